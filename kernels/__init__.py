"""
Fused kernels for two places: where a training step is limited by memory bandwidth, and where a decode step
would otherwise launch many small kernels.

Each file holds one function twice: a PyTorch reference implementation, which runs everywhere and is
the one to read, and a Triton kernel with the same result. The functions below choose: the kernel
for a tensor on a CUDA GPU where Triton is installed, and the reference for everything else. There
is nothing to set.

    layer_rows                  kernels/layer_loss.py          Eq. (6)
    bridge_rows, bridge_back    kernels/bridge_loss.py         Eqs. (14), (15)
    attend                      kernels/decode_attention.py    a decode step: attention over the cache
    norm_product, add_product   kernels/decode_products.py     a decode step: matrix products
    sample_next                 kernels/decode_sampling.py     a decode step: draw the tokens, record them

kernels/mlp_in_pieces.py is not among them: it saves memory, with PyTorch's operations on every device.

Letters: h states of the student, h_t those of the teacher, at the flat positions of the supervised rows, w a
weight for each of these rows. The named files explain all other arguments.
"""
import functools
import importlib.util
import os

import torch
import torch.nn.functional as F

from kernels import bridge_loss, decode_attention, decode_products, decode_sampling, layer_loss


@functools.cache
def triton_runs():
    """Is Triton installed? The answer is printed once, by rank 0."""
    installed = importlib.util.find_spec('triton') is not None
    if os.environ.get('RANK', '0') == '0':
        chosen = 'Triton' if installed else 'Triton is not installed, so the PyTorch references run'
        print(f'kernels: {chosen}', flush=True)
    return installed


def fused(h):
    """Should this tensor go to the Triton kernel (True) or to the PyTorch reference (False)?"""
    return h.is_cuda and h.dtype != torch.float64 and triton_runs()


def layer_rows(h, h_t, at, w, kind):
    """One layer of Eq. (6): see kernels/layer_loss.py."""
    assert kind in layer_loss.KINDS, kind
    fits = h.shape[-1] <= layer_loss.WIDEST and h.is_contiguous()
    if fused(h) and fits:
        return layer_loss.layer_rows_triton(h, h_t, at, w, kind)
    return layer_loss.layer_rows_reference(h, h_t, at, w, kind)


def bridge_rows(h, z_t, at, w, P_s, b_s, inside, normalise):
    """One layer of Eq. (15): see kernels/bridge_loss.py."""
    if fused(h) and h.is_contiguous():
        return bridge_loss.bridge_rows_triton(h, z_t, at, w, P_s, b_s, inside, normalise)
    return bridge_loss.bridge_rows_reference(h, z_t, at, w, P_s, b_s, inside, normalise)


def bridge_back(g, grad, at, P_s, inside, scale):
    """The gradient of Eq. (15), back through the bridge: see kernels/bridge_loss.py."""
    if fused(g) and g.is_contiguous():
        bridge_loss.bridge_back_triton(g, grad, at, P_s, inside, scale)
    else:
        bridge_loss.bridge_back_reference(g, grad, at, P_s, inside, scale)


def attend(qkv, *others, **named):
    """Attention of one new token per row over the cache. The arguments are those of
    kernels/decode_attention.py."""
    if fused(qkv):
        return decode_attention.decode_attention(qkv, *others, **named)
    return decode_attention.decode_attention_reference(qkv, *others, **named)


def norm_product(h, norm, linear, activation=None):
    """linear(norm(h)), gated if there is an activation: see kernels/decode_products.py."""
    if not fused(h):
        return decode_products.norm_product_reference(h, norm, linear, activation)

    # With few rows one kernel does everything. SiLU is the only activation that it knows.
    swiglu = activation is F.silu
    if decode_products.norm_product_fits(h) and (swiglu or activation is None):
        return decode_products.norm_product_triton(h, norm, linear, swiglu)

    # With more rows norm and product are PyTorch's, and SiLU and gating are one kernel.
    if swiglu:
        return decode_products.swiglu_triton(linear(norm(h)))
    return decode_products.norm_product_reference(h, norm, linear, activation)


def add_product(h, x, linear):
    """h + linear(x); on a GPU the result is written over h: see kernels/decode_products.py."""
    if fused(h):
        return decode_products.add_product_in_place(h, x, linear)
    return decode_products.add_product_reference(h, x, linear)


def sample_next(state, slots, logits):
    """Draw and record the next token of each of these slots: see kernels/decode_sampling.py."""
    if fused(logits):
        decode_sampling.sample_next_triton(state, slots, logits)
    else:
        decode_sampling.sample_next_reference(state, slots, logits)
