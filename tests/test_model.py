"""The decoder against transformers, cached against uncached, folders in and out."""
import copy
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tokenizers
import torch
from conftest import rounding, tiny_model, with_random_vectors
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import model as decoder
from formats import huggingface
from formats.huggingface import (
    hf_config,
    hf_tensors,
    load_model,
    name_map,
    parse_config,
    read_config,
    save_model,
)
from formats.tokenizer import load_tokenizer
from kernels import mlp_in_pieces
from kernels.mlp_in_pieces import in_pieces, pieces
from model import (
    ACTIVATIONS,
    PRESETS,
    Cache,
    Linear,
    Model,
    ModelConfig,
    frequencies,
    init_weights,
    onednn_runs,
    rotary,
)
from rollout import naive, sample
from support.files import read_json, write_json
from support.runtime import ROOT, UserError, shown

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


needs_onednn = pytest.mark.skipif(not onednn_runs(torch.zeros(1)), reason='oneDNN is not built for this processor')


@needs_onednn
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_weights_multiply_any_number_of_rows(bias, dtype, monkeypatch):
    """A bias or the last rows of an odd shape could be lost in oneDNN's blocks."""
    if not onednn_runs(torch.zeros(1, dtype=dtype)):
        pytest.skip(f'this processor has no instructions for {dtype}')
    layer = Linear(83, 165, bias=bias).to(dtype).requires_grad_(False)
    layer.pack()
    for shape in [(3, 83), (1, 1, 83), (2, 83), (16, 1, 83), (4, 5, 83), (6, 83), (333, 83), (83,)]:
        x = torch.randn(shape).to(dtype)
        y = layer(x)

        # The sum of 83 products and a bias in float32, rounded once more to the dtype of the result.
        exact = x.double() @ layer.weight.double().t()
        terms = x.double().abs() @ layer.weight.double().abs().t()
        if bias:
            exact += layer.bias.double()
            terms += layer.bias.double().abs()
        bound = 84 * torch.finfo(torch.float32).eps * terms + torch.finfo(dtype).eps * exact.abs()
        assert y.shape == exact.shape and y.dtype == dtype and ((y.double() - exact).abs() <= bound).all(), shape

    # And it is the packed copy that multiplies.
    monkeypatch.setattr(torch.nn.Linear, 'forward', lambda *_: pytest.fail('nn.Linear was called'))
    layer(torch.zeros(1, 83, dtype=dtype))


@needs_onednn
def test_only_large_matrices_of_a_twin_are_packed(monkeypatch):
    """A packed copy of the model that trains would be old after the first update. A copy of each small matrix would
    make the toy slower."""
    model = tiny_model(tied=True)
    assert model.packed() is model
    monkeypatch.setattr('model.PACKED_FROM', model.blocks[0].mlp.down.weight.numel())
    twin = model.packed()
    packed = {name for name, module in twin.named_modules() if isinstance(module, Linear) and module.packed_weight is not None}
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, Linear)}
    limit = sizes['blocks.0.mlp.down']
    assert packed == {name for name, size in sizes.items() if size >= limit} and 0 < len(packed) < len(sizes)
    assert all(module.packed_weight is None for module in model.modules() if isinstance(module, Linear))
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert model.double().packed() is model  # oneDNN has no float64


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


@contextmanager
def pieces_of(tokens):
    """Recomputed blocks take their MLP in pieces of so many tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp_in_pieces, 'PIECE', tokens)
        yield patch


def block_gradients(block, h, rope, grad, recompute, piece=10):
    """A block's result for h, and the gradients of h and of all weights."""
    h = h.detach().requires_grad_()
    block.zero_grad()
    with pieces_of(piece):
        if recompute:
            result = checkpoint(block, h, rope, recomputed=True, **decoder.RECOMPUTE)
        else:
            result = block(h, rope)
        result.backward(grad)
    return result.detach(), {'h': h.grad} | {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def block_case(dtype, rows=3, tokens=11, **shape):
    """A block of odd sizes, states for it, rotary angles, and a gradient of its result that is not 1."""
    model = with_random_vectors(tiny_model(**shape)).to(dtype)
    g = torch.Generator().manual_seed(1)
    h, grad = torch.randn(2, rows, tokens, model.config.d, generator=g).to(dtype)
    rope = rotary(torch.arange(tokens), *model.rope_frequencies(tokens, h.device), dtype)
    return model.blocks[1], h, rope, grad


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('shape', [
    dict(family='qwen3'), dict(family='qwen2', activation='gelu'), dict(family='llama', activation='gelu_pytorch_tanh'),
    dict(family='phi3', partial=0.5, e=8)], ids=lambda shape: shape['family'])
@pytest.mark.parametrize('rows, tokens, sizes', [
    (3, 11, [3, 3, 3, 2]), (1, 33, [9, 8, 8, 8]), (13, 2, [1, 1])], ids=['three rows', 'one row', 'more rows than a piece'])
def test_an_mlp_in_pieces_has_the_gradient_of_the_whole(rows, tokens, sizes, shape, dtype):
    """Result and gradients of a recomputed block against the plain one. A piece that is left out or taken twice, a gradient
    of the norm, of a residual or of an activation that is forgotten, or a sum that begins anew with each piece."""
    block, h, rope, grad = block_case(dtype, rows, tokens, **shape)
    with pieces_of(10):
        assert in_pieces(h, block) and [piece.shape[1] for piece in pieces(h)] == sizes
    result, want = block_gradients(block, h, rope, grad, False)
    result_in_pieces, got = block_gradients(block, h, rope, grad, True)
    assert (result_in_pieces - result).norm() <= rounding(result, 140)       # the sums of a block: see TINY_SUMS
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.norm() > 0
        assert (got[name] - gradient).norm() <= rounding(gradient, 400), name


def test_gradients_of_pieces_are_summed_in_float32():
    """1,200 equal tokens in 400 pieces, in bfloat16: each weight's gradient is 400 times that of one piece, but for its
    rounding at the end. A sum in bfloat16 would stop to grow at 256 times."""
    block, h, _, grad = block_case(torch.bfloat16, 1, 1)
    weights = block.norm2.weight, block.mlp.gate_up.weight, block.mlp.down.weight
    parts = mlp_in_pieces.piece_gradients(block, h.expand(1, 3, -1), grad.expand(1, 3, -1))[1:]
    with pieces_of(3):
        many = h.repeat(1, 1200, 1).requires_grad_()
        got = torch.autograd.grad(mlp_in_pieces.add_mlp_in_pieces(many, block), weights, grad.repeat(1, 1200, 1))
    for whole, part in zip(got, parts, strict=True):
        assert whole.dtype == torch.bfloat16
        want = 400 * part.double()
        assert (whole - want).norm() <= rounding(want.bfloat16(), 1)


def test_pieces_are_as_exact_as_the_whole_in_bfloat16():
    """Both against the gradient of the same weights and states in float64. Beyond the errors that the whole has, each part
    is rounded once, by half an eps of itself."""
    block, h, rope, grad = block_case(torch.bfloat16, 3, 40)
    _, whole = block_gradients(block, h, rope, grad, False)
    _, pieced = block_gradients(block, h, rope, grad, True)
    exact_block = copy.deepcopy(block).double()
    exact_rope = [x.double() for x in rope]
    _, exact = block_gradients(exact_block, h.double(), exact_rope, grad.double(), False)
    parts = [mlp_in_pieces.piece_gradients(exact_block, *piece)[1:] for piece in mlp_pieces(exact_block, h, exact_rope, grad)]
    for number, name in enumerate(('norm2.weight', 'mlp.gate_up.weight', 'mlp.down.weight')):
        extra = rounding([part[number].bfloat16() for part in parts], 1)
        assert (pieced[name] - exact[name]).norm() <= 2 * (whole[name] - exact[name]).norm() + extra, name


def mlp_pieces(block, h, rope, grad):
    """What the MLP of a block reads, and the gradient of its result, in pieces of ten tokens."""
    h, grad = h.double(), grad.double()
    middle = h + block.attn(block.norm1(h), rope)
    with pieces_of(10):
        return list(zip(pieces(middle), pieces(grad), strict=True))


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, and the calls of attention."""
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket
        if name in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.count['products'] += flop_registry[name](*args, **(kwargs or {}), out_val=out)
        self.count['attention'] += 'attention' in str(name)
        return out


def test_pieces_multiply_no_more_than_a_recomputed_block():
    """The MLP was computed a third time when pieces were recomputed inside of a block that is: a sixth more of an update."""
    block, h, rope, grad = block_case(torch.float32, 3, 40)
    counts = []
    for piece in (120, 10):
        with Products() as products:
            block_gradients(block, h, rope, grad, True, piece)
        counts.append(products.count)
    assert counts[0] == counts[1] and counts[0]['attention'] == 3


@pytest.mark.parametrize('frozen', [False, True], ids=['33 tokens of 33', 'a frozen norm'])
def test_a_block_that_is_short_or_partly_frozen_is_recomputed_as_a_whole(frozen):
    """Bit for bit as it was. torch.autograd.grad refuses a frozen weight."""
    block, h, rope, grad = block_case(torch.float32)
    block.norm2.requires_grad_(not frozen)
    piece = 10 if frozen else 33
    result, want = block_gradients(block, h, rope, grad, False, piece)
    recomputed, got = block_gradients(block, h, rope, grad, True, piece)
    assert torch.equal(recomputed, result) and got.keys() == want.keys() and ('norm2.weight' in want) != frozen
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())


def test_a_compiled_block_is_one_graph_without_pieces():
    """Its graph would have all pieces one after another, and break at the gradients that are taken by hand."""
    counters = importlib.import_module('torch._dynamo.utils').counters
    counters.clear()
    block, h, rope, grad = block_case(torch.float32)
    _, want = block_gradients(block, h, rope, grad, False)
    block.compile(backend='aot_eager')
    _, got = block_gradients(block, h, rope, grad, True)
    assert not counters['graph_break'] and counters['stats']['unique_graphs'] == 1
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= rounding(gradient, 400), name


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


def by_hand(model, folder, shard_bytes):
    """The weights' files from all tensors at once, in the order of `name_map`: what a save one by one must equal."""
    groups, size = [{}], 0
    for name, tensor in hf_tensors(model.config, dict(model.named_parameters())).items():
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    folder.mkdir()
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f'model-{number:05d}-of-{len(groups):05d}.safetensors' if len(groups) > 1 else 'model.safetensors'
        save_file(group, folder / file, {'format': 'pt'})
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = sum(tensor.nbytes for group in groups for tensor in group.values())
        write_json(folder / 'model.safetensors.index.json', {'metadata': {'total_size': total}, 'weight_map': weight_map})


@pytest.mark.parametrize('shard_bytes', [1, 3000, 8000, 20_000, 10**9])
@pytest.mark.parametrize('shape', [dict(), dict(tied=True), dict(family='phi3'), dict(family='qwen2', L=6)], ids=str)
def test_a_save_one_tensor_at_a_time_writes_the_same_bytes(shape, shard_bytes, tmp_path):
    """From a dict, from pairs in the model's order, and in any other order: the same files, names and bytes. Each pair is
    taken once and in order, because other ranks gather the same tensors at the same time."""
    model = tiny_model(**shape).bfloat16()
    by_hand(model, tmp_path / 'want', shard_bytes)
    pairs = list(model.named_parameters())
    orders = {'none': None, 'dict': dict(pairs), 'model': pairs, 'back': pairs[::-1], 'map': [(n, dict(pairs)[n]) for n in name_map(model.config)]}
    for order, state in orders.items():
        taken = []
        given = state
        if isinstance(state, list):
            given = (taken.append(name) or (name, tensor) for name, tensor in state)
        save_model(model, tmp_path / order, state=given, shard_bytes=shard_bytes)
        if isinstance(state, list):
            assert taken == [name for name, _ in state]
        for file in (tmp_path / 'want').iterdir():
            assert file.read_bytes() == (tmp_path / order / file.name).read_bytes(), (order, file.name)
        assert {f.name for f in (tmp_path / order).iterdir()} == {f.name for f in (tmp_path / 'want').iterdir()} | {'config.json'}
        assert read_json(tmp_path / order / 'config.json')['dtype'] == 'bfloat16'


@pytest.mark.parametrize('shape', [{}, dict(tied=True), dict(family='qwen2'), dict(family='phi3')])
def test_host_memory_while_saving(shape, tmp_path):
    """Of the tensors that were given, those of one file are alive at a time, and one that is on its way: a save of
    8 B parameters held all of them."""
    model, shard_bytes = tiny_model(L=30, **shape), 20_000
    alive, most = set(), 0
    names = [name for name, _ in model.named_parameters()]
    assert names == list(name_map(model.config))
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}

    def one_by_one():
        nonlocal most
        for name in names:
            tensor = dict(model.named_parameters())[name].detach().clone()
            alive.add(name)
            weakref.finalize(tensor.untyped_storage(), alive.discard, name)
            most = max(most, sum(sizes[n] for n in alive))
            yield name, tensor
    save_model(model, tmp_path / 'm', state=one_by_one(), shard_bytes=shard_bytes)
    assert len(list((tmp_path / 'm').glob('*.safetensors'))) > 8
    largest = max(sizes.values())
    assert sum(sizes.values()) > 4 * (shard_bytes + 2 * largest) > 4 * most > 0


def test_a_save_that_lacks_a_tensor_or_mixes_dtypes_leaves_nothing(tmp_path):
    """It would be a folder that cannot be loaded."""
    pairs = list(tiny_model().named_parameters())
    for wrong, says in ((pairs[:-1], 'missing'), ([*pairs[:-1], (pairs[-1][0], pairs[-1][1].bfloat16())], 'head.weight is torch.bfloat16')):
        with pytest.raises(AssertionError, match=says):
            save_model(tiny_model(), tmp_path / 'm', state=iter(wrong))
        assert list(tmp_path.iterdir()) == []


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
    (lambda f: (f / 'config.json').write_text('{"model_type": "qwen3"}'), 'vocab_size is missing'),
    (lambda f: (f / 'config.json').write_text('[]'), 'holds a list, not a dict'),
    (lambda f: edit(f, hidden_size='20'), "hidden_size = '20'"),
    (lambda f: edit(f, num_hidden_layers=0), 'num_hidden_layers = 0'),
    (lambda f: edit(f, num_key_value_heads=3), 'which 4 query heads cannot share evenly'),
    (lambda f: edit(f, model_type='mamba'), "model_type = 'mamba'"),
    (lambda f: edit(f, use_sliding_window=True, sliding_window=16), 'sliding_window = 16'),
    (lambda f: edit(f, rope_scaling={'rope_type': 'longrope', 'short_factor': [1.0] * 3}), 'long_factor is missing'),
    (lambda f: edit(f, rope_scaling={'rope_type': []}), 'rope_type = []'),
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
    (lambda f: edit(f, num_hidden_layers=4), "'model.layers.3.input_layernorm.weight' is missing"),
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
    (shutil.rmtree, 'no such file or folder'),
    (lambda f: (f / 'config.json').write_bytes(b'\xff\xfe'), 'not valid JSON'),
])
def test_bad_folder(tmp_path, spoil, says):
    folder = tmp_path / 'm'
    save_model(tiny_model(), folder)
    spoil(folder)
    with pytest.raises(UserError) as e:
        load_model(str(folder))
    assert says in str(e.value) and '\n' not in str(e.value), str(e.value)


BIG = 'x' * 100_000
NOT_SIZES = (0, -1, 1e12, 10**12, True, '7', 7.0, math.nan, math.inf, None, [7], {'a': 7}, BIG, 10**400)
FIELDS = [(key, value) for key in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
          for value in NOT_SIZES]
FIELDS += [(key, value) for key in ('num_key_value_heads', 'head_dim', 'max_position_embeddings') for value in NOT_SIZES
           if value is not None and (key, value) != ('head_dim', 0)]
FIELDS += [('rms_norm_eps', value) for value in (0, 0.0, None, True, -1e-6, math.nan, math.inf, 1e300, 1e-300, 2, '1e-6', [1e-6], BIG)]
FIELDS += [(key, value) for key in ('rope_theta', 'partial_rotary_factor')
           for value in (0, None, True, -1.0, math.nan, math.inf, 1e300, '1', [1.0], {'a': 1}, BIG)]
FIELDS += [(key, value) for key in ('tie_word_embeddings', 'attention_bias', 'mlp_bias', 'use_sliding_window')
           for value in ('false', 'true', 0, 1, 0.0, [], [True], {}, BIG)]
FIELDS += [('sliding_window', value) for value in (True, '8', 8.0, -1, [8], 10**12)] + [('layer_types', value) for value in ('full', [1], [['full']], {}, [BIG])]
FIELDS += [('hidden_act', value) for value in (None, 7, True, '', 'relu', ['silu'], BIG)] + [('model_type', value) for value in (None, 7, ['llama'], {}, BIG)]
FIELDS += [(key, value) for key in ('rope_scaling', 'rope_parameters') for value in ('x', [], 7, True, BIG)] + [('quantization_config', 'x')]
FIELDS += [('hidden_size', 21), ('num_attention_heads', 7), ('head_dim', 5), ('head_dim', 1)]


@pytest.mark.parametrize('key, value', FIELDS, ids=lambda value: shown(value)[:25])
def test_every_field_of_config_json_has_a_type_and_a_range(tmp_path, key, value):
    """true as a number, strings as booleans, NaN, sizes that would hang: each is one line that names file, field and value,
    at once. The fields are those of a Llama without head_dim, where the width must divide into the heads."""
    hf = hf_config(ModelConfig('llama', V=37, L=3, d=24, H=4, G=2, e=6, ff=28)) | {'head_dim': None}
    parse_config(hf, 'config.json')
    if key == 'head_dim' and value in (5, 1):
        hf['head_dim'] = value               # an odd head does not rotate in pairs
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        parse_config(hf | {key: value}, 'config.json')
    assert time.perf_counter() - began < 1
    line = str(error.value)
    assert line.startswith('config.json: ') and (key in line or 'cannot share evenly' in line or 'rotated in pairs' in line) and '\n' not in line and len(line) < 300, line
    assert value is None or shown(value) in line or 'cannot share evenly' in line or 'rotated in pairs' in line


LINEAR = dict(rope_type='linear', factor=2.0)
LONG6 = LONG | dict(factor=2.0)
NOT_NUMBERS = (0, None, True, -1.0, math.nan, math.inf, 1e300, '1', [1.0], BIG)
SCALINGS = [(LINEAR | {'factor': value}, 'factor') for value in NOT_NUMBERS]
SCALINGS += [(LLAMA3 | {key: value}, key) for key in LLAMA3 if key != 'rope_type' for value in NOT_NUMBERS]
SCALINGS += [(LLAMA3 | {'low_freq_factor': 4.0}, 'low_freq_factor'), (LLAMA3 | {'low_freq_factor': 5}, 'low_freq_factor'),
             (LLAMA3 | {'original_max_position_embeddings': 1e4}, 'original_max_position_embeddings'),
             (LLAMA3 | {'original_max_position_embeddings': 10**12}, 'original_max_position_embeddings'),
             (LONG6 | {'original_max_position_embeddings': 1}, 'original_max_position_embeddings')]
SCALINGS += [(LONG6 | {key: value}, key) for key in ('long_factor', 'short_factor')
             for value in (None, 1.0, [], [1.0] * 2, [1.0] * 4, [1.0] * 10**5, [1.0, 0, 1.0], [1.0, True, 1.0], [1.0, math.nan, 1.0], ['1'] * 3, [[1.0]] * 3)]
SCALINGS += [(LONG6 | {key: value}, key) for key in ('factor', 'attention_factor') for value in NOT_NUMBERS if value is not None]
SCALINGS += [({'rope_type': value}, 'rope_type') for value in ('yarn', 7, True, ['linear'], {'a': 1}, BIG)]


@pytest.mark.parametrize('spelling', ['rope_scaling', 'rope_parameters'])
@pytest.mark.parametrize('scaling, key', SCALINGS, ids=lambda value: shown(value)[-25:])
def test_every_number_of_a_rotary_scaling_has_a_range(scaling, key, spelling):
    """A factor of 0 and equal bounds of Llama 3 divided by zero; an original context of 1 has a logarithm of 0."""
    hf = hf_config(ModelConfig('llama', V=37, L=3, d=24, H=4, G=2, e=6, ff=28))
    del hf['original_max_position_embeddings'], hf['rope_scaling']
    for fine in (LINEAR, LLAMA3, LONG6):
        assert all(torch.isfinite(frequencies(parse_config(hf | {spelling: fine}, 'x'), 99)[0]))
    with pytest.raises(UserError, match=f'config.json: {key} = ') as error:
        parse_config(hf | {spelling: scaling}, 'config.json')
    assert len(str(error.value)) < 300


@pytest.mark.parametrize('family', ['qwen3', 'qwen2', 'llama', 'phi3'])
def test_missing_fields_have_the_defaults_of_transformers(family):
    """rms_norm_eps was 1e-6 for Phi-3, which has 1e-5, and a Qwen with use_sliding_window alone had no window."""
    theirs = type(hugging_face(family).config)()
    sizes = dict(model_type=family, vocab_size=37, hidden_size=4096, intermediate_size=28, num_hidden_layers=3, num_attention_heads=32)
    c = parse_config(sizes, 'config.json')
    assert (c.eps, c.context, c.activation, c.tied) == (theirs.rms_norm_eps, theirs.max_position_embeddings, theirs.hidden_act, theirs.tie_word_embeddings)
    assert c.theta == theirs.rope_parameters['rope_theta'] == 1e4 and c.partial == 1.0 and c.rope == {}
    made = type(theirs)(**{key: value for key, value in sizes.items() if key != 'model_type'})
    assert c.G == made.num_key_value_heads and c.e == (getattr(made, 'head_dim', None) or 4096 // 32)
    if 'qwen' in family:
        windowed = type(theirs)(use_sliding_window=True)
        assert windowed.sliding_window == 4096
        with pytest.raises(UserError, match='sliding_window'):
            parse_config(sizes | {'use_sliding_window': True}, 'config.json')
        parse_config(sizes | {'use_sliding_window': True, 'sliding_window': None}, 'config.json')


def test_the_largest_shapes_are_read_at_once():
    """The bounds of the table let no config through that takes long to look at."""
    began = time.perf_counter()
    c = parse_config(dict(model_type='llama', vocab_size=10**7, hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=1000,
                          num_attention_heads=2**12, num_key_value_heads=2**12, head_dim=2**12), 'x')
    assert c.count() > 10**14 and time.perf_counter() - began < 30


# ---- weights: dtypes, the index, links ---------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.bool, torch.int64, torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str)
def test_weights_of_other_dtypes_are_refused(dtype, tmp_path):
    """They were read as if they were numbers: quantised codes as weights, the real part of a complex number."""
    save_model(tiny_model(), tmp_path)
    tensors(lambda t: t.update({'model.norm.weight': torch.ones(20).to(dtype)}))(tmp_path)
    with pytest.raises(UserError, match=f'model.norm.weight has dtype {str(dtype)[6:]}, but weights are read as'):
        load_model(tmp_path)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_floating_point_dtypes_are_read(dtype, tmp_path):
    model = tiny_model().to(dtype)
    save_model(model, tmp_path)
    back = load_model(tmp_path, dtype)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize('name', ['/etc/passwd', '../m2/model.safetensors', 'a/../model.safetensors', './model.safetensors', '', '.', '..', 7, None,
                                  ['model.safetensors'], {}, True, 'none.safetensors', 'x' * 100_000, 'sub', 'm\x00'], ids=lambda name: shown(name)[:20])
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    """Another folder's weights were loaded through `../`, and through absolute paths."""
    for folder in ('m', 'm2'):
        save_model(tiny_model(), tmp_path / folder)
    (tmp_path / 'm/sub').mkdir()
    names = dict.fromkeys(index_all(tmp_path / 'm'), 'model.safetensors') | {'model.norm.weight': name}
    write_json(tmp_path / 'm/model.safetensors.index.json', {'weight_map': names})
    with pytest.raises(UserError) as error:
        load_model(tmp_path / 'm')
    assert '\n' not in str(error.value) and len(str(error.value).replace(str(tmp_path), '')) < 200


def a_model_folder(tmp_path):
    """A model with all files that travel with one."""
    folder = tmp_path / 'repo'
    save_model(tiny_model(), folder)
    words = {'a': 0, '<eos>': 1}
    write_json(folder / 'tokenizer.json', json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(words, [])).to_str()))
    write_json(folder / 'tokenizer_config.json', {'eos_token': '<eos>'})
    write_json(folder / 'generation_config.json', {'eos_token_id': 1})
    (folder / 'chat_template.jinja').write_text('{{ messages[0].content }}')
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    return folder


def use(folder, out):
    """Everything that reads a model folder."""
    tokenizer = load_tokenizer(folder)
    save_model(load_model(folder), out, source=folder)
    return tokenizer.render('a')


MEMBERS = ('config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja', 'merges.txt')


@pytest.mark.parametrize('name', MEMBERS)
def test_a_link_out_of_a_model_folder_is_refused(name, tmp_path):
    """merges.txt -> /etc/passwd: the contents were copied into the folder that is published. Relative, absolute, through
    a chain of links, through a linked folder; also a pipe, at which a reader would wait for ever, and a folder."""
    folder = a_model_folder(tmp_path)
    content = (folder / name).read_bytes()
    (tmp_path / 'secret').mkdir()
    (tmp_path / 'secret' / name).write_bytes(content)
    (folder / 'door').symlink_to('../secret')
    for target in (f'../secret/{name}', str(tmp_path / 'secret' / name), f'door/{name}', 'second'):
        (folder / name).unlink()
        (folder / 'second').unlink(missing_ok=True)
        (folder / 'second').symlink_to(f'../secret/{name}')
        (folder / name).symlink_to(target)
        with pytest.raises(UserError, match=f'{name}: a link that leads out of its folder'):
            use(folder, tmp_path / 'out')
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f'{name}: not a regular file'):
        use(folder, tmp_path / 'out')
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(UserError, match=f'{name}: not a regular file'):
        use(folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', MEMBERS)
def test_links_within_a_model_folder_are_followed(name, tmp_path):
    """Also a folder that is itself reached through a link, as out/last is."""
    folder = a_model_folder(tmp_path)
    (folder / name).rename(folder / 'other')
    (folder / name).symlink_to('other')
    (tmp_path / 'last').symlink_to('repo')
    assert use(tmp_path / 'last', tmp_path / 'out') == 'a'
    copied = tmp_path / 'out' / name
    assert copied.is_file() and not copied.is_symlink() and (name == 'config.json' or copied.read_bytes() == (folder / name).read_bytes())


def hub_cache(tmp_path):
    """A model folder as the hub's library keeps it: links into the blobs of the same repository."""
    folder = a_model_folder(tmp_path)
    root = tmp_path / 'hub/models--me--model'
    cached = root / 'snapshots/abc'
    cached.mkdir(parents=True)
    (root / 'blobs').mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(root / f'blobs/{number}')
        (cached / file.name).symlink_to(f'../../blobs/{number}')
    return cached


def test_the_cache_of_the_hub_keeps_working(tmp_path, monkeypatch):
    """Its snapshots hold nothing but links; the copies are files. Only weights may be large, and a blob has no ending."""
    cached = hub_cache(tmp_path)
    monkeypatch.setattr(huggingface, 'LARGEST_TEXT', 10_000)
    assert (cached / 'model.safetensors').stat().st_size > 10_000
    assert use(cached, tmp_path / 'out') == 'a'
    assert not any(file.is_symlink() for file in (tmp_path / 'out').iterdir())
    assert {file.name for file in (tmp_path / 'out').iterdir()} == set(MEMBERS)


@pytest.mark.parametrize('target', ['../../../models--you--model/blobs/0', '../../../../secret', '/etc/passwd', '../' * 40 + 'etc/passwd'])
def test_links_out_of_a_repository_of_the_cache_are_refused(target, tmp_path):
    cached = hub_cache(tmp_path)
    (tmp_path / 'secret').write_text('a')
    (tmp_path / 'hub/models--you--model/blobs').mkdir(parents=True)
    (tmp_path / 'hub/models--you--model/blobs/0').write_text('a')
    (cached / 'merges.txt').unlink()
    (cached / 'merges.txt').symlink_to(target)
    with pytest.raises(UserError, match='merges.txt: a link that leads out of its folder'):
        use(cached, tmp_path / 'out')


@pytest.mark.parametrize('target', ['gone', 'tokenizer.json'])
def test_a_broken_link_and_a_link_to_itself(target, tmp_path):
    """One line, and no RuntimeError about a loop."""
    folder = a_model_folder(tmp_path)
    (folder / 'tokenizer.json').unlink()
    (folder / 'tokenizer.json').symlink_to(target)
    with pytest.raises(UserError, match='tokenizer.json: not a regular file, or a link to nothing'):
        use(folder, tmp_path / 'out')


@pytest.mark.parametrize('name', [name for name in MEMBERS if name != 'model.safetensors'])
def test_files_without_weights_are_bounded(name, tmp_path):
    """A file of a terabyte, which costs nothing on a disk with holes, fills the memory of the one who reads it and the
    disk of the one who publishes it."""
    folder = a_model_folder(tmp_path)
    os.truncate(folder / name, 2**40)
    with pytest.raises(UserError, match=f'{name}: .* bytes, more than any tokenizer has'):
        use(folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


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
