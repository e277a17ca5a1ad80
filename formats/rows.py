"""
Data files to rows: parquet, arrow, JSON, JSON lines, csv, tsv and text, the last five also as .gz.

    for where, row in rows_of('train.jsonl.gz'):     # where: 'train.jsonl.gz:7', for error messages
        row['question']

A row is {column: value}. The names of its columns are in small letters, so that `Problem` and `problem` are
one column. Only the columns that formats/problems.py reads are kept. The endings of READERS, at the end of
this file, say which function reads which file.

Simpler than a library of data sets: a text file is read into memory as a whole, and parquet and arrow files,
which may be larger, a thousand rows at a time. What it does not do: guess. No separator, encoding or
compression is tried out, and nothing in a file is run, unpickled or evaluated. Files are downloaded or
written by hand, so damage of any kind is one line with file and row, and a file that would fill the memory
is refused.
"""
import codecs
import csv
import gzip
import io
import json
import zlib
from contextlib import contextmanager
from pathlib import PurePath

import pyarrow
import pyarrow.parquet

from support.runtime import UserError, cut

# The columns that are read, in the order in which they are looked for. The first that a row has counts.
QUESTION_COLUMNS = ('prompt', 'question', 'problem', 'instruction', 'messages', 'conversations')
ANSWER_COLUMNS = ('answer', 'final_answer', 'expected_answer', 'ground_truth', 'reward_model', 'solution',
                  'completion', 'output')
COLUMNS = (*QUESTION_COLUMNS, 'input', 'system', 'teacher', *ANSWER_COLUMNS)

LONGEST_TEXT = 1_000_000        # characters of a question, an answer or a csv cell: a few hundred pages
LARGEST_FILE = 2**32            # bytes of a text file, unpacked
MOST_PACKED = 100               # a .gz file may unpack to so many times its size; texts reach 5 to 30
ALWAYS_UNPACKED = 2**24         # bytes to which any .gz file may unpack
PIECE = 1000                    # rows of a table that become Python objects together


def rows_of(file):
    """The rows of a data file -> (where, {column: value}) one by one; `where` is file and row."""
    ending = ending_of(file)
    if ending not in READERS:
        raise UserError(f'{file}: problems come as {", ".join(READERS)}; the texts also as .gz')
    yield from READERS[ending](file)


def ending_of(file):
    """What a file's name says that it holds, in small letters: '.jsonl' of Train.JSONL and of train.jsonl.gz.
    '.gz' of a parquet or arrow file, which have a compression of their own."""
    name = file.name.lower()
    ending = PurePath(name.removesuffix('.gz')).suffix
    if name.endswith('.gz') and ending in TABLES:
        return '.gz'
    return ending


def wanted_columns(names, where):
    """The names of a file's columns -> {name as the file spells it: the column that is read}.

    A UserError if none of them holds a question, or if two are the same column.
    """
    wanted = {}
    for name in names:
        column = str(name).strip().lower()
        if column not in COLUMNS:
            continue
        if name in wanted or column in wanted.values():
            raise UserError(f'{where}: two of its columns have one name ({column}); rename one')
        wanted[name] = column
    if not set(QUESTION_COLUMNS) & set(wanted.values()):
        found = cut(', '.join(map(str, names)), 60) or 'none'
        raise UserError(f'{where}: no question; wants {" or ".join(QUESTION_COLUMNS)}; its columns: {found}')
    return wanted


# ---- tables: parquet and arrow -------------------------------------------------------------------

@contextmanager
def one_line(file, kind):
    """Turn what pyarrow says of a damaged file into one line."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two: texts that are not UTF-8, and dates that Python does not have.
        message = cut(str(error).partition('\n')[0], 100)
        raise UserError(f'{file}: not a whole {kind} file ({message}); fetch it again') from None


def parquet_rows(file):
    """(where, row) of a parquet file."""
    with one_line(file, 'parquet'):
        table = pyarrow.parquet.ParquetFile(file)
        wanted = wanted_columns(table.schema_arrow.names, file)
        batches = table.iter_batches(batch_size=PIECE, columns=list(wanted))
        yield from table_rows(file, batches, wanted)


def arrow_rows(file):
    """(where, row) of an arrow file: a stream, as `datasets.save_to_disk` writes it, or a file (Feather)."""
    with one_line(file, 'arrow'), pyarrow.memory_map(str(file)) as memory:
        is_file = memory.read(6) == b'ARROW1'
        memory.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(memory)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(memory)
            batches = reader
        wanted = wanted_columns(reader.schema.names, file)
        yield from table_rows(file, batches, wanted)


def table_rows(file, batches, wanted):
    """(where, row) of pyarrow's record batches."""
    number = 0
    for batch in batches:
        batch = batch.select(list(wanted)).rename_columns(list(wanted.values()))

        # An arrow file is used as it lies in memory, so a damaged one may point outside of it. Look first.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, PIECE):
            for row in batch.slice(start, PIECE).to_pylist():
                number += 1
                yield f'{file}, row {number}', row


# ---- texts ---------------------------------------------------------------------------------------

def content_of(file):
    """The bytes of a text file, unpacked if its name ends with .gz, without the mark that Windows writes in
    front of a text."""
    size = file.stat().st_size
    if file.name.lower().endswith('.gz'):
        content = unpacked(file, size)
    elif size <= LARGEST_FILE:
        content = file.read_bytes()
    else:
        raise UserError(f'{file}: {size} bytes, and texts of at most {LARGEST_FILE} are read; cut it into '
                        'several files, or write it as .parquet')
    return content.removeprefix(codecs.BOM_UTF8)


def unpacked(file, size):
    """The bytes that a .gz file of so many bytes unpacks to. A small file can unpack to anything, so reading
    ends where no text would end."""
    most = min(LARGEST_FILE, max(ALWAYS_UNPACKED, MOST_PACKED * size))
    pieces = []
    total = 0
    try:
        with gzip.open(file) as stream:
            while piece := stream.read(2**20):
                pieces.append(piece)
                total += len(piece)
                if total > most:
                    raise UserError(f'{file}: its {size} bytes unpack to more than {most}; if that is right, '
                                    'unpack it yourself, and give the unpacked file')
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{file}: not a whole .gz file ({cut(str(error), 100)}); fetch it again') from None
    return b''.join(pieces)


def lines_of(file, content):
    """(where, line) of the lines of a text file that are not blank. content: its bytes."""
    # BytesIO ends a line at a newline only: str.splitlines would also split at U+2028, which JSON texts hold.
    for number, line in enumerate(io.BytesIO(content), 1):
        line = line.removesuffix(b'\n').removesuffix(b'\r')          # Windows writes both
        if line.strip():
            yield f'{file}:{number}', line


def text_rows(file):
    """(where, row) of a .txt file, in which each line is a question."""
    for where, line in lines_of(file, content_of(file)):
        with readable(where):
            text = line.decode()
        yield where, {'question': text}


def line_rows(file):
    """(where, row) of a .jsonl file, in which each line is a row."""
    for where, line in lines_of(file, content_of(file)):
        with readable(where):
            row = json.loads(line.decode())
        yield where, named_row(row, where)


def json_rows(file):
    """(where, row) of a .json file: a list of rows, or a row on each line, as many data sets have it."""
    content = content_of(file)
    if not content.lstrip().startswith(b'['):
        yield from line_rows(file)
        return
    with readable(file, 'fetch it again'):
        rows = json.loads(content.decode())
    for number, row in enumerate(rows, 1):
        where = f'{file}, row {number}'
        yield where, named_row(row, where)


def csv_rows(file):
    """(where, row) of a .csv or .tsv file. Its first line names the columns; an empty cell is no value."""
    wanted = {}                                          # filled in from the header
    header = []
    for where, cells in csv_cells(file):
        if not header:
            header = cells
            wanted = wanted_columns(header, where)
            continue
        if len(cells) != len(header):
            raise UserError(f'{where}: {len(cells)} cells under {len(header)} columns; put cells that hold '
                            'a separator or a newline into quotes')
        row = {}
        for name, cell in zip(header, cells, strict=True):
            if name in wanted:
                row[wanted[name]] = cell or None
        yield where, row


def csv_cells(file):
    """(where, [cell, ...]) of the rows of a .csv or .tsv file that are not blank; `where` is a row's first
    line."""
    separator = '\t' if ending_of(file) == '.tsv' else ','
    csv.field_size_limit(LONGEST_TEXT)                   # of the whole process
    lines = (line.decode() for line in io.BytesIO(content_of(file)))

    # The reader takes as many lines as a row has: a quoted cell may hold newlines.
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        where = f'{file}:{reader.line_num + 1}'
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise UserError(f'{where}: {cut(str(error), 100)}; save the file as UTF-8') from None
        except csv.Error as error:
            raise UserError(f'{where}: {cut(str(error), 100)}; look for a quote there that is not closed, or '
                            'not doubled inside of quotes') from None
        if cells:
            yield where, cells


@contextmanager
def readable(where, advice='fix the line or delete it'):
    """Turn an error of a parser into one line. What is not UTF-8 is a ValueError."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: {cut(str(error), 100)}; {advice}') from None


def named_row(row, where):
    """A value of a JSON file -> {column: value} of the columns that are read."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: a {type(row).__name__}, not a row with names')
    wanted = wanted_columns(row, where)
    return {column: row[name] for name, column in wanted.items()}


# Which ending is read by which function.
TABLES = {'.parquet': parquet_rows, '.arrow': arrow_rows}
READERS = {**TABLES, '.jsonl': line_rows, '.json': json_rows, '.csv': csv_rows, '.tsv': csv_rows,
           '.txt': text_rows}
