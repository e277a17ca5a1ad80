"""
The training loop against another one, which shares nothing of distill.py, step.py or support/optimizer.py.

What is held against another run of itself (resumed = whole, two ranks = one) does not see a mistake that every run
makes: a learning rate that is logged and never applied, gradients that are never clipped, the same prompts in every
step. Here the loop is written once more, from the equations, in plain torch; the settings are such that every key
changes the numbers.
"""
import math
from pathlib import Path

import pytest
import torch
from conftest import argv, log_of, with_other_stop

import distill
from configs import load_config
from distill import main
from formats.huggingface import load_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer
from rollout import naive

# Clipping acts in every step, the schedule has a warm-up and an end that is not 0, decay acts, the betas are not
# those of torch, no sampling key has its neutral value, and no key has that of configs/default.py.
KEYS = dict(steps=6, prompts_per_step=3, n=3, lr=0.01, warmup=0.4, schedule='linear', min_lr=0.25, grad_clip=0.3,
            weight_decay=0.3, beta1=0.7, beta2=0.9, adam_eps=1e-4, temperature=1.3, top_k=9, top_p=0.9, seed=5,
            max_new_tokens=20, eval_every=4, eval_n=2, diagnose_every=2, diagnose_rows=10**6, token_budget=60)
OBJECTIVES = {
    'OPRD': dict(positions='last_k', last_k=7),
    'OPRD by token': dict(loss_average='token', rep_loss='cosine', layers=[1, 3]),
    'full KL': dict(oprd_weight=0.0, opd_weight=1.0, opd='full', positions='all'),
    'one column later': dict(position_offset=1, rep_loss='cosine', positions='first_frac', first_frac=0.37),
    'drift': dict(positions='drift', rep_loss='nmse', grad_clip=0.03),
    'bucket': dict(grad_clip=0.1, oprd_weight=0.0, opd_weight=0.7, opd='topk', opd_k=3, opd_support='teacher', opd_tail='bucket',
                   kl_direction='forward', student_temperature=0.8, teacher_temperature=1.5, positions='last_frac', last_frac=0.61),
    'sampled, from the middle on': dict(opd_weight='[[0,0],[0.5,0],[0.5,2]]', opd='sampled', opd_future=True, opd_baseline=True,
                                        positions='all'),
    'both': dict(oprd_weight=0.5, opd_weight='[[0,1],[0.5,1],[0.5,0.2]]', opd='full', positions='first_k', first_k=9),
}


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
    if cfg['positions'] == 'last_frac':
        return list(range(n))[-max(1, round(n * cfg['last_frac'])):]
    if cfg['positions'] == 'first_frac':
        return list(range(n))[:max(1, round(n * cfg['first_frac']))]
    return list(range(n))


def distance_of(ours, theirs, kind):
    """rep_loss by its words, (K, d) and (K, d) -> (K,)."""
    if kind == 'mse':
        return ((ours - theirs) ** 2).mean(-1)
    one_minus_cosine = 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    return {'cosine': 1.0, 'nmse': 2 / ours.shape[-1]}[kind] * one_minus_cosine


def output_loss(logp, logq, sampled, weight, cfg):
    """The output-space term of one answer -> (its value, a scalar with its gradient). logp, logq (n, V), sampled (n,)."""
    KL = (logp.exp() * (logp - logq)).sum(-1)
    if cfg['opd'] == 'full':
        return weight * KL.sum(), weight * KL.sum()
    if cfg['opd'] == 'topk':                 # the tokens outside the set S are one more outcome
        P, Q = [], []
        for t in range(len(logp)):
            S = logq[t].topk(cfg['opd_k']).indices.tolist()
            others = [i for i in range(logp.shape[-1]) if i not in S]
            P.append(torch.cat([logp[t, S], logp[t, others].logsumexp(0, keepdim=True)]))
            Q.append(torch.cat([logq[t, S], logq[t, others].logsumexp(0, keepdim=True)]))
        P, Q = torch.stack(P), torch.stack(Q)
        loss = weight * (Q.exp() * (Q - P)).sum()
        return loss, loss
    t = torch.arange(len(sampled))
    ratio = (logp - logq)[t, sampled].detach()
    reward = torch.stack([ratio[i:].sum() for i in range(len(ratio))]) - KL.detach()
    return weight * ratio.sum(), (weight * reward * logp[t, sampled]).sum()


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
    taken = dict.fromkeys(weights, 0)        # steps of AdamW
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

        # per answer: Eq. (6) at each layer, the output-space term, and what is logged beside them
        hidden, output, surrogate, kl, entropies = 0.0, 0.0, 0.0, 0.0, [0.0, 0.0]
        cosines, layer_losses = [0.0] * len(layers), [0.0] * len(layers)
        for (ids, P, n), count in zip(answers, counted, strict=True):
            columns = [P - 1 + t for t in supervised(n, cfg)]
            shifted = [column + cfg['position_offset'] for column in columns]
            weight = 1 / count / len(answers) if cfg['loss_average'] == 'sequence' else 1 / sum(counted)
            ours, theirs = states(student, ids, shifted), {l: h.detach() for l, h in states(teacher, ids, shifted).items()}
            for i, l in enumerate(layers):
                cos = torch.nn.functional.cosine_similarity(ours[l], theirs[l], dim=-1)
                distance = distance_of(ours[l], theirs[l], cfg['rep_loss'])
                share = torch.full_like(distance, weight)
                if cfg['positions'] == 'drift':          # an answer's weight, dealt out by distance
                    share = weight * count * distance.detach() / distance.detach().sum()
                hidden = hidden + (share * distance).sum() / len(layers)
                layer_losses[i] += float((share * distance).detach().sum())
                cosines[i] += weight * float(cos.detach().sum())
            top_s, top_t = (states(model, ids, columns)[model.config.L] for model in (student, teacher))
            logp = (student.head(top_s) / cfg['student_temperature']).log_softmax(-1)
            logq = (teacher.head(top_t) / cfg['teacher_temperature']).log_softmax(-1).detach()
            value, with_gradient = output_loss(logp, logq, ids[[column + 1 for column in columns]], weight, cfg)
            output, surrogate = output + value, surrogate + with_gradient
            kl += weight * float((logp.exp() * (logp - logq)).detach().sum())
            for i, log in enumerate((logp.detach(), logq)):
                entropies[i] -= weight * float((log.exp() * log).sum())
        mu = cfg['opd_weight']
        if isinstance(mu, list):             # the config's schedules: one weight in the first half, one in the second
            mu = mu[0][1] if (step - 1) / cfg['steps'] < 0.5 else mu[-1][1]
        loss, objective = cfg['oprd_weight'] * hidden, cfg['oprd_weight'] * hidden
        if mu:                               # else the head has no gradient, and does not decay
            loss, objective = loss + mu * output, objective + mu * surrogate
        loss = float(loss)
        grads = dict(zip(weights, torch.autograd.grad(objective, list(weights.values()), allow_unused=True), strict=True))

        # clipped together, then AdamW by its recurrence
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in grads.values() if g is not None))
        scale = min(1.0, cfg['grad_clip'] / (norm + 1e-6))
        lr = rate(step, cfg)
        with torch.no_grad():
            for name, p in weights.items():
                if grads[name] is None:
                    continue
                g = grads[name] * scale
                taken[name] += 1
                m[name] = cfg['beta1'] * m[name] + (1 - cfg['beta1']) * g
                v[name] = cfg['beta2'] * v[name] + (1 - cfg['beta2']) * g * g
                mean, square = m[name] / (1 - cfg['beta1'] ** taken[name]), v[name] / (1 - cfg['beta2'] ** taken[name])
                if p.ndim >= 2:
                    p -= lr * cfg['weight_decay'] * p
                p -= lr * mean / (square.sqrt() + cfg['adam_eps'])
        learned = torch.cat([(v[name] / (1 - cfg['beta2'] ** n)).sqrt().flatten() for name, n in taken.items() if n])
        right = [verdict(tok.decode(ids[P:].tolist()), problems[chosen[b // cfg['n']]].answer) for b, (ids, P, _) in enumerate(answers)]
        rows.append({'step': step, 'mu': mu, 'loss': loss, 'grad_norm': norm, 'lr': lr, 'opd/kl': kl, 'rep/cos_layer': cosines,
                     'loss/layer': layer_losses, 'entropy/student': entropies[0], 'entropy/teacher': entropies[1],
                     'adam/below_eps': float((learned[learned > 0] < cfg['adam_eps']).float().mean()),
                     'len/mean': sum(n for _, _, n in answers) / len(answers), 'finish': float(roll.stopped.float().mean()),
                     'tokens': sum(n for _, _, n in answers), 'acc/rollout': 100 * sum(right) / len(right)})
        assert norm > cfg['grad_clip']
    return rows, weights


@pytest.mark.parametrize('name', OBJECTIVES)
def test_the_loop_equals_one_written_from_the_equations(name, toy_dir, tmp_path, toy_cfg, monkeypatch):
    """Losses, gradient norms, learning rates, answers (through their lengths, accuracies and every later number), the
    logged KL, entropies and cosines, the loss of each layer, the share of damped weights, and the weights at the end;
    the teacher has a stop token of its own. A key that is not handed on to what it means (adam_eps, opd_tail,
    position_offset, rep_loss, ...) trains something else without a message."""
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
        assert ('opd/kl' in got) == (looked or 'loss/opd' in got)
        assert ('loss/opd' in got) == (want['mu'] > 0)
        if 'opd/kl' in got:
            for key in ('opd/kl', 'entropy/student', 'entropy/teacher'):
                assert got[key] == pytest.approx(want[key], rel=5e-3), (name, want['step'], key)
        layer_losses, cosines = ([got[key] for key in got if key.startswith(start)] for start in ('loss/layer/', 'rep/cos/'))
        assert bool(layer_losses) == (cfg['oprd_weight'] > 0) and ('adam/below_eps' in got) == looked
        if layer_losses:
            assert layer_losses == pytest.approx(want['loss/layer'], rel=2e-3), (name, want['step'])
        if looked:
            assert 0.01 < want['adam/below_eps'] < 0.98
            assert got['adam/below_eps'] == pytest.approx(want['adam/below_eps'], abs=2e-3), (name, want['step'])
        assert bool(cosines) == ('rep/cos' in got) == (looked or cfg['oprd_weight'] > 0)
        if cosines:
            assert cosines == pytest.approx(want['rep/cos_layer'], abs=2e-3), (name, want['step'])
            assert got['rep/cos'] == pytest.approx(sum(want['rep/cos_layer']) / len(want['rep/cos_layer']), abs=2e-3)
    after = dict(load_model(tmp_path / 'run/last').named_parameters())
    before = dict(load_model(toy_cfg['student']).named_parameters())
    moved = sum(float((p - before[key]).square().sum()) for key, p in weights.items()) ** 0.5
    apart = sum(float((after[key] - p).square().sum()) for key, p in weights.items()) ** 0.5
    assert apart < 0.02 * moved and moved > 0.1
