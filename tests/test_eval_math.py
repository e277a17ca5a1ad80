"""The metrics against hand-made cases; evaluation that is spread, killed, resumed, graded again."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from statistics import fmean

import pytest
from conftest import argv, evaluate, for_script

import eval_math
from configs import load_config
from eval_math import (
    BOXED,
    answers,
    bootstrap,
    check_answers,
    distinct,
    load_eval_sets,
    majority,
    pass_at,
    scores,
    settings,
    table,
)
from formats.huggingface import load_model
from formats.problems import Problem, load_problems
from formats.tokenizer import load_tokenizer
from studies import toy
from support.files import owned
from support.jsonl import append_row
from support.runtime import ROOT, UserError, run
from support.samples import read_samples

# ---- metrics -------------------------------------------------------------------------------------

def rows(*problems):
    """Each problem a list of (extracted, correct, stopped, length, text)."""
    return [dict(zip(('extracted', 'correct', 'stopped', 'length', 'text'), r, strict=True), problem=i, sample=k)
            for i, some in enumerate(problems) for k, r in enumerate(some)]


def test_scores_by_hand():
    got = scores(rows([('1', True, True, 10, 'a b c d e'), ('2', False, True, 20, 'a b c d'), ('1', True, True, 30, 'x'), (None, False, False, 40, 'a b c d e f')],
                      [('5', False, True, 10, ''), ('5', False, True, 10, ''), ('7', True, True, 10, ''), ('7.0', True, True, 10, '')],
                      [('3', False, True, 5, ''), ('4', False, True, 5, ''), (None, False, False, 5, ''), (None, False, False, 5, '')]))
    assert got['avg@4'] == pytest.approx(100 / 3) and got['best@4'] == pytest.approx(200 / 3) and got['len'] == pytest.approx(160 / 12)
    assert got['pass@2'] == pytest.approx(100 / 3 * 2 * (1 - 1 / 6)) and 'pass@4' not in got
    assert got['maj@4'] == pytest.approx(100 / 3), '1 wins; 5 and 7 tie and 5 came first; 3 is wrong'
    assert got['finish'] == pytest.approx(75) and got['no box'] == pytest.approx(25) and got['problems'] == 3
    assert got['dist-4g'] == pytest.approx(100 * 3 / 6), 'abcd bcde | abcd | abcd bcde cdef: 3 of 6; others have none'
    assert got['interval'][0] < got['avg@4'] < got['interval'][1]
    assert table({})[0].startswith('no eval_data')
    lines = table({'a': got, 'b': got | {'len': 12345.6}})
    assert len({len(line) for line in lines}) == 1 and 'Avg@4' in lines[0] and '12345.6' in lines[2]


def test_distinct_by_hand():
    """Whitespace 4-grams pooled over a problem's answers; cut, the first words only."""
    assert distinct(['a b c d', 'a b c d']) == 0.5 and distinct(['a b c', '']) is None
    assert distinct(['a a a a a a a a']) == 1 / 5 and distinct(['a b c d a a a a a a a a'], words=4) == 1
    long, short = ' '.join(map(str, range(50))) + ' x' * 50, ' '.join(map(str, range(50)))
    assert distinct([long]) < distinct([short]) and distinct([long], 50) == distinct([short], 50)


def test_pass_at_k_is_unbiased():
    """Against the mean over all subsets, and over random draws."""
    from itertools import combinations
    for n, c in ((4, 1), (6, 2), (5, 0), (5, 5)):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            assert pass_at(k, n, c) == pytest.approx(fmean(any(s) for s in combinations(right, k)))


def test_majority_counts_equal_answers_together():
    def one(*extracted):
        return [{'extracted': e, 'correct': r} for e, r in extracted]
    assert majority(one(('0.5', True), ('7', False), ('\\frac12', True))) and not majority(one((None, False), (None, False)))
    assert not majority(one(('7', False), ('1/2', True), ('7.0', False), ('8', False)))
    assert majority(one((None, False), (None, False), ('3', True))), 'no answer is no vote'


def test_bootstrap_covers():
    """95% intervals of the mean of 30 coin flips hold the true mean about 95 times in 100."""
    rng, held = random.Random(0), 0
    for _ in range(200):
        low, high = bootstrap([100 * (rng.random() < 0.4) for _ in range(30)], draws=500)
        held += low <= 40 <= high
    assert 180 <= held <= 198
    assert bootstrap([50.0] * 9) == (50.0, 50.0)


# ---- evaluation ------------------------------------------------------------------------------------

def test_evaluate_is_the_same_however_problems_are_shared(toy_cfg, monkeypatch):
    """Two ranks, one after the other in this process, against one rank; any number of places."""
    tok, model = load_tokenizer(toy_cfg['student']), load_model(toy_cfg['student'])
    problems = load_problems(toy_cfg['eval_data'], tok)
    sets = {'eval': problems}
    how = dict(stop=tok.stop_ids, max_new_tokens=20, temperature=0.7, seed=0)
    whole = evaluate(model, tok, sets, 4, **how)
    assert list(whole) == ['avg@4', 'best@4', 'len'], 'one set has plain names only'
    assert evaluate(model, tok, sets, 4, rows=5, **how) == whole
    parts = []
    monkeypatch.setattr(eval_math, 'all_gather', lambda x: parts.append(x) or parts)
    evaluate(model, tok, sets, 4, rank=0, world=2, **how)
    assert evaluate(model, tok, sets, 4, rank=1, world=2, **how) == whole
    numbered = {i: (i, p) for i, p in enumerate(problems)}
    drawn = {(i, k): (ids, end) for i, k, ids, end in answers(model, numbered, 4, **how)}
    some = {(i, k) for i, k in drawn if (i + k) % 3}
    rest = {(i, k): (ids, end) for i, k, ids, end in answers(model, numbered, 4, done=some, **how)}
    assert rest == {key: v for key, v in drawn.items() if key not in some}


def test_grade_of_a_perfect_model(toy_cfg, monkeypatch):
    """Answers written by the task itself: 100 on both counts, and the right length."""
    tok = load_tokenizer(toy_cfg['student'])
    worked = toy.problems(6, 2, 0, held_out=True)
    problems = load_problems(toy_cfg['eval_data'], tok)
    texts = [tok.encode(a) + [2] for _, a, _ in worked for _ in range(2)]
    monkeypatch.setattr(eval_math, 'stream', lambda *a, **k: ((i, ids, True) for i, ids in enumerate(texts)))
    assert evaluate(None, tok, {'a': problems}, 2, stop=[2]) == {'avg@2': 100.0, 'best@2': 100.0, 'len': 16.0}


def test_several_sets_are_scored_by_name_and_the_plain_score_is_the_mean_over_sets(toy_cfg, monkeypatch):
    """Against each set evaluated alone. Guards against pooling over problems, where a set of 83 problems
    outvotes one of 30, and against random streams that depend on which sets are evaluated together."""
    tok, model = load_tokenizer(toy_cfg['student']), load_model(toy_cfg['student'])
    problems = load_problems(toy_cfg['eval_data'], tok)
    sets = {'large': problems[:5], 'me/small@1': problems[5:]}
    how = dict(stop=tok.stop_ids, max_new_tokens=20, temperature=0.7, seed=3)

    # The grader would find no answer of so small a student right: call every answer of an odd length right.
    monkeypatch.setattr(eval_math, 'verdict', lambda text, problem: {
        'extracted': None, 'correct': len(text) % 2 == 1, 'decided_by': ''})
    together = evaluate(model, tok, sets, 6, **how)
    alone = {name: evaluate(model, tok, {name: some}, 6, **how) for name, some in sets.items()}
    metrics = ['avg@6', 'best@6', 'len']
    assert list(together) == metrics + [f'{m}/{name}' for name in sets for m in metrics]
    for metric in metrics:
        for name in sets:
            assert together[f'{metric}/{name}'] == alone[name][metric]
        assert together[metric] == pytest.approx(fmean(scores[metric] for scores in alone.values()))
    assert 0 < alone['large']['avg@6'] != alone['me/small@1']['avg@6'], 'the sets must differ, or nothing is tested'
    pooled = (5 * alone['large']['len'] + alone['me/small@1']['len']) / 6
    assert abs(pooled - together['len']) > 1e-3, 'the two means must differ, or nothing is tested'

    # Two ranks give the same numbers, in the same order.
    parts = []
    monkeypatch.setattr(eval_math, 'all_gather', lambda x: parts.append(x) or parts)
    evaluate(model, tok, sets, 6, rank=0, world=2, **how)
    assert list(evaluate(model, tok, sets, 6, rank=1, world=2, **how).items()) == list(together.items())

    # In a table the mean is a line, and so is each set.
    lines = table({'student': together, 'distilled': together | {'avg@6/large': 99.5}})
    assert [line.split()[0] for line in lines[1:]] == ['student', 'large', 'me/small@1', 'distilled', 'large', 'me/small@1']
    assert lines[0].split() == ['Avg@6', 'Best@6', 'length'] and lines[5].split()[1] == '99.5'
    assert len({len(line) for line in lines}) == 1


def test_named_sets_ask_for_a_box_unless_told_otherwise(monkeypatch):
    """Bare hub questions do not ask for \\boxed{}, which is what the grader reads: the paper's sets carry the
    instruction, other sets do not, and eval_suffix replaces it."""
    asked = []

    def fake(source, tokenizer, first, split, suffix):
        asked.append((source, split, suffix))
        return [Problem('q', '1', [0])]
    monkeypatch.setattr(eval_math, 'load_problems', fake)
    assert 'put your final answer within \\boxed{}' in BOXED
    assert list(load_eval_sets('AIME24,aimo,me/set', None, 0, '')) == ['AIME24', 'aimo', 'me/set']
    assert asked == [('HuggingFaceH4/aime_2024', 'test', BOXED), ('AI-MO/aimo-validation-amc', 'test', BOXED), ('me/set', 'test', '')]
    asked.clear()
    load_eval_sets('aime25,me/set', None, 0, ' Be brief.')
    assert asked == [('math-ai/aime25', 'test', ' Be brief.'), ('me/set', 'test', ' Be brief.')]


@pytest.mark.parametrize('name', ['r1_1p5b', 'r1_opd_top1', 'r1_opd_top16', 'bridge_qwen', 'bridge_phi'])
def test_the_configs_of_the_paper_evaluate_its_three_sets_every_20_steps(name):
    """Figure 4 shows AIME24, AIME25 and AIMO, a point every 20 steps."""
    cfg = load_config([f'configs/{name}.py'])
    assert cfg['eval_every'] == 20 and cfg['eval_suffix'] == ''
    assert cfg['eval_data'].split(',') == ['aime24', 'aime25', 'aimo'] and set(cfg['eval_data'].split(',')) <= set(eval_math.SETS)


def test_known_answers_that_do_not_equal_themselves_are_counted_and_shown():
    """An answer that the grader cannot read makes its problem unsolvable for every model, in silence."""
    def problems(*known):
        return [Problem('q', answer, [0]) for answer in known]
    fine = problems('7', '1,234', 'so \\boxed{8}', '\\frac{1}{2}', None)
    assert check_answers(fine) == [] == check_answers(problems(None))
    line, = check_answers(fine + problems('{', '{' * 200 + '\x1b[31m\n', '}{'))
    assert line.startswith('3 of 7 known answers') and "such as '{' and '{{{" in line and len(line) < 200
    assert '\x1b' not in line and '\n' not in line


def test_command_line(tmp_path, toy_cfg):
    """The keys of distill.py's evaluation; model is student. Sets by name, by file, several at once."""
    cfg = settings(['model=x/y', 'eval_data=aime24,aimo', 'eval_n=8', '--regrade', 'seed=4'])
    got = [cfg[key] for key in ('student', 'eval_data', 'eval_n', 'n', 'seed', 'regrade')]
    assert got == ['x/y', 'aime24,aimo', 8, 2, 4, True] and settings(['--model=x'])['student'] == 'x'
    tok = load_tokenizer(toy_cfg['student'])
    for name in 'ab':
        (tmp_path / f'{name}.jsonl').write_text('{"problem": "1+1", "answer": "2"}\n')
    sets = load_eval_sets(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", tok, 0, '')
    assert list(sets) == ['a', 'b'] and sets['b'][0].answer == '2'
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c/a.jsonl').write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(UserError, match='two sets are called a'):
        load_eval_sets(f'{tmp_path}/a.jsonl,{tmp_path}/c/a.jsonl', tok, 0, '')
    (tmp_path / 'a.jsonl').write_text('{"problem": "1+1"}\n')
    with pytest.raises(UserError, match='no answer to grade by'):
        load_eval_sets(f'{tmp_path}/a.jsonl', tok, 0, '')
    (tmp_path / 'c,d.jsonl').write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer": "3"}\n')
    assert len(load_eval_sets(f'{tmp_path}/c,d.jsonl', tok, 1, '')['c,d']) == 1


@pytest.mark.parametrize('key', ['n', 'data', 'temperature', 'top_p', 'max_new_tokens'])
def test_a_key_of_training_is_refused(key):
    """n= was evaluation's here and training's elsewhere. Ignored, it would leave an evaluation of 16 answers."""
    with pytest.raises(UserError, match=f'eval_math.py does not read {key}=; did you mean eval_{key}='):
        settings([f'{key}=1'])


def arguments(toy_dir, **keys):
    """A command line for the tiny toy."""
    return for_script('eval_math.py', argv(toy_dir, 'unused', **dict(eval_n=12, eval_rows=5, eval_max_new_tokens=20) | keys))


def script(cwd, toy_dir, *more, wait=True, ranks=0):
    """eval_math.py on the tiny toy, 12 answers a problem, five places."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else []
    p = subprocess.Popen([sys.executable, *torchrun, ROOT / 'eval_math.py', *arguments(toy_dir), *more], cwd=cwd, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if wait:
        out, err = p.communicate(timeout=300)
        assert p.returncode == 0, err
        return out
    return p


@pytest.fixture(scope='module')
def evaluated(toy_dir, tmp_path_factory):
    """An uninterrupted evaluation: its folder, and what it printed."""
    cwd = tmp_path_factory.mktemp('eval')
    out = script(cwd, toy_dir)
    return next((cwd / 'out/eval').iterdir()), out


def test_script(evaluated):
    folder, out = evaluated
    got = read_samples(folder)
    assert [f.name for f in sorted(folder.iterdir())] == ['.lock', 'results.json', 'samples.jsonl'] and len(got) == 6 * 12
    row = got['eval', 0, 0]
    assert {'prompt', 'text', 'ids', 'length', 'extracted', 'correct', 'seed', 'answer', 'stopped'} <= set(row)
    assert row['length'] == len(row['ids']) and row['prompt'].endswith('=')
    figures = json.loads((folder / 'results.json').read_text())['sets']['eval']
    assert figures['avg@12'] == pytest.approx(100 * fmean(r['correct'] for r in got.values()))
    assert 'Avg@12' in out and f"{figures['len']:.1f}" in out and 'pass@8' in out


def test_killed_ten_times_and_resumed(evaluated, toy_dir, tmp_path):
    """SIGKILL at random points: in the end the file is the uninterrupted one, byte for byte. On a loaded
    machine an evaluation can end before this process looks again: that is no kill, and it starts over."""
    rng, kills, starts = random.Random(0), 0, 0
    while kills < 10:
        p = script(tmp_path, toy_dir, wait=False)
        starts += 1
        assert starts <= 25, f'{kills} kills in 25 starts'
        folder = tmp_path / 'out/eval' / evaluated[0].name

        def lines(folder=folder):
            while True:
                try:
                    return sum(f.read_bytes().count(b'\n') for f in folder.glob('samples*.jsonl'))
                except FileNotFoundError:    # renamed between the two
                    pass
        began, enough = time.time(), lines() + rng.randrange(1, 8)
        while p.poll() is None and lines() < enough and time.time() - began < 60:
            time.sleep(0.002)
        os.kill(p.pid, signal.SIGKILL)
        assert p.wait() in (0, -signal.SIGKILL)
        if p.returncode == 0:
            shutil.rmtree(folder)
            continue
        kills += 1
        if rng.random() < 0.5:               # cut in the middle of a line, as a full buffer would
            for part in folder.glob('samples-*.jsonl'):
                part.write_bytes(part.read_bytes()[:-5])
        if lines() == 72:                    # all sampled, killed while it wrote the scores
            shutil.rmtree(folder)
    script(tmp_path, toy_dir)
    assert (folder / 'samples.jsonl').read_bytes() == (evaluated[0] / 'samples.jsonl').read_bytes()
    assert (folder / 'results.json').read_bytes() == (evaluated[0] / 'results.json').read_bytes()


def test_two_ranks_draw_the_same_samples(evaluated, toy_dir, tmp_path):
    script(tmp_path, toy_dir, ranks=2)
    folder = tmp_path / 'out/eval' / evaluated[0].name
    assert (folder / 'samples.jsonl').read_bytes() == (evaluated[0] / 'samples.jsonl').read_bytes()


def write_rows(file, rows):
    """A samples.jsonl with the checksums that eval_math.py writes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('w') as opened:
        for row in rows:
            append_row(opened, row, crc=True)


def test_regrade(evaluated, toy_dir, tmp_path):
    """Verdicts that were wrong are mended without sampling; too few answers are an error."""
    folder = tmp_path / 'out/eval' / evaluated[0].name
    good = list(read_samples(evaluated[0]).values())
    wrong = [row | {'correct': False, 'extracted': '9'} for row in good]
    write_rows(folder / 'samples.jsonl', wrong)
    out = script(tmp_path, toy_dir, '--regrade')
    assert (folder / 'samples.jsonl').read_bytes() == (evaluated[0] / 'samples.jsonl').read_bytes()
    assert 'answers are there' not in out
    write_rows(folder / 'samples.jsonl', good[3:])
    p = script(tmp_path, toy_dir, '--regrade', wait=False)
    assert p.wait(60) == 2 and 'run it without --regrade first' in p.stderr.read()


FOREIGN = {      # what is done to the rows of an evaluation -> what is said of it
    'doubled, the second with another text': (lambda rows: [*rows, rows[0] | {'text': 'x'}], r":73: a second answer for set 'eval', problem 0, sample 0"),
    'of a problem that is not asked': (lambda rows: [rows[0] | {'problem': 99}, *rows[1:]], 'problem 99, sample 0, which this command does not ask for'),
    'of a sample that is not asked': (lambda rows: [rows[0] | {'sample': 12}, *rows[1:]], 'sample 12, which this command does not ask for'),
    'of another set': (lambda rows: [rows[0] | {'set': 'other\x1b'}, *rows[1:]], r"set 'other\\x1b', problem 0"),
    'of another seed': (lambda rows: [row | {'seed': 1} for row in rows], 'whose seed 1 is not 0'),
    'of another prompt': (lambda rows: [rows[0] | {'prompt': rows[20]['prompt']}, *rows[1:]], 'whose prompt .* is not'),
    'of another answer': (lambda rows: [rows[0] | {'answer': '77'}, *rows[1:]], "whose answer '77' is not"),
    'of fewer ids than its length': (lambda rows: [rows[0] | {'ids': rows[0]['ids'][:-1]}, *rows[1:]], r'samples.jsonl:1: length \d+ with \d+ ids'),
    'without ids': (lambda rows: [rows[0] | {'ids': []}, *rows[1:]], r'samples.jsonl:1: ids = \[\]; wants a list of length from 1'),
    'a word among its ids': (lambda rows: [rows[0] | {'ids': [*rows[0]['ids'][1:], 'x']}, *rows[1:]], r"ids = \[.*, 'x'\]; wants a list of length from 1, each entry a whole number from 0"),
    'true is no number': (lambda rows: [rows[0] | {'problem': False}, *rows[1:]], 'problem = False; wants a whole number from 0'),
    'a number is not true': (lambda rows: [rows[0] | {'correct': 1}, *rows[1:]], 'correct = 1; wants true or false'),
    'no text': (lambda rows: [{k: v for k, v in rows[0].items() if k != 'text'}, *rows[1:]], 'samples.jsonl:1: text is missing'),
    'an endless text': (lambda rows: [rows[0] | {'extracted': ['x' * 10**6]}, *rows[1:]], r"extracted = \['xxx.*; wants a text, or null"),
}


@pytest.mark.parametrize('change, says', FOREIGN.values(), ids=FOREIGN)
def test_rows_that_do_not_belong_to_an_evaluation_are_refused(evaluated, toy_dir, tmp_path, monkeypatch, change, says):
    """They counted as answers that are there: other scores, and exit code 0."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'out/eval' / evaluated[0].name
    write_rows(folder / 'samples.jsonl', change(list(read_samples(evaluated[0]).values())))
    before = (folder / 'samples.jsonl').read_bytes()
    with pytest.raises(UserError, match=says) as error:
        eval_math.main(settings(arguments(toy_dir)))
    assert len(str(error.value)) < 250 + len(str(folder)) and '\n' not in str(error.value)
    assert (folder / 'samples.jsonl').read_bytes() == before and sorted(p.name for p in folder.iterdir()) == ['samples.jsonl']


def test_every_flipped_bit_of_an_answer_is_found(evaluated, tmp_path):
    """One wrong digit in a text or in an id is JSON as good as before. A cut-off end, and rows in two files, are none."""
    good = (evaluated[0] / 'samples.jsonl').read_bytes()
    first = good.index(b'\n')
    (tmp_path / 'samples-0.jsonl').write_bytes(good[:first + 1])              # merged, but not deleted yet
    (tmp_path / 'samples-old.jsonl').write_text('not ours\n')
    rng = random.Random(0)
    for place in [*rng.sample(range(first), 150), first]:
        flipped = bytearray(good)
        flipped[place] ^= 1 << rng.randrange(8)
        (tmp_path / 'samples.jsonl').write_bytes(flipped)
        with pytest.raises(UserError, match=r'samples.jsonl:1: damaged; delete the line'):
            read_samples(tmp_path)
    (tmp_path / 'samples.jsonl').write_bytes(good[:-5])
    assert len(read_samples(tmp_path)) == 71
    (tmp_path / 'samples.jsonl').write_bytes(good)
    assert read_samples(tmp_path) == read_samples(evaluated[0])


def test_dropped_rows_are_sampled_again(evaluated, toy_dir, tmp_path):
    """From the middle, the beginning and the end; rows in another order are the same rows."""
    folder = tmp_path / 'out/eval' / evaluated[0].name
    good = list(read_samples(evaluated[0]).values())
    write_rows(folder / 'samples.jsonl', [*good[60:], *good[1:20], *good[25:59]])
    assert '65 of 72 answers are there' in script(tmp_path, toy_dir)
    assert (folder / 'samples.jsonl').read_bytes() == (evaluated[0] / 'samples.jsonl').read_bytes()
    assert (folder / 'results.json').read_bytes() == (evaluated[0] / 'results.json').read_bytes()


def test_an_evaluation_that_goes_on_the_next_day_asks_as_on_the_first(evaluated, toy_dir, tmp_path, monkeypatch):
    """Templates that write the date would put two prompts under one problem. What the templates were told is seen here,
    and that date= chooses another evaluation."""
    monkeypatch.chdir(tmp_path)
    told = []
    load = eval_math.load_tokenizer
    monkeypatch.setattr(eval_math, 'load_tokenizer', lambda path, **how: told.append(how.get('date')) or load(path, **how))
    good = [row | {'date': '2020-02-29'} for row in read_samples(evaluated[0]).values()]
    folder = tmp_path / 'out/eval' / evaluated[0].name
    write_rows(folder / 'samples.jsonl', good[:70])
    eval_math.main(settings(arguments(toy_dir)))
    assert [day for day in told if day][-1] == '2020-02-29'
    assert list(read_samples(folder).values()) == good
    eval_math.main(settings([*arguments(toy_dir), 'date=2021-01-01', '--dry-run']))
    assert [day for day in told if day][-1] == '2021-01-01' and len(list((tmp_path / 'out/eval').iterdir())) == 1


def test_two_evaluations_at_once_in_one_folder(evaluated, toy_dir, tmp_path):
    """Both would append to one file. Who comes second is told who is first."""
    folder = tmp_path / 'out/eval' / evaluated[0].name
    write_rows(folder / 'samples.jsonl', list(read_samples(evaluated[0]).values())[:50])
    with owned(folder):
        p = script(tmp_path, toy_dir, wait=False)
        err = p.communicate(timeout=100)[1]
    assert p.returncode == 2 and f'in use by process {os.getpid()} on' in err and err.count('\n') == 1


def test_a_dry_run_and_a_refused_command_leave_nothing(toy_dir, tmp_path, capsys, monkeypatch):
    """A dry run used to sample all answers; a refused command left an empty folder behind. What a dry run does is look at
    the known answers: that it says what `check_answers` found is told here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_math, 'check_answers', lambda problems: [f'{len(problems)} answers were checked'])
    args = arguments(toy_dir, eval_n=2)
    eval_math.main(settings([*args, '--dry-run']))
    out = capsys.readouterr().out
    assert '0 of 12 answers are there' in out and '  eval: 6 answers were checked' in out
    for more in (['eval_max_new_tokens=500'], ['eval_max_new_tokens=500', '--dry-run']):
        with pytest.raises(UserError, match='lower eval_max_new_tokens='):
            eval_math.main(settings([*args, *more]))
    with pytest.raises(UserError, match='run it without --regrade first'):
        eval_math.main(settings([*args, '--regrade']))
    assert not (tmp_path / 'out').exists()


def test_bad_input(toy_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, says in ((['model='], 'set student='), (['eval_data='], 'set eval_data='), (['eval_max_new_tokens=500'], 'lower eval_max_new_tokens='),
                       (['eval_data=none.jsonl'], 'none.jsonl'), (['nn=3'], "unknown key 'nn'")):
        with pytest.raises(SystemExit) as e:
            run(eval_math.main, lambda more=more: settings([*arguments(toy_dir), *more]))
        err = capsys.readouterr().err
        assert e.value.code == 2 and says in err and err.startswith('error: ') and err.count('\n') == 1, err
