"""
Every run of the toy that the figures and tables of docs/paper.md need: the paper's methods between models of
one architecture, through a bridge, and between unlike tokenizers, three seeds each. Each method has the best
learning rate of its search (docs/toy_search.md).

    python -m paper toy                           the runs, the figures, the tables, the theorems
    python -m studies.compare toy_paper           the runs alone
"""
one = ['configs/toy.py', 'eval_problems=64', 'diagnose_every=5']
same = [*one, 'eval_every=10']
kept = ['save_every=10', 'keep=100']                     # every checkpoint, for the page of studies/view.py
wide = ['configs/toy_bridge.py', 'eval_problems=64', 'diagnose_every=5']
long = [*wide, 'steps=300', 'eval_every=50']
alone = ['bridge=', 'oprd_weight=0', 'opd_weight=1']
first_bridge = ['oprd_weight=[[0,1],[0.667,1],[0.667,0]]', 'opd_weight=[[0,0],[0.667,0],[0.667,1]]']
unlike = ['configs/toy_bridge_tokens.py', 'eval_problems=64', 'diagnose_every=5', 'eval_every=50']
rank = [*wide, 'bridge={wide}', 'steps=100', 'eval_every=0']

seeds = [0, 1, 2]
bridges = {
    'wide': wide[:1],
    'unlike': unlike[:1],
    'ids': [*unlike[:1], 'teacher_ids=student'],
}
runs = {
    # Table 2, Figures 1, 4 to 7 and 9 to 11
    'OPRD': [*same, *kept, 'lr=4e-3'],
    'OPD top-16': [*same, *kept, 'opd_weight=1', 'oprd_weight=0', 'opd=topk', 'lr=1e-3'],
    'OPD top-1': [*same, 'opd_weight=1', 'oprd_weight=0', 'opd=sampled', 'lr=1.2e-4'],
    'OPD full KL': [*same, 'opd_weight=1', 'oprd_weight=0', 'opd=full', 'lr=5e-4'],
    'OPD top-1 + 1 OPRD': [*same, 'opd_weight=1', 'oprd_weight=1', 'opd=sampled', 'lr=2.5e-4'],
    'OPD top-1 + 10 OPRD': [*same, 'opd_weight=1', 'oprd_weight=10', 'opd=sampled', 'lr=2e-3'],

    # Tables 4 and 5: a teacher of another depth and width
    'bridge, r = 16': [*long, 'bridge={wide}'],
    'bridge, then OPD top-1': [*long, 'bridge={wide}', *first_bridge, 'opd=sampled'],
    'wide, OPD top-1': [*long, *alone, 'opd=sampled', 'lr=1.2e-4'],
    'wide, OPD top-16': [*long, *alone, 'opd=topk', 'lr=6e-4'],

    # Table 6: a teacher of another vocabulary, which reads the text, or the student's ids as published
    'tokens, r = 32': [*unlike, 'bridge={unlike}'],
    "tokens, r = 32, student's ids": [*unlike, 'bridge={ids}', 'teacher_ids=student'],

    # Theorem 3: which rank distils best in 100 steps? 0 is the one that it recommends.
    **{f'rank {r}': [*rank, f'bridge_rank={r}'] for r in (2, 4, 8, 16, 0, 64, 96)},
}
panels = {}                     # python -m paper draws the figures
