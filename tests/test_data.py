"""Tokenizers, templates, problems."""
import json
import math
import random

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from formats import problems as problem_sets
from formats.problems import load_problems, prompt_order
from formats.tokenizer import (
    byte_alphabet,
    disagreement,
    load_tokenizer,
    same_vocabulary,
    shared_size,
    stop_set,
)
from grading.grader import grade
from support.files import write_json
from support.runtime import UserError, shown

TEXTS = ['3+7=0;\\boxed{0}', 'naïve café', '数学 ∑x²', '🙂👩‍👩‍👧', 'a\n\t b  ', '\u0000\u202e']


@pytest.fixture
def folder(tmp_path):
    """A small byte-level BPE whose merges leave characters split over tokens."""
    tok = HFTokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(['the cat sat on the mat, the café'] * 9, trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<eos>', '<bos>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(str(tmp_path / 'tokenizer.json'))
    write_json(tmp_path / 'tokenizer_config.json', {'eos_token': {'content': '<eos>'}, 'bos_token': '<bos>'})
    return tmp_path


def test_stop_set_is_the_union_of_all_three_files(folder):
    """Models disagree among their own files; a missed stop token makes answers run to the limit."""
    write_json(folder / 'config.json', {'eos_token_id': 7})
    write_json(folder / 'generation_config.json', {'eos_token_id': [7, 9]})
    assert load_tokenizer(str(folder)).stop_ids == [0, 7, 9]


@pytest.mark.parametrize('name', ['config.json', 'generation_config.json'])
@pytest.mark.parametrize('ids', [-1, 10**9, True, 'x', '2', 2.0, [7, -1], [7, 10**9], [7, True], [7, '2'], [[7]], {'a': 7}, math.inf], ids=str)
def test_stop_ids_of_another_kind_are_refused(folder, ids, name):
    """eos_token_id = true was id 1, the begin token; the others were dropped without a word, so that answers ended at the
    last token or never."""
    write_json(folder / name, {'eos_token_id': ids})
    with pytest.raises(UserError, match='eos_token_id = ') as error:
        load_tokenizer(folder)
    assert name in str(error.value) and shown(ids) in str(error.value)


def test_stop_ids_beyond_the_tokenizer(folder):
    """Within the model's embedding, which is often rounded up, such an id can never be written and is left out. Beyond it
    the file belongs to another model. If nothing is left, answers would never end: an error."""
    size = load_tokenizer(folder).size
    write_json(folder / 'config.json', {'eos_token_id': [7, size], 'vocab_size': size + 1})
    assert load_tokenizer(folder).stop_ids == [0, 7]
    write_json(folder / 'config.json', {'eos_token_id': [7, size + 1], 'vocab_size': size + 1})
    with pytest.raises(UserError, match=f'eos_token_id = {size + 1}, but the model has {size + 1} tokens'):
        load_tokenizer(folder)
    write_json(folder / 'config.json', {'eos_token_id': size, 'vocab_size': size + 1})
    (folder / 'tokenizer_config.json').write_text('{}')
    with pytest.raises(UserError, match='no end-of-text token'):
        load_tokenizer(folder)
    write_json(folder / 'config.json', {'eos_token_id': None})
    with pytest.raises(UserError, match='no end-of-text token'):
        load_tokenizer(folder)


DEEP = 2
for _ in range(50):
    DEEP = [DEEP]


@pytest.mark.parametrize('key, value', [
    ('bos_token', 5), ('eos_token', True), ('pad_token', ['<pad>']), ('eos_token', {'content': 3}), ('eos_token', {}),
    ('bos_token', 'x' * 100_000), ('chat_template', 7), ('chat_template', {'default': 'x'}), ('chat_template', ['x']),
    ('chat_template', [{'name': 'default'}]), ('chat_template', [{'name': 1, 'template': 'x'}]), ('chat_template', 'x' * 10**6),
    ('chat_template', [{'name': 'a', 'template': 'b'}] * 2000), ('eos_token', DEEP),
], ids=lambda value: shown(value)[:30])
def test_fields_of_tokenizer_config(folder, key, value):
    """A template that was a number went to jinja2, a token that was a list to a dict: tracebacks, or one of 100,000
    characters in a line."""
    write_json(folder / 'tokenizer_config.json', {'eos_token': '<eos>', key: value})
    with pytest.raises(UserError, match=f'tokenizer_config.json: {key} = ') as error:
        load_tokenizer(folder)
    assert len(str(error.value).replace(str(folder), '')) < 300 and '\n' not in str(error.value)


def test_files_of_a_tokenizer_that_are_no_json_objects(folder):
    for text in ('[' * 10**5, '{"a": ' * 10**5, '[]', '7', 'NaN', '', '\ufeff{}', '{"eos_token_id": ' + '1' * 10**4 + '}'):
        for name in ('config.json', 'generation_config.json', 'tokenizer_config.json'):
            (folder / name).write_text(text)
            with pytest.raises(UserError, match=name):
                load_tokenizer(folder)
            (folder / name).unlink()
    write_json(folder / 'tokenizer_config.json', {'eos_token': '<eos>'})
    (folder / 'chat_template.jinja').write_text('x' * 10**6)
    with pytest.raises(UserError, match='chat_template.jinja: chat_template = .*of length up to 200000'):
        load_tokenizer(folder)


@pytest.mark.parametrize('model', [
    {'type': 'BPE', 'vocab': {}, 'merges': []}, {'type': 'BPE', 'vocab': {'a': 2**32 - 1}, 'merges': []},
    {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'b'}, None, {'type': 'Unigram', 'vocab': [], 'unk_id': 0},
], ids=str)
def test_a_tokenizer_that_the_library_refuses_or_that_is_too_large(folder, model):
    """Ids near 2^32 would make lists of that length; the library raises bare Exceptions, some only at the first text."""
    core = json.loads((folder / 'tokenizer.json').read_text())
    write_json(folder / 'tokenizer.json', core | {'model': model, 'added_tokens': []})
    write_json(folder / 'config.json', {'eos_token_id': 0})
    with pytest.raises(UserError, match='tokenizer.json: ') as error:
        load_tokenizer(folder).encode('zzz')
    assert '\n' not in str(error.value)


def test_a_panic_of_the_library_is_one_line(folder, capfd):
    """Rust's panics are no Exception to Python: a regular expression that takes for ever ended in a traceback."""
    core = json.loads((folder / 'tokenizer.json').read_text())
    slow = {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}, 'behavior': 'Isolated', 'invert': False}
    write_json(folder / 'tokenizer.json', core | {'pre_tokenizer': slow})
    with pytest.raises(UserError, match='cannot cut a text into tokens'):
        load_tokenizer(folder).encode('a' * 40 + 'b')


def test_the_byte_alphabet_is_that_of_transformers():
    convert = pytest.importorskip('transformers.convert_slow_tokenizer')
    assert byte_alphabet() == {character: byte for byte, character in convert.bytes_to_unicode().items()}


class Words:
    """What the rule for one vocabulary looks at, of a tokenizer with these words."""
    def __init__(self, words, stop_ids=(0,)):
        self.words = words
        self.size = max(words.values()) + 1
        self.stop_ids = list(stop_ids)
        self.name = 'words'


def by_all_pairs(a, b):
    """The rule as it is said: no string has two ids and no id means two strings. Every pair of entries."""
    entries = [*a.items(), *b.items()]
    return all((w == v) == (i == j) for w, i in entries for v, j in entries)


def test_one_vocabulary_against_all_pairs():
    """2,000 random pairs of small vocabularies, one often a subset of the other, with holes in the ids; the same answer
    in both directions. Equality was asked, so that one extra special token made a pair of two vocabularies."""
    rng = random.Random(0)
    agreed = 0
    for _ in range(2000):
        strings = [bytes([c]) for c in b'abcdefg']
        ids = rng.sample(range(9), 7)
        a = dict(zip(strings, ids, strict=True))
        b = dict(rng.sample(sorted(a.items()), rng.randrange(1, 8)))
        if rng.random() < 0.6:                   # one entry more, which may clash
            b[rng.choice([*strings, b'new'])] = rng.randrange(12)
        b = {w: i for i, w in {i: w for w, i in b.items()}.items()}          # a tokenizer has one string for an id
        s, t = Words(a), Words(b)
        assert same_vocabulary(s, t) == same_vocabulary(t, s) == by_all_pairs(a, b)
        assert (disagreement(s, t) is None) == same_vocabulary(s, t) and disagreement(s, t) in (None, *b)
        assert shared_size(s, t) == (min(s.size, t.size) if by_all_pairs(a, b) else s.size)
        agreed += by_all_pairs(a, b)
    assert 500 < agreed < 1500


def test_stop_sets():
    """The student's stop ids, and the teacher's where they mean the same; a stop id that only the teacher has can
    never be written, and one that only the student has must not be its only one."""
    letters = {b'a': 0, b'b': 1, b'<eos>': 2, b'<end>': 3}
    more = letters | {b'<extra>': 4}
    assert stop_set(Words(letters, [2]), Words(letters, [3])) == [2, 3]
    assert stop_set(Words(letters, [2]), Words(more, [4])) == [2]
    assert stop_set(Words(more, [2, 4]), Words(letters, [3])) == [2, 3]
    assert stop_set(Words(letters, [2]), Words({b'a': 1, b'b': 0}, [1])) == [2]        # ids mean other strings
    with pytest.raises(UserError, match='its answers end with id 4, which words does not have'):
        stop_set(Words(more, [4]), Words(letters, []))


@pytest.mark.parametrize('text', TEXTS)
def test_byte_ends_are_exact(folder, text):
    """Against decoding every prefix to bytes: offsets inside characters included."""
    tok = load_tokenizer(str(folder))
    ids = tok.encode(text) + tok.stop_ids
    assert tok.decode(ids) == text
    ends = tok.byte_ends(ids)
    assert ends[-1] == ends[-2] == len(text.encode()) and ends == sorted(ends)
    for i, end in enumerate(ends):
        head = text.encode()[:end]
        assert tok.decode(ids[:i + 1]).encode() == head or tok.decode(ids[:i + 1]).endswith('\ufffd')
        assert tok.decode(ids[:i + 1]).rstrip('\ufffd') == head.decode(errors='ignore')


def test_chat_template_is_rendered_with_what_templates_expect(folder):
    (folder / 'chat_template.jinja').write_text(
        "{{ bos_token }}{% for m in messages %}\n    [{{ m.role }}] {{ m.content | tojson }}\n    {% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}{% if thinking %} think{% endif %}{{ strftime_now('%%') }}")
    tok = load_tokenizer(str(folder), thinking=True)
    assert tok.render('é"x"') == '<bos>    [user] "é\\"x\\""\n> think%'
    assert tok.chat('a')[0] == 1
    transformers = pytest.importorskip('transformers')
    ref = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), bos_token='<bos>',
                                               chat_template=(folder / 'chat_template.jinja').read_text())
    talk = [{'role': 'user', 'content': 'x\n y'}, {'role': 'assistant', 'content': '∑'}]
    assert tok.render(talk) == ref.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, thinking=True)


@pytest.mark.parametrize('template, says', [
    ("{{ raise_exception('no system role') }}", 'no system role'),
    ("{{ messages[0].content.__class__.__mro__ }}", 'chat template failed'),      # the sandbox holds
    ("{% for %}", 'does not parse'),
    ("{{ 1 / 0 }}", 'division by zero'),
    ("{{ 'a'.index('b') }}", 'chat template failed'),
])
def test_bad_templates(folder, template, says):
    (folder / 'chat_template.jinja').write_text(template)
    with pytest.raises(UserError, match=says):
        load_tokenizer(str(folder)).render('x')


def test_named_templates(folder):
    """Some models keep several in a list; the one called default is meant."""
    write_json(folder / 'tokenizer_config.json', {'eos_token': '<eos>', 'chat_template': [
        {'name': 'tool', 'template': 'no'}, {'name': 'default', 'template': 'yes {{ messages[0].content }}'}]})
    assert load_tokenizer(str(folder)).render('x') == 'yes x'


def test_leftover_truncation_and_padding_are_ignored(folder):
    """Published tokenizer.json files carry them; a prompt cut at 5 ids would train without complaint."""
    ids = load_tokenizer(folder).encode('the cat sat on the mat ' * 5)
    core = HFTokenizer.from_file(str(folder / 'tokenizer.json'))
    core.enable_truncation(5)
    core.enable_padding(length=9)
    core.save(str(folder / 'tokenizer.json'))
    tok = load_tokenizer(folder)
    assert tok.encode('the cat sat on the mat ' * 5) == ids and len(tok.encode('the')) < 9


def test_generation_marks_and_tools_as_transformers_renders_them(folder):
    template = ("{% if tools is not none %}TOOLS{% endif %}{% for m in messages %}{% generation %}{{ m.content }}"
                "{% endgeneration %}{% endfor %}{{ messages | tojson(indent=1) }}")
    (folder / 'chat_template.jinja').write_text(template)
    transformers = pytest.importorskip('transformers')
    ref = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), chat_template=template)
    talk = [{'role': 'user', 'content': 'é'}]
    assert load_tokenizer(folder).render(talk) == ref.apply_chat_template(talk, tokenize=False)


def test_bad_tokenizers(folder):
    (folder / 'tokenizer_config.json').write_text('{}')
    with pytest.raises(UserError, match='no end-of-text token'):
        load_tokenizer(str(folder))
    (folder / 'tokenizer_config.json').write_text('[]')
    with pytest.raises(UserError, match='holds a list'):
        load_tokenizer(str(folder))
    (folder / 'tokenizer.json').write_text('{"model": 3}')
    with pytest.raises(UserError, match='not a tokenizer'):
        load_tokenizer(str(folder))
    (folder / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='no such file'):
        load_tokenizer(str(folder))
    with pytest.raises(UserError, match="'': no such file or folder"):
        load_tokenizer('')


def test_problems(folder):
    tok, file = load_tokenizer(str(folder)), folder / 'p.jsonl'
    file.write_text('\n'.join(json.dumps(r) for r in [{'question': '1+1', 'answer': 2}, {'problem': 'x', 'answer': 'y'}]))
    first, second = load_problems(file, tok)
    assert (first.question, first.answer, first.ids) == ('1+1', '2', tok.chat('1+1')) and second.answer == 'y'
    assert len(load_problems(file, tok, first=1)) == 1
    file.write_text('{"question": "a\u2028b\x85c", "answer": "1"}\n\n')     # separators to Python, text to JSON
    assert load_problems(file, tok)[0].question == 'a\u2028b\x85c'


def test_layouts_of_problems(folder, capsys):
    """verl's messages and ground truth, problem + solution, plain text, json; a folder prefers the split
    that is asked for; repeated questions are read once and counted."""
    import pyarrow
    from pyarrow import parquet
    tok = load_tokenizer(str(folder))
    (folder / 'd').mkdir()
    talk = [{'role': 'user', 'content': 'a'}]
    verl = [{'prompt': talk, 'reward_model': {'ground_truth': '7', 'style': 'rule'}, 'index': i} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(verl), folder / 'd/train.parquet')
    parquet.write_table(pyarrow.Table.from_pylist([{'problem': 'b', 'solution': 'so \\boxed{8}', 'id': 1}]), folder / 'd/test.parquet')
    first, = load_problems(folder / 'd', tok)
    assert first.question == talk and first.answer == '7' and first.ids == tok.chat(talk)
    assert '3 rows, 2 of them repeated' in capsys.readouterr().out
    assert load_problems(folder / 'd', tok, split='test')[0].answer == 'so \\boxed{8}'
    (folder / 'p.txt').write_text('one\n\ntwo\n')
    assert [(p.question, p.answer) for p in load_problems(folder / 'p.txt', tok)] == [('one', None), ('two', None)]
    (folder / 'p.json').write_text('[{"question": "q", "answer": 0}]')
    assert load_problems(folder / 'p.json', tok)[0].answer == '0'
    (folder / 'p.txt').write_text('short\n' + 'long ' * 50)
    assert [p.question for p in load_problems(folder / 'p.txt', tok, longest=20)] == ['short']
    assert '1 prompts longer than 20 tokens' in capsys.readouterr().out
    with (folder / 'd/more.train.parquet').open('wb') as f:
        parquet.write_table(pyarrow.Table.from_pylist([{'problem': str(i), 'answer': '1'} for i in range(9)]), f)
    assert len(load_problems(folder / 'd', tok, first=3)) == 3 and len(load_problems(folder / 'd', tok, first=9)) == 9
    (folder / 'e/test').mkdir(parents=True)
    (folder / 'e/test/0.jsonl').write_text('{"question": "held out", "answer": "1"}')
    with pytest.raises(UserError, match='for train; name one file'):
        load_problems(folder / 'e', tok)
    (folder / 'e/constrained.jsonl').write_text('{"question": "mine", "answer": "1"}')
    assert [p.question for p in load_problems(folder / 'e', tok)] == ['mine']
    assert load_problems(folder / 'e', tok, split='test', suffix=' Box it.')[0].question == 'held out Box it.'
    (folder / 'd/train.parquet').write_bytes((folder / 'd/train.parquet').read_bytes()[:-20])
    with pytest.raises(UserError, match='not a whole parquet file'):
        load_problems(folder / 'd', tok)


@pytest.mark.parametrize('text, says', [
    ('', 'no problems in it'),
    ('{"question": "a", "answer": "b"}\n{"question": ', ':2: Expecting value'),
    ('{"answer": "b"}', ':1: no question; wants prompt or question'),
    ('[1, 2]', ':1: a list, not a row'),
    ('{"question": 5, "answer": 5}', ':1: no question'),
    ('{"prompt": [{"role": "user"}], "answer": 5}', ':1: no question'),
])
def test_bad_problems(folder, text, says):
    (folder / 'p.jsonl').write_text(text)
    with pytest.raises(UserError) as e:
        load_problems(folder / 'p.jsonl', load_tokenizer(str(folder)))
    assert says in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(UserError, match='no such file or folder'):
        load_problems(folder / 'none.jsonl', None)
    (folder / 'p.jsonl').write_bytes(b'{"question": "\xff", "answer": "1"}')
    with pytest.raises(UserError, match=":1: 'utf-8' codec"):
        load_problems(folder / 'p.jsonl', None)
    (folder / 'p.jsonl').write_text('{"question": "a", "answer": "b"}')
    (folder / 'chat_template.jinja').write_text('{# nothing #}')
    with pytest.raises(UserError, match='renders to no token'):
        load_problems(folder / 'p.jsonl', load_tokenizer(str(folder)))


@pytest.mark.parametrize('row, says', [
    ({'answer': ['7']}, "the answer ['7'] is of type list; wants a text or a number"),
    ({'answer': {'x': 7}}, 'is of type dict'),
    ({'answer': True}, 'the answer True is of type bool'),
    ({'answer': float('nan')}, 'the answer nan is of type float'),
    ({'answer': float('inf')}, 'the answer inf is of type float'),
    ({'reward_model': {'ground_truth': ['7', '8']}}, 'is of type list'),
    ({'reward_model': [7]}, 'is of type list'),
    ({'answer': 'a' * 1_000_001}, "a text of 1000001 characters, 'aaa"),
    ({'answer': '\ud800'}, "holds '\\ud800', half of a character"),
    ({'question': 'a\udfffb'}, "holds '\\udfff', half of a character"),
    ({'question': 'long ' * 200_001}, 'at most 1000000 are read'),
    ({'question': [{'role': 'user', 'content': '\ud9ab'}]}, "holds '\\ud9ab'"),
    ({'question': [{'role': '\ud9ab', 'content': 'x'}]}, "role '\\ud9ab'"),
    ({'question': [{'role': 5, 'content': 'x'}]}, 'no question'),
    ({'question': [{'role': 'user', 'content': None}]}, 'no question'),
    ({'question': ['text']}, 'no question'),
    ({'question': True}, 'no question'),
    ({'question': {'text': 'a'}}, 'no question'),
])
def test_rows_that_no_problem_can_be(folder, row, says):
    """Each was taken as it is: the text of a list, which no model can ever answer, or a traceback of the tokenizer.
    The line names file and row, and shows a little of the value."""
    rows = [{'question': 'fine', 'answer': '1'}, {'question': 'a', 'answer': '1'} | row]
    if 'reward_model' in row:
        del rows[1]['answer']
    for file, where in (('p.jsonl', 'p.jsonl:2: '), ('p.json', 'p.json, row 2: ')):
        (folder / file).write_text(json.dumps(rows) if file == 'p.json' else '\n'.join(map(json.dumps, rows)))
        with pytest.raises(UserError) as e:
            load_problems(folder / file, load_tokenizer(folder))
        message = str(e.value).removeprefix(f'{folder}/')
        assert message.startswith(where) and says in message and '\n' not in message and len(message) < 200


def test_numbers_and_texts_are_answers(folder):
    """What rows may hold besides: columns without a value, messages with other fields, which are left out."""
    rows = [{'question': 'a', 'answer': 7}, {'question': 'b', 'answer': 0.5}, {'question': 'c', 'answer': None, 'solution': '8'},
            {'question': 'd', 'answer': -10**30}, {'question': 'e', 'reward_model': {}}, {'question': 'f', 'answer': ''},
            {'prompt': [{'role': 'user', 'content': 'g', 'name': None, 'deep': [[[]]]}], 'answer': '1'}]
    (folder / 'p.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    problems = load_problems(folder / 'p.jsonl', load_tokenizer(folder))
    assert [p.answer for p in problems] == ['7', '0.5', '8', '-1' + '0' * 30, None, None, '1']
    assert problems[-1].question == [{'role': 'user', 'content': 'g'}]


@pytest.mark.parametrize('ending', ['txt', 'jsonl', 'json'])
def test_files_from_windows_are_read_as_any_others(folder, ending):
    """A mark in front and carriage returns became part of the questions of a .txt file, and the mark made JSON
    malformed."""
    tok = load_tokenizer(folder)
    texts = {'txt': 'one\n\ntwo\n', 'jsonl': '{"question": "one"}\n\n{"question": "two"}\n',
             'json': '[{"question": "one"},\n {"question": "two"}]\n'}
    for mark, newline in ((b'', '\n'), (b'\xef\xbb\xbf', '\n'), (b'', '\r\n'), (b'\xef\xbb\xbf', '\r\n')):
        (folder / f'p.{ending}').write_bytes(mark + texts[ending].replace('\n', newline).encode())
        problems = load_problems(folder / f'p.{ending}', tok)
        assert [p.question for p in problems] == ['one', 'two'] and problems[0].ids == tok.chat('one')


@pytest.mark.parametrize('ending', ['jsonl', 'json', 'txt', 'parquet'])
@pytest.mark.parametrize('content', [
    b'[' * 100_000, b'[' * 990 + b']' * 990, b'[{"question": ' + b'[' * 100_000, b'{"question": "a", "answer": 1' + b'0' * 5000 + b'}',
    b'\xff\xfe{', b'{"question": "a\x00', b'PAR1', b'PAR1' * 9, b'', b'\x00' * 99, b'null', b'3', b'"text"', b'[3]', b'{}'], ids=repr)
def test_files_that_hold_no_problems_are_one_line(folder, ending, content):
    """Deep nesting, integers of thousands of digits, other encodings, half a parquet file, nothing at all."""
    file = folder / f'p.{ending}'
    file.write_bytes(content)
    if ending == 'txt' and b'\xff' not in content and content:
        assert len(load_problems(file, load_tokenizer(folder))) == 1         # any text is a question
        return
    with pytest.raises(UserError) as e:
        load_problems(file, load_tokenizer(folder))
    assert f'p.{ending}' in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 280


def test_odd_columns_of_parquet_are_one_line(folder):
    """Bytes, dates, decimals, maps, structs, nulls inside of nested values, texts that are not UTF-8, two columns of
    one name."""
    from datetime import datetime
    from decimal import Decimal

    import pyarrow
    from pyarrow import parquet
    text = pyarrow.array(['q'])
    bad_text = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b'\0\0\0\0\2\0\0\0'), pyarrow.py_buffer(b'\xff\xfe'))
    far = pyarrow.array([2**60], pyarrow.int64()).cast(pyarrow.timestamp('ms'))
    map_type = pyarrow.map_(pyarrow.string(), pyarrow.string())
    null_talk = pyarrow.array([[{'role': 'user', 'content': None}, None]])
    for columns in ([text, pyarrow.array([b'7'])], [text, pyarrow.array([datetime(2020, 1, 1)])], [text, far],
                    [text, pyarrow.array([Decimal('7.0')])], [text, pyarrow.array([{'x': 7}])], [text, pyarrow.array([[None]])],
                    [text, pyarrow.array([True])], [text, bad_text], [bad_text, text], [pyarrow.array([b'q']), text],
                    [pyarrow.array([[('a', 'b')]], map_type), text], [null_talk, text], [pyarrow.array([5]), text],
                    [pyarrow.array([None]), text], [pyarrow.array([{'a': {'b': None}}]), text], [pyarrow.array([[]]), text]):
        parquet.write_table(pyarrow.Table.from_arrays(columns, ['question', 'answer']), folder / 'p.parquet')
        with pytest.raises(UserError) as e:
            load_problems(folder / 'p.parquet', load_tokenizer(folder))
        assert 'p.parquet' in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 280, columns
    parquet.write_table(pyarrow.Table.from_arrays([text, text, text], ['question', 'question', 'x']), folder / 'p.parquet')
    with pytest.raises(UserError, match='two of its columns have one name'):
        load_problems(folder / 'p.parquet', load_tokenizer(folder))
    parquet.write_table(pyarrow.Table.from_arrays([text, text.dictionary_encode()], ['question', 'answer']), folder / 'p.parquet')
    assert load_problems(folder / 'p.parquet', load_tokenizer(folder))[0].answer == 'q'


HEADINGS = '#### Case 1\nso \\boxed{8}.\n#### Remark\nnone'


@pytest.mark.parametrize('written, meant, right', [
    ('She has 5 + 2 = <<5+2=7>>7 apples.\n#### 7', '7', '7'),
    ('a\n#### 1,234 ', '1,234', '1234'),
    ('#### 3\nor rather\n#### -4', '-4', '-4'),
    (HEADINGS, HEADINGS, '8'),
    ('12', '12', '12'),
])
def test_an_answer_of_gsm8k_is_what_follows_the_last_hashes(folder, written, meant, right):
    """Taken whole, every answer to GSM8K as it is published counts as wrong. A heading in a solution that has
    a box is not an answer."""
    (folder / 'p.jsonl').write_text(json.dumps({'question': 'q', 'answer': written}))
    problem, = load_problems(folder / 'p.jsonl', load_tokenizer(str(folder)))
    assert problem.answer == meant
    assert grade(f'so \\boxed{{{right}}}', problem.answer) and not grade('so \\boxed{99}', problem.answer)


def test_limits_and_repeats_at_their_boundaries(folder, capsys):
    """A prompt of exactly `longest` tokens stays; `first` counts the problems that are kept; questions are the
    same only if they are the same to the last character."""
    tok = load_tokenizer(str(folder))
    stem = 'the cat sat on the mat and ' * 3
    questions = [stem + 'a', stem + 'b', stem + 'a', 'short', stem + 'longer', 'tiny']
    (folder / 'p.jsonl').write_text('\n'.join(json.dumps({'question': q, 'answer': 1}) for q in questions))

    def asked(**how):
        return [p.question.removeprefix(stem) for p in load_problems(folder / 'p.jsonl', tok, **how)]
    assert asked() == ['a', 'b', 'short', 'longer', 'tiny']
    length = len(tok.chat(stem + 'a'))
    assert len(tok.chat(stem + 'longer')) > length == len(tok.chat(stem + 'b'))
    capsys.readouterr()
    assert asked(longest=length) == ['a', 'b', 'short', 'tiny']
    assert f'6 rows, 1 of them repeated, 1 prompts longer than {length} tokens; 4 problems left' in capsys.readouterr().out
    assert asked(longest=length - 1) == ['short', 'tiny'] == asked(longest=length - 1, first=2)
    assert asked(longest=length - 1, first=1) == ['short'] and asked(first=4) == ['a', 'b', 'short', 'longer']


def test_problems_are_rendered_in_pieces_of_any_size(folder, monkeypatch):
    """Pieces change nothing: neither which problems there are, nor their prompts, nor how far a file is read."""
    tok = load_tokenizer(folder)
    rows = [{'question': f'{i % 17} and ' + 'the cat ' * (i % 5), 'answer': i} for i in range(60)]
    (folder / 'p.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{"no question": 1}\n')
    found = {}
    for piece in (1, 2, 7, 1000):
        monkeypatch.setattr(problem_sets, 'PIECE', piece)
        found[piece] = [load_problems(folder / 'p.jsonl', tok, first=first, longest=longest)
                        for first, longest in ((5, 0), (17, 0), (8, 12), (1, 12))]
        assert all(problem.ids == tok.chat(problem.question) for problem in found[piece][1])
        with pytest.raises(UserError, match=':61: no question'):
            load_problems(folder / 'p.jsonl', tok)
    assert found[1] == found[2] == found[7] == found[1000] and len(found[1][1]) == 17


def test_reading_goes_on_after_a_piece_of_long_prompts(folder, monkeypatch):
    """If all prompts of the first piece were too long, the rest of the file was not read, and the set was called empty."""
    monkeypatch.setattr(problem_sets, 'PIECE', 2)
    (folder / 'p.txt').write_text('long ' * 50 + '\n' + 'longer ' * 50 + '\n' + 'short\n' + 'tiny\n')
    for first in (0, 1, 2):
        problems = load_problems(folder / 'p.txt', load_tokenizer(folder), first=first, longest=20)
        assert [problem.question for problem in problems] == ['short', 'tiny'][:first or 2]


def test_the_row_that_a_template_refuses_is_named(folder):
    (folder / 'chat_template.jinja').write_text("{% if 'bad' in messages[0].content %}{{ raise_exception('not that one') }}{% endif %}x")
    (folder / 'p.txt').write_text('a\n' * 3 + ''.join(f'fine {i}\n' for i in range(300)) + 'bad\n')
    with pytest.raises(UserError, match=r'p.txt:304: .*tokenizer.json: its chat template failed \(not that one\)'):
        load_problems(folder / 'p.txt', load_tokenizer(folder))


def test_prompt_order_visits_everything_once_an_epoch():
    """Steps that straddle epochs included; another seed, another order; no state."""
    seen = [i for step in range(1, 8) for i in prompt_order(10, 3, step, seed=0)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert prompt_order(10, 3, 4, seed=0) == seen[9:12] != prompt_order(10, 3, 4, seed=1)
