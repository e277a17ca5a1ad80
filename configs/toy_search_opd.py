"""
toy_search once more for its methods with an output-space term, the same rates from a better student (260
supervised steps): seed 3's usual one is so weak (17 of 100) that no rate moves it in 100 steps.
Result: docs/toy_search.md.

    python -m studies.compare toy_search_opd
"""
from configs.toy_search import runs as tried

seeds = [3]
runs = {name: [*args, 'toy_student_steps=260'] for name, args in tried.items() if name.startswith('OPD')}
panels = {}                     # a table is enough
