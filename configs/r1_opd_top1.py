"""
The baseline "OPD top-1" of section 4.1 on the paper's pair: Eq. (3) at every response position.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 distill.py config/r1_opd_top1.py
"""
from configs.r1_1p5b import config

config = config | dict(out_dir='out/r1_opd_top1', oprd_weight=0.0, opd_weight=1.0, opd='sampled',
                       positions='all')
