"""
Section 4.2: Qwen3-4B teaches Qwen3-1.7B-Base through a bridge of rank 8; last 2000 positions, all 28
student layers.

    torchrun --nproc_per_node=8 bridge.py config/bridge_qwen.py
    torchrun --nproc_per_node=8 --shutdown-timeout=600 distill.py config/bridge_qwen.py
"""
from configs.r1_1p5b import config

config = config | dict(
    out_dir='out/bridge_qwen', bridge='out/bridge_qwen_stage1', bridge_rank=8,
    student='Qwen/Qwen3-1.7B-Base', teacher='Qwen/Qwen3-4B',
    # the paper does not say how the data's own instruction and thinking are set; the authors' code: off
    enable_thinking=False,
)
