"""
Hugging Face folders and hub ids in, Hugging Face folders out: config.json and safetensors of the
Qwen3, Qwen2, Llama and Phi-3 / Phi-4-mini families.

Nothing is unpickled, and no code of a model folder runs.
"""
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from model import Model, ModelConfig
from support.files import open_safetensors, read_json, whole, write_json, write_safetensors
from support.runtime import UserError


def snapshot(path_or_repo, weights=False, dataset=False):
    """A local folder as it is; a hub id, owner/name or owner/name@revision, downloaded once -> Path.
    Never a pickled file; the weights only if asked for. dataset: a data set's files."""
    path_or_repo = str(path_or_repo)
    if path_or_repo and Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    hub = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', path_or_repo)
    if not hub:
        raise UserError(f'{path_or_repo!r}: no such folder, and not a hub id (owner/name)')
    from huggingface_hub import snapshot_download
    model = ['*.json', '*.jinja', '*.txt', '*.tiktoken', *(['*.safetensors'] if weights else [])]
    try:
        return Path(snapshot_download(
            hub[1], revision=hub[2], repo_type='dataset' if dataset else 'model',
            allow_patterns=['*.parquet', '*.jsonl', '*.json'] if dataset else model))
    except Exception as e:                   # the library lets its network libraries' errors through
        raise UserError(f'{path_or_repo}: no such folder, and the hub did not give it '
                        f'({type(e).__name__}: {(str(e).split(chr(10)) or [""])[0][:120]})') from None


def read_config(path_or_repo):
    """config.json of a folder or hub id -> ModelConfig. What is not a model, or changes the mathematics
    in a way this decoder does not know, is a UserError that names it."""
    file = snapshot(path_or_repo) / 'config.json'
    hf = read_json(file)

    def expect(ok, key, value, what):
        if not ok:
            raise UserError(f'{file}: {key} = {value!r}, {what}')

    family = hf.get('model_type')
    expect(family in ('qwen3', 'qwen2', 'llama', 'phi3'), 'model_type', family,
           'but this decoder reads qwen3, qwen2, llama, phi3')
    sizes = {'num_attention_heads': None, 'hidden_size': None, 'vocab_size': None, 'num_hidden_layers': None,
             'intermediate_size': None, 'num_key_value_heads': hf.get('num_attention_heads'),
             'head_dim': 128 if family == 'qwen3' else 0, 'max_position_embeddings': 2048}
    for key, default in sizes.items():
        sizes[key] = n = default if hf.get(key) is None else hf[key]
        expect(type(n) is int and (n > 0 or key == 'head_dim'), key, n, 'no whole number; is this a model?')
    H, d, V, L, ff, G, e, context = sizes.values()
    e = e or d // H
    expect(H % G == 0, 'num_key_value_heads', G, f'which {H} query heads cannot share evenly')
    window = hf.get('sliding_window') if hf.get('use_sliding_window', family == 'phi3') else None
    used = any('sliding' in kind for kind in hf.get('layer_types') or ['sliding'])
    for key, fine in {
        'sliding_window': not window or not used or window >= context,       # allowed, if it never bites
        'quantization_config': not hf.get('quantization_config'),
        'hidden_act': hf.get('hidden_act', 'silu') == 'silu',
        'attention_bias': family == 'qwen2' or not hf.get('attention_bias'),
        'mlp_bias': not hf.get('mlp_bias'),
    }.items():
        expect(fine, key, hf.get(key), 'which this decoder does not know; choose another model')
    theta, partial, rope = read_rope(hf, family, e, expect)
    return ModelConfig(family, V, L, d, H, G, e, ff, bool(hf.get('tie_word_embeddings')), theta,
                       hf.get('rms_norm_eps', 1e-6), context, partial, rope, hf)


def read_rope(hf, family, e, expect):
    """config.json's rotary settings -> (theta, share of a head that is rotated, scaling or {}). Older
    files spell rope_theta and rope_scaling, newer ones put both into rope_parameters."""
    original = 'original_max_position_embeddings'
    rope = {'rope_theta': 1e4, 'partial_rotary_factor': 1.0}
    rope |= {key: hf[key] for key in (*rope, original) if key in hf}
    for key in ('rope_scaling', 'rope_parameters'):
        expect(isinstance(hf.get(key) or {}, dict), key, hf.get(key), 'not a group of names; fetch it again')
        rope |= hf.get(key) or {}
    kind = rope['rope_type'] = rope.get('rope_type') or rope.get('type', 'default')
    numbers = {'default': [], 'linear': ['factor'], 'longrope': [original],
               'llama3': ['factor', 'low_freq_factor', 'high_freq_factor', original]}
    expect(kind in numbers, 'rope_type', kind, 'which this decoder does not know; choose another model')
    for key in ('rope_theta', 'partial_rotary_factor', *numbers[kind]):
        expect(isinstance(rope.get(key), (int, float)), key, rope.get(key), 'not a number; fetch it again')
    partial = rope['partial_rotary_factor'] if family == 'phi3' else 1.0     # the others ignore it
    for key in ('long_factor', 'short_factor') if kind == 'longrope' else ():
        pairs = int(e * partial) // 2
        expect(isinstance(rope.get(key), list) and len(rope[key]) == pairs, key, rope.get(key),
               f'not the {pairs} numbers that {pairs} rotated pairs need')
    return float(rope['rope_theta']), partial, {} if kind == 'default' else rope


def name_map(c):
    """Our parameter name -> the Hugging Face names whose rows it stacks."""
    names = {'embed.weight': ['model.embed_tokens.weight'], 'norm.weight': ['model.norm.weight']}
    if not c.tied:
        names['head.weight'] = ['lm_head.weight']
    for l in range(c.L):
        ours, hf = f'blocks.{l}.', f'model.layers.{l}.'
        for end in ['weight', 'bias'] if c.qkv_bias else ['weight']:
            parts = ['qkv'] if c.family == 'phi3' else 'qkv'
            names[f'{ours}attn.qkv.{end}'] = [f'{hf}self_attn.{x}_proj.{end}' for x in parts]
        names[f'{ours}attn.out.weight'] = [f'{hf}self_attn.o_proj.weight']
        if c.qk_norm:
            names[f'{ours}attn.q_norm.weight'] = [f'{hf}self_attn.q_norm.weight']
            names[f'{ours}attn.k_norm.weight'] = [f'{hf}self_attn.k_norm.weight']
        parts = ['gate_up'] if c.family == 'phi3' else ['gate', 'up']
        names[f'{ours}mlp.gate_up.weight'] = [f'{hf}mlp.{x}_proj.weight' for x in parts]
        names[f'{ours}mlp.down.weight'] = [f'{hf}mlp.down_proj.weight']
        names[f'{ours}norm1.weight'] = [f'{hf}input_layernorm.weight']
        names[f'{ours}norm2.weight'] = [f'{hf}post_attention_layernorm.weight']
    return names


def splits(c, name):
    """How many rows each stacked Hugging Face tensor has, in order; [-1] = all in one."""
    if c.family == 'phi3':
        return [-1]                          # stacked in the file as well
    if '.qkv.' in name:
        return [c.H * c.e, c.G * c.e, c.G * c.e]
    return [c.ff, c.ff] if '.gate_up.' in name else [-1]


def load_model(path_or_repo, dtype=torch.float32, device='cpu'):
    """Model of a Hugging Face folder or hub id, in eval mode.

    Weights are memory-mapped and go straight to dtype and device, one tensor at a time; each mapping
    is closed again, so that host memory holds one copy and the largest tensor. Missing, surplus,
    misshapen or non-finite tensors are a UserError that names them.
    """
    folder = snapshot(path_or_repo, weights=True)
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
    for ours, hfs in names.items():
        parts = []
        for hf, rows in zip(hfs, splits(c, ours), strict=True):
            if hf not in files:
                raise UserError(f'{folder}: tensor {hf!r} is missing; fetch the model again')
            try:
                t = open_safetensors(files[hf]).get_tensor(hf)
            except SafetensorError as e:
                raise UserError(f'{files[hf]}: {hf} cannot be read ({e}); fetch the model again') from None
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
    places = read_json(index).get('weight_map')
    if not isinstance(places, dict) or not places:
        raise UserError(f'{index}: no weight_map in it; fetch the model again')
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise UserError(f'{index}: names {name}, which is not there; fetch the model again')
    return {hf: folder / name for hf, name in places.items()}


# what travels with the weights, so that the folder is a model and not just numbers
ALONG = ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
         'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt', '*.tiktoken')


def hf_tensors(c, state):
    """Parameters by our names -> by Hugging Face's, as views."""
    tensors = {}
    for ours, hfs in name_map(c).items():
        rows = splits(c, ours)
        t = state[ours].detach()
        tensors |= zip(hfs, [t] if rows == [-1] else t.split(rows), strict=True)
    return tensors


def save_model(model, folder, source=None, state=None, shard_bytes=5 * 10**9):
    """Write a folder that `transformers` and vLLM load as it is; whole or not at all.

    source: a Hugging Face folder whose tokenizer, chat template and generation config go along.
    state: parameters by our names, where they cannot be read off the model (sharded ranks).
    shard_bytes: larger models are cut into files of at most so much, with an index.
    """
    c = model.config
    tensors = hf_tensors(c, state or dict(model.named_parameters()))
    tensors = {hf: t.cpu().contiguous() for hf, t in tensors.items()}
    with whole(folder) as tmp:
        tmp.mkdir()
        groups = [{}]
        for hf, t in tensors.items():
            if groups[-1] and sum(x.nbytes for x in groups[-1].values()) + t.nbytes > shard_bytes:
                groups.append({})
            groups[-1][hf] = t
        names = [f'model-{i:05d}-of-{len(groups):05d}.safetensors' for i in range(1, len(groups) + 1)]
        names = names if groups[1:] else ['model.safetensors']
        for name, group in zip(names, groups, strict=True):
            write_safetensors(group, tmp / name, {'format': 'pt'})
        if groups[1:]:
            write_json(tmp / 'model.safetensors.index.json', {
                'metadata': {'total_size': sum(t.nbytes for t in tensors.values())},
                'weight_map': {hf: name for name, group in zip(names, groups, strict=True) for hf in group}})
        dtype = str(next(iter(tensors.values())).dtype).removeprefix('torch.')
        config = hf_config(c) | {'dtype': dtype, 'torch_dtype': dtype}       # newer and older spelling
        config.pop('auto_map', None)         # points at Python files, which do not travel
        write_json(tmp / 'config.json', config)
        for pattern in ALONG if source else ():
            for file in Path(source).glob(pattern):
                shutil.copy(file, tmp / file.name)


def hf_config(c):
    """config.json of a model: the one it came from, or one written from its shape."""
    if c.hf:
        return c.hf
    name = {'qwen3': 'Qwen3', 'qwen2': 'Qwen2', 'llama': 'Llama', 'phi3': 'Phi3'}[c.family]
    return {
        'architectures': [f'{name}ForCausalLM'], 'model_type': c.family, 'vocab_size': c.V,
        'hidden_size': c.d, 'intermediate_size': c.ff, 'num_hidden_layers': c.L, 'num_attention_heads': c.H,
        'num_key_value_heads': c.G, 'head_dim': c.e, 'hidden_act': 'silu', 'rms_norm_eps': c.eps,
        'rope_theta': c.theta, 'max_position_embeddings': c.context, 'tie_word_embeddings': c.tied,
        'attention_bias': False, 'use_sliding_window': False, 'partial_rotary_factor': c.partial,
        'rope_scaling': c.rope or None, 'original_max_position_embeddings':
            c.rope.get('original_max_position_embeddings', c.context),
    }
