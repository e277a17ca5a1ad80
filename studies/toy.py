"""
The toy: a task, its tokenizer, and a student and a teacher trained here from nothing.

A problem is a chain of arithmetic modulo 10, worked out from left to right:

    prompt   <bos>3+7*4-8*2+5-9=
    answer   3+7=0;0*4=0;0-8=2;2*2=4;4+5=9;9-9=0;\\boxed{0}<eos>

with 21 tokens, about 5e9 problems and one right answer each. The student has had too little
training; the teacher is the same network trained further with embedding and head frozen, like the
paper's pair (R1-Distill and JustRL, which share both). A teacher of another depth, width or vocabulary
is trained from a beginning of its own; toy_teacher_tokens='merged' has 52 tokens, some of them two
symbols long, with ids in another order: the same text, other ids. All of it is written as one folder of
the layouts that real runs use (two Hugging Face folders, two .jsonl files), so nothing downstream knows
that it is a toy.

    python -m studies.toy configs/toy.py  make the folder, show it, stop
"""
import json
import random
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer
from torch.optim import lr_scheduler

from configs import load_config
from formats.huggingface import load_model, save_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer
from model import PRESETS, Model, init_weights
from support.files import digest, locked, read_json, whole, write_json
from support.runtime import UserError, barrier, print0, run, start

SPECIAL = ['<pad>', '<bos>', '<eos>', '<unk>']
LETTERS = [*'0123456789+-*=;', '\\boxed{', '}']      # the box is one token, as a digit is
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
            '{% if add_generation_prompt %}={% endif %}')


def problem(rng, ops):
    """One problem -> (question, worked answer, value). Operands 0..9; factors 2..9, since 0 and 1
    would let the model forget what came before."""
    value = first = rng.randrange(10)
    question, work = str(first), ''
    for _ in range(ops):
        op = rng.choice('+-*')
        x = rng.randrange(2 if op == '*' else 0, 10)
        result = {'+': value + x, '-': value - x, '*': value * x}[op] % 10
        question += f'{op}{x}'
        work += f'{value}{op}{x}={result};'
        value = result
    return question, f'{work}\\boxed{{{value}}}', str(value)


def problems(n, ops, seed, held_out=False):
    """n problems of one side of a fixed split: a sixteenth of all questions (by checksum) is held
    out, so no evaluated question is ever trained on, whatever the seeds."""
    rng, out = random.Random(f'{seed} {held_out}'), []
    while len(out) < n:
        p = problem(rng, ops)
        if (zlib.crc32(p[0].encode()) % 16 == 0) == held_out:
            out.append(p)
    return out


def write_tokenizer(folder, tokens='same'):
    """tokenizer.json, tokenizer_config.json, chat template and generation config of the toy. tokens:
    'merged' adds ;d, d=, [d for every digit d, and ;[, where [ is the box; cut leftmost, longest first."""
    letters, merged = list(LETTERS), []
    if tokens == 'merged':
        digits, box = LETTERS[:10], '\\boxed{'
        merged = [w for d in digits for w in (f';{d}', f'{d}=', box + d)] + [f';{box}']
        letters += merged
        random.Random(0).shuffle(letters)
    tok = HFTokenizer(models.BPE({t: i for i, t in enumerate(SPECIAL + letters)}, [], unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(SPECIAL)
    tok.add_tokens([AddedToken(w, normalized=False) for w in ['\\boxed{', *merged]])
    tok.save(str(folder / 'tokenizer.json'))
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<bos>', 'eos_token': '<eos>',
        'pad_token': '<pad>', 'unk_token': '<unk>', 'clean_up_tokenization_spaces': False})
    write_json(folder / 'generation_config.json', {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0})
    (folder / 'chat_template.jinja').write_text(TEMPLATE)


def supervise(model, tok, cfg, name):
    """Supervised training on worked answers: cross entropy of the answer's tokens only.
    AdamW (.9, .95), 5% warm-up, cosine to 5%, clip 1."""
    steps, lr = cfg[f'toy_{name}_steps'], cfg[f'toy_{name}_lr']
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    rise = max(1, round(0.05 * steps))
    sched = lr_scheduler.SequentialLR(opt, [
        lr_scheduler.LinearLR(opt, 1 / rise, 1, rise - 1),
        lr_scheduler.CosineAnnealingLR(opt, max(1, steps - rise), 0.05 * lr)], [rise - 1])
    rng, began = random.Random(f"{name} {cfg['seed']}"), time.time()
    for step in range(1, steps + 1):
        batch = problems(cfg['toy_batch'], cfg['toy_ops'], rng.random())
        prompt = len(tok.chat(batch[0][0]))
        ids = torch.tensor([tok.chat(q) + tok.encode(a) + tok.stop_ids for q, a, _ in batch])   # (B, T)
        ids = ids.to(model.embed.weight.device)
        logits = model(ids[:, :-1])[:, prompt - 1:]                                             # (B, T', V)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten())
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        sched.step()
        if step % 40 == 0 or step == steps:
            left = (time.time() - began) / step * (steps - step)
            print0(f'  {name} {step:4d}/{steps} | loss {loss.item():.3f} | eta {left:.0f}s')


def shape(cfg, tok, side='student'):
    """ModelConfig of the toy's student or teacher."""
    layers, key = cfg['toy_layers'], 'toy_width'
    if side == 'teacher' and unlike(cfg):
        layers = cfg['toy_teacher_layers'] or layers
        key = 'toy_teacher_width' if cfg['toy_teacher_width'] else key
    d, H = cfg[key], cfg['toy_heads']
    if d % (2 * H):
        raise UserError(f'{key}={d} does not divide into {H} heads of even width; '
                        f'choose a multiple of {2 * H}')
    length = 2 * cfg['toy_ops'] + 3 + 6 * cfg['toy_ops'] + 4
    return replace(PRESETS['toy'], V=tok.size, L=layers, d=d, H=H, G=H, e=d // H, ff=8 * (d // 3),
                   context=2 * length)


def unlike(cfg):
    """Is the teacher another network than the student?"""
    return bool(cfg['toy_teacher_layers'] or cfg['toy_teacher_width'] or cfg['toy_teacher_tokens'] != 'same')


def recipe(cfg):
    """Everything that decides what the folder holds."""
    keys = [k for k in cfg if k.startswith('toy_') and k != 'toy_dir']
    return {k: cfg[k] for k in (*keys, 'seed')} | {'version': 1}


def folder_of(cfg):
    return Path(cfg['toy_dir']) / f"seed{cfg['seed']}-{digest(recipe(cfg))}"


def wanted(cfg):
    return 'toy' in (cfg['student'], cfg['teacher'], cfg['data'], cfg['eval_data'])


def is_made(cfg):
    """Is there nothing left for `prepare` to make?"""
    return not wanted(cfg) or is_whole(folder_of(cfg), cfg)


def is_whole(folder, cfg):
    """Is the folder there, of this recipe, and readable to the last weight?"""
    if not folder.exists():
        return False
    try:
        if read_json(folder / 'recipe.json') != recipe(cfg):
            raise UserError('its recipe is another')
        for side in ('student', 'teacher'):
            load_model(folder / side)
        for name in ('train.jsonl', 'eval.jsonl'):
            load_problems(folder / name, load_tokenizer(folder / 'student'))
    except UserError as e:
        print0(f'toy: {folder} is damaged ({e})')
        return False
    return True


def make(folder, cfg, device):
    """Train both models and write the whole folder, or nothing."""
    print0(f'toy: making student and teacher in {folder} (about two minutes on two cores)')
    with whole(folder) as tmp:
        tmp.mkdir(parents=True)
        for name, n, held_out in (('train', cfg['toy_train'], False), ('eval', cfg['toy_eval'], True)):
            rows = problems(n, cfg['toy_ops'], cfg['seed'], held_out)
            (tmp / f'{name}.jsonl').write_text(''.join(
                json.dumps({'question': q, 'answer': v, 'solution': a}) + '\n' for q, a, v in rows))
        write_tokenizer(tmp)
        tok = load_tokenizer(tmp)
        model = init_weights(Model(shape(cfg, tok)), cfg['seed']).to(device)
        supervise(model, tok, cfg, 'student')
        save_model(model, tmp / 'student', source=tmp)
        if unlike(cfg):
            write_tokenizer(tmp, cfg['toy_teacher_tokens'])
            tok = load_tokenizer(tmp)
            model = init_weights(Model(shape(cfg, tok, 'teacher')), cfg['seed'] + 10**6).to(device)
        else:
            for p in (*model.embed.parameters(), *model.head.parameters()):
                p.requires_grad_(False)
        supervise(model, tok, cfg, 'teacher')
        save_model(model, tmp / 'teacher', source=tmp)
        for file in (*tmp.glob('token*.json'), tmp / 'generation_config.json', tmp / 'chat_template.jinja'):
            file.unlink()                    # each model's folder has its own copy
        write_json(tmp / 'recipe.json', recipe(cfg))


def prepare(cfg, place):
    """cfg with every 'toy' replaced by a path; the folder is made by rank 0 if it is not there."""
    if not wanted(cfg):
        return cfg
    folder = folder_of(cfg)
    if place.rank == 0 and not is_whole(folder, cfg):
        with locked(folder.with_name(f'.{folder.name}.lock')):               # another run may be making it
            if not is_whole(folder, cfg):
                make(folder, cfg, place.device)
    barrier()
    paths = {'student': folder / 'student', 'teacher': folder / 'teacher',
             'data': folder / 'train.jsonl', 'eval_data': folder / 'eval.jsonl'}
    return cfg | {k: str(p) for k, p in paths.items() if cfg[k] == 'toy'}


def main(cfg):
    if not wanted(cfg):
        raise UserError("nothing is 'toy' in this config; python -m studies.toy configs/toy.py")
    cfg = prepare(cfg, start(cfg['device'], cfg['dtype']))
    tok = load_tokenizer(cfg['student'])
    for row in problems(3, cfg['toy_ops'], cfg['seed'], held_out=True):
        print0(f'  {tok.render(row[0])} {row[1]}')
    print0(folder_of(cfg))


if __name__ == '__main__':
    run(main, load_config)
