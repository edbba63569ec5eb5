"""The peak of a process's memory."""

import subprocess
import sys

import numpy as np

from leaklib.peak_memory import peak_memory_mib


def test_it_grows_by_what_is_taken_and_does_not_shrink():
    before = peak_memory_mib()
    block = np.ones(600 * 2**20, dtype=np.uint8)
    during = peak_memory_mib()
    del block
    assert during >= 600
    assert during - before <= 700
    assert peak_memory_mib() >= during - 1


def test_a_process_does_not_inherit_its_parents_peak():
    block = np.ones(600 * 2**20, dtype=np.uint8)
    line = "from leaklib.peak_memory import peak_memory_mib; print(peak_memory_mib())"
    child = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < 500
    del block
