"""
What a run was made by: code, versions, data and models, noted at every start and compared at the next.

    out/starts.jsonl        one row for every start of a run: the step from which it went on, and its record

Resuming with other training data or another teacher would make the run another one, so that is an error.
Other code, another version of torch or another number of threads may well be meant, so that is one printed
line. studies/compare.py and studies/figures.py read the same rows: a finished run says what made it.

Simpler than usual: no tracker and no copy of the code. A source file is compared by its bytes, so a changed
comment counts as a change. Weights are compared by about 1 MB of them, because to read 100 GB at every
start would take minutes: another training run changes nearly every number and is noticed, one flipped bit in
a large file is not. What came from the hub is noted with its commit, and a run that is resumed stays at it.
What this file does not look at: the code of torch and of other libraries, apart from their versions, and the
files in configs/, because a run's config is compared key by key (support/run_folder.py).

    stay_at(started_commits(out))                            # formats/hub.py; before anything is read
    record = start_record(cfg, env, train, held_out)
    note_start(run_folder, record)                           # rank 0; a UserError if it is another run
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import safetensors
import tokenizers
import torch

from formats.hub import commits, snapshot
from support.files import whole
from support.jsonl import append_row, read_rows
from support.runtime import ROOT, UserError, print0

# The files of this project that can change what a run computes. The root files are named one by one: in an
# installation other packages' files lie beside them.
SOURCES = ('bridge.py', 'distill.py', 'eval_math.py', 'losses.py', 'model.py', 'output_losses.py',
           'rollout.py', 'step.py', 'teacher.py', 'bridge_parts/*.py', 'configs/__init__.py',
           'cross_tokenizer/*.py', 'extensions/*.py', 'formats/*.py', 'grading/*.py', 'kernels/*.py',
           'studies/toy.py', 'support/*.py')

# The small files of a model folder that decide what the model reads and when it stops.
TEXT_FILES = ('config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
              'chat_template.jinja', '*.tiktoken')
BLOCK = 4096                    # bytes that are read in one place of a weight file
BLOCKS = 256                    # places in all files of a folder together: 1 MB
LONGEST_HEADER = 2**22          # bytes of a weight file's header that are read at most

# What makes a resumed run another run, if it has changed: key of a record, and what to call it.
ANOTHER_RUN = {'data': 'the training problems', 'student': 'the student that it started from',
               'teacher': 'the teacher', 'bridge': 'the bridge'}
MOST_NAMES = 4                  # of files or folders in a printed line


# ---- the state of the machine and of the code ------------------------------------------------------

def versions(env):
    """What a reader of the run folder needs in order to repeat the run."""
    revision = 'no git'
    if shutil.which('git'):
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT,
                             capture_output=True, text=True)
        if git.returncode == 0:
            revision = git.stdout.strip()
    on_cuda = env.device.type == 'cuda'
    return {'torch': torch.__version__, 'python': sys.version.split()[0],
            'device': torch.cuda.get_device_name() if on_cuda else env.device.type,
            'ranks': env.world, 'threads': torch.get_num_threads(), 'git': revision,
            'tokenizers': tokenizers.__version__, 'safetensors': safetensors.__version__}


@cache
def source_digests():
    """{path: short digest} of the project's own source files, so that one can say which of them have changed,
    with or without git. They are read once for the life of the process."""
    digests = {}
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            digests[file.relative_to(ROOT).as_posix()] = short(hashlib.sha256(file.read_bytes()))
    return digests


def short(sha):
    """A sha256 object -> the first 16 digits."""
    return sha.hexdigest()[:16]


# ---- data and models -----------------------------------------------------------------------------

def problems_digest(problems):
    """Problems -> a short digest of their questions, answers and prompt ids, in their order. Which teacher
    reads them counts where there are several, and the solution where the teacher's prompt shows it."""
    sha = hashlib.sha256()
    for problem in problems:
        parts = [problem.question, problem.answer, problem.ids]
        if problem.teacher or problem.teacher_ids:
            parts += [problem.teacher, problem.teacher_ids]
        line = json.dumps(parts)
        sha.update(f'{line}\n'.encode())
    return short(sha)


def weights_digest(folder):
    """A model's folder, or a bridge's -> a short digest of its small files and of a sample of its weights.

    At most about 1 MB of the weights is read, and the small files whole. The names of the weight files
    count: the same weights cut into other files have another digest.
    """
    sha = hashlib.sha256()
    for pattern in TEXT_FILES:
        for file in sorted(Path(folder).glob(pattern)):
            sha.update(os.fsencode(file.name) + b'\n')
            sha.update(hashlib.sha256(file.read_bytes()).digest())

    # At least eight places in each file, however many files there are.
    files = sorted(Path(folder).glob('*.safetensors'))
    for file in files:
        add_sample(sha, file, max(8, BLOCKS // len(files)))
    return short(sha)


def add_sample(sha, file, blocks):
    """Add to a sha256 object: a weight file's name, size, header, and evenly spaced blocks of its data. A
    file that is not larger than these blocks is read whole."""
    size = file.stat().st_size
    sha.update(os.fsencode(file.name) + f'\n{size}\n'.encode())
    with file.open('rb', buffering=BLOCK) as opened:
        # The header's length is its first eight bytes. A damaged file may claim any length.
        length = opened.read(8)
        sha.update(length)
        sha.update(opened.read(min(int.from_bytes(length, 'little'), LONGEST_HEADER)))
        begin = opened.tell()
        data = size - begin
        if data <= blocks * BLOCK:
            sha.update(opened.read())
            return

        # The first block begins with the data, the last one ends with them.
        for number in range(blocks):
            opened.seek(begin + number * (data - BLOCK) // (blocks - 1))
            sha.update(opened.read(BLOCK))


# ---- the record of a start -----------------------------------------------------------------------

def start_record(cfg, pairs, env, train, held_out):
    """What this start of a run is made by -> dict that JSON can hold.

    cfg: the config, every 'toy' replaced by a path. pairs: the config of each teacher. train: the problems.
    held_out: {name of a set: problems}.
    """
    record = {'versions': versions(env), 'sources': source_digests(), 'data': problems_digest(train),
              'eval_data': {name: problems_digest(problems) for name, problems in held_out.items()},
              'problems': {'data': len(train),
                           'eval_data': {name: len(problems) for name, problems in held_out.items()}}}
    record['student'] = weights_digest(snapshot(cfg['student'], weights=True))
    # Of several teachers all digests, with commas between.
    record['teacher'] = ','.join(weights_digest(snapshot(pair['teacher'], weights=True)) for pair in pairs)
    bridges = [pair['bridge'] for pair in pairs if pair['bridge']]
    record['bridge'] = ','.join(weights_digest(bridge) for bridge in bridges)
    record['commits'] = commits()            # last: by now everything has been read
    return record


def read_starts(out):
    """The rows of a run's starts.jsonl; [] where there is none. A damaged file is a UserError."""
    file = Path(out) / 'starts.jsonl'
    damage = UserError(f'{file}: damaged, so it does not say what made this run; restore it, or delete it '
                       'to go on without this check')
    try:
        rows = read_rows(file)
    except UserError:
        raise damage from None
    for row in rows:
        if not isinstance(row, dict) or type(row.get('step')) is not int:
            raise damage
        tables = [row.get(key) for key in ('versions', 'sources', 'eval_data')]
        tables += [row.get(key, {}) for key in ('config', 'problems', 'commits')]    # older runs lack them
        if not all(isinstance(table, dict) for table in tables):
            raise damage
        for sha in row.get('commits', {}).values():
            if type(sha) is not str or not re.fullmatch('[0-9a-f]{40}', sha):
                raise damage
    return rows


def started_commits(out):
    """What a run has taken from the hub -> {id: its commit}, for formats.hub.stay_at; {} of a new run."""
    found = {}
    for row in read_starts(out):
        found |= row.get('commits', {})
    return found


def append_start(out, record, step):
    """Add the row of a start that goes on after this step. Rank 0 alone calls it.

    The file is written anew, completely or not at all: a row that a kill cut in two must not be continued.
    """
    rows = read_starts(out) + [{'step': step} | record]
    with whole(Path(out) / 'starts.jsonl') as temporary, temporary.open('w') as file:
        for row in rows:
            append_row(file, row)


def lasting_starts(rows):
    """The starts that made steps which are still there, in order.

    A start from step 20 makes every step after 20 anew, so an earlier start from step 20 or 40 has left
    nothing. Example, by their steps: [0, 40, 20, 20] -> [0, 20], the last one.
    """
    lasting = []
    for row in rows:
        while lasting and lasting[-1]['step'] >= row['step']:
            lasting.pop()
        lasting.append(row)
    return lasting


# ---- what has changed ----------------------------------------------------------------------------

def note_start(run_folder, record):
    """Compare this start with the one before, print what has changed, and add its row. Rank 0 alone calls
    it. A UserError if the run would be another one."""
    record = record | {'config': run_folder.config}
    for line in check_start(run_folder.out, record, run_folder.step):
        print0(f'  note: {line}')
    append_start(run_folder.out, record, run_folder.step)


def check_start(out, record, step):
    """Compare a start that goes on after this step with the start that made the step -> lines to print.

    Other training problems, another student, teacher or bridge is a UserError: the run would be another one.
    So are other held-out problems that the config did not ask for: their scores would stand in one curve.
    """
    rows = read_starts(out)
    if not rows and step > 0:
        return [f'{out}/starts.jsonl: not there, so whether code, data or models have changed since '
                f'step {step} is not known']
    if not rows:
        return []

    # Before the first checkpoint there are only the scores of both models, which the first start made.
    made_steps = [row for row in lasting_starts(rows) if row['step'] < step]
    before = made_steps[-1] if made_steps else rows[0]
    other = []
    for key, what in ANOTHER_RUN.items():
        if key in before and before[key] != record[key]:
            other.append(what)
    if changed_sets(before, record) and evaluation_keys(before) == evaluation_keys(record):
        other.append('the held-out problems')
    if other:
        raise UserError(f'{out}: changed since this run was started: {" and ".join(other)}; give the same '
                        'again, or another out_dir=')
    return [f'changed since step {step} was made: {line}' for line in differences(before, record)]


def changed_sets(before, now):
    """Two records -> names of held-out sets that differ. A set that is in one of them alone was asked for, or
    not, by the config."""
    both = before['eval_data'].keys() & now['eval_data'].keys()
    return sorted(name for name in both if before['eval_data'][name] != now['eval_data'][name])


def evaluation_keys(record):
    """The keys of a record's config that say what is evaluated, and how."""
    return {key: value for key, value in record.get('config', {}).items() if key.startswith('eval_')}


def differences(before, now):
    """Two records -> what differs and may well be meant: held-out problems, code, versions. A line for
    each."""
    lines = []
    sets = changed_sets(before, now)
    if sets:
        lines.append(f'the held-out problems of {shortened(sets)}')

    # Another revision whose files are the same computes the same.
    files = changed_files(before['sources'], now['sources'])
    if files:
        revisions = [str(record['versions'].get('git')) for record in (before, now)]
        if revisions[0] == revisions[1]:
            revisions.pop()
        lines.append(f'code in {shortened(files)} (revision {", now ".join(revisions)})')
    values = []
    for key, value in now['versions'].items():
        if key != 'git' and key in before['versions'] and before['versions'][key] != value:
            values.append(f"{key}={before['versions'][key]}, now {value}")
    if values:
        lines.append('; '.join(values))
    return lines


def changed_files(before, now):
    """Two {path: digest} -> the paths that are changed, new or gone."""
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def shortened(names):
    """Names in a line, at most a few: 'a.py, b.py, c.py, d.py and 5 more'."""
    line = ', '.join(names[:MOST_NAMES])
    rest = len(names) - MOST_NAMES
    return f'{line} and {rest} more' if rest > 0 else line


# ---- many runs -----------------------------------------------------------------------------------

def code_notes(folders):
    """How the code that made these runs differs from the code now, and from one run to another -> at most
    three lines; none if all of it is the same."""
    now = source_digests()
    unknown = []                             # folders without a record
    other = []                               # folders that other code has made, at least in part
    changed = set()                          # files that differ between then and now
    revisions = set()                        # then
    for folder in folders:
        starts = lasting_starts(read_starts(folder))
        if not starts:
            unknown.append(str(folder))
        made_by_other = [start for start in starts if start['sources'] != now]
        if made_by_other:
            other.append(str(folder))
        for start in made_by_other:
            changed |= set(changed_files(start['sources'], now))
            revisions.add(str(start['versions'].get('git')))

    lines = []
    if other:
        lines.append(f'{len(other)} of {len(folders)} runs were made by other code than there is now: '
                     f'{shortened(sorted(changed))} (revision {shortened(sorted(revisions))}); to make them '
                     f'again, delete {shortened(other)}')
    if unknown:
        lines.append(f'{len(unknown)} of {len(folders)} runs do not say what code made them; to make them '
                     f'again, delete {shortened(unknown)}')
    return lines + mixed_code(folders)


def mixed_code(folders):
    """A line if not all of these runs were made by the same code; [] if they were."""
    codes = []                               # {path: digest} of every start
    for folder in folders:
        codes += [start['sources'] for start in lasting_starts(read_starts(folder))]
    files = set()
    for code in codes:
        files |= set(changed_files(codes[0], code))
    if not files:
        return []
    return [f'the runs were not all made by the same code: it differs in {shortened(sorted(files))}']
