"""
The memory that a dry run estimates, beside what a CPU run really takes.

    python -m studies.peaks                       every configuration below, about five minutes on two cores
    python -m studies.peaks 'exact KL'            one of them
    python -m studies.peaks --allocator default   with the C library's own settings (see below)

Each configuration is one step of distill.py between two random models, in processes of its own. Their private
memory (RssAnon of /proc: not the memory-mapped files of weights, nor the libraries' code) is read every few
milliseconds, less what a process has after its imports. A run has three parts, which are told apart by the
files that it writes: the start (loading, evaluation), the step (rollout, update) and the save.

Freed memory does not always go back to the system. glibc raises the size from which it does with each block
that is freed, up to 32 MB, and keeps what is smaller: on these runs up to 45% more than the tensors need. So
the processes run with MALLOC_MMAP_THRESHOLD_=131072, which holds that size where it begins;
`--allocator default` measures without it. What is estimated is what tensors need.

Linux only. Simpler than usual: no profiler, no hooks. It cannot say which tensor was too large.
"""
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from configs import load_config
from formats.huggingface import read_config, save_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer, shared_size
from model import Model, ModelConfig
from studies.children import show_failure
from studies.toy import write_tokenizer
from support.command_help import OneLineParser
from support.files import read_json, write_json
from support.memory import Plan, phases, work_of
from support.runtime import ROOT, Env, UserError, run

MB = 1e6
FIXED = {'MALLOC_MMAP_THRESHOLD_': '131072'}

SHAPES = {
    'wide': ModelConfig('qwen3', V=8000, L=6, d=1024, H=8, G=4, e=128, ff=3072, context=4096),
    'llama': ModelConfig('llama', V=32_000, L=8, d=512, H=8, G=4, e=64, ff=1408, context=4096),
    'tied': ModelConfig('qwen3', V=50_000, L=6, d=512, H=8, G=2, e=64, ff=1536, tied=True, context=4096),
}
# Of so many words one in thousands ends an answer, so that answers are of full length.
USUAL = dict(prompts_per_step=4, n=1, max_new_tokens=100, positions='all', steps=1, eval_n=1, eval_every=0)

# name -> shape, ranks, what differs from USUAL. Evaluations are of eight problems.
CASES = {
    'OPRD, float32': ('wide', 1, dict(prompts_per_step=8)),
    'OPRD, blocks recomputed': ('wide', 1, dict(prompts_per_step=16, checkpointing=True)),
    'OPRD, bfloat16': ('wide', 1, dict(dtype='bfloat16')),
    'OPRD, two ranks': ('llama', 2, dict(prompts_per_step=16)),
    'OPRD, one long sequence': ('wide', 1, dict(prompts_per_step=1, max_new_tokens=800, positions='last_k')),
    'exact KL': ('llama', 1, dict(oprd_weight=0.0, opd_weight=1.0, opd='full')),
    'OPRD and top-16, tied head': ('tied', 1, dict(opd_weight=1.0)),
    'evaluation of 64 answers': ('wide', 1, dict(max_new_tokens=10, eval_n=8, eval_max_new_tokens=250)),
}


def make_models(folder, c):
    """Two random models, their tokenizer and problems -> the keys of the config that name them."""
    # The toy's tokenizer, with words that never occur up to the size of the vocabulary.
    source = folder / 'tokenizer'
    source.mkdir()
    write_tokenizer(source)
    tokenizer = read_json(source / 'tokenizer.json')
    words = tokenizer['model']['vocab']
    for number in range(len(words), c.V):
        words[f'w{number}'] = number
    write_json(source / 'tokenizer.json', tokenizer)

    for seed, side in enumerate(('student', 'teacher')):
        torch.manual_seed(seed)
        save_model(Model(c), folder / side, source=source)
    rng = random.Random(0)
    for name, count in (('data', 64), ('eval_data', 8)):
        rows = [json.dumps({'question': f'{number}+{rng.randrange(10)}', 'answer': '3'}) + '\n'
                for number in range(100, 100 + count)]
        (folder / f'{name}.jsonl').write_text(''.join(rows))
    return {'student': folder / 'student', 'teacher': folder / 'teacher', 'data': folder / 'data.jsonl',
            'eval_data': folder / 'eval_data.jsonl', 'out_dir': folder / 'out'}


# ---- what is estimated ---------------------------------------------------------------------------

def estimated(arguments, ranks):
    """{part of a run: bytes}."""
    cfg = load_config(arguments)
    dtype = torch.bfloat16 if cfg['dtype'] == 'bfloat16' else torch.float32
    student = read_config(cfg['student'])
    tok = load_tokenizer(cfg['student'])
    problems = [load_problems(cfg[key], tok) if cfg[key] else [] for key in ('data', 'eval_data')]
    layer_map = {l: l for l in range(1, student.L + 1)}
    work = work_of(cfg, ranks, *problems, shared_size(tok, tok))
    env = Env(0, ranks, 0, torch.device('cpu'), dtype, ranks)
    sizes = {'evaluate': 0}
    for phase, parts in phases(Plan(cfg, student, student, layer_map, work, env)).items():
        sizes[phase] = sum(parts.values())
    return {'start': max(sizes['load'], sizes['evaluate']), 'step': max(sizes['sample'], sizes['update']),
            'save': sizes['save']}


# ---- what is measured ----------------------------------------------------------------------------

def private_memory(process):
    """Bytes of a process's private memory now; 0 after its end."""
    try:
        with open(f'/proc/{process}/status') as file:
            sizes = dict(line.split(':') for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kinds = ('RssAnon', 'RssShmem')
    return sum(int(sizes[kind].split()[0]) * 1024 for kind in kinds if kind in sizes)


def after_imports(environment):
    """Private memory of a process that has imported distill.py and does nothing else."""
    code = 'import distill; from studies.peaks import private_memory; print(private_memory("self"))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True,
                          env=environment)
    return int(done.stdout)


def part_of(out):
    """Which part is a run in, by what lies in its folder?"""
    names = os.listdir(out) if out.exists() else []
    if any('ckpt-' in name for name in names):
        return 'save'
    log = out / 'log.jsonl'
    return 'step' if log.exists() and log.stat().st_size else 'start'


def start_ranks(command, ranks, environment, stdout, cwd=ROOT):
    """Start a Python command as so many ranks of this machine -> their processes. cwd: where it runs."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(ranks):
        where = {}
        if ranks > 1:
            where = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(ranks),
                     'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        running.append(subprocess.Popen([sys.executable, *command], cwd=cwd, text=True,
                                        env=environment | where, stdout=stdout, stderr=subprocess.PIPE))
    return running


def measured(command, ranks, out, environment, cwd=ROOT):
    """Run a Python command that is a run of distill.py in the folder `out` -> {part of the run: most bytes of
    private memory, of the rank that needs most}."""
    running = start_ranks(command, ranks, environment, stdout=subprocess.DEVNULL, cwd=cwd)
    most = dict.fromkeys(('start', 'step', 'save'), 0)
    try:
        while any(child.poll() is None for child in running):
            part = part_of(out)
            for child in running:
                most[part] = max(most[part], private_memory(child.pid))
            time.sleep(0.003)
    finally:
        for child in running:                # after Ctrl-C they may still run
            child.kill()
    for child in running:
        if child.wait():
            raise UserError(show_failure('distill.py', child.stderr.read()))
    return most


def compared(c, ranks, keys, environment):
    """A configuration between two random models of a shape -> {part: bytes} estimated, {part: bytes}
    measured, both beyond what a process has after its imports."""
    imports = after_imports(environment)
    with tempfile.TemporaryDirectory() as folder:
        files = make_models(Path(folder), c)
        if 'eval_max_new_tokens' not in keys:
            files['eval_data'] = ''
        arguments = [f'{key}={value}' for key, value in (USUAL | files | keys).items()]
        estimate = estimated(arguments, ranks)
        most = measured(['distill.py', *arguments], ranks, files['out_dir'], environment)
    return estimate, {part: size - imports for part, size in most.items()}


def main(args):
    environment = dict(os.environ) | (FIXED if args.allocator == 'fixed' else {})
    print(f'allocator: {args.allocator}')
    print(f'{"MB beyond the imports":28}{"part":8}{"estimated":>10}{"measured":>10}{"ratio":>8}')
    for name in args.names or CASES:
        shape, ranks, keys = CASES[name]
        estimate, need = compared(SHAPES[shape], ranks, keys, environment)
        for part, size in estimate.items():
            mark = ' peak' if size == max(estimate.values()) else ''
            ratio = size / need[part]
            sizes = f'{size / MB:10.0f}{need[part] / MB:10.0f}'
            print(f'{name:28}{part:8}{sizes}{ratio:8.2f}{mark}', flush=True)


def arguments():
    """The command line."""
    parser = OneLineParser('studies/peaks.py', "['NAME' ...] [--allocator default]")
    parser.add_argument('names', nargs='*', choices=[*CASES, []], help='configurations; none: all of them')
    parser.add_argument('--allocator', choices=('fixed', 'default'), default='fixed')
    return parser.parse_args()


if __name__ == '__main__':
    run(main, arguments)
