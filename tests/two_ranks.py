"""Run by test_ranks.py under torchrun, on the tiny toy:

    two_ranks.py gradient OUT.safetensors STUDENT TEACHER BUDGET DTYPE RECOMPUTE OPD   one gradient, to a file
    two_ranks.py interrupt STEP configs/toy.py key=value ...                        a run, Ctrl-C in a step
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from conftest import step_sums
from safetensors.torch import save_file

import distill
from configs import load_config
from formats.huggingface import load_model
from output_losses import make_objective
from rollout import sample
from step import diagnostic_mask, position_mask, position_weights
from support.runtime import all_reduce, full, gathered, run, shard, start

PROMPTS = [[1, 5, 9, 12, 4, 14], [1, 4, 14], [1, 7, 10, 8, 11, 14]]


def gradient(student, teacher, budget, rank, world, opd='none'):
    """Sample, weigh, accumulate -> {name: gradient}, sums, ids; prompts dealt to the ranks. opd: 'none';
    'probe', the output space looked at; or a kind of output-space term beside OPRD."""
    mine = range(6)[rank::world]             # answer i is number i % 2 to prompt i // 2
    with gathered(student) as sampler:
        roll = sample(sampler, [PROMPTS[i // 2] for i in mine], which=[i // 2 for i in mine], samples=[i % 2 for i in mine],
                      max_new_tokens=20, stop=[2], seed=4)                   # bf16 draws the same
    mask = position_mask(roll, 'last_k', 9)
    weights = position_weights(mask, 'sequence', sequences=6, tokens=all_reduce(mask.sum()))
    terms = {}
    if opd == 'probe':
        terms = dict(probe=diagnostic_mask(roll, mask, 1, 0.3), output=make_objective('full'))
    elif opd != 'none':
        terms = dict(opd_weight=0.7, output=make_objective(opd, k=4, chunk=5))
    sums = step_sums(student, teacher, roll, weights, {1: 1, 3: 3}, budget, world, **terms)
    sums = {name: all_reduce(value) for name, value in sorted(sums.items())}
    grads = {name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return grads, sums, roll


def write_gradient(out, student, teacher, budget, dtype, recompute, opd='none'):
    env = start('cpu', dtype)
    model = load_model(student, torch.promote_types(env.dtype, torch.float32))
    model.checkpointing = recompute == 'True'
    model.head.requires_grad_(model.config.tied or opd not in ('none', 'probe'))
    grads, sums, _ = gradient(shard(model, env), load_model(teacher, env.dtype), int(budget), env.rank, env.world, opd)
    if env.rank == 0:
        save_file({k: v.contiguous() for k, v in grads.items()} | {f'sum {name}': value for name, value in sums.items()}, out)


def interrupt(step, *args):
    """distill.main, with Ctrl-C on the last rank alone in the middle of a step: all must stop together."""
    real, calls = distill.accumulate, []

    def accumulate(*a, **k):
        calls.append(1)
        if len(calls) == int(step) and int(os.environ['RANK']) == int(os.environ['WORLD_SIZE']) - 1:
            signal.raise_signal(signal.SIGINT)
        return real(*a, **k)
    distill.accumulate = accumulate
    distill.main(load_config(list(args)))


if __name__ == '__main__':
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    job = {'gradient': write_gradient, 'interrupt': interrupt}[sys.argv[1]]
    run(lambda args: job(*args), lambda: sys.argv[2:])
