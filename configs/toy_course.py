"""
The toy for a class (docs/course.md): chains of four operations in place of six, fewer steps, a smaller
evaluation. On one core the models take about a minute, and every run after that about half a minute.

    python distill.py configs/toy_course.py
"""
from configs.toy import config

config = config | dict(
    out_dir='out/course/all', toy_ops=4, steps=60,
    eval_n=8, eval_problems=64, log_every=10,
)
