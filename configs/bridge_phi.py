"""
Section 4.2.4: Phi-4-mini-reasoning teaches Qwen3-1.7B-Base, rank 4, tokenizers unlike. Here the teacher
reads the text; teacher_ids=student is the published setting, in which it reads gibberish.

    torchrun --nproc_per_node=8 bridge.py config/bridge_phi.py
    torchrun --nproc_per_node=8 --shutdown-timeout=600 distill.py config/bridge_phi.py
"""
from configs.bridge_qwen import config

config = config | dict(
    out_dir='out/bridge_phi', bridge='out/bridge_phi_stage1', bridge_rank=4,
    teacher='microsoft/Phi-4-mini-reasoning',
)
