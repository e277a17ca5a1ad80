"""
The toy with output-space distillation instead of hidden states: the exact KL of Eq. (4).

    python distill.py configs/toy_opd_full.py
"""
from configs.toy import config

config = config | dict(out_dir='out/toy_opd_full', oprd_weight=0.0, opd_weight=1.0, opd='full', lr=5e-4)
