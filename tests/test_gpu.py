"""What only an NVIDIA GPU can show; skipped where there is none. Every Triton kernel against its reference on the GPU itself,
sampling with CUDA graphs against the plain sampler on the CPU, and the gradient of every objective against the CPU's."""
import pytest
import torch
from conftest import rounding
from cuda_cases import (
    GRADIENTS,
    SAMPLING,
    assert_same_gradient,
    device_answers,
    equal,
    gradient,
    plain_answers,
    plain_answers_of_limits,
    refilled_answers,
)
from kernel_cases import NAMES, run

from output_losses import add_product, log_probs

DEVICE = 'cuda'
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')


@pytest.mark.parametrize('case, dtype', NAMES)
def test_the_kernel_equals_its_reference_on_a_gpu(case, dtype):
    """The interpreter knows nothing of registers, tiles or tensor cores."""
    pytest.importorskip('triton')
    run(case, dtype, DEVICE)


@pytest.mark.parametrize('room, shape, how', SAMPLING)
def test_sampling_equals_naive(room, shape, how):
    """A graph that replays stale addresses, lengths or random numbers. The same answers as token by token on the
    CPU; one of the 15 may differ, where a random number falls within a rounding of the border of two tokens."""
    assert equal(device_answers(DEVICE, room, shape, how), plain_answers(shape, how)) >= 14


@pytest.mark.parametrize('rows', [2, 5])
def test_refilled_slots_equal_naive(rows):
    """A graph that is replayed for a slot whose answer is another one by now."""
    assert equal(refilled_answers(DEVICE, rows), plain_answers_of_limits()) >= 14


@pytest.mark.parametrize('how', GRADIENTS, ids=str)
def test_the_gradient_is_the_cpu_s(how):
    """A kernel, a product or a sum that is something else on the GPU."""
    assert_same_gradient(gradient('cpu', **how), gradient(DEVICE, **how))


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
