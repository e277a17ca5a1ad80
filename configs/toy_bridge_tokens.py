"""
The toy with a teacher of another depth, width and vocabulary: it reads the student's text in its own
tokens, seven student positions in ten exactly.

    python bridge.py configs/toy_bridge_tokens.py && python distill.py configs/toy_bridge_tokens.py
"""
from configs.toy_bridge import config

config = config | dict(
    out_dir='out/toy_bridge_tokens', bridge='out/toy_bridge_tokens_stage1',
    toy_teacher_width=128, toy_teacher_tokens='merged', toy_teacher_steps=280, bridge_rank=32,
)
