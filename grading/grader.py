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
import operator
import random
import re
import unicodedata
from fractions import Fraction

TAIL = 300_000          # characters of a text in which its last box is looked for
LIMIT = 2000            # characters of an answer that is read; longer ones are compared as text
DEPTH = 40              # nesting
ITEMS = 60              # of a list
BITS = 8_000            # of a number; 9**9**9 has more
WORK = 50_000           # operations, and 64 bits of numbers, that a comparison may cost
SCALES = ((0.05, 0.3), (0.5, 0.95), (1.2, 3), (5, 20))     # of the points where variables are tried


class Unreadable(ValueError):
    """Not in the grammar, or too large."""


# ---- where the answer stands ---------------------------------------------------------------------

def boxed(text):
    """What the last complete \\boxed{...} of a text holds, braces balanced; None if there is none.
    One pass over the end of it: a text of ten thousand unclosed boxes costs no more than any other."""
    text, opened, last = text[-TAIL:], [], None
    for brace in re.finditer(r'\\f?boxed\s{0,3}\{|\{|\}', text):
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
         '∪': '\\cup ', '∈': '\\in ', '°': '\\degree ', '\u00a0': ' ', '\u200b': '', '½': '\\frac{1}{2}',
         '⅓': '\\frac{1}{3}', '⅔': '\\frac{2}{3}', '¼': '\\frac{1}{4}', '¾': '\\frac{3}{4}'}
NOISE = re.compile(r'\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad)(?![a-zA-Z])'
                   r'|\\[,;: ()\[\]]|[$~]|\\hspace\{[^{}]{0,9}\}')
WORDS = re.compile(r'\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\*? ?'
                   r'\{([^{}]*)\}')
RENAMED = {'dfrac': '\\frac ', 'tfrac': '\\frac ', 'cfrac': '\\frac ', 'leq': '\\le ', 'geq': '\\ge ',
           'leqslant': '\\le ', 'geqslant': '\\ge ', 'neq': '\\ne ', 'dbinom': '\\binom ',
           'tbinom': '\\binom ', 'varnothing': '\\emptyset ', 'lbrace': '\\{', 'rbrace': '\\}', 'lvert': '|',
           'rvert': '|', 'vert': '|', 'times': '*', 'cdot': '*', 'ast': '*', 'div': '/', 'lt': '<', 'gt': '>'}
TOKEN = re.compile(r'"[^"]*"|\\[a-zA-Z]+|\\[{}%\\]|\*\*|\d+\.\d+|\.\d+|\d+|[a-zA-Z]+|<=|>=|!=|\S')
FUNCTIONS = {'sin': cmath.sin, 'cos': cmath.cos, 'tan': cmath.tan, 'cot': lambda x: 1 / cmath.tan(x),
             'sec': lambda x: 1 / cmath.cos(x), 'csc': lambda x: 1 / cmath.sin(x), 'arcsin': cmath.asin,
             'arccos': cmath.acos, 'arctan': cmath.atan, 'sinh': cmath.sinh, 'cosh': cmath.cosh,
             'tanh': cmath.tanh, 'ln': cmath.log, 'log': cmath.log, 'exp': cmath.exp, 'abs': abs}
WORDLIKE = {*FUNCTIONS, 'sqrt', 'pi', 'infty', 'inf', 'infinity', 'and', 'or'}
SHORT = {'no', 'on', 'is', 'as', 'in', 'at', 'so', 'of', 'to', 'up', 'an', 'am', 'by', 'do', 'go', 'it', 'if'}
UNITS = re.compile(r'(?<=[\d})]) ?((?:sq(?:uare|\.)? ?|cubic )?(?:degrees?|dollars?|cents?|units?|cm|mm|km|'
                   r'meters?|metres?|centimeters?|kilometers?|inch(?:es)?|feet|foot|ft|yards?|miles?|hours?|'
                   r'minutes?|seconds?|days?|weeks?|months?|years?|kg|grams?|pounds?|lbs?|mph|km/h|m/s|liters?)'
                   r'(?:\^\{?[23]\}?)?)\.?$')
NO_UNIT = re.compile(r'\d|\b(or|and|not|no|million|thousand|hundred|billion|dozen|times|squared|cubed|mod)\b')


def tidy(text):
    """Spelling that means nothing: spaces, sizes, Unicode's doubles, dollar signs, a full stop at the end."""
    text = text.replace('\\\\', ' \\cr ')                                   # a matrix's rows
    text = text.replace(',\\! ', ',').replace('\\!', '')                     # 32,\! 348
    text = re.sub(r'[⁰¹²³⁴-⁹]+', lambda m: '^{' + unicodedata.normalize('NFKC', m[0]) + '}', text)
    text = re.sub(r'√ ?(\d+)', r'\\sqrt{\1}', text)
    text = ''.join(PLAIN.get(c) or (str(unicodedata.decimal(c)) if c.isdecimal() else c) for c in text)
    text = re.sub(r'^\s*(-?)\\?\$(?=\s*-?[\d.])(?!.*\$)(.*)$', r'\1\2 "dollars"', text)      # \$5, not $5$
    text = NOISE.sub(' ', text.replace('\\$', ''))

    def quoted(m):
        inside = ' '.join(m[1].replace('"', ' ').split())
        if inside.lower() in ('percent', '%'):
            return ' % '
        letter = len(inside) == 1 and inside.isalpha() and inside not in 'mgsLhABCDEFGH'     # \mathrm{i}
        return f' "{inside}" ' if any(c.isalpha() for c in inside) and not letter else f' {inside} '
    text = WORDS.sub(quoted, text)
    text = re.sub(r'\\([a-zA-Z]+)', lambda m: RENAMED.get(m[1]) or f'\\{m[1]} ', text.replace('{,}', ''))
    text = re.sub(r'\\(begin|end) ?\{[pb]?matrix\}', r'\\\1matrix ', text)
    text = re.sub(r'\^ ?(\{ ?\\circ ?\}|\\circ)', r'\\degree ', text)
    text = re.sub(r'(?<=\d) ?percent$', '%', ' '.join(text.split()))
    text = re.sub(r'" ?\^ ?\{? ?([23]) ?\}?$', r'^\1"', text)                # cm^2
    return re.sub(r'(?<!\.)\.$', '', text.rstrip(',;: ')).lstrip('=: ')


def tokens(text):
    """Tidied text -> tokens; words that are no function fall into letters if they are short."""
    if not re.search(r'[(\[]|\\\{', text):                                   # 1,234,567 and 1 234 567
        text = re.sub(r'(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])', lambda m: m[0].replace(',', ''), text)
        text = re.sub(r'^\d{1,3}(?: \d{3})+$', lambda m: m[0].replace(' ', ''), text)
    if '..' in text or 'dots' in text:
        raise Unreadable('an ellipsis')
    out = []
    for t in TOKEN.findall(text):
        low = t.strip('" ').lower()
        if low in WORDLIKE:
            out.append('\\' + {'inf': 'infty', 'infinity': 'infty'}.get(low, low))
        elif t[0].isalpha():                 # a product of variables, if it is no word
            if t.lower() in SHORT or len(t) > 3 or (len(t) == 3 and not any(
                    set(t) <= set(s) for s in ('abc', 'xyz', 'pqr'))):
                raise Unreadable(t)
            out += t
        else:
            out.append({'**': '^', '<=': '\\le', '>=': '\\ge', '!=': '\\ne', '\\%': '%'}.get(t, t))
    if not out:
        raise Unreadable('nothing')
    return out


# ---- tokens to a tree ----------------------------------------------------------------------------
# Nodes: ('num', Fraction), ('var', name), (operation, node...), ('list' or 'tuple' + brackets, node...).

NO_FACTOR = {'\\' + t for t in ('pm', 'mp', 'cup', 'and', 'or', '}', 'cr', 'endmatrix', 'rfloor',
                                'rceil')}
RELATIONS = ('=', '<', '>', '\\le', '\\ge', '\\ne', '\\in')
ZERO = ('num', Fraction(0))
CLOSING = {'(': ')', '[': ']', '\\{': '\\}', '{': '}', '|': '|'}


class Parser:
    """Recursive descent over tokens, DEPTH deep at most."""
    def __init__(self, tokens):
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else None

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
            if left[0] == '*' and left[1] in [('var', f) for f in 'fghFGPQ'] and left[2][0] == 'var':
                left = ('of', *left[1:])                                     # f(x)
            if left[0] not in ('var', 'of') and right[0] == 'var' and len(parts) == 3:
                left, right = right, left
            if left[0] in ('var', 'of'):
                return ('=', left, right)
            if left[0] == 'tuple' and all(part[0] == 'var' for part in left[2:]):            # (x, y) = (1, 2)
                return right
        if parts[1] == '\\in' and len(parts) == 3 and parts[0][0] == 'var':   # x \in [0, 1)
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
            return node if sign == '+' else (sign, ZERO, node)
        node = self.power()
        while True:
            t, whole = self.peek(), node[0] == 'num' and node[1].denominator == 1
            if t in ('*', '/'):
                self.take()
                sign = self.take() if self.peek() in ('-', '+') else '+'
                right = self.power()
                node = (t, node, ('-', ZERO, right) if sign == '-' else right)
            elif t == '\\frac' and self.tokens[self.at - 1].isdecimal():      # 3\frac12 is mixed
                if not whole:
                    raise Unreadable('a mixed number in a product')
                right = self.power()
                mixed = right[0] == '/' and right[1][0] == right[2][0] == 'num' and right[1][1] < right[2][1]
                node = ('+' if mixed else '*', node, right)
            elif self.starts(t):
                if t[0].isdecimal() or t[0] == '.':
                    raise Unreadable('two numbers side by side')             # 2 3 is not 6, x2 not 2x
                node = ('*', node, self.power())
            else:
                return node

    def starts(self, t):
        """May a factor begin with this token?"""
        if t is None or t in RELATIONS or t in NO_FACTOR:
            return False
        return t[0].isalpha() or t[0].isdecimal() or t[0] in '.("[{\\' or (t == '|' and not self.bars)

    def power(self):
        node = self.atom()
        while self.peek() in ('^', '!', '%', '\\degree', '_'):
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
            elif t == '%':
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
        if t and t.isdecimal() and len(t) > 1:
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
            self.depth -= 1
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
        if t[0].isdecimal() or (t[0] == '.' and len(t) > 1):
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
                root, = self.group('[')
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
            if power == ('-', ZERO, ('num', Fraction(1))) and f'arc{name}' in FUNCTIONS:     # \sin^{-1}
                name, power = f'arc{name}', None
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
    unit = UNITS.search(text) or re.search(r'(?<=\S) ?"([^"]*)"$', text)     # 5 cm, or 5 \text{ apples}
    if unit and NO_UNIT.search(unit[1].removesuffix('^2').removesuffix('^3').lower()):
        raise Unreadable(unit[1])
    items = Parser(tokens(text[:unit.start()] if unit else text)).items(None)
    node = items[0] if len(items) == 1 else ('list', *items)
    return ('unit', node, singular(unit[1])) if unit else node


def singular(unit):
    """One spelling of a unit."""
    unit = re.sub(r'[{}.]', '', unit.lower()).strip()
    unit = re.sub(r'^cubic (.*)', r'\1^3', re.sub(r'^sq(?:uare)? ?(.*)', r'\1^2', unit))
    unit, _, power = unit.partition('^')
    unit = unit.rstrip('s')
    return {'inche': 'inch', 'feet': 'foot', 'ft': 'foot'}.get(unit, unit) + power


# ---- comparing ------------------------------------------------------------------------------------

FLIPPED = {'<': '>', '>': '<', '\\le': '\\ge', '\\ge': '\\le'}
APART = {'tuple', 'matrix', 'relation', 'word', 'row', '\\cup', 'based', 'of'}   # equal only to their kind


def rational(x, y=Fraction(0)):
    return isinstance(x, Fraction) and isinstance(y, Fraction)


def root(a, n):
    """The whole n-th root of a >= 0, rounded down, by Newton."""
    x = 1 << -(-a.bit_length() // n)
    while a > 1:
        y = ((n - 1) * x + a // x ** (n - 1)) // n
        if y >= x:
            return x
        x = y
    return a


def whole(x, most):
    """x as an int of 0..most."""
    if not rational(x) or x.denominator != 1 or not 0 <= x <= most:
        raise Unreadable('not a small whole number')
    return int(x)


def point(name, k):
    """A variable's value in the k-th trial: a fraction that depends on both alone. The first eight trials
    walk through SCALES with both signs, the others mix them."""
    rng = random.Random(f'{name} {k}')
    low, high = SCALES[k // 2] if k < 8 else rng.choice(SCALES)
    sign = (-1)**k if k < 8 else rng.choice([-1, 1])
    return sign * Fraction(rng.uniform(low, high)).limit_denominator(997)


def has(node, *kinds):
    """Is there a node of one of these kinds in the tree? (The minus of a negative number does not count.)"""
    here = isinstance(node, tuple) and node[0] in kinds and node[1] != ZERO
    return here or isinstance(node, tuple) and any(has(p, *kinds) for p in node)


class Comparison:
    """Two trees, and how much work may still be spent on them: WORK, counted in operations and their bits."""
    def __init__(self):
        self.left = WORK

    def spend(self, bits):
        self.left -= 1 + bits // 64
        if self.left < 0:
            raise Unreadable('too much work')

    def kept(self, x):
        """A result, if it is of bounded size."""
        if rational(x):
            bits = x.numerator.bit_length() + x.denominator.bit_length()
            self.spend(bits)
            if bits > BITS:
                raise Unreadable('a number of too many digits')
        elif not cmath.isfinite(x):
            raise OverflowError
        return x

    def raised(self, x, y):
        """x^y: exact for whole y and for perfect roots, else the principal value."""
        if rational(x, y) and y.denominator == 1:
            bits = int(abs(y)) * max(x.numerator.bit_length(), x.denominator.bit_length())
            if bits > BITS and abs(x) not in (0, 1):
                raise Unreadable('a power of too many digits')
            return self.kept(x ** int(y))
        if rational(x, y) and x >= 0 and y.denominator <= 64:
            self.spend(64 * (x.numerator.bit_length() + x.denominator.bit_length()))
            exact = Fraction(root(x.numerator, y.denominator), root(x.denominator, y.denominator))
            if exact ** y.denominator == x:
                return self.raised(exact, Fraction(y.numerator))
        return self.kept(complex(x) ** complex(y))

    def value(self, node, k):
        """A tree's value in the k-th trial: Fraction or complex."""
        kind, *parts = node
        self.spend(0)
        if kind == 'num':
            return self.kept(parts[0])
        if kind == 'var':
            return point(parts[0], k)
        if kind == 'const':
            return {'pi': math.pi + 0j, 'e': math.e + 0j, 'i': 1j, 'infty': complex(math.inf)}[parts[0]]
        if kind in ('+', '-', '*', '/', '^', 'binom', 'root'):
            x, y = self.value(parts[0], k), self.value(parts[1], k)
            if kind == '^':
                return self.raised(x, y)
            if kind == 'root':
                real = x if rational(x) else x.real if not x.imag else 0
                if real < 0 and rational(y) and y.denominator == 1 and y % 2 == 1:
                    return -self.raised(-x, 1 / y)       # an odd root is real
                return self.raised(x, 1 / y)
            if kind == 'binom':
                return self.kept(Fraction(math.comb(whole(x, 2000), whole(y, 2000))))
            if not rational(x, y):
                x, y = complex(x), complex(y)
            return self.kept({'+': operator.add, '-': operator.sub, '*': operator.mul,
                              '/': operator.truediv}[kind](x, y))
        if kind == '%':
            return self.kept(self.value(parts[0], k) / 100)
        if kind == '!':
            return self.kept(Fraction(math.factorial(whole(self.value(parts[0], k), 1000))))
        if kind == 'call':
            degrees = parts[1][0] == 'unit'                                  # \sin 30^\circ
            x = complex(self.value(parts[1][1], k)) * math.pi / 180 if degrees else self.value(parts[1], k)
            if parts[0] in ('floor', 'ceil'):
                x = x if rational(x) else Fraction(x.real)
                return Fraction(math.floor(x) if parts[0] == 'floor' else math.ceil(x))
            return abs(x) if parts[0] == 'abs' and rational(x) else complex(FUNCTIONS[parts[0]](complex(x)))
        raise Unreadable(kind)

    def same_value(self, a, b):
        """Are two expressions equal in the trials in which both have a value (in two of them at least)?
        Fractions exactly; floats to thirteen digits, twelve beside variables; 0 if a sum cancelled to it."""
        names, tried = has(a, 'var') or has(b, 'var'), 0
        if a == b or ('const', 'infty') in (a, b):
            return a == b
        for k in range(12 if names else 1):
            try:
                x, y = self.value(a, k), self.value(b, k)
            except (ArithmeticError, ValueError) as e:
                if isinstance(e, Unreadable):
                    raise
                continue
            if rational(x, y):
                if x != y:
                    return False
            else:
                exact = 0 in (x, y) and has(a if y == 0 else b, '+', '-', 'call')
                if abs(x - y) > (1e-12 if names else 1e-13) * max(abs(x), abs(y)) + (1e-13 if exact else 0):
                    return False
            tried += 1
        return tried >= (2 if names else 1)

    def same(self, a, b):
        """Do two trees mean the same?"""
        self.spend(0)
        if a == b:
            return True
        kinds = a[0], b[0]
        if 'unit' in kinds:
            one, other = (n[2] if n[0] == 'unit' else '' for n in (a, b))
            if (one and other and one != other) or '%' in kinds:
                return False
            return self.same(*(n[1] if n[0] == 'unit' else n for n in (a, b)))
        if '%' in kinds and kinds[0] != kinds[1]:                            # 50% is 50 and 0.5
            share, other = (a[1], b) if a[0] == '%' else (b[1], a)
            return self.same(share, other) or self.same(('/', share, ('num', Fraction(100))), other)
        if kinds == ('=', '='):
            named = a[1] == b[1] or (('var', 'y') in (a[1], b[1]) and 'of' in (a[1][0], b[1][0]))
            return named and self.same(a[2], b[2]) or self.same(a[1], b[2]) and self.same(a[2], b[1])
        if '=' in kinds:
            return 'relation' not in kinds and self.same(*(n[2] if n[0] == '=' else n for n in (a, b)))
        if 'list' in kinds:
            if kinds[0] != kinds[1]:
                one, other = (a, b) if a[0] == 'list' else (b, a)
                return len(one) == 2 and self.same(one[1], other)
            return self.same_set(a[1:], b[1:])
        if set(kinds) & APART:
            if kinds[0] != kinds[1] or len(a) != len(b):
                return kinds == ('\\cup', '\\cup') and self.same_set(union(a), union(b))
            if a[0] == '\\cup':
                return self.same_set(union(a), union(b))
            turned = (a[0], *(FLIPPED.get(p, p) if isinstance(p, str) else p for p in b[:0:-1]))
            return any(all(x == y if isinstance(x, str) else isinstance(y, tuple) and self.same(x, y)
                           for x, y in zip(a[1:], c[1:], strict=True))
                       for c in ([b, turned] if a[0] == 'relation' else [b]))
        return self.same_value(a, b)

    def same_set(self, xs, ys):
        """Unordered, one for one."""
        ys = list(ys)
        for x in xs:
            i = next((i for i, y in enumerate(ys) if self.same(x, y)), None)
            if i is None:
                return False
            del ys[i]
        return not ys


def union(node):
    return [*union(node[1]), *union(node[2])] if node[0] == '\\cup' else [node]


def plain(node):
    """A tree without pm: a list of both, or of what the items of a list are with both."""
    def signed(node, flip):
        if not isinstance(node, tuple):
            return node
        if node[0] in ('\\pm', '\\mp'):
            node = ('-' if (node[0] == '\\pm') == flip else '+', *node[1:])
        return tuple(signed(part, flip) for part in node)
    if node[0] == 'list':
        parts = [plain(part) for part in node[1:]]
        return ('list', *(q for p in parts for q in (p[1:] if p[0] == 'list' else [p])))
    both = signed(node, False), signed(node, True)
    return both[0] if both[0] == both[1] else ('list', *both)


def bare(text):
    """Text without what means nothing in words and formulas alike: quotes, brackets of a single letter,
    spaces that part nothing, and the case of words."""
    text = re.sub(r'^\(([A-Za-z])\)$', r'\1', text.replace('"', '').strip())
    text = re.sub(r'(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])', '', text).removesuffix('.')
    return text.lower() if re.fullmatch(r'[A-Za-z][A-Za-z ]+', text) else text


def equal(found, answer):
    """Do two answers mean the same? Never raises, never takes long."""
    if max(len(found), len(answer)) > LIMIT:
        return found.strip() == answer.strip()
    a, b = tidy(found), tidy(answer)
    if not a or not b:
        return False
    if bare(a) == bare(b):
        return True
    for one, other in ((a, b), (b, a)):
        choice = re.fullmatch(r'"\(?([A-E])\)? ?" ?(.+)', one)               # \textbf{(B)} 5 is B, and 5
        if choice:
            return equal(choice[1], other) or equal(choice[2], other)
    try:
        return Comparison().same(plain(read(a)), plain(read(b)))
    except (ValueError, ArithmeticError, IndexError, RecursionError):        # Unreadable is a ValueError
        return False
