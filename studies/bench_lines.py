"""
How studies/bench.py makes the lines of a table. Each line is measured, appended to a file as JSON and printed
before the next one begins. So a command that is cut off loses only the line that it was measuring. If a line
fails, its error is recorded in its place, and the next line follows.

    tabulate(args, env, ['full KL', 'top-16'], cases)

On a CPU each line is measured in a process of its own, so that memory which one line leaves in the process
does not count for the next. A line of JSON holds all arguments, the machine and the versions, so lines of
several runs can share a file. This file does not read that file again.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

from model import PRESETS
from studies import limits
from studies.children import show_failure
from studies.measure import MB, counted, machine, measure, speeds
from support.jsonl import append_row, read_rows
from support.provenance import versions
from support.runtime import ROOT

# The columns of a table, each with its number format. A table has those that its first line has a value for.
COLUMNS = {
    'peak_mb': '.0f', 'gradients_mb': '.0f', 'made_mb': '.0f', 'largest_mb': '.1f', 'V-axis': 'd',
    'forwards': '.2f', 'waits': '.2f', 'peak/payload': '.2f', 'seconds': '.4g', 'low': '.4g', 'high': '.4g',
    'time': '.2f', 'tok/s': '.1f', 'limit': '.4g', 'expected': '.4g', 'limit/seconds': '.0%',
}
NOT_KEPT = ('what', 'device', 'dtype', 'case', 'out')        # arguments that a JSON line has in another form


def line_of(args, env, name, case):
    """Measure or count a case, or with --expect only compute its limit -> the fields of its JSON line."""
    got = {}
    if args.expect:
        gpu = limits.GPUS[args.expect]
        got = {'limit': limits.limit(case.work, gpu), 'expected': limits.expected(case.work, gpu)}
    elif args.count:
        got = counted(case, PRESETS[args.model].V, args.vocab)
    else:
        got = measure(case, args.repeat, env.device)
        if case.work:
            this_machine = speeds(env)
            got['limit'] = limits.limit(case.work, this_machine)
            got['limit/seconds'] = got['limit'] / got['seconds']
            got['copy_gb_s'] = this_machine.copy / 1e9
            got['product_tflop_s'] = this_machine.product / 1e12

    # What the peak is compared to.
    if case.gradients:
        got['gradients_mb'] = case.gradients / MB
    if case.payload and 'peak_mb' in got:
        got['payload_mb'] = case.payload / MB
        got['peak/payload'] = got['peak_mb'] * MB / case.payload
    return about_line(args, env, name) | got


def about_line(args, env, name):
    """What every line holds: its name, the arguments, the machine and the versions."""
    asked = {key: value for key, value in vars(args).items() if key not in NOT_KEPT}
    about = {'what': args.what, 'case': name, 'machine': machine(env), 'dtype': dtype_name(env)}
    return about | asked | versions(env)


def dtype_name(env):
    """torch.bfloat16 -> 'bfloat16'."""
    return str(env.dtype).removeprefix('torch.')


def line_in_a_process(name):
    """The same as `line_of`: run the same command for this line alone, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'line.jsonl'
        command = [sys.executable, '-m', 'studies.bench', *sys.argv[1:], '--case', name, '--out', out]
        child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        rows = read_rows(out)
    if not rows:
        raise RuntimeError(show_failure(name, child.stderr))
    return rows[0]


def keep_row(out, row):
    """Append what was measured to the file `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open('a') as file:
        append_row(file, row)


def text_of(row, columns):
    """A line as it is printed."""
    if 'error' in row:
        return f'{row["case"]:36}  {row["error"]}'
    cells = [format(row[key], COLUMNS[key]) if key in row else '' for key in columns]
    return f'{row["case"]:36}' + ''.join(f'{cell:>14}' for cell in cells)


def machine_in_words(args, env, measures):
    """The machine in words. measures: does this process measure seconds? Then it measures the speed of the
    machine now, before a line has filled the memory."""
    if not args.expect and not measures:
        return machine(env)
    found = limits.GPUS[args.expect] if args.expect else speeds(env)
    return f'{found.name}: copy {found.copy / 1e9:.4g} GB/s, product {found.product / 1e12:.3g} TFLOP/s'


def tabulate(args, env, names, cases):
    """Measure the lines with these names, one after another.

    cases: {name: Case}, to be measured in this process; None: each line is measured in a process of its own.
    """
    words = machine_in_words(args, env, measures=cases is not None and not args.count)
    print(f'{words}; {dtype_name(env)}', flush=True)
    rows = []
    first = None
    columns = []
    for name in names:
        try:
            if cases is None:
                row = line_in_a_process(name)
            else:
                row = line_of(args, env, name, cases.pop(name))      # popped: its memory is free afterwards
        except Exception as error:           # after any error the other lines are measured all the same
            message = str(error).strip().splitlines() or ['']
            row = about_line(args, env, name) | {'error': f'{type(error).__name__}: {message[0][:200]}'}
        if not args.expect:
            keep_row(args.out, row)
        rows.append(row)

        # The first line that did not fail decides the columns. The column `time` is the seconds of each line
        # divided by those of this first line.
        if first is None and 'error' not in row:
            first = row
            columns = [key for key in COLUMNS if key in row or (key == 'time' and 'seconds' in row)]
            print(f'{"":36}' + ''.join(f'{key:>14}' for key in columns))
        if 'seconds' in row:
            row = row | {'time': row['seconds'] / first['seconds']}
        print(text_of(row, columns), flush=True)
    compare_answers(rows)


def compare_answers(rows):
    """Print whether all lines of a rollout have written the same answers."""
    for lengths in ('equal', 'spread'):
        answers = {row['answers'] for row in rows if 'answers' in row and row['case'].startswith(lengths)}
        if answers:
            print(f'answers, {lengths}: {"the same in every line" if len(answers) == 1 else "they differ"}')
