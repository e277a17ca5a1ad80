"""
The toy with a teacher of another depth and width, from another beginning: a bridge is needed.

    python bridge.py configs/toy_bridge.py
"""
from configs.toy import config

config = config | dict(
    out_dir='out/toy_bridge', toy_teacher_layers=6, toy_teacher_width=160, toy_teacher_steps=260,
    bridge_prompts=512,
)
