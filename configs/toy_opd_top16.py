"""
The toy with top-16 OPD as the paper's baseline has it: each of the student's 16 likeliest tokens (of 21)
earns log p - log q as a reward. opd_tail='renorm' is Eq. (5).

    python distill.py configs/toy_opd_top16.py
"""
from configs.toy import config

config = config | dict(out_dir='out/toy_opd_top16', oprd_weight=0.0, opd_weight=1.0, opd='topk', lr=1e-3)
