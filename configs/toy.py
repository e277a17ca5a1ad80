"""
The paper's story on two CPU cores, from nothing to a table and a figure in about three minutes:
a 0.45M-parameter student that adds and multiplies modulo 10 badly, a teacher that does it well.

    python distill.py configs/toy.py
    torchrun --nproc_per_node=2 distill.py configs/toy.py
"""
from configs.default import config

config = config | dict(
    out_dir='out/toy',
    student='toy', teacher='toy', data='toy', eval_data='toy',
    prompts_per_step=16, n=2, max_new_tokens=48,
    positions='all',            # answers are 40 tokens long
    steps=100, lr=2e-3, beta2=0.95, weight_decay=0.0,
    eval_every=20, eval_rows=2048, save_every=20, log_every=5,
)
