"""
The run folder and its checkpoints: what a run needs in order to go on after it was stopped.

    out/config.json         the config that the run was started with
    out/log.jsonl           one line per step (support/files.py)
    out/ckpt-000040/        the newest checkpoint: `model`, a Hugging Face folder, and the resume state
    out/last                a link to ckpt-000040/model, for whoever wants the newest weights

A checkpoint holds whole tensors, not shards, so that another number of ranks can read it. Every folder
and the link are written completely or not at all. What it does not do: keep more than the newest
checkpoint, or save the state of a random generator (a rollout's randomness is a function of the seed and
the step).
"""
import os
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from support.files import open_safetensors, read_json, remove, whole, write_json, write_safetensors
from support.runtime import UserError, barrier, full


def open_run(out_dir, cfg, may_change):
    """The run folder -> Path. It is looked at, and nothing is made yet: a command that fails must not
    claim it. A folder that was started with another config (but for the keys in `may_change`), or that
    cannot be made, is a UserError."""
    out = Path(out_dir)
    file = out / 'config.json'
    if file.exists():
        before = read_json(file).get('config', {})
        changed = []
        for key, value in cfg.items():
            if key not in may_change and before.get(key) != value:
                changed.append(f'{key}={before.get(key)!r}, now {value!r}')
        if changed:
            raise UserError(f'{file}: this run was started with {"; ".join(changed)}; '
                            'give the same again, or another out_dir=')
    elif (out / 'last').is_symlink():
        raise UserError(f'{file}: not there, but {out}/last is; '
                        'delete the folder or choose another out_dir=')

    # The nearest folder above that exists must be writable.
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f'{out}: cannot be made, {above} is not a folder of yours; '
                        'choose another out_dir=')
    return out


def save(out, step, elapsed, student, opt, write_model, rank):
    """Write the checkpoint of a step, move `out/last` to it, and delete older ones. All ranks call it.

    The resume state is the float32 weights and the optimizer's tensors, {'weight.NAME', 'exp_avg.NAME',
    ...}. write_model(folder, weights) writes the Hugging Face folder, given {name: float32 tensor}.
    """
    # Making a shard whole is a collective, in which all ranks take part. Rank 0 alone keeps the result,
    # and one tensor at a time is whole elsewhere.
    state = {}
    for name, p in student.named_parameters():
        moments = opt.state[p] if p in opt.state else {}
        for key, tensor in {'weight': p, **moments}.items():
            tensor = full(tensor)
            if rank == 0:
                state[f'{key}.{name}'] = tensor

    if rank == 0:
        weights = {}
        for name, tensor in state.items():
            if name.startswith('weight.'):
                weights[name.removeprefix('weight.')] = tensor
        folder = out / f'ckpt-{step:06d}'
        with whole(folder) as tmp:
            tmp.mkdir()
            write_model(tmp / 'model', weights)
            write_safetensors(state, tmp / 'resume.safetensors')
            write_json(tmp / 'resume.json', {'step': step, 'elapsed': elapsed})

        # The link moves when all of the checkpoint is on the disk, and older ones go after that. Folders
        # that begin with a dot were cut off by a kill.
        with whole(out / 'last') as link:
            link.symlink_to(f'{folder.name}/model')
        for old in (*out.glob('ckpt-*'), *out.glob('.ckpt-*')):
            if old != folder:
                remove(old)
    barrier()


def resume(out, student, opt):
    """Read back what `save` wrote into student and optimizer -> (step, elapsed); (0, 0.0) where nothing
    was saved. Each rank reads the file and keeps its own shard."""
    if not (out / 'last').is_symlink():
        return 0, 0.0
    folder = (out / 'last').resolve().parent
    head = read_json(folder / 'resume.json')
    saved = open_safetensors(folder / 'resume.safetensors')
    names = set(saved.keys())

    def read(name, tensor):
        """Copy one saved tensor into the one that the model or the optimizer holds."""
        if name not in names:
            raise UserError(f'{folder}/resume.safetensors: {name} is missing; '
                            f'delete {out} and start again')
        value = saved.get_tensor(name)
        if value.shape != tensor.shape:
            raise UserError(f'{folder}/resume.safetensors: {name} has shape {list(value.shape)}, '
                            f'but the model has {list(tensor.shape)}; use another out_dir=')
        value = value.to(tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)

    # 'step' is read as well: a weight that had no gradient at first has taken fewer steps than the rest.
    with torch.no_grad():
        for name, p in student.named_parameters():
            read(f'weight.{name}', p)
            if p in opt.state:
                for key, tensor in opt.state[p].items():
                    read(f'{key}.{name}', tensor)
    return head['step'], head['elapsed']
