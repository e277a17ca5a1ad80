"""
The same with a teacher that has other tokens as well: it reads the student's text, or, as a control, its ids.

    python bridge.py configs/toy_course_tokens.py && python distill.py configs/toy_course_tokens.py
"""
from configs.toy_course_bridge import config

config = config | dict(
    out_dir='out/course/from_text', bridge='out/course/text', toy_teacher_tokens='merged', bridge_rank=32,
)
