"""
The study of docs/healing.md: which objective heals a damaged model best? This is the size for two CPU cores;
configs/heal_study_gpu.py is the same study on a GPU. docs/real_model.md shows how to get the model.

    python -m studies.healing heal_study          resumes; about two hours on two cores
"""
model = 'out/smollm2'                            # intact: the teacher
damages = {  # name: options of studies/damage.py; the student is out/smollm2-<name>
    'noise': ['noise=0.1'],
    'drop': ['drop=6,10,14,18,22,26'],
}

# What all runs share. Every position is looked at, so that the curves of all methods begin in one point.
size = ['configs/heal.py', 'dtype=bfloat16', 'diagnose_rows=512']
output_only = ['oprd_weight=0', 'opd_weight=1']
methods = {  # name: what it changes in configs/heal.py
    'OPRD, mse': ['rep_loss=mse'],
    'OPRD, cosine': ['rep_loss=cosine'],
    # With an eps below its gradients nmse takes nearly the steps of the cosine.
    'OPRD, nmse, small eps': ['rep_loss=nmse', 'adam_eps=1e-11'],
    'OPRD, last layer': ['layers=last'],
    'OPD, full KL': [*output_only, 'opd=full'],
    'OPD, top-16': [*output_only, 'opd=topk'],
    'OPD, sampled': [*output_only, 'opd=sampled'],
    'OPRD, then full KL': ['opd=full', 'oprd_weight=[[0,1],[0.5,1],[0.5,0]]',
                           'opd_weight=[[0,0],[0.5,0],[0.5,1]]'],
    # The gradient of the KL is much longer (44 at the first step on the pruned model) than that of the cosine
    # (0.44 on the noisy one): with equal weights the sum would be the KL alone.
    'OPRD + full KL': ['opd=full', 'opd_weight=1', 'oprd_weight=30'],
    # A control: supervised learning on the greedy answers of the teacher.
    'supervised': [*output_only, 'opd=supervised', 'answers_by=teacher', 'temperature=0'],
}
reference = 'OPD, full KL'                       # the others are compared with it, prompt by prompt

# The learning rates of each method, tried on a seed of their own. A name takes the rate of that method.
rates = dict.fromkeys(methods, [1e-4, 3e-4, 1e-3])
rates |= {'OPD, sampled': [3e-5, 1e-4, 3e-4], 'OPRD, nmse, small eps': 'OPRD, cosine'}
rates['OPD, top-16'] = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]    # two lower ones: at 1e-4 it only did harm
search_seed = 2
search_size = ['steps=8', 'eval_problems=1', 'diagnose_every=0', 'diagnose_rows=64']
rates_of = {'noise': 'noise', 'drop': 'drop'}    # the damage on which they are tried

# The comparison with two seeds and all methods is that of the noisy model.
seeds = {'noise': [0, 1], 'drop': [0]}
left_out = {'drop': ['OPRD, nmse, small eps', 'OPRD, last layer', 'OPD, top-16', 'OPD, sampled',
                     'OPRD + full KL']}

# What is measured at the end, on held-out questions; the rates are judged on questions of the training set.
prompts = 24
search_prompts = 8
tokens = 48                                      # longest answer
