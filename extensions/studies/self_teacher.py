"""
The student as its own teacher with the solution in view, against the same without it, and against supervised
learning on the solutions. Three seeds: docs/extensions.md.

    python -m studies.compare extensions/studies/self_teacher.py
"""
base = ['configs/toy_self.py', 'eval_n=8', 'eval_every=25', 'diagnose_every=0']

seeds = [0, 1, 2]
runs = {
    'solution in view, OPD': base,
    'solution in view, OPRD': [*base, 'oprd_weight=1', 'opd_weight=0', 'lr=3e-4'],
    'moving average, OPD': [*base, 'teacher_every=1', 'teacher_decay=0.95'],
    'no solution in view': [*base, 'teacher_sees=prompt'],
    'solutions, supervised': [*base, 'opd=supervised', 'answers_by=solution', 'n=1', 'prompts_per_step=32'],
}
panels = {'the student as its own teacher': list(runs)}
