"""The benchmark runs, what it counts holds, and its limit is what a count of the work says: never a time."""
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import argv, for_script, opd_loss
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import output_losses
from configs import load_config
from cross_tokenizer import next_byte
from model import PRESETS, Cache, Model
from studies import bench_lines, bench_losses, limits
from studies.bench import (
    GPU_COMMANDS,
    TABLES,
    CompiledDecode,
    Decode,
    arguments,
    main,
    random_model,
    seconds_of,
    sized,
    without_machine,
)
from studies.peers import liger_scheme
from studies.toy import folder_of
from support.jsonl import read_rows
from support.runtime import ROOT, run, start


def bench(out, *args):
    """bench.py in a process, which appends to the file `out` -> what it prints."""
    command = [sys.executable, '-m', 'studies.bench', *args, '--device', 'cpu', '--out', str(out)]
    p = subprocess.run(command, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return p.stdout


@pytest.fixture
def here(tmp_path, monkeypatch):
    """here(arguments) of bench.py in this process -> the lines that it has appended to its file, by name."""
    out = tmp_path / 'lines.jsonl'

    def lines(*args, device='cpu'):
        out.unlink(missing_ok=True)
        monkeypatch.setattr(sys, 'argv', ['bench.py', *args, '--device', device, '--out', str(out)])
        main(arguments())
        return {row['case']: row for row in read_rows(out)}
    return lines


TOY = PRESETS['toy']
SMALL = ['--model', 'toy', '--rows', '3', '--tokens', '8', '--batch', '2', '--context', '4', '--repeat', '2']


@pytest.mark.parametrize('what', TABLES)
def test_every_line_of_every_table(what, here):
    """Counted, then timed."""
    counts = here(what, *SMALL, '--count')
    assert len(counts) == {'loss': 5, 'head': 9, 'update': 7, 'decode': 4, 'rollout': 8, 'step': 4}[what]
    assert all(r['peak_mb'] > 0 and r['made_mb'] >= r['largest_mb'] > 0 for r in counts.values())
    for name in counts:
        r = here(what, *SMALL, '--case', name)[name]
        assert 0 < r['low'] <= r['seconds'] <= r['high'] < 60 and r['torch'] and r['machine']
        assert ('tok/s' in r) == (what not in ('loss', 'head')) and r['limit'] > 0


# ---- lines, one by one -----------------------------------------------------------------------------

def test_a_process_for_each_line(tmp_path):
    """What a line's process has measured reaches the table and the file."""
    lines = bench(tmp_path / 'x', 'step', *SMALL, '--case', 'rollout alone', 'OPRD').splitlines()
    assert 'peak_mb' in lines[2] and [line.split('  ')[0] for line in lines[3:]] == ['rollout alone', 'OPRD']
    rows = read_rows(tmp_path / 'x')
    assert [row['case'] for row in rows] == ['rollout alone', 'OPRD'] and all(row['seconds'] > 0 for row in rows)


def test_a_command_that_is_cut_off_keeps_its_lines(here, tmp_path, monkeypatch):
    """All JSON was printed after the table: nine minutes of a GPU were lost with the tenth. The process ends here
    without closing any file."""
    monkeypatch.setattr(bench_losses, 'loss_stacked', lambda x: os._exit(7))
    child = os.fork()
    if child == 0:
        try:
            here('loss', *SMALL, '--count')
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [row['case'] for row in read_rows(tmp_path / 'lines.jsonl')] == ['fused', 'selected rows']


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('no room\nat all'), TypeError('a peer of another version'), ValueError()])
def test_a_line_that_fails_is_a_line_and_the_table_goes_on(here, monkeypatch, capsys, error):
    """A peer that is out of memory, or has other arguments by now, cost all the lines after it."""
    def fails(x):
        raise error
    monkeypatch.setattr(bench_losses, 'loss_fused', fails)
    rows = here('loss', *SMALL, '--count')
    first_line = f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
    assert list(rows) == ['fused', 'selected rows', 'stacked fp32', 'rows alone', 'rows alone, reference']
    assert rows['fused']['error'] == first_line and not any('error' in row for row in list(rows.values())[1:])
    assert first_line in capsys.readouterr().out


def test_a_process_that_dies_is_a_line(monkeypatch, tmp_path):
    """The kernel ends a process that takes all the memory, and it says nothing."""
    monkeypatch.setattr(sys, 'argv', ['bench.py', 'loss'])
    monkeypatch.setattr(bench_lines.subprocess, 'run', lambda *args, **how: subprocess.CompletedProcess(args, -9, '', ''))
    args = sized(arguments(['loss', *SMALL, '--out', str(tmp_path / 'x')]), start('cpu'))
    bench_lines.tabulate(args, start('cpu'), ['fused', 'stacked fp32'], None)
    assert ['RuntimeError: it ended without a word' in row['error'] for row in read_rows(tmp_path / 'x')] == [True, True]


def test_short_kernels_are_timed_by_replays_of_a_graph(here, monkeypatch):
    """The rows of a layer take a GPU four microseconds: without a graph their launches are timed."""
    pytest.importorskip('triton')
    from emulated_cuda import emulated_cuda
    monkeypatch.setattr(bench_lines, 'speeds', lambda env: limits.GPUS['h200'])
    with emulated_cuda() as cuda:
        rows = here('loss', *SMALL, '--case', 'rows alone', device='cuda')
        assert cuda.count['graph'] == 1 and cuda.count['replay'] == 3 * 20 - 1 and cuda.count['layer_rows_kernel']
        rows |= here('decode', *SMALL, '--repeat', '1', '--case', '2 x 4', "2 x 4, the library's products", device='cuda')
    assert len(rows) == 3 and not any('error' in row for row in rows.values()) and rows['2 x 4']['limit'] > 0


# ---- the limit -------------------------------------------------------------------------------------

def products(call):
    """Flops of a call in products of weights, and in attention's, which multiplies the whole square here."""
    def added_in_place(total, a, b, out_shape=None, **how):
        return 2 * a[0] * a[1] * b[1]        # the shapes of two matrices; PyTorch's counter does not know this one
    mapping = {torch.ops.aten.addmm_: added_in_place}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    flops = counter.get_flop_counts().get('Global', {})
    attention = flops.pop(torch.ops.aten.bmm, 0)
    return sum(flops.values()), attention


def attention_by_pairs(texts, begin=0):
    """Flops of attention in the toy, pair by pair: each query from column `begin` on multiplies the keys up to its
    own, once for the score and once for the sum."""
    flops = 0
    for length in texts:
        for query in range(begin, length):
            for _ in range(query + 1):
                flops += TOY.L * TOY.H * 2 * (2 * TOY.e)
    return flops


def cases_of(what, *more):
    """The cases of a table in float32 on the CPU."""
    args = sized(arguments([what, *SMALL, *more]), start('cpu', 'float32'))
    return TABLES[what](args, start('cpu', 'float32'))


def counted_once(case):
    """`products` of a case whose inputs have been made."""
    case.ready()
    return products(case.call)


def flops_of(case):
    return sum(part.flops for part in case.work)


def bytes_of(case):
    return sum(part.bytes for part in case.work)


def test_the_limit_of_the_loss_counts_every_row_once():
    """Read both models' rows, write the gradient. There is no product."""
    cases = cases_of('loss')
    x = bench_losses.RowInputs(sized(arguments(['loss', *SMALL]), start('cpu')), start('cpu', 'float32'))
    assert bytes_of(cases['rows alone']) == x.h.nbytes + 2 * x.target.nbytes
    rows_and_gradient = 2 * (x.h.nbytes + 2 * x.target.nbytes) + 8 * TOY.d * 4
    for name in ('fused', 'selected rows', 'stacked fp32'):
        assert bytes_of(cases[name]) == rows_and_gradient and flops_of(cases[name]) == 0
        assert counted_once(cases[name]) == (0, 0)


def test_the_limit_of_the_head_counts_every_product(monkeypatch):
    """Ours, autograd and Liger's scheme multiply equally much."""
    for module in (output_losses, next_byte):
        monkeypatch.setattr(module, 'row_dot', lambda a, b: (a * b).sum(-1))
    x = bench_losses.HeadInputs(sized(arguments(['head', *SMALL]), start('cpu')), start('cpu', 'float32'))
    for name, case in cases_of('head').items():
        assert counted_once(case) == (flops_of(case), 0), name
        states = x.h.nbytes * (4 if name == 'next byte' else 3)
        assert bytes_of(case) == x.W.nbytes + x.W_t.nbytes + x.W.nbytes + states, name


@pytest.mark.parametrize('again', [False, True], ids=['kept', 'recomputed'])
def test_the_limit_of_an_update_counts_every_product(monkeypatch, again):
    """The student's backward is two forwards, and a recomputed block is one more that is not needed."""
    monkeypatch.setattr(output_losses, 'row_dot', lambda a, b: (a * b).sum(-1))
    texts = [32 + 8] * 3
    cases = cases_of('update', *['--checkpointing'] * again)
    for name in ('OPRD', 'OPD full KL', 'OPRD + top-16', 'transformers, Eq. (6)'):
        case = cases[name]
        of_weights, of_attention = counted_once(case)
        by_pairs = attention_by_pairs(texts)
        passes = 5 if again else 4           # the teacher's forward, the student's, and its backward
        recomputed = sum(part.flops_again for part in case.work)
        assert of_weights + passes * by_pairs == flops_of(case) + recomputed, name
        assert of_attention == passes * by_pairs * 2 * 40 / 41, name
        assert (recomputed > 0) == again


def test_the_limit_of_an_update_counts_every_weight():
    """The blocks once for the teacher and twice for the student, their gradients, and AdamW on all that learns."""
    model = random_model(TOY, start('cpu', 'float32'))
    blocks = sum(p.nbytes for name, p in model.named_parameters() if name.startswith(('blocks', 'norm')))
    everything = sum(p.nbytes for p in model.parameters())
    rows = 6 * TOY.L * 3 * 8 * TOY.d * 4     # Eq. (6), forward and backward
    case = cases_of('update')['OPRD']
    assert bytes_of(case) == 4 * blocks + rows + 7 * (everything - model.head.weight.nbytes)
    assert case.gradients == everything - model.head.weight.nbytes
    case = cases_of('update')['OPD full KL']
    assert case.gradients == everything and case.work[-1].bytes == 7 * everything


@pytest.mark.parametrize('B, context', [(2, 4), (7, 9)])
def test_the_limit_of_a_decode_step_is_every_weight_and_every_key(B, context):
    """The bytes by which the share of bandwidth was always computed; the products of a step as it runs."""
    case = cases_of('decode', '--batch', str(B), '--context', str(context))[f'{B} x {context}']
    decode = Decode(random_model(TOY, start('cpu', 'float32')), B, context, None)
    model = decode.slots.model
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    cache = Cache(TOY, B, context, torch.device('cpu'), torch.float32)
    part, = case.work
    assert part.bytes == weights + sum(kv.nbytes for kv in cache.kv)
    decode.rewind()
    with torch.no_grad():
        assert sum(products(decode.slots.decode_step)) == part.flops


def test_the_limit_of_a_rollout_counts_every_token():
    """Equal lengths in batches waste nothing; with unequal ones a batch goes on until its longest answer ends."""
    cases = cases_of('rollout', '--rows', '4')
    prefill = attention_by_pairs([32] * 4)
    after = attention_by_pairs([32 + 7] * 4, begin=32)       # the first of 8 tokens comes with the prompt
    of_weights, of_attention = products(cases['equal: static batches'].call)
    assert of_weights + prefill + after == flops_of(cases['equal: static batches'])
    assert of_attention == prefill * 2 * 32 / 33 + after
    wasteful = cases['spread: static batches']
    assert sum(products(wasteful.call)) > flops_of(wasteful)

    # Two batches of two answers: seven steps each.
    model = random_model(TOY, start('cpu', 'float32'))
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    held = sum(range(32, 32 + 7)) * 4
    assert bytes_of(cases['equal: refilled']) == (1 + 2 * 7) * weights + held * 2 * TOY.L * TOY.G * TOY.e * 4


def test_slots_that_are_never_free_bound_the_steps():
    """One long answer takes its own steps; many short ones share the slots."""
    def steps(lengths, slots):
        return limits.rollout(TOY, 32, lengths, slots, 4)[1].launches / limits.decode_launches(TOY, slots)
    assert steps([9, 2, 2], 2) == 8 and steps([4, 4, 4], 2) == 5 and steps([4, 4, 4], 3) == 3


def test_a_step_is_its_rollout_and_its_update():
    cases = cases_of('step')
    lengths = [8 * i // 3 for i in (1, 2, 3)]
    update = limits.update(TOY, [32 + n for n in lengths], limits.Terms(sum(lengths), True, 0), 4, False)
    assert cases['OPRD'].work == cases['rollout alone'].work + update
    assert cases['rollout alone'].work == limits.rollout(TOY, 32, lengths, 3, 4)


@pytest.mark.parametrize('name', PRESETS)
def test_the_weights_are_counted_by_shape(name):
    """The limit counts them without making a model."""
    c = PRESETS[name]
    with torch.device('meta'):
        model = Model(c)
    blocks = sum(p.numel() for key, p in model.named_parameters() if key.startswith(('blocks', 'norm')))
    assert limits.trunk_weights(c) == blocks and limits.learning_weights(c, True) == c.count()
    assert limits.learning_weights(c, False) == c.count() - (0 if c.tied else model.head.weight.numel())


def test_a_part_is_limited_by_memory_or_by_arithmetic():
    machine = limits.Machine('a slow one', copy=10.0, product=100.0)
    parts = [limits.Part(bytes=50, flops=100), limits.Part(bytes=10, flops=300, launches=10, flops_again=200)]
    assert limits.limit(parts, machine) == 5 + 3
    assert limits.expected(parts, machine) == pytest.approx(5 + 5 + 10 * limits.LAUNCH)


def test_the_limit_at_the_paper_s_shapes():
    """Figures that were calculated by hand: the loss of 2,000 rows, a token for one row at 4.3 TB/s."""
    paper, gpu = PRESETS['r1_1p5b'], limits.GPUS['h200']
    assert limits.limit(limits.loss_rows(paper, 2000, 2), gpu) == pytest.approx(0.12e-3, rel=0.01)
    assert limits.decode(paper, 1, 16384, 2)[0].bytes == pytest.approx(3.09e9 + 16384 * 28672, rel=1e-3)
    assert limits.decode_launches(paper, 16) == 156 and limits.decode_launches(paper, 17) == 240


# ---- for a GPU that is not at hand -----------------------------------------------------------------

def test_every_command_for_a_gpu_takes_less_than_nine_minutes(capsys):
    """A command on a lent machine is cut off after ten."""
    env = without_machine(start('cpu'))
    seconds = {command: seconds_of(command, env, limits.GPUS['h200']) for command in GPU_COMMANDS}
    assert all(60 < value < 540 for value in seconds.values()), seconds
    assert {command.split()[0] for command in GPU_COMMANDS} == set(TABLES)
    main(arguments(['commands', '--device', 'cpu']))
    assert re.findall('studies.bench (.*)', capsys.readouterr().out) == list(GPU_COMMANDS)
    shown = (ROOT / 'docs/speed.md').read_text().split('## On a GPU')[1]
    assert re.findall('\npython -m studies.bench (.*)', shown) == list(GPU_COMMANDS)


@pytest.mark.parametrize('what', TABLES)
def test_what_is_expected_of_a_gpu_needs_none(what, here, capsys):
    """At the paper's shapes, whose models do not fit here, and nothing is written among what was measured."""
    assert here(what, '--expect', 'h200') == {}
    lines = capsys.readouterr().out.splitlines()
    assert 'H200' in lines[1] and lines[2].split()[-2:] == ['limit', 'expected'] and len(lines) > 3
    for line in lines[3:]:
        limit, expected = map(float, line.split()[-2:])
        assert 0 < limit <= expected < 60


@pytest.mark.parametrize('command, lines, unit', [
    ('decode --batch 1', ['1 x 1024', '1 x 8192', '1 x 16352'], 1e-3), ('decode --batch 2', ['2 x 1024', '2 x 8192', '2 x 16352'], 1e-3),
    ('decode --batch 16', ['16 x 1024', '16 x 8192', '16 x 16352'], 1e-3), ('loss', ['rows alone'], 1e-3), ('head', ['full KL'], 1e-3),
    ('head --vocab 0', ['top-16'], 1e-3), ('update', ['OPRD'], 1), ('update', ['OPD full KL'], 1), ('update --rows 2', ['OPRD'], 1),
    ('rollout', ['equal: refilled', 'spread: refilled'], 1), ('step', ['rollout alone'], 1), ('step', ['OPRD'], 1), ('step', ['OPD full KL'], 1),
])
def test_the_document_shows_what_is_expected(command, lines, unit):
    """A figure of docs/speed.md that no command gives any more."""
    env = without_machine(start('cpu'))
    args = sized(arguments(command.split()), env)
    cases = TABLES[args.what](args, env)
    pairs = []
    for line in (ROOT / 'docs/speed.md').read_text().split('## On a GPU')[1].splitlines():
        cells = [cell.strip() for cell in line.split('|')]
        if len(cells) == 8 and f'`{command}`' in cells[2]:
            pairs.append([[float(x) for x in re.findall(r'\d+\.\d+', cell)] for cell in cells[4:6]])
    wanted = []
    for function in (limits.limit, limits.expected):
        wanted.append([function(cases[name].work, limits.GPUS['h200']) / unit for name in lines])
    assert any(pair == [pytest.approx(values, rel=8e-3) for values in wanted] for pair in pairs), (pairs, wanted)


# ---- what is compared ------------------------------------------------------------------------------

def test_the_vocabulary_is_the_tokenizer_s():
    """An odd vocabulary makes unaligned matrices; the benchmark left it out, and would not have shown it."""
    def vocab_of(*words):
        return sized(arguments(['head', *words]), start('cpu')).vocab
    assert vocab_of() == 151_665 and vocab_of('--vocab', '0') is None and vocab_of('--vocab', '9') == 9
    assert vocab_of('--model', 'smollm2') is None


@pytest.mark.parametrize('what, name', [('head', 'full KL'), ('update', 'OPD sampled'), ('step', 'OPD full KL')])
def test_the_vocabulary_reaches_the_objective(what, name, here, monkeypatch):
    """And the texts of an update have no other ids: on a GPU one of them ends the process."""
    seen = []

    def log_probs(*args, function=output_losses.log_probs, **how):
        logp = function(*args, **how)
        seen.append(logp.exp()[:, 17:].sum().item())
        return logp
    monkeypatch.setattr(output_losses, 'log_probs', log_probs)
    row, = here(what, *SMALL, '--vocab', '17', '--case', name).values()
    assert 'error' not in row and seen and not any(seen)


def test_the_vocabulary_reaches_the_sampler(monkeypatch):
    """At an id more than half of the others would be drawn."""
    decode = Decode(random_model(TOY, start('cpu', 'float32')), 3, 4, 5)
    decode()
    assert decode.slots.ids[:, :32].max() < 5


def test_the_compiled_step_is_one_graph_and_draws_the_same_tokens(monkeypatch):
    """A value that changes with each step would be compiled anew in each. (With torch's own compiler this takes a
    CPU two minutes; what it compiles is run as it is here.)"""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=as_it_is))
    model = random_model(TOY, start('cpu', 'float32'))
    compiled, plain = (kind(model, 2, 4, None) for kind in (CompiledDecode, Decode))
    compiled()
    plain()
    assert torch.equal(compiled.slots.ids, plain.slots.ids)
    compiled()
    assert len(graphs) == 1


def test_rollouts_of_all_kinds_write_the_same(here):
    """Greedy: refilled, in batches, and transformers' generate; equal lengths and spread ones."""
    for lengths in ('equal', 'spread'):
        told = {here('rollout', *SMALL, '--case', f'{lengths}: {who}')[f'{lengths}: {who}']['answers']
                for who in ('refilled', 'static batches', 'transformers')}
        assert len(told) == 1


def test_counts_of_the_loss_path(here):
    """Beyond the teacher's rows themselves less than as much again; nothing has the vocabulary's length."""
    got = here('loss', '--model', 'smollm2', '--rows', '40', '--tokens', '200', '--count')
    assert got['fused']['peak/payload'] < 2 < got['selected rows']['peak/payload'] < got['stacked fp32']['peak/payload'] / 4
    assert not any(r['V-axis'] or r['waits'] for r in got.values())


def test_tensors_of_either_vocabulary_are_counted(here):
    """The tokenizer's is shorter than the embedding's."""
    counts = [here('head', *SMALL, '--vocab', str(vocab), '--count')['full KL']['V-axis'] for vocab in (0, 17)]
    assert counts[0] == counts[1] > 0


def test_counts_of_an_update_and_a_token(here):
    """One forward of the student and one of the teacher; with hidden states alone the one tensor of the
    vocabulary's length is the embedding's gradient; a token is one forward and no wait."""
    for name, r in here('update', '--model', 'toy', '--rows', '2', '--tokens', '8', '--count').items():
        assert r['forwards'] == 2 and (r['V-axis'] == 1) == (name in ('OPRD', 'transformers, Eq. (6)')), name
    got = here('decode', '--model', 'toy', '--batch', '2', '--context', '4', '--count')
    assert (got['2 x 4']['forwards'], got['2 x 4']['waits']) == (1, 0) and got['2 x 4, transformers']['waits'] == 0


def test_bridge_and_pair(toy_dir, tmp_path):
    """Both fits read the same answers: 21 forwards to 1. Pairing of a vocabulary with itself is all exact,
    with the merged one not."""
    keys = [a for a in for_script('bridge.py', argv(toy_dir, 'x', toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged'))
            if '=' in a]
    lines = bench(tmp_path / 'x', 'bridge', '--rows', '20', '--keys', *keys).splitlines()
    got, = read_rows(tmp_path / 'x')
    assert (got['ridge']['forwards'], got['adamw']['forwards']) == (1, 21) and '21x the forwards' in lines[-1]
    assert got['ridge']['cos'].keys() == got['adamw']['cos'].keys() and got['ridge']['cos'] != got['adamw']['cos']
    folder = folder_of(load_config(['configs/toy.py', *keys]))
    texts = tmp_path / 'texts.txt'
    texts.write_text('3+7=0;0*4=0;\n1*1=1;\n')       # inside 7=, ;0, 4= and 1=
    for teacher, align in (('student', 1), ('teacher', 14 / 18)):
        bench(tmp_path / 'x', 'pair', '--tokenizers', str(folder / 'student'), str(folder / teacher), '--data',
              str(texts), '--repeat', '1')
        got = read_rows(tmp_path / 'x')[-1]
        assert got['align'] == pytest.approx(align) and (got['texts'], got['bytes']) == (2, 18) and got['mb_per_s'] > 0


def test_memory_of_the_head_loss_grows_with_the_chunk_not_with_the_rows(tmp_path):
    """V = 49,152, d = 576, float32, resident set of a process: the head's gradient is 113 MB and a chunk
    of 32 rows of logits 6 MB; whole logits of 512 rows are 101 MB each."""
    def peak(case, rows):
        bench(tmp_path / 'x', 'head', '--model', 'smollm2', '--rows', str(rows), '--chunk', '32', '--repeat', '1', '--case', case)
        return read_rows(tmp_path / 'x')[-1]['peak_mb']
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
    ('head --device cpu --model toy --vocab 22', '--vocab 22: toy has 21 ids'), ('loss --expect nope', "invalid choice: 'nope'"),
    ('loss --device cpu --model toy --rows 2 --tokens 4 --case nope', "--case 'nope': no line of this table; choose one of fused"),
])
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, line, says):
    """argparse writes two lines; an unknown device, dtype or case was a traceback."""
    monkeypatch.setattr(sys, 'argv', ['bench.py', *line.split()])
    with pytest.raises(SystemExit) as end:
        run(main, arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith('error: ') and printed.count('\n') == 1 and says in printed
