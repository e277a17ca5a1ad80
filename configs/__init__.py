"""
argv -> one checked dict:  script.py configs/toy.py lr=1e-3 --steps=50 --dry-run

A config file is ordinary Python that ends with a dict called `config`, made from
configs/default.py. Keys are checked here, once: unknown names, wrong types and values out of range
are one-line errors, so that nothing downstream looks at the config with suspicion.
"""
import ast
import difflib
import runpy
import sys
from pathlib import Path

from configs.default import checks, free
from configs.default import config as default
from support.runtime import ROOT, UserError

__all__ = ['load_config', 'checks', 'default', 'free']


def load_config(argv=None):
    """The checked config of a command line (default: sys.argv[1:]) -> dict with every key there is.

    argv: at most one path of a config file, found from the current folder or from the project's;
    `key=value` or `--key=value`; a bare `--key` sets a switch. `--help` prints the keys and exits.
    Raises UserError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if '-h' in argv or '--help' in argv:
        print('usage: script.py [configs/x.py] [key=value ...]\n')
        print((ROOT / 'configs/default.py').read_text().split('\ninf = ')[0])
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
                raise UserError(f'{arg}: not key=value, and not a switch; see --help')
            cfg[key] = parse(key, text) if eq else True
    cfg = check(cfg, 'command line')
    if cfg['ranks'] and not cfg['dry_run']:
        raise UserError(f'ranks={cfg["ranks"]}: belongs to --dry-run; torchrun starts ranks')
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
    try:
        cfg = runpy.run_path(str(path)).get('config')
    except Exception as e:                   # the file is the user's own Python: say where it broke
        raise UserError(f'{name}: {type(e).__name__}: {e}; mend the config file') from None
    if not isinstance(cfg, dict):
        raise UserError(f'{name}: no dict called `config` in it; see configs/toy.py')
    return dict(cfg)


def parse(key, text):
    """The Python value of `text`, except where the key's default is a plain string."""
    if isinstance(default.get(key), str) and list not in checks.get(key, ()):
        return text
    try:
        return ast.literal_eval(text)        # literals only: numbers, True, lists, strings
    except (ValueError, SyntaxError):
        return text


def check(cfg, where):
    """cfg, with every key known, of the right type and in range; else UserError."""
    for key, value in cfg.items():
        if key not in default:
            near = difflib.get_close_matches(key, default, 1)
            raise UserError(f'{where}: unknown key {key!r}' +
                            (f'; did you mean {near[0]!r}?' if near else '; see --help for all keys'))
        like, rule = default[key], checks.get(key)
        if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
            value = cfg[key] = float(value)
        allowed = isinstance(rule, tuple) and list in rule and isinstance(value, list)
        if not allowed and type(value) is not type(like):
            raise UserError(f'{where}: {key}={value!r} is {type(value).__name__}, but {key} is '
                            f'{type(like).__name__} (default {like!r})')
        if rule and isinstance(value, (int, float)) and not rule[0] <= value <= rule[1]:
            raise UserError(f'{where}: {key}={value!r} is out of range; choose {rule[0]:g} to {rule[1]:g}')
        if rule and isinstance(value, str) and value not in rule:
            words = ', '.join(repr(w) if isinstance(w, str) else 'a list of numbers' for w in rule)
            raise UserError(f'{where}: {key}={value!r}; choose one of {words}')
        if isinstance(value, list) and isinstance(like, float) and not are_knots(value):
            raise UserError(f'{where}: {key}={value!r}; give knots [[share of the run, weight], ...] with '
                            'ascending shares from 0 to 1, such as [[0,1],[0.5,0]]')
        if isinstance(value, list) and not isinstance(like, float) and not (
                value and all(type(v) is int and v >= 1 for v in value)):
            raise UserError(f'{where}: {key}={value!r}; give a list of layer numbers from 1, such as [1,2]')
    return {key: cfg.get(key, like) for key, like in default.items()}


def are_knots(value):
    """[[x, weight], ...] with x ascending in 0..1 and weights that are not negative?"""
    if not value or not all(isinstance(v, list) and len(v) == 2 for v in value):
        return False
    if not all(type(x) in (int, float) and 0 <= x < float('inf') for pair in value for x in pair):
        return False
    xs = [x for x, _ in value]
    return xs == sorted(xs) and xs[-1] <= 1
