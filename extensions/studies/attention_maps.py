"""
Attention maps beside hidden states, against either alone. Three seeds: docs/extensions.md.

    python -m studies.compare extensions/studies/attention_maps.py
"""
base = ['configs/toy.py', 'steps=60', 'eval_n=8', 'eval_every=20', 'diagnose_every=0']

seeds = [0, 1, 2]
runs = {
    'OPRD': base,
    'OPRD, lr 4e-3': [*base, 'lr=4e-3'],
    'OPRD + attention': [*base, 'attention_weight=1', 'attention_layers=all'],
    'OPRD + attention, last layer': [*base, 'attention_weight=1'],
    'attention': [*base, 'oprd_weight=0', 'attention_weight=1', 'attention_layers=all'],
}
panels = {'attention maps': list(runs)}
