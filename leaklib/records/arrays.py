"""Named arrays as one file, and their comparison with a reference."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np

from leaklib.records.tables import Tolerance

Arrays = Mapping[str, np.ndarray]


def pack_arrays(arrays: Mapping[str, object], *, what: str = "arrays") -> bytes:
    """Write arrays as an npz archive: equal bytes for equal arrays, any names.

    ``numpy.savez`` cannot hold an array called ``file``; this can.

    Raises:
        ValueError: An array holds objects; ``what`` names its owner in the message.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            try:
                array = np.asarray(value)
            except ValueError:  # rows of unequal length
                array = np.empty(0, dtype=object)
            if array.dtype.hasobject:
                raise ValueError(
                    f"expected numbers or text in {what}, {name!r}, got objects or rows of "
                    "unequal length: give one array per name"
                )
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: no clock in the bytes
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpack_arrays(content: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of an npz archive."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def compare_arrays(
    got: Arrays | None, want: Arrays | None, limit: Tolerance, *, what: str = "arrays"
) -> list[str]:
    """List how named arrays differ from their reference: names, shapes, values.

    Args:
        got: What this run found, None if it is missing.
        want: The reference, None if there is none.
        limit: Tolerance of every number, of a picture's mean error (names ending in `/array`), and
            of text that reads as a number (a caption such as "21.4"); other text must be equal.
        what: Owner of the arrays, first in every line.

    Returns:
        One line per array that differs.
    """
    if got is None or want is None:
        return [f"{what} is {'missing' if got is None else 'not in the reference'}"]
    lines = []
    for name in dict.fromkeys([*want, *got]):
        where = f"{what}, {name!r}"
        if name not in got or name not in want:
            lines.append(f"{where} is {'missing' if name not in got else 'not in the reference'}")
        elif got[name].shape != want[name].shape:
            lines.append(f"{where}: got shape {got[name].shape}, reference {want[name].shape}")
        elif got[name].dtype.kind in "biuf" and want[name].dtype.kind in "biuf":
            a, b = got[name].astype(float), want[name].astype(float)
            close = np.isclose(a, b, rtol=limit.rtol, atol=limit.atol, equal_nan=True)
            if name.endswith("/array"):
                # A picture: its mean error counts, since single pixels of a search differ most.
                room = limit.atol + limit.rtol * np.abs(b).mean()
                close |= bool(np.abs(a - b).mean() <= room)
            if not close.all():
                first = tuple(int(i) for i in np.argwhere(~close)[0])
                lines.append(
                    f"{where}: {int((~close).sum())} of {close.size} values differ, first at "
                    f"{first}: got {a[first]:.6g}, reference {b[first]:.6g}, tolerance {limit}"
                )
        elif not _same_text(got[name], want[name], limit):
            lines.append(f"{where}: got {got[name].tolist()!r}, reference {want[name].tolist()!r}")
    return lines


def _same_text(got: np.ndarray, want: np.ndarray, limit: Tolerance) -> bool:
    """Whether texts agree, numbers among them within the tolerance."""
    if got.dtype.kind != want.dtype.kind:
        return False
    for a, b in zip(got.ravel().tolist(), want.ravel().tolist(), strict=True):
        try:
            if not limit.allows(float(a), float(b)):
                return False
        except ValueError:
            if a != b:
                return False
    return True
