"""Files of JSON lines that a kill may have cut."""
import json
import subprocess
import sys

import pytest

from support.jsonl import append_row, read_rows
from support.runtime import ROOT, UserError


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
