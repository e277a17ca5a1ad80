"""
The child process in which math-verify compares two answers. grader.py starts it; nobody imports it.

math-verify reads LaTeX into SymPy and simplifies. SymPy has no limits: `9^{9^{9}}` fills the memory,
some integrals take for ever, and the text comes from a model, so it may be chosen to do harm. A process
of its own can be limited and killed, which a function call cannot. The operating system keeps these
limits:

    processor time: `cpu_seconds` for each comparison; a process that takes more is killed by the kernel
    memory: `memory_bytes`; an allocation beyond it is a MemoryError, which counts as "not equal"
    files: nothing can be written, and few files can be open; no new processes can be started (not for root)

An audit hook also refuses what no comparison needs: starting a process, the network, opening a file for
writing, loading a library. It is there because SymPy turns digits into numbers with Python's `eval`. No
other text of an answer should get that far: of math-verify we use the reader of LaTeX alone, not its
reader of plain expressions, which hands them to `eval` whole.

The protocol: one line of JSON for each comparison, [answer, found], and one line back, [equal, worn].
`worn` says that this process holds much memory, so that a new one should take over. The first line that
comes back is null, or it says what went wrong. The process ends when the pipe is closed, because
its parent ended.

    python grading/child.py CPU_SECONDS MEMORY_BYTES
"""
import json
import os
import sys
import time

# The beginnings of the names of audit events that are refused.
OUTSIDE = ('subprocess', 'socket', 'ctypes', 'urllib', 'shutil', 'os.system', 'os.exec', 'os.fork',
           'os.spawn', 'os.posix_spawn', 'os.kill', 'os.remove', 'os.rename', 'os.mkdir', 'os.rmdir',
           'os.chmod', 'os.link', 'os.symlink', 'os.truncate')


def refuse(event, arguments):
    """The audit hook. An exception here ends the operation that asks for permission."""
    writing = event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writing or event.startswith(OUTSIDE):
        raise PermissionError(f'the grader allows no {event}')


def limit(memory_bytes):
    """Bounds on memory, files and processes. The bound on processor time moves with each comparison."""
    import resource
    bounds = {'RLIMIT_CORE': 0, 'RLIMIT_FSIZE': 0, 'RLIMIT_NOFILE': 16}
    if sys.platform == 'linux':                                             # elsewhere these two are not kept
        bounds |= {'RLIMIT_AS': memory_bytes, 'RLIMIT_NPROC': 0}
    for name, bound in bounds.items():
        resource.setrlimit(getattr(resource, name), (bound, bound))


def memory_held():
    """Bytes that this process holds at the moment; 0 where the system does not say."""
    if sys.platform != 'linux':
        return 0
    with open('/proc/self/statm') as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


def main(cpu_seconds, memory_bytes):
    # Only our lines may go into the pipe: whatever a library prints goes nowhere.
    replies = os.fdopen(os.dup(1), 'w', buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        import resource

        from math_verify import LatexExtractionConfig, parse, verify
        from math_verify.parser import NormalizationConfig
    except ImportError as problem:
        replies.write(json.dumps(f'{type(problem).__name__}: {problem}') + '\n')
        return

    # units=False: math-verify would drop any word after a number as a unit, `5 \text{ trillion}` would be 5.
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True,
                                   boxed='last')
    reader = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]

    def read(text):
        return parse(f'\\boxed{{{text}}}', reader, extraction_mode='first_match', parsing_timeout=None)

    def equal(answer, found):
        # A decimal makes SymPy compute with floats of 15 digits. Without one we ask for 60 digits, so that
        # e^{-40} and e^{-50} are not both 0.
        digits = 15 if '.' in answer + found else 60
        return bool(verify(read(answer), read(found), float_rounding=15, numeric_precision=digits,
                           allow_set_relation_comp=True, timeout_seconds=None))

    # Some of SymPy is imported at its first use: use it before the limits hold.
    equal('\\frac{x}{2}', '\\sqrt{0.25}')
    equal('(0,1)', '0<x<1')
    equal('\\sin x', '\\cos y')
    sys.dont_write_bytecode = True
    limit(memory_bytes)
    sys.addaudithook(refuse)
    replies.write('null\n')
    for line in sys.stdin:
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_seconds + 1, resource.RLIM_INFINITY))
        verdict = equal(*json.loads(line))
        replies.write(json.dumps([verdict, memory_held() > memory_bytes / 2]) + '\n')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
