"""
Fused kernels, each beside the torch text that it equals. One public function a file; here it is decided
which of the two runs: Triton on CUDA where it is installed, the text everywhere else.
"""
import functools
import importlib.util
import os

import torch

from kernels import layer_loss


@functools.cache
def triton_runs():
    """Can kernels be compiled here? Said once."""
    there = importlib.util.find_spec('triton') is not None
    if os.environ.get('RANK', '0') == '0':
        print('kernels: ' + ('Triton' if there else 'no Triton installed, torch text instead'), flush=True)
    return there


def layer_rows(h, h_t, at, w, kind):
    """kernels.layer_loss, the kernel or its text."""
    fits = h.shape[-1] <= layer_loss.WIDEST and h.dtype != torch.float64 and h.is_contiguous()
    fused = h.is_cuda and fits and triton_runs()
    return (layer_loss.layer_rows if fused else layer_loss.layer_rows_text)(h, h_t, at, w, kind)
