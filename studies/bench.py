"""
Speed and memory, ours beside its peers, on random weights at true shapes. Downloads nothing.

    python -m studies.bench decode                a token for every row, by rows and context
    python -m studies.bench loss                  Eq. (6) alone: fused, and two ways under autograd
    python -m studies.bench head                  losses under the LM head
    python -m studies.bench update                one update at equal lengths: OPRD, OPD, both
    python -m studies.bench rollout               answers of equal and of very different lengths
    python -m studies.bench step                  a whole step: rollout, teacher, student, AdamW
    python -m studies.bench bridge                the toy's bridge in closed form beside 20 epochs of AdamW:
                                                  model forwards, seconds, held-out cosine at every rank
    python -m studies.bench pair --tokenizers A B --data problems.parquet
                                                  text pairing: bytes a second, share of exact positions
    python -m studies.bench commands              how to run the first six on a GPU: commands of less than
                                                  nine minutes, with the seconds that each may take
    python -m studies.bench all                   the first six, one after the other; on a GPU those commands

    python -m studies.bench head --case 'full KL' 'top-16'         these lines of a table alone
    python -m studies.bench head --device cpu --count              counts in place of seconds: bytes, tensors
                                                  of vocabulary size, forwards, waits for the device; the same
                                                  on every machine
    python -m studies.bench head --expect h200    nothing runs: the limit on a GPU that is not at hand

As soon as a line is measured, it is printed and appended as JSON to out/bench.jsonl (--out). If a line fails,
its error is recorded. The columns:

    peak_mb       memory that a case needs beyond its inputs: on CUDA the allocator's figure; on a CPU that of
                  the process's resident set, the libraries' own buffers included, in a process for each line;
                  with --count the bytes of the tensors that exist at once
    seconds       the median of the repeats, between `low` and `high`; in the table decode of one token
    time          seconds, divided by those of the first line
    limit         the least seconds that the work can take at the machine's copy bandwidth and at the speed of
                  its matrix product, which are measured too: see studies/limits.py
    V-axis        with --count: tensors that have an axis of the vocabulary's length
    waits         with --count: how often the host would wait for its GPU

Peers (studies/peers.py): transformers' model of the same weights, with generate() or its caches; Liger-Kernel
or its scheme; `whole logits`, the readable loss under autograd. Some embeddings have more rows than the
tokenizer has ids (--vocab). Our lines leave the other rows out, as distill.py does. The peers cannot.

Simpler than usual: no framework for benchmarks. The inputs of a line are made when it is measured, and this
is not part of its seconds. What it does not do: several GPUs, servers such as vLLM.

Letters: B rows, T tokens, K supervised rows, L layers, d width, V vocabulary.
"""
import importlib.util
import random
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import cache, partial
from operator import call
from pathlib import Path
from unittest import mock

import torch

import kernels
from configs import checks
from kernels import decode_products
from losses import HiddenTerm
from model import PRESETS, Linear, Model
from output_losses import OutputTerm, make_objective
from rollout import Replay, Rollout, Sampling, Slots, naive, sample, stream
from step import Objective, accumulate, cut_rollout, position_mask, position_weights
from studies import limits
from studies.bench_bridge import fits, pairing
from studies.bench_lines import about_line, keep_row, tabulate
from studies.bench_losses import BOUND, head_cases, loss_cases
from studies.measure import Case, made_first
from studies.peers import TransformersDecode, TransformersUpdate, installed, transformers_model
from support.command_help import OneLineParser
from support.optimizer import adamw
from support.runtime import ROOT, UserError, gathered, run, shard, shown, start

# ---- models and inputs -----------------------------------------------------------------------------

# Ids that the tokenizer of a model knows, where its embedding has more rows.
TOKENIZER_SIZE = {'r1_1p5b': 151_665, 'qwen3_1p7b': 151_669, 'qwen3_4b': 151_669}

PROMPT = 32                     # tokens of every prompt
LAST_K = 2000                   # supervised positions of an answer, the paper's


def random_model(c, env, seed=0):
    """A model of a shape with torch's default weights, made directly on the device and in the dtype."""
    torch.manual_seed(seed)
    with env.device:
        return Model(c).to(env.dtype).requires_grad_(False).eval()


def prompts_of(args):
    """`rows` random prompts of 32 ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(PRESETS[args.model].V, (args.rows, PROMPT), generator=generator).tolist()


# ---- update, step: teacher, student, AdamW -----------------------------------------------------------

class Trainer:
    """A student, its teacher and AdamW."""
    def __init__(self, args, env):
        c = PRESETS[args.model]
        self.args = args
        self.student = random_model(c, env, 0).float().train().requires_grad_(True)
        self.teacher = random_model(c, env, 1)
        self.student.checkpointing = args.checkpointing
        shard(self.student, env)
        self.opt = adamw(self.student, 1e-6, (0.9, 0.999), 1e-8, 0.0)
        self.layer_map = {l: l for l in range(1, c.L + 1)}

    def rollout(self, prompts, lengths):
        """Step 2 of distill.py at forced lengths -> Rollout."""
        with gathered(self.student) as sampler:
            return sample(sampler, prompts, max_new_tokens=lengths, stop=[], vocab=self.args.vocab,
                          poll_every=32 * self.args.count)

    def update(self, roll, terms):
        """Steps 3 to 6 of distill.py. terms: weight of OPRD, weight of OPD, kind of OPD, rows at once."""
        oprd_weight, opd_weight, kind, chunk = terms
        weights = position_weights(position_mask(roll, 'last_k', LAST_K))
        output = OutputTerm(make_objective(kind, chunk=chunk, vocab=self.args.vocab), self.teacher)
        objective = Objective(self.layer_map, HiddenTerm('mse'), output)
        micro_batches = cut_rollout(roll, weights, self.args.budget)
        accumulate(self.student, self.teacher, micro_batches, objective,
                   {'oprd': oprd_weight, 'opd': opd_weight})
        self.opt.step()
        self.opt.zero_grad()


def work_of_update(args, env, lengths, terms):
    """Lengths of prompts and answers together, and the terms that are trained (see Trainer.update) -> the
    limits.Part of an update, and the bytes of its float32 gradients."""
    c = PRESETS[args.model]
    oprd_weight, opd_weight, _, _ = terms
    vocab = args.vocab or c.V
    rows = sum(min(length - PROMPT, LAST_K) for length in lengths)
    what = limits.Terms(rows, hidden=oprd_weight > 0, vocab=vocab if opd_weight else 0)
    parts = limits.update(c, lengths, what, env.dtype.itemsize, args.checkpointing)
    return parts, 4 * limits.learning_weights(c, opd_weight > 0)


def equal_answers(args, env):
    """`rows` answers of `tokens` random tokens after prompts of 32 -> Rollout."""
    B = args.rows
    vocab = args.vocab or PRESETS[args.model].V
    ids = torch.randint(vocab, (B, PROMPT + args.tokens)).to(env.device)
    prompt_len = torch.full((B,), PROMPT, device=env.device)
    resp_len = torch.full((B,), args.tokens, device=env.device)
    return Rollout(ids, prompt_len, resp_len, torch.ones(B, dtype=torch.bool), torch.arange(B))


def update_cases(args, env):
    """One update on `rows` answers of `tokens` tokens after prompts of 32."""
    roll = cache(partial(equal_answers, args, env))
    lengths = [PROMPT + args.tokens] * args.rows
    trained = {
        'OPRD': (1.0, 0.0, 'full', args.chunk),
        'OPD sampled': (0.0, 1.0, 'sampled', args.chunk),
        'OPD top-16': (0.0, 1.0, 'topk', args.chunk),
        'OPD full KL': (0.0, 1.0, 'full', args.chunk),
        f'OPD full KL, {BOUND} rows at once': (0.0, 1.0, 'full', BOUND),
        'OPRD + top-16': (1.0, 1.0, 'topk', args.chunk),
    }

    def way(terms):
        return lambda trainer: trainer.update(roll(), terms)

    cases = made_first(partial(Trainer, args, env), {name: way(terms) for name, terms in trained.items()})
    for name, terms in trained.items():
        cases[name].work, cases[name].gradients = work_of_update(args, env, lengths, terms)

    if installed('transformers'):
        update = made_first(partial(transformers_update, args, env, roll), {'transformers, Eq. (6)': call})
        update['transformers, Eq. (6)'].work = cases['OPRD'].work
        update['transformers, Eq. (6)'].gradients = cases['OPRD'].gradients
        cases |= update
    for case in cases.values():
        case.tokens = sum(lengths)
    return cases


def transformers_update(args, env, roll):
    """The same update by transformers, as a function of no arguments."""
    c = PRESETS[args.model]
    trainer = TransformersUpdate(random_model(c, env, 0), random_model(c, env, 1), env, args.checkpointing)
    weights = position_weights(position_mask(roll(), 'last_k', LAST_K)).flatten()
    at = weights.nonzero().squeeze(-1)                                       # (K,)
    return partial(trainer, roll().ids, at, weights[at])


def step_cases(args, env):
    """A whole step at forced lengths: 1/rows, 2/rows ... of `tokens`, the same for every objective."""
    c = PRESETS[args.model]
    prompts = prompts_of(args)
    lengths = [max(1, args.tokens * (i + 1) // args.rows) for i in range(args.rows)]
    texts = [PROMPT + length for length in lengths]
    trained = {'OPRD': (1.0, 0.0, 'full', args.chunk), 'OPD top-16': (0.0, 1.0, 'topk', args.chunk),
               'OPD full KL': (0.0, 1.0, 'full', args.chunk)}

    def way(terms):
        return lambda trainer: trainer.update(trainer.rollout(prompts, lengths), terms)

    ways = {name: way(terms) for name, terms in trained.items()}
    ways['rollout alone'] = lambda trainer: trainer.rollout(prompts, lengths)

    def make():
        """A trainer after one short step of each kind, which compile the kernels."""
        trainer = Trainer(args, env)
        for terms in trained.values():
            trainer.update(trainer.rollout(prompts, [2] * args.rows), terms)
        return trainer

    cases = made_first(make, ways, tokens=sum(lengths))
    sampled = limits.rollout(c, PROMPT, lengths, args.rows, env.dtype.itemsize)
    cases['rollout alone'].work = sampled
    for name, terms in trained.items():
        updated, cases[name].gradients = work_of_update(args, env, texts, terms)
        cases[name].work = sampled + updated
    return cases


# ---- decode, rollout -------------------------------------------------------------------------------

STEPS = 32                      # decode steps of a call, as many as between two polls on CUDA


class Decode:
    """A token for each of B rows that hold `context` tokens, sampling included. The time does not depend on
    the numbers in the cache, so no prompt is read and they stay zero."""
    def __init__(self, model, B, context, vocab):
        self.context = context
        self.slots = Slots(model, B, context, context + STEPS, 32768, Sampling(stop=[], vocab=vocab))
        self.slots.done[:] = False
        self.slots.max_count[:] = STEPS + 1

    def rewind(self):
        """Forget the tokens of the call before."""
        self.slots.cache.length.fill_(self.context)
        self.slots.count.zero_()
        self.slots.reserve(self.context, STEPS)

    @torch.no_grad()
    def __call__(self):
        self.rewind()
        self.slots.decode(STEPS)


def decode_plainly(decode):
    """A decode step with nn.Linear's products, and not those of packed weights (see model.Linear)."""
    with mock.patch.object(Linear, 'forward', torch.nn.Linear.forward):
        decode()


def decode_by_library(decode):
    """A decode step with every product by the matrix library, and none by our `norm_product_kernel`."""
    with mock.patch.object(decode_products, 'MOST_ROWS', 0):
        decode()


def never_fused(h):
    """Takes the place of kernels.fused, so that PyTorch's references run on every device."""
    return False


class CompiledDecode(Decode):
    """The same step with PyTorch's references in place of our kernels, compiled as a whole by torch.compile.
    On CUDA the compiled step is recorded in a CUDA graph, like ours. Compiling takes minutes, and even longer
    on a CPU."""
    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.compiled = torch.compile(self.step, fullgraph=True, dynamic=False)
        self.replay = Replay() if self.slots.ids.is_cuda else call

    def step(self):
        """One step that reads all columns of the cache; the mask hides those beyond an answer. If `longest`
        grew with the answer, torch.compile would compile a new graph at every step."""
        self.slots.cache.longest = self.slots.cache.room
        self.slots.decode_step()

    @torch.no_grad()
    def __call__(self):
        self.rewind()
        with mock.patch.object(kernels, 'fused', never_fused):
            # The model keeps its rotary frequencies. They must be computed before the step is compiled.
            self.slots.model.rope_frequencies(self.slots.cache.limit, self.slots.ids.device)
            for _ in range(STEPS):
                self.replay(self.compiled)


def decode_cases(args, env):
    """A token for each of b rows that hold a context."""
    c = PRESETS[args.model]
    on_cpu = env.device.type == 'cpu'
    model = cache(partial(random_model, c, env))
    theirs = cache(lambda: transformers_model(model(), env))
    cases = {}
    for B in args.batch:
        for context in args.context:
            # Some lines take a minute or more to compile. On a GPU they are measured for the first context
            # only, and `compiled references` on a CPU only if --case names it.
            first = context == args.context[0]
            lines = our_decode(model, args, B, context, on_cpu)
            lines |= their_decode(theirs, args, B, context, static=on_cpu or first)
            if (first and not on_cpu) or (on_cpu and args.case):
                make = partial(made_of, CompiledDecode, model, B, context, args.vocab)
                lines |= made_first(make, {'compiled references': call})
            work = limits.decode(c, B, context, env.dtype.itemsize)
            for name, case in lines.items():
                full_name = f'{B} x {context}, {name}'.removesuffix(', ')
                cases[full_name] = replace(case, steps=STEPS, tokens=B, work=work)
    return cases


def made_of(kind, model, *inputs):
    """An object of the class `kind`. model: a function that makes the model when it is first called."""
    return kind(model(), *inputs)


def our_decode(model, args, B, context, on_cpu):
    """The lines of our decode step, and of the same with other products. On a GPU each has a CUDA graph.
    model: as in `made_of`."""
    make = partial(made_of, Decode, model, B, context, args.vocab)
    lines = made_first(make, {'': call})
    if on_cpu:
        return lines | made_first(make, {'nn.Linear': decode_plainly})
    return lines | made_first(make, {"the library's products": decode_by_library})


def their_decode(theirs, args, B, context, static):
    """The lines of transformers' decode step, with its dynamic cache and, if `static`, its static cache."""
    if not installed('transformers'):
        return {}
    c = PRESETS[args.model]
    names = ['transformers']
    if static:
        names.append('transformers static')
    lines = {}
    for name in names:
        make = partial(made_of, TransformersDecode, theirs, c, B, context, STEPS, name.endswith('static'))
        lines |= made_first(make, {name: call})
    return lines


def rollout_cases(args, env):
    """`rows` greedy answers in batches. "equal": each has `tokens` tokens. "spread": their lengths are drawn
    from an exponential distribution of mean tokens / 5, and cut at `tokens`."""
    c = PRESETS[args.model]
    model = random_model(c, env)
    prompts = prompts_of(args)
    theirs = cache(lambda: transformers_model(model, env))
    B = args.batch[-1]
    rng = random.Random(0)
    spread = [min(args.tokens, 1 + int(rng.expovariate(5 / args.tokens))) for _ in prompts]
    how = dict(stop=[], temperature=0.0, vocab=args.vocab)

    def refilled(lengths):
        """Answers of these lengths; a slot whose answer has ended gets the next prompt."""
        requests = [(p, i, 0) for i, p in enumerate(prompts)]
        got = stream(model, requests, rows=B, max_new_tokens=lengths, poll_every=32 * args.count, **how)
        return [ids for _, ids, _ in sorted(got)]

    def batches(lengths, run):
        """Answers of these lengths by run(prompts, lengths), B prompts at a time. `run` may write more
        tokens, up to the longest of a batch, and these are cut off."""
        answers = []
        for first in range(0, len(prompts), B):
            wanted = lengths[first:first + B]
            written = run(prompts[first:first + B], wanted)
            answers += [ids[:length] for ids, length in zip(written, wanted, strict=True)]
        return answers

    @torch.no_grad()
    def products():
        """The matrix products of the decode steps of equal lengths, and nothing else."""
        slots = Slots(model, B, 1, 1, args.budget, Sampling(stop=[]))
        layers = [module for module in slots.model.modules() if isinstance(module, Linear)]
        x = {n: torch.ones(B, n, dtype=env.dtype, device=env.device) for n in (c.d, c.ff, c.H * c.e)}
        for _ in range(-(-len(prompts) // B) * (args.tokens - 1)):
            for layer in layers:
                layer(x[layer.in_features])

    def static(batch, lengths):
        longest = max(lengths)
        return sample(model, batch, max_new_tokens=longest, poll_every=32 * args.count, **how).answers()

    def without_cache(batch, lengths):
        return naive(model, batch, max_new_tokens=max(lengths), **how).answers()

    def transformers(batch, lengths):
        ids = torch.tensor(batch, device=env.device)
        longest = max(lengths)
        out = theirs().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest,
                                min_new_tokens=longest, eos_token_id=None, pad_token_id=0, do_sample=False)
        return out[:, ids.shape[1]:].tolist()

    cases = {}
    equal = [args.tokens] * len(prompts)
    short = [min(8, args.tokens)] * len(prompts)
    for name, lengths in (('equal', equal), ('spread', spread)):
        cases[f'{name}: refilled'] = Case(partial(refilled, lengths), tokens=sum(lengths))
        cases[f'{name}: static batches'] = Case(partial(batches, lengths, static), tokens=sum(lengths))
        if importlib.util.find_spec('transformers'):
            peer = partial(batches, lengths, transformers)
            cases[f'{name}: transformers'] = Case(peer, tokens=sum(lengths), ready=theirs)
    cases['equal: matrix products alone'] = Case(products, tokens=sum(equal))
    cases['8 tokens, naive'] = Case(partial(batches, short, without_cache), tokens=sum(short))

    for name, case in cases.items():
        lengths = short
        if name.startswith('equal'):
            lengths = equal
        if name.startswith('spread'):
            lengths = spread
        case.work = limits.rollout(model.config, PROMPT, lengths, B, env.dtype.itemsize)
    return cases


# ---- the table -----------------------------------------------------------------------------------

# The arguments that a table uses: they are printed above it.
USES = {'loss': ['rows', 'tokens'], 'head': ['rows', 'chunk', 'vocab'], 'update': ['rows', 'tokens', 'vocab'],
        'decode': ['batch', 'context', 'vocab'], 'rollout': ['rows', 'tokens', 'batch', 'vocab'],
        'step': ['rows', 'tokens', 'vocab']}
TABLES = {'decode': decode_cases, 'loss': loss_cases, 'head': head_cases, 'update': update_cases,
          'rollout': rollout_cases, 'step': step_cases}


# ---- commands ------------------------------------------------------------------------------------

# On a GPU, in the order in which their answers are wanted.
GPU_COMMANDS = ('decode --batch 1', 'decode --batch 2', 'decode --batch 16', 'loss', 'head', 'head --vocab 0',
                'update', 'update --rows 2', 'rollout', 'step')

# The estimate of a command's seconds is generous, so that no command is cut off.
START = 60                      # seconds: to import libraries, make models, compile Triton's kernels
COMPILE = 100                   # seconds: for a line that calls torch.compile
SLOWER = 3                      # a step may take so many times the seconds of limits.expected
PEER_LAUNCH = 2e-4              # seconds of transformers for each launch of ours: 156 launches are 31 ms


def seconds_of(command, env, gpu):
    """Seconds that a command may take on a GPU."""
    args = sized(arguments(command.split()), env)
    seconds = START
    for name, case in TABLES[args.what](args, env).items():
        runs = args.repeat + (args.repeat > 1)
        of_a_step = SLOWER * limits.expected(case.work, gpu)
        if 'transformers' in name:
            of_a_step += PEER_LAUNCH * sum(part.launches for part in case.work)
        seconds += runs * case.steps * of_a_step
        if 'compiled' in name or 'static' in name:
            seconds += COMPILE
    return seconds


def show_commands(args, env):
    """The commands for a GPU, each with the seconds that it may take."""
    gpu = limits.GPUS[args.expect or 'h200']
    env = without_machine(env)
    print(f'seconds on {gpu.name}, estimated')
    for command in GPU_COMMANDS:
        print(f'{seconds_of(command, env, gpu):7.0f}  python -m studies.bench {command}')


def run_all(env):
    """All tables, each in a process of its own."""
    commands = GPU_COMMANDS if env.device.type == 'cuda' else tuple(TABLES)
    began = time.monotonic()
    for command in commands:
        words = [sys.executable, '-m', 'studies.bench', *command.split(), *sys.argv[2:]]
        child = subprocess.Popen(words, cwd=ROOT)
        try:
            child.wait()
        except KeyboardInterrupt:
            return child.wait()              # Ctrl-C has reached the child too, and it prints the message
        print(f'[{time.monotonic() - began:.0f} s]\n', flush=True)


def without_machine(env):
    """An Env whose tensors have shapes and no memory, in the dtype of a GPU."""
    return replace(env, device=torch.device('meta'), dtype=torch.bfloat16)


def main(args):
    env = start(args.device, args.dtype)
    if args.what == 'commands':
        show_commands(args, env)
    elif args.what == 'all':
        return run_all(env)
    elif args.what in ('pair', 'bridge'):
        args = sized(args, env)
        got = {'pair': pairing, 'bridge': fits}[args.what](args, env)
        keep_row(args.out, about_line(args, env, args.what) | got)
    else:
        show_table(args, without_machine(env) if args.expect else env)


def show_table(args, env):
    """A table, or those of its lines that --case names."""
    args = sized(args, env)

    # On a CPU each of several lines is measured in a process of its own. This process then needs only the
    # names of the lines, so it makes the cases of the toy, which have the same names.
    one_line = args.case is not None and len(args.case) == 1
    alone = env.device.type == 'cpu' and not args.count and not one_line
    small = {'model': 'toy', 'vocab': None, 'rows': 1, 'tokens': 2} if alone else {}
    cases = TABLES[args.what](Namespace(**vars(args) | small), env)
    names = args.case or list(cases)
    for name in names:
        if name not in cases:
            raise UserError(f'--case {shown(name)}: no line of this table; choose one of {", ".join(cases)}')
    if args.expect:
        names = of_different_work(names, cases)
    sizes = ', '.join(f'{key} {getattr(args, key)}' for key in USES[args.what])
    print(f'{args.what}: {args.model}, {sizes}')
    tabulate(args, env, names, None if alone else cases)


def of_different_work(names, cases):
    """Several lines can do the same work in different ways, and have the same limit -> names, without those
    whose work is that of an earlier line."""
    chosen = []
    for name in names:
        if cases[name].work not in [cases[before].work for before in chosen]:
            chosen.append(name)
    return chosen


# Sizes where the command line gives none. CPU: a table takes a few minutes on two cores. GPU: the paper's
# shapes. COUNT: small ones for --count, whose counts do not depend on the machine.
CPU = {'loss': dict(model='r1_1p5b', rows=250, tokens=2048, repeat=3),
       'head': dict(model='r1_1p5b', rows=2048), 'update': dict(rows=2, tokens=224, repeat=2),
       'decode': dict(batch=[1, 4, 16], context=[128], repeat=3), 'rollout': dict(rows=64, tokens=160),
       'step': dict(rows=4, tokens=128), 'bridge': dict(rows=512), 'pair': dict(rows=2000, repeat=3)}
GPU = {'loss': dict(rows=2000, tokens=16384), 'head': dict(repeat=5),
       'update': dict(rows=1, tokens=16352, repeat=3),
       'decode': dict(batch=[1, 2, 16], context=[1024, 8192, 16352]),
       'rollout': dict(rows=32, tokens=128, repeat=2), 'step': dict(rows=16, tokens=16352)}
COUNT = {'loss': dict(rows=128, tokens=1024), 'head': dict(rows=512), 'update': dict(tokens=96),
         'decode': dict(batch=[1, 4], context=[64]), 'rollout': dict(rows=4, tokens=24, batch=[2]),
         'step': dict(rows=2, tokens=24)}


def sized(args, env):
    """The arguments, with default sizes where the command line gives none."""
    on_gpu = env.device.type in ('cuda', 'meta')
    usual = dict(repeat=1, rows=1, tokens=1, batch=[16], context=[1])
    usual['model'] = 'r1_1p5b' if on_gpu else 'smollm2'
    for sizes, applies in ((CPU, True), (GPU, on_gpu), (COUNT, args.count)):
        if applies:
            usual |= sizes.get(args.what, {})
    given = {key: value for key, value in vars(args).items() if value is not None}
    args = Namespace(**vars(args) | usual | given)
    if min(args.rows, args.tokens, args.repeat, *args.batch, *args.context) < 1 or args.chunk < 0:
        raise UserError('rows, tokens, batch, context and repeat begin at 1, chunk at 0')

    # Ids that are drawn and compared; None: all.
    if args.vocab is None:
        args.vocab = TOKENIZER_SIZE.get(args.model, 0)
    if not 0 <= args.vocab <= PRESETS[args.model].V:
        raise UserError(f'--vocab {args.vocab}: {args.model} has {PRESETS[args.model].V} ids; give fewer, or '
                        '0 for all')
    args.vocab = args.vocab or None
    args.checkpointing = args.checkpointing or on_gpu
    return args


def arguments(words=None):
    """The command line."""
    p = OneLineParser('studies/bench.py', 'WHAT [--option VALUE ...]')
    p.add_argument('what', choices=[*TABLES, 'bridge', 'pair', 'commands', 'all'])
    p.add_argument('--model', choices=PRESETS, help='shape')
    p.add_argument('--rows', type=int, help='loss, head: supervised rows; update, rollout, step: answers; '
                   'bridge: prompts; pair: texts')
    p.add_argument('--tokens', type=int, help='of an answer; loss: all rows')
    p.add_argument('--batch', type=int, nargs='+', help='decode: rows; rollout: answers at a time')
    p.add_argument('--context', type=int, nargs='+', help='decode: tokens that a row holds')
    p.add_argument('--vocab', type=int, help='ids that the tokenizer knows; 0: all')
    p.add_argument('--chunk', type=int, default=0, help='rows under the head at once; 0: by the free memory')
    p.add_argument('--budget', type=int, default=32768, help='tokens of a micro-batch')
    p.add_argument('--checkpointing', action='store_true', help='recompute blocks (on CUDA always)')
    p.add_argument('--repeat', type=int, help='timed runs; more than one are preceded by one that is not')
    p.add_argument('--count', action='store_true', help='count instead of timing')
    p.add_argument('--expect', choices=limits.GPUS, help='measure nothing: the limit on this GPU')
    p.add_argument('--tokenizers', nargs=2, metavar=('STUDENT', 'TEACHER'), help='pair: folders or hub ids')
    p.add_argument('--data', help='pair: a problem set')
    p.add_argument('--keys', nargs='*', default=[], help='bridge: key=value of the config')
    p.add_argument('--device', choices=checks['device'], default='auto')
    p.add_argument('--dtype', choices=checks['dtype'], default='auto')
    p.add_argument('--case', nargs='+', help='measure these lines only')
    p.add_argument('--out', type=Path, default=Path('out/bench.jsonl'), help='JSON lines are appended to it')
    return p.parse_args(words)


if __name__ == '__main__':
    run(main, arguments)
