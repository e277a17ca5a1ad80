"""
Fused kernels for the three places where a training step or a sampled token spends its memory
bandwidth.

Each file holds one function twice: a PyTorch reference implementation, which runs everywhere and is
the one to read, and a Triton kernel with the same result. The functions below choose: the kernel
for a tensor on a CUDA GPU where Triton is installed, and the reference for everything else. There
is nothing to set.

    layer_rows                  kernels/layer_loss.py          Eq. (6)
    bridge_rows, bridge_back    kernels/bridge_loss.py         Eqs. (14), (15)
    attend                      kernels/decode_attention.py    a decode step's attention over the cache
"""
import functools
import importlib.util
import os

import torch

from kernels import bridge_loss, decode_attention, layer_loss


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


def attend(qkv, *rest, **more):
    """One token a row over the cache: see kernels/decode_attention.py."""
    if fused(qkv):
        return decode_attention.decode_attention(qkv, *rest, **more)
    return decode_attention.decode_attention_reference(qkv, *rest, **more)
