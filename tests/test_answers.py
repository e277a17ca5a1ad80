"""The answers of a run's evaluations: on disk what was scored, on the terminal a few of them."""
import json
from statistics import fmean

import pytest
from conftest import argv, assert_all_measured, log_of, scores_of

import distill
import eval_math
from configs import load_config
from support.answers import NAMES, answer_lines, chosen, fitted, forget_later, keep_answers, width_of
from support.report import score_names


def answers_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def verdict(text, problem):
    """Stands for the grader, for which so small a student is never right."""
    return {'extracted': text[:1] or None, 'correct': (len(text) + int(problem.answer)) % 3 == 0, 'decided_by': ''}


def scores_by_hand(rows, per_problem):
    """Avg@n, Best@n and length of the answers to one set."""
    right = {}
    for row in rows:
        right.setdefault(row['problem'], []).append(row['correct'])
    assert {len(group) for group in right.values()} == {per_problem}
    return {f'avg@{per_problem}': 100 * fmean(correct for group in right.values() for correct in group),
            f'best@{per_problem}': 100 * fmean(any(group) for group in right.values()),
            'len': fmean(row['length'] for row in rows)}


@pytest.fixture(scope='module')
def run_of_two_sets(toy_dir, toy_cfg, tmp_path_factory):
    """A run that is evaluated on two sets of unequal size, and what it printed."""
    folder = tmp_path_factory.mktemp('two sets')
    problems = open(toy_cfg['eval_data']).read().splitlines()
    (folder / 'small.jsonl').write_text('\n'.join(problems[:2]))
    (folder / 'large.jsonl').write_text('\n'.join(problems[2:]))
    args = argv(toy_dir, folder / 'r', eval_data=f"{folder / 'small.jsonl'},{folder / 'large.jsonl'}", steps=3, eval_n=3, eval_show=3)
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_math, 'verdict', verdict)
        patch.setattr('support.answers.print0', printed.append)
        distill.main(load_config(args))
    return folder / 'r', printed


def test_the_answers_on_disk_are_those_that_were_scored(run_of_two_sets):
    """Accuracy, Best@n and length recomputed from the files, set by set, before the first step, of the teacher, and at each
    evaluation. Guards against answers of another step, of one rank alone or of the wrong model."""
    out, _ = run_of_two_sets
    log = log_of(out)
    rows = {'teacher': (log[0], 'teacher')} | {f'{step:06d}': (log[step], 'eval') for step in (0, 2, 3)}
    assert {file.stem for file in (out / 'answers').iterdir()} == set(rows)
    texts = set()
    for name, (row, side) in rows.items():
        answers = answers_in(out / f'answers/{name}.jsonl')
        assert all(tuple(answer) == NAMES for answer in answers) and len(answers) == 6 * 3
        by_set = {}
        for label in ('small', 'large'):
            by_set[label] = scores_by_hand([answer for answer in answers if answer['set'] == label], 3)
        want = {metric: fmean(values[metric] for values in by_set.values()) for metric in by_set['small']}
        for label, values in by_set.items():
            want |= {f'{metric}/{label}': value for metric, value in values.items()}
        assert scores_of(row, side) == want and list(want) == score_names(by_set, 3)
        order = [(('small', 'large').index(answer['set']), answer['problem'], answer['sample']) for answer in answers]
        assert order == sorted(order) and len(set(order)) == len(order)
        texts.add(tuple(answer['text'] for answer in answers))
    assert len(texts) == 4, 'each evaluation has answers of its own'


def test_several_sets_have_their_names_in_every_row(run_of_two_sets):
    out, _ = run_of_two_sets
    assert_all_measured(out)
    names = [name for name in log_of(out)[0] if name.startswith('eval/')]
    assert names == ['eval/avg@3', 'eval/best@3', 'eval/len', 'eval/avg@3/small', 'eval/best@3/small', 'eval/len/small',
                     'eval/avg@3/large', 'eval/best@3/large', 'eval/len/large']


def test_the_same_problems_are_shown_at_each_evaluation(run_of_two_sets):
    """Of both models before the first step, and of the student after steps 2 and 3: three answers, of both sets, two lines
    each, with the verdict, the extracted and the known answer."""
    out, printed = run_of_two_sets
    heads, texts = printed[::2], printed[1::2]
    assert [head.split(',')[0] for head in heads] == [who for who in ('  step 0', '  teacher', '  step 2', '  step 3') for _ in range(3)]
    for i, name in enumerate(('000000', 'teacher', '000002', '000003')):
        answers = {(a['set'], a['problem']): a for a in answers_in(out / f'answers/{name}.jsonl') if a['sample'] == 0}
        for head, text, key in zip(heads[3 * i:], texts[3 * i:], [('small', 0), ('large', 0), ('large', 2)], strict=False):
            answer = answers[key]
            says = 'right' if answer['correct'] else 'wrong'
            found = answer['extracted'] or 'no answer'
            assert f", {key[0]} problem {key[1]}: {says}, {found} (known: {answer['answer']}) | {answer['prompt']}" in head
            assert text.strip() == fitted(answer['text'], 116)


def some_rows(count):
    return [{'set': 'a', 'problem': i // 2, 'sample': i % 2, 'prompt': f'p{i}', 'text': f't{i}', 'answer': '1', 'extracted': None,
             'correct': False, 'length': 3, 'stopped': True} for i in range(count)]


@pytest.mark.parametrize('count, problems', [(0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_what_is_shown_is_spread_over_the_problems(count, problems, tmp_path, capsys):
    """One answer to a problem; never more than there are; 0 prints nothing and still writes the file."""
    rows = some_rows(10)
    assert [(row['problem'], row['sample']) for row in chosen(rows, count)] == [(problem, 0) for problem in problems]
    keep_answers(tmp_path, 'student', 7, rows[::-1], ['a'], count)
    assert answers_in(tmp_path / 'answers/000007.jsonl') == rows
    assert capsys.readouterr().out.count('\n') == 2 * min(count, 5)


def test_shown_answers_cannot_command_the_terminal(tmp_path, capsys):
    """Answers, prompts and known answers are text from outside: escape sequences, marks that reverse the direction, carriage
    returns and newlines. Two lines, whatever the model has written."""
    evil = 'a\x1b[2J\x1b]0;title\x07\u202eb\r\nc\td\u2028e\x9b31m\ud800'
    row = some_rows(1)[0] | {'set': evil, 'prompt': evil, 'text': evil, 'answer': evil, 'extracted': evil}
    keep_answers(tmp_path, 'teacher', 0, [row], [evil], 1)
    printed = capsys.readouterr().out
    assert printed.count('\n') == 2 and not any(mark in printed for mark in '\x1b\x07\u202e\r\t\u2028\x9b\ud800')
    assert r'\x1b[2J' in printed and r'\u202e' in printed
    assert answers_in(tmp_path / 'answers/teacher.jsonl') == [row], 'on disk they are as they were'


@pytest.mark.parametrize('columns', [40, 80, 200])
@pytest.mark.parametrize('text', ['word ' * 9000, '漢字かな' * 3000, '\u202e' * 500, 'short', '', '\U0001f600x' * 90])
def test_shown_answers_fit_the_terminal(text, columns):
    """The beginning and the end are kept, because the answer stands at the end; a Chinese character takes two columns."""
    row = some_rows(1)[0] | {'prompt': text, 'text': text, 'extracted': text[:200], 'answer': text[-200:]}
    lines = answer_lines(row, 'step 3', columns)
    assert len(lines) == 2 and max(map(width_of, lines)) <= max(columns, 110)
    assert width_of(lines[1]) <= columns and 'wrong, ' in lines[0]
    assert width_of('漢a') == 3 and width_of(fitted(text, columns)) <= columns
    if len(text) > 4 * columns:
        assert ' ... ' in lines[1] and lines[1].endswith(text.strip()[-3:] if text[0] != '\u202e' else r'\u202e')
        assert width_of(fitted(text, columns)) > 0.9 * columns


def test_answers_of_steps_that_are_taken_again_are_deleted(tmp_path):
    """What the run goes on from keeps its answers; files with other names are not ours, but for the half of a file that a
    killed process left behind."""
    (tmp_path / 'answers').mkdir()
    for name in ('teacher', '000000', '000004', '000005', '1000000', 'notes', '12'):
        (tmp_path / f'answers/{name}.jsonl').write_text('')
    (tmp_path / 'answers/.000004.jsonl.tmp77').write_text('{"set": "a", "pro')
    forget_later(tmp_path, 4)
    assert sorted(file.stem for file in (tmp_path / 'answers').iterdir()) == ['000000', '000004', '12', 'notes', 'teacher']
    forget_later(tmp_path, -1)
    assert sorted(file.stem for file in (tmp_path / 'answers').iterdir()) == ['12', 'notes', 'teacher']
    forget_later(tmp_path / 'none', 4)
