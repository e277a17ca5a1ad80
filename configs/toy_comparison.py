"""
The comparison of docs/results.md: every objective on the same prompts, three seeds, each method at its own
rate: the best of five, docs/toy_search.md.

    python -m studies.compare toy_comparison      runs what is missing (resumes), then table and figure
"""
seeds = [0, 1, 2]
runs = {    # name: command line of distill.py
    'OPRD, mse': ['configs/toy.py', 'lr=4e-3'],
    'OPRD, nmse': ['configs/toy.py', 'rep_loss=nmse', 'lr=4e-3'],
    'OPRD, last layer only': ['configs/toy.py', 'layers=last'],
    'OPRD, first 10 positions': ['configs/toy.py', 'positions=first_k', 'first_k=10', 'lr=1e-3'],
    'OPRD, last 10 positions': ['configs/toy.py', 'positions=last_k', 'last_k=10', 'lr=1e-3'],
    'OPD, full KL': ['configs/toy_opd_full.py'],
    'OPD, top-16': ['configs/toy_opd_top16.py'],
    'OPD, top-1': ['configs/toy_opd_top1.py'],
    'OPD top-1 + 1 OPRD': ['configs/toy_mu.py'],
    'OPD top-1 + 10 OPRD': ['configs/toy_mu.py', 'oprd_weight=10', 'lr=2e-3'],
    'OPD, full KL, 300 steps': ['configs/toy_opd_full.py', 'steps=300', 'eval_every=60'],
}
panels = {  # of the figure
    'objectives (Figure 4)': ['OPRD, mse', 'OPD, full KL', 'OPD, top-16', 'OPD, top-1'],
    'Eq. (7): OPD top-1 + mu OPRD (Figure 7)': ['OPD, top-1', 'OPD top-1 + 1 OPRD', 'OPD top-1 + 10 OPRD'],
    'which states OPRD matches': ['OPRD, mse', 'OPRD, nmse', 'OPRD, last layer only',
                                  'OPRD, first 10 positions', 'OPRD, last 10 positions'],
}
