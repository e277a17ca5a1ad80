"""
How a call is measured: seconds and peak memory on this machine, or counts that are the same on every one.

Counts are taken on a CPU by watching operations: bytes of the tensors that they make, tensors with an axis of
vocabulary length, forwards, and places where a host would wait for its GPU. The tests check those; seconds
are for bench.py alone. What a machine can do at most is measured too, for the limit beside each line: the
bandwidth of one large copy, and the speed of one large matrix product.
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
from functools import cache, partial

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollout import Replay
from studies.limits import Machine

MB = 1e6
REPLAYS = 20                    # of a CUDA graph in one timed call


@dataclass
class Case:
    """A line of a table: what to run, and what it amounts to."""
    call: Callable
    steps: int = 1              # steps in a call: seconds are of one
    tokens: int = 0             # tokens of a step, for tokens a second
    work: list | None = None    # limits.Part of a step, for `limit`
    payload: int = 0            # bytes to which the peak is compared
    gradients: int = 0          # bytes of the gradients, which are part of the peak
    graph: bool = False         # on CUDA: time replays of a graph, see `replayed`
    ready: Callable | None = None    # what is made before, once, and is not measured


def made_first(make, ways, **about):
    """{name: a function of the inputs} -> cases. `make` makes the inputs, once, when a case asks for them."""
    inputs = cache(make)
    cases = {}
    for name, way in ways.items():
        cases[name] = Case(partial(of_inputs, way, inputs), ready=inputs, **about)
    return cases


def of_inputs(way, inputs):
    return way(inputs())


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
    cuda = device.type == 'cuda'
    if case.ready:
        case.ready()
    call = case.call
    steps = case.steps
    if cuda and case.graph:
        call = replayed(case.call)
        steps *= REPLAYS
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget()
        before = resident()

    # Seconds of each run, and the result of the last.
    times = []
    for _ in range(repeat + (repeat > 1)):
        seconds, made = timed(call, device)
        times.append(seconds / steps)
    peak = torch.cuda.max_memory_allocated() if cuda else highest()
    times = times[repeat > 1:]
    got = {'peak_mb': (peak - before) / MB, 'seconds': statistics.median(times), 'low': min(times),
           'high': max(times)}
    if case.tokens:
        got['tok/s'] = case.tokens / got['seconds']
    if isinstance(made, list):
        got['answers'] = zlib.crc32(json.dumps(made).encode())
    return got


def timed(call, device):
    """Run a call to its end -> seconds, its result."""
    began = time.perf_counter()
    made = call()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - began, made


def replayed(call):
    """The same call as a CUDA graph, REPLAYS times: a function of no arguments that makes nothing.

    Its first run compiles the kernels and records them. Without a graph the host launches each of them, which
    takes longer than some of them run.
    """
    replay = Replay()

    def replays():
        for _ in range(REPLAYS):
            replay(call)
    return replays


# ---- what the machine can do -------------------------------------------------------------------

def fastest(call, device):
    """Seconds of the fastest of six runs."""
    return min(timed(call, device)[0] for _ in range(6))


@cache
def copy_speed(device):
    """Bytes a second, read and written, of a large copy."""
    a = torch.empty(2**30 if device.type == 'cuda' else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / fastest(lambda: b.copy_(a), device)


@cache
def product_speed(device, dtype):
    """Flops a second of a large matrix product."""
    n = 8192 if device.type == 'cuda' else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.empty_like(a)
    return 2 * n**3 / fastest(lambda: torch.mm(a, a, out=b), device)


def speeds(env):
    """What this machine can do at most -> Machine."""
    return Machine(machine(env), copy_speed(env.device), product_speed(env.device, env.dtype))


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
    have an axis of a vocabulary's length. vocabularies: these lengths."""
    def __init__(self, *vocabularies):
        super().__init__()
        self.vocabularies = set(vocabularies)
        self.alive, self.peak, self.made, self.largest, self.wide = 0, 0, 0, 0, 0
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
                self.wide += not self.vocabularies.isdisjoint(x.shape)
        return out

    def free(self, size):
        self.alive -= size


def counted(case, *vocabularies):
    """Run a case twice -> what it did the second time, whatever the machine. vocabularies: see Bytes."""
    case.call()                              # makes what is made once
    forwards = []
    hook = register_module_forward_pre_hook(
        lambda module, args: forwards.append(1) if isinstance(module, torch.nn.Embedding) else None)
    with ExitStack() as stack:
        stack.callback(hook.remove)
        waits, made = stack.enter_context(Waits()), stack.enter_context(Bytes(*vocabularies))
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
