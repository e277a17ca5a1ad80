"""
configs/heal_study.py for a GPU: a third kind of damage, every method on each, three seeds, longer answers,
more steps, and a search for the learning rates of each kind of damage.

    python -m studies.healing heal_study_gpu      resumes
"""
from configs.heal_study import damages as two_kinds
from configs.heal_study import methods, model, rates, reference  # noqa: F401
from configs.heal_study import size as small

size = [*small, 'steps=300', 'prompts_per_step=32', 'max_new_tokens=256', 'diagnose_every=20',
        'diagnose_rows=10000']
damages = two_kinds | {'bits': ['bits=3', 'group=32']}
search_seed = 3
search_size = ['steps=60', 'eval_problems=1', 'diagnose_every=0']
rates_of = {kind: kind for kind in damages}
seeds = {kind: [0, 1, 2] for kind in damages}
prompts = 40
search_prompts = 40
tokens = 256
