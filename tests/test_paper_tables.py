"""The paper's tables from hand-made runs."""
import json
import random
from statistics import fmean

import pytest
from conftest import write_log

import eval_math
from configs import load_config
from paper.runs import Missing, read_runs
from paper.tables import (
    over_seeds,
    printed_lines,
    read_scores,
    scores_data,
    scores_lines,
    table2,
    table3,
    table3_data,
    table3_lines,
    table4,
    table5,
    table6,
)
from studies.compare import span
from support.provenance import append_start
from support.runtime import UserError

SAME = ['configs/toy.py', 'eval_n=2']
WIDE = ['configs/toy_bridge.py', 'eval_n=2']
TOKENS = ['configs/toy_bridge_tokens.py', 'eval_n=2']
OPD = ['bridge=', 'oprd_weight=0', 'opd_weight=1']


def answer(label, problem, sample, correct, text='1 2 3 4 5', length=7):
    return {'set': label, 'problem': problem, 'sample': sample, 'prompt': 'p', 'text': text, 'answer': '1', 'extracted': '1',
            'correct': correct, 'length': length, 'stopped': True}


def graded(*right, label='eval', n=2, **more):
    """Answers to so many problems: right[i] of the n answers to problem i are right."""
    return [answer(label, problem, sample, sample < count, **more) for problem, count in enumerate(right) for sample in range(n)]


def logged(rows, n=2):
    """Scores of answers, as distill.py logs them."""
    return eval_math.shared_scores(rows, list(dict.fromkeys(row['set'] for row in rows)), n)


def evaluated_run(folder, words, student, method, teacher=None, **names):
    """A finished run of two steps, of 6 and 12 seconds, and its answers. names: more of what is logged in each step."""
    (folder / 'answers').mkdir(parents=True)
    config = load_config(words) | {'dtype': 'float32'}
    (folder / 'config.json').write_text(json.dumps({'run': 'x', 'config': config}))
    rows = [{'step': 0}]
    for step in (1, 2):
        rows.append({'step': step, 'time/sample': 4.0 * step, 'time/update': 2.0 * step, 'elapsed': 100.0, **names})
    for side, number, file, answers in (('eval', 0, '000000', student), ('eval', 2, '000002', method), ('teacher', 0, 'teacher', teacher)):
        if answers:
            rows[number] |= {f'{side}/{name}': value for name, value in logged(answers, config['eval_n']).items()}
            (folder / f'answers/{file}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in answers))
    write_log(folder, rows)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Two methods, two seeds, three problems: student 1 and 2 of 6 right, teacher 6, OPRD 4 and 5, top-1 2 and 2."""
    made = []
    for seed in (0, 1):
        student = graded(1, 0, 0) if seed == 0 else graded(1, 1, 0)
        common = (student, graded(2, 2, 2))
        words = [*SAME, f'seed={seed}']
        made.append(evaluated_run(tmp_path / f'a{seed}', words, common[0], graded(2, 2, seed), common[1]))
        made.append(evaluated_run(tmp_path / f'b{seed}', [*words, *OPD, 'opd=sampled'], common[0], graded(1, 1, 0), common[1]))
    return made


def test_table_2_by_hand(folders):
    data = scores_data(2, read_runs(folders))
    shares = {row['method']: row['scores']['eval']['avg']['by_seed'] for row in data['rows']}
    sixth = 100 / 6
    assert shares == {'teacher': [100, 100], 'student': [pytest.approx(sixth), pytest.approx(2 * sixth)],
                      'OPRD': [pytest.approx(4 * sixth), pytest.approx(5 * sixth)],
                      'OPD top-1': [pytest.approx(2 * sixth), pytest.approx(2 * sixth)]}
    oprd = data['rows'][2]
    assert oprd['scores']['eval']['avg']['mean'] == pytest.approx(75) and oprd['steps'] == 2 and oprd['seeds'] == [0, 1]
    assert data['problems'] == {'eval': 3} and data['n'] == 2 and not any(row['paper'] for row in data['rows'])

    # Over the problems OPRD has 100, 100 and 25: with three equal draws the mean is 25 to 100.
    assert oprd['scores']['eval']['avg']['interval'] == [25, 100]
    lines = scores_lines(data)
    assert lines[2] == '| method | Avg@2, %, eval | steps | seeds |'
    assert lines[4] == '| teacher | 100.0 (100.0-100.0) [100.0-100.0] |  | 2 |'
    assert lines[6] == '| OPRD | 75.0 (66.7-83.3) [25.0-100.0] | 2 | 2 |'
    assert 'Problems of each seed: 3 of eval, each answered 2 times.' in lines[9]
    assert lines[10].startswith("No run is at the paper's size, so its numbers are not beside ours. OPRD has dtype='float32' (paper: ")
    assert 'Best' not in ' '.join(lines) and len(lines) == 11


def test_scores_are_those_of_eval_math(tmp_path):
    """The oracle is the evaluation of eval_math.py, which computes all of them from the same rows at once."""
    random_source = random.Random(0)
    rows = []
    for problem in range(9):
        for sample in range(4):
            text = ' '.join(random_source.choice('ab') for _ in range(random_source.randrange(9)))
            rows.append(answer('eval', problem, sample, random_source.random() < 0.4, text, random_source.randrange(50)))
    random_source.shuffle(rows)
    folder = evaluated_run(tmp_path / 'a', ['configs/toy.py', 'eval_n=4'], rows, rows)
    scores = read_scores(read_runs([folder])[0], 'method')['eval']
    expected = eval_math.scores(rows)
    for metric, name in (('avg', 'avg@4'), ('best', 'best@4'), ('dist', 'dist-4g'), ('len', 'len')):
        assert over_seeds([scores[metric]])['mean'] == pytest.approx(expected[name], rel=1e-12), metric
    assert over_seeds([scores['avg']])['interval'] == list(expected['interval'])


def test_problems_are_drawn_once_for_all_seeds():
    """Two seeds that are right on opposite problems: their mean is 50 on each problem, whichever problems are drawn. Seeds
    that are drawn apart from each other would have an interval of some width, and one over 8 values a narrower one than
    there is where both agree."""
    first = {0: 100.0, 1: 0.0, 2: 100.0, 3: 0.0}
    second = {0: 0.0, 1: 100.0, 2: 0.0, 3: 100.0}
    assert over_seeds([first, second]) == {'by_seed': [50, 50], 'mean': 50, 'interval': [50, 50]}
    assert over_seeds([first, first])['interval'] == over_seeds([first])['interval'] == list(eval_math.bootstrap([100.0, 0.0] * 2))
    assert over_seeds([{0: None}]) is None and over_seeds([{0: None, 1: 3.0}])['mean'] == 3


def test_tables_4_to_6_take_the_runs_of_their_pair(folders, tmp_path):
    """A run of another pair in the table would have another teacher."""
    four = graded(2, 1, 0, text='1 2 3 4 5 1 2 3 4', length=9)
    wide = [evaluated_run(tmp_path / 'wide', [*WIDE, 'bridge_rank=8'], graded(0, 0, 1), four, graded(2, 2, 2)),
            evaluated_run(tmp_path / 'alone', [*WIDE, *OPD], graded(0, 0, 1), graded(0, 0, 0, text='short'))]
    tokens = evaluated_run(tmp_path / 'tokens', [*TOKENS, 'bridge_rank=4', 'teacher_ids=student'], graded(0, 0, 1), graded(0, 2, 1))
    runs = read_runs([folders[0], *wide, tokens])
    table4 = scores_data(4, runs)
    assert [row['method'] for row in table4['rows']] == ['teacher', 'student', 'OPD top-16', 'OPRD-Bridge r=8']
    assert {metric: numbers['mean'] for metric, numbers in table4['rows'][3]['scores']['eval'].items()} == {
        'avg': pytest.approx(50), 'best': pytest.approx(200 / 3)}

    # The answers 1 2 3 4 5 1 2 3 4 have six sequences of four words, five of them different; two such answers have 5 / 12.
    table5 = scores_data(5, runs)
    assert table5['rows'][3]['scores']['eval']['dist']['mean'] == pytest.approx(500 / 12)
    assert table5['rows'][3]['scores']['eval']['len']['mean'] == 9 and table5['rows'][2]['scores']['eval']['dist'] is None
    lines = scores_lines(table5)
    assert '| OPD top-16 | not measured | 7.0 [7.0-7.0] | 2 | 1 |' in lines
    assert lines[2].startswith('| method | Dist-4g, %, eval | length') and not any('characters' in line for line in lines)
    assert [row['method'] for row in scores_data(6, runs)['rows']] == ['student', "OPRD-Bridge r=4, student's ids"]
    assert [row['method'] for row in scores_data(2, runs)['rows']] == ['teacher', 'student', 'OPRD']


def test_table_5_counts_characters_where_there_are_no_words(tmp_path):
    """As on the toy, whose answers have no spaces: a column of zeros would say that they are all alike. Two equal answers
    1+2=3 have the sequences 1+2= and +2=3, each twice; with 1+2=4 in place of one there are three different ones of four."""
    rows = graded(1, text='1+2=3')
    other = [rows[0], rows[1] | {'text': '1+2=4'}]
    data = scores_data(5, read_runs([evaluated_run(tmp_path / 'a', WIDE, rows, other)]))
    assert [row['scores']['eval']['characters']['mean'] for row in data['rows']] == [50, 75]
    lines = scores_lines(data)
    assert lines[2] == '| method | Dist-4g of characters, %, eval | length, tokens, eval | steps | seeds |'
    assert lines[5] == '| OPRD-Bridge r=16 | 75.0 [75.0-75.0] | 7.0 [7.0-7.0] | 2 | 1 |'
    assert lines[8].endswith('Where all answers to a problem are alike it is at most 50.0.')


def test_the_papers_numbers_stand_beside_a_run_at_its_size(tmp_path):
    """And beside no other: three sets, one of our methods as the paper has it, another with fewer steps."""
    rows = [row for label in ('aime24', 'aime25', 'aimo') for row in graded(1, 0, label=label, n=16)]
    sizes = []
    for name, words in (('a', ['configs/r1_1p5b.py']), ('b', ['configs/r1_opd_top1.py', 'steps=400'])):
        folder = evaluated_run(tmp_path / name, words, rows, rows, rows, **{'rep/cos': 0.5, 'rep/cos/1': 0.5, 'mem/update_dpeak': 21.0})
        file = folder / 'config.json'
        stored = json.loads(file.read_text())
        stored['config']['dtype'] = 'bfloat16'
        file.write_text(json.dumps(stored))
        sizes.append(folder)
    data = scores_data(2, read_runs(sizes))
    assert {row['method']: row['paper'] for row in data['rows']} == {
        'teacher': 'teacher', 'student': 'student', 'OPRD': 'OPRD', 'OPD top-1': None}
    lines = scores_lines(data)
    assert lines[2] == '| method | Avg@16, %, aime24 | paper | Avg@16, %, aime25 | paper | Avg@16, %, aimo | paper | steps | seeds |'
    ours = '3.1 [0.0-6.2]'
    assert lines[4] == f'| teacher | {ours} | 50.8 | {ours} | 35.6 | {ours} | 79.5 |  | 1 |'
    assert lines[6] == f'| OPRD | {ours} | 49.8 | {ours} | 34.6 | {ours} | 79.1 | 2 | 1 |'
    assert lines[7] == f'| OPD top-1 | {ours} |  | {ours} |  | {ours} |  | 2 | 1 |'
    assert lines[10] == "Not at the paper's size, so without its numbers: OPD top-1. OPD top-1 has steps=400 (paper: 500)."
    memory = table3_lines(table3_data(read_runs(sizes)))
    assert memory[4:6] == ['| OPRD | 21.0 | 20.5 | 0.3 | 563 | 2 | 1 |', '| OPD top-1 | 21.0 |  | 0.3 |  | 2 | 1 |']


def test_table_3_by_hand(folders, tmp_path):
    """Minutes are those of the steps; the 100 seconds with evaluation are not. A CPU has no memory column."""
    for folder in folders:
        versions = {'device': 'cpu', 'ranks': 1, 'threads': 2, 'torch': '2.13.0'}
        append_start(folder, {'versions': versions, 'sources': {}, 'eval_data': {}}, 0)
    data = table3_data(read_runs(folders))
    assert [row['minutes'] for row in data['rows']] == [[0.3, 0.3], [0.3, 0.3]] and data['rows'][0]['gigabytes'] is None
    assert data['machines'] == ['cpu, ranks 1, threads 2']
    lines = table3_lines(data)
    assert lines[4] == '| OPRD | not measured | 0.3 (0.3-0.3) | 2 | 2 |' and len(lines) == 10
    two = [evaluated_run(tmp_path / f'gpu{seed}', [*SAME, f'seed={seed}'], graded(1), graded(1), **{'mem/update_dpeak': 3.0 + seed})
           for seed in (0, 1)]
    assert table3_data(read_runs(two))['rows'][0]['gigabytes'] == [3, 4]
    assert table3_lines(table3_data(read_runs(two)))[4] == f'| OPRD | {span([3.0, 4.0])} | 0.3 (0.3-0.3) | 2 | 2 |'


def test_names_from_files_cannot_leave_their_cell(tmp_path):
    """The label of a set is the name of a file. A bar would begin another cell, a tag would be part of the page."""
    label = 'a|b<script>`x`'
    folder = evaluated_run(tmp_path / 'a', SAME, graded(1, label=label), graded(2, label=label))
    lines = scores_lines(scores_data(2, read_runs([folder])))
    assert lines[2] == '| method | Avg@2, %, a&#124;b&lt;script>&#96;x&#96; | steps | seeds |'
    assert len({line.count('|') for line in lines[2:6]}) == 1


def test_tables_are_written_with_the_same_bytes_twice(folders, tmp_path):
    """From folders in one order: no date, no random interval, no name of the output folder."""
    written = []
    for name in ('x', 'y'):
        files = [*table2(folders, tmp_path / name), *table3(folders, tmp_path / name)]
        assert [file.name for file in files] == ['table2.json', 'table2.md', 'table3.json', 'table3.md']
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1] and json.loads(written[0][0])['table'] == 2


def test_what_is_missing_is_told_with_a_command(folders, tmp_path):
    """Missing, and not an error: `python -m paper all` goes on with the next table."""
    for table, says in ((table4, 'toy_bridge.py'), (table5, 'toy_bridge.py'), (table6, 'toy_bridge_tokens.py')):
        with pytest.raises(Missing, match=says) as error:
            table(folders, tmp_path)
        assert '\n' not in str(error.value)
    for table in (table2, table3):
        with pytest.raises(Missing, match='configs/toy.py makes one'):
            table([], tmp_path)
    (folders[0] / 'answers/000002.jsonl').unlink()
    with pytest.raises(Missing, match='a0/answers/000002.jsonl: no such file'):
        table2(folders, tmp_path)
    unevaluated = evaluated_run(tmp_path / 'none', [*SAME, 'eval_data='], None, None)
    with pytest.raises(Missing, match='no evaluation in its log'):
        table2([unevaluated], tmp_path)
    assert table3_data(read_runs([unevaluated]))['rows'][0]['steps'] == 2    # memory and time need no scores


def damage(change):
    """A change of the answers of a run: rows -> rows."""
    def damaged(folder):
        file = folder / 'answers/000002.jsonl'
        rows = change([json.loads(line) for line in file.read_text().splitlines()])
        file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return damaged


@pytest.mark.parametrize('change, says', [
    (damage(lambda rows: rows[:-1]), 'problem 2: 1 answers, where eval_n=2'),
    (damage(lambda rows: [*rows, answer('eval', 0, 2, True)]), 'problem 0: 3 answers, where eval_n=2'),
    (damage(lambda rows: rows[:-2]), 'avg@2 of these answers is 100.0000, and the log says 66.6'),
    (damage(lambda rows: [row | {'correct': True} for row in rows]), 'avg@2 of these answers is 100.0000, and the log says 66.6'),
    (damage(lambda rows: [row | {'length': 8} for row in rows]), 'len of these answers is 8.0000, and the log says 7.0'),
    (damage(lambda rows: [row | {'set': 'other'} if row['problem'] else row for row in rows]), 'and the log says None'),
    (damage(lambda rows: [rows[0] | {'correct': 'yes'}, *rows[1:]]), ":1: correct = 'yes'; wants true or false"),
    (damage(lambda rows: [[], *rows[1:]]), ':1: holds [], not an object'),
    (damage(lambda rows: []), 'no answers in it'),
])
def test_answers_that_are_not_those_of_the_log_are_refused(folders, tmp_path, change, says):
    """Half a file has other scores that look as good as the whole one's. Nothing is written."""
    change(folders[0])
    with pytest.raises(UserError) as error:
        table2(folders, tmp_path / 'x')
    assert says in str(error.value) and 'a0/answers/000002.jsonl' in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'x').exists()


def test_seeds_with_other_numbers_of_problems_are_refused(folders, tmp_path):
    """Problem 2 of one seed would stand for a problem that the other seed was not asked."""
    rows = graded(1, 0)
    evaluated_run(tmp_path / 'c1', [*SAME, 'seed=1'], rows, rows, rows)
    with pytest.raises(UserError, match='c1: evaluated on other numbers of problems'):
        table2([folders[0], tmp_path / 'c1'], tmp_path / 'x')


def test_seeds_that_end_after_different_steps_are_refused(folders, tmp_path):
    """One of them was interrupted: its score would pull the mean down as if the method were worse."""
    rows = [json.loads(line) for line in (folders[2] / 'log.jsonl').read_text().splitlines()]
    rows[1] |= {name: value for name, value in rows[2].items() if name.startswith('eval/')}
    write_log(folders[2], rows[:2])
    (folders[2] / 'answers/000002.jsonl').rename(folders[2] / 'answers/000001.jsonl')
    for table in (table2, table3):
        with pytest.raises(UserError, match="a0 and .*a1 are seeds of OPRD and end after 2 and 1 steps; finish both"):
            table(folders, tmp_path / 'x')


def test_two_teachers_in_one_table_are_refused(tmp_path):
    """One line called teacher would stand for both."""
    wide = [evaluated_run(tmp_path / name, [*WIDE, *words], graded(1), graded(1), graded(2))
            for name, words in (('a', []), ('b', [*OPD, 'toy_teacher_layers=5']))]
    with pytest.raises(UserError, match='have different teachers: toy_teacher_layers=6 and 5'):
        table4(wide, tmp_path / 'x')


def test_the_papers_own_tables_have_a_cell_for_each_number():
    """They stand in docs/paper.md, with a column for ours."""
    assert printed_lines(2)[5] == '| OPD top-16 | 47.1 | 34.0 | 76.5 | not yet measured |'
    assert printed_lines(3)[2] == '| OPD top-1 | 30.2 | 813 | not yet measured |'
    assert printed_lines(4)[0].startswith("| paper, Table 4 | Avg@16, %, AIME24 |")
    for number in (2, 3, 4, 5, 6):
        assert len({line.count('|') for line in printed_lines(number)}) == 1
    assert fmean(map(float, printed_lines(6)[2].split('|')[2:5])) == 5.0
