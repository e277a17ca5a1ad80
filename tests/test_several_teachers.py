"""Several teachers, each for its share of the prompts: against one loss over all answers by brute force, and against runs
with one teacher."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import argv, assert_equal_runs, for_script, log_of, resume_state, rounding, tiny_model
from emulated_cuda import emulated_cuda

import bridge
import distill
from configs import load_config
from distill import main
from extensions.several_teachers import assign_teachers, configs, keep_on_host, split
from formats.problems import Problem, load_problems
from formats.tokenizer import load_tokenizer
from losses import HiddenTerm, oprd_loss
from rollout import sample
from step import Objective, accumulate, add, cut_rollout, position_mask, position_weights
from support.files import read_json
from support.runtime import UserError
from teacher import Share, Teacher

PROMPTS = [[1, 5, 9], [2, 3], [4, 4, 4, 4], [7]]
MAPS = {1: 2, 3: 3}, {1: 1, 3: 4}                        # the second teacher has four layers


def teachers_of_two_depths():
    """Two of float64, the second one deeper than the first."""
    teachers = []
    for seed, layer_map, L in ((1, MAPS[0], 3), (2, MAPS[1], 4)):
        model = tiny_model(seed, L=L).double().requires_grad_(False)
        teachers.append(Teacher(None, True, layer_map, None, model, Objective(layer_map, HiddenTerm(), None)))
    return teachers


def gradients(student):
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize('assigned', [[0, 1, 1, 0], [1, 1, 1, 1]], ids=['both teach', 'one has no answer'])
@pytest.mark.parametrize('average', ['sequence', 'token'])
def test_the_gradient_is_that_of_one_loss_over_all_answers(assigned, average):
    """Brute force: each answer alone, with the states of its own teacher, and weights over all answers. If the weights were
    normalised for each teacher, the smaller share would count too much."""
    student = tiny_model(0).double()
    roll = sample(student, PROMPTS, n=1, max_new_tokens=9, stop=[0], seed=4)
    teachers = teachers_of_two_depths()
    weights = position_weights(position_mask(roll), average)
    want = 0.0
    for row, number in enumerate(assigned):
        ids = roll.ids[row:row + 1, :int(roll.length[row])]
        at = weights[row].nonzero().squeeze(-1)
        states = teachers[number].model.hidden(ids, sorted(set(MAPS[number].values())), at)
        states = dict(zip(sorted(set(MAPS[number].values())), states, strict=True))
        own = student.hidden(ids, [1, 3], at)
        want = want + oprd_loss(own, [states[t] for t in MAPS[number].values()], weights[row][at])
    want.backward()
    expected = gradients(student)
    student.zero_grad()

    problems = [Problem('', None, [], teacher=number) for number in assigned]
    shares = split(Share(teachers[0], roll, problems), teachers)
    for share in shares:
        share.mask = position_mask(share.roll)
    tokens = sum(share.mask.sum() for share in shares)
    sums = {}
    for share in shares:
        batches = cut_rollout(share.roll, position_weights(share.mask, average, len(PROMPTS), tokens), 20)
        add(sums, accumulate(student, share.teacher.model, batches, share.teacher.objective, {'oprd': 1.0}))
    assert (gradients(student) - expected).norm() <= rounding(expected, 1000)
    assert abs(sums['loss/oprd'] - want) <= rounding(want.detach().float(), 100)


def test_each_teacher_gets_its_own_answers_and_their_advantages():
    roll = sample(tiny_model(), PROMPTS, n=1, max_new_tokens=5, stop=[0], seed=1)
    problems = [Problem(str(row), None, [], teacher=number) for row, number in enumerate([1, 0, 1, 1])]
    first, second, third = split(Share(None, roll, problems, torch.tensor([1.0, 2, 3, 4])), ['a', 'b', 'c'])
    assert [first.teacher, second.teacher] == ['a', 'b'] and third.teacher == 'c'
    assert first.roll.ids.equal(roll.ids[[1]]) and second.roll.ids.equal(roll.ids[[0, 2, 3]])
    assert second.roll.answers() == [roll.answers()[row] for row in (0, 2, 3)]
    assert [problem.question for problem in second.problems] == ['0', '2', '3'] and second.advantage.tolist() == [1, 3, 4]
    assert second.roll.prompt.tolist() == [0, 1, 2]
    assert not position_mask(third.roll).any() and len(third.roll.ids) == 1


def test_weights_deal_the_prompts_in_proportion_and_always_alike():
    problems = [Problem(str(number), None, []) for number in range(4000)]
    numbers = [problem.teacher for problem in assign_teachers(problems, [3, 1], 2, seed=0)]
    deviation = (4000 * 3 / 4 * 1 / 4) ** 0.5
    assert abs(numbers.count(0) - 3000) < 4 * deviation and numbers.count(0) + numbers.count(1) == 4000
    again = assign_teachers(problems[::-1], [3, 1], 2, seed=0)
    assert [problem.teacher for problem in again[::-1]] == numbers           # whatever the order of the file
    assert [problem.teacher for problem in assign_teachers(problems, [3, 1], 2, seed=1)] != numbers


def test_a_tag_names_the_teacher(toy_cfg, tmp_path):
    file = tmp_path / 'tagged.jsonl'
    rows = [{'question': '1+2', 'teacher': 2}, {'question': '2+2', 'teacher': 1}, {'question': '3+2', 'teacher': 'two'}]
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    problems = load_problems(file, load_tokenizer(toy_cfg['student']), show=False)
    assert [problem.teacher for problem in assign_teachers(problems[:2], 'tag', 2, 0)] == [1, 0]
    table = tmp_path / 'tagged.csv'
    table.write_text('question,teacher\n1+2,2\n2+2,1\n3+2,\n')            # its cells are texts
    cells = load_problems(table, load_tokenizer(toy_cfg['student']), show=False)
    assert [problem.teacher for problem in assign_teachers(cells[:2], 'tag', 2, 0)] == [1, 0]
    for wrong, says in ((problems, "'3\\+2' has teacher='two'"), ([replace(problems[0], tag=3)], 'teacher=3; write a number'),
                        ([replace(problems[0], tag=True)], 'teacher=True'), (cells, "'3\\+2' has teacher=None"),
                        ([replace(problems[0], tag='0')], 'teacher=0; write a number'), ([replace(problems[0], tag='')], "teacher=''")):
        with pytest.raises(UserError, match=says):
            assign_teachers(wrong, 'tag', 2, 0)


def test_names_with_commas_between(tmp_path):
    (tmp_path / 'a,b').mkdir()
    one = configs({'teacher': f'{tmp_path}/a,b', 'bridge': ''})
    assert [pair['teacher'] for pair in one] == [f'{tmp_path}/a,b']          # a folder that exists is never split
    pairs = configs({'teacher': 'x/a,x/b', 'bridge': ',out/b', 'lr': 1})
    assert [(pair['teacher'], pair['bridge'], pair['lr']) for pair in pairs] == [('x/a', '', 1), ('x/b', 'out/b', 1)]
    with pytest.raises(UserError, match='nothing between two commas'):
        configs({'teacher': 'x/a,', 'bridge': ''})
    with pytest.raises(UserError, match='names 3 and teacher= 2'):
        configs({'teacher': 'x/a,x/b', 'bridge': 'a,b,c'})


# ---- runs ------------------------------------------------------------------------------------------

TWO = dict(toy_halves=True, positions='all')


@pytest.fixture(scope='module')
def specialists(toy_dir, tmp_path_factory):
    """A run with two teachers."""
    out = tmp_path_factory.mktemp('two') / 'run'
    main(load_config(argv(toy_dir, out, **TWO)))
    return out


def test_each_teacher_and_each_set_has_its_scores(specialists):
    row = log_of(specialists)[0]
    names = {f'{side}/avg@2{of}' for side in ('eval', 'teacher', 'teacher2') for of in ('', '/eval_sums', '/eval_products')}
    assert {name for name in row if '/avg@2' in name} == names and all(row[name] is not None for name in names)
    results = read_json(specialists / 'results.json')
    assert list(results)[:4] == ['student', 'teacher', 'teacher2', 'distilled']
    assert sorted(path.name for path in (specialists / 'answers').glob('teacher*')) == ['teacher.jsonl', 'teacher2.jsonl']
    start, = [json.loads(line) for line in (specialists / 'starts.jsonl').read_text().splitlines()]
    assert len(set(start['teacher'].split(','))) == 2 and start['bridge'] == ''


def test_two_teachers_resume_bit_for_bit(specialists, toy_dir, tmp_path):
    out = tmp_path / 'run'
    main(load_config(argv(toy_dir, out, **TWO | dict(steps=2, schedule='constant', warmup=0))))
    main(load_config(argv(toy_dir, out, **TWO | dict(schedule='constant', warmup=0))))
    main(load_config(argv(toy_dir, tmp_path / 'whole', **TWO | dict(schedule='constant', warmup=0))))
    a, b = resume_state(out), resume_state(tmp_path / 'whole')
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_one_teacher_that_is_named_twice_teaches_the_same(toy_dir, toy_cfg, tmp_path):
    """The prompts are dealt to the two at random; both are the same model."""
    teacher = toy_cfg['teacher']
    for name, keys in (('once', {'teacher': teacher}),
                       ('twice', {'teacher': f'{teacher},{teacher}', 'teacher_share': '[2,1]'})):
        main(load_config(argv(toy_dir, tmp_path / name, opd='full', opd_weight=0.5, prompts_per_step=6, steps=1,
                              eval_data='', **keys)))
    once, twice = (log_of(tmp_path / name)[1] for name in ('once', 'twice'))
    for name in ('loss', 'loss/oprd', 'loss/opd', 'loss/layer/2', 'rep/cos', 'opd/kl', 'grad_norm', 'acc/rollout', 'tokens'):
        assert twice[name] == pytest.approx(once[name], rel=1e-5), name


def test_teachers_of_other_vocabularies_compare_bytes(toy_dir, tmp_path):
    """One teacher reads the student's ids, the other its own; there are no states that both pairs could compare."""
    paths = {}
    for tokens in ('same', 'merged'):
        cfg = distill.toy.prepare(load_config(argv(toy_dir, 'unused', toy_teacher_tokens=tokens)), distill.start('cpu'))
        paths[tokens] = cfg['teacher']
    keys = dict(teacher=f"{paths['same']},{paths['merged']}", teacher_share='[1,1]', opd='byte', opd_weight=1,
                oprd_weight=0, prompts_per_step=6, steps=2, diagnose_every=1)
    main(load_config(argv(toy_dir, tmp_path / 'r', **keys)))
    row = log_of(tmp_path / 'r')[2]
    assert row['loss'] > 0 and row['opd/kl'] > 0 and 0 < row['align'] < 1 and 'rep/cos' not in row


def test_a_teacher_with_a_bridge_beside_one_without(toy_dir, toy_cfg, tmp_path):
    """Another depth and width: its rows are projected, those of the first teacher are not. The logged loss of a layer is the
    sum over both shares, so it is not below either alone."""
    wide = distill.toy.prepare(load_config(argv(toy_dir, 'unused', toy_teacher_layers=4, toy_teacher_width=32)), distill.start('cpu'))
    keys = {key: toy_cfg[key] for key in ('student', 'data', 'eval_data')}
    folder = tmp_path / 'bridge'
    bridge.main(load_config(for_script('bridge.py', argv(toy_dir, 'unused', **keys, teacher=wide['teacher'], bridge=folder,
                                                         bridge_prompts=30)), script='bridge.py'))
    both = dict(teacher=f"{toy_cfg['teacher']},{wide['teacher']}", bridge=f',{folder}', teacher_share='[1,1]')
    alone = dict(teacher=wide['teacher'], bridge=folder)
    for name, chosen in (('both', both), ('alone', alone)):
        main(load_config(argv(toy_dir, tmp_path / name, steps=2, prompts_per_step=6, **keys | chosen)))
    rows = log_of(tmp_path / 'both')
    assert all(row['loss'] == pytest.approx(sum(row[f'loss/layer/{l}'] for l in (1, 2, 3)) / 3) for row in rows[1:])
    assert rows[1]['loss'] != log_of(tmp_path / 'alone')[1]['loss'] and rows[2]['grad_norm'] > 0
    start, = [json.loads(line) for line in (tmp_path / 'both/starts.jsonl').read_text().splitlines()]
    assert start['bridge'] and ',' not in start['bridge']
    with pytest.raises(UserError, match='student width 24, teacher width 32'):       # a bridge for the wrong one
        main(load_config(argv(toy_dir, tmp_path / 'r', **keys | both | dict(bridge=f'{folder},'))))


# ---- in turn ---------------------------------------------------------------------------------------

def test_teachers_in_turn_equal_teachers_together_bit_for_bit(toy_dir, tmp_path):
    """On an emulated GPU, with all that a run does. While one teacher works, the weights of the other lie on the host, and a
    read of them from a kernel would fail."""
    for name, in_turn in (('together', False), ('in turn', True)):
        with emulated_cuda():
            main(load_config(argv(toy_dir, tmp_path / name, teachers_in_turn=in_turn, device='cuda', dtype='float32',
                                  steps=2, opd='full', opd_weight=0.5, diagnose_every=1, **TWO)))
    assert_equal_runs(tmp_path / 'together', tmp_path / 'in turn')


def test_weights_are_on_the_device_only_while_a_teacher_works():
    with emulated_cuda() as cuda:
        model = tiny_model().to(cuda.device).requires_grad_(False)
        want = {name: p.detach().cpu() for name, p in model.named_parameters()}
        ready = keep_on_host(model, cuda.device)
        assert not any(p.is_cuda for p in model.parameters())
        for _ in range(2):                   # a second time too
            with ready(model) as working:
                assert working is model and all(p.is_cuda for p in model.parameters())
                assert all(p.detach().cpu().equal(want[name]) for name, p in model.named_parameters())
            assert not any(p.is_cuda for p in model.parameters())


# ---- mistakes --------------------------------------------------------------------------------------

@pytest.mark.parametrize('keys, says', [
    (dict(teacher='toy,'), 'nothing between two commas'),
    (dict(toy_halves=True, data='{data}'), "data= names 1 sets for 2 teachers; name one for each"),
    (dict(toy_halves=True, teacher_share='[1,1,1]'), "give 'data', 'tag', or a weight for each of them"),
    (dict(toy_halves=True, teacher_share='tag'), 'has teacher=None; write a number from 1 to 2'),
    (dict(toy_halves=True, teacher_every=1), 'can follow it; set teacher=self'),
    (dict(toy_halves=True, teachers_in_turn=True, teacher_shard=True), 'teachers_in_turn=True'),
    (dict(teachers_in_turn=True), 'teachers_in_turn=True'),
    (dict(toy_halves=True, answers_by='teacher', opd='supervised', opd_weight=1), "answers_by='teacher'"),
])
def test_keys_of_several_teachers_that_make_no_sense(toy_dir, toy_cfg, tmp_path, keys, says):
    keys = {key: str(value).format(data=toy_cfg['data']) for key, value in keys.items()}
    with pytest.raises(UserError) as error:
        main(load_config(argv(toy_dir, tmp_path / 'r', **keys)))
    assert says in str(error.value) and not (tmp_path / 'r').exists()


def test_memory_counts_all_teachers_or_the_largest(toy_dir, tmp_path, capsys):
    """On a GPU in turn there is room for one; together for both."""
    lasting = {}
    for in_turn in (False, True):
        main(load_config(argv(toy_dir, tmp_path / 'r', teachers_in_turn=in_turn, dry_run=True, ranks=8, eval_data='', prompts_per_step=8, **TWO)))
        lasting[in_turn] = capsys.readouterr().out
    assert "other teachers' weights" in lasting[False] and "other teachers' weights" not in lasting[True]
