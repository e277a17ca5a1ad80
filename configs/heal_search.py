r"""
The learning rates of configs/heal_study.py: three for each of its methods, a factor of three apart, in a
third of the steps, on a seed that it does not use. They are judged by the distance to the teacher on
questions of the training set, so that the held-out ones stay unseen.

    python -m studies.compare heal_search
    head -12 studies/heal/train.jsonl > out/heal_search/some.jsonl
    python -m studies.agreement out/smollm2 out/heal_search/*-s2/last --prompts out/heal_search/some.jsonl \
        --exact '' --show 0 --out out/heal_search/agreement.json
"""
from configs.heal_study import methods, size

seeds = [2]
few = ['student=out/smollm2-noise', 'steps=8', 'eval_problems=1', 'diagnose_every=0']
lowest = {'OPD, sampled': 3e-5}              # the others begin at 1e-4
runs = {}
for name, changes in methods.items():
    if name == 'OPRD, nmse, small eps':      # it takes the steps of the cosine, and its rate too
        continue
    for rate in (1, 3, 10):
        lr = rate * lowest.get(name, 1e-4)
        runs[f'{name}, lr={lr:g}'] = [*size, *few, *changes, f'lr={lr:g}']
panels = {}                     # a table is enough
