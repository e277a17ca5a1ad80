"""Run by test_ranks.py under torchrun, on the tiny toy:

    two_ranks.py gradient OUT.safetensors STUDENT TEACHER BUDGET DTYPE RECOMPUTE OPD   one gradient, to a file
    two_ranks.py interrupt STEP configs/toy.py key=value ...                        a run, Ctrl-C in a step
"""
import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import save_file

import distill
from configs import load_config
from formats.huggingface import load_model
from losses import position_weights, positions, spread
from output_losses import opd_loss
from rollout import sample
from support.runtime import all_reduce, full, gathered, run, shard, start

PROMPTS = [[1, 5, 9, 12, 4, 14], [1, 4, 14], [1, 7, 10, 8, 11, 14]]


def gradient(student, teacher, budget, rank, world, opd='none'):
    """Sample, weigh, accumulate -> {name: gradient}, sums, ids; prompts dealt to the ranks. opd: 'none';
    'probe', the output space looked at; or a kind of output-space term beside OPRD."""
    mine = list(range(3))[rank::world]
    with gathered(student) as sampler:
        roll = sample(sampler, [PROMPTS[i] for i in mine], 2, which=mine, max_new_tokens=20, stop=[2], seed=4)    # bf16 draws the same
    m = positions(roll, 'last_k', 9)
    w = position_weights(m, 'sequence', sequences=6, tokens=all_reduce(m.sum()))
    terms = dict(opd_weight=0.7, opd=partial(opd_loss, kind=opd, k=4, chunk=5)) if opd not in ('none', 'probe') else {}
    if opd == 'probe':
        terms = dict(probe=spread(roll, m, 1, 0.3), opd=opd_loss)
    sums = all_reduce(distill.accumulate(student, teacher, roll, w, {1: 1, 3: 3}, 'mse', budget, factor=world, **terms))
    grads = {name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return grads, sums, roll


def write_gradient(out, student, teacher, budget, dtype, recompute, opd='none'):
    place = start('cpu', dtype)
    model = load_model(student, torch.promote_types(place.dtype, torch.float32))
    model.checkpointing = recompute == 'True'
    model.head.requires_grad_(model.config.tied or opd not in ('none', 'probe'))
    grads, sums, _ = gradient(shard(model, place), load_model(teacher, place.dtype), int(budget), place.rank, place.world, opd)
    if place.rank == 0:
        save_file({k: v.contiguous() for k, v in grads.items()} | {'sums': sums}, out)


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
