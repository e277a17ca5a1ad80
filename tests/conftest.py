"""What the tests share: a toy small enough to make in a second, and random tiny models."""
import os
import signal

# The tensors are small, and two test processes with two threads each get in each other's way on two cores. So
# one thread is the default. `OMP_NUM_THREADS=4 pytest` runs the suite with four; processes that tests start
# inherit it.
os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest
import torch

from configs import load_config
from model import Model, ModelConfig, init_weights
from studies import toy
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


def argv(toy_dir, out, **keys):
    """Command line of a run on the tiny toy."""
    keys = TINY | dict(toy_dir=toy_dir, out_dir=out, steps=4, prompts_per_step=3, max_new_tokens=20, eval_n=2,
                       eval_every=2, save_every=2) | keys
    return ['configs/toy.py', *(f'{k}={v}' for k, v in keys.items())]


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
