"""
A CUDA device that is computed on the CPU, so that tests exercise the CUDA path on machines without a GPU.

    with emulated_cuda() as cuda:            # torch says that it has one GPU
        roll = sample(model.to(cuda.device), prompts, ...)
        cuda.count['replay'], cuda.waits()   # what happened

A tensor on this device is an ordinary CPU tensor whose storage is on a list. `Device`, a dispatch mode, sees every
operation of PyTorch, decides on which device the result lies, and refuses what CUDA refuses:

    devices   an operation that mixes the host and the device; a kernel that is given a host tensor
    capture   while a CUDA graph is recorded: a wait of the host for the device, a copy from the host (an index that
              is a list or a host tensor is one), the compilation of a kernel
    replay    of a graph that uses memory which was freed since it was recorded

CUDA graphs are emulated: recording leaves all tensors as they were, and a replay runs the recorded operations on the
recorded storages. What a graph has made for itself is overwritten with NaN afterwards: nothing may read it. Waits and
copies outside a recording are legal, and counted.

A Triton kernel cannot run on a CPU. The functions of kernels/__init__.py run up to the launch, where the arguments are
checked, and then once more by the reference implementation, for the result. A new kernel needs no line here.

What it does not do: several GPUs, streams, memory limits, speed. What FSDP does with its shards is not checked. Rounding is
the CPU's.
"""
import inspect
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import kernels
from kernels import decode_attention
from support import runtime
from support.runtime import ROOT

CUDA = torch.device('cuda', 0)
CPU = torch.device('cpu')
GB = 1 << 30

# Operations after which the host must know something that the device has computed: a number, or a shape.
WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', '_unique2', 'unique_dim',
         'unique_consecutive', 'bincount', '_linalg_check_errors'}

# Indexing takes its indices from the host too, and copies them. Other operations with indices do not.
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index'}

# Beside pointwise operations, these take a host tensor of no dimensions as if it were a number.
TAKE_NUMBERS = {'masked_fill', 'masked_fill_', 'fill', 'fill_'}


class CudaError(RuntimeError):
    """What CUDA, or PyTorch on CUDA, would have refused."""


def in_project(frame):
    """Does this code belong to the project? A virtual environment in its folder does not."""
    file = frame.f_code.co_filename
    return file.startswith(f'{ROOT}/') and 'site-packages' not in file and file != __file__


def project_frames():
    """The functions of the project that are running, innermost first: 'rollout.py:310 decode_step'."""
    frames = []
    frame = sys._getframe()
    while frame is not None:
        if in_project(frame):
            frames.append(f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}')
        frame = frame.f_back
    return frames


def made_by_autograd():
    """Is a tensor made by a C++ formula of the backward, and not by Python code that the backward calls?"""
    frame = sys._getframe()
    while frame is not None and not in_project(frame):
        if frame.f_code.co_name == '_engine_run_backward':
            return True
        frame = frame.f_back
    return False


def tensors_in(tree):
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for branch in branches for tensor in tensors_in(branch)]


def replaced(tree, kind, change):
    """Nested lists, tuples and dicts with change(x) in the place of every x of a kind."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, dict):
        return {name: replaced(branch, kind, change) for name, branch in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(replaced(branch, kind, change) for branch in tree)
    return tree


def new_tensors(result, arguments):
    """The tensors of a result that have memory of their own; the others are views of arguments."""
    old = {storage_key(tensor) for tensor in tensors_in(arguments)}
    return [tensor for tensor in tensors_in(result) if storage_key(tensor) not in old]


def storage_of(tensor):
    """The storage of a tensor, or of this rank's shard."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


def storage_key(tensor):
    return storage_of(tensor)._cdata


def written_arguments(func, args, kwargs):
    """The tensors that an operation writes to, by its schema."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return written


def mm_in_float32(a, b, out_dtype, out=None):
    """torch.mm(a, b, out_dtype=float32), which has no CPU implementation."""
    if a.dtype not in (torch.bfloat16, torch.float16) or b.dtype != a.dtype or out_dtype != torch.float32:
        raise CudaError(f'mm: {a.dtype} times {b.dtype} into {out_dtype}')
    return torch.mm(a.float(), b.float(), out=out)


# ---- CUDA graphs ---------------------------------------------------------------------------------

class Address:
    """Where a tensor that existed before a recording lies. It does not keep the memory alive, as a CUDA graph does
    not."""
    def __init__(self, tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.view = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.where = ' < '.join(project_frames()[:2])

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise CudaError(f'a graph is replayed whose memory was freed: {self.dtype} {tuple(self.view[1])}, '
                            f'recorded at {self.where}')
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


@dataclass
class Recorded:
    """An operation of a graph."""
    call: object
    args: tuple                 # an Address for each tensor from outside the graph
    kwargs: dict
    made: list                  # the tensors that it makes


@dataclass
class Recording:
    """What happens while a graph is recorded."""
    operations: list = field(default_factory=list)
    pool: dict = field(default_factory=dict)         # {storage: a tensor in it} of what the graph makes
    before: dict = field(default_factory=dict)       # {storage: (itself, a copy)} of what it has written to

    def add(self, call, args, kwargs, result, resident):
        """Note an operation. resident: is a tensor on the device? The values of others become part of the graph."""
        made = new_tensors(result, (args, kwargs))
        if not made and not call._schema.is_mutable:
            return                           # a view

        def held(tensor):
            if storage_key(tensor) in self.pool:
                return tensor
            return Address(tensor) if resident(tensor) else tensor.clone()
        args, kwargs = replaced((args, kwargs), torch.Tensor, held)
        self.pool |= {storage_key(tensor): tensor for tensor in made}
        self.operations.append(Recorded(call, args, kwargs, made))

    def keep(self, tensors):
        """Copy the storages of these tensors, before something is written to them."""
        for tensor in tensors:
            key = storage_key(tensor)
            if key not in self.pool and key not in self.before:
                storage = tensor.untyped_storage()
                self.before[key] = storage, storage.clone()


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""
    def __init__(self, device):
        self.device = device
        self.operations = []
        self.pool = {}

    def replay(self):
        self.device.count['replay'] += 1
        with _disable_current_modes(), torch.no_grad():
            for operation in self.operations:
                args, kwargs = replaced((operation.args, operation.kwargs), Address, Address.tensor)
                result = operation.call(*args, **kwargs)
                for kept, new in zip(operation.made, new_tensors(result, (args, kwargs)), strict=True):
                    kept.copy_(new)
            self.poison()

    def poison(self):
        """Overwrite what the graph has made."""
        for tensor in self.pool.values():
            if tensor.is_floating_point():
                tensor.fill_(float('nan'))
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else True)


# ---- the device ------------------------------------------------------------------------------------

@dataclass
class Event:
    """A wait or a copy."""
    kind: str                   # 'wait', 'upload'
    operation: str
    frames: list                # project_frames()


class Device(TorchDispatchMode):
    """One emulated GPU. device: its name. count: {what: how often}. events: the waits and copies, in order."""
    def __init__(self, references=True):
        super().__init__()
        self.device = CUDA
        self.references = references         # does the reference of a kernel give its result, or nothing?
        self.count = Counter()
        self.events = []
        self.storages = {}                   # {key: StorageWeakRef} of what lies on the device
        self.purge_at = 4096
        self.recording = None                # a Recording, while a graph is captured
        self.moving_to = None                # the device to which the next operation copies
        self.silent = False                  # operations are those of the emulation itself
        self.compiled = set()                # specialisations of Triton kernels
        self.by_reference = False            # the reference of a kernel runs

    # ---- what lies where

    def resident(self, tensor):
        return storage_key(tensor) in self.storages

    def settle(self, tensor):
        """From here on this tensor, and every view of it, lies on the device. A storage cannot get the key of one that is
        gone: a weak reference keeps the key in use."""
        if len(self.storages) > self.purge_at:
            self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
            self.purge_at = 2 * len(self.storages) + 4096
        self.storages[storage_key(tensor)] = StorageWeakRef(storage_of(tensor))

    @contextmanager
    def unseen(self):
        """Operations in here belong to the emulation: they are neither checked nor recorded."""
        before = self.silent
        self.silent = True
        try:
            yield
        finally:
            self.silent = before

    # ---- what happens

    def refuse(self, what):
        raise CudaError(f'{what}, at {" < ".join(project_frames()[:3])}')

    def note(self, kind, operation):
        """A wait of the host, or a copy from it: legal, but not while a graph is recorded."""
        if self.recording is not None:
            self.refuse(f'{operation}: {"a wait" if kind == "wait" else "a copy from the host"} in a recording')
        self.count[kind] += 1
        self.events.append(Event(kind, operation, project_frames()))

    def waits(self, inside=''):
        """The waits so far, those that a function of this name has caused."""
        return [event for event in self.events if event.kind == 'wait'
                and any(frame.endswith(inside) for frame in event.frames)]

    def uploads(self, inside=''):
        """The copies from the host so far, as `waits`."""
        return [event for event in self.events if event.kind == 'upload'
                and any(frame.endswith(inside) for frame in event.frames)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if any(issubclass(kind, DTensor) for kind in types):
            return self.sharded(func(*args, **kwargs))
        asked = kwargs.get('device')
        if asked is not None and asked.type == 'cuda':
            kwargs['device'] = CPU
        if self.silent:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix('aten::')
        tensors = tensors_in((args, kwargs))
        on_device = [tensor for tensor in tensors if self.resident(tensor)]
        on_host = [tensor for tensor in tensors if not self.resident(tensor) and not tensor.is_meta]
        if asked is not None and not tensors and made_by_autograd():
            asked = CUDA

        # Where does the result lie? PyTorch itself believes that all is on the CPU, so a device 'cpu' beside a
        # tensor means nothing; `move` is what copies to the host.
        to_device = bool(on_device) or (asked is not None and asked.type == 'cuda')
        if self.moving_to is not None:
            to_device = self.moving_to.type == 'cuda'
        elif name == '_to_copy' and on_host and to_device:
            self.note('upload', name)
        elif on_device:
            self.check(func, name, args, on_device, on_host, written_arguments(func, args, kwargs))

        # Compute, and write it into the graph that is being recorded.
        if name == 'mm' and func._overloadname.startswith('dtype'):
            func = mm_in_float32
        elif to_device and self.recording is not None:
            self.recording.keep(filter(self.resident, written_arguments(func, args, kwargs)))
        result = func(*args, **kwargs)
        if to_device:
            for tensor in new_tensors(result, (args, kwargs)):
                self.settle(tensor)
            if self.recording is not None:
                self.recording.add(func, args, kwargs, result, self.resident)
        return result

    def sharded(self, result):
        """An operation on FSDP's shards, which are all on the device. It is not checked."""
        for tensor in tensors_in(result):
            self.settle(tensor)
        return result

    def check(self, func, name, args, on_device, on_host, written):
        """An operation with tensors on the device: are the others where they must be, and does the host wait?"""
        if name in WAITS:
            self.note('wait', name)
        elif name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if not self.resident(args[0]):
                self.refuse(f'{name}: indices on cuda:0 into a tensor on the host')
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.note('wait', f'{name} with a mask')
            if any(tensor.dim() and not any(tensor is index for index in indices) for tensor in on_host):
                self.refuse(f'{name}: values on the host into a tensor on cuda:0')
            if on_host:
                self.note('upload', name)
        elif name in ('copy_', '_foreach_copy_') and on_host:
            self.note('wait' if any(tensor is on_host[0] for tensor in written) else 'upload', name)
        elif on_host:
            numbers = not any(tensor.dim() or any(tensor is one for one in written) for tensor in on_host)
            pointwise = torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS or name.startswith('_foreach')
            if not numbers or not pointwise:
                shapes = [tuple(tensor.shape) for tensor in on_host]
                self.refuse(f'{name}: {shapes} on the host, {tuple(on_device[0].shape)} on cuda:0')

    def move(self, tensor, device):
        """A copy on the other device."""
        self.note('wait' if device.type == 'cpu' else 'upload', 'to')
        self.moving_to = device
        try:
            return tensor.clone()
        finally:
            self.moving_to = None

    # ---- Triton kernels

    def fused(self, h, fused):
        """Stands in for kernels.fused: no kernel runs while the result is computed by the reference."""
        return fused(h) and not self.by_reference

    def choose(self, chooser, *args, **kwargs):
        """Stands in for a function of kernels/__init__.py."""
        before = self.count['launch']
        from_kernel = chooser(*args, **kwargs)
        if self.count['launch'] == before or not self.references:
            return from_kernel
        self.by_reference = True
        try:
            result = chooser(*args, **kwargs)
        finally:
            self.by_reference = False

        # Both make the same tensors. The reference may compute in more than float32.
        shapes, wanted = ([tuple(tensor.shape) for tensor in tensors_in(made)] for made in (from_kernel, result))
        if shapes != wanted:
            self.refuse(f'{chooser.__name__}: the kernel makes {shapes}, its reference {wanted}')
        return result

    def run_kernel(self, kernel, *args, grid, warmup, **options):
        """Stands in for JITFunction.run: the compilation of a kernel for new types may not come in a recording."""
        key = [kernel.__name__, *sorted(options.items())]
        for parameter, value in zip(kernel.params, args, strict=True):
            if isinstance(value, torch.Tensor):
                if not self.resident(value):
                    self.refuse(f'{kernel.__name__}: {parameter.name} {tuple(value.shape)} is on the host')
                key.append((value.dtype, value.data_ptr() % 16 == 0))
            elif parameter.is_constexpr:
                key.append(value)
            elif isinstance(value, int):
                key.append((value == 1, value % 16 == 0, abs(value) < 2**31))
            else:
                key.append(type(value))
        if min(grid) < 1:
            self.refuse(f'{kernel.__name__}: a grid of {grid}')
        if tuple(key) not in self.compiled:
            if self.recording is not None:
                self.refuse(f'{kernel.__name__}: compiled in a recording')
            self.compiled.add(tuple(key))
        self.count['launch'] += 1
        self.count[kernel.__name__] += 1

    # ---- CUDA graphs

    @contextmanager
    def capture(self, graph, **_):
        """Stands in for torch.cuda.graph."""
        self.synchronize()
        self.recording = Recording()
        try:
            yield
        finally:
            recording = self.recording
            self.recording = None
            with self.unseen():
                for storage, copy in recording.before.values():
                    storage.copy_(copy)
        self.count['graph'] += 1
        graph.operations = recording.operations
        graph.pool = recording.pool
        with self.unseen():
            graph.poison()

    def synchronize(self, *_):
        if self.recording is not None:
            self.refuse('synchronize in a recording')


# ---- in place of torch.cuda ------------------------------------------------------------------------

def with_number(device):
    """torch.device('cuda') -> torch.device('cuda', 0)."""
    device = torch.device(device)
    return CUDA if device.type == 'cuda' else device


def replace_tensor_methods(cuda, patch):
    """What tensors say about themselves, and how they leave the device."""
    says_device = torch.Tensor.device
    to = torch.Tensor.to
    tolist = torch.Tensor.tolist
    numpy = torch.Tensor.numpy
    make = torch.tensor

    def device_of(tensor):
        return CUDA if cuda.resident(tensor) else says_device.__get__(tensor)

    def emulated_to(tensor, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        copy = kwargs.pop('copy', False)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        to_meta = {}
        if device is not None and 'meta' in (device.type, tensor.device.type):
            to_meta = {'device': device}
        elif device is not None and with_number(device) != tensor.device:
            tensor = cuda.move(tensor, with_number(device))
            copy = False
        return to(tensor, dtype=dtype or tensor.dtype, copy=copy, memory_format=memory_format, **to_meta)

    def emulated_tolist(tensor):
        if cuda.resident(tensor) and not cuda.silent:
            cuda.note('wait', 'tolist')
        return tolist(tensor)

    def emulated_numpy(tensor, *args, **kwargs):
        if cuda.resident(tensor):
            raise TypeError('numpy() of a tensor on cuda:0; use .cpu() first')
        return numpy(tensor, *args, **kwargs)

    def emulated_make(data, *, device=None, **kwargs):
        return make(data, device=None if device is None else with_number(device), **kwargs)

    patch.setattr(torch.Tensor, 'device', property(device_of))
    patch.setattr(torch.Tensor, 'is_cuda', property(cuda.resident))
    patch.setattr(torch.Tensor, 'is_cpu', property(lambda tensor: device_of(tensor).type == 'cpu'))
    patch.setattr(torch.Tensor, 'to', emulated_to)
    patch.setattr(torch.Tensor, 'cpu', lambda tensor: emulated_to(tensor, 'cpu'))
    patch.setattr(torch.Tensor, 'cuda', lambda tensor, device=CUDA: emulated_to(tensor, device))
    patch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)         # host memory that a GPU reads by itself
    patch.setattr(torch.Tensor, 'tolist', emulated_tolist)
    patch.setattr(torch.Tensor, 'numpy', emulated_numpy)
    patch.setattr(torch, 'tensor', emulated_make)

    # The optimizer and the clipping of gradients ask C++ for the devices of lists of tensors.
    group = torch._C._group_tensors_by_device_and_dtype

    def emulated_group(lists, with_indices=False):
        groups = {}
        for (_, dtype), (tensors, indices) in group(lists, with_indices).items():
            devices = {device_of(tensor) for tensor in tensors[0]}
            if len(devices) > 1:
                raise CudaError(f'a list with tensors of one dtype on {devices}')
            groups[devices.pop(), dtype] = tensors, indices
        return groups
    patch.setattr(torch._C, '_group_tensors_by_device_and_dtype', emulated_group)


class Stream:
    """Stands in for torch.cuda.Stream and torch.cuda.Event. Everything is computed in order, so nothing has to wait."""
    def done(self, *args, **kwargs):
        return self

    record = record_event = wait = wait_event = wait_stream = synchronize = done


def replace_torch_cuda(cuda, patch):
    """torch.cuda of one GPU with 80 GB, of which nothing is in use."""
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 * GB, major=9, minor=0, name='emulated')
    stream = Stream()
    stand_ins = {
        '_lazy_init': lambda: None,
        'is_initialized': lambda: True,
        'is_available': lambda: True,
        'device_count': lambda: 1,
        'current_device': lambda: 0,
        'set_device': lambda device: None,
        'get_device_name': lambda device=None: 'an emulated GPU',
        'get_device_properties': lambda device=None: properties,
        'is_current_stream_capturing': lambda: cuda.recording is not None,
        'synchronize': cuda.synchronize,
        'current_stream': lambda device=None: stream,
        'stream': lambda stream: nullcontext(),
        'Stream': lambda *args, **kwargs: stream,
        'Event': lambda *args, **kwargs: stream,
        'manual_seed_all': lambda seed: None,
        'empty_cache': lambda: None,
        'mem_get_info': lambda device=None: (80 * GB, 80 * GB),
        'CUDAGraph': lambda: Graph(cuda),
        'graph': cuda.capture,
    }
    # Ranks are joined by gloo: PyTorch itself believes that their tensors are on the CPU.
    patch.setitem(runtime.BACKENDS, 'cuda', 'gloo')
    patch.setitem(runtime.DEVICES, 'gloo', 'cuda')
    for name in ('memory_reserved', 'memory_allocated', 'max_memory_allocated', 'reset_peak_memory_stats'):
        stand_ins[name] = lambda device=None: 0
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in)


def replace_kernels(cuda, patch):
    """The functions of kernels/__init__.py, and what launches a kernel."""
    from triton.runtime.jit import JITFunction

    def run(kernel, *args, **options):
        cuda.run_kernel(kernel, *args, **options)

    patch.setattr(JITFunction, 'run', run)
    patch.setattr(kernels, 'triton_runs', lambda: True)
    patch.setattr(kernels, 'fused', partial(cuda.fused, fused=kernels.fused))
    for name, function in list(vars(kernels).items()):
        is_chooser = inspect.isfunction(function) and function.__module__ == 'kernels'
        if is_chooser and name not in ('triton_runs', 'fused'):
            patch.setattr(kernels, name, partial(cuda.choose, function))

    # `longest` and the mask are those of the recording. The kernel does not read them, and the lengths are enough.
    reference = decode_attention.decode_attention_reference

    def by_lengths(*args, **kwargs):
        arguments = inspect.signature(reference).bind(*args, **kwargs).arguments
        return reference(**arguments | {'longest': None, 'mask': None})
    patch.setattr(decode_attention, 'decode_attention_reference', by_lengths)


@contextmanager
def emulated_cuda(references=True):
    """Within this context torch has one GPU. -> Device."""
    lifts = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch:
        cuda = Device(references)
        replace_tensor_methods(cuda, patch)
        replace_torch_cuda(cuda, patch)
        replace_kernels(cuda, patch)
        # An optimizer asks whether a CUDA graph is recorded. A build of torch with CUDA would ask the driver.
        patch.setattr(torch.optim.Optimizer, '_accelerator_graph_capture_health_check', lambda optimizer: None)
        # torch.tensor(values, device=) makes a host tensor, and copies it by an operation that the mode sees.
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with cuda:
                yield cuda
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
