"""
Where a script runs: ranks, devices, shards of a model, clocks, printing, and one-line errors.

torchrun gives each process its rank in the environment. Without torchrun there is one rank, and every
collective below does nothing, so the scripts read the same on a laptop and on eight GPUs.

Simpler than usual: no launcher, no wrapper around the model, no global state apart from torch's process
group and its store. What it does not do: restart after a lost node, or anything that knows what a model
computes.

    python distill.py configs/toy.py                              one rank: a CPU or one GPU
    torchrun --nproc_per_node=8 distill.py configs/toy.py         eight ranks: GPUs, or CPU processes

Several machines: the same command on each, with --nnodes=4 --node_rank=0 (1, 2, 3) --master_addr=HOST
--master_port=29500. Each machine then holds one copy of the student's weights, in shards.
"""
import math
import os
import platform
import re
import runpy
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """An error that the user can fix. One line: where + what was found + what to do. Exit code 2."""


# ---- start: rank, device, dtype ---------------------------------------------------------------

@dataclass(frozen=True)
class Env:
    """Where this process runs."""
    rank: int                   # 0 .. world - 1
    world: int                  # number of ranks, on all machines
    local: int                  # number of this rank on its machine
    device: torch.device
    dtype: torch.dtype          # of forwards
    shard_ranks: int            # ranks that share one copy of the student's weights; a divisor of world


def start(device='auto', dtype='auto', shard_ranks=0, timeout=60):
    """Join torchrun's ranks if there are any, choose device and dtype -> Env.

    device, dtype: 'auto' means CUDA with bfloat16 where there is CUDA, else CPU with float32.
    shard_ranks: see `ranks_of_a_copy`. timeout: minutes that ranks wait for each other, see `barrier`.
    """
    tasks = os.environ.get('SLURM_NTASKS', '1')
    if tasks not in ('', '1') and 'RANK' not in os.environ:
        raise UserError(f'SLURM_NTASKS={tasks}, but no RANK: each of the tasks would run alone; start one '
                        'task per node, with torchrun in it')
    end_with_torchrun()
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    local = int(os.environ.get('LOCAL_RANK', 0))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if dtype == 'auto':
        dtype = 'bfloat16' if device == 'cuda' else 'float32'
    check_device(device, dtype, local, world)

    own_device = torch.device(device)
    if device == 'cuda':
        own_device = torch.device(device, local)
        use_gpu(own_device)

    shard_ranks = ranks_of_a_copy(shard_ranks, world, os.environ.get('LOCAL_WORLD_SIZE'))
    if world > 1 and not dist.is_initialized():
        join(BACKENDS[device], rank, world, timeout)
    return Env(rank, world, local, own_device, getattr(torch, dtype), shard_ranks)


def ranks_of_a_copy(asked, world, on_machine):
    """How many ranks share one copy of the student's weights.

    asked: the key shard_ranks; 0 means those of one machine. on_machine: LOCAL_WORLD_SIZE, which torchrun
    sets; None: unknown. Ranks of one machine have consecutive numbers, so the first copy lies on ranks 0 to
    shard_ranks - 1.
    """
    if world == 1:                           # nobody to share with; a config for eight runs on a laptop
        return 1
    if asked < 0 or (asked and world % asked):
        raise UserError(f'shard_ranks={asked} does not divide the {world} ranks; give a divisor, or 0 for '
                        'the ranks of one machine')
    if asked:
        return asked

    # Machines with unequal numbers of ranks cannot hold a copy each: all ranks share one.
    size = int(on_machine or world)
    return world if world % size else size


def end_with_torchrun():
    """Under torchrun: watch it from a thread, and end this process when it has died.

    A killed torchrun (SIGKILL, out of memory) cannot stop its ranks. They would go on as orphans, and mix
    with those of the next launch. A process without torchrun outlives its shell, as nohup promises.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    torchrun = os.getppid()

    def watch():
        while os.getppid() == torchrun:      # an orphan gets another parent
            time.sleep(1)
        try:
            print('error: torchrun has died; this rank ends with it', file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_device(device, dtype, local, world):
    """A device that is not there, or that cannot do what is asked, is a UserError."""
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError("device='cuda', but torch sees no CUDA GPU; use device=cpu")
    if device == 'cuda' and local >= torch.cuda.device_count():
        raise UserError(f'rank {local} has no GPU of its own: {torch.cuda.device_count()} found; '
                        'lower --nproc_per_node')
    if device == 'mps' and not torch.backends.mps.is_available():
        raise UserError("device='mps', but torch sees no Apple GPU; use device=cpu")
    if device == 'mps' and world > 1:
        raise UserError("device='mps' runs on one rank; use device=cpu, or start without torchrun")
    if device == 'mps' and dtype != 'float32':
        raise UserError("device='mps' runs in float32; use dtype=float32")


ALLOCATOR = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')    # the newer and the older name

def use_gpu(device):
    """Make this GPU the current device of the process, with `expandable_segments` in torch's allocator.

    With segments of fixed sizes the memory becomes fragmented, because caches grow and no two batches have
    the same length: there are gaps, and each is too short for the next tensor. Expandable segments grow
    instead. torch reads the variable when it first allocates, so it need not be set before torch is
    imported. It is not set where the user's environment already configures the allocator, nor on WSL and on
    Tegra boards, whose drivers do not support it.
    """
    configured = any(name in os.environ for name in ALLOCATOR)
    unsupported = any(word in platform.release().lower() for word in ('microsoft', 'tegra'))
    if not configured and not unsupported:
        os.environ[ALLOCATOR[0]] = 'expandable_segments:True'
    torch.cuda.set_device(device)
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        if 'CUDA driver error' not in str(error):
            raise
        raise UserError(f'{device}: {str(error).splitlines()[0]}; its driver may not support expandable '
                        f'segments, try {ALLOCATOR[0]}=expandable_segments:False') from None


def padded_length(T, device):
    """How many columns a tensor of ids on this device has, if its longest row has T tokens.

    On CUDA it is the next multiple of 128, on other devices T itself. On CUDA attention builds a plan for
    every new length, which takes 23 to 37 ms, and almost every batch would have a new one. The padding is on
    the right and attention is causal, so no token sees it. longrope models have other frequencies beyond
    their original context of 4,096 tokens. 128 divides 4,096, so rounding up never crosses it.
    """
    return -(-T // 128) * 128 if torch.device(device).type == 'cuda' else T


# ---- printing: text from outside cannot command the terminal ----------------------------------

# Control characters but tab and newline, marks that change the direction of text, separators that some
# programs take for a newline, and halves of characters, which no encoding can write.
UNPRINTABLE = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]')
ERROR_LENGTH = 300              # of an error line, in characters


def printable(text):
    """Text that may come from outside, safe to print: '\\x1b[2J' and '\\u202e' become visible escapes. Other
    text, in any script, stays as it is."""
    return UNPRINTABLE.sub(lambda match: match[0].encode('unicode_escape').decode(), text)


def cut(text, length):
    """A text of at most so many characters: its beginning and its end, with ' ... ' between them."""
    if len(text) <= length:
        return text
    end = (length - 5) // 2
    return f'{text[:length - 5 - end]} ... {text[len(text) - end:]}'


def shown(value, length=60):
    """A value from a file or a command line as an error line shows it: its repr, cut."""
    try:
        return cut(repr(value), length)
    except (ValueError, RecursionError):     # an integer of thousands of digits, or lists in lists in lists
        return f'a large {type(value).__name__}'


def run_file(file, name, what):
    """Run a Python file of the user -> its variables. An error in it is a UserError that says where it broke.

    name: of the file, as the user gave it. what: the file is, for the advice.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        try:
            message = ' '.join(str(error).split())
        except Exception:                    # an exception may be a class of the user's own
            message = 'no message'
        raise UserError(f'{name}: {type(error).__name__}: {cut(message, 150)}; mend the {what}') from None


def print0(*words):
    """print on rank 0 only."""
    if int(os.environ.get('RANK', 0)) == 0:
        print(*(printable(str(word)) for word in words), flush=True)


# ---- run: one-line errors, exit codes, signals ------------------------------------------------

def run(main, cfg_of):
    """Run `main(cfg_of())` as a script and exit. A UserError, a full disk or a full GPU is one line and
    exit code 2."""
    # A terminal that knows ASCII alone is shown escapes; a path or an answer must not end a run.
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')
    line = None
    try:
        code = main(cfg_of()) or 0
        if code == 0:
            before_leaving()                 # no rank leaves while another still needs it
    except UserError as error:
        line = str(error)
    except torch.OutOfMemoryError as error:
        line = (f'{str(error).splitlines()[0]} Lower token_budget=, eval_rows= or head_rows=, or set '
                'checkpointing=True')
    except BrokenPipeError:
        # Whoever read our output has gone, as in `distill.py ... | head`. There is nobody to tell, and the
        # interpreter's last flush must not fail. The work is not done, so the exit code is that of a program
        # which SIGPIPE has ended (a --help, which has done its work, ends with 0: command_help.show_help).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(128 + signal.SIGPIPE, failed=True)
    except OSError as error:
        line = f'{error.filename or "system"}: {error.strerror or error}; look at space and permissions there'
    except RuntimeError as error:
        # A collective, or the store, fails if another rank has died, or does not come in time.
        if not isinstance(error, dist.DistError) and not re.search('gloo|NCCL', str(error)):
            raise
        line = (f'rank {os.environ.get("RANK", 0)}: another rank has died or is silent, look at its log '
                f'({cut(str(error).splitlines()[0], 150)})')
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        code = 130

    if line is not None:
        line = printable(line).replace('\n', ' ').replace('\t', ' ')
        if meeting is not None:
            meeting.tell(line)

        # An error that rank 0 meets too is printed once: rank 0 is first, and its end stops the others.
        if int(os.environ.get('RANK', 0)):
            time.sleep(HEAD_START)
        print(cut(f'error: {line}', ERROR_LENGTH), file=sys.stderr, flush=True)
        code = 2
    leave(code, failed=line is not None)


def leave(code, failed):
    """Exit with this code. With several ranks by os._exit: gloo's threads have been seen to abort a process
    that had finished its work."""
    sys.stdout.flush()
    if ranks() > 1:
        if failed:
            os._exit(code)                   # at once: the other ranks may be waiting in a collective
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


@contextmanager
def interruptible():
    """The first Ctrl-C (or SIGTERM of a scheduler) is noted, for a loop that looks after each step; another
    one, two seconds later or more, stops at once. Yields the list that will hold the time of the first.

    What comes sooner is the same request once more: Slurm sends its signal to torchrun and to the ranks, and
    torchrun then passes its own on to the ranks.
    """
    caught = []

    def note(number, _):
        now = time.monotonic()
        if caught:
            if now - caught[0] >= 2:
                raise KeyboardInterrupt
            return
        caught.append(now)
        print0('\nstopping: this step is finished and saved first (again: stop at once)')

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the clock --------------------------------------------------------------------------------

class Clock:
    """Seconds of a step by phase, and how long the remaining steps will take, evaluation included."""
    def __init__(self, device):
        self.cuda = device.type == 'cuda'
        self.began = time.perf_counter()
        self.steps = 0

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self):
        """A step begins."""
        self.last = self.now()
        self.phases = {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def lap(self, phase):
        """The time since the last lap belongs to this phase. A phase may have several laps in a step."""
        now = self.now()
        key = f'time/{phase}'
        self.phases[key] = self.phases.get(key, 0.0) + now - self.last
        self.last = now

    def update_begins(self):
        """Memory from here to stop() is the update's."""
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def stop(self):
        """The step ends -> {'time/phase': seconds}; on CUDA also its memory, in GB on the largest rank.

        'mem/peak': the most that was allocated. 'mem/update_dpeak': the update's peak minus what was
        allocated at its start (Table 3). Unlike the paper's it includes the teacher's forward, which
        alternates with the student's.
        """
        self.steps += 1
        if not self.cuda:
            return self.phases
        peak = torch.cuda.max_memory_allocated()
        used = torch.tensor([max(self.peak, peak), peak - self.before], device='cuda') / 1e9
        used = all_reduce(used, 'max').tolist()
        return self.phases | {'mem/peak': used[0], 'mem/update_dpeak': used[1]}

    def eta(self, steps):
        """Seconds that so many further steps will take."""
        return (time.perf_counter() - self.began) / self.steps * steps


# ---- collectives: they do nothing on one rank -------------------------------------------------

BACKENDS = {'cuda': 'nccl', 'cpu': 'gloo', 'mps': 'gloo'}        # device -> library that connects the ranks
DEVICES = {'nccl': 'cuda', 'gloo': 'cpu'}                        # library -> device of the tensors it moves
OPERATIONS = {'sum': dist.ReduceOp.SUM, 'max': dist.ReduceOp.MAX}


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x, op='sum'):
    """Sum (or 'max') of a tensor over the ranks, in place; with one rank, x as it is."""
    operation = OPERATIONS[op]
    if not dist.is_initialized():
        return x

    # nccl knows no CPU tensors. Checked on one rank too, so that a run on one GPU finds the mistake.
    backend = dist.get_backend()
    assert x.device.type == DEVICES[backend], (
        f'all_reduce of a tensor on {x.device}, but {backend} connects the ranks, which moves '
        f'{DEVICES[backend]} tensors; make it with device=env.device')
    if ranks() > 1:
        dist.all_reduce(x, operation)
    return x


def all_gather(obj, task='its work'):
    """List of every rank's `obj` (small Python data, between our own processes only). task: see `barrier`."""
    gathered_objects = [obj] * ranks()
    if ranks() > 1:
        barrier(task)
        dist.all_gather_object(gathered_objects, obj)
    return gathered_objects


def gather(obj, task):
    """List of every rank's `obj` on rank 0, None on the others: for data too large to be everywhere. task: as
    in `barrier`."""
    gathered_objects = [obj]
    if ranks() > 1:
        barrier(task)
        gathered_objects = [None] * ranks() if dist.get_rank() == 0 else None
        dist.gather_object(obj, gathered_objects)
    return gathered_objects


def day_of_start(*known):
    """The first of these dates that is not '', else today's, YYYY-MM-DD: as rank 0 has it, on all ranks."""
    return all_gather(next(filter(None, known), date.today().isoformat()))[0]


# ---- waiting for each other ---------------------------------------------------------------------

LONG_WAIT = 360                 # minutes: for what one rank does alone, such as a download
SIGN = 5                        # seconds between two signs of life of a rank
NO_SIGNS = 15                   # so many have not come, one after the other: the rank is dead, or stopped
HEAD_START = 3                  # seconds between the first rank's error line and that of the others
meeting = None                  # the Meeting of this process, if it has several ranks


def join(backend, rank, world, timeout):
    """Connect this rank with the others. timeout: minutes that a collective or `barrier` waits for them."""
    global meeting
    limit = timedelta(minutes=timeout)
    address = os.environ.get('MASTER_ADDR')
    try:
        store, *_ = next(rendezvous('env://', rank, world, timeout=limit))
        meeting = Meeting(dist.PrefixStore('meeting', store), rank, world, timeout, address)
        meeting.store.set(f'host of {rank}', socket.gethostname())
        meeting.live()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        reason = cut(str(error).splitlines()[0], 150)
        raise UserError(f'rank {rank} does not reach the {world} ranks at {address}: {reason}; start all of '
                        'them, with the same --master_addr and --master_port') from None


@dataclass(frozen=True)
class Meeting:
    """Where ranks wait for each other. A collective that waits for a silent rank cannot say which one it is.
    Here every rank notes its arrival in a store, so those that wait can read who is missing.
    """
    store: object               # torch's key-value store, which one process holds and all reach
    rank: int
    world: int
    minutes: float              # that a rank waits, if it is not told otherwise
    address: str                # where the store is

    def wait(self, task, minutes):
        """Return when all ranks have called this as often as this rank has. task: what they have done by
        then. A rank that does not come in these minutes, is dead or stopped, or has ended with an error is a
        UserError that names it, on every rank that waits.
        """
        try:
            # The rank that comes last notes that all have come. What it noted of the wait before this one
            # has been read by all, and is removed.
            number = self.store.add(f'arrivals of {self.rank}', 1)
            if self.store.add(f'arrived {number}', 1) == self.world:
                self.store.set(f'all have come {number}', '')
                self.store.delete_key(f'all have come {number - 1}')
                self.store.delete_key(f'arrived {number - 1}')
                return
            if self.until(lambda: self.store.check([f'all have come {number}']), task, minutes):
                return
            missing = [rank for rank in range(self.world) if self.arrivals(rank) < number]
            if not missing:                  # the last one has come just now
                return
            names = cut(', '.join(self.name(rank) for rank in missing), 150)
        except (dist.DistNetworkError, dist.DistStoreError):
            raise UserError(f'after {task}: the first machine, {self.address}, does not answer; look at its '
                            'log') from None

        # One rank speaks first, and its end stops the others, and may stop the store: rank 0 (see `run`), or
        # the first that is there.
        if any(rank not in missing for rank in range(self.rank)):
            time.sleep(HEAD_START)
        have = 'has' if len(missing) == 1 else 'have'
        raise UserError(f'{names} {have} not finished {task}, and the others waited for {minutes:g} minutes; '
                        'look at the log there, or raise timeout=')

    def until(self, ready, task, minutes):
        """Look again and again whether ready() -> True; False after so many minutes. A rank that has ended
        with an error, is dead or stopped is a UserError. task: what this rank has finished, or asks for.
        """
        # At first often. (A wait inside the store would keep its connection, which nccl's own thread needs,
        # and would not hear Ctrl-C.) Each rank looks whether the one after it still lives, so that of ranks
        # that are dead one is found by a rank that waits.
        began = time.monotonic()
        looked = began
        signs = []
        after = (self.rank + 1) % self.world
        pause = 0.001
        while time.monotonic() - began < 60 * minutes:
            if ready():
                return True
            if self.store.check(['error']):
                raise UserError(self.store.get('error').decode())
            if time.monotonic() - looked >= SIGN:
                looked = time.monotonic()
                if self.stopped(after, signs):
                    raise UserError(f'{self.name(after)} is dead or stopped: no sign of life for '
                                    f'{SIGN * NO_SIGNS} s, while others wait for {task}; look there')
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return False

    def live(self):
        """Count up a number of this rank every few seconds, from a thread, whatever the rank computes: a rank
        that is slow goes on counting, one that is dead or stopped does not."""
        store = self.store.clone()           # a connection of its own: a collective may wait in the other one

        def count():
            try:
                while True:
                    store.add(f'signs of {self.rank}', 1)
                    time.sleep(SIGN)
            except dist.DistError:           # the store has ended; whoever needs it says so
                pass

        threading.Thread(target=count, daemon=True).start()

    def stopped(self, rank, signs):
        """Has a rank given no sign of life for long? signs: its count at each look so far, a list to which
        this look adds one. A process that was itself stopped has not looked meanwhile, and sees no silence.
        """
        signs.append(self.store.add(f'signs of {rank}', 0))      # 0: the rank has not started yet
        return len(signs) > NO_SIGNS and 0 < signs[-1] == signs[-1 - NO_SIGNS]

    def tell(self, line):
        """This rank ends with an error: those that wait for it, on any machine, end with the same line."""
        try:
            if not self.store.check(['error']):
                self.store.set('error', f'{self.name(self.rank)} has ended: {line}')
        except (dist.DistNetworkError, dist.DistStoreError):
            pass                             # the store has ended first, and so have those that it connects

    def name(self, rank):
        """'rank 3 (host node7)'; without the host if the rank has never been here."""
        if not self.store.check([f'host of {rank}']):
            return f'rank {rank}'
        host = self.store.get(f'host of {rank}').decode()
        return f'rank {rank} (host {host})'

    def arrivals(self, rank):
        """How often a rank has arrived."""
        return self.store.add(f'arrivals of {rank}', 0)


def barrier(task='its work', minutes=0):
    """Wait until all ranks are here; see `Meeting.wait`. minutes: 0 means those of the key timeout."""
    if ranks() > 1:
        meeting.wait(task, minutes or meeting.minutes)


def wait_until(ready, task):
    """Return when ready(), a look into the store, however long that takes; see `Meeting.until`."""
    meeting.until(ready, task, math.inf)


def before_leaving():
    """Wait until no rank needs another one any more, before the exit that all ranks take together. The store
    of `barrier` may lie in rank 0, which may not exit before all have read there that all have come.
    """
    if ranks() > 1:
        barrier('the run')
        dist.barrier()


# ---- shards -----------------------------------------------------------------------------------

def shard(model, env):
    """FSDP2: float32 weights, gradients and optimizer state in shards, forwards in env.dtype.

    On one rank in float32 the model stays as it is. On one rank in bfloat16 a mesh of one rank gives the
    same float32 master weights. The head is a group of its own, so an OPRD step never gathers it. A frozen
    model is sharded in the dtype that it has, and its blocks are gathered for a forward, one after another.
    """
    if env.world == 1 and env.dtype == torch.float32:
        return model
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[env.device.type], store=dist.HashStore(), rank=0, world_size=1)

    wide = torch.promote_types(env.dtype, torch.float32)
    options = {'mesh': mesh_of(env, dist.group.WORLD),
               'mp_policy': MixedPrecisionPolicy(param_dtype=env.dtype, reduce_dtype=wide)}
    for block in model.blocks:
        fully_shard(block, **options)
    if not model.config.tied:
        fully_shard(model.head, **options)

    # The rest, embedding and last norm. A backward will need it, so it stays whole after the forward.
    learns = any(p.requires_grad for p in model.parameters())
    fully_shard(model, **options, reshard_after_forward=not learns)
    register_fsdp_forward_method(model, 'hidden')
    return model


@cache
def mesh_of(env, group):
    """The ranks as FSDP arranges them: in a row that shares one copy of the weights, or, where fewer ranks
    share a copy, in a table (copies, shard_ranks). Weights are gathered within a row of the table, and
    gradients are averaged over all of it. group: torch's group of all ranks; student and teacher get the
    same mesh of it.
    """
    copies = env.world // env.shard_ranks
    if copies == 1:
        return init_device_mesh(env.device.type, (env.world,))
    return init_device_mesh(env.device.type, (copies, env.shard_ranks), mesh_dim_names=('replicate', 'shard'))


@contextmanager
def gathered(model):
    """`with gathered(model) as whole:` a plain Model with the whole weights, in the dtype of forwards, on
    every rank; for sampling.

    The weights are gathered once and not once per token, and there is no second float32 copy. No hook of
    FSDP runs in a token's forward, or is recorded in a CUDA graph, so ranks may stop at different lengths
    without waiting for each other. `whole` must not be used after the block: its memory is freed.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
    try:
        yield model.plain()
    finally:
        for group in groups:
            group.reshard()


@contextmanager
def whole_head(model):
    """`with whole_head(model) as weight:` the LM head's weight (V, d), gathered for the time of the block
    where the model is sharded. All ranks must come here equally often.
    """
    if not isinstance(model.head.weight, DTensor):
        yield model.head.weight
        return
    group = model if model.config.tied else model.head       # a tied head lies in the embedding's group
    group.unshard()
    try:
        yield model.head.weight
    finally:
        group.reshard()


def bytes_on_rank(model, opt):
    """What this rank holds of a model and its optimizer -> {'weights', 'gradients', 'optimizer': bytes}."""
    def held(tensors):
        local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        return sum(x.numel() * x.itemsize for x in local)

    weights = list(model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    states = [x for state in opt.state.values() for x in state.values()]
    return {'weights': held(weights), 'gradients': held(gradients), 'optimizer': held(states)}


def full(tensor):
    """A tensor that may be sharded -> the whole of it on the CPU. Every rank must call this."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()
