"""What the tests share: a toy small enough to make in a second, and random tiny models."""
import os
import signal

os.environ['OMP_NUM_THREADS'] = '1'      # for the processes that tests start
import pytest
import torch

from configs import load_config
from model import Model, ModelConfig, init_weights
from studies import toy
from support.runtime import ROOT, start

signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background jobs ignore Ctrl-C
os.environ['PYTHONPATH'] = str(ROOT)     # so that tests can start `python -m studies.toy` from any folder
torch.set_num_threads(1)                 # small tensors; two busy cores with two threads each crawl

TINY = dict(toy_ops=2, toy_layers=3, toy_width=24, toy_heads=2, toy_batch=16, toy_student_steps=30,
            toy_teacher_steps=10, toy_train=40, toy_eval=6)


def tiny_model(seed=0, **shape):
    """A random decoder with odd sizes; every axis has a length of its own, so that mixing two up fails."""
    shape = dict(family='qwen3', V=37, L=3, d=20, H=4, G=2, e=6, ff=28, context=64) | shape
    return init_weights(Model(ModelConfig(**shape)), seed).eval()


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
