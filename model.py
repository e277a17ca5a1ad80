"""
One decoder for the Qwen3, Qwen2, Llama and Phi-3 / Phi-4-mini families: the mathematics only.

    h = embed(ids);  for each block: h += attention(norm(h)); h += mlp(norm(h));  logits = head(norm(h))

Simpler than usual:
- Rows are right-padded and attention is causal, so a training forward needs no attention mask.
- Rotary angles are computed where they are used, so there are no buffers.
- q, k and v are one matrix, gate and up are one matrix. They are split in files only
  (formats/huggingface.py).

What it does not do: sliding windows, mixtures of experts, quantised weights, YaRN. The reader of
config.json refuses what is not here by name.

How to try it on a CPU (one GPU: the same after .to('cuda'); eight GPUs: support/runtime.py shards it):

    from model import PRESETS, Model, init_weights
    model = init_weights(Model(PRESETS['toy']), seed=0)
    logits = model(torch.tensor([[1, 5, 9]]))                                # (1, 3, 21)

Letters: B rows, T tokens, K selected rows, L layers, d width, V vocabulary, ff width of the MLP,
         H query heads, G key/value heads, e head width, R rotated numbers of a head.
"""
import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.mlp_in_pieces import add_mlp_in_pieces, in_pieces


def gelu_tanh(x):
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate='tanh')


RECOMPUTE = dict(use_reentrant=False, preserve_rng_state=False)              # options of torch's checkpoint
FAMILIES = ('qwen3', 'qwen2', 'llama', 'phi3')
ACTIVATIONS = {'silu': F.silu, 'gelu': F.gelu, 'gelu_pytorch_tanh': gelu_tanh}       # by Hugging Face's names


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what a decoder computes, apart from its weights."""
    family: str                 # of FAMILIES: 'qwen3' has norms on q and k, 'qwen2' has biases on q, k and v
    V: int                      # vocabulary: rows of the embedding and of the head
    L: int                      # layers, which are also called blocks
    d: int                      # width of a hidden state
    H: int                      # query heads
    G: int                      # key/value heads, each shared by H / G query heads
    e: int                      # width of a head
    ff: int                     # width of the gated MLP
    tied: bool = False          # the head shares the embedding's weights
    theta: float = 1e4          # base of the rotary frequencies
    eps: float = 1e-6           # of every RMSNorm
    context: int = 128          # longest sequence that the model was made for, tokens
    partial: float = 1.0        # share of each head that is rotated
    rope: dict = field(default_factory=dict)    # scaling of the frequencies, as config.json has it; {} = none
    activation: str = 'silu'    # of the gated MLP: a key of ACTIVATIONS
    hf: dict = field(default_factory=dict, compare=False, repr=False)       # the config.json it was read from

    def __post_init__(self):
        assert self.family in FAMILIES, f'family {self.family!r}; known: {FAMILIES}'
        assert self.activation in ACTIVATIONS, f'activation {self.activation!r}; known: {tuple(ACTIVATIONS)}'

    @property
    def qkv_bias(self):
        return self.family == 'qwen2'

    @property
    def qk_norm(self):
        return self.family == 'qwen3'

    def count(self):
        """Number of weights, without allocating them."""
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


# ---- rotary positions -------------------------------------------------------------------------

ROPE_KINDS = ('default', 'linear', 'llama3', 'longrope')


def frequencies(c, length):
    """Rotary frequencies (R/2,) for sequences of up to `length` tokens, and the factor on cos and sin.

    A frequency is an angle per token. c.rope says how a model was stretched beyond its original context:
    'linear' divides every frequency, 'llama3' the low ones, 'longrope' each by a number of its own.
    """
    rope = c.rope
    kind = rope.get('rope_type', 'default')
    assert kind in ROPE_KINDS, f'rope_type {kind!r}; known: {ROPE_KINDS}'
    R = int(c.e * c.partial)
    inv = c.theta ** -(torch.arange(0, R, 2, dtype=torch.float32) / R)       # (R/2,)
    scale = 1.0

    if kind == 'linear':
        inv /= rope['factor']

    # A frequency with many turns within the original context is kept, one with few turns is divided by the
    # factor, and in between `keep` falls linearly from 1 to 0.
    if kind == 'llama3':
        turns = rope['original_max_position_embeddings'] * inv / (2 * math.pi)           # (R/2,)
        low = rope['low_freq_factor']
        high = rope['high_freq_factor']
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv = inv * keep + inv / rope['factor'] * (1 - keep)

    # Two lists of divisors: one for sequences within the original context, one for longer ones. The factor
    # on cos and sin makes attention sharper, in the same way for both.
    if kind == 'longrope':
        original = rope['original_max_position_embeddings']
        divisors = rope['long_factor'] if length > original else rope['short_factor']
        inv /= torch.tensor(divisors)
        stretch = rope.get('factor') or c.context / original
        if stretch > 1:
            scale = math.sqrt(1 + math.log(stretch) / math.log(original))
        scale = rope.get('attention_factor') or scale
    return inv, scale


def rotary(position, inv, scale, dtype):
    """cos and sin of the rotary angles at the positions (...,) -> two tensors (..., R)."""
    angle = position[..., None].float() * inv                                # (..., R/2)
    angle = torch.cat([angle, angle], -1)                                    # (..., R)
    cos = (angle.cos() * scale).to(dtype)
    sin = (angle.sin() * scale).to(dtype)
    return cos, sin


def rotate(x, cos, sin):
    """x (..., e) with the first R of its e numbers rotated and the rest as they are. cos, sin: (..., R)."""
    R = cos.shape[-1]
    x, rest = x.split([R, x.shape[-1] - R], -1)

    # The pairs that rotate together are half a head apart: number i and number i + R/2.
    a, b = x.chunk(2, -1)                                                    # (..., R/2) each
    x = x * cos + torch.cat([-b, a], -1) * sin
    if rest.shape[-1]:
        x = torch.cat([x, rest], -1)
    return x


# ---- the key/value cache ----------------------------------------------------------------------

class Cache:
    """Keys and values of B rows, a tensor (B, 2, G, T, e) for each layer, written in place.

    It is used in two phases:
    - prefill: `length` is None. All rows hold `read` tokens, and a forward reads on from there, so a prompt
      may come whole or in pieces.
    - decode: the caller has set `length` (B,). Each row has its own length, and a forward takes one more
      token per row. The caller increases `length` afterwards.
    limit: the most tokens that a row may ever hold.
    """
    def __init__(self, c, B, T, device, dtype, limit=0):
        self.kv = [torch.zeros(B, 2, c.G, T, c.e, device=device, dtype=dtype) for _ in range(c.L)]
        self.read = 0
        self.length = None
        # Counters that kernels.attend needs, one for each row and key head; zero between two calls.
        self.arrived = torch.zeros(B, c.G, dtype=torch.int32, device=device)
        self.limit = max(T, limit)
        self.longest = 0                     # an upper bound of `length`, which the host knows without a wait

    @property
    def room(self):
        """T, the number of tokens that a row has room for."""
        return self.kv[0].shape[3]

    def change(self, new):
        """Replace each layer's tensor kv by new(kv). The layers take turns, so that only one of them is in
        memory twice."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = new(kv)

    def grow(self, tokens):
        """Make room for `tokens` tokens per row, or for half as many again as now if that is more, but for
        no more than `limit`. Growing by half each time keeps the copying cheap."""
        T = min(self.limit, max(tokens, self.room * 3 // 2))
        self.change(lambda kv: F.pad(kv, (0, 0, 0, T - kv.shape[3])))

    def put(self, rows, other, other_rows):
        """Copy the rows `other_rows` (n,) of another, shorter cache into `rows` (n,) of this one, without
        their lengths."""
        for kv, other_kv in zip(self.kv, other.kv, strict=True):
            kv[rows, :, :, :other_kv.shape[3]] = other_kv[other_rows]

    def keep_rows(self, keep):
        """Keep (or repeat) the rows with the numbers `keep` (B',)."""
        self.change(lambda kv: kv[keep])
        self.length = self.length[keep]
        self.arrived = self.arrived.new_zeros(len(keep), self.arrived.shape[1])


# ---- the decoder ------------------------------------------------------------------------------

class Norm(nn.Module):
    """RMSNorm."""
    def __init__(self, d, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


# Fewest numbers of a matrix that is packed. A smaller one stays in the processor's caches and gains nothing.
PACKED_FROM = 2**18


class Linear(nn.Linear):
    """nn.Linear, which can keep a second copy of its weights for the products of a decode step on a CPU.

    With few rows nn.Linear spends most of its time on bringing the weights into the order in which its inner
    loop reads them, and with one row it uses one thread. `pack` brings them into oneDNN's order once, and
    all products are then made with this copy. The copy does not follow the weights when these change, so
    only a second Model, which exists for one call of the sampler, has it: see `Model.packed`.
    """
    packed_weight = None        # the weights in oneDNN's order; None: not packed

    def pack(self):
        """Pack the weights. oneDNN chooses their order for 16 rows, but they can multiply any number."""
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 16)

    def forward(self, x):
        if self.packed_weight is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed_weight, self.bias, 'none', [], '')


def onednn_runs(weight):
    """Can oneDNN multiply by weights of this device and dtype?"""
    # A build for x86 has MKL too. On other processors this has not been tried.
    installed = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not weight.is_cpu or not installed:
        return False

    # Every x86 processor has the instructions for float32, but not every one has those for bfloat16.
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class Attention(nn.Module):
    """Causal self-attention with rotary positions, H query heads and G key/value heads."""
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.grouped = c.H != c.G            # a constant to torch.compile, also if models have other numbers
        self.qkv = Linear(c.d, (c.H + 2 * c.G) * c.e, bias=c.qkv_bias)      # queries, keys, values
        self.out = Linear(c.H * c.e, c.d, bias=False)
        if c.qk_norm:
            self.q_norm = Norm(c.e, c.eps)
            self.k_norm = Norm(c.e, c.eps)

    def forward(self, x, rope, cache=None, layer=0, watch=None):
        """x (B, T, d), rope: cos and sin -> (B, T, d). cache: see Cache; layer: this layer's index in it.
        watch: see `heads`."""
        q, k, v = self.heads(self.qkv(x), rope, watch)
        return self.mix(q, k, v, cache, layer)

    def heads(self, qkv, rope, watch=None):
        """The product qkv (B, T, (H + 2 G) e) -> queries (B, H, T, e), keys and values (B, G, T, e).

        watch: called as watch(q, k) -> (q, k) with the rotated queries and keys; attention uses what it
        returns.
        """
        c = self.config
        B, T, _ = qkv.shape
        heads = qkv.view(B, T, c.H + 2 * c.G, c.e).transpose(1, 2)

        # Split the heads, norm them, rotate them.
        q, k, v = heads.split([c.H, c.G, c.G], 1)                            # (B, H or G, T, e)
        if c.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        if watch is not None:
            q, k = watch(q, k)
        return q, k, v

    def mix(self, q, k, v, cache=None, layer=0):
        """Queries, keys and values -> (B, T, d): each token's mean of the values that it may see, weighted by
        attention."""
        c = self.config
        B, _, T, _ = q.shape

        # Prefill: store keys and values. A later piece of a prompt also sees the pieces before it.
        causal = {'is_causal': True}
        if cache is not None:
            end = cache.read + T
            cache.kv[layer][:, 0, :, cache.read:end] = k
            cache.kv[layer][:, 1, :, cache.read:end] = v
            if cache.read:
                k, v = cache.kv[layer][:, :, :, :end].unbind(1)              # (B, G, end, e) each
                causal = {'attn_mask': causal_lower_right(T, end)}
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped, **causal)     # (B, H, T, e)
        return self.out(y.transpose(1, 2).reshape(B, T, c.H * c.e))


class MLP(nn.Module):
    """The gated MLP: down(activation(gate(x)) * up(x)).

    Change what is inside `gated` as you like. The product with `down` is also in kernels/mlp_in_pieces.py,
    where it is differentiated by hand: change both.
    """
    def __init__(self, c):
        super().__init__()
        self.activation = ACTIVATIONS[c.activation]
        self.gate_up = Linear(c.d, 2 * c.ff, bias=False)
        self.down = Linear(c.ff, c.d, bias=False)

    def gated(self, x):
        """x (B, T, d) -> what `down` reads, (B, T, ff)."""
        gate, up = self.gate_up(x).chunk(2, -1)                              # (B, T, ff) each
        return self.activation(gate) * up

    def forward(self, x):
        return self.down(self.gated(x))


class Block(nn.Module):
    """One layer: attention and MLP, each added to the states it reads. `forward` reads T tokens a row;
    `decode` computes the same for one token a row, and `forward_in_pieces` keeps less for the backward."""
    def __init__(self, c):
        super().__init__()
        self.norm1 = Norm(c.d, c.eps)
        self.attn = Attention(c)
        self.norm2 = Norm(c.d, c.eps)
        self.mlp = MLP(c)

    def forward(self, h, rope, cache=None, layer=0, mask=None, recomputed=False, watch=None):
        if cache is not None and cache.length is not None:
            return self.decode(h, rope, cache, layer, mask)
        if recomputed and in_pieces(h, self):
            return self.forward_in_pieces(h, rope, watch)
        h = h + self.attn(self.norm1(h), rope, cache, layer, watch)
        return h + self.mlp(self.norm2(h))

    def forward_in_pieces(self, h, rope, watch=None):
        """`forward` of a block that is recomputed in the backward: h (B, T, d) -> (B, T, d).

        If all tensors that the backward needs of one block existed at once, they would be most of an update's
        memory. So the MLP is computed in pieces of tokens, and the result of the first norm is not kept: the
        backward computes it once more.
        """
        q, k, v = self.attn.heads(checkpoint(self.normed_qkv, h, **RECOMPUTE), rope, watch)
        v = v.clone()                        # a view would keep all of qkv
        h = h + self.attn.mix(q, k, v)
        return add_mlp_in_pieces(h, self)

    def normed_qkv(self, h):
        """h (B, T, d) -> queries, keys and values in one product, (B, T, (H + 2 G) e)."""
        return self.attn.qkv(self.norm1(h))

    def decode(self, h, rope, cache, layer, mask):
        """h (B, 1, d) -> (B, 1, d), in the five kernels of a decode step. mask: from `decode_mask`."""
        attn = self.attn
        c = attn.config
        norms = (attn.q_norm.weight, attn.k_norm.weight) if c.qk_norm else (None, None)

        # One kernel norms the heads, rotates them, writes keys and values into the cache, and attends.
        qkv = kernels.norm_product(h, self.norm1, attn.qkv).view(len(h), c.H + 2 * c.G, c.e)
        y = kernels.attend(qkv, cache.kv[layer], cache.length, *rope, *norms, c.eps, cache.longest, mask,
                           cache.arrived)                                    # (B, H e)
        h = kernels.add_product(h, y[:, None], attn.out)

        # Norm, gate and up, and the activation are one kernel. `add_product` may write its sum over h.
        x = kernels.norm_product(h, self.norm2, self.mlp.gate_up, self.mlp.activation)   # (B, 1, ff)
        return kernels.add_product(h, x, self.mlp.down)


class Head(Linear):
    """States (K, d) -> logits (K, V); or, given a function loss(states, weight), the value of this function.

    With such a function a loss can compute the logits of a few rows at a time. It need not know about FSDP,
    which gathers the weight before a call of this module and frees it afterwards.
    """
    def forward(self, h, loss=None):
        return super().forward(h) if loss is None else loss(h, self.weight)


def decode_mask(cache, like):
    """Which cached tokens may each row's new token see? -> (B, 1, 1, longest): 0 for these, else -inf."""
    column = torch.arange(cache.longest, device=like.device)
    visible = column <= cache.length[:, None]                                # (B, longest)
    mask = torch.zeros_like(visible, dtype=like.dtype)
    return mask.masked_fill_(~visible, -math.inf)[:, None, None]


class Model(nn.Module):
    """ids (B, T) -> logits (B, T, V). `hidden` gives the states of chosen layers and never calls the head.

    checkpointing: recompute each block in the backward. max_length: the longest sequence to come, if the
    caller knows it (see `rope_frequencies`).
    """
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.checkpointing = False
        self.max_length = 0
        self.rope_cache = {}                 # what `rope_frequencies` has computed
        self.embed = nn.Embedding(c.V, c.d)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.L))
        self.norm = Norm(c.d, c.eps)
        self.head = Head(c.d, c.V, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight

    def trunk(self, ids, cache=None, tap=None, last=None, watch=None):
        """ids (B, T) -> final-normed states (B, T, d).

        tap: called as tap(l, h) -> h after each block l = 1..L; the next block reads what it returns. For
        l = L it gets the final-normed state, which is also the last of Hugging Face's hidden_states. last:
        stop after this block. watch: called as watch(l, q, k) -> (q, k) in each block, if there is no cache,
        with the rotated queries (B, H, T, e) and keys (B, G, T, e). A block that is recomputed in the
        backward calls it once more.
        """
        L = self.config.L
        T = ids.shape[1]
        h = self.embed(ids)                                                  # (B, T, d)

        # The positions of these tokens: in decode each row's length, otherwise those after the tokens read.
        mask = None
        if cache is not None and cache.length is not None:
            assert T == 1, f'{T} tokens for rows of different lengths; give one token per row'
            cache.longest = min(cache.longest + 1, cache.room)               # a finished row does not grow
            position = cache.length                                          # (B,)
            if not kernels.fused(h):         # the Triton kernel reads the lengths itself
                mask = decode_mask(cache, h)
        else:
            start = cache.read if cache else 0
            position = torch.arange(start, start + T, device=ids.device)     # (T,)
        length = T if cache is None else cache.limit
        length = max(length, self.max_length)
        inv, scale = self.rope_frequencies(length, ids.device)
        rope = rotary(position, inv, scale, h.dtype)                         # two of (T, R) or (B, R)

        # The blocks. Training calls them in one way only, so torch.compile makes one graph of them.
        for l, block in enumerate(self.blocks, 1):
            watch_block = None if watch is None else partial(watch, l)
            if cache is not None:
                h = block(h, rope, cache, l - 1, mask)
            elif self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, rope, recomputed=True, watch=watch_block, **RECOMPUTE)
            else:
                h = block(h, rope, watch=watch_block)
            if tap and l < L:
                h = tap(l, h)
            if l == last and l < L:          # the blocks above are not needed
                return h

        if cache is not None and cache.length is None:
            cache.read += T
        h = self.norm(h)
        if tap:
            h = tap(L, h)
        return h

    def rope_frequencies(self, length, device):
        """`frequencies` for sequences of up to `length` tokens on a device, computed once.

        longrope has other frequencies beyond the original context. transformers decides by the length of
        each forward, so when an answer grows past that context, its new queries do not fit the keys that are
        already in the cache. Here, as in vLLM, the longest sequence to come decides. The caller sets it as
        `max_length` before the first forward.
        """
        beyond = length > self.config.rope.get('original_max_position_embeddings', math.inf)
        key = (beyond, device)
        if key not in self.rope_cache:
            inv, scale = frequencies(self.config, length)
            self.rope_cache[key] = (inv.to(device), scale)
        return self.rope_cache[key]

    def forward(self, ids, cache=None, at=None):
        """ids (B, T) -> logits (B, T, V), or (K, V) at the flat positions `at` (K,) of (B*T,)."""
        h = self.trunk(ids, cache)                                           # (B, T, d)
        if at is not None:
            h = h.flatten(0, 1)[at]                                          # (K, d)
        return self.head(h)

    def hidden(self, ids, layers, at=None, tap=None, watch=None):
        """States after the blocks in `layers`, ascending numbers 1..L -> a list of (K, d), one for each.

        at: flat positions (K,) of (B*T,); None: all of them, as (B, T, d). tap: called as tap(l, h) -> (h,
        out) in place of choosing rows; the list then holds its outs. The states are returned, and not stored
        in an attribute, because FSDP attaches its backward hooks to what a forward returns. watch: see
        `trunk`.
        """
        L = self.config.L
        layers = list(layers)
        ascending = layers == sorted({*layers})
        if not layers or not ascending or layers[0] < 1 or layers[-1] > L:
            raise ValueError(f'layers={layers} of a model with {L}; give ascending numbers from 1 to {L}')
        outs = []

        def pick(l, h):
            if l not in layers:
                return h
            if tap:
                h, out = tap(l, h)
            else:
                out = h if at is None else h.flatten(0, 1)[at]
            outs.append(out)
            return h

        self.trunk(ids, tap=pick, last=layers[-1], watch=watch)
        return outs

    def plain(self):
        """A Model of the same weights, not copies, without what FSDP and torch.compile attach to modules.

        The weights of a sharded model are whole only inside `with gathered(model)` (support/runtime.py),
        which calls this; anywhere else it is an error.
        """
        weights = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if isinstance(parameter, DTensor):
                raise RuntimeError(f'{name} is the shard of a weight; use `with gathered(model) as whole:` '
                                   '(support/runtime.py)')
            weights[name] = parameter.detach()

        with torch.device('meta'):
            twin = Model(self.config)
        twin.load_state_dict(weights, assign=True)
        if self.config.tied:                 # `assign` unties them
            twin.head.weight = twin.embed.weight
        twin.max_length = self.max_length
        twin.rope_cache = self.rope_cache
        return twin.requires_grad_(False).eval()

    def packed(self):
        """A Model of the same weights for sampling: where oneDNN runs, a second Model that has packed its
        large matrices (see `Linear`), anywhere else this model itself. The packed copies take as much memory
        again as the matrices."""
        large = []
        for name, module in self.named_modules():
            if isinstance(module, Linear) and module.weight.numel() >= PACKED_FROM:
                large.append(name)
        if not large or not onednn_runs(self.embed.weight):
            return self

        # This model trains on, and the packed copies are right only until its weights change.
        twin = self.plain()
        for name in large:
            twin.get_submodule(name).pack()
        return twin


def init_weights(model, seed):
    """Normal matrices of variance 1 / (3 fan-in), zero biases, norms of one; the same on every machine.

    The usual standard deviation of 0.02 is too small at d = 96: one step of Adam would change a weight by a
    tenth of it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                fan_in = parameter.shape[1]
                numbers = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(numbers * (3 * fan_in) ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith('bias') else 1.0)
    return model
