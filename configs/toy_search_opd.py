"""
toy_search once more for its methods with an output-space term, the same rates on another seed: seed 3's
student is so weak (17 of 100) that no rate moves it. Result: docs/toy_search.md.

    python figures.py --run toy_search_opd
"""
from configs.toy_search import runs as tried

seeds = [4]
runs = {name: args for name, args in tried.items() if name.startswith('OPD')}
