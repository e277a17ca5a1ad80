"""
Everything of the paper on the toy by one command: the runs, the figures, tables and theorems, docs/paper.md.

    python -m paper toy                    on two CPU cores, from nothing to docs/paper.md
    python -m paper toy to=FOLDER          FOLDER/paper.md and FOLDER/paper/ instead; docs/ stays untouched
    python -m paper toy study=FILE         the runs of another study, which bear the same names

In time order:
1. The runs of configs/toy_paper.py, into out/toy_paper (studies/compare.py).
2. Each figure, table and theorem, from the runs that feed it (FEEDS), into out/paper.
3. The parts of docs/paper.md that stand between `<!-- made by python -m paper toy: NAME -->` and
   `<!-- end -->`; the pictures and the numbers behind them are copied into docs/paper.

The same command goes on where it stopped. Finished runs are not started again, and a part is made again only
if its runs, the project's code or its own files have changed since (out/paper/made.json). What cannot be made
is told in a line, and docs/paper.md says it as well.

Simpler than a build system: what feeds what is one table, and any change of the code makes all parts anew,
which takes minutes. Runs that other code has made are told, and not made again: that would take an hour. The
prose of docs/paper.md is written by hand, and what is outside the markers is never changed.
"""
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

from paper.__main__ import function_of
from paper.runs import Missing, machines_of
from paper.tables import printed_lines, text_of
from studies.compare import command_lines, compare, is_finished, read_study, slug
from studies.figures import read_log
from support.fields import Field, check_fields
from support.files import digest, read_json, whole, write_json
from support.provenance import code_notes, source_digests
from support.run_folder import stored_config
from support.runtime import ROOT, UserError, print0

# ---- what feeds what: names of runs and bridges in configs/toy_paper.py --------------------------

SAME = ('OPRD', 'OPD top-16', 'OPD top-1', 'OPD full KL', 'OPD top-1 + 1 OPRD', 'OPD top-1 + 10 OPRD')
WIDE = ('bridge, r = 16', 'bridge, then OPD top-1', 'wide, OPD top-1', 'wide, OPD top-16')
TOKENS = ('tokens, r = 32', "tokens, r = 32, student's ids")
RANKS = tuple(f'rank {r}' for r in (2, 4, 8, 16, 0, 64, 96))

# {part: (runs, bridges)}, in the order in which the parts are made
FEEDS = {
    'figure1': (SAME, ()),
    'table2': (SAME, ()),
    'table3': (SAME, ()),
    'figure4': ((*SAME, *WIDE, *TOKENS), ()),
    'figure5': (SAME, ()),
    'figure6': (SAME, ()),
    'figure7': (SAME, ()),
    'figure8': (('OPRD', 'bridge, r = 16', 'tokens, r = 32'), ()),
    'figure9': (SAME, ()),
    'figure10': (SAME, ()),
    'figure11': (SAME, ()),
    'figure12': ((), ('wide', 'unlike', 'ids')),
    'table4': (WIDE, ()),
    'table5': (WIDE, ()),
    'table6': (TOKENS, ()),
    'theorem1': ((), ()),
    'theorem2': (('OPRD', 'OPD top-16'), ()),
    'theorem3': (RANKS, ('wide',)),
}
DOCUMENT = ROOT / 'docs/paper.md'
COPIED = ('.png', '.json')      # endings of the files that docs/paper gets; PDFs stay in out/paper
MADE = {'from': Field(str), 'files': Field(dict, items=Field(str))}      # of a part, in made.json


@dataclass(frozen=True)
class Study:
    """A study of studies/compare.py, as it lies on the disk."""
    name: str                   # as compare() is given it
    out: Path                   # folder of all its runs
    jobs: dict                  # {run's folder: command line of distill.py}
    runs: dict                  # {name: its folders, one for each seed}
    bridges: dict               # the same of the bridges

    def folders(self, part):
        """The folders that feed a part of docs/paper.md, as far as the study has them."""
        wanted_runs, wanted_bridges = FEEDS[part]
        found = []
        for name in wanted_runs:
            found += self.runs.get(name, [])
        for name in wanted_bridges:
            found += self.bridges.get(name, [])
        return found


# ---- 1. the runs ---------------------------------------------------------------------------------

def open_study(name):
    """A study's name or file -> Study. Nothing is run."""
    file, plan = read_study(name)
    out = Path('out') / file.stem
    _, jobs, folders = command_lines(plan, out)
    runs = {}
    for (run, _), folder in folders.items():
        runs.setdefault(run, []).append(folder)
    bridges = {}
    for bridge in plan.get('bridges', {}):
        bridges[bridge] = [out / f'{slug(bridge)}-stage1-s{seed}' for seed in plan['seeds']]
    return Study(name, out, jobs, runs, bridges)


def make_runs(study):
    """Make the runs that are missing. compare() starts each process again that it is asked about, and a
    finished one takes seconds; so it is only asked if something is missing."""
    missing = [folder for folder, arguments in study.jobs.items() if not is_finished(folder, arguments)]
    if missing or not (study.out / 'table.md').exists():
        print0(f'{study.out}: {len(study.jobs) - len(missing)} of {len(study.jobs)} runs are finished')
        compare(study.name)
        return
    print0(f'{study.out}: all {len(study.jobs)} runs are finished')
    for note in code_notes(list(study.jobs)):
        print0(f'  note: {note}')


def runs_lines(study):
    """What docs/paper.md says of the runs themselves -> markdown lines."""
    machines = {}
    days = set()
    seconds = 0.0
    for folder in study.jobs:
        machines |= dict.fromkeys(machines_of(folder))
        days.add(str(stored_config(folder).get('date')))
        seconds += read_log(folder)[-1]['elapsed']
    table = (study.out / 'table.md').read_text().rstrip().splitlines()
    when = ' to '.join(dict.fromkeys([min(days), max(days)]))
    return [*table, '', f'{len(study.jobs)} runs, {seconds / 3600:.1f} hours of one process in all, {when}. '
                        f'Made on: {"; ".join(machines)}.']


# ---- 2. the parts --------------------------------------------------------------------------------

def made_from(folders):
    """A digest of what a part is made from: the logs, starts, bridges and answers in these folders, and the
    project's code. The answers count by their sizes: their scores are in the log."""
    found = {}
    for folder in folders:
        for name in ('log.jsonl', 'starts.jsonl', 'bridge.json'):
            if (folder / name).exists():
                found[f'{folder}/{name}'] = digest_of(folder / name)
        for file in sorted(folder.glob('answers/*.jsonl')):
            found[str(file)] = file.stat().st_size
    for file in (*sorted(ROOT.glob('paper/*.py')), *sorted(ROOT.glob('studies/*.py'))):
        found[file.relative_to(ROOT).as_posix()] = digest_of(file)
    return digest([found, source_digests()], 16)


def digest_of(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def read_made(to):
    """What earlier commands have made in a folder -> {part: {'from': digest, 'files': {name: digest}}}."""
    file = to / 'made.json'
    made = read_json(file) if file.exists() else {}
    for part, entry in made.items():
        check_fields(entry, MADE, f'{file}: {part}', 'delete the file to make all parts again')
    return made


def is_unchanged(entry, source, to):
    """Was a part made from this, and are its files still those that were written then?"""
    if entry is None or entry['from'] != source:
        return False
    for name, was in entry['files'].items():
        if not (to / name).exists() or digest_of(to / name) != was:
            return False
    return True


def make_parts(study, to):
    """Make every part that has changed -> ({part: its files}, {part: why there is none})."""
    made = read_made(to)
    files = {}
    missing = {}
    for part in FEEDS:
        folders = study.folders(part)
        source = made_from(folders)
        if is_unchanged(made.get(part), source, to):
            files[part] = [to / name for name in made[part]['files']]
            print0(f'{part}: unchanged')
            continue

        # A part that cannot be made does not keep the others from being made.
        began = time.monotonic()
        try:
            files[part] = function_of(part)(folders, to)
        except UserError as error:
            missing[part] = error
            print0(f'{part}: {error}')
            continue
        names = {Path(file).relative_to(to).as_posix(): digest_of(Path(file)) for file in files[part]}
        made[part] = {'from': source, 'files': names}
        write_json(to / 'made.json', made)
        print0(f'{part}: {time.monotonic() - began:.1f} s, {", ".join(names)}')
    return files, missing


# ---- 3. docs/paper.md ----------------------------------------------------------------------------

MARKED = re.compile('(<!-- made by python -m paper toy: ([a-z0-9]+) -->\n).*?(<!-- end -->)', re.DOTALL)


def part_lines(part, files):
    """A part as markdown lines: its pictures, and its tables with the paper's own numbers below."""
    lines = []
    title = re.sub('([a-z])([0-9])', r'\1 \2', part).capitalize()
    for file in map(Path, files):
        if file.suffix == '.png':
            lines += [f'![{title} on the toy](paper/{file.name})', '']
        elif file.suffix == '.md':
            lines += [*file.read_text().splitlines(), '']
    if part.startswith('table'):
        lines += [*printed_lines(int(part.removeprefix('table'))), '']
    return lines[:-1]


def filled_in(text, parts):
    """A document with the lines of each part {name: lines} between its markers."""
    names = [name for _, name, _ in MARKED.findall(text)]
    if sorted(names) != sorted(parts):
        other = next(iter(set(names) ^ set(parts)), 'one that is there twice')
        raise UserError(f'{DOCUMENT}: wants the markers of each part once, and does not with {other}; '
                        'restore the file')

    def fill(match):
        return match[1] + '\n'.join([*parts[match[2]], '', match[3]])
    return MARKED.sub(fill, text)


def write_document(text, files, parts, docs):
    """Write docs/paper.md, and copy the pictures and numbers into docs/paper."""
    for file in files:
        target = docs / 'paper' / file.name
        if file.suffix in COPIED and file.resolve() != target.resolve():
            with whole(target) as temporary:
                temporary.write_bytes(file.read_bytes())
    with whole(docs / 'paper.md') as temporary:
        temporary.write_text(filled_in(text, parts))


def toy(folders=(), to='', study='toy_paper'):
    """Make everything -> the files that were written. to: a folder in place of docs/."""
    if folders:
        raise UserError(f'{folders[0]}: toy makes its runs itself; give no folder, or use all')
    docs = Path(to) if to else DOCUMENT.parent
    work = docs / 'paper' if to else Path('out/paper')
    text = DOCUMENT.read_text()
    filled_in(text, dict.fromkeys(['runs', *FEEDS], []))     # a damaged document is told before the runs
    began = time.monotonic()

    # 1. runs
    study = open_study(study)
    make_runs(study)
    print0(f'runs: {time.monotonic() - began:.0f} s')

    # 2. figures, tables, theorems
    files, missing = make_parts(study, work)

    # 3. the document
    parts = {'runs': runs_lines(study)}
    for part in FEEDS:
        if part in missing:
            parts[part] = [f'Not made: {text_of(missing[part])}.']
        else:
            parts[part] = part_lines(part, files[part])
    every_file = [Path(file) for part in files.values() for file in part]
    write_document(text, every_file, parts, docs)
    print0(f'{time.monotonic() - began:.0f} s in all; missing: {", ".join(missing) or "nothing"}')

    # Missing is what these runs cannot feed. Anything else is an error.
    refused = [part for part, error in missing.items() if not isinstance(error, Missing)]
    if refused:
        raise UserError(f'not made: {", ".join(refused)}; the lines above say why')
    return [docs / 'paper.md']
