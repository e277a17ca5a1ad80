"""What a run was made by: digests that notice a change, and starts that are compared."""
import io
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from formats.problems import Problem
from support import provenance
from support.files import write_safetensors
from support.provenance import (
    BLOCK,
    BLOCKS,
    append_start,
    changed_files,
    check_start,
    code_notes,
    differences,
    lasting_starts,
    mixed_code,
    problems_digest,
    read_starts,
    shortened,
    source_digests,
    start_record,
    versions,
    weights_digest,
)
from support.runtime import ROOT, UserError, start


def record(**changes):
    """A small record, as start_record makes them."""
    made = {'versions': {'torch': '2.13.0', 'threads': 1, 'git': 'abc'}, 'sources': {'losses.py': '1', 'model.py': '2'},
            'data': 'd', 'eval_data': {'aime24': 'e'}, 'student': 's', 'teacher': 't', 'bridge': ''}
    return made | changes


def model_folder(folder, seed=0, rows=40):
    """A folder with weights of rows x 256 numbers (a KB each row), a config and a tokenizer."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    write_safetensors({'w': torch.randn(rows, 256, generator=generator)}, folder / 'model.safetensors', {'format': 'pt'})
    (folder / 'config.json').write_text('{"model_type": "llama"}')
    (folder / 'tokenizer.json').write_text('{"version": "1.0"}')
    return folder


def flip(file, offset):
    """Flip one bit of a file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


# ---- digests -------------------------------------------------------------------------------------

@pytest.mark.parametrize('offset', [0, 12, 200, 20_000, 40_959, -1])
def test_any_flipped_bit_of_a_small_weight_file_is_noticed(tmp_path, offset):
    """In the header's length, in the header, in the first, a middle and the last number: such a run went on with another
    teacher without a word."""
    folder = model_folder(tmp_path / 'm')
    before = weights_digest(folder)
    flip(folder / 'model.safetensors', offset)
    assert weights_digest(folder) != before
    flip(folder / 'model.safetensors', offset)
    assert weights_digest(folder) == before


def test_the_digest_is_that_of_the_contents_not_of_the_place(tmp_path):
    """A copied folder has the same one, whatever its name, its times, and what else lies in it."""
    one = model_folder(tmp_path / 'a')
    two = model_folder(tmp_path / 'b')
    (two / 'README.md').write_text('words')
    assert weights_digest(one) == weights_digest(str(two))


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'generation_config.json', 'chat_template.jinja', 'x.tiktoken'])
def test_a_changed_small_file_of_a_model_is_noticed(tmp_path, name):
    folder = model_folder(tmp_path / 'm')
    before = weights_digest(folder)
    (folder / name).write_text('changed')
    assert weights_digest(folder) != before


def test_other_weights_of_the_same_shape_are_noticed_in_a_file_that_is_not_read_whole(tmp_path):
    """4 MB, of which about 1 MB is read: other random numbers, and the same numbers in two files."""
    rows = 4096
    one = model_folder(tmp_path / 'a', 0, rows)
    assert (one / 'model.safetensors').stat().st_size > 2 * BLOCK * BLOCKS
    assert weights_digest(one) != weights_digest(model_folder(tmp_path / 'b', 1, rows))
    assert weights_digest(one) == weights_digest(model_folder(tmp_path / 'c', 0, rows))
    before = weights_digest(one)
    (one / 'model.safetensors').rename(one / 'model-1.safetensors')
    assert weights_digest(one) != before


class Counted(io.FileIO):
    """A file that counts the bytes that are read of all of its kind."""
    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counted.total += count
        return count


@pytest.mark.parametrize('files', [1, 50])
def test_a_digest_of_large_files_reads_a_few_megabytes(tmp_path, monkeypatch, files):
    """2 GB or 100 GB of sparse files, counted in bytes. The first and the last block of the data count."""
    size = 2 * 10**9
    header = json.dumps({'w': {'dtype': 'U8', 'shape': [size], 'data_offsets': [0, size]}}).encode()
    paths = [tmp_path / f'model-{number:05d}.safetensors' for number in range(files)]
    for path in paths:
        with path.open('wb') as file:
            file.write(len(header).to_bytes(8, 'little') + header)
            file.truncate(8 + len(header) + size)

    def counted_open(path, mode='r', buffering=-1):
        assert mode == 'rb'
        return io.BufferedReader(Counted(path), buffering)
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'open', counted_open)
        Counted.total = 0
        digest = weights_digest(tmp_path)
        assert BLOCK * min(BLOCKS, 8 * files) <= Counted.total < 4e6

    for offset in (8 + len(header), 8 + len(header) + size - 1):
        with paths[-1].open('r+b') as file:
            file.seek(offset)
            file.write(b'\1')
        assert weights_digest(tmp_path) != digest
        digest = weights_digest(tmp_path)


def test_a_weight_file_that_claims_an_endless_header_is_not_read_whole(tmp_path):
    """Eight bytes of 255 are a header of 2^64 bytes: that many must not be asked of the memory. An empty file has a digest
    as well, since the loader is the one that refuses it."""
    (tmp_path / 'model.safetensors').write_bytes(b'\xff' * 100)
    before = weights_digest(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(b'')
    assert weights_digest(tmp_path) != before


def test_every_part_of_a_problem_counts():
    """Question (a text or messages), answer, prompt ids, and the order: the seed draws from it."""
    one = Problem('1+1', '2', [5, 6])
    two = Problem([{'role': 'user', 'content': 'é \ud800'}], None, [7])
    before = problems_digest([one, two])
    assert before == problems_digest([replace(one), replace(two)])
    others = [[two, one], [one], [], [replace(one, question='1+2'), two], [replace(one, answer='3'), two],
              [replace(one, ids=[5, 6, 6]), two], [one, replace(two, answer='')]]
    assert len({before, *map(problems_digest, others)}) == len(others) + 1


def test_every_file_that_a_run_loads_has_a_digest():
    """The list is written by hand: a module that is missing in it could change without a line. The oracle is what Python
    has loaded. Left out: what draws figures, and the config's files, which are compared key by key."""
    code = ('import sys, distill, bridge, eval_math\n'
            "print(*{m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)}, sep='\\n')")
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set()
    for file in p.stdout.splitlines():
        if Path(file).is_relative_to(ROOT) and 'site-packages' not in file:  # an environment may lie in this folder
            loaded.add(Path(file).relative_to(ROOT).as_posix())
    assert loaded - source_digests().keys() == {'configs/default.py', 'studies/__init__.py', 'studies/drawing.py', 'studies/figures.py'}
    assert all((ROOT / file).is_file() for file in source_digests()) and 'grading/child.py' in source_digests()
    root_files = {file.name for file in ROOT.glob('*.py')}
    assert root_files - source_digests().keys() == {'minimal.py'}


def test_a_source_digest_follows_the_file(tmp_path, monkeypatch):
    (tmp_path / 'support').mkdir()
    (tmp_path / 'losses.py').write_text('a')
    (tmp_path / 'somebody_elses.py').write_text('a')
    (tmp_path / 'support/new.py').write_text('a')
    monkeypatch.setattr(provenance, 'ROOT', tmp_path)
    before = source_digests.__wrapped__()
    (tmp_path / 'support/new.py').write_text('b')
    after = source_digests.__wrapped__()
    assert set(before) == {'losses.py', 'support/new.py'} and changed_files(before, after) == ['support/new.py']
    (tmp_path / 'losses.py').unlink()
    assert changed_files(after, source_digests.__wrapped__()) == ['losses.py']


# ---- starts --------------------------------------------------------------------------------------

def test_a_real_record_can_be_written_and_is_equal_to_itself(toy_cfg, tmp_path):
    """Made twice, written and read back: nothing has changed."""
    problems = [Problem('1+1', '2', [5, 6])]
    made = start_record(toy_cfg, [toy_cfg], start('cpu'), problems, {'toy': problems})
    append_start(tmp_path, made, 0)
    assert check_start(tmp_path, start_record(toy_cfg, [toy_cfg], start('cpu'), problems, {'toy': problems}), 4) == []
    assert made['student'] != made['teacher'] and made['bridge'] == '' and made['data'] == made['eval_data']['toy']
    assert set(made['versions']) == {'torch', 'python', 'device', 'ranks', 'threads', 'git', 'tokenizers', 'safetensors'}
    assert made['versions'] == versions(start('cpu'))
    (row,) = read_starts(tmp_path)
    assert row == {'step': 0} | made


@pytest.mark.parametrize('key, says', [('data', 'the training problems'), ('teacher', 'the teacher'), ('bridge', 'the bridge'),
                                       ('student', 'the student that it started from')])
@pytest.mark.parametrize('step', [0, 40])
def test_another_run_is_an_error(tmp_path, key, says, step):
    """Nothing noticed that the data or the teacher had been replaced at resume; before the first checkpoint, too, since the
    scores of both models are in the log."""
    append_start(tmp_path, record(), 0)
    with pytest.raises(UserError) as error:
        check_start(tmp_path, record(**{key: 'other'}), step)
    assert f'{tmp_path}: ' in str(error.value) and f': {says}; give the same again' in str(error.value)
    assert '\n' not in str(error.value) and len(read_starts(tmp_path)) == 1


def test_changed_code_versions_and_held_out_problems_are_lines_that_name_them(tmp_path):
    append_start(tmp_path, record(), 0)
    now = record(sources={'losses.py': '9', 'model.py': '2', 'step.py': '1'}, eval_data={'aime24': 'x', 'amc23': 'y'},
                 versions={'torch': '2.14.0', 'threads': 4, 'git': 'def-dirty', 'tokenizers': '1'}, config={'eval_n': 4})
    before = 'changed since step 40 was made: '
    assert check_start(tmp_path, now, 40) == [
        f'{before}the held-out problems of aime24', f'{before}code in losses.py, step.py (revision abc, now def-dirty)',
        f'{before}torch=2.13.0, now 2.14.0; threads=1, now 4']
    assert check_start(tmp_path, record(sources={'losses.py': '1'}), 40) == [f'{before}code in model.py (revision abc)']


def test_other_held_out_problems_that_nobody_asked_for_are_an_error(tmp_path):
    """The file had changed and the config had not: two sets of problems stood in one curve."""
    append_start(tmp_path, record(config={'eval_n': 4, 'lr': 1.0}), 0)
    now = record(eval_data={'aime24': 'x'}, config={'eval_n': 4, 'lr': 2.0})
    with pytest.raises(UserError, match='changed since this run was started: the held-out problems; give the same again'):
        check_start(tmp_path, now, 40)


def test_another_revision_of_the_same_files_is_not_told():
    """A changed document changes the revision and no number."""
    assert differences(record(), record(versions={'torch': '2.13.0', 'threads': 1, 'git': 'def'})) == []


def test_a_start_is_compared_with_the_one_that_made_the_last_step(tmp_path):
    """Code A made 40 steps; code B was started and killed before it made one that is kept; B again must still be told that A
    made the 40. Then B has made step 60, and B again has nothing to be told."""
    other = record(sources={'losses.py': '9', 'model.py': '2'})
    append_start(tmp_path, record(), 0)
    append_start(tmp_path, other, 40)
    assert ['losses.py' in line for line in check_start(tmp_path, other, 40)] == [True]
    append_start(tmp_path, other, 40)
    assert check_start(tmp_path, other, 60) == []
    assert ['losses.py' in line for line in check_start(tmp_path, record(), 60)] == [True]
    assert [row['step'] for row in read_starts(tmp_path)] == [0, 40, 40]


def test_lasting_starts_are_those_whose_steps_are_there():
    """Against a simulation that notes for each step which start has made it last."""
    rng = random.Random(0)
    for _ in range(500):
        rows = []
        makers = {}                          # {step: number of the start that made it}
        last = 0
        for number in range(rng.randrange(1, 8)):
            step = rng.randrange(last + 1)
            last = step + rng.randrange(1, 6)
            makers = {made: who for made, who in makers.items() if made <= step}
            makers |= dict.fromkeys(range(step + 1, last + 1), number)
            rows.append({'step': step, 'number': number})
        assert [row['number'] for row in lasting_starts(rows)] == sorted(set(makers.values()))


def test_a_run_without_a_record_is_told_if_it_has_steps(tmp_path):
    """A run folder of an older version goes on, and the line comes once: from then on there is a record."""
    assert check_start(tmp_path, record(), 0) == []
    (line,) = check_start(tmp_path, record(), 40)
    assert line.startswith(f'{tmp_path}/starts.jsonl: not there') and 'step 40' in line
    append_start(tmp_path, record(), 40)
    assert check_start(tmp_path, record(), 60) == []


@pytest.mark.parametrize('text', [b'[]\n', b'{}\n', b'{"step": 1}\n', b'\xff\xfe\n', b'{"step": true, "versions": {}}\n', b'\0\n',
                                  b'{"step": 0, "versions": 3, "sources": {}, "eval_data": {}}\n',
                                  b'{"step": 0, "versions": {}, "sources": [], "eval_data": {}}\n',
                                  b'{"step": 0, "versions": {}, "sources": {}, "eval_data": null}\n', b'[' * 10**5 + b'\n'])
@pytest.mark.parametrize('use', ['check', 'append', 'notes'])
def test_a_damaged_record_is_one_clear_line(tmp_path, text, use):
    """And it stays as it was."""
    file = tmp_path / 'starts.jsonl'
    file.write_bytes(text)
    calls = {'check': lambda: check_start(tmp_path, record(), 40), 'append': lambda: append_start(tmp_path, record(), 40),
             'notes': lambda: code_notes([tmp_path])}
    with pytest.raises(UserError) as error:
        calls[use]()
    assert str(error.value).startswith(f'{file}: damaged') and '\n' not in str(error.value) and len(str(error.value)) < 300
    assert file.read_bytes() == text


def test_a_row_that_a_kill_has_cut_is_not_continued(tmp_path):
    append_start(tmp_path, record(), 0)
    whole_row = (tmp_path / 'starts.jsonl').read_bytes()
    (tmp_path / 'starts.jsonl').write_bytes(whole_row + whole_row[:30])
    append_start(tmp_path, record(), 20)
    assert [row['step'] for row in read_starts(tmp_path)] == [0, 20]


def test_many_names_are_cut_short():
    assert shortened(['a', 'b', 'c', 'd']) == 'a, b, c, d'
    assert shortened(list('abcdefghi')) == 'a, b, c, d and 5 more'


# ---- many runs -----------------------------------------------------------------------------------

def run_folder(folder, *sources):
    """A run folder with a start for each of these {path: digest}, twenty steps apart; none: a run of an older version."""
    folder.mkdir()
    for number, digests in enumerate(sources):
        append_start(folder, record(sources=digests), 20 * number)
    return folder


def test_runs_of_this_code_need_no_words(tmp_path):
    folders = [run_folder(tmp_path / name, source_digests()) for name in 'ab']
    assert code_notes(folders) == [] and mixed_code(folders) == []


def test_runs_of_other_code_are_counted_and_named(tmp_path):
    """A study printed its old table after the loss had been replaced by `raise`. A run that other code only began counts,
    and a run without a record is told apart."""
    now = source_digests()
    folders = [run_folder(tmp_path / 'a', now), run_folder(tmp_path / 'b', now | {'losses.py': '0'}),
               run_folder(tmp_path / 'c', now | {'step.py': '0'}, now), run_folder(tmp_path / 'd')]
    other, unknown, mixed = code_notes(folders)
    assert other.startswith('2 of 4 runs were made by other code than there is now: losses.py, step.py (revision abc)')
    assert other.endswith(f'delete {folders[1]}, {folders[2]}')
    assert unknown.startswith('1 of 4 runs do not say what code made them') and unknown.endswith(f'delete {folders[3]}')
    assert [mixed] == mixed_code(folders) and mixed.endswith('it differs in losses.py, step.py')


def test_runs_of_one_other_code_are_not_called_mixed(tmp_path):
    folders = [run_folder(tmp_path / name, source_digests() | {'losses.py': '0'}) for name in 'ab']
    (other,) = code_notes(folders)
    assert other.startswith('2 of 2 runs') and mixed_code(folders) == []
