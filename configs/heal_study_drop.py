"""
configs/heal_study.py for a model that has lost six of its 30 layers:

    python -m studies.damage out/smollm2 out/smollm2-drop drop=6,10,14,18,22,26
    python -m studies.compare heal_study_drop
"""
from configs.heal_study import runs_of

seeds = [0]                     # one: the comparison with ranges is heal_study
runs = runs_of('out/smollm2-drop')
