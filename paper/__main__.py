"""
The paper's figures, tables and theorems from run folders, each by one command.

    python -m paper toy                            all runs of the toy, then all below: docs/paper.md
    python -m paper all out/toy_paper              what these folders can feed, and what is missing
    python -m paper figure4 out/a out/b to=out/x   one figure: out/x/figure4.pdf, .png and .json
    python -m paper table2 out/toy_paper           one table: out/paper/table2.md and .json
    python -m paper theorem1                       one theorem as an experiment, with its figure

Commands: figure1, figure4 to figure12, table2 to table6, theorem1 to theorem3, all, toy, healed.
A folder is one of distill.py or bridge.py, or a folder of such folders, of which the finished ones are
read. Files are written into out/paper/, or where to=FOLDER says. What else a command takes is in the header
of its file: figures.py, tables.py, first_last.py (Figure 8), theorem1.py, theorem2.py, theorem3.py,
toy.py, healed.py.

Simpler than a parser of options: a command is the function of its name in one of these files, such as
`figure4(folders, to)`, and what stands as key=value on the command line is handed to it.
"""
import inspect
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from paper.runs import Missing, folders_in, kind_of_folder, of_kind
from support.command_help import command_words
from support.files import existing_above
from support.provenance import mixed_code
from support.runtime import UserError, print0, run, shown

# {command: the file of paper/ that holds its function}
FIGURES = {f'figure{number}': 'figures' for number in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12)}
FIGURES['figure8'] = 'first_last'            # it measures two models
TABLES = {f'table{number}': 'tables' for number in (2, 3, 4, 5, 6)}
THEOREMS = {f'theorem{number}': f'theorem{number}' for number in (1, 2, 3)}
COMMANDS = FIGURES | TABLES | THEOREMS | {'toy': 'toy', 'healed': 'healed'}


def function_of(command):
    """The function that does a command."""
    return getattr(import_module(f'paper.{COMMANDS[command]}'), command)


def read_words(words):
    """The words of a command line -> (command, folders, {key: text})."""
    known = [*COMMANDS, 'all']
    if not words:
        raise UserError(f'no command given; give one of {", ".join(known)}; see --help')
    if words[0] not in known:
        near = get_close_matches(words[0], known, 1)
        advice = f'did you mean {near[0]}?' if near else f'give one of {", ".join(known)}; see --help'
        raise UserError(f'{shown(words[0])}: no command; {advice}')
    folders = []
    options = {}
    for word in words[1:]:
        if word.startswith('-'):
            raise UserError(f'{shown(word)}: there are no such options; keys are given as to=FOLDER')
        key, equals, value = word.partition('=')
        if equals and key.isidentifier() and not Path(word).is_dir():    # rank_=_8-s0 may be a folder
            options[key] = value
        else:
            folders.append(word)
    return words[0], folders, options


def check_options(command, function, options):
    """UserError if a command does not take one of these keys."""
    taken = list(inspect.signature(function).parameters)[1:]
    for key in options:
        if key not in taken:
            raise UserError(f'{key}=: {command} does not read this; it reads {"=, ".join(taken)}=')


def found_in(words):
    """The runs and bridges that the command line names, each once; a line for those that are left out."""
    named = {}                               # {where it lies: folder as it was named}
    for word in words:
        finished, unfinished = folders_in(word)
        for folder in finished:
            named.setdefault(folder.resolve(), folder)
            if kind_of_folder(folder) == 'run' and not (folder / 'results.json').exists():
                print0(f'note: {folder} is not finished')
        for folder in unfinished:
            print0(f'{folder}: left out, the run is not finished')
    folders = list(named.values())
    for note in mixed_code(of_kind(folders, 'run')):
        print0(f'note: {note}')
    return folders


def draw_all(folders, to='out/paper'):
    """Everything that the folders can feed. Yields each file when it is written; what is missing is told, a
    line each. A UserError at the end if runs were refused."""
    if not folders:
        raise UserError('all: no folder given; give run folders, or a folder of them such as out/toy_paper')
    refused = []
    for command in [*FIGURES, *TABLES, 'theorem2', 'theorem3']:              # theorem1 reads no run
        try:
            yield from function_of(command)(folders, to)
        except Missing as error:
            print0(f'{command}: {error}')
        except UserError as error:
            refused.append(command)
            print0(f'{command}: {error}')
    if refused:
        raise UserError(f'not drawn: {", ".join(refused)}; the lines above say why')


def main(words):
    command, words, options = read_words(words)
    function = draw_all if command == 'all' else function_of(command)
    check_options(command, function, options)
    existing_above(options.get('to') or 'out/paper')         # before the work of an hour
    for file in function(found_in(words), **options):
        print0(file)


if __name__ == '__main__':
    run(main, lambda: command_words('paper/__main__.py'))
