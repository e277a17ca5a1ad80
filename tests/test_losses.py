"""Eq. (6) against brute force in float64; the fused form against autograd. Output space: test_opd.py."""
import pytest
import torch
from conftest import TINY_SUMS, flat_sums, rounding, step_sums, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import losses
from losses import HiddenTerm, layer_loss, layer_pairs, layer_set, oprd_loss, teacher_layer
from rollout import Rollout, sample
from step import Objective, cut_rollout, diagnose, micro_batches, position_mask, position_weights
from teacher import hidden_rows

PHI = {1: 1, 2: 2, 3: 3}
SETS = [('all', 0), ('last', 0), ('last_k', 3), ('last_k', 100), ('first_k', 2), ('last_frac', 0.3), ('first_frac', 0.5)]


def rollout(seed=0, B=5, V=37):
    """Ragged prompts and answers, one answer of a single token; padding is garbage, not zeros."""
    g = torch.Generator().manual_seed(seed)
    prompt_len, resp_len = torch.tensor([3, 1, 6, 2, 4])[:B], torch.tensor([7, 1, 4, 11, 2])[:B]
    ids = torch.randint(V, (B, int((prompt_len + resp_len).max())), generator=g)
    return Rollout(ids, prompt_len, resp_len, torch.ones(B, dtype=torch.bool), torch.arange(B))


def chosen(n, which, size):
    """Response positions 0..n-1 that a set names, by its words."""
    k = {'all': n, 'last': 1}.get(which) or (max(1, round(n * size)) if 'frac' in which else size)
    every = list(range(n))
    return every[:k] if which.startswith('first') else every[-k:]


@pytest.mark.parametrize('which, size', SETS)
def test_positions_by_hand(which, size):
    roll = rollout()
    m = position_mask(roll, which, size)
    for b in range(5):
        P, n = int(roll.prompt_len[b]), int(roll.resp_len[b])
        assert m[b].nonzero().squeeze(-1).tolist() == [P - 1 + t for t in chosen(n, which, size)]


def test_layer_sets_and_map():
    assert layer_set('all', 4) == [1, 2, 3, 4] and layer_set('last', 4) == [4]
    assert layer_set('even', 5) == [2, 4] and layer_set('odd', 5) == [1, 3, 5] and layer_set([3, 1, 3], 5) == [1, 3]
    assert [teacher_layer(l, 28, 28) for l in (1, 14, 28)] == [1, 14, 28]
    phi = [teacher_layer(l, 28, 36) for l in range(1, 29)]                 # Eq. (11) for Qwen3-1.7B <- 4B
    assert phi[0] == 1 and phi[-1] == 36 and phi == sorted(phi)
    assert all(abs(p - ((l - 1) / 27 * 35 + 1)) <= 0.5 for l, p in enumerate(phi, 1))
    assert teacher_layer(1, 1, 6) == 6 and teacher_layer(8, 11, 46) == 33     # 31.5 + 1: floats come out one low


def brute_force(h_s, h_t, roll, layers, which, size, kind, average):
    """Eq. (6) as its sums are written, over Python loops in float64."""
    total, B, d = 0.0, len(roll.ids), h_s[0].shape[-1]
    tokens = sum(len(chosen(int(n), which, size)) for n in roll.resp_len)
    for l in range(len(layers)):
        for b in range(B):
            at = [int(roll.prompt_len[b]) - 1 + t for t in chosen(int(roll.resp_len[b]), which, size)]
            for t in at:
                s, q = h_s[l][b, t], h_t[l][b, t]
                if kind != 'mse':
                    s, q = s / s.norm(), q / q.norm()
                one = ((s - q) ** 2).sum() / d if kind != 'cosine' else 1 - (s * q).sum()
                total = total + one / (len(at) * B if average == 'sequence' else tokens)
    return total / len(layers)


@pytest.mark.parametrize('average', ['sequence', 'token'])
@pytest.mark.parametrize('kind', ['mse', 'nmse', 'cosine'])
@pytest.mark.parametrize('layers', ['all', 'last', 'odd', [2]])
@pytest.mark.parametrize('which, size', SETS)
def test_equation_6(which, size, layers, kind, average):
    """Value and gradient, float64, ragged lengths, upstream gradient 1.7: plain and fused."""
    roll, L, d = rollout(), 3, 6
    layers = layer_set(layers, L)
    g = torch.Generator().manual_seed(1)
    shape = (*roll.ids.shape, d)
    h_s = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for _ in layers]
    h_t = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in layers]
    want = brute_force(h_s, h_t, roll, layers, which, size, kind, average)
    want_grad = torch.autograd.grad(1.7 * want, h_s)

    w = position_weights(position_mask(roll, which, size).double(), average).flatten()
    at = w.nonzero().squeeze(-1)
    w = w[at]
    rows = [h.flatten(0, 1)[at] for h in h_s]
    plain = oprd_loss(rows, [h.flatten(0, 1)[at] for h in h_t], w, kind)
    assert abs(plain - want) < 1e-12
    for a, b in zip(torch.autograd.grad(1.7 * plain, h_s), want_grad, strict=True):
        assert (a - b).abs().max() < 1e-12

    fused = [layer_loss(h, t.flatten(0, 1)[at], at, w, kind) for h, t in zip(h_s, h_t, strict=True)]
    value = sum(loss for _, loss, _ in fused) / len(layers)
    assert abs(value - want) < 1e-12
    for a, b in zip(torch.autograd.grad(1.7 * value, h_s), want_grad, strict=True):
        assert (a - b).abs().max() < 1e-12


DTYPES = pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])


@DTYPES
@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('kind', ['mse', 'nmse', 'cosine'])
def test_layer_by_layer_equals_autograd_through_the_model(kind, recompute, dtype):
    """The gradient injected on the way back, against autograd on gathered rows."""
    roll, teacher = rollout(), tiny_model(1).to(dtype)
    w = position_weights(position_mask(roll, 'last_k', 3))
    at = w.flatten().nonzero().squeeze(-1)
    plain = tiny_model(0).to(dtype)
    h_t = hidden_rows(teacher, roll.ids, dict.fromkeys(PHI, at), PHI)
    oprd_loss(plain.hidden(roll.ids, [1, 2, 3], at), list(h_t.values()), w.flatten()[at], kind).backward()
    fused = tiny_model(0).to(dtype)
    fused.checkpointing = recompute
    step_sums(fused, teacher, roll, w, PHI, kind=kind)
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if name == 'head.weight':
            assert a.grad is None and b.grad is None
        else:
            assert (a.grad - b.grad).norm() <= rounding(a.grad, TINY_SUMS), name


@DTYPES
@pytest.mark.parametrize('average', ['sequence', 'token'])
@pytest.mark.parametrize('layers', [[3], [1, 2]])
def test_micro_batches_do_not_change_the_gradient(layers, average, dtype):
    """From one row at a time to everything at once; sums that are logged, in float32, agree too."""
    roll, teacher, results = rollout(), tiny_model(1).to(dtype), []
    w = position_weights(position_mask(roll, 'all'), average)
    for budget in (1, 20, 30, 10**6):
        model = tiny_model(0).to(dtype)
        sums = flat_sums(step_sums(model, teacher, roll, w, {l: l for l in layers}, budget))
        results.append((sums, [p.grad for p in model.parameters() if p.grad is not None]))
    for sums, grads in results[:-1]:
        assert (sums - results[-1][0]).norm() <= rounding(results[-1][0].float(), 100)
        for a, b in zip(grads, results[-1][1], strict=True):
            assert (a - b).norm() <= rounding(b, TINY_SUMS)


def test_micro_batches_cover_every_row_within_the_budget():
    lengths = [7, 3, 30, 9, 9, 1, 12]
    groups = micro_batches(lengths, 24)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(len(g) * max(lengths[i] for i in g) <= 24 or len(g) == 1 for g in groups)
    assert len(groups) == 4


def test_logged_cosines_keep_their_layers_through_length_sorting():
    """Metrics of sorted micro-batches must not be permuted: each layer against its own direct cosine."""
    roll, student, teacher = rollout(), tiny_model(0).double(), tiny_model(1).double()
    m = position_mask(roll, 'all')
    logged = rounding(torch.ones(()), int(m.sum()))          # weights that sum to 1, as many float32 numbers
    sums = step_sums(student, teacher, roll, position_weights(m, 'token'), PHI, 15)
    assert abs(sums['weight'] - 1) <= logged
    for l, cos in enumerate(sums['layer_cosine'], 1):
        s, t = student.hidden(roll.ids, [l])[0][m], teacher.hidden(roll.ids, [l])[0][m]
        assert abs(torch.cosine_similarity(s, t).mean() - cos) <= logged


def huber(h_s, h_t):
    """A distance that the project does not have."""
    return torch.nn.functional.huber_loss(h_s, h_t, reduction='none', delta=0.3).mean(-1)


def test_a_distance_added_in_one_place_trains(monkeypatch):
    """The trap of an ablation: a new distance that is written into the readable table, and then trains as another one.
    Its gradient through the model equals autograd's, and is not that of the cosine."""
    monkeypatch.setitem(losses.DISTANCES, 'huber', huber)
    roll, teacher = rollout(), tiny_model(1).double()
    w = position_weights(position_mask(roll, 'last_k', 3)).double()
    at = w.flatten().nonzero().squeeze(-1)
    h_t = hidden_rows(teacher, roll.ids, dict.fromkeys(PHI, at), PHI)
    grads = {}
    for name in ('huber', 'cosine'):
        model = tiny_model(0).double()
        step_sums(model, teacher, roll, w, PHI, kind=name)
        grads[name] = [p.grad for p in model.parameters() if p.grad is not None]
    plain = tiny_model(0).double()
    sum((w.flatten()[at] * huber(s, t)).sum() / 3
        for s, t in zip(plain.hidden(roll.ids, [1, 2, 3], at), h_t.values(), strict=True)).backward()
    want = [p.grad for p in plain.parameters() if p.grad is not None]
    for got, ours, cosine in zip(grads['huber'], want, grads['cosine'], strict=True):
        assert (got - ours).norm() <= 1e-12 * ours.norm() < (got - cosine).norm()


def test_an_edited_distance_trains_as_edited(monkeypatch):
    """Whoever changes the formula of 'mse' gets the changed gradient, and not the kernel's old one."""
    assert all(losses.HiddenTerm(kind).fused for kind in ('mse', 'nmse', 'cosine'))
    monkeypatch.setitem(losses.DISTANCES, 'mse', huber)
    term = losses.HiddenTerm('mse')
    assert not term.fused
    g = torch.Generator().manual_seed(0)
    h, h_t = torch.randn(2, 4, 6, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(8, 6, generator=g, dtype=torch.float64)
    _, loss, _ = layer_loss(h, h_t.clone(), torch.arange(8), torch.ones(8).double(), 'mse', fused=term.fused)
    want = huber(h.flatten(0, 1), h_t).sum()
    assert abs(loss - want) < 1e-13
    assert (torch.autograd.grad(loss, h)[0] - torch.autograd.grad(want, h)[0]).abs().max() < 1e-13


@pytest.mark.parametrize('kind', list(losses.DISTANCES))
def test_short_rows_are_compared_alike_in_both_forms(kind):
    """Value, logged cosine and gradient of rows whose length is 1e-4 to 1e-9. A smallest norm of 1e-2 in one of the two
    forms would change each of them, and ordinary rows would not show it."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1e-4, 1.0, 1e-9, 1e-6], dtype=torch.float64)[:, None]
    h = lengths * torch.randn(4, 16, generator=g, dtype=torch.float64)
    h_t = lengths.flip(0) * torch.randn(4, 16, generator=g, dtype=torch.float64)
    at, weights = torch.arange(4), torch.rand(4, generator=g, dtype=torch.float64)
    fused, readable = h_t.clone(), h_t.clone()
    got, want = (rows(h, gradient, at, weights, kind) for rows, gradient in (
        (kernels.layer_rows, fused), (losses.layer_rows_by_autograd, readable)))
    exact = torch.nn.functional.normalize(h, eps=1e-30) * torch.nn.functional.normalize(h_t, eps=1e-30)
    for value, cosine in (got, want):
        assert torch.allclose(cosine, exact.sum(-1), rtol=1e-12, atol=1e-12)
        assert torch.allclose(value, want[0], rtol=1e-12, atol=1e-14)
    assert ((fused - readable).norm(dim=-1) <= 1e-10 * readable.norm(dim=-1)).all()


def test_hidden_states_one_column_later():
    """position_offset=1 compares the states that have read y_t, as the authors' code does, and still weighs each answer
    the same; output space is not moved. A look at the cosines without training on them sees the same states."""
    roll, student, teacher = rollout(), tiny_model(0).double(), tiny_model(1).double()
    mask = position_mask(roll, 'last_k', 3)
    w = position_weights(mask.double())
    sums = step_sums(student, teacher, roll, w, PHI, 20, offset=1)
    want = 0.0
    for b in range(5):
        P, n = int(roll.prompt_len[b]), int(roll.resp_len[b])
        read = range(P, P + n)[-3:]          # the columns of the last three response tokens
        for l in PHI:
            s, t = (model.hidden(roll.ids, [l])[0][b, list(read)] for model in (student, teacher))
            want += (s - t).square().mean(-1).mean() / 5 / 3
    assert sums['loss/oprd'] == pytest.approx(want.item(), rel=1e-12)
    looked = diagnose(student, teacher, cut_rollout(roll, w, 20, offset=1), Objective(PHI, HiddenTerm(), None))
    assert looked['layer_cosine'].tolist() == pytest.approx(sums['layer_cosine'].tolist(), rel=1e-6)
    plain = step_sums(student, teacher, roll, w, PHI, 20)
    assert (plain['layer_cosine'] - sums['layer_cosine']).abs().max() > 1e-3
    assert abs(plain['loss/oprd'] / sums['loss/oprd'] - 1) > 1e-3


def test_a_loss_that_is_not_used_adds_nothing():
    """Only the second layer's loss is back-propagated; the first must act as the identity."""
    h = torch.randn(2, 3, 4, requires_grad=True)
    at, w = torch.tensor([0, 5]), torch.ones(2)
    out, _, _ = layer_loss(h, torch.randn(2, 4), at, w)
    out.sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


def test_bfloat16_rows():
    """bf16 states: the value to float32's precision and the gradient to bf16's, its size included (a cosine alone
    does not see a factor)."""
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(1, 9, 64, generator=g).bfloat16(), torch.randn(9, 64, generator=g).bfloat16()
    at, w = torch.arange(9), torch.full((9,), 1 / 9)
    s.requires_grad_()
    for kind in ('mse', 'nmse', 'cosine'):
        ref = s.detach().double().requires_grad_()
        want = oprd_loss([ref[0]], [t.double()], w.double(), kind)
        want.backward()
        _, loss, _ = layer_loss(s, t.clone(), at, w, kind)
        got, = torch.autograd.grad(loss, s)
        assert abs(loss - want) <= rounding(want.detach().float(), 64 + 9)
        # The gradient is rounded to bf16 twice: in the teacher's memory, and when the loss's factor is applied.
        assert got.dtype == torch.bfloat16
        assert (got.double() - ref.grad).norm() <= rounding(ref.grad.bfloat16(), 2)


class Shapes(TorchDispatchMode):
    """Collects the shape of every tensor that any operation returns, and where its memory begins."""
    def __init__(self):
        super().__init__()
        self.seen, self.owners = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
                self.owners.add((tuple(x.shape), x.data_ptr()))
        return out


@pytest.mark.parametrize('tied', [False, True])
def test_no_tensor_has_an_axis_of_vocabulary_size(tied):
    """Student and teacher of one OPRD step, backward included. The embedding's own gradient (V, d)
    is the one exception; nothing with rows x V, in any order, is ever made."""
    V, d = 997, 20
    student, teacher = tiny_model(0, V=V, tied=tied), tiny_model(1, V=V, tied=tied)
    roll = rollout(V=V)
    w = position_weights(position_mask(roll, 'all'))
    with Shapes() as watch:
        step_sums(student, teacher, roll, w, PHI)
    assert (5, 13, d) in watch.seen                                       # it did watch
    assert {s for s in watch.seen if V in s} == {(V, d)}
    with Shapes() as watch:
        sample(student, [[1, 2]], max_new_tokens=2, stop=[0])
    assert (1, V) in watch.seen                                           # and sampling has logits


def test_the_teacher_is_left_as_it_was():
    student, teacher = tiny_model(0), tiny_model(1).requires_grad_(False)
    before = [p.clone() for p in teacher.parameters()]
    opt = torch.optim.AdamW(student.parameters(), lr=0.1)
    for _ in range(3):
        step_sums(student, teacher, rollout(), position_weights(position_mask(rollout())), PHI, 20)
        opt.step()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters(), strict=True))


def test_two_student_layers_may_share_a_teacher_layer():
    """Deeper student: rows of one teacher layer serve twice, and the first loss overwrites its own copy."""
    shallow, roll = tiny_model(1, L=2), rollout()
    at = torch.arange(6)
    phi = layer_pairs([1, 2, 3, 4, 5], 5, 2)
    h_t = hidden_rows(shallow, roll.ids, dict.fromkeys(phi, at), phi)
    want = shallow.hidden(roll.ids, [1, 2], at)
    assert [bool(torch.equal(h_t[l], want[1])) for l in (1, 2, 3, 4, 5)] == [False, False, True, True, True]
    assert len({h.data_ptr() for h in h_t.values()}) == 5
