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

import torch
from conftest import rounding

from kernels import decode_attention as attention
from kernels.bridge_loss import (
    bridge_back_reference,
    bridge_back_triton,
    bridge_rows_reference,
    bridge_rows_triton,
)
from kernels.layer_loss import KINDS, layer_rows_reference, layer_rows_triton

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
]


def decode(device, dtype):
    """Rows of very different lengths, shares without tokens, heads of odd numbers and widths; two steps, the second
    of which reads what the first wrote. The cache is a window of a larger one, and infinite wherever no token is:
    none of that may be read, and none changed."""
    T = 103
    for lengths, H, G, e, R, normed, S in DECODE:
        g, B = torch.Generator().manual_seed(e + R), len(lengths)
        length, row = torch.tensor(lengths, device=device), torch.arange(B, device=device)
        norms = torch.rand(2, e, generator=g).to(device, dtype) if normed else (None, None)
        whole = torch.full((B + 1, 2, G + 1, T + 3, e + 2), torch.inf, dtype=dtype)
        window = (slice(1, None), slice(None), slice(G), slice(2, T + 2), slice(e))
        for b, n in enumerate(lengths):
            whole[window][b, :, :, :n] = torch.randn(2, G, n, e, generator=g)
        whole = whole.to(device)
        ours, reference = whole.clone(), whole.nan_to_num(posinf=0)
        for _ in range(2):
            qkv = torch.randn(H + 2 * G, e, B, generator=g).to(device, dtype).permute(2, 0, 1)       # as Linear has it
            angle = 9 * torch.rand(B, R, generator=g)
            cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
            y = attention.decode_attention(qkv, ours[window], length, cos, sin, *norms, S=S)
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


# ---- all of them ----------------------------------------------------------------------------------

CASES = {
    'layer_rows': (layer_rows, DTYPES),
    'layer_rows_of_zeros': (layer_rows_of_zeros, WIDE_DTYPES),
    'bridge_rows': (bridge_rows, DTYPES),
    'bridge_rows_of_zeros': (bridge_rows_of_zeros, WIDE_DTYPES),
    'decode': (decode, DTYPES),
}
NAMES = [(case, dtype) for case, (_, dtypes) in CASES.items() for dtype in dtypes]
HAVE_LOOPS = ('bridge_rows', 'bridge_rows_of_zeros', 'decode')               # up to a number known at run time


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
