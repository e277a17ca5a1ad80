"""
The frozen teacher's side: what does it say of a rollout?

Vanilla OPRD compares hidden states number by number, so student and teacher have the same width and
the same vocabulary; preflight.py has made sure of it.

Letters: B rows, T tokens, K supervised positions, L layers, d width.
"""
import torch

from losses import layer_map


@torch.no_grad()
def hidden_rows(teacher, ids, layers, at, L_s):
    """Teacher states for student layers `layers` at the supervised positions only.

    ids: (B, T). at: flat positions (K,). L_s: the student's depth, for Eq. (11).
    -> {student layer: (K, d)}, each a tensor of its own (layer_loss overwrites it).
    """
    phi = {l: layer_map(l, L_s, teacher.config.L) for l in layers}
    read = sorted(set(phi.values()))
    rows = dict(zip(read, teacher.hidden(ids, read, at), strict=True))
    shared = len(read) < len(layers)
    return {l: rows[t].clone() if shared else rows[t] for l, t in phi.items()}
