"""
The toy: a task, its tokenizer, and a student and a teacher that are trained here from nothing.

    python -m studies.toy configs/toy.py          make the folder, show three problems, stop

A problem is a chain of arithmetic modulo 10, worked out from left to right:

    prompt   <bos>3+7*4-8*2+5-9=
    answer   3+7=0;0*4=0;0-8=2;2*2=4;4+5=9;9-9=0;\\boxed{0}<eos>

There are 21 tokens, about 5e9 problems and one right answer to each. The student has had too little
training. The teacher is the same network, trained further with embedding and head frozen, like the paper's
pair (R1-Distill and JustRL, which share both). A teacher of another depth, width or vocabulary is trained
from its own random weights; toy_teacher_tokens='merged' has 52 tokens, some of them two symbols long, with
ids in another order: the same text, other ids. With toy_halves=True there are two teachers, each the
student's network trained further on problems of its own: one on sums (+ and -), one on products (*).

Everything is written as one folder in the layouts that real runs use (two Hugging Face folders, two .jsonl
files), so the other scripts do not know that it is a toy. What it does not show: anything about language.

Letters: B sequences, T tokens, V vocabulary.
"""
import json
import random
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from support.plan import check_folder
from support.provenance import changed_files, shortened, source_digests
from support.runtime import LONG_WAIT, UserError, barrier, print0, run, start

SPECIAL = ['<pad>', '<bos>', '<eos>', '<unk>']
BOX = '\\boxed{'                                     # one token, as a digit is
LETTERS = [*'0123456789+-*=;', BOX, '}']
MADE_BY = ('formats/huggingface.py', 'formats/tokenizer.py', 'model.py', 'studies/toy.py')
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
            '{% if add_generation_prompt %}={% endif %}')


# ---- the task ---------------------------------------------------------------------------------

def problem(rng, ops, operators='+-*'):
    """One problem of `ops` operations -> (question, worked answer, value). Operands are 0..9, factors 2..9,
    because 0 and 1 would let the model forget what came before."""
    question = str(rng.randrange(10))
    for _ in range(ops):
        op = rng.choice(operators)
        x = rng.randrange(2 if op == '*' else 0, 10)
        question += f'{op}{x}'
    return question, *work_out(question)


def work_out(question, slip=None, error=0):
    """A question -> (worked answer, value). slip: the number of an operation, from 0, whose result is wrong
    by `error`; the answer goes on from this wrong result, as a student's answer would."""
    value = int(question[0])
    work = ''
    for number in range(len(question) // 2):
        op, x = question[2 * number + 1], int(question[2 * number + 2])
        result = {'+': value + x, '-': value - x, '*': value * x}[op]
        if number == slip:
            result += error
        work += f'{value}{op}{x}={result % 10};'
        value = result % 10
    return f'{work}{BOX}{value}}}', str(value)


def problems(n, ops, seed, held_out=False, operators='+-*'):
    """n problems of one side of a fixed split. A sixteenth of all questions (by checksum) is held out, so
    no evaluated question is ever trained on, whatever the seeds are."""
    rng = random.Random(f'{seed} {held_out}')
    chosen = []
    while len(chosen) < n:
        candidate = problem(rng, ops, operators)
        is_held_out = zlib.crc32(candidate[0].encode()) % 16 == 0
        if is_held_out == held_out:
            chosen.append(candidate)
    return chosen


def write_problems(file, rows):
    """Problems -> a .jsonl file."""
    lines = [json.dumps({'question': question, 'answer': value, 'solution': answer}) + '\n'
             for question, answer, value in rows]
    file.write_text(''.join(lines))


def write_tokenizer(folder, tokens='same'):
    """tokenizer.json, tokenizer_config.json, chat template and generation config of the toy.

    tokens: 'merged' adds ;d, d=, [d for every digit d, and ;[, where [ is the box. Text is cut from the
    left, the longest token first.
    """
    assert tokens in ('same', 'merged'), tokens
    letters = list(LETTERS)
    merged = []
    if tokens == 'merged':
        for digit in LETTERS[:10]:
            merged += [f';{digit}', f'{digit}=', f'{BOX}{digit}']
        merged.append(f';{BOX}')
        letters += merged
        random.Random(0).shuffle(letters)    # the ids of the letters differ too

    ids = {token: number for number, token in enumerate(SPECIAL + letters)}
    tok = HFTokenizer(models.BPE(ids, [], unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(SPECIAL)
    tok.add_tokens([AddedToken(word, normalized=False) for word in [BOX, *merged]])

    tok.save(str(folder / 'tokenizer.json'))
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<bos>', 'eos_token': '<eos>',
        'pad_token': '<pad>', 'unk_token': '<unk>', 'clean_up_tokenization_spaces': False})
    write_json(folder / 'generation_config.json', {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0})
    (folder / 'chat_template.jinja').write_text(TEMPLATE)


# ---- the models -------------------------------------------------------------------------------

# Of the answers to prompts that show the worked answer, so many have a slip. A model that has only seen right
# ones copies what it is shown, whatever a student has written before.
SLIPS = 0.7
NOT_LEARNED = -100              # in the place of a token that is not learned


def with_hint(rng, question, answer):
    """A question whose prompt shows its worked answer -> (prompt, answer, number of the answer's token that
    is a wrong result; None: there is none)."""
    if rng.random() >= SLIPS:
        return answer + question, answer, None
    slip = rng.randrange(len(question) // 2)
    slipped, _ = work_out(question, slip, rng.randrange(1, 10))
    return answer + question, slipped, 6 * slip + 4


def supervise(model, tok, cfg, name, operators='+-*'):
    """Supervised training of the model called `name` on worked answers: cross entropy of the answer's
    tokens. AdamW with betas .9 and .95, 5% warm-up, cosine down to 5%, gradient norm clipped at 1."""
    steps = cfg[f'toy_{name}_steps']
    lr = cfg[f'toy_{name}_lr']
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, round(0.05 * steps))
    schedule = lr_scheduler.SequentialLR(opt, [
        lr_scheduler.LinearLR(opt, 1 / warmup, 1, warmup - 1),
        lr_scheduler.CosineAnnealingLR(opt, max(1, steps - warmup), 0.05 * lr)], [warmup - 1])

    rng = random.Random(f"{name} {cfg['seed']}")
    began = time.monotonic()
    for step in range(1, steps + 1):
        # New problems in every step. All have the same length, so there is no padding.
        batch = problems(cfg['toy_batch'], cfg['toy_ops'], rng.random(), operators=operators)
        shown = cfg['toy_hints'] > 0 and rng.random() < cfg['toy_hints']
        texts = [with_hint(rng, question, answer) if shown else (question, answer, None)
                 for question, answer, _ in batch]
        prompts = tok.chat_all([prompt for prompt, _, _ in texts])
        rows = []
        for prompt_ids, (_, answer, _) in zip(prompts, texts, strict=True):
            rows.append(prompt_ids + tok.encode(answer) + tok.stop_ids)
        ids = torch.tensor(rows).to(model.embed.weight.device)               # (B, T)
        prompt = len(prompts[0])

        # The state at column t predicts the token of column t + 1; the answer's tokens alone are learned, and
        # of those not a wrong result.
        logits = model(ids[:, :-1])[:, prompt - 1:]                          # (B, T - prompt, V)
        wanted = ids[:, prompt:].clone()                                     # (B, T - prompt)
        for row, (_, _, wrong) in enumerate(texts):
            if wrong is not None:
                wanted[row, wrong] = NOT_LEARNED
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=NOT_LEARNED)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        schedule.step()
        if step % 40 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            print0(f'  {name} {step:4d}/{steps} | loss {loss.item():.3f} | eta {left:.0f}s')


def shape(cfg, tok, side='student'):
    """ModelConfig of the toy's student or teacher."""
    layers = cfg['toy_layers']
    width_key = 'toy_width'
    if side == 'teacher' and unlike(cfg):
        layers = cfg['toy_teacher_layers'] or layers
        width_key = 'toy_teacher_width' if cfg['toy_teacher_width'] else width_key
    width = cfg[width_key]
    heads = cfg['toy_heads']
    if width % (2 * heads):
        raise UserError(f'{width_key}={width} does not divide into {heads} heads of even width; '
                        f'choose a multiple of {2 * heads}')

    # Tokens of prompt and answer: bos, digit, (op, digit) each, '='; then 'a+b=c;' each, box, digit, '}',
    # eos.
    length = 2 * cfg['toy_ops'] + 3 + 6 * cfg['toy_ops'] + 4
    return replace(PRESETS['toy'], V=tok.size, L=layers, d=width, H=heads, G=heads, e=width // heads,
                   ff=8 * (width // 3), context=2 * length)


def unlike(cfg):
    """Is the teacher another network than the student?"""
    return bool(cfg['toy_teacher_layers'] or cfg['toy_teacher_width'] or cfg['toy_teacher_tokens'] != 'same')


# ---- the folder -------------------------------------------------------------------------------

def sets(cfg):
    """{operators: ending of the names of a set of problems and of its teacher}."""
    if cfg['toy_halves']:
        return {'+-': '_sums', '*': '_products'}
    return {'+-*': ''}


def recipe(cfg):
    """Everything in the config that decides what the folder holds. Keys that came later are noted only where
    they are used, so that earlier folders keep their names."""
    keys = [key for key in cfg if key.startswith('toy_') and key != 'toy_dir']
    keys.remove('toy_teacher_half')          # both teachers are made, whichever teaches
    for key in ('toy_hints', 'toy_halves'):
        if not cfg[key]:
            keys.remove(key)
    return {key: cfg[key] for key in (*keys, 'seed')} | {'version': 1}


def sources():
    """{file: digest} of the code that decides what is trained and how it is written. What only times or
    prints, or draws the samples of a later run, is not among it."""
    return {file: source_digests()[file] for file in MADE_BY}


def folder_of(cfg):
    return Path(cfg['toy_dir']) / f"seed{cfg['seed']}-{digest(recipe(cfg))}"


def wanted(cfg):
    return 'toy' in (cfg['student'], cfg['teacher'], cfg['data'], cfg['eval_data'])


def is_made(cfg):
    """Is there nothing left for `prepare` to make?"""
    return not wanted(cfg) or is_whole(folder_of(cfg), cfg)


def check_recipe(cfg):
    """UserError if the toy cannot be made: no network has this shape, or nothing can be written there."""
    tok = SimpleNamespace(size=PRESETS['toy'].V)
    for side in ('student', 'teacher'):
        shape(cfg, tok, side)
    if cfg['toy_hints'] and unlike(cfg):
        raise UserError(f"toy_hints={cfg['toy_hints']}: a teacher of another shape or vocabulary learns "
                        'without hints; drop one of the keys')
    if not cfg['toy_dir']:
        raise UserError("toy_dir='': nothing given; name a folder for the toy's models")
    check_folder(folder_of(cfg))


def ends_dry_run(cfg):
    """In a dry run, are there models to make first, so that nothing more can be said? The shapes and the
    folder are checked as a run checks them."""
    if not cfg['dry_run'] or is_made(cfg):
        return False
    check_recipe(cfg)
    print0(f'  dry run: a run makes {folder_of(cfg)} first (about two minutes)')
    return True


def is_whole(folder, cfg):
    """Does the folder exist, made by this recipe for models of this shape, and can all of it be read?"""
    if not folder.exists():
        return False
    try:
        made = read_json(folder / 'recipe.json')
        made.pop('sources', None)                    # other code is told by `code_note`, and not refused
        if made != recipe(cfg):
            raise UserError('it was made by another recipe')
        student_tok = load_tokenizer(folder / 'student')
        if load_model(folder / 'student').config != shape(cfg, student_tok):
            raise UserError('its student has another shape than models have now')
        for suffix in sets(cfg).values():
            tok = load_tokenizer(folder / f'teacher{suffix}')
            if load_model(folder / f'teacher{suffix}').config != shape(cfg, tok, 'teacher'):
                raise UserError(f'its teacher{suffix} has another shape than models have now')
            for name in ('train', 'eval'):
                load_problems(folder / f'{name}{suffix}.jsonl', student_tok, show=False)
    except UserError as error:
        print0(f'toy: {folder} cannot be used ({error})')
        return False
    return True


def code_note(folder):
    """A line for a folder that other code has made, or ''. Most edits change no weight, and training again
    takes minutes, so the user decides."""
    made_by = read_json(folder / 'recipe.json').get('sources')
    again = f'to make it again (about two minutes), delete {folder}'
    if not isinstance(made_by, dict):
        return f'toy: its models were made by a version that did not note its code; {again}'
    changed = changed_files(made_by, sources())
    return f'toy: {shortened(changed)} changed since its models were made; {again}' if changed else ''


def make(folder, cfg, device):
    """Train both models and write the whole folder, or nothing."""
    print0(f'toy: making student and teacher in {folder} (about two minutes on two cores)')
    with whole(folder) as tmp:
        tmp.mkdir(parents=True)
        for operators, suffix in sets(cfg).items():
            train = problems(cfg['toy_train'], cfg['toy_ops'], cfg['seed'], operators=operators)
            write_problems(tmp / f'train{suffix}.jsonl', train)
            held_out = problems(cfg['toy_eval'], cfg['toy_ops'], cfg['seed'], True, operators)
            write_problems(tmp / f'eval{suffix}.jsonl', held_out)

        # The student.
        write_tokenizer(tmp)
        tok = load_tokenizer(tmp)
        model = init_weights(Model(shape(cfg, tok)), cfg['seed']).to(device)
        supervise(model, tok, cfg, 'student')
        save_model(model, tmp / 'student', source=tmp)

        # The teacher: the student trained on with embedding and head frozen, or a network of its own.
        # Specialists are made in the same way, each with its own operators.
        for operators, suffix in sets(cfg).items():
            if unlike(cfg):
                write_tokenizer(tmp, cfg['toy_teacher_tokens'])
                tok = load_tokenizer(tmp)
                model = init_weights(Model(shape(cfg, tok, 'teacher')), cfg['seed'] + 10**6).to(device)
            else:
                model = load_model(tmp / 'student', torch.float32, device)
                model.embed.requires_grad_(False)
                model.head.requires_grad_(False)
            supervise(model, tok, cfg, 'teacher', operators)
            save_model(model, tmp / f'teacher{suffix}', source=tmp)

        # Each model's folder has its own copy of the tokenizer.
        for file in (*tmp.glob('token*.json'), tmp / 'generation_config.json', tmp / 'chat_template.jinja'):
            file.unlink()
        write_json(tmp / 'recipe.json', recipe(cfg) | {'sources': sources()})


def prepare(cfg, env):
    """cfg with every 'toy' replaced by a path. Rank 0 makes the folder if it is not there."""
    if not wanted(cfg):
        return cfg
    folder = folder_of(cfg)
    if env.rank == 0 and not is_whole(folder, cfg):
        check_recipe(cfg)                                # before a file is made for the lock
        with locked(folder.with_name(f'.{folder.name}.lock')):
            if not is_whole(folder, cfg):                # another run may have made it in the meantime
                make(folder, cfg, env.device)
    barrier('making the toy', LONG_WAIT)
    note = code_note(folder)
    if note:
        print0(note)
    names = {'student': ['student'], 'teacher': [], 'data': [], 'eval_data': []}
    for suffix in sets(cfg).values():
        if cfg['toy_teacher_half'] in ('both', suffix[1:]) or not suffix:
            names['teacher'].append(f'teacher{suffix}')
        names['data'].append(f'train{suffix}.jsonl')
        names['eval_data'].append(f'eval{suffix}.jsonl')
    paths = {key: ','.join(str(folder / name) for name in names[key]) for key in names if cfg[key] == 'toy'}
    return cfg | paths


def main(cfg):
    if not wanted(cfg):
        raise UserError("nothing is 'toy' in this config; python -m studies.toy configs/toy.py")
    if ends_dry_run(cfg):
        return
    cfg = prepare(cfg, start(cfg['device'], cfg['dtype']))
    tok = load_tokenizer(cfg['student'])
    for question, answer, _ in problems(3, cfg['toy_ops'], cfg['seed'], held_out=True):
        print0(f'  {tok.render(question)} {answer}')
    print0(folder_of(cfg))


if __name__ == '__main__':
    run(main, lambda: load_config(script='studies/toy.py'))
