"""What only an NVIDIA GPU can show; skipped where there is none. Every Triton kernel against its reference on the GPU itself,
sampling with CUDA graphs against the plain sampler on the CPU, and the gradient of every objective against the CPU's."""
import pytest
import torch
from conftest import flat_sums, rounding, step_sums, tiny_model
from kernel_cases import NAMES, run

import rollout
from output_losses import add_product, log_probs, make_objective
from rollout import Rollout, naive, sample
from step import position_mask, position_weights

DEVICE = 'cuda'
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')

PROMPTS = [[1, 5, 9], [2, 3, 4, 5, 6, 7, 8, 9], [3], [10, 11, 12, 13, 14], [4, 4, 4, 4]]


def gpu_model(seed=0, **shape):
    """A tiny model with widths that a GPU's matrix units like."""
    return tiny_model(seed, **dict(d=64, H=4, G=2, e=16, ff=96, context=400) | shape)


@pytest.mark.parametrize('case, dtype', NAMES)
def test_the_kernel_equals_its_reference_on_a_gpu(case, dtype):
    """The interpreter knows nothing of registers, tiles or tensor cores."""
    pytest.importorskip('triton')
    run(case, dtype, DEVICE)


@pytest.mark.parametrize('room, shape, how', [
    (1024, {}, {}),
    (2, {}, {}),                # the cache grows, and the CUDA graph must be recorded anew
    (1024, dict(family='qwen2', V=5003), dict(vocab=4999, stop=list(range(60)))),
    (2, dict(family='llama'), dict(top_k=20, top_p=0.8)),
])
def test_sampling_equals_naive(monkeypatch, room, shape, how):
    """A graph that replays stale addresses, lengths or random numbers. The same answers as token by token on the
    CPU; one of the 15 may differ, where a random number falls within a rounding of the border of two tokens."""
    monkeypatch.setattr(rollout, 'ROOM', room)
    how = dict(max_new_tokens=60, stop=[0], seed=3, step=7) | how
    want = naive(gpu_model(**shape), PROMPTS, 3, **how).answers()
    got = sample(gpu_model(**shape).to(DEVICE), PROMPTS, 3, **how).answers()
    assert len(got) == len(want) == 15
    assert sum(a == b for a, b in zip(got, want, strict=True)) >= 14


def gradient(device, kind='mse', checkpointing=False, opd=None, **how):
    """One gradient of Eq. (7) in float32 -> {name: gradient on the CPU}, sums."""
    student = gpu_model(0, family='qwen2', V=301).to(device)
    teacher = gpu_model(1, family='qwen2', V=301).to(device)
    student.checkpointing = checkpointing
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(301, (3, 50), generator=g)
    lengths = torch.tensor([5, 9, 3]), torch.tensor([40, 30, 47])
    roll = Rollout(*(x.to(device) for x in (ids, *lengths, torch.ones(3, dtype=torch.bool), torch.arange(3))))
    w = position_weights(position_mask(roll, 'last_k', 25))
    terms = dict(opd_weight=1.0, output=make_objective(chunk=16, **opd)) if opd else {}
    sums = step_sums(student, teacher, roll, w, {1: 1, 3: 3}, 110, kind=kind, **terms, **how)
    return {name: p.grad.cpu() for name, p in student.named_parameters() if p.grad is not None}, flat_sums(sums).cpu()


@pytest.mark.parametrize('how', [
    dict(kind='mse'), dict(kind='nmse'), dict(kind='cosine'), dict(drift=True, checkpointing=True),
    dict(opd=dict(kind='full')), dict(opd=dict(kind='full', direction='forward')),
    dict(opd=dict(kind='topk', k=4, tail='bucket', support='union')),
    dict(opd=dict(kind='sampled', future=True, baseline=True)),
], ids=str)
def test_the_gradient_is_the_cpu_s(how):
    """Both in float32. The sums on the way, forth and back, have three times two times 400 terms (d, T, e, d, d and
    ff of a block), and those over the positions 75."""
    (want, want_sums), (got, got_sums) = gradient('cpu', **how), gradient(DEVICE, **how)
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= rounding(want[name], 2500), name
    assert (got_sums - want_sums).norm() <= rounding(want_sums, 2500)


def test_products_of_bfloat16_are_summed_in_float32():
    """Under the LM head, where two models near each other differ by less than bf16 can say. An odd vocabulary, and a
    head with padding rows, which no gradient may reach."""
    g = torch.Generator().manual_seed(0)
    h, W = (torch.randn(n, 256, generator=g).bfloat16() for n in (64, 5003))
    G = torch.randn(64, 4999, generator=g)
    got = log_probs(h.to(DEVICE), W[:4999].to(DEVICE), 0.7).cpu()
    want = (h.double() @ W[:4999].double().t() / 0.7).log_softmax(-1)
    assert got.dtype == torch.float32 and (got - want).norm() <= rounding(want.float(), 256)

    d_W = torch.zeros(5003, 256, device=DEVICE)
    add_product(d_W[:4999], G.to(DEVICE), h.to(DEVICE), 0.5)
    want = 0.5 * G.double().t() @ h.double()
    assert not d_W[4999:].any()
    assert (d_W[:4999].cpu() - want).norm() <= rounding(want.bfloat16(), 1)          # G is rounded to bf16 first
