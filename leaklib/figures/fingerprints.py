"""Comparing what figures show: the regression test of the study's pictures.

Pixels change with every version of the font renderer, and by more than a wrong curve changes them.
A fingerprint (read by `leaklib.figures.artists`) holds coordinates, colours, image arrays, limits
and texts instead. It is the same at any resolution and survives another matplotlib; a curve that is
off by half a per cent, a wrong colour or a missing bar is named by its key.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leaklib.figures.artists import Fingerprint, fingerprint

__all__ = [
    "Fingerprint",
    "check_picture",
    "compare_fingerprints",
    "fingerprint",
    "load_fingerprint",
    "save_fingerprint",
]


def compare_fingerprints(
    found: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    image_atol: float | None = None,
) -> list[str]:
    """Faults of a fingerprint against a reference, one line each; an empty list is agreement.

    Numbers agree if |found - reference| <= atol + rtol * |reference|, or if both are NaN or the
    same infinity; texts agree if they are equal.

    Args:
        found: fingerprint of the figure under test.
        reference: fingerprint it should have.
        rtol: relative tolerance.
        atol: absolute tolerance.
        image_atol: absolute tolerance of image arrays; `atol` if None. Reconstructions in float32
            differ between processors, so a picture may deserve more room than a curve.
    """
    faults = [f"{key}: missing from the figure" for key in reference if key not in found]
    faults += [f"{key}: not in the reference" for key in found if key not in reference]
    for key in reference:
        if key not in found:
            continue
        here, there = np.asarray(found[key]), np.asarray(reference[key])
        if here.shape != there.shape or (here.dtype.kind == "U") != (there.dtype.kind == "U"):
            faults.append(
                f"{key}: expected {_kind(there)} of shape {there.shape}, got {_kind(here)} of "
                f"shape {here.shape}"
            )
        elif there.dtype.kind == "U":
            if (wrong := here != there).any():
                place = tuple(int(i) for i in np.argwhere(wrong)[0])
                faults.append(
                    f"{key}: {int(wrong.sum())} of {wrong.size} texts differ, first at {place}: "
                    f"found {str(here[place])!r}, reference {str(there[place])!r}"
                )
        else:
            room = image_atol if image_atol is not None and key.endswith("/array") else atol
            if fault := _deviation(here, there, rtol=rtol, atol=room):
                faults.append(f"{key}: {fault}")
    return faults


def save_fingerprint(path: str | Path, found: Mapping[str, np.ndarray]) -> None:
    """Write a fingerprint as a compressed npz file, whole or not at all; equal data, equal bytes.

    Raises:
        ValueError: a value that could only be stored as a Python object.
    """
    if plain := [key for key, value in found.items() if np.asarray(value).dtype.kind == "O"]:
        raise ValueError(f"found: expected arrays of numbers or texts, got objects in {plain}")
    arrays: dict[str, Any] = dict(found)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(part, path)


def load_fingerprint(path: str | Path) -> Fingerprint:
    """Read a fingerprint written by `save_fingerprint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or no npz file of plain arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a figure fingerprint at {path}, found none; re-run the notebook that draws "
            "the figure"
        )
    try:
        # Opened here, because numpy leaves the file open when its contents are damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"expected an npz file of plain arrays at {path}, got a damaged one ({error}); delete "
            "it and re-run the notebook that draws the figure"
        ) from error


def check_picture(
    picture: str | Path | bytes,
    *,
    size: tuple[int, int] | None = None,
    tolerance: int = 1,
    ink: float = 0.005,
) -> list[str]:
    """Faults of a saved picture, looked at loosely: readable, of the right size, not blank.

    Args:
        picture: a file or its bytes.
        size: expected width and height in pixels.
        tolerance: pixels by which each side may differ.
        ink: share of the pixels that must differ from the commonest colour.
    """
    try:
        # A PNG that ends early raises while it is decoded, which is only when it is converted.
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError) as error:
        return [f"expected a readable picture, got none ({error})"]
    faults = []
    shape = pixels.shape[1], pixels.shape[0]
    if size is not None and max(abs(shape[0] - size[0]), abs(shape[1] - size[1])) > tolerance:
        faults.append(f"expected {size[0]} x {size[1]} pixels, got {shape[0]} x {shape[1]}")
    _, counts = np.unique(pixels.reshape(-1, 3) @ [65536, 256, 1], return_counts=True)
    if (share := 1 - counts.max() / counts.sum()) < ink:
        faults.append(f"expected a picture, got one colour on all but {share:.2%} of the pixels")
    return faults


def _deviation(found: np.ndarray, reference: np.ndarray, *, rtol: float, atol: float) -> str:
    """The worst place where two arrays of numbers disagree, or an empty text."""
    here, there = found.astype(np.float64), reference.astype(np.float64)
    same = np.isclose(here, there, rtol=rtol, atol=atol, equal_nan=True)
    if same.all():
        return ""
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(here - there))
    gap = np.where(np.isnan(gap), np.inf, gap)
    place = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
    return (
        f"{int((~same).sum())} of {same.size} numbers differ, largest deviation {gap[place]:.3g} "
        f"at {place}: found {here[place]:.6g}, reference {there[place]:.6g} "
        f"(rtol {rtol:g}, atol {atol:g})"
    )


def _kind(array: np.ndarray) -> str:
    return "texts" if array.dtype.kind == "U" else "numbers"
