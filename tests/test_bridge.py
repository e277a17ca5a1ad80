"""Stage 1: closed forms against least squares on the rows themselves, Theorem 3 against its definition."""
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    argv,
    assert_all_measured,
    evaluate,
    for_script,
    log_of,
    step_sums,
    tiny_model,
    with_other_stop,
)
from safetensors import safe_open
from safetensors.torch import save_file
from test_losses import rollout

import bridge
import distill
import eval_math
from bridge import main
from bridge_parts import collection, report, saved
from bridge_parts.closed_form import (
    LayerBridge,
    Moments,
    cosine_sums,
    energy,
    predicted_share,
    principal_directions,
    ridge,
)
from bridge_parts.saved import Bridge, load_bridge
from configs import load_config
from cross_tokenizer.next_byte import NextByte
from cross_tokenizer.pairing import Reading
from formats.huggingface import load_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer
from losses import BridgeTerm, bridge_loss
from output_losses import OutputTerm, make_objective, opd_rows
from step import Objective, accumulate, cut_rollout, diagnose, micro_batches, position_mask, position_weights
from studies import toy
from studies.toy import folder_of
from support.files import owned, read_json
from support.jsonl import append_row, read_rows
from support.runtime import ROOT, UserError, run, start
from teacher import hidden_rows

N, D_S, D_T = 300, 5, 7


def rows(seed=0, n=N):
    """Student and teacher rows that share three directions, means that are not 0, two classes that relate
    differently."""
    g = torch.Generator().manual_seed(seed)
    shared, inside = torch.randn(n, 3, generator=g, dtype=torch.float64), torch.rand(n, generator=g) < 0.3
    a, b, c = (torch.randn(3, d, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k, d in ((5, D_S), (6, D_T), (7, D_T)))
    x = shared @ a + 0.3 * torch.randn(n, D_S, generator=g, dtype=torch.float64) + 2
    y = torch.where(inside[:, None], shared @ c, shared @ b) + 0.2 * torch.randn(n, D_T, generator=g, dtype=torch.float64) - 3
    return x, y, inside


def summed(x, y, inside, chunk=37):
    m = Moments(D_S, D_T, 'cpu')
    for i in range(0, len(x), chunk):
        m.add(x[i:i + chunk], y[i:i + chunk], inside[i:i + chunk])
    return m


def test_principal_directions():
    """Against the SVD of the centred rows; the signs do not depend on the solver's mood."""
    x, y, inside = rows()
    mean, P_t, lam = principal_directions(summed(x, y, inside))
    _, S, V = torch.linalg.svd(y - y.mean(0), full_matrices=False)
    assert torch.allclose(mean, y.mean(0)) and torch.allclose(lam, S**2 / N)
    assert torch.allclose(P_t.abs(), V.abs(), atol=1e-8) and torch.allclose(P_t @ P_t.t(), torch.eye(D_T, dtype=y.dtype))
    assert (P_t.gather(1, P_t.abs().argmax(1, keepdim=True)) > 0).all()
    _, P2, _ = principal_directions(summed(x, -y, inside))
    assert torch.allclose(P2, P_t, atol=1e-8)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('penalty', [0.0, 0.5])
def test_closed_form_equals_least_squares_at_every_rank(bias, penalty):
    """Each class on its own rows: torch.linalg.lstsq in float64 with the penalty as extra rows; solving
    at rank r alone gives the first r rows."""
    x, y, inside = rows()
    m = summed(x, y, inside)
    mean, P_t, _ = principal_directions(m)
    P_s, b_s = ridge(m, mean, P_t, penalty, bias)
    z = (y - mean) @ P_t.t()
    for c in (0, 1):
        at = inside == c
        a, b = x[at], z[at]
        mx, mz = (a.mean(0), b.mean(0)) if bias else (torch.zeros(D_S), torch.zeros(D_T))
        a, b = a - mx, b - mz
        damp = (penalty * a.square().mean() * len(a)).sqrt()
        a, b = torch.cat([a, damp * torch.eye(D_S, dtype=a.dtype)]), torch.cat([b, torch.zeros(D_S, D_T, dtype=b.dtype)])
        want = torch.linalg.lstsq(a, b, driver='gelsd').solution.t()
        assert (P_s[c] - want).abs().max() < 1e-6
        assert torch.allclose(b_s[c], mz - want @ mx if bias else torch.zeros(D_T, dtype=x.dtype), atol=1e-6)
        few, _ = ridge(m, mean, P_t[:2], penalty, bias)
        assert torch.allclose(few, P_s[:, :2])


def test_a_class_without_rows_gets_zeros():
    x, y, _ = rows()
    m = summed(x, y, torch.zeros(N, dtype=torch.bool))
    mean, P_t, _ = principal_directions(m)
    P_s, b_s = ridge(m, mean, P_t, 1e-4, True)
    assert (P_s[1] == 0).all() and (b_s[1] == 0).all() and P_s[0].abs().max() > 0


def test_what_is_predicted_on_held_out_rows():
    """rho^2 from moments against residuals of the rows; energy against Theorem 3's sums."""
    m = summed(*rows())
    mean, P_t, _ = principal_directions(m)
    P_s, b_s = ridge(m, mean, P_t, 1e-4, True)
    x, y, inside = rows(seed=1)
    lam, rho2 = predicted_share(summed(x, y, inside), LayerBridge(mean, P_t, P_s, b_s))
    z = (y - mean) @ P_t.t()
    guess = torch.where(inside[:, None], x @ P_s[1].t() + b_s[1], x @ P_s[0].t() + b_s[0])
    assert torch.allclose(lam, z.var(0, correction=0))
    assert torch.allclose(rho2, (1 - (z - guess).square().mean(0) / lam).clamp(min=0))
    assert rho2[:2].min() > 0.5 > rho2[-1]
    E = energy(lam, rho2)
    for r in range(1, D_T + 1):
        assert E[r - 1] == pytest.approx(float((lam * rho2)[r:].sum() + (lam * (1 - rho2))[:r].sum()))
    steps = E[1:] - E[:-1]
    assert [bool(s < 0) for s in steps] == [bool(p > 0.5) for p in rho2[1:]], 'a direction pays while rho^2 > 1/2'


def test_cosines_at_every_rank():
    a, b = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for r in range(1, 5):
        assert cosine_sums(a, b)[r - 1] == pytest.approx(float(torch.cosine_similarity(a[:, :r], b[:, :r]).sum()), rel=1e-5)


# ---- the script on the tiny toy, a teacher of another depth, width and vocabulary -----------------

def args(toy_dir, out, **keys):
    """Command line of bridge.py, whose folder is `out`."""
    unlike = dict(toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged', bridge_prompts=30)
    return argv(toy_dir, 'unused', **unlike | dict(bridge=out) | keys)


@pytest.fixture(scope='module')
def made(toy_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp('b') / 'whole'
    main(load_config(args(toy_dir, out, eval_rows=7)))
    return out


def tensors(out):
    with safe_open(out / 'bridge.safetensors', 'pt') as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()['bridge'])        # noqa: SIM118


def test_what_stage_1_writes(made, toy_dir):
    """Every layer pair of Eq. (11), both classes, every rank; figures per layer; each answer read once."""
    got, about = tensors(made)
    assert about['phi'] == {'1': 1, '2': 3, '3': 4} and about['d'] == [24, 32] and about['L'] == [3, 4]
    assert {k: tuple(v.shape) for k, v in got.items() if k.endswith('.2')} == {
        'mean.2': (32,), 'P_t.2': (24, 32), 'P_s.2': (2, 24, 24), 'b_s.2': (2, 24)}
    figures = read_json(made / 'bridge.json')
    assert figures['forwards per answer'] == 1 and 0.5 < figures['align'] < 0.95 and figures['rank'] == about['rank']
    for layer in figures['layers'].values():
        assert set(layer['cos']) == {'1', '2', '4', '8', '16', '24', str(figures['used'])} and layer['explained']['24'] <= 1
    assert (made / 'bridge.png').read_bytes().startswith(b'\x89PNG')
    assert len((made / 'rollouts.jsonl').read_text().splitlines()) == 31


def test_rank_r_is_the_first_r_rows(made):
    """Of everything that is saved, per layer. The last rows of P_t are the directions of least variance."""
    got, about = tensors(made)
    for rank, wanted in ((5, 5), (24, 24), (0, about['rank'])):
        face = load_bridge(made, rank, [1, 3], {'d': [24, 32]}, 'cpu')
        assert face.rank == wanted and face.layer_map == {1: 1, 3: 4}
        for l in (1, 3):
            assert torch.equal(face.mean[l], got[f'mean.{l}']) and torch.equal(face.P_t[l], got[f'P_t.{l}'][:wanted])
            assert torch.equal(face.P_s[l], got[f'P_s.{l}'][:, :wanted]) and torch.equal(face.b_s[l], got[f'b_s.{l}'][:, :wanted])
    y = torch.randn(9, 32)
    assert torch.allclose(load_bridge(made, 5, [2], {}, 'cpu').teacher(2, y), (y - got['mean.2']) @ got['P_t.2'][:5].t())


def test_all_ranks_are_judged_and_some_are_saved(made, toy_dir, tmp_path, monkeypatch):
    """The first SAVED_ROWS, or as many as the rank that is used or Theorem 3's needs; a rank that was judged and not
    saved, and one that was not fitted, are errors of their own. Guards against a file that keeps the last rows, those of
    the least variance."""
    monkeypatch.setattr(saved, 'SAVED_ROWS', 6)
    for asked, rows_saved in ((4, 6), (9, 9)):
        out = tmp_path / str(asked)
        shutil.copytree(made, out)
        main(load_config(args(toy_dir, out, bridge_rank=asked)))
        got, about = tensors(out)
        figures = read_json(out / 'bridge.json')
        assert about['rank'] <= 6 and about['ranks'] == 24 and len(got['P_t.1']) == rows_saved, 'as this test needs'
        whole, _ = tensors(made)
        for name, first in (('P_t', whole['P_t.1'][:rows_saved]), ('P_s', whole['P_s.1'][:, :rows_saved]),
                            ('b_s', whole['b_s.1'][:, :rows_saved])):
            assert torch.allclose(got[f'{name}.1'], first, rtol=1e-4, atol=1e-5), name
        assert figures['used'] == asked and {'16', '24'} <= set(figures['layers']['1']['cos'])
        with pytest.raises(UserError, match=f'holds ranks 1 to {rows_saved} of 24, but bridge_rank=10; lower it, or rerun'):
            load_bridge(out, 10, [1], {}, 'cpu')
        with pytest.raises(UserError, match='fitted for ranks 1 to 24, but bridge_rank=25; lower it'):
            load_bridge(out, 25, [1], {}, 'cpu')
    monkeypatch.setattr(report, 'theorem_3_rank', lambda judged: 20)
    main(load_config(args(toy_dir, tmp_path / '4', bridge_rank=4)))
    assert len(tensors(tmp_path / '4')[0]['P_t.1']) == 20 and load_bridge(tmp_path / '4', 0, [1], {}, 'cpu').rank == 20


def test_collecting_goes_on_where_it_stopped(made, toy_dir, tmp_path, monkeypatch):
    """Cut in the middle of a line: the same answers, and the same bridge to the bit; whole answers are
    not sampled again. A line that was damaged is an error, as is another student's file."""
    out = tmp_path / 'cut'
    out.mkdir()
    text = (made / 'rollouts.jsonl').read_text()
    (out / 'rollouts.jsonl').write_text(text[:len(text) // 2])
    whole, sampled = text[:len(text) // 2].count('\n') - 1, []
    real = bridge.sample
    monkeypatch.setattr(bridge, 'sample', lambda model, prompts, **k: sampled.extend(prompts) or real(model, prompts, **k))
    main(load_config(args(toy_dir, out)))
    assert (out / 'rollouts.jsonl').read_text() == text and len(sampled) == 30 - whole
    a, b = tensors(made)[0], tensors(out)[0]
    assert all(torch.equal(a[k], b[k]) for k in b)
    (out / 'rollouts.jsonl').write_text(text.replace('\n{', '\n[{', 1))
    with pytest.raises(UserError, match='rollouts.jsonl:2: damaged; delete the file'):
        main(load_config(args(toy_dir, out)))
    with pytest.raises(UserError, match='sampled with other settings'):
        main(load_config(args(toy_dir, made, temperature=0.5)))


def write_rows(file, rows):
    """A rollouts.jsonl with the checksums that bridge.py writes."""
    with file.open('w') as opened:
        for row in rows:
            append_row(opened, row, crc=True)


FOREIGN = {      # what is done to the rows after the first -> what is said of it
    'doubled': (lambda rows: [rows[0], *rows], 'line 3 is not the answer that belongs there'),
    'dropped': (lambda rows: rows[1:], 'line 2 is not the answer that belongs there'),
    'one too many': (lambda rows: [*rows, rows[0]], 'line 32 is not the answer that belongs there'),
    'in another order': (lambda rows: rows[::-1], 'line 2 is not the answer that belongs there'),
    'a problem that there is not': (lambda rows: [rows[0] | {'problem': 10**9}, *rows[1:]], 'line 2 is not the answer'),
    'without stopped': (lambda rows: [{k: rows[0][k] for k in ('problem', 'ids')}, *rows[1:]], 'line 2: stopped is missing; wants true or false'),
    'an id beyond the vocabulary': (lambda rows: [rows[0] | {'ids': [10**9, *rows[0]['ids'][1:]]}, *rows[1:]],
                                    r'line 2: ids = \[1000000000, .*, each entry a whole number from 0 to 20'),
    'an id below 0': (lambda rows: [rows[0] | {'ids': [-1, *rows[0]['ids'][1:]]}, *rows[1:]], r'ids = \[-1, '),
    'true is no id': (lambda rows: [rows[0] | {'ids': [True, *rows[0]['ids'][1:]]}, *rows[1:]], r'ids = \[True, '),
    'an id with a fraction': (lambda rows: [rows[0] | {'ids': [1.0, *rows[0]['ids'][1:]]}, *rows[1:]], r'ids = \[1.0, '),
    'no ids': (lambda rows: [rows[0] | {'ids': []}, *rows[1:]], r'ids = \[\]; wants a list of length from 1 to 20'),
    'ids beyond the limit': (lambda rows: [rows[0] | {'ids': [4] * 21, 'stopped': False}, *rows[1:]], 'wants a list of length from 1 to 20'),
    'cut before the limit': (lambda rows: [rows[0] | {'ids': [4, 4], 'stopped': False}, *rows[1:]], 'line 2 is not the answer'),
    'stopped at no stop token': (lambda rows: [rows[0] | {'ids': [4, 4], 'stopped': True}, *rows[1:]], 'line 2 is not the answer'),
    'null': (lambda rows: [rows[0] | {'stopped': None}, *rows[1:]], 'stopped = None; wants true or false'),
    'nothing': (lambda rows: [{}, *rows[1:]], 'line 2: problem is missing'),
}


@pytest.mark.parametrize('change, says', FOREIGN.values(), ids=FOREIGN)
def test_rows_that_do_not_belong_to_a_collection_are_refused(made, toy_dir, tmp_path, change, says):
    """Some were read as answers, and an id of 10**9 is an IndexError in the embedding. Nothing is written."""
    out = tmp_path / 'b'
    out.mkdir()
    head, *rows = read_rows(made / 'rollouts.jsonl', crc=True)
    write_rows(out / 'rollouts.jsonl', [head, *change(rows)])
    before = (out / 'rollouts.jsonl').read_bytes()
    with pytest.raises(UserError, match=says) as error:
        main(load_config(args(toy_dir, out)))
    assert '\n' not in str(error.value) and len(str(error.value)) < 250 + len(str(out))
    assert (out / 'rollouts.jsonl').read_bytes() == before and os.listdir(out) == ['rollouts.jsonl']


def test_every_flipped_bit_of_a_collection_is_found(made, toy_dir, tmp_path):
    """One wrong digit is another id, and gave another bridge without a word. Bytes that are not UTF-8 are damage too."""
    good = (made / 'rollouts.jsonl').read_bytes()
    head, *_ = read_rows(made / 'rollouts.jsonl', crc=True)
    order = [row['problem'] for row in read_rows(made / 'rollouts.jsonl', crc=True)[1:]]
    file = tmp_path / 'rollouts.jsonl'
    file.write_bytes(good)
    assert len(collection.read_answers(file, head, order, [2], 21, 20)[0]) == 30
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(good) - 1, (200,), generator=generator).tolist():
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=r'rollouts.jsonl:\d+: damaged; delete the file to sample anew'):
            collection.read_answers(file, head, order, [2], 21, 20)


def test_a_collection_that_goes_on_the_next_day_asks_as_on_the_first(made, toy_dir, tmp_path, monkeypatch):
    """Templates that write the date would change the prompts of the answers that are there. With date= given, answers of
    another day are refused."""
    told = []
    load = bridge.load_tokenizer
    monkeypatch.setattr(bridge, 'load_tokenizer', lambda path, **how: told.append(how['date']) or load(path, **how))
    head, *rows = read_rows(made / 'rollouts.jsonl', crc=True)
    (tmp_path / 'b').mkdir()
    write_rows(tmp_path / 'b/rollouts.jsonl', [head | {'date': '2020-02-29'}, *rows[:9]])
    main(load_config([*args(toy_dir, tmp_path / 'b'), '--dry-run']))
    assert told == ['2020-02-29'] * 2
    with pytest.raises(UserError, match='sampled with other settings'):
        main(load_config([*args(toy_dir, tmp_path / 'b'), 'date=2021-01-01', '--dry-run']))
    assert told[2:] == ['2021-01-01'] * 2
    main(load_config([*args(toy_dir, tmp_path / 'c'), 'date=2021-01-01', '--dry-run']))
    write_rows(tmp_path / 'b/rollouts.jsonl', [head | {'date': 20200229}, *rows[:9]])
    with pytest.raises(UserError, match='the first row: date = 20200229; wants a text of length 10'):
        main(load_config(args(toy_dir, tmp_path / 'b')))


def test_a_dry_run_shows_the_plan_and_writes_nothing(toy_dir, made, tmp_path, capsys, monkeypatch):
    """It made the whole bridge. What a run refuses is refused, and no weights are loaded."""
    monkeypatch.setattr(bridge, 'load_model', None)
    main(load_config([*args(toy_dir, tmp_path / 'b'), '--dry-run']))
    out = capsys.readouterr().out
    assert 'plan: 30 answers of up to 20 tokens, 0 of them there, 3 held out; student layer -> teacher layer: {1: 1, 2: 3, 3: 4}' in out
    main(load_config([*args(toy_dir, made), '--dry-run']))
    assert '30 answers of up to 20 tokens, 30 of them there' in capsys.readouterr().out
    main(load_config([*args(toy_dir, tmp_path / 'b', toy_layers=2), '--dry-run']))
    assert 'dry run: a run makes' in capsys.readouterr().out
    for keys, says in ((dict(max_new_tokens=10**6), 'lower max_new_tokens'), (dict(layers=[9]), r'layers=\[9\]'),
                       (dict(bridge_prompts=2, bridge_held_out=0.9), 'raise bridge_prompts')):
        with pytest.raises(UserError, match=says):
            main(load_config([*args(toy_dir, tmp_path / 'b', **keys), '--dry-run']))
    assert os.listdir(tmp_path) == []


def test_only_a_folder_of_a_bridge_is_written_to(toy_dir, made, tmp_path):
    """bridge= with the folder of a run, or of something else, would mix its files with those. Two bridges at once in one
    folder would both append to its answers."""
    for name in ('notes', 'run'):
        (tmp_path / name).mkdir()
    (tmp_path / 'notes/rollouts.txt').write_text('mine')
    (tmp_path / 'file').write_text('')
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'broken').symlink_to('nothing')
    for folder, says in (('notes', "holds 'rollouts.txt' and no bridge"), ('file', 'not a folder'), ('run', 'is out_dir as well'),
                         ('loop', 'cannot be made'), ('broken', 'cannot be made')):
        with pytest.raises(UserError, match=says):
            main(load_config(args(toy_dir, tmp_path / folder, out_dir=tmp_path / 'notes/../run')))
    assert os.listdir(tmp_path / 'notes') == ['rollouts.txt'] and os.listdir(tmp_path / 'run') == []
    saved.check_folder(tmp_path / 'run', 'x')
    saved.check_folder(made, 'x')
    for name in ('loop', 'loop/x', 'a/' + 'x' * 300):                        # a RuntimeError, or the folder `a` was made
        with pytest.raises(UserError, match='cannot be made'):
            saved.check_folder(tmp_path / name, 'x')
    shutil.copy(made / 'rollouts.jsonl', tmp_path / 'run')
    with owned(tmp_path / 'run'):
        p = subprocess.run([sys.executable, 'bridge.py', *for_script('bridge.py', args(toy_dir, tmp_path / 'run'))], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 2 and f'in use by process {os.getpid()} on' in p.stderr and p.stderr.count('\n') == 1


def test_what_is_not_finite_is_not_saved(made, toy_dir, tmp_path, monkeypatch):
    """A fit that diverged, models with NaN weights, a figure without a number: one line each, and no file. NaN is not
    JSON, and a bridge that holds it makes NaN of the student."""
    for name in ('adamw', 'weights', 'figure'):
        (tmp_path / name).mkdir()
        shutil.copy(made / 'rollouts.jsonl', tmp_path / name)

    def refused(name, says, **keys):
        with pytest.raises(UserError, match=says):
            main(load_config(args(toy_dir, tmp_path / name, **keys)))
        assert sorted(os.listdir(tmp_path / name)) == ['.lock', 'rollouts.jsonl']
    with monkeypatch.context() as patch:
        patch.setattr(bridge, 'adamw_fit', lambda pair, answers, fitted, *a: {
            l: (part.P_s * float('nan'), part.b_s) for l, part in fitted.items()})
        refused('adamw', 'layer 1: the fit diverged; lower bridge_lr=', bridge_fit='adamw')
    load = bridge.load_model

    def broken(path, *a):
        model = load(path, *a)
        next(model.parameters()).data[3] = float('nan')
        return model
    with monkeypatch.context() as patch:
        patch.setattr(bridge, 'load_model', broken)
        refused('weights', 'layer 1: states that are NaN or infinite; look at the weights')
    monkeypatch.setattr(bridge, 'report', lambda *a: report.report(*a) | {'more': float('nan')})
    refused('figure', 'what was measured is NaN or infinite, so nothing is saved')


def test_answers_end_at_the_stop_tokens_of_both_models(toy_dir, toy_cfg, tmp_path):
    """As in training, where both have one vocabulary. Guards against a bridge that is fitted to what the student writes
    beyond the teacher's stop token, which no training run ever sees."""
    teacher = with_other_stop(toy_cfg['teacher'], tmp_path / 'teacher')
    main(load_config(argv(toy_dir, 'unused', bridge=tmp_path / 'b', bridge_prompts=9, teacher=teacher)))
    answers = [row['ids'] for row in read_rows(tmp_path / 'b/rollouts.jsonl', crc=True)[1:]]
    assert len(answers) == 9 and not any({2, 20} & set(ids[:-1]) for ids in answers)
    assert 20 in {ids[-1] for ids in answers}


def test_what_was_collected_survives_a_full_disk(made, toy_dir, tmp_path, monkeypatch):
    """The file is not touched where nothing changes, and is replaced as a whole where its last line was cut off:
    rewriting it in place lost answers when the disk was full."""
    out = tmp_path / 'full'
    out.mkdir()
    file = out / 'rollouts.jsonl'
    text = (made / 'rollouts.jsonl').read_text()
    file.write_text(text)
    before = file.stat()
    main(load_config(args(toy_dir, out)))
    after = file.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)

    room = [3]

    def full_disk(lines, row, crc):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, os.strerror(28), lines.name)
        lines.write(json.dumps(row) + '\n')
        lines.flush()
    file.write_text(text[:-9])
    monkeypatch.setattr(collection, 'append_row', full_disk)
    with pytest.raises(OSError, match='No space'):
        main(load_config(args(toy_dir, out)))
    assert file.read_text() == text[:-9]


def test_a_teacher_of_the_same_vocabulary_reads_the_students_ids(toy_cfg, tmp_path):
    """As it does in distill.py, whatever its own chat template says. A bridge was fitted to states that had read the
    teacher's rendering of the prompt, and then used on states that had read the student's."""
    shutil.copytree(toy_cfg['student'], tmp_path / 'teacher')
    (tmp_path / 'teacher/chat_template.jinja').write_text("{% for m in messages %}9+9={{ m['content'] }}{% endfor %}=")
    tok_s, tok_t = load_tokenizer(toy_cfg['student']), load_tokenizer(tmp_path / 'teacher')
    problems = load_problems(toy_cfg['data'], tok_s)[:2]
    assert tok_t.chat(problems[0].question) != problems[0].ids
    pair = bridge.Pair(None, SimpleNamespace(config=SimpleNamespace(context=512)), tok_s, tok_t, problems, {}, toy_cfg, None)
    roll = bridge.as_rollout([collection.Answer(0, tok_s.encode('1+2=3;'), False), collection.Answer(1, tok_s.encode('4'), False)],
                             problems, 'cpu')
    reading = pair.as_teacher_reads(roll)
    assert torch.equal(reading.ids, roll.ids) and reading.align == 1 and not reading.inside.any()


def test_two_ranks_make_the_same_bridge(made, toy_dir, tmp_path):
    """To 1e-10, where each answer is a forward of its own: a float32 forward is not the same to the bit in
    another batch."""
    shutil.copytree(made, tmp_path / 'one')
    main(load_config(args(toy_dir, tmp_path / 'one', token_budget=1)))
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'bridge.py',
                        *for_script('bridge.py', args(toy_dir, tmp_path / 'two', token_budget=1))], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    assert (tmp_path / 'two/rollouts.jsonl').read_text() == (made / 'rollouts.jsonl').read_text()
    one, two = (read_json(out / 'bridge.json') for out in (tmp_path / 'one', tmp_path / 'two'))
    for l, layer in one['layers'].items():
        assert two['layers'][l]['variance'] == pytest.approx(layer['variance'], rel=1e-10)
        for key in ('rho2', 'cos', 'R2', 'explained', 'E', 'before', 'mean_only'):
            assert two['layers'][l][key] == pytest.approx(layer[key], abs=1e-10), key
    a, b = tensors(tmp_path / 'one')[0], tensors(tmp_path / 'two')[0]
    assert all((a[k] - b[k]).abs().max() < 1e-6 * a[k].abs().max() for k in a), 'float32 in the file'


def test_ridge_is_at_least_as_good_as_twenty_epochs(made, toy_dir, tmp_path):
    """Algorithm 1's fit reads everything 21 times (once for P_T) and is no better in held-out R^2, at the rate of 1e-3. (The
    tiny toy has so few rows that a larger rate overfits less than ridge does.)"""
    out = tmp_path / 'adamw'
    out.mkdir()
    (out / 'rollouts.jsonl').write_text((made / 'rollouts.jsonl').read_text())
    main(load_config(args(toy_dir, out, bridge_fit='adamw', bridge_lr=1e-3)))
    ours, theirs = (read_json(f / 'bridge.json') for f in (made, out))
    assert theirs['forwards per answer'] == 21
    for l, layer in ours['layers'].items():
        assert sum(layer['R2'].values()) >= sum(theirs['layers'][l]['R2'].values())


def test_control_random(made, toy_dir, tmp_path):
    """The same P_T, a P_S of noise for both classes, no bias."""
    shutil.copytree(made, tmp_path / 'random')
    main(load_config(args(toy_dir, tmp_path / 'random', bridge_fit='random')))
    real, (got, told) = tensors(made)[0], tensors(tmp_path / 'random')
    assert told['bridge_fit'] == 'random' and (got['P_t.3'] - real['P_t.3']).abs().max() < 1e-6
    assert torch.equal(*got['P_s.3']) and got['P_s.3'].std() == pytest.approx(24**-0.5, rel=0.2)
    assert (got['b_s.3'] == 0).all()


def fake_pair(monkeypatch, x, y, layer_map, parts, inside=None):
    """A Pair whose models' states are x {l: rows} and y {t: rows}, read in `parts` batches."""
    inside = torch.zeros(len(x[1]), dtype=torch.bool) if inside is None else inside
    env = SimpleNamespace(device='cpu', world=1)
    models = (SimpleNamespace(config=SimpleNamespace(L=len(m), d=m[1].shape[1])) for m in (x, y))
    pair = bridge.Pair(*models, None, None, [], layer_map, {}, env)
    read = [({l: v[i::parts] for l, v in x.items()}, {l: v[i::parts] for l, v in y.items()},
             inside[i::parts]) for i in range(parts)]
    monkeypatch.setattr(pair, 'read', lambda *a: iter(read))
    return pair


def test_control_shuffled(monkeypatch):
    """Pairs torn within each batch; what each side looks like by itself stays."""
    x, y, _ = rows()
    pair = fake_pair(monkeypatch, {1: x}, {1: y}, {1: 1}, 3)
    torn, whole = (pair.moments([], 'fit', shuffle)[1].sums for shuffle in (True, False))
    want = sum(y[i::3].roll(50, 0).t() @ x[i::3] for i in range(3))
    assert torch.allclose(torn['yx'][0], want) and not torch.allclose(torn['yx'], whole['yx'])
    assert torch.allclose(torn['yy'], whole['yy']) and torch.equal(torn['xx'], whole['xx'])


FIT = dict(bridge_ridge=1e-4, bridge_bias=True, bridge_lr=1e-3, seed=0)


def test_a_shuffled_fit_is_the_fit_of_shuffled_pairs(monkeypatch):
    """bridge_fit='shuffled' against the closed form on pairs that are torn apart by hand. If nothing were
    shuffled, the control would be as good as the bridge."""
    x, y, inside = rows()
    pair = fake_pair(monkeypatch, {1: x}, {1: y}, {1: 1}, 3, inside)
    got = bridge.fit(pair, [], FIT | {'bridge_fit': 'shuffled'})[1]
    torn = Moments(D_S, D_T, 'cpu')
    for i in range(3):
        torn.add(x[i::3], torch.cat([y[i::3][50:], y[i::3][:50]]), inside[i::3])
    mean, P_t, _ = principal_directions(torn)
    P_s, b_s = ridge(torn, mean, P_t[:D_S], 1e-4, True)
    assert torch.allclose(got.P_s, P_s, atol=1e-9) and torch.allclose(got.b_s, b_s, atol=1e-9)
    held = summed(*rows(seed=1))
    true_fit = bridge.fit(pair, [], FIT | {'bridge_fit': 'ridge'})[1]
    assert predicted_share(held, true_fit)[1][0] > 0.5 > predicted_share(held, got)[1][0]


def test_judged_cosines_and_their_controls(monkeypatch):
    """Every cosine that is reported against one row and one rank at a time: the bridge, a random P_S, the pair
    half a batch away, and the mean of the class alone. A control that is not what its name says would make
    every bridge look honest."""
    x, y, inside = rows(seed=1)
    fitted = bridge.fit(fake_pair(monkeypatch, {1: rows()[0]}, {1: rows()[1]}, {1: 1}, 3, rows()[2]), [],
                        FIT | {'bridge_fit': 'ridge'})[1]
    judged = bridge.judge(fake_pair(monkeypatch, {1: x}, {1: y}, {1: 1}, 2, inside), [], {1: fitted}, 7)[1]
    noise = torch.randn(D_S, D_S, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    want = {name: torch.zeros(D_S, dtype=torch.float64) for name in bridge.COSINES}
    for i in range(2):
        a, b, c = x[i::2], y[i::2], inside[i::2].long()
        means = [a[c == k].mean(0) for k in (0, 1)]

        def project(row, k):
            return fitted.P_s[k] @ row + fitted.b_s[k]
        for k in range(len(a)):
            z_t = fitted.P_t @ (b[k] - fitted.mean)
            other = k - len(a) // 2              # counts from the end where it is negative
            guess = {'cos': project(a[k], c[k]), 'before': noise @ a[k], 'shuffled': project(a[other], c[other]),
                     'mean_only': project(means[c[k]], c[k])}
            for name, z_s in guess.items():
                for r in range(1, D_S + 1):
                    want[name][r - 1] += torch.cosine_similarity(z_s[:r], z_t[:r], dim=0) / N
    for name in bridge.COSINES:
        assert torch.allclose(judged[name], want[name], atol=1e-12), name
    assert judged['cos'][-1] > 0.6 > judged['shuffled'][-1]
    assert judged['rows'] == N and judged['class 1'] == pytest.approx(float(inside.double().mean()))


def test_every_rank_up_to_the_full_width_is_judged(monkeypatch):
    """300 and 310 numbers in a state: ranks beyond 256 are fitted, judged and reported, the last one included.
    With so many rows the student predicts all of the teacher, so Theorem 3 wants all ranks."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(700, 300, generator=g, dtype=torch.float64)
    y = x @ torch.randn(300, 310, generator=g, dtype=torch.float64)
    pair = fake_pair(monkeypatch, {1: x}, {1: y}, {1: 1}, 2)
    fitted = bridge.fit(pair, [], FIT | {'bridge_fit': 'ridge'})
    assert fitted[1].P_t.shape == (300, 310) and fitted[1].P_s.shape == (2, 300, 300)
    judged = bridge.judge(pair, [], fitted, 0)
    assert len(judged[1]['cos']) == len(judged[1]['E']) == 300
    figures = bridge.report(judged, {1: 1}, 0)
    assert list(figures['layers']['1']['cos']) == ['1', '2', '4', '8', '16', '32', '64', '128', '256', '300']
    assert figures['rank'] == figures['used'] == figures['ranks'] == 300 and bridge.report(judged, {1: 1}, 5)['used'] == 5
    few = fake_pair(monkeypatch, {1: x[:40]}, {1: y[:40]}, {1: 1}, 2)
    assert fitted[1].P_t[:39].shape == bridge.fit(few, [], FIT | {'bridge_fit': 'ridge'})[1].P_t.shape


def test_counts_are_summed_on_the_device(monkeypatch):
    """nccl reduces no CPU tensor, and gloo does not mind: a bridge on several GPUs died after the fit."""
    seen = []

    def reduce(x):
        seen.append(x.device.type)
        return torch.tensor([3.0, 4.0])
    monkeypatch.setattr(bridge, 'all_reduce', reduce)
    assert bridge.align([(1.0, 2), (2.0, 2)], 'meta') == 0.75 and seen == ['meta']


def test_only_positions_with_a_teacher_state_are_read(monkeypatch):
    """Pair.read against whole hidden states, position by position. A position without a state (column -1) would
    be paired with the last state of the row above."""
    student, teacher = tiny_model(0), tiny_model(1, L=4, d=24, V=50)
    problems = [SimpleNamespace(ids=[1, 2, 3], question=''), SimpleNamespace(ids=[4, 5], question='')]
    answers = [collection.Answer(1, [6, 7, 8, 9], True), collection.Answer(0, [10, 11], False), collection.Answer(1, [12], True)]
    cfg = dict(token_budget=1000, positions='last_k', last_k=3, first_k=9, last_frac=1.0, first_frac=1.0,
               pair='floor', teacher_ids='text')
    tok = SimpleNamespace(chat=lambda question: [])
    pair = bridge.Pair(student, teacher, tok, tok, problems, {1: 2, 3: 4}, cfg, SimpleNamespace(rank=0, world=1, device='cpu'))
    ids_t = torch.arange(21).view(3, 7)
    column = torch.tensor([[0, 1, 2, -1, 6, 5], [3, 3, 4, 5, -1, 0], [-1, -1, 2, 2, 2, 2]])
    inside = column % 2 == 1
    given = []

    def read_rollout(roll, *rest):
        given.append(roll)
        return Reading(ids_t, torch.tensor([7, 7, 7]), column, inside, {}, 0.5)
    monkeypatch.setattr(bridge, 'read_rollout', read_rollout)
    monkeypatch.setattr(bridge, 'same_vocabulary', lambda *toks: False)
    (states_s, states_t, classes), = pair.read(answers)

    # Supervised: the last three positions of an answer, in columns prompt_len - 1 + t; then those with a state.
    at = [(0, 2), (0, 4), (1, 2), (1, 3)]
    x, y = student.hidden(given[0].ids, [1, 3]), teacher.hidden(ids_t, [2, 4])
    for k, (b, t) in enumerate(at):
        for l, h in zip((1, 3), x, strict=True):
            assert torch.allclose(states_s[l][k], h[b, t], atol=1e-6)
        for l, h in zip((2, 4), y, strict=True):
            assert torch.allclose(states_t[l][k], h[b, column[b, t]], atol=1e-6)
    assert classes.tolist() == [bool(inside[b, t]) for b, t in at] and len(states_s[1]) == len(states_t[2]) == 4


def test_layers_by_cka(made, toy_dir, tmp_path, monkeypatch):
    """Teacher layers that are a student's, turned, scaled and shifted, in another order, among noise: each
    is found, over batches. Through the script, and by hand: in the file, and read back by a run."""
    g = torch.Generator().manual_seed(0)
    x = {l: torch.randn(90, D_S, generator=g) for l in (1, 2, 3)}
    turn = torch.linalg.qr(torch.randn(D_S, D_S, generator=g))[0]
    y = {1: x[2] @ turn * 3 + 1, 2: torch.randn(90, D_T, generator=g), 3: x[1] @ turn - 2, 4: x[3] * 0.1}
    pair = fake_pair(monkeypatch, x, y, {1: 1, 2: 2, 3: 4}, 3)
    assert bridge.layers_by_cka(pair, []) == {1: 3, 2: 1, 3: 4}
    out = tmp_path / 'cka'
    shutil.copytree(made, out)
    main(load_config(args(toy_dir, out, layer_map='cka')))
    phi = tensors(out)[1]['phi']
    assert set(phi) == {'1', '2', '3'} and set(phi.values()) <= {1, 2, 3, 4}
    distill.main(load_config(run_args(toy_dir, out, tmp_path / 'run', layer_map='cka', steps=1)))
    by_hand = tmp_path / 'by_hand'
    shutil.copytree(made, by_hand)
    main(load_config(args(toy_dir, by_hand, layer_map=[1, 1, 4])))
    assert tensors(by_hand)[1]['phi'] == {'1': 1, '2': 1, '3': 4}
    with pytest.raises(UserError, match=r"layer_map=\[1, 1, 4\], but here it is 'depth'"):
        distill.main(load_config(run_args(toy_dir, by_hand, tmp_path / 'r')))


def test_student_ids_for_another_vocabulary_only_when_asked(made, toy_dir, tmp_path):
    """The published setting is there by its name; its file says so."""
    main(load_config(args(toy_dir, tmp_path / 'ids', teacher_ids='student')))
    assert tensors(tmp_path / 'ids')[1]['teacher_ids'] == 'student' and tensors(made)[1]['teacher_ids'] == 'text'
    assert read_json(tmp_path / 'ids/bridge.json')['align'] == 1


def test_bad_input(toy_dir, tmp_path, capsys, monkeypatch):
    def refused(**keys):
        with pytest.raises(SystemExit) as e:
            run(main, lambda: load_config(args(toy_dir, tmp_path / 'r', **keys)))
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
        return err
    assert "student=''" in refused(student='') and "bridge=''" in refused(bridge='')
    assert 'layers=[9]' in refused(layers=[9])
    assert 'raise bridge_prompts' in refused(bridge_prompts=2, bridge_held_out=0.9)
    real = bridge.load_model

    def constant(path, *a):
        model = real(path, *a)
        if path.endswith('teacher'):
            for p in model.parameters():
                p.data.zero_()
        return model
    monkeypatch.setattr(bridge, 'load_model', constant)
    assert 'do not vary; nothing to bridge' in refused(bridge=tmp_path / 'constant')


# ---- stage 2: training through a bridge -------------------------------------------------------------

def interface(r=3, d_s=D_S, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*s, generator=g, dtype=dtype) for s in ((2, r, d_s), (2, r)))


@pytest.mark.parametrize('normalise', [True, False])
def test_equation_15(normalise):
    """Fused against autograd on rows picked by hand, both classes, weights with a zero, upstream 1.7; the
    bridge itself gets no gradient."""
    g = torch.Generator().manual_seed(1)
    h, z_t = torch.randn(2, 4, D_S, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, generator=g, dtype=torch.float64)
    at, inside = torch.tensor([0, 2, 3, 5, 7]), torch.tensor([False, True, True, False, True])
    w, (P_s, b_s) = torch.tensor([0.1, 0.0, 0.5, 0.2, 0.3], dtype=torch.float64), interface()
    total = 0.0
    for k in range(5):
        c = int(inside[k])
        z, t = P_s[c] @ h.flatten(0, 1)[at[k]] + b_s[c], z_t[k]
        if normalise:
            z, t = z / z.norm(), t / t.norm()
        total = total + w[k] * ((z - t) ** 2).sum()
    P_s.requires_grad_()
    out, loss, cos = bridge_loss(h, z_t, at, w, (P_s, b_s), inside, normalise)
    assert abs(loss - total) < 1e-12
    got, want = torch.autograd.grad(1.7 * loss + 0 * out.sum(), h)[0], torch.autograd.grad(1.7 * total, h)[0]
    assert (got - want).abs().max() < 1e-12
    if normalise:
        assert loss.item() == pytest.approx(float(2 * (w.sum() - cos)))


@pytest.mark.parametrize('budget', [10**6, 20])
def test_composite_through_a_bridge(toy_dir, budget):
    """Eq. (15) plus KL for a teacher of other depth and width, and Eq. (15) alone for one that reads other
    ids at other places, through distill.accumulate against plain autograd on whole hidden states."""
    for other in (False, True):
        student, teacher, roll = tiny_model(0), tiny_model(1, L=4, d=24, V=50), rollout()
        spans = {l: list(interface(3, 20, l, torch.float32)) for l in (1, 2, 3)}
        frames = {l: (torch.randn(24, generator=torch.Generator().manual_seed(l)), torch.randn(3, 24, generator=torch.Generator().manual_seed(l)))
                  for l in spans}
        face = Bridge({1: 1, 2: 3, 3: 4}, 3, {l: f[0] for l, f in frames.items()}, {l: f[1] for l, f in frames.items()},
                      {l: s[0] for l, s in spans.items()}, {l: s[1] for l, s in spans.items()})
        m, reading = position_mask(roll, 'all'), None
        ids_t, at_t, inside = roll.ids, torch.arange(roll.ids.shape[1]).expand(roll.ids.shape), torch.zeros_like(m)
        if other:                            # every second token of another text; one answer beyond its context
            ids_t = torch.arange(roll.ids.shape[0] * 9).view(-1, 9) % 50
            at_t = torch.arange(roll.ids.shape[1]).expand(roll.ids.shape) // 2
            at_t = torch.where(torch.arange(len(at_t))[:, None] == 2, -1, at_t)
            inside = torch.arange(roll.ids.shape[1]).expand(roll.ids.shape) % 3 == 1
            reading = Reading(ids_t, torch.full((len(ids_t),), 9), at_t, inside, {}, 0.5)
            m = m & (at_t >= 0)
        w = position_weights(m, 'token')
        opd_weight = 0.0 if other else 0.7
        sums = step_sums(student, teacher, roll, w, {1: 1, 2: 3, 3: 4}, budget, oprd_weight=0.3, opd_weight=opd_weight,
                         output=None if other else make_objective('full', vocab=37), reading=reading, bridge=face)
        plain = tiny_model(0)
        x, y = plain.hidden(roll.ids, [1, 2, 3]), teacher.hidden(ids_t, [1, 3, 4])              # Eq. (11): 1, 2.5 up, 4
        loss = 0.0
        for l, x_l, y_l in zip((1, 2, 3), x, y, strict=True):
            for b, t in m.nonzero().tolist():
                z_t = frames[l][1] @ (y_l[b, at_t[b, t]].detach() - frames[l][0])
                c = int(inside[b, t])
                z_s = spans[l][0][c] @ x_l[b, t] + spans[l][1][c]
                loss = loss + 0.3 / 3 * w[b, t] * (z_s / z_s.norm() - z_t / z_t.norm()).square().sum()
        if not other:
            kl = opd_rows(plain.head(x[2][m]), teacher.head(y[2][m])[:, :37], None, 'full')
            loss = loss + 0.7 * (w[m] * kl).sum()
        loss.backward()
        for (name, p), q in zip(plain.named_parameters(), student.named_parameters(), strict=True):
            if p.grad is not None:
                assert (p.grad - q[1].grad).abs().max() <= 1e-5 * p.grad.abs().max(), name
        assert sums['weight'] == pytest.approx(1)


def test_teacher_states_of_the_next_byte_term():
    """opd='byte' is given the teacher's floor state of every position and the state before the teacher's last
    token. Where the student is inside a token, the floor state is itself the state before it: one further back
    has not read the token before."""
    student, teacher, roll = tiny_model(0), tiny_model(1, L=4, d=24, V=50), rollout()
    B, T = roll.ids.shape
    m = position_mask(roll, 'all')
    ids_t = torch.arange(B * T).view(B, T) % 50
    column = torch.arange(T).expand(B, T)
    inside = (torch.arange(T) % 3 == 1).expand(B, T)
    written = {(b, t): b'x' for b, t in m.nonzero().tolist() if t % 2 or t % 3 == 1}
    reading = Reading(ids_t, torch.full((B,), T), column, inside, written, 0.5)
    given = []

    class Spy(OutputTerm):
        def __call__(self, head, h, teacher_h, rows):
            given.append((teacher_h, rows.written, rows.inside))
            return h.sum() * 0, torch.zeros(5)
    objective = Objective({}, None, Spy(NextByte(None, None), teacher))
    accumulate(student, teacher, cut_rollout(roll, position_weights(m), 10**6, reading), objective, {'opd': 1.0})
    (h_t, words, classes), = given
    states = teacher.hidden(ids_t, [4])[0].detach()
    rounding = 64 * torch.finfo(torch.float32).eps * float(states.norm(dim=-1).max())    # rows in another order
    K = len(h_t) // 2
    order, = micro_batches(roll.length.tolist(), 10**6)
    at = [(b, t) for b in order for t in m[b].nonzero().flatten().tolist()]
    assert len(at) == K
    for k, (b, t) in enumerate(at):
        back = t - 1 if (b, t) in written and not inside[b, t] else t
        assert (h_t[k] - states[b, t]).abs().max() < rounding and (h_t[K + k] - states[b, back]).abs().max() < rounding
        assert words[k] == written.get((b, t), b'') and bool(classes[k]) == bool(inside[b, t])


def test_positions_without_a_teacher_state_have_no_weight(made, toy_dir, tmp_path, monkeypatch):
    """In a step of distill.py: the weights go to the other positions of the answer."""
    readings, weights = [], []
    read, weigh = distill.read_rollout, distill.position_weights

    def reading_with_gaps(*a):
        reading = read(*a)
        reading.column[:, ::2] = -1
        readings.append(reading)
        return reading

    def weighed(*a):
        weights.append(weigh(*a))
        return weights[-1]
    monkeypatch.setattr(distill, 'read_rollout', reading_with_gaps)
    monkeypatch.setattr(distill, 'position_weights', weighed)
    distill.main(load_config(run_args(toy_dir, made, tmp_path / 'gaps', steps=1)))
    assert (weights[0][readings[0].column < 0] == 0).all() and float(weights[0].sum()) == pytest.approx(1)


def test_only_projections_of_the_teacher_are_kept():
    """r numbers a row and layer, not d_t: what hidden_rows returns."""
    teacher, roll = tiny_model(1, L=4, d=24), rollout()
    face = Bridge({1: 1, 3: 4}, 3, dict.fromkeys((1, 3), torch.zeros(24)), dict.fromkeys((1, 3), torch.randn(3, 24)), {}, {})
    rows = hidden_rows(teacher, roll.ids, {1: torch.arange(9), 3: torch.arange(9), 'head': torch.arange(4)}, {1: 1, 3: 4}, face)
    assert {l: tuple(x.shape) for l, x in rows.items()} == {1: (9, 3), 3: (9, 3), 'head': (4, 24)}


def run_args(toy_dir, bridge_dir, out, **keys):
    return args(toy_dir, bridge_dir, **dict(out_dir=out, bridge_rank=8, steps=3) | keys)


def test_training_through_a_bridge(made, toy_dir, tmp_path):
    """Unlike tokenizers: align in the log, no output-space figures, the teacher examined in its own tokens,
    the bridge's file untouched; two ranks do the same."""
    before = (made / 'bridge.safetensors').read_bytes()
    distill.main(load_config(run_args(toy_dir, made, tmp_path / 'one')))
    log = log_of(tmp_path / 'one')
    assert_all_measured(tmp_path / 'one')
    assert all(0.5 < row['align'] < 0.95 and {'rep/cos/1', 'rep/cos/2', 'rep/cos/3'} <= row.keys() and 'opd/kl' not in row for row in log[1:])
    assert (made / 'bridge.safetensors').read_bytes() == before
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'distill.py',
                        *for_script('distill.py', run_args(toy_dir, made, tmp_path / 'two'))], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    two = log_of(tmp_path / 'two')
    for a, b in zip(log[1:], two[1:], strict=True):
        assert [a[k] for k in ('loss', 'rep/cos', 'grad_norm', 'align')] == pytest.approx(
            [b[k] for k in ('loss', 'rep/cos', 'grad_norm', 'align')], rel=1e-4)


def test_a_step_hands_on_the_keys_of_the_bridge(made, toy_dir, tmp_path):
    """Its rank, and whether projections are normalised: with the defaults in their place another loss is trained."""
    for rank, normalise in ((5, False), (7, True)):
        cfg = load_config(run_args(toy_dir, made, tmp_path / 'r', bridge_rank=rank, bridge_normalise=normalise))
        setup = distill.prepare(toy.prepare(cfg, start('cpu')), start('cpu'))
        assert setup.teachers[0].bridge.rank == rank == len(setup.teachers[0].bridge.P_t[1]) and setup.teachers[0].objective.hidden.normalise == normalise


def test_the_keys_of_the_next_byte_are_handed_on(made, toy_dir, tmp_path):
    """With kl_direction=forward, or another temperature, the reverse KL at temperature 1 would be trained."""
    keys = dict(opd='byte', opd_weight=1, kl_direction='forward', student_temperature=0.8, teacher_temperature=1.5, head_rows=7)
    cfg = load_config(run_args(toy_dir, made, tmp_path / 'r', **keys))
    made_of = distill.prepare(toy.prepare(cfg, start('cpu')), start('cpu')).teachers[0].objective.output.objective
    assert (made_of.direction, made_of.temperature, made_of.teacher_temperature, made_of.chunk) == ('forward', 0.8, 1.5, 7)


@pytest.mark.parametrize('other', [False, True])
def test_a_look_through_a_bridge_sees_the_cosine_that_training_logs(other):
    """An objective in output space looks at the cosines of a bridge from time to time. They are cosines, and not
    1 - cos, and those of the same projections that Eq. (15) compares, class by class."""
    student, teacher, roll = tiny_model(0), tiny_model(1, L=4, d=24), rollout()
    sides = {l: list(interface(3, 20, l, torch.float32)) for l in (1, 3)}
    g = torch.Generator().manual_seed(0)
    face = Bridge({1: 1, 3: 4}, 3, {l: torch.randn(24, generator=g) for l in sides}, {l: torch.randn(3, 24, generator=g) for l in sides},
                  {l: P for l, (P, _) in sides.items()}, {l: b for l, (_, b) in sides.items()})
    reading, mask = None, position_mask(roll, 'all')
    if other:
        column = torch.arange(roll.ids.shape[1]).expand(roll.ids.shape)
        reading = Reading(roll.ids, roll.length, column, column % 3 == 1, {}, 0.5)
    w = position_weights(mask)
    trained = step_sums(student, teacher, roll, w, face.layer_map, bridge=face, reading=reading)
    looked = diagnose(student, teacher, cut_rollout(roll, w, 10**6, reading), Objective(face.layer_map, BridgeTerm(face), None, face))
    assert looked['layer_cosine'].tolist() == pytest.approx(trained['layer_cosine'].tolist(), abs=1e-6)
    assert (trained['layer_cosine'] - 0.5).abs().min() > 1e-3            # 1 - cos would be seen


def test_a_teacher_of_another_vocabulary_is_scored_in_its_own_tokens(made, toy_dir, tmp_path, monkeypatch):
    """Its own prompts, stop tokens and weights, against `evaluate` called here. The student's stop ids mean something
    else to it, and its answers would be cut there."""
    monkeypatch.setattr(eval_math, 'verdict', lambda text, problem: {'extracted': None, 'correct': len(text) % 3 == 0, 'decided_by': ''})
    folder = folder_of(load_config(run_args(toy_dir, made, 'x')))
    tok = load_tokenizer(folder / 'teacher')
    teacher = with_other_stop(folder / 'teacher', tmp_path / 'teacher', [*tok.stop_ids, *tok.encode('1')])
    distill.main(load_config(run_args(toy_dir, made, tmp_path / 'r', bridge='', oprd_weight=0, opd='byte', opd_weight=1, steps=1,
                                      teacher=teacher, eval_every=0)))
    tok, cfg = load_tokenizer(teacher), toy.prepare(load_config(run_args(toy_dir, made, 'x')), start('cpu'))
    sets = eval_math.load_eval_sets(cfg['eval_data'], tok, 0, '')
    want = evaluate(load_model(teacher), tok, sets, 2, temperature=0.7, top_p=1.0, stop=tok.stop_ids, seed=0,
                    vocab=tok.size, max_new_tokens=20)
    assert read_json(tmp_path / 'r/results.json')['teacher'] == want and len(tok.stop_ids) > 1


@pytest.mark.parametrize('keys', [dict(pair='exact'), dict(pair='floor'), dict(teacher_ids='student')], ids=str)
def test_how_the_teacher_reads_is_handed_on(keys, made, toy_dir, tmp_path, monkeypatch):
    """To the pairing in both stages: with pair='exact' no position inside a teacher token is supervised. The teacher reads
    its own rendering of the prompts; in the student's ids it would read another text."""
    given, masks, prompts = [], [], []
    read = bridge.read_rollout

    def recorded(roll, prompts_t, tok_s, tok_t, context, *how):
        prompts.append(prompts_t)
        reading = read(roll, prompts_t, tok_s, tok_t, context, *how)
        given.append((how, reading))
        return reading
    monkeypatch.setattr(bridge, 'read_rollout', recorded)
    monkeypatch.setattr(distill, 'read_rollout', recorded)
    weigh = distill.position_weights
    monkeypatch.setattr(distill, 'position_weights', lambda mask, *a: masks.append(mask) or weigh(mask, *a))
    main(load_config(args(toy_dir, tmp_path / 'b', bridge_prompts=8, bridge_held_out=0.5, bridge_rank=2, **keys)))
    distill.main(load_config(run_args(toy_dir, tmp_path / 'b', tmp_path / 'r', steps=1, eval_data='', bridge_rank=2, **keys)))
    how = keys.get('pair', 'floor'), keys.get('teacher_ids', 'text')
    assert {asked for asked, _ in given} == {how} and len(masks) == 1
    cfg = toy.prepare(load_config(run_args(toy_dir, made, 'x')), start('cpu'))
    tok_s, tok_t = load_tokenizer(cfg['student']), load_tokenizer(cfg['teacher'])
    renderings = [[tok.chat(problem.question) for problem in load_problems(cfg['data'], tok_s)] for tok in (tok_s, tok_t)]
    for prompt in [*prompts[0].values(), *prompts[-1]]:
        assert prompt in renderings[1] and prompt not in renderings[0]
    assert bool((masks[0] & given[-1][1].inside).any()) == (how == ('floor', 'text'))


def test_a_bridge_made_for_something_else_is_refused(made, toy_dir, tmp_path, capsys):
    def refused(bridge_dir=made, **keys):
        with pytest.raises(SystemExit) as e:
            run(distill.main, lambda: load_config(run_args(toy_dir, bridge_dir, tmp_path / 'r', **keys)))
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
        return err
    assert 'ranks 1 to 24, but bridge_rank=25; lower it' in refused(bridge_rank=25)
    assert "made for pair='floor', but here it is 'exact'" in refused(pair='exact')
    assert 'made for student=' in refused(seed=1)
    assert "the tokenizers differ; use opd='byte'" in refused(opd_weight=1)
    assert 'not a whole safetensors file' in refused(tmp_path / 'none')
    student = load_config(run_args(toy_dir, made, 'x'))
    folder = folder_of(student) / 'student'
    assert 'not a bridge; make one with bridge.py' in refused(folder / 'model.safetensors')
    two = tmp_path / 'two_layers'
    two.mkdir()
    (two / 'rollouts.jsonl').write_text((made / 'rollouts.jsonl').read_text())
    main(load_config(args(toy_dir, two, layers=[1, 3])))
    assert 'has no layer 2; set layers=[1,3]' in refused(two)
    got, about = tensors(two)
    for layer, broken in (('mean.1', got['P_t.1']), ('P_t.3', got['P_t.3'] * float('nan')), ('P_s.1', got['P_s.1'][:, :5]),
                          ('b_s.3', got['b_s.3'].int())):
        save_file(got | {layer: broken.clone().contiguous()}, two / 'bridge.safetensors', {'bridge': json.dumps(about)})
        assert f'layer {layer[-1]} is damaged; rerun bridge.py' in refused(two, layers=[1, 3])
    save_file({k: v for k, v in got.items() if k != 'P_s.1'}, two / 'bridge.safetensors', {'bridge': json.dumps(about)})
    assert 'layer 1 is damaged; rerun bridge.py' in refused(two, layers=[1, 3])
    save_file(got | {'P_t.1': torch.tensor(1.0)}, two / 'bridge.safetensors', {'bridge': json.dumps(about)})
    assert 'layer 1 is damaged; rerun bridge.py' in refused(two, layers=[1, 3])
    without_phi = {k: v for k, v in about.items() if k != 'phi'}
    for made_of in (without_phi, about | {'phi': {}}, about | {'phi': [1]}, about | {'phi': {'1': 1, '3': 5}}, about | {'phi': {'1': True}},
                    about | {'phi': {'1': 1, '3': 0}}, about | {'phi': {'1': 1, '4': 1}}, about | {'phi': {'01': 1}}, about | {'rank': 0},
                    about | {'rank': '8'}, about | {'ranks': None}, about | {'d': [24]}, about | {'d': 'ab'}, about | {'L': [3, 4.0]},
                    [about], 'text', None, 3):
        save_file(got, two / 'bridge.safetensors', {'bridge': json.dumps(made_of)})
        assert 'not a bridge; make one with bridge.py' in refused(two, layers=[1, 3])
    for text in ('[' * 10**5, '{', '', '\x00'):
        save_file(got, two / 'bridge.safetensors', {'bridge': text})
        assert 'not a bridge; make one with bridge.py' in refused(two, layers=[1, 3])
    save_file(got, two / 'bridge.safetensors', {'bridge': json.dumps(about | {'student': 'x\x1b[31m' * 9999})})
    line = refused(two, layers=[1, 3])
    assert 'made for student=' in line and len(line) <= 301 and '\x1b' not in line
    (two / 'bridge.safetensors').write_bytes((two / 'bridge.safetensors').read_bytes()[:2000])
    assert 'not a whole safetensors file' in refused(two, layers=[1, 3])


@pytest.mark.parametrize('through', ['bridge', 'bytes alone'])
def test_next_byte_kl_across_tokenizers(made, toy_dir, tmp_path, through):
    """opd='byte' with a bridge beside it, and without one; micro-batches do not matter; a teacher fed the
    student's ids is refused."""
    keys = dict(opd='byte', opd_weight=0.5, steps=2) | (dict(bridge='', oprd_weight=0) if through != 'bridge' else {})
    logs = []
    for name, budget in (('a', 10**6), ('b', 30)):
        distill.main(load_config(run_args(toy_dir, made, tmp_path / name, **keys, token_budget=budget)))
        logs.append(log_of(tmp_path / name)[1:])
        assert_all_measured(tmp_path / name)
    for a, b in zip(*logs, strict=True):
        assert a['loss/opd'] == pytest.approx(b['loss/opd'], rel=1e-4) and a['opd/kl'] == pytest.approx(a['loss/opd'], rel=1e-5)
        assert ('rep/cos' in a) == (through == 'bridge') and 'opd/overlap16' not in a and a['loss/opd'] > 0
    with pytest.raises(UserError, match='needs a teacher that reads the text'):
        distill.main(load_config(run_args(toy_dir, made, tmp_path / 'x', **keys, teacher_ids='student')))
