"""
How well does a model answer? The paper's four metrics and what else a reader wants to see.

    python eval_math.py model=out/toy/last data=out/toy_models/.../eval.jsonl
    python eval_math.py model=Qwen/Qwen3-4B data=aime24,aime25,aimo n=16 max_new_tokens=31744 top_p=0.95
    python eval_math.py configs/toy.py model=out/toy/last          the rest from a config
    torchrun --nproc_per_node=8 eval_math.py model=...             answers spread over ranks
    python eval_math.py ... --regrade                              grade what was sampled again

On this command line a key without `eval_` means the one with it: n is eval_n. Every answer goes to
samples.jsonl as it ends, graded; the same command goes on where it stopped. Places of finished answers are
refilled, so a few long ones do not keep the others waiting. Grading (grader.py) is bounded work, about a
millisecond an answer, so it stands between two decode steps.

Avg@n: share of right answers. Best@n: problems with a right one among n. pass@k: the same for k of them,
unbiased. maj@n: problems whose commonest answer is right. Dist-4g: distinct share of whitespace 4-grams,
pooled per problem (the authors'); /256: of each answer's first 256 words, since long texts repeat
themselves. The interval of Avg@n is a bootstrap over problems: 30 of them are few.
"""
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from configs import default, load_config
from formats.huggingface import load_model, snapshot
from formats.problems import load_problems
from formats.tokenizer import check_ids, load_tokenizer, shared_size, stop_set
from grading.grader import equal, extract, grade
from rollout import stream
from studies import toy
from support.files import digest, remove, whole, write_json
from support.runtime import UserError, all_gather, barrier, print0, run, start

__all__ = ['grade', 'evaluate']

SETS = {'aime24': 'HuggingFaceH4/aime_2024', 'aime25': 'math-ai/aime25', 'aimo': 'AI-MO/aimo-validation-amc',
        'amc23': 'math-ai/amc23', 'math500': 'HuggingFaceH4/MATH-500'}
WORDS = 256                     # of an answer that the length-matched Dist-4g looks at


# ---- problems ----------------------------------------------------------------------------------

def exam_sets(source, tokenizer, first, suffix):
    """Held-out problems of a file, folder, hub data set or short name, or of several with commas between
    -> {name: [Problem]}. One without a known answer is a UserError: it would always count as wrong."""
    sets = {}
    for name in [source] if Path(source).exists() else source.split(','):
        where = SETS.get(name.lower(), name)
        problems = load_problems(where, tokenizer, first, split='test', suffix=suffix)
        unknown = sum(not p.answer for p in problems)
        if unknown:
            raise UserError(f'{where}: {unknown} of {len(problems)} problems have no answer to grade by; '
                            'choose other eval_data=')
        label = Path(name).stem if Path(name).exists() else name
        if label in sets:
            raise UserError(f'{source}: two sets are called {label}; rename a file')
        sets[label] = problems
    return sets


def exam_problems(*args):
    """The problems of `exam_sets`, one after the other."""
    return [p for problems in exam_sets(*args).values() for p in problems]


# ---- sampling ----------------------------------------------------------------------------------

def answers(model, numbered, n, *, rows=64, rank=0, world=1, done=(), **how):
    """This rank's share of n answers to each problem, as they end -> (key, sample, ids, stopped).

    numbered: {key: (number, Problem)}. done: (key, sample) pairs not to draw again. rows: answers in the
    making at once. how: as in rollout.stream. A problem's number, the sample's and the seed fix an answer,
    so two evaluations differ by their models alone, and neither rank nor restart changes anything.
    """
    todo = [(key, k) for key in numbered for k in range(n) if (key, k) not in done][rank::world]
    requests = [(numbered[key][1].ids, numbered[key][0], k) for key, k in todo]
    for j, ids, stopped in stream(model, requests, rows=rows, step=-1, **how) if requests else ():
        yield *todo[j], ids, stopped


def progress_of(rows, total, name):
    """Pass on rows, with a bar: answers, tokens a second, finished and right so far."""
    bar = tqdm(total=total, desc=name, unit='answer', leave=False, disable=None if name else True)
    count = tokens = finished = right = 0
    for row in rows:
        count, tokens = count + 1, tokens + row['length']
        finished, right = finished + row['stopped'], right + row['correct']
        seconds = bar.format_dict['elapsed'] or 1
        bar.set_postfix_str(f'{tokens / seconds:.0f} tok/s, {finished / count:.0%} finished, '
                            f'{right / count:.0%} right', refresh=False)
        bar.update()
        yield row
    bar.close()


def evaluate(model, tokenizer, problems, n, *, rows=64, rank=0, world=1, progress='', **how):
    """n sampled answers to every problem -> {'avg@n', 'best@n', 'len'}, the same on every rank: what the
    training loop wants to know."""
    numbered = {i: (i, p) for i, p in enumerate(problems)}
    some = ({'problem': i, 'length': len(ids), 'stopped': stopped,
             'correct': grade(tokenizer.decode(ids), problems[i].answer)}
            for i, _, ids, stopped in answers(model, numbered, n, rows=rows, rank=rank, world=world, **how))
    mine = list(progress_of(some, len(problems) * n // world, progress))
    every = [(r['problem'], r['correct'], r['length']) for part in all_gather(mine) for r in part]
    right = defaultdict(list)
    for i, correct, _ in every:
        right[i].append(correct)
    return {f'avg@{n}': 100 * fmean(c for _, c, _ in every),
            f'best@{n}': 100 * fmean(map(any, right.values())), 'len': fmean(length for *_, length in every)}


# ---- metrics -----------------------------------------------------------------------------------

def pass_at(k, n, right):
    """Chance that k answers drawn from n, `right` of them right, hold a right one."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(rows):
    """Is the commonest answer of a problem right? Equal answers count together; the first of the equally
    common wins; no answer is no vote."""
    groups = []
    for row in rows:
        if row['extracted'] is not None:
            group = next((g for g in groups if equal(row['extracted'], g[0]['extracted'])), None)
            groups.append([row]) if group is None else group.append(row)
    return bool(groups) and max(groups, key=len)[0]['correct']


def distinct(texts, words=None, size=4):
    """Distinct share of the `size`-grams of texts, pooled; of their first so many words. None if none."""
    cut = [text.split()[:words] for text in texts]
    grams = [tuple(w[i:i + size]) for w in cut for i in range(len(w) - size + 1)]
    return len(set(grams)) / len(grams) if grams else None


def bootstrap(values, draws=10_000, level=0.95):
    """Interval of the mean of values, one a problem, if other problems had been drawn -> (low, high)."""
    x, g = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(0)
    means = torch.cat([x[torch.randint(len(x), (100, len(x)), generator=g)].mean(1)
                       for _ in range(draws // 100)])
    return tuple(means.quantile(q).item() for q in ((1 - level) / 2, (1 + level) / 2))


def scores(rows):
    """Rows of one set, n for each problem -> all metrics; shares in per cent, length in tokens."""
    by = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r['problem'], r['sample'])):
        by[row['problem']].append(row)
    n = len(rows) // len(by)
    each = [100 * fmean(r['correct'] for r in some) for some in by.values()]
    right = [sum(r['correct'] for r in some) for some in by.values()]
    texts = [[r['text'] for r in some] for some in by.values()]

    def share(values):
        values = [v for v in values if v is not None]
        return 100 * fmean(values) if values else 0.0
    return {f'avg@{n}': fmean(each), 'interval': bootstrap(each), f'best@{n}': share(map(bool, right)),
            **{f'pass@{2**i}': share(pass_at(2**i, n, c) for c in right) for i in range(1, n.bit_length())
               if 2**i < n},
            f'maj@{n}': share(map(majority, by.values())), 'dist-4g': share(map(distinct, texts)),
            f'dist-4g/{WORDS}': share(distinct(t, WORDS) for t in texts),
            'len': fmean(r['length'] for r in rows), 'finish': share(r['stopped'] for r in rows),
            'no box': share(r['extracted'] is None for r in rows), 'problems': len(by)}


def table(rows):
    """{'name': scores} -> the lines of a table; a pair of numbers is an interval."""
    if not rows:
        return ['no eval_data, so no accuracy']
    keys = list(next(iter(rows.values())))
    names = [k.replace('avg', 'Avg').replace('best', 'Best').replace('len', 'length') for k in keys]
    cells = [[f'{v[0]:.1f}-{v[1]:.1f}' if isinstance(v, tuple | list) else f'{v:.1f}' if isinstance(v, float)
              else str(v) for v in (row[k] for k in keys)] for row in rows.values()]
    wide = [max(10, 2 + max(map(len, column))) for column in zip(names, *cells, strict=True)]
    lines = [[f'{"":12}', *names], *([f'{name:12}', *row] for name, row in zip(rows, cells, strict=True))]
    return [line[0] + ''.join(f'{c:>{w}}' for c, w in zip(line[1:], wide, strict=True)) for line in lines]


# ---- samples on disk -----------------------------------------------------------------------------

def read_samples(folder):
    """Whole rows of samples.jsonl and of every rank's part -> {(set, problem, sample): row}. A line that
    was cut off as it was written is dropped; any other damage is a UserError."""
    got = {}
    for file in sorted(folder.glob('samples*.jsonl')):
        for i, line in enumerate(file.read_text().split('\n')[:-1], 1):
            try:
                row = json.loads(line)
                got[row['set'], row['problem'], row['sample']] = row
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{file}:{i}: damaged; delete the line to sample it anew') from None
    return got


def write_samples(folder, got):
    """All rows in order into samples.jsonl; the parts go."""
    with whole(folder / 'samples.jsonl') as tmp:
        tmp.write_text(''.join(json.dumps(got[key]) + '\n' for key in sorted(got)))
    for part in folder.glob('samples-*.jsonl'):
        remove(part)


def folder_of(cfg, sets):
    """out/eval/<model>-<digest>: one for each model (by its files), problem sets and way of sampling."""
    model = snapshot(cfg['student'])
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in model.iterdir() if f.is_file())
    keys = ('seed', 'teacher', 'dtype', 'enable_thinking', 'max_new_tokens', 'eval_n', 'eval_temperature',
            'eval_top_p', 'eval_max_new_tokens', 'eval_suffix')
    asked = {name: [(p.question, p.answer) for p in problems] for name, problems in sets.items()}
    name = cfg['student'].rstrip('/').split('/')[-1]
    return Path('out/eval') / f'{name}-{digest([files, [cfg[k] for k in keys], asked])}'


# ---- the script ----------------------------------------------------------------------------------

def settings(argv=None):
    """The command line -> the checked config, and whether to grade again."""
    argv, short = list(sys.argv[1:] if argv is None else argv), {'model': 'student'}
    out = []
    for arg in argv:
        key, eq, value = arg.removeprefix('--').partition('=')
        long = short.get(key, f'eval_{key}')
        out.append(f'{long}={value}' if eq and (key in short or long in default) else arg)
    regrade = [a for a in out if a != '--regrade']
    return load_config(regrade), len(regrade) < len(out)


def main(cfg, regrade=False):
    place = start(cfg['device'], cfg['dtype'])
    cfg = toy.prepare(cfg, place)
    for key, name in (('student', 'model'), ('eval_data', 'data')):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; set {name}=")
    tok = load_tokenizer(cfg['student'], enable_thinking=cfg['enable_thinking'])
    sets = exam_sets(cfg['eval_data'], tok, cfg['eval_problems'], cfg['eval_suffix'])
    folder = folder_of(cfg | {'dtype': str(place.dtype)}, sets)
    numbered = {(name, i): (i, p) for name, problems in sets.items() for i, p in enumerate(problems)}
    got = read_samples(folder)
    all_gather(None)                                 # everybody has read before anybody writes
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if regrade:
            for row in got.values():
                row |= verdict(row['text'], numbered[row['set'], row['problem']][1])
        write_samples(folder, got)
    barrier()
    total = len(numbered) * cfg['eval_n']
    if not regrade and len(got) < total:
        print0(f'{folder}: {len(got)} of {total} answers are there')
        sample_rest(cfg, place, tok, folder, numbered, {(key[:2], key[2]) for key in got})
        barrier()
        if place.rank == 0:                          # alone: it deletes the parts
            got = read_samples(folder)
            write_samples(folder, got)
    if place.rank == 0:
        if len(got) < total:
            raise UserError(f'{folder}: {len(got)} of {total} answers; run it without --regrade first')
        results = {name: scores([r for r in got.values() if r['set'] == name]) for name in sets}
        write_json(folder / 'results.json', {'model': cfg['student'], 'seed': cfg['seed'], 'sets': results})
        print0('\n'.join(table(results)))
        print0(f'{folder}: results.json, samples.jsonl')
    barrier()


def verdict(text, problem):
    """The answer a text gives, and whether it is right."""
    return {'extracted': extract(text), 'correct': grade(text, problem.answer)}


def sample_rest(cfg, place, tok, folder, numbered, done):
    """Sample what is not done yet, and append it to this rank's part as it ends."""
    model = load_model(cfg['student'], place.dtype, place.device)
    tokens = cfg['eval_max_new_tokens'] or cfg['max_new_tokens']
    longest = max(len(p.ids) for _, p in numbered.values()) + tokens
    if longest > model.config.context:
        raise UserError(f"{cfg['student']}: reads {model.config.context} tokens, but the longest prompt and "
                        f'{tokens} new tokens make {longest}; lower max_new_tokens')
    check_ids(cfg['student'], model.config.V, tok)
    model.max_length = longest
    tok_t = load_tokenizer(cfg['teacher'] or cfg['student'])     # as in training: at either's stop tokens
    new = answers(model, numbered, cfg['eval_n'], rows=cfg['eval_rows'], rank=place.rank, world=place.world,
                  done=done, max_new_tokens=tokens, stop=stop_set(tok, tok_t), vocab=shared_size(tok, tok_t),
                  seed=cfg['seed'],
                  temperature=cfg['eval_temperature'], top_p=cfg['eval_top_p'])

    def rows():
        for key, k, ids, stopped in new:
            text, problem = tok.decode(ids), numbered[key][1]
            yield {'set': key[0], 'problem': key[1], 'sample': k, 'seed': cfg['seed'],
                   'answer': problem.answer, **verdict(text, problem), 'length': len(ids), 'stopped': stopped,
                   'prompt': tok.decode(problem.ids), 'text': text, 'ids': ids}
    left = (len(numbered) * cfg['eval_n'] - len(done)) // place.world
    with (folder / f'samples-{place.rank}.jsonl').open('a') as file:
        for row in progress_of(rows(), left, 'evaluate' if place.rank == 0 else ''):
            file.write(json.dumps(row) + '\n')
            file.flush()


if __name__ == '__main__':
    run(lambda given: main(*given), settings)
