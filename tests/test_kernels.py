"""Fused kernels in Triton's interpreter: no GPU needed, so equality is tested and speed is not."""
import os
import subprocess
import sys

import pytest

from runtime import ROOT


def test_every_kernel_equals_its_text():
    pytest.importorskip('triton')
    p = subprocess.run([sys.executable, ROOT / 'tests/kernel_cases.py'], capture_output=True, text=True,
                       env=os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT)})
    assert p.returncode == 0, p.stderr
    assert int(p.stdout) == 73
