"""
What lies on disk is whole: JSON, safetensors, the log, the run folder and its checkpoints.

Everything is written under a temporary name, fsynced and renamed, so a crash, a full disk or a
power cut leaves the file or folder that was there before. No pickle is written or read.
"""
import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from support.runtime import UserError, barrier, full


@contextmanager
def whole(path):
    """`with whole(path) as tmp:` write the file or folder `tmp`; it becomes `path` only if all went
    well: fsynced, then renamed. After an error or a power cut, `path` is as it was before (or, where
    a folder replaces a folder, in the instant between two renames, not there)."""
    path = Path(path)
    tmp, old = (path.with_name(f'.{path.name}.{end}{os.getpid()}') for end in ('tmp', 'old'))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield tmp
        for f in (*tmp.rglob('*'), tmp):
            fsync(f)
        if path.is_dir() and not path.is_symlink():
            os.replace(path, old)            # a folder cannot be renamed over a full one
        try:
            os.replace(tmp, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        fsync(path.parent)
    finally:
        for left in (tmp, old):
            remove(left)


@contextmanager
def locked(path):
    """One process at a time; the others wait. The lock goes with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def remove(path):
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path, obj):
    with whole(path) as tmp:
        tmp.write_text(json.dumps(obj, indent=2) + '\n')


def read_json(path, kind=dict):
    """Parsed JSON of a file; missing, malformed or not of the kind is a UserError that names it."""
    try:
        obj = json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except ValueError as e:
        raise UserError(f'{path}: not valid JSON ({e}); delete it or fetch it again') from None
    if not isinstance(obj, kind):
        raise UserError(f'{path}: holds a {type(obj).__name__}, not a {kind.__name__}; fetch it again')
    return obj


def digest(obj, n=8):
    """Short stable name of a JSON-able object."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()[:n]


def open_safetensors(file):
    try:
        return safe_open(file, 'pt')
    except (SafetensorError, OSError) as e:
        raise UserError(f'{file}: not a whole safetensors file ({e}); fetch or make it again') from None


def write_safetensors(tensors, file, metadata=None):
    """save_file, with a full disk reported as the OSError it is."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as e:
        raise OSError(28, f'could not be written ({e})', str(file)) from None
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)            # save_file makes it private to its owner


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
        """Forget what a run wrote after its last checkpoint, `step`."""
        self.rows = [r for r in self.rows if r['step'] <= step]

    def rewrite(self, rank=0):
        """Make the file say what `rows` say."""
        if rank == 0 and self.path.exists():
            with whole(self.path) as tmp:
                tmp.write_text(''.join(json.dumps(r) + '\n' for r in self.rows))

    def write(self, row, rank=0):
        self.rows.append(row)
        if rank == 0:
            with self.path.open('a') as f:
                f.write(json.dumps(row) + '\n')
                f.flush()
                os.fsync(f.fileno())         # a checkpoint must never be newer than its log


# ---- the run folder and its checkpoints --------------------------------------------------------

def open_run(out_dir, cfg, free):
    """The run folder, looked at and not yet touched -> Path. One that was started with another config
    (but for the keys in `free`), or that cannot be made, is a UserError."""
    out = Path(out_dir)
    file = out / 'config.json'
    if file.exists():
        was = read_json(file).get('config', {})
        changed = [f'{k}={was.get(k)!r}, now {v!r}' for k, v in cfg.items()
                   if k not in free and was.get(k) != v]
        if changed:
            raise UserError(f'{file}: this run was started with {"; ".join(changed)}; '
                            'give the same again, or another out_dir=')
    elif (out / 'last').is_symlink():
        raise UserError(f'{file}: not there, but {out}/last is; delete the folder or choose another out_dir=')
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f'{out}: cannot be made, {above} is not a folder of yours; choose another out_dir=')
    return out


def save(out, step, elapsed, student, opt, write_model, rank):
    """out/ckpt-000040/: the Hugging Face folder `model` and the resume state beside it (float32
    weights and AdamW state, whole, so that another number of ranks can read them). `out/last`
    points at the newest `model` and moves when all of it is on disk.

    write_model(folder, weights): writes the Hugging Face folder, given {name: whole float32 tensor}.
    """
    state = {}
    for name, p in student.named_parameters():
        moments = opt.state[p] if p in opt.state else {}
        for key, t in {'weight': p, **moments}.items():
            t = full(t)                      # a collective: all ranks take part, one tensor at a time,
            if rank == 0:                    # and one of them keeps it
                state[f'{key}.{name}'] = t
    if rank == 0:
        weights = {k.removeprefix('weight.'): t for k, t in state.items() if k.startswith('weight.')}
        folder = out / f'ckpt-{step:06d}'
        with whole(folder) as tmp:
            tmp.mkdir()
            write_model(tmp / 'model', weights)
            write_safetensors(state, tmp / 'resume.safetensors')
            write_json(tmp / 'resume.json', {'step': step, 'elapsed': elapsed})
        with whole(out / 'last') as link:
            link.symlink_to(f'{folder.name}/model')
        for old in (*out.glob('ckpt-*'), *out.glob('.ckpt-*')):              # the latter: cut off by a kill
            if old != folder:
                remove(old)
    barrier()


def resume(out, student, opt):
    """Read back what `save` wrote into student and optimizer, shard by shard -> (step, elapsed);
    (0, 0.0) where nothing was saved."""
    if not (out / 'last').is_symlink():
        return 0, 0.0
    folder = (out / 'last').resolve().parent
    head = read_json(folder / 'resume.json')
    saved = open_safetensors(folder / 'resume.safetensors')
    known = set(saved.keys())

    def read(name, into):
        if name not in known:
            raise UserError(f'{folder}/resume.safetensors: {name} is missing; delete {out} and start again')
        t = saved.get_tensor(name)
        if t.shape != into.shape:
            raise UserError(f'{folder}/resume.safetensors: {name} has shape {list(t.shape)}, but the model '
                            f'has {list(into.shape)}; use another out_dir=')
        t = t.to(into.device)
        if isinstance(into, DTensor):
            t = distribute_tensor(t, into.device_mesh, into.placements)
        into.copy_(t)

    with torch.no_grad():
        for name, p in student.named_parameters():
            read(f'weight.{name}', p)
            if p in opt.state:
                for key, t in opt.state[p].items():      # 'step' too: a head may have had fewer than the rest
                    read(f'{key}.{name}', t)
    return head['step'], head['elapsed']
