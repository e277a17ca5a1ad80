"""
The exact part of the grader: do two short answers mean the same? `decide(found, answer)`.

It knows integers, decimals (repeating ones too), fractions, mixed numbers, percentages, units, the
letters of multiple choice, and tuples, lists and sets of these. It computes with `fractions.Fraction`,
so that nothing is rounded, and says True or False. Whatever else it meets (roots, powers, variables,
functions) it does not guess at: it says None, "cannot decide", and grader.py asks math-verify.

    decide('0.5', r'\\frac{1}{2}') -> True
    decide('0.333', r'\\frac{1}{3}') -> False
    decide('x+1', '1+x') -> None

Conventions: 50% is 50 or 0.5. A unit may be left out, but different units are not compared. x = 5 is 5.
A list is unordered unless it stands in brackets. 1,234 is a number, or a list of two numbers, whichever
fits the other side; in brackets it is a list. Decimals are what they say.

Nothing here evaluates text, imports a module or takes long: grader.py bounds the length of what comes here.
"""
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

DEPTH = 3               # brackets within brackets
SCALES = {'dozen': 12, 'hundred': 100, 'thousand': 10**3, 'million': 10**6, 'billion': 10**9,
          'trillion': 10**12}
CASELESS_WORDS = {'yes', 'no', 'true', 'false', 'none'}     # others are known as words by their \text{...}

# A unit is known by its singular. A word that is not in this table is no unit: `5 factorial` is not 5.
UNITS = {name: name for name in '''degree unit dollar cent euro pound acre gallon mile yard foot inch cm mm km
    kg m g liter mph second minute hour day week month year point step way page book box card coin ball apple
    orange person people student child children boy girl man men woman women team game face edge'''.split()}
UNITS |= {'deg': 'degree', 'inche': 'inch', 'in': 'inch', 'feet': 'foot', 'ft': 'foot', 'meter': 'm',
          'metre': 'm', 'centimeter': 'cm', 'millimeter': 'mm', 'kilometer': 'km', 'gram': 'g',
          'kilogram': 'kg', 'boxe': 'box'}


class Number(NamedTuple):
    """A value that is known exactly, and its unit; '' is none, '%' is per cent."""
    value: Fraction
    unit: str


class Choice(NamedTuple):
    """A letter of multiple choice, and the Number beside it if there is one: (B) 5."""
    letter: str
    value: Number | None


class Sequence(NamedTuple):
    """Items between brackets, such as '()', '[)' or '{}'; '' are no brackets."""
    brackets: str
    items: tuple


# ---- the last box of a text ----------------------------------------------------------------------

def boxed(text):
    """What the last complete \\boxed{...} of a text holds, with balanced braces; None if there is none.
    It is one pass, so that ten thousand unclosed boxes cost no more than any other text of their length."""
    open_braces = []
    last = None
    for brace in re.finditer(r'\\f?boxed\s{0,3}\{|\{|\}', text):
        if brace[0] != '}':
            open_braces.append((len(brace[0]) > 1, brace.end()))
        elif open_braces:
            is_box, start = open_braces.pop()
            if is_box and (last is None or start > last.start):
                last = slice(start, brace.start())
    return text[last] if last else None


# ---- one spelling for what is spelled in several ways ---------------------------------------------

CHARACTERS = {'\u2212': '-', '\u2013': '-', '\u00a0': ' ', '\u200b': '', '×': '\\times ', '·': '\\cdot ',
              '∙': '\\cdot ', '⋅': '\\cdot ', '÷': '/', 'π': '\\pi ', '∞': '\\infty ', '√': '\\sqrt ',
              '≤': '\\le ', '≥': '\\ge ', '≠': '\\ne ', '±': '\\pm ', '∪': '\\cup ', '∈': '\\in ',
              '°': '^\\circ ', '½': '\\frac{1}{2}', '⅓': '\\frac{1}{3}', '⅔': '\\frac{2}{3}',
              '¼': '\\frac{1}{4}', '¾': '\\frac{3}{4}'}
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r'\\! ?', ''),                                                         # 32,\!348
    (r'\{,\}', ','),                                                        # 32{,}348
    (r'\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![a-zA-Z])', ''),
    (r'(\\\\)|\\[,;:> ]|\\q?quad(?![a-zA-Z])|~', r'\1 '),                   # spaces, but not a matrix's \\
    (r'\\(?:text(?:bf|it|rm|sf|normal)|math(?:rm|bf|it|sf)|mbox) ?(?=\{)', r'\\text'),
    (r' ?\\text ?\{ ?percent ?\}| percent\b|\\?%', r'\\%'),
    (r'\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])', r'^\\circ '),
    (r'\\[dtc]frac(?![a-zA-Z])', r'\\frac'),
    (r'\\frac ?(\d) ?', r'\\frac{\1}'),                                     # \frac12
    (r'(\\frac ?\{[^{}]*\}|\\sqrt ?\[\d+\]) ?(\d)', r'\1{\2}'),               # and \sqrt[3]2
    (r'\\text\{i\}', 'i'),
    (r'(?<=\d) (?=[a-z](?![a-zA-Z]))', ''),                                 # 3+4 i is 3+4i
)]
AROUND_FORMULA = re.compile(r'\$\$?([^$]*[^$\\])\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]', re.DOTALL)


def tidy(text):
    """One spelling for spaces, sizes, fonts, fractions, per cent, degrees and Unicode's mathematics.
    What the text means does not change, so that math-verify is given the tidied text too."""
    text = re.sub('[⁰¹²³⁴-⁹]+', lambda found: '^{' + unicodedata.normalize('NFKC', found[0]) + '}', text)
    text = re.sub(r'√ ?(\d+)', r'\\sqrt{\1}', text)
    characters = []
    for character in text:
        if character.isdecimal():
            character = str(unicodedata.decimal(character))                     # ١٤٢ is 142
        characters.append(CHARACTERS.get(character, character))
    text = ''.join(characters).strip()

    # Dollar signs, \( \) and \[ \] around the whole answer say only that it is a formula.
    around = AROUND_FORMULA.fullmatch(text)
    if around:
        text = around[around.lastindex]
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = ' '.join(text.split()).rstrip(',;: ')
    return text if text.endswith('..') else text.removesuffix('.').rstrip()


def compact(text):
    """Tidied text without the spaces that separate nothing: `x + 1` is `x+1`, but `2 3` stays `2 3`."""
    return re.sub(r'(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])', '', text)


# ---- reading numbers --------------------------------------------------------------------------------

SIGNED = re.compile(r' *([-+]?) ?([^-+ ].*?) *')
GROUPED = re.compile(r'[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?')          # 1,234,567 and 1 234 567
DECIMAL = re.compile(r'\d+(?:\.\d*)?|\.\d+')
REPEATING = re.compile(r'(\d*)\.(\d*)\\overline ?\{(\d+)\}')                        # 0.1\overline{6}
MIXED = re.compile(r'(\d+) ?\\frac ?\{(\d+)\} ?\{(\d+)\}|(\d+) (\d+)/(\d+)')        # 3\frac{1}{2} and 3 1/2
FRACTION = re.compile(r'\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}|([^/\\ ]+)/([^/\\ ]+)')
UNIT_AT_END = re.compile(r'(.*[\d})]) ?(?:(\^\\circ|\\%)|(?:\\text ?\{([^{}]+)\}|([a-zA-Z][a-zA-Z. ]+))'
                         r'(?: ?\^ ?\{? ?([23]) ?\}?)?)')


def read_fraction(text):
    """A decimal, a mixed number or a fraction, with at most one sign -> Fraction; else None."""
    # The sign, and the separators of thousands.
    signed = SIGNED.fullmatch(text)
    if signed is None:
        return None
    sign = -1 if signed[1] == '-' else 1
    text = signed[2]
    if GROUPED.fullmatch(text):
        text = text.replace(',', '').replace(' ', '')
    if DECIMAL.fullmatch(text):
        return sign * Fraction(text.removesuffix('.'))

    # 0.1666... = (16 - 1) / 90: the digits with the repeated ones once, minus the digits without them.
    repeating = REPEATING.fullmatch(text)
    if repeating:
        whole, fixed, repeated = repeating.groups()
        numerator = int(whole + fixed + repeated) - int(whole + fixed or '0')
        return sign * Fraction(numerator, 10**len(fixed) * (10**len(repeated) - 1))

    # 3\frac{1}{2} is mixed; 3\frac{6}{2} may be a product, so it is not read.
    mixed = MIXED.fullmatch(text)
    if mixed:
        whole, numerator, denominator = (int(part) for part in mixed.groups() if part)
        return sign * (whole + Fraction(numerator, denominator)) if numerator < denominator else None

    # The parts of a fraction are read in the same way. A denominator of 0 gives no number.
    fraction = FRACTION.fullmatch(text)
    if fraction is None:
        return None
    numerator, denominator = (read_fraction(part) for part in fraction.groups() if part)
    return sign * numerator / denominator if numerator is not None and denominator else None


def read_unit(words, power):
    """['square', 'inches'] -> 'inch^2'; None if it is no unit that we know."""
    for word, its_power in (('square', '2'), ('sq', '2'), ('cubic', '3')):
        if words[0] == word and words[1:] and not power:
            words = words[1:]
            power = its_power
    name = ' '.join(words)
    unit = UNITS.get(name) or UNITS.get(name.removesuffix('s'))
    return unit and unit + (f'^{power}' if power else '')


def read_number(text):
    """A rational number with a scale and a unit or without, such as `\\$1.5 million` -> Number; else None."""
    money = re.fullmatch(r'(-?) ?\\?\$ ?(.*)', text)
    text = money[1] + money[2] if money else text
    unit = 'dollar' if money else ''
    scale = 1

    # Words at the end: first a scale if there is one, then the unit. A word that is neither: no number.
    ending = UNIT_AT_END.fullmatch(text)
    if ending:
        text, sign, quoted, bare, power = ending.groups()
        words = (quoted or bare or '').lower().replace('.', '').split()
        if words and words[0] in SCALES:
            scale = SCALES[words.pop(0)]
        if power and not words:
            return None                                                             # million^2 is no unit
        if sign or words:
            its_unit = {'\\%': '%', '^\\circ': 'degree'}.get(sign) or read_unit(words, power)
            if its_unit is None or unit not in ('', its_unit):
                return None
            unit = its_unit
    value = read_fraction(text)
    return None if value is None else Number(value * scale, unit)


# ---- reading answers --------------------------------------------------------------------------------

LETTER = r'\(?([A-Z])\)?\.?'
WORD = re.compile(r'\\text ?\{ ?([a-zA-Z][a-zA-Z ]+)\}|([a-zA-Z]{2,})')
CHOICE_AND_VALUE = re.compile(r'\\text ?\{ ?\(([A-Z])\) ?\} ?:? ?(.+)')             # \textbf{(B)} 5
AROUND_VALUE = re.compile(r'\\text ?\{([^{}]*)\}|\\?\{([^{},\\]*)\\?\}|\(([^(),]*)\)')
SEPARATOR = re.compile(r',? ?(?:\\text ?\{,? ?(?:and|or) ?\}|\b(?:and|or)\b)')
BRACKETED = re.compile(r'(\\\{|[(\[])(.*)(\\\}|[)\]])')


def split_items(text):
    """Text -> its parts between the commas that stand in no brackets; [] if brackets do not match."""
    parts = []
    start = depth = 0
    for position, character in enumerate(text + ','):
        depth += (character in '([{') - (character in ')]}')
        if depth < 0:
            return []
        if character == ',' and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return parts if depth == 0 else []


def read_value(text, depth=0):
    """A choice, a sequence in brackets or a number; else None."""
    text = text.strip()
    # What stands around a single value says nothing: \text{5}, (5), {5}.
    around = AROUND_VALUE.fullmatch(text)
    if around:
        text = around[around.lastindex].strip()

    # A letter of multiple choice, alone or with the value that it stands for.
    letter = re.fullmatch(LETTER, text)
    if letter:
        return Choice(letter[1], None)
    choice = CHOICE_AND_VALUE.fullmatch(text)
    if choice:
        value = read_number(choice[2])
        return Choice(choice[1], value) if value else None

    # A list in brackets. A named item has no place in it.
    bracketed = BRACKETED.fullmatch(text)
    name, sequence = read_list(bracketed[2], depth + 1) if bracketed else ('', None)
    if sequence and not name:
        return sequence._replace(brackets=(bracketed[1] + bracketed[3]).replace('\\', ''))
    return read_number(text)


def read_named(text, depth=0):
    """`x = 5` -> ('x', Number); `5` -> ('', Number); else ('', None)."""
    named = re.fullmatch(r' *(?:([a-zA-Z]) ?=)?([^=]*)', text)
    return (named[1] or '', read_value(named[2], depth)) if named else ('', None)


def read_list(text, depth=0):
    """Items between commas, with one name for all or none: `x=1, x=2` -> ('x', Sequence); else ('', None)."""
    parts = split_items(SEPARATOR.sub(',', text))
    one_number = re.search(r',0\d', text)                                       # 1,050 is not 1 and 50
    if depth > DEPTH or len(parts) < 2 or one_number:
        return '', None
    named_items = [read_named(part, depth) for part in parts]
    names = {name for name, _ in named_items}
    items = tuple(item for _, item in named_items)
    return (names.pop(), Sequence('', items)) if len(names) == 1 and None not in items else ('', None)


# ---- comparing --------------------------------------------------------------------------------------

def same_number(one, other):
    """Are two Numbers equal? None if their units differ: 1 hour may be 60 minutes."""
    if '%' in (one.unit, other.unit) and '' in (one.unit, other.unit):
        share, plain = (one, other) if one.unit == '%' else (other, one)
        return plain.value in (share.value, share.value / 100)
    comparable = one.unit == other.unit or '' in (one.unit, other.unit)
    return one.value == other.value if comparable else None


def same_sequence(one, other):
    """Are two Sequences equal? In round or square brackets the order counts; a set forgets repeated items."""
    brackets = {one.brackets, other.brackets}
    unordered = brackets <= {'', '{}'}
    if len(brackets) > 1 and not unordered:
        pairs = len(one.items) == len(other.items) == 2 and brackets <= {'()', '[]', '(]', '[)'}
        return False if pairs else None                                             # [0,1) is not (0,1)

    # Match the items one for one, each with the first that is left and equal.
    left = list(dict.fromkeys(one.items) if '{}' in brackets else one.items)
    right = list(dict.fromkeys(other.items) if '{}' in brackets else other.items)
    if len(left) != len(right):
        return False
    for item in left:
        candidates = right if unordered else right[:1]
        verdicts = [same_value(item, candidate) for candidate in candidates]
        if True not in verdicts:
            return None if None in verdicts else False
        del right[verdicts.index(True)]
    return True


def same_value(one, other):
    """Are two values equal? True, False, or None for "cannot decide"."""
    if isinstance(one, Number) and isinstance(other, Choice):
        return same_value(other, one)
    if isinstance(one, Choice) and isinstance(other, Number):
        return one.value is not None and same_number(one.value, other)              # (B) 5 is 5
    if type(one) is not type(other):
        return False
    if isinstance(one, Number):
        return same_number(one, other)
    if isinstance(one, Sequence):
        return same_sequence(one, other)
    if one.letter == other.letter and one.value and other.value:
        return same_number(one.value, other.value)
    return one.letter == other.letter


def same_word(one, other):
    """Is it one word, up to upper and lower case? `\\text{East}` is `east`; the products Ab and ab differ."""
    words = [WORD.fullmatch(text) for text in (one, other)]
    if None in words:
        return False
    first, second = ((word[1] or word[2]).strip() for word in words)
    ordinary = all(word in (word.lower(), word.capitalize()) for word in (first, second))
    known = any(word[1] for word in words) or first.lower() in CASELESS_WORDS
    return ordinary and known and first.lower() == second.lower()


def decide(found, answer):
    """Do two tidied answers mean the same? True, False, or None for "cannot decide"."""
    if not found or not answer:
        return False
    if compact(found) == compact(answer) or same_word(found, answer):
        return True

    # A text may mean two things: compare all meanings of one side with all meanings of the other.
    verdicts = []
    for name, value in (read_named(found), read_list(found)):
        for other_name, other_value in (read_named(answer), read_list(answer)):
            if value is not None and other_value is not None:
                apart = name and other_name and name != other_name                  # x = 5 and y = 5
                verdicts.append(None if apart else same_value(value, other_value))
    if verdicts:
        return True if True in verdicts else None if None in verdicts else False

    # AB and ab are two things, though math-verify ignores the case of letters.
    return False if compact(found).lower() == compact(answer).lower() else None
