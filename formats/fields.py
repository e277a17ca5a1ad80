"""
What the fields of a model folder's JSON files may hold: a table for each kind of file, and `checked`, which
holds an object of such a file against a table.

A folder comes from somebody else, so every field that is read has a type and a range here, and what is
missing has the value that transformers gives it. The bounds are far beyond every published model. They are
there so that a number cannot hang a loop, overflow a float or fill the memory.

    fields = checked(read_json(file), CONFIG, file)
    fields['num_hidden_layers']              # a whole number from 1 to 1000, for sure

Simpler than a schema language: a kind of value is a function that says yes or no, and the words for what it
wants. Fields that are not in the table are not read, and may hold anything. What two fields mean together
is checked where they are used.
"""
import reprlib
from collections.abc import Callable
from typing import NamedTuple

from model import ACTIVATIONS, FAMILIES
from support.runtime import UserError


class Kind(NamedTuple):
    """What a field may hold."""
    fits: Callable              # value -> may it be this?
    wants: str                  # the same in words, for an error


def whole(low, high):
    """A whole number. true is none, and neither is 2.0."""
    return Kind(lambda value: type(value) is int and low <= value <= high,
                f'a whole number from {low} to {high}')


def number(low, high):
    """A number. true, NaN and infinity are none."""
    return Kind(lambda value: type(value) in (int, float) and low <= value <= high,
                f'a number from {low:g} to {high:g}')


def word(*words):
    return Kind(lambda value: type(value) is str and value in words, f'one of {", ".join(words)}')


def text(longest):
    return Kind(lambda value: type(value) is str and len(value) <= longest,
                f'a text of at most {longest} characters')


def items(kind, longest=1000):
    """A list of values of one kind."""
    return Kind(lambda value: type(value) is list and len(value) <= longest and all(map(kind.fits, value)),
                f'a list, each entry {kind.wants}')


def group(**kinds):
    """An object that has at least these fields."""
    def fits(value):
        return type(value) is dict and all(kind.fits(value.get(key)) for key, kind in kinds.items())
    return Kind(fits, f'an object with {", ".join(kinds) or "names"}')


def either(*kinds):
    return Kind(lambda value: any(kind.fits(value) for kind in kinds),
                ', or '.join(kind.wants for kind in kinds))


switch = Kind(lambda value: type(value) is bool, 'true or false')
null = Kind(lambda value: value is None, 'null')
REQUIRED = object()             # in the place of a default: the field must be there

# ---- the tables: field -> (what it may hold, what it is if it is missing) ---------------------------

VOCABULARY = 10**7              # more tokens than any vocabulary has

CONFIG = {
    'model_type':              (word(*FAMILIES), REQUIRED),
    'vocab_size':              (whole(1, VOCABULARY), REQUIRED),
    'hidden_size':             (whole(1, 2**17), REQUIRED),
    'intermediate_size':       (whole(1, 2**20), REQUIRED),
    'num_hidden_layers':       (whole(1, 1000), REQUIRED),
    'num_attention_heads':     (whole(1, 2**12), REQUIRED),
    'num_key_value_heads':     (either(whole(1, 2**12), null), None),       # null: as many as query heads
    'head_dim':                (either(whole(0, 2**12), null), None),       # 0, null: hidden_size / heads
    'max_position_embeddings': (whole(1, 2**30), 2048),
    'hidden_act':              (word(*ACTIVATIONS), 'silu'),
    'rms_norm_eps':            (number(1e-12, 1), 1e-6),
    'tie_word_embeddings':     (either(switch, null), False),
    'attention_bias':          (either(switch, null), False),
    'mlp_bias':                (either(switch, null), False),
    'use_sliding_window':      (either(switch, null), False),
    'sliding_window':          (either(whole(0, 2**30), null), None),
    'max_window_layers':       (either(whole(0, 1000), null), None),
    'layer_types':             (either(items(text(60)), null), None),
    'quantization_config':     (either(group(), null), None),
    'rope_scaling':            (either(group(), null), None),
    'rope_parameters':         (either(group(), null), None),
}

# Where a family has other defaults.
QWEN = {'max_position_embeddings': 32768, 'sliding_window': 4096, 'num_key_value_heads': 32}
FAMILY_DEFAULTS = {
    'qwen3': QWEN | {'head_dim': 128},
    'qwen2': QWEN,
    'llama': {},
    'phi3': {'max_position_embeddings': 4096, 'rms_norm_eps': 1e-5, 'use_sliding_window': True},
}

# The rotary settings, which are spread over config.json in two spellings. Each kind of scaling has numbers
# of its own.
original = (whole(2, 2**30), REQUIRED)       # its logarithm is a divisor
factor = (number(1, 1e6), REQUIRED)
divisors = (items(number(1e-3, 1e6), 2**12), REQUIRED)
ROPE = {
    'rope_theta':            (number(1, 1e12), 1e4),
    'partial_rotary_factor': (number(1e-3, 1), 1.0),
}
ROPE_SCALING = {
    'default':  {},
    'linear':   {'factor': factor},
    'llama3':   {'factor': factor,
                 'low_freq_factor': (number(1e-3, 1e6), REQUIRED),
                 'high_freq_factor': (number(1e-3, 1e6), REQUIRED),
                 'original_max_position_embeddings': original},
    'longrope': {'original_max_position_embeddings': original,
                 'long_factor': divisors, 'short_factor': divisors,
                 'factor': (either(number(1, 1e6), null), None),
                 'attention_factor': (either(number(1e-3, 1e3), null), None)},
}

# config.json and generation_config.json
stop_id = whole(0, VOCABULARY)
STOP = {
    'eos_token_id': (either(stop_id, items(stop_id), null), None),
    'vocab_size':   (either(whole(1, VOCABULARY), null), None),
}

# model.safetensors.index.json: tensor -> file
INDEX = {'weight_map': (group(), REQUIRED)}

# tokenizer_config.json
token = (either(text(1000), group(content=text(1000)), null), None)
template = text(200_000)
TOKENIZER = {
    'bos_token': token, 'eos_token': token, 'pad_token': token,
    'chat_template': (either(template, items(group(name=text(1000), template=template)), null), None),
}


# ---- the check --------------------------------------------------------------------------------------

def checked(given, table, where, defaults=None):
    """The fields of a table, out of an object of a JSON file -> {field: value, or its default}.

    defaults: over those of the table. A field that is missing and must be there, or that holds something
    else than the table says, is a UserError that names it.
    """
    fields = {}
    for key, (kind, default) in table.items():
        if defaults and key in defaults:
            default = defaults[key]
        if key not in given and default is not REQUIRED:
            fields[key] = default
            continue
        value = given.get(key)
        if not kind.fits(value):
            raise UserError(f'{where}: {key} = {short(value)}, but it must be {kind.wants}; '
                            'choose another model, or fetch it again')
        fields[key] = value
    return fields


def short(value):
    """A value as Python writes it, cut to about 60 characters."""
    # It looks at the beginning of what is long or deep, and no further.
    writer = reprlib.Repr()
    writer.maxstring = 60
    writer.maxother = 60
    written = writer.repr(value)
    return written if len(written) <= 65 else written[:60] + '...'
