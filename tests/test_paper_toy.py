"""Everything on the toy by one command: its runs once, its parts when they have changed, its document."""
import json
import re
from pathlib import Path

import pytest
from conftest import argv

import distill
from configs import load_config
from paper import toy
from paper.__main__ import COMMANDS
from paper.runs import Missing
from support.files import read_json, write_json
from support.runtime import ROOT, UserError

PARTS = {'table2': (('OPRD', 'OPD top-16'), ()), 'figure4': (('OPRD',), ()), 'table4': (toy.WIDE, ()), 'figure12': ((), ('wide',))}


def document(*parts):
    marks = [f'# {part}\n<!-- made by python -m paper toy: {part} -->\nold\n<!-- end -->\nprose of {part}\n' for part in parts]
    return '\n'.join(marks)


@pytest.fixture
def study(toy_dir, tmp_path, monkeypatch):
    """Two runs of the smallest toy in a folder of their own, made in this process, and a document with a few parts. -> the
    list of runs that were started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, 'FEEDS', PARTS)
    monkeypatch.setattr(toy, 'DOCUMENT', tmp_path / 'template.md')
    toy.DOCUMENT.write_text(document('runs', *PARTS))
    words = [word for word in argv(toy_dir, 'x', steps=2) if not word.startswith('out_dir')]
    other = [*words, 'opd_weight=1', 'oprd_weight=0', 'opd=topk']
    Path('tiny.py').write_text(f"seeds = [0]\npanels = {{}}\nruns = {{'OPRD': {words}, 'OPD top-16': {other}}}\n")
    started = []

    def launch(script, jobs):
        for folder, arguments in jobs.items():
            started.append(folder.name)
            distill.main(load_config(arguments, script))
    monkeypatch.setattr('studies.compare.launch', lambda script, jobs: launch(script, jobs) if jobs else None)
    return started


def files_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


def test_the_command_makes_everything_once(study, capsys, monkeypatch):
    """Runs, parts, document; what is missing is told there too. The second time nothing is run and nothing drawn, and all
    bytes are the same. A part whose file is gone is made again, and so are all if the code has changed."""
    before = files_of(ROOT / 'docs')
    assert toy.toy(to='pages', study='tiny.py') == [Path('pages/paper.md')]
    assert study == ['oprd-s0', 'opd_top-16-s0'] and files_of(ROOT / 'docs') == before
    page = Path('pages/paper.md').read_text()
    assert '\n![Figure 4 on the toy](paper/figure4.png)\n' in page and '\nprose of table2\n' in page and '\nold\n' not in page
    assert '| OPRD | ' in page and '\n| OPD top-16 | 47.1 | 34.0 | 76.5 | not yet measured |\n' in page
    assert page.count('\nNot made: ') == 2 and '2 runs, 0.0 hours of one process in all, 2' in page
    made = files_of(Path('pages'))
    assert {'paper/figure4.png', 'paper/figure4.pdf', 'paper/figure4.json', 'paper/table2.json', 'paper/table2.md'} <= set(made)
    said = capsys.readouterr().out
    assert 'table4: no run with a teacher of another depth' in said and said.splitlines()[-1].endswith('s in all; missing: table4, figure12')

    toy.toy(to='pages', study='tiny.py')
    assert len(study) == 2 and files_of(Path('pages')) == made
    said = capsys.readouterr().out
    assert 'out/tiny: all 2 runs are finished' in said and 'table2: unchanged' in said and 'figure4: unchanged' in said

    Path('pages/paper/figure4.png').write_bytes(b'')
    toy.toy(to='pages', study='tiny.py')
    said = capsys.readouterr().out
    assert 'table2: unchanged' in said and 'figure4: unchanged' not in said and files_of(Path('pages')) == made
    monkeypatch.setattr(toy, 'source_digests', dict)
    toy.toy(to='pages', study='tiny.py')
    assert 'unchanged' not in capsys.readouterr().out and len(study) == 2


def test_a_run_with_another_config_is_not_finished(tmp_path):
    """A study whose learning rate was changed would else be drawn from runs with the old one."""
    words = ['configs/toy.py', 'seed=1', f'out_dir={tmp_path}']
    config = load_config(words) | {'dtype': 'float32', 'date': '2026-11-26'}
    write_json(tmp_path / 'config.json', {'run': 'x', 'config': config})
    assert not toy.is_finished(tmp_path, words)
    write_json(tmp_path / 'results.json', {})
    assert toy.is_finished(tmp_path, words) and not toy.is_finished(tmp_path, [*words, 'lr=1e-3'])
    write_json(tmp_path / 'config.json', {'run': 'x', 'config': {key: value for key, value in config.items() if key != 'lr'}})
    assert not toy.is_finished(tmp_path, words)


def part_of(error=None):
    """A stand-in for the function of a part."""
    def make(folders, to):
        if error:
            raise error
        write_json(to / 'x.json', 1)
        return [to / 'x.json']
    return make


def test_a_part_that_is_refused_does_not_keep_the_others_from_being_made(study, tmp_path, monkeypatch):
    """What is missing is a line; another error is one too, and the command fails when the rest is made."""
    errors = {'table2': UserError('two <machines>'), 'table4': Missing('no bridge')}
    monkeypatch.setattr(toy, 'function_of', lambda part: part_of(errors.get(part)))
    monkeypatch.setattr(toy, 'make_runs', lambda study: None)
    monkeypatch.setattr(toy, 'runs_lines', lambda study: ['the runs'])
    with pytest.raises(UserError, match='not made: table2; the lines above say why'):
        toy.toy(to='pages', study='tiny.py')
    page = Path('pages/paper.md').read_text()
    assert 'Not made: two &lt;machines>.' in page and 'Not made: no bridge.' in page and 'the runs' in page
    assert set(read_json(Path('pages/paper/made.json'))) == {'figure4', 'figure12'}


def test_a_damaged_list_of_what_was_made_is_refused(study, monkeypatch):
    monkeypatch.setattr(toy, 'make_runs', lambda study: None)
    Path('pages/paper').mkdir(parents=True)
    Path('pages/paper/made.json').write_text(json.dumps({'table2': {'from': 3, 'files': {}}}))
    with pytest.raises(UserError, match="made.json: table2: from = 3; wants a text; delete the file"):
        toy.toy(to='pages', study='tiny.py')


def test_only_what_is_between_the_markers_changes():
    text = document('a', 'b')
    filled = toy.filled_in(text, {'b': ['two', 'lines'], 'a': ['\\1 stays']})
    assert filled == text.replace('old\n', '\\1 stays\n\n', 1).replace('old\n', 'two\nlines\n\n', 1)
    assert toy.filled_in(filled, {'a': ['x'], 'b': ['y']}) == text.replace('old\n', 'x\n\n', 1).replace('old\n', 'y\n\n', 1)


@pytest.mark.parametrize('parts', [['a'], ['a', 'b', 'c'], ['a', 'b', 'b'], ['a', 'x']])
def test_a_document_without_its_markers_is_refused(parts):
    """A marker that was lost would leave an old table in the page. Told before the runs."""
    with pytest.raises(UserError, match='wants the markers of each part once'):
        toy.filled_in(document(*parts), {'a': [], 'b': []})


def test_the_page_of_this_project_has_a_place_for_each_part():
    text = toy.DOCUMENT.read_text()
    filled = toy.filled_in(text, {part: [f'<{part}>'] for part in ('runs', *toy.FEEDS)})
    for part in ('runs', *toy.FEEDS):
        assert f'\n<{part}>\n' in filled
    assert set(toy.FEEDS) == COMMANDS.keys() - {'toy', 'healed'}             # the latter is of a real model
    for part in toy.FEEDS:
        assert f'| `{part}` |' in text, part


def test_every_run_of_the_study_feeds_a_part():
    """Names that do not match would leave a figure without its runs, and a run that nothing needs takes minutes."""
    study = toy.open_study('toy_paper')
    assert {name for runs, _ in toy.FEEDS.values() for name in runs} == set(study.runs)
    assert {name for _, bridges in toy.FEEDS.values() for name in bridges} == set(study.bridges)
    assert study.folders('table6') == [Path('out/toy_paper') / f'{name}-s{seed}'
                                       for name in ('tokens_r_=_32', 'tokens_r_=_32_student_s_ids') for seed in (0, 1, 2)]
    assert study.folders('figure12')[0] == Path('out/toy_paper/wide-stage1-s0')


def test_folders_are_refused():
    with pytest.raises(UserError, match='out/x: toy makes its runs itself'):
        toy.toy(['out/x'])


def test_the_links_of_the_page_lead_to_its_headings():
    """The table at its top is how a reader finds a figure."""
    text = toy.DOCUMENT.read_text()
    anchors = {re.sub('[^a-z0-9 -]', '', heading.lower()).replace(' ', '-') for heading in re.findall('^##? (.+)$', text, re.MULTILINE)}
    links = set(re.findall(r'\]\(#([^)]+)\)', text))
    assert len(links) > 8 and links <= anchors
