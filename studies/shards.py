"""
What each rank holds of a student in training: bytes of weights, gradients and AdamW's moments, measured.

A student of random weights is cut into shards as distill.py does it, reads a few tokens, and takes a backward
of the sum of its last states. Then every rank counts the bytes of its own tensors. The table shows the rank
that holds most. Simpler than a run: there is no teacher and no rollout, and activations are not counted.

    python -m studies.shards                                            one rank: all of it
    torchrun --nproc_per_node=4 -m studies.shards                       four ranks share one copy
    torchrun --nproc_per_node=4 -m studies.shards --shard_ranks=2       two copies, a 2 x 2 mesh

Letters: as in support/memory.py.
"""
import torch

from model import PRESETS, Model, init_weights
from support.command_help import OneLineParser
from support.optimizer import adamw
from support.runtime import all_gather, bytes_on_rank, print0, run, shard, start


def held(c, env):
    """One backward of a student (its ModelConfig) -> a list with one {'weights', 'gradients', 'optimizer':
    bytes} for each rank."""
    student = init_weights(Model(c), seed=0).to(env.device)
    student.head.requires_grad_(c.tied)      # Eq. (6) never reaches it
    shard(student, env)
    optimizer = adamw(student, 1e-5, (0.9, 0.999), 1e-8, 0.01)
    ids = torch.arange(8, device=env.device)[None] % c.V                     # (1, T)
    states, = student.hidden(ids, [c.L])                                     # (1, T, d)
    states.sum().backward()
    return all_gather(bytes_on_rank(student, optimizer))


def lines(c, env, ranks):
    """What the ranks hold -> a table of two lines: the rank with most, and the sum over all of them."""
    rows = ['ranks  copies  of            weights  gradients      AdamW    (MB)']
    for name, of in (('largest rank', max), ('all ranks', sum)):
        sizes = [of(rank[key] for rank in ranks) / 1e6 for key in ('weights', 'gradients', 'optimizer')]
        rows.append(f'{env.world:5d}  {env.world // env.shard_ranks:6d}  {name:12s}' +
                    ''.join(f'{size:11.3f}' for size in sizes))
    return rows


def main(args):
    env = start(args.device, args.dtype, args.shard_ranks)
    c = PRESETS[args.model]
    print0(f'{args.model}: {c.count() / 1e6:.2f}M weights')
    print0('\n'.join(lines(c, env, held(c, env))))


def parsed():
    """The command line."""
    parser = OneLineParser('studies/shards.py', '[--shard_ranks=2] [--model=toy]')
    parser.add_argument('--model', default='toy', choices=PRESETS, help='a shape of model.PRESETS')
    parser.add_argument('--shard_ranks', type=int, default=0, help='that share a copy; 0: those of a machine')
    parser.add_argument('--device', default='auto', choices=('auto', 'cuda', 'cpu', 'mps'))
    parser.add_argument('--dtype', default='auto', choices=('auto', 'bfloat16', 'float32'))
    return parser.parse_args()


if __name__ == '__main__':
    run(main, parsed)
