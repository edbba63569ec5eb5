"""The two image sets that live in the repository: `digits` and `patches`.

Each split is a PNG contact sheet and each set has a table; `data/make_embedded.py` makes them and
`data/README.md` says what they show and who took the photographs. Every file is compared with
`SHA256SUMS` when it is read.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from leaklib.data.sources import ImageSource, file_sha256

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class _Sheet:
    tile: int  # side of a tile in pixels
    white: int  # stored value that stands for 1
    class_names: tuple[str, ...]


_SHEETS = {
    "digits": _Sheet(8, 16, tuple("0123456789")),
    "patches": _Sheet(
        32,
        255,
        (
            "astronaut",
            "chelsea",
            "coffee",
            "hubble_deep_field",
            "ihc",
            "motorcycle_left",
            "retina",
            "rocket",
            "china",
            "flower",
        ),
    ),
}


def embedded_folder() -> Path:
    """Return the folder of the embedded sets: $LEAKLIB_EMBEDDED, else `data/embedded` here."""
    return Path(os.environ.get("LEAKLIB_EMBEDDED") or REPOSITORY / "data" / "embedded")


def verified_files(folder: Path, names: list[str]) -> dict[str, Path]:
    """Return the paths of files after comparing each with SHA256SUMS."""
    for name in ("SHA256SUMS", *names):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no embedded file {folder / name}; restore it from the repository, make it with "
                "`python data/make_embedded.py`, or set LEAKLIB_EMBEDDED to the folder that has it"
            )
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = {line[66:]: line[:64] for line in lines}
    for name in names:
        found = file_sha256(folder / name)
        if found != listed.get(name):
            raise ValueError(
                f"expected {folder / name} to have the SHA-256 {listed.get(name)} of SHA256SUMS, "
                f"got {found}: the file is damaged or changed; restore it from the repository"
            )
    return {name: folder / name for name in names}


def open_embedded(name: str, split: str) -> ImageSource:
    """Open one split of an embedded set.

    Args:
        name: `digits` (1x8x8, stored 0..16) or `patches` (3x32x32, stored 0..255).
        split: `train` or `test`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file differs from its checksum.
    """
    sheet = _SHEETS[name]
    files = verified_files(embedded_folder(), [f"{name}.csv", f"{name}-{split}.png"])
    with files[f"{name}.csv"].open(encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["split"] == split]
    with Image.open(files[f"{name}-{split}.png"]) as picture:
        # a palette picture gives its indices: the digits' stored values 0..16
        pixels = torch.from_numpy(np.array(picture))
    # (lines, tile, columns, tile, channels) -> (images, channels, tile, tile)
    tiles = pixels.reshape(
        len(pixels) // sheet.tile, sheet.tile, -1, sheet.tile, pixels[0, 0].numel()
    )
    tiles = tiles.permute(0, 2, 4, 1, 3).flatten(0, 1)

    def origin(position: int) -> str:
        row = rows[position]
        if name == "digits":
            return f"load_digits row {row['load_digits_row']}"
        place = f"row {row['top']}, column {row['left']}, side {row['side']}"
        return f"{row['photograph']}: square at {place}"

    return ImageSource(
        class_names=sheet.class_names,
        labels=torch.tensor([int(row["label"]) for row in rows]),
        indices=torch.arange(len(rows)),
        read=lambda position: tiles[position].float() / sheet.white,
        origin=origin,
        files=lambda positions: files,
    )
