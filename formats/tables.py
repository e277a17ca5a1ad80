"""
What the JSON files of a model folder may hold: a table for each kind of file (support/fields.py).

A folder comes from somebody else, so every field that is read has a type and a range here, and what is
missing has the value that transformers gives it. The bounds are far beyond every published model. They are
there so that a number cannot hang a loop, overflow a float or fill the memory.

Simpler than a schema for each version of transformers: only the fields that are read have a line. What two
fields mean together is checked where they are used.
"""
from model import ACTIVATIONS, FAMILIES
from support.fields import Field

VOCABULARY = 10**7              # more tokens than any vocabulary has
ANOTHER_MODEL = 'choose another model, or fetch it again'        # what to do about a field that does not fit

# ---- config.json ------------------------------------------------------------------------------------

MODEL_TYPE = {'model_type': Field(str, words=tuple(FAMILIES))}
CONFIG = {
    'vocab_size':              Field(int, 1, VOCABULARY),
    'hidden_size':             Field(int, 1, 2**17),
    'intermediate_size':       Field(int, 1, 2**20),
    'num_hidden_layers':       Field(int, 1, 1000),
    'num_attention_heads':     Field(int, 1, 2**12),
    'num_key_value_heads':     Field(int, 1, 2**12, null=True, default=None),   # null: as many as query heads
    'head_dim':                Field(int, 0, 2**12, null=True, default=None),   # 0, null: hidden_size / heads
    'max_position_embeddings': Field(int, 1, 2**30, default=2048),
    'hidden_act':              Field(str, words=tuple(ACTIVATIONS), default='silu'),
    'rms_norm_eps':            Field(float, 1e-12, 1, default=1e-6),
    'tie_word_embeddings':     Field(bool, null=True, default=False),
    'attention_bias':          Field(bool, null=True, default=False),
    'mlp_bias':                Field(bool, null=True, default=False),
    'use_sliding_window':      Field(bool, null=True, default=False),
    'sliding_window':          Field(int, 0, 2**30, null=True, default=None),
    'max_window_layers':       Field(int, 0, 1000, null=True, default=None),
    'layer_types':             Field(list, high=1000, items=Field(str, high=60), null=True, default=None),
    'quantization_config':     Field(dict, null=True, default=None),
    'kept_layers':             Field(list, 1, 1000, items=Field(int, 1, 1000), null=True, default=None),
    'rope_scaling':            Field(dict, null=True, default=None),
    'rope_parameters':         Field(dict, null=True, default=None),
}

# What a family has where the field is missing, if it is not the default above.
QWEN = {'max_position_embeddings': 32768, 'sliding_window': 4096, 'num_key_value_heads': 32}
FAMILY_DEFAULTS = {
    'qwen3': QWEN | {'head_dim': 128},
    'qwen2': QWEN,
    'llama': {},
    'phi3': {'max_position_embeddings': 4096, 'rms_norm_eps': 1e-5, 'use_sliding_window': True},
}

# The rotary settings, which are spread over config.json in two spellings. Each kind of scaling has numbers
# of its own.
ROPE = {
    'rope_theta':            Field(float, 1, 10**12, default=1e4),
    'partial_rotary_factor': Field(float, 1e-3, 1, default=1.0),
}
original = Field(int, 2, 2**30)                          # its logarithm is a divisor
divisors = Field(list, high=2**12, items=Field(float, 1e-3, 10**6))
ROPE_SCALING = {
    'default': {},
    'linear': {
        'factor': Field(float, 1, 10**6),
    },
    'llama3': {
        'factor': Field(float, 1, 10**6),
        'low_freq_factor': Field(float, 1e-3, 10**6),
        'high_freq_factor': Field(float, 1e-3, 10**6),
        'original_max_position_embeddings': original,
    },
    'longrope': {
        'original_max_position_embeddings': original,
        'long_factor': divisors,
        'short_factor': divisors,
        'factor': Field(float, 1, 10**6, null=True, default=None),
        'attention_factor': Field(float, 1e-3, 1000, null=True, default=None),
    },
}
ROPE_TYPE = {'rope_type': Field(str, words=tuple(ROPE_SCALING))}

# ---- the other files --------------------------------------------------------------------------------

# config.json and generation_config.json, for the tokenizer.
stop_ids = Field(list, high=1000, items=Field(int, 0, VOCABULARY))
STOP = {
    'eos_token_id': Field(int, 0, VOCABULARY, other=stop_ids, null=True, default=None),
    'vocab_size':   Field(int, 1, VOCABULARY, null=True, default=None),
}

# model.safetensors.index.json: tensor -> file
INDEX = {'weight_map': Field(dict)}

# tokenizer_config.json. A token is a text, or an object that has it as its content. A chat template is a
# text, or one of several that have names.
content = Field(dict, fields={'content': Field(str, high=1000)})
token = Field(str, high=1000, other=content, null=True, default=None)
named_template = Field(dict, fields={'name': Field(str, high=1000), 'template': Field(str, high=200_000)})
named_templates = Field(list, high=1000, items=named_template)
TOKENIZER = {
    'bos_token':     token,
    'eos_token':     token,
    'pad_token':     token,
    'chat_template': Field(str, high=200_000, other=named_templates, null=True, default=None),
}
