"""
The paper's main experiment, section 4.1.1: JustRL-DeepSeek-1.5B teaches DeepSeek-R1-Distill-Qwen-1.5B on
DAPO-Math-17K. 500 steps of 8 prompts x 2 answers of up to 16,384 tokens, all 28 layers, last 2000 positions.

    torchrun --nproc_per_node=8 --shutdown-timeout=600 distill.py config/r1_1p5b.py
"""
from configs.default import config

config = config | dict(
    out_dir='out/r1_1p5b',
    student='deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B',
    teacher='hbx/JustRL-DeepSeek-1.5B',
    data='BytedTsinghua-SIA/DAPO-Math-17k',     # repeats each problem a hundred times; each is read once
    eval_data='aime24,aime25,aimo', eval_every=20,      # Figure 4: three sets, a point every 20 steps
    # Eq. (6) to the letter. On pretrained models its last layers weigh most (docs/objectives.md);
    # rep_loss=cosine is the scale-free form.
    rep_loss='mse',
    checkpointing=True,
    # everything else is the paper's and stands in default.py
)
