"""
The ablations of docs/course.md on the small toy: which layers, which positions, how much of each term. A run
takes half a minute on one core.

    python -m studies.compare toy_ablations
"""
small = ['configs/toy_course.py']

seeds = [0]                     # another one costs as much again, and the minute for its models
runs = {
    'all layers, all positions': small,
    'last layer': [*small, 'layers=last'],
    'even layers': [*small, 'layers=even'],
    'odd layers': [*small, 'layers=odd'],
    'layer 2': [*small, 'layers=[2]'],
    'first 7 positions': [*small, 'positions=first_k', 'first_k=7', 'lr=1e-3'],
    'last 7 positions': [*small, 'positions=last_k', 'last_k=7', 'lr=1e-3'],
    'last position': [*small, 'positions=last', 'lr=1e-3'],
    'top-1 alone': [*small, 'oprd_weight=0', 'opd_weight=1', 'opd=sampled', 'lr=1.2e-4'],
    'top-1 + 1 OPRD': [*small, 'oprd_weight=1', 'opd_weight=1', 'opd=sampled', 'lr=2.5e-4'],
    'top-1 + 10 OPRD': [*small, 'oprd_weight=10', 'opd_weight=1', 'opd=sampled', 'lr=2e-3'],
    'exact KL alone': [*small, 'oprd_weight=0', 'opd_weight=1', 'opd=full', 'lr=5e-4'],
    'OPRD, then exact KL': [*small, 'oprd_weight=[[0,1],[0.5,1],[0.5,0]]',
                            'opd_weight=[[0,0],[0.5,0],[0.5,1]]', 'opd=full'],
}
panels = {
    'which layers': ['all layers, all positions', 'last layer', 'even layers', 'odd layers', 'layer 2'],
    'which positions': ['all layers, all positions', 'first 7 positions', 'last 7 positions',
                        'last position'],
    'which terms, Eq. (7)': ['all layers, all positions', 'top-1 alone', 'top-1 + 1 OPRD', 'top-1 + 10 OPRD',
                             'exact KL alone', 'OPRD, then exact KL'],
}
