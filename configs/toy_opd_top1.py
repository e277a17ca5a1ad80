"""
The toy with Eq. (3): the log-ratio at the sampled token as a reward, the paper's "top-1".

    python distill.py configs/toy_opd_top1.py
"""
from configs.toy import config

config = config | dict(out_dir='out/toy_opd_top1', oprd_weight=0.0, opd_weight=1.0, opd='sampled', lr=1.2e-4)
