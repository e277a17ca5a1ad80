"""The calculation of steps on many GPUs, held against the sampler, the cutting and the counts that it imitates."""
import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model

import rollout
import step
from rollout import Rollout, Slots, sample
from studies import scale
from support import plan as dry_run
from support.memory import phases, weights_of
from support.plan import Rates
from support.runtime import ROOT

READ_BOUND = Rates(1e30, 1e9, '')
COMPUTE_BOUND = Rates(1e9, 1e30, '')


def machine_of(rate=READ_BOUND, poll=1, compact_at=0.75):
    return scale.Machine(rate, 1e9, 1e8, 8, poll, compact_at)


@pytest.mark.parametrize('rate', [READ_BOUND, COMPUTE_BOUND])
@pytest.mark.parametrize('poll', [1, 32, 100])
def test_equal_answers_take_what_a_dry_run_says(rate, poll):
    """Without a tail there is a closed form: new tokens, each as in the middle of the lengths. A step that is counted
    twice or left out at the end of the loop is seen here."""
    plan = scale.plan_of(scale.STUDENTS['8B'], 8)
    lengths = np.full((2, 3, 5), 777)
    seconds = scale.sampling_seconds(plan, lengths, machine_of(rate, poll))
    expected = dry_run.sampling_seconds(plan.student, plan.s, 5, scale.PROMPT, 777, rate)
    assert seconds.shape == (2, 3)
    assert np.allclose(seconds, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize('poll', [1, 4])
def test_rows_leave_the_batch_as_in_the_sampler(poll, monkeypatch):
    """The real sampler answers with given lengths; each of its decode steps notes how many rows are computed and how many
    still hold keys. Guards against a batch that shrinks too early, too late, or at the wrong share."""
    lengths = [3, 40, 17, 9, 22, 5, 33, 18]
    prompt = 6
    model = tiny_model()
    computed = []
    real = Slots.decode_step

    def noted(slots):
        computed.append((len(slots.all_slots), int((slots.cache.length > 0).sum())))
        real(slots)

    monkeypatch.setattr(Slots, 'decode_step', noted)
    prompts = [[1, 2, 3, 4, 5, i] for i in range(len(lengths))]
    sample(model, prompts, max_new_tokens=lengths, stop=[], poll_every=poll)

    # The first token of an answer comes from reading its prompt, so an answer of T tokens takes T - 1 steps.
    c = model.config
    base = scale.plan_of(c, 1)
    plan = replace(base, work=replace(base.work, prompt=prompt))
    dealt = np.array([lengths]) - 1
    per_row = 2 * (weights_of(c).blocks + c.V * c.d)
    flops = 0.0
    read = 0.0
    for t, (rows, alive) in enumerate(computed):
        held = prompt + t + 0.5
        flops += rows * (per_row + 4 * c.L * held * c.H * c.e)
        read += plan.s * (per_row / 2 + alive * held * 2 * c.L * c.G * c.e)
    assert scale.sampling_seconds(plan, dealt, machine_of(Rates(1, 1e30, ''), poll))[0] == pytest.approx(flops, rel=1e-12)
    assert scale.sampling_seconds(plan, dealt, machine_of(Rates(1e30, 1, ''), poll))[0] == pytest.approx(read, rel=1e-12)


def test_the_sampler_is_described_as_it_is():
    """How often it looks, and when it drops rows, are written down twice."""
    source = inspect.getsource(rollout.stream)
    assert f'({scale.ON_GPU[0]} if on_cuda else {scale.ON_CPU[0]})' in source
    assert f'{scale.ON_GPU[1]} if on_cuda else {scale.ON_CPU[1]}' in source


def test_answers_are_dealt_as_in_the_training_loop():
    """By number, with prompts that do not come out even: what distill.py's step 1 gives to each rank."""
    prompts, n, world = 5, 3, 4
    lengths = np.arange(1, 1 + 2 * prompts * n).reshape(2, prompts, n)
    flat = lengths.reshape(2, -1)
    by_answer = scale.deal(lengths, world, 'answer')
    by_prompt = scale.deal(lengths, world, 'prompt')
    for seed in range(2):
        for rank in range(world):
            mine = range(rank, prompts * n, world)
            assert [int(x) for x in by_answer[seed, rank] if x] == [flat[seed, i] for i in mine]
            slots = range(rank, prompts, world)
            assert [int(x) for x in by_prompt[seed, rank] if x] == [x for slot in slots for x in lengths[seed, slot]]


def test_dealing_by_length_evens_the_sums():
    """Longest first, then back: of two answers each, a rank gets the longest and the shortest, the second longest and
    the second shortest, and so on."""
    lengths = np.array([[[9, 1], [7, 3], [8, 2]]])
    assert scale.deal(lengths, 3, 'length').tolist() == [[[9, 1], [8, 2], [7, 3]]]
    drawn = scale.draw_lengths(32, 2, 16384)
    spread = {how: scale.deal(drawn, 32, how).sum(-1).max(1).mean() for how in ('prompt', 'answer', 'length')}
    assert spread['length'] < spread['answer'] < spread['prompt']
    with pytest.raises(AssertionError):
        scale.deal(lengths, 3, 'luck')


@pytest.mark.parametrize('ranks', [2, 8, 64])
def test_dealing_by_answer_never_waits_longer_on_average(ranks, monkeypatch):
    """The answers to a hard prompt are long together. Apart, they make more ranks long, and the mean over ranks comes
    nearer to the longest. The means are over 400 drawn steps: over 20 they can come out the other way."""
    monkeypatch.setattr(scale, 'SEEDS', 400)
    plan = scale.plan_of(scale.STUDENTS['1.5B'], ranks)
    machine = replace(scale.gpu_machine(), poll=512)
    drawn = scale.draw_lengths(plan.cfg['prompts_per_step'], plan.cfg['n'], plan.work.new)
    waiting = {}
    last = {}
    for how in ('prompt', 'answer'):
        seconds = scale.sampling_seconds(plan, scale.deal(drawn, ranks, how), machine)
        waiting[how] = (1 - seconds.mean(1) / seconds.max(1)).mean()
        last[how] = seconds.max(1).mean()
    assert waiting['answer'] < waiting['prompt'] and last['answer'] < last['prompt']


def test_equal_answers_do_not_wait():
    """And with two of them on a rank, the step takes little longer than one of them alone."""
    step = scale.simulate(scale.plan_of(scale.STUDENTS['1.5B'], 8), scale.gpu_machine(), spread=0)
    assert step.waiting == pytest.approx(0, abs=1e-12)
    assert step.longest < step.sampling < 1.1 * step.longest


def test_micro_batches_are_those_of_the_training_step(monkeypatch):
    """step.cut_rollout on each rank's answers: as many, and padded to as many tokens. A rank that has run out repeats its
    first answer, which the others wait for."""
    tokens = np.array([[50, 20, 9, 31], [12, 11, 10, 0], [60, 0, 0, 0]])
    budget = 64
    answers, padded = scale.cut(tokens, budget)
    monkeypatch.setattr(step, 'all_reduce', lambda count, op: torch.tensor(answers.shape[1]))
    for rank, row in enumerate(tokens):
        lengths = torch.tensor([x for x in row.tolist() if x])
        B = len(lengths)
        roll = Rollout(torch.ones(B, int(lengths.max()), dtype=torch.long), torch.full((B,), 4), lengths - 4,
                       torch.ones(B, dtype=torch.bool), torch.arange(B))
        weights = step.position_weights(step.position_mask(roll))
        shapes = [tuple(rows.ids.shape) for rows in step.cut_rollout(roll, weights, budget)]
        assert shapes == list(zip(answers[rank].tolist(), padded[rank].tolist(), strict=True))


def test_one_micro_batch_takes_what_a_dry_run_counts():
    """Answers of full length on one rank: support.plan.update_flops, divided by the rate."""
    plan = scale.plan_of(scale.STUDENTS['1.5B'], 1)
    dealt = np.full((1, 1, plan.work.answers), plan.work.new)
    seconds, count = scale.update_seconds(plan, dealt, machine_of(COMPUTE_BOUND))
    assert seconds == pytest.approx(dry_run.update_flops(plan) / 1e9, rel=1e-12)
    assert count == 16                       # an answer of 16,684 tokens fills a budget of 32,768


def test_the_network_of_two_machines():
    """In bytes, by hand: two copies in eight shards each. One machine alone sums nothing with others."""
    student = scale.STUDENTS['8B']
    weights = weights_of(student)
    blocks, embed, total = weights.blocks, weights.embed, weights.total
    learned = total - weights.head           # OPRD never reaches the head
    machine = machine_of()
    shared = 7 / 8 * (2 * total + 3 * (2 * 2 * blocks + 2 * embed + 4 * learned))
    one = scale.network_seconds(scale.plan_of(student, 8), 3, machine)
    two = scale.network_seconds(scale.plan_of(student, 16), 3, machine)
    assert one == pytest.approx(shared / 1e9, rel=1e-12)
    assert two - one == pytest.approx(3 * 4 * learned / 8 / 1e8, rel=1e-9)   # of two copies each sends one
    sharded = scale.network_seconds(scale.plan_of(student, 8, teacher_shard=True), 3, machine)
    assert sharded - one == pytest.approx(7 / 8 * 3 * 2 * (blocks + embed) / 1e9, rel=1e-9)
    assert scale.network_seconds(scale.plan_of(student, 1), 3, machine) == 0


def test_shapes_have_the_published_numbers_of_weights():
    """Billions, as the model cards say them; and as model.py builds them."""
    totals = [round(weights_of(student).total / 1e9, 2) for student in scale.STUDENTS.values()]
    assert totals == [1.78, 8.19, 32.76]
    for student in scale.STUDENTS.values():
        assert weights_of(student).total == student.count()


@pytest.fixture(scope='module')
def lines():
    return scale.tables()


def cells_of(lines, title):
    """The rows of a table under its title, as lists of cells."""
    start = lines.index(title) + 4
    rows = []
    while lines[start].startswith('|'):
        rows.append([cell.strip() for cell in lines[start].strip('|').split('|')])
        start += 1
    return rows


def test_the_bytes_of_each_phase_are_those_of_the_estimate(lines):
    """All twelve cells, teacher whole and in shards; shards are those of one machine on 64 and 512 GPUs too."""
    rows = cells_of(lines, 'Memory of a GPU, GiB, teacher whole / in shards, and what fits:')
    assert [row[:2] for row in rows] == [[str(gpus), name] for gpus in (1, 8, 64, 512) for name in ('1.5B', '8B', '32B')]
    for gpus, name, *cells in rows:
        whole, shards = (phases(scale.plan_of(scale.STUDENTS[name], int(gpus), teacher_shard=flag)) for flag in (False, True))
        S = min(int(gpus), 8)
        weights = weights_of(scale.STUDENTS[name])
        assert whole['sample']['AdamW, float32'] == pytest.approx(8 * (weights.total - weights.head) / S)
        assert shards['sample']['teacher weights'] == pytest.approx(2 * weights.total / S)
        for cell, phase in zip(cells, ('load', 'sample', 'evaluate', 'update'), strict=False):
            assert cell == ' / '.join(f'{sum(estimate[phase].values()) / 2**30:.0f}' for estimate in (whole, shards))


def test_what_does_not_fit_says_so(lines):
    """64 GB of bfloat16 weights beside the shards do not fit 80 GB, on any number of GPUs."""
    rows = cells_of(lines, 'Memory of a GPU, GiB, teacher whole / in shards, and what fits:')
    assert all(row[6].startswith('no: ') for row in rows if row[1] == '32B')
    limits = {(row[0], row[1]): row[-1] for row in cells_of(lines, 'Time of a step:')}
    assert len(limits) == 12
    assert all(limit.startswith('80 GB of memory') == (name == '32B' or (gpus, name) == ('1', '8B'))
               for (gpus, name), limit in limits.items())


def test_on_how_many_gpus_an_8b_pair_fits():
    """docs/scale.md said that it needs eight: the tables have no rows of two and four."""
    found = [[scale.fits(scale.STUDENTS['8B'], gpus, size) for gpus in (1, 2, 4)] for size in ('80 GB', '141 GB')]
    assert [words.startswith('no: ') for words in found[0]] == [True, True, False]
    assert [words.startswith('no: ') for words in found[1]] == [True, False, False]
    text = (ROOT / 'docs/scale.md').read_text()
    assert 'four GPUs of 80 GB (`eval_rows=4`;' in text and found[0][2] == 'teacher whole, eval_rows=4'
    assert 'two of 141 GB\n(`eval_rows=16`)' in text and found[1][1] == 'teacher whole, eval_rows=16'


def test_docs_show_the_tables_as_they_are_calculated(lines):
    """After a change of a count or of an assumption: python -m studies.scale, and paste its tables."""
    text = (ROOT / 'docs/scale.md').read_text()
    missing = [line for line in lines if line and line not in text]
    assert missing == []


def test_the_rates_of_a_rank_are_a_line_of_json(monkeypatch):
    """`check` reads them from its ranks. One rank receives nothing from others, in no time."""
    monkeypatch.setattr(scale.time, 'perf_counter', scale.time.perf_counter)
    said = []
    monkeypatch.setattr(scale, 'print0', said.append)
    scale.measure_rates()
    rates = json.loads(said[0])
    assert rates['flops'] > 1e8 and rates['bytes'] > 1e8 and rates['received'] == float('inf')
