r"""
Evaluation: how many of a model's sampled answers to held-out problems are right?

    python eval_math.py configs/toy.py student=out/toy/last        problems and settings of a config
    python eval_math.py student=Qwen/Qwen3-4B eval_data=aime24,aime25,aimo enable_thinking=False \
        eval_max_new_tokens=31744 eval_top_p=0.95                  the paper's sets and settings
    torchrun --nproc_per_node=8 eval_math.py student=...           the answers are shared out over the ranks
    python eval_math.py ... --regrade                              grade the stored answers again
    python eval_math.py ... --dry-run                              load, check, say what is missing, stop

The keys are those of distill.py's evaluation (`eval_*`); model= is another spelling of student=.

Everything is written to out/eval/<model>-<digest>: samples.jsonl holds every answer, appended as it ends,
and results.json the scores. The same command goes on where it stopped. In float32 an answer does not
depend on the other answers in its batch, on the number of ranks or on a restart, up to a tie in the last
bit. In bfloat16 only its random numbers are independent of them: the logits of a row change with the shape
of the batch, so a resumed evaluation can have other answers. Simpler than usual: one process
samples and grades. Grading is bounded work (a tenth of a millisecond for most answers, some tens of
milliseconds for formulas), so it runs between two decode steps, and no server or queue is needed. A
finished answer's slot in the batch is refilled at once, so a few long answers do not keep the others
waiting. It does not run code or tools that an answer asks for.

    Avg@n       share of right answers; the interval is a bootstrap over problems, of which 30 are few
    Best@n      share of problems with a right answer among the n
    pass@k      the same for k of the n answers, unbiased
    maj@n       share of problems whose most common answer is right
    dist-4g     distinct share of whitespace 4-grams, pooled per problem, as the authors' code has it
    dist-4g/256 the same over the first 256 words of each answer, because long texts repeat themselves

distill.py calls `load_eval_sets`, `check_answers`, `sample_and_grade` and `shared_scores`; the rest is the
script.
"""
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from configs import load_config
from formats.hub import commits
from formats.huggingface import load_model, read_config
from formats.problems import BOXED, load_problems
from formats.tokenizer import check_ids, load_tokenizer, shared_size, stop_set
from grading.grader import equal, grade, judge
from rollout import stream
from studies import toy
from support.answers import NAMES
from support.files import owned, write_json
from support.jsonl import append_row
from support.progress import Progress
from support.runtime import UserError, all_gather, barrier, day_of_start, print0, run, shown, start
from support.samples import check_samples, first_date, read_samples, samples_folder, write_samples

__all__ = ['grade', 'sample_and_grade', 'shared_scores', 'load_eval_sets', 'check_answers']

# The sets that can be given by name: hub id, and the instruction that is added to each question.
SETS = {
    'aime24': ('HuggingFaceH4/aime_2024', BOXED),
    'aime25': ('math-ai/aime25', BOXED),
    'aimo': ('AI-MO/aimo-validation-amc', BOXED),
    'amc23': ('math-ai/amc23', BOXED),
    'math500': ('HuggingFaceH4/MATH-500', BOXED),
}
FIRST_WORDS = 256               # of an answer, for the Dist-4g that compares texts of one length


# ---- problems ------------------------------------------------------------------------------------

def load_eval_sets(source, tokenizer, first, suffix):
    """Held-out problems of a file, folder, hub data set or named set, or of several with commas between
    -> {name: [Problem]}.

    first: take so many of each set; 0 = all. suffix: added to questions that are texts; '' = a named set's
    own instruction, and nothing for other sets. A problem without a known answer is a UserError, because
    it would always count as wrong.
    """
    sets = {}
    # A file's own name may hold a comma, so a path that exists is never split.
    names = [source] if Path(source).exists() else source.split(',')
    for name in names:
        hub_id, instruction = SETS.get(name.lower(), (name, ''))
        problems = load_problems(hub_id, tokenizer, first, split='test', suffix=suffix or instruction)

        # Without a known answer nothing can be right.
        unknown = sum(not problem.answer for problem in problems)
        if unknown:
            raise UserError(f'{hub_id}: {unknown} of {len(problems)} problems have no answer to grade by; '
                            'choose other eval_data=')

        # The label names the set in logs and tables: the short name, the hub id, or the file's name.
        label = Path(name).stem if Path(name).exists() else name
        if label in sets:
            raise UserError(f'{source}: two sets are called {label}; rename a file')
        sets[label] = problems
    return sets


def number_problems(sets):
    """{name: [Problem]} -> {(name, i): (i, Problem)}.

    The number i chooses a problem's random stream. It counts within the set, so that the random numbers do
    not depend on which other sets are evaluated beside it.
    """
    numbered = {}                            # in the order of the sets, which is the order of sampling
    for name, problems in sets.items():
        for number, problem in enumerate(problems):
            numbered[name, number] = (number, problem)
    return numbered


def check_answers(problems):
    """Does the grader accept each known answer as equal to itself? -> [], or one line that counts and shows
    those it rejects. It is a note: no model can ever be right on those problems."""
    # Training problems may have no known answer; they are not graded.
    known = [problem.answer for problem in problems if problem.answer is not None]

    # The model's side of the comparison: the answer in a box, as the instruction asks for it.
    rejected = [answer for answer in known if not grade('\\boxed{' + answer + '}', answer)]
    if not rejected:
        return []

    # Two examples are enough to see what kind of answer it is.
    examples = ' and '.join(shown(answer) for answer in rejected[:2])
    return [f'{len(rejected)} of {len(known)} known answers do not grade equal to themselves, such as '
            f'{examples}']


# ---- sampling ------------------------------------------------------------------------------------

def answers(model, numbered, per_problem, *, rows=64, rank=0, world=1, done=(), **how):
    """This rank's share of `per_problem` answers to each problem, as they end -> (key, sample, ids, stopped).

    numbered: {key: (number, Problem)}. rows: how many answers are sampled at once. done: (key, sample) pairs
    that are not sampled again. how: as in rollout.stream. A problem's number, the sample's number and the
    seed fix an answer's random numbers, whatever the rank and however often the script was restarted.
    """
    # What is still to be sampled, over all ranks.
    everything = [(key, sample) for key in numbered for sample in range(per_problem)]
    wanted = [pair for pair in everything if pair not in done]

    # Every world-th one is ours: neighbours have similar lengths, so the ranks finish together.
    wanted = wanted[rank::world]
    if not wanted:
        return                               # `stream` wants at least one request

    # The sampler knows prompts and numbers; it hands back the index of a request.
    requests = []                            # (prompt ids, problem number, sample number)
    for key, sample in wanted:
        number, problem = numbered[key]
        requests.append((problem.ids, number, sample))
    # Step -1 is no training step, so evaluation never shares random numbers with a rollout.
    for request, ids, stopped in stream(model, requests, rows=rows, step=-1, **how):
        yield *wanted[request], ids, stopped


def graded_rows(new_answers, tokenizer, numbered, seed):
    """Answers as `answers` yields them -> one dict each: a line of samples.jsonl."""
    for (name, number), sample, ids, stopped in new_answers:
        problem = numbered[name, number][1]
        text = tokenizer.decode(ids)         # what is graded

        # Prompt, text and ids are all kept: a reader wants the text, a bug hunt wants the ids.
        yield {'set': name, 'problem': number, 'sample': sample, 'seed': seed, 'answer': problem.answer,
               **verdict(text, problem), 'length': len(ids), 'stopped': stopped,
               'prompt': tokenizer.decode(problem.ids), 'text': text, 'ids': ids}


def verdict(text, problem):
    """The answer that a text gives (None if it gives none), whether it is right, and which part of the
    grader decided that."""
    return judge(text, problem.answer)._asdict()


def with_shares(rows, progress):
    """Pass the rows on, and let the line of a Progress end with the shares of answers that are finished and
    right."""
    count = 0                                # answers so far
    finished = 0                             # those that ended at a stop token
    right = 0                                # those that the grader accepts
    for row in rows:
        count += 1
        finished += row['stopped']
        right += row['correct']
        progress.extra = f'{finished / count:.0%} finished, {right / count:.0%} right'
        yield row


def sample_and_grade(model, tokenizer, sets, per_problem, *, rows=64, rank=0, world=1, label='evaluate',
                     **how):
    """Sample `per_problem` answers to every problem of {name: [Problem]} -> a dict for each answer of this
    rank's share, as support/answers.py writes it. rows, rank, world: as in `answers`. label: of the line that
    shows how far it is. how: as in rollout.stream; max_new_tokens is a number.
    """
    numbered = number_problems(sets)
    share = len(range(0, len(numbered) * per_problem, world))        # answers of rank 0, which shows them
    longest = how.get('max_new_tokens', 0)

    # This rank samples its share; nothing runs until the loop below asks for the rows.
    mine = []
    with Progress(label, share, 'answers', rank=rank, world=world, longest=longest) as progress:
        new = answers(model, numbered, per_problem, rows=rows, rank=rank, world=world,
                      on_poll=progress.update, **how)
        graded = graded_rows(new, tokenizer, numbered, how.get('seed', 0))

        # Token ids are many times as large as the text that they stand for.
        for row in with_shares(graded, progress):
            mine.append({name: row[name] for name in NAMES})
    return mine


def shared_scores(rows, sets, per_problem):
    """This rank's answers -> flat dict of scores over all ranks, the same on every rank. This is what the
    training loop logs.

    One set:       'avg@n' and 'best@n' in per cent, 'len' in tokens, over all problems.
    Several sets:  the same three of each set, such as 'avg@16/aime24', after the plain ones; 'avg@16',
                   'best@16' and 'len' are then the mean over SETS, not over problems, because 83 of the 143
                   problems of aime24,aime25,aimo are AIMO's and would make 58% of the number.
    """
    # Four numbers of each answer are sent between the ranks, without the texts.
    mine = [(row['set'], row['problem'], row['correct'], row['length']) for row in rows]
    results = [result for part in all_gather(mine) for result in part]

    # Every rank computes the same scores from the same numbers.
    by_set = []                              # {metric: value} of each set
    for name in sets:
        by_set.append(basic_scores([rest for label, *rest in results if label == name], per_problem))
    if len(by_set) == 1:
        return by_set[0]                     # plain keys only

    # Several sets: first the mean over them under the plain keys, so that what reads one number reads this.
    combined = {}
    for metric in by_set[0]:
        combined[metric] = fmean(values[metric] for values in by_set)
    # Then each set under its own name.
    for name, values in zip(sets, by_set, strict=True):
        for metric, value in values.items():
            combined[f'{metric}/{name}'] = value
    return combined


def basic_scores(results, per_problem):
    """(problem, correct, length) of each answer to one set -> {'avg@n', 'best@n', 'len'}."""
    # A problem is solved if any of its answers is right.
    solved = defaultdict(bool)
    for problem, correct, _ in results:
        solved[problem] |= correct
    return {f'avg@{per_problem}': 100 * fmean(correct for _, correct, _ in results),
            f'best@{per_problem}': 100 * fmean(solved.values()),
            'len': fmean(length for *_, length in results)}


# ---- metrics -------------------------------------------------------------------------------------

def pass_at(k, n, right):
    """Probability that k answers drawn from n, of which `right` are right, hold a right one.

    One minus the share of the subsets of size k that hold wrong answers only: 1 - C(n - right, k) / C(n, k).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(rows):
    """Is the most common answer to a problem right?

    Answers that the grader calls equal count together (0.5 and 1/2). Of equally common answers the one that
    came first wins. A text without an answer has no vote.
    """
    groups = []                              # rows whose answers are equal, oldest group first
    for row in rows:
        if row['extracted'] is None:
            continue

        # Join the first group with an equal answer, or start a new one.
        for group in groups:
            if equal(row['extracted'], group[0]['extracted']):
                group.append(row)
                break
        else:
            groups.append([row])
    if not groups:
        return False                         # no text gave an answer
    largest = max(groups, key=len)           # the first of the largest
    return largest[0]['correct']


def distinct(texts, words=None, size=4):
    """Distinct share of the `size`-grams of words of several texts, pooled; None if there are none.
    words: look at so many first words of each text; None = all."""
    # All answers to a problem together: a gram that two answers share counts once.
    grams = []
    for text in texts:
        kept = text.split()[:words]          # [:None] is all of it
        for start_word in range(len(kept) - size + 1):
            grams.append(tuple(kept[start_word:start_word + size]))
    return len(set(grams)) / len(grams) if grams else None


def bootstrap(values, draws=10_000, level=0.95):
    """Interval of the mean of values, one per problem, had other problems been drawn -> (low, high)."""
    observed = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)         # the same table whenever it is printed
    count = len(observed)

    # 100 resamples at a time, so that a set of thousands of problems needs no gigabytes.
    means = []
    for _ in range(draws // 100):
        chosen = torch.randint(count, (100, count), generator=generator)
        means.append(observed[chosen].mean(1))
    means = torch.cat(means)

    # The middle 95% of the means.
    low = means.quantile((1 - level) / 2).item()
    high = means.quantile((1 + level) / 2).item()
    return low, high


def scores(rows):
    """Rows of one set, n for each problem -> all metrics: shares in per cent, length in tokens."""
    # Answers come in the order in which they ended; sorted, every run groups them alike.
    by_problem = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row['problem'], row['sample'])):
        by_problem[row['problem']].append(row)
    samples = list(by_problem.values())
    n = len(rows) // len(samples)

    # Of each problem: how many answers are right, their share in per cent, and the texts.
    right = [sum(row['correct'] for row in group) for group in samples]
    accuracy = [100 * fmean(row['correct'] for row in group) for group in samples]
    texts = [[row['text'] for row in group] for group in samples]

    # Accuracy. Problems have n answers each, so the mean over problems is the mean over answers.
    metrics = {f'avg@{n}': fmean(accuracy), 'interval': bootstrap(accuracy),
               f'best@{n}': percentage(map(bool, right))}
    k = 2
    while k < n:                             # Avg@n is pass@1, Best@n is pass@n: show the powers between
        metrics[f'pass@{k}'] = percentage(pass_at(k, n, count) for count in right)
        k *= 2
    metrics[f'maj@{n}'] = percentage(map(majority, samples))

    # Diversity: of whole answers, and of their first words.
    metrics['dist-4g'] = percentage(map(distinct, texts))
    metrics[f'dist-4g/{FIRST_WORDS}'] = percentage(distinct(group, FIRST_WORDS) for group in texts)

    # Form: how long, how many ended by themselves, how many gave no answer at all.
    metrics['len'] = fmean(row['length'] for row in rows)
    metrics['finish'] = percentage(row['stopped'] for row in rows)
    metrics['no box'] = percentage(row['extracted'] is None for row in rows)
    metrics['problems'] = len(samples)
    return metrics


def percentage(shares):
    """Mean of shares in per cent. None means that there was nothing to measure, and is left out."""
    known = [share for share in shares if share is not None]
    return 100 * fmean(known) if known else 0.0


# ---- tables --------------------------------------------------------------------------------------

def table(rows):
    """{name: scores} -> the lines of a table. What `shared_scores` returns for several sets becomes a line
    for the mean and an indented line for each set."""
    if not rows:
        return ['no eval_data, so no accuracy']

    # One model may fill several lines.
    labelled = []                            # (label, scores)
    for name, values in rows.items():
        labelled += split_sets(name, values)

    # Models that were evaluated with another n have other columns; a cell that was not measured is empty.
    keys = list(dict.fromkeys(key for _, values in labelled for key in values))

    # Text first: a column's width is known only when all of its cells are.
    titles = [key.replace('avg', 'Avg').replace('best', 'Best').replace('len', 'length') for key in keys]
    cells = [['', *titles]]
    for name, values in labelled:
        cells.append([name, *(cell(values[key]) if key in values else '' for key in keys)])

    # Names to the left, numbers to the right, a column as wide as its longest cell.
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        line = name.ljust(max(12, widths[0] + 1))
        for text, width in zip(numbers, widths[1:], strict=True):
            line += text.rjust(max(10, width + 2))
        lines.append(line)
    return lines


def split_sets(name, values):
    """A model's flat scores -> [(label, scores)]: the plain scores, then those of each set."""
    # Every set has a length, so these keys name the sets.
    sets = [key.removeprefix('len/') for key in values if key.startswith('len/')]
    if not sets:
        return [(name, values)]

    # The metrics that every set has, under the plain key and under its own.
    metrics = [key for key in values if f'{key}/{sets[0]}' in values]
    labelled = [(name, {metric: values[metric] for metric in metrics})]
    for label in sets:
        labelled.append((f'  {label}', {metric: values[f'{metric}/{label}'] for metric in metrics}))
    return labelled


def cell(value):
    """One number of a table as text; a pair of numbers is an interval."""
    if isinstance(value, tuple | list):
        return f'{value[0]:.1f}-{value[1]:.1f}'
    return f'{value:.1f}' if isinstance(value, float) else str(value)


# ---- the script ----------------------------------------------------------------------------------

def settings(argv=None):
    """The command line -> checked config. model= is another spelling of student=."""
    argv = sys.argv[1:] if argv is None else argv
    return load_config([re.sub('^(--)?model=', 'student=', word) for word in argv], 'eval_math.py')


@dataclass(frozen=True)
class Evaluation:
    """What a command asks for. Only configs, tokenizers and problems have been read."""
    cfg: dict
    date: str                   # the day that chat templates are told is today
    tokenizer: object
    stop: list                  # token ids that end an answer
    vocab: int                  # ids below it are written
    sets: dict                  # {name: [Problem]}
    numbered: dict              # {(name, i): (i, Problem)}
    total: int                  # answers
    longest: int                # tokens of the longest prompt and answer together
    folder: Path                # where the answers are


def prepare(cfg, env, date):
    """Read and check what can be checked before the weights are loaded -> Evaluation."""
    tokenizer = load_tokenizer(cfg['student'], enable_thinking=cfg['enable_thinking'], date=date)
    check_ids(cfg['student'], read_config(cfg['student']).V, tokenizer)
    sets = load_eval_sets(cfg['eval_data'], tokenizer, cfg['eval_problems'], cfg['eval_suffix'])
    numbered = number_problems(sets)

    # As in training, an answer ends at a stop token of either model, if both have the same tokens.
    teacher_tokenizer = load_tokenizer(cfg['teacher'] or cfg['student'])
    stop = stop_set(tokenizer, teacher_tokenizer)
    vocab = shared_size(tokenizer, teacher_tokenizer)
    longest = longest_sequence(cfg, numbered)
    total = len(numbered) * cfg['eval_n']
    folder = samples_folder(cfg | {'dtype': str(env.dtype)}, sets)
    return Evaluation(cfg, date, tokenizer, stop, vocab, sets, numbered, total, longest, folder)


def longest_sequence(cfg, numbered):
    """Tokens of the longest prompt and answer together; UserError if the model cannot read so many."""
    new_tokens = cfg['eval_max_new_tokens'] or cfg['max_new_tokens']
    longest = max(len(problem.ids) for _, problem in numbered.values()) + new_tokens
    context = read_config(cfg['student']).context
    if longest > context:
        raise UserError(f"{cfg['student']}: reads {context} tokens, but the longest prompt and "
                        f'{new_tokens} new tokens make {longest}; lower eval_max_new_tokens=')
    return longest


def open_evaluation(cfg, env):
    """The problems, and the answers that earlier runs of this command have left -> (Evaluation, samples).

    Prompts may hold the date: an evaluation that goes on the next day asks as it asked on the first.
    """
    evaluation = prepare(cfg, env, day_of_start(cfg['date']))
    samples = read_samples(evaluation.folder)
    first_day = day_of_start(first_date(samples), evaluation.date)
    if first_day != evaluation.date:
        evaluation = prepare(cfg, env, first_day)
    check_samples(evaluation.folder, samples, evaluation.numbered, evaluation.tokenizer, cfg)
    return evaluation, samples


def main(cfg):
    env = start(cfg['device'], cfg['dtype'], timeout=cfg['timeout'])
    for key in ('student', 'eval_data'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; set {key}=")
    cfg = cfg | {'data': ''}                 # nothing is trained here: no toy is made for it
    if toy.ends_dry_run(cfg):
        return
    cfg = toy.prepare(cfg, env)

    # What is asked, and what is there. An answer that the grader cannot read is told now, not after hours of
    # sampling.
    evaluation, samples = open_evaluation(cfg, env)
    for name, problems in evaluation.sets.items():
        for line in check_answers(problems):
            print0(f'  {name}: {line}')
    there = f'{evaluation.folder}: {len(samples)} of {evaluation.total} answers'
    if cfg['dry_run']:                       # nothing is written
        print0(f'{there} are there; a run samples the rest')
        return
    if cfg['regrade'] and len(samples) < evaluation.total:
        raise UserError(f'{there}; run it without --regrade first')

    # The folder is made only after the weights are loaded, so that a refused command leaves nothing behind.
    model = None
    if len(samples) < evaluation.total:
        print0(f'{there} are there')
        model = load_model(cfg['student'], env.dtype, env.device)
        model.max_length = evaluation.longest      # longrope chooses its factors by the longest sequence
    with owned(evaluation.folder, env.rank):
        run_in_folder(evaluation, model, env)


def run_in_folder(evaluation, model, env):
    """Sample what is missing or, without a model, nothing; grade again if asked; score. This process and its
    ranks own the folder."""
    # The answers are read again, because another process may have written until a moment ago. Once all ranks
    # have read them, rank 0 merges the ranks' parts into one file.
    samples = read_samples(evaluation.folder)
    barrier()
    if env.rank == 0:
        if evaluation.cfg['regrade']:
            for (name, number, _), row in samples.items():
                row |= verdict(row['text'], evaluation.numbered[name, number][1])
        write_samples(evaluation.folder, samples)
    barrier()

    # Each rank appends to a part of its own, and rank 0 merges again.
    if model is not None:
        sample_rest(evaluation, model, env, samples)
        barrier()
        if env.rank == 0:
            samples = read_samples(evaluation.folder)
            write_samples(evaluation.folder, samples)

    # Scores are made from what is on disk: answers of earlier runs count as those of this one.
    if env.rank == 0:
        report(evaluation, samples)
    barrier()


def sample_rest(evaluation, model, env, samples):
    """Sample the answers that are not there yet, and append each to this rank's part as it ends."""
    cfg = evaluation.cfg

    # What is there is not sampled again.
    done = {((name, number), sample) for name, number, sample in samples}
    new_tokens = cfg['eval_max_new_tokens'] or cfg['max_new_tokens']
    share = len(range(0, evaluation.total - len(done), env.world))   # answers of rank 0, which shows them
    progress = Progress('evaluate', share, 'answers', rank=env.rank, world=env.world, longest=new_tokens)
    with (evaluation.folder / f'samples-{env.rank}.jsonl').open('a') as file, progress:
        new = answers(model, evaluation.numbered, cfg['eval_n'], rows=cfg['eval_rows'], rank=env.rank,
                      world=env.world, done=done, max_new_tokens=new_tokens,
                      stop=evaluation.stop, vocab=evaluation.vocab, seed=cfg['seed'],
                      temperature=cfg['eval_temperature'], top_p=cfg['eval_top_p'], on_poll=progress.update)
        graded = graded_rows(new, evaluation.tokenizer, evaluation.numbered, cfg['seed'])
        for row in with_shares(graded, progress):
            append_row(file, row | {'date': evaluation.date}, crc=True)


def report(evaluation, samples):
    """Score all answers, set by set: results.json, and a table on the terminal."""
    results = {}
    for name in evaluation.sets:
        results[name] = scores([row for row in samples.values() if row['set'] == name])
    cfg = evaluation.cfg
    write_json(evaluation.folder / 'results.json',
               {'model': cfg['student'], 'seed': cfg['seed'], 'commits': commits(), 'sets': results})
    print0('\n'.join(table(results)))
    print0(f'{evaluation.folder}: results.json, samples.jsonl')


if __name__ == '__main__':
    run(main, settings)
