"""
Where the time and the memory of a training step go: python distill.py ... --profile

The second and the third step of a start are traced; the first one warms up (it compiles kernels, and fills
the memory pools). Rank 0 alone is traced: the others do the same work. In out/<run>/profile/, for step 2:

    trace-000002.json.gz       every operation, on the CPU and on the GPU, with its memory: open it in
                               https://ui.perfetto.dev or in chrome://tracing
    operations-000002.txt      the operations that take the most time by themselves
    memory-000002.pickle       on CUDA, the allocations with the lines that made them: open it in
                               https://pytorch.org/memory_viz

A rollout of thousands of tokens would make a trace of gigabytes. So it is left out where an answer may have
more than ROLLOUT_TOKENS tokens; to see decoding, trace a short run with max_new_tokens=64. A trace ends
before the step's evaluation. Tracing makes the step slower, and changes no number but the seconds in the log.

Simpler than usual: it is a Clock that knows when a step begins, when its rollout has ended and when the step
ends, so the loop has no line for it. What it does not do: traces of bridge.py or of evaluations.
"""
import torch

from support.runtime import Clock, print0

TRACED = (2, 3)                 # which steps of a start
ROLLOUT_TOKENS = 256            # longest answer with which rollouts are traced too
ALLOCATIONS = 100_000           # most events of a memory file
TABLE_ROWS = 25


class ProfilingClock(Clock):
    """A Clock whose TRACED steps leave their traces in a folder.

    first_step: number of the first step of this start. longest_answer: max_new_tokens.
    """
    def __init__(self, device, folder, first_step, longest_answer):
        super().__init__(device)
        self.folder = folder
        self.first_step = first_step
        self.with_rollout = longest_answer <= ROLLOUT_TOKENS
        self.trace = None                    # the profiler, while a step is traced

    def is_traced(self):
        """Is this step one of those that are traced? Clock counts the steps that have ended."""
        return self.steps + 1 in TRACED

    def start(self):
        super().start()
        if self.is_traced() and self.with_rollout:
            self.begin_trace()

    def update_begins(self):
        super().update_begins()
        if self.is_traced() and not self.with_rollout:
            self.begin_trace()

    def stop(self):
        measured = super().stop()
        if self.trace:
            self.write_trace()
        return measured

    def begin_trace(self):
        """Trace operations and allocations from here on."""
        self.trace = torch.profiler.profile(profile_memory=True)
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS, stacks='python')
        self.trace.start()

    def write_trace(self):
        """End the trace, and write its files."""
        self.trace.stop()
        self.folder.mkdir(exist_ok=True)
        step = self.first_step + self.steps - 1
        self.trace.export_chrome_trace(str(self.folder / f'trace-{step:06d}.json.gz'))

        # By the GPU's time where there is one: the CPU only launches its kernels.
        order = 'self_cuda_time_total' if self.cuda else 'self_cpu_time_total'
        table = self.trace.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
        (self.folder / f'operations-{step:06d}.txt').write_text(table)
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f'memory-{step:06d}.pickle'))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.trace = None
        part = '' if self.with_rollout else ', without its rollout'
        print0(f'  step {step} is traced{part}: {self.folder}')
