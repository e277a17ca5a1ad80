"""
What a file may hold: a table with a Field for each name, and `check_fields`, which compares an object that
was read from a JSON file with such a table.

    ROW = {'set': Field(str), 'problem': Field(int, 0), 'ids': Field(list, 1, items=Field(int, 0, 151_642)),
           'extracted': Field(str, null=True), 'note': Field(str, default='')}
    fields = check_fields(row, ROW, f'{file}:{number}', 'delete the line to make it anew')
    fields['problem']                        # a whole number from 0 on, for sure

Everything that is read back from a disk, or was downloaded, may be damaged, or may have been written to do
harm. A number that is true, NaN or 10**9 would otherwise run on for hours, or end in an IndexError somewhere
else.

Simpler than a schema language: types, ranges, lengths and lists of words. Names that a table does not have
are not looked at. Whether two fields fit together is checked by the caller.
"""
import math
import sys
from dataclasses import dataclass

from support.runtime import UserError, shown

KINDS = {int: 'a whole number', float: 'a finite number', str: 'a text', bool: 'true or false',
         list: 'a list', dict: 'an object'}
REQUIRED = object()             # as a default: the field must be there


@dataclass(frozen=True)
class Field:
    """What one field may hold. For int and float `low` and `high` bound the number, for str, list and dict
    the length; both ends are allowed."""
    kind: type                  # int, float (whole numbers too), str, bool, list or dict; true is no number
    low: float = -math.inf
    high: float = math.inf
    words: tuple = ()           # a text must be one of these
    items: object = None        # a Field: what each entry of a list, or each value of a dict, may be
    fields: object = None       # a table: what a dict must hold
    other: object = None        # another Field, which the value may fit instead
    null: bool = False          # True: the value may be null (None)
    default: object = REQUIRED  # the value where the field is absent

    def fits(self, value):
        """May the field hold this value?"""
        if value is None and self.null:
            return True
        if self.other is not None and self.other.fits(value):
            return True
        return self.fits_kind(value)

    def fits_kind(self, value):
        """Is the value of the field's type, in its range, and so are the values in it?"""
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds:
            return False
        if self.kind is bool:
            return True

        # The range. NaN lies in none. A float is not infinite, and an integer in its place is not larger than
        # every float.
        size = value if self.kind in (int, float) else len(value)
        if not self.low <= size <= self.high:
            return False
        if self.kind is float and abs(value) > sys.float_info.max:
            return False

        # What a text says, and what lists and objects hold.
        if self.words and value not in self.words:
            return False
        if self.fields:
            return all(field.fits(value.get(name)) for name, field in self.fields.items())
        if self.items:
            entries = value if self.kind is list else value.values()
            return self.items.fits_all(entries)
        return True

    def fits_all(self, entries):
        """Do all entries fit?"""
        # Answers have millions of token ids, so whole numbers are looked at all at once.
        all_whole = self.kind is int and set(map(type, entries)) == {int}
        if all_whole and self.low <= min(entries) and max(entries) <= self.high:
            return True
        return all(map(self.fits, entries))

    def wanted(self):
        """The field in words: 'a whole number from 0 to 7', 'a text of length 10, or null'."""
        is_number = self.kind in (int, float)
        words = KINDS[self.kind]
        if self.words:
            words = f'one of {", ".join(self.words)}'
        bounds = in_words(self.low, self.high)
        if bounds:
            words += f' {bounds}' if is_number else f' of length {bounds}'
        if self.items:
            words += f', each entry {self.items.wanted()}'
        if self.fields:
            words += f' with {", ".join(self.fields)}'
        if self.other:
            words += f', or {self.other.wanted()}'
        return f'{words}, or null' if self.null else words


def in_words(low, high):
    """A range as text: 'from 0 to 7'; '' if it has no bounds."""
    if low == high:
        return f'{low}'
    ends = []
    if low > -math.inf:
        ends.append(f'from {low}')
    if high < math.inf:
        ends.append(f'to {high}' if ends else f'up to {high}')
    return ' '.join(ends)


def check_fields(obj, table, where, advice='fetch or make it again'):
    """The fields of a table {name: Field}, out of an object -> {name: its value, or its default}.

    A UserError, one line, if the object is no dict, lacks a field that has no default, or holds something
    else than the table says. where: the file, and the line or row. advice: what to do about it.
    """
    if not isinstance(obj, dict):
        raise UserError(f'{where}: holds {shown(obj)}, not an object; {advice}')
    found = {}
    for name, field in table.items():
        if name in obj:
            found[name] = obj[name]
            if not field.fits(obj[name]):
                raise UserError(f'{where}: {name} = {shown(obj[name])}; wants {field.wanted()}; {advice}')
        elif field.default is REQUIRED:
            raise UserError(f'{where}: {name} is missing; wants {field.wanted()}; {advice}')
        else:
            found[name] = field.default
    return found
