"""
Two specialists into one generalist, against each specialist alone, the output space, and supervised learning
on the solutions of both halves. Three seeds: docs/extensions.md.

    python -m studies.compare extensions/studies/two_teachers.py
"""
base = ['configs/toy_two_teachers.py', 'eval_n=8', 'eval_every=25', 'diagnose_every=0']

seeds = [0, 1, 2]
runs = {
    'two teachers, OPRD': base,
    'two teachers, OPD': [*base, 'oprd_weight=0', 'opd_weight=1', 'opd=full', 'lr=5e-4'],
    'sums alone, OPRD': [*base, 'toy_teacher_half=sums'],
    'products alone, OPRD': [*base, 'toy_teacher_half=products'],
    'solutions, supervised': [*base, 'oprd_weight=0', 'opd_weight=1', 'opd=supervised', 'answers_by=solution',
                              'n=1', 'prompts_per_step=32', 'lr=1.5e-3'],
}
panels = {'two specialists': list(runs)}
