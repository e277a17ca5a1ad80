"""The decoder against transformers, cached against uncached, folders in and out."""
import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from formats.huggingface import hf_config, load_model, read_config, save_model, snapshot
from model import ACTIVATIONS, PRESETS, Cache, Linear, Model, ModelConfig, frequencies, init_weights
from rollout import naive, sample
from support.files import read_json, write_json
from support.runtime import ROOT, UserError

transformers = pytest.importorskip('transformers')


def hugging_face(family, tied=False, **other):
    """A random model of the reference library, with odd sizes and grouped heads."""
    torch.manual_seed(0)
    name = {'qwen3': 'Qwen3', 'qwen2': 'Qwen2', 'llama': 'Llama', 'phi3': 'Phi3'}[family]
    other = copy.deepcopy(other)             # transformers writes into the settings it is given
    c = dict(vocab_size=37, pad_token_id=0, eos_token_id=2, hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, rope_theta=5e4,
             initializer_range=0.3, **other)
    if family == 'qwen3':
        c['head_dim'] = 10                   # apart from hidden_size / heads
    model = getattr(transformers, f'{name}ForCausalLM')(getattr(transformers, f'{name}Config')(**c)).eval()
    for p in model.parameters():
        if p.ndim == 1:                      # norms of ones and biases of zeros would hide mistakes
            torch.nn.init.normal_(p, 1.0, 0.3)
    return model


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('family', ['qwen3', 'qwen2', 'llama', 'phi3'])
def test_equals_transformers(family, tied, tmp_path):
    """Logits, every hidden state (layer L final-normed) and gradients; then back into transformers."""
    theirs = hugging_face(family, tied)
    theirs.save_pretrained(tmp_path / 'hf')
    ours = load_model(tmp_path / 'hf')
    ids = torch.randint(37, (3, 19), generator=torch.Generator().manual_seed(1))
    want = theirs(ids, output_hidden_states=True)
    assert (ours(ids) - want.logits).abs().max() < 1e-4
    for h, ref in zip(ours.hidden(ids, [1, 2, 3]), want.hidden_states[1:], strict=True):
        assert (h - ref).norm() / ref.norm() < 1e-5
    (ours(ids) ** 2).mean().backward()
    (want.logits ** 2).mean().backward()
    q = 'qkv' if family == 'phi3' else 'q'
    grad = dict(theirs.named_parameters())[f'model.layers.1.self_attn.{q}_proj.weight'].grad
    mine = ours.blocks[1].attn.qkv.weight.grad[:len(grad)]
    assert (mine - grad).norm() / grad.norm() < 1e-4
    save_model(ours, tmp_path / 'back')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back')
    assert (back(ids).logits - want.logits).abs().max() < 1e-5


LONG = dict(rope_type='longrope', short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 3.0, 9.0],
            original_max_position_embeddings=16)
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
SCALED = [('llama', LLAMA3, {}), ('llama', dict(rope_type='linear', factor=4.0), {}),
          ('phi3', None, dict(partial_rotary_factor=0.5)),
          ('phi3', LONG, dict(original_max_position_embeddings=16)),
          ('phi3', LONG | dict(attention_factor=1.3), dict(original_max_position_embeddings=16))]


SCALED += [('phi3', {k: v[:2] if 'factor' in k else v for k, v in LONG.items()},           # Phi-4-mini's form
            dict(original_max_position_embeddings=16, partial_rotary_factor=0.75))]


@pytest.mark.parametrize('family, scaling, other', SCALED)
def test_rotary_scaling_equals_transformers(family, scaling, other, tmp_path):
    """Within, at and beyond the original context of 16; partial rotation; then back into transformers."""
    theirs = hugging_face(family, rope_scaling=scaling, **other)
    theirs.save_pretrained(tmp_path / 'hf')
    ours = load_model(tmp_path / 'hf')
    save_model(ours, tmp_path / 'back')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back')
    for T in (9, 16, 17, 40):
        ids = torch.randint(37, (2, T), generator=torch.Generator().manual_seed(T))
        want = theirs(ids).logits
        assert (ours(ids) - want).abs().max() < 1e-4 and (back(ids).logits - want).abs().max() < 1e-5


def test_longrope_cached_equals_uncached_across_the_original_context(tmp_path):
    """An answer that grows past the original context: the cache was made with the long factors from the
    start, and a training forward of a short answer uses them too, once `max_length` says what is to come."""
    hugging_face('phi3', rope_scaling=LONG, original_max_position_embeddings=16).save_pretrained(tmp_path / 'hf')
    model = load_model(tmp_path / 'hf')
    how = dict(max_new_tokens=20, stop=[99], temperature=0.7, seed=1)
    model.max_length = 30
    fast, slow = sample(model, [[1, 2, 3], [4] * 10], 2, **how), naive(model, [[1, 2, 3], [4] * 10], 2, **how)
    assert torch.equal(fast.ids, slow.ids) and fast.length.max() == 30
    ids = torch.arange(8).view(1, 8)
    long = model(ids)
    model.max_length = 0
    assert (model(ids) - long).abs().max() > 1e-3


@pytest.mark.parametrize('activation', list(ACTIVATIONS))
def test_activations_equal_transformers(activation, tmp_path):
    """By the names that config.json has for them; a folder must not say "silu" when its model computes GELU."""
    theirs = hugging_face('llama', hidden_act=activation)
    theirs.save_pretrained(tmp_path / 'hf')
    ours = load_model(tmp_path / 'hf')
    ids = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1))
    assert ours.config.activation == activation and (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
    save_model(ours, tmp_path / 'back')
    assert read_json(tmp_path / 'back/config.json')['hidden_act'] == activation
    others = [load_model(tmp_path / 'back')(ids), Model(replace(ours.config, activation='silu')).eval()]
    others[1].load_state_dict(ours.state_dict())
    assert torch.equal(others[0], ours(ids)) and torch.equal(others[1](ids), ours(ids)) == (activation == 'silu')


@pytest.mark.parametrize('name', ['theta', 'partial', 'linear', 'none'])
def test_frequencies_by_hand(name):
    """One angle at a time in Python's own arithmetic; an unknown kind was computed as if it were not scaled."""
    c = ModelConfig('phi3', V=7, L=1, d=8, H=1, G=1, e=8, ff=8, theta=500.0, partial=0.5 if name == 'partial' else 1.0,
                    rope={'rope_type': 'linear', 'factor': 4.0} if name == 'linear' else {})
    R = 4 if name == 'partial' else 8
    want = [500.0 ** (-2 * i / R) / (4.0 if name == 'linear' else 1.0) for i in range(R // 2)]
    inv, scale = frequencies(c, 16)
    assert inv.tolist() == pytest.approx(want, rel=1e-6) and scale == 1.0
    with pytest.raises(AssertionError, match='yarn'):
        frequencies(replace(c, rope={'rope_type': 'yarn'}), 16)


def test_a_model_made_here_loads_in_transformers(tmp_path):
    """config.json written from a shape, not copied from a folder."""
    model = tiny_model()
    save_model(model, tmp_path / 'm')
    ids = torch.arange(12).view(2, 6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5
    assert theirs.config.rope_parameters['rope_theta'] == model.config.theta


@pytest.mark.parametrize('name, millions', [('r1_1p5b', 1777.1), ('qwen3_1p7b', 1720.6), ('qwen3_4b', 4022.5),
                                            ('smollm2', 134.5), ('phi4_mini', 3836.0)])
def test_presets_have_the_published_sizes(name, millions):
    assert abs(PRESETS[name].count() / 1e6 - millions) < 0.1


def test_cached_equals_uncached():
    """Ragged right-padded prompts, then one token a row: the same logits as reading it all again."""
    model, lengths = tiny_model(), torch.tensor([5, 9, 2])
    ids = torch.randint(37, (3, 14), generator=torch.Generator().manual_seed(0))
    cache = Cache(model.config, 3, 14, 'cpu', torch.float32)
    with torch.no_grad():
        model(ids[:, :9], cache)
        cache.length, cache.longest = lengths.clone(), 9
        for t in range(4):
            token = ids[torch.arange(3), lengths + t]
            got = model(token[:, None], cache)[:, 0]
            cache.length += 1
            for b in range(3):
                want = model(ids[b:b + 1, :lengths[b] + t + 1])[0, -1]
                assert (got[b] - want).abs().max() < 1e-5


def test_a_prompt_in_pieces():
    """Read by 9, or by 4, 4 and 1, into a cache: the same states and the same keys and values."""
    model = tiny_model(family='qwen2')
    ids = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0))
    whole, pieces = (Cache(model.config, 3, 12, 'cpu', torch.float32) for _ in range(2))
    with torch.no_grad():
        want = model.trunk(ids, whole)
        got = torch.cat([model.trunk(part, pieces) for part in ids.split(4, 1)], 1)
    assert (got - want).abs().max() < 1e-5 and pieces.read == whole.read == 9
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(pieces.kv, whole.kv, strict=True))
    assert not any(kv[:, :, :, 9:].any() for kv in pieces.kv)


@pytest.mark.parametrize('bias', [True, False])
def test_few_rows_on_a_cpu(bias):
    """(W x')' is x W'; with a gradient nothing changes."""
    layer = Linear(20, 33, bias=bias)
    for shape in [(3, 20), (1, 1, 20), (2, 20), (32, 1, 20), (4, 5, 20), (6, 20), (33, 20)]:
        x = torch.randn(shape)
        with torch.no_grad():
            fast = layer(x)
        want = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert fast.shape == want.shape and (fast - want).abs().max() < 1e-5
        assert torch.equal(layer(x), want) and fast.view(*shape[:-1], 11, 3).shape[-1] == 3


def test_plain_shares_its_weights():
    """Another Model, the same memory; the original may train on."""
    for tied in (False, True):
        model, ids = tiny_model(tied=tied), torch.tensor([[1, 2, 3]])
        model.embed.register_forward_pre_hook(lambda m, args: pytest.fail('a hook came along'))
        twin = model.plain()
        assert twin(ids).shape == (1, 3, 37) and not any(p.requires_grad for p in twin.parameters())
        assert all(p.requires_grad for p in model.parameters())
        assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_plain_keeps_the_longest_length():
    """A longrope model samples answers of a training run through `plain`. Without the length to come, short texts would
    be read with other frequencies than in the forward that trains."""
    rope = dict(rope_type='longrope', short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 3.0, 9.0], original_max_position_embeddings=12)
    model, other = (tiny_model(family='phi3', rope=rope) for _ in range(2))
    model.max_length, ids = 13, torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.equal(model.plain()(ids), model(ids)) and not torch.equal(other(ids), model(ids))


def test_padding_and_neighbours_do_not_matter():
    model = tiny_model()
    ids = torch.randint(37, (4, 11), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 7:] = 0
    assert torch.equal(model(ids)[:, :7], model(changed)[:, :7])


def test_hidden_picks_rows():
    model = tiny_model()
    ids = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(0))
    at = torch.tensor([1, 4, 7])
    every, rows = model.hidden(ids, [1, 3]), model.hidden(ids, [1, 3], at)
    for e, r in zip(every, rows, strict=True):
        assert r.shape == (3, 20) and torch.equal(r, e.flatten(0, 1)[at])


@pytest.mark.parametrize('layers', [[9], [4, 1], [1, 1], [0, 2], [-1], []])
def test_hidden_refuses_layers_that_it_cannot_give(layers):
    """[9] of 3 layers gave [], and [3, 1] gave the order 1, 3: a list that looks right and means something else."""
    with pytest.raises(ValueError, match='of a model with 3; give ascending numbers from 1 to 3') as e:
        tiny_model().hidden(torch.arange(4).view(1, 4), layers)
    assert str(layers) in str(e.value)


def test_blocks_above_the_last_tap_do_not_run():
    """Nobody asked for them: they would be half of the work of layers=[1, 2]."""
    model, ran = tiny_model(), []
    for l, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, l=l: ran.append(l))
    model.norm.register_forward_hook(lambda *_: ran.append('norm'))
    assert len(model.hidden(torch.arange(4).view(1, 4), [1, 2])) == 2 and ran == [1, 2]
    model.hidden(torch.arange(4).view(1, 4), [3])
    assert ran == [1, 2, 1, 2, 3, 'norm']


def test_checkpointing_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = tiny_model()
        model.checkpointing = recompute
        model(torch.arange(10).view(2, 5)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_sharded_index_is_read(tmp_path):
    theirs = hugging_face('qwen3')
    theirs.save_pretrained(tmp_path / 'hf', max_shard_size='20KB')
    assert (tmp_path / 'hf/model.safetensors.index.json').exists()
    ids = torch.arange(8).view(1, 8)
    assert (load_model(tmp_path / 'hf')(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_large_models_are_saved_in_shards(tmp_path):
    """With an index, as transformers writes them; both sides read it."""
    model = tiny_model()
    save_model(model, tmp_path / 'm', shard_bytes=8000)
    files = sorted(p.name for p in (tmp_path / 'm').glob('*.safetensors'))
    assert len(files) > 3 and files[0].startswith('model-00001-of-')
    assert all((tmp_path / 'm' / f).stat().st_size < 12_000 for f in files)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(load_model(tmp_path / 'm')(ids), model(ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5


def test_host_memory_while_loading(tmp_path):
    """At most 1.3 times the checkpoint, mapped pages included: one copy, and one tensor on its way."""
    c = ModelConfig('llama', V=4000, L=12, d=1024, H=8, G=8, e=128, ff=3072, tied=True)
    save_model(Model(c), tmp_path / 'm')
    size = (tmp_path / 'm/model.safetensors').stat().st_size
    code = ('import resource, sys, torch; from formats.huggingface import load_model\n'
            'def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n'
            'before = peak(); m = load_model(sys.argv[1]); print(peak() - before)')
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'm')], cwd=ROOT, capture_output=True, text=True)
    assert size > 600e6 and int(p.stdout) < 1.3 * size, (p.stdout, size, p.stderr)


def test_older_and_newer_rope_spellings(tmp_path):
    save_model(tiny_model(theta=777.0), tmp_path / 'm')
    c = read_json(tmp_path / 'm/config.json')
    assert read_config(tmp_path / 'm').theta == 777.0
    c['rope_parameters'] = {'rope_type': 'default', 'rope_theta': c.pop('rope_theta')}
    write_json(tmp_path / 'm/config.json', c)
    assert read_config(tmp_path / 'm').theta == 777.0


# ---- a changed model is saved as what it is -----------------------------------------------------

CHANGES = [dict(L=2), dict(L=5), dict(H=2), dict(G=4), dict(G=1, H=3), dict(e=14), dict(d=28, ff=20), dict(V=50), dict(tied=True),
           dict(theta=123.0), dict(eps=0.3), dict(context=256), dict(activation='gelu_pytorch_tanh'),
           dict(rope={'rope_type': 'linear', 'factor': 4.0}), dict(rope=LLAMA3), dict(rope=LLAMA3, theta=99.0, L=1)]
CHANGED = [(family, change) for family in ('qwen3', 'qwen2', 'llama') for change in CHANGES]
CHANGED += [('phi3', dict(L=2)), ('phi3', dict(H=2, G=2)), ('phi3', dict(partial=0.5)), ('phi3', dict(activation='gelu', L=4)),
            ('phi3', dict(rope=LONG | {'original_max_position_embeddings': 16})), ('llama', dict(family='qwen3')),
            ('qwen3', dict(family='llama')), ('qwen2', dict(family='qwen3', L=1))]


@pytest.mark.parametrize('spelling', ['newer', 'older'])
@pytest.mark.parametrize('family, change', CHANGED, ids=str)
def test_a_changed_model_is_saved_as_it_is(family, change, spelling, tmp_path):
    """config.json kept the old numbers: 24 layers and "num_hidden_layers": 30, so that the folder said "fetch the
    model again". Logits after loading here are equal to the last bit, and near in transformers; both spellings of
    the rotary settings, and lists with an entry for each layer, follow."""
    theirs = hugging_face(family)
    theirs.save_pretrained(tmp_path / 'hf')
    hf = read_json(tmp_path / 'hf/config.json')
    assert 'rope_parameters' in hf
    if spelling == 'older':
        rope = hf.pop('rope_parameters')
        hf |= {'rope_theta': rope['rope_theta'], 'rope_scaling': None}
        write_json(tmp_path / 'hf/config.json', hf)
    before = read_config(tmp_path / 'hf')
    c = replace(before, **change)
    model = init_weights(Model(c), seed=3).eval()
    save_model(model, tmp_path / 'm')
    assert read_config(tmp_path / 'm') == c != before
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
    for T in (9, 40):
        ids = torch.randint(37, (2, T), generator=torch.Generator().manual_seed(T))
        assert torch.equal(load_model(tmp_path / 'm')(ids), model(ids))
        assert (back(ids).logits - model(ids)).abs().max() < 1e-4
    saved = read_json(tmp_path / 'm/config.json')
    assert saved.get('layer_types') in (None, ['full_attention'] * c.L) and saved['eos_token_id'] == 2


def test_an_unchanged_model_keeps_its_spelling_and_a_pruned_one_its_windows_unused(tmp_path):
    """Qwen's files carry a window that no layer uses and the number of layers below it; after pruning both must
    still say that no layer has one. What has not changed stays as it was written."""
    hugging_face('qwen2').save_pretrained(tmp_path / 'hf')
    edit(tmp_path / 'hf', use_sliding_window=True, sliding_window=64, max_window_layers=3, layer_types=['full_attention'] * 3,
         dtype='float32', torch_dtype='float32')
    hf = read_json(tmp_path / 'hf/config.json')
    save_model(load_model(tmp_path / 'hf'), tmp_path / 'same')
    saved = read_json(tmp_path / 'same/config.json')
    assert {key: saved[key] for key in hf} == hf
    for change in (dict(L=2), dict(L=5), dict(context=128)):
        model = init_weights(Model(replace(read_config(tmp_path / 'hf'), **change)), 0)
        save_model(model, tmp_path / 'm')
        saved = read_json(tmp_path / 'm/config.json')
        assert saved['max_window_layers'] == len(saved['layer_types']) == model.config.L
        assert saved['sliding_window'] in (None, 64) and read_config(tmp_path / 'm') == model.config
        ids = torch.randint(37, (1, 100), generator=torch.Generator().manual_seed(0))
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
        assert (back(ids).logits - model(ids)).abs().max() < 1e-4


# ---- bad folders: each is one line that names the place ----------------------------------------

def index_all(folder):
    return list(load_file(folder / 'model.safetensors'))


def edit(folder, **keys):
    write_json(folder / 'config.json', read_json(folder / 'config.json') | keys)


def cut(folder):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])


def tensors(change):
    def apply(folder):
        t = load_file(folder / 'model.safetensors')
        change(t)
        save_file(t, folder / 'model.safetensors')
    return apply


@pytest.mark.parametrize('spoil, says', [
    (lambda f: (f / 'config.json').unlink(), 'config.json: no such file'),
    (lambda f: (f / 'config.json').write_text('{'), 'not valid JSON'),
    (lambda f: (f / 'config.json').write_text('{"model_type": "qwen3"}'), 'vocab_size = None'),
    (lambda f: (f / 'config.json').write_text('[]'), 'holds a list, not a dict'),
    (lambda f: edit(f, hidden_size='20'), "hidden_size = '20'"),
    (lambda f: edit(f, num_hidden_layers=0), 'num_hidden_layers = 0'),
    (lambda f: edit(f, num_key_value_heads=3), 'which 4 query heads cannot share evenly'),
    (lambda f: edit(f, model_type='mamba'), "model_type = 'mamba'"),
    (lambda f: edit(f, use_sliding_window=True, sliding_window=16), 'sliding_window = 16'),
    (lambda f: edit(f, rope_scaling={'rope_type': 'longrope', 'short_factor': [1.0] * 3}), 'long_factor = None'),
    (lambda f: edit(f, attention_bias=True), 'attention_bias'),
    (lambda f: edit(f, rope_scaling='x'), "rope_scaling = 'x'"),
    (lambda f: edit(f, rope_theta='x'), "rope_theta = 'x'"),
    (lambda f: edit(f, rope_theta=None), 'rope_theta = None'),
    (lambda f: edit(f, head_dim='6'), "head_dim = '6'"),
    (lambda f: edit(f, head_dim=-1), 'head_dim = -1'),
    (lambda f: edit(f, rms_norm_eps=None), 'rms_norm_eps = None'),
    (lambda f: edit(f, rms_norm_eps=-1e-6), 'rms_norm_eps = -1e-06'),
    (lambda f: edit(f, rope_theta=math.nan), 'rope_theta = nan'),
    (lambda f: edit(f, rope_theta=True), 'rope_theta = True'),
    (lambda f: edit(f, tie_word_embeddings='false'), "tie_word_embeddings = 'false'"),
    (lambda f: edit(f, hidden_act=['silu']), "hidden_act = ['silu']"),
    (lambda f: edit(f, model_type=['llama']), "model_type = ['llama']"),
    (lambda f: edit(f, rope_scaling={'rope_type': 'longrope', 'short_factor': [1.0], 'long_factor': [1.0],
                                     'original_max_position_embeddings': 9}), 'long_factor = [1.0], not the 3 numbers'),
    (lambda f: write_json(f / 'model.safetensors.index.json', {'weight_map': []}), 'weight_map = []'),
    (lambda f: write_json(f / 'model.safetensors.index.json', {'weight_map': dict.fromkeys(
        ['model.norm.weight', *index_all(f)], 'model.safetensors') | {'lm_head.weight': 'other.safetensors'}}),
     "names 'other.safetensors'"),
    (lambda f: edit(f, rope_scaling={'rope_type': 'yarn'}), 'rope_type'),
    (lambda f: edit(f, quantization_config={'bits': 4}), 'quantization_config'),
    (lambda f: edit(f, hidden_act='relu'), "hidden_act = 'relu'"),
    (lambda f: edit(f, num_hidden_layers=4), "'model.layers.3.self_attn.q_proj.weight' is missing"),
    (lambda f: edit(f, num_hidden_layers=2), "surplus tensor 'model.layers.2."),
    (lambda f: edit(f, intermediate_size=30), 'has shape [28, 20], but config.json says [30, 20]'),
    (lambda f: (f / 'model.safetensors').unlink(), 'no model.safetensors'),
    (cut, 'not a whole safetensors file'),
    (tensors(lambda t: t.pop('lm_head.weight')), "'lm_head.weight' is missing"),
    (tensors(lambda t: t['model.norm.weight'].fill_(float('nan'))), 'model.norm.weight holds NaN'),
    (lambda f: write_json(f / 'model.safetensors.index.json', {'weight_map': {'a': 'model-2.safetensors'}}),
     "names 'model-2.safetensors', which is not there"),
    (lambda f: (shutil.copy(f / 'model.safetensors', f.parent), write_json(f / 'model.safetensors.index.json', {
        'weight_map': dict.fromkeys(index_all(f), '../model.safetensors')})), "names '../model.safetensors'"),
    (shutil.rmtree, 'no such folder'),
    (lambda f: (f / 'config.json').write_bytes(b'\xff\xfe'), 'not valid JSON'),
])
def test_bad_folder(tmp_path, spoil, says):
    folder = tmp_path / 'm'
    save_model(tiny_model(), folder)
    spoil(folder)
    with pytest.raises(UserError) as e:
        load_model(str(folder))
    assert says in str(e.value) and '\n' not in str(e.value), str(e.value)


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path):
    """Revision after @; weights only for load_model; never a pickled file; data sets as data sets."""
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *a, **k: asked.append((a, k)) or tmp_path)
    save_model(tiny_model(), tmp_path)
    read_config('me/model@v1.2')
    load_model('me/model')
    snapshot('me/problems', dataset=True)
    (a, config), (_, weights), (_, data) = asked
    assert a == ('me/model',) and config['revision'] == 'v1.2' and weights['revision'] is None
    assert '*.safetensors' in weights['allow_patterns'] and '*.safetensors' not in config['allow_patterns']
    assert data['repo_type'] == 'dataset' and '*.parquet' in data['allow_patterns']
    assert not any(p.endswith(('.bin', '.pt', '.py', '*')) for _, k in asked for p in k['allow_patterns'])


def test_a_hub_id_that_the_hub_does_not_give(monkeypatch):
    """No network, or no such repository: one line that names it."""
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError('no network\nand a long story')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(UserError) as e:
        load_model('nobody/nothing')
    assert 'nobody/nothing' in str(e.value) and '\n' not in str(e.value)


def test_an_index_that_names_a_tensor_its_file_lacks(tmp_path):
    save_model(tiny_model(), tmp_path)
    names = dict.fromkeys(index_all(tmp_path), 'model.safetensors')
    tensors(lambda t: t.pop('model.norm.weight'))(tmp_path)
    write_json(tmp_path / 'model.safetensors.index.json', {'weight_map': names})
    with pytest.raises(UserError, match="'model.norm.weight' is not in model.safetensors"):
        load_model(tmp_path)


def test_published_spellings_that_change_nothing_are_accepted(tmp_path):
    """Sliding windows that no layer uses or that are wider than the context; partial rotation where the
    family ignores it; head_dim null; Qwen3's default head_dim of 128."""
    save_model(tiny_model(), tmp_path)
    full = ['full_attention'] * 3
    for keys in (dict(use_sliding_window=True, sliding_window=16, layer_types=full), dict(partial_rotary_factor=0.5),
                 dict(use_sliding_window=True, sliding_window=64), dict(use_sliding_window=False, sliding_window=8)):
        save_model(tiny_model(), tmp_path)
        edit(tmp_path, **keys)
        assert read_config(tmp_path).partial == 1.0
    edit(tmp_path, head_dim=None)
    assert read_config(tmp_path).e == 128
    edit(tmp_path, model_type='llama', hidden_size=24)
    assert read_config(tmp_path).e == 6


def test_config_json_keeps_every_field_it_came_with(tmp_path):
    """A field we do not read (vLLM may) must survive load and save."""
    save_model(tiny_model(), tmp_path / 'a')
    edit(tmp_path / 'a', bos_token_id=7, my_note='kept', torch_dtype='bfloat16', auto_map={'x': 'y.py'})
    save_model(load_model(tmp_path / 'a'), tmp_path / 'b')
    assert json.loads((tmp_path / 'b/config.json').read_text())['my_note'] == 'kept'
    assert hf_config(load_model(tmp_path / 'b').config)['bos_token_id'] == 7
    saved = read_json(tmp_path / 'b/config.json')
    assert saved['torch_dtype'] == saved['dtype'] == 'float32' and 'auto_map' not in saved
