"""
Does a model's answer equal the known one? `grade(text, answer)`: the last box, then `equal`.

Model output is hostile, so nothing here evaluates it, hands it to a library that might, or takes long
over it. An answer of at most LIMIT characters is read by a small grammar of our own: numbers, LaTeX's
fractions, roots, powers and functions, tuples, intervals, sets, matrices, equations. What that does not
know is compared as text. Every number is an exact fraction of bounded size where it can be and a complex
float where it cannot; expressions with variables are equal if they are at twelve points, small and large, of
both signs: fractions, so polynomials are compared exactly.

Conventions: 50% is 50 or 0.5; units and degrees may be left out, but not be others; x = 5 is 5; a list is
unordered unless it is in brackets; 1,234 is a number unless it is in brackets; 3\\frac12 is mixed; decimals
are what they say (0.333 is not 1/3).
"""
import cmath
import math
import random
import re
import unicodedata
from fractions import Fraction

TAIL = 300_000          # characters of a text in which its last box is looked for
LIMIT = 2000            # characters of an answer that is read; longer ones are compared as text
DEPTH = 40              # nesting
ITEMS = 60              # of a list
BITS = 20_000           # of a number; 9**9**9 has more
SCALES = ((0.05, 0.3), (0.5, 0.95), (1.2, 3), (5, 20))     # of the points where variables are tried


class Unreadable(ValueError):
    """Not in the grammar, or too large."""


# ---- where the answer stands ---------------------------------------------------------------------

def boxed(text):
    """What the last complete \\boxed{...} of a text holds, braces balanced; None if there is none.
    One pass over the end of it: a text of ten thousand unclosed boxes costs no more than any other."""
    text, opened, last = text[-TAIL:], [], None
    for brace in re.finditer(r'\\f?boxed\{|\{|\}', text):
        if brace[0] != '}':
            opened.append((len(brace[0]) > 1, brace.end()))
        elif opened:
            is_box, start = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, brace.start()
    return text[slice(*last)] if last else None


def extract(text):
    """The answer a text gives: its last box, or else a last line `Answer: ...`, as DAPO asks for; or None."""
    found = boxed(text)
    if found is None:
        line = re.fullmatch(r'\W{0,4}answer\W{0,4}:(.*)', text[-300:].strip().split('\n')[-1].strip(),
                            re.IGNORECASE)
        found = line[1].strip('*_ ') if line else None
    return found


def grade(text, answer):
    """Does the text give the answer? answer: itself, or a solution that ends in a box."""
    found = extract(text)
    return found is not None and equal(found, boxed(answer) or answer)


# ---- characters to tokens ------------------------------------------------------------------------

PLAIN = {'\u2212': '-', '\u2013': '-', '\u00d7': '*', '·': '*', '∙': '*', '⋅': '*', '÷': '/', 'π': '\\pi ',
         '∞': '\\infty ', '√': '\\sqrt ', '≤': '\\le ', '≥': '\\ge ', '≠': '\\ne ', '±': '\\pm ',
         '∪': '\\cup ', '∈': '\\in ', '°': '\\degree ', '²': '^2', '³': '^3', '⁴': '^4', '\u00a0': ' ',
         '\u200b': ''}
NOISE = re.compile(r'\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad)(?![a-zA-Z])'
                   r'|\\[!,;: ()\[\]]|[$~]|\\\$|\\hspace\{[^{}]{0,9}\}')
WORDS = re.compile(r'\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\*? ?'
                   r'\{([^{}]*)\}')
RENAMED = {'dfrac': 'frac', 'tfrac': 'frac', 'cfrac': 'frac', 'leq': 'le', 'geq': 'ge', 'leqslant': 'le',
           'geqslant': 'ge', 'neq': 'ne', 'dbinom': 'binom', 'tbinom': 'binom', 'varnothing': 'emptyset'}
SIGNS = {'lbrace': '\\{', 'rbrace': '\\}', 'lvert': '|', 'rvert': '|', 'vert': '|', 'times': '*', 'cdot': '*',
         'ast': '*', 'div': '/', 'lt': '<', 'gt': '>'}
TOKEN = re.compile(r'"[^"]*"|\\[a-zA-Z]+|\\[{}%\\]|\*\*|\d+\.\d+|\.\d+|\d+|[a-zA-Z]+|<=|>=|!=|\S')
FUNCTIONS = {'sin': cmath.sin, 'cos': cmath.cos, 'tan': cmath.tan, 'cot': lambda x: 1 / cmath.tan(x),
             'sec': lambda x: 1 / cmath.cos(x), 'csc': lambda x: 1 / cmath.sin(x), 'arcsin': cmath.asin,
             'arccos': cmath.acos, 'arctan': cmath.atan, 'sinh': cmath.sinh, 'cosh': cmath.cosh,
             'tanh': cmath.tanh, 'ln': cmath.log, 'log': cmath.log, 'exp': cmath.exp, 'abs': abs}
WORDLIKE = {*FUNCTIONS, 'sqrt', 'pi', 'infty', 'inf', 'infinity', 'and', 'or', 'max', 'min', 'gcd', 'lcm'}
UNITS = re.compile(r'(?<=[\d})%]) ?((?:sq(?:uare|\.)? ?|cubic )?(?:degrees?|percent|dollars?|cents?|units?|'
                   r'cm|mm|km|meters?|metres?|centimeters?|kilometers?|inch(?:es)?|feet|foot|ft|yards?|miles?|hours?|'
                   r'minutes?|seconds?|days?|weeks?|months?|years?|kg|grams?|pounds?|lbs?|mph|km/h|m/s|liters?)'
                   r'(?:\^\{?[23]\}?)?)\.?$')


def tidy(text):
    """Spelling that means nothing: spaces, sizes, Unicode's doubles, dollar signs, a full stop at the end."""
    text = text.replace('\\\\', ' \\cr ')                                   # rows of a matrix
    text = ''.join(PLAIN.get(c) or (str(unicodedata.decimal(c)) if c.isdecimal() else c) for c in text)
    def quoted(m):
        inside = ' '.join(m[1].split())
        return f' "{inside}" ' if any(c.isalpha() for c in inside) else f' {inside} '
    text = WORDS.sub(quoted, NOISE.sub(' ', text.replace('"', ' ')))
    text = re.sub(r'\\([a-zA-Z]+)', lambda m: SIGNS.get(m[1]) or f'\\{RENAMED.get(m[1], m[1])} ', text)
    text = text.replace('{,}', '')
    text = re.sub(r'\\(begin|end) ?\{[pb]?matrix\}', r'\\\1matrix ', text)
    text = re.sub(r'\^ ?(\{ ?\\circ ?\}|\\circ)', r'\\degree ', text)
    return ' '.join(text.split()).rstrip('.,;: ').lstrip('=: ')


def tokens(text):
    """Tidied text -> tokens; words that are no function fall into letters if they are short."""
    if not re.search(r'[(\[]|\\\{', text):                                   # 1,234,567 and 1 234 567
        text = re.sub(r'(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])', lambda m: m[0].replace(',', ''), text)
        text = re.sub(r'^\d{1,3}(?: \d{3})+$', lambda m: m[0].replace(' ', ''), text)
    out = []
    for t in TOKEN.findall(text):
        if t[0].isalpha() and t.lower() not in WORDLIKE:
            if len(t) > 3:
                raise Unreadable(t)
            out += t
        elif t[0].isalpha():
            out.append('\\' + {'inf': 'infty', 'infinity': 'infty'}.get(t.lower(), t.lower()))
        elif t[0] == '"' and t.strip('" ').lower() in WORDLIKE:
            out.append('\\' + t.strip('" ').lower())
        else:
            out.append({'**': '^', '<=': '\\le', '>=': '\\ge', '!=': '\\ne', '\\%': '%'}.get(t, t))
    return out


# ---- tokens to a tree ----------------------------------------------------------------------------
# Nodes: ('num', Fraction), ('var', name), (operation, node...), ('list' or 'tuple' + brackets, node...).

NO_FACTOR = {'\\' + t for t in ('pm', 'mp', 'cup', 'and', 'or', '}', '%', 'cr', 'endmatrix', 'rfloor',
                                'rceil')}
RELATIONS = ('=', '<', '>', '\\le', '\\ge', '\\ne', '\\in')
ZERO = ('num', Fraction(0))
CLOSING = {'(': ')', '[': ']', '\\{': '\\}', '{': '}', '|': '|'}


class Parser:
    """Recursive descent over tokens, DEPTH deep at most."""
    def __init__(self, tokens):
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self, ahead=0):
        i = self.at + ahead
        return self.tokens[i] if i < len(self.tokens) else None

    def take(self, *expected):
        t = self.peek()
        if t is None or expected and t not in expected:
            raise Unreadable(f'{t!r} where {expected} should be')
        self.at += 1
        return t

    def items(self, *ends):
        """Relations separated by commas, semicolons, `and`, `or`."""
        out = [self.relation()]
        while self.peek() in (',', ';', '\\and', '\\or'):
            while self.peek() in (',', ';', '\\and', '\\or'):
                self.take()
            out.append(self.relation())
        if len(out) > ITEMS or self.peek() not in ends:
            raise Unreadable(f'{self.peek()!r} is left over')
        return out

    def relation(self):
        parts = [self.sum()]
        while self.peek() in RELATIONS:
            parts += [self.take(), self.sum()]
        if len(parts) == 1:
            return parts[0]
        if set(parts[1::2]) == {'='}:                                        # x = ... = 5
            left, right = parts[0], parts[-1]
            if left[0] == '*' and left[1] in [('var', f) for f in 'fghFGPQ']:    # f(x) = ... is y = ...
                left = ('var', 'y')
            if left[0] != 'var' and right[0] == 'var' and len(parts) == 3:
                left, right = right, left
            if left[0] == 'var':
                return ('=', left, right)
        if parts[1] == '\\in' and len(parts) == 3:                           # x \in [0, 1)
            return parts[2]
        return ('relation', *parts)

    def sum(self):
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable('nested too deeply')
        node = self.product()
        while self.peek() in ('+', '-', '\\pm', '\\mp', '\\cup'):
            node = (self.take(), node, self.product())
        self.depth -= 1
        return node

    def product(self):
        if self.peek() in ('-', '+', '\\pm', '\\mp'):
            sign = self.take()
            self.depth += 1
            if self.depth > DEPTH:
                raise Unreadable('nested too deeply')
            node = self.product()
            self.depth -= 1
            if node[0] in ('unit', '%'):                                     # -4 degrees
                return (node[0], (sign, ZERO, node[1]), *node[2:])
            return (sign, ZERO, node)
        node = self.power()
        while True:
            t, whole = self.peek(), node[0] == 'num' and node[1].denominator == 1
            if t in ('*', '/'):
                self.take()
                sign = self.take() if self.peek() in ('-', '+') else '+'
                right = self.power()
                node = (t, node, ('-', ZERO, right) if sign == '-' else right)
            elif t == '\\frac' and whole:                                    # 3\frac12 is mixed
                right = self.power()
                mixed = right[0] == '/' and right[1][0] == right[2][0] == 'num' and right[1][1] < right[2][1]
                node = ('+' if mixed else '*', node, right)
            elif self.starts(t):
                if t[0].isdigit() or t[0] == '.':
                    raise Unreadable('two numbers side by side')             # 2 3 is not 6, x2 not 2x
                node = ('*', node, self.power())
            else:
                return node

    def starts(self, t):
        """May a factor begin with this token?"""
        if t is None or t in RELATIONS or t in NO_FACTOR:
            return False
        return t[0].isalnum() or t[0] in '.("[{\\' or (t == '|' and not self.bars) or t == '\\{'

    def power(self):
        node = self.atom()
        while self.peek() in ('^', '!', '%', '\\degree', '\\%', '_'):
            t = self.take()
            if t == '^':
                node = ('^', node, self.exponent())
            elif t == '!':
                node = ('!', node)
            elif t == '_':                                                   # x_1; a number's base stays text
                low = self.argument()
                if node[0] == 'var' and low[0] in ('num', 'var'):
                    node = ('var', f'{node[1]}_{low[1]}')
                elif node[0] == low[0] == 'num':
                    node = ('based', node[1], low[1])
                else:
                    raise Unreadable('subscript')
            elif t in ('%', '\\%'):
                node = ('%', node)
            else:
                node = ('unit', node, 'degree')
        return node

    def exponent(self):
        if self.peek() in ('-', '+'):
            sign = self.take()
            node = self.atom()
            return ('-', ZERO, node) if sign == '-' else node
        node = self.atom()
        return ('^', node, self.exponent()) if self.peek() == '^' and self.take() else node

    def argument(self):
        """What TeX takes for an argument: a group, or one digit or letter."""
        t = self.peek()
        if t and t.isdigit() and len(t) > 1:
            self.tokens[self.at] = t[1:]
            return ('num', Fraction(t[0]))
        return self.atom()

    def group(self, opening):
        """The items up to the bracket that closes `opening`, which has been taken."""
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable('nested too deeply')
        if self.peek() == CLOSING[opening]:
            self.take()
            return []
        ends = (')', ']') if opening in '([' else (CLOSING[opening],)
        bars, self.bars = self.bars, int(opening == '|')
        items = self.items(*ends)
        self.closed = self.take()
        self.bars = bars
        self.depth -= 1
        return items

    def atom(self):
        t = self.take()
        if t[0].isdigit() or (t[0] == '.' and len(t) > 1):
            return ('num', Fraction(t))
        if t in ('(', '[', '\\{', '{'):
            items = self.group(t)
            closed = self.closed if items else CLOSING[t]
            if t == '\\{':
                return ('list', *items)
            if len(items) == 1 and closed == CLOSING[t]:
                return items[0]
            if not items or t == '{':
                raise Unreadable('empty brackets')
            return ('tuple', t + closed, *items)
        if t == '|':
            inside = self.group('|')
            return ('call', 'abs', inside[0]) if len(inside) == 1 else ('list', *inside)
        if t.isalpha() and len(t) == 1:
            return ('const', t) if t in 'ie' else ('var', t)
        if t[0] == '"':
            return ('word', t.strip('" ').lower())
        if t[0] != '\\':
            raise Unreadable(t)
        return self.command(t[1:])

    def command(self, name):
        """A backslash word that has been taken."""
        if name == 'frac':
            return ('/', self.argument(), self.argument())
        if name == 'binom':
            return ('binom', self.argument(), self.argument())
        if name == 'sqrt':
            root = ('num', Fraction(2))
            if self.peek() == '[':
                self.take()
                root = self.group('[')[0]
            return ('root', self.argument(), root)
        if name in ('pi', 'infty'):
            return ('const', name)
        if name == 'emptyset':
            return ('list',)
        if name == 'beginmatrix':
            return self.matrix()
        if name in ('lfloor', 'lceil'):
            node = self.sum()
            self.take('\\r' + name[1:])
            return ('call', name[1:], node)
        if name in FUNCTIONS:
            base = power = None
            for _ in range(2):
                if self.peek() == '_':
                    self.take()
                    base = self.argument()
                elif self.peek() == '^':
                    self.take()
                    power = self.exponent()
            if self.peek() in ('(', '[', '{'):
                inside = self.group(self.take())
                if len(inside) != 1:
                    raise Unreadable('several arguments')
                node = inside[0]
            else:
                node = self.power()
                while self.starts(self.peek()) and self.peek()[1:] not in FUNCTIONS:
                    node = ('*', node, self.power())
            node = ('call', name, node) if base is None else (
                '/', ('call', 'log', node), ('call', 'log', base))
            return node if power is None else ('^', node, power)
        if name in GREEK:
            return ('var', name)
        raise Unreadable(name)

    def matrix(self):
        """Rows up to \\end; pmatrix and bmatrix mean the same, a determinant is no matrix."""
        rows, t = [[]], '&'
        while t != '\\endmatrix':
            rows[-1].append(self.sum())
            t = self.take('&', '\\cr', '\\endmatrix')
            if t == '\\cr':
                if self.peek() == '\\endmatrix':
                    t = self.take()
                else:
                    rows.append([])
        return ('matrix', *(('row', *row) for row in rows))


GREEK = {'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'varepsilon', 'zeta', 'eta', 'theta', 'iota', 'kappa',
         'lambda', 'mu', 'nu', 'xi', 'rho', 'sigma', 'tau', 'upsilon', 'phi', 'varphi', 'chi', 'psi', 'omega',
         'Gamma', 'Delta', 'Theta', 'Lambda', 'Sigma', 'Phi', 'Psi', 'Omega'}


def read(text):
    """Tidied text -> tree. A unit at the end is kept apart: ('unit', node, name)."""
    mixed = re.fullmatch(r'(-?)(\d+) (\d+)/(\d+)', text)                     # 3 1/2
    if mixed:
        text = f'{mixed[1]}({mixed[2]}+{mixed[3]}/{mixed[4]})'
    unit = UNITS.search(text)
    if unit:
        text = text[:unit.start()]
    kept = tokens(text)
    if not kept:
        raise Unreadable('nothing')
    quoted = re.fullmatch(r'"([^"]*)"', kept[-1]) if len(kept) > 1 else None
    if quoted and not unit:                                                  # 5 \text{ apples}
        kept = kept[:-1]
    elif len(kept) > 3 and kept[-2] == '^' and kept[-3][0] == '"':           # 5 \text{ cm}^2
        quoted, kept = re.fullmatch(r'"([^"]*)"', kept[-3][:-1] + '^' + kept[-1] + '"'), kept[:-3]
    parser = Parser(kept)
    items = parser.items(None)
    node = items[0] if len(items) == 1 else ('list', *items)
    name = unit[1] if unit else quoted[1] if quoted else ''
    return ('unit', node, singular(name)) if name else node


def singular(unit):
    """One spelling of a unit."""
    unit = re.sub(r'[{}.]', '', unit.lower()).strip()
    unit = re.sub(r'^cubic (.*)', r'\1^3', re.sub(r'^sq(?:uare)? ?(.*)', r'\1^2', unit))
    unit, _, power = unit.partition('^')
    unit = unit.rstrip('s')
    return {'inche': 'inch', 'feet': 'foot', 'ft': 'foot', 'percent': '%'}.get(unit, unit) + power


# ---- trees to numbers ----------------------------------------------------------------------------

def bounded(x):
    """x, if it is of bounded size."""
    if isinstance(x, Fraction) and x.numerator.bit_length() + x.denominator.bit_length() > BITS:
        raise Unreadable('a number of too many digits')
    return x


def rational(x, y=Fraction(0)):
    return isinstance(x, Fraction) and isinstance(y, Fraction)


def raise_to(x, y):
    """x^y: exact for whole y and for perfect roots, else the principal value."""
    if rational(x, y) and y.denominator == 1:
        if abs(y) * max(x.numerator.bit_length(), x.denominator.bit_length()) > BITS and abs(x) not in (0, 1):
            raise Unreadable('a power of too many digits')
        return bounded(x ** int(y))
    if rational(x, y) and x >= 0 and y.denominator <= 64:
        exact = nth_root(x, y.denominator)
        if exact is not None:
            return raise_to(exact, Fraction(y.numerator))
    return complex(x) ** complex(y)


def nth_root(x, n):
    """The n-th root of a Fraction that is not negative, if it is a Fraction; else None."""
    roots = []
    for part in (x.numerator, x.denominator):
        low, high = 0, 1 << -(-part.bit_length() // n)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**n <= part else (low, middle - 1)
        if low**n != part:
            return None
        roots.append(low)
    return Fraction(*roots)


def whole(x, most):
    """x as an int of 0..most."""
    if not rational(x) or x.denominator != 1 or not 0 <= x <= most:
        raise Unreadable('not a small whole number')
    return int(x)


def value(node, point):
    """A tree's value where variable `name` is point(name): Fraction or complex."""
    kind, *parts = node
    if kind == 'num':
        return bounded(parts[0])
    if kind == 'var':
        return point(parts[0])
    if kind == 'const':
        return {'pi': math.pi + 0j, 'e': math.e + 0j, 'i': 1j, 'infty': complex(math.inf)}[parts[0]]
    if kind in ('+', '-', '*', '/', '^', 'binom', 'root'):
        x, y = value(parts[0], point), value(parts[1], point)
        if kind == '^':
            return raise_to(x, y)
        if kind == 'root':
            if rational(x, y) and x < 0 and y.denominator == 1 and y % 2 == 1:
                return -raise_to(-x, 1 / y)              # a real number's odd root is real
            return raise_to(x, 1 / y)
        if kind == 'binom':
            return bounded(Fraction(math.comb(whole(x, 2000), whole(y, 2000))))
        if not rational(x, y):
            x, y = complex(x), complex(y)
        return bounded(x + y if kind == '+' else x - y if kind == '-' else x * y if kind == '*' else x / y)
    if kind == '%':
        return value(('/', parts[0], ('num', Fraction(100))), point)
    if kind == '!':
        return bounded(Fraction(math.factorial(whole(value(parts[0], point), 1000))))
    if kind == 'call':
        degrees = parts[1][0] == 'unit'                                      # \sin 30^\circ
        x = complex(value(parts[1][1], point)) * math.pi / 180 if degrees else value(parts[1], point)
        if parts[0] in ('floor', 'ceil'):
            x = x if rational(x) else Fraction(x.real)
            return Fraction(math.floor(x) if parts[0] == 'floor' else math.ceil(x))
        return abs(x) if parts[0] == 'abs' and rational(x) else complex(FUNCTIONS[parts[0]](complex(x)))
    raise Unreadable(kind)


def point(k):
    """The k-th assignment of variables: a fraction that depends on k and the name alone. The first eight
    walk through SCALES with both signs, the others mix them."""
    def at(name):
        rng = random.Random(f'{name} {k}')
        low, high = SCALES[k // 2] if k < 8 else rng.choice(SCALES)
        sign = (-1)**k if k < 8 else rng.choice([-1, 1])
        return sign * Fraction(rng.uniform(low, high)).limit_denominator(997)
    return at


def near(x, y):
    """Two values: fractions exactly, floats to ten digits."""
    if rational(x, y):
        return x == y
    x, y = complex(x), complex(y)
    if cmath.isinf(x) or cmath.isinf(y):
        return x == y
    return abs(x - y) <= 1e-10 * max(abs(x), abs(y)) + 1e-14


def same_value(a, b):
    """Are two expressions equal at the points where both have a value (at two of them at least)?"""
    names = variables(a) | variables(b)
    tried = 0
    for k in range(12 if names else 1):
        try:
            x, y = value(a, point(k)), value(b, point(k))
        except (ZeroDivisionError, OverflowError, ValueError) as e:
            if isinstance(e, Unreadable):
                return False
            continue
        if not near(x, y):
            return False
        tried += 1
    return tried >= (2 if names else 1)


def variables(node):
    """Names of the variables in a tree."""
    if node[0] == 'var':
        return {node[1]}
    return set().union(*(variables(p) for p in node[1:] if isinstance(p, tuple)))


# ---- comparing ------------------------------------------------------------------------------------

def plain(node):
    """A tree without pm: a list of both."""
    def signed(node, flip):
        if not isinstance(node, tuple):
            return node
        if node[0] in ('\\pm', '\\mp'):
            node = ('-' if (node[0] == '\\pm') == flip else '+', *node[1:])
        return tuple(signed(part, flip) for part in node)
    both = signed(node, False), signed(node, True)
    return both[0] if both[0] == both[1] else ('list', *both)


FLIPPED = {'<': '>', '>': '<', '\\le': '\\ge', '\\ge': '\\le'}


def same(a, b):
    """Do two trees mean the same?"""
    if a == b:
        return True
    if 'unit' in (a[0], b[0]):
        one, other = (n[2] if n[0] == 'unit' else '' for n in (a, b))
        if one and other and one != other:
            return False
        a, b = (n[1] if n[0] == 'unit' else n for n in (a, b))
        return same(a, b)
    if '%' in (a[0], b[0]) and a[0] != b[0]:                                 # 50% is 50 and 0.5
        share, other = (a[1], b) if a[0] == '%' else (b[1], a)
        return same(share, other) or same(('/', share, ('num', Fraction(100))), other)
    if a[0] == b[0] == '%':
        return same(a[1], b[1])
    if '=' in (a[0], b[0]):
        if a[0] == b[0]:
            return same(a[2], b[2]) and a[1] == b[1] or same(a[1], b[2]) and same(a[2], b[1])
        return same(a[2] if a[0] == '=' else a, b[2] if b[0] == '=' else b) and 'relation' not in (a[0], b[0])
    if 'list' in (a[0], b[0]):
        if a[0] != b[0]:
            one, other = (a, b) if a[0] == 'list' else (b, a)
            return len(one) == 2 and same(one[1], other)
        return same_set(a[1:], b[1:])
    if a[0] != b[0] and {a[0], b[0]} & {'tuple', 'matrix', 'relation', 'word', 'row', '\\cup', 'based'}:
        return False
    if a[0] == 'tuple':
        return a[1] == b[1] and len(a) == len(b) and all(map(same, a[2:], b[2:]))
    if a[0] in ('matrix', 'row'):
        return len(a) == len(b) and all(map(same, a[1:], b[1:]))
    if a[0] == '\\cup':
        return same_set(union(a), union(b))
    if a[0] == 'relation':
        flipped = ('relation', *(FLIPPED.get(p, p) if isinstance(p, str) else p for p in b[:0:-1]))
        return any(len(a) == len(c) and all(x == y if isinstance(x, str) else same(x, y)
                                            for x, y in zip(a[1:], c[1:], strict=True)) for c in (b, flipped))
    if a[0] in ('word', 'based'):
        return False
    return same_value(a, b)


def union(node):
    return [*union(node[1]), *union(node[2])] if node[0] == '\\cup' else [node]


def same_set(xs, ys):
    """Unordered, without repetitions."""
    def once(items):
        kept = []
        for x in items:
            if not any(same(x, k) for k in kept):
                kept.append(x)
        return kept
    xs, ys = once(xs), once(ys)
    return len(xs) == len(ys) and all(any(same(x, y) for y in ys) for x in xs)


def bare(text):
    """Text without what is around words: quotes, brackets of a single letter, case, spaces."""
    text = re.sub(r'^"?\(([A-Za-z])\)"?$', r'\1', re.sub(r'["{}]', '', text).strip())
    return re.sub(r'\s+', '', text).lower().removesuffix('.')


def equal(found, answer):
    """Do two answers mean the same? Never raises, never takes long."""
    if max(len(found), len(answer)) > LIMIT:
        return found.strip() == answer.strip()
    a, b = tidy(found), tidy(answer)
    if not a or not b:
        return False
    if bare(a) == bare(b):
        return True
    try:
        return same(plain(read(a)), plain(read(b)))
    except (Unreadable, RecursionError, ZeroDivisionError, OverflowError):
        return False
