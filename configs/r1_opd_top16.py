"""
The baseline "OPD top-16" of section 4.1 on the paper's pair: each of the student's 16 likeliest tokens
earns log p - log q as a reward, weighed by p renormalised on the 16 (the authors' code). Eq. (5) is
opd_tail='renorm'.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 distill.py config/r1_opd_top16.py
"""
from configs.r1_1p5b import config

config = config | dict(out_dir='out/r1_opd_top16', oprd_weight=0.0, opd_weight=1.0, opd='topk', opd_k=16,
                       opd_tail='reward', positions='all')
