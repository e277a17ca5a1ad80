"""
argv -> one checked dict:  distill.py configs/toy.py lr=1e-3 --steps=50 --dry-run

A config file is ordinary Python that ends with a dict called `config`, made from configs/default.py.
Keys are checked once, when they are read: unknown names, wrong types and values out of range
(support/config_values.py) are one-line errors, so that the code that uses them need not check again.
"""
import ast
import difflib
import sys
from pathlib import Path

from configs.default import checks, free, later, reads
from configs.default import config as default
from support.command_help import command, key_lines, show_help, summary
from support.config_values import check_value
from support.key_hints import hint, unread
from support.runtime import ROOT, UserError, cut, run_file, shown

__all__ = ['load_config', 'checks', 'default', 'free', 'later', 'reads']


def load_config(argv=None, script=''):
    """The checked config of a command line (default: sys.argv[1:]) -> dict with every key there is.

    argv: at most one path of a config file, found from the current folder or from the project's;
    `key=value` or `--key=value`; a bare `--key` sets a switch. `--help` prints the keys and exits.
    script: the file that is run, such as 'bridge.py'. A key that it does not read is an error on the command
    line, and --help prints those that it reads; '' reads all. Raises UserError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if '-h' in argv or '--help' in argv:
        show_keys(script)

    # Words first: an option in another program's form (--lr 1e-3) is no config file.
    files = []
    given = {}
    for arg in argv:
        if '=' in arg or arg.startswith('-'):
            key, value = read_argument(arg, script)
            given[key] = value
        else:
            files.append(arg)
    if len(files) > 1:
        raise UserError(f'{files[1]}: a second config file, after {files[0]}; give one, then key=value')

    # The config file comes first, wherever it stands: the command line may change what it says.
    cfg = check(read_config_file(files[0]), files[0]) if files else dict(default)
    cfg = check(cfg | given, 'command line', script)
    if cfg['ranks'] and not cfg['dry_run']:
        raise UserError(f'ranks={cfg["ranks"]}: belongs to --dry-run; torchrun starts ranks')
    return cfg


def show_keys(script):
    """Print what a script does and the keys that it reads, and exit."""
    usage = f'usage: {command(script or "script.py")} [configs/x.py] [key=value ...]'
    about = summary(script) if script else 'The keys of all scripts.'
    keys = '\n'.join(key_lines(reads.get(script, default)))
    show_help(f'{usage}\n\n{about}\n\nKeys and their defaults, from configs/default.py:\n\n{keys}')


def read_argument(arg, script):
    """One word of a command line -> (key, value)."""
    key, equals, text = arg.removeprefix('--').partition('=')
    key = key.replace('-', '_')
    if script and key in default and key not in reads[script]:
        raise UserError(unread(key, script, reads))
    if not equals and not isinstance(default.get(key), bool):
        advice = f'give {key}=VALUE' if key in default else hint(key, reads.get(script, default), script)
        raise UserError(f'{cut(arg, 60)}: not key=value, and not a switch; {advice}')
    return key, parse(key, text) if equals else True


def read_config_file(name):
    """Run a config file -> its `config` dict."""
    # It is found from the current folder, or from the project's.
    path = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if path is None:
        known = [file.stem for file in (ROOT / 'configs').glob('[a-z]*.py')]
        near = difflib.get_close_matches(Path(name).stem, known, 1)
        raise UserError(f'{name}: no such config file' +
                        (f'; did you mean configs/{near[0]}.py?' if near else f'; try {", ".join(known)}'))

    # The file is the user's own Python. It can say `from configs.default import config` wherever it lies.
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
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


def check(cfg, where, script=''):
    """cfg, with every key there is, each of the right type and in range; else UserError. script: as in
    `load_config`."""
    checked = dict(default)
    for key, value in cfg.items():
        if key not in default:
            advice = hint(key, reads.get(script, default), script)
            raise UserError(f'{where}: unknown key {shown(key)}; {advice}')
        checked[key] = check_value(key, value, default[key], checks.get(key), where)
    return checked
