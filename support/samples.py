"""
The answers of an evaluation on disk. eval_math.py samples and grades them; here they are read and written.

    samples.jsonl       one answer per line, in order
    samples-0.jsonl     answers that rank 0 has appended since, until they are merged into samples.jsonl

Every row bears a checksum and is compared with what the command asks for. A row of another evaluation that
was copied into the folder would otherwise count as one of its answers. Simpler than a database: all rows are
read at once. It does not compare texts with their token ids, and it does not grade.
"""
from pathlib import Path

from formats.hub import snapshot
from support.fields import Field, check_fields
from support.files import digest, remove, whole
from support.jsonl import append_row, read_rows
from support.runtime import UserError, shown

ROW = {
    'set': Field(str), 'problem': Field(int, 0), 'sample': Field(int, 0),
    'seed': Field(int), 'date': Field(str, 10, 10),      # of the first start; chat templates are told it
    'prompt': Field(str), 'answer': Field(str),
    'text': Field(str), 'ids': Field(list, 1, items=Field(int, 0)), 'length': Field(int, 1),
    'extracted': Field(str, null=True), 'correct': Field(bool), 'stopped': Field(bool),
}
DELETE = 'delete the line to make it anew'


def samples_folder(cfg, sets):
    """out/eval/<model>-<digest>: one for each model (by its files), problem sets and way of sampling."""
    files = []                               # names, sizes and times: hashing the weights would take minutes
    for file in snapshot(cfg['student']).iterdir():
        if file.is_file():
            files.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))

    # Everything that decides an answer or its grade. What changes neither, such as eval_rows, is left out.
    keys = ('seed', 'teacher', 'dtype', 'enable_thinking', 'date', 'max_new_tokens', 'eval_n',
            'eval_temperature', 'eval_top_p', 'eval_max_new_tokens', 'eval_suffix')
    asked = {}
    for name, problems in sets.items():
        asked[name] = [(problem.question, problem.answer) for problem in problems]

    # The last part of a path or hub id, for people; the digest is for the computer.
    model_name = cfg['student'].rstrip('/').split('/')[-1]
    fingerprint = digest([sorted(files), [cfg[key] for key in keys], asked])
    return Path('out/eval') / f'{model_name}-{fingerprint}'


def sample_files(folder):
    """samples.jsonl and every rank's part. Other files in the folder are not ours."""
    parts = [file for file in folder.glob('samples-*.jsonl') if file.stem.removeprefix('samples-').isdigit()]
    return [folder / 'samples.jsonl', *sorted(parts)]


def read_samples(folder):
    """Whole rows of samples.jsonl and of every rank's part -> {(set, problem, sample): row}. A line that was
    cut off as it was written is dropped; any other damage is a UserError."""
    samples = {}
    for file in sample_files(folder):
        for number, row in enumerate(read_rows(file, crc=True, advice=DELETE), 1):
            where = f'{file}:{number}'
            check_fields(row, ROW, where, DELETE)
            if row['length'] != len(row['ids']):
                raise UserError(f"{where}: length {row['length']} with {len(row['ids'])} ids; {DELETE}")

            # A kill between merging the parts and deleting them leaves a row in two files. Two rows that
            # differ would be a choice.
            key = row['set'], row['problem'], row['sample']
            if samples.setdefault(key, row) != row:
                raise UserError(f'{where}: a second answer for set {shown(key[0])}, problem {key[1]}, sample '
                                f'{key[2]}; {DELETE}')
    return samples


def first_date(samples):
    """The date in the first row; '' if there is none."""
    return next((row['date'] for row in samples.values()), '')


def check_samples(folder, samples, numbered, tokenizer, cfg):
    """A row that is not an answer to what a command asks is a UserError. numbered: {key: (i, Problem)}."""
    # What a row of each problem must say.
    asked = {}
    for problem_key, (_, problem) in numbered.items():
        prompt = tokenizer.decode(problem.ids)
        asked[problem_key] = {'prompt': prompt, 'answer': problem.answer, 'seed': cfg['seed']}

    for (name, number, sample), row in samples.items():
        where = f'{folder}: its samples hold set {shown(name)}, problem {number}, sample {sample}'
        if (name, number) not in asked or sample >= cfg['eval_n']:
            raise UserError(f'{where}, which this command does not ask for; delete the folder')
        for key, expected in asked[name, number].items():
            if row[key] != expected:
                raise UserError(f'{where}, whose {key} {shown(row[key], 40)} is not {shown(expected, 40)}; '
                                'delete the folder')


def write_samples(folder, samples):
    """All rows in order into samples.jsonl; then the ranks' parts can go."""
    with whole(folder / 'samples.jsonl') as temporary, temporary.open('w') as file:
        for key in sorted(samples):
            append_row(file, samples[key], crc=True)
    for part in sample_files(folder)[1:]:
        remove(part)
