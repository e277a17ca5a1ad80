"""The memory estimate, held against what autograd keeps and against all tensors that are alive at once."""
import inspect
import os
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import step_sums, tiny_model

import rollout
from configs import default
from extensions import attention_maps
from extensions.attention_maps import AttentionTerm
from formats.huggingface import save_model
from kernels import mlp_in_pieces
from model import PACKED_FROM, PRESETS, Linear, Model, ModelConfig, rotary
from output_losses import make_objective
from rollout import Rollout, sample
from step import Objective, position_mask, position_weights
from studies import peaks
from studies.measure import Bytes
from support import checkpoints, memory
from support.memory import (
    PIECE,
    PREFILL,
    ROOM,
    MicroBatch,
    Plan,
    Work,
    bridge_phases,
    kept_by_block,
    largest_micro_batch,
    peak,
    phases,
    sampler,
    update,
    weights_of,
)
from support.runtime import ROOT, Env

FAMILIES = {
    'qwen3': dict(family='qwen3'),
    'qwen2': dict(family='qwen2'),
    'llama': dict(family='llama', G=4),
    'phi3': dict(family='phi3', partial=0.5, e=8),
    'tied': dict(family='llama', tied=True),
}


def shape(**keys):
    return ModelConfig(**dict(family='qwen3', V=37, L=3, d=20, H=4, G=2, e=6, ff=28, context=500) | keys)


def plan_of(c, work, world=1, dtype=torch.float32, device='cpu', layers=None, shard_ranks=0, **keys):
    """A Plan between two models of one shape."""
    layer_map = {l: l for l in layers or range(1, c.L + 1)}
    return Plan(default | dict(positions='all') | keys, c, c, layer_map, work, Env(0, world, 0, torch.device(device), dtype, shard_ranks or world))


def work_of_answers(answers, prompt, new, vocab=37):
    return Work(answers, answers, prompt, prompt, new, 0, 0, 0, 0, vocab)


@pytest.mark.parametrize('name', FAMILIES)
def test_weights_are_those_of_the_model(name):
    """By group: a bias or a norm that is forgotten is a wrong size of every shard and checkpoint."""
    c = shape(**FAMILIES[name])
    model = Model(c)
    weights = weights_of(c)
    assert weights.total == sum(p.numel() for p in model.parameters()) == c.count()
    assert weights.block == sum(p.numel() for p in model.blocks[0].parameters())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_block_keeps_what_autograd_saves(name, dtype):
    """Every tensor that one block saves for its backward, each memory once, without weights and rotary angles."""
    c = shape(**FAMILIES[name])
    model = Model(c).to(dtype)
    B, T = 2, 11
    h = torch.randn(B, T, c.d, dtype=dtype, requires_grad=True)
    rope = rotary(torch.arange(T), *model.rope_frequencies(T, h.device), dtype)
    other = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *rope)}
    saved = {}

    def pack(x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in other:
            saved[memory.data_ptr()] = memory      # kept, so that no other tensor gets its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.blocks[0](h, rope)
    kept = sum(memory.nbytes() for memory in saved.values())

    # In bfloat16 the norms' own factors are cast: d numbers of float32, or e, whatever the number of tokens.
    weights = (2 * c.d + (2 * c.e if c.qk_norm else 0)) * 4
    assert 0 <= kept - kept_by_block(c, dtype.itemsize, cuda=False) * B * T <= weights


UPDATES = {
    'hidden states': {},
    'one micro-batch after another': dict(token_budget=130),
    'blocks recomputed': dict(checkpointing=True),
    'MLP in pieces': dict(checkpointing=True, piece=50, L=12),
    'MLP in pieces, qwen2': dict(checkpointing=True, piece=50, L=12, family='qwen2'),
    'MLP in pieces, phi3, wide heads': dict(checkpointing=True, piece=20, L=12, family='phi3', partial=0.5, e=18),
    'MLP in pieces, exact KL': dict(checkpointing=True, piece=50, L=12, oprd_weight=0.0, opd_weight=1.0, opd='full'),
    'last layer': dict(layers=[4]),
    'exact KL': dict(oprd_weight=0.0, opd_weight=1.0, opd='full'),
    'both': dict(opd_weight=1.0, opd='full', token_budget=130),
    'attention': dict(attention_weight=1.0, attention_layers='all'),
    'attention, blocks recomputed': dict(attention_weight=1.0, attention_layers='all', checkpointing=True),
    'attention, MLP in pieces': dict(attention_weight=1.0, attention_layers='all', checkpointing=True, piece=50, L=12),
    'attention alone': dict(attention_weight=1.0, attention_layers='all', attention_heads=[1, 2], oprd_weight=0.0),
}


@pytest.mark.parametrize('name', UPDATES)
def test_an_update_holds_as_many_bytes_as_are_counted(name, monkeypatch):
    """All tensors alive at once in steps 4 and 5, of which the estimate must name the largest moment. A term that is
    missing, or that is added although it has gone by then, is seen here."""
    keys = dict(token_budget=10**6, checkpointing=False, oprd_weight=1.0, opd_weight=0.0, layers=None) | UPDATES[name]
    piece = keys.pop('piece', PIECE)
    for module in (mlp_in_pieces, memory):
        monkeypatch.setattr(module, 'PIECE', piece)
    of_shape = {key: keys.pop(key) for key in ('family', 'L', 'e', 'partial') if key in keys}
    c = shape(**dict(V=500, L=4, d=48, H=4, G=2, e=12, ff=120) | of_shape)
    student = Model(c)
    teacher = Model(c).requires_grad_(False)
    student.checkpointing = keys['checkpointing']
    if not keys['opd_weight']:
        student.head.requires_grad_(False)
    B, prompt, new = 4, 5, 60
    lengths = torch.full((B,), prompt), torch.full((B,), new)
    roll = Rollout(torch.randint(0, c.V, (B, prompt + new)), *lengths, torch.zeros(B, dtype=torch.bool), torch.arange(B))
    weights = position_weights(position_mask(roll))

    plan = plan_of(c, work_of_answers(B, prompt, new, c.V), **keys)
    objective = make_objective('full') if keys['opd_weight'] else None
    attention = None
    if plan.watched:
        attention = AttentionTerm(plan.cfg['attention_layers'], plan.cfg['attention_heads'], {}, c, c)
    with Bytes(c.V) as counted:
        step_sums(student, teacher, roll, weights, plan.layer_map if keys['oprd_weight'] else {}, keys['token_budget'],
                  output=objective, oprd_weight=keys['oprd_weight'], opd_weight=keys['opd_weight'], attention=attention,
                  attention_weight=plan.cfg['attention_weight'])
    assert sum(update(plan).values()) == pytest.approx(counted.peak, rel=0.06)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('logits', [2**24, 2**18])
def test_long_attention_maps_hold_as_many_bytes_as_are_counted(logits, recompute, monkeypatch):
    """Where pieces of maps are the largest tensors of an update, in one piece and in ten."""
    for module in (attention_maps, memory):
        monkeypatch.setattr(module, 'LOGITS', logits)
    c = shape(V=100, L=2, d=64, H=8, e=32, ff=256, context=1500)
    student = Model(c)
    teacher = Model(c).requires_grad_(False)
    student.checkpointing = recompute
    student.head.requires_grad_(False)
    lengths = torch.tensor([5]), torch.tensor([1495])
    roll = Rollout(torch.randint(0, c.V, (1, 1500)), *lengths, torch.zeros(1, dtype=torch.bool), torch.arange(1))
    weights = position_weights(position_mask(roll, 'last_k', 200))
    keys = dict(attention_weight=1.0, attention_layers='all', positions='last_k', last_k=200, checkpointing=recompute)
    plan = plan_of(c, work_of_answers(1, 5, 1495, c.V), **keys, token_budget=10**6)
    with Bytes(c.V) as counted:
        step_sums(student, teacher, roll, weights, plan.layer_map, attention=AttentionTerm('all', 'all', {}, c, c), attention_weight=1.0)
    assert sum(update(plan).values()) == pytest.approx(counted.peak, rel=0.06)


def test_the_papers_update_has_less_than_four_gigabytes_of_activations():
    """R1-Distill-Qwen-1.5B, two answers of 16k tokens, bfloat16, recomputed blocks: by count of all tensors alive at once,
    the teacher's rows among them, the gradients of large matrices apart. With the whole MLP of a block at once 7.5 GB. The
    dry run's estimate must be that of the count."""
    c = PRESETS['r1_1p5b']
    counted = peaks.counted_update(c, 2, 16_384)
    assert counted['activations'] < 4e9
    plan = plan_of(c, work_of_answers(2, 0, 16_384, c.V), 8, torch.bfloat16, 'cuda', checkpointing=True, positions='last_k',
                   token_budget=10**6)
    batch = largest_micro_batch(plan.cfg, plan.work)
    most = memory.backward_in_pieces(c.L, plan, batch, memory.teacher_rows(plan, batch))[0]
    estimate = most['activations'] + most["the teacher's rows"]
    assert estimate == pytest.approx(counted['activations'], rel=0.01)

    # Under torch.compile the MLP is whole: its estimate counts the block's input and the last norm's once too often, two of
    # 74 times N d numbers. The document has both counts.
    whole = peaks.counted_update(c, 2, 16_384, piece=10**9)
    most = memory.backward_of_block(c.L, plan, batch, memory.teacher_rows(plan, batch))
    assert most['activations'] + most["the teacher's rows"] == pytest.approx(whole['activations'], rel=0.03)
    assert not memory.in_pieces(replace(plan, cfg=plan.cfg | {'compile': True}), batch)
    row = ' | '.join(f'{sizes["activations"] / 1e9:.2f}' for sizes in (whole, counted))
    assert f'| activations, 2 x 16k | {row} |' in (ROOT / 'docs/speed.md').read_text()


def test_a_micro_batch_leaves_no_rows_behind(monkeypatch):
    """The teacher's rows of one micro-batch were still there while it read the next one: L x K x d numbers too many."""
    real = Objective.teacher_rows
    seen = []                                # a weak reference to each tensor of rows, of every micro-batch

    def teacher_rows(objective, teacher, rows):
        assert not any(reference() is not None for reference in seen)
        made = real(objective, teacher, rows)
        seen.extend(weakref.ref(tensor) for tensor in made.values())
        return made

    monkeypatch.setattr(Objective, 'teacher_rows', teacher_rows)
    roll = sample(tiny_model(0), [[1, 5, 9], [1, 4, 14]], 2, max_new_tokens=10, stop=[2], seed=4)
    step_sums(tiny_model(0), tiny_model(1), roll, position_weights(position_mask(roll)), {1: 1, 3: 3}, 25)
    assert len(seen) >= 4


@pytest.mark.parametrize('V, top_p', [(500, 1.0), (500, 0.9), (6000, 1.0), (6000, 0.9)])
def test_sampling_holds_as_many_bytes_as_are_counted(V, top_p):
    """The cache at its full length, and the tensors of a decode step, in a small and in a large vocabulary."""
    model = tiny_model(V=V, L=4, d=48, H=4, G=2, e=12, ff=120, context=300)
    prompts = [[1, 2, 3, 4, 5]] * 6
    with Bytes(V) as counted:
        sample(model, [list(prompt) for prompt in prompts], max_new_tokens=80, stop=[], top_p=top_p)
    need = sampler(model.config, 4, 6, 6, 5, 80, V, top_p)
    assert sum(need.values()) == pytest.approx(counted.peak, rel=0.15)


@pytest.mark.parametrize('tied', [False, True])
def test_packed_matrices_are_counted(tied):
    """On a CPU a second copy of the large ones, the head among them; on a GPU none."""
    decoder = tiny_model(V=5000, L=2, d=64, H=4, G=2, e=16, ff=3000, tied=tied)
    c = decoder.config
    cpu = Plan(default, c, c, {}, None, Env(0, 1, 0, torch.device('cpu'), torch.float32, 1))
    gpu = replace(cpu, env=replace(cpu.env, device=torch.device('cuda')))
    linear = [module for module in decoder.modules() if isinstance(module, Linear)]
    large = [module for module in linear if module.weight.numel() >= PACKED_FROM]
    assert 0 < len(large) < len(linear)
    assert sum(memory.packed(cpu, c).values()) == sum(module.weight.nbytes for module in large)
    assert memory.packed(gpu, c) == {}


def test_what_is_copied_is_what_it_was_copied_from():
    assert ROOM == rollout.ROOM
    assert PIECE == mlp_in_pieces.PIECE
    assert memory.LOGITS == attention_maps.LOGITS
    assert memory.PACKED_FROM == PACKED_FROM
    assert inspect.signature(rollout.stream).parameters['budget'].default == PREFILL


def test_micro_batches_are_those_of_the_step():
    """Two answers of 105 tokens fit into 250; an answer that is longer than the budget goes alone; the rule of positions
    bounds the rows."""
    work = work_of_answers(5, 5, 100)
    cfg = default | dict(positions='last_k', last_k=30)
    assert largest_micro_batch(cfg | dict(token_budget=250), work) == MicroBatch(210, 60, True)
    assert largest_micro_batch(cfg | dict(token_budget=50), work) == MicroBatch(105, 30, True)
    assert largest_micro_batch(cfg, work) == MicroBatch(525, 150, False)
    for rule, rows in dict(all=500, drift=500, last=5, first_frac=150).items():
        assert largest_micro_batch(cfg | dict(positions=rule, first_frac=0.3), work).rows == rows


def test_phases_are_not_added():
    """Sampling and update never overlap. An evaluation of many answers is a phase of its own, and can be the largest."""
    c = shape(V=500, L=4, d=48, H=4, G=2, e=12, ff=120)
    work = work_of_answers(4, 5, 60)
    usual = phases(plan_of(c, work))
    assert list(usual) == ['load', 'sample', 'update', 'save']
    many = phases(plan_of(c, replace(work, eval_answers=2000, eval_total=2000, eval_prompt=5, eval_new=200)))
    assert peak(many) == 'evaluate' and sum(many['evaluate'].values()) > sum(usual[peak(usual)].values())
    assert {phase: many[phase] for phase in usual} == usual


@pytest.mark.parametrize('checkpointing', [False, True])
def test_more_ranks_need_less_each(checkpointing):
    """Weights, moments and gradients are shared out; the teacher and the gathered copy are not."""
    c = shape(V=500, L=12, d=48, H=4, G=2, e=12, ff=120)
    need = []
    for world in (2, 4, 8):
        plan = plan_of(c, work_of_answers(2, 5, 60), world, torch.bfloat16, 'cuda', checkpointing=checkpointing)
        estimate = phases(plan)
        assert estimate['sample']['AdamW, float32'] == 8 * (c.count() - c.V * c.d) / world
        assert estimate['sample']['teacher weights'] == 2 * c.count()
        need.append(sum(estimate['update'].values()))
    assert need == sorted(need, reverse=True) and need[0] > need[-1]


def test_copies_on_several_machines_cost_what_one_machine_costs():
    """Shards are of shard_ranks ranks: 64 ranks in eight copies hold as much each as eight ranks in one, but for the resume
    state, of which each of the 64 writes its part."""
    c = shape(V=500, L=12, d=48, H=4, G=2, e=12, ff=120)
    work = work_of_answers(2, 5, 60)
    one, eight = (phases(plan_of(c, work, world, torch.bfloat16, 'cuda', shard_ranks=8)) for world in (8, 64))
    assert one == eight
    alone = phases(plan_of(c, work, 64, torch.bfloat16, 'cuda'))
    assert alone['sample']['AdamW, float32'] == one['sample']['AdamW, float32'] / 8
    small, large = (memory.saving(plan_of(c, work, 64, torch.bfloat16, 'cuda', shard_ranks=n)) for n in (64, 8))
    assert small == large


@pytest.mark.parametrize('tied', [False, True])
def test_a_sharded_teacher_is_gathered_a_block_at_a_time(tied):
    """Its shards, two blocks and the embedding while it reads, its head under the loss, and all of it for its evaluation."""
    c = shape(V=500, L=12, d=48, H=4, G=2, e=12, ff=120, tied=tied)
    work = replace(work_of_answers(2, 5, 60), eval_answers=4, eval_total=4, eval_prompt=5, eval_new=60)
    whole, shards = (plan_of(c, work, 8, torch.bfloat16, 'cuda', teacher_shard=flag, opd_weight=1.0) for flag in (False, True))
    weights = weights_of(c)
    assert phases(shards)['update']['teacher weights'] * 8 == phases(whole)['update']['teacher weights'] == 2 * c.count()
    batch = largest_micro_batch(shards.cfg, work)
    fsdp = 'gathered weights and buffers of FSDP'
    reads = [memory.teacher_forward(plan, batch, 0)[fsdp] for plan in (whole, shards)]
    assert reads[1] - reads[0] == 2 * (2 * weights.block + weights.embed)
    under_head = [memory.loss_under_head(plan, batch, 0)[fsdp] for plan in (whole, shards)]
    assert under_head[1] - under_head[0] == 2 * (weights.embed if tied else weights.head)

    # Without its evaluation nobody needs all of it.
    evaluated = phases(shards)['evaluate'], phases(replace(shards, teacher=replace(c, L=24)))['evaluate']
    assert 'teacher weights, gathered for sampling' in evaluated[1]
    spared = phases(replace(shards, teacher=replace(c, L=24), cfg=shards.cfg | {'eval_teacher': False}))['evaluate']
    assert 'teacher weights, gathered for sampling' not in spared and sum(spared.values()) < sum(evaluated[1].values())


def test_the_cache_is_that_of_the_model_that_writes():
    """With answers_by='teacher' the larger model samples; the estimate had the student's cache."""
    student = shape(L=2, d=48, H=4, G=2, e=12)
    teacher = replace(student, L=24)
    plan = replace(plan_of(student, work_of_answers(4, 5, 60)), teacher=teacher)
    caches = {}
    for writer, c in (('student', student), ('teacher', teacher)):
        caches[writer] = phases(replace(plan, cfg=plan.cfg | {'answers_by': writer}))['sample']['KV cache']
        assert caches[writer] == memory.cache_bytes(c, plan.s, plan.work.answers, plan.work.prompt + plan.work.new)
    assert caches['teacher'] == 12 * caches['student']


def test_nobody_holds_a_whole_student_while_it_is_read():
    """Every rank had all of it in float32 for a moment: 128 GB for a student of 32B."""
    c = shape(V=500, L=12, d=48, H=4, G=2, e=12, ff=120)
    load = phases(plan_of(c, work_of_answers(2, 5, 60), 8, torch.bfloat16, 'cuda'))['load']
    assert sum(load.values()) - load['teacher weights'] < 4 * c.count()


def test_a_bridge_holds_moments_of_two_classes():
    """By the example in bridge_parts/closed_form.py: 28 pairs of layers of 2048 and 2560 numbers, 7.2 GB."""
    student = shape(L=28, d=2048)
    teacher = shape(L=28, d=2560)
    plan = replace(plan_of(student, work_of_answers(4, 5, 60)), teacher=teacher)
    estimate = bridge_phases(plan)
    assert estimate['fit']['moments'] == 28 * 2 * (2048**2 + 2048 * 2560 + 2560**2) * 8
    assert peak(estimate) == 'judge'


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_run_takes_about_what_is_estimated():
    """A process of its own, measured from outside. The bound is wide: libraries keep some tens of MB of their own, and
    200 MB is what a test may take; python -m studies.peaks measures larger runs."""
    c = ModelConfig('qwen3', V=256, L=3, d=512, H=8, G=4, e=64, ff=1536, context=256)
    keys = dict(max_new_tokens=60, prompts_per_step=8, max_prompt_tokens=100)
    estimate, need = peaks.compared(c, 1, keys, dict(os.environ) | peaks.FIXED)
    assert 0.6 < estimate['step'] / need['step'] < 1.4


def test_the_sizes_of_files_are_those_that_are_written():
    """They are written down twice, because importing the code that saves would load half of the project."""
    assert memory.FILE_BYTES == checkpoints.FILE_BYTES
    assert memory.SHARD_BYTES == inspect.signature(save_model).parameters['shard_bytes'].default
    assert memory.ROOM == rollout.ROOM
