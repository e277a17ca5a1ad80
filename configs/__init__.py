"""
argv -> one checked dict:  script.py configs/toy.py lr=1e-3 --steps=50 --dry-run

A config file is ordinary Python that ends with a dict called `config`, made from
configs/default.py. Keys are checked here, once: unknown names, wrong types and values out of range
are one-line errors, so that nothing downstream looks at the config with suspicion.
"""
import ast
import difflib
import re
import sys
from pathlib import Path

from configs.default import checks, free, later
from configs.default import config as default
from support import fields
from support.fields import Field
from support.runtime import ROOT, UserError, cut, run_file, shown

__all__ = ['load_config', 'checks', 'default', 'free', 'later']

# What a list may hold, and what is said of another one: layer numbers, or the knots of a schedule.
LAYERS = Field(list, 1, 1000, items=Field(int, 1, 1000))
KNOTS = Field(list, 1, 1000, items=Field(list, 2, 2, items=Field(float, 0, 1e6)))
LISTS = {str: 'give a list of layer numbers from 1, such as [1,2]',
         float: 'give knots [[share of the run, weight], ...] with ascending shares from 0 to 1, such as '
                '[[0,1],[0.5,0]]'}


def load_config(argv=None):
    """The checked config of a command line (default: sys.argv[1:]) -> dict with every key there is.

    argv: at most one path of a config file, found from the current folder or from the project's;
    `key=value` or `--key=value`; a bare `--key` sets a switch. `--help` prints the keys and exits.
    Raises UserError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if '-h' in argv or '--help' in argv:
        print('usage: script.py [configs/x.py] [key=value ...]\n')
        print((ROOT / 'configs/default.py').read_text().split('\n)\n')[0] + '\n)', flush=True)
        raise SystemExit(0)
    files = [a for a in argv if '=' not in a and not a.startswith('-')]
    if len(files) > 1:
        raise UserError(f'{files[1]}: a second config file, after {files[0]}; give one, then key=value')
    cfg = check(read_config_file(files[0]), files[0]) if files else dict(default)
    for arg in argv:
        if arg not in files:
            key, eq, text = arg.removeprefix('--').partition('=')
            key = key if eq else key.replace('-', '_')
            if not eq and not (key in default and isinstance(default[key], bool)):
                raise UserError(f'{cut(arg, 60)}: not key=value, and not a switch; see --help')
            cfg[key] = parse(key, text) if eq else True
    cfg = check(cfg, 'command line')
    if cfg['ranks'] and not cfg['dry_run']:
        raise UserError(f'ranks={cfg["ranks"]}: belongs to --dry-run; torchrun --nproc_per_node= starts '
                        'ranks')
    return cfg


def read_config_file(name):
    """Run a config file -> its `config` dict."""
    path = next((p for p in (Path(name), ROOT / name) if p.is_file()), None)
    if path is None:
        known = [p.stem for p in (ROOT / 'configs').glob('[a-z]*.py')]
        near = difflib.get_close_matches(Path(name).stem, known, 1)
        raise UserError(f'{name}: no such config file' +
                        (f'; did you mean configs/{near[0]}.py?' if near else f'; try {", ".join(known)}'))
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))        # so that it can say `from configs.default import config`
    cfg = run_file(path, name, 'config file').get('config')
    if not isinstance(cfg, dict):
        raise UserError(f'{name}: no dict called `config` in it; see configs/toy.py')
    return dict(cfg)


def parse(key, text):
    """The Python value of `text`, except where the key's default is a plain string."""
    if isinstance(default.get(key), str) and list not in checks.get(key, ()):
        return text
    try:
        return ast.literal_eval(text)        # literals only: numbers, True, lists, strings
    except (ValueError, SyntaxError, MemoryError, RecursionError):           # the last two: deep nesting
        return text


def check(cfg, where):
    """cfg, with every key there is, each of the right type and in range; else UserError."""
    checked = dict(default)
    for key, value in cfg.items():
        if key not in default:
            near = difflib.get_close_matches(str(key)[:60], default, 1)
            hint = f'did you mean {near[0]!r}?' if near else 'see --help for all keys'
            raise UserError(f'{where}: unknown key {shown(key)}; {hint}')
        checked[key] = check_value(key, value, where)
    return checked


def check_value(key, value, where):
    """The value of a key, a float where the default is one; else UserError. where: the file it is in."""
    like, rule = default[key], checks.get(key)
    told = f'{where}: {key}={shown(value)}'
    if isinstance(like, float) and type(value) is int:
        value = float(max(-1e300, min(value, 1e300)))        # larger ones would overflow; no range holds them

    # Lists: of layer numbers, or the knots of a schedule.
    if isinstance(value, list) and list in (rule or ()):
        is_schedule = isinstance(like, float)
        fields.check_value(value, KNOTS if is_schedule else LAYERS, f'{where}: {key}', LISTS[type(like)])
        shares = [share for share, _ in value] if is_schedule else []
        if shares != sorted(shares) or max(shares, default=0) > 1:
            raise UserError(f'{told}; {LISTS[float]}')
        return value

    # One type, and one range or a few words.
    if type(value) is not type(like):
        raise UserError(f'{told} is {type(value).__name__}, but {key} is {type(like).__name__} '
                        f'(default {like!r})')
    if isinstance(value, (int, float)) and rule and not rule[0] <= value <= rule[1]:
        raise UserError(f'{told} is out of range; choose {rule[0]:g} to {rule[1]:g}')
    if key in ('temperature', 'eval_temperature') and 0 < value < 1e-3:
        raise UserError(f'{told}: logits divided by it overflow; choose 0 (greedy), or 1e-3 and more')
    if isinstance(value, str) and rule and value not in rule:
        words = ', '.join(repr(w) if isinstance(w, str) else 'a list of numbers' for w in rule)
        raise UserError(f'{told}; choose one of {words}')
    if isinstance(value, str) and re.search('[\0\ud800-\udfff]', value):
        raise UserError(f'{told}: no text in UTF-8; remove the characters that are shown as escapes')
    return value
