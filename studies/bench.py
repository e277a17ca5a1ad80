"""
Speed and memory, ours beside its peers, on random weights at true shapes. Downloads nothing.

    python -m studies.bench loss                  Eq. (6) alone: fused, and two ways under autograd
    python -m studies.bench head                  losses under the LM head
    python -m studies.bench update                one update at equal lengths: OPRD, OPD, both
    python -m studies.bench decode                a token for every row, by rows and context
    python -m studies.bench rollout               answers of equal and of very different lengths
    python -m studies.bench step                  a whole step: rollout, teacher, student, AdamW
    python -m studies.bench bridge                the toy's bridge in closed form beside 20 epochs of AdamW:
                                                  model forwards, seconds, held-out cosine at every rank
    python -m studies.bench pair --tokenizers A B --data problems.parquet
                                                  text pairing: bytes a second, share of exact positions
    python -m studies.bench all                   the first six, one after the other, sizes of this machine
    python -m studies.bench ... --device cpu --count  no seconds: bytes, tensors of vocabulary size, forwards,
                                                  waits for the device; the same numbers on every machine

A table's lines are also printed as JSON, with machine, versions and dtype. Peak is what a case needs beyond
its inputs: the allocator's figure on CUDA; the process's resident set on a CPU, where each line is measured
in a process of its own, so that none inherits another's memory (the libraries' own buffers count too);
tensors alive at once with --count. Seconds are the median and the range of the repeats; decode's are of one
token. `limit` is the share of what reading every weight and key once takes at the measured copy bandwidth.

Peers: `transformers` is its model of the same weights, with generate() or its caches. `whole logits` is the
plain text under autograd. `Liger's scheme` is that of Liger-Kernel 0.8's fused linear JSD written in plain
torch: its rule for the chunk, its tensors, with the KL of Eq. (4) for its kernel; on CUDA, with liger-kernel
installed, the kernel itself is measured too.
"""
import argparse
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch

import kernels
from configs import checks
from cross_tokenizer.next_byte import ByteTable, NextByte
from cross_tokenizer.pairing import pair_text
from formats.huggingface import hf_config, hf_tensors
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer, same_vocabulary
from kernels.layer_loss import layer_rows_reference
from losses import HiddenTerm, layer_loss, oprd_loss, row_distance
from model import PRESETS, Linear, Model
from output_losses import HeadLoss, HeadRows, OutputTerm, make_objective, opd_rows, rows_at_once
from rollout import Rollout, Sampling, Slots, naive, sample, stream
from step import Objective, accumulate, cut_rollout, position_mask, position_weights
from studies.children import log_text, run_logged, show_failure
from studies.measure import MB, Case, counted, machine, measure
from support.command_help import OneLineParser
from support.optimizer import adamw
from support.provenance import versions
from support.runtime import ROOT, UserError, gathered, run, shard, shown, start

# ---- models of a shape -----------------------------------------------------------------------------

def random_model(c, env, seed=0):
    """A model of a shape, its weights as torch makes them, on the device and in the dtype at once."""
    torch.manual_seed(seed)
    with env.device:
        return Model(c).to(env.dtype).requires_grad_(False).eval()


def transformers_model(model, env):
    """The same weights in transformers' model of the family."""
    peer = importlib.import_module('transformers')
    config = peer.AutoConfig.for_model(**hf_config(model.config))
    with env.device:
        theirs = peer.AutoModelForCausalLM.from_config(config, dtype=env.dtype).eval().requires_grad_(False)
    left = theirs.load_state_dict(hf_tensors(model.config, dict(model.named_parameters())), strict=False)
    assert set(left.missing_keys) <= {'lm_head.weight'} and not left.unexpected_keys, left
    theirs.tie_weights()
    return theirs


def read_bytes(model, rows, context):
    """What a token for each of `rows` answers cannot but read: every weight but the embedding's other rows,
    and every key and value."""
    c, size = model.config, model.embed.weight.element_size()
    weights = sum(p.numel() for p in model.parameters()) - (0 if c.tied else c.V * c.d)
    return size * (weights + rows * context * 2 * c.L * c.G * c.e)


# ---- loss: hidden states alone ---------------------------------------------------------------------

def loss_cases(args, env):
    """Eq. (6) over every layer of a model, its blocks left out: `rows` supervised rows of `tokens`."""
    c, g = PRESETS[args.model], torch.Generator().manual_seed(0)
    N, K = args.tokens, min(args.rows, args.tokens)
    h, target = (torch.randn(1, N, c.d, generator=g).to(env.device, env.dtype) for _ in range(2))
    at = torch.arange(N - K, N, device=env.device)
    w = torch.full((K,), 1 / K, device=env.device)
    h.requires_grad_()
    payload = c.L * K * c.d * h.element_size()

    def fused():
        h_t = [target[0, at] for _ in range(c.L)]
        x, total = h, 0.0
        for l in range(c.L):
            x, loss, _ = layer_loss(x, h_t[l], at, w)
            total = total + loss / c.L
        return torch.autograd.grad(total, h)[0]

    def selected():
        rows = [target[0, at] for _ in range(c.L)]
        return torch.autograd.grad(oprd_loss([h.view_as(h)[0, at] for _ in range(c.L)], rows, w), h)[0]

    def stacked():
        s, t = (torch.stack([x.view_as(x)] * c.L).float() for x in (h, target))            # (L, 1, N, d)
        each = row_distance(s.flatten(0, 2), t.flatten(0, 2)).view(c.L, N)
        return torch.autograd.grad((each[:, at] * w).sum() / c.L, h)[0]

    def rows_alone(rows):
        spent = target[0, :K].clone()

        def call():
            for _ in range(c.L):
                rows(h.detach()[0], spent, at, w, 'mse')
        return call

    cases = {'fused': fused, 'selected rows': selected, 'stacked fp32': stacked,
             'rows alone': rows_alone(kernels.layer_rows),
             'rows alone, reference': rows_alone(layer_rows_reference)}
    if env.device.type == 'cuda':
        cases['rows alone, compiled reference'] = rows_alone(torch.compile(layer_rows_reference))
    return {name: Case(call, payload=payload) for name, call in cases.items()}


# ---- head: losses under the LM head --------------------------------------------------------------

def liger_scheme(h, W, h_t, W_t, w):
    """Liger's chunking: ceil(V / d) chunks, their size rounded up to a power of two; per chunk both
    logits, both log-softmaxes, the softmax, the loss and its gradient in fp32."""
    K, (V, d) = len(h), W.shape
    size = min(K, 1 << (-(-K // -(-V // d)) - 1).bit_length())
    d_W, d_h, total = torch.zeros_like(W), torch.zeros_like(h), 0.0
    for at in range(0, K, size):
        rows = slice(at, at + size)
        z_s, z_t = ((a @ b.t()).float() / 1.0 for a, b in ((h[rows], W), (h_t[rows], W_t)))
        logp, logq, p = z_s.log_softmax(-1), z_t.log_softmax(-1), z_s.softmax(-1)
        each = p * (logp - logq)
        total += (w[rows, None] * each).sum()
        logp.copy_(each.add_(p).mul_(w[rows, None]))                         # dD/dlog p, in place
        grad = ((logp - p * logp.sum(-1, keepdim=True)) / 1.0).to(h.dtype)
        d_h[rows] = grad @ W
        d_W.addmm_(grad.t(), h[rows])
    return total, d_h, d_W


def head_cases(args, env):
    """Losses and gradients of rows of a student and a teacher of one shape, forward and backward."""
    c, g = PRESETS[args.model], torch.Generator().manual_seed(0)
    h, h_t = (torch.randn(args.rows, c.d, generator=g).to(env.device, env.dtype) for _ in range(2))
    W, W_t = (torch.empty(c.V, c.d, dtype=env.dtype).normal_(std=c.d**-0.5, generator=g).to(env.device)
              for _ in range(2))
    y = torch.zeros(args.rows, dtype=torch.long, device=env.device)
    w = torch.full((args.rows,), 1 / args.rows, device=env.device)
    h.requires_grad_()
    W.requires_grad_()

    def ours(kind, **how):
        objective = make_objective(kind, chunk=args.chunk, **how)
        batch = HeadRows(h_t, W_t, y, w, torch.zeros_like(y), None, None)
        loss, _ = HeadLoss.apply(h, W, objective, batch)
        torch.autograd.grad(loss, (h, W))

    def whole():
        loss = (w * opd_rows((h @ W.t()).float(), (h_t @ W_t.t()).float(), y, 'full')).sum()
        torch.autograd.grad(loss, (h, W))

    def liger():
        peer = importlib.import_module('liger_kernel.ops.fused_linear_jsd').LigerFusedLinearJSDFunction
        loss = peer.apply(h, W, h_t, W_t, None, 1.0)                         # beta 1: reverse KL
        torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, (h, W))

    def next_byte(written, inside, both):
        batch = HeadRows(both, W_t, y, w, torch.zeros_like(y), inside, written)
        loss, _ = HeadLoss.apply(h, W, NextByte(table, table, chunk=args.chunk), batch)
        torch.autograd.grad(loss, (h, W))
    rng = random.Random(0)                   # words of 1 to 8 of 64 bytes; 6 rows in 100 inside a token
    words = [bytes(rng.choices(range(64), k=rng.randint(1, 8))) for _ in range(c.V)]
    table = ByteTable(words, [], c.V, env.device)
    inside = torch.tensor([rng.random() < 0.06 for _ in range(args.rows)], device=env.device)
    written = [rng.choice(words)[:1 if part else None] for part in inside.tolist()]
    scheme = partial(liger_scheme, h.detach(), W.detach(), h_t, W_t, w)
    cases = {'full KL': partial(ours, 'full'), 'full KL, forward': partial(ours, 'full', direction='forward'),
             'top-16': partial(ours, 'topk'), 'sampled': partial(ours, 'sampled'),
             'next byte': partial(next_byte, written, inside, torch.cat([h_t, h_t])),
             "Liger's scheme": scheme, 'whole logits': whole}
    peer = env.device.type == 'cuda' and importlib.util.find_spec('liger_kernel')
    cases |= {'Liger': liger} if peer else {}
    chunk = args.chunk or rows_at_once(env.device)
    ideal = 4 * c.V * (c.d + chunk)          # the head's gradient and one chunk of logits
    return {name: Case(call, payload=ideal) for name, call in cases.items()}


# ---- update, step: teacher, student, AdamW -----------------------------------------------------------

def trainer(args, env):
    """-> student, and update(rollout, oprd weight, opd weight, ...): steps 3 to 6 of distill.py."""
    c = PRESETS[args.model]
    student, teacher = (random_model(c, env, seed) for seed in (0, 1))
    student = student.float().train().requires_grad_(True)
    student.checkpointing = args.checkpointing
    shard(student, env)
    opt, layer_map = adamw(student, 1e-6, (0.9, 0.999), 1e-8, 0.0), {l: l for l in range(1, c.L + 1)}

    def update(roll, oprd, opd, kind='full'):
        weights = position_weights(position_mask(roll, 'last_k', 2000))
        output = OutputTerm(make_objective(kind, chunk=args.chunk), teacher)
        objective = Objective(layer_map, HiddenTerm('mse'), output)
        accumulate(student, teacher, cut_rollout(roll, weights, args.budget), objective, oprd, opd)
        opt.step()
        opt.zero_grad()
    return student, update


def update_cases(args, env):
    """One update on `rows` answers of `tokens` tokens after prompts of 32."""
    student, update = trainer(args, env)
    B, P, T = args.rows, 32, args.tokens
    prompt, answer = (torch.full((B,), n, device=env.device) for n in (P, T))
    ids = torch.randint(student.config.V, (B, P + T)).to(env.device)
    roll = Rollout(ids, prompt, answer, torch.ones(B, dtype=torch.bool), torch.arange(B))
    terms = {'OPRD': (1.0, 0.0, 'full'), 'OPD sampled': (0.0, 1.0, 'sampled'),
             'OPD top-16': (0.0, 1.0, 'topk'), 'OPD full KL': (0.0, 1.0, 'full'),
             'OPRD + top-16': (1.0, 1.0, 'topk')}
    cases = {name: partial(update, roll, oprd, opd, kind=kind) for name, (oprd, opd, kind) in terms.items()}

    @cache
    def peers():
        """transformers' student and teacher, AdamW, and the supervised rows with their weights."""
        both = [transformers_model(random_model(student.config, env, seed), env) for seed in (0, 1)]
        theirs = both[0].float().train().requires_grad_(True)
        if args.checkpointing:
            theirs.gradient_checkpointing_enable()
        w = position_weights(position_mask(roll, 'last_k', 2000)).flatten()
        at = w.nonzero().squeeze(-1)
        return theirs, both[1], adamw(theirs, 1e-6, (0.9, 0.999), 1e-8, 0.0), at, w[at]

    def transformers():
        """The step as one would write it: all hidden states kept, Eq. (6) by autograd."""
        theirs, teacher, opt, at, w = peers()
        theirs, teacher = theirs.model, teacher.model                        # without the head
        with torch.autocast(env.device.type, env.dtype, enabled=env.dtype != torch.float32):
            with torch.no_grad():
                h_t = [h.flatten(0, 1)[at] for h in teacher(ids, output_hidden_states=True).hidden_states[1:]]
            h_s = [h.flatten(0, 1)[at] for h in theirs(ids, output_hidden_states=True).hidden_states[1:]]
        oprd_loss(h_s, h_t, w).backward()
        opt.step()
        opt.zero_grad()
    cases = {name: Case(call, tokens=B * (P + T)) for name, call in cases.items()}
    if importlib.util.find_spec('transformers'):
        cases['transformers, Eq. (6)'] = Case(transformers, tokens=B * (P + T), ready=peers)
    return cases


def step_cases(args, env):
    """A whole step at forced lengths: 1/rows, 2/rows ... of `tokens`, the same for every objective."""
    student, update = trainer(args, env)
    prompts, most = prompts_of(args), [max(1, args.tokens * (i + 1) // args.rows) for i in range(args.rows)]

    def step(*terms, most=most, **how):
        with gathered(student) as sampler:
            roll = sample(sampler, prompts, max_new_tokens=most, stop=[], poll_every=32 * args.count)
        update(roll, *terms, **how)
    cases = {'OPRD': partial(step, 1.0, 0.0), 'OPD top-16': partial(step, 0.0, 1.0, kind='topk'),
             'OPD full KL': partial(step, 0.0, 1.0, kind='full')}
    short = {'most': [2] * args.rows}        # compiles the kernels
    return {name: Case(call, tokens=sum(most), ready=partial(call, **short)) for name, call in cases.items()}


# ---- decode, rollout -------------------------------------------------------------------------------

def prompts_of(args):
    """`rows` random prompts of 32 ids."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(PRESETS[args.model].V, (args.rows, 32), generator=g).tolist()


def decode_cases(args, env):
    """A token for each of b rows that hold a context: 32 steps, sampling included, as between two looks."""
    model, steps, cases = random_model(PRESETS[args.model], env), 32, {}
    c = model.config
    theirs = cache(lambda: transformers_model(model, env))

    @cache
    def filled(b, context):
        """Slots as if `context` tokens had been read; what keys they hold does not change the time."""
        p = Slots(model, b, context, context + steps, args.budget, Sampling(stop=[]))
        p.done[:], p.max_count[:] = False, steps + 1
        return p

    def ours(b, context):
        p = filled(b, context)
        p.cache.length.fill_(context)
        p.count.zero_()
        p.reserve(context, steps)
        with torch.no_grad():
            p.decode(steps)

    def plainly(b, context):
        """Without the packed weights of model.Linear."""
        with mock.patch.object(Linear, 'forward', torch.nn.Linear.forward):
            ours(b, context)

    @cache
    def compiled(b, context):
        """transformers' static cache, and its model compiled for it on CUDA, as generate() does."""
        peer = importlib.import_module('transformers')
        kv = peer.StaticCache(config=theirs().config, max_cache_len=context + steps)
        cuda = env.device.type == 'cuda'
        return torch.compile(theirs().forward, mode='reduce-overhead') if cuda else theirs(), kv

    @torch.no_grad()
    def transformers(b, context, static):
        forward, kv = compiled(b, context) if static else (
            theirs(), importlib.import_module('transformers').DynamicCache())
        empty = torch.zeros(b, c.G, context, c.e, dtype=env.dtype, device=env.device)
        if static:
            kv.reset()
        for l in range(c.L):                 # as if read
            kv.update(empty, empty, l)
        ids = torch.ones(b, 1, dtype=torch.long, device=env.device)
        for t in range(steps):
            at = torch.full((b, 1), context + t, device=env.device)
            z = forward(input_ids=ids, position_ids=at, past_key_values=kv, use_cache=True).logits
            ids = z[:, -1].float().softmax(-1).multinomial(1)

    for b in args.batch:
        for context in args.context:
            size = dict(steps=steps, tokens=b, reads=read_bytes(model, b, context))
            cases[f'{b} x {context}'] = Case(partial(ours, b, context), **size)
            if env.device.type == 'cpu':
                cases[f'{b} x {context}, nn.Linear'] = Case(partial(plainly, b, context), **size)
            if importlib.util.find_spec('transformers'):
                # on CUDA the static cache for one shape only: each takes a minute to compile
                first = env.device.type == 'cpu' or (b, context) == (args.batch[0], args.context[0])
                for static in (False, True)[:1 + first]:
                    name = f'{b} x {context}, transformers' + ' static' * static
                    cases[name] = Case(partial(transformers, b, context, static), **size, ready=theirs)
    return cases


def rollout_cases(args, env):
    """`rows` greedy answers, a batch at a time, of `tokens` tokens each, or of lengths spread as an
    exponential of mean tokens / 5, cut at `tokens`. A finished row of a static batch is computed on."""
    c = PRESETS[args.model]
    model, prompts = random_model(c, env), prompts_of(args)
    theirs = cache(lambda: transformers_model(model, env))
    rng, B = random.Random(0), args.batch[-1]
    spread = [min(args.tokens, 1 + int(rng.expovariate(5 / args.tokens))) for _ in prompts]
    how = dict(stop=[], temperature=0.0)

    def refilled(most):
        requests = [(p, i, 0) for i, p in enumerate(prompts)]
        got = stream(model, requests, rows=B, max_new_tokens=most, poll_every=32 * args.count, **how)
        return [ids for _, ids, _ in sorted(got)]

    def batches(most, run):
        return [ids[:n] for i in range(0, len(prompts), B)
                for ids, n in zip(run(prompts[i:i + B], most[i:i + B]), most[i:i + B], strict=True)]

    @torch.no_grad()
    def products():
        """The matrix products of the decode steps of equal lengths, and nothing else."""
        slots = Slots(model, B, 1, 1, args.budget, Sampling(stop=[]))
        layers = [module for module in slots.model.modules() if isinstance(module, Linear)]
        x = {n: torch.ones(B, n, dtype=env.dtype, device=env.device) for n in (c.d, c.ff, c.H * c.e)}
        for _ in range(-(-len(prompts) // B) * (args.tokens - 1)):
            for layer in layers:
                layer(x[layer.in_features])

    def static(some, most):
        return sample(model, some, max_new_tokens=max(most), poll_every=32 * args.count, **how).answers()

    def slow(some, most):
        return naive(model, some, max_new_tokens=max(most), **how).answers()

    def transformers(some, most):
        ids = torch.tensor(some, device=env.device)
        out = theirs().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(most),
                                min_new_tokens=max(most), eos_token_id=None, pad_token_id=0, do_sample=False)
        return out[:, ids.shape[1]:].tolist()

    cases = {}
    for name, most in (('equal', [args.tokens] * len(prompts)), ('spread', spread)):
        cases[f'{name}: refilled'] = Case(partial(refilled, most), tokens=sum(most))
        cases[f'{name}: static batches'] = Case(partial(batches, most, static), tokens=sum(most))
        if importlib.util.find_spec('transformers'):
            peer = partial(batches, most, transformers)
            cases[f'{name}: transformers'] = Case(peer, tokens=sum(most), ready=theirs)
    bound = Case(products, tokens=args.tokens * len(prompts))
    cases['equal: matrix products alone'] = bound
    few = [min(8, args.tokens)] * len(prompts)
    return cases | {'8 tokens, naive': Case(partial(batches, few, slow), tokens=sum(few))}


# ---- pair: the student's answers in the teacher's tokens -------------------------------------------

def pairing(args, env):
    """Cut the questions of a problem set as the student would, pair them with the teacher's tokens."""
    if not (args.tokenizers and args.data):
        raise UserError('pair: give --tokenizers STUDENT TEACHER and --data PROBLEMS')
    tok_s, tok_t = (load_tokenizer(path) for path in args.tokenizers)
    texts = [p.question for p in load_problems(args.data, tok_s, args.rows)]
    texts = [t if isinstance(t, str) else ''.join(m['content'] for m in t) for t in texts]
    answers = [tok_s.encode(t, special=False) for t in texts]
    size = sum(len(tok_s.pieces[i]) for answer in answers for i in answer)
    same, seconds = same_vocabulary(tok_s, tok_t), []
    for _ in range(args.repeat):
        began = time.perf_counter()
        inside = [pair_text(answer, tok_s, [0], tok_t, same=same)[2] for answer in answers]
        seconds.append(time.perf_counter() - began)
    count = sum(map(len, inside))
    align = 1 - sum(int(x.sum()) for x in inside) / count
    rate = size / MB / statistics.median(seconds)
    print(f'pair: {len(answers)} texts, {size / MB:.2f} MB, {count} positions, {align:.3f} of them exact; '
          f'{rate:.2f} MB/s on one core; {machine(env)}')
    return {'texts': len(answers), 'bytes': size, 'align': align, 'mb_per_s': rate}


# ---- bridge: one pass beside Algorithm 1 -----------------------------------------------------------

def fits(args, env):
    """Stage 1 of the toy in closed form and as Algorithm 1 does it, on the same answers."""
    made, keys = {}, [f'bridge_prompts={args.rows}', f'device={args.device}', *args.keys]
    print(f'bridge: configs/toy_bridge.py, {args.rows} prompts; {machine(env)}')
    with tempfile.TemporaryDirectory() as tmp:
        for fit in ('ridge', 'adamw'):
            out = Path(tmp) / fit
            if fit == 'adamw':
                out.mkdir()
                shutil.copy(Path(tmp) / 'ridge/rollouts.jsonl', out)
            log = Path(tmp) / f'{fit}.log'
            command = ['bridge.py', 'configs/toy_bridge.py', f'bridge={out}', f'bridge_fit={fit}', *keys]
            if run_logged(command, log) != 0:
                raise UserError(show_failure('bridge.py', log_text(log)))
            made[fit] = json.loads((out / 'bridge.json').read_text())
    got, ranks = {}, list(made['ridge']['layers']['1']['cos'])
    for fit, m in made.items():
        cos = {r: statistics.fmean(v['cos'][r] for v in m['layers'].values()) for r in ranks}
        got[fit] = {'forwards': m['forwards per answer'], 'seconds': m['seconds'], 'cos': cos}
    print(f'{"":8}{"forwards":>9}{"seconds":>9}' + ''.join(f'{"r=" + r:>7}' for r in ranks))
    for fit, m in got.items():
        cells = ''.join(f'{x:7.3f}' for x in m['cos'].values())
        print(f'{fit:8}{m["forwards"]:9.0f}{m["seconds"]:9.1f}{cells}')
    more, longer = (got['adamw'][k] / got['ridge'][k] for k in ('forwards', 'seconds'))
    print(f'AdamW: {more:.0f}x the forwards, {longer:.0f}x the seconds; both fits give every rank at once')
    return got


# ---- the table -----------------------------------------------------------------------------------

def line_of(args, env, name, case):
    """Measure a line of a table -> what its JSON line holds."""
    V = PRESETS[args.model].V
    got = counted(case, V) if args.count else measure(case, args.repeat, env.device)
    if case.payload:
        got |= {'payload_mb': case.payload / MB, 'peak/payload': got['peak_mb'] * MB / case.payload}
    asked = {k: v for k, v in vars(args).items() if k not in ('device', 'dtype')}
    where = {'machine': machine(env), 'dtype': str(env.dtype)[6:]} | versions(env)
    return asked | {'case': name} | got | where


def in_a_process(name):
    """`line_of` in a process of its own, for a resident set that nobody else has swollen."""
    p = subprocess.run([sys.executable, '-m', 'studies.bench', *sys.argv[1:], '--case', name],
                       capture_output=True, text=True, cwd=ROOT)
    if p.returncode:
        raise RuntimeError(show_failure(name, p.stderr))
    return json.loads(p.stdout.strip().splitlines()[-1])


COLUMNS = {'peak_mb': '.0f', 'made_mb': '.0f', 'largest_mb': '.1f', 'V-axis': 'd', 'forwards': '.2f',
           'waits': '.2f', 'peak/payload': '.2f', 'seconds': '.4g', 'low': '.4g', 'high': '.4g',
           'tok/s': '.1f', 'limit': '.0%'}


def tabulate(args, env, cases_of):
    """Measure every line, print the table as it grows and then its JSON."""
    alone = env.device.type != 'cuda' and not args.count       # in processes of their own
    small = argparse.Namespace(**vars(args) | {'model': 'toy', 'rows': 1, 'tokens': 2}) if alone else args
    sizes = ', '.join(f'{k} {getattr(args, k)}' for k in USES[args.what])
    print(f'{args.what}: {args.model}, {sizes}; {machine(env)}, {str(env.dtype)[6:]}')
    lines, first = [], None
    for name, case in cases_of(small, env).items():
        try:
            r = in_a_process(name) if alone else line_of(args, env, name, case)
        except (RuntimeError, torch.OutOfMemoryError) as e:
            print(f'{name:28}  {str(e).splitlines()[0][:90]}', flush=True)
            continue
        columns = [k for k in COLUMNS if k in r]
        if not lines:
            titles = columns + ['time'] * ('seconds' in r)
            print(f'{"":28}' + ''.join(f'{k:>13}' for k in titles))
            first = r
        cells = [format(r[k], COLUMNS[k]) for k in columns]
        cells += [f"{r['seconds'] / first['seconds']:.2f}x"] if 'seconds' in r else []
        lines.append(r)
        print(f'{name:28}' + ''.join(f'{c:>13}' for c in cells), flush=True)
    for lengths in ('equal', 'spread'):
        told = {r['answers'] for r in lines if 'answers' in r and r['case'].startswith(lengths)}
        if told:
            print(f'answers, {lengths}: ' + ('the same in every line' if len(told) == 1 else 'they differ'))
    print('\n'.join(map(json.dumps, lines)))


USES = {'loss': ['rows', 'tokens'], 'head': ['rows', 'chunk'], 'update': ['rows', 'tokens'],
        'decode': ['batch', 'context'], 'rollout': ['rows', 'tokens', 'batch'], 'step': ['rows', 'tokens']}
TABLES = {'loss': loss_cases, 'head': head_cases, 'update': update_cases, 'decode': decode_cases,
          'rollout': rollout_cases, 'step': step_cases}


def main(args):
    env = start(args.device, args.dtype)
    if args.what == 'all':
        began = time.monotonic()
        more = [['update', '--rows', '2']] if env.device.type == 'cuda' else []        # Table 3's 2 x 16k
        for what in [*([t] for t in TABLES), *more]:
            child = subprocess.Popen([sys.executable, '-m', 'studies.bench', *what, *sys.argv[2:]], cwd=ROOT)
            try:
                child.wait()
            except KeyboardInterrupt:
                return child.wait()          # Ctrl-C has reached it too: it says so, once
            print(f'[{time.monotonic() - began:.0f} s]\n', flush=True)
        return
    args = sized(args, env)
    if args.what in ('pair', 'bridge'):
        got = (pairing if args.what == 'pair' else fits)(args, env)
        print(json.dumps({'what': args.what, 'machine': machine(env)} | got | versions(env)))
    elif args.case:
        cases = TABLES[args.what](args, env)
        if args.case not in cases:
            raise UserError(f'--case {shown(args.case)}: no line of this table; choose one of '
                            f'{", ".join(cases)}')
        print(json.dumps(line_of(args, env, args.case, cases[args.case])))
    else:
        tabulate(args, env, TABLES[args.what])


# What is measured where nothing is said: on two CPU cores a few minutes a table; on a GPU the paper's shapes;
# with --count small ones, for counts do not depend on a machine.
CPU = {'loss': dict(model='r1_1p5b', rows=250, tokens=2048, repeat=3),
       'head': dict(model='r1_1p5b', rows=2048), 'update': dict(rows=2, tokens=224, repeat=2),
       'decode': dict(batch=[1, 4, 16], context=[128], repeat=3), 'rollout': dict(rows=64, tokens=160),
       'step': dict(rows=4, tokens=128), 'bridge': dict(rows=512), 'pair': dict(rows=2000, repeat=3)}
GPU = {'loss': dict(rows=2000, tokens=16384), 'head': dict(repeat=3), 'update': dict(rows=1, tokens=16352),
       'decode': dict(batch=[1, 2, 16], context=[1024, 8192, 16352]),
       'rollout': dict(rows=32, tokens=128, repeat=2), 'step': dict(rows=16, tokens=16352)}
COUNT = {'loss': dict(rows=128, tokens=1024), 'head': dict(rows=512), 'update': dict(tokens=96),
         'decode': dict(batch=[1, 4], context=[64]), 'rollout': dict(rows=4, tokens=24, batch=[2]),
         'step': dict(rows=2, tokens=24)}


def sized(args, env):
    """Sizes that were not given."""
    cuda = env.device.type == 'cuda'
    usual = dict(model='r1_1p5b' if cuda else 'smollm2', repeat=1, rows=1, tokens=1, batch=[16], context=[1])
    for sizes, here in ((CPU, True), (GPU, cuda), (COUNT, args.count)):
        usual |= sizes.get(args.what, {}) if here else {}
    for key, value in usual.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if min(args.rows, args.tokens, args.repeat, *args.batch, *args.context) < 1 or args.chunk < 0:
        raise UserError('rows, tokens, batch, context and repeat begin at 1')
    args.checkpointing = args.checkpointing or cuda
    return args


def arguments():
    """The command line."""
    p = OneLineParser('studies/bench.py', 'WHAT [--option VALUE ...]')
    p.add_argument('what', choices=[*TABLES, 'bridge', 'pair', 'all'])
    p.add_argument('--model', choices=PRESETS, help='shape')
    p.add_argument('--rows', type=int, help='loss, head: supervised rows; update, rollout, step: answers; '
                   'bridge: prompts; pair: texts')
    p.add_argument('--tokens', type=int, help='of an answer; loss: all rows')
    p.add_argument('--batch', type=int, nargs='+', help='decode: rows; rollout: answers at a time')
    p.add_argument('--context', type=int, nargs='+', help='decode: tokens that a row holds')
    p.add_argument('--chunk', type=int, default=0, help='rows under the head at once; 0: by the free memory')
    p.add_argument('--budget', type=int, default=32768, help='tokens of a micro-batch')
    p.add_argument('--checkpointing', action='store_true', help='recompute blocks (on CUDA always)')
    p.add_argument('--repeat', type=int, help='timed runs; more than one are preceded by one that is not')
    p.add_argument('--count', action='store_true', help='count instead of timing')
    p.add_argument('--tokenizers', nargs=2, metavar=('STUDENT', 'TEACHER'), help='pair: folders or hub ids')
    p.add_argument('--data', help='pair: a problem set')
    p.add_argument('--keys', nargs='*', default=[], help='bridge: key=value of the config')
    p.add_argument('--device', choices=checks['device'], default='auto')
    p.add_argument('--dtype', choices=checks['dtype'], default='auto')
    p.add_argument('--case', help='measure one line only')
    return p.parse_args()


if __name__ == '__main__':
    run(main, arguments)
