"""
May a key of the config have this value? `check_value` compares it with the key's default, whose type it
must have, and with the key's rule, an entry of `checks` in configs/default.py: the bounds of a number, or the
words that a text may be.

Simpler than a class for each key: a type, and a range or a few words. Whether the values of two keys fit
together is checked where they are used, before a run starts (support/preflight.py).
"""
import re

from support.fields import Field
from support.runtime import UserError, shown

# A key that may be a list wants whole numbers, such as those of layers, where its default is a text, and the
# knots of a schedule where its default is a number.
LAYERS = Field(list, 1, 1000, items=Field(int, 1, 1000))
KNOTS = Field(list, 1, 1000, items=Field(list, 2, 2, items=Field(float, 0, 10**6)))
GIVE_LAYERS = 'give a list of whole numbers from 1, such as [1,2]'
GIVE_KNOTS = ('give knots [[share of the run, weight], ...] with ascending shares from 0 to 1, such as '
              '[[0,1],[0.5,0]]')


def check_value(key, value, default, rule, where):
    """The value of a key, as a float where the default is one; a UserError if the key may not have it.

    rule: (low, high) for a number, or the words that a text may be; `list` in it allows a list too. None: any
    value of the default's type. where: the file that the value is in.
    """
    told = f'{where}: {key}={shown(value)}'
    if isinstance(value, list) and list in (rule or ()):
        check_list(value, default, told)
        return value

    # The type. A whole number may stand for a float; one that is too large for a float is in no range.
    if isinstance(default, float) and type(value) is int:
        value = float(max(-1e300, min(value, 1e300)))
    if type(value) is int and list in (rule or ()):
        raise UserError(f'{told}; {GIVE_LAYERS}')
    if type(value) is not type(default):
        raise UserError(f'{told} is {type(value).__name__}, but {key} is {type(default).__name__} '
                        f'(default {default!r})')

    # Numbers.
    if isinstance(value, (int, float)) and rule and not rule[0] <= value <= rule[1]:
        raise UserError(f'{told} is out of range; choose {rule[0]:g} to {rule[1]:g}')
    if key in ('temperature', 'eval_temperature') and 0 < value < 1e-3:
        raise UserError(f'{told}: logits divided by it overflow; choose 0 (greedy), or 1e-3 and more')

    # Texts.
    if isinstance(value, str) and rule and value not in rule:
        words = ', '.join('a list of numbers' if word is list else repr(word) for word in rule)
        raise UserError(f'{told}; choose one of {words}')
    if isinstance(value, str) and re.search('[\0\ud800-\udfff]', value):
        raise UserError(f'{told}: no text in UTF-8; remove the characters that are shown as escapes')
    return value


def check_list(value, default, told):
    """A list that is neither layer numbers nor knots, whichever the key wants, is a UserError."""
    if isinstance(default, str):
        if not LAYERS.fits(value):
            raise UserError(f'{told}; {GIVE_LAYERS}')
        return
    if not KNOTS.fits(value):
        raise UserError(f'{told}; {GIVE_KNOTS}')
    shares = [share for share, _ in value]
    if shares != sorted(shares) or shares[-1] > 1:
        raise UserError(f'{told}; {GIVE_KNOTS}')
