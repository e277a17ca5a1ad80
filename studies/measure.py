"""
How a call is measured: seconds and peak memory on this machine, or counts that are the same on every one.

Counts are taken on a CPU by watching operations: bytes of the tensors that they make, tensors with an axis of
vocabulary length, forwards, and places where a host would wait for its GPU. The tests check those; seconds
are for bench.py alone.
"""
import gc
import json
import platform
import resource
import statistics
import sys
import time
import weakref
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB = 1e6


@dataclass
class Case:
    """A line of a table: what to run, and what it amounts to."""
    call: Callable
    steps: int = 1              # steps in a call: seconds are of one
    tokens: int = 0             # tokens of a step, for tokens a second
    reads: int = 0              # bytes that a step must read, for `limit`
    payload: int = 0            # bytes to which the peak is compared
    ready: Callable | None = None    # what is made before, once, and is not measured


# ---- seconds and memory ------------------------------------------------------------------------

def resident():
    """Bytes of this process in memory now (Linux; elsewhere its highest so far)."""
    try:
        with open('/proc/self/statm') as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return highest()


def highest():
    """The most bytes this process has had in memory, since `forget` on Linux. (A child's ru_maxrss begins
    with its parent's there.)"""
    try:
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def forget():
    """Let `highest` begin anew, where the kernel allows it."""
    try:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    except OSError:
        pass


def measure(case, repeat, device):
    """Run a case 1 + repeat times -> {peak_mb, seconds, low, high, ...}; the first run, unless it is the
    only one, warms up and is not timed."""
    cuda, times = device.type == 'cuda', []
    if case.ready:
        case.ready()
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget()
    before = torch.cuda.memory_allocated() if cuda else resident()
    for _ in range(repeat + (repeat > 1)):
        began = time.perf_counter()
        made = case.call()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / case.steps)
    peak = (torch.cuda.max_memory_allocated() if cuda else highest()) - before
    times = times[repeat > 1:]
    got = {'peak_mb': peak / MB, 'seconds': statistics.median(times), 'low': min(times), 'high': max(times)}
    got |= {'tok/s': case.tokens / got['seconds']} if case.tokens else {}
    got |= {'limit': case.reads / copy_speed(device) / got['seconds']} if case.reads else {}
    return got | ({'answers': zlib.crc32(json.dumps(made).encode())} if isinstance(made, list) else {})


@cache
def copy_speed(device):
    """Bytes a second, read and written, of a large copy."""
    a = torch.empty(2**30 if device.type == 'cuda' else 2**27, dtype=torch.uint8, device=device)
    b, times = torch.empty_like(a), []
    for _ in range(6):
        began = time.perf_counter()
        b.copy_(a)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * a.nbytes / min(times)


# ---- counts ------------------------------------------------------------------------------------

class Waits(TorchFunctionMode):
    """Counts calls at which a host would wait for its GPU to have finished: values that become Python's,
    shapes that depend on values. (Numbers on their way to the device are not counted.)"""
    NAMES = {'tolist', 'item', 'cpu', 'numpy', 'nonzero', 'unique', 'masked_select', 'equal', '__bool__',
             '__int__', '__float__', '__index__'}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        index = tree_leaves(args[1:2]) if name in ('__getitem__', '__setitem__') else []
        self.count += name in self.NAMES or any(
            torch.is_tensor(x) and x.dtype == torch.bool for x in index)
        return func(*args, **(kwargs or {}))


def has_storage(x):
    """Is x a tensor with memory that torch can look at? Weights that oneDNN has packed are not, nor is a
    tensor of the meta device."""
    return torch.is_tensor(x) and x.layout is torch.strided and not x.is_meta


class Bytes(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes, forward or backward, and the tensors that
    have an axis of length V."""
    def __init__(self, V):
        super().__init__()
        self.V, self.alive, self.peak, self.made, self.largest, self.wide = V, 0, 0, 0, 0, 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        had = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if has_storage(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if has_storage(x) and (own := x.untyped_storage()) not in self.known and own not in had:
                self.known.add(own)
                weakref.finalize(own, self.free, own.nbytes())
                self.alive += own.nbytes()
                self.made += own.nbytes()
                self.peak, self.largest = max(self.peak, self.alive), max(self.largest, own.nbytes())
                self.wide += self.V in x.shape
        return out

    def free(self, size):
        self.alive -= size


def counted(case, V):
    """Run a case twice -> what it did the second time, whatever the machine."""
    case.call()                              # makes what is made once
    forwards = []
    hook = register_module_forward_pre_hook(
        lambda module, args: forwards.append(1) if isinstance(module, torch.nn.Embedding) else None)
    with ExitStack() as stack:
        stack.callback(hook.remove)
        waits, made = stack.enter_context(Waits()), stack.enter_context(Bytes(V))
        case.call()
    return {'peak_mb': made.peak / MB, 'made_mb': made.made / MB, 'largest_mb': made.largest / MB,
            'V-axis': made.wide, 'forwards': len(forwards) / case.steps, 'waits': waits.count / case.steps}


# ---- where -------------------------------------------------------------------------------------

def machine(env):
    """What the figures were measured on."""
    if env.device.type == 'cuda':
        return torch.cuda.get_device_name()
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
