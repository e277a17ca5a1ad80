"""Problem sets as people have them: one dozen of problems in many layouts and files, damaged files, and their bounds."""
import codecs
import csv
import gzip
import io
import json
import pickle
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import feather, parquet

from configs.default import config
from formats import rows as data_files
from formats.problems import BOXED, Problem, folded, load_problems
from support.preflight import problem_lines
from support.runtime import ROOT, UserError

DATA = ROOT.parent / 'shared/data'

# Quotes, separators, newlines, other scripts, what looks like a number, a separator of lines to Python alone.
QUESTIONS = ['What is 1+1?', 'Say "seven", please.', 'a, b; c\td', 'two\n\nparagraphs', '数学 ∑x² 🙂', '007', 'x' * 3000,
             '$\\frac{1}{2}$ of "x,\n y"', 'a\u2028b', "it's", '{a} and [b]', '# 5']
ANSWERS = ['2', '7', 'c', '\\frac{1}{2}', '数', '007', '3000', '0.5', '(a, b)', '"s"', '1/3', '-5']
ROWS = [{'question': question, 'answer': answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]


class Letters:
    """A tokenizer whose prompts are the bytes of the messages: a text is one message of the user."""

    def chat_all(self, questions, origins):
        assert len(questions) == len(origins)
        talks = [[{'role': 'user', 'content': q}] if isinstance(q, str) else q for q in questions]
        return [list(json.dumps(talk).encode()) for talk in talks]


def load(source, **how):
    return load_problems(source, Letters(), **how)


def as_text(problem):
    """A problem whose question is one message of the user -> the same with a text for a question."""
    question = problem.question
    if isinstance(question, list):
        (message,) = question
        assert message['role'] == 'user'
        question = message['content']
    return replace(problem, question=question)


EXPECTED = [Problem(row['question'], row['answer'], Letters().chat_all([row['question']], [''])[0], row['answer']) for row in ROWS]


def refusal(source, **how):
    """The one line with which a set is refused, without its folder."""
    with pytest.raises(UserError) as error:
        load(source, **how)
    line = str(error.value).replace(f'{Path(str(source).split(",")[0]).parent}/', '')
    assert '\n' not in line and len(line) < 300, line
    return line


# ---- layouts: writers of ROWS --------------------------------------------------------------------

def renamed(question, answer):
    return [{question: row['question'], answer: row['answer'], 'id': number} for number, row in enumerate(ROWS)]


def user(row):
    return [{'role': 'user', 'content': row['question']}]


def assistant(row):
    return [{'role': 'assistant', 'content': row['answer']}]


def jsonl(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def table(rows, **how):
    """csv or tsv, by the standard library."""
    stream = io.StringIO(newline='')
    writer = csv.DictWriter(stream, list(rows[0]), **how)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def arrow_stream(rows, path, compression=None):
    batch = pyarrow.Table.from_pylist(rows)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_stream(str(path), batch.schema, options=options) as writer:
        writer.write_table(batch, max_chunksize=5)


VERL = [{'data_source': 'x', 'prompt': user(row), 'ability': 'math', 'extra_info': {'index': 'a', 'split': 'train'},
         'reward_model': {'ground_truth': row['answer'], 'style': 'rule'}} for row in ROWS]
SHAREGPT = [{'conversations': [{'from': 'human', 'value': row['question']}, {'from': 'gpt', 'value': row['answer']}]}
            for row in ROWS]
ALPACA = [{'instruction': row['question'].partition('\n\n')[0], 'input': row['question'].partition('\n\n')[2],
           'output': row['answer']} for row in ROWS]
TEXT_FILES = {
    'question.jsonl': jsonl(ROWS), 'UPPER.JSONL': jsonl(renamed('QUESTION', 'ANSWER')),
    'capitals.json': json.dumps(renamed('Problem', 'Answer'), indent=1).encode(),
    'lines.json': jsonl(renamed('problem', 'solution')), 'final.json.gz': gzip.compress(json.dumps(renamed('prompt', 'final_answer')).encode()),
    'packed.jsonl.gz': gzip.compress(jsonl(renamed('problem', 'expected_answer'))),
    'comma.csv': table(renamed('Question', 'Answer')), 'unix.csv': table(ROWS, lineterminator='\n'),
    'quoted.csv': table(ROWS, quoting=csv.QUOTE_ALL), 'mark.csv': codecs.BOM_UTF8 + table(ROWS),
    'packed.csv.gz': gzip.compress(codecs.BOM_UTF8 + table(renamed(' Problem', 'Ground_Truth '))),
    'tabs.tsv': table(ROWS, delimiter='\t'), 'sharegpt.json': json.dumps(SHAREGPT).encode(), 'alpaca.jsonl': jsonl(ALPACA),
    'openai.jsonl': jsonl([{'messages': user(row) + assistant(row)} for row in ROWS]),
    'trl.jsonl': jsonl([{'prompt': row['question'], 'completion': row['answer']} for row in ROWS]),
    'trl_talk.jsonl': jsonl([{'prompt': user(row), 'completion': assistant(row)} for row in ROWS]),
    'rlvr.jsonl': jsonl([{'messages': user(row), 'ground_truth': row['answer'], 'dataset': 'x'} for row in ROWS]),
}


@pytest.mark.parametrize('name', TEXT_FILES)
def test_text_files_of_all_layouts_hold_the_same_problems(tmp_path, name):
    """Most of these were refused, and a question of the last ones lost its answer without a word."""
    (tmp_path / name).write_bytes(TEXT_FILES[name])
    problems = load(tmp_path / name)
    assert [as_text(problem) for problem in problems] == EXPECTED
    assert isinstance(problems[0].question, list) == (name in ('openai.jsonl', 'trl_talk.jsonl', 'rlvr.jsonl', 'sharegpt.json'))


@pytest.mark.parametrize('rows', [ROWS, VERL, ALPACA, [{'messages': user(row) + assistant(row), 'n': 1} for row in ROWS]],
                         ids=['plain', 'verl', 'alpaca', 'messages'])
def test_tables_of_all_layouts_hold_the_same_problems(tmp_path, rows):
    """parquet with small row groups, an arrow stream (compressed or not), an arrow file, as pyarrow writes them."""
    written = pyarrow.Table.from_pylist(rows)
    parquet.write_table(written, tmp_path / 'a.parquet', row_group_size=5)
    feather.write_feather(written, str(tmp_path / 'b.arrow'), chunksize=5)
    arrow_stream(rows, tmp_path / 'c.arrow')
    arrow_stream(rows, tmp_path / 'd.arrow', 'zstd')
    for name in ('a.parquet', 'b.arrow', 'c.arrow', 'd.arrow'):
        assert [as_text(problem) for problem in load(tmp_path / name)] == EXPECTED, name


def test_what_pandas_writes(tmp_path):
    """to_csv, to_json and to_parquet of one frame; numbers stay the numbers that they are."""
    pandas = pytest.importorskip('pandas')
    frame = pandas.DataFrame(renamed('Problem', 'Answer'))
    frame.to_csv(tmp_path / 'a.csv', index=False)
    frame.to_csv(tmp_path / 'b.csv.gz')                      # with the index as a column without a name
    frame.to_json(tmp_path / 'c.jsonl', orient='records', lines=True)
    frame.to_json(tmp_path / 'd.json', orient='records')
    frame.to_parquet(tmp_path / 'e.parquet')
    for name in ('a.csv', 'b.csv.gz', 'c.jsonl', 'd.json', 'e.parquet'):
        assert load(tmp_path / name) == EXPECTED, name
    pandas.DataFrame({'question': ['a', 'b'], 'answer': [7, 8], 'solution': [None, 'x']}).to_csv(tmp_path / 'f.csv')
    assert [problem.answer for problem in load(tmp_path / 'f.csv')] == ['7', '8']
    pandas.DataFrame({'question': ['a', 'b'], 'answer': ['1', None], 'solution': [None, 'x']}).to_csv(tmp_path / 'g.csv')
    assert [problem.answer for problem in load(tmp_path / 'g.csv')] == ['1', 'x']


def test_folders_that_datasets_saves(tmp_path):
    """A data set and a dictionary of them, shuffled, in several files, beside files of its cache: the library itself says
    what is in them. dataset_info.json and state.json were read as problems."""
    datasets = pytest.importorskip('datasets')
    plain = datasets.Dataset.from_list(ROWS)
    plain.save_to_disk(tmp_path / 'one')
    assert load(tmp_path / 'one') == EXPECTED == load(tmp_path / 'one', split='test')

    mixed = plain.shuffle(seed=1).select(range(9))
    mixed.save_to_disk(tmp_path / 'mixed', num_shards=3)
    assert len(list((tmp_path / 'mixed').glob('*.arrow'))) == 3
    arrow_stream([{'question': 'of the cache', 'answer': '1'}], tmp_path / 'mixed/cache-0123456789abcdef.arrow')
    assert [problem.question for problem in load(tmp_path / 'mixed')] == datasets.load_from_disk(tmp_path / 'mixed')['question'][:]

    datasets.DatasetDict({'train': mixed, 'test': plain.select(range(2))}).save_to_disk(tmp_path / 'both')
    assert [problem.question for problem in load(tmp_path / 'both')] == mixed['question'][:]
    assert load(tmp_path / 'both', split='test') == EXPECTED[:2]
    datasets.DatasetDict({'validation': plain}).save_to_disk(tmp_path / 'held')
    assert 'file in it for train' in refusal(tmp_path / 'held')


def test_folders_of_text_files(tmp_path):
    """Held-out files are taken before those whose name says nothing, and never the training file beside them, which was read
    as held-out problems where there is a validation file and no test file. A README.txt is no problem set."""
    for name, word in (('train-0.csv.gz', 'a'), ('train-1.csv.gz', 'b'), ('validation.csv.gz', 'c')):
        (tmp_path / name).write_bytes(gzip.compress(f'question,answer\n{word},1\n'.encode()))
    (tmp_path / 'README.txt').write_text('hello')
    (tmp_path / 'dataset_infos.json').write_text('{"default": {}}')
    assert [problem.question for problem in load(tmp_path)] == ['a', 'b']
    assert [problem.question for problem in load(tmp_path, split='test')] == ['c']


def test_several_files_with_commas_between(tmp_path, capsys):
    """All rows of the first, then those of the second, each question once; a path that exists is never split."""
    (tmp_path / 'a,b.csv').write_text('question,answer\nq,1\n')
    assert len(load(tmp_path / 'a,b.csv')) == 1
    (tmp_path / 'half.jsonl').write_bytes(jsonl(ROWS[:8]))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[5:]), tmp_path / 'rest.parquet')
    both = f'{tmp_path}/half.jsonl,{tmp_path}/rest.parquet'
    capsys.readouterr()
    assert load(both) == EXPECTED
    assert '15 rows, 3 of them repeated; 12 problems left' in capsys.readouterr().out
    assert "'./nope.jsonl': no such file or folder" in refusal(f'{tmp_path}/half.jsonl,./nope.jsonl')
    assert "'': no such file or folder" in refusal(f'{tmp_path}/half.jsonl,')


@pytest.mark.parametrize('ending', ['csv', 'tsv', 'csv.gz', 'jsonl.gz', 'txt.gz', 'json.gz'])
def test_marks_and_carriage_returns_are_no_part_of_a_problem(tmp_path, ending):
    texts = {'csv': 'question,answer\none,1\n\ntwo,2\n', 'tsv': 'question\tanswer\none\t1\ntwo\t2\n', 'txt': 'one\n\ntwo\n',
             'jsonl': '{"question": "one"}\n\n{"question": "two"}\n', 'json': '[{"question": "one"},\n {"question": "two"}]\n'}
    for mark, newline in ((b'', '\n'), (codecs.BOM_UTF8, '\n'), (b'', '\r\n'), (codecs.BOM_UTF8, '\r\n'), (b'', '')):
        text = texts[ending.removesuffix('.gz')].replace('\n', newline or '\n')
        content = mark + (text if newline else text.rstrip('\n')).encode()       # and without the last end of line
        (tmp_path / f'p.{ending}').write_bytes(gzip.compress(content) if ending.endswith('gz') else content)
        problems = load(tmp_path / f'p.{ending}')
        assert [problem.question for problem in problems] == ['one', 'two']
        assert [problem.answer for problem in problems] == (['1', '2'] if 'sv' in ending else [None, None])


# ---- which column counts -------------------------------------------------------------------------

TALK = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}, {'role': 'assistant', 'content': 'so 5'}]


@pytest.mark.parametrize('row, question, answer', [
    ({'question': 'q', 'prompt': 'p', 'answer': '1'}, 'p', '1'),
    ({'problem': 'q', 'messages': TALK, 'solution': 'so \\boxed{5}'}, 'q', 'so \\boxed{5}'),             # NuminaMath
    ({'problem': 'q', 'answer': '5', 'solution': 'so 6'}, 'q', '5'),
    ({'question': '', 'problem': 'q', 'answer': None, 'output': '5'}, 'q', '5'),
    ({'messages': TALK}, TALK[:2], 'so 5'),
    ({'messages': TALK, 'answer': 5}, TALK[:2], '5'),
    ({'messages': [*TALK, {'role': 'user', 'content': 'sure?'}], 'Answer': '6'}, [*TALK, {'role': 'user', 'content': 'sure?'}], '6'),
    ({'messages': TALK[1:2]}, TALK[1:2], None),
    ({'prompt': TALK}, TALK, None),                          # an answer that was begun, as verl renders it
    ({'conversations': [{'from': 'human', 'value': 'u', 'weight': None}, {'from': 'gpt', 'value': '6 #### 7'}]}, TALK[1:2], '7'),
    ({'conversations': [{'from': 'user', 'value': 'u'}, {'from': 'assistant', 'value': '7'}]}, TALK[1:2], '7'),
    ({'instruction': 'i', 'input': 'x', 'output': 'o'}, 'i\n\nx', 'o'),
    ({'instruction': 'i', 'input': None, 'output': 'o'}, 'i', 'o'),
    ({'question': 'q', 'input': 'x', 'Ground_Truth': '3', 'reward_model': {'ground_truth': '4'}}, 'q', '3'),
    ({'question': 'q', 'reward_model': {'style': 'rule'}, 'completion': [{'role': 'assistant', 'content': 'c'}]}, 'q', 'c'),
    ({'instruction': 'Double it.', 'input': 21, 'output': '42'}, 'Double it.\n\n21', '42'),
    ({'question': 'q', 'answer': '', 'solution': '5'}, 'q', '5'),
    ({'question': ' \n', 'problem': 'q', 'answer': ' ', 'output': 0}, 'q', '0'),
    ({'question': 'q', 'answer': 'no ####\n'}, 'q', None),
    ({'conversations': [{'from': 'Human', 'value': 'u'}, {'from': 'GPT', 'value': '7'}]}, TALK[1:2], '7'),
    ({'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'u'}, {'from': 'gpt', 'value': '7'}]}, TALK[:2], '7'),
    ({'system': 's', 'conversations': [{'from': 'user', 'value': 'u'}, {'from': 'assistant', 'value': '7'}]}, TALK[:2], '7'),     # OpenThoughts
    ({'system': 'x', 'messages': TALK}, TALK[:2], 'so 5'),
    ({'System': None, 'messages': TALK[1:]}, TALK[1:2], 'so 5'),
    ({'messages': [*TALK, TALK[1], {'role': 'assistant', 'content': '6'}]}, [*TALK, TALK[1]], '6'),
])
def test_the_first_column_that_has_a_value_counts(tmp_path, row, question, answer):
    """The order of rows.QUESTION_COLUMNS and rows.ANSWER_COLUMNS; a conversation's own answer comes last. A blank text is no
    value: '' was an answer, with which every rollout counted as wrong. An input that is a number and the column `system` of
    a conversation were left out without a word."""
    (tmp_path / 'p.jsonl').write_bytes(jsonl([row]))
    problem, = load(tmp_path / 'p.jsonl')
    assert (problem.question, problem.answer) == (question, answer)


def said_by(*roles):
    return [{'role': role, 'content': 'x'} for role in roles]


@pytest.mark.parametrize('row, says', [
    ({'conversations': [{'from': 'human', 'value': 'u'}, {'from': 'chatgpt', 'value': '7'}]}, "the role 'chatgpt'; wants system, developer"),
    ({'prompt': said_by('user', 'model')}, "the role 'model'"),
    ({'messages': said_by('user', 'assistant', 'assistant')}, 'ends with two messages of the assistant; join them'),
    ({'messages': said_by('system', 'assistant')}, 'no question'),
    ({'prompt': 'q', 'completion': said_by('assistant', 'user')}, 'the answer ends with a message of the role user'),
    ({'instruction': 'i', 'input': {'a': 1}, 'output': 'o'}, "instruction and input are 'i' and {'a': 1}; wants two texts"),
    ({'instruction': said_by('user'), 'input': '1', 'output': 'o'}, 'wants two texts'),
    ({'prompt': 'q', 'reward_model': {'ground_truth': '["7"]'}}, 'is a list printed as a text'),
    ({'question': 'q', 'answer': " ['7', '8']\n"}, 'is a list printed as a text'),
])
def test_a_row_that_would_be_read_wrongly_is_refused(tmp_path, row, says):
    """Each of these was read: with the answer as a part of the question, with half of the question, or with an answer that no
    model can give."""
    (tmp_path / 'p.jsonl').write_bytes(jsonl([row]))
    line = refusal(tmp_path / 'p.jsonl')
    assert line.startswith('p.jsonl:1: ') and says in line


def test_an_answer_that_is_a_list_in_mathematics_is_read(tmp_path):
    """An interval or a vector: what shows a printed list are the quotes."""
    answers = ['[0, 1]', '(a, b)', "f'", '["', '[x]']
    (tmp_path / 'p.jsonl').write_bytes(jsonl([{'question': answer, 'answer': answer} for answer in answers]))
    assert [problem.answer for problem in load(tmp_path / 'p.jsonl')] == answers


def test_the_columns_and_missing_answers_are_printed(tmp_path, capsys):
    """An answer in a column of another name was None without a word."""
    (tmp_path / 'p.jsonl').write_bytes(jsonl([{'Problem': 'a', 'label': '1'}, {'Problem': 'b', 'Solution': '2'}, {'question': 'c'}]))
    load(tmp_path / 'p.jsonl')
    said = capsys.readouterr().out
    assert 'p.jsonl: 3 problems; columns problem, question (question), solution (answer); 2 of them without a known answer in ' \
           'answer, final_answer' in said and said.count('\n') == 1
    (tmp_path / 'p.jsonl').write_bytes(jsonl(ROWS))
    load(tmp_path / 'p.jsonl')
    assert capsys.readouterr().out.endswith('p.jsonl: 12 problems; columns question (question), answer (answer)\n')
    load(tmp_path / 'p.jsonl', show=False)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('name, content, says', [
    ('p.csv', 'id,text\n1,a\n', 'p.csv:1: no question; wants prompt or question or problem or instruction or messages or '
     'conversations; its columns: id, text'),
    ('p.csv', 'question;answer\na;1\n', 'its columns: question;answer'),
    ('p.csv', 'question,answer\na,1\nb, or c,2\n', 'p.csv:3: 3 cells under 2 columns; put cells'),
    ('p.csv', 'question,answer\na\n', 'p.csv:2: 1 cells under 2 columns'),
    ('p.csv', 'question,answer\n"a\nb",1\n"c,2\n', 'p.csv:4: unexpected end of data; look for a quote'),
    ('p.csv', 'question,answer\n"a"b,1\n', "p.csv:2: ',' expected after '\"'"),
    ('p.csv', 'question,Question\na,1\n', 'p.csv:1: two of its columns have one name (question); rename one'),
    ('p.csv', b'question,answer\na,1\nb\xff,1\n', "p.csv:3: 'utf-8' codec"),
    ('p.csv', 'question,answer\na,1\n'.encode('utf-16'), 'save the file as UTF-8'),
    ('p.csv', 'question,answer\n,1\n', 'p.csv:2: no question'),
    ('p.csv', '', 'no problems in it'), ('p.csv', 'question,answer\n', 'no problems in it'),
    ('p.csv', f'question,answer\n{"x" * 1_000_001},1\n', 'p.csv:2: field larger than field limit (1000000)'),
    ('p.csv', 'prompt\n"[{\'content\': \'a\', \'role\': \'user\'}]"\n', 'is a list or an object printed as a text; write the set as'),
    ('p.csv', 'prompt,reward_model\na,"{\'ground_truth\': \'1\'}"\n', 'p.csv:2: "{\'ground_truth\': \'1\'}" is a list or an object'),
    ('p.jsonl', '{"question": "a", "Question": "b"}', 'p.jsonl:1: two of its columns have one name'),
    ('p.jsonl', '{"messages": [{"role": "assistant", "content": "a"}]}', 'p.jsonl:1: no question'),
    ('p.jsonl', '{"conversations": [{"from": 1, "value": "a"}]}', 'p.jsonl:1: no question'),
    ('p.jsonl.gz', '{"question": "a"}', 'p.jsonl.gz: not a whole .gz file (Not a gzipped file'),
    ('p.jsonl.gz', gzip.compress(b'{"question": "a"}' * 9, mtime=0)[:-9], 'p.jsonl.gz: not a whole .gz file (Compressed file ended'),
    ('p.parquet.gz', gzip.compress(b'PAR1', mtime=0), 'problems come as .parquet, .arrow, .jsonl'),
    ('p.xlsx', b'PK', 'problems come as .parquet, .arrow, .jsonl, .json, .csv, .tsv, .txt; the texts also as .gz'),
    ('p.pkl', pickle.dumps(ROWS), 'problems come as'),
    ('p.arrow', b'', 'p.arrow: not a whole arrow file'), ('p.arrow', b'ARROW1\0\0', 'p.arrow: not a whole arrow file'),
], ids=lambda value: repr(value)[:40])
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refusal(tmp_path / name)


# ---- damage and bounds ---------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['s.arrow', 'z.arrow', 'f.arrow', 'p.parquet', 'p.csv', 'p.tsv', 'p.csv.gz', 'p.jsonl', 'p.json.gz'])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, name):
    """200 times bytes changed or the end cut off. An arrow file is used as it lies in memory, so offsets that point outside
    of it ended the process."""
    rng = random.Random(name)
    file = tmp_path / name
    if name == 'p.parquet':
        parquet.write_table(pyarrow.Table.from_pylist(VERL), file)
    elif name == 'f.arrow':
        feather.write_feather(pyarrow.Table.from_pylist(VERL), str(file))
    elif name.endswith('.arrow'):
        arrow_stream(VERL, file, 'zstd' if name == 'z.arrow' else None)
    else:
        content = table(ROWS, delimiter='\t' if 'tsv' in name else ',') if 'sv' in name else json.dumps(ROWS).encode()
        content = jsonl(ROWS) if name == 'p.jsonl' else content
        file.write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
    whole = file.read_bytes()
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)):]
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        file.write_bytes(damaged)
        try:
            load(file, show=False)
        except UserError as error:
            line = str(error).replace(str(tmp_path), '')
            assert name in line and '\n' not in line and len(line) < 280
            refused += 1
    assert refused > 20


class Endless:
    """What gzip.open gives of a file that never ends; `read` counts what was taken."""
    taken = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, size):
        self.taken += size
        return b'x' * size


def test_a_gz_file_that_never_ends_is_not_read_to_its_end(tmp_path, monkeypatch):
    """A file of a kilobyte may unpack to as much as it likes; a real one of 32 MiB of newlines is refused as well, and one
    with the same row many times is not."""
    file = tmp_path / 'p.jsonl.gz'
    file.write_bytes(gzip.compress(b'\n' * 2**25))
    assert f'its {file.stat().st_size} bytes unpack to more than {2**24}; if that is right, unpack it yourself' in refusal(file)
    file.write_bytes(gzip.compress(jsonl(ROWS) * 500))
    assert load(file) == EXPECTED
    endless = Endless()
    monkeypatch.setattr(data_files.gzip, 'open', lambda file: endless)
    for ending in ('jsonl', 'json', 'csv', 'tsv', 'txt'):
        (tmp_path / f'p.{ending}.gz').write_bytes(b'x')
        endless.taken = 0
        assert 'its 1 bytes unpack to more than' in refusal(tmp_path / f'p.{ending}.gz')
        assert endless.taken <= data_files.ALWAYS_UNPACKED + 2**20


def test_the_largest_text_files(tmp_path, monkeypatch):
    """A text file of exactly the limit is read, one of a byte more is refused before it is read, packed or not."""
    content = jsonl(ROWS)
    (tmp_path / 'p.jsonl').write_bytes(content)
    (tmp_path / 'p.jsonl.gz').write_bytes(gzip.compress(content))
    monkeypatch.setattr(data_files, 'LARGEST_FILE', len(content))
    assert load(tmp_path / 'p.jsonl') == load(tmp_path / 'p.jsonl.gz') == EXPECTED
    monkeypatch.setattr(data_files, 'LARGEST_FILE', len(content) - 1)
    assert f'unpack to more than {len(content) - 1}' in refusal(tmp_path / 'p.jsonl.gz')
    monkeypatch.setattr(Path, 'read_bytes', None)
    assert f'p.jsonl: {len(content)} bytes, and texts of at most {len(content) - 1} are read' in refusal(tmp_path / 'p.jsonl')


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'json', 'tsv', 'jsonl.gz'])
def test_a_text_file_is_in_memory_once(tmp_path, ending):
    """Most of this file is a column that is not read. A csv file was in memory six times: as bytes, as a text, and as the
    text's four bytes for each character. A .json file, parsed as a whole, and a .gz file, joined from pieces, are there twice."""
    rows = [{'question': f'q {number}', 'answer': '1', 'generations': chr(97 + number % 26) * 100_000} for number in range(100)]
    content = json.dumps(rows).encode() if ending == 'json' else jsonl(rows)
    if 'sv' in ending:
        content = table(rows, delimiter='\t' if ending == 'tsv' else ',')
    file = tmp_path / f'p.{ending}'
    file.write_bytes(gzip.compress(content, 1) if ending.endswith('gz') else content)
    tracemalloc.start()
    assert len(load(file)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    most = 3.5 if ending == 'json' else 2.5 if ending.endswith('gz') else 1.3
    assert peak < most * len(content)


def test_a_table_becomes_objects_a_piece_at_a_time(tmp_path, monkeypatch):
    """A long text in each of many rows is a small file if it is stored once; all rows at once would fill the memory.
    Reading stops at the first text that is too long."""
    made = []
    original = data_files.table_rows

    def counted(*args):
        for where, row in original(*args):
            made.append(where)
            yield where, row
    monkeypatch.setattr(data_files, 'table_rows', counted)
    column = pyarrow.array(['x' * 1_000_001]).dictionary_encode().take(pyarrow.array([0] * 2500))
    big = pyarrow.table({'question': column})
    feather.write_feather(big, str(tmp_path / 'p.arrow'))
    assert 'row 1: a text of 1000001 characters' in refusal(tmp_path / 'p.arrow') and len(made) == 1
    for piece in (1, 5, 7, 1000):
        monkeypatch.setattr(data_files, 'PIECE', piece)
        for name, write in (('q.parquet', parquet.write_table), ('q.arrow', lambda t, f: feather.write_feather(t, str(f)))):
            write(pyarrow.Table.from_pylist(VERL), tmp_path / name)
            assert [as_text(problem) for problem in load(tmp_path / name)] == EXPECTED
            assert [where.rpartition(' ')[2] for where, _ in data_files.rows_of(tmp_path / name)] == [str(i) for i in range(1, 13)]


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, 'w')


def test_a_type_that_an_arrow_file_names_is_never_unpickled(tmp_path):
    """pyarrow before 14.0.1 unpickled extension types; the rows of such a file are read, and its pickle is not."""
    pickled = pickle.dumps(Harm(tmp_path / 'harm'))
    fields = [pyarrow.field('question', pyarrow.string(), metadata={'ARROW:extension:name': 'arrow.py_extension_type',
                                                                    'ARROW:extension:metadata': pickled})]
    batch = pyarrow.table([pyarrow.array(['q'])], schema=pyarrow.schema(fields))
    with pyarrow.ipc.new_stream(str(tmp_path / 'p.arrow'), batch.schema) as writer:
        writer.write_table(batch)
    parquet.write_table(batch, tmp_path / 'p.parquet')
    for name in ('p.arrow', 'p.parquet'):
        assert [problem.question for problem in load(tmp_path / name)] == ['q']
    assert not (tmp_path / 'harm').exists()
    pickle.loads(pickled).close()
    assert (tmp_path / 'harm').exists()                      # the pickle works


@pytest.mark.skipif(not DATA.exists(), reason='no shared/data beside the project')
def test_published_sets_hold_as_many_problems_as_ever():
    counts = {'AIME24': 30, 'AIME25': 30, 'AIMO': 83, 'dapo-math-17k': 17398}
    sets = {name: load(DATA / f'{name}.parquet') for name in counts}
    assert {name: len(problems) for name, problems in sets.items()} == counts
    assert all(problem.answer for problems in sets.values() for problem in problems)
    assert len(load(f'{DATA}/AIME24.parquet,{DATA}/AIME25.parquet')) == 60


# ---- epochs and overlap --------------------------------------------------------------------------

def lines_for(train, held_out, **keys):
    return problem_lines(config | keys, train, held_out)


def test_the_epochs_of_a_run_are_said():
    train = EXPECTED[:10]
    assert lines_for(train, [], steps=10, prompts_per_step=4) == ['10 steps x 4 prompts: 4 epochs of 10 training problems']
    assert lines_for(train, [], steps=2, prompts_per_step=3) == [
        '2 steps x 3 prompts: 0.6 epochs of 10 training problems; 4 are never asked']
    assert lines_for(train, [], steps=5, prompts_per_step=2) == []


def test_held_out_questions_that_are_trained_on_are_counted():
    """Against a comparison by hand: spaces, capitals, a system prompt and the instruction of a named set do not matter."""
    def problems(*questions):
        return [Problem(question, '1', [1]) for question in questions]
    train = problems('What is  1+1?\n', 'b', [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'Three'}], 'd')
    once = dict(steps=2, prompts_per_step=2)
    same = problems('what is 1+1?' + BOXED, 'three')
    assert lines_for(train, problems('e', 'bd', 'what is 1+1'), **once) == []
    assert lines_for(train, same + problems('e'), **once) == ['note: 2 of 3 held-out questions are training questions too']
    assert lines_for(train, same, **once, data='a', eval_data='b')[0].startswith('note: all 2 held-out questions are training')
    assert lines_for(train, train, **once, data='a', eval_data='a')[0].startswith('note: data and eval_data are the same: all 4 ')
    assert lines_for(train, problems('B Box it.'), **once, data='a', eval_suffix=' Box it.')[0].startswith('note: all 1 ')
    assert folded('A\u00a0 b\n') == 'a b' and folded([{'role': 'user', 'content': 'ß'}]) == 'ss'


def test_the_toy_holds_out_what_it_does_not_train_on(toy_cfg):
    train, held_out = (load(toy_cfg[key], show=False) for key in ('data', 'eval_data'))
    assert len(train) == 40 and len(held_out) == 6
    assert not {folded(problem.question) for problem in train} & {folded(problem.question) for problem in held_out}
    assert not any('held-out' in line for line in problem_lines(toy_cfg, train, held_out))
