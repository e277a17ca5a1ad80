"""
The student's own answers: a KV-cached batched sampler, and the naive one it must equal.

The slow text is `naive`: read everything again for every token. `sample` reads each prompt once,
copies its cache for the n answers, then feeds one token a row; finished rows leave the batch.

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
    """The number of each stream at `position` (an int) -> float64 (B,) in [0, 1), 53 bits."""
    if keys.device.type == 'mps':            # no float64 there
        keys = keys.cpu()
    return (mix(keys + signed(GOLDEN * (position + 1))) >> 11 & (1 << 53) - 1).double() * 2.0**-53


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
def sample(model, prompts, n=1, *, max_new_tokens, stop, seed=0, step=0, which=None, progress='', **how):
    """n answers to each prompt -> Rollout of B = len(prompts) * n rows, a prompt's rows together.

    prompts: lists of ids. stop: ids that end an answer. how: temperature, top_k, top_p, vocab as in pick.
    which: each prompt's number in its problem set (default: its place in the list); with seed, step
    and the sample's number it fixes the answer. progress: label of a progress bar on a terminal.
    """
    device = model.embed.weight.device
    roll, prompt, number = layout(prompts, n, max_new_tokens, which, device)
    keys = stream_keys(seed, step, prompt, number)
    stop = torch.tensor(list(stop), device=device)
    P, longest = roll.prompt_len[::n], int(roll.prompt_len.max())

    # Prompts, once each. Right padding is harmless: causal attention never looks right, and the
    # padding's keys are overwritten by answers before any row's length reaches them.
    cache = Cache(model.config, len(prompts), longest + max_new_tokens, device, compute_dtype(model))
    last = torch.arange(len(prompts), device=device) * longest + P - 1
    logits = model(roll.ids[::n, :longest], cache, at=last)                  # (prompts, V)
    cache.length, cache.longest = P.clone(), longest
    if n > 1:
        cache.rows(roll.prompt)
        logits = logits[roll.prompt]

    alive = torch.arange(len(roll.ids), device=device)                       # rows still in the batch
    done = torch.zeros_like(alive, dtype=torch.bool)
    look = 16 if device.type == 'cuda' else 1        # tokens between looks at `done`: each one is a sync
    bar = tqdm(total=len(alive), desc=progress, unit='answer', leave=False,
               disable=None if progress else True)
    for position in range(max_new_tokens):
        token = pick(logits, uniform(keys, position), **how)                 # (rows,)
        token = token.where(~done, 0)
        roll.ids[alive, (roll.prompt_len + roll.resp_len)[alive]] = token
        roll.resp_len[alive] += ~done
        ended = torch.isin(token, stop) & ~done
        roll.stopped[alive] |= ended
        done |= ended
        if position + 1 == max_new_tokens:
            break
        if (position + 1) % look == 0:
            left = int((~done).sum())
            bar.update(len(roll.ids) - left - bar.n)
            if left == 0:
                break
            if left <= 0.75 * len(alive):            # finished rows leave: one copy of what stays
                keep = (~done).nonzero().squeeze(-1)
                cache.rows(keep)
                alive, keys, token, done = alive[keep], keys[keep], token[keep], done[keep]
        logits = model(token[:, None], cache)[:, 0]                          # (rows, V)
        cache.length += ~done
    bar.close()
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
