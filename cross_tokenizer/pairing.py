"""
The same text in another vocabulary: which state of the teacher belongs to which position of the student.
"""
import re
from dataclasses import dataclass

import numpy as np
import torch

from formats.tokenizer import same_vocabulary
from support.runtime import UserError


def readable(data):
    """Bytes -> text, and for each byte of its UTF-8 form how many bytes of `data` one must have read to
    know it (an array). Invalid bytes become U+FFFD, known when all of them are read; a character cut
    off at the end is left out."""
    try:
        text = data.decode()
        return text, np.arange(1, len(data) + 1)
    except UnicodeDecodeError:
        pass
    texts, need, at, view = [], [], 0, memoryview(data)
    while at < len(data):
        try:
            good, bad, cut = str(view[at:], 'utf-8'), 0, True
        except UnicodeDecodeError as e:
            good, bad = str(view[at:at + e.start], 'utf-8'), e.end - e.start
            cut = e.reason == 'unexpected end of data'
        size = len(good.encode())
        texts.append(good if cut else good + '\ufffd')
        need.append(np.arange(at + 1, at + size + 1))
        at += size + bad
        if cut:
            break
        need.append(np.full(3, at))
    return ''.join(texts), np.concatenate(need) if need else np.arange(0)


# An ASCII character never merges with what stands before it: text may be normalised piece by piece.
PIECE = re.compile(r'[\x00-\x7f]+(?![^\x00-\x7f])|[\x00-\x7f]?[^\x00-\x7f]+')


def normalised(text, need, tok):
    """Text as the tokenizer sees it, with `need` for its bytes: a piece that changes is known when all
    of it has been read."""
    if tok.normal(text) == text:
        return text, need
    out, known, at = [], [], 0
    for piece in PIECE.findall(text):
        form, size = tok.normal(piece), len(piece.encode())
        same = form == piece
        known.append(need[at:at + size] if same else np.full(len(form.encode()), need[at + size - 1]))
        out.append(form)
        at += size
    if ''.join(out) != tok.normal(text):
        raise UserError(f'{tok.name}: it rewrites text across words, so its bytes cannot be paired; '
                        'choose another teacher')
    return ''.join(out), np.concatenate(known)


def pair_text(answer, tok_s, prompt_t, tok_t, context=None, same=None):
    """Floor pairing: a student's answer (n ids) as the teacher reads it -> (ids, at, inside, written).

    prompt_t: the prompt in the teacher's own rendering. ids: what the teacher reads, prompt included,
    at most `context` tokens. at (n,): for student position t, which has read the answer's tokens before
    t, the index into ids of the teacher's last state that has read no more bytes of the answer; -1
    where the teacher's context ends before. inside (n,): False (class 0): exactly the same bytes; True
    (class 1): the student is inside a teacher token. written[t]: of the teacher's last token, whole or not,
    the bytes that are written; a t that has read no token of the answer is not there.
    Causal: no state has read a byte that the student has not. Special tokens write no bytes, so the
    teacher does not see the student's; a character that is cut off at the end is not read; other bytes
    that are not UTF-8 are read as U+FFFD.
    One vocabulary on both sides: the student's own ids, all of class 0 (`same`, if known: it takes a
    while to compare two).
    """
    last = len(prompt_t) - 1                 # the state that has read the prompt and no byte of the answer
    if same_vocabulary(tok_s, tok_t) if same is None else same:
        ids, at = [*prompt_t, *answer], last + np.arange(len(answer))
        inside, written = np.zeros(len(answer), dtype=bool), {}
    else:
        data = b''.join([tok_s.pieces[i] for i in answer])
        text, need = normalised(*readable(data), tok_t)
        own = tok_t.encode(text, special=False)
        ends = np.array(tok_t.byte_ends(own), dtype=np.int64)
        if (ends[-1] if own else 0) != len(need):
            raise UserError(f'{tok_t.name}: its tokens do not spell out the text {text[:20]!r}..., so it '
                            'cannot be paired; choose a teacher with a byte-level tokenizer')
        read = np.concatenate([[0], need[ends - 1]])                         # bytes read by teacher state j
        have = np.array([0, *tok_s.byte_ends(answer)[:-1]])                  # bytes read by position t
        j = np.searchsorted(read, have, side='right') - 1
        ids, at, inside = [*prompt_t, *own], last + j, read[j] != have
        each = enumerate(zip(j.tolist(), inside.tolist(), strict=True))
        written = {t: data[read[k]:have[t]] if part else tok_t.pieces[own[k - 1]] for t, (k, part) in each
                   if part or k}
    if context is not None and len(ids) > context:
        ids, at = ids[:context], np.where(at < context, at, -1)
    return ids, at, inside, written


@dataclass
class Reading:
    """What the teacher reads of a rollout (B, T), and where it stands at each position of the student."""
    ids: torch.Tensor           # (B, T_t) the teacher's ids, right-padded
    length: torch.Tensor        # (B,)
    at: torch.Tensor            # (B, T) column of ids for each of the student's; -1: no state to learn from
    inside: torch.Tensor        # (B, T) class 1: the student is inside a teacher token
    written: dict               # {(row, column): bytes of the teacher's last token that are written}
    align: float                # share of the answers' positions that are of class 0

    def part(self, rows, T, at):
        """Of some rows, at flat positions `at` (K,) of the student's first T columns -> ids (b, T_t), flat
        positions in them (K,), inside (K,), bytes written (K)."""
        ids = self.ids[rows, :int(self.length[rows].max())]
        column, inside = (x[rows, :T].flatten()[at] for x in (self.at, self.inside))
        written = [self.written.get((rows[i // T], i % T), b'') for i in at.tolist()]
        return ids, at // T * ids.shape[1] + column, inside, written


def read_rollout(roll, prompts_t, tok_s, tok_t, context=None, pair='floor', feed='text'):
    """A rollout as the teacher reads it. prompts_t: its prompts in the teacher's rendering and ids.
    pair: 'floor', or 'exact': positions of class 1 get -1. feed: 'student' hands the teacher the
    student's ids unchanged, whatever they mean to it: the published setting, for comparison only."""
    B, T = roll.ids.shape
    device, answers = roll.ids.device, roll.answers()
    if feed == 'student':
        every = torch.arange(T, device=device).expand(B, T)
        return Reading(roll.ids, roll.length, every, torch.zeros_like(every, dtype=torch.bool), {}, 1.0)
    same = same_vocabulary(tok_s, tok_t)
    rows = [pair_text(answer, tok_s, prompts_t[p], tok_t, context, same)
            for answer, p in zip(answers, roll.prompt.tolist(), strict=True)]
    length = torch.tensor([len(ids) for ids, *_ in rows])
    ids, at = torch.zeros(B, int(length.max()), dtype=torch.long), torch.full((B, T), -1)
    inside, written = torch.zeros(B, T, dtype=torch.bool), {}
    for b, ((own, where, within, parts), P) in enumerate(zip(rows, roll.prompt_len.tolist(), strict=True)):
        ids[b, :len(own)] = torch.tensor(own)
        span = slice(P - 1, P - 1 + len(where))
        at[b, span], inside[b, span] = torch.from_numpy(where), torch.from_numpy(within)
        written |= {(b, P - 1 + t): part for t, part in parts.items()}
    align = 1 - int(inside.sum()) / sum(map(len, answers))
    if pair == 'exact':
        at[inside] = -1
    return Reading(*(x.to(device) for x in (ids, length, at, inside)), written, align)
