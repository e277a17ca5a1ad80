"""
Rewards alone, distillation alone, and both, with equally many rollouts. Three seeds: docs/extensions.md.

    python -m studies.compare extensions/studies/rewards.py
"""
base = ['configs/toy_rewards.py', 'steps=80', 'eval_n=8', 'eval_every=20', 'diagnose_every=0']
oprd = [*base, 'oprd_weight=1', 'reward_weight=0', 'lr=1e-3']

seeds = [0, 1, 2]
runs = {
    'rewards': base,
    'rewards, 0.05 KL to the start': [*base, 'teacher=self', 'opd_weight=0.05', 'opd=full'],
    'OPRD': oprd,
    'OPRD + 0.1 rewards': [*oprd, 'reward_weight=0.1'],
}
panels = {'rewards': list(runs)}
