"""
What runs in the child process in which math-verify compares two answers. grader.py starts it; nobody
imports it.

math-verify reads LaTeX into SymPy and simplifies. SymPy has no limits: `9^{9^{9}}` fills the memory,
some integrals take for ever, and the text comes from a model, so it may be chosen to do harm. The limits of
time and memory, and what the process may not do, are those of support/limited.py: SymPy turns digits into
numbers with Python's `eval`. No other text of an answer should get that far: of math-verify we use the
reader of LaTeX alone, not its reader of plain expressions, which hands them to `eval` whole.

A memory limit that is met counts as "not equal". It does not decide what is worth asking; grader.py does.
"""


def prepare():
    """Import math-verify -> the function that answers a request: [answer, found] -> are they equal?"""
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    # units=False: math-verify would drop any word after a number as a unit, `5 \text{ trillion}` would be 5.
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True,
                                   boxed='last')
    reader = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]

    def read(text):
        return parse(f'\\boxed{{{text}}}', reader, extraction_mode='first_match', parsing_timeout=None)

    def equal(request):
        # A decimal makes SymPy compute with floats of 15 digits. Without one we ask for 60 digits, so that
        # e^{-40} and e^{-50} are not both 0.
        answer, found = request
        digits = 15 if '.' in answer + found else 60
        return bool(verify(read(answer), read(found), float_rounding=15, numeric_precision=digits,
                           allow_set_relation_comp=True, timeout_seconds=None))

    # Some of SymPy is imported at its first use: use it before the limits hold.
    equal(['\\frac{x}{2}', '\\sqrt{0.25}'])
    equal(['(0,1)', '0<x<1'])
    equal(['\\sin x', '\\cos y'])
    return equal
