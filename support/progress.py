"""
How far long work has come: a bar on a terminal, elsewhere a line a minute.

    rollout: 12 of 64 answers, 183k tokens so far, 8.21k tok/s, 1.4m, about 6.1m left

Answers of 16k tokens take many minutes, so the tokens are counted while no answer has ended yet: the
sampler calls `update` at each of its polls (rollout.stream), with counts that it has on the host anyway.
Work that takes less than a minute prints nothing in a log file.

    with Progress('rollout', 64, 'answers', rank=env.rank, world=env.world, longest=16384) as progress:
        roll = sample(model, prompts, on_poll=progress.update, ...)

Simpler than usual: no thread. What does not call `update` for ten minutes says nothing for ten minutes.
Rank 0 alone prints, and counts its own share. The time that is left is an estimate (`Progress.left`).
"""
import sys
import time

from tqdm import tqdm

from support.report import amount, duration
from support.runtime import print0

LINE_SECONDS = 60               # between two lines of a log file
BAR_SECONDS = 0.2               # between two looks of a bar


class Progress:
    """So many of `total` are done. It is made before the work begins, and used as a context manager, so that
    the bar goes away whatever ends the work.

    label, unit: of the line, such as 'rollout' and 'answers'; without a label nothing is shown. longest: the
    most tokens of an answer; 0 if no tokens are counted. rank, world: of this process; rank 0 alone shows
    anything. now: the clock, in seconds.
    """
    def __init__(self, label, total, unit, *, rank=0, world=1, longest=0, now=time.monotonic):
        self.label = label if world == 1 else f'{label} (rank 0 of {world})'
        self.total = total
        self.unit = unit
        self.longest = longest
        self.now = now
        self.silent = rank > 0 or not label
        self.began = now()
        self.shown = self.began              # when the line was shown last

        # What is done, and what was done before the present call of the sampler, which counts from 0.
        self.done = 0
        self.tokens = 0
        self.done_before = 0
        self.tokens_before = 0
        self.extra = ''                      # more to say at the end of the line
        self.bar = None
        if not self.silent and sys.stderr.isatty():
            self.bar = tqdm(total=total, bar_format='{desc} |{bar}|', dynamic_ncols=True, leave=False)
            self.show()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.close()

    def update(self, done, tokens=0):
        """So many are done, and so many tokens sampled, those of unfinished answers included."""
        self.done = self.done_before + done
        self.tokens = self.tokens_before + tokens
        every = BAR_SECONDS if self.bar else LINE_SECONDS
        if self.now() - self.shown >= every:
            self.show()

    def next_call(self):
        """The next call of the sampler begins; what `update` is told is counted from here on."""
        self.done_before = self.done
        self.tokens_before = self.tokens

    def show(self):
        """Show the line now."""
        self.shown = self.now()
        if self.silent:
            return
        if self.bar:
            self.bar.n = self.done
            self.bar.set_description_str(self.line(self.shown - self.began))
        else:
            print0(f'  {self.line(self.shown - self.began)}')

    def line(self, seconds):
        """What is shown after so many seconds. There is no speed before there is a token."""
        parts = [f'{self.label}: {self.done} of {self.total} {self.unit}']
        if self.tokens and seconds > 0:
            parts.append(f'{amount(self.tokens)} tokens so far')
            parts.append(f'{amount(self.tokens / seconds)} tok/s')
        parts.append(duration(seconds))
        left = self.left(seconds)
        if left:
            parts.append(left)
        if self.extra:
            parts.append(self.extra)
        return ', '.join(parts)

    def left(self, seconds):
        """How long the rest will take, in words, after so many seconds; '' if nothing is known.

        If every token ends its answer with the same probability, the best estimate of the mean length is
        tokens / done, the tokens of unfinished answers included. The rest, total - done answers of this
        length, then takes seconds / done * (total - done). No answer is longer than `longest`: this bounds
        the rest, and it is all that is known before the first answer has ended.
        """
        guesses = []
        if self.done:
            guesses.append(seconds / self.done * (self.total - self.done))
        if self.longest and self.tokens:
            most = (self.total - self.done) * self.longest
            if not self.done:
                most -= self.tokens
            guesses.append(seconds / self.tokens * most)
        if not guesses:
            return ''
        return f"{'about' if self.done else 'at most'} {duration(min(guesses))} left"


def counted(items, label, unit, rank=0, world=1):
    """Pass the items of a list on, and show how many are done. Arguments as in `Progress`."""
    with Progress(label, len(items), unit, rank=rank, world=world) as progress:
        for done, item in enumerate(items):
            progress.update(done)
            yield item
