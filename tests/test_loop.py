"""
The training loop against another one, which shares nothing of distill.py, step.py or support/optimizer.py.

What is held against another run of itself (resumed = whole, two ranks = one) does not see a mistake that every run
makes: a learning rate that is logged and never applied, gradients that are never clipped, the same prompts in every
step. Here the loop is written once more, from the equations, in plain torch; the settings are such that every key
changes the numbers.
"""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import argv

import distill
from configs import load_config
from distill import main
from formats.huggingface import load_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer
from rollout import naive
from support.files import read_json, write_json

# Clipping acts in every step, the schedule has a warm-up and an end that is not 0, decay acts, the betas are not
# those of torch, and no sampling key has its neutral value.
KEYS = dict(steps=6, prompts_per_step=3, n=2, lr=0.01, warmup=0.4, schedule='linear', min_lr=0.25, grad_clip=0.3,
            weight_decay=0.3, beta1=0.7, beta2=0.9, adam_eps=1e-4, temperature=1.3, top_k=9, top_p=0.9, seed=5,
            max_new_tokens=20, eval_every=4, eval_n=2, diagnose_every=2, diagnose_rows=10**6, token_budget=60)
OBJECTIVES = {
    'OPRD': dict(positions='last_k', last_k=7),
    'OPRD by token': dict(loss_average='token', rep_loss='cosine', layers=[1, 3]),
    'full KL': dict(oprd_weight=0.0, opd_weight=1.0, opd='full', positions='all'),
    'both': dict(oprd_weight=0.5, opd_weight='[[0,1],[0.5,1],[0.5,0.2]]', opd='full', positions='first_k', first_k=9),
}


def log_of(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def with_other_stop(folder, out):
    """A copy of the teacher whose generation config names one more token that ends an answer."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = read_json(out / 'generation_config.json')
    config['eos_token_id'] = [2, 20]                     # 20 is the } that closes the box
    write_json(out / 'generation_config.json', config)
    return out


def verdict(text, answer):
    """Stands for the grader, for which so small a student is never right: which answers count is what is tested here."""
    return (len(text) + int(answer)) % 3 == 0


def rate(step, cfg):
    """The learning rate by its words: up to the peak in warmup * steps steps, then straight down to min_lr of it, which
    would be reached in the step after the last."""
    rise = round(cfg['warmup'] * cfg['steps'])
    if step <= rise:
        return cfg['lr'] * step / rise
    left = 1 - (step - rise - 1) / (cfg['steps'] - rise)
    return cfg['lr'] * (cfg['min_lr'] + (1 - cfg['min_lr']) * left)


def states(model, ids, last):
    """Hidden states after each layer at the response positions of one answer: {layer: (n, d)}."""
    out = model.hidden(ids[None], list(range(1, model.config.L + 1)))
    return {l: h[0, last] for l, h in enumerate(out, 1)}


def supervised(n, cfg):
    """Response positions 0..n-1 that are supervised."""
    if cfg['positions'] == 'last_k':
        return list(range(n))[-cfg['last_k']:]
    if cfg['positions'] == 'first_k':
        return list(range(n))[:cfg['first_k']]
    return list(range(n))


def loop_by_hand(cfg, student_folder, teacher_folder, data):
    """The rows of a log, as the equations say; and the student's weights at the end."""
    student, teacher = load_model(student_folder), load_model(teacher_folder)
    tok = load_tokenizer(student_folder)
    problems = load_problems(data, tok)
    stop = sorted({*tok.stop_ids, *load_tokenizer(teacher_folder).stop_ids})
    layers = cfg['layers'] if isinstance(cfg['layers'], list) else list(range(1, student.config.L + 1))
    trains_head = cfg['opd_weight'] != 0.0
    weights = {name: p for name, p in student.named_parameters() if trains_head or name != 'head.weight'}
    m = {name: torch.zeros_like(p) for name, p in weights.items()}
    v = {name: torch.zeros_like(p) for name, p in weights.items()}
    rows = []
    for step in range(1, cfg['steps'] + 1):
        # each epoch is a shuffle of all problems; a step takes the next prompts_per_step of them
        chosen = []
        for draw in range((step - 1) * cfg['prompts_per_step'], step * cfg['prompts_per_step']):
            generator = torch.Generator().manual_seed(cfg['seed'] * 1_000_003 + draw // len(problems))
            chosen.append(torch.randperm(len(problems), generator=generator).tolist()[draw % len(problems)])
        roll = naive(student, [problems[i].ids for i in chosen], cfg['n'], max_new_tokens=cfg['max_new_tokens'], stop=stop,
                     seed=cfg['seed'], step=step, temperature=cfg['temperature'], top_k=cfg['top_k'], top_p=cfg['top_p'])
        answers = [(roll.ids[b, :int(roll.length[b])], int(roll.prompt_len[b]), int(roll.resp_len[b])) for b in range(len(roll.ids))]
        counted = [len(supervised(n, cfg)) for _, _, n in answers]

        hidden, output, kl, cosines = 0.0, 0.0, 0.0, [0.0] * len(layers)
        for (ids, P, n), count in zip(answers, counted, strict=True):
            columns = [P - 1 + t for t in supervised(n, cfg)]
            weight = 1 / count / len(answers) if cfg['loss_average'] == 'sequence' else 1 / sum(counted)
            ours, theirs = states(student, ids, columns), {l: h.detach() for l, h in states(teacher, ids, columns).items()}
            for i, l in enumerate(layers):
                cos = torch.nn.functional.cosine_similarity(ours[l], theirs[l], dim=-1)
                distance = 1 - cos if cfg['rep_loss'] == 'cosine' else ((ours[l] - theirs[l]) ** 2).mean(-1)
                hidden = hidden + weight * distance.sum() / len(layers)
                cosines[i] += weight * float(cos.detach().sum())
            logp = student.head(ours[student.config.L]).log_softmax(-1)
            logq = teacher.head(theirs[teacher.config.L]).log_softmax(-1).detach()
            exact = (logp.exp() * (logp - logq)).sum(-1)
            output = output + weight * exact.sum()
            kl += weight * float(exact.detach().sum())
        mu = cfg['opd_weight']
        if isinstance(mu, list):             # the config's schedule: 1 in the first half, 0.2 in the second
            mu = 1.0 if (step - 1) / cfg['steps'] < 0.5 else 0.2
        loss = cfg['oprd_weight'] * hidden + mu * output
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))

        # clipped together, then AdamW by its recurrence
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in grads.values() if g is not None))
        scale = min(1.0, cfg['grad_clip'] / (norm + 1e-6))
        lr = rate(step, cfg)
        with torch.no_grad():
            for name, p in weights.items():
                if grads[name] is None:
                    continue
                g = grads[name] * scale
                m[name] = cfg['beta1'] * m[name] + (1 - cfg['beta1']) * g
                v[name] = cfg['beta2'] * v[name] + (1 - cfg['beta2']) * g * g
                mean, square = m[name] / (1 - cfg['beta1'] ** step), v[name] / (1 - cfg['beta2'] ** step)
                if p.ndim >= 2:
                    p -= lr * cfg['weight_decay'] * p
                p -= lr * mean / (square.sqrt() + cfg['adam_eps'])
        right = [verdict(tok.decode(ids[P:].tolist()), problems[chosen[b // cfg['n']]].answer) for b, (ids, P, _) in enumerate(answers)]
        rows.append({'step': step, 'loss': loss.item(), 'grad_norm': norm, 'lr': lr, 'opd/kl': kl, 'rep/cos_layer': cosines,
                     'len/mean': sum(n for _, _, n in answers) / len(answers), 'finish': float(roll.stopped.float().mean()),
                     'tokens': sum(n for _, _, n in answers), 'acc/rollout': 100 * sum(right) / len(right)})
        assert norm > cfg['grad_clip']
    return rows, weights


@pytest.mark.parametrize('name', OBJECTIVES)
def test_the_loop_equals_one_written_from_the_equations(name, toy_dir, tmp_path, toy_cfg, monkeypatch):
    """Losses, gradient norms, learning rates, answers (through their lengths, accuracies and every later number), the
    logged KL and cosines, and the weights at the end; the teacher has a stop token of its own."""
    teacher = with_other_stop(Path(toy_cfg['teacher']), tmp_path / 'teacher')
    monkeypatch.setattr(distill, 'grade', verdict)
    args = argv(toy_dir, tmp_path / 'run', student=toy_cfg['student'], teacher=teacher, data=toy_cfg['data'],
                eval_data=toy_cfg['eval_data'], **KEYS | OBJECTIVES[name])
    cfg = load_config(args)
    main(cfg)
    rows, weights = loop_by_hand(cfg, toy_cfg['student'], teacher, toy_cfg['data'])
    log = log_of(tmp_path / 'run')[1:]
    assert len({row['len/mean'] for row in rows}) > 2 and len({round(row['lr'], 12) for row in rows}) == 5
    assert len({row['acc/rollout'] for row in rows}) > 1, 'no answer was ever right, so accuracy is not tested'
    for got, want in zip(log, rows, strict=True):
        for key in ('step', 'tokens', 'len/mean', 'finish', 'acc/rollout'):
            assert got[key] == pytest.approx(want[key], rel=1e-6), (name, want['step'], key)
        for key in ('loss', 'grad_norm', 'lr'):
            assert got[key] == pytest.approx(want[key], rel=2e-3), (name, want['step'], key)
        looked = want['step'] in (1, 2, 4, 6)
        assert ('opd/kl' in got) == (looked or cfg['opd_weight'] != 0.0)
        if 'opd/kl' in got:
            assert got['opd/kl'] == pytest.approx(want['opd/kl'], rel=5e-3), (name, want['step'])
        assert ('rep/cos_layer' in got) == (looked or cfg['oprd_weight'] > 0)
        if 'rep/cos_layer' in got:
            assert got['rep/cos_layer'] == pytest.approx(want['rep/cos_layer'], abs=2e-3), (name, want['step'])
    after = dict(load_model(tmp_path / 'run/last').named_parameters())
    before = dict(load_model(toy_cfg['student']).named_parameters())
    moved = sum(float((p - before[key]).square().sum()) for key, p in weights.items()) ** 0.5
    apart = sum(float((after[key] - p).square().sum()) for key, p in weights.items()) ** 0.5
    assert apart < 0.02 * moved and moved > 0.1
