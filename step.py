"""
Steps 3 to 5 of a training step: from a rollout to the gradient of Eq. (7).

    3. which positions of the answers are supervised, with what weight     position_mask, position_weights
       cut into micro-batches                                              cut_rollout -> Rows
    4. the teacher's hidden states at those rows                           Objective.teacher_rows
    5. the student's forward; each matched layer takes its loss; backward  accumulate

Step 5 as a chain of calls, for Eq. (6):

    accumulate -> Model.hidden -> take_loss_at_layer, as each layer passes -> losses.HiddenTerm
    -> losses.layer_loss -> kernels.layer_rows: value and gradient of the rows; later, in the
    backward, losses.LayerLoss adds that gradient to the gradient of the states

A "row" is one supervised position: one token of one answer, whose hidden state (or output
distribution) the student shall match. K rows are picked out of a micro-batch of B x T tokens by their
flat positions, so answers of different length need no padding in the loss.

Response position t (0, 1, ...) is the column whose output predicts response token t. The model has
read the prompt and t response tokens there, so it is column prompt_len - 1 + t. Positions are found
by length and never by token id: the column that predicts the stop token is supervised, padding
never is.

Letters: B answers, T tokens (columns), K supervised positions, L layers, d width, r rank of a bridge.
"""
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from support.runtime import all_reduce, padded_length
from teacher import hidden_rows

# ---- 3. which positions, with what weight ---------------------------------------------------------

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


# ---- 3. micro-batches ----------------------------------------------------------------------------

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
    advantage: torch.Tensor | None = None        # (K,) of the answer over others to its prompt


def cut_rollout(roll, weights, budget, reading=None, offset=0, advantage=None):
    """A rollout and its weights (B, T) -> the Rows of one micro-batch after another.

    budget: tokens of a micro-batch.
    reading: what a teacher of another vocabulary reads (pairing.Reading).
    offset: see Rows.
    advantage: of the answers (B,).
    Every rank yields equally many: FSDP needs as many forwards on each, so a rank
    that has run out of answers repeats its first one with weight 0.
    """
    lengths = [padded_length(length, roll.ids.device) for length in roll.length.tolist()]
    groups = micro_batches(lengths, budget)
    count = torch.tensor(len(groups), device=weights.device)
    count = int(all_reduce(count, 'max'))
    for i in range(count):
        group = groups[i] if i < len(groups) else [0]
        share = 1.0 if i < len(groups) else 0.0

        # The columns beyond the group's longest answer, which is its first, are cut off.
        ids = roll.ids[group, :lengths[group[0]]]                            # (b, T)
        T = ids.shape[1]
        flat_weights = share * weights[group, :T].flatten()                  # (b * T,)
        at = flat_weights.nonzero().squeeze(-1)                              # (K,)

        teacher_reads = ids, at, torch.zeros_like(at, dtype=torch.bool), None
        if reading is not None:
            teacher_reads = reading.part(group, T, at)
        row_advantage = None if advantage is None else advantage[group][at // T]         # (K,)
        yield Rows(ids, at, flat_weights[at], ids.flatten()[at + 1], at // T, *teacher_reads, offset,
                   row_advantage)


# ---- what is minimised -----------------------------------------------------------------------------

# The terms of the loss. The weight of each is a key of the config, such as oprd_weight.
TERMS = ('oprd', 'opd', 'reward', 'attention')


@dataclass
class Objective:
    """Eq. (7), and what may be added to it. Its terms are made once, before the loop; None: a term that
    these models do not allow, or that nobody asked for."""
    layer_map: dict             # {student layer: teacher layer}, ascending, of the hidden-state term
    hidden: object              # losses.HiddenTerm, Eq. (6), or losses.BridgeTerm, Eq. (15)
    output: object              # output_losses.OutputTerm, one of Eqs. (3)-(5) or the next byte
    bridge: object = None       # bridge_parts.saved.Bridge
    reward: object = None       # extensions.rewards.RewardTerm
    attention: object = None    # extensions.attention_maps.AttentionTerm

    def only(self, terms):
        """The objective with the terms of these names (of TERMS) alone."""
        left_out = {}
        if 'oprd' not in terms:
            left_out |= {'layer_map': {}, 'hidden': None}
        if 'opd' not in terms:
            left_out |= {'output': None}
        left_out |= {term: None for term in ('reward', 'attention') if term not in terms}
        return replace(self, **left_out)

    def student_layers(self, L):
        """The student layers whose states the terms look at, ascending."""
        layers = set(self.layer_map)
        if self.output is not None or self.reward is not None:
            layers.add(L)
        if self.attention is not None:
            layers |= set(self.attention.layer_map)
        return sorted(layers)

    def teacher_rows(self, teacher, rows):
        """Step 4: the teacher's states at the supervised rows -> {student layer or 'head': (K, d)}, and its
        'attention' (extensions.attention_maps.AttentionMaps), if that is a term."""
        wanted = {}
        for l in self.layer_map:
            wanted[l] = rows.teacher_at + rows.offset
        if self.output is not None:
            wanted['head'] = self.output.teacher_positions(rows)
        read = partial(hidden_rows, teacher, rows.teacher_ids, wanted, self.layer_map, self.bridge)
        if self.attention is None:
            return read() if wanted else {}  # the reward term needs no teacher states

        # The attention term keeps its part of the teacher itself, in the same forward.
        maps = self.attention.maps(rows)
        return read(maps.keep, maps.layer_map.values()) | {'attention': maps}


# ---- 4 and 5. the gradient -----------------------------------------------------------------------

class LayerPart(NamedTuple):
    """What one layer of the student contributes to a step: scalars, and statistics (5,); None =
    nothing."""
    hidden: torch.Tensor | None = None       # its share of Eq. (6) or (15)
    cosine: torch.Tensor | None = None       # weighted mean cosine to the teacher
    output: torch.Tensor | None = None       # the output-space term
    statistics: torch.Tensor | None = None   # see output_losses.head_statistics
    reward: torch.Tensor | None = None       # the reward term
    attention: torch.Tensor | None = None    # its share of the attention term


def take_loss_at_layer(l, h, objective, student, rows, teacher_rows):
    """Called as the states h (B, T, d) of student layer l pass -> h, LayerPart.

    A matched layer takes its loss now and writes its gradient over the teacher's rows, which are
    not needed any more: no second copy of L x K x d numbers is ever made.
    """
    output = statistics = hidden_loss = cosine = reward = attention = None
    if l == student.config.L and objective.output is not None:
        h_s = h.flatten(0, 1)[rows.at]                                       # (K, d)
        output, statistics = objective.output(student.head, h_s, teacher_rows['head'], rows)
    if l == student.config.L and objective.reward is not None:
        reward = objective.reward(student.head, h.flatten(0, 1)[rows.at], rows)
    if l in objective.layer_map:
        h, hidden_loss, cosine = objective.hidden(l, h, teacher_rows[l], rows)
    if objective.attention is not None and l in objective.attention.layer_map:
        h, attention = teacher_rows['attention'].loss(l, h)
    return h, LayerPart(hidden_loss, cosine, output, statistics, reward, attention)


def accumulate(student, teacher, micro_batches, objective, weights, scale=1.0, lap=lambda phase: None):
    """Steps 4 and 5: add the gradient of scale * the weighted terms over a rollout to the student's .grad.

    micro_batches: the rollout's Rows (step.cut_rollout). weights: {name of a term: its weight in this
    step}; a term of weight 0, or without one, does not run. lap: called with the phase that has just ended.
    -> {name: this rank's sum}; summed over ranks they are what they would be on one rank in one
    micro-batch: 'loss/oprd', 'loss/opd' and so on for each term that ran, 'layer_loss' and 'layer_cosine'
    (one number for each layer of the map), 'weight' of the rows, 'statistics' (5,) of the output space.
    """
    objective = objective.only([term for term in weights if weights[term] > 0])
    layers = objective.student_layers(student.config.L)
    sums = {}
    for rows in micro_batches:
        # 4. The teacher reads the answers. Of each matched layer the supervised rows alone are kept.
        teacher_rows = objective.teacher_rows(teacher, rows)
        lap('teacher')

        # 5. The student reads them once. The loss of each layer is taken as the layer passes.
        tap = partial(take_loss_at_layer, objective=objective, student=student, rows=rows,
                      teacher_rows=teacher_rows)
        parts = student.hidden(rows.ids, layers, tap=tap, watch=teacher_rows.get('attention'))
        losses = term_losses(parts)

        # The weights of the rows already sum to 1 over the whole batch, so micro-batches add up.
        loss = sum(weights[term] * value for term, value in losses.items())
        (loss * scale).backward()
        lap('student')
        add_to(sums, parts, rows)
        add(sums, {f'loss/{term}': value.detach() for term, value in losses.items()})

        # L x K x d numbers, which the next micro-batch must not find still in memory.
        del teacher_rows, tap
    return sums


def term_losses(parts):
    """What the layers said -> {name of a term: its loss}, of the terms that ran."""
    losses = {}
    by_layer = [part.hidden for part in parts if part.hidden is not None]    # in layer_map's order
    if by_layer:
        losses['oprd'] = sum(by_layer) / len(by_layer)
    shares = [part.attention for part in parts if part.attention is not None]
    if shares:
        losses['attention'] = sum(shares)
    head = parts[-1]                         # the terms under the LM head are taken at the last layer
    if head.output is not None:
        losses['opd'] = head.output
    if head.reward is not None:
        losses['reward'] = head.reward
    return losses


def add(sums, new):
    """Add the numbers of `new` to those of the same names in `sums`."""
    for name, value in new.items():
        sums[name] = sums.get(name, 0.0) + value


def add_to(sums, parts, rows):
    """Add what the layers of a micro-batch said to a step's sums."""
    new = {}
    cosines = [part.cosine for part in parts if part.cosine is not None]
    losses = [part.hidden.detach() for part in parts if part.hidden is not None]
    statistics = [part.statistics for part in parts if part.statistics is not None]
    if cosines:
        new['layer_cosine'] = torch.stack(cosines)
        new['weight'] = rows.weights.sum()
    if losses:
        new['layer_loss'] = torch.stack(losses)
    if statistics:
        new['statistics'] = statistics[0]
    add(sums, new)


# ---- what the objective leaves out ----------------------------------------------------------------

def layer_diagnosis(l, h, objective, student, rows, teacher_rows):
    """`take_loss_at_layer` without losses: the cosine of layer l, or the statistics of the output
    space."""
    cosine = statistics = None
    flat = h.flatten(0, 1)                                                   # (B * T, d)
    if l == student.config.L and objective.output is not None:
        statistics = objective.output.statistics(student.head, flat[rows.at], teacher_rows['head'], rows)
    if l in objective.layer_map:
        h_s = flat[rows.at + rows.offset].float()
        row_cosine = objective.hidden.cosine(l, h_s, teacher_rows[l].float(), rows.inside)   # (K,)
        cosine = (rows.weights * row_cosine).sum()
    return h, LayerPart(cosine=cosine, statistics=statistics)


@torch.no_grad()
def diagnose(student, teacher, micro_batches, objective):
    """Look at the terms of an objective without training on them: one forward of both models, no
    gradient.

    -> {name: this rank's sum} as from `accumulate`: 'weight', 'layer_cosine', 'statistics'.
    """
    layers = objective.student_layers(student.config.L)
    sums = {}
    if not layers:                           # the objective leaves nothing out
        return sums
    for rows in micro_batches:
        teacher_rows = objective.teacher_rows(teacher, rows)
        look = partial(layer_diagnosis, objective=objective, student=student, rows=rows,
                       teacher_rows=teacher_rows)
        parts = student.hidden(rows.ids, layers, tap=look)
        add_to(sums, parts, rows)
    return sums
