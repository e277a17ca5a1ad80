"""
The toy with Eq. (7): the sampled-token term plus mu times OPRD; mu is oprd_weight (Figure 7 has 0, 1, 10).

    python distill.py configs/toy_mu.py oprd_weight=10.0
"""
from configs.toy import config

config = config | dict(out_dir='out/toy_mu', oprd_weight=1.0, opd_weight=1.0, opd='sampled', lr=2.5e-4)
