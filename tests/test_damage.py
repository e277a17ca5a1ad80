"""Damaged models: what is written loads in transformers with equal logits, and each kind of damage is what it says. What
a pruned student is paired with."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import argv, rounding, tiny_model
from test_real import SMOL, needs_smollm2

from configs import load_config
from distill import main
from formats.huggingface import load_model, read_config, save_model
from formats.tokenizer import load_tokenizer
from studies import damage, view
from support.files import read_json, write_json
from support.preflight import layer_lines, match_layers
from support.provenance import weights_digest
from support.runtime import UserError

transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def intact(tmp_path_factory, toy_cfg):
    """A folder of six layers with the toy's tokenizer, and weights in which every layer differs."""
    folder = tmp_path_factory.mktemp('intact') / 'm'
    save_model(tiny_model(V=21, L=6, d=24, H=4, G=2, e=6, ff=32), folder, source=toy_cfg['student'])
    return folder


def parsed(*words):
    """The options of a command line."""
    return damage.settings(['model', 'out', *words])[2]


KINDS = {'noise': ['noise=0.3', 'seed=3'], 'drop': ['drop=2,5'], 'bits': ['bits=2', 'group=4']}


@pytest.mark.parametrize('kind', list(KINDS))
def test_a_damaged_folder_is_a_model_of_transformers(kind, intact, tmp_path):
    """Equal logits in both libraries, all files of the source, a config that fits the weights, and a record of what was
    done. A config.json of 6 layers beside the weights of 4 loads nowhere."""
    out = tmp_path / 'out'
    damage.main([intact, out, parsed(*KINDS[kind])])
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    ours = load_model(out)
    layers = 4 if kind == 'drop' else 6
    assert ours.config.L == theirs.config.num_hidden_layers == layers
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        logits = ours(ids)
        assert (logits - theirs(ids).logits).norm() <= rounding(logits, 1000)
        assert (logits - load_model(intact)(ids)).norm() > 0.01 * logits.norm()          # it is damaged
    copied = {file.name for file in intact.iterdir()} - {'config.json', 'model.safetensors'}
    assert copied and all((out / name).read_bytes() == (intact / name).read_bytes() for name in copied)
    assert load_tokenizer(out).encode('1+2') == load_tokenizer(intact).encode('1+2')
    kept = [1, 3, 4, 6] if kind == 'drop' else [1, 2, 3, 4, 5, 6]
    wanted = {'noise': {'noise': 0.3, 'seed': 3}, 'drop': {'drop': [2, 5]}, 'bits': {'bits': 2, 'group': 4}}[kind]
    assert read_json(out / 'damage.json') == {'damage': wanted, 'model': str(intact), 'model_digest': weights_digest(intact),
                                              'kept_layers': kept}
    assert read_json(out / 'config.json')['kept_layers'] == kept


def test_the_layers_that_stay_are_those_that_were_asked_for(intact, tmp_path):
    """Counted from 1; every tensor of a layer that stays is bit for bit the intact one. An index from 0 would drop the
    neighbours."""
    damage.main([intact, tmp_path / 'once', parsed('drop=2,5')])
    before, after = load_model(intact), load_model(tmp_path / 'once')
    for new, old in enumerate([1, 3, 4, 6]):
        for mine, theirs in zip(after.blocks[new].parameters(), before.blocks[old - 1].parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(after.embed.weight, before.embed.weight) and torch.equal(after.norm.weight, before.norm.weight)

    # Pruned once more, it still names layers of the intact model: its third layer was the fourth.
    damage.main([tmp_path / 'once', tmp_path / 'twice', parsed('drop=3')])
    assert read_config(tmp_path / 'twice').hf['kept_layers'] == [1, 3, 6]
    damage.main([tmp_path / 'twice', tmp_path / 'noisy', parsed('noise=0.1')])
    assert read_config(tmp_path / 'noisy').hf['kept_layers'] == [1, 3, 6]


def test_noise_has_the_asked_size_and_follows_the_seed(intact, tmp_path):
    """Of every matrix by its own standard deviation, and of no norm: one size for all would destroy the small ones."""
    for name, words in {'a': ['noise=0.3'], 'b': ['noise=0.3', 'seed=0'], 'c': ['noise=0.3', 'seed=1']}.items():
        damage.main([intact, tmp_path / name, parsed(*words)])
    before, a, b, c = (load_model(folder) for folder in (intact, *(tmp_path / name for name in 'abc')))
    for name, old in before.named_parameters():
        new = a.get_parameter(name)
        assert torch.equal(new, b.get_parameter(name))
        if old.ndim == 1:
            assert torch.equal(new, old)
            continue
        assert not torch.equal(new, c.get_parameter(name))
        # The mean square of n standard normal numbers has a standard deviation of sqrt(2 / n): six of them.
        ratio = ((new - old).square().mean() / old.var()).item() / 0.09
        assert abs(ratio - 1) < 6 * (2 / old.numel())**0.5, name


def brute_force_rounding(weight, bits, group):
    """Each number by itself: the nearest of 2^bits candidates between the ends of its group."""
    out = weight.clone()
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], group):
            members = weight[row, first:first + group].tolist()
            low, high = min(members), max(members)
            candidates = [low + (high - low) * level / (2**bits - 1) for level in range(2**bits)]
            for i, value in enumerate(members):
                out[row, first + i] = min(candidates, key=lambda candidate: abs(candidate - value))
    return out


def test_rounding_takes_the_nearest_of_the_values_of_a_group():
    """Against one number at a time in float64. A group across two rows, or along the columns, gives other values."""
    weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[1, 4:8] = 0.7                     # equal neighbours stay as they are
    for bits, group in ((1, 3), (2, 4), (3, 12)):
        got = damage.rounded(weight, bits, group)
        assert torch.allclose(got, brute_force_rounding(weight, bits, group), rtol=0, atol=1e-14)
        counts = [len(set(piece.tolist())) for piece in got.round(decimals=9).view(-1, group)]
        assert max(counts) == min(2**bits, group)
    assert damage.rounded(torch.tensor([[0.0, 0.4, 1.1, 3.0]]), 2, 4).tolist() == [[0, 0, 1, 3]]


def test_rounding_leaves_embedding_head_and_norms(intact, tmp_path):
    damage.main([intact, tmp_path / 'b', parsed('bits=3', 'group=2')])
    before, after = load_model(intact).requires_grad_(False), load_model(tmp_path / 'b').requires_grad_(False)
    for name, old in before.named_parameters():
        changed = name.startswith('blocks.') and old.ndim == 2
        # With two neighbours both are ends of their group, up to the rounding of end + (end - end).
        assert torch.allclose(after.get_parameter(name), old, rtol=0, atol=4 * torch.finfo(torch.float32).eps * old.abs().max().item())
        assert changed or torch.equal(after.get_parameter(name), old)
    damage.main([intact, tmp_path / 'c', parsed('bits=1', 'group=4')])
    for name, new in load_model(tmp_path / 'c').named_parameters():
        changed = name.startswith('blocks.') and new.ndim == 2
        assert torch.equal(new, before.get_parameter(name)) != changed, name


@pytest.mark.parametrize('words, says', [
    (['m'], 'wants a model and a folder'), (['m', 'o'], 'no kind of damage given'), (['m', 'o', 'noise=1', 'bits=2'], 'noise and bits given'),
    (['m', 'o', 'noise=x'], 'noise = .x.; wants a finite number'), (['m', 'o', 'noise=0'], 'noise = 0'), (['m', 'o', 'bits=2.5'], 'bits = 2.5'),
    (['m', 'o', 'drop=0'], r'drop = \[0\]'), (['m', 'o', 'drop=1,x'], 'drop = '), (['m', 'o', 'drop=True'], r'drop = \[True\]'),
    (['m', 'o', 'noise=1', 'group=2'], "'group': not an option of noise="), (['m', 'o', 'noise=1', 'sigma=2'], "'sigma'"), (['-m', 'o', 'noise=1'], 'wants a model')])
def test_a_command_that_cannot_be_meant_is_one_line(words, says):
    with pytest.raises(UserError, match=says):
        damage.settings(words)


def test_what_cannot_be_damaged_leaves_nothing_behind(intact, tmp_path):
    """A folder that exists may be somebody's only copy of a model."""
    (tmp_path / 'mine').mkdir()
    for out, words, says in (('mine', ['noise=1'], 'is there already'), ('new', ['drop=7'], 'drop=7: the model has 6 layers'),
                             ('new', ['drop=1,2,3,4,5,6'], 'no layer of 6 would stay'), ('new', ['bits=2', 'group=7'], 'group=7 does not divide')):
        with pytest.raises(UserError, match=says):
            damage.main([intact, tmp_path / out, parsed(*words)])
    assert [path.name for path in tmp_path.iterdir()] == ['mine'] and not any((tmp_path / 'mine').iterdir())


# ---- layer_map=kept ---------------------------------------------------------------------------------

def match(kept, **keys):
    return match_layers({'bridge': '', 'layer_map': 'kept', 'layers': 'all'} | keys, SimpleNamespace(L=3, hf={'kept_layers': kept}), SimpleNamespace(L=6))


def test_a_pruned_student_is_paired_with_the_layers_it_kept():
    """By depth layer 2 of 3 would meet layer 4 of 6, which was never its own."""
    assert match([1, 3, 6]) == {1: 1, 2: 3, 3: 6}
    assert match([1, 3, 6], layers=[2]) == {2: 3} and match([2, 3, 6], layers='odd') == {1: 2, 3: 6}
    # Both last states are final-normed. A student that lost its last block has the norm behind another one.
    assert match([1, 3, 4]) == {1: 1, 2: 3, 3: 6}
    assert match([1, 2, 6], layer_map='depth') == {1: 1, 2: 4, 3: 6}


@pytest.mark.parametrize('kept, says', [(None, 'has no kept_layers'), ([], 'has no kept_layers'), ([1, 2], 'names 2 layers and the student has 3'),
                                        ([1, 2, 7], 'has kept layer 7, but the teacher has 6')])
def test_layer_map_kept_needs_a_student_that_fits(kept, says):
    with pytest.raises(UserError, match=says):
        match(kept)


def test_a_pruned_student_paired_by_depth_is_told():
    """It was paired by depth without a word that its folder knows better."""
    pairs = {1: 1, 2: 4, 3: 6}
    line, note = layer_lines(pairs, 3, 6, 'depth', [1, 3, 6])
    assert line == 'layers, student -> teacher: 1 -> 1, 2 -> 4, 3 -> 6'
    assert 'was pruned and has kept layers 1, 3, 6; layer_map=kept' in note and '\n' not in note
    assert len(layer_lines(pairs, 3, 6, 'kept', [1, 3, 6])) == 1 and len(layer_lines(pairs, 3, 6, [1, 4, 6], [1, 3, 6])) == 1
    assert len(layer_lines({1: 1, 2: 2, 3: 3}, 3, 3, 'depth', [1, 2, 3])) == 1                # it has lost nothing
    assert len(layer_lines({1: 1, 2: 2, 3: 3}, 3, 3, 'depth', [1, 3, 4])) == 2                # a teacher of the same depth


def test_a_folder_with_a_list_that_is_none_is_refused(intact, tmp_path):
    """config.json comes from somebody else."""
    damage.main([intact, tmp_path / 'd', parsed('drop=2')])
    config = read_json(tmp_path / 'd/config.json')
    for bad in ('1,2', [0], [True], {'1': 2}, [1.5], [10**9]):
        write_json(tmp_path / 'd/config.json', config | {'kept_layers': bad})
        with pytest.raises(UserError, match='kept_layers = .*; wants a list'):
            read_config(tmp_path / 'd')


def test_a_pruned_student_heals_with_its_own_layers(toy_dir, toy_cfg, tmp_path, capsys):
    """Through the whole loop: the teacher of three layers without its second. Without a change the cosine of layer 1 is
    exactly that of equal models, and the checkpoint still says what it kept, so that a second run can be paired."""
    damage.main([toy_cfg['teacher'], tmp_path / 'pruned', parsed('drop=2')])
    for how in ('kept', 'depth'):
        main(load_config(argv(toy_dir, tmp_path / how, student=tmp_path / 'pruned', layer_map=how, steps=1, eval_data='', lr=0)))
    said = capsys.readouterr().out
    assert said.count('layers, student -> teacher: 1 -> 1, 2 -> 3') == 2 and said.count('layer_map=kept pairs it with those') == 1
    row = json.loads((tmp_path / 'kept/log.jsonl').read_text().splitlines()[-1])
    assert abs(row['rep/cos/1'] - 1) < 1e-5 and row['rep/cos/2'] < 0.999
    assert read_config(tmp_path / 'kept/last').hf['kept_layers'] == [1, 3]

    # The page of the run pairs them in the same way: it knew nothing of kept layers, and refused the run.
    view.main(view.settings([str(tmp_path / 'kept'), 'prompts=1', 'tokens=5', f"data={toy_cfg['data']}", f"to={tmp_path / 'page.html'}"]))
    assert (tmp_path / 'page.html').exists()
    with pytest.raises(UserError, match='has no kept_layers'):
        main(load_config(argv(toy_dir, tmp_path / 'no', layer_map='kept', steps=1, eval_data='')))


@needs_smollm2
def test_smollm2_without_six_layers_loads_with_equal_logits(tmp_path):
    """The damage of docs/real_model.md on real weights."""
    damage.main([SMOL, tmp_path / 'd', parsed('drop=6,10,14,18,22,26')])
    ours, theirs = load_model(tmp_path / 'd'), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'd', dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(SMOL).chat('Why is the sky blue?')])
    with torch.no_grad():
        logits = ours(ids)
        assert ours.config.L == theirs.config.num_hidden_layers == 24
        assert (logits - theirs(ids).logits).norm() <= rounding(logits, 24 * 5000)
