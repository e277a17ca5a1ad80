"""
Which positions of a rollout are supervised, with what weight, and in which micro-batch: step 3 of a
training step.

A "row" is one supervised position: one token of one answer, whose hidden state (or output
distribution) the student shall match. K rows are picked out of a micro-batch of B x T tokens by
their flat positions, so answers of different length need no padding in the loss.

Response position t (0, 1, ...) is the column whose output predicts response token t. The model has
read the prompt and t response tokens there, so it is column prompt_len - 1 + t. Positions are found
by length and never by token id: the stop token is supervised, padding never is.

Letters: B answers, T tokens (columns), K supervised positions.
"""
from dataclasses import dataclass

import torch

from support.runtime import all_reduce

POSITIONS = ('all', 'last', 'last_k', 'first_k', 'last_frac', 'first_frac', 'drift')


def position_mask(roll, which='all', size=0):
    """Mask of the supervised positions of a rollout -> bool (B, T).

    which: 'all'; 'last'; 'last_k' or 'first_k', size = k; 'last_frac' or 'first_frac', size = the
    share of each answer, rounded, at least one position; 'drift', which is all of them (the loss
    weighs them, see `drift_weights`).
    """
    assert which in POSITIONS, which
    answer_length = roll.resp_len[:, None]                                   # (B, 1)
    column = torch.arange(roll.ids.shape[1], device=roll.ids.device)         # (T,)
    t = column - (roll.prompt_len[:, None] - 1)                              # (B, T) response position
    mask = (t >= 0) & (t < answer_length)

    if which.endswith('frac'):
        size = (answer_length * size).round().clamp(min=1)
    if which == 'last':
        size = 1
    if which.startswith('last'):
        mask &= t >= answer_length - size
    if which.startswith('first'):
        mask &= t < size
    return mask


def position_weights(mask, average='sequence', sequences=None, tokens=None):
    """Mask (B, T) -> weights (B, T), float32, that sum to 1 over the global batch.

    average: 'sequence' is Eq. (6): a mean over the positions of each answer, then over the answers.
    'token' gives every supervised token the same weight, as the authors' code does.
    sequences, tokens: their numbers in the global batch (default: in this mask). The weights are
    made once per step, before the rollout is cut, so that neither micro-batches nor ranks change
    the gradient.
    """
    assert average in ('sequence', 'token'), average
    count = mask.sum(1, keepdim=True)                                        # (B, 1)
    if average == 'sequence':
        if sequences is None:
            sequences = (count > 0).sum()
        return mask / count.clamp(min=1) / sequences
    if tokens is None:
        tokens = mask.sum()
    return mask / tokens


def diagnostic_mask(roll, mask, step, share):
    """About `share` of the positions in a mask (B, T), spread evenly over each answer, others in
    every step.

    Position t is taken if the fractional part of t * golden ratio + step * plastic number is below
    the share (in whole numbers, so that all devices agree). This is a function of t and step alone:
    neither micro-batches nor ranks change which positions are looked at.
    """
    column = torch.arange(mask.shape[1], device=mask.device)
    t = column - (roll.prompt_len[:, None] - 1)                              # (B, T)
    fraction = (t * 2654435769 + step * 3242174889) % 2**32                  # in units of 2^-32
    return mask & (fraction < share * 2**32)


def micro_batches(lengths, budget):
    """Lengths of the answers -> groups of their indices, longest first, each of at most `budget`
    tokens, padding included. An answer longer than the budget goes alone."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = []
    for i in longest_first:
        fits = groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget
        if fits:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@dataclass
class Rows:
    """The K supervised positions of one micro-batch, as both models read them.

    A teacher with the student's vocabulary reads the same ids at the same positions. One with
    another vocabulary reads the same text in its own tokens (cross_tokenizer/pairing.py), so its
    ids and positions differ.
    """
    ids: torch.Tensor           # (b, T) what the student reads
    at: torch.Tensor            # (K,) flat positions in ids
    weights: torch.Tensor       # (K,) over all micro-batches and ranks they sum to 1
    next_token: torch.Tensor    # (K,) the token that was sampled there
    answer: torch.Tensor        # (K,) which row of ids a position belongs to, ascending
    teacher_ids: torch.Tensor   # (b, T') what the teacher reads
    teacher_at: torch.Tensor    # (K,) flat positions in teacher_ids
    inside: torch.Tensor        # (K,) True: the student stands inside a teacher token
    written: list | None        # [K] bytes of the teacher's last token that are written; None: one vocabulary
    offset: int = 0             # hidden states are compared so many columns later (position_offset)


def cut_rollout(roll, weights, budget, reading=None, offset=0):
    """A rollout and its weights (B, T) -> the Rows of one micro-batch after another.

    budget: tokens of a micro-batch. reading: what a teacher of another vocabulary reads
    (pairing.Reading).
    offset: see Rows. Every rank yields equally many: FSDP needs as many forwards on each, so a rank
    that has run out of answers repeats its first one with weight 0.
    """
    groups = micro_batches(roll.length.tolist(), budget)
    count = torch.tensor(len(groups), device=weights.device)
    count = int(all_reduce(count, 'max'))
    for i in range(count):
        group = groups[i] if i < len(groups) else [0]
        share = 1.0 if i < len(groups) else 0.0

        # The columns beyond the group's longest answer are cut off.
        T = int(roll.length[group].max())
        ids = roll.ids[group, :T]                                            # (b, T)
        flat_weights = share * weights[group, :T].flatten()                  # (b * T,)
        at = flat_weights.nonzero().squeeze(-1)                              # (K,)

        teacher_reads = ids, at, torch.zeros_like(at, dtype=torch.bool), None
        if reading is not None:
            teacher_reads = reading.part(group, T, at)
        yield Rows(ids, at, flat_weights[at], ids.flatten()[at + 1], at // T, *teacher_reads, offset)
