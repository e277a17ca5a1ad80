"""The benchmark runs, and what it counts holds: never a time."""
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import argv, for_script, opd_loss

from configs import load_config
from studies.bench import TABLES, arguments, liger_scheme, main
from studies.toy import folder_of
from support.runtime import run


def bench(*args):
    p = subprocess.run([sys.executable, '-m', 'studies.bench', *args, '--device', 'cpu'], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return p.stdout


def here(capsys, *args):
    """bench.py in this process -> the JSON lines by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['bench.py', *args, '--device', 'cpu'])
        main(arguments())
    return {r['case']: r for r in map(json.loads, re.findall('^{.*', capsys.readouterr().out, re.MULTILINE))}


SMALL = ['--model', 'toy', '--rows', '3', '--tokens', '8', '--batch', '2', '--context', '4', '--repeat', '2']


@pytest.mark.parametrize('what', TABLES)
def test_every_line_of_every_table(what, capsys):
    """Counted, then timed."""
    counts = here(capsys, what, *SMALL, '--count')
    assert len(counts) == {'loss': 5, 'head': 7, 'update': 6, 'decode': 4, 'rollout': 8, 'step': 3}[what]
    assert all(r['peak_mb'] > 0 and r['made_mb'] >= r['largest_mb'] > 0 for r in counts.values())
    for name in counts:
        r = here(capsys, what, *SMALL, '--case', name)[name]
        assert 0 < r['low'] <= r['seconds'] <= r['high'] < 60 and r['torch'] and r['machine']
        assert ('tok/s' in r) == (what not in ('loss', 'head')) and ('limit' in r) == (what == 'decode')


def test_a_process_for_each_line():
    lines = bench('step', *SMALL).splitlines()
    assert 'peak_mb' in lines[1] and [line.split('  ')[0] for line in lines[2:5]] == ['OPRD', 'OPD top-16', 'OPD full KL']
    assert all(json.loads(line)['seconds'] > 0 for line in lines[5:]) and len(lines) == 8


def test_rollouts_of_all_kinds_write_the_same(capsys):
    """Greedy: refilled, in batches, and transformers' generate; equal lengths and spread ones."""
    for lengths in ('equal', 'spread'):
        told = {here(capsys, 'rollout', *SMALL, '--case', f'{lengths}: {who}')[f'{lengths}: {who}']['answers']
                for who in ('refilled', 'static batches', 'transformers')}
        assert len(told) == 1


def test_counts_of_the_loss_path(capsys):
    """Beyond the teacher's rows themselves less than as much again; nothing has the vocabulary's length."""
    got = here(capsys, 'loss', '--model', 'smollm2', '--rows', '40', '--tokens', '200', '--count')
    assert got['fused']['peak/payload'] < 2 < got['selected rows']['peak/payload'] < got['stacked fp32']['peak/payload'] / 4
    assert not any(r['V-axis'] or r['waits'] for r in got.values())


def test_counts_of_an_update_and_a_token(capsys):
    """One forward of the student and one of the teacher; with hidden states alone the one tensor of the
    vocabulary's length is the embedding's gradient; a token is one forward and no wait."""
    for name, r in here(capsys, 'update', '--model', 'toy', '--rows', '2', '--tokens', '8', '--count').items():
        assert r['forwards'] == 2 and (r['V-axis'] == 1) == (name in ('OPRD', 'transformers, Eq. (6)')), name
    got = here(capsys, 'decode', '--model', 'toy', '--batch', '2', '--context', '4', '--count')
    assert (got['2 x 4']['forwards'], got['2 x 4']['waits']) == (1, 0) and got['2 x 4, transformers']['waits'] == 0


def test_bridge_and_pair(toy_dir, tmp_path):
    """Both fits read the same answers: 21 forwards to 1. Pairing of a vocabulary with itself is all exact,
    with the merged one not."""
    keys = [a for a in for_script('bridge.py', argv(toy_dir, 'x', toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged'))
            if '=' in a]
    lines = bench('bridge', '--rows', '20', '--keys', *keys).splitlines()
    got = json.loads(lines[-1])
    assert (got['ridge']['forwards'], got['adamw']['forwards']) == (1, 21) and '21x the forwards' in lines[-2]
    assert got['ridge']['cos'].keys() == got['adamw']['cos'].keys() and got['ridge']['cos'] != got['adamw']['cos']
    folder = folder_of(load_config(['configs/toy.py', *keys]))
    texts = tmp_path / 'texts.txt'
    texts.write_text('3+7=0;0*4=0;\n1*1=1;\n')       # inside 7=, ;0, 4= and 1=
    for teacher, align in (('student', 1), ('teacher', 14 / 18)):
        out = bench('pair', '--tokenizers', str(folder / 'student'), str(folder / teacher), '--data',
                    str(texts), '--repeat', '1')
        got = json.loads(out.splitlines()[-1])
        assert got['align'] == pytest.approx(align) and (got['texts'], got['bytes']) == (2, 18) and got['mb_per_s'] > 0


def test_memory_of_the_head_loss_grows_with_the_chunk_not_with_the_rows():
    """V = 49,152, d = 576, float32, resident set of a process: the head's gradient is 113 MB and a chunk
    of 32 rows of logits 6 MB; whole logits of 512 rows are 101 MB each."""
    def peak(case, rows):
        return json.loads(bench('head', '--model', 'smollm2', '--rows', str(rows), '--chunk', '32', '--repeat', '1',
                                '--case', case))['peak_mb']
    few, many = peak('full KL', 64), peak('full KL', 512)
    assert many < 1.25 * few and many < 113 + 4 * 6.3 + 75               # four chunks; the rest is the libraries'
    assert peak('whole logits', 512) > 3 * many


def test_the_peer_computes_the_same():
    """Liger's scheme, as written down here, is the same loss: the comparison is of like with like."""
    g = torch.Generator().manual_seed(0)
    h, W, h_t, W_t = (torch.randn(n, 6, generator=g) for n in (9, 29, 9, 29))
    w = torch.rand(9, generator=g)
    loss, d_h, d_W = liger_scheme(h, W, h_t, W_t, w)
    a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
    ours, _ = opd_loss(a, b, h_t, W_t, torch.zeros(9, dtype=torch.long), w)
    want = torch.autograd.grad(ours, (a, b))
    assert loss == pytest.approx(ours.item(), rel=1e-5)
    for x, y in zip((d_h, d_W), want, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize('line, says', [
    ('', 'required: what'), ('nope', "invalid choice: 'nope'"), ('loss --rows x', "invalid int value: 'x'"),
    ('loss --nope', 'unrecognized arguments: --nope'), ('decode --batch', 'expected at least one argument'),
    ('pair --tokenizers a', 'expected 2 arguments'), ('loss --device nope', "invalid choice: 'nope'"),
    ('loss --dtype nope', "invalid choice: 'nope'"), ('loss --rows 0', 'begin at 1'),
    ('loss --device cpu --model toy --rows 2 --tokens 4 --case nope', "--case 'nope': no line of this table; choose one of fused"),
])
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, line, says):
    """argparse writes two lines; an unknown device, dtype or case was a traceback."""
    monkeypatch.setattr(sys, 'argv', ['bench.py', *line.split()])
    with pytest.raises(SystemExit) as end:
        run(main, arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith('error: ') and printed.count('\n') == 1 and says in printed
