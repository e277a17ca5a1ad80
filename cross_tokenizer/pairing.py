"""
The same text in two vocabularies: which state of the teacher belongs to which position of the
student?

The student's answer is a list of token ids, and a teacher with another vocabulary would read
gibberish in them. So it reads the answer's bytes, cut into its own tokens. `pair_text` does this
for one answer, `read_rollout` for a batch. Floor pairing: a student position takes the last teacher
state that has read no more bytes of the answer than the student has. No state has read a byte that
the student has not, so the target never contains the future.

A position has one of two classes. Class 0: both have read exactly the same bytes. Class 1, called
`inside`: the student is inside a teacher token, and has read the first bytes of it. The example in
`pair_text` shows both.

Simpler than usual: positions in bytes decide everything, and no strings are searched or aligned.
What this file does not do: teachers whose tokenizer is not byte-level.

Letters: B answers, T tokens of the student, T_t tokens of the teacher, K supervised positions, n
tokens of an answer.
"""
import re
from dataclasses import dataclass

import numpy as np
import torch

from formats.tokenizer import same_vocabulary
from support.runtime import UserError, padded_length

PAIRS = ('floor', 'exact')
FEEDS = ('text', 'student')


# ---- from bytes to the text that the teacher reads -------------------------------------------

def readable(data):
    """Bytes -> (text, needed). needed: an array with a number for each byte of the text in UTF-8,
    which says how many bytes of `data` one must have read to know it.

        b'ab'    -> 'ab', [1, 2]
        b'a\\xff' -> 'a\\ufffd', [1, 2, 2, 2]     a byte that is not UTF-8 becomes U+FFFD (3 bytes)
        b'a\\xe2' -> 'a', [1]                    a character that is cut off at the end is left out
    """
    try:
        text = data.decode()
        return text, np.arange(1, len(data) + 1)
    except UnicodeDecodeError:
        pass

    texts = []
    needed = []
    start = 0
    view = memoryview(data)
    while start < len(data):
        # The longest valid stretch from `start`, and how many invalid bytes follow it.
        try:
            valid = str(view[start:], 'utf-8')
            invalid = 0
            cut_off = True
        except UnicodeDecodeError as error:
            valid = str(view[start:start + error.start], 'utf-8')
            invalid = error.end - error.start
            cut_off = error.reason == 'unexpected end of data'
        size = len(valid.encode())
        texts.append(valid)
        needed.append(np.arange(start + 1, start + size + 1))
        start += size + invalid
        if cut_off:
            break
        # U+FFFD stands for the invalid bytes, and is known when the last of them has been read.
        texts.append('\ufffd')
        needed.append(np.full(3, start))
    return ''.join(texts), np.concatenate(needed) if needed else np.arange(0)


# Where a text may be cut so that normalising the pieces equals normalising the whole: before an
# ASCII character, which never merges with what stands before it.
PIECE = re.compile(r'[\x00-\x7f]+(?![^\x00-\x7f])|[\x00-\x7f]?[^\x00-\x7f]+')


def normalised(text, needed, tok):
    """The text in the Unicode form that a tokenizer cuts into tokens, with `needed` for its bytes.

    A piece that changes is known only when all of it has been read. Example, in NFC: 'e' and a
    combining accent (1 + 2 bytes, needed [1, 2, 3]) become one character of two bytes, needed [3,
    3].
    """
    whole = tok.normal(text)
    if whole == text:
        return text, needed
    forms = []
    needed_forms = []
    start = 0
    for piece in PIECE.findall(text):
        form = tok.normal(piece)
        end = start + len(piece.encode())
        if form == piece:
            needed_forms.append(needed[start:end])
        else:
            needed_forms.append(np.full(len(form.encode()), needed[end - 1]))
        forms.append(form)
        start = end
    if ''.join(forms) != whole:
        raise UserError(f'{tok.name}: it rewrites text across words, so its bytes cannot be '
                        'paired; choose another teacher')
    return whole, np.concatenate(needed_forms)


# ---- one answer ------------------------------------------------------------------------------

def pair_text(answer, tok_s, prompt_t, tok_t, context=None, same=None):
    """Floor pairing of a student's answer, n token ids -> (ids, column, inside, written).

    prompt_t: ids of the prompt in the teacher's own rendering and vocabulary.
    context: the teacher reads at most so many tokens, prompt included.
    same: whether both vocabularies are the same, if the caller knows; comparing two takes a while.

    ids: what the teacher reads, prompt included.
    column (n,): position t of the student has read the answer's first t tokens. This is the index
        into ids of the teacher's last state that has read no more bytes of the answer than that;
        -1 where the teacher's context ends before it.
    inside (n,): True for class 1, where the student has read more bytes than that state.
    written: {t: the bytes of the teacher's last token that the student has read}. In class 0 that
        is the whole token, in class 1 a part of it. If the student has read no byte of the answer,
        t is left out.

    Example: the student writes `1`, `2`, `+`, `3` and its stop token; the teacher has the tokens
    `12` and `+3`, and its prompt has two ids, p and q. Then ids = [p, q, `12`, `+3`], and

        t                                0       1       2       3       4
        the student has read                     1       12      12+     12+3
        the teacher's last state is at   q       q       12      12      +3
        column                           1       1       2       2       3
        inside                           False   True    False   True    False
        written                          -       b'1'    b'12'   b'+'    b'+3'

    Special tokens write no bytes, so the teacher does not see the student's. With one vocabulary on
    both sides the teacher reads the student's own ids, and every position is of class 0.
    """
    if same is None:
        same = same_vocabulary(tok_s, tok_t)
    if same:
        answer_t = answer
        state = np.arange(len(answer))
        inside = np.zeros(len(answer), dtype=bool)
        written = {}
    else:
        answer_t, state, inside, written = floor_states(answer, tok_s, tok_t)

    # State 0 stands at the prompt's last token: it has read no byte of the answer.
    ids = [*prompt_t, *answer_t]
    column = len(prompt_t) - 1 + state                                       # (n,)
    if context is not None and len(ids) > context:
        ids = ids[:context]
        column = np.where(column < context, column, -1)
    return ids, column, inside, written


def floor_states(answer, tok_s, tok_t):
    """An answer in another vocabulary -> (answer_t, state, inside, written).

    answer_t: the answer in the teacher's ids. state (n,): how many of them the teacher has read at
    position t of the student. inside, written: see pair_text.
    """
    data = b''.join([tok_s.pieces[i] for i in answer])
    answer_t, bytes_t = read_as(data, tok_t)

    # Teacher state j has read bytes_t[j] bytes, position t of the student bytes_s[t]. Floor: the
    # last j with bytes_t[j] <= bytes_s[t].
    bytes_s = np.array([0, *tok_s.byte_ends(answer)[:-1]])                   # (n,)
    state = np.searchsorted(bytes_t, bytes_s, side='right') - 1              # (n,)
    inside = bytes_t[state] != bytes_s                                       # (n,)
    written = {}
    for t, (j, is_inside) in enumerate(zip(state.tolist(), inside.tolist(), strict=True)):
        if is_inside:
            # The first bytes of the answer's token j, which the teacher has not read yet.
            written[t] = data[bytes_t[j]:bytes_s[t]]
        elif j > 0:
            # All bytes of token j - 1, which the teacher has read last.
            written[t] = tok_t.pieces[answer_t[j - 1]]
    return answer_t, state, inside, written


def read_as(data, tok_t):
    """Bytes as a teacher reads them -> its ids (m of them), and the bytes of `data` that each of
    its states has read (m + 1,): first 0, at the end of the prompt, then a number after each
    token."""
    text, needed = normalised(*readable(data), tok_t)
    ids = tok_t.encode(text, special=False)
    ends = np.array(tok_t.byte_ends(ids), dtype=np.int64)                    # (m,) in the text
    size = ends[-1] if ids else 0
    if size != len(needed):
        raise UserError(f'{tok_t.name}: its tokens do not spell out the text {text[:20]!r}..., so '
                        'it cannot be paired; choose a teacher with a byte-level tokenizer')
    return ids, np.concatenate([[0], needed[ends - 1]])


# ---- a batch of answers ----------------------------------------------------------------------

@dataclass
class Reading:
    """What the teacher reads of a rollout (B, T), and where it stands at each position of the
    student."""
    ids: torch.Tensor           # (B, T_t) the teacher's ids, right-padded
    length: torch.Tensor        # (B,) how many of them are not padding
    column: torch.Tensor        # (B, T) the teacher's column at each position; -1: it has no state
    inside: torch.Tensor        # (B, T) class 1: the student is inside a teacher token
    written: dict | None        # {(row, student's column): bytes, as in pair_text}; None: one vocabulary
    align: float                # share of the answers' positions that are of class 0

    def part(self, rows, T, at):
        """The reading of some supervised positions -> (ids (b, T_t), flat positions in them (K,),
        inside (K,), a list of K bytes written, or None).

        rows (b): rows of the rollout. at (K,): flat positions in their first T columns, that is, in
        (b, T).
        """
        longest = int(self.length[rows].max())
        ids = self.ids[rows, :padded_length(longest, self.ids.device)]       # (b, T_t)
        column = self.column[rows, :T].flatten()[at]                         # (K,)
        inside = self.inside[rows, :T].flatten()[at]                         # (K,)
        at_t = at // T * ids.shape[1] + column                               # (K,) flat, in ids
        if self.written is None:
            return ids, at_t, inside, None
        written = []
        for flat in at.tolist():
            written.append(self.written.get((rows[flat // T], flat % T), b''))
        return ids, at_t, inside, written


def read_rollout(roll, prompts_t, tok_s, tok_t, context=None, pair='floor', feed='text'):
    """A rollout as the teacher reads it -> Reading.

    prompts_t: {prompt number: ids in the teacher's rendering and vocabulary}, or a list. pair:
    'floor', or 'exact': positions of class 1 have no state, so they are not supervised. feed:
    'text', or 'student': the teacher is handed the student's ids unchanged, whatever they mean to
    it, as in the published code; for comparison only.
    """
    assert pair in PAIRS, pair
    assert feed in FEEDS, feed
    B, T = roll.ids.shape
    device = roll.ids.device
    if feed == 'student':
        column = torch.arange(T, device=device).expand(B, T)
        inside = torch.zeros_like(column, dtype=torch.bool)
        return Reading(roll.ids, roll.length, column, inside, {}, 1.0)

    # Each answer by itself.
    same = same_vocabulary(tok_s, tok_t)
    answers = roll.answers()
    paired = []
    for answer, prompt in zip(answers, roll.prompt.tolist(), strict=True):
        paired.append(pair_text(answer, tok_s, prompts_t[prompt], tok_t, context, same))

    # Into tensors. Position t of an answer is column prompt_len - 1 + t of the student's ids: it
    # has read the prompt and t tokens of the answer, and predicts the next.
    length = torch.tensor([len(ids_t) for ids_t, *_ in paired])              # (B,)
    T_t = padded_length(int(length.max()), device)
    ids = torch.zeros(B, T_t, dtype=torch.long)                              # (B, T_t)
    column = torch.full((B, T), -1)
    inside = torch.zeros(B, T, dtype=torch.bool)
    written = {}
    prompt_len = roll.prompt_len.tolist()
    for row, (ids_t, column_t, inside_t, written_t) in enumerate(paired):
        first = prompt_len[row] - 1
        span = slice(first, first + len(column_t))
        ids[row, :len(ids_t)] = torch.tensor(ids_t)
        column[row, span] = torch.from_numpy(column_t)
        inside[row, span] = torch.from_numpy(inside_t)
        for t, token_bytes in written_t.items():
            written[row, first + t] = token_bytes

    align = 1 - int(inside.sum()) / max(1, sum(map(len, answers)))
    if pair == 'exact':
        column[inside] = -1
    tensors = [tensor.to(device) for tensor in (ids, length, column, inside)]
    return Reading(*tensors, None if same else written, align)
