"""
Where a script runs: ranks, devices, shards of a model, clocks, and one-line errors.

torchrun hands every process its rank in the environment; without torchrun there is one rank and
every collective below is a no-op, so the scripts read the same on a laptop and on eight GPUs.
Nothing here knows what a model computes.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """A mistake the user can mend. One line: where + what was found + what to do. Exit code 2."""


@dataclass(frozen=True)
class Place:
    """This process: rank r of `world`, its number on this machine, its device, and the dtype that
    forwards run in."""
    rank: int
    world: int
    local: int
    device: torch.device
    dtype: torch.dtype


def start(device='auto', dtype='auto'):
    """Join torchrun's ranks if there are any, choose device and dtype -> Place.

    'auto' means CUDA with bfloat16 where there is CUDA, else CPU with float32.
    """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    local = int(os.environ.get('LOCAL_RANK', 0))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError("device='cuda', but torch sees no CUDA GPU; use device=cpu")
    if device == 'cuda' and local >= torch.cuda.device_count():
        raise UserError(f'rank {local} has no GPU of its own: {torch.cuda.device_count()} found; '
                        'lower --nproc_per_node')
    if device == 'mps' and not torch.backends.mps.is_available():
        raise UserError("device='mps', but torch sees no Apple GPU; use device=cpu")
    if device == 'mps' and world > 1:
        raise UserError("device='mps' runs on one rank; use device=cpu, or start without torchrun")
    if dtype == 'auto':
        dtype = 'bfloat16' if device == 'cuda' else 'float32'
    if device == 'mps' and dtype != 'float32':
        raise UserError("device='mps' runs in float32; use dtype=float32")
    own = torch.device(device, local) if device == 'cuda' else torch.device(device)
    if device == 'cuda':
        torch.cuda.set_device(own)
    if world > 1 and not dist.is_initialized():
        # hours, not the usual ten minutes: ranks wait for each other's longest answer, and for rank 0
        # while it makes the toy or writes a checkpoint
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo', timeout=timedelta(hours=6))
    return Place(rank, world, local, own, getattr(torch, dtype))


def versions(place):
    """What a reader of the run folder needs in order to repeat it."""
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT,
                         capture_output=True, text=True) if shutil.which('git') else None
    return {'torch': torch.__version__, 'python': sys.version.split()[0],
            'device': torch.cuda.get_device_name() if place.device.type == 'cuda' else place.device.type,
            'ranks': place.world, 'threads': torch.get_num_threads(),
            'git': git.stdout.strip() if git and git.returncode == 0 else 'no git'}


def print0(*words):
    """print on rank 0 only."""
    if int(os.environ.get('RANK', 0)) == 0:
        print(*words, flush=True)


def run(main, cfg_of):
    """Run `main(cfg_of())` as a script: a UserError, a full disk or a full GPU is one line, exit 2."""
    line = None
    try:
        code = main(cfg_of()) or 0
    except UserError as e:
        line = str(e)
    except torch.OutOfMemoryError as e:
        line = (f'{str(e).splitlines()[0]} Lower token_budget=, eval_rows= or head_rows=, or set '
                'checkpointing=True')
    except OSError as e:
        line = f'{e.filename or "system"}: {e.strerror or e}; look at space and permissions there'
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        code = 130
    if line is not None:
        if int(os.environ.get('RANK', 0)):
            time.sleep(3)                    # a mistake that rank 0 meets too is told once, by rank 0
        print(f'error: {line}', file=sys.stderr, flush=True)
        if ranks() > 1:
            sys.stdout.flush()
            os._exit(2)                      # no farewell: the other ranks may wait in a collective
        code = 2
    if ranks() > 1:
        if code == 0:
            barrier()                        # nobody leaves while another still talks to it
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)                       # gloo's threads have been seen to abort a process that is done
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


@contextmanager
def interruptible():
    """Ctrl-C (or a scheduler's SIGTERM) sets a flag that a loop reads after each step; a second one
    stops at once. Yields the list that will hold the signal."""
    caught = []

    def note(number, _):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print0('\nstopping: this step is finished and saved first (again: stop at once)')
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Clock:
    """Seconds of a step by phase, and how long the steps to come will take, evaluation included."""
    def __init__(self, device):
        self.cuda, self.began, self.steps = device.type == 'cuda', time.perf_counter(), 0

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self):
        self.last, self.phases = self.now(), {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def lap(self, phase):
        """The time since the last lap goes to this phase; a phase may come again in a step."""
        now, key = self.now(), f'time/{phase}'
        self.phases[key], self.last = self.phases.get(key, 0.0) + now - self.last, now

    def update_begins(self):
        """Memory from here to stop() is the update's."""
        if self.cuda:
            self.peak, self.before = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def stop(self):
        """-> {'time/phase': seconds} of the step; on CUDA also its highest memory and the update's
        delta-peak (peak allocated during it minus allocated at its start; Table 3), GB, largest rank. Unlike
        the paper's it includes the teacher's forward, which takes turns with the student's."""
        self.steps += 1
        if not self.cuda:
            return self.phases
        peak = torch.cuda.max_memory_allocated()
        gb = all_reduce(torch.tensor([max(self.peak, peak), peak - self.before], device='cuda') / 1e9, 'max')
        return self.phases | dict(zip(('mem/peak', 'mem/update_dpeak'), gb.tolist(), strict=True))

    def eta(self, steps):
        return (time.perf_counter() - self.began) / self.steps * steps


# ---- collectives: no-ops on one rank ----------------------------------------------------------

def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x, op='sum'):
    """Sum (or 'max') of a tensor over the ranks, in place; with one rank, x as it is."""
    if ranks() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if op == 'max' else dist.ReduceOp.SUM)
    return x


def all_gather(obj):
    """List of every rank's `obj` (small Python data between our own processes only)."""
    out = [obj] * ranks()
    if ranks() > 1:
        dist.all_gather_object(out, obj)
    return out


def barrier():
    if ranks() > 1:
        dist.barrier()


# ---- shards -----------------------------------------------------------------------------------

def shard(model, place):
    """FSDP2: float32 weights, gradients and optimizer state in shards, forwards in place.dtype.

    On one rank in float32 the model stays as it is; on one rank in bfloat16 a mesh of one gives the
    same float32 master weights. The head is a group of its own: an OPRD step never gathers it.
    """
    if place.world == 1 and place.dtype == torch.float32:
        return model
    if not dist.is_initialized():
        dist.init_process_group('nccl' if place.device.type == 'cuda' else 'gloo',
                                store=dist.HashStore(), rank=0, world_size=1)
    wide = torch.promote_types(place.dtype, torch.float32)
    how = dict(mesh=init_device_mesh(place.device.type, (place.world,)),
               mp_policy=MixedPrecisionPolicy(param_dtype=place.dtype, reduce_dtype=wide))
    for block in model.blocks:
        fully_shard(block, **how)
    if not model.config.tied:
        fully_shard(model.head, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, 'hidden')
    return model


@contextmanager
def gathered(model):
    """-> model.plain() over whole weights, in the dtype of forwards, on every rank while sampling: gathered
    once, not once a token, and no second float32 copy. Ranks may stop at different lengths without waiting
    for each other, and no hook of FSDP runs, or is recorded, in a token's forward."""
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in groups:
        m.unshard()
    try:
        yield model.plain()
    finally:
        for m in groups:
            m.reshard()


def full(t):
    """A possibly sharded tensor, whole, on the CPU (every rank must ask)."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()
