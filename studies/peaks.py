"""
The memory that a dry run estimates, beside what a CPU run really takes.

    python -m studies.peaks                       every configuration below, about seven minutes on two cores
    python -m studies.peaks 'exact KL'            one of them
    python -m studies.peaks --allocator default   with the C library's own settings (see below)
    python -m studies.peaks --count               an update at the paper's shapes, counted: a few seconds

Each configuration is one step of distill.py between two random models, in processes of its own. Their private
memory (RssAnon of /proc: not the memory-mapped files of weights, nor the libraries' code) is read every few
milliseconds, less what a process has after its imports. A run has three parts, which are told apart by the
files that it writes: the start (loading, evaluation), the step (rollout, update) and the save.

Freed memory does not always go back to the system. glibc raises the size from which it does with each block
that is freed, up to 32 MB, and keeps what is smaller: on these runs up to 45% more than the tensors need. So
the processes run with MALLOC_MMAP_THRESHOLD_=131072, which holds that size where it begins;
`--allocator default` measures without it. What is estimated is what tensors need.

`--count` runs steps 4 and 5 of a training step on PyTorch's meta device, where tensors have shapes and no
numbers, and adds up all that are alive at once. RMSNorm and attention are one operation each, as on CUDA.
What a kernel allocates for itself is not seen.

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
import weakref
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs import load_config
from formats.huggingface import read_config, save_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer, shared_size
from kernels import mlp_in_pieces
from kernels.mlp_in_pieces import PIECE
from losses import HiddenTerm
from model import PRESETS, Model, ModelConfig
from step import Objective, Rows, accumulate
from studies.children import show_failure
from studies.toy import write_tokenizer
from support.command_help import OneLineParser
from support.files import read_json, write_json
from support.memory import Plan, phases, work_of
from support.runtime import ROOT, Env, UserError, run

MB = 1e6
GB = 1e9
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
    'OPRD, MLP in pieces': ('wide', 1, dict(prompts_per_step=48, checkpointing=True)),
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


# ---- what is counted -----------------------------------------------------------------------------

class Apart(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at once, those of some shapes apart.

    shapes: of the gradients. activations, gradients: the most bytes that were alive, of each kind.
    """
    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes
        self.known = weakref.WeakSet()
        self.alive = {'activations': 0, 'gradients': 0}
        self.peak = dict(self.alive)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        arguments = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                memory = tensor.untyped_storage()
                if memory not in arguments and memory not in self.known:
                    self.known.add(memory)
                    kind = 'gradients' if tensor.shape in self.shapes else 'activations'
                    self.change(kind, memory.nbytes())
                    weakref.finalize(memory, self.change, kind, -memory.nbytes())
        return result

    def change(self, kind, size):
        self.alive[kind] += size
        self.peak[kind] = max(self.peak[kind], self.alive[kind])


class OneNorm(torch.autograd.Function):
    """RMSNorm as CUDA has it: one operation, which keeps its input and a number for each row. No numbers."""
    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


def flash_attention(q, k, v, is_causal, enable_gqa):
    """Attention as CPUs and GPUs have it, in one operation. Meta tensors would get T x T scores."""
    assert is_causal
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]


def counted_update(c, answers, tokens, piece=PIECE):
    """An update in bfloat16 with recomputed blocks: answers of so many tokens, the last 2,000 supervised in
    every layer. -> the most bytes of activations, the teacher's rows among them, and apart of the gradients
    of large matrices in the backward of one block."""
    K = answers * min(2000, tokens)
    hidden = HiddenTerm('mse')
    as_on_a_gpu = {'rms_norm': OneNorm.apply, 'scaled_dot_product_attention': flash_attention}
    with torch.device('meta'), patch.object(mlp_in_pieces, 'PIECE', piece), patch.multiple(F, **as_on_a_gpu):
        torch.set_default_dtype(torch.bfloat16)
        student = Model(c)
        teacher = Model(c).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        student.checkpointing = True
        student.head.requires_grad_(False)           # Eq. (6) never reaches it

        # The gradients of a block go into their shards, or into the sums of a step, as soon as they are made.
        large = [weight for weight in student.parameters() if weight.numel() > 10**7]
        for weight in student.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, 'grad', None))

        # One micro-batch. Which tokens and positions does not matter.
        ids = torch.zeros(answers, tokens, dtype=torch.long)
        at = torch.zeros(K, dtype=torch.long)
        rows = Rows(ids, at, torch.ones(K), at, at, ids, at, at > 0, None)
        layer_map = {l: l for l in range(1, c.L + 1)}
        with Apart({weight.shape for weight in large}) as counter:
            accumulate(student, teacher, [rows], Objective(layer_map, hidden, None), {'oprd': 1.0})
    return counter.peak


def print_counts():
    """The update of R1-Distill-Qwen-1.5B with one and two answers of 16k tokens, and its gradients."""
    c = PRESETS['r1_1p5b']
    print(f'{"GB":40}{"whole MLP":>12}{"in pieces":>12}')
    for answers in (1, 2):
        sizes = [counted_update(c, answers, 16_384, piece)['activations'] for piece in (10**9, PIECE)]
        print(f'{f"activations, {answers} x 16k":40}{sizes[0] / GB:12.2f}{sizes[1] / GB:12.2f}', flush=True)
    learned = c.count() - c.V * c.d
    for ranks in (1, 8):
        print(f'{f"float32 gradients, a rank of {ranks}":40}{4 * learned / ranks / GB:12.2f}')


def main(args):
    if args.count:
        print_counts()
        return
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
    parser = OneLineParser('studies/peaks.py', "['NAME' ...] [--allocator default] | --count")
    parser.add_argument('--count', action='store_true', help='count an update on the meta device instead')
    parser.add_argument('names', nargs='*', choices=[*CASES, []], help='configurations; none: all of them')
    parser.add_argument('--allocator', choices=('fixed', 'default'), default='fixed')
    return parser.parse_args()


if __name__ == '__main__':
    run(main, arguments)
