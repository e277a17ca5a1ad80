"""
The student's own answers: a KV-cached batched sampler, and the naive one it must equal.

The slow text is `naive`: read everything again for every token. `stream` reads each prompt once, copies
its cache for its answers, then feeds one token a row. A finished row's place goes to the next answer that
waits (continuous batching), or, if none does, leaves the batch. `sample` is a stream with a row for all.

Randomness is counter-based: the uniform number behind a token is a function of (seed, step, prompt,
sample, position) alone. So an answer does not depend on its batch neighbours, on the number of
ranks, or on a restart, and there is no generator state to save. (Logits of a row may differ in the
last bit between batch shapes, as matrix products do; a token changes only if its uniform number
falls within that bit.)

Letters: B rows, T tokens, V vocabulary.
"""
from dataclasses import dataclass

import torch
from tqdm import tqdm

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


def pick(logits, u, temperature=1.0, top_k=0, top_p=1.0, vocab=None):
    """One token a row by inverting the cumulative distribution at u (B,) in [0, 1) -> (B,).

    In float64: with 150k tokens an fp32 sum could end below 1 and hand the rest to a token that
    top-p removed. Temperature 0 is greedy. vocab: ids from here on are padding of the embedding
    that no token stands for, and are never drawn.
    """
    logits = logits[:, :vocab]
    if temperature == 0:
        return logits.argmax(-1)
    mass = distribution(logits, temperature, top_k, top_p).to(u).cumsum(-1)  # (B, V)
    token = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True).squeeze(-1)
    # logits of NaN would give V: stay in the vocabulary, so that the loss says what is wrong
    return token.clamp(max=logits.shape[-1] - 1).to(logits.device)


# ---- whole answers ----------------------------------------------------------------------------

def layout(prompts, n, max_new_tokens, which, device):
    """Right-padded prompts, n rows each -> an empty Rollout and (prompt, sample) numbers of its rows."""
    P = torch.tensor([len(p) for p in prompts])
    ids = torch.zeros(len(prompts), int(P.max()) + max_new_tokens, dtype=torch.long)
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
        for position in range(max_new_tokens):
            end = int(roll.length[b])
            logits = model(roll.ids[b:b + 1, :end])[:, -1]
            token = pick(logits, uniform(keys[b:b + 1], position), **how)
            roll.ids[b, end] = token
            roll.resp_len[b] += 1
            if token.item() in stop:
                roll.stopped[b] = True
                break
    return trim(roll)


@torch.no_grad()
def stream(model, requests, *, rows, max_new_tokens, stop, seed=0, step=0, budget=32768, look=0, **how):
    """Answers as they end -> (index of the request, its ids, ended by a stop token?), one by one.

    requests: (prompt ids, prompt number, sample number) each; seed, step and the two numbers fix the answer,
    whatever is answered beside it. rows: answers in the making at once, which bounds the cache. budget:
    tokens of prompts read at once. look: tokens between looks at which rows are done, each of which waits for
    the device; 0: 16 on CUDA, else 1. The rest is as in `sample`.
    """
    c, device = model.config, model.embed.weight.device
    B, dtype = min(rows, len(requests)), compute_dtype(model)
    cache = Cache(c, B, max(len(p) for p, _, _ in requests) + max_new_tokens, device, dtype)
    stop = torch.tensor(list(stop), device=device)
    ids = torch.zeros(B, max_new_tokens + 1, dtype=torch.long, device=device)            # last: never read
    who, token, count, keys = torch.full((4, B), -1, device=device)          # request in this place, ...
    done, stopped = torch.ones(2, B, dtype=torch.bool, device=device)
    look = look or (16 if device.type == 'cuda' else 1)
    begun = tokens = 0

    def draw(at, logits):
        """The next token of the places `at`."""
        t = pick(logits, uniform(keys[at], count[at]), **how).where(~done[at], 0)        # (B',)
        ids[at, count[at]] = t
        count[at] += ~done[at]
        ended = torch.isin(t, stop) & ~done[at]
        stopped[at] |= ended
        done[at] |= ended | (count[at] == max_new_tokens)
        token[at] = t

    def fill(places, first):
        """Read the prompts of the next requests, each once, and draw their first tokens."""
        some = requests[first:first + len(places)]
        own = list({id(p): p for p, _, _ in some}.values())                  # an answer's neighbours share it
        number = {id(p): i for i, p in enumerate(own)}
        P = torch.tensor([len(p) for p in own], device=device)
        read = torch.zeros(len(own), int(P.max()), dtype=torch.long)
        for row, p in zip(read, own, strict=True):
            row[:len(p)] = torch.tensor(p)
        read, logits = read.to(device), []
        of = torch.tensor([number[id(p)] for p, _, _ in some], device=device)
        for i in range(0, len(own), each := max(1, budget // read.shape[1])):
            # right padding is harmless: causal attention never looks right, and the padding's keys are
            # overwritten by answers before any row's length reaches them
            part, length = read[i:i + each], P[i:i + each]
            new = Cache(c, len(part), part.shape[1], device, dtype)
            last = torch.arange(len(part), device=device) * part.shape[1] + length - 1
            logits.append(model(part, new, at=last))                         # (prompts, V)
            here = ((of >= i) & (of < i + each)).nonzero().squeeze(-1)
            cache.put(places[here], new, of[here] - i)
        who[places] = torch.arange(first, first + len(some), device=device)
        prompt, sample = torch.tensor([[q, k] for _, q, k in some], device=device).t()
        keys[places], count[places] = stream_keys(seed, step, prompt, sample), 0
        done[places], stopped[places], cache.length[places] = False, False, P[of]
        draw(places, torch.cat(logits)[of])

    while True:
        if tokens % look == 0:
            over = (done & (who >= 0)).nonzero().squeeze(-1)
            if len(over):
                ended = zip(*(x[over].tolist() for x in (who, ids, count, stopped)), strict=True)
                yield from ((i, row[:n], by_stop) for i, row, n, by_stop in ended)
                who[over], cache.length[over] = -1, 0
            free = (who < 0).nonzero().squeeze(-1)
            if begun < len(requests) and len(free) >= max(1, B // 8):        # some at once: a prompt is read
                places = free[:len(requests) - begun]                        # as slowly as a token or two
                fill(places, begun)
                begun += len(places)
                continue
            if len(free) == B:
                return
            if begun == len(requests) and len(free) >= 0.25 * B:             # nobody waits: rows leave
                keep = (who >= 0).nonzero().squeeze(-1)
                cache.rows(keep)
                who, token, count, keys, done, stopped, ids = (
                    x[keep] for x in (who, token, count, keys, done, stopped, ids))
                B = len(keep)
            cache.longest = int(cache.length.max())
        logits = model(token[:, None], cache)[:, 0]                          # (B, V)
        cache.length += ~done
        draw(torch.arange(B, device=device), logits)
        tokens += 1


def sample(model, prompts, n=1, *, max_new_tokens, stop, seed=0, step=0, which=None, progress='', **how):
    """n answers to each prompt -> Rollout of B = len(prompts) * n rows, a prompt's rows together.

    prompts: lists of ids. stop: ids that end an answer. how: temperature, top_k, top_p, vocab as in pick.
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


def compute_dtype(model):
    """The dtype a model's forward runs in: FSDP may keep float32 parameters and compute in bfloat16."""
    return getattr(model, 'compute_dtype', None) or model.embed.weight.dtype


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
