"""
Memory and time of a training step on 1 to 512 GPUs, by calculation: nothing is loaded, no GPU is needed.

    python -m studies.scale              the tables of docs/scale.md, in seconds, on any machine
    python -m studies.scale check        the same calculation beside a measured run on 1 and on 2 CPU ranks

A step is a sum of four times:

    sampling      all answers of a rank are written at once; the step waits for the rank that is last
    update        the teacher's forward, the student's forward and backward
    optimizer     AdamW reads and writes the shards of a rank
    network       weights are gathered, gradients are summed over the ranks

Sampling is a loop over decode steps. Each reads all weights once, and the keys and values of the answers that
are not finished yet, so its time follows from how many answers are alive then. Their lengths are drawn from
a distribution with a long tail. Bytes and operations are counted as in a dry run (support/memory.py and
support/plan.py).

Simpler than usual: a time is a count divided by a rate, nothing overlaps, and all prompts have one length.
Reading the prompts, grading, evaluations and checkpoints take no time. To ask another question, change the
constants below: all that is assumed stands there, and is printed beside the tables.

Letters: S seeds (drawn steps), W ranks (one GPU each), m answers of a rank, M micro-batches of a rank.
"""
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
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
from support.command_help import OneLineParser
from support.jsonl import read_rows
from support.memory import GiB, Plan, phases, weights_of, work_of
from support.plan import Rates, decode_counts, least_seconds, rates, update_flops
from support.runtime import Env, barrier, print0, run, start

# ---- assumptions: change them here ---------------------------------------------------------------

GPUS = (1, 8, 64, 512)
CONFIG = 'configs/r1_1p5b.py'   # the work; prompts_per_step is raised to the number of GPUs

# Published shapes: the paper's 1.5B pair (Qwen2.5-1.5B with a head of its own), Qwen3-8B and Qwen3-32B. The
# teacher has the student's shape.
STUDENTS = {
    '1.5B': PRESETS['r1_1p5b'],
    #                   family       V   L     d   H  G    e      ff   tied theta   eps  context
    '8B':  ModelConfig('qwen3', 151_936, 36, 4096, 32, 8, 128, 12_288, False, 1e6, 1e-6, 40_960),
    '32B': ModelConfig('qwen3', 151_936, 64, 5120, 64, 8, 128, 25_600, False, 1e6, 1e-6, 40_960),
}

# Lengths. An answer has MEDIAN * exp(PROMPT_SPREAD * x + ANSWER_SPREAD * y) tokens, cut at max_new_tokens:
# x is a standard normal number of the prompt, y one of the answer. So hard prompts have long answers.
PROMPT = 300                    # tokens of a prompt
MEDIAN = 5000
PROMPT_SPREAD = 0.6
ANSWER_SPREAD = 0.5
SEEDS = 20                      # steps that are drawn; times are means over them
EVALUATED = 143                 # problems of an evaluation: AIME24 and AIME25 have 30 each, AIMO 83

# A GPU: an H100 SXM. Its products and its memory reach the share of its data sheet that a dry run assumes.
MEMORY = {'80 GB': 79, '141 GB': 140}        # GiB that torch sees on an H100 and on an H200
SPARE = 8                       # GiB of it for the CUDA context, NCCL's buffers and the allocator's gaps
MACHINE = 8                     # GPUs of a machine
INSIDE = 300e9                  # bytes a second that a GPU gets from the others of its machine, by NVLink
ACROSS = 40e9                   # and from other machines: 400 Gbit/s for each GPU, 80% of them

# How the sampler works (rollout.stream): decode steps between two looks at which answers are finished, and
# the share of the batch that is alive when the finished rows leave it.
ON_GPU = (32, 0.5)
ON_CPU = (1, 0.75)


@dataclass(frozen=True)
class Machine:
    """The rates of a kind of machine, and how the sampler works there."""
    rate: Rates                 # of products, and of memory
    inside: float               # bytes a second that a rank gets from the others of its machine
    across: float               # and from other machines
    size: int                   # ranks of a machine
    poll: int
    compact_at: float


def gpu_machine():
    """The GPUs that are assumed -> Machine."""
    env = Env(0, 1, 0, torch.device('cuda'), torch.bfloat16, 1)
    return Machine(rates(env, is_here=False), INSIDE, ACROSS, MACHINE, *ON_GPU)


@cache
def config():
    """The keys of CONFIG."""
    return load_config([CONFIG])


@dataclass(frozen=True)
class PromptIds:
    """A problem, of which only the number of its ids counts."""
    ids: range
    teacher_ids: None = None


def plan_of(student, gpus, shard_ranks=0, **keys):
    """A run of CONFIG on so many GPUs -> support.memory.Plan. keys: of the config, where they differ."""
    cfg = config() | {'prompts_per_step': max(config()['prompts_per_step'], gpus)} | keys
    problems = [PromptIds(range(PROMPT))]
    work = work_of(cfg, gpus, problems, problems * EVALUATED, student.V)
    layer_map = {l: l for l in range(1, student.L + 1)}
    env = Env(0, gpus, 0, torch.device('cuda'), torch.bfloat16, shard_ranks or min(gpus, MACHINE))
    return Plan(cfg, student, student, layer_map, work, env)


# ---- lengths of answers, and which rank gets which -----------------------------------------------

def draw_lengths(prompts, n, longest, spread=1.0):
    """Lengths of n answers to each prompt, whole numbers (S, prompts, n). spread: a factor on both."""
    rng = np.random.default_rng(0)
    difficulty = PROMPT_SPREAD * rng.standard_normal((SEEDS, prompts, 1))
    luck = ANSWER_SPREAD * rng.standard_normal((SEEDS, prompts, n))
    tokens = MEDIAN * np.exp(spread * (difficulty + luck))
    return np.clip(np.ceil(tokens), 1, longest).astype(int)


def deal(lengths, ranks, how):
    """Lengths (S, prompts, n) -> (S, W, m): what each rank gets; 0 where it has fewer answers than another.

    how: 'answer' is what distill.py does: answer number i goes to rank i % W. 'prompt': all answers to prompt
    number j go to rank j % W. 'length', if answers could move before the update: the longest first, to ranks
    0, 1, ... W - 1, then back from W - 1 to 0, and so on, so that long ones meet short ones.
    """
    assert how in ('answer', 'prompt', 'length'), how
    seeds, _, n = lengths.shape
    parts = lengths                                                          # (S, parts, answers of one)
    if how != 'prompt':
        parts = lengths.reshape(seeds, -1, 1)
    if how == 'length':
        parts = -np.sort(-parts, axis=1)

    # Parts are dealt in turns, and in each turn every rank gets one.
    missing = -parts.shape[1] % ranks
    parts = np.pad(parts, ((0, 0), (0, missing), (0, 0)))
    turns = parts.reshape(seeds, -1, ranks, parts.shape[2])                  # (S, turns, W, answers of one)
    if how == 'length':
        turns[:, 1::2] = turns[:, 1::2, ::-1].copy()
    return turns.transpose(0, 2, 1, 3).reshape(seeds, ranks, -1)


# ---- the four times of a step --------------------------------------------------------------------

def sampling_seconds(plan, dealt, machine):
    """Seconds in which each rank writes its answers: lengths (..., m) -> (...).

    A sum over the decode steps, from one look at the finished answers to the next. In between, a finished
    answer is decoded like the others. Its row leaves the batch when few enough answers are alive.
    """
    seconds = np.zeros(dealt.shape[:-1])
    rows = (dealt > 0).sum(-1)
    longest = int(dealt.max())
    for first in range(0, longest, machine.poll):
        steps = min(machine.poll, longest - first)
        alive = (dealt > first).sum(-1)
        rows = np.where(alive <= machine.compact_at * rows, alive, rows)

        # Every row of the batch is computed. Keys and values are read for the answers that are alive.
        held = plan.work.prompt + first + steps / 2                          # tokens, halfway through these
        flops, _ = decode_counts(plan.student, plan.s, rows, held, 0)
        _, read = decode_counts(plan.student, plan.s, alive, held, 0)
        step = np.maximum(flops / machine.rate.flops, read / machine.rate.bytes)
        seconds += steps * step * (alive > 0)
    return seconds


def update_seconds(plan, dealt, machine):
    """Lengths (S, W, m) -> seconds of the update (S,), and its number of micro-batches (S,).

    All ranks take equally many micro-batches, because FSDP gathers weights in each, and each lasts as long as
    that of the slowest rank.
    """
    seconds = []
    counts = []
    for lengths in dealt:
        tokens = lengths + plan.work.prompt * (lengths > 0)                  # (W, m)
        answers, padded = cut(tokens, plan.cfg['token_budget'])              # (W, M)
        work = replace(plan.work, answers=answers, new=padded - plan.work.prompt)
        by_rank = update_flops(replace(plan, work=work)) / machine.rate.flops            # (W, M)
        seconds.append(by_rank.max(0).sum())
        counts.append(by_rank.shape[1])
    return np.array(seconds), np.array(counts)


def cut(tokens, budget):
    """Tokens of each rank's answers (W, m) -> how many answers each of its micro-batches has, and to how many
    tokens they are padded, (W, M) both, as step.cut_rollout makes them."""
    by_rank = []
    for row in tokens:
        lengths = [int(length) for length in row if length]
        groups = [(len(group), lengths[group[0]]) for group in micro_batches(lengths, budget)]
        by_rank.append(groups)

    # A rank that has run out of answers repeats its first one, with weight 0.
    count = max(len(groups) for groups in by_rank)
    for groups, row in zip(by_rank, tokens, strict=True):
        groups += [(1, int(row[0]))] * (count - len(groups))
    pairs = np.array(by_rank)                                                # (W, M, 2)
    return pairs[..., 0], pairs[..., 1]


def even_update_seconds(plan, machine):
    """Seconds of an update in which all ranks compute equally much, without padding: none can be shorter."""
    lengths = draw_lengths(plan.cfg['prompts_per_step'], plan.cfg['n'], plan.work.new)
    work = replace(plan.work, answers=1, new=lengths)
    flops = update_flops(replace(plan, work=work))                           # (S, prompts, n)
    return flops.sum((1, 2)).mean() / plan.W / machine.rate.flops


def optimizer_seconds(plan, machine):
    """AdamW reads gradient, weight and two moments, and writes the last three: 28 bytes of each weight."""
    return 28 * plan.learned / plan.S / machine.rate.bytes


def network_seconds(plan, count, machine):
    """Seconds in which weights are gathered and gradients summed, in a step of `count` micro-batches.

    Ranks that share one copy of the weights: each gets what it lacks. Once for sampling, and for each
    micro-batch the blocks twice (forward and backward), the embedding once, and the float32 gradients of its
    shard from the others. Then each shard is summed with those of the other copies, in a ring.
    """
    weights = weights_of(plan.student)
    micro_batch = plan.s * (2 * weights.blocks + weights.embed) + 4 * plan.learned
    if plan.teacher_sharded:
        teacher = weights_of(plan.teacher)
        micro_batch += plan.s * (teacher.blocks + teacher.embed)
    lacking = (plan.S - 1) / plan.S
    shared = lacking * (plan.s * weights.total + count * micro_batch)

    copies = plan.W // plan.S
    summed = count * 2 * (copies - 1) / copies * 4 * plan.learned / plan.S
    within = machine.inside if plan.S <= machine.size else machine.across
    return shared / within + summed / machine.across


# ---- a step --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Step:
    """Seconds of a step, means over the seeds."""
    answers: int                # of all ranks
    sampling: float             # until the last rank has finished
    longest: float              # what the longest answer takes alone on a GPU
    waiting: float              # share of the sampling time in which a GPU waits for others, on average
    update: float               # the optimizer's time included
    network: float

    @property
    def total(self):
        return self.sampling + self.update + self.network

    @property
    def limit(self):
        """What takes most of the step. No number of GPUs makes the longest answer shorter."""
        parts = {'longest answer': self.longest, 'decode bandwidth': self.sampling - self.longest,
                 'update': self.update, 'network': self.network}
        return max(parts, key=parts.get)


def simulate(plan, machine, how='answer', spread=1.0):
    """A plan -> Step. how: answers are dealt (see `deal`). spread: of their lengths (see `draw_lengths`)."""
    lengths = draw_lengths(plan.cfg['prompts_per_step'], plan.cfg['n'], plan.work.new, spread)
    dealt = deal(lengths, plan.W, how)                                                   # (S, W, m)
    sampling = sampling_seconds(plan, dealt, machine)                                    # (S, W)
    longest = sampling_seconds(plan, lengths.max((1, 2))[:, None], machine)              # (S,)
    update, count = update_seconds(plan, dealt, machine)                                 # (S,)
    last = sampling.max(1)                                                               # (S,)
    return Step(
        answers=lengths[0].size, sampling=last.mean(), longest=longest.mean(),
        waiting=(1 - sampling.mean(1) / last).mean(),
        update=update.mean() + optimizer_seconds(plan, machine),
        network=network_seconds(plan, count.mean(), machine))


# ---- tables, in markdown -------------------------------------------------------------------------

def table(title, head, rows):
    """-> lines, an empty one at the end."""
    lines = [head, ['---'] * len(head), *rows]
    return [title, '', *['| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines], '']


def short(seconds):
    """Seconds with two or three digits."""
    return f'{seconds:.2g}' if seconds < 10 else f'{seconds:,.0f}'


def assumptions(machine):
    """What the tables assume -> lines."""
    cfg = config()
    limit = f'{cfg["max_new_tokens"]:,}'
    rate = machine.rate
    return [
        f'- The work is that of `{CONFIG}`: {cfg["prompts_per_step"]} prompts a '
        f'step (as many as GPUs, where there are more GPUs) of {PROMPT} tokens, '
        f'{cfg["n"]} answers to each, of up to {limit} tokens.',
        f'- An answer has {MEDIAN:,} exp({PROMPT_SPREAD} x + {ANSWER_SPREAD} y) tokens, cut at {limit}. x is '
        'a standard normal number of its prompt, y one of its own. Times are means over '
        f'{SEEDS} drawn steps.',
        f'- A GPU works {rate.words}: {rate.flops / 1e12:.0f} TFLOP/s in bfloat16 and '
        f'{rate.bytes / 1e12:.2f} TB/s. A machine has {MACHINE} GPUs. A GPU gets {INSIDE / 1e9:.0f} GB/s '
        f'from the others of its machine and {ACROSS / 1e9:.0f} GB/s from other machines. Nothing overlaps.',
        f'- Each machine has one copy of the weights, in shards. Of a GPU {SPARE} GiB stay free '
        'for the CUDA context, buffers of NCCL and gaps of the allocator.',
        '']


def gib(estimate, phase):
    """GiB of a phase."""
    return sum(estimate[phase].values()) / GiB


def fits(student, gpus, size, shard_ranks=0):
    """Does a run fit GPUs of this size, with which teacher, with how many rows of an evaluation? -> words."""
    for teacher, flag in (('whole', False), ('in shards', True)):
        for rows in (64, 32, 16, 8, 4, 2, 1):
            plan = plan_of(student, gpus, shard_ranks, teacher_shard=flag, eval_rows=rows)
            estimate = phases(plan)
            needs = {phase: gib(estimate, phase) for phase in estimate}
            if max(needs.values()) <= MEMORY[size] - SPARE:
                return f'teacher {teacher}, eval_rows={rows}'
    phase = max(needs, key=needs.get)
    return f'no: {phase} needs {needs[phase]:.0f} of {MEMORY[size] - SPARE}'


def memory_table():
    """GiB of each phase, with the teacher whole and in shards, and whether it fits -> lines."""
    rows = []
    for gpus in GPUS:
        for name, student in STUDENTS.items():
            whole = phases(plan_of(student, gpus))
            shards = phases(plan_of(student, gpus, teacher_shard=True))
            cells = []
            for phase in ('load', 'sample', 'evaluate', 'update'):
                cells.append(f'{gib(whole, phase):.0f} / {gib(shards, phase):.0f}')
            rows.append([gpus, name, *cells, *[fits(student, gpus, size) for size in MEMORY]])
    head = ['GPUs', 'student', 'load', 'sample', 'evaluate, 64 rows', 'update',
            *[f'{size} GPU' for size in MEMORY]]
    return table('Memory of a GPU, GiB, teacher whole / in shards, and what fits:', head, rows)


def parts_table():
    """What a 32B student needs while it samples, by the number of ranks that share its weights -> lines."""
    names = {'student weights, float32': 'float32 weights', 'AdamW, float32': 'AdamW',
             'teacher weights': 'teacher', 'student weights, gathered for sampling': 'gathered',
             'KV cache': 'KV cache'}
    rows = []
    for shard_ranks in (8, 64, 512):
        student = STUDENTS['32B']
        parts = phases(plan_of(student, 512, shard_ranks, teacher_shard=True))['sample']
        cells = [f'{parts[name] / GiB:.1f}' for name in names]
        verdicts = [fits(student, 512, size, shard_ranks) for size in MEMORY]
        rows.append([shard_ranks, *cells, f'{sum(parts.values()) / GiB:.0f}', *verdicts])
    head = ['shard_ranks', *names.values(), 'sum', *[f'{size} GPU' for size in MEMORY]]
    return table('32B on 512 GPUs while it samples, GiB, teacher in shards:', head, rows)


def step_table(machine):
    """Seconds of a step and what limits it -> lines."""
    rows = []
    for gpus in GPUS:
        for name, student in STUDENTS.items():
            plan = plan_of(student, gpus)
            step = simulate(plan, machine)
            in_shards = simulate(plan_of(student, gpus, teacher_shard=True), machine)
            network = f'{short(step.network)} / {short(in_shards.network)}'
            limit = step.limit
            if fits(student, gpus, '80 GB').startswith('no'):
                limit = f'80 GB of memory; then {limit}'
            per_hour = 3600 * step.answers / step.total / gpus
            rows.append([gpus, name, step.answers, short(step.sampling), short(step.longest),
                         f'{step.waiting:.0%}', short(step.update), network, short(step.total),
                         short(per_hour), limit])
    head = ['GPUs', 'student', 'answers', 'sampling, s', 'the longest answer alone, s', 'a GPU waits',
            'update, s', 'network, s: teacher whole / in shards', 'step, s', 'answers per GPU hour', 'limit']
    return table('Time of a step:', head, rows)


def same_work_table(machine):
    """The same work on more and more GPUs, and from which number on more of them help little -> lines."""
    works = (('1.5B', 8), ('1.5B', 512), ('8B', 512), ('32B', 512))
    counts = [2**power for power in range(11)]
    columns = []
    for name, prompts in works:
        seconds = {}
        for gpus in counts:
            plan = plan_of(STUDENTS[name], gpus, prompts_per_step=prompts)
            if prompts * plan.cfg['n'] >= gpus:
                seconds[gpus] = simulate(plan, machine).total
        columns.append(seconds)

    rows = []
    for gpus in counts:
        cells = [short(seconds[gpus]) if gpus in seconds else '-' for seconds in columns]
        rows.append([gpus, *cells])
    rows.append(['twice as many save less than a quarter from', *[enough(seconds) for seconds in columns]])
    head = ['GPUs', *[f'{name}, {prompts * config()["n"]:,} answers' for name, prompts in works]]
    return table('The same work on more GPUs, seconds of a step, whether or not it fits:', head, rows)


def enough(seconds):
    """{GPUs: seconds of a step} -> the least number of which twice as many save less than a quarter."""
    for gpus in seconds:
        if 2 * gpus in seconds and seconds[2 * gpus] > 0.75 * seconds[gpus]:
            return gpus
    return 'none here'


def waiting_table(machine):
    """How much the way in which answers are dealt changes, for the 1.5B student -> lines.

    The last two columns are no options of distill.py. Moved: answers go to other ranks before the update,
    long ones to short ones. Even: all ranks compute equally much, and nothing is padded.
    """
    rows = []
    for gpus in GPUS[1:]:
        plan = plan_of(STUDENTS['1.5B'], gpus)
        prompt, answer, moved = [simulate(plan, machine, how) for how in ('prompt', 'answer', 'length')]
        rows.append([gpus, f'{prompt.sampling:.1f}', f'{answer.sampling:.1f}', f'{prompt.waiting:.0%}',
                     f'{answer.waiting:.0%}', f'{prompt.update:.2f}', f'{answer.update:.2f}',
                     f'{moved.update:.2f}', f'{even_update_seconds(plan, machine):.2f}'])
    head = ['GPUs', 'sampling, s: dealt by prompt', 'by answer', 'a GPU waits: by prompt', 'by answer',
            'update, s: by prompt', 'by answer', 'moved', 'even']
    return table('Waiting for the slowest, 1.5B:', head, rows)


def spread_table(machine):
    """Other spreads of the lengths, for the 1.5B student on 64 GPUs -> lines."""
    rows = []
    for spread in (0, 0.5, 1, 1.5):
        plan = plan_of(STUDENTS['1.5B'], 64)
        lengths = draw_lengths(plan.cfg['prompts_per_step'], plan.cfg['n'], plan.work.new, spread)
        step = simulate(plan, machine, spread=spread)
        rows.append([f'{spread:g}', f'{lengths.mean():,.0f}', f'{(lengths == plan.work.new).mean():.0%}',
                     short(step.longest), short(step.sampling), f'{step.waiting:.0%}', short(step.total)])
    head = ['factor on both spreads', 'mean length', 'cut', 'the longest answer alone, s', 'sampling, s',
            'a GPU waits', 'step, s']
    return table('Other spreads of the lengths, 1.5B on 64 GPUs:', head, rows)


def tables():
    """All tables, and what they assume -> lines."""
    machine = gpu_machine()
    return [*assumptions(machine), *memory_table(), *parts_table(), *step_table(machine),
            *same_work_table(machine), *waiting_table(machine), *spread_table(machine)]


# ---- the same calculation beside a measured run --------------------------------------------------

# A made model of 19M weights. Its vocabulary is so small that answers end by chance, which gives a long tail
# of lengths. The first step makes what is made once, and the last one is diagnosed: they are not compared.
CHECKED = ModelConfig('llama', V=60, L=6, d=512, H=8, G=8, e=64, ff=1408, context=1024)
STEPS = 4
KEYS = dict(prompts_per_step=3, n=2, max_new_tokens=150, positions='all', steps=STEPS, lr=0.0,
            save_every=STEPS, diagnose_every=0, dtype='float32', device='cpu', token_budget=400, eval_data='')
UPDATE = ('time/teacher', 'time/student', 'time/update')     # names of log.jsonl

# Starts the script that follows it with a clock that counts the processor time of its process. On a machine
# that does other work too, the wall clock would measure the other work.
PROCESSOR_TIME = ("import runpy, sys, time; time.perf_counter = time.process_time; del sys.argv[0]; "
                  "runpy.run_path(sys.argv[0], run_name='__main__')")


def measure_rates():
    """Rates of a rank while all ranks measure theirs, in processor time: one line of JSON from rank 0.

    `check` starts this as its ranks, because the ranks of one machine share its memory.
    """
    time.perf_counter = time.process_time
    env = start('cpu', 'float32')
    barrier('starting')
    rate = rates(env, is_here=True)

    # What a rank gets from the others when 16 MB are gathered, about the weights of a block.
    received = float('inf')
    if env.world > 1:
        own = torch.ones(2**22)
        whole = torch.empty(env.world * len(own))
        seconds = least_seconds(lambda: dist.all_gather_into_tensor(whole, own), env.device)
        received = (env.world - 1) * own.nbytes / seconds
    print0(json.dumps({'flops': rate.flops, 'bytes': rate.bytes, 'received': received}))


def cpu_machine(ranks, environment):
    """Measure the rates of so many CPU ranks at once -> Machine."""
    command = ['-m', 'studies.scale', 'rates']
    running = peaks.start_ranks(command, ranks, environment, stdout=subprocess.PIPE)
    outputs = [process.communicate()[0] for process in running]
    measured = json.loads(outputs[0].splitlines()[-1])
    rate = Rates(measured['flops'], measured['bytes'], 'measured')
    return Machine(rate, measured['received'], measured['received'], ranks, *ON_CPU)


def check(ranks):
    """Run KEYS on so many CPU ranks -> lines: what is calculated beside what is measured."""
    environment = dict(os.environ) | peaks.FIXED | {'OMP_NUM_THREADS': '1'}
    machine = cpu_machine(ranks, environment)
    imports = peaks.after_imports(environment)
    with tempfile.TemporaryDirectory() as folder:
        keys = KEYS | peaks.make_models(Path(folder), CHECKED) | {'eval_data': ''}
        arguments = [f'{key}={value}' for key, value in keys.items()]
        command = ['-c', PROCESSOR_TIME, 'distill.py', *arguments]
        most = peaks.measured(command, ranks, keys['out_dir'], environment)
        log = read_rows(keys['out_dir'] / 'log.jsonl')[2:-1]
        plan, lengths = what_was_done(load_config(arguments), ranks)
    lengths = lengths[1:-1]                                                  # (S, prompts, n)

    # Memory beyond a process's imports, of the rank that needs most.
    need = {phase: sum(parts.values()) for phase, parts in phases(plan).items()}
    calculated = {'start': need['load'], 'step': max(need['sample'], need['update']), 'save': need['save']}
    rows = []
    for part, size in calculated.items():
        rows.append([ranks, f'memory, {part}, MB', *beside(size / 1e6, (most[part] - imports) / 1e6)])

    # The log has the processor time of rank 0, so not the time in which it waits for other ranks.
    dealt = deal(lengths, ranks, 'answer')[:, :1]                            # (S, 1, m)
    sampling = sampling_seconds(plan, dealt, machine).mean()
    update, count = update_seconds(plan, dealt, machine)
    update = update.mean() + optimizer_seconds(plan, machine) + network_seconds(plan, count.mean(), machine)
    sampled = np.mean([row['time/sample'] for row in log])
    updated = np.mean([sum(row[name] for name in UPDATE) for row in log])
    rows.append([ranks, 'sampling, s', *beside(sampling, sampled)])
    rows.append([ranks, 'update, s', *beside(update, updated)])
    rows.append([ranks, 'step, s', *beside(sampling + update, sampled + updated)])

    run_length = np.mean([row['len/mean'] for row in log])
    rate = machine.rate
    title = (f'{ranks} rank(s): {rate.flops / 1e9:.0f} GFLOP/s, {rate.bytes / 1e9:.1f} GB/s, '
             f'{machine.inside / 1e9:.2f} GB/s from other ranks; {lengths.mean():.1f} tokens an answer, in '
             f'the run {run_length:.1f}')
    return table(title, ['ranks', 'what', 'calculated', 'measured', 'ratio'], rows)


def beside(calculated, measured):
    """Two numbers and their ratio, as cells."""
    return f'{calculated:.3g}', f'{measured:.3g}', f'{calculated / measured:.2f}'


def what_was_done(cfg, ranks):
    """The Plan of a run of distill.py that has taken place, and the lengths of its answers (S, prompts, n).

    With lr=0 every step samples from the same student, and the random numbers of an answer are a function of
    (seed, step, slot, sample), so the answers can be written once more here.
    """
    tok = load_tokenizer(cfg['student'])
    problems = load_problems(cfg['data'], tok)
    model = load_model(cfg['student'])
    vocab = shared_size(tok, tok)
    steps = []
    for step in range(1, cfg['steps'] + 1):
        order = prompt_order(len(problems), cfg['prompts_per_step'], step, cfg['seed'])
        prompts = [problems[number].ids for number in order]
        roll = sample(model, prompts, cfg['n'], max_new_tokens=cfg['max_new_tokens'], step=step,
                      seed=cfg['seed'], stop=tok.stop_ids, vocab=vocab)
        steps.append(roll.resp_len.reshape(len(prompts), cfg['n']).numpy())
    work = work_of(cfg, ranks, problems, [], vocab)
    layer_map = {l: l for l in range(1, model.config.L + 1)}
    env = Env(0, ranks, 0, torch.device('cpu'), torch.float32, ranks)
    return Plan(cfg, model.config, model.config, layer_map, work, env), np.stack(steps)


# ---- the script ----------------------------------------------------------------------------------

def main(args):
    if args.what == 'tables':
        print('\n'.join(tables()))
    if args.what == 'check':
        for ranks in (1, 2):
            print('\n'.join(check(ranks)), flush=True)
    if args.what == 'rates':
        measure_rates()


def arguments():
    """The command line."""
    parser = OneLineParser('studies/scale.py', '[tables | check]')
    parser.add_argument('what', nargs='?', default='tables', choices=('tables', 'check', 'rates'),
                        help="'rates' is what `check` starts as its ranks")
    return parser.parse_args()


if __name__ == '__main__':
    run(main, arguments)
