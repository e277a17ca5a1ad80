"""The attention term against KL divergences of whole attention maps, taken one row at a time, and autograd."""
import weakref

import pytest
import torch
from conftest import TINY_SUMS, argv, log_of, resume_state, rounding, step_sums, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill
from configs import load_config
from distill import main
from extensions import attention_maps
from extensions.attention_maps import AttentionMaps, AttentionTerm, cut_rows
from kernels import mlp_in_pieces
from rollout import sample
from step import cut_rollout, position_mask, position_weights
from support.preflight import check_attention
from support.runtime import UserError

PROMPTS = [[1, 5, 9, 12, 4, 14], [1, 4, 14], [1, 7, 10, 8, 11, 14]]
SHAPES = {'grouped': {}, 'as many key heads': dict(G=4), 'qwen2': dict(family='qwen2'), 'one key head': dict(G=1),
          'partly rotated': dict(family='phi3', partial=0.5, e=8)}


def rollout(student):
    """Three answers of unlike lengths, so that rows are padded."""
    roll = sample(student, PROMPTS, max_new_tokens=12, stop=[2, 3, 4, 6, 8], seed=4)
    assert len(set(roll.length.tolist())) > 1
    return roll


def weights_of(roll, dtype=torch.float64, which='last_k'):
    return position_weights(position_mask(roll, which, 4)).to(dtype)


def queries_and_keys(model, ids):
    """{layer: q (B, H, T, e), k (B, H, T, e)}: the keys once for each query head."""
    c = model.config
    seen = {}

    def watch(l, q, k):
        seen[l] = q, k.repeat_interleave(c.H // c.G, 1)
        return q, k
    model.hidden(ids, [c.L], watch=watch)
    return seen


def plain_loss(student, teacher, roll, weights, pairs, heads):
    """The term by its definition: softmax over the keys that a row sees, one row and one head at a time."""
    ours = queries_and_keys(student, roll.ids)
    with torch.no_grad():
        theirs = queries_and_keys(teacher, roll.ids)
    total = 0.0
    for b, t in weights.nonzero().tolist():
        for l, l_t in pairs.items():
            for head in heads:
                logs = []
                for q, k in (ours[l], theirs[l_t]):
                    logits = (k[b, head, :t + 1] @ q[b, head, t]) / q.shape[-1] ** 0.5
                    logs.append(logits.log_softmax(-1))
                divergence = torch.nn.functional.kl_div(*logs, reduction='sum', log_target=True)
                total = total + weights[b, t] * divergence / len(pairs) / len(heads)
    return total


def add_gradient(student, teacher, roll, weights, term, budget=10**6, factor=1.0):
    """The gradient of factor times the term alone, added to .grad, as a training step takes it -> the term."""
    sums = step_sums(student, teacher, roll, weights, {}, budget, factor, oprd_weight=0.0, attention=term, attention_weight=1.0)
    assert sums.keys() == {'loss/attention'}
    return sums['loss/attention']


def gradients(model):
    """Of all weights: those that the term does not reach have none, or zeros."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


def both_ways(student, teacher, pairs, heads='all', layers='all', **how):
    """The loss and the gradient by the term, and those of the plain form."""
    roll = rollout(student)
    weights = weights_of(roll)
    term = AttentionTerm(layers, heads, {}, student.config, teacher.config)
    assert term.layer_map == pairs
    value = add_gradient(student, teacher, roll, weights, term, factor=0.3, **how)
    ours = gradients(student)
    student.zero_grad()
    student.checkpointing = False
    numbers = range(student.config.H) if heads == 'all' else [head - 1 for head in heads]
    want = plain_loss(student, teacher, roll, weights, pairs, numbers)
    (0.3 * want).backward()
    return value, ours, want.detach(), gradients(student)


def assert_equal(value, ours, want, wanted):
    assert wanted.norm() > 1e-4
    assert (value - want).abs() <= rounding(want, TINY_SUMS)
    assert (ours - wanted).norm() <= rounding(wanted, TINY_SUMS)


EVERY = {1: 1, 2: 2, 3: 3}


@pytest.mark.parametrize('logits', [10**6, 150, 1])
@pytest.mark.parametrize('name', SHAPES)
def test_value_and_gradient_are_those_of_the_definition(name, logits, monkeypatch):
    """Keys of another query head, of a later token or of another sequence; a piece that begins at the wrong row; the
    scale of the logits."""
    monkeypatch.setattr(attention_maps, 'LOGITS', logits)
    student, teacher = (tiny_model(seed, **SHAPES[name]).double() for seed in (0, 1))
    assert_equal(*both_ways(student, teacher, EVERY))


@pytest.mark.parametrize('heads', [[1], [2, 4], [4, 3, 3]])
def test_only_the_chosen_heads_count(heads):
    """The list counts from 1, in any order; a head that is named twice counts once."""
    student, teacher = tiny_model(0).double(), tiny_model(1).double()
    value, ours, want, wanted = both_ways(student, teacher, EVERY, sorted(set(heads)))
    assert_equal(value, ours, want, wanted)
    named = AttentionTerm('all', heads, {}, student.config, teacher.config)
    assert named.heads == [head - 1 for head in sorted(set(heads))]


@pytest.mark.parametrize('layers, pairs', [('last', {3: 3}), ([1], {1: 1}), ([3, 1], {1: 1, 3: 3})])
def test_only_the_chosen_layers_count(layers, pairs):
    student, teacher = tiny_model(0).double(), tiny_model(1).double()
    assert_equal(*both_ways(student, teacher, pairs, layers=layers))


def test_a_teacher_of_another_shape_is_compared_layer_by_layer():
    """Another depth, width, width of a head and number of key heads: the number of query heads is the same."""
    student, teacher = tiny_model(0).double(), tiny_model(1, L=5, d=28, e=10, G=4).double()
    assert_equal(*both_ways(student, teacher, {1: 1, 2: 3, 3: 5}))


def test_pairs_of_hidden_states_are_those_of_the_maps():
    """layer_map= is the user's word: what it pairs is not paired by depth."""
    c, deep = tiny_model(0).config, tiny_model(1, L=5).config
    assert AttentionTerm('all', 'all', {2: 4}, c, deep).layer_map == {1: 1, 2: 4, 3: 5}
    assert AttentionTerm('last', 'all', {}, c, deep).layer_map == {3: 5}


@pytest.mark.parametrize('piece', [2048, 7])
def test_blocks_that_are_recomputed_give_the_same_gradient(piece, monkeypatch):
    """The second call must find the teacher's tensors, and must not count the loss twice."""
    monkeypatch.setattr(mlp_in_pieces, 'PIECE', piece)
    student, teacher = tiny_model(0).double(), tiny_model(1).double()
    student.checkpointing = True
    assert_equal(*both_ways(student, teacher, EVERY))


@pytest.mark.parametrize('recompute', [False, True])
def test_a_block_is_computed_no_more_often_for_the_term(recompute, monkeypatch):
    """The pieces are differentiated in the forward. Under checkpoint's hooks each of them would compute its block again."""
    calls = []
    real = attention_maps.attention_distance

    def noted(*args):
        calls.append(1)
        return real(*args)
    monkeypatch.setattr(attention_maps, 'attention_distance', noted)
    student, teacher = tiny_model(0), tiny_model(1)
    student.checkpointing = recompute
    roll = rollout(student)
    term = AttentionTerm('all', 'all', {}, student.config, teacher.config)
    add_gradient(student, teacher, roll, weights_of(roll, torch.float32), term)
    assert len(calls) == 3 * 3 * (1 + recompute)         # layers, sequences


def test_micro_batches_do_not_change_the_gradient():
    student, teacher = tiny_model(0).double(), tiny_model(1).double()
    assert_equal(*both_ways(student, teacher, EVERY, budget=20))


def test_a_student_that_is_the_teacher_has_no_gradient():
    """KL of a map to itself: a term that does not rest there would drive the student away from its teacher. Student's and
    teacher's probabilities cancel, up to the rounding of what they give beside a teacher of another mind."""
    student, same, other = (tiny_model(seed).double() for seed in (0, 0, 1))
    roll = rollout(student)
    term = AttentionTerm('all', 'all', {}, student.config, same.config)
    found = []
    for teacher in (same, other):
        student.zero_grad()
        value = add_gradient(student, teacher, roll, weights_of(roll), term)
        found.append((value, gradients(student)))
    assert found[0][0] == 0 < found[1][0]
    assert found[0][1].norm() <= rounding(found[1][1], TINY_SUMS)


def test_other_losses_of_the_same_states_are_added():
    """The states that the term hands on carry the gradient of what comes behind them."""
    student, teacher = tiny_model(0).double(), tiny_model(1).double()
    roll = rollout(student)
    rows, = cut_rollout(roll, weights_of(roll), 10**6)
    term = AttentionTerm([2], 'all', {}, student.config, teacher.config)
    found = []
    for parts in ('both', 'states', 'maps'):
        student.zero_grad()
        maps = AttentionMaps(term, rows)
        teacher.hidden(rows.ids, [2], watch=maps.keep)
        kept = []

        def tap(l, h, maps=maps, kept=kept):
            h, loss = maps.loss(l, h) if l == 2 else (h, None)
            kept.append(h)
            return h, loss
        losses = student.hidden(rows.ids, [2, 3], tap=tap, watch=maps)
        states = sum(h.pow(3).sum() for h in kept)
        {'both': losses[0] + states, 'states': states, 'maps': losses[0]}[parts].backward()
        found.append(gradients(student))
    both, states, maps = found
    assert maps.any() and (both - states - maps).norm() <= rounding([both, states, maps], TINY_SUMS)


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that an operation returns."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def test_no_whole_map_is_ever_made(monkeypatch):
    """Three sequences of 200 tokens whose every position of an answer is supervised. The largest tensor has the size of a
    piece, or that of the queries, but never T x T numbers."""
    monkeypatch.setattr(attention_maps, 'LOGITS', 5000)
    student, teacher = tiny_model(0, context=300), tiny_model(1, context=300)
    roll = sample(student, PROMPTS, max_new_tokens=194, stop=[], seed=4)
    rows, = cut_rollout(roll, weights_of(roll, torch.float32, 'all'), 10**6)
    q, k = torch.randn(2, 3, 4, 200, 6)
    maps = AttentionMaps(AttentionTerm('last', 'all', {}, student.config, teacher.config), rows)
    with Largest() as largest:
        maps.keep(3, k, k[:, :2])
        q = q.requires_grad_()
        result, _ = maps(3, q, k[:, :2])
        h, loss = maps.loss(3, result)
        (h.sum() + loss).backward()
    assert largest.numbers <= 3 * 4 * 200 * 6 < 200 * 200


def test_rows_are_cut_as_the_docstring_says(monkeypatch):
    monkeypatch.setattr(attention_maps, 'LOGITS', 20)
    assert cut_rows(torch.tensor([3, 4, 17, 18, 19]), 10, 1) == [(0, 0, 2, 5), (1, 2, 4, 9), (1, 4, 5, 10)]
    assert cut_rows(torch.tensor([], dtype=torch.long), 10, 1) == []


@pytest.mark.parametrize('recompute', [False, True])
def test_nothing_of_a_micro_batch_is_left_after_its_backward(recompute):
    """Loss, blocks and teacher's tensors hold each other: one reference too many keeps a micro-batch in memory."""
    student, teacher = tiny_model(0), tiny_model(1)
    student.checkpointing = recompute
    roll = rollout(student)
    rows, = cut_rollout(roll, weights_of(roll, torch.float32), 10**6)
    maps = AttentionMaps(AttentionTerm('all', 'all', {}, student.config, teacher.config), rows)
    with torch.no_grad():
        teacher.hidden(rows.ids, [3], watch=maps.keep)
    seen = [weakref.ref(layer.k) for layer in maps.teacher.values()]
    losses = student.hidden(rows.ids, [1, 2, 3], tap=maps.loss, watch=maps)
    sum(losses).backward()
    assert maps.losses == dict.fromkeys(EVERY)           # a loss would keep its block's tensors
    del maps
    assert len(seen) == 3 and not any(reference() is not None for reference in seen)


def test_bfloat16_maps_are_float32():
    """Both models in bfloat16: the value is that of their queries and keys in float32, and the gradient has their dtype."""
    student, teacher = tiny_model(0).bfloat16(), tiny_model(1).bfloat16()
    roll = rollout(tiny_model(0))
    weights = weights_of(roll, torch.float32)
    term = AttentionTerm('all', 'all', {}, student.config, teacher.config)
    value = add_gradient(student, teacher, roll, weights, term)
    assert value.dtype == torch.float32 and gradients(student).dtype == torch.bfloat16
    exact = torch.zeros((), dtype=torch.float64)
    ours, theirs = (queries_and_keys(model, roll.ids) for model in (student, teacher))
    for b, t in weights.nonzero().tolist():
        for l in EVERY:
            log_s, log_t = ((k[b].double()[:, :t + 1] @ q[b].double()[:, t, :, None])[..., 0].div(6 ** 0.5).log_softmax(-1)
                            for q, k in (ours[l], theirs[l]))
            exact += weights[b, t] * (log_t.exp() * (log_t - log_s)).sum() / 12
    assert (value - exact).abs() <= rounding(torch.ones(()), 200) * 2


def test_the_term_is_added_to_hidden_states():
    """The gradient is linear in the weights of the terms: a layer that both look at must carry both gradients."""
    student, teacher = tiny_model(0).double(), tiny_model(1).double()
    roll = rollout(student)
    weights = weights_of(roll)
    term = AttentionTerm([1, 3], 'all', {}, student.config, teacher.config)
    found = {}
    for oprd, attention in ((0.5, 2.0), (0.5, 0.0), (0.0, 2.0)):
        student.zero_grad()
        sums = step_sums(student, teacher, roll, weights, {1: 1, 2: 2}, oprd_weight=oprd, attention=term, attention_weight=attention)
        found[oprd, attention] = gradients(student)
        assert ('loss/oprd' in sums, 'loss/attention' in sums) == (oprd > 0, attention > 0)
    both, states, maps = found.values()
    assert states.any() and maps.any()
    assert (both - states - maps).norm() <= rounding([both, states, maps], TINY_SUMS)


# ---- runs ------------------------------------------------------------------------------------------

KEYS = dict(attention_weight=2, attention_layers='all', oprd_weight=0.5)


def test_a_run_logs_the_term_and_resumes_bit_for_bit(toy_dir, tmp_path, monkeypatch):
    """A run that was stopped in its third step ends as one that was not, and the loss is the sum of its terms."""
    main(load_config(argv(toy_dir, tmp_path / 'whole', steps=3, save_every=1, **KEYS)))
    real, steps = distill.accumulate, []

    def stops(*args, **keys):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args, **keys)
    args = argv(toy_dir, tmp_path / 'stopped', steps=3, save_every=1, **KEYS)
    monkeypatch.setattr(distill, 'accumulate', stops)
    with pytest.raises(KeyboardInterrupt):
        main(load_config(args))
    monkeypatch.setattr(distill, 'accumulate', real)
    main(load_config(args))

    whole, stopped = (log_of(tmp_path / name)[1:] for name in ('whole', 'stopped'))
    assert [row['loss/attention'] for row in whole] == [row['loss/attention'] for row in stopped]
    for row in whole:
        assert row['loss/attention'] > 0
        assert row['loss'] == pytest.approx(0.5 * row['loss/oprd'] + 2 * row['loss/attention'], rel=1e-6)
    a, b = resume_state(tmp_path / 'whole'), resume_state(tmp_path / 'stopped')
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_run_without_the_term_has_no_column_for_it(toy_dir, tmp_path):
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, eval_data='')))
    assert 'loss/attention' not in (tmp_path / 'r/log.jsonl').read_text()


def test_recomputed_blocks_and_small_micro_batches_change_no_step(toy_dir, tmp_path):
    """With the term alone: nothing but the term makes the states behind the last map a part of the loss."""
    keys = dict(oprd_weight=0, attention_weight=1, attention_layers=[1, 2], steps=2, eval_data='')
    main(load_config(argv(toy_dir, tmp_path / 'plain', **keys)))
    main(load_config(argv(toy_dir, tmp_path / 'cut', checkpointing=True, token_budget=40, **keys)))
    for row, other in zip(log_of(tmp_path / 'plain')[1:], log_of(tmp_path / 'cut')[1:], strict=True):
        assert row['grad_norm'] > 0
        for name in ('loss', 'loss/attention', 'grad_norm'):
            assert row[name] == pytest.approx(other[name], rel=1e-4)


# ---- what is refused ---------------------------------------------------------------------------------

@pytest.mark.parametrize('keys, says', [
    (dict(teacher='self', teacher_sees='solution', solution_text='{solution}{question}'), 'the teacher reads other tokens'),
    (dict(compile=True), 'set compile=False'),
    (dict(attention_layers=[2, 4]), r'attention_layers=[2, 4], but the student has 3; choose from 1 to 3'),
    (dict(attention_heads=[1, 3]), r'attention_heads=[1, 3]: the student has 2 heads, the teacher 2; choose from 1 to 2'),
    (dict(attention_heads=[0]), 'attention_heads=[0]; give a list of whole numbers from 1'),
    (dict(attention_heads='last'), "attention_heads='last'; choose one of 'all', a list"),
    (dict(attention_weight=0, oprd_weight=0), 'reward_weight, attention_weight are all 0 there; raise one'),
])
def test_keys_that_make_no_sense_are_refused(toy_dir, tmp_path, keys, says):
    with pytest.raises(UserError) as error:
        main(load_config(argv(toy_dir, tmp_path / 'r', **dict(attention_weight=1) | keys)))
    assert says in str(error.value) and not (tmp_path / 'r').exists()


def test_models_whose_maps_cannot_be_compared_are_refused():
    """Another vocabulary, other numbers of heads, and layers that a model does not have."""
    c, narrow = tiny_model(H=4).config, tiny_model(H=2).config
    cfg = load_config(['attention_weight=1'])
    check_attention(cfg, c, c, same=True)
    check_attention(cfg | {'attention_heads': [1, 2]}, c, narrow, same=True)
    for keys, teacher, same, says in (({}, c, False, 'the teacher reads other tokens'),
                                      ({}, narrow, True, 'the student has 4 heads, the teacher 2; give a list'),
                                      ({'attention_heads': [3]}, narrow, True, 'choose from 1 to 2')):
        with pytest.raises(UserError, match=says):
            check_attention(cfg | keys, c, teacher, same)
    with pytest.raises(UserError, match='the student has 1; choose'):
        check_attention(cfg | {'attention_layers': 'even'}, tiny_model(L=1).config, c, same=True)
