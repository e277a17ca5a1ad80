"""
The student's own answers: a KV-cached batched sampler, and the naive one it must equal.

The slow text is `naive`: read everything again for every token. `Places` holds the answers in the making:
it reads each prompt once, copies its cache for its answers, then feeds one token a row. Decoding lives on
memory bandwidth: every token reads every weight, so on CUDA a step with its sampling is one CUDA graph,
and the host looks in only every 32 tokens. `stream` is the schedule: a finished row's place goes to the
next answer that waits (continuous batching), or, if none does, leaves the batch. `sample` is a stream
with a place for all.

Randomness is counter-based: the uniform number behind a token is a function of (seed, step, prompt,
sample, position) alone. So an answer does not depend on its batch neighbours, on the number of
ranks, or on a restart, and there is no generator state to save. (Logits of a row may differ in the
last bit between batch shapes, as matrix products do; a token changes only if its uniform number
falls within that bit.)

Letters: B rows, T tokens, V vocabulary.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from model import Cache


@dataclass
class Rollout:
    """Sampled answers, right-padded with id 0. Lengths, never ids, say what is padding."""
    ids: torch.Tensor           # (B, T) prompt, answer, padding
    prompt_len: torch.Tensor    # (B,)
    resp_len: torch.Tensor      # (B,) tokens sampled, the stop token included
    stopped: torch.Tensor       # (B,) True: ended by a stop token; False: cut at max_new_tokens
    prompt: torch.Tensor        # (B,) index of the row's prompt in the call's list

    @property
    def length(self):
        return self.prompt_len + self.resp_len

    def answers(self):
        """Each row's sampled ids, as lists."""
        spans = zip(self.ids.tolist(), self.prompt_len.tolist(), self.length.tolist(), strict=True)
        return [ids[a:b] for ids, a, b in spans]


# ---- randomness: splitmix64, one stream per sample --------------------------------------------

GOLDEN = -0x61c8864680b583eb    # 2^64 / golden ratio, as a signed 64-bit number


def signed(x):
    """A Python integer, modulo 2^64, as the signed 64-bit number torch holds."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def mix(z):
    """Splitmix64's finaliser on an int64 tensor; products wrap, shifts are made logical by masks."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * signed(0xbf58476d1ce4e5b9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * signed(0x94d049bb133111eb)
    return z ^ (z >> 31 & (1 << 33) - 1)


def stream_keys(seed, step, prompt, sample):
    """Start of each sample's stream; prompt and sample are int64 tensors (B,) -> (B,)."""
    key = torch.zeros_like(prompt)
    for part in (signed(seed), signed(step), prompt, sample):
        key = mix(key + GOLDEN ^ part)
    return key


def uniform(keys, position):
    """The number of each stream at `position`, an int or (B,) -> float64 (B,) in [0, 1), 53 bits."""
    if keys.device.type == 'mps':            # no float64 there
        keys, position = keys.cpu(), torch.as_tensor(position).cpu()
    step = (position + 1) * GOLDEN if torch.is_tensor(position) else signed(GOLDEN * (position + 1))
    return (mix(keys + step) >> 11 & (1 << 53) - 1).double() * 2.0**-53


# ---- one token --------------------------------------------------------------------------------

def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, V) -> probabilities (B, V) in fp32: temperature, then top-k, then top-p of what is
    left. Ties at the k-th place all stay. Sums to 1 up to rounding."""
    p = (logits.float() / temperature).softmax(-1)
    if 0 < top_k < p.shape[-1]:
        p = p.where(p >= p.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1:
        p = p / p.sum(-1, keepdim=True)
        ranked, order = p.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked                  # mass of the likelier ones
        p = torch.zeros_like(p).scatter(-1, order, ranked.where(before < top_p, 0.0))
    return p


def invert(mass, x):
    """First place of each row where the cumulative mass (B, n) passes x (B, 1), whose own mass is therefore
    positive: x, though it was rounded, stays below the total. -> (B, 1)."""
    x = torch.minimum(x, torch.nextafter(mass[:, -1:], torch.zeros_like(x)))
    return torch.searchsorted(mass, x, right=True).clamp(max=mass.shape[-1] - 1)     # NaN would be beyond


def pick(logits, u, temperature=1.0, top_k=0, top_p=1.0, vocab=None):
    """One token a row by inverting the cumulative distribution at u (B,) in [0, 1) -> (B,).

    In float64: with 150k tokens an fp32 sum could end below 1 and hand the rest to a token that
    top-p removed. A large vocabulary in two stages, a block of 512 tokens and then a token of it, so that
    no running sum is as long as a row. Temperature 0 is greedy. vocab: ids from here on are padding of the
    embedding that no token stands for, and are never drawn.
    """
    logits = logits[:, :vocab]
    if temperature == 0:
        return logits.argmax(-1)
    p = distribution(logits, temperature, top_k, top_p).to(u.device)         # (B, V)
    B, V = p.shape
    if V <= 4096:
        mass = p.to(u).cumsum(-1)
        token = invert(mass, u[:, None] * mass[:, -1:])
    else:
        p = F.pad(p, (0, -V % 512)).view(B, -1, 512)
        mass = F.pad(p.sum(-1, dtype=u.dtype).cumsum(-1), (1, 0))            # (B, 1 + blocks)
        x = u[:, None] * mass[:, -1:]
        block = invert(mass[:, 1:].contiguous(), x)                          # (B, 1)
        inside = p.take_along_dim(block[..., None], 1).squeeze(1).to(u).cumsum(-1)       # (B, 512)
        token = block * 512 + invert(inside, x - mass.gather(-1, block))
    # logits of NaN could give any: stay in the vocabulary, so that the loss says what is wrong
    return token.squeeze(-1).clamp(max=V - 1).to(logits.device)


# ---- whole answers ----------------------------------------------------------------------------

def limits(max_new_tokens, n):
    """A number, or one for each of n answers -> a list."""
    return max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * n


def layout(prompts, n, max_new_tokens, which, device):
    """Right-padded prompts, n rows each -> an empty Rollout and (prompt, sample) numbers of its rows."""
    P = torch.tensor([len(p) for p in prompts])
    ids = torch.zeros(len(prompts), int(P.max()) + max(limits(max_new_tokens, 1)), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[:len(prompt)] = torch.tensor(prompt)
    which = torch.arange(len(prompts)) if which is None else torch.as_tensor(which)
    prompt = torch.arange(len(prompts)).repeat_interleave(n)                 # (B,)
    none = torch.zeros_like(prompt)
    roll = Rollout(*(x.to(device) for x in (ids[prompt], P[prompt], none, none.bool(), prompt)))
    return roll, which.to(device)[roll.prompt], torch.arange(n, device=device).repeat(len(prompts))


@torch.no_grad()
def naive(model, prompts, n=1, *, max_new_tokens, stop, seed=0, step=0, which=None, **how):
    """What `sample` computes, written down: every token reads the whole text again. Same arguments."""
    roll, prompt, number = layout(prompts, n, max_new_tokens, which, model.embed.weight.device)
    keys = stream_keys(seed, step, prompt, number)
    for b in range(len(roll.ids)):
        for position in range(limits(max_new_tokens, len(keys))[b]):
            end = int(roll.length[b])
            logits = model(roll.ids[b:b + 1, :end])[:, -1]
            token = pick(logits, uniform(keys[b:b + 1], position), **how)
            roll.ids[b, end] = token
            roll.resp_len[b] += 1
            if token.item() in stop:
                roll.stopped[b] = True
                break
    return trim(roll)


ROOM = 1024                     # tokens beyond the longest prompt that a cache begins with


class Replay:
    """A function of tensors that stay where they are, as one CUDA graph: the first call runs it, which
    compiles its kernels, the second records it, and from then on a call is a single launch. It holds no
    reference to the function: a cycle would keep the cache until Python's collector comes by."""
    def __init__(self):
        self.graph, self.warm = None, False

    def __call__(self, step):
        if self.graph is None and self.warm:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):    # records, runs nothing
                step()
            self.graph = graph
        if self.graph is None:
            step()
            self.warm = True
        else:
            self.graph.replay()


class Places:
    """B answers in the making. What a step touches are tensors of fixed size and place (until `keep` or
    `grow` makes others), and it looks at no value: so it can be recorded.

    limit: the longest a prompt with its answer may become. longest: the longest prompt. The rest is as
    in `stream`.
    """
    def __init__(self, model, B, longest, limit, stop, seed, step, budget, how):
        c, device = model.config, model.embed.weight.device
        self.model, self.seed, self.at_step, self.budget, self.how = model, seed, step, budget, how
        self.cache = Cache(c, B, min(limit, longest + ROOM), device, model.embed.weight.dtype, limit)
        self.ids = torch.zeros(B, limit + 1, dtype=torch.long, device=device)            # last: never read
        self.token, self.count, self.most, self.keys, self.cache.length = (
            torch.zeros(B, dtype=torch.long, device=device) for _ in range(5))
        self.done, self.stopped = (torch.ones(B, dtype=torch.bool, device=device) for _ in range(2))
        self.ends = torch.zeros(c.V, dtype=torch.bool, device=device)
        self.ends[[t for t in stop if t < c.V]] = True
        self.every = torch.arange(B, device=device)
        self.moved()

    def moved(self):
        """Tensors are elsewhere: a graph of the old ones would read where they were."""
        self.replay = Replay() if kernels.fused(self.model.embed.weight) else None

    def advance(self):
        """`step`, replayed where there are graphs."""
        if self.replay:
            self.replay(self.step)
        else:
            self.step()

    def draw(self, at, logits):
        """The next token of the places `at` (n,), logits (n, V)."""
        t = pick(logits, uniform(self.keys[at], self.count[at]), **self.how)
        going = ~self.done[at]
        self.ids[at, self.count[at]] = t
        self.count[at] += going
        self.token[at] = t
        ended = self.ends[t] & going
        self.stopped[at] |= ended
        self.done[at] |= ended | (self.count[at] == self.most[at])

    def step(self):
        """One more token in every place; finished ones write into the void."""
        logits = self.model(self.token[:, None], self.cache)[:, 0]                       # (B, V)
        self.cache.length += ~self.done
        self.draw(self.every, logits)

    def fill(self, places, requests, most):
        """Read the prompts of `requests`, each once, and draw the first token of each answer, in `places`."""
        c, device = self.model.config, self.ids.device
        put = partial(torch.tensor, device=device)
        own = list({id(p): p for p, _, _ in requests}.values())              # an answer's neighbours share it
        number = {id(p): i for i, p in enumerate(own)}
        of = [number[id(p)] for p, _, _ in requests]
        T, states = max(map(len, own)), []
        read = put([p + [0] * (T - len(p)) for p in own])                    # (prompts, T)
        length, each = put([len(p) for p in own]), max(1, self.budget // T)
        for i in range(0, len(own), each):   # so many prompts at once; one longer than that is read in pieces
            # right padding is harmless: causal attention never looks right, and the padding's keys are
            # overwritten by answers before any row's length reaches them
            last, state = length[i:i + each] - 1, 0.0
            row = torch.arange(len(last), device=device)
            new = Cache(c, len(last), T, device, self.cache.kv[0].dtype, self.cache.limit)
            for a in range(0, T, self.budget):
                h = self.model.trunk(read[i:i + each, a:a + self.budget], new)           # (n, T', d)
                here = (last // self.budget == a // self.budget)[:, None]
                state = torch.where(here, h[row, (last - a).clamp(0, h.shape[1] - 1)], state)    # (n, d)
            states.append(state)
            mine = [j for j, p in enumerate(of) if i <= p < i + each]
            self.cache.put(put([places[j] for j in mine]), new, put([of[j] - i for j in mine]))
        logits = self.model.head(torch.cat(states))                          # (prompts, V)
        at, of, (_, prompt, sample) = put(places), put(of), zip(*requests, strict=True)
        self.keys[at] = stream_keys(self.seed, self.at_step, put(prompt), put(sample))
        self.count[at], self.most[at] = 0, put(most)
        self.done[at], self.stopped[at], self.cache.length[at] = False, False, length[of]
        self.draw(at, logits[of])

    def look(self):
        """Wait for the device once -> done, stopped, count, tokens held, a list of each."""
        return torch.stack([self.done, self.stopped, self.count, self.cache.length]).tolist()

    def take(self, places):
        """The ids in these, a list of each; they are free, and shall not make the others wait."""
        self.cache.length[places] = 0
        return self.ids[places].tolist()

    def keep(self, places):
        """Free places leave the batch."""
        rows = torch.tensor(places, device=self.ids.device)
        self.cache.rows(rows)
        for name in ('ids', 'token', 'count', 'most', 'keys', 'done', 'stopped'):
            setattr(self, name, getattr(self, name)[rows])
        self.every = self.every[:len(rows)]
        self.moved()

    def reserve(self, held, tokens):
        """Room for so many more tokens, the longest row holding `held`."""
        self.cache.longest = held
        if held + tokens > self.cache.room and self.cache.room < self.cache.limit:
            self.cache.grow(held + tokens)
            self.moved()


@torch.no_grad()
def stream(model, requests, *, rows, max_new_tokens, stop, seed=0, step=0, budget=32768, look=0, **how):
    """Answers as they end -> (index of the request, its ids, ended by a stop token?), one by one.

    requests: (prompt ids, prompt number, sample number) each; seed, step and the two numbers fix the answer,
    whatever is answered beside it. rows: answers in the making at once, which bounds the cache. budget:
    tokens of prompts read at once. look: tokens between looks at which rows are done, each of which waits for
    the device; 0: 32 on CUDA, else 1. max_new_tokens: a number, or one for each request. The rest is as in
    `sample`.
    """
    n, cuda = len(requests), model.embed.weight.is_cuda
    most = limits(max_new_tokens, n)
    longest = max(len(p) for p, _, _ in requests)
    limit = max(len(p) + m for (p, _, _), m in zip(requests, most, strict=True))
    places = Places(model, min(rows, n), longest, limit, stop, seed, step, budget, how)
    who, begun, look = [-1] * min(rows, n), 0, look or (32 if cuda else 1)   # request in each place, or -1
    crowd = 0.5 if cuda else 0.75    # rows leave when so many are left: on CUDA a graph is recorded anew
    while True:
        done, stopped, count, held = places.look()
        over = [b for b, i in enumerate(who) if i >= 0 and done[b]]
        if over:
            for b, ids in zip(over, places.take(over), strict=True):
                yield who[b], ids[:count[b]], bool(stopped[b])
                who[b], held[b] = -1, 0
        free = [b for b, i in enumerate(who) if i < 0]
        if begun < n and len(free) >= max(1, len(who) // 8):     # some at once: a prompt is read as slowly
            free = free[:n - begun]                              # as a token or two
            end = begun + len(free)
            places.fill(free, requests[begun:end], most[begun:end])
            for b in free:
                who[b], begun = begun, begun + 1
            continue
        if len(free) == len(who):
            return
        if begun == n and len(who) - len(free) <= crowd * len(who):          # nobody waits: rows leave
            busy = [b for b, i in enumerate(who) if i >= 0]
            places.keep(busy)
            who, held, count = ([x[b] for b in busy] for x in (who, held, count))
        left = min(look, max(most[i] - count[b] for b, i in enumerate(who) if i >= 0))
        places.reserve(max(held), left)
        for _ in range(left):
            places.advance()


def sample(model, prompts, n=1, *, max_new_tokens, stop, seed=0, step=0, which=None, progress='', **how):
    """n answers to each prompt -> Rollout of B = len(prompts) * n rows, a prompt's rows together.

    prompts: lists of ids. max_new_tokens: a number, or a list of one for each of the B answers. stop: ids
    that end an answer. how: temperature, top_k, top_p, vocab as in pick.
    which: each prompt's number in its problem set (default: its place in the list); with seed, step
    and the sample's number it fixes the answer. progress: label of a progress bar on a terminal.
    """
    roll, prompt, number = layout(prompts, n, max_new_tokens, which, model.embed.weight.device)
    requests = [(prompts[i], q, k) for i, q, k in zip(*(x.tolist() for x in (roll.prompt, prompt, number)),
                                                      strict=True)]
    answers = stream(model, requests, rows=len(requests), max_new_tokens=max_new_tokens, stop=stop,
                     seed=seed, step=step, **how)
    ids, P = roll.ids.cpu(), roll.prompt_len.tolist()
    for b, answer, stopped in tqdm(answers, total=len(requests), desc=progress, unit='answer', leave=False,
                                   disable=None if progress else True):
        ids[b, P[b]:P[b] + len(answer)] = torch.tensor(answer)
        roll.resp_len[b], roll.stopped[b] = len(answer), stopped
    roll.ids = ids.to(roll.ids.device)
    return trim(roll)


def trim(roll):
    """Cut columns that no row uses."""
    roll.ids = roll.ids[:, :int(roll.length.max())]
    return roll


def micro_batches(lengths, budget):
    """Row lengths -> groups of row indices, longest first, each at most `budget` tokens with padding
    (a longer row goes alone)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
