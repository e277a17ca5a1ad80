"""Generated bad inputs over all scripts: each is refused in one line, or runs to its end. The tool is bad_inputs.py."""
import json
import subprocess
import sys

import pytest
from bad_input_kinds import KINDS, Case, all_cases
from bad_inputs import FAULTS, Outcome, contents, difference, judge

from support.runtime import ROOT

CASES = 5 * len(KINDS)


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    """What the first cases did, in the tool's own process: forks want one that has a single thread."""
    if sys.platform != 'linux':
        pytest.skip('the tool needs Linux')
    file = tmp_path_factory.mktemp('bad') / 'outcomes.jsonl'
    tool = subprocess.run([sys.executable, ROOT / 'tests/bad_inputs.py', str(CASES), '--json', file], text=True,
                          capture_output=True)
    print(tool.stdout)                       # the table; pytest shows it if a test fails
    assert tool.returncode in (0, 1), tool.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_bad_inputs_are_refused_in_one_line(outcomes):
    """Tracebacks, endless lines, hangs, files left behind, control characters on the terminal, questions to a hub about a
    mistyped folder: a user meets any of these by one wrong character, or by one odd file in a download."""
    assert len(outcomes) == CASES
    faulty = [(outcome['number'], outcome['kind'], outcome['what'], outcome['faults']) for outcome in outcomes if outcome['faults']]
    assert faulty == []


def test_the_good_inputs_are_accepted(outcomes):
    """If the files that the cases start from were broken, everything would be refused, and nothing would be shown."""
    good = [outcome for outcome in outcomes if outcome['kind'] == 'good' and outcome['what'] != '--help']
    assert good and all(outcome['code'] == 0 for outcome in good)
    assert {0, 2} <= {outcome['code'] for outcome in outcomes}


def test_a_number_names_a_case():
    """A case that fails is repeated by its number; a generator that used Python's own hash of texts, or a clock, would
    give it to another case."""
    program = 'from bad_input_kinds import all_cases; print([(c.kind, c.script, c.args, c.what) for c in all_cases()][:2000])'
    texts = set()
    for seed in ('0', '1'):
        listed = subprocess.run([sys.executable, '-c', program], cwd=ROOT / 'tests', text=True, capture_output=True, check=True,
                                env={'PYTHONHASHSEED': seed, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'utf-8:surrogateescape'})
        texts.add(listed.stdout)
    assert len(texts) == 1


def test_every_kind_has_cases_and_the_first_ones_show_all_kinds():
    cases = all_cases()
    kinds = {case.kind for case in cases}
    assert kinds == {kind.__name__ for kind in KINDS} == {case.kind for case in cases[:len(KINDS)]}
    assert {case.expect for case in cases} == {'refused', 'either', 'fine'}


def outcome_of(tmp_path, code=2, err='error: x.json: not there; make it\n', out='', seconds=0.1, asked='', left=(), memory=0, **case):
    """The faults that the tool finds in what a script did."""
    case = Case('distill.py', [], 'x', **case)
    outcome = Outcome(0, 'x', 'x', 'distill.py', code, seconds, memory, out=out, err=err, asked=asked, left=list(left))
    judge(case, outcome, tmp_path)
    return outcome.faults


TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nKeyError: 1\n'


@pytest.mark.parametrize('faults, did', [
    ([], {}),
    ([], dict(code=0, err='', expect='either')),
    (['accepted'], dict(code=0, err='')),
    (['traceback'], dict(code=1, err=TRACEBACK)),
    (['traceback'], dict(code=-11, err='')),
    (['traceback', 'form'], dict(err=TRACEBACK + 'error: x\n')),
    (['hang'], dict(seconds=2.5)),
    (['hang'], dict(code=-9, err='')),
    (['memory'], dict(memory=2**31)),
    (['form'], dict(err='')),
    (['form'], dict(err='error: a\nerror: b\n')),
    (['form'], dict(err='usage: x\n')),
    (['form'], dict(err='error: ' + 'x' * 294 + '\n')),
    ([], dict(err='error: ' + 'x' * 293 + '\n')),
    (['files'], dict(left=['out/x'])),
    ([], dict(code=0, err='', left=['out/x'], expect='either')),
    (['control'], dict(out='\x1b[31m')),
    (['control'], dict(err='error: \u202ex\n')),
    (['network'], dict(asked='socket.getaddrinfo huggingface.co\n')),
    ([], dict(asked='socket.getaddrinfo huggingface.co\n', hub=True)),
    (['wrong'], dict(expect='fine')),
    (['wrong'], dict(code=0, err='', out="prompt: '1+2\\r='", absent='\\r', expect='either')),
])
def test_the_tool_finds_each_fault(faults, did, tmp_path):
    """A check that finds nothing passes always."""
    assert outcome_of(tmp_path, **did) == faults
    assert set(faults) <= set(FAULTS)


def test_the_tool_finds_what_was_left_and_what_leaked(tmp_path):
    (tmp_path / 'a').write_text('x')
    (tmp_path / 'b').write_text('x')
    before = contents(tmp_path)
    (tmp_path / 'a').write_text('longer')
    (tmp_path / 'b').unlink()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/merges.txt').write_text('SECRET-7f3a')
    left = difference(before, contents(tmp_path))
    assert left == ['a', 'b', 'out', 'out/merges.txt']
    assert outcome_of(tmp_path, code=0, err='', left=left, expect='either') == ['leak']
