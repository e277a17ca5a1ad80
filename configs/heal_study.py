"""
Which objective heals a damaged model best? Here SmolLM2-135M with noise on its weights (docs/real_model.md);
configs/heal_study_drop.py and heal_study_bits.py have the same methods for the two other kinds of damage, and
configs/heal_search.py tries three learning rates for each method.

    python -m studies.compare heal_study          runs what is missing (resumes), then table and figure
    python -m studies.agreement out/smollm2 out/smollm2-noise out/heal_study/*-s0/last

The table of the first command has the right answers, that of the second the distances to the teacher.
"""
size = ['configs/heal.py', 'dtype=bfloat16']
output_only = ['oprd_weight=0', 'opd_weight=1']
methods = {  # name: what it changes in configs/heal.py
    'OPRD, mse': ['rep_loss=mse', 'lr=1e-4'],
    'OPRD, cosine': ['lr=3e-4'],
    # With an eps below its gradients nmse takes nearly the steps of the cosine.
    'OPRD, nmse, small eps': ['rep_loss=nmse', 'adam_eps=1e-11', 'lr=3e-4'],
    'OPRD, last layer': ['layers=last', 'lr=3e-4'],
    'OPD, full KL': [*output_only, 'opd=full', 'lr=1e-4'],
    'OPD, top-16': [*output_only, 'opd=topk', 'lr=1e-4'],
    'OPD, sampled': [*output_only, 'opd=sampled', 'lr=1e-4'],
    'OPRD, then full KL': ['opd=full', 'oprd_weight=[[0,1],[0.5,1],[0.5,0]]',
                           'opd_weight=[[0,0],[0.5,0],[0.5,1]]', 'lr=3e-4'],
    # The gradient of the KL is much longer (44 at the first step on the pruned model) than that of the cosine
    # (0.44 on the noisy one): with equal weights the sum would be the KL alone.
    'OPRD + full KL': ['opd=full', 'opd_weight=1', 'oprd_weight=30', 'lr=3e-4'],
    # A control: supervised learning on the greedy answers of the teacher.
    'supervised': [*output_only, 'opd=supervised', 'answers_by=teacher', 'temperature=0', 'lr=1e-4'],
}


def runs_of(student):
    """{method: command line} for one damaged model."""
    return {name: [*size, f'student={student}', *changes] for name, changes in methods.items()}


seeds = [0, 1]
runs = runs_of('out/smollm2-noise')
