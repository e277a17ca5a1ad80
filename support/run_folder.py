"""
The folder of a run: whose it is, how the run was started, and its log.

    out/config.json         the run's name and the config of its last start
    out/starts.jsonl        a line for every start (support/provenance.py)
    out/log.jsonl           a line for every step; the figures are drawn from it alone
    out/answers/            what was answered in each evaluation (support/answers.py)
    out/ckpt-000040/        a checkpoint (support/checkpoints.py)
    out/last, out/best      links to the newest model, and to the one with the best held-out accuracy
    out/curve.png           drawn anew at every evaluation
    out/results.json        at the end
    out/tensorboard/, out/wandb/    with report= (support/trackers.py)
    out/profile/            with --profile (support/profile.py)

    out = open_run('out/toy', config, may_change)            looks, and writes nothing
    with owned(out, rank):                                   support/files.py: one process owns it
        run = begin(out, config, may_change, rank, names)
        resume(run, student, opt, later)                     support/checkpoints.py
        run.log({'step': run.step + 1, ...})

A row of the log is flat: {name: number, text or null}. Every row has the same names in the same order, and
null is what was not measured in a step. So the names are given before the first row (support/report.py).

Simpler than an experiment tracker: files that can be read with any editor. A run's name is drawn once, and
only checkpoints that bear it are ever deleted. It does not merge the logs of two runs.
"""
import fcntl
import json
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from support.answers import forget_later
from support.fields import Field, check_fields
from support.files import existing_above, read_json, whole, write_json
from support.jsonl import append_row, read_rows
from support.runtime import UserError, all_gather, shown

# What the rows of log.jsonl may hold, by how a name begins. What no part of the project reads again may be
# any finite number.
MEASURED = Field(float, 0, 1e9, null=True)   # a score, a length or seconds
COSINE = Field(float, -1.01, 1.01, null=True)            # rounding may add a little to 1
NUMBER = Field(float, null=True)
KINDS = {'eval/': MEASURED, 'teacher/': MEASURED, 'len/': MEASURED, 'time/': MEASURED,
         'elapsed': MEASURED, 'rep/cos': COSINE}

ELAPSED = 'elapsed'             # name in the log: seconds since the run began
CHANGED = 'changed'             # name in the log: a text, what has been different since this step


@dataclass
class RunFolder:
    """A run that goes on in its folder."""
    out: Path
    name: str                   # drawn when the run was started; its checkpoints bear it
    config: dict                # of this start
    rank: int
    names: list                 # of what each row of the log holds, in this order
    rows: list = field(default_factory=list)             # of log.jsonl
    step: int = 0               # steps that were taken before this start
    began: float = field(default_factory=lambda: time.monotonic())   # less the seconds of earlier starts
    best: dict | None = None    # the checkpoint with the best held-out accuracy: {'step', 'score', 'metric'}
    changed: dict = field(default_factory=dict)          # {key: [before, now]} since the last checkpoint
    trackers: object = None     # they are given each row too (support/trackers.py)

    def seconds(self):
        """How long the run has taken, earlier starts included."""
        return time.monotonic() - self.began

    def log(self, row):
        """Add a row to the log; what it does not hold is null. It is with the operating system when this
        returns; what a power cut takes is logged again, because a checkpoint has the log up to its step
        beside it."""
        row = row | {ELAPSED: self.seconds()}
        if self.changed:
            row[CHANGED] = in_words(self.changed)
            self.changed = {}
        unknown = row.keys() - set(self.names)
        assert not unknown, f'{sorted(unknown)} in a row, but the log was begun with {self.names}'

        # All rows have all names, so that the log is a table for whatever reads it.
        row = {name: row.get(name) for name in self.names}
        self.rows.append(row)
        self.note_score(row)
        if self.rank == 0:
            with (self.out / 'log.jsonl').open('a') as file:
                append_row(file, row)
        if self.trackers:
            self.trackers.log([row])

    def note_score(self, row):
        """Remember the step with the best held-out accuracy, of several sets their mean. Scores of another
        metric (another eval_n) cannot be compared, so the best one is then looked for anew. Row 0 is of the
        student before training, which no checkpoint holds."""
        if row['step'] == 0:
            return
        for metric, score in plain_scores(row, 'eval').items():
            if metric.startswith('avg@'):
                if self.best is None or self.best['metric'] != metric or score > self.best['score']:
                    self.best = {'step': row['step'], 'score': score, 'metric': metric}

    def is_best(self, step):
        """Was the student better after this step than after all before it?"""
        return self.best is not None and self.best['step'] == step


def open_run(out_dir, config, may_change):
    """The run folder -> Path. It is looked at, and nothing is made: a command that is refused must not leave
    a folder behind.

    UserError: another process is using it; it is a folder with other things than a run; its run was started
    with another config (the keys in `may_change` may differ); it cannot be made.
    """
    if not out_dir:
        raise UserError("out_dir='': nothing given; name a folder for this run")
    out = Path(out_dir)
    check_place(out)
    check_config(out, config, may_change)
    return out


def check_config(out, config, may_change):
    """UserError if the run in a folder was started with another config."""
    before = stored_config(out)
    is_run = (out / 'config.json').exists()
    differences = []
    for key, value in config.items():
        if is_run and key not in may_change and before.get(key) != value:
            differences.append(f'{key}={before.get(key)!r}, now {value!r}')
    if differences:
        raise UserError(f'{out}/config.json: this run was started with {"; ".join(differences[:3])}; '
                        'give the same again, or another out_dir=')


def stored_config(out):
    """The config with which a run was last started; {} if there is no run."""
    file = Path(out) / 'config.json'
    if not file.exists():
        return {}
    stored = read_json(file)
    if not isinstance(stored.get('config'), dict) or not isinstance(stored.get('run'), str):
        raise UserError(f'{file}: does not describe a run; choose another out_dir=')
    return stored['config']


def check_place(out):
    """UserError if a folder cannot be made or used, holds something else, or is in use."""
    existing_above(out)
    if not out.exists():
        return

    # The lock of support.files.owned. It is only tried: who goes on takes it later.
    if (out / '.lock').is_file():
        with (out / '.lock').open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f'{out}: in use by {file.read(100).strip() or "another process"}; wait for '
                                'its end, or choose another out_dir=') from None
            except OSError:
                pass                         # a disk without locks, which `owned` tells

    # A folder with other things in it would be mixed with the run's files.
    visible = sorted(path.name for path in out.iterdir() if not path.name.startswith('.'))
    if visible and 'config.json' not in visible:
        raise UserError(f'{out}: holds {visible[0]!r} and no run (no config.json); choose another out_dir=')


def begin(out, config, may_change, rank, names):
    """-> RunFolder at step 0; of a new run rank 0 writes config.json. The caller owns the folder; another
    start may have used it in the meantime, so its config is compared again.

    names: of what the rows of the log can hold, in order. The seconds and what has changed come after them.
    """
    check_config(out, config, may_change)
    file = out / 'config.json'
    name = read_json(file)['run'] if file.exists() else uuid.uuid4().hex[:12]
    name = all_gather(name)[0]               # what rank 0 has read or drawn
    run = RunFolder(out, name, config, rank, [*names, ELAPSED, CHANGED])
    if rank == 0 and not file.exists():
        write_config(run)
    return run


def write_config(run):
    """Write config.json: the run's name, and the config with which it goes on."""
    write_json(run.out / 'config.json', {'run': run.name, 'config': run.config})


# ---- the log --------------------------------------------------------------------------------------

def rewrite_log(run, rows):
    """Make log.jsonl say what `rows` say: what was logged after the checkpoint will be logged again.

    A run that goes on may have other names, such as eval/avg@8 after eval/avg@16. All rows then have both.
    """
    if rows:
        run.names = list(dict.fromkeys([*rows[0], *run.names]))
    run.rows = [{name: row.get(name) for name in run.names} for row in rows]
    if run.rank == 0:
        forget_later(run.out, len(rows) - 1)
        with whole(run.out / 'log.jsonl') as temporary, temporary.open('w') as file:
            for row in run.rows:
                append_row(file, row)


def log_rows(file):
    """The rows of a log.jsonl. Rows that are doubled, missing or no rows of a log are a UserError, and so are
    other names than those of the first row, and a value of another kind than was logged: steps are numbered
    0, 1, 2, ..."""
    rows = read_rows(file)
    advice = 'restore the file, or run distill.py again'
    table = {}
    for number, row in enumerate(rows):
        where = f'{file}:{number + 1}'
        if not isinstance(row, dict) or row.get('step') != number:
            found = json.dumps(row.get('step') if isinstance(row, dict) else row)
            raise UserError(f'{where}: step {found[:40]} where step {number} belongs')

        # The first row says what the others hold.
        if number == 0:
            refuse_nested(row, where)
            table = {name: kind_of(name) for name in row}
        if list(row) != list(table):
            other = next(iter(row.keys() ^ table.keys()), 'their order')
            raise UserError(f'{where}: other names than in line 1 ({shown(other)}); {advice}')
        check_fields(row, table, where, advice)
    return rows


def refuse_nested(row, where):
    """UserError if the first row is of a log as earlier versions wrote it: the scores of both models were
    objects in it."""
    for name in ('student', 'teacher'):
        if name in row:
            raise UserError(f'{where}: {name!r} is a name in the logs of earlier versions, which this one '
                            'does not read; run distill.py again, in another out_dir=')


def kind_of(name):
    """What a name of the log may hold -> Field."""
    if name == CHANGED:
        return Field(str, null=True)
    for start, kind in KINDS.items():
        if name.startswith(start):
            return kind
    return NUMBER


def in_words(changed):
    """{key: [before, now]} -> a text for the log: 'lr=0.001 (before 0.002), keep=3 (before 2)'."""
    return ', '.join(f'{key}={now!r} (before {before!r})' for key, (before, now) in changed.items())


def scores_of(row, side):
    """The held-out scores in a row, with the names that eval_math.shared_scores gives them: {'avg@16': 80.0,
    ...}; {} if nothing was evaluated. side: 'eval', the student after the row's step, or 'teacher', which is
    in row 0."""
    scores = {}
    for name, value in row.items():
        if name.startswith(f'{side}/') and value is not None:
            scores[name.removeprefix(f'{side}/')] = value
    return scores


def teacher_scores(row):
    """The scores of the teachers in row 0 -> {'teacher': scores, 'teacher2': scores, ...}, as `scores_of`; {}
    if none was evaluated."""
    teachers = {}
    side = 'teacher'
    while scores_of(row, side):
        teachers[side] = scores_of(row, side)
        side = f'teacher{len(teachers) + 1}'
    return teachers


def plain_scores(row, side):
    """The same without the scores of single sets: 'avg@16', 'best@16' and 'len', of several sets their
    means."""
    return {name: value for name, value in scores_of(row, side).items() if '/' not in name}


def scores_as_logged(scores, side):
    """Scores as eval_math.shared_scores names them -> the same with their names in the log."""
    return {f'{side}/{name}': value for name, value in scores.items()}
