"""
Hugging Face folders in, Hugging Face folders out: config.json and safetensors of the Qwen3, Qwen2, Llama and
Phi-3 / Phi-4-mini families. Where an id of the hub stands in a folder's place, hub.py fetches it.

Simpler than usual: no table of architectures. Reading is one function for config.json, which refuses by
name what the decoder does not compute, and one map from our parameter names to theirs. A folder written
here loads in `transformers` and vLLM as it is.

A folder comes from somebody else: what its JSON files may hold is in tables.py, and a link in it leads to no
file outside (`member`). What it does not do: unpickle anything, or run code that comes with a model folder.

    model = load_model('Qwen/Qwen3-4B', torch.bfloat16, 'cuda')
    save_model(model, 'out/copy', source=snapshot('Qwen/Qwen3-4B'))
"""
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

from formats.hub import snapshot
from formats.tables import (
    ANOTHER_MODEL,
    CONFIG,
    FAMILY_DEFAULTS,
    INDEX,
    MODEL_TYPE,
    ROPE,
    ROPE_SCALING,
    ROPE_TYPE,
)
from model import Model, ModelConfig
from support.fields import check_fields
from support.files import open_safetensors, read_json, whole, write_json, write_safetensors
from support.runtime import UserError, shown

CLASS_NAMES = {'qwen3': 'Qwen3', 'qwen2': 'Qwen2', 'llama': 'Llama', 'phi3': 'Phi3'}
LARGEST_TEXT = 2**28            # bytes of a file without weights; the largest published tokenizers have 2**25


def member(folder, name):
    """A file of a model folder, which may be missing -> its path. A link to a file outside is a UserError: it
    could show us, or make us publish, a file of this computer. Something that is not a regular file, and a
    file that is far too large, are a UserError too.

    The hub's cache is made of links, models--owner--name/snapshots/revision/file -> ../../blobs/sha256, so
    for a folder in it everything in models--owner--name is inside.
    """
    file = Path(folder) / name
    home = Path(folder).resolve()
    in_cache = home.parent.name == 'snapshots' and home.parents[1].name.startswith('models--')
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(home.parents[1] if in_cache else home):
        raise UserError(f'{file}: a link that leads out of its folder; put the file itself there')
    if os.path.lexists(file) and not target.is_file():
        raise UserError(f'{file}: not a regular file, or a link to nothing; put the file itself there')
    size = target.stat().st_size if target.exists() else 0
    if size > LARGEST_TEXT and file.suffix != '.safetensors':
        raise UserError(f'{file}: {size:,} bytes, more than any tokenizer has; fetch it again')
    return file


# ---- config.json ------------------------------------------------------------------------------

def read_config(path_or_repo):
    """config.json of a folder or hub id -> ModelConfig."""
    file = member(snapshot(path_or_repo), 'config.json')
    return parse_config(read_json(file), file)


def parse_config(hf, file):
    """The contents of a config.json -> ModelConfig. What is not a model, or changes the mathematics in a
    way that this decoder does not know, is a UserError that names the key."""
    def expect(fine, key, what):
        if not fine:
            raise UserError(f'{file}: {key} = {shown(hf.get(key))}, {what}')

    # Each field by itself. A missing one has the default that transformers gives it in this family.
    family = check_fields(hf, MODEL_TYPE, file, ANOTHER_MODEL)['model_type']
    fields = check_fields(FAMILY_DEFAULTS[family] | hf, CONFIG, file, ANOTHER_MODEL)
    d = fields['hidden_size']
    H = fields['num_attention_heads']
    G = fields['num_key_value_heads'] or H
    e = fields['head_dim'] or FAMILY_DEFAULTS[family].get('head_dim')
    context = fields['max_position_embeddings']

    # What must fit together.
    expect(H % G == 0, 'num_key_value_heads', f'which {H} query heads cannot share evenly; fetch it again')
    if not e:
        expect(d % H == 0, 'hidden_size', f'which {H} heads cannot share evenly; fetch it again')
        e = d // H

    # What would change the mathematics. A sliding window is fine if no layer uses it or no sequence fills
    # it.
    window = fields['sliding_window'] if fields['use_sliding_window'] else None
    layer_types = fields['layer_types'] or ['sliding']
    window_is_used = any('sliding' in kind for kind in layer_types)
    fine = {
        'sliding_window': not window or not window_is_used or window >= context,
        'quantization_config': not fields['quantization_config'],
        'attention_bias': family == 'qwen2' or not fields['attention_bias'],
        'mlp_bias': not fields['mlp_bias'],
    }
    for key, is_fine in fine.items():
        expect(is_fine, key, 'which this decoder does not know; choose another model')

    theta, partial, rope = parse_rope(hf, fields, family, e, file)
    return ModelConfig(
        family, V=fields['vocab_size'], L=fields['num_hidden_layers'], d=d, H=H, G=G, e=e,
        ff=fields['intermediate_size'], tied=bool(fields['tie_word_embeddings']), theta=theta,
        eps=fields['rms_norm_eps'], context=context, partial=partial, rope=rope,
        activation=fields['hidden_act'], hf=hf)


def parse_rope(hf, fields, family, e, file):
    """The rotary settings of a config.json -> (theta, share of a head that is rotated, scaling or {}).

    Older files spell them rope_theta, partial_rotary_factor and rope_scaling; newer ones put all of them
    into rope_parameters. What is read last counts.
    """
    original = 'original_max_position_embeddings'
    given = {original: 4096} if family == 'phi3' else {}                     # transformers' default
    for key in (*ROPE, original):
        if key in hf:
            given[key] = hf[key]
    for key in ('rope_scaling', 'rope_parameters'):
        given |= fields[key] or {}
    settings = check_fields(given, ROPE, file, ANOTHER_MODEL)
    theta = float(settings['rope_theta'])
    partial = settings['partial_rotary_factor'] if family == 'phi3' else 1.0             # others ignore it

    # The numbers rotate in pairs, which must fit into a head.
    pairs = (int(e * partial) + 1) // 2
    if not 0 < 2 * pairs <= e:
        raise UserError(f'{file}: heads of {e} numbers, {int(e * partial)} of them rotated in pairs; '
                        'choose another model')

    # Each kind of scaling has numbers of its own; nothing else is kept of what the file says.
    kind = given.get('rope_type')
    if kind is None:
        kind = given.get('type', 'default')
    check_fields({'rope_type': kind}, ROPE_TYPE, file, ANOTHER_MODEL)
    scaling = {}
    for key, value in check_fields(given, ROPE_SCALING[kind], file, ANOTHER_MODEL).items():
        if value is not None:
            scaling[key] = value
    for key in ('long_factor', 'short_factor'):
        if len(scaling.get(key, [0] * pairs)) != pairs:
            raise UserError(f'{file}: {key} = {shown(scaling[key])}, not the {pairs} numbers that {pairs} '
                            'rotated pairs need; fetch it again')
    if kind == 'llama3' and scaling['low_freq_factor'] >= scaling['high_freq_factor']:
        raise UserError(f"{file}: low_freq_factor = {scaling['low_freq_factor']}, not below high_freq_factor "
                        f"= {scaling['high_freq_factor']}; fetch it again")
    return theta, partial, {'rope_type': kind} | scaling if scaling else {}


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
    """{our parameter name: the Hugging Face names whose rows it stacks}, in the order of a model's own
    parameters."""
    names = {'embed.weight': ['model.embed_tokens.weight']}

    # Phi-3 stacks q, k, v and gate, up in its files too.
    qkv = ['qkv'] if c.family == 'phi3' else ['q', 'k', 'v']
    gate_up = ['gate_up'] if c.family == 'phi3' else ['gate', 'up']
    for l in range(c.L):
        ours = f'blocks.{l}.'
        hf = f'model.layers.{l}.'
        names[f'{ours}norm1.weight'] = [f'{hf}input_layernorm.weight']
        for end in ['weight', 'bias'] if c.qkv_bias else ['weight']:
            names[f'{ours}attn.qkv.{end}'] = [f'{hf}self_attn.{part}_proj.{end}' for part in qkv]
        names[f'{ours}attn.out.weight'] = [f'{hf}self_attn.o_proj.weight']
        if c.qk_norm:
            names[f'{ours}attn.q_norm.weight'] = [f'{hf}self_attn.q_norm.weight']
            names[f'{ours}attn.k_norm.weight'] = [f'{hf}self_attn.k_norm.weight']
        names[f'{ours}norm2.weight'] = [f'{hf}post_attention_layernorm.weight']
        names[f'{ours}mlp.gate_up.weight'] = [f'{hf}mlp.{part}_proj.weight' for part in gate_up]
        names[f'{ours}mlp.down.weight'] = [f'{hf}mlp.down_proj.weight']
    names['norm.weight'] = ['model.norm.weight']
    if not c.tied:
        names['head.weight'] = ['lm_head.weight']
    return names


def splits(c, name):
    """How many rows each stacked Hugging Face tensor has, in order; [-1]: it is one tensor in the file."""
    if c.family == 'phi3':
        return [-1]
    if '.qkv.' in name:
        return [c.H * c.e, c.G * c.e, c.G * c.e]
    return [c.ff, c.ff] if '.gate_up.' in name else [-1]


# ---- folders in -------------------------------------------------------------------------------

def load_model(path_or_repo, dtype=torch.float32, device='cpu', shard=None):
    """Model of a Hugging Face folder or hub id, in eval mode.

    Weights are memory-mapped and go to dtype and device one tensor at a time. Each mapping is closed again,
    so that host memory holds one copy of the model and its largest tensor. Missing, surplus, misshapen or
    non-finite tensors are a UserError that names them.

    shard: a function that is given the model before it has any weights, and may cut them into shards
    (support.runtime.shard). Each rank then reads every tensor and keeps its own part, so no rank ever holds a
    whole model.
    """
    folder = snapshot(path_or_repo, weights=True)
    c = read_config(folder)
    files = tensor_files(folder)
    with torch.device('meta'):
        model = Model(c)
    if shard is not None:
        shard(model)

    # No tensor may be left over, apart from some that older files carry for nothing.
    names = name_map(c)
    known = {'lm_head.weight'} if c.tied else set()
    for hf_names in names.values():
        known |= set(hf_names)
    for hf_name, file in files.items():
        if hf_name not in known and not hf_name.endswith('rotary_emb.inv_freq'):
            raise UserError(f'{file}: surplus tensor {hf_name!r}; config.json describes another model')

    # Read the parts of each parameter and stack them.
    empty = dict(model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in empty.items()}
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
        if isinstance(empty[name], DTensor):
            # All ranks read the same files, so none has to send anything.
            mesh = empty[name].device_mesh
            stacked = distribute_tensor(stacked, mesh, empty[name].placements, src_data_rank=None)
            is_one = True                                        # the part is a view of the whole
        state[name] = stacked.to(device, dtype, copy=is_one)     # a copy: a mapped tensor dies with its file

    if c.tied:
        state['head.weight'] = state['embed.weight']
    model.load_state_dict(state, assign=True)
    if c.tied:
        model.head.weight = model.embed.weight                   # `assign` unties them
    return model.eval()


# What weights may be stored as. float64 holds every number of the others.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_tensor(file, name, shape):
    """One tensor of a safetensors file, memory-mapped, of this shape, of a dtype of WEIGHT_DTYPES, and
    finite; else a UserError."""
    try:
        tensor = open_safetensors(file).get_tensor(name)
    except SafetensorError as error:
        raise UserError(f'{file}: {name} cannot be read ({error}); fetch the model again') from None
    if list(tensor.shape) != shape:
        raise UserError(f'{file}: {name} has shape {list(tensor.shape)}, but config.json says {shape}')
    if tensor.dtype not in WEIGHT_DTYPES:
        raise UserError(f'{file}: {name} has dtype {str(tensor.dtype)[6:]}, but weights are read as float32, '
                        'bfloat16, float16 or float64; choose another model')
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):      # reads the numbers once and copies nothing
        raise UserError(f'{file}: {name} holds NaN or infinite numbers; fetch the model again')
    return tensor


def tensor_files(folder):
    """{Hugging Face tensor name: the file that holds it}, from the index or from the only file."""
    index = member(folder, 'model.safetensors.index.json')
    if not index.exists():
        only = member(folder, 'model.safetensors')
        if not only.exists():
            raise UserError(f'{folder}: no model.safetensors in it; pickled weights are never loaded')
        return dict.fromkeys(open_safetensors(only).keys(), only)

    # The index is somebody else's: it may name files of this folder only, and only tensors that they hold.
    weight_map = check_fields(read_json(index), INDEX, index, ANOTHER_MODEL)['weight_map']
    tensors_of = {}
    for hf_name, name in weight_map.items():
        if type(name) is not str or Path(name).name != name or not os.path.isfile(folder / name):
            raise UserError(f'{index}: names {shown(name)}, which is not there; fetch the model again')
        if name not in tensors_of:
            tensors_of[name] = set(open_safetensors(member(folder, name)).keys())
        if hf_name not in tensors_of[name]:
            raise UserError(f'{index}: {shown(hf_name)} is not in {name}; fetch the model again')
    if not weight_map:
        raise UserError(f'{index}: no tensor in its weight_map; fetch the model again')
    return {hf_name: folder / name for hf_name, name in weight_map.items()}


# ---- folders out ------------------------------------------------------------------------------

# Files that travel with the weights, so that the folder is a model that others can use.
ALONG = ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
         'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt', '*.tiktoken')


def files_along(folder):
    """The files of a model folder that travel with its weights -> list of paths. See `member` for what is
    refused."""
    files = []
    for pattern in ALONG:
        for found in sorted(Path(folder).glob(pattern)):
            files.append(member(folder, found.name))
    return files


def hf_tensors(c, state):
    """{our name: parameter}, of all parameters or of some -> {Hugging Face name: tensor}, as views."""
    tensors = {}
    for name, hf_names in name_map(c).items():
        if name in state:
            rows = splits(c, name)
            parameter = state[name].detach()
            parts = [parameter] if rows == [-1] else parameter.split(rows)
            for hf_name, part in zip(hf_names, parts, strict=True):
                tensors[hf_name] = part
    return tensors


def save_model(model, folder, source=None, state=None, shard_bytes=5 * 10**9):
    """Write a folder that `transformers` and vLLM load as it is, completely or not at all.

    source: a Hugging Face folder whose tokenizer, chat template and generation config are copied.
    state: parameters by our names, all of one dtype, where they cannot be read from the model (sharded
    ranks): a dict, or pairs (name, tensor), of which each is taken once and kept until its file is written.
    shard_bytes: larger models are cut into files of at most so many bytes, with an index.
    """
    if state is None:
        state = model.named_parameters()
    elif isinstance(state, dict):
        state = state.items()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    config = hf_config(model.config)
    config.pop('auto_map', None)             # names Python files, which do not travel

    with whole(folder) as tmp:
        tmp.mkdir()
        dtype = str(write_weights(model.config, shapes, state, tmp, shard_bytes)).removeprefix('torch.')
        config |= {'dtype': dtype, 'torch_dtype': dtype}                     # newer and older spelling
        write_json(tmp / 'config.json', config)
        for file in files_along(source) if source else ():
            shutil.copy(file, tmp / file.name)


def write_weights(c, shapes, state, folder, shard_bytes):
    """Write model.safetensors, or several files of at most `shard_bytes` bytes each and their index -> the
    dtype of the weights.

    state: (name, parameter) for every parameter, in any order. A file is written as soon as all of it has
    come. So in the order of a model's own parameters memory holds the tensors of one file.
    """
    dtype = None
    for name, parameter in state:
        if dtype is None:
            dtype = parameter.dtype
            files = plan_files(c, shapes, dtype, shard_bytes)
            file_of = {hf_name: file for file, hf_names in files.items() for hf_name in hf_names}
            waiting = {file: {} for file in files}
        assert parameter.dtype == dtype, f'{name} is {parameter.dtype}, and those before it are {dtype}'

        for hf_name, part in hf_tensors(c, {name: parameter}).items():
            file = file_of[hf_name]
            waiting[file][hf_name] = part.cpu().contiguous()
            if len(waiting[file]) == len(files[file]):
                write_safetensors(waiting.pop(file), folder / file, {'format': 'pt'})
    assert not waiting, f'parameters of {list(waiting)} are missing'

    if len(files) > 1:
        total = sum(shape.numel() for name, shape in shapes.items()) * dtype.itemsize
        write_json(folder / 'model.safetensors.index.json',
                   {'metadata': {'total_size': total}, 'weight_map': file_of})
    return dtype


def plan_files(c, shapes, dtype, shard_bytes):
    """Which tensors lie in which file -> {file: [Hugging Face names]}, each file of at most `shard_bytes`
    bytes unless it holds one tensor. Known from the shapes, before there is a tensor."""
    empty = {name: torch.empty(shape, dtype=dtype, device='meta') for name, shape in shapes.items()}
    groups = [[]]
    size = 0                                 # bytes in the last group
    for hf_name, tensor in hf_tensors(c, empty).items():
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(hf_name)
        size += tensor.nbytes
    if len(groups) == 1:
        return {'model.safetensors': groups[0]}
    files = {}
    for number, group in enumerate(groups, 1):
        files[f'model-{number:05d}-of-{len(groups):05d}.safetensors'] = group
    return files
