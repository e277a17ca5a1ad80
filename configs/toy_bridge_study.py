"""
The table of unlike models in docs/results.md: a teacher of other depth and width, through a bridge, by output
distributions alone, by both; ranks and fits.

    python -m studies.compare toy_bridge_study    stage 1 for each seed and fit, the runs, table and figure
"""
fit = ['configs/toy_bridge.py']
pair = [*fit, 'eval_every=100']
alone = ['bridge=', 'oprd_weight=0', 'opd_weight=1', 'steps=300']

seeds = [0, 1, 2]
bridges = {     # name: command line of bridge.py; a run that says {name} waits for it
    'ridge': fit,
    'adamw': [*fit, 'bridge_fit=adamw'],
}
runs = {
    'bridge, r = 16': [*pair, 'bridge={ridge}'],
    'bridge, then full KL': ['configs/toy_bridge_opd.py', 'bridge={ridge}'],
    'full KL alone': [*pair, *alone, 'opd=full', 'lr=6e-4'],
    'bridge, 300 steps': [*pair, 'bridge={ridge}', 'steps=300'],
    'r = 4': [*pair, 'bridge={ridge}', 'bridge_rank=4'],
    "Theorem 3's rank": [*pair, 'bridge={ridge}', 'bridge_rank=0'],
    'AdamW fit, r = 16': [*pair, 'bridge={adamw}'],
}
panels = {
    'unlike depth and width': ['bridge, r = 16', 'bridge, then full KL', 'full KL alone',
                               'bridge, 300 steps'],
    'ranks, 200 steps': ['r = 4', 'bridge, r = 16', "Theorem 3's rank"],
    'fits, 200 steps': ['bridge, r = 16', 'AdamW fit, r = 16'],
}
