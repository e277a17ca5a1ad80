"""
The same for unlike tokenizers: two thirds of it through the bridge, the rest on the KL of the next byte.

    python bridge.py configs/toy_bridge_tokens.py && python distill.py configs/toy_bridge_byte.py
"""
from configs.toy_bridge_tokens import config

config = config | dict(
    out_dir='out/toy_bridge_byte', steps=300, eval_every=100,
    oprd_weight=[[0, 1], [2/3, 1], [2/3, 0]], opd_weight=[[0, 0], [2/3, 0], [2/3, 1]], opd='byte',
)
