"""The course in docs/course.md: its commands exist, and what it shows is what is printed."""
import ast
import inspect
import json
import re
import shlex
from importlib.util import find_spec

import pytest
import torch
from conftest import argv

import distill
import eval_math
from configs import load_config
from studies import by_hand
from studies.compare import command_lines, read_study
from support.runtime import ROOT

DOCUMENT = ROOT / 'docs/course.md'
BLOCK = re.compile(r'```(\w*)\n(.*?)```', re.DOTALL)


def blocks(kind):
    """The code blocks of the document: '' are commands, 'text' is output, 'python' is Python."""
    return [text for found, text in BLOCK.findall(DOCUMENT.read_text()) if found == kind]


def commands():
    """The command lines, each as a list of words."""
    lines = []
    for block in blocks(''):
        lines += block.replace('\\\n', ' ').splitlines()
    return [shlex.split(line) for line in lines]


def output(capsys, **arguments):
    """What by_hand.main prints. It changes torch's defaults, which are put back."""
    try:
        by_hand.main(**arguments)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_printoptions(profile='default')
    return capsys.readouterr().out


def made_by(words):
    """The folders that a command of the document makes, or has made before."""
    if words[:3] == ['python', '-m', 'studies.compare']:
        file, plan = read_study(words[3])
        bridges, runs, _ = command_lines(plan, ROOT / 'out' / file.stem)
        return {str(folder.relative_to(ROOT)) for folder in (*bridges, *runs)}
    if words[1] in ('distill.py', 'bridge.py'):
        return {load_config(words[2:], words[1])['out_dir' if words[1] == 'distill.py' else 'bridge']}
    return set()


def test_the_document_has_commands():
    """The tests below look at what they find; they must find something."""
    scripts = [words[1] for words in commands()]
    assert scripts.count('distill.py') > 12 and scripts.count('bridge.py') > 1 and 'eval_math.py' in scripts
    assert len(blocks('text')) > 12 and len(blocks('python')) > 1


@pytest.mark.parametrize('words', commands(), ids=' '.join)
def test_every_command_can_be_typed(words):
    """A script, a study, a key or a value that has another name today ends a lesson."""
    assert words[0] == 'python'
    if words[1] in ('distill.py', 'bridge.py'):
        load_config(words[2:], words[1])
    elif words[1] == 'eval_math.py':
        eval_math.settings(words[2:])
    elif words[1] == '-c':
        ast.parse(words[2])
        for call in re.findall(r'\bmain\((.*)\)', words[2]):
            names = set(re.findall(r'(\w+)=', call))
            assert names <= set(inspect.signature(by_hand.main).parameters), names
    else:
        assert words[1] == '-m' and find_spec(words[2])
        for command in read_study(words[3])[1]['runs'].values() if words[2] == 'studies.compare' else ():
            load_config(command, 'distill.py')


def test_a_figure_is_drawn_of_folders_that_were_made_before():
    """Also the folders that lines of Python read, and the models that are evaluated."""
    made = set()
    for words in commands():
        if words[1:3] == ['-m', 'studies.figures']:
            assert set(words[3:]) <= made, words
        made |= made_by(words)
    for path in re.findall(r"\bout/[\w./-]+/(?:log\.jsonl|last\b)", DOCUMENT.read_text()):
        assert path.rpartition('/')[0] in made, path


def same_lines(shown, printed):
    """Are two texts the same, but for the last digit of the numbers with a point?"""
    number = r'-?\d+\.\d+|-?\d+e-\d+'
    if re.sub(rf' *(?:{number})', '#', shown) != re.sub(rf' *(?:{number})', '#', printed):
        return False
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    return all(abs(float(a) - float(b)) < 0.0015 for a, b in pairs)


def shown_in(block, printed):
    """Does every paragraph of a block stand in what was printed?"""
    paragraphs = printed.strip().split('\n\n')
    return all(any(same_lines(part, paragraph) for paragraph in paragraphs) for part in block.strip().split('\n\n'))


def test_the_step_by_hand_prints_what_the_document_shows(capsys):
    """Each block that has a title of the script's. One number of the document changed: it must be noticed."""
    printed = output(capsys)
    session, _, _ = DOCUMENT.read_text().partition('## Session 2')
    _, _, session = session.partition('### A step by hand')
    found = [text for kind, text in BLOCK.findall(session) if kind == 'text']
    assert len(found) == 5
    for block in found:
        assert shown_in(block, printed), block
    assert not shown_in(found[-1].replace('1.3431', '1.3531'), printed)
    for number in re.findall(r'\d\.\d{4}', session.partition('### Questions')[0]):
        assert any(abs(float(number) - float(other)) < 0.00015 for other in re.findall(r'\d\.\d{4}', printed)), number


def test_the_solutions_by_hand_print_what_the_document_shows(capsys):
    """A command that calls by_hand.main with other arguments, and the block of output that follows it."""
    _, _, solutions = DOCUMENT.read_text().partition('## Solutions')
    pairs = re.findall(r'by_hand import main; main\((\w+)=\'(\w+)\'\)"\n```\n+```text\n(.*?)```', solutions, re.DOTALL)
    assert len(pairs) == 3
    for name, value, block in pairs:
        assert shown_in(block, output(capsys, **{name: value})), (name, value)


@pytest.mark.parametrize('arguments', [{}, {'positions': 'last'}, {'distance': 'cosine'}, {'average': 'token'}], ids=str)
def test_the_gradient_by_hand_is_right(arguments, capsys):
    """The script prints how far its gradients are apart; a reader trusts that. Central differences in float64 with steps of
    1e-5 are off by about 1e-10 from the third derivative, and by 1e-11 from rounding; the others by rounding alone."""
    printed = output(capsys, **arguments)
    to_differences, = re.findall(r'largest difference: (\S+)', printed)
    others = re.findall(r'largest difference to (?:the formula|step.accumulate): (\S+)', printed)
    assert float(to_differences) < 1e-8 and len(others) == 1 + (arguments != {'distance': 'cosine'})
    assert max(map(float, others)) < 1e-13
    before, after = re.findall(r'same answers: (\S+) -> (\S+)', printed)[0]
    assert float(after) < float(before)


def test_the_log_has_the_names_that_the_document_reads(tmp_path):
    """A line of pandas with a name of yesterday is a KeyError in front of a class. The tiny toy with four layers and both
    terms has every name that the course's runs have."""
    keys = dict(toy_layers=4, steps=1, eval_n=8, opd='sampled', opd_weight=1)
    distill.main(load_config(argv(tmp_path, tmp_path / 'run', **keys), 'distill.py'))
    row = json.loads((tmp_path / 'run/log.jsonl').read_text().splitlines()[-1])
    names = set()
    for block in blocks('python'):
        ast.parse(block)
        if 'log.jsonl' in block:
            names |= set(re.findall(r"'([a-z_]+(?:/[\w@/]+)?)'", block)) - {'all_layers_all_positions', 'exact_kl_alone'}
    assert len(names) > 12 and names <= row.keys(), names - row.keys()
