"""Run by test_ranks.py under torchrun: several gradients and several runs in one start, since a start takes seconds.

    on_ranks.py JOBS.json        {"gradients": [arguments of write_gradient, ...], "runs": [arguments of whole_run, ...]}
                                 {"late": a rank that sleeps, "timeout": minutes}
                                 {"frozen": a rank that stops as with SIGSTOP}
                                 {"stop": seconds that rank 0 takes to save before all stop}
"""
import argparse
import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from conftest import step_sums
from safetensors.torch import save_file

import distill
from configs import load_config
from extensions.attention_maps import AttentionTerm
from formats.huggingface import load_model
from kernels import mlp_in_pieces
from output_losses import make_objective
from rollout import right_pad, sample
from step import diagnostic_mask, position_mask, position_weights
from studies import shards
from support import runtime
from support.answers import keep_answers
from support.optimizer import adamw
from support.runtime import (
    all_gather,
    all_reduce,
    barrier,
    bytes_on_rank,
    full,
    gathered,
    print0,
    run,
    shard,
    start,
)

PROMPTS = [[1, 5, 9, 12, 4, 14], [1, 4, 14], [1, 7, 10, 8, 11, 14]]


def gradient(student, teacher, budget, rank, world, opd='none'):
    """Sample, weigh, accumulate -> {name: gradient}, sums, rollout; answers dealt to the ranks. opd: 'none';
    'probe', the output space looked at; 'attention', attention maps alone; or a kind of output-space term beside OPRD."""
    mine = range(6)[rank::world]             # answer i is number i % 2 to prompt i // 2
    with gathered(student) as sampler:
        roll = sample(sampler, [PROMPTS[i // 2] for i in mine], which=[i // 2 for i in mine], samples=[i % 2 for i in mine],
                      max_new_tokens=20, stop=[2], seed=4)                   # bf16 draws the same
    mask = position_mask(roll, 'last_k', 9)
    weights = position_weights(mask, 'sequence', sequences=6, tokens=all_reduce(mask.sum()))
    terms = {}
    if opd == 'probe':
        terms = dict(probe=diagnostic_mask(roll, mask, 1, 0.3), output=make_objective('full'))
    elif opd == 'attention':
        terms = dict(oprd_weight=0.0, attention_weight=0.7, attention=AttentionTerm([1, 3], [1, 2], {}, student.config, teacher.config))
    elif opd != 'none':
        terms = dict(opd_weight=0.7, output=make_objective(opd, k=4, chunk=5))
    sums = step_sums(student, teacher, roll, weights, {1: 1, 3: 3}, budget, world, **terms)
    sums = {name: all_reduce(value) for name, value in sorted(sums.items())}
    grads = {name: full(p.grad).clone() for name, p in student.named_parameters() if p.grad is not None}
    return grads, sums, roll


def prepared(model, env, opd='none', recompute=False, frozen=False, sharded=True):
    """As distill.prepare_student and prepare_teacher."""
    model.requires_grad_(not frozen)
    model.checkpointing = recompute
    if not frozen:
        model.head.requires_grad_(model.config.tied or opd not in ('none', 'probe', 'attention'))
    if sharded:
        shard(model, env)


def write_gradient(env, out, student, teacher, budget=25, dtype='float64', recompute=False, opd='none', shard_ranks=0,
                   teacher_shard=False, piece=2048):
    """A gradient, its norm, sums, the answers, and the bytes that each rank has held, to a file."""
    mlp_in_pieces.PIECE = piece
    env = replace(env, dtype=getattr(torch, dtype), shard_ranks=shard_ranks or env.shard_ranks)
    model = load_model(student, torch.promote_types(env.dtype, torch.float32),
                       shard=partial(prepared, env=env, opd=opd, recompute=recompute))
    other = load_model(teacher, env.dtype, shard=partial(prepared, env=env, frozen=True, sharded=teacher_shard))
    opt = adamw(model, 1e-3, (0.9, 0.99), 1e-8, 0.0)
    grads, sums, roll = gradient(model, other, budget, env.rank, env.world, opd)
    norm = full(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0))
    bytes_of = torch.tensor(all_gather(list(bytes_on_rank(model, opt).values())))        # (W, 3)
    answers = {}
    for rank, texts in enumerate(all_gather(roll.answers())):
        for i, ids in zip(range(6)[rank::env.world], texts, strict=True):
            answers[i] = ids
    if env.rank == 0:
        tensors = {name: grad.contiguous() for name, grad in grads.items()}
        tensors |= {f'sum {name}': value for name, value in sums.items()}
        save_file(tensors | {'norm': norm, 'bytes': bytes_of, 'answers': right_pad([answers[i] for i in range(6)], torch.device('cpu'))}, out)


def whole_run(name, args, interrupt_at=0):
    """distill.main, with Ctrl-C on the last rank alone in the middle of a step: all must stop together."""
    real = distill.accumulate
    calls = []

    def accumulate(*a, **k):
        calls.append(1)
        if len(calls) == interrupt_at and int(os.environ['RANK']) == int(os.environ['WORLD_SIZE']) - 1:
            signal.raise_signal(signal.SIGINT)
        return real(*a, **k)
    distill.accumulate = accumulate
    print0(f'=== {name}')
    try:
        distill.main(load_config(args))
        assert not interrupt_at
    except KeyboardInterrupt:
        print0('=== interrupted')
    distill.accumulate = real


def stop(env, seconds):
    """The end of a step after Ctrl-C, where rank 0 is the last to have saved."""
    def save(*_):
        time.sleep(0 if env.rank else seconds)
        barrier('deleting old checkpoints')
    distill.save = save
    setup = SimpleNamespace(student=None, opt=None)
    distill.stop_or_save({'save_every': 1, 'steps': 9, 'keep': 1}, setup, env, {'step': 3}, None, [0.0])


def main(jobs):
    if 'frozen' in jobs:
        runtime.SIGN = 0.1
    env = start('cpu', timeout=jobs.get('timeout', 60))
    if 'late' in jobs:
        if env.rank == jobs['late']:
            time.sleep(100)
        keep_answers(Path('never'), 'student', 12, [], [], 0)
    if 'frozen' in jobs:
        time.sleep(0.5)
        if env.rank == jobs['frozen']:
            signal.raise_signal(signal.SIGSTOP)
        barrier('the rollout of step 12')
    if 'stop' in jobs:
        stop(env, jobs['stop'])
    for job in jobs.get('gradients', ()):
        write_gradient(env, **job)
    for job in jobs.get('runs', ()):
        whole_run(**job)
    if 'gradients' in jobs:
        shards.main(argparse.Namespace(model='toy', shard_ranks=0, device='cpu', dtype='float32'))


if __name__ == '__main__':
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    run(main, lambda: json.loads(Path(sys.argv[1]).read_text()))
