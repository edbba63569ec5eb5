"""How much memory this process has taken so far."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_memory_mib() -> float:
    """Largest resident memory of this process since it started, in MiB.

    It only grows: to measure one piece of work, do it in a process of its own and subtract what
    stood before. On Linux it is VmHWM and not `ru_maxrss`, which a process inherits from its
    parent.

    Returns:
        MiB, at least what the interpreter and its libraries take.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
