"""
The frozen teacher's side: what does it say of a rollout?

A teacher with the student's vocabulary reads the student's ids. One with another vocabulary reads the
same *text*: `pair_text` cuts the answer's bytes into the teacher's tokens and says, for each position of
the student, which teacher state has read as much. (The published code feeds such a teacher the
student's ids, which mean other strings to it: gibberish.)

Letters: B rows, T tokens, K supervised positions, L layers, d width, n tokens of an answer.
"""

import torch


@torch.no_grad()
def hidden_rows(teacher, ids, wanted, phi, bridge=None):
    """Teacher states that correspond to a student's -> {layer: (K, d)}, each a tensor of its own
    (layer_loss overwrites it).

    ids: (B, T). wanted: {student layer, or 'head' for the last: flat positions (K,) of ids}. phi: {student
    layer: teacher layer}. Only those rows are kept, layer by layer; with a bridge only their projections
    (K, r), but for the 'head'.
    """
    phi = {l: teacher.config.L if l == 'head' else phi[l] for l in wanted}

    def keep(t, h):
        rows = {l: h.flatten(0, 1)[at] for l, at in wanted.items() if phi[l] == t}
        return h, {l: x if bridge is None or l == 'head' else bridge.teacher(l, x) for l, x in rows.items()}
    rows = teacher.hidden(ids, sorted(set(phi.values())), tap=keep)
    return {l: h for some in rows for l, h in some.items()}
