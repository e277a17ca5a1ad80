"""
A child process with limits of time and memory, for work on text that may have been written to do harm.

Answers of a model go to SymPy (grading/child.py), and chat templates are programs that come with a model
folder (formats/template_child.py). Either can compute for ever or fill the memory. A function call cannot
be stopped, but a process can be limited and killed. The operating system keeps these limits:

    processor time: so many seconds for each request; a process that takes more is killed by the kernel
    memory: an allocation beyond the limit is a MemoryError in the child (on Linux only)
    files: nothing can be written, and few files can be open; no new processes can be started (on Linux, and
           not for root)

An audit hook also refuses what no request needs: starting a process, the network, opening a file for
writing, loading a library.

This file has both sides. The parent makes a LimitedChild and asks it:

    child = LimitedChild('grading/child.py', 'grading', 'math-verify')
    answer, problem = child.ask(request, Limits(cpu_seconds=3, wall_seconds=5, memory_bytes=2**30))

The child runs `python -P support/limited.py FILE CPU_SECONDS MEMORY_BYTES`. FILE has a function `prepare`,
which imports what is needed while there are no limits yet, and returns the function that answers a request.

The protocol: one line of JSON for each request, and one line back, [answer, is_large]. `is_large` says that
the child holds much memory, so that a new one should replace it. The first line that comes back is null, or
it says what went wrong. The child ends when its pipe is closed, because its parent ended.

Simpler than a pool of workers: one child, one request at a time. It imports nothing but the standard
library, so that the child starts fast and a parent that only grades needs no torch.
"""
import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from typing import NamedTuple

START_SECONDS = 120             # by the clock, for importing a library from a slow disk


# ---- the parent's side -----------------------------------------------------------------------------

class Limits(NamedTuple):
    """What a child may take. The child keeps the first and the last from its start on."""
    cpu_seconds: int                # processor time for one request
    wall_seconds: float             # the same by the clock, for a machine that is busy with other things
    memory_bytes: int               # address space of the child


class LimitedChild:
    """One child process. It starts with the first request, and again after it was stopped.

    file: what it runs. work, package: for the error if the package is missing.
    process: None before it starts and after it was stopped.
    """
    def __init__(self, file, work, package):
        self.file = str(file)
        self.work = work
        self.package = package
        self.process = None
        atexit.register(self.stop)

    def start(self, limits):
        """Start the child and wait until it has imported what it needs."""
        command = [sys.executable, '-P', os.path.abspath(__file__), self.file,
                   str(limits.cpu_seconds), str(limits.memory_bytes)]
        # It sees no GPU. In a session of its own it does not get our Ctrl-C: it ends when its pipe is closed.
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True,
                                        env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})
        line, _ = self.reply(time.monotonic() + START_SECONDS)
        problem = json.loads(line) if line else 'its process did not start'
        if problem is not None:
            # Imported only now, because it imports torch, which the work itself does not need.
            from support.runtime import UserError
            self.stop()
            raise UserError(f'{self.work}: {self.package} cannot be used ({problem}); '
                            f'pip install {self.package}')

    def stop(self):
        """End the child, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def send(self, line, deadline):
        """Write a line to the child -> did that end before the deadline?"""
        pipe = self.process.stdin.fileno()
        sent = 0
        while sent < len(line):
            _, ready, _ = select.select([], [pipe], [], max(0, deadline - time.monotonic()))
            if not ready:
                return False
            # A pipe that is ready takes this much without waiting.
            sent += os.write(pipe, line[sent:sent + select.PIPE_BUF])
        return True

    def reply(self, deadline):
        """The next line from the child, or b'' if it ends or the time is over -> (line, is the time over)."""
        pipe = self.process.stdout.fileno()
        line = bytearray()
        while not line.endswith(b'\n'):
            ready, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                return b'', True
            piece = os.read(pipe, 2**16)
            if not piece:
                return b'', False
            line += piece
        return line, False

    def ask(self, request, limits):
        """The child's answer to a request that JSON can hold -> (answer, None), or (None, 'timeout') if it
        took too long, or (None, 'crash') if the child ended without an answer."""
        if self.process is not None and self.process.poll() is not None:
            self.stop()                                             # somebody else has killed it
        if self.process is None:
            self.start(limits)
        deadline = time.monotonic() + limits.wall_seconds
        line = b''
        late = True
        try:
            if self.send(json.dumps(request).encode() + b'\n', deadline):
                line, late = self.reply(deadline)
        except BrokenPipeError:              # the child has ended before it read the request
            late = False

        # An answer. A child that holds much memory is replaced.
        if line:
            answer, is_large = json.loads(line)
            if is_large:
                self.stop()
            return answer, None

        # No answer: the time is over, or the child has ended. The kernel ends one that used up its seconds.
        if not late:
            late = self.process.wait() == -signal.SIGXCPU
        self.stop()
        return None, 'timeout' if late else 'crash'


# ---- the child's side ------------------------------------------------------------------------------

# The beginnings of the names of audit events that are refused.
OUTSIDE = ('subprocess', 'socket', 'ctypes', 'urllib', 'shutil', 'os.system', 'os.exec', 'os.fork',
           'os.spawn', 'os.posix_spawn', 'os.kill', 'os.remove', 'os.rename', 'os.mkdir', 'os.rmdir',
           'os.chmod', 'os.link', 'os.symlink', 'os.truncate')


def refuse(event, arguments):
    """The audit hook. An exception here ends the operation that asks for permission."""
    writing = event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writing or event.startswith(OUTSIDE):
        raise PermissionError(f'a limited process allows no {event}')


def limit(memory_bytes):
    """Bounds on memory, files and processes. The bound on processor time moves with each request."""
    import resource
    bounds = {'RLIMIT_CORE': 0, 'RLIMIT_FSIZE': 0, 'RLIMIT_NOFILE': 16}
    if sys.platform == 'linux':                                             # elsewhere these two are not kept
        bounds |= {'RLIMIT_AS': memory_bytes, 'RLIMIT_NPROC': 0}
    for name, bound in bounds.items():
        bound = within(getattr(resource, name), bound)
        resource.setrlimit(getattr(resource, name), (bound, bound))


def within(kind, bound):
    """A bound that the shell's own limits (`ulimit -H`) allow: they can be lowered, and not be raised."""
    import resource
    hard = resource.getrlimit(kind)[1]
    return bound if hard == resource.RLIM_INFINITY else min(bound, hard)


def memory_held():
    """Bytes that this process holds at the moment; 0 where the system does not say."""
    if sys.platform != 'linux':
        return 0
    with open('/proc/self/statm') as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


def serve(file, cpu_seconds, memory_bytes):
    """Prepare what `file` says, take the limits, and answer requests until the pipe is closed."""
    # Only our lines may go into the pipe: whatever a library prints goes nowhere.
    replies = os.fdopen(os.dup(1), 'w', buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        import resource
        answer = runpy.run_path(file)['prepare']()
    except ImportError as problem:
        replies.write(json.dumps(f'{type(problem).__name__}: {problem}') + '\n')
        return

    sys.dont_write_bytecode = True
    limit(memory_bytes)
    sys.addaudithook(refuse)
    replies.write('null\n')
    for line in sys.stdin:
        spent = int(time.process_time())
        bound = within(resource.RLIMIT_CPU, spent + cpu_seconds + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (bound, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        answered = answer(json.loads(line))
        replies.write(json.dumps([answered, memory_held() > memory_bytes / 2]) + '\n')


if __name__ == '__main__':
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
