"""How many kernels a decode step launches on a GPU, counted without one.

The step is the one of R1-Distill-Qwen-1.5B at its true shape, in fake tensors, which have shapes and no numbers. It takes
the branches that a CUDA tensor takes (`kernels.fused` says yes). The rule of counting:

- A launch of a Triton kernel is one, and is not run.
- An operation of PyTorch is one, a product of matrices included: the library may need a second kernel for one product.
- A view, an empty tensor and a question about a device launch nothing.
- RMSNorm is one. On a CPU it consists of several operations, on CUDA it is a kernel.
- The model packs no weights here: that is for CPUs.
"""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model
from kernels import decode_products, decode_sampling
from rollout import Sampling, Slots

jit = pytest.importorskip('triton.runtime.jit')

SHAPE = model.PRESETS['r1_1p5b']
VOCAB = 151_665                 # the tokenizer's; the embedding is padded
FREE = {'aten::empty', 'aten::empty_like', 'aten::new_empty', 'aten::detach', 'aten::_unsafe_view', 'prim::device'}


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel, by name."""
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not func.is_view and name not in FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def made_in_bfloat16():
    """The model in bfloat16. (A fake tensor cannot be cast in place.)"""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return model.Model(SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def launches(monkeypatch):
    """launches(rows, settings of the sampler) -> {name: how many} of one decode step."""
    counter = Launches()

    def launch(kernel, *args, **how):
        counter.count[kernel.__name__] += 1

    def rms_norm(x, *args):
        counter.count['rms_norm'] += 1
        return torch.empty_like(x)

    monkeypatch.setattr(jit.JITFunction, 'run', launch)
    monkeypatch.setattr(kernels, 'fused', lambda h: True)
    monkeypatch.setattr(F, 'rms_norm', rms_norm)
    monkeypatch.setattr(model.Model, 'packed', lambda self: self)

    @torch.no_grad()
    def count(rows, **settings):
        with FakeTensorMode():
            decoder = made_in_bfloat16()
            slots = Slots(decoder, rows, 1024, 2048, 99, Sampling(stop=[0], vocab=VOCAB, **settings))
            slots.decode_step()              # the frequencies of the rotation are computed once
            counter.count.clear()
            with counter:
                slots.decode_step()
        return Counter(counter.count)
    return count


def split(count):
    """{name: how many} -> launches of a layer, and those that come once a step."""
    layer = sum(number // SHAPE.L for number in count.values())
    return layer, count.total() - layer * SHAPE.L


@pytest.mark.parametrize('rows', [1, 2, decode_products.MOST_ROWS])
def test_a_decode_step_of_few_rows_has_five_launches_a_layer(launches, rows):
    """A copy, a cast or a norm that comes back into the block costs 28 launches, and no test of numbers sees it."""
    count = launches(rows)
    assert split(count)[0] == 5, count
    assert count.total() <= 160, count


def test_a_decode_step_of_many_rows_has_eight_launches_a_layer(launches):
    """Norm and product are PyTorch's there."""
    count = launches(decode_products.MOST_ROWS + 1)
    assert split(count)[0] == 8, count
    assert count.total() <= 245, count


@pytest.mark.parametrize('settings', [dict(temperature=0.7, top_p=0.95), dict(top_k=50), dict(top_k=50, top_p=0.95)])
def test_every_setting_of_the_sampler_stays_within_the_aim(launches, settings):
    """Sorting is PyTorch's, but the random numbers and the record must stay in the kernels."""
    count = launches(2, **settings)
    assert count['draw_token'] == 1 and count.total() <= 200, count


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_token_is_drawn_and_recorded_in_two_launches(launches, monkeypatch, temperature):
    """The step without drawing has two launches less."""
    whole = launches(2, temperature=temperature).total()
    monkeypatch.setattr(kernels, 'sample_next', lambda *args: None)
    assert whole - launches(2, temperature=temperature).total() == 2


def test_the_references_have_more_than_twice_as_many_launches(launches, monkeypatch):
    """The count sees PyTorch's operations: eleven a layer with attention in one kernel, and those of the sampler."""
    monkeypatch.setattr(kernels, 'norm_product', decode_products.norm_product_reference)
    monkeypatch.setattr(kernels, 'add_product', decode_products.add_product_reference)
    monkeypatch.setattr(kernels, 'sample_next', decode_sampling.sample_next_reference)
    count = launches(2)
    assert split(count)[0] == 11, count
    assert 380 <= count.total() <= 400, count
