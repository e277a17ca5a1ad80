"""
Heal a damaged model: the student is a copy that studies/damage.py has made, the intact model is its teacher.
docs/real_model.md shows how to make out/smollm2, a real model without a hub, and its damaged copies.

    python distill.py configs/heal.py student=out/smollm2-noise teacher=out/smollm2
    python -m studies.agreement out/smollm2 out/smollm2-noise out/heal/last        before and after
"""
from configs.default import config

config = config | dict(
    out_dir='out/heal', student='out/smollm2-noise', teacher='out/smollm2',
    data='studies/heal/train.jsonl',         # from the project's folder
    prompts_per_step=6, n=1, max_new_tokens=48,
    positions='all',            # answers are short
    rep_loss='cosine',          # on pretrained weights the last layers have nearly all of 'mse'
    layer_map='kept',           # a damaged folder says which layers it has
    steps=24, lr=3e-4, warmup=0.1, beta2=0.95, weight_decay=0.0,

    # Short exact answers, greedily. The intact model has all of them right, so it is not asked.
    eval_data='studies/heal/exact.jsonl', eval_n=1, eval_temperature=0.0, eval_max_new_tokens=16,
    eval_every=0, eval_teacher=False,

    # A checkpoint has the weights four times (2 GB for SmolLM2): one, at the end.
    save_every=10_000, keep=1,
    diagnose_every=4, diagnose_rows=64,
)
