"""
The table of unlike tokenizers in docs/results.md: floor pairing, the next byte, both, and what goes wrong.

    python -m studies.compare toy_tokens_study    stage 1 for each seed and fit, the runs, table and figure
"""
fit = ['configs/toy_bridge_tokens.py']
pair = [*fit, 'eval_every=100']
alone = ['bridge=', 'oprd_weight=0', 'opd_weight=1', 'steps=300', 'opd=byte', 'lr=6e-4']

seeds = [0, 1, 2]
bridges = {
    'floor': fit,
    'exact': [*fit, 'pair=exact'],
    'ids': [*fit, 'teacher_ids=student'],
    'shuffled': [*fit, 'bridge_fit=shuffled'],
    'random': [*fit, 'bridge_fit=random'],
}
runs = {
    'bridge, r = 32': [*pair, 'bridge={floor}'],
    'bridge, then next byte': ['configs/toy_bridge_byte.py', 'bridge={floor}'],
    'next byte alone': [*pair, *alone],
    'bridge, 300 steps': [*pair, 'bridge={floor}', 'steps=300'],
    'r = 16': [*pair, 'bridge={floor}', 'bridge_rank=16'],
    "Theorem 3's rank": [*pair, 'bridge={floor}', 'bridge_rank=0'],
    'exact pairs only': [*pair, 'bridge={exact}', 'pair=exact'],
    "student's ids fed": [*pair, 'bridge={ids}', 'teacher_ids=student'],
    'shuffled pairs': [*pair, 'bridge={shuffled}'],
    'random P_S': [*pair, 'bridge={random}'],
}
panels = {
    'unlike tokenizers': ['bridge, r = 32', 'bridge, then next byte', 'next byte alone', 'bridge, 300 steps'],
    'controls, 200 steps': ['bridge, r = 32', 'exact pairs only', "student's ids fed",
                            'shuffled pairs', 'random P_S'],
}
