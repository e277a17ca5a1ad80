"""
A bridge on disk: bridge.py writes it, distill.py reads it. No fitting code is needed to read one.

bridge.safetensors holds mean, P_t, P_s and b_s of every matched student layer in float32, and in
its metadata a fingerprint: which models and tokenizers it was made for, and how. Using it for
anything else is an error and not a worse run. bridge.json holds the same fingerprint with the
figures that bridge.py measured.

Simpler than usual: no pickle, no class registry. What it does not do: compare the weights of the
two models; the fingerprint has their names and shapes.

Letters: K rows, d width (d_s student, d_t teacher), r rank.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from support.fields import Field, check_fields
from support.files import digest, existing_above, open_safetensors, whole, write_json, write_safetensors
from support.runtime import UserError, shown

SAVED_ROWS = 256                # rows of P_t and P_s that are always saved, where there are as many
PARTS = ('mean', 'P_t', 'P_s', 'b_s')
OURS = ('rollouts.jsonl', 'bridge.safetensors', 'bridge.json', 'bridge.png')

# What the metadata of bridge.safetensors may hold. The rest of the fingerprint is not in this table, because
# it is compared with what a run expects.
two_numbers = Field(list, 2, 2, items=Field(int, 1))
MADE = {'d': two_numbers, 'L': two_numbers, 'phi': Field(dict, 1, items=Field(int, 1)),
        'rank': Field(int, 1), 'ranks': Field(int, 1)}


def check_folder(folder, out_dir):
    """A folder that holds other files and no bridge, or that is the folder of a run, is a UserError."""
    folder = Path(folder)
    if os.path.realpath(folder) == os.path.realpath(out_dir):
        raise UserError(f'{folder}: is out_dir as well, the folder of the run; choose another bridge=')
    existing_above(folder)
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith('.'))
    if names and not set(names) & set(OURS):
        raise UserError(f'{folder}: holds {shown(names[0])} and no bridge; choose another bridge=')


@dataclass
class Bridge:
    """A bridge of rank r, read back in float32. The dictionaries have student layers as keys."""
    layer_map: dict             # {student layer: teacher layer}
    rank: int
    mean: dict                  # {layer: (d_t,)}
    P_t: dict                   # {layer: (r, d_t)}
    P_s: dict                   # {layer: (2, r, d_s)}
    b_s: dict                   # {layer: (2, r)}

    def teacher(self, layer, y):
        """Project teacher states y (K, d_t) that belong to this student layer -> (K, r)."""
        return (y.float() - self.mean[layer]) @ self.P_t[layer].t()


def fingerprint(cfg, student, teacher, tok_s, tok_t):
    """What a bridge is tied to: both models (their names and ModelConfigs), their tokenizers, and
    how the teacher reads the answers."""
    tokens = []
    for tok in (tok_s, tok_t):
        tokens.append(digest(sorted(map(str, tok.words.items()))))
    return {
        'student': cfg['student'],
        'teacher': cfg['teacher'],
        'd': [student.d, teacher.d],
        'L': [student.L, teacher.L],
        'tokens': tokens,
        'pair': cfg['pair'],
        'teacher_ids': cfg['teacher_ids'],
        'layer_map': cfg['layer_map'],
    }


def settings_of_fit(cfg, layer_map):
    """What else is written beside the fingerprint: how the bridge was fitted, and between which layers."""
    keys = ('positions', 'bridge_prompts', 'bridge_held_out', 'bridge_fit', 'bridge_ridge', 'bridge_bias')
    phi = {str(layer): layer_t for layer, layer_t in layer_map.items()}
    return {key: cfg[key] for key in keys} | {'phi': phi}


def save_bridge(folder, bridge, made, figures):
    """Write bridge.safetensors and bridge.json.

    bridge: {student layer: LayerBridge} of full rank. made: the fingerprint and the settings of the
    fit. figures: what bridge.report returned. The rows of the rank that will be used and of the
    rank that Theorem 3 recommends are always saved.
    """
    rows = max(SAVED_ROWS, figures['used'], figures['rank'])

    # P_s and b_s have an axis for the class before their rows.
    tensors = {}
    for layer, (mean, P_t, P_s, b_s) in bridge.items():
        cut = (mean, P_t[:rows], P_s[:, :rows], b_s[:, :rows])
        for name, tensor in zip(PARTS, cut, strict=True):
            tensors[f'{name}.{layer}'] = tensor.float().contiguous().cpu()

    # With the fingerprint: the rank that Theorem 3 recommends, and how many ranks were fitted.
    ranks = {'rank': figures['rank'], 'ranks': figures['ranks']}
    metadata = {'bridge': json.dumps(made | ranks)}
    try:
        json.dumps(figures, allow_nan=False)         # JSON has no NaN: others could not read the file
    except ValueError:
        raise UserError(f'{folder}: what was measured is NaN or infinite, so nothing is saved; raise '
                        'bridge_prompts=') from None
    with whole(folder / 'bridge.safetensors') as temporary:
        write_safetensors(tensors, temporary, metadata)
    write_json(folder / 'bridge.json', made | figures)


def load_bridge(path, rank, layers, expected, device):
    """Read a bridge (a folder, or the file itself) for some student layers -> Bridge.

    rank: 0 means the rank that Theorem 3 recommends. expected: the `fingerprint` of this run; a
    bridge that was made for something else is a UserError that says for what.
    """
    file = Path(path)
    if file.is_dir():
        file = file / 'bridge.safetensors'
    saved = open_safetensors(file)
    made = check_fingerprint(file, saved, layers, expected)

    bridge = Bridge({}, rank or made['rank'], {}, {}, {}, {})
    for layer in layers:
        mean, P_t, P_s, b_s = (tensor.to(device) for tensor in read_layer(file, saved, layer, made))
        check_rank(file, bridge.rank, len(P_t), made)

        # Rank r is the first r rows of what was fitted.
        bridge.layer_map[layer] = made['phi'][str(layer)]
        bridge.mean[layer] = mean
        bridge.P_t[layer] = P_t[:bridge.rank]
        bridge.P_s[layer] = P_s[:, :bridge.rank].contiguous()
        bridge.b_s[layer] = b_s[:, :bridge.rank].contiguous()
    return bridge


def read_layer(file, saved, layer, made):
    """mean, P_t, P_s and b_s of a student layer; a UserError if they do not belong together."""
    damaged = UserError(f'{file}: layer {layer} is damaged; rerun bridge.py')
    try:
        parts = [saved.get_tensor(f'{name}.{layer}') for name in PARTS]
    except SafetensorError:
        raise damaged from None
    d_s, d_t = made['d']
    rows = len(parts[1]) if parts[1].dim() else 0
    shapes = [(d_t,), (rows, d_t), (2, rows, d_s), (2, rows)]
    for part, shape in zip(parts, shapes, strict=True):
        if part.shape != shape or part.dtype != torch.float32 or not part.isfinite().all():
            raise damaged
    return parts


def check_rank(file, wanted, rows, made):
    """A UserError if a rank was not fitted, or is not among the `rows` ranks that were saved."""
    fitted = made['ranks']
    if wanted > fitted:
        raise UserError(f'{file}: fitted for ranks 1 to {fitted}, but bridge_rank={wanted}; lower '
                        'it, or if both models are wider, rerun bridge.py with more prompts')
    if wanted > rows:
        raise UserError(f'{file}: holds ranks 1 to {rows} of {fitted}, but bridge_rank={wanted}; '
                        f'lower it, or rerun bridge.py with bridge_rank={wanted}')


def check_fingerprint(file, saved, layers, expected):
    """The fingerprint in an open safetensors file; a UserError if it is not there, is not
    `expected`, or lacks one of the layers."""
    advice = 'not a bridge; make one with bridge.py'
    try:
        made = json.loads((saved.metadata() or {})['bridge'])
    except (KeyError, ValueError, RecursionError):
        raise UserError(f'{file}: {advice}') from None
    check_fields(made, MADE, str(file), advice)
    for key, value in expected.items():
        if made.get(key) != value:
            raise UserError(f'{file}: made for {key}={shown(made.get(key))}, but here it is {shown(value)}; '
                            'rerun bridge.py')

    # The pairs of layers: numbers of layers that both models have.
    fitted_layers = list(made['phi'])                # as strings: JSON has no other keys
    L_s, L_t = made['L']
    for layer, layer_t in made['phi'].items():
        if layer not in map(str, range(1, L_s + 1)) or layer_t > L_t:
            raise UserError(f'{file}: layers {shown(layer)} -> {layer_t} of {L_s} and {L_t}; {advice}')
    missing = [layer for layer in layers if str(layer) not in fitted_layers]
    if missing:
        choice = ','.join(fitted_layers)
        raise UserError(f'{file}: has no layer {missing[0]}; set layers=[{choice}], or rerun '
                        'bridge.py')
    return made
