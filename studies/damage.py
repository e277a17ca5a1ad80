"""
Damage a model on purpose, so that distillation from the intact one can heal it.

    python -m studies.damage MODEL OUT noise=0.1                    noise of 0.1 standard deviations; seed=0
    python -m studies.damage MODEL OUT drop=6,10,14,18,22,26        remove these layers, counted from 1
    python -m studies.damage MODEL OUT bits=3 group=32              round to 8 values in groups of 32 numbers

MODEL is a Hugging Face folder or an id of the hub. OUT becomes a Hugging Face folder of float32 weights that
`transformers` loads, with tokenizer and generation settings of MODEL. Its config.json says in `kept_layers`
which layers of the intact model it has; with layer_map='kept' distill.py pairs each with its own. The file
damage.json says what was done, and to which model.

Simpler than tools for pruning and quantisation: nothing is chosen by data, and rounded weights are stored as
ordinary floats, so a rounded model is neither smaller nor faster. What it does not do: heal. For that see
docs/real_model.md.
"""
import ast
import os
from dataclasses import replace

import torch
from torch import nn

from formats.hub import snapshot
from formats.huggingface import load_model, save_model
from support.command_help import command_words
from support.fields import Field, check_fields
from support.files import existing_above, whole, write_json
from support.provenance import weights_digest
from support.runtime import UserError, print0, run, shown

# Each kind of damage, and the options that it has.
OPTIONS = {
    'noise': {'noise': Field(float, 1e-6, 100), 'seed': Field(int, 0, 2**63 - 1, default=0)},
    'drop': {'drop': Field(list, 1, 1000, items=Field(int, 1, 1000))},
    'bits': {'bits': Field(int, 1, 16), 'group': Field(int, 2, 2**20, default=32)},
}
ADVICE = 'see --help'


# ---- three kinds of damage: each changes a model in place --------------------------------------------

def add_noise(model, sigmas, seed=0):
    """Add Gaussian noise to every weight matrix: `sigmas` standard deviations of that matrix."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter += sigmas * parameter.std() * torch.randn(parameter.shape, generator=generator)


def drop_layers(model, dropped):
    """Remove the layers with these numbers, counted from 1. The layers that stay are not changed."""
    c = model.config
    unknown = [layer for layer in dropped if layer > c.L]
    if unknown:
        raise UserError(f'drop={unknown[0]}: the model has {c.L} layers; choose from 1 to {c.L}')
    stay = [layer for layer in range(1, c.L + 1) if layer not in dropped]
    if not stay:
        raise UserError(f'drop={shown(dropped)}: no layer of {c.L} would stay; drop fewer')

    # A model that was pruned before names layers of the intact one, and so does what is left of it.
    before = kept_layers(c)
    model.blocks = nn.ModuleList(model.blocks[layer - 1] for layer in stay)
    model.config = replace(c, L=len(stay), hf=c.hf | {'kept_layers': [before[layer - 1] for layer in stay]})


def round_blocks(model, bits, group):
    """Round the weight matrices of all blocks. Embedding and head stay as they are, as most quantisers leave
    them."""
    for name, parameter in model.blocks.named_parameters():
        if parameter.ndim == 2:
            if parameter.shape[1] % group:
                raise UserError(f'group={group} does not divide the {parameter.shape[1]} columns of blocks.'
                                f'{name}; choose a divisor')
            parameter.copy_(rounded(parameter, bits, group))


def rounded(weight, bits, group):
    """Round a matrix (out, in) to the nearest of 2^bits values -> (out, in).

    Each `group` neighbours of a row have values of their own, evenly spaced from the least of these
    neighbours to the greatest. Example: with 2 bits [0.0, 0.4, 1.1, 3.0] becomes [0, 0, 1, 3].
    """
    groups = weight.unflatten(1, (-1, group))                                # (out, in / group, group)
    least = groups.amin(-1, keepdim=True)
    greatest = groups.amax(-1, keepdim=True)
    spacing = (greatest - least) / (2**bits - 1)

    # Where all neighbours are equal the spacing is 0, and the level may be any.
    level = ((groups - least) / spacing.clamp(min=1e-30)).round()
    return (least + level * spacing).flatten(1)


# ---- the folder --------------------------------------------------------------------------------------

def kept_layers(c):
    """Which layers of the intact model a model has, as its config.json says; all, if it says nothing."""
    return c.hf.get('kept_layers') or list(range(1, c.L + 1))


@torch.no_grad()
def damage(source, out, options):
    """Write a damaged copy of a model as a folder, completely or not at all.

    options: a kind of damage with its value, and its other options: {'bits': 3, 'group': 32}.
    """
    kind = next(iter(options))
    assert kind in OPTIONS, kind
    folder = snapshot(source, weights=True)
    model = load_model(folder)
    if kind == 'noise':
        add_noise(model, options['noise'], options['seed'])
    if kind == 'drop':
        drop_layers(model, options['drop'])
    if kind == 'bits':
        round_blocks(model, options['bits'], options['group'])

    # Every damaged folder says which layers it has, so that layer_map='kept' fits all kinds of damage.
    kept = kept_layers(model.config)
    model.config = replace(model.config, hf=model.config.hf | {'kept_layers': kept})
    with whole(out) as temporary:
        save_model(model, temporary, source=folder)
        write_json(temporary / 'damage.json', {'damage': options, 'model': str(source),
                                               'model_digest': weights_digest(folder), 'kept_layers': kept})
    return model


# ---- the script --------------------------------------------------------------------------------------

def settings(words):
    """The words of a command line -> (model, folder to write, options); a UserError says what is wrong."""
    places = [word for word in words if '=' not in word]
    if len(places) != 2 or any(place.startswith('-') for place in places):
        raise UserError(f'{shown(" ".join(places))}: wants a model and a folder to write, then one of '
                        f'{", ".join(f"{kind}=" for kind in OPTIONS)}; {ADVICE}')

    # A value is a number, or numbers with commas between them.
    given = {}
    for word in words:
        name, equals, text = word.partition('=')
        if equals:
            given[name] = read_value(name, text)
    kinds = [kind for kind in OPTIONS if kind in given]
    if len(kinds) != 1:
        raise UserError(f'{" and ".join(kinds) or "no kind of damage"} given; give one of '
                        f'{", ".join(f"{kind}=" for kind in OPTIONS)}')

    # The kind comes first in what is returned.
    table = OPTIONS[kinds[0]]
    for name in given:
        if name not in table:
            raise UserError(f'{shown(name)}: not an option of {kinds[0]}=; leave it out, or {ADVICE}')
    return *places, check_fields(given, table, 'command line', ADVICE)


def read_value(name, text):
    """A value of the command line: a number, or for `drop` a list of numbers. What is neither stays a text,
    which no option accepts."""
    try:
        value = ast.literal_eval(text)       # literals only
    except (ValueError, SyntaxError, MemoryError, RecursionError):           # the last two: deep nesting
        return text
    if name == 'drop':
        return list(value) if isinstance(value, tuple) else [value]
    return value


def main(given):
    source, out, options = given
    # What is there may be somebody's only copy of a model.
    existing_above(out)
    if os.path.lexists(out):
        raise UserError(f'{out}: is there already; delete it, or choose another folder')
    c = damage(source, out, options).config
    done = ' '.join(f'{name}={value}' for name, value in options.items())
    print0(f'{out}: {source} with {done}; {c.L} layers, {c.count() / 1e6:.2f}M weights')


if __name__ == '__main__':
    run(main, lambda: settings(command_words('studies/damage.py')))
