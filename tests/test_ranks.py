"""Several ranks on gloo against one process: the same answers, gradient, log and checkpoint. Two ranks, and two
torchrun nodes of two ranks each, where the default is a 2 x 2 mesh; each is started once for all that it shall do."""
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_SUMS, argv, log_of, rounding, tiny_model
from on_ranks import gradient
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor

import bridge
from configs import load_config
from distill import evaluate_model, main
from formats.huggingface import load_model, save_model
from model import PRESETS
from studies import shards
from support.runtime import ROOT, Env, Meeting, UserError, all_reduce, gathered, ranks_of_a_copy, shard

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def torchrun(*args, nodes=1):
    """Two ranks on each node, all on this machine -> what rank 0 has printed."""
    address = ['--master_addr=127.0.0.1', f'--master_port={free_port()}'] if nodes > 1 else ['--standalone']
    started = []
    for node in range(nodes):
        command = [*TORCHRUN, f'--nnodes={nodes}', f'--node_rank={node}', *address, *map(str, args)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    printed = [p.communicate(timeout=300) for p in started]
    for p, (out, err) in zip(started, printed, strict=True):
        assert p.returncode == 0, out + err
    return printed[0][0]


# ---- gradients ----------------------------------------------------------------------------------

def case(ranks, models='toy', **arguments):
    return dict(ranks=ranks, models=models, arguments=arguments)


GRADIENTS = {
    # With a small budget some ranks need fewer micro-batches than others, and run empty ones.
    'one micro-batch': case(2, budget=10**6),
    'micro-batches, blocks recomputed': case(2, recompute=True),
    'float32': case(2, 'untied', dtype='float32', recompute=True),
    'topk, tied': case(2, 'tied', opd='topk', recompute=True),
    'sampled, untied': case(2, 'untied', opd='sampled', recompute=True),
    'probe, untied': case(2, 'untied', opd='probe', recompute=True),
    'probe, tied': case(2, 'tied', opd='probe', recompute=True),
    'bfloat16': case(2, budget=10**6, dtype='bfloat16'),
    'bfloat16, topk': case(2, 'untied', dtype='bfloat16', opd='topk'),
    'bfloat16, probe': case(2, 'untied', dtype='bfloat16', opd='probe'),
    'MLP in pieces': case(2, budget=10**6, recompute=True, piece=7),
    'MLP in pieces, float32, topk': case(2, 'tied', dtype='float32', opd='topk', recompute=True, piece=7),
    'bfloat16, MLP in pieces': case(2, budget=10**6, dtype='bfloat16', recompute=True, piece=7),
    'attention': case(2, opd='attention'),
    'attention, blocks recomputed': case(2, 'untied', opd='attention', recompute=True),
    # A 2 x 2 mesh by default, since LOCAL_WORLD_SIZE is 2.
    '2 x 2': case(4, recompute=True),
    '2 x 2, sharded teacher': case(4, 'untied', teacher_shard=True),
    '2 x 2, sharded teacher, full, untied': case(4, 'untied', opd='full', teacher_shard=True, recompute=True),
    '2 x 2, sharded teacher, topk, tied': case(4, 'tied', opd='topk', teacher_shard=True),
    '2 x 2, sharded teacher, probe, tied': case(4, 'tied', opd='probe', teacher_shard=True),
    '1 x 4, sharded teacher, sampled': case(4, 'untied', opd='sampled', shard_ranks=4, teacher_shard=True),
    '4 x 1': case(4, 'tied', opd='topk', shard_ranks=1),
    '2 x 2, bfloat16, sharded teacher': case(4, budget=10**6, dtype='bfloat16', teacher_shard=True),
}


@pytest.fixture(scope='module')
def started(toy_dir, toy_cfg, tmp_path_factory):
    """What was asked of four ranks, and then of two -> the folder with all of it, 'models' of each kind."""
    folder = tmp_path_factory.mktemp('ranks')
    models = {'toy': (toy_cfg['student'], toy_cfg['teacher'])}
    for kind in ('tied', 'untied'):
        models[kind] = folder / kind / 'student', folder / kind / 'teacher'
        for path, seed in zip(models[kind], (0, 1), strict=True):
            save_model(tiny_model(seed, tied=kind == 'tied'), path)
    jobs = {2: {'gradients': []}, 4: {'gradients': []}}
    for name, one in GRADIENTS.items():
        student, teacher = map(str, models[one['models']])
        jobs[one['ranks']]['gradients'].append(
            dict(out=str(folder / f'{name}.safetensors'), student=student, teacher=teacher, **one['arguments']))

    # Whole runs, and runs that go on on another mesh: 2 x 2, one rank, two ranks.
    def job(name, *more, **keys):
        return dict(name=name, args=arguments(toy_dir, folder / name, *more), **keys)
    jobs[4]['runs'] = [job('four', 'teacher_shard=True'), job('four, one, two', 'shard_ranks=2', interrupt_at=1),
                       job('bytes on four', *BYTES, f'toy_dir={folder / "merged"}', 'teacher_shard=True'),
                       job('specialists on four', *SPECIALISTS, 'teacher_shard=True'),
                       job('itself on four', *ITSELF, 'teacher_shard=True')]
    jobs[2]['runs'] = [job('two'), job('two by token', *BY_TOKEN), job('four, one, two'), job('one, two'),
                       job('two, one', interrupt_at=3),
                       job('specialists on two', *SPECIALISTS), job('rewards on two', *REWARDS),
                       job('itself on two', *ITSELF), job('itself, two, one', *ITSELF, interrupt_at=3)]
    torch.set_num_threads(1)
    main(load_config(arguments(toy_dir, folder / 'one')))
    main(load_config(arguments(toy_dir, folder / 'one by token', *BY_TOKEN)))
    main(load_config(arguments(toy_dir, folder / 'bytes on one', *BYTES, f'toy_dir={folder / "merged"}')))
    for name, keys in (('specialists', SPECIALISTS), ('rewards', REWARDS), ('itself', ITSELF)):
        main(load_config(arguments(toy_dir, folder / f'{name} on one', *keys)))
    printed = {}
    for ranks, one in jobs.items():
        (folder / f'{ranks}.json').write_text(json.dumps(one))
    printed[4] = torchrun('tests/on_ranks.py', folder / '4.json', nodes=2)
    alone(folder, 'four, one, two', 1, toy_dir)
    alone(folder, 'one, two', 1, toy_dir)
    printed[2] = torchrun('tests/on_ranks.py', folder / '2.json')
    main(load_config(arguments(toy_dir, folder / 'two, one')))
    main(load_config(arguments(toy_dir, folder / 'itself, two, one', *ITSELF)))
    return folder, models, printed


def alone(folder, name, interrupt_at, toy_dir):
    """One step of a run on one rank."""
    job = dict(name=name, args=arguments(toy_dir, folder / name), interrupt_at=interrupt_at)
    (folder / 'alone.json').write_text(json.dumps({'runs': [job]}))
    env = {**os.environ, 'RANK': '0', 'WORLD_SIZE': '1'}
    p = subprocess.run([sys.executable, 'tests/on_ranks.py', folder / 'alone.json'], cwd=ROOT, env=env, capture_output=True,
                       text=True)
    assert p.returncode == 0 and 'stopped after step' in p.stdout, p.stdout + p.stderr


@pytest.fixture(scope='module')
def on_one(started):
    """(kind of models, dtype, kind of output-space term) -> gradient, sums and rollout on one rank."""
    @cache
    def computed(models, dtype, opd):
        student, teacher = (load_model(path, dtype) for path in started[1][models])
        student.head.requires_grad_(student.config.tied or opd not in ('none', 'probe', 'attention'))
        return gradient(student, teacher.requires_grad_(False), 10**6, 0, 1, opd)
    return computed


def read(started, name):
    """A gradient that several ranks have written -> {name: gradient}, sums, the rest."""
    tensors = load_file(started[0] / f'{name}.safetensors')
    rest = {key: tensors.pop(key) for key in ('norm', 'bytes', 'answers')}
    sums = {key.removeprefix('sum '): tensors.pop(key) for key in list(tensors) if key.startswith('sum ')}
    return tensors, sums, rest


@pytest.mark.parametrize('name', [name for name in GRADIENTS if 'bfloat16' not in name])
def test_gradient_does_not_depend_on_the_ranks(started, on_one, name):
    """Answers, gradient, its norm and the sums, against one rank in one micro-batch. In float64, where a wrong weight of
    one row in a million would show, and within float32's rounding in the dtype that a run on CPUs has.

    Ranks hold unequal numbers of rows: the poorer ones run empty micro-batches, and nothing hangs. The head's gradient is
    formed inside its own FSDP group, or, tied, inside the root's; a probe gathers the frozen head and leaves no gradient. A
    sharded teacher's head is gathered apart from its blocks."""
    arguments = GRADIENTS[name]['arguments']
    dtype = getattr(torch, arguments.get('dtype', 'float64'))
    want, want_sums, roll = on_one(GRADIENTS[name]['models'], dtype, arguments.get('opd', 'none'))
    got, got_sums, rest = read(started, name)
    assert [ids[:len(answer)] for ids, answer in zip(rest['answers'].tolist(), roll.answers(), strict=True)] == roll.answers()
    assert got.keys() == want.keys()
    for key, grad in want.items():
        assert got[key].dtype == grad.dtype and (got[key] - grad).norm() <= rounding(grad, TINY_SUMS), key
    norm = torch.nn.utils.get_total_norm(want.values())
    assert abs(rest['norm'] - norm) <= rounding(norm, TINY_SUMS)

    # What is logged is float32 at most, and a sum over fewer than 100 positions.
    assert got_sums.keys() == want_sums.keys()
    for key, value in want_sums.items():
        assert (got_sums[key] - value).norm() <= rounding(value.float(), 100), key
    opd = arguments.get('opd', 'none')
    assert opd == 'none' or (want_sums['loss/attention'] if opd == 'attention' else want_sums['statistics'][0]) > 0


def assert_near_in_bfloat16(got, want, cosine):
    """Float32 gradients of forwards in bf16 against those of forwards in float32: the direction, and the length, for
    a cosine does not see a wrong factor. Each of the 3 or 4 blocks rounds its state about eight times, the way back
    as often: 64 roundings, which add up like a random walk."""
    assert got.keys() == want.keys() and all(g.dtype == torch.float32 for g in got.values())
    ours, exact = (torch.cat([grads[name].flatten() for name in want]) for grads in (got, want))
    assert abs(ours.norm() - exact.norm()) <= rounding(exact.bfloat16(), 64**0.5)
    assert torch.cosine_similarity(ours, exact, dim=0) > cosine


@pytest.mark.parametrize('name', [name for name in GRADIENTS if 'bfloat16' in name])
def test_bfloat16_forwards_keep_float32_gradients(started, on_one, name):
    """What GPUs run: bf16 weights gathered for blocks and head, fp32 chunks, fp32 reduction. Of the hidden-state term the
    layers are 1 and 3; with a probe the frozen head is gathered without a gradient."""
    opd = GRADIENTS[name]['arguments'].get('opd', 'none')
    want, sums, _ = on_one(GRADIENTS[name]['models'], torch.float32, opd)
    got, got_sums, _ = read(started, name)
    if opd != 'none':        # a reward is a small difference of two rounded log-probabilities
        assert all(torch.allclose(got_sums[key], value, rtol=0.1, atol=0.02) for key, value in sums.items())
    assert_near_in_bfloat16(got, want, 0.98 if opd == 'none' else 0.9)


@pytest.mark.parametrize('name, shards', [('float32', 2), ('2 x 2', 2), ('1 x 4, sharded teacher, sampled', 4), ('4 x 1', 1)])
def test_each_rank_holds_its_part(started, name, shards):
    """Bytes of weights, gradients and AdamW's moments. FSDP cuts the first axis, rounded up: no part is larger than that."""
    model = load_model(started[1][GRADIENTS[name]['models']][0])
    _, _, rest = read(started, name)
    size = 4 if 'dtype' in GRADIENTS[name]['arguments'] else 8
    whole = sum(p.numel() for p in model.parameters()) * size
    largest = sum(-(-len(p) // shards) * p[0].numel() for p in model.parameters()) * size
    for rank, (weights, gradients, moments) in enumerate(rest['bytes'].tolist()):
        assert weights <= largest and gradients <= weights and moments <= 2 * weights + 4 * 100, rank
    copies = len(rest['bytes']) // shards
    assert rest['bytes'][:, 0].sum() == copies * whole


def test_the_table_of_what_ranks_hold(started):
    """python -m studies.shards: on a 2 x 2 mesh a rank holds what one of two ranks does, and all ranks twice as much."""
    tables = {}
    for ranks, printed in started[2].items():
        tables[ranks] = [line.split()[-3:] for line in printed.splitlines() if 'largest rank' in line or 'all ranks' in line]
    whole = PRESETS['toy'].count() * 4 / 1e6
    assert tables[2][0] == tables[4][0] and float(tables[2][1][0]) == pytest.approx(whole, abs=1e-3)
    assert float(tables[4][1][0]) == pytest.approx(2 * whole, abs=1e-3)


# ---- whole runs ---------------------------------------------------------------------------------

KEYS = ('loss', 'rep/cos', 'grad_norm', 'len/mean', 'acc/rollout', 'finish')

# A mean over all tokens of the step: over those of one rank, the ranks would each count alike.
BY_TOKEN = ['loss_average=token', 'rep_loss=cosine', 'adam_eps=1e-5', 'eval_data=']

# A teacher with another vocabulary reads the text of the answers, and the next byte is compared.
BYTES = ['toy_teacher_tokens=merged', 'opd=byte', 'oprd_weight=0', 'opd_weight=1', 'eval_every=0']

# Two teachers and four answers: on four ranks each has answers of one teacher alone, and on two at least where the
# two prompts have the same teacher. The other teacher reads a prompt without an answer there.
SPECIALISTS = ['toy_halves=True', 'prompts_per_step=2', 'n=2', 'opd=full', 'opd_weight=0.5', 'eval_data=']

# Answer i goes to rank i % 2, so the three answers to a prompt are never on one rank. The usual student is too weak: all of
# its answers are wrong.
REWARDS = ['reward_weight=1', 'prompts_per_step=20', 'n=3', 'eval_data=', 'toy_student_steps=150']

# The student teaches itself with the solution in view, and moves after steps 2 and 4.
ITSELF = ['teacher=self', 'teacher_sees=solution', 'solution_text={solution}{question}', 'teacher_every=2',
          'teacher_decay=0.5', 'opd=full', 'opd_weight=1', 'eval_data=']


def arguments(toy_dir, out, *more):
    """Command line of a run, through the `config` link."""
    return ['config/toy.py', *argv(toy_dir, out, lr=1e-4)[1:], *more]


def assert_same_run(a, b, keys=KEYS):
    rows = log_of(a), log_of(b)
    assert [[r['step'] for r in rs] for rs in rows] == [[0, 1, 2, 3, 4]] * 2
    for x, y in zip(*(rs[1:] for rs in rows), strict=True):
        assert [x[k] for k in keys] == pytest.approx([y[k] for k in keys], rel=1e-5)
        assert x.get('adam/below_eps') == pytest.approx(y.get('adam/below_eps'), abs=1e-3)
    for p, q in zip(load_model(a / 'last').parameters(), load_model(b / 'last').parameters(), strict=True):
        assert (p - q).norm() <= 1e-5 * p.norm()


def assert_same_answers(a, b):
    """The ranks' answers are gathered into the files that one rank writes: none twice, none missing, in one order."""
    files = [{file.name: file.read_bytes() for file in (out / 'answers').iterdir()} for out in (a, b)]
    assert files[0] == files[1] and {'teacher.jsonl', '000000.jsonl'} <= set(files[0])


@pytest.mark.parametrize('name', ['two', 'four'])
def test_the_answers_of_an_evaluation_on_several_ranks(started, name):
    assert_same_answers(started[0] / 'one', started[0] / name)


@pytest.mark.parametrize('name, like', [('two', 'one'), ('two by token', 'one by token'), ('four', 'one')])
def test_a_whole_run_on_several_ranks(started, name, like):
    """Log and weights agree with one process; with four ranks the teacher is sharded too."""
    assert_same_run(started[0] / like, started[0] / name)


@pytest.mark.parametrize('name', ['one, two', 'two, one', 'four, one, two'])
def test_a_run_goes_on_on_other_ranks(started, name):
    """It was stopped after a step on each of them. A checkpoint of a 2 x 2 mesh holds each weight once."""
    assert_same_run(started[0] / 'one', started[0] / name)
    sizes = []
    for run in ('one', 'four'):
        files = (started[0] / run / 'ckpt-000004/resume').iterdir()
        sizes.append(sum(tensor.nbytes for file in files for tensor in load_file(file).values()))
    steps = len(load_file(next((started[0] / 'one/ckpt-000004/resume').iterdir())))      # 'step' is in every file
    assert sizes[0] <= sizes[1] <= sizes[0] + 4 * 4 * steps


def test_each_rank_saves_its_own_shard_alone(started):
    """A save gathered all of the resume state on the host of every rank, 21 GB each, although one rank wrote it."""
    sizes = {'00001': 0, '00002': 0}         # bytes of each rank's files
    for file in (started[0] / 'two/ckpt-000004/resume').iterdir():
        sizes[file.name.split('-')[1]] += sum(tensor.nbytes for tensor in load_file(file).values())
    assert max(sizes.values()) < 0.55 * sum(sizes.values())


def test_rank_0_alone_speaks(started):
    """One table and one line for each step, of each run, on one machine and on two."""
    for ranks, name in ((2, 'two'), (4, 'four')):
        printed = started[2][ranks].split(f'=== {name}\n')[1].split('===')[0]
        assert printed.count('Avg@2') == 2 and printed.count('step 0004') == 1
    assert [started[2][ranks].count('=== interrupted') for ranks in (2, 4)] == [2, 1]        # as many as were stopped


def test_a_sharded_teacher_with_another_vocabulary(started):
    """It reads its own prompts and its own tokens, in as many forwards on each rank."""
    assert_same_run(started[0] / 'bytes on one', started[0] / 'bytes on four', ('loss', 'opd/kl', 'grad_norm', 'align'))


@pytest.mark.parametrize('ranks', ['two', 'four'])
def test_two_teachers_of_which_a_rank_has_no_answer(started, ranks):
    """A rank without answers of a teacher must run as many forwards of both models as the others: on four ranks the
    teachers are sharded, and a missing one would hang. The weights are shares of all answers, whoever reads them."""
    assert_same_run(started[0] / 'specialists on one', started[0] / f'specialists on {ranks}', (*KEYS, 'opd/kl', 'loss/opd'))


def test_rewards_are_compared_over_the_ranks(started):
    """An answer has an advantage over the others to its prompt, which are on other ranks. Over those of its own rank alone
    it would be another number."""
    assert_same_run(started[0] / 'rewards on one', started[0] / 'rewards on two', (*KEYS, 'loss/oprd', 'loss/reward'))
    steps = log_of(started[0] / 'rewards on two')[1:]
    assert sum(row['loss/reward'] != 0 for row in steps) >= 2


@pytest.mark.parametrize('name', ['itself on two', 'itself on four', 'itself, two, one'])
def test_a_teacher_that_follows_the_student_on_several_ranks(started, name):
    """On two ranks the moving average is sharded and the teacher is not, on four both are. The last run was stopped after
    its third step: one rank then goes on with an average that two have saved."""
    assert_same_run(started[0] / 'itself on one', started[0] / name, (*KEYS, 'opd/kl', 'loss/opd'))


def test_a_teacher_that_does_not_fit_is_not_evaluated():
    """With eval_teacher=False nobody asks for its whole weights; setup.teachers is not even looked at."""
    setup = SimpleNamespace(tok=None, held_out={'set': []}, stop=[], vocab=0)
    cfg = load_config(['eval_teacher=False'])
    assert evaluate_model(cfg, setup, None, None, 0, 'teacher') == {}


# ---- errors -------------------------------------------------------------------------------------

def test_an_error_on_two_ranks_ends_both(toy_dir, tmp_path):
    p = subprocess.run([*TORCHRUN, '--standalone', 'distill.py', *argv(toy_dir, tmp_path / 'x', prompts_per_step=1, n=1)],
                       cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert p.returncode != 0 and p.stderr.count('gives 1 answers, fewer than the 2 ranks') == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / 'distill.py') not in p.stderr


def test_a_silent_rank_ends_the_run(tmp_path):
    """One line, exit code 2, and torchrun ends the sleeping rank. It was a traceback, after six hours. An evaluation is the
    longest wait; its answers were gathered without a name for the rank that is missing."""
    (tmp_path / 'late.json').write_text(json.dumps({'late': 1, 'timeout': 0.05}))
    p = subprocess.run([*TORCHRUN, '--standalone', 'tests/on_ranks.py', tmp_path / 'late.json'], cwd=ROOT, text=True,
                       capture_output=True, timeout=90)
    line = (f'error: rank 1 (host {socket.gethostname()}) has not finished the evaluation of the student '
            'after step 12, and the others waited for 0.05 minutes')
    assert p.returncode == 1 and p.stderr.count(line) == 1 and p.stderr.count('error: ') == 1
    assert re.search(r'rank +: 0 .*\n +exitcode +: 2 ', p.stderr)


def without_torchrun(tmp_path, job):
    """Two processes, of which the first holds the store -> both of them."""
    (tmp_path / 'job.json').write_text(json.dumps(job))
    where = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    started = []
    for rank in ('0', '1'):
        env = {**os.environ, **where, 'RANK': rank, 'LOCAL_RANK': rank, 'OMP_NUM_THREADS': '1'}
        started.append(subprocess.Popen([sys.executable, 'tests/on_ranks.py', tmp_path / 'job.json'], cwd=ROOT, env=env,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    return started


def test_ranks_without_torchrun_stop_together(tmp_path):
    """The store of `barrier` lies in rank 0 then. It left as soon as it had noted that both had come, and the other one, which
    looks five times a second, said that the first machine does not answer, with exit code 2."""
    started = without_torchrun(tmp_path, {'stop': 1.0})
    printed = [p.communicate(timeout=90)[1] for p in started]
    assert printed == ['\ninterrupted\n'] * 2 and [p.returncode for p in started] == [130, 130]


def test_a_frozen_rank_is_found_long_before_the_timeout(tmp_path):
    """A machine that died left the others idle for an hour. Stopped with SIGSTOP, a rank keeps its connections."""
    started = without_torchrun(tmp_path, {'frozen': 1})
    try:
        printed = started[0].communicate(timeout=90)[1]
    finally:
        started[1].kill()
        started[1].communicate()
    assert started[0].returncode == 2
    assert printed == (f'error: rank 1 (host {socket.gethostname()}) is dead or stopped: no sign of life for 1.5 s, while '
                       'others wait for the rollout of step 12; look there\n')


def met(ranks, late, minutes, told=''):
    """Ranks as threads: each waits three times; those of `late` come too late for the third time -> what each got. told:
    the error with which they end instead."""
    store = dist.HashStore()
    errors = {}

    def go(rank):
        meeting = Meeting(store, rank, ranks, minutes, 'localhost')
        store.set(f'host of {rank}', f'node{rank // 2}')
        for number in (1, 2, 3):
            if rank in late and number == 3:
                if told:
                    meeting.tell(told)
                return
            time.sleep(0.01 * rank)
            try:
                meeting.wait(f'task {number}', minutes)
            except UserError as error:
                errors[rank] = str(error)
    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return errors


@pytest.mark.parametrize('late, told', [
    ([], None), ([2], 'rank 2 (host node1) has'), ([0], 'rank 0 (host node0) has'),
    ([1, 3], 'rank 1 (host node0), rank 3 (host node1) have')])
def test_a_silent_rank_is_named(monkeypatch, late, told):
    """By every rank that waits. A collective says that a socket has timed out, after six hours."""
    monkeypatch.setattr('support.runtime.HEAD_START', 0)
    errors = met(4, late, 0.02)
    assert set(errors) == (set(range(4)) - set(late) if late else set())
    for line in errors.values():
        assert line == f'{told} not finished task 3, and the others waited for 0.02 minutes; look at the log there, or raise timeout='


def test_a_rank_that_has_never_come_is_named():
    """nccl lets the others go on without it. Its host was waited for in the store, after the wait for the rank, and then
    there was a traceback."""
    meeting = Meeting(dist.HashStore(), 0, 2, 0.001, 'localhost')
    meeting.store.set_timeout(timedelta(seconds=1))
    with pytest.raises(UserError, match=r'^rank 1 has not finished task, and the others waited for 0.001 minutes'):
        meeting.wait('task', 0.001)


def test_the_second_rank_names_the_silent_one_without_the_store(monkeypatch):
    """It waits so that the first one speaks first. That one's exit took the store away, and the second one's names with it:
    a traceback instead of a line."""
    class Store(dist.HashStore):
        def check(self, keys):
            if slept:
                raise dist.DistNetworkError('Connection reset by peer')
            return super().check(keys)
    slept = []
    meeting = Meeting(Store(), 1, 3, 0, 'localhost')
    monkeypatch.setattr('support.runtime.time.sleep', slept.append)
    meeting.store.add('arrivals of 0', 1)
    with pytest.raises(UserError, match='^rank 2 has not finished task, '):
        meeting.wait('task', 0)
    assert slept == [3]


@pytest.mark.parametrize('dead', [True, False])
def test_a_dead_rank_is_told_from_a_slow_one(monkeypatch, dead):
    """Rank 0 follows rank 2. A slow rank is waited for until the timeout, and its signs of life come meanwhile."""
    monkeypatch.setattr('support.runtime.SIGN', 0.05)
    store = dist.HashStore()
    slow = Meeting(store, 0, 3, 0, 'localhost')
    if dead:
        store.add('signs of 0', 1)
    else:
        monkeypatch.setattr(dist.HashStore, 'clone', lambda self: self, raising=False)
        slow.live()
    line = 'rank 0 is dead or stopped: no sign of life for 0.75 s' if dead else 'rank 0, rank 1 have not finished task, and the'
    with pytest.raises(UserError, match=f'^{line}'):
        Meeting(store, 2, 3, 0, 'localhost').wait('task', 1 if dead else 0.05)


def test_an_error_of_one_rank_ends_those_that_wait_for_it():
    """On other machines, where torchrun does not stop them: they waited for six hours."""
    errors = met(4, [2], 10, 'x.json: broken; fetch it again')
    assert errors == dict.fromkeys((0, 1, 3), 'rank 2 (host node1) has ended: x.json: broken; fetch it again')


def test_ranks_of_a_copy():
    """Those of a machine, unless machines have unequal numbers of ranks."""
    assert [ranks_of_a_copy(0, 16, '8'), ranks_of_a_copy(0, 8, '8'), ranks_of_a_copy(0, 1, None)] == [8, 8, 1]
    assert [ranks_of_a_copy(0, 12, '8'), ranks_of_a_copy(0, 12, None), ranks_of_a_copy(6, 12, '4')] == [12, 12, 6]
    with pytest.raises(UserError, match='shard_ranks=8 does not divide the 12 ranks; give a divisor'):
        ranks_of_a_copy(8, 12, '4')
    with pytest.raises(UserError, match='shard_ranks=-2 does not divide the 2 ranks'):
        ranks_of_a_copy(-2, 2, '2')


@pytest.mark.parametrize('word', ['--device=gpu', '--dtype=int8', '--model=gpt', '--shard_ranks=two', '--shards=2'])
def test_a_wrong_option_of_studies_shards_is_one_line(monkeypatch, word):
    """--device=gpu and --dtype=int8 were tracebacks of torch, the others four lines."""
    monkeypatch.setattr(sys, 'argv', ['shards.py', word])
    with pytest.raises(UserError, match='; see --help$'):
        shards.parsed()


def test_a_bridge_wants_a_whole_teacher():
    """Ranks of bridge.py read unequal numbers of micro-batches: with a sharded teacher one would wait for ever."""
    with pytest.raises(UserError, match='teacher_shard=True: in bridge.py .* set it to False here'):
        bridge.main(load_config(['configs/toy_bridge.py', 'teacher_shard=True']))


@pytest.mark.parametrize('backend, moves', [('nccl', 'cuda'), ('gloo', 'cpu')])
def test_all_reduce_refuses_tensors_that_its_library_does_not_move(backend, moves, monkeypatch):
    """nccl knows no CPU tensors: every bridge run on several GPUs died after its fit, and gloo, on which the tests
    run, hid it. The check runs on one rank too, and without a GPU ("meta" stands for any other device)."""
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 1)
    monkeypatch.setattr(dist, 'get_backend', lambda: backend)
    x = torch.ones(2)
    if moves == 'cpu':
        assert all_reduce(x) is x
        x = x.to('meta')
    with pytest.raises(AssertionError, match=f'{backend} connects the ranks, which moves {moves} tensors; .*env.device'):
        all_reduce(x)


def test_a_sharded_model_is_plain_only_while_it_is_gathered():
    """`plain` promised whole weights and kept DTensors, which fail in the middle of somebody's own evaluation. A mesh
    of one rank shards in bfloat16."""
    assert not dist.is_initialized()
    try:
        model = shard(tiny_model(), Env(0, 1, 0, torch.device('cpu'), torch.bfloat16, 1))
        ids = torch.tensor([[1, 2, 3]])
        want = tiny_model().to(torch.bfloat16)(ids)
        with pytest.raises(RuntimeError, match=r'use `with gathered\(model\)'):
            model.plain()
        with gathered(model) as whole, torch.no_grad():
            assert not any(isinstance(p, DTensor) for p in whole.parameters()) and torch.equal(whole(ids), want)
            assert all(type(p) is torch.nn.Parameter and p.dtype == torch.bfloat16 for p in whole.parameters())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        with pytest.raises(RuntimeError, match='is the shard of a weight'):
            model.plain()
    finally:
        dist.destroy_process_group()
