"""
What a command prints when it is asked for --help, and how its command line is read.

    python bridge.py --help               what it does, its commands, and the keys that it reads
    python -m studies.compare --help      of a script without keys: its header

Nothing is written twice: the header of a script says what it does and how it is started, configs/default.py
has a comment for each key, and the help is cut out of these files by their layout. Simpler than usual: no
option is declared. Scripts whose options are no keys of the config use `OneLineParser`.
"""
import argparse
import ast
import os
import re
import sys

from support.runtime import ROOT, UserError


def header(script):
    """The docstring of a script's file."""
    return ast.get_docstring(ast.parse((ROOT / script).read_text()))


def summary(script):
    """The first two paragraphs of a script's header, and its commands -> text."""
    paragraphs = header(script).split('\n\n')
    chosen = paragraphs[:2]
    for paragraph in paragraphs[2:]:
        if re.match(r' +(python|torchrun) ', paragraph):
            chosen.append(paragraph)
    return '\n\n'.join(chosen)


def command(script):
    """How a script is started: 'studies/toy.py' -> 'python -m studies.toy'."""
    if '/' in script:
        return f'python -m {script.removesuffix(".py").replace("/", ".")}'
    return f'python {script}'


def key_lines(keys):
    """The lines of configs/default.py that are about these keys, under the headings of their sections."""
    text = (ROOT / 'configs/default.py').read_text()
    text = text.split('config = dict(\n')[1].split('\n)\n')[0]
    lines = []
    heading = []                             # of this section, until one of its keys is wanted
    wanted = False
    for line in text.splitlines():
        key = re.match(r'    (\w+)=', line)
        if key:
            wanted = key[1] in keys
        elif not line.startswith('     '):   # a blank line, or a line of a heading
            wanted = False
            heading = [*heading, line] if line else ['']
        if wanted:
            lines += [*heading, line]
            heading = []
    return [line[4:] for line in lines]


def show_help(text):
    """Print a help text and exit with code 0, even if nobody reads it to its end, as in `--help | head`:
    all that was asked has been done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def command_words(script):
    """The command line of a script that has neither keys nor options -> words. --help shows its header."""
    words = sys.argv[1:]
    if '-h' in words or '--help' in words:
        show_help(header(script))
    return words


class OneLineParser(argparse.ArgumentParser):
    """A command line with options. Its errors are one line, as those of the other scripts are."""
    def __init__(self, script, usage):
        super().__init__(usage=f'{command(script)} {usage}', description=summary(script),
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f'{message}; see --help')

    def print_help(self, file=None):
        show_help(self.format_help())
