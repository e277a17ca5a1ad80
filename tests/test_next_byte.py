"""KL over the next byte: against enumeration over small vocabularies, and against the ordinary KL."""
import random

import pytest
import torch

from losses import opd_rows
from next_byte import END, FLOOR, NONE, ByteTable, byte_loss, byte_rows

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
    g = torch.Generator().manual_seed(seed)
    sizes = ((K, 5), (V + 2, 5), (K, 7), (V_t + 3, 7))                        # padded embeddings on both sides
    return [2 * torch.randn(*s, generator=g, dtype=D) for s in sizes]


def by_hand(p, pieces, stops, written):
    """Next-byte probabilities of one row, token by token, then renormalised."""
    out = [0.0] * 257
    for i, piece in enumerate(pieces):
        if not written and i in stops:
            out[END] = out[END] + p[i]
        elif len(piece) > len(written) and piece[:len(written)] == written:
            out[piece[len(written)]] = out[piece[len(written)]] + p[i]
    total = sum(out)
    return [x / total for x in out] if total > 0 else None


WRITTEN = [b'', b'a', b'ab', b'=', b'\xff', b'']


@pytest.mark.parametrize('direction', ['reverse', 'forward'])
@pytest.mark.parametrize('seed', range(4))
def test_against_enumeration(seed, direction):
    """Value and gradient for states and head, both temperatures, any chunk, upstream 1.7; rows inside a
    teacher token, and rows where no token of the teacher goes on."""
    (s, stop_s), (t, stop_t) = vocabulary(seed), vocabulary(seed + 10, 25)
    h, W, h_t, W_t = models(len(s), len(t), seed=seed)
    w = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=D)
    written = [*WRITTEN[:4], b'zz', b'']
    a, b, total = h.clone().requires_grad_(), W.clone().requires_grad_(), 0.0
    for k in range(6):
        q = (h_t[k] @ W_t[:len(t)].t() / 1.3).softmax(-1)
        Q = by_hand(q, t, stop_t, written[k])
        if Q is None:
            continue
        P = by_hand((a[k] @ b[:len(s)].t() / 0.7).softmax(-1), s, stop_s, b'')
        Q = [max(float(y), FLOOR) if float(x) > 0 else 0.0 for x, y in zip(P, Q, strict=True)]
        for x, y in zip(P, Q, strict=True):
            if y:                            # an outcome that the student has tokens for
                y = y / sum(Q)
                total = total + w[k] * (x * (x / y).log() if direction == 'reverse' else y * (y / x).log())
    want = torch.autograd.grad(1.7 * total, (a, b))
    tables = dict(table_s=ByteTable(s, stop_s, len(s)), table_t=ByteTable(t, stop_t, len(t)))
    for chunk in (1, 4, 100):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        loss, stats = byte_loss(a, b, h_t, W_t, None, w, None, written, **tables, direction=direction, temperature=0.7,
                                teacher_temperature=1.3, chunk=chunk)
        assert loss.item() == pytest.approx(total.item(), rel=1e-9) and stats[0] == pytest.approx(w.sum().item())
        for got, grad in zip(torch.autograd.grad(1.7 * loss, (a, b)), want, strict=True):
            assert (got - grad).abs().max() < 1e-9


def test_single_bytes_give_the_ordinary_kl():
    """One vocabulary of single bytes and an end: the next byte is the next token."""
    pieces = [b'x', b'', b'y', b'\x00', b'\xff']
    h, W, h_t, W_t = (x / 2 for x in models(5, 5))                            # nothing below FLOOR
    w = torch.ones(6, dtype=D)
    table = ByteTable(pieces, [1], 5)
    loss, _ = byte_loss(h, W, h_t, W_t, None, w, table_s=table, table_t=table)
    assert loss.item() == pytest.approx(opd_rows(h @ W[:5].t(), h_t @ W_t[:5].t(), None).sum().item(), rel=1e-6)


def test_a_table_by_hand():
    table = ByteTable([b'a', b'ab', b'', b'abc', b'b', b'', b'ac'], stops=[2], count=7)
    assert table.first.tolist() == [97, 97, END, 97, 98, NONE, 97]
    assert [x.tolist() for x in table.after(b'a')] == [[1, 3, 6], [98, 98, 99]]
    assert [x.tolist() for x in table.after(b'ab')] == [[3], [99]] and table.after(b'q')[0].tolist() == []
    p = torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.15, 0.1, 0.1]])
    out = table.outcomes(p.repeat(2, 1), [b'', b'ab'])
    assert out[0, [97, 98, END]].tolist() == pytest.approx([0.45, 0.15, 0.3]) and out[1].nonzero().tolist() == [[99]]


def test_plain_rows_equal_the_fused_ones():
    (s, stop), (t, stop_t) = vocabulary(1), vocabulary(2)
    h, W, h_t, W_t = models(len(s), len(t))
    table_s, table_t = ByteTable(s, stop, len(s)), ByteTable(t, stop_t, len(t))
    p, q = (h @ W[:len(s)].t()).softmax(-1), (h_t @ W_t[:len(t)].t()).softmax(-1)
    loss, stats = byte_loss(h, W, h_t, W_t, None, torch.ones(6, dtype=D), None, WRITTEN, table_s=table_s, table_t=table_t, kind=None)
    Q = table_t.outcomes(q, WRITTEN)
    rows = byte_rows(p, Q, table_s.first)[Q.sum(-1) > 0]
    assert 3 < len(rows) and loss.item() == pytest.approx(rows.sum().item()) and stats[1] == loss and 0 < stats[2] < 6 * 5.55
