"""Make the embedded sets from scikit-learn and scikit-image: `digits`, `patches`, sentences.

    python data/make_embedded.py           write data/embedded/
    python data/make_embedded.py --check   compare what would be written with what is there

Each split of a picture set is one PNG contact sheet (tiles row by row) and each has one table (CSV)
with a row per tile; `make_sentences.py` makes `sentences.txt`. `SHA256SUMS` covers all of them and
is what `sha256sum --check` reads. Nothing is fetched: all sources are files inside the two
installed wheels.

The arithmetic is exact and the random numbers come from `random.Random.random`, whose stream
Python promises not to change, so that the pixels depend only on the source photographs and on the
JPEG decoder. The bytes of the PNG files also depend on Pillow's compressor; with the pinned
versions of `requirements.txt` they are reproduced exactly.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_sentences import make_sentences, same_source

HERE = Path(__file__).resolve().parent / "embedded"

# name, wheel and file; the order is the order of the classes
PHOTOGRAPHS = (
    ("astronaut", "skimage", "astronaut.png"),
    ("chelsea", "skimage", "chelsea.png"),
    ("coffee", "skimage", "coffee.png"),
    ("hubble_deep_field", "skimage", "hubble_deep_field.jpg"),
    ("ihc", "skimage", "ihc.png"),
    ("motorcycle_left", "skimage", "motorcycle_left.png"),
    ("retina", "skimage", "retina.jpg"),
    ("rocket", "skimage", "rocket.jpg"),
    ("china", "sklearn", "china.jpg"),
    ("flower", "sklearn", "flower.jpg"),
)
SEED = 2026
TILE = 32
TRAIN_CROPS = 24
TEST_CROPS = 8  # the first of them is the whole central square
TEST_DIGITS = 36  # per class
SIDE_DIVISORS = (3, 4, 6)  # a crop's side is the photograph's shorter side divided by one of these
LEAST_CONTRAST = 16.0  # standard deviation on the 0..255 scale; a flat crop teaches nothing

Box = tuple[int, int, int]  # top, left, side


def photograph(wheel: str, file: str) -> np.ndarray:
    """Return a photograph `(height, width, 3)` as uint8, read from inside an installed wheel."""
    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.__file__).parent / "datasets" / "images",
    }
    with Image.open(folders[wheel] / file) as picture:
        return np.array(picture.convert("RGB"))


def area_average(square: np.ndarray, cells: int = TILE) -> np.ndarray:
    """Average a square `(side, side, 3)` over `cells x cells` equal areas; return uint8.

    Cell i covers [i side, (i+1) side) and pixel k covers [k cells, (k+1) cells), both in units of
    1/cells of a pixel. The overlaps are integers and all sums stay below 2^53, so float64 holds
    them exactly and the mean is the same fraction everywhere; halves are rounded up.
    """
    side = square.shape[0]
    low = np.arange(cells)[:, None] * side
    left = np.arange(side)[None, :] * cells
    overlap = np.minimum(low + side, left + cells) - np.maximum(low, left)
    weights = np.clip(overlap, 0, None).astype(np.float64)  # (cells, side), rows sum to side
    channels = np.moveaxis(square.astype(np.float64), 2, 0)
    total = np.moveaxis(weights @ channels @ weights.T, 0, 2).astype(np.int64)
    return ((2 * total + side**2) // (2 * side**2)).astype(np.uint8)


def cells_of(height: int, width: int, test: bool) -> list[tuple[int, int, int, int]]:
    """Cut a photograph into 3 rows and 3 or more columns; return the cells of one split.

    Every third cell, along the diagonals, is a test cell. Both splits so see all parts of the
    picture, and no test cell shares a pixel with a training cell.

    Returns:
        `(top, left, height, width)` of each cell; both sides are at least a third of the
        photograph's shorter side.
    """
    columns = 3 * width // min(height, width)
    rows = 3 * height // min(height, width)
    tops = [row * height // rows for row in range(rows + 1)]
    lefts = [column * width // columns for column in range(columns + 1)]
    return [
        (tops[r], lefts[c], tops[r + 1] - tops[r], lefts[c + 1] - lefts[c])
        for r in range(rows)
        for c in range(columns)
        if ((r + c) % 3 == 2) == test
    ]


def draw_boxes(picture: np.ndarray, count: int, test: bool, rng: random.Random) -> list[Box]:
    """Draw square crops, each inside one random cell of the split; flat crops are drawn again."""
    height, width = picture.shape[:2]
    cells = cells_of(height, width, test)
    boxes: list[Box] = []
    for _ in range(1000):
        top, left, cell_height, cell_width = cells[int(rng.random() * len(cells))]
        side = min(height, width) // SIDE_DIVISORS[int(rng.random() * len(SIDE_DIVISORS))]
        top += int(rng.random() * (cell_height - side + 1))
        left += int(rng.random() * (cell_width - side + 1))
        tile = area_average(picture[top : top + side, left : left + side])
        if tile.mean(axis=2).std() >= LEAST_CONTRAST:
            boxes.append((top, left, side))
        if len(boxes) == count:
            return boxes
    raise RuntimeError(
        f"expected {count} crops with contrast >= {LEAST_CONTRAST}, got {len(boxes)} in 1000 draws"
    )


def patches() -> tuple[dict[str, np.ndarray], list[list[object]]]:
    """Return each split's tiles and the table's rows; image i shows photograph i mod 10."""
    rng = random.Random(SEED)
    pictures = [photograph(wheel, file) for _, wheel, file in PHOTOGRAPHS]
    boxes: dict[str, list[list[Box]]] = {"train": [], "test": []}
    for picture in pictures:
        height, width = picture.shape[:2]
        side = min(height, width)
        whole = ((height - side) // 2, (width - side) // 2, side)
        boxes["test"].append([whole, *draw_boxes(picture, TEST_CROPS - 1, True, rng)])
        boxes["train"].append(draw_boxes(picture, TRAIN_CROPS, False, rng))
    tiles: dict[str, np.ndarray] = {}
    rows: list[list[object]] = []
    for split, of_photograph in boxes.items():
        crops = []
        for index in range(len(of_photograph) * len(of_photograph[0])):
            turn, label = divmod(index, len(of_photograph))
            top, left, side = of_photograph[label][turn]
            crops.append(area_average(pictures[label][top : top + side, left : left + side]))
            rows.append([split, index, label, PHOTOGRAPHS[label][0], top, left, side])
        tiles[split] = np.stack(crops)
    return tiles, rows


def digits() -> tuple[dict[str, np.ndarray], list[list[object]]]:
    """Return each split's tiles and the table's rows; test image i shows digit i mod 10."""
    rng = random.Random(SEED)
    pixels, labels = load_digits(return_X_y=True)
    keys = [rng.random() for _ in labels]
    by_class = [
        sorted(np.flatnonzero(labels == digit).tolist(), key=keys.__getitem__)
        for digit in range(10)
    ]
    test = [by_class[i % 10][i // 10] for i in range(10 * TEST_DIGITS)]
    train = sorted(set(range(len(labels))) - set(test))
    tiles: dict[str, np.ndarray] = {}
    rows: list[list[object]] = []
    for split, chosen in (("train", train), ("test", test)):
        tiles[split] = pixels[chosen].reshape(-1, 8, 8).astype(np.uint8)
        rows += [[split, i, int(labels[row]), row] for i, row in enumerate(chosen)]
    return tiles, rows


def contact_sheet(tiles: np.ndarray, columns: int) -> bytes:
    """Lay tiles `(images, height, width[, 3])` out row by row; return the PNG file.

    Grey tiles keep their values 0..16 as indices of a palette that shows them from black to white.
    """
    count, height, width = tiles.shape[:3]
    lines = -(-count // columns)
    sheet = np.zeros((lines * height, columns * width, *tiles.shape[3:]), np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = tile
    picture = Image.fromarray(sheet)
    if tiles.ndim == 3:
        picture = picture.convert("L")
        picture.putpalette([round(min(v, 16) * 255 / 16) for v in range(256) for _ in "rgb"])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def csv_file(header: Sequence[str], rows: list[list[object]]) -> bytes:
    """Return a table as the bytes of a CSV file with Unix line ends."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def make() -> dict[str, bytes]:
    """Return every embedded file, name -> content."""
    files: dict[str, bytes] = {}
    for name, (tiles, rows), columns, header in (
        ("digits", digits(), {"train": 40, "test": 20}, ["load_digits_row"]),
        ("patches", patches(), {"train": 10, "test": 10}, ["photograph", "top", "left", "side"]),
    ):
        for split in tiles:
            files[f"{name}-{split}.png"] = contact_sheet(tiles[split], columns[split])
        files[f"{name}.csv"] = csv_file(["split", "index", "label", *header], rows)
    files["sentences.txt"] = make_sentences()
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    files["SHA256SUMS"] = "".join(lines).encode()
    return files


def compare(name: str, made: bytes, path: Path) -> tuple[bool, str]:
    """Say whether a file on disk holds what would be made: by bytes, else by pixels."""
    if not path.is_file():
        return False, "missing"
    there = path.read_bytes()
    if there == made:
        return True, "same bytes"
    if name.endswith(".txt") and not same_source(made, there):
        return True, "made from another version of scikit-learn, so not compared"
    if not name.endswith(".png"):
        return False, "differs"
    try:
        old, new = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (there, made))
    except (OSError, SyntaxError) as error:
        return False, f"not a readable picture ({error})"
    if old.shape != new.shape:
        return False, f"differs: {old.shape} there, {new.shape} made"
    worst = int(abs(old - new).max())
    if worst == 0:
        return True, "same pixels in other bytes (another version of Pillow)"
    return False, f"differs by up to {worst} of 255 in {(old != new).mean():.2%} of the values"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or compare them; the exit status is 0 when all is as it should be."""
    parser = argparse.ArgumentParser(description="Make or check the embedded sets.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--out", type=Path, default=HERE, help="folder (default: data/embedded)")
    options = parser.parse_args(arguments)
    files = make()
    if not options.check:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (options.out / name).write_bytes(content)
            print(f"{name}: {len(content):,} bytes")
        return 0
    # SHA256SUMS must fit the files beside it, not the bytes of another compressor
    sums = options.out / "SHA256SUMS"
    listed = (
        dict(line.split()[::-1] for line in sums.read_text().splitlines()) if sums.is_file() else {}
    )
    good = True
    for name, content in files.items():
        if name == "SHA256SUMS":
            continue
        same, verdict = compare(name, content, options.out / name)
        if (
            same
            and listed.get(name) != hashlib.sha256((options.out / name).read_bytes()).hexdigest()
        ):
            same, verdict = False, f"{verdict}, but not the checksum in SHA256SUMS"
        good = good and same
        print(f"{'ok ' if same else 'BAD'} {name}: {verdict}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
