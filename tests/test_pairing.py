"""Text pairing: every student position against brute force over prefixes. Real vocabularies: test_real.py."""
import random
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from cross_tokenizer.pairing import normalised, pair_text, read_rollout, readable
from formats.tokenizer import load_tokenizer
from rollout import Rollout
from support.files import write_json
from support.runtime import UserError

TEXTS = ['the cat sat on the mat', 'café ∑x² 数学题：求最大值。', '🙂👩‍👩‍👧🇫🇷', 'def f(x):\n    return x**2\n', '\\frac{a}{b} = \\sqrt{2}',
         '3+7=0;0*4=0;', ' \t\r\n', 'e\u0301a\u0323\u0301', '\u0000\u202e\u2028', '<eos>', '<think>hm</think>', 'ß ﬁ Ǆ', '1234567890']


def vocabulary(folder, corpus, size, normalizer=None):
    """A byte-level BPE trained on a corpus; ids of two such mean different strings."""
    tok = HFTokenizer(models.BPE())
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(corpus * 9, trainers.BpeTrainer(
        vocab_size=size, special_tokens=['<eos>', '<bos>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_tokens([AddedToken('<think>', special=False)])
    folder.mkdir()
    tok.save(str(folder / 'tokenizer.json'))
    write_json(folder / 'tokenizer_config.json', {'eos_token': '<eos>', 'bos_token': '<bos>'})
    return load_tokenizer(folder)


@pytest.fixture(scope='module')
def toks(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('v')
    return (vocabulary(tmp / 's', TEXTS[:7], 290), vocabulary(tmp / 't', TEXTS[::-1], 340),
            vocabulary(tmp / 'nfc', TEXTS[2:], 330, normalizers.NFC()))


def brute_force(answer, tok_s, own, tok_t):
    """Floor pairing as its words say, for valid text that is not rewritten: prefixes of bytes, all pairs."""
    pieces_t = [tok_t.pieces[i] for i in own]
    out = []
    for t in range(len(answer)):
        have = b''.join(tok_s.pieces[i] for i in answer[:t])
        fits = [j for j in range(len(own) + 1) if have.startswith(b''.join(pieces_t[:j]))]
        out.append((fits[-1], b''.join(pieces_t[:fits[-1]]) != have))
    return out


def strings(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        yield ''.join(rng.choice([*TEXTS, ' ', '\n']) if rng.random() < 0.5 else chr(rng.choice([rng.randrange(32, 127),
                      rng.randrange(0xa0, 0x2000), rng.randrange(0x4e00, 0x9000), rng.randrange(0x1f300, 0x1f700)]))
                      for _ in range(rng.randrange(8)))


def test_against_brute_force(toks):
    """600 random texts both ways, the student's cut into tokens as no tokenizer would (one byte each, now
    and then), with prompts of any length."""
    rng, shares = random.Random(1), []
    for text in strings(600):
        for tok_s, tok_t in ((toks[0], toks[1]), (toks[1], toks[0])):
            answer = [i for word in tok_s.encode(text, special=False)
                      for i in ([word] if rng.random() < 0.8 else [tok_s.words[bytes([b])] for b in tok_s.pieces[word]])]
            answer += tok_s.stop_ids
            ids, at, inside, written = pair_text(answer, tok_s, [0, 1, 0], tok_t)
            have = [0, *tok_s.byte_ends(answer)]
            for t, j in enumerate(at - 2):       # the teacher's last token, whole or as far as it is written
                before = sum(len(tok_t.pieces[i]) for i in ids[3:3 + j - (not inside[t])])
                assert written.get(t, b'') == (text.encode()[before:have[t]] if j or inside[t] else b'')
            assert ids[:3] == [0, 1, 0] and b''.join(tok_t.pieces[i] for i in ids[3:]) == text.encode()
            assert list(zip(at - 2, inside, strict=True)) == brute_force(answer, tok_s, ids[3:], tok_t), text
            assert at[0] == 2 and not inside[0] and not inside[-1], 'the ends always meet'
            shares.append(1 - inside.mean())
    assert 0.3 < np.mean(shares) < 1


def by_hand(pieces, ids):
    """A tokenizer of given pieces, which cuts one text into given ids."""
    return SimpleNamespace(pieces=pieces, words=dict(zip(pieces, range(9), strict=False)), normal=lambda text: text,
                           encode=lambda text, special: ids, name='by hand',
                           byte_ends=lambda ids: list(accumulate(len(pieces[i]) for i in ids)))


def test_the_example_of_the_docstring():
    """Student tokens 1, 2, +, 3 and a stop token; teacher tokens 12 and +3."""
    tok_s = by_hand([b'1', b'2', b'+', b'3', b''], [0, 1, 2, 3])
    tok_t = by_hand([b'12', b'+3', b'p', b'q'], [0, 1])
    ids, column, inside, written = pair_text([0, 1, 2, 3, 4], tok_s, [2, 3], tok_t, same=False)
    assert ids == [2, 3, 0, 1] and column.tolist() == [1, 1, 2, 2, 3]
    assert inside.tolist() == [False, True, False, True, False]
    assert written == {1: b'1', 2: b'12', 3: b'+', 4: b'+3'}


def a_rollout(tok, texts):
    """Answers of one token per byte now and then, under prompts of 1, 2, 3, ... tokens, right-padded; the
    rows' prompts are numbered backwards."""
    rng = random.Random(5)
    rows = []
    for text in texts:
        answer = []
        for word in tok.encode(text, special=False):
            split = [tok.words[bytes([b])] for b in tok.pieces[word]]
            answer += split if rng.random() < 0.3 else [word]
        rows.append(answer + tok.stop_ids)
    prompt_len = torch.arange(1, len(rows) + 1)
    resp_len = torch.tensor([len(answer) for answer in rows])
    ids = torch.zeros(len(rows), int((prompt_len + resp_len).max()) + 2, dtype=torch.long)
    for b, answer in enumerate(rows):
        ids[b, :b + 1] = 5
        ids[b, b + 1:b + 1 + len(answer)] = torch.tensor(answer)
    return Rollout(ids, prompt_len, resp_len, resp_len > 0, torch.arange(len(rows)).flip(0))


def test_a_batch_is_laid_where_its_answers_are(toks):
    """Every cell of a batch of answers under prompts of different lengths, from the ids alone: student column c has
    read the answer up to and with c, teacher column j its own text up to and with j. One column to the right
    would hand every position the target of its neighbour."""
    s, t, _ = toks
    roll = a_rollout(s, TEXTS[:7])
    prompts_t = [[5] * (2 + number) for number in range(len(roll.ids))]
    reading = read_rollout(roll, prompts_t, s, t)
    met = 0
    for b, (P, n, number) in enumerate(zip(roll.prompt_len, roll.resp_len, roll.prompt, strict=True)):
        first_t = len(prompts_t[number])
        for c in range(roll.ids.shape[1]):
            j = int(reading.column[b, c])
            if not P - 1 <= c < P - 1 + n:
                assert j == -1 and not reading.inside[b, c] and (b, c) not in reading.written
                continue
            have = b''.join(s.pieces[i] for i in roll.ids[b, P:c + 1].tolist())
            read = b''.join(t.pieces[i] for i in reading.ids[b, first_t:j + 1].tolist())
            word = t.pieces[reading.ids[b, j + 1]] if j + 1 < reading.length[b] else None
            assert have.startswith(read) and bool(reading.inside[b, c]) == (have != read)
            assert have == read or not have.startswith(read + word), 'the last such state'
            last = have[len(read):] if have != read else t.pieces[reading.ids[b, j]] if j >= first_t else b''
            assert reading.written.get((b, c), b'') == last
            met += have == read
    assert reading.align == pytest.approx(met / int(roll.resp_len.sum())) and 0.3 < reading.align < 0.95


def test_exact_pairs_leave_no_state_inside_a_token(toks):
    """pair='exact' takes the state of every position of class 1 and leaves all others as they are."""
    s, t, _ = toks
    roll = a_rollout(s, TEXTS[:7])
    prompts_t = [[5] * (2 + number) for number in range(len(roll.ids))]
    floor, exact = (read_rollout(roll, prompts_t, s, t, pair=pair) for pair in ('floor', 'exact'))
    assert floor.inside.any() and (floor.column[floor.inside] >= 0).all()
    assert (exact.column[floor.inside] == -1).all()
    assert torch.equal(exact.column[~floor.inside], floor.column[~floor.inside])
    assert torch.equal(exact.ids, floor.ids) and exact.align == floor.align


def test_a_short_context_takes_the_states_behind_its_end(toks):
    """Through read_rollout: no column points behind what the teacher reads, and those before are unchanged."""
    s, t, _ = toks
    roll = a_rollout(s, TEXTS[:7])
    prompts_t = [[5] * (2 + number) for number in range(len(roll.ids))]
    whole, short = (read_rollout(roll, prompts_t, s, t, context) for context in (None, 12))
    assert int(short.length.max()) == short.ids.shape[1] == 12 < whole.ids.shape[1]
    assert torch.equal(short.column, torch.where(whole.column < 12, whole.column, -1)) and (whole.column >= 12).any()


def test_the_reading_of_some_rows_and_positions(toks):
    """Reading.part against indexing cell by cell, rows in another order, fewer columns."""
    s, t, _ = toks
    roll = a_rollout(s, TEXTS[:7])
    reading = read_rollout(roll, [[5] * (2 + number) for number in range(len(roll.ids))], s, t)
    rows = [4, 1, 6]
    T = int(roll.length[rows].max())
    cells = [(k, c) for k in range(3) for c in range(T) if reading.column[rows[k], c] >= 0][::2]
    ids, at_t, inside, written = reading.part(rows, T, torch.tensor([k * T + c for k, c in cells]))
    assert torch.equal(ids, reading.ids[rows][:, :ids.shape[1]]) and ids.shape[1] == int(reading.length[rows].max())
    for i, (k, c) in enumerate(cells):
        assert divmod(int(at_t[i]), ids.shape[1]) == (k, int(reading.column[rows[k], c]))
        assert inside[i] == reading.inside[rows[k], c] and written[i] == reading.written.get((rows[k], c), b'')


def test_unknown_kinds_of_pairing_are_errors(toks):
    """Not the other kind, in silence."""
    roll = a_rollout(toks[0], ['cat'])
    for kind in (dict(pair='nearest'), dict(feed='teacher')):
        with pytest.raises(AssertionError):
            read_rollout(roll, [[5]], *toks[:2], **kind)


def test_one_vocabulary_is_the_identity(toks):
    """The ids as they were sampled, though the tokenizer would have cut the text otherwise."""
    tok = toks[0]
    answer = [tok.words[bytes([b])] for b in b'the cat'] + tok.stop_ids
    assert tok.encode('the cat') != answer[:-1]
    ids, at, inside, _ = pair_text(answer, tok, [5, 6], tok)
    assert ids == [5, 6, *answer] and at.tolist() == list(range(1, 9)) and not inside.any()


def test_special_tokens_and_their_names(toks):
    """A special token in the answer writes nothing; its name written as text is text, not the teacher's
    end of text; an added token that is not special is text that both may know as one token."""
    s, t, _ = toks
    eos, text = s.words[b'<eos>'], 'the <eos> <think>cat'
    answer = [*s.encode('the '), eos, *s.encode('<eos> <think>cat', special=False), eos]
    ids, at, inside, _ = pair_text(answer, s, [0], t)
    assert t.words[b'<eos>'] not in ids[1:] and t.words[b'<think>'] in ids and b''.join(t.pieces[i] for i in ids[1:]) == text.encode()
    k = len(s.encode('the '))
    assert at[k] == at[k + 1] and inside[k] == inside[k + 1], 'before and after the special token the same bytes are read'


def test_a_character_cut_off_at_the_end(toks):
    """An answer that hits the token limit inside a character: the teacher reads up to the whole ones."""
    s, t, _ = toks
    answer = [s.words[bytes([b])] for b in 'a🙂'.encode()[:3]]
    ids, at, inside, _ = pair_text(answer, s, [0], t)
    assert b''.join(t.pieces[i] for i in ids[1:]) == b'a' and at.tolist() == [0, 1, 1] and inside.tolist() == [False, False, True]


def test_bytes_that_are_no_text(toks):
    """They become U+FFFD, which is known when the last of them is read; what follows is paired on."""
    assert readable(b'a\xffb')[0] == 'a\ufffdb' and readable(b'a\xffb')[1].tolist() == [1, 2, 2, 2, 3]
    assert readable(b'\xf0\x9f\x99a')[1].tolist() == [3, 3, 3, 4] and readable(b'ab\xf0\x9f')[0] == 'ab'
    assert readable(b'\xff')[0] == '\ufffd' and readable(b'')[0] == '' and len(readable(b'\xf0')[1]) == 0
    for data in (b'\xff\xfe\xc3(\xe2\x82', bytes(range(256)) * 2, b'\xc3' * 1000):
        assert readable(data)[0] == data.decode(errors='replace') or readable(data)[0] + '\ufffd' == data.decode(errors='replace')
    s, t, _ = toks
    answer = [s.words[bytes([b])] for b in b'a\xff\xffb'] + s.stop_ids
    ids, at, inside, _ = pair_text(answer, s, [0], t)
    assert b''.join(t.pieces[i] for i in ids[1:]).decode() == 'a\ufffd\ufffdb'
    consumed = readable(b'a\xff\xffb')[1]
    ends = [0, *consumed[np.array(t.byte_ends(ids[1:])) - 1]]
    for k in range(5):
        assert ends[at[k]] <= k and (at[k] + 1 == len(ends) or ends[at[k] + 1] > k) and inside[k] == (ends[at[k]] != k)


def test_a_teacher_that_normalises(toks):
    """NFC: e + accent is one character to the teacher. A state that has read it is not paired with a
    student that has read the bare e."""
    s, _, nfc = toks
    text, need = normalised(*readable('ae\u0301b'.encode()), nfc)
    assert text == 'a\u00e9b' and need.tolist() == [1, 4, 4, 5]
    answer = [s.words[bytes([b])] for b in 'ae\u0301b'.encode()] + s.stop_ids
    ids, at, inside, _ = pair_text(answer, s, [0], nfc)
    read = [0, *need[np.array(nfc.byte_ends(ids[1:])) - 1]]
    assert [read[j] for j in at] == [0, 1, 1, 1, 4, 5] and inside.tolist() == [False, False, True, True, False, False]
    for text in strings(200, seed=3):                                     # nothing is ever read ahead
        answer = s.encode(text, special=False) + s.stop_ids
        ids, at, inside, _ = pair_text(answer, s, [0], nfc)
        form, need = normalised(*readable(text.encode()), nfc)
        read = np.array([0, *need[np.array(nfc.byte_ends(ids[1:]), dtype=int) - 1]])
        have = np.array([0, *s.byte_ends(answer)[:-1]])
        assert (read[at] <= have).all() and (inside == (read[at] != have)).all() and form == nfc.normal(text)


def test_empty_answers_and_short_contexts(toks):
    s, t, _ = toks
    ids, at, inside, _ = pair_text(s.stop_ids, s, [3, 4], t)
    assert ids == [3, 4] and at.tolist() == [1] and not inside.any()
    answer = s.encode('the cat sat on the mat') + s.stop_ids
    whole, at, _, _ = pair_text(answer, s, [3, 4], t)
    ids, short, _, _ = pair_text(answer, s, [3, 4], t, context=5)
    assert ids == whole[:5] and short.tolist() == [a if a < 5 else -1 for a in at] and -1 in short


def test_a_tokenizer_that_loses_bytes_is_refused(toks, tmp_path):
    tok = HFTokenizer(models.BPE({'<unk>': 0, 'a': 1, 'b': 2}, [], unk_token='<unk>'))
    tok.save(str(tmp_path / 'tokenizer.json'))
    write_json(tmp_path / 'config.json', {'eos_token_id': 0})
    with pytest.raises(UserError, match='do not spell out the text'):
        pair_text(toks[0].encode('abc'), toks[0], [0], load_tokenizer(tmp_path))
