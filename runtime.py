"""
Where a script runs and what it leaves behind: ranks, devices, one-line errors, the run folder.

torchrun hands every process its rank in the environment; without torchrun there is one rank and
every collective below is a no-op, so the scripts read the same on a laptop and on eight GPUs.
Nothing here knows about models.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake the user can mend. One line: where + what was found + what to do. Exit code 2."""


@dataclass(frozen=True)
class Place:
    """This process: rank r of `world`, its device, and the dtype that forwards run in."""
    rank: int
    world: int
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
        raise UserError(f"rank {local} has no GPU of its own: {torch.cuda.device_count()} found; "
                        "lower --nproc_per_node")
    if device == 'mps' and not torch.backends.mps.is_available():
        raise UserError("device='mps', but torch sees no Apple GPU; use device=cpu")
    if device == 'mps' and world > 1:
        raise UserError("device='mps' runs on one rank; use device=cpu, or start without torchrun")
    if dtype == 'auto':
        dtype = 'bfloat16' if device == 'cuda' else 'float32'
    at = torch.device(device, local) if device == 'cuda' else torch.device(device)
    if device == 'cuda':
        torch.cuda.set_device(at)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    return Place(rank, world, at, getattr(torch, dtype))


def all_reduce(x, op='sum'):
    """Sum (or 'max') of a tensor over the ranks, in place; with one rank, x as it is."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if op == 'max' else dist.ReduceOp.SUM)
    return x


def all_gather(obj):
    """List of every rank's `obj` (small Python data between our own processes only)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [obj]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, obj)
    return out


def barrier():
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def print0(*words, **kw):
    """print on rank 0 only."""
    if int(os.environ.get('RANK', 0)) == 0:
        print(*words, flush=True, **kw)


def run(main, cfg_of):
    """Run `main(cfg_of())` as a script: a UserError, a full disk or a full GPU is one line, exit 2."""
    def give_up(line):
        # under torchrun every rank may meet the same mistake: rank 0 speaks, others only when alone
        print(f'error: {line}', file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2) if dist.is_initialized() else sys.exit(2)   # peers may wait in a collective
    try:
        code = main(cfg_of()) or 0
    except UserError as e:
        give_up(str(e))
    except torch.OutOfMemoryError as e:
        give_up(f'{str(e).splitlines()[0]} Lower token_budget=, or set checkpointing=True')
    except OSError as e:
        give_up(f'{e.filename or "file system"}: {e.strerror or e}; '
                'free space or permissions there, or choose another out_dir=')
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---- files: whole or not at all -------------------------------------------------------------

@contextmanager
def whole(path):
    """`with whole(path) as tmp:` write the file or folder `tmp`; it becomes `path` only if all went
    well: fsynced, then renamed. After an error or a power cut, `path` is as it was before."""
    path = Path(path)
    tmp = path.with_name(f'.{path.name}.tmp{os.getpid()}')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield tmp
        for f in sorted(tmp.rglob('*')) if tmp.is_dir() else [tmp]:
            fsync(f)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)              # a folder cannot be renamed over a full one
        os.replace(tmp, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True) if tmp.is_dir() else tmp.unlink(missing_ok=True)


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path, obj):
    with whole(path) as tmp:
        tmp.write_text(json.dumps(obj, indent=2) + '\n')


def read_json(path):
    """Parsed JSON of a file; missing or malformed is a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except (ValueError, UnicodeDecodeError) as e:
        raise UserError(f'{path}: not valid JSON ({e}); delete it or fetch it again') from None


def digest(obj, n=8):
    """Short stable name of a JSON-able object."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()[:n]


# ---- the log: one dict per line -------------------------------------------------------------

class Log:
    """`log.jsonl` of a run folder: what figures.py reads, and nothing else is needed to draw.

    On resume, `keep(step)` drops lines a crashed run wrote after its last checkpoint.
    """
    def __init__(self, path):
        self.path, self.rows = Path(path), []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    break                    # a line cut off by a power loss ends what is usable

    def keep(self, step):
        self.rows = [r for r in self.rows if r['step'] <= step]
        with whole(self.path) as tmp:
            tmp.write_text(''.join(json.dumps(r) + '\n' for r in self.rows))

    def write(self, row):
        self.rows.append(row)
        with self.path.open('a') as f:
            f.write(json.dumps(row) + '\n')


def versions(place):
    """What a reader of the run folder needs in order to repeat it."""
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT,
                         capture_output=True, text=True) if shutil.which('git') else None
    return {'torch': torch.__version__, 'python': sys.version.split()[0],
            'device': torch.cuda.get_device_name() if place.device.type == 'cuda' else place.device.type,
            'ranks': place.world, 'threads': torch.get_num_threads(),
            'git': git.stdout.strip() if git and git.returncode == 0 else 'no git'}
