"""
The ranks of a bridge, for docs/course.md: one bridge gives every rank, and each is distilled through.

    python -m studies.compare toy_ranks
"""
fit = ['configs/toy_course_bridge.py']

seeds = [0]                     # each more costs as much again, the models included
bridges = {'ridge': fit}
runs = {f'rank {rank}': [*fit, 'bridge={ridge}', f'bridge_rank={rank}'] for rank in (2, 8, 32)}
