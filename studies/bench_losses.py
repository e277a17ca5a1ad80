"""
The tables `loss` and `head` of studies/bench.py: losses alone, without the models that they stand on.

    python -m studies.bench loss                  Eq. (6) over every layer: rows of hidden states
    python -m studies.bench head                  Eqs. (3)-(5) and the next byte under the LM head

Each way to compute a loss is a function of the inputs: loss and gradient together. Simpler than a step: the
states are random numbers, and there are no blocks between them. What is not here: a training step, for which
there is the table `update`.

Letters: N tokens, K supervised rows, L layers, d width, V vocabulary.
"""
import random
from functools import cache, partial

import torch

import kernels
from cross_tokenizer.next_byte import ByteTable, NextByte
from kernels.layer_loss import layer_rows_reference
from losses import layer_loss, oprd_loss, row_distance
from model import PRESETS
from output_losses import HeadLoss, HeadRows, make_objective, opd_rows, rows_at_once
from studies import limits
from studies.measure import made_first
from studies.peers import installed, liger, liger_scheme

BOUND = 1024                    # rows at once under the head, beside as many as the free memory allows

# ---- loss: hidden states alone ---------------------------------------------------------------------

class LossInputs:
    """States of both models. One state (1, N, d) stands for every layer, as if the blocks did nothing."""
    def __init__(self, args, env):
        c = PRESETS[args.model]
        N = args.tokens
        K = min(args.rows, N)
        torch.manual_seed(0)
        self.L = c.L
        self.h = torch.randn(1, N, c.d, device=env.device, dtype=env.dtype, requires_grad=True)
        self.target = torch.randn(1, N, c.d, device=env.device, dtype=env.dtype)
        self.at = torch.arange(N - K, N, device=env.device)                  # (K,)
        self.w = torch.full((K,), 1 / K, device=env.device)                  # (K,)


class RowInputs:
    """The supervised rows of all layers, each in memory of its own as in a step. All together they are larger
    than a GPU's cache."""
    def __init__(self, args, env):
        c = PRESETS[args.model]
        K = min(args.rows, args.tokens)
        torch.manual_seed(0)
        self.h = torch.randn(c.L, K, c.d, device=env.device, dtype=env.dtype)
        self.target = torch.randn(c.L, K, c.d, device=env.device, dtype=env.dtype)
        self.at = torch.arange(K, device=env.device)                         # (K,)
        self.w = torch.full((K,), 1 / K, device=env.device)                  # (K,)


def loss_fused(x):
    """Our way: each layer takes its loss as it passes."""
    teacher_rows = [x.target[0, x.at] for _ in range(x.L)]                   # L of (K, d)
    h = x.h
    total = 0.0
    for rows in teacher_rows:
        h, loss, _ = layer_loss(h, rows, x.at, x.w)
        total = total + loss / x.L
    return torch.autograd.grad(total, x.h)[0]


def loss_selected(x):
    """Autograd on the supervised rows."""
    teacher_rows = [x.target[0, x.at] for _ in range(x.L)]
    # The student's rows have no name here, so they live as long as autograd needs them, and no longer.
    loss = oprd_loss([x.h.view_as(x.h)[0, x.at] for _ in range(x.L)], teacher_rows, x.w)
    return torch.autograd.grad(loss, x.h)[0]


def loss_stacked(x):
    """Autograd on all positions of all layers, in float32."""
    h_s = torch.stack([x.h.view_as(x.h)] * x.L).float()                      # (L, 1, N, d)
    h_t = torch.stack([x.target] * x.L).float()
    distance = row_distance(h_s.flatten(0, 2), h_t.flatten(0, 2)).view(x.L, -1)          # (L, N)
    return torch.autograd.grad((distance[:, x.at] * x.w).sum() / x.L, x.h)[0]


def rows_alone(layer_rows, x):
    """Value and gradient of each layer's rows, and no backward."""
    for h, target in zip(x.h, x.target, strict=True):
        layer_rows(h, target, x.at, x.w, 'mse')


@cache
def compiled_reference():
    """The kernel's reference, compiled by torch.compile at its first call."""
    return torch.compile(layer_rows_reference)


def loss_cases(args, env):
    """Eq. (6) over every layer of a model: `rows` supervised rows of `tokens`."""
    c = PRESETS[args.model]
    size = env.dtype.itemsize
    K = min(args.rows, args.tokens)
    payload = c.L * K * c.d * size
    ways = {'fused': loss_fused, 'selected rows': loss_selected, 'stacked fp32': loss_stacked}
    cases = made_first(partial(LossInputs, args, env), ways, payload=payload,
                       work=limits.loss(c, K, args.tokens, size))

    # The kernel and its reference, without what autograd adds.
    alone = {'rows alone': partial(rows_alone, kernels.layer_rows),
             'rows alone, reference': partial(rows_alone, layer_rows_reference)}
    if env.device.type != 'cpu':
        alone['rows alone, compiled reference'] = lambda x: rows_alone(compiled_reference(), x)
    cases |= made_first(partial(RowInputs, args, env), alone, payload=payload, graph=True,
                        work=limits.loss_rows(c, K, size))
    return cases


# ---- head: losses under the LM head --------------------------------------------------------------

class HeadInputs:
    """Rows of a student and a teacher of one shape, with their heads."""
    def __init__(self, args, env):
        c = PRESETS[args.model]
        K = args.rows
        numbers = dict(device=env.device, dtype=env.dtype)
        torch.manual_seed(0)
        self.h = torch.randn(K, c.d, **numbers, requires_grad=True)
        self.h_t = torch.randn(K, c.d, **numbers)
        self.W = torch.empty(c.V, c.d, **numbers).normal_(std=c.d**-0.5).requires_grad_()
        self.W_t = torch.empty(c.V, c.d, **numbers).normal_(std=c.d**-0.5)
        self.y = torch.zeros(K, dtype=torch.long, device=env.device)         # (K,)
        self.w = torch.full((K,), 1 / K, device=env.device)                  # (K,)


class ByteInputs(HeadInputs):
    """The same for the next byte: a vocabulary of words of 1 to 8 of 64 bytes; 6 rows in 100 stand inside a
    token; the teacher has two states for each row."""
    def __init__(self, args, env):
        super().__init__(args, env)
        V = args.vocab or PRESETS[args.model].V
        rng = random.Random(0)
        words = [bytes(rng.choices(range(64), k=rng.randint(1, 8))) for _ in range(V)]
        inside = [rng.random() < 0.06 for _ in range(args.rows)]
        self.table = ByteTable(words, [], V, env.device)
        self.inside = torch.tensor(inside, device=env.device)                # (K,)
        self.written = [rng.choice(words)[:1 if part else None] for part in inside]
        self.h_t = torch.cat([self.h_t, self.h_t])                           # (2 K, d)


def head_loss(x, objective, inside=None, written=None):
    """Our way: loss and gradients, a chunk of rows at a time."""
    batch = HeadRows(x.h_t, x.W_t, x.y, x.w, torch.zeros_like(x.y), inside, written)
    loss, _ = HeadLoss.apply(x.h, x.W, objective, batch)
    torch.autograd.grad(loss, (x.h, x.W))


def head_of_bytes(chunk, x):
    """The next byte, our way."""
    head_loss(x, NextByte(x.table, x.table, chunk=chunk), x.inside, x.written)


def head_by_autograd(x):
    """The readable form of Eq. (4), on whole logits."""
    distance = opd_rows((x.h @ x.W.t()).float(), (x.h_t @ x.W_t.t()).float(), x.y, 'full')         # (K,)
    torch.autograd.grad((x.w * distance).sum(), (x.h, x.W))


def head_cases(args, env):
    """Losses and gradients of `rows` rows under the heads."""
    c = PRESETS[args.model]
    size = env.dtype.itemsize
    vocab = args.vocab or c.V

    def of_kind(kind, chunk=args.chunk, **how):
        objective = make_objective(kind, chunk=chunk, vocab=args.vocab, **how)
        return lambda x: head_loss(x, objective)

    ways = {
        'full KL': of_kind('full'),
        'full KL, forward': of_kind('full', direction='forward'),
        'top-16': of_kind('topk'),
        'sampled': of_kind('sampled'),
        f'full KL, {BOUND} rows at once': of_kind('full', BOUND),
        f'top-16, {BOUND} rows at once': of_kind('topk', BOUND),
        "Liger's scheme": lambda x: liger_scheme(x.h.detach(), x.W.detach(), x.h_t, x.W_t, x.w),
        'whole logits': head_by_autograd,
    }
    if env.device.type == 'cuda' and installed('liger_kernel'):
        ways['Liger'] = lambda x: liger(x.h, x.W, x.h_t, x.W_t)

    # The payload is the head's gradient and one chunk of logits.
    def payload(chunk):
        return 4 * c.V * (c.d + min(chunk, args.rows))

    usual = payload(args.chunk or rows_at_once(env.device))
    cases = made_first(partial(HeadInputs, args, env), ways, payload=usual,
                       work=limits.head(c, args.rows, vocab, size))
    cases |= made_first(partial(ByteInputs, args, env), {'next byte': partial(head_of_bytes, args.chunk)},
                        payload=usual, work=limits.head(c, args.rows, vocab, size, teacher_states=2))
    for name in (f'full KL, {BOUND} rows at once', f'top-16, {BOUND} rows at once'):
        cases[name].payload = payload(BOUND)
    return cases
