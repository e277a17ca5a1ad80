"""
Checkpoints of a run: what it needs in order to go on after it was stopped, whatever stopped it.

    out/ckpt-000040/model/          a Hugging Face folder in the dtype of forwards
    out/ckpt-000040/resume/         float32 weights and AdamW's moments, as safetensors
    out/ckpt-000040/log.jsonl       the log up to this step
    out/ckpt-000040/resume.json     step, seconds, and the digest of each file above
    out/last, out/best              links to the model of the newest checkpoint, and of the best one

Every rank writes and reads its own shard (torch.distributed.checkpoint), so no host holds more than the
shards of its ranks, and another number of ranks can go on. A checkpoint appears under its name when all of
it is on the disk. At resume the newest one is taken whose files are as they were written; the links are
not asked, since copies of a folder may lack them. No pickle is written or read.

What it does not do: save the state of a random generator (a rollout's randomness is a function of the seed
and the step), or delete anything but the checkpoints of this run.
"""
import hashlib
import os
import re
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from support.files import digest, read_json, remove, whole, write_json
from support.jsonl import append_row
from support.provenance import read_starts
from support.run_folder import log_rows, rewrite_log, stored_config, write_config
from support.runtime import UserError, all_gather, barrier, print0, ranks

FILE_BYTES = 2**28              # of a file of the resume state, on each rank

# ---- save ---------------------------------------------------------------------------------------

def save(run, step, student, opt, write_model, keep):
    """Write the checkpoint of a step, move the links, and delete checkpoints that are no longer kept: all but
    the newest `keep` and the best. All ranks call it.

    write_model(folder, weights) writes the Hugging Face folder on rank 0, given (name, whole tensor) one by
    one; gathering a tensor is a collective. Weights that are not finite are a UserError, and what was saved
    before stays.
    """
    state = tensors(student, opt)
    require_finite(run, step, state)

    # Rank 0 makes the folder and renames it at the end; all ranks write into it.
    folder = folder_of(run.out, step)
    with whole(folder) if run.rank == 0 else nullcontext() as temporary:
        if run.rank == 0:
            (temporary / 'resume').mkdir(parents=True)
        temporary = Path(all_gather(str(temporary))[0])
        transfer(dcp.save, state, temporary, storage_writer=HuggingFaceStorageWriter(
            str(temporary / 'resume'), file_numbers(state), save_distributed=True))
        weights = whole_weights(student, run.rank)
        if run.rank == 0:
            write_model(temporary / 'model', weights)
            with (temporary / 'log.jsonl').open('w') as file:
                for row in run.rows:
                    append_row(file, row)
        for _ in weights:                    # the other ranks take part in the gathering
            pass
        barrier('writing the checkpoint')

        # What the checkpoint says of itself: without its own digest, the digest of every other file.
        names = [str(file.relative_to(temporary)) for file in sorted(temporary.rglob('*')) if file.is_file()]
        record = {'run': run.name, 'step': step, 'elapsed': run.seconds(), 'config': run.config,
                  'best': run.best, 'files': digests(temporary, names, run.rank)}
        if run.rank == 0:
            write_json(temporary / 'resume.json', record | {'digest': digest(record, 64)})
        barrier('writing the checkpoint')

    # The links move when all of the checkpoint is on the disk, and older ones go after that.
    if run.rank == 0:
        link(run.out, 'last', folder)
        if run.best:
            link(run.out, 'best', folder_of(run.out, run.best['step']))
        delete_old(run, keep)
    barrier('deleting old checkpoints')


def folder_of(out, step):
    return out / f'ckpt-{step:06d}'


def tensors(student, opt):
    """What a checkpoint holds -> {'weight.NAME', 'exp_avg.NAME', ...: tensor}, shards where the student is
    sharded. 'step' is among them: a weight that had no gradient at first has taken fewer steps."""
    state = {}
    for name, p in student.named_parameters():
        # AdamW has no moments of a weight that is frozen.
        for key, tensor in {'weight': p, **opt.state.get(p, {})}.items():
            state[f'{key}.{name}'] = tensor.detach()
    return state


def file_numbers(state):
    """{name: number of its file, from 1}. A file is put together in memory before it is written, so that
    several of about FILE_BYTES on each rank need less memory than one."""
    numbers = {}
    number = 1
    size = 0                                 # bytes of a rank in the last file
    for name, tensor in state.items():
        share = tensor.nbytes / ranks()
        if size and size + share > FILE_BYTES:
            number += 1
            size = 0
        numbers[name] = number
        size += share
    return numbers


def require_finite(run, step, state):
    """UserError, on all ranks, if a weight or a moment is not finite on one of them."""
    # On a GPU all answers are read at once, since each reading waits for the device. On a Mac the optimizer's
    # steps lie on the CPU.
    device = next(iter(state.values())).device
    finite = []
    for tensor in state.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        finite.append(local.isfinite().all().to(device))
    is_finite = dict(zip(state, torch.stack(finite).tolist(), strict=True))
    broken = [name for name in state if not is_finite[name]]
    broken = [name for names in all_gather(broken) for name in names]
    if broken:
        raise UserError(f'step {step}: {broken[0]} holds NaN or infinite numbers; it is not saved, and '
                        f'earlier ones in {run.out} stay; lower lr= and go on from there')


def whole_weights(student, rank):
    """(name, whole tensor) of each parameter: on the CPU of rank 0, one at a time. Others get the names."""
    for name, p in student.named_parameters():
        tensor = p.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        yield name, tensor.cpu() if rank == 0 else None


def transfer(operation, state, folder, **storage):
    """dcp.save or dcp.load. Its errors, which are bundles with tracebacks, become the error inside."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # that there is one process, and how it copies
        try:
            operation(state, **storage, no_dist=not dist.is_initialized())
        except CheckpointException as bundle:
            error = next(iter(bundle.failures.values()))[0]
            if isinstance(error, OSError):
                raise error from None
            raise UserError(f'{folder}: {type(error).__name__}: {str(error).splitlines()[0]}') from None


def digests(folder, names, rank):
    """{name: SHA-256} of files in a folder, of which each rank reads its share; '' for one that cannot be
    read."""
    mine = {name: file_digest(folder / name) for name in names[rank::ranks()]}
    return {name: found for part in all_gather(mine) for name, found in part.items()}


def file_digest(path):
    """SHA-256 of a file; '' if it cannot be read."""
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError:
        return ''


def link(out, name, folder):
    """Let out/`name` point to a checkpoint's model."""
    with whole(out / name) as temporary:
        temporary.symlink_to(f'{folder.name}/model')


def delete_old(run, keep):
    """Delete this run's checkpoints, but for the newest `keep` and the best one."""
    ours = []
    for step, folder in checkpoint_folders(run.out):
        record = read_record(folder)
        if record and record['run'] == run.name:
            ours.append((step, folder))
    for step, folder in ours[keep:]:
        if not run.best or step != run.best['step']:
            remove(folder)


# ---- resume -------------------------------------------------------------------------------------

def checkpoint_folders(out):
    """(step, folder) of everything that has the name of a checkpoint, newest first."""
    found = []
    for path in out.glob('ckpt-*'):
        number = re.fullmatch(r'ckpt-(\d{6,12})', path.name)
        if number and path.is_dir() and not path.is_symlink():
            found.append((int(number[1]), path))
    return sorted(found, reverse=True)


def read_record(folder):
    """resume.json, or None if it is not there or is not as it was written."""
    try:
        record = read_json(folder / 'resume.json')
    except (UserError, OSError):
        return None
    said = record.pop('digest', None)
    return record if digest(record, 64) == said else None


def newest_whole(run):
    """The newest checkpoint of this run whose files are as they were written -> (folder, record), or (None,
    None) if none was ever saved. A newer one that is damaged is told; if all are, it is a UserError."""
    told = []
    folders = all_gather([str(folder) for _, folder in checkpoint_folders(run.out)])
    if any(names != folders[0] for names in folders):
        raise UserError(f'{run.out}: ranks see different files there; out_dir= must be on a disk that all '
                        'share')
    for folder in map(Path, folders[0]):
        record = all_gather(read_record(folder))[0]
        if record is None:
            told.append(f'{folder}/resume.json is damaged')
        elif record['run'] != run.name:
            told.append(f'{folder} belongs to another run')
        else:
            found = digests(folder, list(record['files']), run.rank)
            damaged = [name for name, said in record['files'].items() if found[name] != said]
            if not damaged:
                for line in told:
                    print0(f'  note: {line}; going back to step {record["step"]}')
                return folder, record
            told.append(f'{folder}/{damaged[0]} is not as it was written')
    if not told and (run.out / 'last').is_symlink():
        told.append(f'{run.out}: last points to a checkpoint that is not there')
    if told:
        raise UserError(f'{told[0]}, and no other checkpoint is whole; choose another out_dir=')
    return None, None


def resume(run, student, opt, later):
    """Go on from the newest whole checkpoint: fill in the student, the optimizer and the RunFolder, its log
    included. Without one the run is at step 0, and its log keeps the row of step 0.

    later: keys that may differ from the checkpoint's, or without one from those of the last start. Those that
    do are printed, and kept in run.changed. A checkpoint beyond the config's `steps`, or something foreign in
    the place of a link, is a UserError.
    """
    folder, record = newest_whole(run)
    if folder is None:
        note_changes(run, all_gather(stored_config(run.out))[0], later)
        rewrite_log(run, first_row(run.out / 'log.jsonl'))
        if run.rank == 0:
            write_config(run)
        return

    # From which step, and with what weights.
    run.step = record['step']
    run.began -= record['elapsed']
    if run.step > run.config['steps']:
        raise UserError(f'{run.out}: has taken {run.step} steps already; raise steps=')
    if record['best'] and folder_of(run.out, record['best']['step']).is_dir():
        run.best = record['best']
    transfer(dcp.load, tensors(student, opt), folder,
             storage_reader=HuggingFaceStorageReader(str(folder / 'resume')))

    # The links may be missing or old, or be folders where a copy was made without links.
    links = {'last': folder}
    if run.best:
        links['best'] = folder_of(run.out, run.best['step'])
    check_resumable(run.out)
    barrier()                                # no rank looks any more

    # Nothing was refused; what is written says what goes on from now.
    print0(f'resumed after step {run.step}')
    note_changes(run, record['config'], later)
    rewrite_log(run, log_rows(folder / 'log.jsonl'))
    if run.rank == 0:
        write_config(run)
        for name, target in links.items():
            mend_link(run.out, name, target)
    barrier()


def note_changes(run, config, later):
    """Print which keys of `later` were different in an earlier config, and keep them in run.changed."""
    for key in later:
        before, now = config.get(key), run.config.get(key)
        if before != now:
            run.changed[key] = [before, now]
            print0(f'  from step {run.step + 1} on: {key}={now!r}, before {before!r}')


def first_row(file):
    """The row of step 0, with the scores before training: it need not be measured again. Where the log
    cannot be read, []."""
    try:
        return log_rows(file)[:1]
    except (UserError, OSError):
        return []


def mend_link(out, name, target):
    """Let out/`name` point to a checkpoint, and say so if it did not."""
    path = out / name
    if not path.is_symlink() or os.readlink(path) != f'{target.name}/model':
        link(out, name, target)
        print0(f'  note: {path} now points to {target.name}')


def check_resumable(out):
    """UserError if a run cannot go on in this folder: starts.jsonl is damaged, or something else has the name
    of one of the links. That belongs to the user, and must not be replaced. A script looks before it writes
    anything, and `resume` looks again."""
    read_starts(out)
    for path in (out / 'last', out / 'best'):
        if path.exists() and not path.is_symlink() and not is_copy(path, out):
            raise UserError(f'{path}: not a link, and not a copy of a model of this run; move it away')


def is_copy(path, out):
    """Is it what a copy makes of a link? A folder whose files are those of the model in one of the
    checkpoints here, or, where links are not known, a text file that names one."""
    if path.is_file():
        with path.open('rb') as file:
            return bool(re.fullmatch(rb'ckpt-\d{6,12}/model', file.read(40).strip()))
    found = {}
    for file in path.rglob('*'):
        if not file.is_dir():
            found[f'model/{file.relative_to(path)}'] = file_digest(file)
    for _, folder in checkpoint_folders(out):
        record = read_record(folder)
        if record and found and found.items() <= record['files'].items():
            return True
    return False
