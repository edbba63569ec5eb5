"""Where a result comes from: code, settings, versions, device, data. No machine path, no names."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any, Protocol

from leaklib.code_hash import PACKAGE, code_version

ROOT = PACKAGE.parent
VERSIONED = ("torch", "torchvision", "numpy")


class Checksummed(Protocol):
    """Anything with a name and the checksum of its source files, such as an image set."""

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def checksum(self) -> str:
        """SHA-256 of the source files."""


def provenance(
    *,
    parameters: Mapping[str, Any],
    seconds: float | None = None,
    device: str | None = None,
    data: Mapping[str, str] | Iterable[Checksummed] | None = None,
) -> dict[str, Any]:
    """Describe a run so that it can be repeated: what ran, with what, on what, on which data.

    Args:
        parameters: Every setting of the run. Absolute paths are shortened to the part inside the
            project, or to the last name.
        seconds: Wall time of the run.
        device: ``"cpu"`` or ``"cuda:0"``; by default ``parameters["device"]`` if there is one.
        data: Data set name -> checksum, or the image sets themselves.

    Returns:
        Plain values, ready for JSON. ``commit`` is None outside a checkout; ``dirty`` says whether
        tracked files other than notebooks and results differ from it.
    """
    device = str(device or parameters.get("device") or "cpu")
    commit = _git("rev-parse", "HEAD")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!*.ipynb", ":!data"
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(float(seconds), 3),
        "commit": commit,
        "dirty": None if commit is None or changed is None else bool(changed),
        "code_version": code_version(),
        "leaklib": _version("leaklib"),
        "python": platform.python_version(),
        **{package: _version(package) for package in VERSIONED},
        "device": device,
        "device_name": device_name(device),
        "threads": _threads(),
        "parameters": plain(parameters),
        "data": _checksums(data),
    }


def plain(value: object) -> object:
    """Turn a value into what JSON can hold, without machine paths; never fails."""
    if isinstance(value, str | PurePath):
        return portable(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__qualname__", type(value).__qualname__)
    return str(value)


def portable(text: str | PurePath) -> str:
    """Shorten an absolute path to its part inside the project, or to its last name."""
    raw = os.fspath(text)
    if not (PurePath(raw).is_absolute() or raw.startswith("~")):
        return raw
    try:
        return Path(raw).resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return f".../{PurePath(raw).name}"


def device_name(device: str) -> str:
    """Name of the processor or of the CUDA device."""
    if device.startswith("cuda"):
        import torch  # not at the top: commands that start no computation stay quick

        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "not available"
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _threads() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    setting = os.environ.get("OMP_NUM_THREADS", "")
    return int(setting) if setting.isdigit() else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in leaklib's own checkout, None where there is no checkout or no git."""
    if not (ROOT / ".git").exists():
        return None
    # a hook sets GIT_DIR and its kin; taking no locks lets several runs ask at once
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _checksums(data: Mapping[str, str] | Iterable[Checksummed] | None) -> dict[str, str]:
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return {str(name): str(checksum) for name, checksum in data.items()}
    return {_full_name(item): item.checksum for item in data}


def _full_name(item: Checksummed) -> str:
    split = getattr(item, "split", "")
    return f"{item.name}/{split}" if split else item.name
