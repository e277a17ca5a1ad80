"""
The toy with a teacher of another depth and width, from another beginning: a bridge is needed.

    python bridge.py configs/toy_bridge.py && python distill.py configs/toy_bridge.py
"""
from configs.toy import config

config = config | dict(
    out_dir='out/toy_bridge', bridge='out/toy_bridge_stage1',
    toy_teacher_layers=6, toy_teacher_width=160, toy_teacher_steps=260,
    bridge_prompts=512, bridge_rank=16, steps=200, eval_every=40,
)
