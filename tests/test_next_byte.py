"""KL over the next byte: against enumeration over small vocabularies, and against the ordinary KL."""
import math
import random

import pytest
import torch
from conftest import Products, byte_loss

from cross_tokenizer.next_byte import ELSE, END, FLOOR, ByteTable, NextByte, byte_rows
from output_losses import HeadRows, head_statistics, opd_rows

D = torch.float64


def vocabulary(seed, n=40):
    """Random pieces over four bytes, one of them not UTF-8: single bytes and random merges, shuffled; two
    special tokens that write nothing, the first of which ends answers."""
    rng = random.Random(seed)
    alphabet = [b'a', b'b', b'=', b'\xff']
    words = {b''.join(rng.choices(alphabet, k=rng.randrange(2, 5))) for _ in range(3 * n)}
    pieces = [b'', b'', *alphabet, *sorted(words)[:n]]
    rng.shuffle(pieces)
    return pieces, [pieces.index(b'')]


def models(V, V_t, K=6, seed=0):
    """Student rows and head; teacher rows, after its last token and before it, and head."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((K, 5), (V + 2, 5), (2 * K, 7), (V_t + 3, 7))                    # padded embeddings on both sides
    return [2 * torch.randn(*s, generator=g, dtype=D) for s in sizes]


def firsts(p, pieces, stops):
    """Outcomes of one row's tokens, one by one: {byte, 'end' or 'else': probability}."""
    out = {}
    for i, piece in enumerate(pieces):
        o = 'end' if i in stops else piece[0] if piece else 'else'
        out[o] = out.get(o, 0.0) + p[i]
    return out


def teacher_by_hand(before, after, pieces, stops, written, inside):
    """The header's formula, token by token. Inside, what does not go on is one outcome, 'else'."""
    going, ends = {}, 0.0
    for i, piece in enumerate(pieces):
        if written and i not in stops and piece.startswith(written):
            if piece == written:
                ends += before[i]
            else:
                o = piece[len(written)]
                going[o] = going.get(o, 0.0) + before[i]
    if inside:
        out = going | {'else': ends} if going else {}
    else:
        out = {o: going.get(o, 0.0) + (ends if going else 1.0) * q for o, q in firsts(after, pieces, stops).items()}
        out |= {o: q for o, q in going.items() if o not in out}
    total = sum(out.values())
    return {o: q / total for o, q in out.items()}


WRITTEN = [b'', b'a', b'b', b'=', b'ab', b'zz']
INSIDE = torch.tensor([False, True, False, False, True, True])


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
@pytest.mark.parametrize('seed', range(4))
def test_against_enumeration(seed, direction):
    """Value and gradient for states and head, both temperatures, any chunk, upstream 1.7; rows after a whole
    token of the teacher, inside one, before any, and inside one that no token of the teacher goes on from."""
    (s, stop_s), (t, stop_t) = vocabulary(seed), vocabulary(seed + 10, 25)
    h, W, h_t, W_t = models(len(s), len(t), seed=seed)
    w = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=D)
    a, b, total = h.clone().requires_grad_(), W.clone().requires_grad_(), 0.0
    q = (h_t @ W_t[:len(t)].t() / 1.3).softmax(-1)
    for k in range(6):
        Q = teacher_by_hand(q[6 + k], q[k], t, stop_t, WRITTEN[k], INSIDE[k])
        P = firsts((a[k] @ b[:len(s)].t() / 0.7).softmax(-1), s, stop_s)
        if not Q:
            assert k >= 4
            continue
        if INSIDE[k]:
            P = {o: x for o, x in P.items() if o in Q and o != 'else'} | {'else': sum(x for o, x in P.items() if o not in Q or o == 'else')}
        kept = {o: max(float(Q.get(o, 0.0)), FLOOR) for o in P}
        for o, x in P.items():
            y = kept[o] / sum(kept.values())
            total = total + w[k] * (x * (x / y).log() if direction == 'reverse' else y * (y / x).log())
    want = torch.autograd.grad(1.7 * total, (a, b))
    tables = dict(table_s=ByteTable(s, stop_s, len(s)), table_t=ByteTable(t, stop_t, len(t)))
    for chunk in (1, 4, 100):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        loss, stats = byte_loss(a, b, h_t, W_t, w, WRITTEN, INSIDE, **tables, direction=direction, temperature=0.7,
                                teacher_temperature=1.3, chunk=chunk)
        assert loss.item() == pytest.approx(total.item(), rel=1e-11) and stats[0] == pytest.approx(w.sum().item(), rel=1e-12)
        for got, grad in zip(torch.autograd.grad(1.7 * loss, (a, b)), want, strict=True):
            assert (got - grad).abs().max() < 1e-11


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_matrices_of_odd_vocabularies_have_aligned_rows(dtype):
    """As in test_opd.py: both models' logits, and the gradient of the student's."""
    (s, stop_s), (t, stop_t) = vocabulary(1, 39), vocabulary(2, 25)
    assert len(s) % 2 and len(t) % 2
    g = torch.Generator().manual_seed(0)
    h, W, h_t, W_t = (torch.randn(n, d, generator=g).to(dtype) for n, d in ((6, 16), (len(s) + 3, 16), (12, 24), (len(t), 24)))
    h.requires_grad_()
    W.requires_grad_()
    tables = dict(table_s=ByteTable(s, stop_s, len(s)), table_t=ByteTable(t, stop_t, len(t)))
    with Products() as products:
        loss, _ = byte_loss(h, W, h_t, W_t, torch.ones(6), WRITTEN, INSIDE, **tables, chunk=4)
        loss.backward()
    assert products.names == {'mm', 'addmm_'} and not products.unaligned and not W.grad[len(s):].any()


def test_single_bytes_give_the_ordinary_kl():
    """One vocabulary of single bytes and an end: the next byte is the next token, whatever was written."""
    pieces = [b'x', b'', b'y', b'\x00', b'\xff']
    h, W, h_t, W_t = (x / 2 for x in models(5, 5))                            # nothing below FLOOR
    w, table = torch.ones(6, dtype=D), ByteTable(pieces, [1], 5)
    want = opd_rows(h @ W[:5].t(), h_t[:6] @ W_t[:5].t(), None, 'full').sum().item()
    for rows, written, inside in ((h_t[:6], None, None), (h_t, [b'x', b'', b'y', b'\xff', b'x', b'x'], torch.zeros(6).bool())):
        loss, _ = byte_loss(h, W, rows, W_t, w, written, inside, table_s=table, table_t=table)
        assert loss.item() == pytest.approx(want, rel=1e-12)


def test_a_table_by_hand():
    table = ByteTable([b'a', b'ab', b'', b'abc', b'b', b'', b'ac'], stops=[2], count=7)
    assert table.first.tolist() == [97, 97, END, 97, 98, ELSE, 97]
    assert [x.tolist() for x in table.after(b'a')] == [[1, 3, 6], [98, 98, 99], [0]]
    assert [x.tolist() for x in table.after(b'ab')] == [[3], [99], [1]] and table.after(b'q')[0].tolist() == []
    before = torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.15, 0.1, 0.1]], dtype=D).repeat(3, 1)
    after = torch.tensor([[0.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.0]], dtype=D).repeat(3, 1)
    Q, told = table.outcomes(before, after, [b'', b'a', b'a'], torch.tensor([False, False, True]))
    assert Q[0, [98, END]].tolist() == pytest.approx([0.4, 0.6]) and told[:2].all()
    assert Q[1, [98, 99, END]].tolist() == pytest.approx([0.29 / 0.45, 0.1 / 0.45, 0.06 / 0.45])
    assert Q[2, [98, 99, ELSE]].tolist() == pytest.approx([0.25 / 0.45, 0.1 / 0.45, 0.1 / 0.45]) and told[2].sum() == 3


def test_what_the_student_wrote_next_does_not_justify_itself():
    """The teacher writes 7= as one token and is sure of it. Before it is seen what the student wrote after 7,
    and whatever that was, = is what the teacher wants: where the text went on with ; the teacher's state
    after a lone 7 knows that no = follows, and alone would teach the slip."""
    pieces = [b'7', b'7=', b'=', b';']
    table, before = ByteTable(pieces, [], 4), torch.tensor([[0.02, 0.97, 0.0, 0.01]])
    after = torch.tensor([[0.0, 0.0, 0.0, 1.0]])                              # a lone 7 is followed by ;
    for inside in (False, True):             # the student wrote 7; or 7=
        Q, _ = table.outcomes(before, after, [b'7'], torch.tensor([inside]))
        assert Q[0, ord('=')] > 0.97 and table.first_outcomes(after)[0, ord('=')] == 0
    doubtful = torch.tensor([[0.97, 0.02, 0.0, 0.01]])                        # here it wants 7 and then ;
    Q, told = table.outcomes(doubtful, after, [b'7'], torch.tensor([True]))
    assert Q[0, ord('=')] < 0.03 and Q[0, ELSE] > 0.97 and told.sum() == 2    # though 7= was written


def test_plain_rows_equal_the_fused_ones():
    (s, stop), (t, stop_t) = vocabulary(1), vocabulary(2)
    h, W, h_t, W_t = models(len(s), len(t))
    table_s, table_t = ByteTable(s, stop, len(s)), ByteTable(t, stop_t, len(t))
    p, q = (h @ W[:len(s)].t()).softmax(-1), (h_t @ W_t[:len(t)].t()).softmax(-1)
    loss, stats = byte_loss(h, W, h_t, W_t, torch.ones(6, dtype=D), WRITTEN, INSIDE, table_s=table_s, table_t=table_t)
    batch = HeadRows(h_t, W_t, None, torch.ones(6, dtype=D), None, INSIDE, WRITTEN)
    assert torch.allclose(head_statistics(h, W, NextByte(table_s, table_t), batch), stats, rtol=1e-12)
    Q, told = table_t.outcomes(q[6:], q[:6], WRITTEN, INSIDE)
    rows = byte_rows(p, Q, told, table_s.first)[Q.sum(-1) > 0]
    assert len(rows) == 5 and loss.item() == pytest.approx(rows.sum().item()) and stats[1] == loss and 0 < stats[2] < 6 * 5.55


@pytest.mark.parametrize('q, seen', [(1e-2, 1e-2), (1e-6, 1e-6), (1e-7, 1e-7), (1e-12, 1e-8), (0.0, 1e-8)])
def test_a_teacher_may_be_sure_up_to_one_in_a_hundred_million(q, seen):
    """The least probability of an outcome is 1e-8, written here as a number: with 1e-3 the loss would be the same for a
    byte that the teacher never writes and for one that it writes now and then."""
    p = torch.tensor([[0.75, 0.25]], dtype=D)
    Q = torch.zeros(1, 258, dtype=D)
    Q[0, ord('a')], Q[0, ord('b')] = 1 - q, q
    first = torch.tensor([ord('a'), ord('b')])
    got = byte_rows(p, Q, torch.ones(1, 258, dtype=torch.bool), first).item()
    total = 1 - q + seen                     # renormalised
    want = sum(s * math.log(s / (t / total)) for s, t in ((0.75, 1 - q), (0.25, seen)))
    assert got == pytest.approx(want, rel=1e-9)
