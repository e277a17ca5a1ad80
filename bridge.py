"""
Stage 1 of OPRD-Bridge (section 3.3): a frozen low-rank interface between two models of any width, depth
and vocabulary, found in one pass over the student's own answers.

    1. collect: the student answers bridge_prompts problems; ids go to rollouts.jsonl as they come
    2. read:    both models read them once; for every layer pair, moments are summed in float64
    3. fit:     P_T by eigenvectors of the teacher's covariance (12), P_S by ridge least squares (13),
                in closed form and for every rank at once: rank r is the first r rows
    4. judge:   on held-out prompts, per layer and rank: cosine, R^2, Theorem 3, two controls

Nothing is trained, so nothing is read twice: the paper's twenty epochs (bridge_fit='adamw') are there to
be compared. A teacher with another vocabulary reads the text (teacher.py); positions where it stands
inside one of its tokens (class 1) get a P_S of their own; P_T and the mean are shared.

    python bridge.py configs/toy_bridge.py                         CPU, or one GPU
    torchrun --nproc_per_node=8 bridge.py config/bridge_qwen.py    eight: each reads its share

Writes bridge.safetensors, bridge.json and bridge.png into the folder that the key bridge names, where
distill.py (stage 2) finds them. Run again, it goes on collecting where it stopped. What it does not know:
models too large for one GPU.

Letters: K rows, L layers, d width (d_s, d_t), r rank, R largest rank, i a component of the teacher,
         c class, lam eigenvalues, rho2 share of a component that the student predicts.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from configs import load_config
from cross_tokenizer.pairing import read_rollout
from formats.huggingface import load_model, read_config
from formats.problems import load_problems, prompt_order
from formats.tokenizer import check_ids, load_tokenizer, shared_size, stop_set
from losses import positions
from rollout import Rollout, micro_batches, sample
from studies import toy
from studies.figures import bridges
from support.files import digest, open_safetensors, whole, write_json, write_safetensors
from support.preflight import match_layers
from support.runtime import UserError, all_gather, all_reduce, barrier, print0, run, start

RANKS = [2**i for i in range(13)]
COSINES = ('cos', 'before', 'shuffled', 'mean_only')
KEPT = 256                      # rows of P_T and P_S that are saved; ranks beyond were never the best


# ---- moments ---------------------------------------------------------------------------------

class Moments:
    """Sums over rows of a layer pair, for each class c: count, student x, teacher y, x x', y x', y y'.
    float64: with 28 layers of 2048 and 2560 numbers, 7 GB."""
    def __init__(self, d_s, d_t, device):
        shapes = {'n': (), 'x': (d_s,), 'y': (d_t,), 'xx': (d_s, d_s), 'yx': (d_t, d_s), 'yy': (d_t, d_t)}
        self.sums = {k: torch.zeros(2, *s, dtype=torch.float64, device=device) for k, s in shapes.items()}

    def add(self, x, y, inside):
        """Rows x (K, d_s), y (K, d_t) of classes inside (K,)."""
        m = self.sums
        for c, rows in enumerate((~inside, inside)):
            a, b = x[rows].double(), y[rows].double()
            m['n'][c] += len(a)
            m['x'][c] += a.sum(0)
            m['y'][c] += b.sum(0)
            m['xx'][c].addmm_(a.t(), a)
            m['yx'][c].addmm_(b.t(), a)
            m['yy'][c].addmm_(b.t(), b)

    def reduce(self):
        """Over ranks."""
        for t in self.sums.values():
            all_reduce(t)
        return self

    def central(self, c=None):
        """Means and covariances of class c, or of both together -> n, mx, my, Cxx, Cyx, Cyy."""
        m = {k: t.sum(0) if c is None else t[c] for k, t in self.sums.items()}
        n = m['n'].clamp(min=1)
        mx, my = m['x'] / n, m['y'] / n
        return (int(m['n']), mx, my, m['xx'] / n - torch.outer(mx, mx), m['yx'] / n - torch.outer(my, mx),
                m['yy'] / n - torch.outer(my, my))


# ---- the interface of one layer pair -----------------------------------------------------------

def principal(moments):
    """Eq. (12): mean (d_t,), principal directions P_t (d_t, d_t), a row each, and their variances lam,
    largest first; each row's largest entry is positive, so that machines agree on the signs."""
    _, _, mean, _, _, cov = moments.central()
    lam, vectors = torch.linalg.eigh(cov)
    P_t = vectors.flip(1).t().contiguous()
    sign = P_t.gather(1, P_t.abs().argmax(1, keepdim=True)).sign()
    return mean, P_t * sign, lam.flip(0).clamp(min=0)


def ridge(moments, mean, P_t, penalty, bias):
    """Eq. (13) in closed form: P_s (2, R, d_s) and b_s (2, R), one per class, such that
    P_s x + b_s is nearest to z = P_t (y - mean) in the mean square, plus penalty * mean variance of x
    times |P_s|^2. Components do not mix, so the first r rows are the solution at rank r. Without
    bias, b_s = 0. A class without rows gets zeros."""
    P_s, b_s = [], []
    for c in (0, 1):
        n, mx, my, Cxx, Cyx, _ = moments.central(c)
        z = P_t @ (my - mean)                                                # (R,) mean of z in this class
        if n == 0:
            P_s.append(torch.zeros(len(P_t), len(mx), dtype=mx.dtype, device=mx.device))
            b_s.append(torch.zeros_like(z))
            continue
        if not bias:
            Cxx, Cyx = Cxx + torch.outer(mx, mx), Cyx + torch.outer(my - mean, mx)
        damp = penalty * Cxx.diagonal().mean().clamp(min=1e-30)
        damped = Cxx + damp * torch.eye(len(mx), dtype=mx.dtype, device=mx.device)
        A = torch.linalg.solve(damped, Cyx.t() @ P_t.t()).t()                # (R, d_s)
        P_s.append(A)
        b_s.append(z - A @ mx if bias else torch.zeros_like(z))
    return torch.stack(P_s), torch.stack(b_s)


def predicted(moments, mean, P_t, P_s, b_s):
    """From held-out moments: variance lam (R,) of each component z_i, and rho2 (R,), the share of it that
    the bridge predicts, 1 - E (z - P_s x - b_s)^2 / lam; not below 0."""
    left = 0.0
    every = moments.central()[0]
    for c in (0, 1):
        n, mx, my, Cxx, Cyx, Cyy = moments.central(c)
        A, gap = P_s[c], P_t @ (my - mean) - P_s[c] @ mx - b_s[c]
        zz = ((P_t @ Cyy) * P_t).sum(1)
        zx = ((P_t @ Cyx) * A).sum(1)
        left = left + n / every * (zz - 2 * zx + ((A @ Cxx) * A).sum(1) + gap.square())
    cov = moments.central()[5]
    total = ((P_t @ cov) * P_t).sum(1).clamp(min=1e-30)
    return total, (1 - left / total).clamp(min=0)


def energy(lam, rho2):
    """Theorem 3: E(r) for r = 1..R, = sum_{i>r} lam_i rho2_i + sum_{i<=r} lam_i (1 - rho2_i) (R,):
    direction r is worth having as long as more than half of it can be predicted."""
    missed, wrong = (lam * rho2).flip(0).cumsum(0).flip(0), (lam * (1 - rho2)).cumsum(0)
    return torch.cat([missed[1:], missed.new_zeros(1)]) + wrong


def cosines(z_s, z_t):
    """Mean cosine of rows (K, R) at every rank 1..R -> sums over rows (R,)."""
    dots, s, t = ((a * b).cumsum(1) for a, b in ((z_s, z_t), (z_s, z_s), (z_t, z_t)))        # (K, R)
    return (dots / (s * t).sqrt().clamp(min=1e-12)).sum(0)


# ---- 1. collect ------------------------------------------------------------------------------

def collect(out, student, train, vocab, stop, cfg, place):
    """The student's answers to bridge_prompts problems -> [(problem, answer ids, stopped)], the same on
    every rank. They are appended to out/rollouts.jsonl as they come; what is there is not sampled again."""
    file, n = out / 'rollouts.jsonl', min(cfg['bridge_prompts'], len(train))
    draw = ('seed', 'temperature', 'top_k', 'top_p', 'max_new_tokens')
    keys = ('student', 'data', 'max_prompt_tokens', *draw)
    head = {'made by': digest({k: cfg[k] for k in keys} | {'stop': stop, 'n': n})}
    order = prompt_order(len(train), n, 1, cfg['seed'])
    lines = file.read_text().split('\n') if file.exists() else []
    rows = []
    for number, line in enumerate(lines[:-1], 1):    # the last one is empty, or was cut off
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f'{file}: line {number} is damaged; delete the file to sample anew') from None
    if rows and rows[0] != head:
        raise UserError(f'{file}: sampled with other settings; choose another bridge=, or delete it')
    rows = rows[1:n + 1]
    all_gather(None)                                 # everybody has read before anybody writes
    if place.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(''.join(json.dumps(r) + '\n' for r in [head, *rows]))
    each = max(1, cfg['eval_rows']) * place.world
    quiet = place.rank > 0 or None                   # None: shown on a terminal only
    with tqdm(total=n, initial=len(rows), desc='collect', unit='answer', disable=quiet) as bar:
        while len(rows) < n:
            slots = range(len(rows), min(len(rows) + each, n))
            mine = slots[place.rank::place.world]
            new = {}
            if mine:
                roll = sample(student, [train[order[i]].ids for i in mine], which=list(mine), step=-2,
                              stop=stop, vocab=vocab, **{k: cfg[k] for k in draw})
                new = dict(zip(mine, zip(roll.answers(), roll.stopped.tolist(), strict=True), strict=True))
            new = {i: row for part in all_gather(new) for i, row in part.items()}
            some = [[order[i], *new[i]] for i in slots]
            rows += some
            if place.rank == 0:
                with file.open('a') as f:
                    f.writelines(json.dumps(r) + '\n' for r in some)
            bar.update(len(some))
    return rows


def as_rollout(rows, train, device):
    """Rows of `collect` -> Rollout; its `prompt` is the problem's number."""
    prompts = [train[i].ids for i, _, _ in rows]
    P, n = (torch.tensor([len(x) for x in xs]) for xs in (prompts, [a for _, a, _ in rows]))
    ids = torch.zeros(len(rows), int((P + n).max()), dtype=torch.long)
    for row, prompt, (_, answer, _) in zip(ids, prompts, rows, strict=True):
        row[:len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    return Rollout(*(t.to(device) for t in (ids, P, n, torch.tensor([s for _, _, s in rows]),
                                            torch.tensor([i for i, _, _ in rows]))))


# ---- 2. read ---------------------------------------------------------------------------------

class Pair:
    """Both models and how they read the student's answers. phi: {student layer: teacher layer}."""
    def __init__(self, student, teacher, tok_s, tok_t, train, phi, cfg, place):
        self.models, self.toks, self.train, self.phi = (student, teacher), (tok_s, tok_t), train, phi
        self.cfg, self.place = cfg, place
        self.aligned, self.forwards = [], 0

    @torch.no_grad()
    def read(self, rows, name='', layers_t=None):
        """This rank's share of `rows`, by micro-batches -> x {student layer: (K, d_s)}, y {teacher layer:
        (K, d_t)}, inside (K,). name: of a progress bar. layers_t: if not those of phi."""
        cfg, place, (student, teacher) = self.cfg, self.place, self.models
        mine = rows[place.rank::place.world]
        groups = micro_batches([len(self.train[i].ids) + len(a) for i, a, _ in mine], cfg['token_budget'])
        layers_t = layers_t or sorted(set(self.phi.values()))
        for group in tqdm(groups, desc=name, leave=False, disable=not name or place.rank > 0 or None):
            roll = as_rollout([mine[i] for i in group], self.train, place.device)
            prompts_t = {i: self.toks[1].chat(self.train[i].question) for i in set(roll.prompt.tolist())}
            seen = read_rollout(roll, prompts_t, *self.toks, teacher.config.context, cfg['pair'],
                                cfg['teacher_ids'])
            keep = positions(roll, cfg['positions'], cfg.get(cfg['positions'], 0)) & (seen.at >= 0)
            row = torch.arange(len(roll.ids), device=place.device)[:, None]  # (b, 1)
            at_t = (row * seen.ids.shape[1] + seen.at)[keep]                 # (K,)
            y = dict(zip(layers_t, teacher.hidden(seen.ids, layers_t, at_t), strict=True))
            x = student.hidden(roll.ids, list(self.phi), keep.flatten().nonzero().squeeze(-1))
            tokens = int(roll.resp_len.sum())
            self.aligned.append((seen.align * tokens, tokens))
            self.forwards += len(group)
            yield dict(zip(self.phi, x, strict=True)), y, seen.inside[keep]

    def match(self, rows, most=1024):
        """phi by linear CKA: for each student layer the teacher layer whose centred states have the most
        alike inner products, |x'y|^2 / (|x'x| |y'y|), over `most` positions of sixteen answers."""
        every, got = list(range(1, self.models[1].config.L + 1)), []
        for x, y, _ in self.read(rows[:16 * self.place.world], 'cka', every):
            got.append((x, y))
        grams = []
        for side in (0, 1):
            states = {l: torch.cat([part[side][l] for part in got]) for l in got[0][side]}
            centred = {l: h[:: 1 + len(h) // most].double() for l, h in states.items()}
            centred = {l: h - h.mean(0) for l, h in centred.items()}
            grams.append({l: torch.nn.functional.normalize((h @ h.t()).flatten(), dim=0)
                          for l, h in centred.items()})
        phi = {l: max(every, key=lambda t, g=g: float(g @ grams[1][t])) for l, g in grams[0].items()}
        self.phi = all_gather(phi)[0]

    def moments(self, rows, name, shuffle=False):
        """{l: Moments} over rows, summed over ranks. shuffle: pairs torn apart, half a batch along."""
        d_s, d_t = (m.config.d for m in self.models)
        sums = {l: Moments(d_s, d_t, self.place.device) for l in self.phi}
        for x, y, inside in self.read(rows, name):
            for l, t in self.phi.items():
                sums[l].add(x[l], y[t].roll(len(inside) // 2, 0) if shuffle else y[t], inside)
        return {l: m.reduce() for l, m in sums.items()}


# ---- 3. fit ----------------------------------------------------------------------------------

def adamw_fit(pair, rows, frames, R, lr, seed, epochs=20, batch=16):
    """Eq. (13) as Algorithm 1 does it: `epochs` passes of AdamW over batches of answers, both models reading
    everything again in each -> {l: (P_s, b_s)}. One P_s for both classes, no bias. Components do not mix,
    nor do AdamW's steps, so this too is every rank at once."""
    d_s, g = pair.models[0].config.d, torch.Generator().manual_seed(seed)
    P = {l: (torch.randn(R, d_s, generator=g) * d_s**-0.5).to(pair.place.device).requires_grad_()
         for l in pair.phi}
    opt = torch.optim.AdamW(P.values(), lr=lr)
    target = {l: [v.float() for v in frames[l][:2]] for l in P}
    some = max(batch, pair.place.world)
    starts = range(0, len(rows) - pair.place.world + 1, some)                # a row for every rank, at least
    with tqdm(total=epochs * len(starts), desc='adamw', disable=pair.place.rank > 0 or None) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=g).tolist()
            for i in starts:
                count = torch.zeros((), device=pair.place.device)
                for x, y, inside in pair.read([rows[j] for j in order[i:i + some]]):
                    count += len(inside)
                    for l, t in pair.phi.items():
                        mean, P_t = target[l]
                        gap = x[l].float() @ P[l].t() - (y[t].float() - mean) @ P_t.t()      # (K, R)
                        gap.square().sum().backward()
                all_reduce(count)
                for p in P.values():
                    all_reduce(p.grad).div_(count.clamp(min=1))
                opt.step()
                opt.zero_grad()
                bar.update()
    zeros = torch.zeros(2, R, dtype=torch.float64, device=pair.place.device)
    return {l: (p.detach().double().expand(2, -1, -1), zeros) for l, p in P.items()}


# ---- stage 2's side --------------------------------------------------------------------------

@dataclass
class Bridge:
    """A bridge read back: rank r rows of everything, float32, by student layer."""
    phi: dict                   # {student layer: teacher layer}
    rank: int
    mean: dict                  # {l: (d_t,)}
    P_t: dict                   # {l: (r, d_t)}
    P_s: dict                   # {l: (2, r, d_s)}
    b_s: dict                   # {l: (2, r)}

    def teacher(self, l, y):
        """Teacher rows (K, d_t) of student layer l -> (K, r)."""
        return (y.float() - self.mean[l]) @ self.P_t[l].t()


def load_bridge(path, rank, layers, about, device):
    """bridge.safetensors -> Bridge of `rank` (0: Theorem 3's) for student layers `layers`. about: what it
    must have been made for, as `made_for` says; anything else is a UserError that names it."""
    file = Path(path) / 'bridge.safetensors' if Path(path).is_dir() else Path(path)
    saved = open_safetensors(file)
    try:
        made = json.loads((saved.metadata() or {})['bridge'])
    except (KeyError, ValueError):
        raise UserError(f'{file}: not a bridge; make one with bridge.py') from None
    for key, value in about.items():
        if made.get(key) != value:
            raise UserError(f'{file}: made for {key}={made.get(key)!r}, but here it is {value!r}; '
                            'rerun bridge.py')
    missing = [l for l in layers if str(l) not in made['phi']]
    if missing:
        raise UserError(f"{file}: has no layer {missing[0]}; set layers=[{','.join(made['phi'])}], or "
                        'rerun bridge.py')
    rank = rank or made['rank']
    parts = {name: {l: saved.get_tensor(f'{name}.{l}').to(device) for l in layers}
             for name in ('mean', 'P_t', 'P_s', 'b_s')}
    most = min(len(P) for P in parts['P_t'].values())
    if rank > most:
        raise UserError(f'{file}: rank {most}, but bridge_rank={rank}; lower it, or rerun bridge.py with '
                        'more prompts')
    phi = {l: made['phi'][str(l)] for l in layers}
    return Bridge(phi, rank, parts['mean'], {l: P[:rank] for l, P in parts['P_t'].items()},
                  {l: P[:, :rank].contiguous() for l, P in parts['P_s'].items()},
                  {l: b[:, :rank].contiguous() for l, b in parts['b_s'].items()})


def made_for(cfg, student, teacher, tok_s, tok_t):
    """What a bridge is tied to: both models, their shapes and tokenizers, and how the teacher reads."""
    return {'student': cfg['student'], 'teacher': cfg['teacher'], 'd': [student.d, teacher.d],
            'L': [student.L, teacher.L],
            'tokens': [digest(sorted(map(str, t.words.items()))) for t in (tok_s, tok_t)],
            **{k: cfg[k] for k in ('pair', 'teacher_ids', 'layer_map')}}


# ---- 4. judge --------------------------------------------------------------------------------

def judge(pair, rows, bridge, seed):
    """Held-out rows through a bridge {l: (mean, P_t, P_s, b_s)} -> {l: {name: (R,) or number}}: mean cosine
    at every rank of the fit ('cos'), of a random P_s ('before'), of pairs shuffled within a batch
    ('shuffled') and of the mean alone, P_s x left out ('mean_only'); lam, rho2, E of Theorem 3."""
    g = torch.Generator().manual_seed(seed)
    R = len(next(iter(bridge.values()))[3][0])
    sums = {l: torch.zeros(4, R, dtype=torch.float64, device=pair.place.device) for l in bridge}
    d_s, d_t = (m.config.d for m in pair.models)
    random = torch.randn(R, d_s, generator=g, dtype=torch.float64).to(pair.place.device)
    moments = {l: Moments(d_s, d_t, pair.place.device) for l in bridge}
    for xs, ys, inside in pair.read(rows, 'judge'):
        c = inside.long()
        for l, (mean, P_t, P_s, b_s) in bridge.items():
            x, y = xs[l].double(), ys[pair.phi[l]].double()
            moments[l].add(x, y, inside)
            z = (y - mean) @ P_t.t()                                         # (K, R)
            each = torch.where(inside[:, None], x @ P_s[1].t(), x @ P_s[0].t()) + b_s[c]
            middle = [x[c == k].mean(0) if (c == k).any() else x[0] for k in (0, 1)]
            flat = torch.stack([middle[k] @ P_s[k].t() + b_s[k] for k in (0, 1)])[c]
            for i, guess in enumerate((each, x @ random.t(), each.roll(len(each) // 2, 0), flat)):
                sums[l][i] += cosines(guess, z)
    out = {}
    for l, m in moments.items():
        count = m.reduce().central()[0]
        lam, rho2 = predicted(m, *bridge[l])
        out[l] = dict(zip(COSINES, all_reduce(sums[l]) / count, strict=True)) | {
            'rows': count, 'class 1': float(m.sums['n'][1]) / count, 'lam': lam, 'rho2': rho2,
            'E': energy(lam, rho2), 'total': float(m.central()[5].diagonal().sum())}
    return out


def best_rank(judged):
    """Theorem 3's rank for all layers together: least sum of E(r), each in units of its variance."""
    return int(sum(v['E'] / v['total'] for v in judged.values()).argmin()) + 1


def report(judged, phi, rank, align, forwards, seconds):
    """What was measured -> a JSON dict, and the lines of a table: mean over layers, and the last layer.
    rank: the one that will be used; 0: Theorem 3's."""
    R, last, best = len(next(iter(judged.values()))['cos']), max(judged), best_rank(judged)
    used = min(rank or best, R)
    ranks = sorted({r for r in RANKS if r < R} | {R, used})
    layers = {str(l): {'teacher layer': phi[l], 'rows': v['rows'], 'variance': v['total'],
                       **{k: {str(r): float(v[k][r - 1]) for r in ranks} for k in COSINES},
                       'R2': {str(r): float((v['lam'] * v['rho2'])[:r].sum() / v['lam'][:r].sum())
                              for r in ranks},
                       'explained': {str(r): float(v['lam'][:r].sum() / v['total']) for r in ranks},
                       'E': {str(r): float(v['E'][r - 1] / v['total']) for r in ranks},
                       'rho2': [float(x) for x in v['rho2'][:64]], 'best rank': int(v['E'].argmin()) + 1}
              for l, v in judged.items()}
    columns = ('cosine', 'last layer', 'R2', 'explained', 'shuffled', 'mean only', 'before')
    lines = [f'{"rank":>6}' + ''.join(f'{c:>12}' for c in columns)]
    for r in map(str, ranks):
        mean = {k: sum(v[k][r] for v in layers.values()) / len(layers) for k in (*COSINES, 'R2', 'explained')}
        rest = ('R2', 'explained', 'shuffled', 'mean_only', 'before')
        cells = [mean['cos'], layers[str(last)]['cos'][r], *(mean[k] for k in rest)]
        lines.append(f'{r:>6}' + ''.join(f'{x:12.3f}' for x in cells))
    lines.append(f"Theorem 3's rank: {best}; align {align:.3f}; {forwards:g} forward(s) per answer and model")
    return {'rank': best, 'used': used, 'align': align, 'forwards per answer': forwards, 'seconds': seconds,
            'layers': layers}, lines


# ---- all of it -------------------------------------------------------------------------------

def main(cfg):
    place = start(cfg['device'], cfg['dtype'])
    for key in ('student', 'teacher', 'data', 'bridge'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; set {key}= (see configs/toy_bridge.py)")
    cfg = toy.prepare(cfg, place)
    out = Path(cfg['bridge'])
    tok_s, tok_t = (load_tokenizer(cfg[side], enable_thinking=cfg['enable_thinking'])
                    for side in ('student', 'teacher'))
    for side, tok in (('student', tok_s), ('teacher', tok_t)):
        check_ids(side, read_config(cfg[side]).V, tok)
    phi = match_layers(cfg, *(read_config(cfg[side]).L for side in ('student', 'teacher')))
    train = load_problems(cfg['data'], tok_s, longest=cfg['max_prompt_tokens'])
    student, teacher = (load_model(cfg[side], place.dtype, place.device).requires_grad_(False)
                        for side in ('student', 'teacher'))
    stop = stop_set(tok_s, tok_t)
    rows = collect(out, student, train, shared_size(tok_s, tok_t), stop, cfg, place)
    held = max(1, round(cfg['bridge_held_out'] * len(rows)))      # whole prompts, never rows of one
    fit_rows, held_rows = rows[:-held], rows[-held:]
    if len(fit_rows) < place.world or held < place.world:
        raise UserError(f'{len(rows)} answers, {held} of them held out, for {place.world} rank(s); raise '
                        'bridge_prompts')

    pair = Pair(student, teacher, tok_s, tok_t, train, phi, cfg, place)
    clock = time.perf_counter()
    if cfg['layer_map'] == 'cka':
        pair.match(fit_rows)
        print0(f'layers by CKA: {pair.phi}')
    moments = pair.moments(fit_rows, 'fit', cfg['bridge_fit'] == 'shuffled')
    bridge = {}
    for l, m in moments.items():
        mean, P_t, lam = principal(m)
        count = int(m.central()[0])
        R = min(KEPT, len(P_t), student.config.d, count - 1)
        if R < 1 or lam.sum() <= 1e-12 * mean.square().sum():
            raise UserError(f'layer {l}: {count} rows of the teacher that do not vary; nothing to bridge, '
                            'look at data= and positions=')
        bridge[l] = mean, P_t[:R], *ridge(m, mean, P_t[:R], cfg['bridge_ridge'], cfg['bridge_bias'])
    if cfg['bridge_fit'] == 'adamw':
        fitted = adamw_fit(pair, fit_rows, bridge, R, cfg['bridge_lr'], cfg['seed'])
        bridge = {l: (*bridge[l][:2], *fitted[l]) for l in bridge}
    if cfg['bridge_fit'] == 'random':
        g = torch.Generator().manual_seed(cfg['seed'])
        for l, (mean, P_t, P_s, b_s) in bridge.items():
            noise = torch.randn(P_s.shape[1:], generator=g).to(P_s) * student.config.d**-0.5
            bridge[l] = mean, P_t, noise.expand_as(P_s).contiguous(), torch.zeros_like(b_s)
    forwards = pair.forwards / max(1, len(fit_rows[place.rank::place.world]))
    seconds = time.perf_counter() - clock
    judged = judge(pair, held_rows, bridge, cfg['seed'])
    same, count = (sum(x) for x in zip(*pair.aligned, strict=True))
    same, count = all_reduce(torch.tensor([same, count], dtype=torch.float64, device=place.device)).tolist()
    figures, lines = report(judged, pair.phi, cfg['bridge_rank'], same / count, forwards, seconds)
    print0('\n'.join(lines))
    if place.rank == 0:
        write_bridge(out, bridge, figures, cfg, pair, tok_s, tok_t)
        bridges([out], out / 'bridge.png')
        print0(f'{out}: bridge.safetensors, bridge.json, bridge.png; {seconds:.1f} s for the fit')
    barrier()


def write_bridge(out, bridge, figures, cfg, pair, tok_s, tok_t):
    """bridge.safetensors: mean, P_t, P_s, b_s of each student layer in float32, and what they were made
    for; bridge.json: the same figures for people."""
    student, teacher = (m.config for m in pair.models)
    how = ('positions', 'bridge_prompts', 'bridge_held_out', 'bridge_fit', 'bridge_ridge', 'bridge_bias')
    made = made_for(cfg, student, teacher, tok_s, tok_t) | {k: cfg[k] for k in how}
    made['phi'] = {str(l): t for l, t in pair.phi.items()}
    tensors = {f'{name}.{l}': t.float().contiguous().cpu() for l, parts in bridge.items()
               for name, t in zip(('mean', 'P_t', 'P_s', 'b_s'), parts, strict=True)}
    with whole(out / 'bridge.safetensors') as tmp:
        write_safetensors(tensors, tmp, {'bridge': json.dumps(made | {'rank': figures['rank']})})
    write_json(out / 'bridge.json', made | figures)


if __name__ == '__main__':
    run(main, load_config)
