"""
One decoder for the Qwen3, Qwen2 and Llama families; Hugging Face folders in and out.

    h = embed(ids);  for each block: h += attention(norm(h)); h += mlp(norm(h));  logits = head(norm(h))

Simpler than usual: rows are right-padded and attention is causal, so a training forward needs no
attention mask; rotary angles are computed where they are used, so there are no buffers; q, k, v and
gate, up are one matrix each, split only in files. What it does not know: sliding windows, mixtures
of experts, quantised weights, rotary scaling (read_config refuses them by name).

Letters: B rows, T tokens, K selected rows, L layers, d width, V vocabulary,
         H query heads, G key/value heads, e head width.
"""
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import open_safetensors, read_json, whole, write_safetensors
from runtime import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. `hf` keeps the config.json it came from, so that saving loses nothing."""
    family: str                 # 'qwen3' has qk_norm, 'qwen2' has qkv_bias, 'llama' neither
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
}


# ---- the decoder ----------------------------------------------------------------------------

class Norm(nn.Module):
    """RMSNorm."""
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotary(pos, c, dtype):
    """cos and sin of the rotary angles at positions `pos` (...,) -> two of (..., e)."""
    inv = c.theta ** -(torch.arange(0, c.e, 2, device=pos.device, dtype=torch.float32) / c.e)
    angle = pos[..., None].float() * inv                                     # (..., e/2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Cache:
    """Keys and values of B rows, each at its own length; preallocated, written in place."""
    def __init__(self, c, B, T, device, dtype):
        self.k = torch.zeros(c.L, B, c.G, T, c.e, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(B, dtype=torch.long, device=device)        # tokens held by each row
        self.longest = 0                     # an upper bound known to the host: no sync to find it

    def rows(self, keep):
        """Keep (or repeat) rows: `keep` is an index (B',)."""
        self.k = self.k[:, keep]             # one after the other: the old keys go before new values come
        self.v = self.v[:, keep]
        self.length = self.length[keep]


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.qkv = nn.Linear(c.d, (c.H + 2 * c.G) * c.e, bias=c.qkv_bias)
        self.out = nn.Linear(c.H * c.e, c.d, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(c.e, c.eps), Norm(c.e, c.eps)

    def forward(self, x, rope, cache=None, l=0, mask=None):
        c, (B, T, _) = self.c, x.shape
        q, k, v = self.qkv(x).view(B, T, c.H + 2 * c.G, c.e).transpose(1, 2).split([c.H, c.G, c.G], 1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)                            # (B, H, T, e), (B, G, T, e)
        if mask is None:                     # whole sequences: training, or filling an empty cache
            if cache is not None:
                cache.k[l, :, :, :T], cache.v[l, :, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.H != c.G)
        else:                                # one token a row: write it at the row's length, read all
            row = torch.arange(B, device=x.device)
            cache.k[l, row, :, cache.length], cache.v[l, row, :, cache.length] = k[:, :, 0], v[:, :, 0]
            k, v = cache.k[l, :, :, :mask.shape[-1]], cache.v[l, :, :, :mask.shape[-1]]
            q = q.reshape(B, c.G, c.H // c.G, c.e)                           # a head group is the "sequence"
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, c.H, 1, c.e)
        return self.out(y.transpose(1, 2).reshape(B, T, c.H * c.e))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Linear(c.d, 2 * c.ff, bias=False)
        self.down = nn.Linear(c.ff, c.d, bias=False)

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


class Model(nn.Module):
    """ids (B, T) -> logits (B, T, V); `hidden` stops short of the vocabulary."""
    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        self.embed = nn.Embedding(c.V, c.d)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.L))
        self.norm = Norm(c.d, c.eps)
        self.head = nn.Linear(c.d, c.V, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight

    def trunk(self, ids, cache=None, tap=None, last=None):
        """ids (B, T) -> final-normed states (B, T, d). `tap(l, h) -> h` is called after each block
        l = 1..last; for l = L it sees the final-normed state, as Hugging Face's hidden_states do."""
        c, T = self.config, ids.shape[1]
        h = self.embed(ids)                                                  # (B, T, d)
        mask, pos = None, torch.arange(T, device=ids.device)                 # (T,)
        if cache is not None and cache.longest:                              # one more token a row
            assert T == 1, f'{T} tokens onto a filled cache: one at a time'
            cache.longest += 1
            pos = cache.length[:, None, None]                                # (B, 1, 1): heads, tokens
            mask = torch.arange(cache.longest, device=ids.device) <= pos[..., None]   # (B, 1, 1, longest)
        rope = rotary(pos, c, h.dtype)                                       # (T, e) or (B, 1, 1, e)
        for l, block in enumerate(self.blocks, 1):
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, rope, cache, l - 1, mask)
            if tap and l < c.L:
                h = tap(l, h)
            if l == last and l < c.L:        # nothing above is asked for
                return h
        h = self.norm(h)
        return tap(c.L, h) if tap else h

    def forward(self, ids, cache=None, at=None):
        """ids (B, T) -> logits (B, T, V), or (K, V) at flat positions `at` (K,) of (B*T,).

        cache: an empty Cache is filled (the caller then sets `length` and `longest`); a filled one
        is extended by one token a row, after which the caller advances `length`.
        """
        h = self.trunk(ids, cache)
        return self.head(h if at is None else h.flatten(0, 1)[at])

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


# ---- Hugging Face folders -------------------------------------------------------------------

def snapshot(path_or_repo):
    """A local folder as it is; a hub id downloaded (once) without any pickled file -> Path."""
    path_or_repo = str(path_or_repo)
    if path_or_repo and Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', path_or_repo):
        raise UserError(f'{path_or_repo!r}: no such folder, and not a hub id (owner/name)')
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=[
            '*.safetensors', '*.json', '*.jinja', '*.txt', '*.tiktoken']))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(f'{path_or_repo}: no such folder, and the hub did not give it '
                        f'({type(e).__name__}: {(str(e).split(chr(10)) or [""])[0][:120]})') from None


def read_config(path_or_repo):
    """config.json of a folder or hub id -> ModelConfig. An unknown field that changes the
    mathematics is a UserError that names it."""
    file = snapshot(path_or_repo) / 'config.json'
    hf = read_json(file, dict)
    family = hf.get('model_type')
    if family not in ('qwen3', 'qwen2', 'llama'):
        raise UserError(f"{file}: model_type {family!r}; this decoder reads 'qwen3', 'qwen2', 'llama'")
    # older files spell rope_theta and rope_scaling, newer ones put both into rope_parameters
    rope = {'rope_theta': hf.get('rope_theta', 1e4)}
    rope |= hf.get('rope_scaling') or {}
    rope |= hf.get('rope_parameters') or {}
    refused = {
        'rope_type': rope.get('rope_type', rope.get('type', 'default')) != 'default',
        'use_sliding_window': bool(hf.get('use_sliding_window')),
        'quantization_config': bool(hf.get('quantization_config')),
        'hidden_act': hf.get('hidden_act', 'silu') != 'silu',
        'attention_bias': bool(hf.get('attention_bias')),
        'mlp_bias': bool(hf.get('mlp_bias')),
    }
    for key, bad in refused.items():
        if bad:
            raise UserError(f'{file}: {key} = {rope.get(key, hf.get(key))!r} changes the model in a way this '
                            'decoder does not know; choose another model')
    for key in ('vocab_size', 'num_hidden_layers', 'hidden_size', 'num_attention_heads', 'intermediate_size'):
        if type(hf.get(key)) is not int or hf[key] < 1:
            raise UserError(f'{file}: {key} = {hf.get(key)!r}, not a whole number from 1; is this a model?')
    d, H = hf['hidden_size'], hf['num_attention_heads']
    G = hf.get('num_key_value_heads') or H
    if H % G:
        raise UserError(f'{file}: {H} query heads do not share {G} key/value heads evenly; is this a model?')
    return ModelConfig(
        family=family, V=hf['vocab_size'], L=hf['num_hidden_layers'], d=d, H=H, G=G,
        e=hf.get('head_dim') or d // H, ff=hf['intermediate_size'], tied=bool(hf.get('tie_word_embeddings')),
        theta=float(rope['rope_theta']), eps=hf.get('rms_norm_eps', 1e-6),
        context=hf.get('max_position_embeddings', 2048), hf=hf)


def name_map(c):
    """Our parameter name -> the Hugging Face names whose rows it stacks."""
    names = {'embed.weight': ['model.embed_tokens.weight'], 'norm.weight': ['model.norm.weight']}
    if not c.tied:
        names['head.weight'] = ['lm_head.weight']
    for l in range(c.L):
        ours, hf = f'blocks.{l}.', f'model.layers.{l}.'
        for end in ['weight', 'bias'] if c.qkv_bias else ['weight']:
            names[f'{ours}attn.qkv.{end}'] = [f'{hf}self_attn.{x}_proj.{end}' for x in 'qkv']
        names[f'{ours}attn.out.weight'] = [f'{hf}self_attn.o_proj.weight']
        if c.qk_norm:
            names[f'{ours}attn.q_norm.weight'] = [f'{hf}self_attn.q_norm.weight']
            names[f'{ours}attn.k_norm.weight'] = [f'{hf}self_attn.k_norm.weight']
        names[f'{ours}mlp.gate_up.weight'] = [f'{hf}mlp.gate_proj.weight', f'{hf}mlp.up_proj.weight']
        names[f'{ours}mlp.down.weight'] = [f'{hf}mlp.down_proj.weight']
        names[f'{ours}norm1.weight'] = [f'{hf}input_layernorm.weight']
        names[f'{ours}norm2.weight'] = [f'{hf}post_attention_layernorm.weight']
    return names


def splits(c, name):
    """How many rows each stacked Hugging Face tensor has, in order; [-1] = all in one."""
    if '.qkv.' in name:
        return [c.H * c.e, c.G * c.e, c.G * c.e]
    return [c.ff, c.ff] if '.gate_up.' in name else [-1]


def load_model(path_or_repo, dtype=torch.float32, device='cpu'):
    """Model of a Hugging Face folder or hub id, in eval mode.

    Weights are memory-mapped and go straight to dtype and device, one tensor at a time. Missing,
    surplus, misshapen or non-finite tensors are a UserError that names them.
    """
    folder = snapshot(path_or_repo)
    c = read_config(folder)
    files = shards(folder)
    with torch.device('meta'):
        model = Model(c)
    want, state = dict(model.named_parameters()), {}
    names = name_map(c)
    known = {hf for hfs in names.values() for hf in hfs} | ({'lm_head.weight'} if c.tied else set())
    for hf in files:
        if hf not in known and not hf.endswith('rotary_emb.inv_freq'):
            raise UserError(f'{files[hf]}: surplus tensor {hf!r}; config.json describes another model')
    opened = {}
    for ours, hfs in names.items():
        parts = []
        for hf, rows in zip(hfs, splits(c, ours), strict=True):
            if hf not in files:
                raise UserError(f'{folder}: tensor {hf!r} is missing; fetch the model again')
            if files[hf] not in opened:
                opened[files[hf]] = open_safetensors(files[hf])
            t = opened[files[hf]].get_tensor(hf)
            shape = list(want[ours].shape) if rows == -1 else [rows, *want[ours].shape[1:]]
            if list(t.shape) != shape:
                raise UserError(f'{files[hf]}: {hf} has shape {list(t.shape)}, but config.json says {shape}')
            if not torch.isfinite(t.sum(dtype=torch.float32)):               # one pass, no copy
                raise UserError(f'{files[hf]}: {hf} holds NaN or infinite numbers; fetch the model again')
            parts.append(t)
        # a copy of its own: a mapped tensor dies with its file
        state[ours] = (torch.cat(parts) if parts[1:] else parts[0]).to(device, dtype, copy=not parts[1:])
    if c.tied:
        state['head.weight'] = state['embed.weight']
    model.load_state_dict(state, assign=True)
    if c.tied:
        model.head.weight = model.embed.weight           # `assign` unties them
    return model.eval()


def shards(folder):
    """Hugging Face tensor name -> the file it lies in, from the index or from the only file."""
    index = folder / 'model.safetensors.index.json'
    if not index.exists():
        one = folder / 'model.safetensors'
        if not one.exists():
            raise UserError(f'{folder}: no model.safetensors in it; pickled weights are never loaded')
        return dict.fromkeys(open_safetensors(one).keys(), one)
    places = read_json(index).get('weight_map') or {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise UserError(f'{index}: names {name}, which is not there; fetch the model again')
    return {hf: folder / name for hf, name in places.items()}


# what travels with the weights, so that the folder is a model and not just numbers
ALONG = ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
         'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt')


def save_model(model, folder, source=None, state=None):
    """Write a folder that `transformers` and vLLM load as it is; whole or not at all.

    source: a Hugging Face folder whose tokenizer, chat template and generation config go along.
    state: parameters by our names, where they cannot be read off the model (sharded ranks).
    """
    c = model.config
    state = state or dict(model.named_parameters())
    tensors = {}
    for ours, hfs in name_map(c).items():
        rows = splits(c, ours)
        t = state[ours].detach().cpu()
        for hf, part in zip(hfs, [t] if rows == [-1] else t.split(rows), strict=True):
            tensors[hf] = part.contiguous()
    with whole(folder) as tmp:
        tmp.mkdir()
        write_safetensors(tensors, tmp / 'model.safetensors', {'format': 'pt'})
        dtype = str(next(iter(tensors.values())).dtype).removeprefix('torch.')
        (tmp / 'config.json').write_text(json.dumps(hf_config(c) | {'dtype': dtype}, indent=2) + '\n')
        for name in ALONG if source else ():
            if (Path(source) / name).exists():
                shutil.copy(Path(source) / name, tmp / name)


def hf_config(c):
    """config.json of a model: the one it came from, or one written from its shape."""
    if c.hf:
        return c.hf
    name = {'qwen3': 'Qwen3', 'qwen2': 'Qwen2', 'llama': 'Llama'}[c.family]
    return {
        'architectures': [f'{name}ForCausalLM'], 'model_type': c.family, 'vocab_size': c.V,
        'hidden_size': c.d, 'intermediate_size': c.ff, 'num_hidden_layers': c.L, 'num_attention_heads': c.H,
        'num_key_value_heads': c.G, 'head_dim': c.e, 'hidden_act': 'silu', 'rms_norm_eps': c.eps,
        'rope_theta': c.theta, 'max_position_embeddings': c.context, 'tie_word_embeddings': c.tied,
        'attention_bias': False, 'use_sliding_window': False,
    }
