"""The grader and the metrics."""
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import argv

import eval_math
import toy
from configs import load_config
from data import load_problems, load_tokenizer
from eval_math import boxed, evaluate, grade, scores, table
from model import load_model


@pytest.mark.parametrize('text, inside', [
    ('so \\boxed{7}', '7'), ('\\boxed{1} then \\boxed{2}', '2'), ('\\boxed{\\frac{1}{2}}.', '\\frac{1}{2}'),
    ('\\boxed{1} and \\boxed{2', '1'), ('no box', None), ('\\boxed{', None), ('} { \\boxed{3}', '3'),
    ('\\boxed{a \\boxed{b}}', 'b'), ('\\boxed{}', ''),
])
def test_boxed(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize('text, answer, right', [
    ('\\boxed{142}', '142', True), ('\\boxed{142.0}', '142', True), ('\\boxed{ 142 }', '142', True),
    ('\\boxed{143}', '142', False), ('142', '142', False), ('\\boxed{0142}', '142', True),
    ('\\boxed{142}, no, \\boxed{7}', '142', False), ('\\boxed{1e2}', '100', False), ('\\boxed{x+1}', 'x+1', True),
    ('\\boxed{8}', 'so \\boxed{8}', True), ('\\boxed{}', '', False), ('thus\nAnswer: 34', '34', True),
    ('Answer: 34\nor so', '34', False), ('\\boxed{7}\nAnswer: 34', '34', False), ('\\boxed{9**9**9}', '0', False), ('\\boxed{__import__("os")}', '1', False), ('\\boxed{١٤٢}', '142', True),
])
def test_grade(text, answer, right):
    assert grade(text, answer) is right


def test_hostile_text_is_graded_in_time():
    """Ten thousand unclosed boxes, and a megabyte of braces: linear, not quadratic."""
    began = time.time()
    assert not grade('\\boxed{' * 10_000, '1')
    assert not grade('{' * 10**6 + '\\boxed{' + '1' * 10**6, '1')
    assert not grade('\\boxed{' + '9' * 10**6 + '}', '1')
    assert time.time() - began < 20


def test_scores_by_hand():
    assert scores([[True, False], [False, False], [True, True]], [10, 20, 30, 40, 50, 60]) == {
        'avg@2': 50.0, 'best@2': pytest.approx(200 / 3), 'len': 35.0}
    assert table({})[0].startswith('no eval_data')


def test_evaluate_is_the_same_however_problems_are_shared(toy_cfg, monkeypatch):
    """Two ranks, one after the other in this process, against one rank."""
    tok, model = load_tokenizer(toy_cfg['student']), load_model(toy_cfg['student'])
    problems = load_problems(toy_cfg['eval_data'], tok)
    how = dict(stop=tok.stop_ids, max_new_tokens=20, temperature=0.7, seed=0)
    whole = evaluate(model, tok, problems, 4, **how)
    assert evaluate(model, tok, problems, 4, rows=9, **how) == whole      # two problems at a time
    parts = []
    monkeypatch.setattr(eval_math, 'all_gather', lambda x: parts.append(x) or parts)
    with pytest.raises(KeyError):            # rank 0 alone knows half of the problems
        evaluate(model, tok, problems, 4, rank=0, world=2, **how)
    assert evaluate(model, tok, problems, 4, rank=1, world=2, **how) == whole


def test_script(toy_dir, capsys):
    eval_math.main(load_config(argv(toy_dir, 'unused')))
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[0] == 'student' and 0 <= float(line[1]) <= float(line[2]) <= 100


def test_grade_of_a_perfect_model(toy_cfg, monkeypatch):
    """Answers written by the task itself: 100 on both counts, and the right length."""
    tok = load_tokenizer(toy_cfg['student'])
    worked = toy.problems(6, 2, 0, held_out=True)
    problems = load_problems(toy_cfg['eval_data'], tok)
    answers = [tok.encode(a) + [2] for _, a, _ in worked for _ in range(2)]

    roll = SimpleNamespace(resp_len=torch.tensor([len(a) for a in answers]), answers=lambda: answers)
    monkeypatch.setattr(eval_math, 'sample', lambda *a, **k: roll)
    assert evaluate(None, tok, problems, 2, stop=[2]) == {'avg@2': 100.0, 'best@2': 100.0, 'len': 16.0}
