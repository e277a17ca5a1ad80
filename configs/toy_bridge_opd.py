"""
Bridge, then OPD (section 4.2.2) as one run: two thirds of it through the bridge, the rest on the exact KL.

    python bridge.py configs/toy_bridge.py && python distill.py configs/toy_bridge_opd.py
"""
from configs.toy_bridge import config

config = config | dict(
    out_dir='out/toy_bridge_opd', steps=300, eval_every=100,
    oprd_weight=[[0, 1], [2/3, 1], [2/3, 0]], opd_weight=[[0, 0], [2/3, 0], [2/3, 1]], opd='full',
)
