"""The line that says how far long work has come, and the counts of the sampler behind it."""
import io
import random
import sys

import pytest
from conftest import argv, tiny_model

import bridge
import distill
from configs import load_config
from rollout import Slots, sample, stream
from support import progress as progress_file
from support.progress import Progress, counted
from support.report import amount

PROMPTS = [[1, 2, 3], [4] * 10, [5, 6], [7, 8, 9, 10]]
HOW = dict(stop=[0, 5], seed=3, max_new_tokens=30)


class Watch:
    """A clock that is set by hand."""
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def requests_of(n):
    return [(prompt, number, k) for number, prompt in enumerate(PROMPTS) for k in range(n)]


# ---- the counts -------------------------------------------------------------------------------

@pytest.mark.parametrize('rows', [1, 3, 12])
@pytest.mark.parametrize('poll_every', [1, 16])
def test_the_counts_are_those_of_the_answers(rows, poll_every):
    """At each poll: the answers that have ended are those handed out by the next poll, and the tokens are theirs plus
    those of the answers in the making. Guards against tokens that are counted twice when a slot is compacted or given
    to the next request, and against a line that stays at 0 until the first answer has ended."""
    polls = []
    handed_out = []
    how = HOW | dict(max_new_tokens=20, rows=rows, poll_every=poll_every, on_poll=lambda *counts: polls.append(counts))
    for _, ids, _ in stream(tiny_model(), requests_of(3), **how):
        handed_out.append(len(ids))
        ended, tokens = polls[-1]
        assert len(handed_out) <= ended and sum(handed_out) <= tokens <= sum(handed_out) + 20 * (12 - len(handed_out))
    assert polls[-1] == (12, sum(handed_out))
    for before, after in zip(polls, polls[1:], strict=False):
        assert before[0] <= after[0] and before[1] < after[1]
    assert polls[0][1] > 0


def test_with_a_slot_for_each_answer_the_counts_are_a_sum():
    """At poll k of a batch that is polled at each token every answer has min(k, its length) tokens."""
    polls = []
    how = HOW | dict(poll_every=1, on_poll=lambda *counts: polls.append(counts))
    roll = sample(tiny_model(), PROMPTS, 3, **how)
    lengths = roll.resp_len.tolist()
    expected = []
    for k in range(1, max(lengths) + 1):
        expected.append((sum(n <= k for n in lengths), sum(min(k, n) for n in lengths)))
    assert polls == expected and len(set(lengths)) > 3


def test_the_counts_do_not_wait_for_the_device(monkeypatch):
    """Slots.poll is where the host waits. A second wait for the counts would cost a GPU its lead."""
    waits = []
    poll = Slots.poll
    monkeypatch.setattr(Slots, 'poll', lambda slots: waits.append(1) or poll(slots))
    without = sample(tiny_model(), PROMPTS, 2, **HOW)
    count = len(waits)
    polls = []
    with_counts = sample(tiny_model(), PROMPTS, 2, on_poll=lambda *counts: polls.append(counts), **HOW)
    assert len(waits) == 2 * count and len(polls) == count - 1       # the first poll sees empty slots
    assert with_counts.answers() == without.answers()


# ---- the line ---------------------------------------------------------------------------------

def test_the_line_is_the_one_of_the_header():
    watch = Watch()
    progress = Progress('rollout', 64, 'answers', longest=16384, now=watch)
    assert progress.line(0.0) == 'rollout: 0 of 64 answers, 0s'
    progress.update(0, 0)
    assert progress.line(3.0) == 'rollout: 0 of 64 answers, 3s'      # no speed before there is a token
    progress.update(0, 64)
    most = 3.0 / 64 * (64 * 16384 - 64)
    assert progress.line(3.0) == f'rollout: 0 of 64 answers, 64 tokens so far, 21.3 tok/s, 3s, at most {most / 3600:.1f}h left'
    progress.update(12, 183_000)
    progress.extra = '80% finished'
    assert progress.line(84.0) == ('rollout: 12 of 64 answers, 183k tokens so far, 2.18k tok/s, 1.4m, about 6.1m left, '
                                   '80% finished')
    assert Progress('fit', 3, 'batches', world=4).line(1.0) == 'fit (rank 0 of 4): 0 of 3 batches, 1s'


def test_no_answer_is_thought_to_be_longer_than_the_longest():
    """After one early answer of 64 the others were said to take 64 times as long, beyond what they are allowed."""
    progress = Progress('rollout', 64, 'answers', longest=1000, now=Watch())
    progress.update(1, 6400)
    assert progress.left(10.0) == 'about 98s left'.replace('98s', '1.6m')        # 10 / 6400 * 63 * 1000 = 98.4 s
    progress.longest = 0
    assert progress.left(10.0) == 'about 10.5m left'                 # 10 / 1 * 63


def test_a_speed_is_never_zero():
    """`0.0k tok/s` was printed, and `0 tok/s`. Three significant digits, whatever the size."""
    rng = random.Random(0)
    for _ in range(2000):
        number = 10 ** rng.uniform(-3, 11.9)
        text = amount(number)
        scale = {'k': 1e3, 'M': 1e6, 'G': 1e9}.get(text[-1], 1.0)
        value = float(text.rstrip('kMG'))
        assert abs(value * scale - number) <= 0.00501 * number and 0 < value < 1000
    shown = {0.0427: '0.0427', 1: '1', 12: '12', 999: '999', 999.7: '1k', 1000: '1k', 8214: '8.21k', 183_000: '183k',
             999_700: '1M', 1.5e9: '1.5G'}
    assert {number: amount(number) for number in shown} == shown


# ---- when it is shown ---------------------------------------------------------------------------

def test_a_log_file_has_a_line_a_minute_before_any_answer_has_ended(capsys):
    """40 tokens of 10 seconds each, and no stop token: nothing was printed until the first answer ended."""
    watch = Watch()
    progress = Progress('rollout', 4, 'answers', longest=40, now=watch)

    def ten_seconds_later(ended, tokens):
        watch.seconds += 10
        progress.update(ended, tokens)
    with progress:
        sample(tiny_model(), PROMPTS, max_new_tokens=40, stop=[], poll_every=1, on_poll=ten_seconds_later)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 6 and printed.err == ''
    assert lines[0] == '  rollout: 0 of 4 answers, 24 tokens so far, 0.4 tok/s, 60s, at most 5.7m left'
    assert all(line.startswith('  rollout: 0 of 4 answers, ') for line in lines)


def test_what_takes_less_than_a_minute_prints_nothing(capsys):
    watch = Watch()
    with Progress('rollout', 100, 'answers', now=watch) as progress:
        for step in range(100):
            watch.seconds = 0.599 * step
            progress.update(step, 10 * step)
    with Progress('rollout', 1, 'answers', rank=1, world=2, now=watch) as other, Progress('', 1, 'x', now=watch) as unnamed:
        watch.seconds += 1000                # only rank 0 speaks, and only of what has a name
        other.update(1, 10)
        unnamed.update(1)
    assert capsys.readouterr() == ('', '')


def test_several_calls_of_the_sampler_are_one_work(capsys):
    """bridge.py samples batch after batch, and each call counts from 0."""
    watch = Watch()
    progress = Progress('collect', 6, 'answers', now=watch)
    for _ in range(3):
        progress.next_call()
        for ended, tokens in ((0, 7), (1, 9), (2, 10)):
            watch.seconds += 20
            progress.update(ended, tokens)
    assert (progress.done, progress.tokens) == (6, 30)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(',')[0] for line in lines] == [f'  collect: {n} of 6 answers' for n in (2, 4, 6)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch):
    """Also after an error. What is left of a bar would stand in the way of the lines of the steps."""
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    watch = Watch()
    with pytest.raises(KeyError), Progress('evaluate', 8, 'answers', longest=50, now=watch) as progress:
        for tokens in range(5):
            watch.seconds += 0.5
            progress.update(0, tokens)
            assert terminal.getvalue().split('\r')[-1].startswith(f'evaluate: 0 of 8 answers, {"0s" if not tokens else tokens}')
        progress.update(4, 100)              # within a fifth of a second nothing is drawn again
        assert '4 of 8' not in terminal.getvalue()
        raise KeyError
    assert terminal.getvalue().split('\r')[-2].strip() == '' and terminal.getvalue().endswith('\r')
    assert list(counted([3, 1, 4], 'fit', 'batches')) == [3, 1, 4]


# ---- who shows it -------------------------------------------------------------------------------

def test_all_long_work_shows_it(toy_dir, tmp_path, capsys, monkeypatch):
    """Rollouts showed it on CUDA alone, and evaluations and bridges on a terminal alone."""
    monkeypatch.setattr(progress_file, 'LINE_SECONDS', 0)
    distill.main(load_config(argv(toy_dir, tmp_path / 'run', steps=1)))
    printed = capsys.readouterr().out
    for label in ('rollout', 'evaluate student, step 0', 'evaluate teacher, step 0', 'evaluate student, step 1'):
        total = 6 if label == 'rollout' else 12
        lines = [line for line in printed.splitlines() if line.startswith(f'  {label}: ')]
        assert len(lines) > 5 and f'{total} of {total} answers' in lines[-1]
        assert all(f' of {total} answers, ' in line and ' tok/s, ' in line for line in lines)
        assert any('% right' in line for line in lines) == (label != 'rollout')

    bridge.main(load_config(['configs/toy_bridge.py', *argv(toy_dir, tmp_path / 'run')[1:], f'bridge={tmp_path / "bridge"}',
                             'bridge_prompts=12', 'eval_rows=5', 'bridge_fit=adamw', 'toy_teacher_layers=0', 'toy_teacher_width=0']))
    printed = capsys.readouterr().out
    collected = [line for line in printed.splitlines() if line.startswith('  collect: ')]
    assert all(' of 12 answers, ' in line for line in collected) and '12 of 12 answers' in collected[-1]
    for label, unit in (('fit', 'batches'), ('adamw', 'steps'), ('judge', 'batches')):
        assert f'  {label}: ' in printed and unit in printed
