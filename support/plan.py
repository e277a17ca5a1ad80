"""
What a dry run says about a run that is not started: memory by phase, disk, time.

    python distill.py configs/toy.py --dry-run                              this device, these ranks
    python distill.py configs/r1_1p5b.py --dry-run ranks=8                  eight GPUs, asked from a laptop
    python distill.py configs/r1_1p5b.py --dry-run ranks=64 shard_ranks=8   eight machines of eight GPUs
    python distill.py configs/toy.py --dry-run ranks=2 device=cpu           two CPU ranks

Simpler than usual: everything is a count, divided by a rate. Memory is counted in support/memory.py. Time is
the least that the counted operations and the counted bytes take: at this device's own rates, which a
product of two matrices and a copy measure in a fifth of a second, or for GPUs that are not here at a share
of an H100's data sheet. Real runs are slower, small models by a factor: a step has thousands of small
operations.

Letters: as in support/memory.py.
"""
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace

import torch

from support.files import existing_above
from support.memory import GiB, checkpoint_bytes, peak, saving, weights_of
from support.report import amount
from support.runtime import UserError, ranks_of_a_copy

GPUS = 8                        # of a machine, if a dry run is not told otherwise


def planned(cfg, env):
    """Where the run would happen -> Env. With the key `ranks` that is another machine than this one: GPUs,
    unless the config names a device, and eight of them in a machine."""
    if not cfg['ranks']:
        return env
    device = torch.device('cuda' if cfg['device'] == 'auto' else cfg['device'])
    dtype = cfg['dtype']
    if dtype == 'auto':
        dtype = 'bfloat16' if device.type == 'cuda' else 'float32'
    on_machine = min(cfg['ranks'], GPUS) if device.type == 'cuda' else cfg['ranks']
    shard_ranks = ranks_of_a_copy(cfg['shard_ranks'], cfg['ranks'], on_machine)
    return replace(env, world=cfg['ranks'], device=device, dtype=getattr(torch, dtype),
                   shard_ranks=shard_ranks)


def mesh_lines(plan):
    """Which ranks share the weights, where there is more than one."""
    if plan.W == 1:
        return []
    who = f'{plan.W} ranks' if plan.S == plan.W else f'{plan.W} ranks: each {plan.S} of them'
    assumed = plan.cfg['ranks'] and not plan.cfg['shard_ranks'] and plan.cuda
    if assumed:
        who += f' (as if a machine had {GPUS} GPUs, see shard_ranks=)'
    teacher = 'and one of the teacher' if plan.teacher_sharded else 'and each has the whole teacher'
    return [f'{who} share one copy of the student, {teacher}']


def check_folder(folder):
    """A folder that a run could not make is a UserError: a temporary one is made beside it and removed."""
    above = existing_above(folder)
    try:
        os.rmdir(tempfile.mkdtemp(prefix='.dry-run-', dir=above))
    except OSError as error:
        raise UserError(f'{folder}: cannot be made, {above}: {error.strerror}; '
                        'choose another folder') from None
    return above


# ---- memory and disk -----------------------------------------------------------------------------

def memory_lines(estimate):
    """{phase: {what: bytes}} -> a line for each phase, and the parts of the largest."""
    lines = ['memory of a rank by phase, GiB, counted for answers of full length:']
    largest = peak(estimate)
    for phase, parts in estimate.items():
        mark = '   <- the peak' if phase == largest else ''
        lines.append(f'  {sum(parts.values()) / GiB:8.2f}  {phase}{mark}')
        if phase == largest:
            lines += [f'      {size / GiB:8.2f}  {what}' for what, size in parts.items() if size]
    return lines


def free_memory(device):
    """Bytes that this device has free; None where nobody says."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open('/proc/meminfo') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return None


def of_free(env, is_here):
    """' of 17.3 free', where that is known."""
    free = free_memory(env.device) if is_here else None
    return '' if free is None else f' of {free / GiB:.1f} free'


def memory_notes(estimate, env, is_here):
    """Does it fit? -> notes. Ranks on one CPU share its memory."""
    free = free_memory(env.device) if is_here else None
    need = sum(estimate[peak(estimate)].values())
    if env.device.type == 'cpu':
        need *= env.world
    if free is None or need <= free:
        return []
    return [f'note: the run needs {need / GiB:.1f} GiB, and {free / GiB:.1f} GiB are free here; lower '
            'token_budget=, eval_rows= or max_new_tokens=, set checkpointing=True, or use more ranks']


def host_lines(plan):
    """Host memory while a checkpoint is written, where the run itself is on GPUs."""
    if not plan.cuda:
        return []
    need = sum(saving(plan).values()) / GiB
    return [f'host memory of rank 0 while saving: {need:.1f} GiB']


def disk_lines(plan, is_here):
    """Disk for the checkpoints: those that stay, the best one, and the one that is being written."""
    size = checkpoint_bytes(plan)
    count = plan.cfg['keep'] + 2
    lines = [f'disk: up to {count} checkpoints of {size / 1e9:.2f} GB, {count * size / 1e9:.1f} GB']
    if is_here:
        above = check_folder(plan.cfg['out_dir'])
        free = shutil.disk_usage(above).free
        lines[0] += f'; {free / 1e9:.0f} GB free at {above}'
        if free < count * size:
            lines.append('note: that is more than is free there; lower keep=, or choose another out_dir=')
    return lines


# ---- time ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""
    flops: float
    bytes: float
    words: str                  # where the two numbers come from


# An H100 SXM's data sheet, dense, and the share of it that large products and copies reach in practice.
H100_FLOPS = {torch.bfloat16: 989e12, torch.float32: 67e12}
H100_BYTES = 3.35e12
H100_SHARE = 0.4


def rates(env, is_here):
    """Rates of the device -> Rates: measured here, or a share of a data sheet."""
    if not is_here and env.device.type == 'cuda':
        return Rates(H100_SHARE * H100_FLOPS[env.dtype], H100_SHARE * H100_BYTES,
                     f"at {H100_SHARE:.0%} of an H100's data sheet")
    device = env.device if is_here else torch.device('cpu')
    a = torch.ones(512, 512, device=device, dtype=env.dtype)
    flops = 2 * 512**3 / least_seconds(lambda: a @ a, device)
    b = torch.ones(2**24, device=device, dtype=torch.uint8)
    c = torch.empty_like(b)
    copied = 2 * b.nbytes / least_seconds(lambda: c.copy_(b), device)
    words = f'at {flops / 1e9:.0f} GFLOP/s and {copied / 1e9:.0f} GB/s, measured here just now'
    return Rates(flops, copied, words)


def least_seconds(call, device, seconds=0.1):
    """The least time of a call, of as many as fit into a tenth of a second."""
    times = []
    began = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def forward_flops(c, T):
    """Operations per token of a forward through the blocks, for sequences of T tokens. A product of d x n
    weights takes 2 d n; attention sees T / 2 tokens on average, at 4 H e each."""
    return 2 * weights_of(c).blocks + 2 * c.L * T * c.H * c.e


def update_flops(plan):
    """Operations of one rank's update. The backward takes two forwards, and a recomputed block a third."""
    work = plan.work
    T = work.prompt + work.new
    forwards = 4 if plan.cfg['checkpointing'] else 3
    per_token = forwards * forward_flops(plan.student, T) + forward_flops(plan.teacher, T)
    flops = work.answers * T * per_token

    # Under the heads: both models' logits, and the gradients of the student's states and head.
    if plan.output:
        flops += work.answers * work.new * 2 * work.vocab * (3 * plan.student.d + plan.teacher.d)
    return flops


def decode_counts(c, s, answers, prompt, new):
    """A decode step of so many answers, in the middle of their lengths -> operations, bytes read."""
    T = prompt + new / 2
    weights = weights_of(c).blocks + c.V * c.d
    flops = answers * (2 * weights + 4 * c.L * T * c.H * c.e)
    return flops, s * (weights + answers * T * 2 * c.L * c.G * c.e)


def sampling_seconds(c, s, answers, prompt, new, rate):
    """The least that sampling so many answers at once takes."""
    flops, read = decode_counts(c, s, answers, prompt, new)
    return new * max(flops / rate.flops, read / rate.bytes)


def time_lines(plan, is_here):
    """The least time of a step and of the run, and the counts that it comes from."""
    rate = rates(plan.env, is_here)
    student = plan.student
    work = plan.work
    steps = plan.cfg['steps']
    flops = update_flops(plan)
    _, read = decode_counts(student, plan.s, work.answers, work.prompt, work.new)
    sampling = sampling_seconds(student, plan.s, work.answers, work.prompt, work.new, rate)
    step = sampling + flops / rate.flops

    # Evaluations: of both models before the first step, of the student every so often and after the last one.
    count = 0
    evaluation = 0.0
    if work.eval_answers:
        count = (2 if plan.cfg['eval_teacher'] else 1) + -(-steps // (plan.cfg['eval_every'] or steps))
        rounds = work.eval_total / work.eval_answers
        evaluation = rounds * sampling_seconds(student, plan.s, work.eval_answers, work.eval_prompt,
                                               work.eval_new, rate)
    total = steps * step + count * evaluation
    return [f'a step, of one rank: {amount(read, gap=" ")}B read per decoded token of {work.answers} '
            f'answers, {amount(flops, gap=" ")}FLOP in the update',
            f'time, a rough estimate of the least for answers of full length, {rate.words}: '
            f'{seconds(step)} a step ({seconds(sampling)} of it sampling), {seconds(evaluation)} an '
            f'evaluation, {seconds(total)} for {steps} steps and {count} evaluations']


def seconds(number):
    """A duration in the unit that reads best."""
    if number < 120:
        return f'{number:.2g} s' if number < 10 else f'{number:.0f} s'
    return f'{number / 60:.0f} min' if number < 7200 else f'{number / 3600:.1f} h'
