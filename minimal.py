"""
On-policy representation distillation (Eq. 6) on one screen, on the toy.

With configs/toy.py it does the same steps as distill.py, number for number, without what makes that
one fast and safe: no micro-batches, no fused loss, no ranks, no resume, no figures. Change it, run it,
watch the loss. Keys of other objectives, layers and positions are refused, because it has one of each.

    python minimal.py configs/toy.py steps=20
"""
import torch

from configs import load_config
from formats.huggingface import load_model
from formats.problems import load_problems, prompt_order
from formats.tokenizer import load_tokenizer
from losses import oprd_loss
from rollout import sample
from step import position_mask, position_weights
from studies import toy
from support.optimizer import adamw, learning_rate
from support.preflight import check_objective
from support.runtime import UserError, run, start


def main(cfg):
    check_config(cfg)
    cfg = toy.prepare(cfg, start('cpu'))     # makes two models and their problems, once
    tokenizer = load_tokenizer(cfg['student'])
    student = load_model(cfg['student'])
    teacher = load_model(cfg['teacher'])
    check_pair(student.config, teacher.config)
    student.head.requires_grad_(False)       # Eq. (6) never reaches it
    problems = load_problems(cfg['data'], tokenizer)
    layers = list(range(1, student.config.L + 1))
    optimizer = adamw(student, cfg['lr'], (cfg['beta1'], cfg['beta2']), cfg['adam_eps'], cfg['weight_decay'])

    for step in range(1, cfg['steps'] + 1):
        # 1. prompts
        numbers = prompt_order(len(problems), cfg['prompts_per_step'], step, cfg['seed'])
        prompts = [problems[number].ids for number in numbers]

        # 2. rollout: the student answers them itself
        roll = sample(student, prompts, cfg['n'], max_new_tokens=cfg['max_new_tokens'],
                      stop=tokenizer.stop_ids, seed=cfg['seed'], step=step)

        # 3. rows: every position of every answer is supervised, and each answer counts the same
        mask = position_mask(roll, 'all')                                    # (B, T)
        weights = position_weights(mask)[mask]                               # (K,), they sum to 1
        at = mask.flatten().nonzero().squeeze(-1)                            # (K,) flat positions

        # 4. teacher, 5. student: both read the same answers; neither computes logits
        with torch.no_grad():
            teacher_rows = teacher.hidden(roll.ids, layers, at)              # one (K, d) for each layer
        student_rows = student.hidden(roll.ids, layers, at)
        loss = oprd_loss(student_rows, teacher_rows, weights, cfg['rep_loss'])
        loss.backward()

        # 6. update
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg['grad_clip'])
        lr = learning_rate(step, cfg['steps'], cfg['lr'], cfg['warmup'], cfg['schedule'], cfg['min_lr'])
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad()
        print(f'step {step:4d} | loss {loss.item():.6f} | gradient norm {norm.item():.4f}', flush=True)


def check_config(cfg):
    """UserError if a key asks for what only distill.py can do."""
    known = {'layers': 'all', 'positions': 'all', 'oprd_weight': 1.0, 'opd_weight': 0.0,
             'reward_weight': 0.0, 'attention_weight': 0.0, 'answers_by': 'student',
             'teacher_sees': 'prompt', 'teacher_every': 0, 'dry_run': False}
    for key, value in known.items():
        if cfg[key] != value:
            raise UserError(f'{key}={cfg[key]!r}: minimal.py knows {key}={value!r} alone; use distill.py')
    check_objective(cfg)


def check_pair(student, teacher):
    """UserError if the two ModelConfigs do not fit: states are compared number by number, layer by layer."""
    if teacher.d != student.d or teacher.L < student.L:
        raise UserError(f'a teacher of width {teacher.d} and {teacher.L} layers: minimal.py wants the '
                        f"student's width, {student.d}, and its {student.L} layers or more; use distill.py")


if __name__ == '__main__':
    run(main, lambda: load_config(script='minimal.py'))
