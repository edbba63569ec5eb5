"""Files written so that a kill at any moment leaves the old content or the new, never a part."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a file under a temporary name beside it, then rename it into place.

    The content is flushed to the disk before the rename, so a power cut cannot leave an
    empty file under the final name.

    Args:
        path: The file. Its folder must exist (see :func:`prepare_folder`).
        content: Text (written as UTF-8) or bytes.

    Returns:
        The path.

    Raises:
        OSError: The disk is full or the folder cannot be written. An earlier file is untouched.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def prepare_folder(folder: str | Path) -> Path:
    """Make a folder and try to write in it. Call it before the long work, not after.

    Args:
        folder: The folder that will hold the results; parents are made too.

    Returns:
        The folder as a path.

    Raises:
        OSError: The folder cannot be made or written, with the reason and what to do.
    """
    folder = Path(folder)
    probe = folder / f".{uuid.uuid4().hex[:8]}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"expected a folder that can be written, got {folder} ({reason}): "
            "choose another folder, or mend its permissions or free space"
        ) from error
    return folder
