"""Rewards of whole answers (GRPO) against the gradient of the expected reward, all answers enumerated."""
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import argv, assert_equal_runs, log_of, rounding, run_with_a_stop, tiny_model

import distill
from configs import load_config
from distill import main
from extensions.rewards import RewardTerm, advantages
from rollout import collect
from step import Objective, accumulate, cut_rollout, position_mask, position_weights
from support.preflight import check_objective
from support.provenance import read_starts
from support.runtime import UserError

V = 4
ANSWERS = [list(ids) for ids in product(range(V), repeat=2)]                 # all of two tokens
PROMPT = [1, 3]


def reward(answer):
    """Some are right: no token alone decides."""
    return float((answer[0] + 2 * answer[1]) % 3 == 0)


def log_p(model, answer, temperature=1.0):
    logits = model(torch.tensor([PROMPT + answer]))[0, len(PROMPT) - 1:-1]   # (2, V)
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def add_gradient(model, group, factor, scale, budget=10**6):
    """Add factor * the term's gradient for one group of answers to .grad."""
    roll = collect([(PROMPT, 0, 0)] * len(group), 1, [(i, ids, False) for i, ids in enumerate(group)], 'cpu')
    dtype = model.embed.weight.dtype
    rewards = torch.tensor([reward(ids) for ids in group], dtype=dtype)
    weights = position_weights(position_mask(roll, 'all')).to(dtype)
    objective = Objective({}, None, None, reward=RewardTerm(1.0, 3, None))
    batches = cut_rollout(roll, weights, budget, advantage=advantages(rewards, len(group), scale))
    return accumulate(model, None, batches, objective, {'reward': 1.0}, factor)


@pytest.mark.parametrize('scale', [False, True])
def test_the_gradient_is_that_of_the_expected_reward(scale):
    """Over all groups of two answers, each as likely as the model says. Without the standard deviation the expectation is
    known: the mean of two takes half of the gradient away, and a mean over two tokens halves it again. With it, the
    two answers of a group have advantages 1 and -1, or 0 and 0: another weight, by hand."""
    model = tiny_model(V=V, L=2).double()
    p = [log_p(model, ids).exp() for ids in ANSWERS]
    assert sum(p).item() == pytest.approx(1)
    for a, first in enumerate(ANSWERS):
        for b, second in enumerate(ANSWERS):
            add_gradient(model, [first, second], (p[a] * p[b]).item(), scale)
    ours = gradients(model)
    model.zero_grad()
    if scale:
        # 1/2 (log p(right) - log p(wrong)) over two tokens, for each pair of a right and a wrong answer, in both orders.
        want = -sum((p[a] * p[b]).detach() * (log_p(model, first) - log_p(model, second)) / 2
                    for a, first in enumerate(ANSWERS) for b, second in enumerate(ANSWERS)
                    if reward(first) > reward(second))
    else:
        want = -sum(log_p(model, ids).exp() * reward(ids) for ids in ANSWERS) / 4
    want.backward()
    # The advantages of a group are divided by its deviation and a millionth.
    assert (ours - gradients(model)).norm() <= (3e-6 if scale else 1e-9) * ours.norm()


def test_a_group_of_equals_teaches_nothing():
    """All right or all wrong."""
    model = tiny_model(V=V, L=1)
    right = [ids for ids in ANSWERS if reward(ids)][:3]
    add_gradient(model, right, 1.0, True)
    assert not gradients(model).any()


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    assert advantages(rewards, 4, scale=False).tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    deviation = (3 / 16) ** 0.5
    want = torch.tensor([0.75 / deviation, *[-0.25 / deviation] * 3, 0, 0, 0, 0])
    assert (advantages(rewards, 4) - want).abs().max() < 1e-5


def test_micro_batches_leave_the_gradient_as_it_is():
    group = [ANSWERS[i] for i in (0, 3, 7, 9, 12)]
    found = []
    for budget in (10**6, 5):
        model = tiny_model(V=V, L=2)
        sums = add_gradient(model, group, 1.0, True, budget)
        found.append(gradients(model))
    assert (found[0] - found[1]).norm() <= rounding(found[0], 1000)
    assert sums['loss/reward'].isfinite()


GRPO = dict(oprd_weight=0, reward_weight=1, n=4, positions='all', diagnose_every=0)


def test_a_run_with_rewards_alone_runs_no_teacher_after_its_first_look(toy_dir, tmp_path, monkeypatch):
    """The log has the term; between the first and the last step the teacher is not asked."""
    phases = []
    real = distill.accumulate

    def noted(student, teacher, batches, objective, weights, **keys):
        used = objective.only([term for term, weight in weights.items() if weight > 0])
        phases.append((used.layer_map, used.output, used.reward is not None))
        return real(student, teacher, batches, objective, weights, **keys)
    monkeypatch.setattr(distill, 'accumulate', noted)
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=3, **GRPO)))
    assert phases == [({}, None, True)] * 3
    rows = log_of(tmp_path / 'r')[1:]
    assert all(row['loss'] == row['loss/reward'] for row in rows)
    assert any(row['grad_norm'] > 0 for row in rows) == any(0 < row['acc/rollout'] < 100 for row in rows)


def test_rewards_beside_distillation_add_up(toy_dir, tmp_path):
    """The gradient is linear in the weights, so the logged loss is the weighted sum."""
    keys = GRPO | dict(oprd_weight=0.5, opd_weight=0.25, reward_weight=2, opd='full')
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=2, **keys)))
    for row in log_of(tmp_path / 'r')[1:]:
        total = 0.5 * row['loss/oprd'] + 0.25 * row['loss/opd'] + 2 * row['loss/reward']
        assert row['loss'] == pytest.approx(total, rel=1e-6)


def test_a_run_with_rewards_resumes_bit_for_bit(toy_dir, tmp_path, monkeypatch):
    """It was killed in its fourth step, after the checkpoint of the second. The rewards begin in the second quarter of the run,
    so the head has taken fewer steps than the other weights when it is resumed."""
    keys = GRPO | dict(oprd_weight=1, reward_weight='[[0.25,0],[0.25,1]]', prompts_per_step=12, steps=4, save_every=2, eval_data='',
                       toy_student_steps=150)            # the usual student gives wrong answers alone
    run_with_a_stop(argv(toy_dir, tmp_path / 'stopped', **keys), 4, monkeypatch)
    main(load_config(argv(toy_dir, tmp_path / 'whole', **keys)))
    assert_equal_runs(tmp_path / 'stopped', tmp_path / 'whole')
    assert [row['step'] for row in read_starts(tmp_path / 'stopped')] == [0, 2]
    rewards = [row.get('loss/reward') for row in log_of(tmp_path / 'whole')]
    assert rewards[:2] == [None, None] and any(rewards[3:])


def test_problems_without_a_known_answer_cannot_be_rewarded(toy_dir, toy_cfg, tmp_path):
    """The grader says None of their answers, and the first step ended with a traceback."""
    file = tmp_path / 'some.jsonl'
    file.write_text(Path(toy_cfg['data']).read_text() + '{"question": "1+2*3"}\n')
    with pytest.raises(UserError, match='reward_weight: 1 of 41 problems of data= have no known answer to grade by; delete'):
        main(load_config(argv(toy_dir, tmp_path / 'r', data=file, **GRPO)))
    assert not (tmp_path / 'r').exists()


def test_a_reward_without_anybody_to_compare_with_is_refused():
    with pytest.raises(UserError, match='with n=1 an answer is compared with no other'):
        check_objective(load_config(['reward_weight=1', 'n=1']))
    assert check_objective(load_config(['reward_weight=1', 'oprd_weight=0'])) == []
