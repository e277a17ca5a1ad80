"""Run by test_ranks.py under torchrun: one gradient of the tiny toy, whole, to a file.

    torchrun --nproc_per_node=2 tests/two_ranks.py OUT.safetensors STUDENT TEACHER BUDGET DTYPE
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import save_file

from distill import accumulate
from losses import position_weights, positions
from model import load_model
from rollout import sample
from runtime import all_reduce, full, gathered, shard, start

PROMPTS = [[1, 5, 9, 12, 4, 14], [1, 4, 14], [1, 7, 10, 8, 11, 14]]


def gradient(student, teacher, budget, rank, world):
    """Sample, weigh, accumulate -> {name: gradient}, sums, ids; prompts dealt to the ranks."""
    mine = list(range(3))[rank::world]
    with gathered(student):
        roll = sample(student, [PROMPTS[i] for i in mine], 2, which=mine, max_new_tokens=20, stop=[2], seed=1)
    m = positions(roll, 'last_k', 9)
    w = position_weights(m, 'sequence', sequences=6, tokens=all_reduce(m.sum()))
    sums = all_reduce(accumulate(student, teacher, roll, w, [1, 3], 'mse', budget, factor=world))
    grads = {name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return grads, sums, roll


if __name__ == '__main__':
    torch.set_num_threads(1)
    out, student, teacher, budget, dtype = sys.argv[1:]
    place = start('cpu', dtype)
    model = shard(load_model(student), place)
    grads, sums, _ = gradient(model, load_model(teacher, place.dtype), int(budget), place.rank, place.world)
    if place.rank == 0:
        save_file({k: v.contiguous() for k, v in grads.items()} | {'sums': sums}, out)
    torch.distributed.destroy_process_group()
