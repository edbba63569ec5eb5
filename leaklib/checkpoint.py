"""Checkpoint files: whole or absent, readable without running code, refused for another run."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leaklib.files import write_atomic


def digest(tensors: Mapping[Any, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal tensors, equal text.

    >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(2)})
    True
    >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(2, 1)})
    False
    """
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_checkpoint(
    path: Path, content: Mapping[str, Any], *, settings: Mapping[str, Any]
) -> None:
    """Replace the checkpoint at `path` by this one; a kill meanwhile leaves the old one whole.

    Args:
        path: the checkpoint; its folder must exist.
        content: tensors, numbers, text, and lists and dicts of these.
        settings: what the run was started with; `read_checkpoint` compares it.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"settings": dict(settings), **content}, buffer)
    write_atomic(path, buffer.getvalue())


def read_checkpoint(path: Path, *, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of the checkpoint on the CPU, or None if there is no such file.

    Raises:
        ValueError: the file is damaged, or belongs to a run with other settings; these are named.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return None
    data = path.read_bytes()
    try:
        # torch reads flipped bits without complaint; the archive's own checksums do not
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        theirs = content["settings"]
    except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint (damaged, or written by another program): "
            "delete it to start again, or name another file"
        ) from error
    other = [name for name in {**settings, **theirs} if settings.get(name) != theirs.get(name)]
    if other:
        raise ValueError(
            f"{path} belongs to another run, which differs in: {', '.join(other)}; "
            "start with the same values, delete the file to start again, or name another file"
        )
    return {name: value for name, value in content.items() if name != "settings"}
