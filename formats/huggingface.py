"""
Hugging Face folders and hub ids in, Hugging Face folders out: config.json and safetensors of the Qwen3,
Qwen2, Llama and Phi-3 / Phi-4-mini families.

Simpler than usual: no table of architectures. Reading is one function for config.json, which refuses by
name what the decoder does not compute, and one map from our parameter names to theirs. A folder written
here loads in `transformers` and vLLM as it is.

What it does not do: unpickle anything, or run code that comes with a model folder.

    model = load_model('Qwen/Qwen3-4B', torch.bfloat16, 'cuda')
    save_model(model, 'out/copy', source=snapshot('Qwen/Qwen3-4B'))
"""
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from model import ACTIVATIONS, Model, ModelConfig
from support.files import open_safetensors, read_json, whole, write_json, write_safetensors
from support.runtime import UserError

CLASS_NAMES = {'qwen3': 'Qwen3', 'qwen2': 'Qwen2', 'llama': 'Llama', 'phi3': 'Phi3'}


def snapshot(path_or_repo, weights=False, dataset=False):
    """A local folder as it is; a hub id, owner/name or owner/name@revision, downloaded once -> Path.

    Pickled files are never downloaded, weights only if asked for. dataset: the id is a data set's.
    """
    path_or_repo = str(path_or_repo)
    if path_or_repo and Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    hub = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', path_or_repo)
    if not hub:
        raise UserError(f'{path_or_repo!r}: no such folder, and not a hub id (owner/name)')

    patterns = ['*.json', '*.jinja', '*.txt', '*.tiktoken']
    if weights:
        patterns.append('*.safetensors')
    if dataset:
        patterns = ['*.parquet', '*.jsonl', '*.json']

    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub[1], revision=hub[2], repo_type='dataset' if dataset else 'model',
                                      allow_patterns=patterns))
    except Exception as error:               # the library lets the errors of its network libraries through
        first_line = str(error).split('\n')[0]
        raise UserError(f'{path_or_repo}: no such folder, and the hub did not give it '
                        f'({type(error).__name__}: {first_line[:120]})') from None


# ---- config.json ------------------------------------------------------------------------------

def read_config(path_or_repo):
    """config.json of a folder or hub id -> ModelConfig."""
    file = snapshot(path_or_repo) / 'config.json'
    return parse_config(read_json(file), file)


def parse_config(hf, file):
    """The contents of a config.json -> ModelConfig. What is not a model, or changes the mathematics in a
    way that this decoder does not know, is a UserError that names the key."""
    def expect(fine, key, value, what):
        if not fine:
            raise UserError(f'{file}: {key} = {value!r}, {what}')

    family = hf.get('model_type')
    expect(family in tuple(CLASS_NAMES), 'model_type', family,
           f'but this decoder reads {", ".join(CLASS_NAMES)}')

    # The sizes. A missing key has the default that transformers gives it.
    required = ('num_attention_heads', 'hidden_size', 'vocab_size', 'num_hidden_layers', 'intermediate_size')
    defaults = {'num_key_value_heads': hf.get('num_attention_heads'),
                'head_dim': 128 if family == 'qwen3' else 0,                 # 0: hidden_size / heads
                'max_position_embeddings': 2048}
    sizes = {}
    for key in (*required, *defaults):
        value = defaults.get(key) if hf.get(key) is None else hf[key]
        expect(type(value) is int and (value > 0 or key == 'head_dim' and value == 0), key, value,
               'no whole number above 0; is this a model?')
        sizes[key] = value
    H = sizes['num_attention_heads']
    G = sizes['num_key_value_heads']
    e = sizes['head_dim'] or sizes['hidden_size'] // H
    context = sizes['max_position_embeddings']
    expect(H % G == 0, 'num_key_value_heads', G, f'which {H} query heads cannot share evenly')

    # What would change the mathematics. A sliding window is fine if no layer uses it or no sequence fills
    # it.
    window = hf.get('sliding_window') if hf.get('use_sliding_window', family == 'phi3') else None
    layer_types = hf.get('layer_types') or ['sliding']
    window_is_used = any('sliding' in kind for kind in layer_types)
    fine = {
        'sliding_window': not window or not window_is_used or window >= context,
        'quantization_config': not hf.get('quantization_config'),
        'hidden_act': hf.get('hidden_act', 'silu') in tuple(ACTIVATIONS),
        'attention_bias': family == 'qwen2' or not hf.get('attention_bias'),
        'mlp_bias': not hf.get('mlp_bias'),
    }
    for key, is_fine in fine.items():
        expect(is_fine, key, hf.get(key), 'which this decoder does not know; choose another model')

    eps = hf.get('rms_norm_eps', 1e-5 if family == 'phi3' else 1e-6)
    expect(is_positive(eps), 'rms_norm_eps', eps, 'not a positive number; fetch it again')
    tied = hf.get('tie_word_embeddings', False)
    expect(tied in (True, False, None), 'tie_word_embeddings', tied, 'neither true nor false; fetch it again')
    theta, partial, rope = parse_rope(hf, family, e, expect)
    return ModelConfig(
        family, V=sizes['vocab_size'], L=sizes['num_hidden_layers'], d=sizes['hidden_size'], H=H, G=G, e=e,
        ff=sizes['intermediate_size'], tied=bool(tied), theta=theta, eps=eps, context=context,
        partial=partial, rope=rope, activation=hf.get('hidden_act', 'silu'), hf=hf)


def is_positive(value):
    """Is this value of a JSON file a number above 0? True and NaN are not."""
    return type(value) in (int, float) and value > 0


def parse_rope(hf, family, e, expect):
    """The rotary settings of a config.json -> (theta, share of a head that is rotated, scaling or {}).

    Older files spell them rope_theta, partial_rotary_factor and rope_scaling; newer ones put all of them
    into rope_parameters. What is read last counts.
    """
    original = 'original_max_position_embeddings'
    rope = {'rope_theta': 1e4, 'partial_rotary_factor': 1.0}
    for key in (*rope, original):
        if key in hf:
            rope[key] = hf[key]
    for key in ('rope_scaling', 'rope_parameters'):
        group = hf.get(key) or {}
        expect(isinstance(group, dict), key, group, 'not a group of names; fetch it again')
        rope |= group

    # Each kind of scaling has numbers of its own; nothing else is kept of what the group says.
    kind = rope.get('rope_type') or rope.get('type', 'default')
    numbers = {'default': [], 'linear': ['factor'], 'longrope': [original],
               'llama3': ['factor', 'low_freq_factor', 'high_freq_factor', original]}
    expect(kind in tuple(numbers), 'rope_type', kind,
           'which this decoder does not know; choose another model')
    for key in ('rope_theta', 'partial_rotary_factor', *numbers[kind]):
        value = rope.get(key)
        expect(is_positive(value), key, value, 'not a positive number; fetch it again')
    theta = float(rope['rope_theta'])
    partial = rope['partial_rotary_factor'] if family == 'phi3' else 1.0     # the others ignore it
    if kind == 'default':
        return theta, partial, {}
    scaling = {'rope_type': kind}
    for key in numbers[kind]:
        scaling[key] = rope[key]
    if kind == 'longrope':
        scaling |= parse_longrope(rope, int(e * partial) // 2, expect)
    return theta, partial, scaling


def parse_longrope(rope, pairs, expect):
    """longrope's own settings: a divisor for each of the pairs of numbers that rotate together, within and
    beyond the original context, and two numbers that may be missing."""
    scaling = {}
    for key in ('long_factor', 'short_factor'):
        divisors = rope.get(key)
        fine = isinstance(divisors, list) and len(divisors) == pairs and all(map(is_positive, divisors))
        expect(fine, key, divisors, f'not the {pairs} numbers that {pairs} rotated pairs need')
        scaling[key] = divisors
    for key in ('factor', 'attention_factor'):
        if rope.get(key) is not None:
            expect(is_positive(rope[key]), key, rope[key], 'not a positive number; fetch it again')
            scaling[key] = rope[key]
    return scaling


SHAPE_KEYS = ('model_type', 'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
              'num_attention_heads', 'num_key_value_heads', 'head_dim', 'hidden_act', 'rms_norm_eps',
              'max_position_embeddings', 'tie_word_embeddings')
ROPE_KEYS = ('rope_theta', 'partial_rotary_factor', 'rope_scaling', 'original_max_position_embeddings')


def hf_config(c):
    """ModelConfig -> the contents of its config.json: what it was read from, and over it the shape that the
    model has now, so that a changed model (fewer layers, another activation) is described as it is."""
    new = {
        'architectures': [f'{CLASS_NAMES[c.family]}ForCausalLM'], 'model_type': c.family,
        'vocab_size': c.V, 'hidden_size': c.d, 'intermediate_size': c.ff, 'num_hidden_layers': c.L,
        'num_attention_heads': c.H, 'num_key_value_heads': c.G, 'head_dim': c.e,
        'hidden_act': c.activation, 'rms_norm_eps': c.eps, 'rope_theta': c.theta,
        'max_position_embeddings': c.context, 'tie_word_embeddings': c.tied, 'attention_bias': False,
        'use_sliding_window': False, 'partial_rotary_factor': c.partial, 'rope_scaling': c.rope or None,
        'original_max_position_embeddings': c.rope.get('original_max_position_embeddings', c.context),
    }
    if not c.hf:
        return new
    hf = dict(c.hf)
    before = parse_config(hf, 'config.json')
    for key in SHAPE_KEYS:
        hf[key] = new[key]
    if c.family != before.family:
        hf['architectures'] = new['architectures']

    # The rotary settings have two spellings. They stay as they were, or are written anew in the older one,
    # which everybody reads.
    if (c.theta, c.partial, c.rope) != (before.theta, before.partial, before.rope):
        hf.pop('rope_parameters', None)
        for key in ROPE_KEYS:
            hf[key] = new[key]

    # Lists with an entry for each layer must follow the number of layers. No layer has a window here.
    if (c.L, c.context) != (before.L, before.context):
        if hf.get('layer_types'):
            hf['layer_types'] = ['full_attention'] * c.L
        if hf.get('max_window_layers') is not None:
            hf['max_window_layers'] = c.L    # windows would begin above this layer
        if hf.get('sliding_window') and hf['sliding_window'] < c.context:
            hf['sliding_window'] = None
            hf['use_sliding_window'] = False
    return hf


# ---- names ------------------------------------------------------------------------------------

def name_map(c):
    """{our parameter name: the Hugging Face names whose rows it stacks}."""
    names = {'embed.weight': ['model.embed_tokens.weight'], 'norm.weight': ['model.norm.weight']}
    if not c.tied:
        names['head.weight'] = ['lm_head.weight']

    # Phi-3 stacks q, k, v and gate, up in its files too.
    qkv = ['qkv'] if c.family == 'phi3' else ['q', 'k', 'v']
    gate_up = ['gate_up'] if c.family == 'phi3' else ['gate', 'up']
    for l in range(c.L):
        ours = f'blocks.{l}.'
        hf = f'model.layers.{l}.'
        for end in ['weight', 'bias'] if c.qkv_bias else ['weight']:
            names[f'{ours}attn.qkv.{end}'] = [f'{hf}self_attn.{part}_proj.{end}' for part in qkv]
        names[f'{ours}attn.out.weight'] = [f'{hf}self_attn.o_proj.weight']
        if c.qk_norm:
            names[f'{ours}attn.q_norm.weight'] = [f'{hf}self_attn.q_norm.weight']
            names[f'{ours}attn.k_norm.weight'] = [f'{hf}self_attn.k_norm.weight']
        names[f'{ours}mlp.gate_up.weight'] = [f'{hf}mlp.{part}_proj.weight' for part in gate_up]
        names[f'{ours}mlp.down.weight'] = [f'{hf}mlp.down_proj.weight']
        names[f'{ours}norm1.weight'] = [f'{hf}input_layernorm.weight']
        names[f'{ours}norm2.weight'] = [f'{hf}post_attention_layernorm.weight']
    return names


def splits(c, name):
    """How many rows each stacked Hugging Face tensor has, in order; [-1]: it is one tensor in the file."""
    if c.family == 'phi3':
        return [-1]
    if '.qkv.' in name:
        return [c.H * c.e, c.G * c.e, c.G * c.e]
    return [c.ff, c.ff] if '.gate_up.' in name else [-1]


# ---- folders in -------------------------------------------------------------------------------

def load_model(path_or_repo, dtype=torch.float32, device='cpu'):
    """Model of a Hugging Face folder or hub id, in eval mode.

    Weights are memory-mapped and go to dtype and device one tensor at a time. Each mapping is closed again,
    so that host memory holds one copy of the model and its largest tensor. Missing, surplus, misshapen or
    non-finite tensors are a UserError that names them.
    """
    folder = snapshot(path_or_repo, weights=True)
    c = read_config(folder)
    files = tensor_files(folder)
    with torch.device('meta'):
        model = Model(c)

    # No tensor may be left over, apart from some that older files carry for nothing.
    names = name_map(c)
    known = {'lm_head.weight'} if c.tied else set()
    for hf_names in names.values():
        known |= set(hf_names)
    for hf_name, file in files.items():
        if hf_name not in known and not hf_name.endswith('rotary_emb.inv_freq'):
            raise UserError(f'{file}: surplus tensor {hf_name!r}; config.json describes another model')

    # Read the parts of each parameter and stack them.
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    state = {}
    for name, hf_names in names.items():
        parts = []
        for hf_name, rows in zip(hf_names, splits(c, name), strict=True):
            if hf_name not in files:
                raise UserError(f'{folder}: tensor {hf_name!r} is missing; fetch the model again')
            shape = shapes[name] if rows == -1 else [rows, *shapes[name][1:]]
            parts.append(read_tensor(files[hf_name], hf_name, shape))
        is_one = len(parts) == 1
        stacked = parts[0] if is_one else torch.cat(parts)
        state[name] = stacked.to(device, dtype, copy=is_one)     # a copy: a mapped tensor dies with its file

    if c.tied:
        state['head.weight'] = state['embed.weight']
    model.load_state_dict(state, assign=True)
    if c.tied:
        model.head.weight = model.embed.weight                   # `assign` unties them
    return model.eval()


def read_tensor(file, name, shape):
    """One tensor of a safetensors file, memory-mapped, of this shape and finite; else a UserError."""
    try:
        tensor = open_safetensors(file).get_tensor(name)
    except SafetensorError as error:
        raise UserError(f'{file}: {name} cannot be read ({error}); fetch the model again') from None
    if list(tensor.shape) != shape:
        raise UserError(f'{file}: {name} has shape {list(tensor.shape)}, but config.json says {shape}')
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):      # reads the numbers once and copies nothing
        raise UserError(f'{file}: {name} holds NaN or infinite numbers; fetch the model again')
    return tensor


def tensor_files(folder):
    """{Hugging Face tensor name: the file that holds it}, from the index or from the only file."""
    index = folder / 'model.safetensors.index.json'
    if not index.exists():
        only = folder / 'model.safetensors'
        if not only.exists():
            raise UserError(f'{folder}: no model.safetensors in it; pickled weights are never loaded')
        return dict.fromkeys(open_safetensors(only).keys(), only)

    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f'{index}: no weight_map in it; fetch the model again')
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f'{index}: names {name}, which is not there; fetch the model again')
    return {hf_name: folder / name for hf_name, name in weight_map.items()}


# ---- folders out ------------------------------------------------------------------------------

# Files that travel with the weights, so that the folder is a model that others can use.
ALONG = ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
         'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt', '*.tiktoken')


def hf_tensors(c, state):
    """{our name: parameter} -> {Hugging Face name: tensor}, as views."""
    tensors = {}
    for name, hf_names in name_map(c).items():
        rows = splits(c, name)
        parameter = state[name].detach()
        parts = [parameter] if rows == [-1] else parameter.split(rows)
        for hf_name, part in zip(hf_names, parts, strict=True):
            tensors[hf_name] = part
    return tensors


def save_model(model, folder, source=None, state=None, shard_bytes=5 * 10**9):
    """Write a folder that `transformers` and vLLM load as it is, completely or not at all.

    source: a Hugging Face folder whose tokenizer, chat template and generation config are copied.
    state: parameters by our names, where they cannot be read from the model (sharded ranks).
    shard_bytes: larger models are cut into files of at most so many bytes, with an index.
    """
    c = model.config
    tensors = {}
    for hf_name, tensor in hf_tensors(c, state or dict(model.named_parameters())).items():
        tensors[hf_name] = tensor.cpu().contiguous()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix('torch.')
    config = hf_config(c) | {'dtype': dtype, 'torch_dtype': dtype}           # newer and older spelling
    config.pop('auto_map', None)             # names Python files, which do not travel

    with whole(folder) as tmp:
        tmp.mkdir()
        write_weights(tensors, tmp, shard_bytes)
        write_json(tmp / 'config.json', config)
        for pattern in ALONG if source else ():
            for file in Path(source).glob(pattern):
                shutil.copy(file, tmp / file.name)


def write_weights(tensors, folder, shard_bytes):
    """Tensors -> model.safetensors, or several files of at most `shard_bytes` bytes each and their
    index."""
    groups = [{}]
    size = 0                                 # bytes in the last group
    for hf_name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][hf_name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        write_safetensors(tensors, folder / 'model.safetensors', {'format': 'pt'})
        return

    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f'model-{number:05d}-of-{len(groups):05d}.safetensors'
        write_safetensors(group, folder / name, {'format': 'pt'})
        weight_map |= dict.fromkeys(group, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / 'model.safetensors.index.json',
               {'metadata': {'total_size': total}, 'weight_map': weight_map})
