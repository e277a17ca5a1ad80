"""
Files of one JSON value per line that grow while a script runs and survive its being killed.

    rows = read_rows(path)                      # [] where there is no file; the file is not touched
    with path.open('a') as file:
        append_row(file, row)                   # written and flushed: a kill loses this row at most

A kill can cut the last line in two, so `read_rows` drops a last line that has no newline. Damage anywhere
else is an error that names file and line, because a row that is silently skipped would change results.
With `crc=True`, given to both functions, every row (a dict) carries a checksum of its text under the key
'crc', so that a single wrong digit is damage as well.

Before appending to a file that may end in a cut line, write its whole rows anew, or the next row would
continue that line:

    with whole(path) as temporary, temporary.open('w') as file:        # support.files.whole
        for row in rows:
            append_row(file, row)

A row that must survive a power cut needs `os.fsync(file.fileno())` after `append_row`; flushing alone
survives the death of the process, not of the machine. What a row must hold is the caller's business
(support/fields.py).
"""
import json
import zlib
from pathlib import Path

from support.runtime import UserError


def read_rows(path, crc=False, advice='delete the line to make it anew'):
    """The whole lines of a file -> list of their JSON values. Raises UserError at a damaged line.

    crc: the rows were written with checksums, which are compared and left out. advice: what to do about a
    damaged line.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    with path.open('rb') as file:
        # Bytes, and not text: a line that is not UTF-8 then fails like any other damaged line.
        for number, line in enumerate(file, 1):
            if not line.endswith(b'\n'):
                break                        # the last line was cut off as it was written

            # KeyError: a row without a checksum. TypeError, AttributeError: a row that is no dict.
            try:
                row = json.loads(line.decode())
                if crc and row.pop('crc') != checksum(row):
                    raise ValueError
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                raise UserError(f'{path}:{number}: damaged; {advice}') from None
            rows.append(row)
    return rows


def append_row(file, row, crc=False):
    """Write one row to an open text file, and hand it to the operating system at once."""
    if crc:
        row = row | {'crc': checksum(row)}
    file.write(json.dumps(row) + '\n')
    file.flush()


def checksum(row):
    """Eight hexadecimal digits that another row has by chance alone. JSON reads back what it wrote: the same
    names in the same order, and the same numbers."""
    return f'{zlib.crc32(json.dumps(row).encode()):08x}'
