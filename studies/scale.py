"""
Memory and time of a training step on 1 to 512 GPUs, by calculation: nothing is loaded, no GPU is needed.

    python -m studies.scale              the tables of docs/scale.md, in seconds, on any machine
    python -m studies.scale check        the same calculation beside a measured run on 1 and on 2 CPU ranks

A step is a sum of four times. Ranks meet after the first one, and in each micro-batch:

    sampling      all answers of a rank are written at once; the step waits for the rank that is last
    update        the teacher's forward, the student's forward and backward
    optimizer     AdamW reads and writes the shards of a rank
    network       weights are gathered, gradients are summed over the ranks

Sampling is a loop over decode steps. Each reads all weights once and the keys and values of the answers that
are not finished yet, so its cost follows from how many answers are alive then. Lengths of answers are drawn
from a distribution with a long tail. The counts of bytes and operations are those of a dry run
(support/memory.py, support/plan.py).

Simpler than usual: a time is a count divided by a rate, as in a dry run; nothing overlaps; all prompts have
one length; reading the prompts, grading, evaluations and checkpoints take no time. To ask another question,
change the constants below: everything that is assumed stands there, and is printed beside the tables.

Letters: S seeds, W ranks (one GPU each), m answers of a rank, M micro-batches of a rank, T tokens.
"""
import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configs import load_config
from formats.huggingface import load_model
from formats.problems import load_problems, prompt_order
from formats.tokenizer import load_tokenizer, shared_size
from model import PRESETS, ModelConfig
from rollout import sample
from step import micro_batches
from studies import peaks
from support.jsonl import read_rows
from support.memory import GiB, Plan, phases, weights_of, work_of
from support.plan import Rates, decode_counts, least_seconds, rates, update_flops
from support.runtime import Env, barrier, print0, run, start

# ---- assumptions: change them here ----------------------------------------------------------------

GPUS = (1, 8, 64, 512)
CONFIG = 'configs/r1_1p5b.py'   # the work; prompts_per_step is raised where there are more GPUs than that

# Published shapes: the paper's 1.5B pair (the shape of Qwen2.5-1.5B, with a head of its own), Qwen3-8B, Qwen3-32B.
# The teacher has the student's shape.
STUDENTS = {
    '1.5B': PRESETS['r1_1p5b'],
    #                   family       V   L     d   H  G    e      ff   tied theta   eps  context
    '8B':  ModelConfig('qwen3', 151_936, 36, 4096, 32, 8, 128, 12_288, False, 1e6, 1e-6, 40_960),
    '32B': ModelConfig('qwen3', 151_936, 64, 5120, 64, 8, 128, 25_600, False, 1e6, 1e-6, 40_960),
}

# Lengths. An answer has MEDIAN * exp(PROMPT_SPREAD * x + ANSWER_SPREAD * y) tokens, cut at max_new_tokens: x is
# a standard normal number of the prompt, y one of the answer. Hard prompts have long answers.
PROMPT = 300                    # tokens of a prompt
MEDIAN = 5000
PROMPT_SPREAD = 0.6
ANSWER_SPREAD = 0.5
SEEDS = 20                      # steps that are simulated; times are means over them

# The evaluation holds so many problems (AIME24 and AIME25 have 30 each, AIMO 83).
EVALUATED = 143

# A GPU: an H100 SXM. Rates of products and of memory are those of a dry run, a share of the data sheet.
MEMORY = {'80 GB': 79, '141 GB': 140}    # GiB that torch sees on an H100 and on an H200
SPARE = 8                       # GiB for the CUDA context, NCCL's buffers and the allocator's gaps
MACHINE = 8                     # GPUs of a machine
INSIDE = 300e9                  # bytes a second that a GPU gets from the others of its machine, by NVLink
ACROSS = 40e9                   # and from those of other machines: 400 Gbit/s for each GPU, 80% of it

# How the sampler works on a GPU (rollout.stream).
POLL = 32                       # decode steps between two looks at which answers are finished
COMPACT_AT = 0.5                # finished rows leave the batch when this share of it is alive


@dataclass(frozen=True)
class Machine:
    """The rates of a kind of machine, and how the sampler works there."""
    rate: Rates                 # of products, and of memory
    inside: float               # bytes a second between ranks of one machine
    across: float               # between ranks of two machines
    size: int                   # ranks of a machine
    poll: int
    compact_at: float


def gpu_machine():
    """The GPU that is assumed -> Machine."""
    env = environment(1, 1)
    return Machine(rates(env, is_here=False), INSIDE, ACROSS, MACHINE, POLL, COMPACT_AT)


def environment(ranks, shard_ranks, device='cuda', dtype=torch.bfloat16):
    """Env of a run that is not started."""
    values = dict(rank=0, world=ranks, local=0, device=torch.device(device), dtype=dtype)
    if 'shard_ranks' in [field.name for field in fields(Env)]:
        return Env(**values, shard_ranks=shard_ranks)
    return Env(**values | {'world': shard_ranks})


@cache
def config():
    """The keys of CONFIG."""
    return load_config([CONFIG])


@dataclass(frozen=True)
class Tokens:
    """A problem, of which the ids alone are looked at."""
    ids: range


def plan_of(student, gpus, shard_ranks=None, **keys):
    """A run of CONFIG on so many GPUs -> support.memory.Plan. keys: keys of the config that differ."""
    cfg = config() | {'prompts_per_step': max(config()['prompts_per_step'], gpus)} | keys
    problems = [Tokens(range(PROMPT))]
    work = work_of(cfg, gpus, problems, problems * EVALUATED, student.V)
    layer_map = {l: l for l in range(1, student.L + 1)}
    env = environment(gpus, shard_ranks or min(gpus, MACHINE))
    return Plan(cfg, student, student, layer_map, work, env)


# ---- lengths of answers, and who gets which ---------------------------------------------------------

def draw_lengths(prompts, n, longest, spread=1.0, seeds=SEEDS):
    """Lengths of n answers to each prompt -> whole numbers (S, prompts, n). spread: a factor on both spreads."""
    rng = np.random.default_rng(0)
    difficulty = PROMPT_SPREAD * rng.standard_normal((seeds, prompts, 1))
    luck = ANSWER_SPREAD * rng.standard_normal((seeds, prompts, n))
    tokens = MEDIAN * np.exp(spread * (difficulty + luck))
    return np.clip(np.ceil(tokens), 1, longest).astype(int)


def deal(lengths, ranks, how):
    """Lengths (S, prompts, n) -> (S, W, m): what each rank gets; 0 where it has fewer answers than others.

    how: 'answer', as distill.py does: answer number i goes to rank i % W. 'prompt': all answers to prompt
    number j go to rank j % W. 'length', if answers could move before the update: the longest first, to ranks
    0, 1, ... W - 1, then back, W - 1, ... 1, 0, so that who has a long one gets a short one too.
    """
    assert how in ('answer', 'prompt', 'length'), how
    seeds, _, n = lengths.shape
    parts = lengths                                                          # (S, parts, answers of a part)
    if how != 'prompt':
        parts = lengths.reshape(seeds, -1, 1)
    if how == 'length':
        parts = -np.sort(-parts, axis=1)

    # Deal in turns: in each of them, every rank gets one part.
    missing = -parts.shape[1] % ranks
    parts = np.pad(parts, ((0, 0), (0, missing), (0, 0)))
    turns = parts.reshape(seeds, -1, ranks, parts.shape[2])                  # (S, turns, W, answers of a part)
    if how == 'length':
        turns[:, 1::2] = turns[:, 1::2, ::-1].copy()
    return turns.transpose(0, 2, 1, 3).reshape(seeds, ranks, -1)


# ---- time of the four parts --------------------------------------------------------------------------

def sampling_seconds(plan, dealt, machine):
    """Seconds in which each rank writes its answers: lengths (..., m) -> (...).

    A sum over the decode steps, from one look at the finished answers to the next. Until then a finished
    answer is decoded like the others; its rows leave the batch when few enough answers are alive.
    """
    seconds = np.zeros(dealt.shape[:-1])
    rows = (dealt > 0).sum(-1)
    for start in range(0, int(dealt.max()), machine.poll):
        alive = (dealt > start).sum(-1)
        rows = np.where(alive <= machine.compact_at * rows, alive, rows)
        steps = min(machine.poll, int(dealt.max()) - start)

        # Every row of the batch is computed; keys and values are read for those that are alive.
        context = plan.work.prompt + start + steps / 2
        flops, _ = decode_counts(plan.student, plan.s, rows, context, 0)
        _, read = decode_counts(plan.student, plan.s, alive, context, 0)
        step = np.maximum(flops / machine.rate.flops, read / machine.rate.bytes)
        seconds += steps * step * (alive > 0)
    return seconds


def update_seconds(plan, dealt, machine):
    """Lengths (S, W, m) -> seconds of the update (S,), and its number of micro-batches (S,).

    All ranks take equally many micro-batches, because FSDP gathers weights in each (step.cut_rollout), and
    each lasts as long as that of the slowest rank.
    """
    seconds = []
    counts = []
    for lengths in dealt:
        answers, tokens = cut(lengths + plan.work.prompt * (lengths > 0), plan.cfg['token_budget'])
        work = replace(plan.work, answers=answers, new=tokens - plan.work.prompt)
        by_rank = update_flops(replace(plan, work=work)) / machine.rate.flops            # (W, M)
        seconds.append(by_rank.max(0).sum())
        counts.append(by_rank.shape[1])
    return np.array(seconds), np.array(counts)


def cut(tokens, budget):
    """Tokens of the answers of each rank (W, m), prompts included -> number of answers and padded length of
    each rank's micro-batches (W, M) each, as step.cut_rollout makes them."""
    by_rank = []
    for row in tokens:
        lengths = [int(length) for length in row if length]
        by_rank.append([(len(group), lengths[group[0]]) for group in micro_batches(lengths, budget)])

    # A rank that has run out of answers repeats its first one, with weight 0.
    count = max(len(groups) for groups in by_rank)
    for groups, row in zip(by_rank, tokens, strict=True):
        groups += [(1, int(row[0]))] * (count - len(groups))
    pairs = np.array(by_rank)                                                # (W, M, 2)
    return pairs[..., 0], pairs[..., 1]


def optimizer_seconds(plan, shard_ranks, machine):
    """AdamW reads a gradient, a weight and two moments, and writes the last three: 28 bytes of each weight."""
    return 28 * plan.learned / shard_ranks / machine.rate.bytes


def network_seconds(plan, gpus, shard_ranks, count, machine):
    """Seconds in which weights are gathered and gradients summed, in a step of `count` micro-batches.

    Within the ranks that share one copy of the weights, each gets what it lacks: once for sampling, and for
    each micro-batch twice the blocks (forward and backward), once the embedding, and its shard of the summed
    float32 gradients. Then each shard is summed with those of the other copies, in a ring.
    """
    weights = weights_of(plan.student)
    lacks = (shard_ranks - 1) / shard_ranks
    micro_batch = plan.s * (2 * weights.blocks + weights.embed) + 4 * plan.learned
    if plan.cfg.get('teacher_shard'):
        teacher = weights_of(plan.teacher)
        micro_batch += plan.s * (teacher.blocks + teacher.embed)
    shared = lacks * (plan.s * weights.total + count * micro_batch)

    copies = gpus // shard_ranks
    summed = count * 2 * (copies - 1) / copies * 4 * plan.learned / shard_ranks
    within = machine.inside if shard_ranks <= machine.size else machine.across
    return shared / within + summed / machine.across


# ---- a step -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Step:
    """Seconds of a step, means over the seeds."""
    answers: int                # of all ranks
    sampling: float             # until the last rank has finished
    longest: float              # what the longest answer takes alone on a GPU
    idle: float                 # share of the sampling time in which a GPU waits, on average
    update: float
    optimizer: float
    network: float

    @property
    def total(self):
        return self.sampling + self.update + self.optimizer + self.network

    @property
    def limit(self):
        """What takes most of the step. The longest answer alone is a limit that no number of GPUs moves."""
        parts = {'longest answer': self.longest, 'decode bandwidth': self.sampling - self.longest,
                 'update': self.update + self.optimizer, 'network': self.network}
        return max(parts, key=parts.get)


def simulate(plan, gpus, machine, how='answer', spread=1.0):
    """A step of a plan on so many GPUs -> Step. how: answers are dealt. spread: see draw_lengths."""
    lengths = draw_lengths(plan.cfg['prompts_per_step'], plan.cfg['n'], plan.work.new, spread)
    dealt = deal(lengths, gpus, how)
    sampling = sampling_seconds(plan, dealt, machine)                                    # (S, W)
    longest = sampling_seconds(plan, lengths.max((1, 2))[:, None], machine)              # (S,)
    update, count = update_seconds(plan, dealt, machine)                                 # (S,)
    shard_ranks = min(gpus, machine.size)
    return Step(answers=lengths[0].size, sampling=sampling.max(1).mean(), longest=longest.mean(),
                idle=idle_share(sampling), update=update.mean(),
                optimizer=optimizer_seconds(plan, shard_ranks, machine),
                network=network_seconds(plan, gpus, shard_ranks, count.mean(), machine))


def idle_share(seconds):
    """Seconds of each rank (S, W) -> share of the time until the last has finished in which a rank waits."""
    return float((1 - seconds.mean(1) / seconds.max(1)).mean())


# ---- tables, in markdown -----------------------------------------------------------------------------

def table(head, rows):
    """Cells -> lines of a table."""
    lines = [head, ['---'] * len(head), *rows]
    return ['| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines] + ['']


def number(seconds):
    """Seconds as they are printed: two or three digits."""
    return f'{seconds:.2g}' if seconds < 10 else f'{seconds:.0f}'


def assumptions(cfg, machine):
    """What the tables assume -> lines."""
    return [
        f'- The work: `{CONFIG}`, {cfg["prompts_per_step"]} prompts of {PROMPT} tokens in a step (as many as GPUs, '
        f'if there are more of these), {cfg["n"]} answers to each, of up to {cfg["max_new_tokens"]:,} tokens.',
        f'- An answer has {MEDIAN:,} exp({PROMPT_SPREAD} x + {ANSWER_SPREAD} y) tokens, cut at '
        f'{cfg["max_new_tokens"]:,}: x is a standard normal number of its prompt, y one of its own. Times are means '
        f'over {SEEDS} drawn steps.',
        f'- A GPU, {machine.rate.words}: {machine.rate.flops / 1e12:.0f} TFLOP/s in bfloat16 and '
        f'{machine.rate.bytes / 1e12:.2f} TB/s. {MACHINE} in a machine; {INSIDE / 1e9:.0f} GB/s from the others '
        f'of its machine, {ACROSS / 1e9:.0f} GB/s from other machines. Nothing overlaps.',
        f'- Weights are in shards over the GPUs of a machine, with a copy on each machine. {SPARE} GiB of a GPU '
        'stay free for the CUDA context, the buffers of NCCL and the gaps of the allocator.',
        '']


def gib(estimate, phase):
    """GiB of a phase."""
    return sum(estimate[phase].values()) / GiB


def memory_table():
    """GiB of each phase, with the teacher whole and in shards, and whether it fits -> lines."""
    rows = []
    for gpus in GPUS:
        for name, student in STUDENTS.items():
            whole, shards = (phases(plan_of(student, gpus, teacher_shard=flag)) for flag in (False, True))
            cells = [f'{gib(whole, phase):.0f} / {gib(shards, phase):.0f}' for phase in ('load', 'sample', 'update')]
            rows.append([gpus, name, *cells, *[fits(student, gpus, size) for size in MEMORY]])
    return table(['GPUs', 'student', 'load', 'sample', 'update', *[f'fits a GPU of {size}?' for size in MEMORY]],
                 rows)


def fits(student, gpus, size, shard_ranks=None):
    """Does a run fit GPUs of this size, with which teacher, and how many rows of an evaluation? -> words."""
    room = MEMORY[size] - SPARE
    needs = {}
    for teacher, flag in (('whole', False), ('in shards', True)):
        if flag and gpus == 1:
            continue
        for rows in (64, 32, 16, 8, 4, 2, 1):
            estimate = phases(plan_of(student, gpus, shard_ranks, teacher_shard=flag, eval_rows=rows))
            needs = {phase: gib(estimate, phase) for phase in estimate}
            if max(needs.values()) <= room:
                return f'teacher {teacher}, eval_rows={rows}'
    phase = max(needs, key=needs.get)
    return f'no: {phase} needs {needs[phase]:.0f}'


def step_table(machine):
    """Seconds of a step and what limits it -> lines."""
    rows = []
    for gpus in GPUS:
        for name, student in STUDENTS.items():
            step = simulate(plan_of(student, gpus), gpus, machine)
            limit = step.limit
            if fits(student, gpus, '80 GB').startswith('no'):
                limit = f'memory, then {limit}'
            rows.append([gpus, name, step.answers, number(step.sampling), number(step.longest),
                         number(step.update + step.optimizer), number(step.network), number(step.total),
                         f'{3600 * step.answers / step.total / gpus:.0f}', limit])
    return table(['GPUs', 'student', 'answers', 'sampling, s', 'longest answer alone, s', 'update, s', 'network, s',
                  'step, s', 'answers per GPU hour', 'limit'], rows)


def waiting_table(machine):
    """How long ranks wait for the slowest, by how answers are dealt -> lines. The 1.5B student.

    The last two columns are no options of distill.py: the update if answers were moved to other ranks before it,
    long ones beside short ones, and if all ranks had equally much to do without any padding.
    """
    rows = []
    for gpus in GPUS[1:]:
        plan = plan_of(STUDENTS['1.5B'], gpus)
        prompt, answer, moved = (simulate(plan, gpus, machine, how) for how in ('prompt', 'answer', 'length'))
        even = even_update_seconds(plan, gpus, machine)
        rows.append([gpus, f'{prompt.sampling:.1f}', f'{answer.sampling:.1f}', f'{prompt.idle:.0%}',
                     f'{answer.idle:.0%}', f'{prompt.update:.2f}', f'{answer.update:.2f}',
                     f'{moved.update:.2f}', f'{even:.2f}'])
    return table(['GPUs', 'sampling, s: by prompt', 'by answer', 'a GPU waits: by prompt', 'by answer',
                  'update, s: by prompt', 'by answer', 'moved', 'even'], rows)


def even_update_seconds(plan, gpus, machine):
    """Seconds of an update in which every rank computes as much, without padding: none can be shorter."""
    lengths = draw_lengths(plan.cfg['prompts_per_step'], plan.cfg['n'], plan.work.new)
    alone = replace(plan.work, answers=1, new=lengths)
    flops = update_flops(replace(plan, work=alone)).sum((1, 2)).mean()
    return flops / gpus / machine.rate.flops


def spread_table(machine):
    """The same with other spreads of the lengths -> lines. The 1.5B student on 64 GPUs."""
    rows = []
    for factor in (0, 0.5, 1, 1.5):
        plan = plan_of(STUDENTS['1.5B'], 64)
        step = simulate(plan, 64, machine, spread=factor)
        by_prompt = simulate(plan, 64, machine, 'prompt', factor)
        lengths = draw_lengths(64, plan.cfg['n'], plan.work.new, factor)
        cut_share = (lengths == plan.work.new).mean()
        rows.append([f'{factor:g}', f'{lengths.mean():.0f}', f'{cut_share:.0%}', f'{step.longest:.1f}',
                     f'{step.sampling:.1f}', f'{by_prompt.idle:.0%}', f'{step.idle:.0%}', f'{step.total:.1f}'])
    return table(['factor on both spreads', 'mean length', 'cut', 'longest answer alone, s', 'sampling, s',
                  'a GPU waits: by prompt', 'by answer', 'step, s'], rows)


def same_work(machine):
    """The same work on more and more GPUs -> lines, and from where on more of them help little."""
    works = [('1.5B', 8), ('1.5B', 512), ('8B', 512), ('32B', 512)]
    counts = [2**power for power in range(11)]
    columns = []
    for name, prompts in works:
        seconds = {}
        for gpus in counts:
            plan = plan_of(STUDENTS[name], gpus, prompts_per_step=prompts)
            if prompts * plan.cfg['n'] >= gpus:
                seconds[gpus] = simulate(plan, gpus, machine).total
        columns.append(seconds)

    rows = [[gpus, *[number(seconds[gpus]) if gpus in seconds else '' for seconds in columns]] for gpus in counts]
    rows.append(['twice as many save less than a quarter from', *[last_useful(seconds) for seconds in columns]])
    return table(['GPUs', *[f'{name}, {2 * prompts:,} answers' for name, prompts in works]], rows)


def last_useful(seconds):
    """{GPUs: seconds of a step} -> the least number of GPUs of which twice as many save less than a quarter."""
    for gpus in seconds:
        if 2 * gpus in seconds and seconds[2 * gpus] > 0.75 * seconds[gpus]:
            return gpus
    return 'never'


def shards_table():
    """What the 32B student needs while it samples, GiB, by the number of ranks that share its weights -> lines."""
    rows = []
    for shard_ranks in (8, 64, 512):
        plan = plan_of(STUDENTS['32B'], 512, shard_ranks, teacher_shard=True)
        parts = phases(plan)['sample']
        known = ('student weights, float32', 'AdamW, float32', 'teacher weights',
                 'student weights, gathered for sampling', 'KV cache')
        cells = [parts[name] / GiB for name in known]
        rest = sum(parts.values()) / GiB - sum(cells)
        rows.append([shard_ranks, *[f'{cell:.1f}' for cell in (*cells, rest)], f'{sum(cells) + rest:.0f}',
                     *[fits(STUDENTS['32B'], 512, size, shard_ranks) for size in MEMORY]])
    return table(['shard_ranks', 'float32 weights', 'AdamW', 'teacher, in shards', 'gathered', 'KV cache', 'decode',
                  'sum', *[f'fits {size}?' for size in MEMORY]], rows)


def tables():
    """All tables -> lines."""
    machine = gpu_machine()
    plan = plan_of(STUDENTS['1.5B'], 1)
    return [*assumptions(plan.cfg, machine),
            'Memory of a GPU, GiB by phase, teacher whole / in shards:', '', *memory_table(),
            'Time of a step:', '', *step_table(machine),
            'The same work on more GPUs, seconds of a step:', '', *same_work(machine),
            'Waiting, 1.5B:', '', *waiting_table(machine),
            'Other spreads of the lengths, 1.5B on 64 GPUs:', '', *spread_table(machine),
            'A 32B student on 512 GPUs while it samples, GiB:', '', *shards_table()]


# ---- the same calculation beside a measured run ---------------------------------------------------------

# A made model of 19M weights. Its vocabulary is so small that answers end by chance, about every hundredth token:
# a long tail.
CHECKED = ModelConfig('llama', V=100, L=6, d=512, H=8, G=8, e=64, ff=1408, context=1024)
CHECK_RANKS = (1, 2)
UPDATE = ('time/teacher', 'time/student', 'time/update')     # names in log.jsonl
COLUMNS = ['ranks', 'what', 'calculated', 'measured', 'ratio']
MB = 1e6
CHECK_STEPS = 5                 # the first one makes what is made once, the last one is diagnosed: not compared
CHECK_KEYS = dict(
    prompts_per_step=4, n=2, max_new_tokens=250, positions='all', steps=CHECK_STEPS, lr=0.0,
    save_every=CHECK_STEPS, diagnose_every=0, dtype='float32', device='cpu', token_budget=600, eval_data='')


# Starts the script that follows it, with a clock that counts the processor time of its process. On a machine that
# does other work too, the time on the wall would measure the others.
PROCESSOR_TIME = ("import runpy, sys, time; time.perf_counter = time.process_time; del sys.argv[0]; "
                  "runpy.run_path(sys.argv[0], run_name='__main__')")


def measure_rates():
    """The rates of one rank while all ranks measure theirs, in processor time, one line of JSON from rank 0.

    `python -m studies.scale check` starts this as its ranks, because ranks on one CPU share its memory.
    """
    time.perf_counter = time.process_time
    env = start('cpu', 'float32')
    barrier()
    rate = rates(env, is_here=True)
    received = float('inf')
    if env.world > 1:
        own = torch.ones(2**22)                                              # 16 MB, about a block's weights
        whole = torch.empty(env.world * len(own))
        seconds = least_seconds(lambda: dist.all_gather_into_tensor(whole, own), env.device)
        received = (env.world - 1) * own.nbytes / seconds
    print0(json.dumps({'flops': rate.flops, 'bytes': rate.bytes, 'received': received}))


def cpu_machine(ranks, environment_of_run):
    """Measure the rates of so many CPU ranks at once -> Machine."""
    command = ['-m', 'studies.scale', 'rates']
    running = peaks.start_ranks(command, ranks, environment_of_run, stdout=subprocess.PIPE)
    outputs = [process.communicate()[0] for process in running]
    measured = json.loads(outputs[0].splitlines()[-1])
    rate = Rates(measured['flops'], measured['bytes'], f'measured on {ranks} rank(s) at once')
    return Machine(rate, measured['received'], measured['received'], ranks, poll=1, compact_at=0.75)


def check(ranks):
    """Run CHECK_KEYS on so many CPU ranks -> rows of a table: calculated beside measured."""
    environment_of_run = dict(os.environ) | peaks.FIXED | {'OMP_NUM_THREADS': '1'}
    machine = cpu_machine(ranks, environment_of_run)
    imports = peaks.after_imports(environment_of_run)
    with tempfile.TemporaryDirectory() as folder:
        keys = CHECK_KEYS | peaks.make_models(Path(folder), CHECKED) | {'eval_data': ''}
        arguments = [f'{key}={value}' for key, value in keys.items()]
        command = ['-c', PROCESSOR_TIME, 'distill.py', *arguments]
        most = peaks.measured(command, ranks, keys['out_dir'], environment_of_run)
        log = read_rows(keys['out_dir'] / 'log.jsonl')[2:-1]
        plan, lengths = what_was_done(load_config(arguments), ranks)

    # Memory: what is beyond a process's imports, of the rank that needs most.
    need = {phase: sum(parts.values()) for phase, parts in phases(plan).items()}
    parts = {'start': need['load'], 'step': max(need['sample'], need['update']), 'save': need['save']}
    rows = [[ranks, f'memory, {part}, MB', *beside(size / MB, (most[part] - imports) / MB)]
            for part, size in parts.items()]

    # Time: the log has the processor time of rank 0, so no time in which it waits for other ranks.
    dealt = deal(lengths[1:-1], ranks, 'answer')
    sampling = sampling_seconds(plan, dealt, machine)[:, 0]                              # (S,)
    update, count = update_seconds(plan, dealt[:, :1], machine)                          # (S,)
    update += optimizer_seconds(plan, ranks, machine)
    update += network_seconds(plan, ranks, ranks, count, machine)
    sampled = np.array([row['time/sample'] for row in log])
    updated = np.array([sum(row[name] for name in UPDATE if row.get(name)) for row in log])
    for what, calculated, measured in (('sampling', sampling, sampled), ('update', update, updated),
                                       ('step', sampling + update, sampled + updated)):
        rows.append([ranks, f'{what}, s', *beside(calculated.mean(), measured.mean())])
    return [f'{ranks} rank(s): {machine.rate.flops / 1e9:.0f} GFLOP/s, {machine.rate.bytes / 1e9:.1f} GB/s, '
            f'{machine.inside / 1e9:.2f} GB/s from other ranks; mean length {lengths[1:-1].mean():.1f}, in the run '
            f'{np.mean([row["len/mean"] for row in log]):.1f}', '', *table(COLUMNS, rows)]


def beside(calculated, measured):
    """Two numbers and their ratio, as cells."""
    return f'{calculated:.3g}', f'{measured:.3g}', f'{calculated / measured:.2f}'


def what_was_done(cfg, ranks):
    """The Plan of a run of distill.py that has taken place, and the lengths of its answers (S, prompts, n).

    lr is 0, so every step samples from the same student, and the random numbers of an answer are a function of
    (seed, step, slot, sample): the answers are written once more here.
    """
    tok = load_tokenizer(cfg['student'])
    problems = load_problems(cfg['data'], tok)
    model = load_model(cfg['student'])
    steps = []
    for step in range(1, cfg['steps'] + 1):
        order = prompt_order(len(problems), cfg['prompts_per_step'], step, cfg['seed'])
        prompts = [problems[number].ids for number in order]
        roll = sample(model, prompts, cfg['n'], max_new_tokens=cfg['max_new_tokens'], step=step, seed=cfg['seed'],
                      stop=tok.stop_ids, vocab=shared_size(tok, tok))
        steps.append(roll.resp_len.reshape(len(prompts), cfg['n']).numpy())
    work = work_of(cfg, ranks, problems, [], shared_size(tok, tok))
    layer_map = {l: l for l in range(1, model.config.L + 1)}
    env = environment(ranks, ranks, 'cpu', torch.float32)
    return Plan(cfg, model.config, model.config, layer_map, work, env), np.stack(steps)


# ---- the script ---------------------------------------------------------------------------------------

def main(args):
    if args.what == 'tables':
        print('\n'.join(tables()))
    if args.what == 'rates':
        measure_rates()
    if args.what == 'check':
        for ranks in CHECK_RANKS:
            print('\n'.join(check(ranks)), flush=True)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', default='tables', choices=('tables', 'check', 'rates'),
                        help="'rates' is what `check` starts as its ranks")
    return parser.parse_args()


if __name__ == '__main__':
    run(main, arguments)
