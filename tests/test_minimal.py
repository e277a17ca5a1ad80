"""The algorithm on one screen is the algorithm that trains."""
import json
import re

import pytest
from conftest import argv

import distill
import minimal
from configs import load_config
from studies import toy
from support.runtime import UserError, start


@pytest.mark.parametrize('kind', ['mse', 'cosine'])
def test_minimal_gives_the_losses_of_distill(kind, toy_dir, tmp_path, capsys):
    """Losses and gradient norms of eight steps, as far as they are printed: minimal.py is read as the definition, so it
    must not drift away from what is trained."""
    keys = dict(rep_loss=kind, steps=8, eval_every=0, save_every=100, eval_data='')
    distill.main(load_config(argv(toy_dir, tmp_path / 'run', **keys)))
    rows = [json.loads(line) for line in (tmp_path / 'run/log.jsonl').read_text().splitlines()][1:]
    capsys.readouterr()
    minimal.main(load_config(argv(toy_dir, 'unused', **keys)))
    printed = re.findall(r'step +(\d+) \| loss ([\d.]+) \| gradient norm ([\d.]+)', capsys.readouterr().out)
    assert [int(step) for step, _, _ in printed] == list(range(1, 9)) and len({loss for _, loss, _ in printed}) == 8
    for row, (_, loss, norm) in zip(rows, printed, strict=True):
        assert float(loss) == pytest.approx(row['loss'], rel=1e-4, abs=2e-6)
        assert float(norm) == pytest.approx(row['grad_norm'], rel=1e-3, abs=2e-4)


def test_what_minimal_cannot_compare_is_refused(toy_dir):
    """It was an assertion, or an error of torch about two sizes, in the first step."""
    with pytest.raises(UserError, match="rep_loss='mes': no such distance"):
        minimal.main(load_config(argv(toy_dir, 'unused', rep_loss='mes')))
    unlike = argv(toy_dir, 'unused', toy_teacher_layers=4, toy_teacher_width=32)
    toy.prepare(load_config(unlike), start('cpu'))
    with pytest.raises(UserError, match='a teacher of width 32 and 4 layers: minimal.py wants'):
        minimal.main(load_config(unlike))
