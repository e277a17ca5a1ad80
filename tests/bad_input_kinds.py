"""
The kinds of bad input that tests/bad_inputs.py tries: a generator of cases for each.

A case starts from a good command line (LINES) in a folder of good files and changes one thing. Its `expect` says what must
follow: 'refused' where the input is bad by construction, 'either' where a sensible program may also accept it, 'fine' where
it is good. What is left out: Python files that never end (a config file is the user's own program), and templates and model
folders that need a network.

    toy/{student,teacher,other}  three models: `other` has another depth and width
    toy/{train,eval}.jsonl       problems
    stage1/                      a bridge from `student` to `other`
    done/, run/                  a finished run of distill.py; the same before it wrote its results
    out/eval/...                 an evaluation
"""
import gzip
import json
import math
import os
import random
import zlib
from dataclasses import dataclass, replace

from conftest import TINY

NAN = float('nan')
INF = float('inf')
MISSING = object()              # as a value: the key is taken out
RED = '\x1b[31m'                # what a terminal would obey
SECRET = 'SECRET-7f3a'          # the contents of files outside model folders: it must never be copied


@dataclass
class Case:
    """One input of a script."""
    script: str                 # its file
    args: list                  # its command line
    what: str                   # what is bad about it, in a few words
    change: object = None       # change(folder) makes the good files bad
    expect: str = 'refused'     # or 'fine', or 'either'
    hub: bool = False           # may a hub be asked?
    seconds: float = 2.0        # processor time until it is refused
    absent: str = ''            # what the output must not hold
    kind: str = ''


# ---- good command lines -----------------------------------------------------------------------

TINY_TOY = [f'{key}={value}' for key, value in TINY.items()]
CPU = ['device=cpu', 'dtype=float32']
STEPS = ['steps=2', 'prompts_per_step=3', 'n=2', 'max_new_tokens=20']
EVAL = ['eval_data=toy/eval.jsonl', 'eval_n=1', 'eval_every=0', 'save_every=1', 'eval_rows=64']
PAIR = ['student=toy/student', 'teacher=toy/teacher', 'data=toy/train.jsonl']
UNLIKE = ['student=toy/student', 'teacher=toy/other', 'data=toy/train.jsonl']
BRIDGE = ['bridge=stage1', 'bridge_rank=4']
LINES = {
    'distill.py': ['configs/toy.py', *PAIR, *STEPS, *EVAL, *CPU, 'out_dir=out/new', '--dry-run'],
    'bridge.py': ['configs/toy_bridge.py', *UNLIKE, *CPU, *BRIDGE, 'bridge_prompts=16', 'max_new_tokens=20',
                  'eval_rows=64'],
    'eval_math.py': ['student=toy/student', 'eval_data=toy/eval.jsonl', 'eval_n=2', 'eval_max_new_tokens=20',
                     *CPU, '--dry-run'],
    'minimal.py': [*PAIR, *STEPS, 'positions=all'],
    'studies/toy.py': ['configs/toy.py', 'toy_ops=1', 'toy_layers=1', 'toy_width=8', 'toy_heads=1',
                       'toy_batch=2',
                       'toy_student_steps=1', 'toy_teacher_steps=1', 'toy_train=4', 'toy_eval=2',
                       'toy_dir=out/toys',
                       'device=cpu'],
}
WITH_BRIDGE = ['configs/toy_bridge.py', *UNLIKE, *STEPS, *EVAL, *CPU, *BRIDGE, 'out_dir=out/new',
               '--dry-run']     # of distill.py
SCRIPTS = list(LINES)


def real(script):
    """A script's good command line without --dry-run."""
    return [arg for arg in LINES[script] if arg != '--dry-run']


def good():
    """The good inputs. If one of these is refused, the cases made from it show nothing."""
    for script, line in LINES.items():
        yield Case(script, line, 'good', expect='fine')
    yield Case('distill.py', WITH_BRIDGE, 'good, with a bridge', expect='fine')
    yield Case('distill.py', real('distill.py'), 'good, training', expect='fine')
    yield Case('distill.py', [*real('distill.py'), 'out_dir=done'], 'good, finished run', expect='fine')
    for what, keys in (('two teachers', [TWO, 'teacher_share=[1,1]']), ('rewards', ['reward_weight=1']),
                       ('itself as its teacher', [*ITSELF, 'teacher_every=1']), ('attention maps', ['attention_weight=1'])):
        for dry in ([], ['--dry-run']):
            yield Case('distill.py', [*real('distill.py'), *keys, *dry], f'good, {what} {" ".join(dry)}'.strip(), expect='fine')
    yield Case('distill.py', [*real('distill.py'), 'out_dir=run'], 'good, resumed', expect='fine')
    yield Case('eval_math.py', real('eval_math.py'), 'good, evaluated before', expect='fine')
    yield Case('eval_math.py', [*real('eval_math.py'), '--regrade'], 'good, regrade', expect='fine')
    yield Case('eval_math.py', [*real('eval_math.py'), 'seed=1'], 'good, sampled', expect='fine')
    yield Case('studies/figures.py', ['done'], 'good, one run', expect='fine')
    yield Case('studies/figures.py', ['done', 'run'], 'good, two runs', expect='fine')
    yield Case('studies/figures.py', ['stage1'], 'good, a bridge', expect='fine')
    studies = ('studies/compare.py', 'studies/figures.py', 'studies/bench.py', 'studies/fixed_points.py')
    for script in (*SCRIPTS, *studies):
        yield Case(script, ['--help'], '--help', expect='fine')


# ---- command lines ----------------------------------------------------------------------------

def default_config():
    """-> (every key with its default, what each may be)."""
    from configs import checks, default
    return default, checks


def reader_of(key, rng, scripts=SCRIPTS):
    """One of these scripts that reads a key, drawn; None if there is none."""
    from configs import reads
    readers = [script for script in scripts if key in reads[script]]
    return rng.choice(readers) if readers else None


def misspelt(word, rng):
    """A word with a letter dropped, doubled, changed, or two exchanged."""
    at = rng.randrange(len(word) - 1)
    return rng.choice([word[:at] + word[at + 1:], word[:at] + word[at] + word[at:],
                       word[:at] + 'q' + word[at + 1:],
                       word[:at] + word[at + 1] + word[at] + word[at + 2:]])


def unknown_keys():
    """Keys that do not exist: misspelt ones, those of other trainers, or no words at all."""
    default, _ = default_config()
    rng = random.Random('unknown keys')
    words = [misspelt(key, rng) for key in default if len(key) > 2]
    words += ['learning_rate', 'num_generations', 'max_completion_length', 'batch_size', 'rows', 'tokens',
              'what', 'x', 'STEPS', 'rollout.n', 'data.train_batch_size', '..', 'a.', 'num_train_epochs', 'beta',
              'steps ', ' steps', 'steps.', 'sté', '', '-', 'a' * 100_000, f'{RED}steps', '\u202esteps',
              'st\neps', '\udcff\udcfe',
              '__class__', '1', 'None', 'steps,lr', '=' * 50]
    for word in words:
        script = rng.choice(SCRIPTS)
        if word in default:
            continue
        dashes = rng.choice(['', '--'])
        yield Case(script, [*LINES[script], f'{dashes}{word}={rng.choice(["1", "x", ""])}'],
                   f'unknown key {word[:30]!r}')


def unread_keys():
    """Keys that a script does not read, with their default as the value: it would be ignored."""
    from configs import reads
    default, _ = default_config()
    for script in SCRIPTS:
        for key, value in default.items():
            if key not in reads[script]:
                yield Case(script, [*LINES[script], f'{key}={value}'], f'{key}, which it does not read')


def wrong_types():
    """Values of a type that the key does not have."""
    default, checks = default_config()
    rng = random.Random('wrong types')
    wrong = {bool: ['1', 'yes', 'None', '[]', '0.0', '', 'true', 'False ,'],
             int: ['abc', '1.5', 'None', '[]', '{}', '"3"', '', '1e3', 'True', '(1,)', '1_0.5', '3j', '[1]',
                   '\u0665'],
             float: ['abc', 'None', 'True', '{}', '"3"', '', '3j', '1..2', '[[0,1],[0.5]]', '[0,1]',
                     '[[0,"x"]]', '[[2,1]]',
                     '[[0,1],[nan,1]]', '[[0,1e999]]', '[[-1,1]]', '[[0.5,1],[0.1,1]]', '[[0,-1]]',
                     '[[0,True]]']}
    for key, value in default.items():
        texts = wrong.get(type(value), [])
        if isinstance(value, str) and key in checks:
            texts = ['', 'nope', '5', '{}', 'None', 'auto ', 'ALL', '[0]', '[]', '[1.5]', '[True]', '["x"]',
                     '[-1]',
                     '[[1]]', '[1e999]', '[' * 500 + ']' * 500]
        for text in texts:
            script = reader_of(key, rng)
            yield Case(script, [*LINES[script], f'{key}={text}'], f'{key}={text[:40]}')


def out_of_range():
    """Numbers below and above what a key allows, and numbers that are none."""
    default, checks = default_config()
    rng = random.Random('out of range')
    for key, rule in checks.items():
        if isinstance(default[key], str) or isinstance(default[key], bool):
            continue
        low, high = rule[:2]
        texts = ['-1', '-1e9', '-' + '9' * 400, 'nan', '-inf', '1e999', '-1e999', '9' * 400, '9' * 5000,
                 '1e400']
        if low == 1:
            texts.append('0')
        if high != INF:
            texts += [repr(high * 2), '1e300' if isinstance(default[key], float) else str(2**64)]
        for text in texts:
            script = reader_of(key, rng)
            yield Case(script, [*LINES[script], f'{key}={text}'],
                       f'{key}={text[:12]}{"..." * (len(text) > 12)}')


def huge_numbers():
    """Numbers that a key may allow, and that must not take for ever. Asked by dry runs alone, which train nothing."""
    default, checks = default_config()
    rng = random.Random('huge numbers')
    for key, value in default.items():
        if type(value) is not int or key.startswith('toy_'):
            continue
        for text in (str(10**7), str(10**12), str(2**63 - 1), str(10**30)):
            script = reader_of(key, rng, ['distill.py', 'eval_math.py']) or 'bridge.py'
            dry = {*LINES[script], '--dry-run'} - {*LINES[script]}
            yield Case(script, [*LINES[script], *dry, f'{key}={text}'], f'{key}={text}', expect='either')
    for steps in (10**6, 10**9, 10**12):
        yield Case('distill.py', [*LINES['distill.py'], f'steps={steps}', 'oprd_weight=[[0,1],[0.5,0]]',
                                  'opd_weight=[[0,0],[1,1]]',
                                  'opd=full'], f'steps={steps} with knots', expect='either')
        yield Case('distill.py', [*LINES['distill.py'], f'steps={steps}', 'oprd_weight=[[0,0],[1,0]]'],
                   f'steps={steps} without a loss')
    for date in ('x', '2026-13-40', '9' * 400, '2026-02-30', RED, '20260101', '0000-00-00'):
        if 'date' in default:
            yield Case('eval_math.py', [*LINES['eval_math.py'], f'date={date}'], f'date={date[:12]!r}')
    knots = str([[i / 20000, 1.0] for i in range(20000)]).replace(' ', '')
    yield Case('distill.py', [*LINES['distill.py'], f'oprd_weight={knots}'], '20,000 knots',
               expect='either')
    yield Case('distill.py',
               [*LINES['distill.py'], 'layers=' + str(list(range(1, 30000))).replace(' ', '')],
               '30,000 layers')
    yield Case('distill.py', [*LINES['distill.py'], 'layers=[' + '1,' * 30000 + '1]'],
               'layer 1, 30,000 times', expect='either')


def odd_text():
    """Texts that a terminal, a file system or an encoding stumbles over, as the values of keys."""
    rng = random.Random('odd text')
    odd = [f'{RED}x', 'x\x07', '\x9b31m', '\u202eevil', '\u2066x', 'a\nb', 'a\r\x1b[2K', '\udcff\udcfe',
           '\ufeffx', 'x' * 300, 'x' * 100_000,
           '\u0301' * 500, '\U0001f600' * 200, '%s%n{0}{x}', "'\"`$(x)", '\\x1b[31m', '\t', ' ', '\x7f',
           '\u2028x', '../' * 1500, '~', '-', '*']
    # Keys that are paths are odd to the scripts that read them; keys of a list of words are odd everywhere.
    words = ['opd', 'layers', 'positions', 'device', 'dtype', 'schedule', 'pair', 'steps', 'lr', 'dry_run',
             'layer_map']
    paths = [('distill.py', key) for key in ('student', 'teacher', 'data', 'eval_data', 'bridge',
                                             'rep_loss')]
    paths += [('minimal.py', key) for key in ('student', 'teacher', 'data', 'rep_loss')]
    paths += [('bridge.py', key) for key in ('student', 'teacher', 'data')]
    paths += [('eval_math.py', 'student'), ('eval_math.py', 'model'), ('eval_math.py', 'eval_data')]
    for script, key in [*paths, *((reader_of(key, rng), key) for key in words)]:
        for text in odd:
            yield Case(script, [*LINES[script], f'{key}={text}'], f'{key}={text[:20]!r}')
    for text in odd:
        for script in ('eval_math.py', 'distill.py'):
            yield Case(script, [*LINES[script], f'eval_suffix={text}'], f'eval_suffix={text[:20]!r}',
                       expect='either')


def command_lines():
    """Words that are neither key=value nor a switch, and switches with values."""
    rng = random.Random('command lines')
    words = ['--steps', 'steps', '--', '-', '', ' ', '--=5', '=5', '==', 'steps==4', '-dry-run',
             '---dry-run', '--dry-run=maybe',
             '--dry-run=', 'dry-run', '--dryrun', '--no-dry-run', '--regrade=1', 'regrade', '-steps=4',
             '--steps=4=5', 'configs/toy.py,x',
             'a' * 100_000, '--' + 'a' * 100_000, f'{RED}', '--\x07', '\udcff', '\u202e', '-v', '--version',
             '-n', '@file',
             '--config=x', 'toy/student', 'toy', '/', '..', '\n', '-h=1', '--help=1', '--dry_run=0',
             'steps: 4', 'steps 4', '{"steps": 4}']
    for word in words:
        for script in rng.sample(SCRIPTS, 3):
            yield Case(script, [*LINES[script], word], f'the word {word[:30]!r}')
    for script in ('distill.py', 'bridge.py', 'minimal.py', 'studies/toy.py'):
        yield Case(script, [*LINES[script], 'configs/toy_mu.py'], 'a second config file')
    for script in ('distill.py', 'bridge.py', 'eval_math.py'):
        yield Case(script, [], 'nothing given')
        yield Case(script, ['--dry-run'], 'nothing but --dry-run')
    yield Case('studies/toy.py', [], 'nothing given')
    yield Case('minimal.py', ['layers=all', 'positions=all'], 'no models given')
    for key in ('student', 'teacher', 'data'):
        for script in ('distill.py', 'bridge.py', 'minimal.py'):
            yield Case(script, [*LINES[script], f'{key}='], f'{key}= with nothing')


CONFIG_TEXTS = {
    'binary': b'\x7fELF\x00\x01\x02\xff\xfe', 'empty': b'', 'only a comment': b'# nothing\n',
    'syntax': b'config = dict(\n',
    'tabs': b'if 1:\n\tx = 1\n        y = 2\n', 'not UTF-8': b'config = dict(student="\xff\xfe")\n',
    'NUL': b'config = {}\x00\n',
    'a list': b'config = [1, 2]\n', 'a text': b'config = "steps=4"\n', 'None': b'config = None\n',
    'the class': b'config = dict\n',
    'a function': b'def config(): pass\n', 'raises': b'1 / 0\n',
    'raises a long text': b'raise ValueError("x" * 100_000)\n',
    'raises many lines': b'raise ValueError("a\\nb\\n" * 50)\n',
    'raises control characters': b'raise ValueError("\\x1b[31m\\x07")\n',
    'raises without a text': b'raise ValueError\n', 'ends the process': b'raise SystemExit(0)\n',
    'ends with 1': b'raise SystemExit(1)\n',
    'ends with a text': b'raise SystemExit("a\\nb")\n', 'interrupt': b'raise KeyboardInterrupt\n',
    'no such import': b'import nosuchmodule\n',
    'no such name': b'from configs.default import nothing\n', 'recursion': b'def f(): f()\nf()\n',
    'keys that are numbers': b'config = {1: 2}\n',
    'keys that are None': b'config = {None: 2}\n', 'keys that are tuples': b'config = {("steps",): 2}\n',
    'a set': b'config = {1, 2}\n',
    'unknown key': b'config = {"stepz": 4}\n',
    'key with control characters': b'config = {"\\x1b[31m": 4}\n',
    'endless key': b'config = {"x" * 100_000: 4}\n',
    'NUL in a path': b'from configs.toy import config\nconfig = config | dict(student="a\\0b")\n',
    'NaN': b'config = {"lr": float("nan")}\n', 'endless text': b'config = {"steps": "x" * 100_000}\n',
    'a list in itself': b'x = []\nx.append(x)\nconfig = {"layers": x}\n',
    'a dict in itself': b'x = {}\nx["steps"] = x\nconfig = x\n',
    'deep list': b'x = []\nfor i in range(100_000): x = [x]\nconfig = {"layers": x}\n',
    'an object': b'config = {"steps": object()}\n',
    'a lambda': b'config = {"lr": lambda: 1}\n',
    'a tensor': b'import torch\nconfig = {"lr": torch.tensor(1.0)}\n',
    'numpy number': b'import numpy\nconfig = {"steps": numpy.int64(3)}\n',
    'bytes': b'config = {"student": b"toy"}\n',
    'a path': b'from pathlib import Path\nconfig = {"student": Path("toy")}\n',
    'complex': b'config = {"lr": 1j}\n',
    'its text raises': b'class X:\n def __repr__(self): raise ValueError("no")\nconfig = {"steps": X()}\n',
    'its text has lines': b'class X:\n def __repr__(self): return "a\\nb" * 99\nconfig = {"steps": X()}\n',
    'a number of 5000 digits': b'config = {"steps": 10**4999}\n',
    'a float of 10**400': b'config = {"lr": 10**400}\n',
    'str subclass': b'class S(str): pass\nconfig = {"student": S("x")}\n',
    'UTF-16': 'config = {}\n'.encode('utf-16'),
    'exception whose text raises': b'class E(Exception):\n def __str__(self): raise ValueError("no")\nraise E\n',
    'exception group': b'raise ExceptionGroup("a\\nb", [ValueError("c")])\n',
    'lone surrogate': b'config = {"student": "\\ud800"}\n',
    'knots of NaN': b'config = {"oprd_weight": [[0, float("nan")]]}\n',
    'a big list': b'config = {"layers": list(range(-1, 10**6))}\n',
    'warns': b'import warnings\nwarnings.warn("a\\nb")\nconfig = {"stepz": 4}\n',
    'nothing left of it': b'config = {}\ndel config\n',
}


def config_files():
    """Config files that are none, that fail, or that hold odd values."""
    rng = random.Random('config files')
    for what, text in CONFIG_TEXTS.items():
        # What the command line says would hide what the file says.
        script = 'distill.py' if b'"student"' in text or b'student=' in text else rng.choice(SCRIPTS)
        line = [arg for arg in LINES[script] if not arg.startswith('configs/')]
        if script == 'distill.py':
            line = [arg for arg in line if not arg.startswith('student=') or b'student' not in text]
        yield Case(script, ['mine.py', *line], f'a config file: {what}', write('mine.py', text))

    # Paths that name no such file.
    paths = ['nope.py', 'configs/tyo.py', 'toy', 'toy/student', '/', '/dev/null/x', '/proc/self/mem',
             'toy/train.jsonl', 'x' * 5000, 'configs',
             'toy/student/model.safetensors', f'{RED}.py', '\udcff.py', 'a\nb.py', 'configs/toy',
             'configs/toy.pyc', 'loop.py', 'gone.py']
    for path in paths:
        for script in rng.sample(SCRIPTS, 2):
            yield Case(script, [path, *[arg for arg in LINES[script] if not arg.startswith('configs/')]],
                       f'config file {path[:30]!r}',
                       both(link('loop.py', 'loop.py'), link('gone.py', 'nowhere.py')))


CROSS_KEYS = [
    ('distill.py', 'opd=sampled opd_weight=1 kl_direction=forward'),
    ('distill.py', 'opd=topk opd_weight=1 kl_direction=forward'),
    ('distill.py', 'opd=topk opd_weight=1 opd_k=1 opd_tail=renorm'), ('distill.py', 'opd_future=True'),
    ('distill.py', 'opd_baseline=True'), ('distill.py', 'opd=supervised opd_weight=1'),
    ('distill.py', 'opd=supervised opd_weight=1 answers_by=teacher kl_direction=forward'),
    ('distill.py', 'oprd_weight=0 opd_weight=0'), ('distill.py', 'oprd_weight=[[0,0],[1,0]]'),
    ('distill.py', 'oprd_weight=[[0,1],[0.5,0]]'),
    ('distill.py', 'layers=[4]'), ('distill.py', 'layers=[1,2,99]'), ('distill.py', 'layers=[1,1]'),
    ('distill.py', 'layers=[2,1]'),
    ('distill.py', 'layer_map=[1]'), ('distill.py', 'layer_map=[1,2,9]'), ('distill.py', 'layer_map=cka'),
    ('distill.py', 'layer_map=kept'),
    ('distill.py', 'rep_loss=mes'),
    ('distill.py', 'position_offset=1 positions=drift'), ('distill.py', 'max_new_tokens=1000000'),
    ('distill.py', 'eval_max_new_tokens=1000000'),
    ('distill.py', 'teacher=toy/other'), ('distill.py', 'device=cuda'), ('distill.py', 'device=mps'),
    ('distill.py', 'max_prompt_tokens=1'),
    ('distill.py', 'bridge=stage1'), ('distill.py', 'bridge=nowhere'), ('distill.py', 'bridge=toy'),
    ('distill.py', 'teacher=out/new'),
    ('distill.py', 'student=toy toy_width=9'), ('distill.py', 'student=toy toy_heads=3 toy_width=8'),
    ('distill.py', 'student=toy toy_width=25 toy_heads=2'),
    ('distill.py', 'student=toy toy_teacher_width=9 toy_heads=2'),
    ('distill.py', 'oprd_weight=0 reward_weight=[[0,0],[1,0]]'), ('distill.py', 'reward_weight=1 n=1'),
    ('distill.py', 'reward_weight=[[0,0],[0.5,1]] n=1'),
    ('distill.py', 'attention_weight=1 attention_layers=[9]'),
    ('distill.py', 'attention_weight=1 attention_heads=[9]'),
    ('distill.py', 'attention_weight=1 attention_heads=[1,1]'), ('distill.py', 'attention_weight=1 compile=True'),
    ('distill.py', 'attention_weight=1 teacher=toy/other opd=byte oprd_weight=0 opd_weight=1'),
    ('distill.py', 'answers_by=solution'), ('distill.py', 'answers_by=teacher opd=sampled opd_weight=1 opd_future=True'),
    ('distill.py', 'student=toy toy_halves=True'), ('distill.py', 'student=toy teacher=toy data=toy toy_halves=True'),
    ('distill.py', 'student=toy teacher=toy toy_halves=True toy_teacher_half=sums data=toy toy_hints=1'),
    ('distill.py', 'out_dir=done steps=3 beta1=0.5'), ('distill.py', 'out_dir=run n=5'),
    ('bridge.py', 'bridge='), ('bridge.py', 'bridge_prompts=2 bridge_held_out=0.9'),
    ('bridge.py', 'bridge_rank=1000'), ('bridge.py', 'layers=[99]'),
    ('bridge.py', 'layer_map=[1]'), ('bridge.py', 'seed=5'), ('bridge.py', 'temperature=0.5'),
    ('bridge.py', 'device=cuda'),
    ('bridge.py', 'max_new_tokens=100000 bridge=out/b'), ('bridge.py', 'max_prompt_tokens=1 bridge=out/b'),
    ('eval_math.py', 'eval_max_new_tokens=100000'), ('eval_math.py', 'device=cuda'),
    ('eval_math.py', 'eval_data=toy/eval.jsonl,toy/eval.jsonl'),
    ('eval_math.py', 'eval_data=toy/eval.jsonl,'), ('eval_math.py', 'eval_data=,'),
    ('eval_math.py', 'teacher=toy/nope seed=3'), ('eval_math.py', 'device=mps'),
    ('minimal.py', 'layers=last'), ('minimal.py', 'positions=last'), ('minimal.py', 'oprd_weight=2.0'),
    ('minimal.py', 'opd_weight=1'),
    ('minimal.py', 'teacher=toy/other'), ('minimal.py', 'max_new_tokens=100000'),
    ('minimal.py', 'rep_loss=mes'), ('minimal.py', 'student=toy/nope'),
    ('studies/toy.py', 'student=x teacher=x data=x eval_data=x'), ('studies/toy.py', 'toy_width=9'),
    ('studies/toy.py', 'toy_heads=3'),
    ('studies/toy.py', 'toy_heads=64'), ('studies/toy.py', 'toy_teacher_width=9'),
    ('studies/toy.py', 'device=cuda'), ('studies/toy.py', 'device=mps'),
]
MAY_PASS = ('layers=[1,1]', 'layers=[2,1]', 'bridge_rank=1000', 'eval_data=toy/eval.jsonl,',
            'max_new_tokens=100000', 'attention_weight=1 attention_heads=[1,1]',
            'attention_weight=1 teacher=toy/other opd=byte oprd_weight=0 opd_weight=1', 'answers_by=solution',
            'answers_by=teacher opd=sampled opd_weight=1 opd_future=True', 'student=toy toy_halves=True',
            'student=toy teacher=toy data=toy toy_halves=True',
            'student=toy teacher=toy toy_halves=True toy_teacher_half=sums data=toy toy_hints=1')


def cross_keys():
    """Keys that are fine one by one, and not together, or not for these models. With --dry-run and without: a dry
    run refuses what the run would refuse."""
    for script, keys in CROSS_KEYS:
        expect = 'either' if keys in MAY_PASS else 'refused'
        small = ['toy_train=8', 'toy_eval=2', 'toy_batch=2', 'toy_student_steps=1', 'toy_teacher_steps=1',
                 'toy_dir=out/toys']
        more = [*small, *keys.split()] if 'student=toy ' in keys else keys.split()
        for dry in ([], ['--dry-run']):
            if dry and script in ('minimal.py', 'bridge.py', 'studies/toy.py'):
                continue
            yield Case(script, [*real(script), *more, *dry], f'{keys} {" ".join(dry)}'.strip(),
                       expect=expect)
    for script in ('bridge.py', 'minimal.py', 'studies/toy.py'):
        change = remove('stage1/bridge.safetensors') if script == 'bridge.py' else None
        yield Case(script, [*LINES[script], '--dry-run'], '--dry-run', change, expect='either')


TWO = 'teacher=toy/teacher,toy/teacher'
ITSELF = ['teacher=self', 'teacher_sees=solution', 'solution_text={solution}{question}']
TEACHERS = {
    # Keys of several teachers: what must follow.
    'teacher=toy/teacher,': 'refused', 'teacher=,toy/teacher': 'refused', 'teacher=,': 'refused', TWO: 'refused',
    f'{TWO} data=toy/train.jsonl,': 'refused', f'{TWO} data=,toy/train.jsonl': 'refused',
    f'{TWO} data=toy/train.jsonl,toy/train.jsonl': 'fine', f'{TWO} data=toy/train.jsonl,toy/eval.jsonl': 'fine',
    f'{TWO} data=toy/train.jsonl,toy/nope.jsonl': 'refused',
    f'{TWO} teacher_share=tag': 'refused', f'{TWO} teacher_share=[1]': 'refused',
    f'{TWO} teacher_share=[1,1,1]': 'refused', f'{TWO} teacher_share=[1,1]': 'fine',
    f'{TWO} teacher_share=[1,1000]': 'either', f'{TWO} teacher_share=[0,1]': 'refused',
    f'{TWO} teacher_share=[1,1] bridge=stage1': 'refused', f'{TWO} teacher_share=[1,1] bridge=,': 'fine',
    f'{TWO} teacher_share=[1,1] bridge=stage1,': 'refused', f'{TWO} teacher_share=[1,1] bridge=,,': 'refused',
    f'{TWO} teacher_share=[1,1] answers_by=teacher': 'refused',
    f'{TWO} teacher_share=[1,1] teachers_in_turn=True': 'fine',
    f'{TWO} teacher_share=[1,1] teachers_in_turn=True teacher_shard=True': 'refused',
    f'{TWO} teacher_share=[1,1] teacher_every=1': 'refused', 'teachers_in_turn=True': 'refused',
    'teacher=toy/teacher,toy/nope teacher_share=[1,1]': 'refused',
    'teacher=toy/teacher,toy/other teacher_share=[1,1]': 'refused',
    'teacher=toy/teacher,toy/other teacher_share=[1,1] oprd_weight=0 opd_weight=1 opd=full': 'fine',
    'teacher=' + ','.join(['toy/teacher'] * 200) + ' teacher_share=' + str([1] * 200).replace(' ', ''): 'refused',
    'teacher=' + ',' * 5000: 'refused',

    # The student as its own teacher.
    'teacher=self': 'fine', 'teacher=self teacher_every=1 teacher_decay=0.9': 'fine',
    'teacher=self,self teacher_share=[1,1] teacher_every=1': 'refused',
    'teacher=self,toy/teacher teacher_share=[1,1]': 'fine',
    'teacher=self teacher_decay=0.5': 'refused', 'teacher_decay=0.5': 'refused', 'teacher_every=1': 'refused',
    'teacher=self teacher_every=1 teachers_in_turn=True': 'refused',
    'teacher=self teacher_sees=solution': 'either', 'teacher_sees=solution max_prompt_tokens=1': 'refused',
    'teacher=self teacher_sees=solution solution_text={question}': 'refused',
    'teacher=self teacher_sees=solution solution_text={solution}': 'refused',
    'teacher=self teacher_sees=solution solution_text=': 'refused',
    'teacher=self teacher_sees=solution solution_text={solution}{solution}{question}': 'refused',
    'teacher=self teacher_sees=solution solution_text={solution}{question}{0}{x.__class__}': 'either',
    f'teacher=self teacher_sees=solution solution_text={RED}{{solution}}{{question}}': 'either',
    'teacher=self teacher_sees=solution solution_text={solution}{question}' + '1' * 5000: 'refused',
    ' '.join([*ITSELF, 'attention_weight=1']): 'refused', ' '.join([*ITSELF, 'max_prompt_tokens=9']): 'refused',
    'teacher=self bridge=stage1': 'refused', 'student=self': 'refused',
}
TAGS = (None, 0, 3, -1, True, 1.0, NAN, '1x', 'two', '', ' ', [], [1], {}, 10**30, RED, '9' * 5000, '\u0661')


def teachers():
    """Several teachers, or the student itself: keys, and rows without the tag, the solution or the answer that is asked for.
    With --dry-run and without."""
    line = real('distill.py')
    for keys, expect in TEACHERS.items():
        for dry in ([], ['--dry-run']):
            yield Case('distill.py', [*line, *keys.split(' '), *dry], f'{keys[:120]} {" ".join(dry)}'.strip(), expect=expect)
    by_tag = [*line, TWO, 'teacher_share=tag', '--dry-run']
    fine = [{'question': f'{number}+2-3', 'answer': '1', 'teacher': number % 2 + 1} for number in range(4)]
    yield Case('distill.py', [*by_tag, 'data=tags.jsonl'], 'good tags', write('tags.jsonl', rows_of(fine, 'jsonl')), 'fine')
    yield Case('distill.py', [*by_tag, 'data=tags.csv'], 'good tags in a csv file',
               write('tags.csv', 'question,Teacher\n1+2-3,1\n4+5-6,2\n'), 'fine')
    for tag in TAGS:
        rows = [*fine, {'question': '9+2-3', 'answer': '8', 'teacher': tag}]
        yield Case('distill.py', [*by_tag, 'data=tags.jsonl'], f'tag {label(tag)}', write('tags.jsonl', rows_of(rows, 'jsonl')))
    for number in (1, 2):
        rows = [row for row in fine if row['teacher'] == number]
        yield Case('distill.py', [*by_tag, 'data=tags.jsonl'], f'tag {number} alone', write('tags.jsonl', rows_of(rows, 'jsonl')))
    without = [{'question': '1+2-3', 'answer': '0'}, {'question': '4+5-6'}]
    for dry in ([], ['--dry-run']):
        for keys in (ITSELF, ['reward_weight=1'], ['answers_by=solution', 'opd=supervised', 'opd_weight=1', 'oprd_weight=0']):
            yield Case('distill.py', [*line, *keys, 'data=some.jsonl', *dry], f'a row without an answer, {" ".join(keys)}',
                       write('some.jsonl', rows_of(without, 'jsonl')))
    odd = [{'question': '1+2-3', 'answer': '0', 'solution': value} for value in
           (['7'], {'a': 1}, 5, '\ud800', RED, 'x' * 2_000_000, '1+2=3;' * 1000)]
    for row in odd:
        yield Case('distill.py', [*line, *ITSELF, 'data=some.jsonl', '--dry-run'], f'solution {label(row["solution"])}',
                   write('some.jsonl', rows_of([row], 'jsonl')), 'either')


# ---- changes of files -------------------------------------------------------------------------

def write(name, data):
    """-> a change: the file holds these bytes, this text, or this object as JSON."""
    def change(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)         # it may be a second name of the good file
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            path.write_bytes((data if isinstance(data, str) else json.dumps(data)).encode())
    return change


def remove(name):
    """-> a change: the file is gone."""
    return lambda folder: (folder / name).unlink()


def link(name, target):
    """-> a change: the file is a link."""
    def change(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.symlink(str(target).replace('{folder}', str(folder)), path)
    return change


def both(*changes):
    """-> a change: one after the other."""
    def change(folder):
        for one in changes:
            one(folder)
    return change


def edit(name, function):
    """-> a change: the file's bytes go through a function."""
    return lambda folder: write(name, function((folder / name).read_bytes()))(folder)


def edit_json(name, function):
    """-> a change: the object in the file goes through a function, which changes it or returns another one."""
    def through(data):
        value = json.loads(data)
        result = function(value)
        return json.dumps(value if result is None else result).encode()
    return edit(name, through)


def set_key(name, key, value):
    """-> a change: the JSON file's key has this value, or is not there. key: 'a/b' is b in a."""
    def change(obj):
        *above, last = key.split('/')
        for part in above:
            obj = obj[part]
        if value is MISSING:
            obj.pop(last, None)
        else:
            obj[last] = value
    return edit_json(name, change)


def found(pattern, change_of, must_exist=True):
    """-> a change of the first file that matches a pattern, such as 'run/**/resume.json'."""
    def change(folder):
        paths = sorted(path for path in folder.glob(pattern) if path.is_file())
        assert paths or not must_exist, f'no {pattern}'
        for path in paths[:1]:
            change_of(str(path.relative_to(folder)))(folder)
    return change


def label(value):
    """A value in a few characters."""
    if value is MISSING:
        return 'missing'
    text = repr(value) if not isinstance(value,
                                         int) or abs(value) < 10**50 else f'10**{int(math.log10(value))}'
    return text[:40]


def deep(levels, inside='1'):
    """A JSON text of nested lists."""
    return '[' * levels + inside + ']' * levels


# What a JSON file may be instead of itself.
BROKEN_JSON = {
    'empty': b'', 'blank': b' \n', 'a list': b'[]', 'a text': b'"x"', 'a number': b'7', 'null': b'null',
    'NaN': b'NaN', 'cut': b'{"a": [1, 2',
    'deep lists': deep(100_000).encode(), 'deep dicts': (b'{"a":' * 50_000 + b'1' + b'}' * 50_000),
    'not UTF-8': b'{"a": "\xff\xfe"}',
    'UTF-16': '{}'.encode('utf-16'), 'BOM': b'\xef\xbb\xbf{}',
    'a number of 10,000 digits': b'{"a": ' + b'9' * 10_000 + b'}', 'NUL': b'\x00\x00',
    'control characters': b'{"\x1b[31m": 1}', 'binary': bytes(range(256)), 'empty object': b'{}',
    'single quotes': b"{'a': 1}",
    'a long line': b'"' + b'x' * 10**6 + b'"',
}

# ---- model folders ----------------------------------------------------------------------------

NOT_SIZES = ['12', 1.5, -1, True, NAN, INF, [], {}, [3], 10**12, 10**40, '\x1b[31m']
NOT_POSITIVE = [None, True, '1e-6', 0, -1, -1.5, NAN, INF, -INF, [], {}, [1], 10**400]
CONFIG_FIELDS = {
    # field: (must be refused, may be refused)
    **dict.fromkeys(['hidden_size', 'vocab_size', 'num_attention_heads', 'num_hidden_layers',
                     'intermediate_size'],
                    ([*NOT_SIZES, None, 0, MISSING], [])),
    'num_key_value_heads': ([*NOT_SIZES, 0, 5], [None, MISSING]),
    'head_dim': ([*NOT_SIZES, 7], [None, 0, MISSING]),
    'max_position_embeddings': (['12', 1.5, -1, True, NAN, INF, [], {}, [3], 0, 3],
                                [None, MISSING, 10**12, 10**40]),
    'rms_norm_eps': (NOT_POSITIVE, [MISSING, 1e10, 10**40]),
    'rope_theta': (NOT_POSITIVE, [MISSING, 1e300, 1e-300]),
    'tie_word_embeddings': (['false', 'true', [], {}, NAN, 2, '', 'x'], [None, MISSING, True, 1, 0]),
    'hidden_act': (['weird', None, 5, [], {}, True, RED, 'x' * 10_000], [MISSING]),
    'model_type': (['gpt2', None, 5, [], {}, MISSING, 'llama', 'qwen2', 'phi3', RED, 'x' * 10_000, 'QWEN3'],
                   []),
    'attention_bias': ([True, 'false', 1, [1], 'x'], [None, [], NAN, MISSING]),
    'mlp_bias': ([True, 'false', 1, [1]], [None, []]),
    'quantization_config': ([{'bits': 4}, 'x', 5, [1], True], [None, {}, []]),
    'sliding_window': ([], [1, 0, -1, 'x', [], NAN, 10**12]),
    'use_sliding_window': ([], ['x', 1, [], None]),
    'layer_types': ([], [5, [5], [None], 'x', {}, [[]], ['sliding_attention'], True,
                         ['full_attention'] * 10**5]),
    'rope_scaling': ([5, 'x', True, [1], {'rope_type': 'yarn', 'factor': 2.0}, {'rope_type': 5},
                      {'rope_type': []}, {'rope_type': {}},
                      {'rope_type': 'linear'}, {'rope_type': 'linear', 'factor': 0},
                      {'rope_type': 'linear', 'factor': NAN},
                      {'rope_type': 'linear', 'factor': True}, {'rope_type': 'linear', 'factor': '2'},
                      {'rope_type': 'linear', 'factor': -1},
                      {'rope_type': 'linear', 'factor': INF}, {'rope_type': 'llama3', 'factor': 8.0},
                      {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
                       'high_freq_factor': 1.0, 'original_max_position_embeddings': 64},
                      {'rope_type': 'llama3', 'factor': 0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                       'original_max_position_embeddings': 64},
                      {'rope_type': 'longrope', 'long_factor': [1], 'short_factor': [1]},
                      {'rope_type': 'longrope', 'long_factor': 'x'},
                      {'rope_type': 'longrope', 'original_max_position_embeddings': 64,
                       'long_factor': [NAN] * 6, 'short_factor': [1] * 6},
                      {'rope_type': RED}, {'rope_theta': 'x'}, {'rope_theta': NAN}, {'rope_theta': -1}],
                     [None, {}, [], 0, {'type': None}]),
    'rope_parameters': ([5, 'x', True, [1], {'rope_theta': None}, {'rope_theta': 0}, {'rope_type': 'x'}],
                        [None, {}]),
    'eos_token_id': ([-1, True, '2', 1.5, {}, NAN, {'a': 1}, [True], ['2'], [[2]], [None], RED],
                     [None, MISSING, 10**9, [], [2, 10**9], 2]),
    'partial_rotary_factor': ([], [0, -1, NAN, 'x', 2.0, None, [], 1e-9]),
    'original_max_position_embeddings': ([], [0, -1, 'x', None]),
    'architectures': ([], [5, None, 'x', []]),
    'torch_dtype': ([], ['x', 5]),
    'auto_map': ([], [{'AutoModel': 'evil.py'}]),
}


def models_case(what, change, expect, rng, seconds=2.0):
    """A case of a broken student: evaluated or trained from for real, or in a dry run, which may refuse less."""
    how = rng.randrange(3)
    if how == 0:
        return Case('distill.py', LINES['distill.py'], f'{what} (dry run)', change,
                    'either' if expect == 'refused' else expect,
                    seconds=seconds)
    if how == 1:
        return Case('minimal.py', real('minimal.py'), what, change, expect, seconds=seconds)
    return Case('eval_math.py', [*real('eval_math.py'), 'eval_n=1', 'seed=1'], what, change, expect,
                seconds=seconds)


def model_config():
    """Fields of config.json of a type or size that no model has."""
    rng = random.Random('model config')
    file = 'toy/student/config.json'
    for key, (refused, either) in CONFIG_FIELDS.items():
        for value in refused:
            yield models_case(f'config.json {key}={label(value)}', set_key(file, key, value), 'refused',
                              rng)
        for value in either:
            yield models_case(f'config.json {key}={label(value)}', set_key(file, key, value), 'either', rng)
    for what, data in BROKEN_JSON.items():
        yield models_case(f'config.json is {what}', write(file, data), 'refused', rng)
    yield models_case('config.json is a folder', both(remove(file), lambda folder: (folder / file).mkdir()),
                      'refused', rng)
    yield models_case('config.json links to itself', link(file, 'config.json'), 'refused', rng)
    yield models_case('config.json is missing', remove(file), 'refused', rng)
    yield models_case('config.json with CRLF', edit(file, lambda data: data.replace(b'\n', b'\r\n')),
                      'fine', rng)
    yield models_case('config.json with unknown keys',
                      edit_json(file, lambda obj: obj.update({RED: deep(5)})), 'fine', rng)


def generation_config():
    """Ids that end an answer."""
    rng = random.Random('generation config')
    file = 'toy/student/generation_config.json'
    for value in [-1, True, '2', 1.5, {}, NAN, [True], ['2'], [[2]], RED, {'a': [1]}]:
        yield models_case(f'generation_config.json eos_token_id={label(value)}',
                          set_key(file, 'eos_token_id', value), 'refused', rng)
    for value in [None, MISSING, 10**9, [], [2, 3], [2, 10**9], [2] * 10**5]:
        yield models_case(f'generation_config.json eos_token_id={label(value)}',
                          set_key(file, 'eos_token_id', value), 'either', rng)
    for what, data in BROKEN_JSON.items():
        expect = 'either' if what in ('empty object', 'BOM') else 'refused'
        yield models_case(f'generation_config.json is {what}', write(file, data), expect, rng)
    for name in ('config', 'generation_config', 'tokenizer_config'):
        no_end = both(set_key('toy/student/generation_config.json', 'eos_token_id', MISSING),
                      set_key('toy/student/tokenizer_config.json', 'eos_token', MISSING),
                      set_key('toy/student/config.json', 'eos_token_id', MISSING))
        key = 'eos_token' if name == 'tokenizer_config' else 'eos_token_id'
        value = '<nope>' if name == 'tokenizer_config' else 10**9
        yield models_case(f'no end of text but a foreign one in {name}.json',
                          both(no_end, set_key(f'toy/student/{name}.json', key, value)),
                          'refused', rng)


def paths_in(obj, path=()):
    """The paths of everything in a JSON object."""
    yield path
    items = obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, list) else ()
    for key, value in items:
        yield from paths_in(value, (*path, key))


def mutate(obj, rng):
    """Give one place in a JSON object a value of another kind, or take it out."""
    path = rng.choice([path for path in paths_in(obj) if path])
    above = obj
    for key in path[:-1]:
        above = above[key]
    value = rng.choice([None, True, 0, -1, 1.5, NAN, 10**9, 10**30, '', 'x', RED, [], {}, [1], {'a': 1},
                        MISSING, '\ud800'])
    if value is MISSING:
        del above[path[-1]]
    else:
        above[path[-1]] = value
    return f'{"/".join(map(str, path))}={label(value)}'


def random_json(name, count, rng, what):
    """`count` changes of one place each in a JSON file -> (what, change)."""
    for number in range(count):
        seed = f'{what} {number}'
        yield f'{what} with one place changed, {number}', edit_json(name, lambda obj,
                                                                    seed=seed: mutate(obj, random.Random(seed)) and None)


def tokenizer_files():
    """tokenizer.json: broken, or with vocabularies that nobody can use."""
    rng = random.Random('tokenizer files')
    file = 'toy/student/tokenizer.json'
    for what, data in BROKEN_JSON.items():
        yield models_case(f'tokenizer.json is {what}', write(file, data), 'refused', rng)
    yield models_case('tokenizer.json is missing', remove(file), 'refused', rng)
    yield models_case('tokenizer.json is a folder',
                      both(remove(file), lambda folder: (folder / file).mkdir()), 'refused', rng)
    for size in (1, 100, 1000, -10):
        yield models_case(f'tokenizer.json is cut at {size}',
                          edit(file, lambda data, size=size: data[:size]), 'refused', rng)
    for value in (-1, 10**9, 2**32 - 1, 2**40, '1', None, 1.5, True, 24):
        yield models_case(f'tokenizer.json: id {label(value)}', set_key(file, 'model/vocab/7', value),
                          'refused' if value != 24 else 'either', rng)
    for key, value in (('vocab', {}), ('vocab', []), ('vocab', None), ('type', 'Nope'),
                       ('merges', [['a', 'b']]), ('merges', 'x'), ('unk_token', '<nope>')):
        expect = 'either' if key in ('unk_token', 'merges') else 'refused'
        yield models_case(f'tokenizer.json: {key}={label(value)}', set_key(file, f'model/{key}', value),
                          expect, rng)
    for what, change in random_json(file, 80, rng, 'tokenizer.json'):
        yield models_case(what, change, 'either', rng)
    yield models_case('only a .tiktoken file of an unknown name',
                      both(remove(file), write('toy/student/x.tiktoken', b'AA== 0\n')), 'refused', rng)
    for what, data in (('binary', bytes(range(256))), ('empty', b''), ('short', b'AA== 0\n'),
                       ('no rank', b'AA==\n'), ('not base 64', b'\xff\xfe 1\n'),
                       ('negative', b'AA== -1\n'), ('long', b'x' * 10**6)):
        yield models_case(f'qwen.tiktoken is {what}',
                          both(remove(file), write('toy/student/qwen.tiktoken', data)), 'refused', rng)


def tokenizer_config():
    """tokenizer_config.json: marks and templates of wrong types."""
    rng = random.Random('tokenizer config')
    file = 'toy/student/tokenizer_config.json'
    for key in ('bos_token', 'eos_token', 'pad_token'):
        for value in (5, True, [], ['<eos>'], {'a': 1}, {'content': 5}, {'content': None}, {'content': []},
                      1.5, [[]]):
            # bos_token is put into prompts; what is not a text there would be printed as Python shows it.
            yield models_case(f'tokenizer_config.json {key}={label(value)}', set_key(file, key, value),
                              'refused' if value else 'either', rng)
        for value in (RED, '\ud800', 'x' * 10**6, '<nope>', '', None, MISSING, '\x07', '\u202e'):
            yield models_case(f'tokenizer_config.json {key}={label(value)}', set_key(file, key, value),
                              'either', rng)
    template = remove('toy/student/chat_template.jinja')
    for value in (5, True, 1.5, [5], [None], ['x'], [{'name': 'default'}], [{'template': 'x'}], {'a': 1},
                  [[]], [{'name': 'default', 'template': 5}],
                  [{'name': [], 'template': 'x'}], {'default': 'x'}):
        yield models_case(f'chat_template={label(value)}',
                          both(template, set_key(file, 'chat_template', value)), 'refused', rng)
    for value in ([], {}, [{'name': 'tool', 'template': 'x'}], '', None):
        yield models_case(f'chat_template={label(value)}',
                          both(template, set_key(file, 'chat_template', value)), 'either', rng)
    for what, data in BROKEN_JSON.items():
        yield models_case(f'tokenizer_config.json is {what}', write(file, data),
                          'either' if what in ('empty object', 'BOM') else 'refused', rng)


HOSTILE = {
    # Limits of time and memory must end these.
    'two loops of 99,999': '{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}',
    'an empty loop in loops': '{% for i in range(9999) %}' * 3 + '{% endfor %}' * 3,
    'a text of 10**10': "{{ 'a' * 10**10 }}", 'a text of 10**9': "{{ 'a' * 10**9 }}",
    'centred': "{{ 'a'|center(10**10) }}",
    'a list of 10**9': '{{ range(99999)|list * 99999 }}', 'a power': '{{ 10**(10**9) }}',
    'a long power': '{{ (7**(9**8)) % 10 }}',
    'a growing text': "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    'a format': "{{ '%1000000000d'|format(1) }}",
    'a joined product': "{{ ('x' * 99999)|list|join('y' * 99999) }}",
}
FAILING = {
    'raise_exception': "{{ raise_exception('no') }}",
    'a long exception': "{{ raise_exception('x' * 100000) }}",
    'an exception of many lines': "{{ raise_exception('a\\nb\\n' * 50) }}",
    'an exception with control characters': "{{ raise_exception('\x1b[31m\x07') }}",
    'no such message': '{{ messages[99].content.x }}', 'division': '{{ 1 / 0 }}', 'syntax': '{% for %}',
    'cut': '{% if messages %}', 'braces': '{{ {{ }} }}',
    'a class': "{{ ''.__class__.__mro__[1].__subclasses__() }}", 'include': "{% include '/etc/passwd' %}",
    'import': "{% import 'x' as x %}",
    'a macro in itself': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'nothing': '{# nothing #}',
    'deep brackets': '{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}',
    'deep ifs': '{% if 1 %}' * 2000 + '{% endif %}' * 2000, 'a surrogate': "{{ '\\ud800' }}",
    'no such filter': '{{ 1|nope }}', 'no such test': '{{ 1 is nope }}',
    'unknown tag': '{% nope %}', 'a bad date': '{{ strftime_now(5) }}',
    'tojson of a function': '{{ raise_exception|tojson }}', 'extends': "{% extends 'x' %}",
    'a long chain': '{{ 1' + ' + 1' * 20_000 + ' }}',
    'changes messages': '{{ messages.append(1) }}{{ messages.clear() }}', 'undefined call': '{{ nope() }}',
    'generation without end': '{% generation %}x', 'not a number': "{{ 'x'|int + 'y' }}",
}
ODD_TEMPLATES = {
    'control characters': '\x1b[31m\x07{{ messages[0].content }}',
    'not UTF-8': b'\xff\xfe{{ messages[0].content }}', 'BOM': b'\xef\xbb\xbf1', 'binary': bytes(range(256)),
    'a long text': 'x' * 10**6, 'another prompt each time': '{{ range(9)|random }}',
    'the date': "{{ strftime_now('%Y') }}", 'lipsum': '{{ lipsum(3) }}', 'empty': '',
    'marks of direction': '\u202e{{ messages[0].content }}', 'self': '{{ self }}', 'cycler': '{{ cycler }}',
    'undefined': '{{ nope }}1', 'a big table': '{{ messages|tojson(indent=99) }}',
}


def templates():
    """Chat templates that take for ever, fill the memory, fail, or print what a terminal obeys."""
    rng = random.Random('templates')
    file = 'toy/student/chat_template.jinja'
    for what, text in FAILING.items():
        expect = 'either' if what in ('include', 'not a number', 'changes messages', 'a long chain',
                                      'deep ifs', 'a date', 'deep brackets') else 'refused'
        yield models_case(f'template: {what}', write(file, text), expect, rng)
    for what, text in ODD_TEMPLATES.items():
        yield models_case(f'template: {what}', write(file, text), 'either', rng)

    # In a hostile one the limit itself may be spent.
    for what, text in HOSTILE.items():
        yield replace(models_case(f'hostile template: {what}', write(file, text), 'either', rng),
                      seconds=10.0)
        yield Case('eval_math.py', LINES['eval_math.py'], f'hostile template: {what}', write(file, text),
                   'refused', seconds=10.0)


WEIGHTS = 'toy/student/model.safetensors'


def edit_tensors(name, function, metadata=None):
    """-> a change: the tensors of a safetensors file go through a function, which changes the dict that it is given."""
    def change(folder):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file
        path = folder / name
        tensors = load_file(path)
        with safe_open(path, 'pt') as file:
            kept = file.metadata() or {}
        function(tensors)
        path.unlink()                        # it may be a second name of the good file
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path,
                  kept if metadata is None else metadata(kept))
    return change


def fill(value, how='one'):
    """-> a function on a tensor: a copy with one number, or all of them, set."""
    def function(tensor):
        tensor = tensor.clone()
        if how == 'one':
            tensor.view(-1)[-1] = value
        else:
            tensor.fill_(value)
        return tensor
    return function


def tensor_changes():
    """What may happen to a tensor -> (what, function on a tensor, expect)."""
    import torch
    for dtype in ('bool', 'int64', 'int32', 'int8', 'uint8', 'float8_e4m3fn', 'complex64'):
        yield f'as {dtype}', lambda tensor, dtype=dtype: tensor.to(getattr(torch, dtype)), 'refused'
    for dtype in ('float16', 'bfloat16', 'float64'):
        yield f'as {dtype}', lambda tensor, dtype=dtype: tensor.to(getattr(torch, dtype)), 'either'
    for value in (NAN, INF, -INF):
        yield f'with one {value}', fill(value), 'refused'
    yield 'all NaN', fill(NAN, 'all'), 'refused'
    yield 'with a huge number', fill(3e38), 'either'
    yield 'all huge', fill(3e38, 'all'), 'either'
    yield 'all zero', fill(0.0, 'all'), 'either'
    yield 'with infinities that cancel', lambda tensor: fill(INF)(tensor), 'refused'
    yield 'one row short', lambda tensor: tensor[:-1], 'refused'
    yield 'one row more', lambda tensor: torch.cat([tensor, tensor[:1]]), 'refused'
    yield 'with one more axis', lambda tensor: tensor[None], 'refused'
    yield 'flat', lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()]), 'refused'
    yield 'empty', lambda tensor: tensor[:0], 'refused'
    yield 'without axes', lambda tensor: tensor.flatten()[0], 'refused'


def header_changes():
    """What may happen to the header of a safetensors file -> (what, function on its bytes)."""
    def with_header(function):
        def through(data):
            size = int.from_bytes(data[:8], 'little')
            header = json.dumps(function(json.loads(data[8:8 + size]))).encode()
            return len(header).to_bytes(8, 'little') + header + data[8 + size:]
        return through

    def first(**changed):
        def function(header):
            name = next(key for key in header if key != '__metadata__')
            header[name].update(changed)
            return header
        return with_header(function)
    for changed in (dict(dtype='F7'), dict(dtype='I64'), dict(dtype=5), dict(shape=[-1]),
                    dict(shape=[10**18]), dict(shape='x'), dict(shape=[1.5]),
                    dict(data_offsets=[0, 10**18]), dict(data_offsets=[10, 0]), dict(data_offsets=None),
                    dict(shape=[2**63, 2])):
        yield f'header with {changed}', first(**changed)
    for what, header in (('a list', []), ('a text', 'x'), ('empty', {}),
                         ('a foreign one', {'x\x1b[31m': {'dtype': 'F32', 'shape': [1],
                                                          'data_offsets': [0, 4]}})):
        yield f'header is {what}', with_header(lambda old, header=header: header)
    yield 'header of endless length', lambda data: (2**63).to_bytes(8, 'little') + data[8:]
    yield 'header of length 0', lambda data: bytes(8) + data[8:]
    yield 'header is deep', lambda data: len(deep(50_000)).to_bytes(8, 'little') + deep(50_000).encode()


def weights():
    """model.safetensors: cut, of other types, not finite, missing, surplus, misshapen."""
    rng = random.Random('weights')
    names = ['model.embed_tokens.weight', 'lm_head.weight', 'model.norm.weight',
             'model.layers.1.self_attn.q_proj.weight',
             'model.layers.2.mlp.down_proj.weight', 'model.layers.0.self_attn.k_norm.weight',
             'model.layers.0.input_layernorm.weight']
    for what, function, expect in tensor_changes():
        for name in rng.sample(names, 3):
            change = edit_tensors(WEIGHTS, lambda tensors, name=name,
                                  function=function: tensors.update({name: function(tensors[name])}))
            yield weights_case(f'{name} {what}', change, expect, rng)
    for name in names:
        yield weights_case(f'{name} missing', edit_tensors(WEIGHTS, lambda tensors,
                                                           name=name: tensors.pop(name)), 'refused', rng)
        surplus = edit_tensors(WEIGHTS, lambda tensors,
                               name=name: tensors.update({f'{name}{RED}': tensors[name].clone()}))
        yield weights_case(f'{name} twice', surplus, 'refused', rng)
    for what, function in header_changes():
        yield weights_case(what, edit(WEIGHTS, function), 'refused', rng)
    for _ in range(30):
        share = rng.random()
        yield weights_case(f'cut to {share:.2f}',
                           edit(WEIGHTS, lambda data, share=share: data[:int(share * len(data))]),
                           'refused', rng)
    for number in range(30):
        yield weights_case(f'a byte of the header changed, {number}',
                           edit(WEIGHTS, flip(rng.randrange(8, 2000), rng.randrange(1, 256))), 'either',
                           rng)
    for what, data in (('empty', b''), ('a text', b'hello'), ('a pickle', b'\x80\x04K\x01.'),
                       ('zeros', bytes(10**5)), ('a big random file', random.Random(0).randbytes(10**6))):
        yield weights_case(f'model.safetensors is {what}', write(WEIGHTS, data), 'refused', rng)
    yield weights_case('model.safetensors is missing', remove(WEIGHTS), 'refused', rng)
    yield weights_case('only a pickle', both(remove(WEIGHTS), write('toy/student/pytorch_model.bin',
                                                                    b'\x80\x04K\x01.')), 'refused', rng)
    yield weights_case('model.safetensors is a folder',
                       both(remove(WEIGHTS), lambda folder: (folder / WEIGHTS).mkdir()), 'refused', rng)


def weights_case(what, change, expect, rng):
    """Weights are read by real runs; a dry run of distill.py may look at them or not."""
    if rng.random() < 0.2:
        return Case('distill.py', LINES['distill.py'], f'{what} (dry run)', change, 'either')
    script = rng.choice(['minimal.py', 'eval_math.py', 'distill.py'])
    more = ['eval_n=1', 'seed=1'] if script == 'eval_math.py' else []
    return Case(script, [*real(script), *more], what, change, expect)


def flip(at, bits):
    """-> a function on bytes: one byte is changed."""
    def function(data):
        data = bytearray(data)
        data[at % len(data)] ^= bits
        return bytes(data)
    return function


def index_files():
    """model.safetensors.index.json: names of files that are not plain names in the folder."""
    rng = random.Random('index files')
    folder = 'toy/student'
    names = ['../teacher/model.safetensors', '/etc/passwd', '{folder}/toy/teacher/model.safetensors',
             './a.safetensors', 'x/../a.safetensors', 'nope.safetensors',
             '', '.', '..', 'config.json', 'tokenizer.json', 5, None, True, [], {}, ['a.safetensors'], 1.5,
             RED, 'a.safetensors\x00', 'x' * 5000, '\ud800', 'a\\b',
             '/dev/zero', '/proc/self/mem', 'outside.safetensors', 'loop.safetensors', 'sub']

    def change_of(name, every):
        def change(root):
            from safetensors.torch import load_file
            os.rename(root / WEIGHTS, root / folder / 'a.safetensors')
            keys = list(load_file(root / folder / 'a.safetensors'))
            shown = name.replace('{folder}', str(root)) if isinstance(name, str) else name
            weight_map = dict.fromkeys(keys, 'a.safetensors')
            weight_map |= dict.fromkeys(keys if every else keys[:1], shown)
            os.symlink('loop.safetensors', root / folder / 'loop.safetensors')
            (root / folder / 'sub').mkdir()
            write(f'{folder}/model.safetensors.index.json', {'weight_map': weight_map})(root)
        return change
    for name in names:
        for every in (True, False):
            yield weights_case(f'index names {label(name)}', change_of(name, every), 'refused', rng)
    yield Case('eval_math.py', [*real('eval_math.py'), 'seed=1'], 'a good index',
               change_of('a.safetensors', True), 'fine')
    for value in ([], {}, None, 5, 'x', MISSING, {'x': 'a.safetensors'}, [1], True):
        index = {} if value is MISSING else {'weight_map': value}
        change = both(change_of('a.safetensors', True), write(f'{folder}/model.safetensors.index.json',
                                                              index))
        yield weights_case(f'weight_map={label(value)}', change, 'refused', rng)
    for what, data in BROKEN_JSON.items():
        yield weights_case(f'the index is {what}', both(change_of('a.safetensors', True),
                                                        write(f'{folder}/model.safetensors.index.json',
                                                              data)), 'refused', rng)


def links():
    """Links in a model folder that lead out of it. They may be refused or, where a hub's cache has such links, read; the
    contents of what they lead to must not be found in what is written."""
    files = ['merges.txt', 'vocab.json', 'added_tokens.json', 'special_tokens_map.json', 'x.tiktoken',
             'tokenizer_config.json', 'generation_config.json',
             'chat_template.jinja', 'config.json', 'tokenizer.json', 'model.safetensors']
    for name in files:
        for target in ('../../secret.txt', '{folder}/secret.txt', '/etc/passwd', name, '../teacher',
                       '/dev/zero', 'nowhere'):
            big = target == '/dev/zero'      # reading a device has no end
            yield Case('distill.py', real('distill.py'), f'{name} -> {target}',
                       link(f'toy/student/{name}', target), 'either', seconds=4.0 if big else 2.0)
    def moved(folder):
        os.rename(folder / 'toy/student', folder / 'toy/moved')
    line = real('distill.py')
    yield Case('distill.py', line, 'the student is a link', both(moved, link('toy/student', 'moved')), 'fine')
    yield Case('distill.py', line, 'the student is a link to itself', both(moved, link('toy/student', 'student')))


# ---- problem sets -----------------------------------------------------------------------------

QUESTION = '1+2-3'
BAD_ROWS = {
    # In a set to evaluate on: refused.
    **{f'question {label(value)}': {'question': value, 'answer': '7'} for value in
       (5, None, [], {}, [5], [None], True, 1.5, NAN, [{'role': 'user'}], [{'content': 'x'}],
        [{'role': 'user', 'content': None}],
        [{'role': 'user', 'content': ['x']}], [[{'role': 'user', 'content': 'x'}]],
        {'role': 'user', 'content': 'x'}, '', 10**30)},
    **{f'answer {label(value)}': {'question': QUESTION,
                                  'answer': value} for value in (None, [], ['7'], {}, {'a': 1}, True, False,
                                                                 [[]])},
    'no answer': {'question': QUESTION}, 'no question': {'answer': '7'}, 'no columns': {},
    'other columns': {'text': 'x', 'label': 'y'},
    'reward_model without an answer': {'prompt': QUESTION, 'reward_model': {}}, 'a list': [1],
    'a text': 'x', 'a number': 7, 'null': None, 'true': True,
    'a lone surrogate in the question': {'question': '1+2\ud800', 'answer': '7'},
    'a lone surrogate in a message': {'prompt': [{'role': 'user', 'content': '\udfff'}], 'answer': '7'},
    'ground_truth a list': {'prompt': QUESTION, 'reward_model': {'ground_truth': ['7']}},
    'a long question': {'question': '1+' * 200_000, 'answer': '7'},
}
ODD_ROWS = {
    'answer 7': {'question': QUESTION, 'answer': 7}, 'answer 7.5': {'question': QUESTION, 'answer': 7.5},
    'answer NaN': {'question': QUESTION, 'answer': NAN},
    'answer of 300 digits': {'question': QUESTION, 'answer': 10**300},
    'answer ""': {'question': QUESTION, 'answer': ''}, 'answer " "': {'question': QUESTION, 'answer': ' '},
    'answer with a surrogate': {'question': QUESTION, 'answer': '\ud800'},
    'answer with control characters': {'question': QUESTION, 'answer': '\x1b[31m\x07'},
    'answer of 10**5 characters': {'question': QUESTION, 'answer': 'x' * 10**5},
    'answer with braces': {'question': QUESTION, 'answer': '}{{' * 30},
    'a formula without end': {'question': QUESTION, 'answer': '9^{' * 500 + '}' * 500},
    'a nested fraction': {'question': QUESTION, 'answer': '\\frac{1}{' * 300 + '2' + '}' * 300},
    'control characters in the question': {'question': '1+2\x1b[31m\x07', 'answer': '7'},
    'marks of direction': {'question': '\u202e1', 'answer': '7'},
    'newlines': {'question': '\n\n\n', 'answer': '7'},
    'a role that is a number': {'prompt': [{'role': 5, 'content': '1+2'}], 'answer': '7'},
    'NUL': {'question': '\x00', 'answer': '7'},
    'an odd role': {'prompt': [{'role': RED, 'content': '1+2'}], 'answer': '7'},
    'a long answer': {'question': QUESTION, 'answer': '####' * 10**4},
    'reward_model a number': {'prompt': QUESTION, 'reward_model': 7},
    'reward_model a list': {'prompt': QUESTION, 'reward_model': [7]},
    'solution a list': {'problem': QUESTION, 'solution': ['7']},
    'answer too deep': {'question': QUESTION, 'answer': {'a': {'b': [1] * 99}}},
}
BAD_LINES = {
    'cut': b'{"question": "1+2", "ans', 'two rows': b'{"question": "1"}{"question": "2"}',
    'single quotes': b"{'question': '1', 'answer': '7'}",
    'not UTF-8': b'{"question": "\xff\xfe", "answer": "7"}',
    'UTF-16': '{"question": "1", "answer": "7"}'.encode('utf-16'),
    'deep lists': deep(100_000).encode(),
    'deep in a row': b'{"question": "1", "answer": ' + deep(100_000).encode() + b'}',
    'a number of 10,000 digits': b'{"question": "1", "answer": ' + b'9' * 10_000 + b'}',
    'NUL bytes': b'\x00\x00\x00', 'a comma': b'{"question": "1", "answer": "7"},',
    'an open bracket': b'[', 'binary': bytes(range(256)).replace(b'\n', b''),
    'control characters': b'{"question": "1\x1b", "answer": "7"}', 'plain text': b'1+2',
    'csv': b'question,answer', 'a comment': b'# x', '5 MB without a row': b'x' * 5_000_000,
    'not UTF-8 at all': b'\x80' * 10_000,
}

BAD_TABLES = {
    'an open quote': b'question,answer\n"1+2-3,0\n', 'a quote inside': b'question,answer\n"1"+2,3\n',
    'a cell too many': b'question,answer\n1+2-3,0,0\n', 'a cell too few': b'question,answer\n1+2-3\n',
    'other columns': b'text,label\n1+2-3,0\n', 'semicolons': b'question;answer\n1+2-3;0\n',
    'two columns of one name': b'question,Question\n1,2\n', 'no rows': b'question,answer\n',
    'no names': b'1+2-3,0\n4+5-6,3\n', 'not UTF-8': b'question,answer\n\xff,0\n',
    'UTF-16': 'question,answer\n1+2-3,0\n'.encode('utf-16'), 'control characters': RED.encode() + b',\x07\n1,2\n',
    'a cell of 2 MB': b'question,answer\n' + b'1+' * 10**6 + b',0\n', 'JSON': b'{"question": "1", "answer": "7"}\n',
    'printed messages': b'prompt,answer\n"[{\'role\': \'user\', \'content\': \'1\'}]",7\n',
}


def problems_case(what, name, change, expect, rng, **more):
    """A broken problem set, as the one to evaluate on or to train on."""
    if rng.random() < 0.6:
        return Case('eval_math.py', [*LINES['eval_math.py'], f'eval_data={name}'], what, change, expect, **more)
    # Training needs no answers, and leaves out prompts that are too long.
    key = rng.choice(['data', 'eval_data'])
    may_be_skipped = 'answer' in what or 'long question' in what
    return Case('distill.py', [*LINES['distill.py'], f'{key}={name}'], f'{what} as {key}', change,
                'either' if key == 'data' and may_be_skipped and expect == 'refused' else expect, **more)


def rows_of(rows, ending):
    """Rows -> the bytes of a file with this ending."""
    if ending == 'json':
        return json.dumps(rows).encode()
    return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def problem_rows():
    """Rows of .jsonl and .json whose columns hold something else."""
    rng = random.Random('problem rows')
    fine = {'question': '4+5-6', 'answer': '3'}
    for table, expect in ((BAD_ROWS, 'refused'), (ODD_ROWS, 'either')):
        for what, row in table.items():
            for ending in ('jsonl', 'json'):
                rows = [fine, row] if rng.random() < 0.5 else [row, fine]
                yield problems_case(f'{ending}: {what}', f'bad.{ending}',
                                    write(f'bad.{ending}', rows_of(rows, ending)), expect, rng)


def problem_lines():
    """Files that are not what their name says: .jsonl, .json, .txt."""
    rng = random.Random('problem lines')
    fine = b'{"question": "4+5-6", "answer": "3"}'
    for what, line in BAD_LINES.items():
        expect = 'either' if what == 'UTF-16' else 'refused'
        for place in (line + b'\n' + fine + b'\n', fine + b'\n' + line):
            yield problems_case(f'jsonl: {what}', 'bad.jsonl', write('bad.jsonl', place), expect, rng)
        yield problems_case(f'json: {what}', 'bad.json', write('bad.json', line), 'refused', rng)
    for what, data in BROKEN_JSON.items():
        yield problems_case(f'json is {what}', 'bad.json', write('bad.json', data), 'refused', rng)
    for ending in ('jsonl', 'json', 'txt', 'parquet', 'csv', 'tsv', 'arrow', 'jsonl.gz', 'csv.gz'):
        for what, data in (('empty', b''), ('blank lines', b'\n\n \n'), ('CR alone', b'\r\r')):
            yield problems_case(f'{ending} is {what}', f'bad.{ending}', write(f'bad.{ending}', data),
                                'either' if what == 'CR alone' else 'refused', rng)
    yield problems_case('jsonl with CRLF', 'bad.jsonl', write('bad.jsonl', (fine + b'\r\n') * 3), 'fine',
                        rng)
    yield problems_case('jsonl with a BOM', 'bad.jsonl', write('bad.jsonl', b'\xef\xbb\xbf' + fine + b'\n'),
                        'either', rng)
    yield problems_case('json with a BOM', 'bad.json', write('bad.json', b'\xef\xbb\xbf[' + fine + b']'),
                        'either', rng)
    for what, data in BAD_TABLES.items():
        yield problems_case(f'csv with {what}', 'bad.csv', write('bad.csv', data), 'refused', rng)
        yield problems_case(f'csv.gz with {what}', 'bad.csv.gz', write('bad.csv.gz', gzip.compress(data)), 'refused', rng)
    table = b'Question,Answer\r\n4+5-6,3\r\n'
    for name, data in (('csv', b'\xef\xbb\xbf' + table), ('csv.gz', gzip.compress(table)), ('tsv', table.replace(b',', b'\t')),
                       ('jsonl.gz', gzip.compress(fine)), ('json.gz', gzip.compress(b'[' + fine + b']'))):
        yield problems_case(f'a good {name} file', f'bad.{name}', write(f'bad.{name}', data), 'fine', rng)
    for name in ('csv', 'jsonl', 'json'):
        yield problems_case(f'{name}.gz of 64 MiB of newlines', f'bad.{name}.gz',
                            lambda folder, name=name: write(f'bad.{name}.gz', gzip.compress(b'\n' * 2**26))(folder), 'refused', rng)

    # A .txt file has questions alone, so it is for training. The prompt is printed: nothing of the line's end may be in it.
    for what, data, absent in (('CRLF', b'1+2-3\r\n4+5-6\r\n', '\\r'),
                               ('a BOM', b'\xef\xbb\xbf1+2-3\n', '\\ufeff'),
                               ('not UTF-8', b'1+2\xff\n', ''),
                               ('UTF-16', '1+2\n'.encode('utf-16'), ''),
                               ('control characters', b'1+2\x1b[31m\n', ''), ('NUL', b'1+\x00\n', ''),
                               ('a line of 2 MB', b'1+' * 10**6, '')):
        refused = what in ('not UTF-8', 'UTF-16', 'a line of 2 MB')
        yield Case('distill.py', [*LINES['distill.py'], 'data=bad.txt'], f'txt with {what}',
                   write('bad.txt', data), 'refused' if refused else 'either', absent=absent)


def parquet(columns):
    """-> a change: bad.parquet holds these columns, {name: values}."""
    def change(folder):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / 'bad.parquet')
    return change


def problem_parquets():
    """Parquet files: cut, with wrong columns, with columns of odd types."""
    rng = random.Random('parquet')
    fine = {'question': ['1+2-3', '4+5-6'], 'answer': ['0', '3']}
    yield problems_case('a good parquet file', 'bad.parquet', parquet(fine), 'fine', rng)
    refused = {'other columns': {'x': ['1']}, 'no rows': {'question': [], 'answer': []},
               'null questions': {'question': [None, '1'], 'answer': ['1', '2']},
               'numbers as questions': {'question': [1, 2], 'answer': ['1', '2']},
               'bytes as questions': {'question': [b'1'], 'answer': ['1']},
               'lists as questions': {'question': [['1']], 'answer': ['1']},
               'structs as questions': {'question': [{'a': 1}], 'answer': ['1']},
               'null answers': {'question': ['1', '2'], 'answer': [None, '1']},
               'lists as answers': {'question': ['1'], 'answer': [['1']]},
               'structs as answers': {'question': ['1'], 'answer': [{'a': 1}]},
               'true as answers': {'question': ['1'], 'answer': [True]},
               'bytes as answers': {'question': ['1'], 'answer': [b'\xff\xfe']},
               'no answers': {'question': ['1']},
               'messages without a role': {'prompt': [[{'content': '1'}]], 'answer': ['1']},
               'no columns': {}}
    for what, columns in refused.items():
        yield problems_case(f'parquet: {what}', 'bad.parquet', parquet(columns), 'refused', rng)
    yield problems_case('parquet: numbers as answers', 'bad.parquet',
                        parquet({'question': ['1+2-3'], 'answer': [7]}), 'either', rng)
    for _ in range(25):
        share = rng.random()
        yield problems_case(f'parquet cut to {share:.2f}', 'bad.parquet',
                            both(parquet(fine), edit('bad.parquet', lambda data,
                                                     share=share: data[:int(share * len(data))])),
                            'refused', rng)
    for number in range(60):
        change = both(parquet(fine), edit('bad.parquet', flip(rng.randrange(2000), rng.randrange(1, 256))))
        yield problems_case(f'parquet with a byte changed, {number}', 'bad.parquet', change, 'either', rng)
    for what, data in (('a text', b'hello'), ('PAR1', b'PAR1PAR1'),
                       ('PAR1 and a length', b'PAR1' + b'\xff\xff\xff\x7f' + b'PAR1'),
                       ('zeros', bytes(10_000))):
        yield problems_case(f'parquet is {what}', 'bad.parquet', write('bad.parquet', data), 'refused', rng)


LOCAL_PATHS = ['out/tyop', 'toy/trian', 'toy/eval', 'toy/nope.jsonl', 'toy/eval.jsnl', './tyop',
               '../tyop/x', 'out/eval.jsonl', 'done/model', 'stage1/nope', 'x.jsonl', 'data/x.jsonl',
               'problems/train.json', 'a/b.parquet', 'a/x.txt', '/tmp/nope/x', '~/data', '~/x.jsonl',
               'C:\\data\\x', 'a\\b', 'toy/student/', 'toy//eval', 'toy/', '/', '.', '..', 'a/b/c',
               'a/b/c@main', 'toy', 'nope', '@', 'a/', '/a', 'a/@', 'file:///x', 'http://example.org/x',
               'https://huggingface.co/a/b', 's3://a/b', 'toy/student/config.json',
               'run/log.jsonl', 'toy/student', 'run', '/dev/null', '/dev/zero', '/dev/stdin',
               '/proc/self/mem', '/proc/self/environ', '/etc/passwd', 'x.csv', 'x.tar.gz', 'out/eval/x',
               'toy/student@main', 'run/last', 'run/lsat', 'secret.txt/x']


def problem_paths():
    """Paths of problem sets that are not there or are something else. What looks local is not asked of a hub."""
    rng = random.Random('problem paths')
    for path in LOCAL_PATHS:
        if path != 'toy':                    # the toy's own problems
            expect = 'either' if path in ('toy/', '.', '..') else 'refused'      # folders with problems in them
            yield problems_case(f'problems at {path}', path, None, expect, rng)
    for ending in ('csv', 'tsv', 'xlsx', 'jsonl.gz', 'JSONL', 'arrow', 'py', 'pkl', 'md', 'x' * 200, ''):
        name = f'bad.{ending}' if ending else 'bad'
        yield problems_case(f'problems in {name[:20]}', name,
                            write(name, b'{"question": "1+2-3", "answer": "0"}\n'),
                            'either' if ending == 'JSONL' else 'refused', rng)
    yield problems_case('an empty folder', 'set', lambda folder: (folder / 'set').mkdir(), 'refused', rng)
    yield problems_case('a folder of pictures', 'set', write('set/x.png', b'x'), 'refused', rng)
    yield Case('distill.py', [*LINES['distill.py'], 'data=set'], 'a folder of held-out problems',
               write('set/test.jsonl', b'{"question": "1", "answer": "1"}\n'))
    for name in ('aime42', 'amie24', 'math500,aime42x', 'AIME-24'):
        yield problems_case(f'problems {name}', name, None, 'refused', rng, hub='math500' in name)       # a set of the hub
    for name in ('nobody/nothing-here', 'nobody/nothing@v1', 'aime24'):
        yield problems_case(f'hub id {name}', name, None, 'refused', rng, hub=True)
    yield problems_case('a path that is a loop', 'loop.jsonl', link('loop.jsonl', 'loop.jsonl'), 'refused',
                        rng)


def model_paths():
    """Paths of models that are not there or are something else."""
    rng = random.Random('model paths')
    for path in LOCAL_PATHS:
        if path in ('toy', 'toy/student', 'toy/student/', 'run/last'):
            continue                         # a model
        for script, key in (('distill.py', 'student'), ('distill.py', 'teacher'), ('eval_math.py', 'student'),
                            ('bridge.py', 'teacher'), ('minimal.py', 'student')):
            if rng.random() < 0.5:
                yield Case(script, [*LINES[script], f'{key}={path}'], f'{key} at {path}')
    for name in ('nobody/nothing-here', 'nobody/nothing@v1', 'Qwen/Qwen3-4B'):
        yield Case('eval_math.py', [*LINES['eval_math.py'], f'student={name}'], f'hub id {name}', hub=True)
    yield Case('eval_math.py', [*LINES['eval_math.py'], 'student=empty'], 'an empty folder',
               lambda folder: (folder / 'empty').mkdir())


# ---- bridges, runs, evaluations ---------------------------------------------------------------

def bridge_files():
    """bridge.safetensors of wrong shapes, types and fingerprints, read by a dry run of distill.py."""
    rng = random.Random('bridge files')
    file = 'stage1/bridge.safetensors'

    def case(what, change, expect='refused'):
        line = WITH_BRIDGE if rng.random() < 0.7 else [*[arg for arg in WITH_BRIDGE if arg != '--dry-run'],
                                                       'steps=1']
        return Case('distill.py', line, f'bridge: {what}', change, expect)
    for what, function, expect in tensor_changes():
        for name in ('mean.1', 'P_t.2', 'P_s.3', 'b_s.1'):
            if what == 'as float64':
                expect = 'either'
            yield case(f'{name} {what}', edit_tensors(file, lambda tensors, name=name,
                                                      function=function: tensors.update({name: function(tensors[name])})), expect)
    for name in ('mean.1', 'P_t.2', 'P_s.3', 'b_s.1'):
        yield case(f'{name} missing', edit_tensors(file, lambda tensors, name=name: tensors.pop(name)))

    def made(function):
        """-> a change of the fingerprint."""
        def metadata(old):
            about = json.loads(old['bridge'])
            result = function(about)
            return {'bridge': json.dumps(about if result is None else result)}
        return edit_tensors(file, lambda tensors: None, metadata)
    for key in ('student', 'teacher', 'd', 'L', 'tokens', 'pair', 'teacher_ids', 'layer_map', 'phi', 'rank',
                'ranks'):
        for value in (None, 5, 'x', [], {}, -1, [1], True, RED * 5, 'x' * 10_000, MISSING, NAN):
            used = key not in ('rank', 'ranks')          # bridge_rank is given, so these may not be read
            def change(about, key=key, value=value):
                about[key] = value
                if value is MISSING:
                    del about[key]
            yield case(f'{key}={label(value)}', made(change), 'refused' if used else 'either')
    for phi in ({'1': 1}, {'1': 9, '2': 2, '3': 4}, {'1': -1, '2': 2, '3': 4}, {'1': 'x', '2': 2, '3': 4},
                {'1': None, '2': 2, '3': 4}, {'1': 1.5, '2': 2, '3': 4}, {'x': 1},
                {'1': [1], '2': 2, '3': 4}, {'1': True, '2': 2, '3': 4}, {'1': 0, '2': 2, '3': 4}):
        yield case(f'phi={label(phi)}', made(lambda about, phi=phi: about.update(phi=phi)))
    for what, value in (('no metadata', None), ('empty metadata', {}), ('not JSON', {'bridge': 'x'}),
                        ('a list', {'bridge': '[]'}), ('null', {'bridge': 'null'}),
                        ('deep', {'bridge': deep(100_000)})):
        yield case(what, edit_tensors(file, lambda tensors: None, lambda old,
                                      value=value: value or {'x': 'y'}))
    for share in (0.0, 0.1, 0.5, 0.99):
        yield case(f'cut to {share}', edit(file, lambda data, share=share: data[:int(share * len(data))]))
    yield case('missing', remove(file))
    for rank in (5000, 10**9, 10**18):
        yield Case('distill.py', [*WITH_BRIDGE, f'bridge_rank={rank}'], f'bridge_rank={rank}')
    for more in ('pair=exact', 'layers=[1]', 'student=toy/teacher', 'teacher=toy/teacher',
                 'teacher_ids=student'):
        yield Case('distill.py', [*WITH_BRIDGE, more], f'another bridge: {more}',
                   expect='either' if more == 'layers=[1]' else 'refused')


def edit_rows(name, function):
    """-> a change: the rows of a .jsonl file (parsed) go through a function, which changes the list that it is given. Rows
    that carried a checksum get a new one: the fields are to be judged, and not the damage."""
    def through(data):
        rows = [json.loads(line) for line in data.splitlines()]
        checked = any([isinstance(row, dict) and row.pop('crc', None) for row in rows])
        function(rows)
        lines = []
        for row in rows:
            if checked and isinstance(row, dict):
                row = row | {'crc': f'{zlib.crc32(json.dumps(row).encode()):08x}'}
            lines.append(json.dumps(row) + '\n')
        return ''.join(lines).encode()
    return edit(name, through)


def set_column(row, column, value):
    """Change a column of a row of rollouts.jsonl, by its number or by its name."""
    row[column if isinstance(row, list) else ('problem', 'ids', 'stopped')[column]] = value


def rollouts():
    """rollouts.jsonl of bridge.py: doubled, dropped and foreign rows, ids that no token has, wrong types."""
    file = 'stage1/rollouts.jsonl'
    line = LINES['bridge.py']

    def case(what, function, expect='refused'):
        return Case('bridge.py', line, f'rollouts: {what}', edit_rows(file, function), expect)
    yield case('a row doubled', lambda rows: rows.insert(2, rows[2]))
    yield case('a row dropped', lambda rows: rows.pop(3))
    yield case('two rows exchanged', lambda rows: rows.__setitem__(slice(1, 3), rows[2:0:-1]))
    yield case('the last row dropped', lambda rows: rows.pop(), 'fine')
    yield case('a row too many', lambda rows: rows.append(rows[-1]))
    yield case('no head', lambda rows: rows.pop(0))
    for head in ({}, [], None, 5, 'x', {'made by': None}, {'made by': RED}):
        yield case(f'head {label(head)}', lambda rows, head=head: rows.__setitem__(0, head))
    for row in ([], {}, None, 5, 'x', [0], [0, [1]], [0, [1], True, 1], [[0], [1], True], RED):
        yield case(f'row {label(row)}', lambda rows, row=row: rows.__setitem__(2, row))
    columns = {0: [-1, 10**9, '0', None, 1.5, True, [], 99], 1: [[], [-1], [10**9], [25], ['1'], [1.5],
                                                                 [None], [True], 'x', 5, None, {}, [[1]],
                                                                 [10**30], [1] * 500, {'a': 1}],
               2: ['x', None, 5, [], 'true', 1.5, NAN]}
    for column, values in columns.items():
        for value in values:
            yield case(f'column {column}={label(value)}', lambda rows, column=column,
                       value=value: set_column(rows[3], column, value))
    yield case('a float as a number', lambda rows: set_column(rows[3], 0, 3.0))
    for what, data in BAD_LINES.items():
        for number in (0, 2):
            def through(text, data=data, number=number):
                lines = text.splitlines()
                lines[number] = data.replace(b'\n', b'')
                return b'\n'.join(lines) + b'\n'
            yield Case('bridge.py', line, f'rollouts: line {number} is {what}', edit(file, through))
    yield Case('bridge.py', line, 'rollouts: a folder',
               both(remove(file), lambda folder: (folder / file).mkdir()))
    yield Case('bridge.py', line, 'rollouts: empty', write(file, b''), 'fine')


def samples():
    """samples.jsonl of eval_math.py: doubled, dropped and foreign rows, wrong types."""
    rng = random.Random('samples')
    pattern = 'out/eval/*/samples.jsonl'

    def case(what, change, expect='refused'):
        more = rng.choice([[], ['--regrade'], ['--dry-run']])
        if more == ['--dry-run'] and expect == 'fine':
            more = []
        if more == ['--regrade'] and what.startswith('correct'):
            expect = 'either'                # it is made anew
        return Case('eval_math.py', [*real('eval_math.py'), *more], f'samples: {what} {" ".join(more)}',
                    found(pattern, change), expect)

    def rows(function):
        return lambda name: edit_rows(name, function)
    yield case('a row doubled', rows(lambda rows: rows.append(rows[0])), 'either')
    yield case('a row doubled with another verdict',
               rows(lambda rows: rows.append(rows[0] | {'correct': not rows[0]['correct'],
                                                        'text': 'other'})))
    yield Case('eval_math.py', real('eval_math.py'), 'samples: a row dropped',
               found(pattern, rows(lambda rows: rows.pop(3))), 'fine')
    yield Case('eval_math.py', [*real('eval_math.py'), '--regrade'], 'samples: a row dropped, --regrade',
               found(pattern, rows(lambda rows: rows.pop(3))))
    for key, values in {'set': ['x', None, 5, [], {}, RED],
                        'problem': [-1, 99, '0', None, 1.5, [], {}, 10**30],
                        'sample': [-1, 99, '0', None, 1.5, [], {}],
                        'correct': ['yes', None, 5, [], NAN, 0.5],
                        'length': [-1, 'x', None, 1.5, [], NAN, 10**30], 'stopped': ['x', None, 5, []],
                        'text': [5, None, [], {}],
                        'extracted': [5, [], {}, True], 'seed': [5, None, 'x'],
                        'answer': ['foreign', None, 5], 'ids': ['x', 5, None, [-1], ['1'], [10**9]],
                        'prompt': ['foreign', None]}.items():
        for value in [*values, MISSING]:
            def function(rows, key=key, value=value):
                rows[1][key] = value
                if value is MISSING:
                    del rows[1][key]
            # A verdict that is missing can be made again; what is not read may be anything.
            expect = 'either' if key in ('extracted', 'prompt', 'ids', 'seed',
                                         'answer') or value in (0.5, 10**30) else 'refused'
            yield case(f'{key}={label(value)}', rows(function), expect)
    for row in ([], None, 5, 'x', {}, RED):
        yield case(f'row {label(row)}', rows(lambda rows, row=row: rows.__setitem__(1, row)))
    for what, data in BAD_LINES.items():
        def through(text, data=data):
            lines = text.splitlines()
            lines[1] = data.replace(b'\n', b'')
            return b'\n'.join(lines) + b'\n'
        yield case(f'line 2 is {what}', lambda name, through=through: edit(name, through))
    for what, data in BROKEN_JSON.items():
        yield Case('eval_math.py', real('eval_math.py'), f'results.json of an evaluation is {what}',
                   found('out/eval/*/results.json', lambda name, data=data: write(name, data)), 'either')


def results():
    """results.json of a finished run, which distill.py shows."""
    line = [*real('distill.py'), 'out_dir=done']
    file = 'done/results.json'
    for what, data in BROKEN_JSON.items():
        yield Case('distill.py', line, f'results.json is {what}', write(file, data))
    for key in ('steps', 'student', 'teacher', 'distilled', 'rep_cos', 'seconds'):
        for value in (None, 5, 'x', [], {}, True, NAN, [1], MISSING, RED, {'avg@1': 'x'}, 'x' * 10_000):
            yield Case('distill.py', line, f'results.json {key}={label(value)}', set_key(file, key, value),
                       'either')


def resume():
    """What a run reads when it goes on: resume.json, config.json, log.jsonl, the weights, the link to the newest ones."""
    line = [*real('distill.py'), 'out_dir=run']

    def case(what, change, expect='either'):
        return Case('distill.py', line, f'resume: {what}', change, expect, seconds=3.0)
    # The previous checkpoint may be taken where the newest is damaged.
    for what, data in BROKEN_JSON.items():
        yield case(f'resume.json is {what}', found('run/ckpt-*/**/resume.json', lambda name,
                                                   data=data: write(name, data)))
        yield case(f'config.json is {what}', write('run/config.json', data), 'refused')
    for key in ('step', 'elapsed'):
        for value in (None, 'x', -1, 10**9, 10**30, NAN, True, 1.5, [], {}, MISSING, 0, INF):
            yield case(f'resume.json {key}={label(value)}', found('run/ckpt-*/**/resume.json', lambda name,
                                                                  key=key, value=value: set_key(name, key, value)))
    for value in (None, [], 5, 'x', {}, MISSING, {'steps': 'x'}, RED):
        yield case(f'config.json config={label(value)}', set_key('run/config.json', 'config', value),
                   'refused')
    for key, value in (('lr', 'x'), ('lr', None), ('seed', 5), ('n', [1]), ('student', RED),
                       ('opd', 'x' * 10_000), ('beta1', NAN), ('data', {'a': 1})):
        yield case(f'config.json {key}={label(value)}', set_key('run/config.json', f'config/{key}', value),
                   'either' if key == 'lr' else 'refused')
    for function, what in ((lambda rows: rows.pop(), 'the last row gone'),
                           (lambda rows: rows.pop(0), 'the first row gone'),
                           (lambda rows: rows.pop(1), 'a row gone'),
                           (lambda rows: rows.append(rows[-1]), 'a row doubled'),
                           (lambda rows: rows.clear(), 'all rows gone'),
                           (lambda rows: rows.insert(1, {}), 'an empty row'),
                           (lambda rows: rows.insert(1, 5), 'a number'),
                           (lambda rows: rows.insert(1, []), 'a list'),
                           (lambda rows: rows.insert(1, None), 'null'),
                           (lambda rows: rows[1].pop('loss'), 'no loss'),
                           (lambda rows: rows[0].pop('eval/avg@1'), 'no accuracy'),
                           (lambda rows: rows[1].update(step='x'), 'step x'),
                           (lambda rows: rows[1].update(step=None), 'step null'),
                           (lambda rows: rows[2].update({'rep/cos': 'x'}), 'a cosine that is a text'),
                           (lambda rows: rows[2].update({'rep/cos/1': [5]}), 'a layer that is a list'),
                           (lambda rows: rows[0].update(student={'avg@1': 1.0}), 'a name of earlier versions'),
                           (lambda rows: rows[0].update({'eval/avg@1': []}), 'an accuracy that is a list'),
                           (lambda rows: rows[0].update({'teacher/avg@1': 'x'}),
                            'an accuracy that is a text')):
        yield case(f'log.jsonl with {what}', edit_rows('run/log.jsonl', function))
    for what, data in BAD_LINES.items():
        yield case(f'log.jsonl is {what}', write('run/log.jsonl', data + b'\n'))
    for share in (0.0, 0.3, 0.9):
        yield case(f'resume state cut to {share}', found('run/ckpt-*/**/*.safetensors',
                                                      lambda name, share=share: edit(name, lambda data: data[:int(share * len(data))])))
    # Files that a run may have or not.
    for pattern in ('run/starts.jsonl', 'run/ckpt-*/log.jsonl'):
        for what in ('cut', 'not UTF-8', 'deep lists', 'binary', 'plain text'):
            yield case(f'{pattern} is {what}', found(pattern, lambda name, what=what: write(name, BAD_LINES[what] + b'\n'), False))
        for value in (5, [], None, 'x', {}):
            yield case(f'{pattern} holds {label(value)}', found(pattern, lambda name, value=value: write(name, [value]), False))
    yield case('last links to itself', link('run/last', 'last'))
    yield case('last links to nothing', link('run/last', 'nowhere/model'))
    yield case('last is a file', write('run/last', b'x'))
    yield case('last leads elsewhere', link('run/last', '../toy/student'))
    yield case('no config.json', remove('run/config.json'), 'refused')


# ---- folders, studies, figures ----------------------------------------------------------------

def folders():
    """Folders to write into that cannot be made, are no folders, or hold something else."""
    never = ['/proc/x', '/proc', '/proc/self/x', '/dev/null', '/dev/null/x', '/sys/x', '/sys/kernel/x',
             'secret.txt', 'secret.txt/x', 'x' * 300, 'a/' + 'x' * 300, 'loop', 'loop/x',
             'toy', 'toy/student', '/' + 'x' * 5000]
    maybe = [f'out/{RED}', 'out/\u202e', 'out/a\nb', 'out/\udcff', 'out/a/b/c/d', 'out/ ', ' ', 'out/x=y',
             'gone/x', '.', '~', 'out/..', 'out/\x07', 'out/-', '-']
    change = both(link('loop', 'loop'), link('gone', 'nowhere'))
    for path in never:
        yield Case('distill.py', [*LINES['distill.py'], f'out_dir={path}'],
                   f'out_dir={path[:30]} (dry run)', change)
        yield Case('distill.py', [*real('distill.py'), f'out_dir={path}', 'steps=1'],
                   f'out_dir={path[:30]}', change)
        if not path.startswith('toy'):
            yield Case('bridge.py', [*LINES['bridge.py'], f'bridge={path}'], f'bridge={path[:30]}', change)
            yield Case('studies/toy.py', [*LINES['studies/toy.py'], f'toy_dir={path}'],
                       f'toy_dir={path[:30]}', change)
            yield Case('distill.py', ['configs/toy.py', f'toy_dir={path}', '--dry-run'],
                       f'toy_dir={path[:30]} (dry run of distill.py)', change)
    for path in maybe:
        yield Case('distill.py', [*LINES['distill.py'], f'out_dir={path}'], f'out_dir={path!r} (dry run)',
                   change, 'either')
        yield Case('distill.py', [*real('distill.py'), f'out_dir={path}', 'steps=1'], f'out_dir={path!r}',
                   change, 'either')
        yield Case('bridge.py', [*LINES['bridge.py'], f'bridge={path}'], f'bridge={path!r}', change,
                   'either')
    for dry in ([], ['--dry-run']):
        yield Case('distill.py', [*real('distill.py'), 'out_dir=', *dry], f'out_dir= with nothing {dry}')
        yield Case('distill.py', ['configs/toy.py', 'toy_dir=', *TINY_TOY, *dry],
                   f'toy_dir= with nothing {dry}', expect='either')

    # eval_math.py writes to out/eval.
    for name in ('out', 'out/eval'):
        def blocked(folder, name=name):
            os.rename(folder / name, folder / 'moved')
            (folder / name).write_text('x')
        yield Case('eval_math.py', [*real('eval_math.py'), 'seed=1'], f'{name} is a file', blocked)
        looped = both(lambda folder, name=name: os.rename(folder / name, folder / 'moved'),
                      link(name, os.path.basename(name)))
        yield Case('eval_math.py', [*real('eval_math.py'), 'seed=1'], f'{name} links to itself', looped)
    yield Case('distill.py', [*real('distill.py'), 'out_dir=out/mine'], 'a folder with files of its owner',
               write('out/mine/ckpt-notes.txt', b'x'))
    yield Case('distill.py', [*LINES['distill.py'], 'out_dir=out/mine'],
               'a folder with files of its owner (dry run)', write('out/mine/notes.txt', b'x'))


STUDIES = {
    'no seeds': 'runs = {}', 'no runs': 'seeds = [0]', 'empty': '', 'binary': b'\x7fELF\x00\xff',
    'syntax': 'seeds = [', 'raises': '1 / 0', 'raises a long text': 'raise ValueError("x" * 10**5)',
    'raises control characters': 'raise ValueError("\\x1b[31m")', 'ends the process': 'raise SystemExit(0)',
    'seeds is a number': 'seeds = 3\nruns = {"a": ["configs/toy.py"]}',
    'seeds is a text': 'seeds = "ab"\nruns = {"a": ["configs/toy.py"]}',
    'no seed': 'seeds = []\nruns = {"a": ["configs/toy.py"]}',
    'a negative seed': 'seeds = [-1]\nruns = {"a": ["configs/toy.py"]}',
    'seeds of None': 'seeds = [None]\nruns = {"a": ["configs/toy.py"]}',
    'a seed twice': 'seeds = [0, 0]\nruns = {"a": ["configs/toy.py"]}', 'no run': 'seeds = [0]\nruns = {}',
    'runs is a list': 'seeds = [0]\nruns = [1]', 'runs is a text': 'seeds = [0]\nruns = "x"',
    'arguments are a text': 'seeds = [0]\nruns = {"a": "configs/toy.py"}',
    'arguments are numbers': 'seeds = [0]\nruns = {"a": [1, 2]}',
    'arguments are None': 'seeds = [0]\nruns = {"a": None}',
    'names are numbers': 'seeds = [0]\nruns = {1: ["configs/toy.py"]}',
    'an unknown key': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "stepz=3"]}',
    'a long unknown key': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "x" * 10**5 + "=3"]}',
    'an open brace': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "bridge={"]}',
    'an unknown brace': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "bridge={nope}"]}',
    'braces with a position': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "bridge={0}"]}',
    'braces with an attribute': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "bridge={x.__class__}"]}',
    'no eval_data': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "eval_data="]}',
    'two names of one folder': 'seeds = [0]\nruns = {"a b": ["configs/toy.py"], "a_b": ["configs/toy.py"]}',
    'runs that cannot be compared': 'seeds = [0]\nruns = {"a": ["configs/toy.py"], "b": ["configs/toy.py", "eval_n=3"]}', 'control characters': 'seeds = [0]\nruns = {"\\x1b[31m": ["stepz=1"]}',
    'a long name': 'seeds = [0]\nruns = {"a" * 5000: ["configs/toy.py"]}',
    'bridges is a list': 'seeds = [0]\nbridges = [1]\nruns = {"a": ["configs/toy.py"]}',
    'bridges of None': 'seeds = [0]\nbridges = {"b": None}\nruns = {"a": ["configs/toy.py"]}',
    'a bridge with an unknown key': 'seeds = [0]\nbridges = {"b": ["stepz=1"]}\nruns = {"a": ["configs/toy.py"]}',
    'panels is a list': 'seeds = [0]\nruns = {"a": ["configs/toy.py"]}\npanels = [1]',
    'panels with a foreign name': 'seeds = [0]\nruns = {"a": ["configs/toy.py"]}\npanels = {"x": ["nope"]}',
    'panels without names': 'seeds = [0]\nruns = {"a": ["configs/toy.py"]}\npanels = {"x": []}',
    'a config that is not there': 'seeds = [0]\nruns = {"a": ["configs/tyo.py"]}',
    'out_dir of its own': 'seeds = [0]\nruns = {"a": ["configs/toy.py", "steps=x", "out_dir=x"]}',
    'a run that asks for help': 'seeds = [0]\nruns = {"a": ["--help"]}',
}


def studies():
    """studies.compare: study files that are broken. They must be refused before any run is started."""
    for what, text in STUDIES.items():
        may_pass = what in ('a run that asks for help', 'a seed twice')
        yield Case('studies/compare.py', ['mine.py'], f'study: {what}', write('mine.py', text),
                   'either' if may_pass else 'refused')
    for args in ([], ['a', 'b'], ['-x'], [''], ['nope'], ['toy_comparisn'], ['configs/toy.py'], ['toy'],
                 ['/'], ['/dev/null'], [RED], ['x' * 5000], ['\udcff'], ['toy/train.jsonl'], ['a\nb'],
                 ['.'], ['--steps=3'], ['toy/student/model.safetensors'], ['\u202e']):
        yield Case('studies/compare.py', args, f'arguments {[arg[:20] for arg in args]}')


LOG_CHANGES = {
    'row 0 without models': lambda rows: rows[0].clear(),
    'student null': lambda rows: rows[0].update(student=None),
    'student an object': lambda rows: rows[0].update(student={'avg@1': 1.0}),
    'no accuracies': lambda rows: [row.pop('eval/avg@1') for row in rows],
    'no teacher': lambda rows: [row.pop(name) for row in rows for name in list(row) if name.startswith('teacher/')],
    'teacher without accuracies': lambda rows: rows[0].update({'teacher/avg@1': None}),
    'an accuracy null': lambda rows: rows[0].update({'eval/avg@1': None}),
    'an accuracy a text': lambda rows: rows[0].update({'eval/avg@1': 'x'}),
    'an accuracy a list': lambda rows: rows[0].update({'eval/avg@1': [1]}),
    'a metric with control characters': lambda rows: [row.update({f'eval/avg@{RED}': 1.0, f'teacher/avg@{RED}': 2.0})
                                                      for row in rows],
    'a cosine null': lambda rows: rows[1].update({'rep/cos': None}),
    'a cosine a text': lambda rows: rows[1].update({'rep/cos': 'x'}),
    'a layer a list': lambda rows: rows[1].update({'rep/cos/1': [5]}),
    'no layers': lambda rows: [row.pop(name) for row in rows for name in list(row) if name.startswith('rep/cos/')],
    'a layer gone': lambda rows: rows[1].pop('rep/cos/1'),
    'a layer null': lambda rows: rows[1].update({'rep/cos/1': None}),
    'a layer a text': lambda rows: rows[1].update({'rep/cos/1': 'a'}),
    'a step null': lambda rows: rows[1].update(step=None),
    'a step a text': lambda rows: rows[1].update(step='x'), 'no step': lambda rows: rows[1].pop('step'),
    'rows exchanged': lambda rows: rows.reverse(), 'one row': lambda rows: rows.__delitem__(slice(1, None)),
    'no rows': lambda rows: rows.clear(), 'a list as a row': lambda rows: rows.__setitem__(1, [1]),
    'a number as a row': lambda rows: rows.__setitem__(0, 5),
    'null as a row': lambda rows: rows.__setitem__(1, None),
    'NaN': lambda rows: rows[1].update({'rep/cos': NAN, 'eval/avg@1': NAN}),
    'infinite': lambda rows: rows[1].update({'rep/cos': INF, 'eval/avg@1': INF}),
    'a huge step': lambda rows: rows[2].update(step=10**30),
    'a huge accuracy': lambda rows: rows[2].update({'eval/avg@1': 1e308}),
    'a number of 400 digits': lambda rows: rows[2].update({'eval/avg@1': 10**400}),
}


def figure_folders():
    """studies.figures: run and bridge folders that are broken."""
    script = 'studies/figures.py'
    for what, function in LOG_CHANGES.items():
        yield Case(script, ['run'], f'log.jsonl with {what}', edit_rows('run/log.jsonl', function),
                   'refused' if what in ('one row', 'no rows') else 'either')
    for what, data in BAD_LINES.items():
        yield Case(script, ['run'], f'log.jsonl is {what}', write('run/log.jsonl', data + b'\n'))
    for args in ([], ['-x'], [''], ['nope'], ['secret.txt'], ['/'], ['toy'], ['run', 'nope'],
                 ['run', 'stage1'], [RED], ['x' * 5000], ['\udcff'], ['a\nb'], ['/dev/null'],
                 ['run/log.jsonl'], ['\u202e'],
                 ['run', ''], ['--steps=3'], ['run', '-x']):
        yield Case(script, args, f'arguments {[arg[:20] for arg in args]}')
    for what, data in BROKEN_JSON.items():
        yield Case(script, ['stage1'], f'bridge.json is {what}', write('stage1/bridge.json', data))
        yield Case(script, ['run', 'done'], f'config.json is {what}', write('run/config.json', data),
                   'either' if what in ('empty object', 'a number of 10,000 digits') else 'refused')
    for key in ('layers', 'used', 'rank'):
        for value in (None, 5, 'x', [], {}, True, {'x': {}}, {'1': {}}, {'1': 5}, {'1': {'cos': {}}},
                      {'1': {'cos': {'x': 1}}}, MISSING, RED, NAN, -1, 10**30, {'1': {'cos': 5}}):
            yield Case(script, ['stage1'], f'bridge.json {key}={label(value)}',
                       set_key('stage1/bridge.json', key, value),
                       'refused' if key == 'layers' or value is MISSING else 'either')
    for key, value in (('eval_n', 5), ('student', RED), ('eval_data', 'x' * 10_000),
                       ('eval_temperature', [1]), ('student', None)):
        yield Case(script, ['run', 'done'], f'config.json {key}={label(value)}',
                   set_key('run/config.json', f'config/{key}', value), 'refused')
    for value in (None, [], 5, 'x'):
        yield Case(script, ['run', 'done'], f'config.json config={label(value)}',
                   set_key('run/config.json', 'config', value), 'refused')


def bench_arguments():
    """studies.bench: arguments alone."""
    for line in ('', 'nope', 'loss --rows x', 'loss --rows 0', 'loss --rows -1', 'loss --tokens 1.5',
                 'loss --model nope', 'loss --repeat 0', 'loss --chunk -1', 'loss --chunk x',
                 'loss --case nope', 'loss --device nope',
                 'loss --device cuda', 'loss --device mps', 'loss --dtype nope', 'loss --nope',
                 'loss extra', 'decode --batch', 'decode --batch 0', 'decode --context x',
                 'decode --batch 1 x',
                 'pair', 'pair --tokenizers nope', 'pair --tokenizers out/nope toy/nope',
                 'pair --tokenizers toy/student toy/teacher --data nope.jsonl',
                 'bridge --rows x', 'head --rows nan', 'rollout --batch -1', 'step --rows 1e3',
                 'update --budget x', 'loss --rows 9999999999999999999999x', '--rows 3', f'{RED}',
                 'loss --model \x07', 'pair --tokenizers toy/student toy/student'):
        yield Case('studies/bench.py', line.split(), f'arguments {line[:40]!r}')
    for args in (['x'], ['--nope'], ['steps=3'], [RED], ['a', 'b']):
        yield Case('studies/fixed_points.py', args, f'arguments {args}')


# ---- all of them ------------------------------------------------------------------------------

KINDS = [good, unknown_keys, unread_keys, wrong_types, out_of_range, huge_numbers, odd_text, command_lines, config_files,
         cross_keys, teachers, model_config, generation_config, tokenizer_files, tokenizer_config, templates, weights,
         index_files, links, problem_rows, problem_lines, problem_parquets, problem_paths, model_paths,
         bridge_files, rollouts, samples, results, resume, folders, studies, figure_folders,
         bench_arguments]


def all_cases():
    """Every case, in an order in which the kinds take turns; within a kind the order is shuffled, always alike."""
    waiting = []
    for kind in KINDS:
        cases = [replace(case, kind=kind.__name__) for case in kind()]
        random.Random(kind.__name__).shuffle(cases)
        waiting.append(cases)
    ordered = []
    while any(waiting):
        for cases in waiting:
            if cases:
                ordered.append(cases.pop())
    return ordered
