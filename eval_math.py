"""
How well a model answers: n samples a problem, each graded by its last box.

    python eval_math.py configs/toy.py                          the toy's student
    python eval_math.py configs/toy.py student=out/toy/last     what distillation made of it
    torchrun --nproc_per_node=2 eval_math.py configs/toy.py     problems spread over ranks

Avg@n: share of correct samples. Best@n: share of problems with a correct one among n. What it does
not know yet: equality beyond the same text or the same decimal number (1/2 against 0.5).
"""
import re
from fractions import Fraction

import toy
from configs import load_config
from data import check_ids, load_problems, load_tokenizer
from model import load_model
from rollout import sample
from runtime import UserError, all_gather, print0, run, start


def boxed(text):
    """What the last complete \\boxed{...} of a text holds, braces balanced; None if there is none.
    One pass: a text of ten thousand unclosed boxes costs no more than any other."""
    opened, last = [], None
    for brace in re.finditer(r'\\boxed\{|\{|\}', text):
        if brace[0] != '}':
            opened.append((len(brace[0]) > 1, brace.end()))
        elif opened:
            is_box, start = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, brace.start()
    return text[slice(*last)] if last else None


def number(text):
    """A plain decimal number of bounded length -> Fraction, else None. Nothing is evaluated."""
    return Fraction(text) if re.fullmatch(r'[+-]?\d{1,30}(\.\d{1,30})?', text) else None


def grade(text, answer):
    """Does the text's last box hold the answer: the same characters, or the same decimal number?
    Without a box, its last line counts if it reads `Answer: ...`, as DAPO's prompts ask for."""
    found = boxed(text)
    if found is None:
        line = re.fullmatch(r'answer:(.*)', text.strip()[-200:].split('\n')[-1].strip(), re.IGNORECASE)
        found = line[1] if line else ''
    found, answer = found.strip(), (boxed(answer) or answer).strip()         # a solution as answer: its box
    if not answer:
        return False
    return found == answer or (number(found) is not None and number(found) == number(answer))


def scores(verdicts, lengths):
    """Verdicts [problem][sample] and lengths [tokens] -> {'avg@n', 'best@n', 'len'}; percentages, tokens."""
    n = len(verdicts[0])
    return {f'avg@{n}': 100 * sum(map(sum, verdicts)) / (n * len(verdicts)),
            f'best@{n}': 100 * sum(map(any, verdicts)) / len(verdicts),
            'len': sum(lengths) / len(lengths)}


def evaluate(model, tokenizer, problems, n, *, rows=64, rank=0, world=1, progress='', **how):
    """n sampled answers to every problem -> `scores`, the same on every rank.

    rows: answers sampled at once, which bounds the KV cache. how: max_new_tokens, stop, vocab,
    temperature, top_p, seed as in rollout.sample. Every call draws the same random numbers, so two
    evaluations differ by their models alone. Ranks share the problems.
    """
    mine, each = range(rank, len(problems), world), max(1, rows // n)
    verdicts, lengths = {}, []
    for first in range(0, len(mine), each):
        some = mine[first:first + each]
        roll = sample(model, [problems[i].ids for i in some], n, which=list(some), step=-1,
                      progress=progress and f'{progress}, problem {first + 1}/{len(mine)}', **how)
        lengths += roll.resp_len.tolist()
        texts = [tokenizer.decode(ids) for ids in roll.answers()]
        for j, i in enumerate(some):
            verdicts[i] = [grade(text, problems[i].answer) for text in texts[j * n:(j + 1) * n]]
    parts = all_gather((verdicts, lengths))
    verdicts = {i: v for part, _ in parts for i, v in part.items()}
    return scores([verdicts[i] for i in range(len(problems))], [x for _, part in parts for x in part])


def exam_problems(source, tokenizer, first, suffix):
    """Held-out problems; one without a known answer is a UserError, since it would always count as wrong."""
    problems = load_problems(source, tokenizer, first, split='test', suffix=suffix)
    unknown = sum(not p.answer for p in problems)
    if unknown:
        raise UserError(f'{source}: {unknown} of {len(problems)} problems have no answer to grade by; '
                        'choose other eval_data=')
    return problems


def table(rows):
    """{'name': scores} -> the lines of a table."""
    if not rows:
        return ['no eval_data, so no accuracy']
    keys = list(next(iter(rows.values())))
    names = [k.replace('avg', 'Avg').replace('best', 'Best').replace('len', 'length') for k in keys]
    lines = [f'{"":12}' + ''.join(f'{n:>10}' for n in names)]
    return lines + [f'{name:12}' + ''.join(f'{row[k]:10.1f}' for k in keys) for name, row in rows.items()]


def main(cfg):
    place = start(cfg['device'], cfg['dtype'])
    cfg = toy.prepare(cfg, place)
    if not cfg['eval_data']:
        raise UserError("eval_data='': nothing to evaluate on; set eval_data=")
    tok = load_tokenizer(cfg['student'], enable_thinking=cfg['enable_thinking'])
    stop = set(tok.stop_ids) | set(load_tokenizer(cfg['teacher']).stop_ids if cfg['teacher'] else ())
    problems = exam_problems(cfg['eval_data'], tok, cfg['eval_problems'], cfg['eval_suffix'])
    tokens = cfg['eval_max_new_tokens'] or cfg['max_new_tokens']
    model = load_model(cfg['student'], place.dtype, place.device)
    longest = max(len(p.ids) for p in problems) + tokens
    if longest > model.config.context:
        raise UserError(f"{cfg['student']}: reads {model.config.context} tokens, but the longest prompt and "
                        f'{tokens} new tokens make {longest}; lower eval_max_new_tokens')
    check_ids(cfg['student'], model.config.V, tok)
    model.reach = longest
    how = dict(max_new_tokens=tokens, stop=sorted(stop), vocab=tok.size, seed=cfg['seed'],
               temperature=cfg['eval_temperature'], top_p=cfg['eval_top_p'])
    got = evaluate(model, tok, problems, cfg['eval_n'], rows=cfg['eval_rows'], rank=place.rank,
                   world=place.world, progress='evaluate' if place.rank == 0 else '', **how)
    print0('\n'.join(table({cfg['student'].rstrip('/').split('/')[-1]: got})))


if __name__ == '__main__':
    run(main, load_config)
