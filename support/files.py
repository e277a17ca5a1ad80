"""
Files that are written completely or not at all: JSON and safetensors; and the lock of a folder.

Everything is written under a temporary name, flushed to the disk and renamed. A crash, a full disk or a
power cut therefore leaves the file or folder that was there before, and never half of a new one. No
pickle is written or read. It needs a file system on which a rename is atomic and `flock` works: local
disks and the usual network ones.

    with whole('out/table.txt') as tmp:      write `tmp`; it becomes out/table.txt at the end of the block
        tmp.write_text('...')

Checkpoints, which are made of these, are in support/checkpoints.py; files that grow, in support/jsonl.py.
"""
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.runtime import UserError, barrier, print0

LONGEST_NAME = 255              # bytes of a file's name, on the usual disks

# ---- one file or folder, atomically -----------------------------------------------------------


@contextmanager
def whole(path):
    """`with whole(path) as tmp:` write the file or folder `tmp`; it becomes `path` if all went well.

    After an error or a power cut `path` is as it was before. (Where a folder replaces a folder, there
    is an instant between two renames at which `path` does not exist.)
    """
    path = Path(path)
    tmp = path.with_name(f'.{path.name}.tmp{os.getpid()}')
    old = path.with_name(f'.{path.name}.old{os.getpid()}')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield tmp

        # The contents must be on the disk before the name points at them. Otherwise a power cut could
        # leave the new name on an empty file.
        for file in tmp.rglob('*'):
            fsync(file)
        fsync(tmp)

        # A file replaces a file in one step. A folder cannot be renamed over a folder that is not
        # empty, so the old one steps aside, and comes back if the second rename fails.
        if path.is_dir() and not path.is_symlink():
            os.replace(path, old)
        try:
            os.replace(tmp, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise

        # The rename itself is an entry in the parent folder, which has to reach the disk as well.
        fsync(path.parent)
    finally:
        remove(tmp)
        remove(old)


def existing_above(folder):
    """The folder itself, or the nearest one above it that exists -> Path. A UserError if the folder cannot be
    made there. Nothing is written, so that a command that is refused leaves no folders behind."""
    folder = Path(folder)
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        raise UserError(f'{folder}: cannot be made, a name has more than {LONGEST_NAME} bytes; choose '
                        'another folder')

    # A link that leads nowhere, or to itself, exists and is no folder.
    paths = (folder, *folder.absolute().parents)
    above = next(path for path in paths if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f'{folder}: cannot be made, {above} is not a folder of yours; choose another '
                        'folder')
    return above


@contextmanager
def locked(path):
    """Let one process at a time into the block; the others wait. The lock is the operating system's and
    ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def owned(folder, rank=0):
    """Hold a folder for the life of a run: `with owned(out, env.rank):`. The folder is made if it is not
    there. Another process that holds it is a UserError, which says who that is.

    Rank 0 holds the lock for all ranks, and the others go on only when it does: two launches into one
    folder cannot both get past this line. The lock is the operating system's, so a killed process leaves
    none behind. What a killed process left half-written in the folder is deleted.
    """
    if rank > 0:
        barrier()
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / '.lock').open('a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(100).strip() or 'another process'
            raise UserError(f'{folder}: in use by {owner}; wait for its end, or choose another '
                            'folder') from None
        except OSError as error:
            print0(f'  note: {folder} is on a disk without locks ({error.strerror}); start only once there')
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        sweep(folder)
        barrier()
        yield


def sweep(folder):
    """Delete the temporary files and folders that killed processes left in a folder. Only its owner may."""
    for path in folder.glob('.*'):
        left = re.fullmatch(r'\.(.+)\.(tmp|old)\d+', path.name)
        if not left:
            continue
        # A folder that had stepped aside comes back if nothing has taken its place.
        target = folder / left[1]
        if left[2] == 'old' and not target.exists():
            os.replace(path, target)
        else:
            remove(path)


def remove(path):
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path):
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- JSON -------------------------------------------------------------------------------------

def write_json(path, obj):
    """Write an object as indented JSON, completely or not at all."""
    with whole(path) as tmp:
        tmp.write_text(json.dumps(obj, indent=2) + '\n')


def read_json(path, kind=dict):
    """Parsed JSON of a file. A file that is missing, malformed or not of the kind is a UserError."""
    try:
        obj = json.loads(Path(path).read_text(encoding='utf-8-sig'))         # with or without a mark
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not valid JSON ({error}); delete it or fetch it again') from None
    except IsADirectoryError:
        raise UserError(f'{path}: a folder, where a file belongs') from None
    if not isinstance(obj, kind):
        raise UserError(f'{path}: holds a {type(obj).__name__}, not a {kind.__name__}; fetch it again')
    return obj


def digest(obj, n=8):
    """A short name for an object that JSON can hold: equal objects have equal names, on every machine."""
    text = json.dumps(obj, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:n]


# ---- safetensors ------------------------------------------------------------------------------

def open_safetensors(file):
    """A memory-mapped safetensors file. One that is missing or cut off is a UserError."""
    try:
        return safe_open(file, 'pt')
    except (SafetensorError, OSError) as e:
        raise UserError(f'{file}: not a whole safetensors file ({e}); fetch or make it again') from None


def write_safetensors(tensors, file, metadata=None):
    """Write {name: tensor}. A full disk is an OSError that names the file, as it is for other files."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as e:
        raise OSError(28, f'could not be written ({e})', str(file)) from None

    # The library makes the file private to its owner. Others may read it as far as the umask allows,
    # which can only be asked by setting it.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)
