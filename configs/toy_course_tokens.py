"""
The small toy of docs/course.md with a teacher of another depth, width and vocabulary. On one core its models
take two to three minutes, the bridge half a minute, and every run after that about a minute.

    python bridge.py configs/toy_course_tokens.py && python distill.py configs/toy_course_tokens.py
"""
from configs.toy_bridge_tokens import config

config = config | dict(
    out_dir='out/course/from_text', bridge='out/course/text', toy_ops=4,
    toy_teacher_layers=5, toy_teacher_steps=240, bridge_prompts=256,
    steps=100, eval_every=50, eval_n=8, eval_problems=64, log_every=10,
)
