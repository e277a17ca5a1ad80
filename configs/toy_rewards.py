"""
Rewards for right answers alone, without distillation: GRPO on problems of three operations. The student
answers a third to a half of them rightly. Rewards are a weaker signal than a teacher, so a step has many
answers.

    python distill.py configs/toy_rewards.py
"""
from configs.toy import config

config = config | dict(
    out_dir='out/toy_rewards', toy_ops=3, toy_student_steps=200, toy_teacher_steps=100, max_new_tokens=30,
    oprd_weight=0.0, reward_weight=1.0, prompts_per_step=64, n=8, lr=1e-4, beta2=0.99, schedule='constant',
)
