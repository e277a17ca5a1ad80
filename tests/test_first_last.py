"""Figure 8: the cosine over the first and the last k positions, held against the log of a run and the masks of a step."""
import contextlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_SUMS, argv, for_script, rounding

import bridge
import distill
from configs import load_config
from paper import first_last
from paper.first_last import (
    draw_figure8,
    figure8,
    figure8_data,
    first_and_last,
    open_pair,
    position_cosines,
    started_in,
    values_of_k,
)
from paper.runs import Missing, read_runs
from rollout import Rollout
from step import position_mask, position_weights
from support.runtime import UserError

UNLIKE = dict(toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged', bridge='b', bridge_rank=4)
QUICK = dict(steps=1, eval_data='')


@pytest.fixture(scope='module')
def runs(tmp_path_factory, toy_dir):
    """A folder with two runs of one step, started in it: out/same between models of one architecture, and out/unlike
    through a bridge (b) to a teacher of another vocabulary."""
    root = tmp_path_factory.mktemp('root')
    with contextlib.chdir(root):
        distill.main(load_config(argv(toy_dir, 'out/same', **QUICK)))
        words = argv(toy_dir, 'out/unlike', **QUICK | UNLIKE)
        bridge.main(load_config([*for_script('bridge.py', words), 'bridge_prompts=8'], 'bridge.py'))
        distill.main(load_config(words, 'distill.py'))
    return root


def measured(run):
    with started_in(run.folder, run.config):
        return position_cosines(open_pair(run.config, run.folder))


@pytest.mark.parametrize('name', ['same', 'unlike'])
def test_the_first_answers_are_those_of_the_run_and_the_cosine_is_the_one_in_its_log(runs, name, monkeypatch):
    """Step 1 of the run has logged the cosine of the last layer, over all positions, and the mean length. Another order of
    prompts, another stream of random numbers, one column beside, or states without the bridge would all show here."""
    monkeypatch.setattr(first_last, 'ANSWERS', 7)
    run, = read_runs([runs / 'out' / name])
    cosines, elsewhere, lengths = measured(run)
    assert len(cosines) == 12 == len(elsewhere) == len(lengths)      # two steps of 3 prompts and 2 answers
    row = run.rows[1]
    first_step, answers = cosines[:6], lengths[:6]
    assert float(answers.double().mean()) == pytest.approx(row['len/mean'], rel=1e-6)
    (first,), (last,) = first_and_last(first_step, answers, [1000])
    assert first == last
    assert abs(first - row['rep/cos/3']) < rounding(torch.ones(1), TINY_SUMS)
    assert not torch.equal(cosines[:6], cosines[6:12])                 # the second step has other answers

    # Exactly the positions of the answers have a state; the control has the same ones, and is less alike.
    assert torch.equal(cosines.isfinite(), torch.arange(cosines.shape[1]) < lengths[:, None])
    assert torch.equal(elsewhere.isfinite(), cosines.isfinite())
    assert elsewhere.nanmean() < cosines.nanmean() - 0.05


def test_the_control_is_the_same_position_of_another_answer(runs, tmp_path, monkeypatch, kept):
    """A shift by half of the micro-batch stayed in the same answer where one was longer than the others, or alone."""
    rows = torch.tensor([4, 4, 4, 6, 6, 9, 9, 9, 9])
    assert first_last.in_next_answer(rows).tolist() == [3, 4, 4, 5, 6, 0, 1, 2, 2]
    assert first_last.in_next_answer(rows[:3]).tolist() == [0, 1, 2]         # alone: itself

    # A budget of one token: each answer is a micro-batch of its own, so nothing has a control.
    monkeypatch.setattr(first_last, 'ANSWERS', 6)
    run, = read_runs([runs / 'out/same'])
    cosines, elsewhere, lengths = measured(replace(run, config=run.config | {'token_budget': 1}))
    assert cosines.isfinite().any() and not elsewhere.isfinite().any()
    data = figure8_data({'a': {'b': (cosines, elsewhere, lengths)}})
    assert data['panels']['a']['runs']['b']['another answer'] is None
    draw_figure8(data, tmp_path / 'figure8')
    assert 'another answer: not measured' in ' '.join(kept[0].texts[-1].get_text().split())


def test_first_k_and_last_k_are_the_masks_of_a_step():
    """Against step.position_mask and the weights of Eq. (6), for every k and answers of unequal length. A mean over all
    tokens in place of one over answers, or a last k counted from the longest answer, would differ."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 1, 4, 6])
    prompts = torch.tensor([3, 5, 1, 2])
    cosines = torch.rand(4, 9, generator=generator, dtype=torch.float64) * 2 - 1
    cosines[torch.arange(9) >= lengths[:, None]] = math.nan
    ids = torch.zeros(4, 12, dtype=torch.long)
    roll = Rollout(ids, prompts, lengths, torch.ones(4, dtype=torch.bool), torch.arange(4))
    in_columns = torch.zeros(4, 12, dtype=torch.float64)
    for row in range(4):
        for t in range(lengths[row]):
            in_columns[row, prompts[row] - 1 + t] = cosines[row, t]
    ks = list(range(1, 10))
    found = first_and_last(cosines, lengths, ks)
    for which, means in zip(('first_k', 'last_k'), found, strict=True):
        for k, mean in zip(ks, means, strict=True):
            weights = position_weights(position_mask(roll, which, k)).double()
            assert abs(float((weights * in_columns).sum()) - mean) < 1e-7        # the weights are float32


def test_positions_without_a_state_are_left_out():
    """A teacher whose context is too short has none at the end, and a NaN must not spread into the mean."""
    nan = math.nan
    cosines = torch.tensor([[1.0, nan, 0.5, nan], [nan, nan, 0.2, nan], [nan, nan, nan, nan]], dtype=torch.float64)
    first, last = first_and_last(cosines, torch.tensor([4, 3, 2]), [1, 2, 3, 4])
    assert first == [1.0, 1.0, pytest.approx((0.75 + 0.2) / 2), pytest.approx((0.75 + 0.2) / 2)]
    assert last == [0.2, pytest.approx((0.5 + 0.2) / 2), pytest.approx((0.5 + 0.2) / 2), pytest.approx((0.75 + 0.2) / 2)]


def test_the_values_of_k():
    """All of a short answer; of a long one at most 60, with both ends."""
    assert values_of_k(41) == list(range(1, 42))
    ks = values_of_k(16384)
    assert ks[0] == 1 and ks[-1] == 16384 and len(ks) <= 60 and ks == sorted(set(ks))


def panel(shift=0.0):
    cosines = torch.tensor([[0.9, 0.7, math.nan], [0.8, 0.6, 0.4]], dtype=torch.float64) + shift
    return cosines, cosines - 0.5, torch.tensor([2, 3])


def test_the_numbers_of_the_figure():
    """By hand: means over the answers of their means over positions."""
    data = figure8_data({'same architecture': {'out/a': panel(), 'out/b': panel(0.1)}})
    numbers = data['panels']['same architecture']
    assert numbers['k'] == [1, 2, 3] and numbers['answers'] == 4 and numbers['answers of k tokens'] == [4, 4, 2]
    assert numbers['runs']['out/a']['first'] == pytest.approx([0.85, 0.75, 0.7])
    assert numbers['runs']['out/a']['last'] == pytest.approx([0.55, 0.65, 0.7])
    assert numbers['runs']['out/a']['another answer'] == pytest.approx(0.2)
    assert numbers['runs']['out/b']['first'] == pytest.approx([0.95, 0.85, 0.8])
    json.dumps(data, allow_nan=False)


def test_the_figure_draws_these_numbers_and_the_same_bytes_twice(tmp_path, kept):
    data = figure8_data({'same architecture': {'a': panel(), 'b': panel(0.1)}, 'through a bridge': {'c': panel(0.2)}})
    files = draw_figure8(data, tmp_path / 'figure8')
    left, right = kept[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines['first k tokens'] == pytest.approx([0.9, 0.8, 0.75]) and lines['last k tokens'] == pytest.approx([0.6, 0.7, 0.75])
    assert right.get_title() == 'through a bridge'
    notes = ' '.join(kept[0].texts[-1].get_text().split())
    assert '4 answers of 2 seeds (thin: each), 2 answers of one seed; cosine to the state at the same position of another answer: 0.25, 0.40' in notes
    again, = draw_figure8(data, tmp_path / 'again.png')
    assert [file.suffix for file in files] == ['.png', '.pdf'] and files[0].read_bytes() == again.read_bytes()


def test_one_command_measures_a_panel_for_each_kind_of_pair(runs, tmp_path, monkeypatch):
    """From any folder, because the paths in a run's config begin where it was started; and a run is measured once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_last, 'ANSWERS', 6)
    folders = [runs / 'out/same', runs / 'out/unlike', runs / 'b']
    files = figure8(folders, 'to')
    assert [file.name for file in files] == ['first_last.json', 'figure8.png', 'figure8.pdf'] and (tmp_path / 'to/figure8.pdf').exists()
    panels = json.loads(files[0].read_text())['panels']
    assert list(panels) == ['same architecture', 'another vocabulary, r = 4']
    assert [list(numbers['runs']) for numbers in panels.values()] == [[str(folders[0])], [str(folders[1])]]


def test_paths_begin_where_the_run_was_started(tmp_path, monkeypatch):
    """The folder from which out_dir leads to the run; of an absolute out_dir every folder does, and the root was taken."""
    (tmp_path / 'a/out/x').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for folder, out_dir, wanted in (('a/out/x', 'out/x', tmp_path / 'a'), ('a/out/x', 'out/y', tmp_path), ('a/out/x', 'a/out/x', tmp_path),
                                    ('a/out/x', str(tmp_path / 'a/out/x'), tmp_path)):
        with started_in(folder, {'out_dir': out_dir}):
            assert Path.cwd() == wanted
        assert Path.cwd() == tmp_path


def test_a_pair_that_no_run_has_is_given_by_its_keys(runs, toy_cfg, tmp_path, monkeypatch):
    """The same two models, by path: the same numbers as of the run."""
    monkeypatch.setattr(first_last, 'ANSWERS', 6)
    monkeypatch.setattr(first_last, 'draw_figure8', lambda data, file: [])
    monkeypatch.chdir(tmp_path)
    words = dict(student=toy_cfg['student'], teacher=toy_cfg['teacher'], data=toy_cfg['data'], max_new_tokens='20')
    (tmp_path / 'mine.py').write_text('from configs.default import config\nconfig = config | dict(prompts_per_step=3, n=2, dtype="float32")\n')
    figure8([], 'pair', config='mine.py', **words)
    panels = json.loads((tmp_path / 'pair/first_last.json').read_text())['panels']
    run, = read_runs([runs / 'out/same'])
    assert panels == figure8_data({'same architecture': {words['student']: measured(run)}})['panels']
    with pytest.raises(UserError, match='a run folder says itself'):
        figure8([runs / 'out/same'], 'x', **words)


def test_what_cannot_be_measured_is_said(runs, tmp_path, monkeypatch, toy_dir):
    """In one line: nothing to measure, unlike models without a bridge, models that are gone or are not those of the run."""
    with pytest.raises(Missing, match='configs/toy.py makes one'):
        figure8([], tmp_path)
    unlike = load_config(argv(toy_dir, 'x', **UNLIKE | dict(bridge='')))
    with pytest.raises(Missing, match=r'widths \(24 and 32\) or vocabularies.*bridge=FOLDER'):
        open_pair(unlike)
    shutil.copytree(runs / 'out/same', tmp_path / 'moved')
    file = tmp_path / 'moved/config.json'
    stored = json.loads(file.read_text())
    stored['config']['toy_dir'] = 'gone'
    file.write_text(json.dumps(stored))
    with pytest.raises(Missing, match="the toy's models are not there"):
        figure8([tmp_path / 'moved'], tmp_path / 'to')
    starts = (runs / 'out/same/starts.jsonl').read_text()
    row = json.loads(starts.splitlines()[0])
    shutil.copytree(runs / 'out/same', tmp_path / 'other')
    (tmp_path / 'other/starts.jsonl').write_text(json.dumps(row | {'teacher': 'another'}) + '\n')
    with pytest.raises(UserError, match='not the teacher that .*other began with'):
        figure8([tmp_path / 'other'], tmp_path / 'to')
    assert not (tmp_path / 'to').exists()
