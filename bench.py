"""
Speed and memory, ours beside its peers, on random weights at true shapes. Downloads nothing.

    python bench.py head                          losses under the LM head: peak bytes, seconds
    python bench.py update --model smollm2        one update at equal lengths: OPRD, OPD, both
    python bench.py rollout                       answers of very different lengths: places refilled, or not
    python bench.py bridge                        the toy's bridge in closed form beside 20 epochs of AdamW:
                                                  model forwards, seconds, held-out cosine at every rank
    python bench.py pair --tokenizers A B --data problems.parquet
                                                  text pairing: bytes a second, share of exact positions

Each line of a table is measured in a process of its own, so that no case inherits another's memory; it
is also printed as one JSON line with machine, versions and dtype. Peak is what a case needs beyond its
inputs: the allocator's figure on CUDA, the process's resident set on a CPU (so the libraries' own
buffers count too). Seconds are the median and the range of the repeats.

Peers: `whole logits` is the plain text under autograd. `Liger's scheme` is that of Liger-Kernel 0.8's
fused linear JSD written in plain torch: its rule for the chunk, its tensors, with the KL of Eq. (4) for
its kernel; on CUDA, with liger-kernel installed, the kernel itself is measured too.
"""
import argparse
import importlib.util
import json
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from data import load_problems, load_tokenizer
from distill import accumulate, adamw
from losses import opd_loss, opd_rows, position_weights, positions
from model import PRESETS, Model, init_weights
from next_byte import ByteTable, byte_loss
from rollout import Rollout, sample, stream
from runtime import ROOT, UserError, run, shard, start, versions
from teacher import pair_text

MB = 1e6


# ---- measuring ---------------------------------------------------------------------------------

def resident():
    """Bytes of this process in memory now (Linux; elsewhere its highest so far)."""
    try:
        with open('/proc/self/statm') as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return highest()


def highest():
    """The most bytes this process has had in memory, since `forget` on Linux. (A child's ru_maxrss begins
    with its parent's there.)"""
    try:
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def forget():
    """Let `highest` begin anew, where the kernel allows it."""
    try:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    except OSError:
        pass


def measure(call, repeat, device):
    """Run `call` 1 + repeat times -> {peak_mb, seconds, low, high}; the first run, unless it is the
    only one, warms up and is not timed."""
    cuda, times = device.type == 'cuda', []
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget()
    before = torch.cuda.memory_allocated() if cuda else resident()
    for _ in range(repeat + (repeat > 1)):
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = (torch.cuda.max_memory_allocated() if cuda else highest()) - before
    times = times[repeat > 1:]
    return {'peak_mb': peak / MB, 'seconds': statistics.median(times), 'low': min(times), 'high': max(times)}


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


def head_cases(args, place):
    """{name: call} for rows of a student and a teacher of one shape, forward and backward."""
    c, g = PRESETS[args.model], torch.Generator().manual_seed(0)
    h, h_t = (torch.randn(args.rows, c.d, generator=g).to(place.device, place.dtype) for _ in range(2))
    W, W_t = (torch.empty(c.V, c.d, dtype=place.dtype).normal_(std=c.d**-0.5, generator=g).to(place.device)
              for _ in range(2))
    y = torch.zeros(args.rows, dtype=torch.long, device=place.device)
    w = torch.full((args.rows,), 1 / args.rows, device=place.device)
    h.requires_grad_()
    W.requires_grad_()

    def ours(kind, **how):
        loss, _ = opd_loss(h, W, h_t, W_t, y, w, kind=kind, chunk=args.chunk, **how)
        torch.autograd.grad(loss, (h, W))

    def whole():
        loss = (w * opd_rows((h @ W.t()).float(), (h_t @ W_t.t()).float(), y)).sum()
        torch.autograd.grad(loss, (h, W))

    def liger():
        peer = importlib.import_module('liger_kernel.ops.fused_linear_jsd').LigerFusedLinearJSDFunction
        loss = peer.apply(h, W, h_t, W_t, None, 1.0)                         # beta 1: reverse KL
        torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, (h, W))
    def next_byte(written, inside, both):
        loss, _ = byte_loss(h, W, both, W_t, y, w, None, written, inside, table_s=table, table_t=table,
                            chunk=args.chunk)
        torch.autograd.grad(loss, (h, W))
    rng = random.Random(0)                   # words of 1 to 8 of 64 bytes; 6 rows in 100 inside a token
    words = [bytes(rng.choices(range(64), k=rng.randint(1, 8))) for _ in range(c.V)]
    table = ByteTable(words, [], c.V, place.device)
    inside = torch.tensor([rng.random() < 0.06 for _ in range(args.rows)], device=place.device)
    written = [rng.choice(words)[:1 if part else None] for part in inside.tolist()]
    scheme = partial(liger_scheme, h.detach(), W.detach(), h_t, W_t, w)
    cases = {'full KL': partial(ours, 'full'), 'full KL, forward': partial(ours, 'full', direction='forward'),
             'top-16': partial(ours, 'topk'), 'sampled': partial(ours, 'sampled'),
             'next byte': partial(next_byte, written, inside, torch.cat([h_t, h_t])),
             "Liger's scheme": scheme, 'whole logits': whole}
    peer = place.device.type == 'cuda' and importlib.util.find_spec('liger_kernel')
    return cases | ({'Liger': liger} if peer else {})


def head_ideal(args):
    """MB that a chunked head loss cannot do without: the head's gradient and one chunk of logits."""
    c = PRESETS[args.model]
    return 4 * c.V * (c.d + args.chunk) / MB


# ---- update: teacher, student, AdamW at forced lengths -------------------------------------------

def update_cases(args, place):
    """{name: call} for one update on `rows` answers of `tokens` tokens after prompts of 32."""
    c = PRESETS[args.model]
    torch.manual_seed(0)
    student, teacher = (init_weights(Model(c), seed).to(place.device) for seed in (0, 1))
    teacher.requires_grad_(False).to(place.dtype)
    student.checkpointing = args.checkpointing
    shard(student, place)
    B, P, T = args.rows, 32, args.tokens
    prompt, answer = (torch.full((B,), n, device=place.device) for n in (P, T))
    ids = torch.randint(c.V, (B, P + T)).to(place.device)
    roll = Rollout(ids, prompt, answer, torch.ones(B, dtype=torch.bool), torch.arange(B))
    w = position_weights(positions(roll, 'last_k', 2000))
    opt = adamw(student, 1e-6, (0.9, 0.999), 0.0)
    phi = {l: l for l in range(1, c.L + 1)}

    def update(oprd, opd, **how):
        accumulate(student, teacher, roll, w, phi, 'mse', args.budget, oprd_weight=oprd,
                   opd_weight=opd, opd=partial(opd_loss, chunk=args.chunk, **how))
        opt.step()
        opt.zero_grad()
    opd = {f'OPD {name}': partial(update, 0.0, 1.0, kind=kind)
           for name, kind in (('sampled', 'sampled'), ('top-16', 'topk'), ('full KL', 'full'))}
    return {'OPRD': partial(update, 1.0, 0.0), **opd, 'OPRD + top-16': partial(update, 1.0, 1.0, kind='topk')}


# ---- rollout: many answers of different lengths ----------------------------------------------------

def rollout_cases(args, place):
    """{name: call} for `rows` answers, `batch` at a time. A token in 1 / 48 of the vocabulary ends one, so
    that lengths are spread as 48 times an exponential, cut at `tokens`. Every case draws the same answers."""
    c = PRESETS[args.model]
    model = init_weights(Model(c), 0).to(place.device, place.dtype).requires_grad_(False)
    prompts = torch.randint(c.V, (args.rows, 32), generator=torch.Generator().manual_seed(0)).tolist()
    how = dict(max_new_tokens=args.tokens, stop=list(range(max(1, c.V // 48))), seed=0)

    def refilled():
        for _ in stream(model, [(p, i, 0) for i, p in enumerate(prompts)], rows=args.batch, **how):
            pass

    def static():
        for i in range(0, args.rows, args.batch):
            some = prompts[i:i + args.batch]
            sample(model, some, which=range(i, i + len(some)), **how)
    return {'refilled': refilled, 'static batches': static}


# ---- pair: the student's answers in the teacher's tokens -------------------------------------------

def pairing(args, place):
    """Cut the questions of a problem set as the student would, pair them with the teacher's tokens."""
    if not (args.tokenizers and args.data):
        raise UserError('pair: give --tokenizers STUDENT TEACHER and --data PROBLEMS')
    tok_s, tok_t = (load_tokenizer(path) for path in args.tokenizers)
    texts = [p.question for p in load_problems(args.data, tok_s, args.rows)]
    texts = [t if isinstance(t, str) else ''.join(m['content'] for m in t) for t in texts]
    answers = [tok_s.encode(t, special=False) for t in texts]
    size = sum(len(tok_s.pieces[i]) for answer in answers for i in answer)
    same, seconds = tok_s.words == tok_t.words, []
    for _ in range(args.repeat):
        began = time.perf_counter()
        inside = [pair_text(answer, tok_s, [0], tok_t, same=same)[2] for answer in answers]
        seconds.append(time.perf_counter() - began)
    count = sum(map(len, inside))
    align = 1 - sum(int(x.sum()) for x in inside) / count
    rate = size / MB / statistics.median(seconds)
    print(f'pair: {len(answers)} texts, {size / MB:.2f} MB, {count} positions, {align:.3f} of them exact; '
          f'{rate:.2f} MB/s on one core; {machine(place)}')
    return {'texts': len(answers), 'bytes': size, 'align': align, 'mb_per_s': rate}


# ---- bridge: one pass beside Algorithm 1 -----------------------------------------------------------

def fits(args, place):
    """Stage 1 of the toy in closed form and as Algorithm 1 does it, on the same answers."""
    made, keys = {}, [f'bridge_prompts={args.rows}', f'device={args.device}', *args.keys]
    print(f'bridge: configs/toy_bridge.py, {args.rows} prompts; {machine(place)}')
    with tempfile.TemporaryDirectory() as tmp:
        for fit in ('ridge', 'adamw'):
            out = Path(tmp) / fit
            if fit == 'adamw':
                out.mkdir()
                shutil.copy(Path(tmp) / 'ridge/rollouts.jsonl', out)
            subprocess.run([sys.executable, ROOT / 'bridge.py', 'configs/toy_bridge.py', f'bridge={out}',
                            f'bridge_fit={fit}', *keys], check=True, stdout=subprocess.DEVNULL)
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
    print(f'AdamW: {more:.0f}x the forwards, {longer:.0f}x the seconds; refitted for each of {len(ranks)} '
          f'ranks, as published, {more * len(ranks):.0f}x and {longer * len(ranks):.0f}x')
    return got


# ---- the table -----------------------------------------------------------------------------------

def machine(place):
    """What the figures were measured on."""
    if place.device.type == 'cuda':
        return torch.cuda.get_device_name()
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def one_case(args, place, cases):
    """Measure one line of a table -> its JSON line."""
    got = measure(cases(args, place)[args.case], args.repeat, place.device)
    where = {'machine': machine(place), 'dtype': str(place.dtype)[6:]} | versions(place)
    return json.dumps({k: v for k, v in vars(args).items() if k not in ('device', 'dtype')} | got | where)


def main(args):
    place = start(args.device, args.dtype)
    if args.what in ('pair', 'bridge'):
        got = (pairing if args.what == 'pair' else fits)(args, place)
        print(json.dumps({'what': args.what, 'machine': machine(place)} | got | versions(place)))
        return
    cases = {'head': head_cases, 'update': update_cases, 'rollout': rollout_cases}[args.what]
    if args.case:
        print(one_case(args, place, cases))
        return
    small = argparse.Namespace(**vars(args) | {'model': 'toy', 'rows': 1, 'tokens': 2})
    ideal = head_ideal(args) if args.what == 'head' else None
    of = f'chunks of {args.chunk}, ideal {ideal:.0f} MB' if ideal else f'of {args.tokens} tokens'
    print(f'{args.what}: {args.model}, {args.rows} rows {of}; {machine(place)}')
    columns = ['peak MB', 'seconds', 'low', 'high', 'time'] + ['peak/ideal'] * bool(ideal)
    print(f'{"":18}' + ''.join(f'{c:>11}' for c in columns))
    first, lines = None, []
    for name in cases(small, place):
        p = subprocess.run([sys.executable, ROOT / 'bench.py', *sys.argv[1:], '--case', name],
                           capture_output=True, text=True)
        if p.returncode:
            why = (p.stderr.strip().splitlines() or ['ended without a word; out of memory?'])[-1]
            print(f'{name:18}  {why[:90]}', flush=True)
            continue
        lines.append(p.stdout.strip().splitlines()[-1])
        r = json.loads(lines[-1])
        first = first or r['seconds']
        cells = [f"{r['peak_mb']:.0f}", *(f'{r[k]:.2f}' for k in ('seconds', 'low', 'high')),
                 f"{r['seconds'] / first:.2f}x"] + ([f"{r['peak_mb'] / ideal:.2f}"] if ideal else [])
        print(f'{name:18}' + ''.join(f'{c:>11}' for c in cells), flush=True)
    print('\n'.join(lines))


def arguments():
    """The command line; sizes that are not given are a few minutes' worth on two cores."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['head', 'update', 'rollout', 'bridge', 'pair'])
    p.add_argument('--model', choices=PRESETS, help='shape (head: r1_1p5b, update: smollm2)')
    p.add_argument('--rows', type=int, help='head: rows under the head (2048); update: answers (4); '
                   'rollout: answers (64); bridge: prompts (512); pair: texts (2000)')
    p.add_argument('--batch', type=int, default=16, help='rollout: answers at a time')
    p.add_argument('--tokens', type=int, default=224, help='update, rollout: tokens of an answer')
    p.add_argument('--chunk', type=int, default=64, help='rows under the head at once')
    p.add_argument('--budget', type=int, default=32768, help='update: tokens of a micro-batch')
    p.add_argument('--checkpointing', action='store_true', help='update: recompute blocks')
    p.add_argument('--repeat', type=int, default=3)
    p.add_argument('--tokenizers', nargs=2, metavar=('STUDENT', 'TEACHER'), help='pair: folders or hub ids')
    p.add_argument('--data', help='pair: a problem set')
    p.add_argument('--keys', nargs='*', default=[], help='bridge: key=value of the config')
    p.add_argument('--device', default='auto')
    p.add_argument('--dtype', default='auto')
    p.add_argument('--case', help='measure one line only')
    args = p.parse_args()
    args.model = args.model or {'head': 'r1_1p5b'}.get(args.what, 'smollm2')
    usual = {'head': 2048, 'update': 4, 'rollout': 64, 'bridge': 512, 'pair': 2000}
    args.rows = args.rows or usual[args.what]
    if min(args.rows, args.tokens, args.chunk, args.repeat) < 1:
        raise UserError('rows, tokens, chunk and repeat begin at 1')
    return args


if __name__ == '__main__':
    run(main, arguments)
