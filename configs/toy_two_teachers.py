"""
Two specialists into one generalist: one teacher knows sums, the other products, and each reads the student's
answers to its own problems. Each of the two held-out sets has its own scores.

    python distill.py configs/toy_two_teachers.py
"""
from configs.toy import config

config = config | dict(out_dir='out/toy_two_teachers', toy_halves=True, lr=4e-3)
