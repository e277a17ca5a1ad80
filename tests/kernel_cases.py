"""
Cases that hold every Triton kernel against its PyTorch reference implementation.

test_kernels.py starts this file as a script, with TRITON_INTERPRET=1: all cases run in Triton's interpreter, without a
GPU, and each prints one JSON line. (A process of its own, since Triton reads that variable when it is imported.)
test_gpu.py calls the same cases with device='cuda'.

Bounds: a float32 sum of n numbers in another order differs by about sqrt(n) eps / 3 times their norm, so 10 sqrt(n)
is 30 times what is expected (see `rounding` in conftest.py); what is stored in half precision is rounded once more.
"""
import json
import sys
import traceback
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from conftest import rounding, tiny_model, with_random_vectors

import kernels
from kernels import decode_attention as attention
from kernels.bridge_loss import (
    bridge_back_reference,
    bridge_back_triton,
    bridge_rows_reference,
    bridge_rows_triton,
)
from kernels.decode_products import (
    MOST_ROWS,
    add_product_in_place,
    add_product_reference,
    norm_product_reference,
    norm_product_triton,
    swiglu_reference,
    swiglu_triton,
)
from kernels.decode_sampling import (
    GOLDEN,
    distribution,
    sample_next_reference,
    sample_next_triton,
    signed,
    stream_keys,
    uniform,
)
from kernels.layer_loss import KINDS, layer_rows_reference, layer_rows_triton
from model import Norm
from rollout import Request, Sampling, Slots

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
WIDE_DTYPES = {name: DTYPES[name] for name in ('float32', 'bfloat16')}       # a gradient of 1e12 is no float16


def assert_rows_close(ours, reference, terms, count, stored=torch.float32):
    """Row by row, for a row of zeros has a gradient 1e12 times its neighbours'. terms (K,): the size of what was
    summed in float32. stored: the dtype of the result."""
    assert ours.isfinite().all() and ours.shape == reference.shape
    for k in range(len(ours)):
        error = (ours[k].double() - reference[k].double()).norm()
        bound = rounding(terms[k].float(), count)
        if stored != torch.float32:
            bound += rounding(reference[k].to(stored), 1)
        assert error <= bound, (k, float(error), bound)


def refused(call, *tensors):
    """A kernel must refuse what it would read wrongly."""
    try:
        call(*tensors)
    except ValueError:
        return
    raise AssertionError('a tensor that the kernel cannot read was taken')


# ---- Eq. (6) --------------------------------------------------------------------------------------

def compare_layer_rows(h, h_t, at, w, kind):
    """One call of the kernel and of the reference on the same tensors -> the kernel's gradient."""
    ours, reference = h_t.clone(), h_t.clone()
    value, cos = layer_rows_triton(h, ours, at, w, kind)
    want_value, want_cos = layer_rows_reference(h, reference, at, w, kind)

    # What was summed: s and t, each times the factor that the gradient has.
    d = h.shape[1]
    s_norm = h[at].double().norm(dim=-1).clamp(min=1e-12)
    t_norm = h_t.double().norm(dim=-1).clamp(min=1e-12)
    one = torch.ones_like(s_norm)
    if kind == 'mse':
        terms = 2 / d * (s_norm + t_norm)
        value_terms = (s_norm + t_norm) ** 2 / d
    else:
        scale = 2 / d if kind == 'nmse' else 1.0
        terms = 2 * scale / s_norm
        value_terms = 2 * scale * one
    count = 10 * d**0.5
    assert_rows_close(ours, reference, w.double() * terms, count, h_t.dtype)
    assert_rows_close(value, want_value, value_terms, count)
    assert_rows_close(cos, want_cos, one, count)
    return ours


def layer_rows(device, dtype):
    """Widths that are powers of two and not, rows that repeat, a row without weight, no rows at all."""
    for d, K in [(100, 1), (100, 257), *((d, 7) for d in (64, 576, 1536, 2048, 2560, 3072))]:
        g = torch.Generator().manual_seed(d)
        h = torch.randn(400, d, generator=g).to(device, dtype)
        h_t = torch.randn(K, d, generator=g).to(device, dtype)
        at = torch.randint(400, (K,), generator=g).to(device)
        w = torch.rand(K, generator=g).to(device)
        w[0] = 0 if K > 1 else 0.3
        for kind in KINDS if K < 257 or dtype == torch.float32 else KINDS[1:2]:          # the interpreter is slow
            grad = compare_layer_rows(h, h_t, at, w, kind)
            assert K == 1 or not grad[0].any()
    none = torch.empty(0, dtype=torch.long, device=device)
    value, cos = layer_rows_triton(h, h_t[:0], none, w[:0], 'mse')
    assert value.shape == cos.shape == (0,)
    for bad in (h.t(), h[:, ::2], h.double()):
        one = torch.randn(1, bad.shape[1], device=device)
        refused(layer_rows_triton, bad, one, at[:1] * 0, w[:1], 'mse')


def layer_rows_of_zeros(device, dtype):
    """Rows of zeros, rows that are shorter than the smallest norm, and rows that only look short. A kernel without
    the smallest norm divides 0 by 0, and one with a larger one changes the last."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(12, 100, generator=g)
    h_t = torch.randn(8, 100, generator=g)
    h[0] = 0
    h[1] *= 1e-20
    h[2] *= 1e-9
    h_t[3] = 0
    h_t[4] *= 1e-20
    h_t[5] *= 1e-9
    h[6] = h_t[6] = 0
    at, w = torch.arange(8), torch.rand(8, generator=g)
    for kind in KINDS:
        compare_layer_rows(h.to(device, dtype), h_t.to(device, dtype), at.to(device), w.to(device), kind)


# ---- Eqs. (14), (15) ------------------------------------------------------------------------------

def compare_bridge_rows(h, z_t, at, w, P_s, b_s, inside, normalise):
    """One call of the kernel and of the reference on the same tensors -> the kernel's gradient."""
    ours, reference = z_t.clone(), z_t.clone()
    value, cos = bridge_rows_triton(h, ours, at, w, P_s, b_s, inside, normalise)
    want_value, want_cos = bridge_rows_reference(h, reference, at, w, P_s, b_s, inside, normalise)

    # The norms of the projected row, and of the terms that were summed to make it.
    K, r, d = len(at), z_t.shape[1], h.shape[1]
    s, P, b = h[at].double(), P_s.double()[inside.long()], b_s.double()[inside.long()]
    z_norm = (torch.einsum('krd,kd->kr', P, s) + b).norm(dim=-1)             # (K,)
    squares = torch.einsum('krd,kd->kr', P**2, s**2) + b**2                  # (K, r)
    t_norm = z_t.double().norm(dim=-1)
    size = z_norm + squares.sum(-1).sqrt() + t_norm
    length = z_norm.clamp(min=1e-12)
    count = 10 * (d**0.5 + r**0.5)
    if normalise:                            # what is off in z is off in u by as much, relative to |z|
        terms = 4 * (1 + (size - t_norm) / length)
        grad_terms = terms / length
    else:
        terms = size**2
        grad_terms = 2 * size
    cos_terms = 1 + (size - t_norm) / length
    assert_rows_close(ours, reference, w.double() * grad_terms, count)
    assert_rows_close(value, want_value, terms, count)
    assert_rows_close(cos, want_cos, cos_terms, count)
    assert len(ours) == K
    return ours


def compare_bridge_back(above, grad, at, P_s, inside):
    """The way back of both: scaled, in place, on those rows alone."""
    ours, reference = above.clone(), above.clone()
    scale = torch.tensor(-1.7, device=above.device)
    bridge_back_triton(ours, grad, at, P_s, inside, scale)
    bridge_back_reference(reference, grad, at, P_s, inside, scale)
    P = P_s.double()[inside.long()]                                          # (K, r, d)
    squares = torch.einsum('krd,kr->kd', P**2, grad.double() ** 2).sum(-1)
    terms = 1.7 * squares.sqrt() + above[at].double().norm(dim=-1)           # (K,)
    assert_rows_close(ours[at], reference[at], terms, 10 * grad.shape[1]**0.5, above.dtype)
    ours[at] = above[at]
    assert ours.equal(above)


BRIDGE = [                      # r, d, K, share of rows inside
    (1, 20, 1, 0), (8, 100, 7, 0.5), (24, 576, 7, 0), (8, 20, 65, 0.1), (64, 100, 65, 1), (256, 100, 7, 0.5),
]


def bridge_case(r, d, K, share, device, dtype):
    """Random arguments of bridge_rows, on the device, but for `normalise`."""
    g = torch.Generator().manual_seed(r + d)
    h = torch.randn(80, d, generator=g).to(dtype)
    at, inside = torch.randperm(80, generator=g)[:K], torch.rand(K, generator=g) < share
    P_s, b_s, z_t = (torch.randn(n, generator=g) for n in ((2, r, d), (2, r), (K, r)))
    w = torch.rand(K, generator=g)
    w[1::3] = 0
    return [x.to(device) for x in (h, z_t, at, w, P_s, b_s, inside)]


def bridge_rows(device, dtype):
    """Ranks and widths that are no powers of two, blocks of one class and of both, rows without weight, teacher rows
    of zeros; and the way back."""
    for r, d, K, share in BRIDGE:
        for normalise in (True, False):
            h, z_t, at, w, P_s, b_s, inside = bridge_case(r, d, K, share, device, dtype)
            z_t[2::3] = 0
            grad = compare_bridge_rows(h, z_t, at, w, P_s, b_s, inside, normalise)
            assert not grad[1::3].any()
            compare_bridge_back(h.flip(0), grad, at, P_s, inside)
    none = torch.empty(0, dtype=torch.long, device=device)
    above = h.clone()
    bridge_rows_triton(h, z_t[:0], none, w[:0], P_s, b_s, none.bool(), True)             # no rows
    bridge_back_triton(above, grad[:0], none, P_s, none.bool(), w[0])
    assert above.equal(h)
    refused(bridge_rows_triton, h.t(), z_t, at, w, P_s, b_s, inside, True)
    refused(bridge_back_triton, h.double(), grad, at, P_s, inside, w[0])


def bridge_rows_of_zeros(device, dtype):
    """As layer_rows_of_zeros: projected rows and teacher rows of zeros, shorter than the smallest norm, and short."""
    for normalise in (True, False):
        h, z_t, at, w, P_s, b_s, inside = bridge_case(8, 100, 9, 0.5, device, dtype)
        w.fill_(0.7)
        b_s.zero_()
        h[at[0]] = 0
        h[at[1]] *= 1e-20
        h[at[2]] *= 1e-9
        z_t[3] = 0
        z_t[4] *= 1e-20
        z_t[5] *= 1e-9
        h[at[6]] = 0
        z_t[6] = 0
        compare_bridge_rows(h, z_t, at, w, P_s, b_s, inside, normalise)


# ---- a decode step --------------------------------------------------------------------------------

DECODE = [                      # lengths, H, G, e, R, norms, S
    ([0], 3, 1, 6, 6, True, 1),
    ([0, 1, 15, 16, 17, 100], 3, 1, 24, 24, True, 2),
    ([100, 0, 64], 9, 3, 64, 48, False, 1),
    ([100, 65], 3, 1, 6, 4, False, 4),
    ([100], 5, 1, 128, 96, True, None),
    ([17, 100], 20, 1, 64, 64, False, 1),
    ([100, 0, 65], 6, 2, 24, 24, True, 2),
    ([64, 100], 9, 3, 64, 48, False, 4),
]


@contextmanager
def programs_backwards(arrived):
    """Triton's interpreter runs the programs of a launch one after another. In here the last one comes first. Before each
    program, `arrived` must say how many of its row and key head there were."""
    from triton.runtime.interpreter import interpreter_builder as builder
    set_number = builder.set_grid_idx

    def backwards(x, i, z):
        x, last = builder.grid_dim[0] - 1 - x, builder.grid_dim[1] - 1
        assert arrived.view(-1)[x] == i, 'the counter is of another row or head, or was set back too early'
        set_number(x, last - i, z)
    with mock.patch.object(builder, 'set_grid_idx', backwards):
        yield


def decode(device, dtype):
    """Rows of very different lengths, shares without tokens, heads of odd numbers and widths; two steps, the second
    of which reads what the first wrote, and whose programs come in another order: the last to come joins the shares, and not
    the last by number. The cache is a window of a larger one, and infinite wherever no token is: none of that may be read, and
    none changed."""
    T = 103
    for lengths, H, G, e, R, normed, S in DECODE:
        g, B = torch.Generator().manual_seed(e + R), len(lengths)
        length, row = torch.tensor(lengths, device=device), torch.arange(B, device=device)
        norms = torch.rand(2, e, generator=g).to(device, dtype) if normed else (None, None)
        arrived = torch.zeros(B + 1, G, dtype=torch.int32, device=device)
        whole = torch.full((B + 1, 2, G + 1, T + 3, e + 2), torch.inf, dtype=dtype)
        window = (slice(1, None), slice(None), slice(G), slice(2, T + 2), slice(e))
        for b, n in enumerate(lengths):
            whole[window][b, :, :, :n] = torch.randn(2, G, n, e, generator=g)
        whole = whole.to(device)
        ours, reference = whole.clone(), whole.nan_to_num(posinf=0)
        for step in range(2):
            qkv = torch.randn(H + 2 * G, e, B, generator=g).to(device, dtype).permute(2, 0, 1)       # as Linear has it
            angle = 9 * torch.rand(B, R, generator=g)
            cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
            with programs_backwards(arrived) if step and S != 1 and device == 'cpu' else nullcontext():
                y = attention.decode_attention(qkv, ours[window], length, cos, sin, *norms, arrived=arrived, S=S)
            assert not arrived.any()         # the next launch counts from 0 again
            longest = int(length.max()) + 1
            want = attention.decode_attention_reference(qkv, reference[window], length, cos, sin, *norms, 1e-6, longest)
            at = row, slice(None), slice(None), length
            (k, v), (want_k, want_v) = (x[window][at].unbind(1) for x in (ours, reference))
            assert v.equal(want_v), (e, H, S)

            # A key is normed and turned: a sum of e squares, then two products. A logit is a sum of e products, and
            # as large as e where heads have no norm; the reference rounds a query in half precision thrice.
            assert_rows_close(k, want_k, want_k.flatten(1).float().norm(dim=-1), 10 * e**0.5, dtype)
            error = (y.double() - want.double()).norm(dim=-1)
            for b in range(B):
                bound = rounding(want[b].float(), 10 * e)
                if dtype != torch.float32:
                    bound += rounding(want[b], 3)
                assert error[b] <= bound, (e, H, S, b, float(error[b]), bound)
            whole[window][at] = ours[window][at]
            assert ours.equal(whole), ('a number outside was changed', e, H, S)
            length = length + 1
    refused(attention.decode_attention, qkv.double(), ours[window].double(), length, cos, sin)


# ---- the products of a decode step ----------------------------------------------------------------

PRODUCTS = [                    # rows, d, n, bias, gated
    (1, 100, 70, True, False), (3, 300, 33, False, True), (MOST_ROWS, 64, 16, False, False), (2, 24, 4100, False, True),
]


def norm_and_linear(d, n, bias, device, dtype, g):
    """A norm and a matrix with random weights, and the same in float64."""
    modules = []
    for wide in (dtype, torch.float64):
        modules += [Norm(d, 1e-5).to(device, wide), torch.nn.Linear(d, n, bias=bias).to(device, wide)]
    norm, linear, norm64, linear64 = modules
    with torch.no_grad():
        norm.weight.copy_(3 * torch.randn(d, generator=g))
        linear.weight.copy_(torch.randn(n, d, generator=g))
        if bias:
            linear.bias.copy_(torch.randn(n, generator=g))
        norm64.load_state_dict(norm.state_dict())
        linear64.load_state_dict(linear.state_dict())
    return norm, linear, norm64, linear64


@torch.no_grad()
def norm_product(device, dtype):
    """One row and the most rows, odd widths, a bias, a gated product; rows of zeros, short rows and long ones. Beside
    the reference in float64: in bfloat16 the kernel rounds a normed state once, and its result once."""
    for B, d, n, bias, gated in PRODUCTS:
        g = torch.Generator().manual_seed(d)
        h = torch.randn(B, 1, d, generator=g).to(device, dtype)
        for b, size in zip(range(1, B), (0, 1e-20, 1e-3, 1e3), strict=False):
            h[b] *= size
        rows = 2 * n if gated else n
        norm, linear, norm64, linear64 = norm_and_linear(d, rows, bias, device, dtype, g)
        ours = norm_product_triton(h, norm, linear, gated)
        want = norm_product_reference(h.double(), norm64, linear64, F.silu if gated else None)
        assert ours.shape == want.shape == (B, 1, n) and ours.dtype == dtype

        # What is summed in each number of the product; the gate then hands on what is off in either half.
        squares = norm64(h.double()).square() @ linear64.weight.square().t()
        if bias:
            squares += linear64.bias.square()
        sizes = squares.sqrt()                                               # (B, 1, rows)
        if gated:
            gate, up = linear64(norm64(h.double())).chunk(2, -1)
            gate_size, up_size = sizes.chunk(2, -1)
            sizes = 1.1 * gate_size * up.abs() + F.silu(gate).abs() * up_size    # silu is nowhere steeper than 1.1
        for b in range(B):
            terms = sizes[b].norm()
            bound = rounding(terms.float(), 10 * d**0.5)
            if dtype != torch.float32:
                bound += rounding(terms.to(dtype), 1) + rounding(want[b].to(dtype), 1)
            assert ours[b].isfinite().all() and (ours[b] - want[b]).norm() <= bound, (d, n, b)
    many = torch.randn(MOST_ROWS + 1, 1, d, device=device).to(dtype)
    for bad in (many, h.double(), h.half(), torch.cat([h, h], -1)[..., ::2]):
        refused(norm_product_triton, bad, norm, linear, gated)


@torch.no_grad()
def swiglu(device, dtype):
    """Widths below and beyond a block; gates so large or so small that exp(-gate) is none of the dtype's numbers."""
    for B, n in [(1, 7), (17, 1030)]:
        g = torch.Generator().manual_seed(n)
        gate_up = torch.randn(B, 1, 2 * n, generator=g)
        gate_up[:, :, :4] = torch.tensor([-200.0, 200.0, -9.0, 0.0])
        gate_up = gate_up.to(device, dtype)
        want = swiglu_reference(gate_up.double())
        ours = swiglu_triton(gate_up.transpose(0, 2).contiguous().transpose(0, 2))
        assert ours.dtype == dtype and ours.shape == (B, 1, n)
        assert_rows_close(ours[:, 0], want[:, 0], want[:, 0].norm(dim=-1), 10, dtype)
    refused(swiglu_triton, gate_up.double())


@torch.no_grad()
def add_product(device, dtype):
    """What the matrix library adds in place, with a view of a larger tensor as its factor."""
    g = torch.Generator().manual_seed(0)
    h, x = (torch.randn(n, generator=g).to(device, dtype) for n in ((5, 1, 40), (5, 2, 70)))
    _, linear, _, linear64 = norm_and_linear(70, 40, False, device, dtype, g)
    want = add_product_reference(h.double(), x[:, :1].double(), linear64)
    terms = (x[:, 0].double().square() @ linear64.weight.square().t()).sum(-1).sqrt() + h[:, 0].double().norm(dim=-1)
    ours = h.clone()
    got = add_product_in_place(ours, x[:, :1], linear)
    assert got is ours
    assert_rows_close(got[:, 0], want[:, 0], terms, 10 * 70**0.5, dtype)


# ---- one token ------------------------------------------------------------------------------------

SAMPLE = [                      # V, settings
    (5, dict()), (37, dict(vocab=30, temperature=0.0, top_k=3)), (1024, dict(vocab=1023, temperature=0.7)),
    (3003, dict(vocab=2500)), (3003, dict(temperature=0.0)), (3003, dict(vocab=2500, temperature=1.3, top_k=40)),
    (1500, dict(temperature=0.8, top_p=0.9)),
]


def slots_of(B, V, settings, device):
    """The state of B slots, some of which are finished, or end with the next token."""
    g = torch.Generator().manual_seed(V)
    number = torch.arange(B)
    count = torch.randint(0, 5, (B,), generator=g)
    state = dict(
        keys=stream_keys(3, 7, number, number % 2), token=torch.zeros(B).long(), count=count,
        ids=torch.randint(V, (B, 20), generator=g), max_count=count + 1 + number % 4,
        done=number % 5 == 3, stopped=number % 10 == 3, is_stop=torch.rand(V, generator=g) < 0.2)
    return SimpleNamespace(sampling=settings, **{name: x.to(device) for name, x in state.items()})


def copy_of(state):
    """A copy of the state whose tensors are copies too."""
    return SimpleNamespace(**{name: x.clone() if torch.is_tensor(x) else x for name, x in vars(state).items()})


def at_the_border(a, b, logits, u, settings):
    """Do the tokens a and b differ only because u lies on their border? An exponential whose argument x is rounded is
    off by |x| eps, and a sum of 1024 numbers in pairs by ten roundings more."""
    x = logits[:settings.vocab].float() / settings.temperature
    mass = distribution(x[None], 1.0, settings.top_k, settings.top_p)[0].double().cumsum(-1)
    low, high = min(a, b), max(a, b)
    size = float(x[x.isfinite()].abs().max())
    near = (size + 20) * torch.finfo(torch.float32).eps * mass[-1]
    return abs(u * mass[-1] - mass[low]) <= near and mass[high - 1] - mass[low] <= near


def sample_next(device, dtype):
    """Slots in another order than the rows; several blocks, one of them without any probability; a padded vocabulary
    whose padding has the largest logits; equal logits; top-k and top-p; finished slots, stop tokens, greatest lengths. Four tokens,
    each after the record of the one before."""
    for V, how in SAMPLE:
        settings = Sampling(stop=[], **how)
        reference = slots_of(11, V, settings, device)
        slots = torch.tensor([4, 0, 10, 3, 7, 1], device=device)
        g = torch.Generator().manual_seed(V)
        for _ in range(4):
            logits = 4 * torch.randn(6, V + 3, generator=g)                  # a row is part of a longer one
            logits[:, settings.vocab or V:] = 99.0
            logits[1, 1:] = -torch.inf                                       # only one token is possible
            logits[2, :V // 2] = -torch.inf
            logits[3, :V] = logits[3, 0]
            logits = logits.to(device, dtype)[:, :V]
            ours = copy_of(reference)
            u = uniform(reference.keys, reference.count)[slots]
            sample_next_triton(ours, slots, logits if V < 3003 else logits.t().contiguous().t())
            sample_next_reference(reference, slots, logits)
            for i, slot in enumerate(slots.tolist()):
                a, b = int(ours.token[slot]), int(reference.token[slot])
                if a != b:                   # go on with the reference's token
                    assert settings.temperature > 0 and at_the_border(a, b, logits[i], float(u[i]), settings), (V, i, a, b)
                    ours = reference
            for name, tensor in vars(reference).items():
                assert name == 'sampling' or vars(ours)[name].equal(tensor), (V, name)

        # NaN gives some token of the vocabulary, as the reference does.
        ours = copy_of(reference)
        sample_next_triton(ours, slots, logits * float('nan'))
        assert (0 <= ours.token).all() and (ours.token[slots] < (settings.vocab or V)).all()
    refused(sample_next_triton, reference, slots, logits.double())


def key_of(number, position):
    """The key whose stream has number / 2^53 at this position: `uniform` backwards."""
    def undo_shift(z, bits):                 # of z ^ z >> bits
        return z ^ z >> bits ^ z >> 2 * bits
    z = undo_shift(number << 11, 31)
    z = undo_shift(z * pow(0x94d049bb133111eb, -1, 2**64) % 2**64, 27)
    z = undo_shift(z * pow(0xbf58476d1ce4e5b9, -1, 2**64) % 2**64, 30)
    return signed(z - (position + 1) * GOLDEN)


def drawn(logits, numbers, settings):
    """The tokens (n,) that the kernels draw from the same logits (V,) at u = number / 2^53 for each of n numbers."""
    n = len(numbers)
    state = slots_of(n, len(logits), settings, logits.device)
    position = state.count.tolist()
    state.keys[:] = torch.tensor([key_of(number, t) for number, t in zip(numbers, position, strict=True)])
    assert uniform(state.keys, state.count).tolist() == [number / 2**53 for number in numbers]
    sample_next_triton(state, torch.arange(n, device=logits.device), logits.expand(n, -1))
    return state.token.tolist()


@torch.no_grad()
def borders(device, dtype):
    """u on the border between two tokens, next to it, and at both ends. Tokens that are equally likely show whether each bit
    of u counts, in a block of tokens and between blocks; with 4096 of them u can lie on a border. At temperature 0 the first
    of them wins at any u."""
    for V in (3000, 4096):
        numbers, want = [0, 2**53 - 1], [0, V - 1]
        for k in (1, 2, 1023, 1024, 1025, 2047, 2048, 2999):
            numbers += [int((k - 2**-30) / V * 2**53), int((k + 2**-30) / V * 2**53)]
            want += [k - 1, k]
            if V == 4096:
                numbers.append(k * 2**41)                                    # k / 4096 itself
                want.append(k)
        equal = torch.full((V,), 2.5, device=device, dtype=dtype)
        assert drawn(equal, numbers, Sampling(stop=[])) == want
        assert drawn(equal, numbers, Sampling(stop=[], temperature=0.0)) == [0] * len(numbers)


@torch.no_grad()
def likely_tokens(device, dtype):
    """A block of tokens ends with tokens of probability exp(-60) or less, and u is within a rounding of the block's end. The sum
    of a block is float32 and is made twice, with other roundings: a search for what is left of u went past the last likely
    token, to the last token of the block, once in about 10^7 draws."""
    for seed in (0, 7):
        logits = 3 * torch.randn(2048, generator=torch.Generator().manual_seed(seed))
        logits[900:1024] = -60.0
        logits = logits.to(device, dtype)
        mass = logits.double().softmax(-1).cumsum(-1)
        end = int(mass[899] * 2**53)
        tokens = drawn(logits, [end + (k << 25) for k in range(-32, 32)], Sampling(stop=[]))
        assert not any(900 <= token < 1024 for token in tokens), (seed, tokens)

    # The largest u, where the sum of all masses can be above the last cumulative one. The last 100 tokens are impossible.
    for seed in range(8):
        logits = -40 * torch.rand(1000, generator=torch.Generator().manual_seed(seed))
        logits[900:] = -torch.inf
        token, = drawn(logits.to(device, dtype), [2**53 - 1], Sampling(stop=[]))
        assert token < 900, (seed, token)


# ---- a whole decode step --------------------------------------------------------------------------

MODELS = [                      # shape, rows
    (dict(family='qwen2', L=2), 3), (dict(family='qwen3', L=1), MOST_ROWS + 1), (dict(family='llama', activation='gelu'), 2),
]


def three_steps(model, rows, fused):
    """Three decode steps, with or without the kernels -> the sampled ids, and the logits (rows, V) of each step."""
    logits = []
    head = model.head.register_forward_hook(lambda module, args, made: logits.append(made[:, 0]))
    with mock.patch.object(kernels, 'fused', lambda h: fused):
        slots = Slots(model, rows, 3, 200, 99, Sampling(stop=[0], vocab=30))     # 200 tokens: several shares a row
        slots.prefill(list(range(rows)), [Request([1, 5, 9][:1 + b % 3], b, 0, 12) for b in range(rows)])
        slots.reserve(3, 3)
        logits.clear()
        for _ in range(3):
            slots.decode_step()
    head.remove()
    return slots.ids, logits


@torch.no_grad()
def decode_step(device, dtype):
    """A model, its cache and its slots, with and without the kernels: a counter that belongs to another row, a bias
    or a norm that is left out, an activation that the kernel does not know. Tokens are compared in float32 alone: in
    bfloat16 both round too much to agree."""
    for shape, rows in MODELS:
        model = with_random_vectors(tiny_model(**shape)).to(device, dtype)
        ids, logits = three_steps(model, rows, True)
        want_ids, want_logits = three_steps(model, rows, False)
        assert ids.equal(want_ids)
        assert len(logits) == len(want_logits) == 3
        for ours, want in zip(logits, want_logits, strict=True):
            assert (ours - want).norm() <= rounding(want, 300)               # d + T + e + H e + d + ff, for each block


# ---- all of them ----------------------------------------------------------------------------------

CASES = {
    'layer_rows': (layer_rows, DTYPES),
    'layer_rows_of_zeros': (layer_rows_of_zeros, WIDE_DTYPES),
    'bridge_rows': (bridge_rows, DTYPES),
    'bridge_rows_of_zeros': (bridge_rows_of_zeros, WIDE_DTYPES),
    'decode': (decode, DTYPES),
    'norm_product': (norm_product, WIDE_DTYPES),
    'swiglu': (swiglu, DTYPES),
    'add_product': (add_product, WIDE_DTYPES),
    'sample_next': (sample_next, DTYPES),
    'borders': (borders, DTYPES),
    'likely_tokens': (likely_tokens, DTYPES),
    'decode_step': (decode_step, {'float32': torch.float32}),
}
NAMES = [(case, dtype) for case, (_, dtypes) in CASES.items() for dtype in dtypes]
HAVE_LOOPS = ('bridge_rows', 'bridge_rows_of_zeros', 'decode', 'norm_product', 'decode_step')    # up to a number known at run time


def run(case, dtype, device):
    """One case on a device; an AssertionError where kernel and reference differ."""
    function, dtypes = CASES[case]
    function(device, dtypes[dtype])


def loops_are_interpreted():
    """Does Triton's interpreter run a loop up to a number known at run time? -> '' if so, else its error.

    Such a number is an array of one element to the interpreter, which numpy 2.5 does not convert to an int. Triton 3.6
    relies on that; Triton 3.7 does not."""
    import triton
    import triton.language as tl

    @triton.jit
    def count_up(total, n):
        steps = 0
        for _ in range(0, n):
            steps += 1
        tl.store(total, steps)

    total = torch.zeros(1, dtype=torch.int32)
    try:
        count_up[(1,)](total, 3)
    except Exception as error:
        return f'{type(error).__name__}: {str(error).strip().splitlines()[-1]}'
    assert total.item() == 3
    return ''


if __name__ == '__main__':
    broken = loops_are_interpreted()
    for case, dtype in NAMES:
        result = {'case': case, 'dtype': dtype, 'error': '', 'not_run': ''}
        if broken and case in HAVE_LOOPS:
            result['not_run'] = broken
        else:
            try:
                run(case, dtype, 'cpu')
            except Exception:                # the test that started this process asserts that it is empty
                result['error'] = traceback.format_exc()
        print(json.dumps(result), flush=True)
    sys.exit(0)
