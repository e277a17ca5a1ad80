"""What the tests share: a toy small enough to make in a second, and random tiny models."""
import json
import os
import signal
from itertools import combinations
from pathlib import Path

# The tensors are small, and two test processes with two threads each get in each other's way on two cores. So
# one thread is the default. `OMP_NUM_THREADS=4 pytest` runs the suite with four; processes that tests start
# inherit it.
os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.torch import load_file
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill
import eval_math
from configs import load_config, reads
from cross_tokenizer.next_byte import NextByte
from losses import BridgeTerm, HiddenTerm
from model import Model, ModelConfig, init_weights
from output_losses import HeadLoss, HeadRows, OutputTerm, head_statistics, make_objective
from step import Objective, accumulate, cut_rollout, diagnose
from studies import toy
from support.files import read_json, write_json
from support.runtime import ROOT, start

signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background jobs ignore Ctrl-C
os.environ['PYTHONPATH'] = str(ROOT)     # so that tests can start `python -m studies.toy` from any folder
torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))

TINY = dict(toy_ops=2, toy_layers=3, toy_width=24, toy_heads=2, toy_batch=16, toy_student_steps=30,
            toy_teacher_steps=10, toy_train=40, toy_eval=6)


def tiny_model(seed=0, **shape):
    """A random decoder with odd sizes; every axis has a length of its own, so that mixing two up fails."""
    shape = dict(family='qwen3', V=37, L=3, d=20, H=4, G=2, e=6, ff=28, context=64) | shape
    return init_weights(Model(ModelConfig(**shape)), seed).eval()


@torch.no_grad()
def with_random_vectors(model):
    """The model with random norms and biases: ones and zeros would hide that one is left out or taken for another."""
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + torch.rand(len(parameter), generator=g))
    return model


# How many roundings lie between the weights of `tiny_model` and their gradients: the lengths of the sums on the
# longest path. A block has d + T + e + H e + d + ff < 140 of them, three blocks 420, the way back as many again,
# and a weight's gradient is a sum over fewer than 100 positions.
TINY_SUMS = 1000


def rounding(terms, count):
    """How far apart two ways to compute one sum may be: count * eps * |terms|.

    Each addition is off by at most eps / 2 of its result. These errors have both signs, so those of a sum of n numbers
    grow like sqrt(n) eps |terms| / 3 (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
    With n in place of sqrt(n) there is room for every order of summation, on any CPU and with any number of threads.

    terms: a tensor, or a list of tensors of one dtype, that are summed; where they do not cancel, the sum itself.
    count: the lengths of all sums on the way, added up. eps: that of the terms' dtype.
    """
    if isinstance(terms, torch.Tensor):
        terms = [terms]
    magnitude = sum(float(term.detach().norm()) for term in terms)
    return count * torch.finfo(terms[0].dtype).eps * magnitude


def opd_loss(h, W, h_t, W_t, y, w, answer=None, *, kind='full', **how):
    """An output-space objective of rows (K, d) under a head (V, d) -> (loss, statistics (5,)). kind None: the
    statistics alone, and a loss of 0."""
    objective = make_objective(kind or 'full', **how)
    batch = HeadRows(h_t, W_t, y, w, torch.zeros_like(y) if answer is None else answer, None, None)
    if kind is None:
        return 0.0, head_statistics(h, W, objective, batch)
    return HeadLoss.apply(h, W, objective, batch)


def byte_loss(h, W, h_t, W_t, w, written=None, inside=None, *, table_s, table_t, **how):
    """The next-byte KL of rows -> (loss, statistics (5,)). Without `written` h_t is (K, d_t): one state serves as both."""
    if written is None:
        h_t = torch.cat([h_t, h_t])
        inside = torch.zeros(len(h), dtype=torch.bool)
    batch = HeadRows(h_t, W_t, None, w, None, inside, written)
    return HeadLoss.apply(h, W, NextByte(table_s, table_t, **how), batch)


class Products(TorchDispatchMode):
    """Collects the matrix products that run in it: their names, and the matrices that enter or leave one and whose rows (or
    columns, in a transposed matrix) do not begin at multiples of 8 numbers."""
    NAMES = ('mm', 'addmm', 'addmm_', 'bmm', 'baddbmm')

    def __init__(self):
        super().__init__()
        self.names, self.unaligned = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix('aten::')
        if name in self.NAMES:
            self.names.add(name)
            for x in tree_leaves((args, kwargs, out)):
                if isinstance(x, torch.Tensor) and x.ndim > 1 and (min(x.stride()) != 1 or max(x.stride()) % 8):
                    self.unaligned.add((name, tuple(x.shape), x.stride()))
        return out


def step_sums(student, teacher, roll, weights, layer_map, budget=10**6, scale=1.0, *, kind='mse', drift=False, bridge=None,
              normalise=True, output=None, oprd_weight=1.0, opd_weight=0.0, reading=None, offset=0, probe=None,
              attention=None, attention_weight=0.0):
    """Steps 4 and 5 of a training step, as distill.train takes them -> the sums of accumulate. output: an objective of
    output_losses or next_byte. probe: a mask (B, T): what the objective leaves out is looked at there, and joins the sums, the
    weight of these positions as 'looked'."""
    hidden = BridgeTerm(bridge, normalise) if bridge else HiddenTerm(kind, drift)
    objective = Objective(layer_map, hidden, OutputTerm(output, teacher) if output else None, bridge, attention=attention)
    term_weights = {'oprd': oprd_weight, 'opd': opd_weight, 'attention': attention_weight}
    looked = {}
    if probe is not None:
        left_out = objective.only([term for term, weight in term_weights.items() if weight == 0])
        looked = diagnose(student, teacher, cut_rollout(roll, weights * probe, budget, reading, offset), left_out)
        looked.pop('weight', None)           # that of cosines, if they are left out too
        looked['looked'] = (weights * probe).sum()
    micro_batches = cut_rollout(roll, weights, budget, reading, offset)
    return accumulate(student, teacher, micro_batches, objective, term_weights, scale) | looked


def flat_sums(sums):
    """All of a step's sums in one vector, by the order of their names."""
    return torch.cat([sums[name].reshape(-1) for name in sorted(sums)])


def argv(toy_dir, out, **keys):
    """Command line of a run on the tiny toy."""
    keys = TINY | dict(toy_dir=toy_dir, out_dir=out, steps=4, prompts_per_step=3, max_new_tokens=20, eval_n=2,
                       eval_every=2, save_every=2) | keys
    return ['configs/toy.py', *(f'{k}={v}' for k, v in keys.items())]


def for_script(script, arguments):
    """A command line of distill.py without the keys that another script does not read."""
    return [word for word in arguments if '=' not in word or word.split('=')[0] in reads[script]]


def with_other_stop(folder, out, stop=(2, 20)):
    """A copy of a model folder whose generation config names other tokens that end an answer. To the toy, 20 is the }
    that closes the box."""
    out.mkdir(parents=True)
    for file in Path(folder).iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = read_json(out / 'generation_config.json')
    write_json(out / 'generation_config.json', config | {'eos_token_id': list(stop)})
    return out


@pytest.fixture(scope='module', autouse=True)
def no_group_is_left():
    """A run in bfloat16 makes a group of one rank. The next module of this process begins without it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope='session')
def toy_dir(tmp_path_factory):
    """Folder in which the tiny toy has been made."""
    folder = tmp_path_factory.mktemp('toys')
    toy.prepare(load_config(argv(folder, 'unused')), start('cpu'))
    return folder


@pytest.fixture(scope='session')
def toy_cfg(toy_dir):
    """Config of the tiny toy, paths filled in."""
    return toy.prepare(load_config(argv(toy_dir, 'unused')), start('cpu'))


@pytest.fixture
def kept(monkeypatch):
    """The figures of matplotlib that are saved, in order; one that is saved as two files stands there once."""
    figures, save = [], Figure.savefig

    def recorded_save(figure, *a, **k):
        if figure not in figures:
            figures.append(figure)
        save(figure, *a, **k)
    monkeypatch.setattr(Figure, 'savefig', recorded_save)
    return figures


def badly_placed_texts(figure):
    """A figure that was saved -> pairs of its texts of which one is drawn over the other, and texts that leave it. Measured
    are the boxes as drawn; ticks beyond the limits of their axis are not drawn."""
    figure.draw_without_rendering()          # a PDF was drawn last, in other units
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.majorTicks, *axis.minorTicks):
                if not low <= tick.get_loc() <= high:
                    hidden.update((tick.label1, tick.label2))
    boxes = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            boxes.append((text.get_text(), text.get_window_extent().padded(-1)))
    found = [(name, 'leaves the figure') for name, box in boxes if not all(figure.bbox.contains(*corner) for corner in (box.p0, box.p1))]
    for (name, box), (other_name, other) in combinations(boxes, 2):
        if box.overlaps(other):
            found.append((name, other_name))
    return found


@pytest.fixture
def disk(monkeypatch):
    """What is asked of the operating system, in order: ('fsync', inode, size then) and ('rename', inode, new name)."""
    events, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        about = os.fstat(descriptor)
        events.append(('fsync', about.st_ino, about.st_size))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(('rename', os.lstat(source).st_ino, os.path.basename(target)))
        replace(source, target)
    monkeypatch.setattr(os, 'fsync', recorded_fsync)
    monkeypatch.setattr(os, 'replace', recorded_replace)
    return events


def entries(folder):
    """Inodes of a folder and of all that it holds."""
    return {path.stat().st_ino for path in (folder, *folder.rglob('*'))}


def log_of(out):
    """The rows of a run's log.jsonl, each without what was not measured. All rows must have the same names in the same
    order, flat values, and a number for what every row has."""
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    for row in rows:
        assert list(row) == list(rows[0]) and not any(isinstance(value, (dict, list)) for value in row.values())
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def assert_all_measured(out):
    """Every name in the log of a whole run was measured in some step: what cannot occur in a run has no column."""
    measured = set().union(*log_of(out))
    assert set(json.loads((out / 'log.jsonl').read_text().splitlines()[0])) - measured <= {'changed'}


def write_log(out, rows):
    """Write rows as a run logs them: every row has the names of all."""
    names = dict.fromkeys(name for row in rows for name in row)
    (out / 'log.jsonl').write_text(''.join(json.dumps(dict.fromkeys(names) | row) + '\n' for row in rows))


def write_run(folder, columns, file='configs/toy.py', **keys):
    """A finished run: its config, and a log of {name: [value in step 0, 1, ...]}."""
    folder.mkdir(parents=True)
    config = load_config([file, *(f'{key}={value}' for key, value in keys.items())])
    (folder / 'config.json').write_text(json.dumps({'config': config}))
    steps = range(len(next(iter(columns.values()))))
    write_log(folder, [{'step': step} | {name: values[step] for name, values in columns.items()} for step in steps])
    (folder / 'results.json').write_text('{}')
    return folder


def evaluate(model, tokenizer, sets, per_problem, **how):
    """An evaluation as distill.evaluate_model makes it: answers, then their scores over all ranks."""
    rows = eval_math.sample_and_grade(model, tokenizer, sets, per_problem, **how)
    return eval_math.shared_scores(rows, sets, per_problem)


def scores_of(row, side='eval'):
    """The scores in a row of the log, named as eval_math.shared_scores names them."""
    return {name.removeprefix(f'{side}/'): value for name, value in row.items() if name.startswith(f'{side}/')}


def run_with_a_stop(arguments, step, monkeypatch):
    """A run that was killed in the middle of a step, and then started again with the same command line. It has one teacher."""
    real = distill.accumulate
    calls = []

    def accumulate(*a, **k):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*a, **k)
    with monkeypatch.context() as patch:
        patch.setattr(distill, 'accumulate', accumulate)
        with pytest.raises(KeyboardInterrupt):
            distill.main(load_config(arguments))
    distill.main(load_config(arguments))


def assert_equal_runs(a, b):
    """Bit for bit: all that the last checkpoint needs to go on, and all logged numbers but those of time and memory."""
    states = resume_state(a), resume_state(b)
    assert states[0].keys() == states[1].keys() and all(states[0][name].equal(states[1][name]) for name in states[0])
    logs = []
    for out in (a, b):
        logs.append([{name: value for name, value in row.items() if not name.startswith(('time/', 'elapsed', 'mem/'))}
                     for row in log_of(out)])
    assert logs[0] == logs[1]


def resume_state(out):
    """{'weight.NAME': tensor, 'exp_avg.NAME': ...} of a run's newest checkpoint, which one rank wrote."""
    state = {}
    for file in ((out / 'last').resolve().parent / 'resume').iterdir():
        state |= load_file(file)
    return state
