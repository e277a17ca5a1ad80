"""
What a file may hold: a table for each kind of file, and one function that holds an object against it.

    ROW = {'set': Field(str), 'problem': Field(int, 0), 'ids': Field(list, 1, items=Field(int, 0, 151_642)),
           'extracted': Field(str, null=True), 'note': Field(str, needed=False)}
    check_fields(row, ROW, f'{file}:{number}', 'delete the line to make it anew')

Everything that is read back from a disk, or was downloaded, may be damaged or made to do harm. A number that
is true, NaN or 10**9 otherwise runs on for hours, or ends in an IndexError somewhere else.

Simpler than a schema language: types, ranges and lengths. Fields that a table does not name are not looked
at. What fields have to do with each other is the caller's business.
"""
import math
import sys
from dataclasses import dataclass

from support.runtime import UserError, shown

WORDS = {int: 'a whole number', float: 'a finite number', str: 'a text', bool: 'true or false',
         list: 'a list', dict: 'an object'}


@dataclass(frozen=True)
class Field:
    """What one field may hold. For int and float `low` and `high` bound the number, for str, list and dict
    the length; both ends are allowed."""
    kind: type                  # int, float (whole numbers too), str, bool, list or dict; true is no number
    low: float = -math.inf
    high: float = math.inf
    items: object = None        # a Field: what each entry of a list, or each value of a dict, may be
    needed: bool = True         # False: the field may be absent
    null: bool = False          # True: it may be null (None)

    def wanted(self):
        """In words: 'a whole number from 0 to 7'."""
        words = WORDS[self.kind]
        bounds = []
        if self.low > -math.inf:
            bounds.append(f'from {self.low}')
        if self.high < math.inf:
            bounds.append(f'to {self.high}')
        if bounds and self.kind in (str, list, dict):
            words += ' of length'
        if self.null:
            bounds.append('or null')
        return ' '.join([words, *bounds])


def check_fields(obj, table, where, advice='fetch or make it again'):
    """Raise a UserError, one line, if `obj` is no dict that holds what a table {name: Field} says.

    where: the file, and the line or row. advice: what to do about it.
    """
    if not isinstance(obj, dict):
        raise UserError(f'{where}: {shown(obj)} is {WORDS.get(type(obj), "null")}, not an object; {advice}')
    for name, field in table.items():
        if name not in obj:
            if field.needed:
                raise UserError(f'{where}: {name} is missing; wants {field.wanted()}; {advice}')
            continue
        check_value(obj[name], field, f'{where}: {name}', advice)


def check_value(value, field, where, advice):
    """Raise a UserError if a value is not what its field wants. where: file and name."""
    if not fits(value, field):
        raise UserError(f'{where} is {shown(value)}; wants {field.wanted()}; {advice}')
    if field.items is None or value is None:
        return
    entries = value if field.kind is list else value.values()
    if fast_fits(entries, field.items):
        return
    for number, entry in enumerate(entries, 1):
        check_value(entry, field.items, f'{where}, entry {number}', advice)


def fits(value, field):
    """Is the value of the field's type, and in its range?"""
    if value is None:
        return field.null
    kinds = (int, float) if field.kind is float else (field.kind,)
    if type(value) not in kinds:
        return False
    if field.kind is bool:
        return True
    size = value if field.kind in (int, float) else len(value)

    # NaN lies in no range, not even in that of all numbers. Infinity, which JSON does not have, and whole
    # numbers of hundreds of digits are larger than any float.
    return field.low <= size <= field.high and abs(size) <= sys.float_info.max


def fast_fits(entries, field):
    """Are all entries whole numbers in range? True only for such fields; answers have millions of ids."""
    if field.kind is not int or set(map(type, entries)) != {int}:
        return False
    return field.low <= min(entries) and max(entries) <= field.high
