"""How far a reader has to go who follows one plain training step through the code."""
import sys

import pytest
from conftest import argv

import distill
from configs import load_config
from support.runtime import ROOT


def functions_of_a_step(args, step):
    """The project's functions that one step of distill.train calls, in the order of their first call: (file, name)."""
    seen, tracing = [], []

    def profile(frame, event, _):
        if event == 'call' and tracing:
            code = frame.f_code
            file = code.co_filename.removeprefix(f'{ROOT}/')
            pair = file, code.co_qualname
            if code.co_filename.startswith(str(ROOT)) and '<' not in code.co_name and '.venv' not in file and pair not in seen:
                seen.append(pair)

    class Watch(distill.Clock):
        """A step begins and ends where the clock says so."""
        def start(self):
            super().start()
            self.number = getattr(self, 'number', 0) + 1
            if self.number == step:
                tracing.append(True)

        def stop(self):
            tracing.clear()
            return super().stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, 'Clock', Watch)
        sys.setprofile(profile)
        try:
            distill.main(load_config(args))
        finally:
            sys.setprofile(None)
    return seen


# Read on their own, as the sampler and the decoder that they are; and clocks, collectives, text. support/limited is the
# grader's child process: it is asked only for answers that the grader has not met before in this process.
BESIDE = ('rollout.py', 'model.py', 'kernels/__init__', 'kernels/decode', 'support/runtime', 'support/limited', 'formats/',
          'grading/', 'tests/')


def test_the_path_of_one_step_is_short(toy_dir, tmp_path):
    """Step 2 of a vanilla run: no diagnosis, no evaluation, no checkpoint. From the loop to the gradient and the update, with
    the rollout (rollout.sample) and the forward (Model.hidden) as one thing each: how many functions, in how many files, and
    how often the reader comes back to a file that was left before."""
    seen = functions_of_a_step(argv(toy_dir, tmp_path / 'run', steps=3, save_every=9, eval_every=0, diagnose_every=0), 2)
    path = [pair for pair in seen if not pair[0].startswith(BESIDE)]
    files = [file for file, _ in path]
    visits = [file for i, file in enumerate(files) if i == 0 or file != files[i - 1]]
    returns = len(visits) - len(set(visits))
    shown = '\n'.join(f'{file} {name}' for file, name in path)
    assert ('step.py', 'accumulate') in path and ('losses.py', 'LayerLoss.backward') in path, shown
    assert len(path) <= 40 and len(set(files)) <= 7 and returns <= 12, f'{len(path)}, {len(set(files))}, {returns}\n{shown}'
