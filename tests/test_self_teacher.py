"""Self-distillation: the teacher is the student, whose prompt shows a solution, and whose weights may follow the student's."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import argv, assert_equal_runs, log_of, rounding, run_with_a_stop, tiny_model
from safetensors.torch import load_file

import distill
from configs import load_config
from cross_tokenizer.pairing import read_rollout
from distill import main
from extensions.self_teacher import keep_average, move_average, show_solutions, teach_average, with_solution
from formats.huggingface import load_model
from formats.problems import Problem, load_problems, prompt_order
from formats.tokenizer import load_tokenizer
from output_losses import OutputTerm, make_objective
from rollout import sample
from step import Objective, cut_rollout, position_mask, position_weights
from support.optimizer import adamw
from support.provenance import read_starts
from support.runtime import UserError

SELF = {'teacher': 'self', 'teacher_sees': 'solution', 'solution_text': '{solution}{question}'}


# ---- what the teacher reads ------------------------------------------------------------------------

@pytest.mark.parametrize('budget', [10**6, 40])
def test_states_are_paired_over_the_answer_although_the_prompts_differ(toy_cfg, budget):
    """Brute force: each answer by itself behind the teacher's own prompt. An offset of one row, of another row's prompt
    or of the padding would pair other states."""
    tok = load_tokenizer(toy_cfg['student'])
    student, teacher = tiny_model(0, V=tok.size).double(), tiny_model(1, V=tok.size).double()
    prompts, prompts_t = [[1, 5, 9], [1, 4], [1, 7, 10, 8]], [[1, 5], [1, 6, 6, 6, 8, 14], [1, 9, 9]]
    roll = sample(student, prompts, max_new_tokens=9, stop=[2], seed=4)
    weights = position_weights(position_mask(roll, 'last_k', 4))
    reading = read_rollout(roll, prompts_t, tok, tok)
    objective = Objective({1: 2, 3: 3}, None, OutputTerm(make_objective('full'), teacher))
    seen = 0
    for rows in cut_rollout(roll, weights, budget, reading):
        ours = objective.teacher_rows(teacher, rows)
        assert rows.written is None and not rows.inside.any()
        for k, (flat, row) in enumerate(zip(rows.at.tolist(), rows.answer.tolist(), strict=True)):
            # Which answer is it? The one with these ids.
            number = next(b for b in range(3) if roll.ids[b, :roll.length[b]].equal(rows.ids[row, :roll.length[b]]))
            answer = roll.answers()[number]
            t = flat % rows.ids.shape[1] - (len(prompts[number]) - 1)
            states = dict(zip((2, 3), teacher.hidden(torch.tensor([prompts_t[number] + answer]), [2, 3]), strict=True))
            at = len(prompts_t[number]) - 1 + t
            for key, layer in ((1, 2), (3, 3), ('head', 3)):
                assert (ours[key][k] - states[layer][0, at]).norm() <= rounding(states[layer][0, at], 1000)
            assert rows.next_token[k] == answer[t]
            seen += 1
    assert seen == int((weights > 0).sum()) > 6


def test_the_teachers_text_holds_question_and_solution_as_they_are():
    """Solutions are full of braces, and of messages only the last one changes."""
    text = 'Q: {question} S: {solution}.'
    problem = Problem('a {solution} b', '7', [1], r'\boxed{7} {question}')
    assert with_solution(problem, text) == r'Q: a {solution} b S: \boxed{7} {question}.'
    messages = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'q'}]
    shown = with_solution(replace(problem, question=messages), text)
    assert shown == [messages[0], {'role': 'user', 'content': r'Q: q S: \boxed{7} {question}.'}]
    assert messages[1]['content'] == 'q'


def test_the_solution_of_a_row_is_its_longest_answer(toy_cfg, tmp_path):
    """GSM8K has the work and the answer in one column, others have a column for each, conversations a last message."""
    rows = [{'question': '1+2', 'answer': '1+2=3;\n#### 3'}, {'question': '2+2', 'answer': '4', 'solution': '2+2=4;'},
            {'messages': [{'role': 'user', 'content': '3+2'}, {'role': 'assistant', 'content': '3+2=5;'}], 'answer': '5'},
            {'question': '4+2', 'answer': 6}, {'question': '5+2'}]
    file = tmp_path / 'rows.jsonl'
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    tok = load_tokenizer(toy_cfg['student'])
    problems = load_problems(file, tok, show=False)
    assert [problem.solution for problem in problems] == ['1+2=3;\n#### 3', '2+2=4;', '3+2=5;', '6', None]
    assert [problem.answer for problem in problems] == ['3', '4', '5', '6', None]
    with pytest.raises(UserError, match="teacher_sees='solution': 1 of 5 problems have no solution"):
        show_solutions(problems, [tok], '{solution}{question}')
    few = show_solutions(problems[1:4], [tok], '{solution}{question}', longest=10)
    assert [problem.teacher_ids for problem in few] == [tok.chat('64+2')]    # the others have 11 tokens
    with pytest.raises(UserError, match='longer than 3 tokens; raise max_prompt_tokens='):
        show_solutions(problems[:4], [tok], '{solution}{question}', longest=3)


# ---- weights that follow ---------------------------------------------------------------------------

@pytest.mark.parametrize('decay', [0.0, 0.75])
def test_the_teacher_is_the_average_of_the_students_weights(decay):
    """A recursion in plain tensors. With decay 0 it is a copy. A head that does not learn stays."""
    student, teacher = tiny_model(0, tied=False), tiny_model(0, tied=False).bfloat16()
    student.head.requires_grad_(False)
    opt = adamw(student, 0.1, (0.9, 0.95), 1e-8, 0.0)
    keep_average(opt)
    want = {name: p.detach().clone() for name, p in student.named_parameters()}
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        for p in student.parameters():
            p.grad = torch.randn(p.shape, generator=g) if p.requires_grad else None
        opt.step()
        move_average(opt, decay)
        for name, p in student.named_parameters():
            want[name] = decay * want[name] + (1 - decay) * p.detach()
    before = teacher.head.weight.clone()
    teach_average(opt, student, teacher)
    assert teacher.head.weight.equal(before)
    for name, p in teacher.named_parameters():
        assert (p.float() - want[name]).abs().max() <= 2**-8 * want[name].abs().max(), name
        assert (p.float() - want[name]).norm() <= rounding(want[name].bfloat16(), 1)
        if decay == 0 and name != 'head.weight':
            assert p.equal(dict(student.named_parameters())[name].bfloat16())


# ---- runs ------------------------------------------------------------------------------------------

FOLLOWS = SELF | {'teacher_every': 2, 'teacher_decay': 0.5, 'opd_weight': 1.0, 'opd': 'full'}


@pytest.fixture(scope='module')
def followed(toy_dir, tmp_path_factory):
    """A run of five steps whose teacher moves after the second and the fourth."""
    out = tmp_path_factory.mktemp('self') / 'run'
    main(load_config(argv(toy_dir, out, steps=5, lr=1e-2, **FOLLOWS)))
    return out


@pytest.mark.parametrize('decay', [0.0, 0.5])
def test_a_following_teacher_resumes_bit_for_bit(toy_dir, tmp_path, monkeypatch, decay):
    """The run is killed in step 7 and goes on from the checkpoint of step 5, two steps after the teacher has moved: the teacher
    is neither the student nor the model of the start. A copy of the student of step 5 would teach steps 6 to 8 otherwise."""
    keys = FOLLOWS | dict(teacher_every=3, teacher_decay=decay, steps=8, save_every=5, lr=1e-2, eval_data='')
    run_with_a_stop(argv(toy_dir, tmp_path / 'stopped', **keys), 7, monkeypatch)
    main(load_config(argv(toy_dir, tmp_path / 'whole', **keys)))
    assert_equal_runs(tmp_path / 'stopped', tmp_path / 'whole')
    assert [row['step'] for row in read_starts(tmp_path / 'stopped')] == [0, 5]

    # The teacher of step 6 is that of step 4, and not the student of step 5.
    state = {}
    for file in (tmp_path / 'whole/ckpt-000005/resume').iterdir():
        state |= load_file(file)
    assert any(name.startswith('average.') for name in state)
    assert not any(state[name].equal(state[name.replace('average.', 'weight.')]) for name in state if name.startswith('average.'))


def test_a_following_teacher_changes_the_losses_after_its_first_move(followed, toy_dir, tmp_path):
    """Steps 1 and 2 are those of a frozen teacher, step 3 is not."""
    keys = FOLLOWS | {'teacher_every': 0, 'teacher_decay': 0.0}
    main(load_config(argv(toy_dir, tmp_path / 'frozen', steps=5, lr=1e-2, **keys)))
    losses, frozen = ([row['loss'] for row in log_of(out)[1:]] for out in (followed, tmp_path / 'frozen'))
    assert losses[:2] == frozen[:2] and losses[2] != frozen[2]


def test_a_teacher_that_is_the_student_and_sees_the_same_has_nothing_to_teach(toy_dir, tmp_path):
    """The control. With a solution in view it has."""
    for name, keys in (('prompt', SELF | {'teacher_sees': 'prompt'}), ('solution', SELF)):
        main(load_config(argv(toy_dir, tmp_path / name, steps=1, eval_data='', **keys)))
    blind, seeing = (log_of(tmp_path / name)[1] for name in ('prompt', 'solution'))
    assert blind['grad_norm'] == 0 and blind['rep/cos'] == pytest.approx(1, abs=1e-6)
    assert seeing['grad_norm'] > 0 and seeing['rep/cos'] < 1 and seeing['align'] == 1


def test_answers_that_are_the_solutions_are_learned_as_supervised_text(toy_cfg, toy_dir, tmp_path):
    """The control without any sampling: at the first step the loss is the cross-entropy of the solutions."""
    keys = dict(opd='supervised', opd_weight=1, oprd_weight=0, answers_by='solution', positions='all', eval_data='', steps=1)
    main(load_config(argv(toy_dir, tmp_path / 'r', n=1, **keys)))
    tok, student = load_tokenizer(toy_cfg['student']), load_model(toy_cfg['student'])
    train = load_problems(toy_cfg['data'], tok, show=False)
    losses = []
    for number in prompt_order(len(train), 3, 1, 0):
        answer = (tok.encode(train[number].solution) + tok.stop_ids)[:20]
        logits = student(torch.tensor([train[number].ids + answer]))[0, len(train[number].ids) - 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
    assert log_of(tmp_path / 'r')[1]['loss'] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_the_teacher_is_scored_with_the_solution_in_view(toy_dir, toy_cfg, tmp_path, monkeypatch):
    """Without it its score would be the student's."""
    asked = {}
    real = distill.sample_and_grade

    def noted(model, tok, sets, *args, **keys):
        asked[keys['label']] = [problem.ids for problems in sets.values() for problem in problems]
        return real(model, tok, sets, *args, **keys)
    monkeypatch.setattr(distill, 'sample_and_grade', noted)
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, **SELF)))
    tok = load_tokenizer(toy_cfg['student'])
    held_out = load_problems(toy_cfg['eval_data'], tok, show=False)
    assert asked['evaluate student, step 0'] == [problem.ids for problem in held_out]
    assert asked['evaluate teacher, step 0'] == [tok.chat(problem.solution + problem.question) for problem in held_out]


def test_a_problem_without_a_solution_cannot_be_learned(toy_dir, tmp_path):
    """The first step that asked it ended with a traceback of the tokenizer."""
    file = tmp_path / 'some.jsonl'
    file.write_text('{"question": "1+2-3", "solution": "1+2=3;"}\n{"question": "4+5-6"}\n')
    with pytest.raises(UserError, match="^answers_by='solution': 1 of 2 problems have no solution; delete them"):
        main(load_config(argv(toy_dir, tmp_path / 'r', answers_by='solution', data=file)))
    assert not (tmp_path / 'r').exists()


@pytest.mark.parametrize('keys, says', [
    (dict(teacher_every=1), 'can follow it; set teacher=self'),
    (dict(teacher='self', teacher_decay=0.5), 'the teacher never follows the student; set teacher_every=1'),
    (dict(SELF, solution_text='{question}'), 'wants {question}, and {solution} once'),
])
def test_keys_of_a_self_teacher_that_make_no_sense(toy_dir, tmp_path, keys, says):
    with pytest.raises(UserError) as error:
        main(load_config(argv(toy_dir, tmp_path / 'r', **keys)))
    assert says in str(error.value) and not (tmp_path / 'r').exists()
