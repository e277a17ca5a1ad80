"""
The ranks of a bridge, for docs/course.md: chains of four operations, a teacher of other depth and width. On
one core the models take two to three minutes a seed, and every run after that less than a minute.

    python -m studies.compare toy_ranks
"""
small = ['configs/toy_bridge.py', 'toy_ops=4', 'toy_teacher_layers=5', 'toy_teacher_width=128',
         'toy_teacher_steps=240', 'bridge_prompts=256', 'steps=100', 'eval_every=50', 'eval_n=8',
         'eval_problems=64', 'log_every=10']

seeds = [0]                     # a seed more is two to three minutes more
bridges = {'ridge': small}
runs = {f'rank {rank}': [*small, 'bridge={ridge}', f'bridge_rank={rank}'] for rank in (2, 8, 32)}
