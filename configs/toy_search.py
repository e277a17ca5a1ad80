"""
The learning rates that toy_comparison uses: five for each of its methods, a factor of two apart, on a
seed that it does not use. Result: docs/toy_search.md.

    python -m studies.compare toy_search
"""
from configs.toy_comparison import runs as methods

seeds = [3]
lowest = {'OPD, top-1': 6e-5, 'OPD, top-16': 2.5e-4, 'OPD, full KL': 2.5e-4, 'OPD top-1 + 1 OPRD': 2.5e-4,
          'OPD top-1 + 10 OPRD': 2.5e-4}     # OPRD alone begins at 5e-4
runs = {f'{name}, lr={lr:g}': [*args, f'lr={lr:g}', 'eval_every=0']
        for name, args in methods.items() if 'steps=300' not in args
        for lr in (lowest.get(name, 5e-4) * 2**i for i in range(5))}
panels = {}                     # a table is enough
