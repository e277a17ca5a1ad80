"""
Cases that hold the CUDA path against the CPU: sampling against the plain sampler, gradients against the CPU's.

test_gpu.py runs them on an NVIDIA GPU, test_emulated_cuda.py on a device that is computed on the CPU.
"""
from unittest.mock import patch

import pytest
import torch
from conftest import flat_sums, rounding, step_sums, tiny_model

import rollout
from bridge_parts.saved import Bridge
from kernels import mlp_in_pieces
from output_losses import make_objective
from rollout import collect, naive, sample, stream
from step import position_mask, position_weights

PROMPTS = [[1, 5, 9], [2, 3, 4, 5, 6, 7, 8, 9], [3], [10, 11, 12, 13, 14], [4, 4, 4, 4]]


def cuda_model(seed=0, **shape):
    """A tiny model with widths that a GPU's matrix units like."""
    return tiny_model(seed, **dict(d=64, H=4, G=2, e=16, ff=96, context=400) | shape)


# ---- sampling --------------------------------------------------------------------------------------

SAMPLING = [                    # room in a new cache, the model, the sampling
    (1024, {}, {}),
    (2, {}, {}),                # the cache grows, and the CUDA graph must be recorded anew
    (1024, dict(family='qwen2', V=5003), dict(vocab=4999, stop=list(range(60)))),
    (2, dict(family='llama'), dict(top_k=20, top_p=0.8)),
    (2, dict(family='phi3', partial=0.75), dict(temperature=0)),
]


HOW = dict(stop=[0], seed=3, step=7)


def plain_answers(shape, how):
    """15 answers of the plain sampler on the CPU."""
    return naive(cuda_model(**shape), PROMPTS, 3, **HOW | dict(max_new_tokens=60) | how).answers()


def device_answers(device, room, shape, how):
    """The same answers on a device. room: of a new cache, beyond the longest prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, 'ROOM', room)
        return sample(cuda_model(**shape).to(device), PROMPTS, 3, **HOW | dict(max_new_tokens=60) | how).answers()


LIMITS = [40 - 2 * i for i in range(15)]


def plain_answers_of_limits():
    """15 answers of different lengths, each alone."""
    answers = []
    for i, limit in enumerate(LIMITS):
        answers += naive(cuda_model(), [PROMPTS[i % 5]], which=[i], max_new_tokens=limit, **HOW).answers()
    return answers


def refilled_answers(device, rows):
    """The same answers on a device, in fewer slots."""
    requests = [(PROMPTS[i % 5], i, 0) for i in range(15)]
    answers = stream(cuda_model().to(device), requests, rows=rows, max_new_tokens=LIMITS, poll_every=8, **HOW)
    return [ids for _, ids, _ in sorted(answers)]


def equal(got, want):
    """How many of two lists of answers are equal."""
    return sum(a == b for a, b in zip(got, want, strict=True))


# ---- gradients -------------------------------------------------------------------------------------

GRADIENTS = [
    dict(kind='mse'), dict(kind='nmse'), dict(kind='cosine'), dict(drift=True, checkpointing=True),
    dict(checkpointing=True, piece=40),
    dict(bridge=True), dict(bridge=True, normalise=False, opd=dict(kind='full')),
    dict(opd=dict(kind='full')), dict(oprd_weight=0.0, opd=dict(kind='full', direction='forward')),
    dict(opd=dict(kind='topk', k=4, tail='bucket', support='union')), dict(oprd_weight=0.0, opd=dict(kind='topk', k=4)),
    dict(oprd_weight=0.0, opd=dict(kind='sampled')), dict(opd=dict(kind='sampled', future=True, baseline=True)),
    dict(oprd_weight=0.0, opd=dict(kind='supervised')),
]


def random_bridge(device):
    """A bridge of rank 8 between layers of 64 numbers."""
    g = torch.Generator().manual_seed(2)
    sides = {}
    for name, shape in dict(mean=(64,), P_t=(8, 64), P_s=(2, 8, 64), b_s=(2, 8)).items():
        sides[name] = {l: torch.randn(shape, generator=g).to(device) for l in (1, 3)}
    return Bridge({1: 1, 3: 3}, 8, **sides)


def gradient(device, kind='mse', checkpointing=False, bridge=False, opd=None, lengths=((5, 40), (9, 30), (3, 47)),
             budget=110, piece=2048, **how):
    """One gradient of Eq. (7) in float32 -> {name: gradient on the CPU}, sums. lengths: of each prompt and its answer. On a
    GPU the answers have more padding than on a CPU, and other micro-batches."""
    student = cuda_model(0, family='qwen2', V=301).to(device)
    teacher = cuda_model(1, family='qwen2', V=301).to(device)
    student.checkpointing = checkpointing
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(301, (3, 400), generator=g).tolist()
    requests = [(row[:prompt], 0, 0) for row, (prompt, _) in zip(ids, lengths, strict=True)]
    answers = [(i, ids[i][prompt:prompt + new], True) for i, (prompt, new) in enumerate(lengths)]
    roll = collect(requests, 1, answers, torch.device(device))
    w = position_weights(position_mask(roll, 'last_k', 25))
    terms = dict(opd_weight=1.0, output=make_objective(chunk=16, **opd)) if opd else {}
    terms |= dict(bridge=random_bridge(device)) if bridge else {}
    with patch.object(mlp_in_pieces, 'PIECE', piece):
        sums = step_sums(student, teacher, roll, w, {1: 1, 3: 3}, budget, kind=kind, **terms, **how)
    return {name: p.grad.cpu() for name, p in student.named_parameters() if p.grad is not None}, flat_sums(sums).cpu()


def assert_same_gradient(one, other, count=2500):
    """Both in float32. The sums on the way, forth and back, have three times two times 400 terms (d, T, e, d, d and
    ff of a block, with T = 50), and those over the positions 75. count: of all terms, if T is another number."""
    (want, want_sums), (got, got_sums) = one, other
    assert got.keys() == want.keys() and want
    for name in want:
        assert (got[name] - want[name]).norm() <= rounding(want[name], count), name
    assert (got_sums - want_sums).norm() <= rounding(want_sums, count)
