"""
The frozen teacher's side of a step: its hidden states at the supervised rows of a rollout.

The teacher reads the student's answers in one forward. Of each matched layer the supervised rows
alone are kept, layer by layer as the forward passes: K x d numbers instead of B x T x d, and
through a bridge K x r.

A teacher with another vocabulary reads the same text in its own tokens: cross_tokenizer/pairing.py.

A run has one teacher, or several (extensions/several_teachers.py). The class Teacher holds what belongs to
one of them.

Letters: B answers, T tokens, K supervised positions, d width, r rank of a bridge.
"""
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch


@dataclass
class Teacher:
    """A teacher, which no gradient trains, and what is needed to learn from it. A dry run loads neither its
    model nor its objective."""
    tok: object                 # its tokenizer
    same_ids: bool              # it reads the student's ids as they are
    layer_map: dict             # {student layer: teacher layer}
    bridge: object              # bridge_parts.saved.Bridge, or None
    model: object = None
    objective: object = None    # step.Objective
    ready: object = nullcontext              # ready(model): a context in which the weights are on the device


@dataclass
class Share:
    """The answers of a step that a teacher reads, B of them on this rank."""
    teacher: Teacher
    roll: object                # rollout.Rollout
    problems: list              # one for each answer
    advantage: torch.Tensor | None = None    # (B,) of each answer, where answers are rewarded
    reading: object = None      # cross_tokenizer.pairing.Reading; None: it reads the student's ids
    mask: torch.Tensor | None = None         # (B, T) the supervised positions


@torch.no_grad()
def hidden_rows(teacher, ids, wanted, layer_map, bridge=None, watch=None, watched=()):
    """The teacher's states for each of the student's layers -> {student layer or 'head': (K, d)}.

    ids (B, T): what the teacher reads. wanted: {student layer: flat positions (K,) of ids}; the key
    'head' asks for the teacher's last layer. layer_map: {student layer: teacher layer}. bridge:
    project the rows of every key but 'head' to (K, r). Each result is a tensor of its own, also
    where two student layers share a teacher layer: layer_loss overwrites it. watch: see
    Model.trunk; it is called at least in the teacher layers `watched`.
    """
    # The teacher layer of each key.
    teacher_layers = {}
    for key in wanted:
        teacher_layers[key] = teacher.config.L if key == 'head' else layer_map[key]

    # One forward up to the deepest of them. Each layer hands over its rows as it passes.
    keep = partial(keep_rows, wanted=wanted, teacher_layers=teacher_layers, bridge=bridge)
    layers = sorted({*teacher_layers.values(), *watched})
    rows = {}
    for rows_of_layer in teacher.hidden(ids, layers, tap=keep, watch=watch):
        rows |= rows_of_layer
    return rows


def keep_rows(t, h, wanted, teacher_layers, bridge):
    """Called with the states h (B, T, d) of teacher layer t -> h, and the rows of all keys that
    want this layer."""
    rows = {}
    for key, at in wanted.items():
        if teacher_layers[key] != t:
            continue
        rows[key] = h.flatten(0, 1)[at]                                      # (K, d)
        if bridge is not None and key != 'head':
            rows[key] = bridge.teacher(key, rows[key])                       # (K, r)
    return h, rows
