"""Files of JSON lines that a kill may have cut, and what a file may hold."""
import json
import re
import subprocess
import sys

import pytest

from support.fields import Field, check_fields
from support.jsonl import append_row, read_rows
from support.runtime import ROOT, UserError, shown


def test_rows_come_back_as_they_were_written(tmp_path):
    """Any JSON value, and texts that hold what looks like the end of a line."""
    rows = [{'text': 'a\n\u2028\x85é🙂\x00', 'x': [1, 2.5, None, True]}, [0, [1, 2], False], 'word', {}]
    file = tmp_path / 'a.jsonl'
    assert read_rows(file) == []
    with file.open('a') as opened:
        for row in rows:
            append_row(opened, row)
    assert read_rows(file) == read_rows(str(file)) == rows and file.read_bytes().count(b'\n') == len(rows)


@pytest.mark.parametrize('cut', [1, 2, 9, 20])
def test_a_last_line_that_was_cut_is_dropped(tmp_path, cut):
    """Also when it was cut before its newline only: a row is whole when its newline is there. A row that is
    appended to a cut line would damage both, so the file is written anew first."""
    file = tmp_path / 'a.jsonl'
    with file.open('w') as opened:
        append_row(opened, {'first': 1})
        append_row(opened, {'second': 'a longer row'})
    file.write_bytes(file.read_bytes()[:-cut])
    assert read_rows(file) == [{'first': 1}]


@pytest.mark.parametrize('line', [b'{"x": 1', b'', b'\xff', b'{"x": 1} {"y": 2}', b'[' * 100_000])
def test_damage_before_the_end_is_an_error_with_file_and_line(tmp_path, line):
    """A row that is skipped in silence would change results."""
    file = tmp_path / 'a.jsonl'
    file.write_bytes(b'{"x": 0}\n' + line + b'\n{"x": 2}\n')
    with pytest.raises(UserError, match=r'a\.jsonl:2: damaged; delete the line') as error:
        read_rows(file)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_a_row_survives_a_kill_right_after_it_was_appended(tmp_path):
    """Without the flush a killed process would lose all rows in its buffer."""
    code = ('import os\nfrom support.jsonl import append_row\n'
            f'with open({str(tmp_path / "a.jsonl")!r}, "a") as file:\n'
            '    for number in range(3):\n        append_row(file, number)\n    os._exit(9)\n')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT)
    assert done.returncode == 9 and read_rows(tmp_path / 'a.jsonl') == [0, 1, 2]
    assert json.loads((tmp_path / 'a.jsonl').read_text().splitlines()[2]) == 2


def json_writes_it_in_another_way(good, flipped, place):
    """The case of a letter in 1e+300 or in \\u00e9 means nothing."""
    return flipped.lower() == good.lower() and bool(re.search(rb'\de|\\u[0-9a-f]{0,4}', good[max(0, place - 6):place + 1]))


@pytest.mark.parametrize('row', [
    {'text': 'a\n\u2028é🙂\x00\ud800', 'x': [1, 2.5, -0.0, 1e300, 10**30, None, True], 'y': {'b': 1, 'a': {}}}, {}, {'crc ': 'crc'}])
def test_a_checksum_belongs_to_one_row(tmp_path, row):
    """What was written comes back; every single bit that is flipped is found, wherever it is, and so is a row without a
    checksum, or one whose values were swapped."""
    file = tmp_path / 'a.jsonl'
    with file.open('w') as opened:
        append_row(opened, row, crc=True)
        append_row(opened, {'next': 1}, crc=True)
    assert read_rows(file, crc=True) == [row, {'next': 1}] and list(read_rows(file, crc=True)[0]) == list(row)
    good = file.read_bytes()
    for place in range(good.index(b'\n') + 1):
        for bit in range(8):
            flipped = bytearray(good)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            if json_writes_it_in_another_way(good, bytes(flipped), place):
                continue
            with pytest.raises(UserError, match=r'a\.jsonl:1: damaged; delete the file'):
                read_rows(file, crc=True, advice='delete the file')
    for line in (json.dumps(row), '[]', '3', 'null', '"crc"', '{"crc": null}', '{"crc": "00000000"}', '{"x": 1, "crc": ["x"]}'):
        file.write_text(line + '\n')
        with pytest.raises(UserError, match=r'a\.jsonl:1: damaged; delete the line'):
            read_rows(file, crc=True)


def test_a_line_in_another_encoding_is_damage(tmp_path):
    """json.loads guesses UTF-16 and UTF-32 from bytes, and reads a line that nobody wrote."""
    for encoding in ('utf-16', 'utf-32', 'utf-16-le', 'utf-8-sig'):
        (tmp_path / 'a.jsonl').write_bytes('{"x": 1}'.encode(encoding) + b'\n')
        with pytest.raises(UserError, match=r'a\.jsonl:1: damaged'):
            read_rows(tmp_path / 'a.jsonl')


NAN, INF = float('nan'), float('inf')
TABLE = {'number': Field(int, 0, 7), 'share': Field(float, 0, 1), 'word': Field(str, 1, 5), 'on': Field(bool),
         'ids': Field(list, 1, 3, items=Field(int, 0, 9)), 'map': Field(dict, items=Field(float)), 'maybe': Field(str, null=True),
         'rows': Field(list, items=Field(list, items=Field(bool))), 'left': Field(int, default=-1)}
FINE = {'number': 0, 'share': 0.5, 'word': 'abc', 'on': True, 'ids': [0, 9], 'map': {'a': 1, 'b': -2.5}, 'maybe': None, 'rows': [[True], []]}


def test_values_that_a_table_allows():
    """Both ends of every range, whole numbers where fractions are meant, fields that the table does not name."""
    check_fields(FINE, TABLE, 'a')
    for more in ({'number': 7}, {'share': 0}, {'share': 1}, {'word': 'abcde'}, {'on': False}, {'ids': [1, 2, 3]}, {'map': {}},
                 {'maybe': 'x' * 999}, {'rows': []}, {'left': -10**30}, {'other': NAN}):
        check_fields(FINE | more, TABLE, 'a')


@pytest.mark.parametrize('name, value, says', [
    *[('number', value, 'wants a whole number from 0 to 7') for value in (-1, 8, True, 1.0, '1', None, [1], 10**4000, NAN)],
    *[('share', value, 'wants a finite number from 0 to 1') for value in (NAN, INF, -INF, -0.1, 1.1, True, '0.5', None, 10**400)],
    *[('word', value, 'wants a text of length from 1 to 5') for value in ('', 'abcdef', b'abc', 5, None, ['a'])],
    *[('on', value, 'wants true or false') for value in (0, 1, 'true', None)],
    *[('ids', value, 'wants a list of length from 1 to 3') for value in ([], [1] * 4, {}, 'abc', None, (1, 2))],
    *[('ids', [0, value], 'each entry a whole number from 0 to 9') for value in (-1, 10, True, 1.0, '1', None, [1])],
    *[('map', value, 'wants an object') for value in ([], 'x', None)],
    *[('map', {'a': 1, 'b': value}, 'wants an object, each entry a finite number') for value in (NAN, INF, True, 'x', None)],
    ('maybe', 5, 'maybe = 5; wants a text, or null'), ('rows', [[True], [1]], 'rows = [[True], [1]]; wants a list, each entry a list, each entry true or false'),
    ('left', 'x', "left = 'x'; wants"), ('left', None, 'left = None; wants a whole number')])
def test_values_that_a_table_refuses(name, value, says):
    """True is no number, and NaN lies in no range. The line says where, what and what to do, and is short."""
    with pytest.raises(UserError) as error:
        check_fields(FINE | {name: value}, TABLE, 'a.json', 'fetch it')
    line = str(error.value)
    assert line.startswith(f'a.json: {name}') and says in line and line.endswith('; fetch it') and len(line) < 150


def test_words_alternatives_tables_in_tables_and_defaults():
    """A list of ids where one id is usual, a token that is a text or an object: one table has a line for each. What the
    table does not name is not handed on."""
    ids = Field(list, high=3, items=Field(int, 0, 9))
    table = {'kind': Field(str, words=('a', 'b'), default='b'), 'stop': Field(int, 0, 9, other=ids, null=True, default=None),
             'token': Field(str, high=4, other=Field(dict, fields={'content': Field(str, high=4)}))}
    assert check_fields({'token': 'x', 'more': NAN}, table, 'a') == {'kind': 'b', 'stop': None, 'token': 'x'}
    for fine in ({'kind': 'a'}, {'stop': 9}, {'stop': []}, {'stop': [0, 9, 9]}, {'stop': None}, {'token': {'content': 'abcd', 'lstrip': 1}}):
        given = {'token': 'x'} | fine
        assert check_fields(given, table, 'a') == {'kind': 'b', 'stop': None} | given
    for name, values, wants in (('kind', ('c', '', 1, None, ['a']), 'one of a, b'),
                                ('stop', (10, True, [10], [True], [1] * 4, '1', {}),
                                 'a whole number from 0 to 9, or a list of length up to 3, each entry a whole number from 0 to 9, or null'),
                                ('token', ('abcde', {}, {'content': 5}, {'content': 'abcde'}, {'content': None}, ['x'], None),
                                 'a text of length up to 4, or an object with content')):
        for value in values:
            with pytest.raises(UserError) as error:
                check_fields({'token': 'x', name: value}, table, 'a')
            assert str(error.value) == f'a: {name} = {shown(value)}; wants {wants}; fetch or make it again'
    assert not Field(float).fits(10**400) and not Field(float).fits(-INF) and Field(float).fits(-10**300) and Field(int).fits(10**400)


def test_what_is_no_object_or_lacks_a_field_is_refused():
    for value in ([], 'text', 3, None, True, [['x'] * 10**5]):
        with pytest.raises(UserError, match=r'a.json: .* not an object; fetch or make it again') as error:
            check_fields(value, TABLE, 'a.json')
        assert len(str(error.value)) < 150
    for name in FINE:
        with pytest.raises(UserError, match=f'a.json: {name} is missing; wants'):
            check_fields({key: value for key, value in FINE.items() if key != name}, TABLE, 'a.json')
