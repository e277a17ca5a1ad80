"""
Fused kernels, each beside the torch text that it equals. One job a file; here it is decided which of the
two runs: Triton on CUDA where it is installed, the text everywhere else.
"""
import functools
import importlib.util
import os

import torch

from kernels import bridge_loss, decode_attention, layer_loss


@functools.cache
def triton_runs():
    """Can kernels be compiled here? Said once."""
    there = importlib.util.find_spec('triton') is not None
    if os.environ.get('RANK', '0') == '0':
        print('kernels: ' + ('Triton' if there else 'no Triton installed, torch text instead'), flush=True)
    return there


def fused(h):
    """Does the kernel run on such a tensor, or its text?"""
    return h.is_cuda and h.dtype != torch.float64 and triton_runs()


def layer_rows(h, h_t, at, w, kind):
    """kernels/layer_loss.py: one layer of Eq. (6)."""
    fits = h.shape[-1] <= layer_loss.WIDEST and h.is_contiguous()
    return (layer_loss.layer_rows if fused(h) and fits else layer_loss.layer_rows_text)(h, h_t, at, w, kind)


def bridge_rows(h, z_t, at, w, P_s, b_s, inside, normalise):
    """kernels/bridge_loss.py: one layer of Eq. (15)."""
    run = bridge_loss.bridge_rows if fused(h) and h.is_contiguous() else bridge_loss.bridge_rows_text
    return run(h, z_t, at, w, P_s, b_s, inside, normalise)


def bridge_back(g, grad, at, P_s, inside, scale):
    """kernels/bridge_loss.py: its gradient, back through the bridge."""
    run = bridge_loss.bridge_back if fused(g) and g.is_contiguous() else bridge_loss.bridge_back_text
    run(g, grad, at, P_s, inside, scale)


def attend(qkv, *rest, **more):
    """kernels/decode_attention.py: one token a row over the cache."""
    run = decode_attention.decode_attention if fused(qkv) else decode_attention.decode_attention_reference
    return run(qkv, *rest, **more)
