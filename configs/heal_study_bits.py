"""
configs/heal_study.py for a model whose matrices are rounded to three bits:

    python -m studies.damage out/smollm2 out/smollm2-bits bits=3 group=32
    python -m studies.compare heal_study_bits
"""
from configs.heal_study import runs_of

seeds = [0]                     # one: the comparison with ranges is heal_study
runs = runs_of('out/smollm2-bits')
