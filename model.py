"""
One decoder for the Qwen3, Qwen2, Llama and Phi-3 / Phi-4-mini families; Hugging Face folders in and out.

    h = embed(ids);  for each block: h += attention(norm(h)); h += mlp(norm(h));  logits = head(norm(h))

Simpler than usual: rows are right-padded and attention is causal, so a training forward needs no
attention mask; rotary angles are computed where they are used, so there are no buffers; q, k, v and
gate, up are one matrix each, split only in files. What it does not know: sliding windows, mixtures
of experts, quantised weights, YaRN (read_config refuses what it does not know by name).

Letters: B rows, T tokens, K selected rows, L layers, d width, V vocabulary,
         H query heads, G key/value heads, e head width, R rotated numbers of a head.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import kernels


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. `hf` keeps the config.json it came from, so that saving loses nothing."""
    family: str                 # 'qwen3' has qk_norm, 'qwen2' has qkv_bias, 'llama' and 'phi3' neither
    V: int
    L: int
    d: int
    H: int
    G: int
    e: int
    ff: int                     # width of the gated MLP
    tied: bool = False          # head shares the embedding's weights
    theta: float = 1e4          # rotary base
    eps: float = 1e-6           # of every RMSNorm
    context: int = 128          # longest sequence the model was made for
    partial: float = 1.0        # share of each head that is rotated
    rope: dict = field(default_factory=dict)    # frequency scaling as config.json has it; {} = none
    hf: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def qkv_bias(self):
        return self.family == 'qwen2'

    @property
    def qk_norm(self):
        return self.family == 'qwen3'

    def count(self):
        """Number of weights, without making them."""
        with torch.device('meta'):
            return sum(p.numel() for p in Model(self).parameters())


# The paper's models and the toy, to compare by eye.
PRESETS = {
    #                         family       V   L     d   H  G    e    ff   tied theta   eps  context
    'toy':        ModelConfig('qwen3',      21,  4,   96,  4, 4,  24,  256, False, 1e4, 1e-6,     128),
    'r1_1p5b':    ModelConfig('qwen2', 151_936, 28, 1536, 12, 2, 128, 8960, False, 1e4, 1e-6, 131_072),
    'qwen3_1p7b': ModelConfig('qwen3', 151_936, 28, 2048, 16, 8, 128, 6144,  True, 1e6, 1e-6,  32_768),
    'qwen3_4b':   ModelConfig('qwen3', 151_936, 36, 2560, 32, 8, 128, 9728,  True, 1e6, 1e-6,  40_960),
    'smollm2':    ModelConfig('llama',  49_152, 30,  576,  9, 3,  64, 1536,  True, 1e5, 1e-5,   8_192),
    'phi4_mini':  ModelConfig('phi3',  200_064, 32, 3072, 24, 8, 128, 8192,  True, 1e4, 1e-5, 131_072, 0.75),
}


# ---- the decoder ----------------------------------------------------------------------------

class Norm(nn.Module):
    """RMSNorm."""
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def frequencies(c, length):
    """Rotary frequencies (R/2,) of a model for sequences up to `length`, and the factor on cos and sin."""
    R, r, kind = int(c.e * c.partial), c.rope, c.rope.get('rope_type', 'default')
    inv = c.theta ** -(torch.arange(0, R, 2, dtype=torch.float32) / R)
    if kind == 'linear':
        inv /= r['factor']
    if kind == 'llama3':                     # long waves stretched, short ones kept, a ramp between
        turns = r['original_max_position_embeddings'] * inv / (2 * math.pi)  # in the original context
        low, high = r['low_freq_factor'], r['high_freq_factor']
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv = inv * keep + inv / r['factor'] * (1 - keep)
    if kind != 'longrope':
        return inv, 1.0
    original = r['original_max_position_embeddings']
    inv /= torch.tensor(r['long_factor' if length > original else 'short_factor'])
    stretch = r.get('factor') or c.context / original
    scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return inv, r.get('attention_factor') or scale


def rotary(pos, inv, scale, dtype):
    """cos and sin of the rotary angles at positions `pos` (...,) -> two of (..., R)."""
    angle = pos[..., None].float() * inv                                     # (..., R/2)
    angle = torch.cat([angle, angle], -1)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotate(x, cos, sin):
    """Rotate the first R of the last axis's e numbers; the rest stays."""
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = x.chunk(2, -1)
    x = x * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([x, rest], -1) if rest.shape[-1] else x


class Cache:
    """Keys and values of B rows, (B, 2, G, T, e) for each layer, written in place.

    As long as `length` is None all rows hold `read` tokens, and a forward reads on from there: a prompt
    whole, or in pieces. Once the caller has set it, (B,), each row is at its own length, and a forward
    takes one more token a row, after which the caller advances it. limit: the longest a row may become.
    """
    def __init__(self, c, B, T, device, dtype, limit=0):
        self.kv = [torch.zeros(B, 2, c.G, T, c.e, device=device, dtype=dtype) for _ in range(c.L)]
        self.read, self.length, self.limit = 0, None, max(T, limit)
        self.longest = 0                     # an upper bound of `length`, known to the host without a sync

    @property
    def room(self):
        """T, the tokens a row has room for."""
        return self.kv[0].shape[3]

    def change(self, new):
        """Every layer's (B, 2, G, T, e) becomes new(it); the old one goes before the next layer's turn."""
        for l, kv in enumerate(self.kv):
            self.kv[l] = new(kv)

    def grow(self, tokens):
        """Room for so many tokens a row, and half as many again, up to the limit: what has been written is
        copied a few times in all, and of one layer at most there are two."""
        T = min(self.limit, max(tokens, self.room * 3 // 2))
        self.change(lambda kv: F.pad(kv, (0, 0, 0, T - kv.shape[3])))

    def put(self, places, other, rows):
        """Copy `rows` (n,) of another, shorter cache to `places` (n,) of this one, but not their lengths."""
        for mine, its in zip(self.kv, other.kv, strict=True):
            mine[places, :, :, :its.shape[3]] = its[rows]

    def rows(self, keep):
        """Keep (or repeat) rows: `keep` is an index (B',)."""
        self.change(lambda kv: kv[keep])
        self.length = self.length[keep]


class Linear(nn.Linear):
    """nn.Linear. On a CPU 5 to 32 rows without a gradient, a decode step, are computed as (W x')': with the
    weights as left factor the matrix library is faster (`bench.py decode`)."""
    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or not x.is_cpu or not 4 < rows <= 32:
            return super().forward(x)
        columns = x.reshape(rows, -1).t()
        y = self.weight @ columns
        y = y if self.bias is None else y.add_(self.bias[:, None])
        return y.t().view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.qkv = Linear(c.d, (c.H + 2 * c.G) * c.e, bias=c.qkv_bias)
        self.out = Linear(c.H * c.e, c.d, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(c.e, c.eps), Norm(c.e, c.eps)

    def forward(self, x, rope, cache=None, l=0, mask=None):
        c, (B, T, _) = self.c, x.shape
        qkv = self.qkv(x).view(B, T, c.H + 2 * c.G, c.e)
        if cache is not None and cache.length is not None:                   # one token a row
            norms = (self.q_norm.weight, self.k_norm.weight) if c.qk_norm else (None, None)
            y = kernels.attend(qkv[:, 0], cache.kv[l], cache.length, *rope, *norms, c.eps,
                               cache.longest, mask)
            return self.out(y[:, None])
        q, k, v = qkv.transpose(1, 2).split([c.H, c.G, c.G], 1)              # (B, H, T, e), (B, G, T, e)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        how = {'is_causal': True}
        if cache is not None:                # a piece of a prompt: it sees the pieces before
            end = cache.read + T
            cache.kv[l][:, 0, :, cache.read:end], cache.kv[l][:, 1, :, cache.read:end] = k, v
            if cache.read:
                k, v = cache.kv[l][:, :, :, :end].unbind(1)
                how = {'attn_mask': causal_lower_right(T, end)}
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=c.H != c.G, **how)
        return self.out(y.transpose(1, 2).reshape(B, T, c.H * c.e))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up = Linear(c.d, 2 * c.ff, bias=False)
        self.down = Linear(c.ff, c.d, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = Norm(c.d, c.eps), Attention(c)
        self.norm2, self.mlp = Norm(c.d, c.eps), MLP(c)

    def forward(self, h, *where):
        h = h + self.attn(self.norm1(h), *where)
        return h + self.mlp(self.norm2(h))


class Head(Linear):
    """States (K, d) -> logits (K, V). Given a function of (states, weight), what that makes of them: a
    loss can take the vocabulary in pieces, and FSDP, which gathers the weight for a call, need not know."""
    def forward(self, h, loss=None):
        return super().forward(h) if loss is None else loss(h, self.weight)


class Model(nn.Module):
    """ids (B, T) -> logits (B, T, V); `hidden` stops short of the vocabulary."""
    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        self.reach, self.turning = 0, {}     # longest sequence to come, if known; frequencies by device
        self.embed = nn.Embedding(c.V, c.d)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.L))
        self.norm = Norm(c.d, c.eps)
        self.head = Head(c.d, c.V, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight

    def trunk(self, ids, cache=None, tap=None, last=None):
        """ids (B, T) -> final-normed states (B, T, d). `tap(l, h) -> h` is called after each block
        l = 1..last; for l = L it sees the final-normed state, as Hugging Face's hidden_states do."""
        c, T = self.config, ids.shape[1]
        h = self.embed(ids)                                                  # (B, T, d)
        mask, start = None, cache.read if cache else 0
        if cache is not None and cache.length is not None:                   # one more token a row
            assert T == 1, f'{T} tokens onto rows of different lengths: one at a time'
            cache.longest = min(cache.longest + 1, cache.room)               # finished rows may go on
            pos = cache.length                                               # (B,)
            if not kernels.fused(h):         # the kernel reads lengths itself
                there = torch.arange(cache.longest, device=ids.device) <= pos[:, None]       # (B, longest)
                mask = torch.zeros_like(there, dtype=h.dtype).masked_fill_(~there, -math.inf)[:, None, None]
        else:
            pos = torch.arange(start, start + T, device=ids.device)          # (T,)
        reach = max(self.reach, T if cache is None else cache.limit)
        rope = rotary(pos, *self.frequencies(reach, ids.device), h.dtype)    # (T, R) or (B, R)
        for l, block in enumerate(self.blocks, 1):
            if cache is not None:
                h = block(h, rope, cache, l - 1, mask)
            elif self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, rope)           # called one way only: torch.compile then makes one graph of it
            if tap and l < c.L:
                h = tap(l, h)
            if l == last and l < c.L:        # nothing above is asked for
                return h
        if cache is not None and cache.length is None:
            cache.read += T
        h = self.norm(h)
        return tap(c.L, h) if tap else h

    def frequencies(self, reach, device):
        """longrope turns differently beyond the original context. transformers decides by the length
        of each forward, and so contradicts its own cache when an answer grows past it; here the
        longest sequence to come decides (`reach`, set by whoever knows it), as in vLLM."""
        long = reach > self.config.rope.get('original_max_position_embeddings', math.inf)
        if (long, device) not in self.turning:
            inv, scale = frequencies(self.config, reach)
            self.turning[long, device] = inv.to(device), scale
        return self.turning[long, device]

    def forward(self, ids, cache=None, at=None):
        """ids (B, T) -> logits (B, T, V), or (K, V) at flat positions `at` (K,) of (B*T,).

        cache: see Cache.
        """
        h = self.trunk(ids, cache)
        return self.head(h if at is None else h.flatten(0, 1)[at])

    def plain(self):
        """A Model of the same weights, not copies, without what FSDP and torch.compile hang onto modules."""
        with torch.device('meta'):
            twin = Model(self.config)
        twin.load_state_dict({k: p.detach() for k, p in self.named_parameters(remove_duplicate=False)},
                             assign=True)
        if self.config.tied:
            twin.head.weight = twin.embed.weight
        twin.reach, twin.turning = self.reach, self.turning
        return twin.requires_grad_(False).eval()

    def hidden(self, ids, layers, at=None, tap=None):
        """States after the blocks in `layers` (1..L, ascending) -> list of (K, d), the head untouched.

        at: flat positions (K,) of (B*T,); None = all, as (B, T, d). tap: `tap(l, h) -> h, out` may
        replace the gathering of rows by anything; then the list holds its `out`s. Outputs are
        returned, not kept aside, because FSDP hangs its backward hooks on what a forward returns.
        """
        outs = []

        def pick(l, h):
            if l not in layers:
                return h
            h, out = tap(l, h) if tap else (h, h if at is None else h.flatten(0, 1)[at])
            outs.append(out)
            return h
        self.trunk(ids, tap=pick, last=max(layers))
        return outs


def init_weights(model, seed):
    """Normal matrices of variance 1 / (3 fan-in), zero biases, unit norms; the same numbers on every
    machine. (The usual 0.02 is too small at d = 96: one Adam step would be a tenth of a weight.)"""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=g) * (3 * p.shape[1]) ** -0.5)
            else:
                p.fill_(0.0 if name.endswith('bias') else 1.0)
    return model
