"""
The log of a run in Weights & Biases and TensorBoard, for those who use them: report=wandb,tensorboard

    report=wandb          a W&B run, whose files are in out/<run>/wandb. WANDB_PROJECT, WANDB_ENTITY and so on
                          work as usual. With WANDB_MODE=offline there is no network, and
                          `wandb sync out/<run>/wandb/offline-run-*` uploads the run later
    report=tensorboard    event files in out/<run>/tensorboard; tensorboard --logdir out

log.jsonl stays the record of a run. A tracker is given the numbers of each of its rows once; the x axis is
the training step. A tracker that fails (no network, no login, a full disk) is a line on the terminal, and
training goes on without it. A run that goes on may have another report=: a new tracker is given the earlier
rows too.

A run that died goes on from its last checkpoint, and takes some steps again. TensorBoard then reads the new
rows in place of the old ones. W&B can take nothing back, so it depends on what has changed:
    nothing       the steps give the same numbers again; W&B keeps those it has, and is sent only later steps
    lr= or such   W&B gets a new run beside the old one, with all rows of the log

Simpler than usual: rank 0 alone speaks to them, and nothing is read back. What it does not do: upload
checkpoints, or sweeps. The packages are imported only if report= names them; requirements.txt has neither.
"""
import importlib
import os
import time
from contextlib import contextmanager

from support.files import read_json, write_json
from support.runtime import UserError, cut, print0, shown

FINISH_SECONDS = 60             # how long the end of a run waits for the last rows to be uploaded
FLUSH_SECONDS = 0.5             # how long W&B may keep a row in memory
FLUSH_KEY = 'x_transaction_log_flush_interval'


class WandB:
    """A run of Weights & Biases. out/<run>/wandb.json remembers which rows it has, because offline nobody
    else knows: {'attempt': number of the W&B run, 'step': the last one it was sent}."""
    module = 'wandb'

    def __init__(self, run):
        self.run = run                       # RunFolder
        self.memory = run.out / 'wandb.json'
        self.sent = {'attempt': 1, 'step': -1}

    def begin(self):
        """Make the W&B run, or go on with it."""
        import wandb
        run = self.run
        if self.memory.exists():
            self.sent = read_json(self.memory)

        # Steps that were sent are taken again, with other numbers: they are another attempt.
        if run.changed and run.step < self.sent['step']:
            self.sent = {'attempt': self.sent['attempt'] + 1, 'step': -1}
        suffix = '' if self.sent['attempt'] == 1 else f"-{self.sent['attempt']}"

        # Its files are in the run folder, also those that it would write into the home folder.
        for name in ('CACHE', 'DATA'):
            os.environ.setdefault(f'WANDB_{name}_DIR', str(run.out / 'wandb' / name.lower()))
        options = dict(console='off', silent=True, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)

        # Newer versions keep up to 15 seconds of rows in memory, which a kill would take.
        if FLUSH_KEY in wandb.Settings.model_fields:
            options[FLUSH_KEY] = FLUSH_SECONDS
        self.wandb_run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', 'nanoOPRD'), id=run.name + suffix,
            name=run.out.name + suffix, resume='allow', dir=str(run.out), config=run.config,
            allow_val_change=True, settings=wandb.Settings(**options))
        online = self.wandb_run.settings.mode == 'online'
        print0(f"  wandb: {self.wandb_run.url if online else run.out / 'wandb'}")

        # W&B numbers the rows that it is sent. The x axis is the row's own step instead.
        self.wandb_run.define_metric('step')
        self.wandb_run.define_metric('*', step_metric='step')

    def log(self, rows):
        """Send the rows that W&B does not have."""
        rows = [row for row in rows if row['step'] > self.sent['step']]
        for row in rows:
            self.wandb_run.log(numbers_of(row))
        if rows:
            self.sent['step'] = rows[-1]['step']
            write_json(self.memory, self.sent)

    def end(self, failed):
        """Wait for what is on its way, and let W&B's own process end."""
        import wandb
        self.wandb_run.finish(exit_code=int(failed))
        wandb.teardown()


class TensorBoard:
    """Event files of TensorBoard. Each start writes all rows of the log anew: purge_step=0 lets a reader
    forget what earlier files hold, so that no step is doubled and none is missing."""
    module = 'torch.utils.tensorboard'

    def __init__(self, run):
        self.run = run                       # RunFolder

    def begin(self):
        """Open a new event file, which begins with the config."""
        from torch.utils.tensorboard import SummaryWriter
        folder = self.run.out / 'tensorboard'
        self.writer = SummaryWriter(folder, purge_step=0)
        config = [f'    {key} = {value!r}' for key, value in self.run.config.items()]
        self.writer.add_text('config', '\n'.join(config), 0)
        print0(f'  tensorboard --logdir {folder}')

    def log(self, rows):
        """Write these rows, each with the time at which it was logged."""
        began = time.time() - self.run.seconds()
        for row in rows:
            for name, number in numbers_of(row).items():
                if name != 'step':
                    self.writer.add_scalar(name, number, row['step'], walltime=began + row['elapsed'])
        self.writer.flush()

    def end(self, failed):
        """Close the file."""
        self.writer.close()


TRACKERS = {'wandb': WandB, 'tensorboard': TensorBoard}


class Trackers:
    """The trackers of a run. One that fails is told in a line and left out from then on: training goes on."""
    def __init__(self, names, run):
        self.active = {name: TRACKERS[name](run) for name in names}
        for name, tracker in list(self.active.items()):
            self.attempt(name, tracker.begin)

    def log(self, rows):
        """Hand these rows of the log on."""
        for name, tracker in list(self.active.items()):
            self.attempt(name, tracker.log, rows)

    def end(self, failed):
        """The run ends. failed: by an error or a signal."""
        for name, tracker in list(self.active.items()):
            self.attempt(name, tracker.end, failed)

    def attempt(self, name, call, *arguments):
        """call(*arguments). Its error is printed, and ends the tracker of this name."""
        try:
            call(*arguments)
        except Exception as error:           # of any kind: they come from another package
            message = ' '.join(str(error).split()) or type(error).__name__
            print0(f'  note: {name}: {cut(message, 150)}; training goes on without it')
            del self.active[name]


@contextmanager
def tracked(run, report):
    """While the block runs, the trackers that `report` names are given each row that a RunFolder logs; first
    the rows that it has. run: RunFolder, after its resume. Rank 0 alone has trackers."""
    if not report or run.rank > 0:
        yield
        return
    run.trackers = Trackers(tracker_names(report), run)
    run.trackers.log(run.rows)
    failed = True
    try:
        yield
        failed = False
    finally:
        run.trackers.end(failed)


def check_trackers(report, rank):
    """Import the packages that `report` names. One that is missing is a UserError, which a script raises
    before it loads a model."""
    for name in tracker_names(report):
        try:
            if rank == 0:
                importlib.import_module(TRACKERS[name].module)
        except ImportError as error:
            raise UserError(f'report={name}: {cut(str(error), 100)}; pip install {name}') from None


def tracker_names(report):
    """The value of report= -> names: 'wandb,tensorboard' -> ['wandb', 'tensorboard']; '' -> []."""
    names = [name.strip() for name in report.split(',')] if report else []
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"report={shown(report)}: no tracker is called {shown(name)}; give wandb, "
                            "tensorboard, or wandb,tensorboard")
    return list(dict.fromkeys(names))


def numbers_of(row):
    """A row of the log without texts, and without what was not measured."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}
