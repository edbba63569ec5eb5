"""Named image sets as tensors in [0, 1], and the private batches that are attacked.

`load_images` gives n pictures of a split, by seed or by index, from the two embedded sets, from
torchvision's sets or from a folder of pictures; `make_victims` groups them into private batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from leaklib.data.embedded import REPOSITORY, open_embedded
from leaklib.data.selection import choose_positions
from leaklib.data.sources import (
    TORCHVISION_SETS,
    ImageSource,
    listing_sha256,
    open_cifar10_subset,
    open_cifar10_victims,
    open_folder,
    open_torchvision,
)
from leaklib.data.victims import Victims

__all__ = ["ImageSet", "Victims", "available_sets", "data_root", "load_images", "make_victims"]

_DESCRIPTIONS = {
    "digits": "embedded: handwritten digits, 1x8x8, 10 classes, 1437 train and 360 test",
    "digits28": "embedded: the same digits, 1x28x28 by bilinear interpolation",
    "patches": "embedded: colour crops of ten photographs, 3x32x32, 240 train and 80 test",
    "mnist": "torchvision: MNIST, 1x28x28, 10 classes, 60000 train and 10000 test",
    "fashion_mnist": "torchvision: Fashion-MNIST, 1x28x28, 10 classes, 60000 train and 10000 test",
    "cifar10": "torchvision: CIFAR-10, 3x32x32, 10 classes; else the PNG folder cifar10-subset",
    "cifar100": "torchvision: CIFAR-100, 3x32x32, 100 classes, 50000 train and 10000 test",
    "cifar10-victims": "the 128 CIFAR-10 training pictures attacked by the authors of PRECODE",
    "folder:PATH": "any folder <class>/<picture> or <split>/<class>/<picture>",
}
_GREY = (0.299, 0.587, 0.114)  # luma weights of ITU-R BT.601, as in Pillow and torchvision


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled pictures of one split of a named set.

    Attributes:
        images: `(images, channels, height, width)`, float32 in [0, 1].
        labels: `(images,)`, int64.
        class_names: Name of each class; for `patches` the name of the photograph.
        indices: `(images,)`, int64, position in the original split.
        name: Name of the set.
        split: Name of the split.
        checksum: SHA-256 of the listing `<sha256>  <name>` of the files that were read.
        origins: Where each picture comes from, in words: a crop of a photograph, a file.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    indices: Tensor
    name: str
    split: str
    checksum: str
    origins: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


def make_victims(image_set: ImageSet, *, batch: int = 1) -> Victims:
    """Group pictures into private batches, in their order: `batch` consecutive pictures a victim.

    Args:
        image_set: n pictures.
        batch: Pictures a victim; divides n.

    Returns:
        n / batch victims.

    Raises:
        ValueError: `batch` does not divide n.
    """
    count = len(image_set)
    if batch < 1 or count % batch:
        raise ValueError(
            f"expected a batch >= 1 that divides {count} pictures, got {batch}; "
            f"load {max(batch, 1) * max(count // max(batch, 1), 1)} pictures"
        )
    return Victims(
        image_set.images.unflatten(0, (-1, batch)), image_set.labels.unflatten(0, (-1, batch))
    )


def available_sets() -> dict[str, str]:
    """Return the known sets, name -> one line of description; PATH stands for a folder."""
    return dict(_DESCRIPTIONS)


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder of the real sets: `root`, else $LEAKLIB_DATA, else `data/sets` here."""
    return Path(root or os.environ.get("LEAKLIB_DATA") or REPOSITORY / "data" / "sets").expanduser()


def load_images(
    name: str,
    n: int | None = None,
    *,
    split: str = "test",
    indices: Iterable[int] | None = None,
    seed: int | None = None,
    root: str | Path | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    balanced: bool = False,
    download: bool = False,
) -> ImageSet:
    """Load pictures of one split of a named set.

    Which pictures: all of the split; the first `n`; `n` drawn without replacement with a generator
    seeded by `seed`; or those at the given `indices`. CIFAR-10 gives its first pictures of each
    original batch out before the others, also in a draw, so that the same setting names the same
    pictures whether the complete set or only `cifar10-subset` is there.

    Args:
        name: A name of `available_sets`, or `folder:PATH`; a relative PATH is looked up in the
            working directory, then under the data root.
        n: Number of pictures.
        split: `train` or `test`; for a folder the name of a subfolder. A folder without splits
            and `cifar10-victims` have `test` only.
        indices: Positions in the original split, in the order wanted.
        seed: Seed of the draw; needs `n`.
        root: Data root of the sets that are not embedded; see `data_root`.
        size: (height, width), or one number for both: bilinear resizing, averaging where it
            shrinks. Needed for folders whose pictures differ in size.
        channels: 1 (luma 0.299 R + 0.587 G + 0.114 B) or 3 (grey repeated).
        balanced: Take classes in turn, so that their counts differ by one at most; needs `n`.
        download: Let torchvision download a set that is not there.

    Returns:
        The pictures, float32 in [0, 1], on the CPU. torchvision's sets are opened whole, for
        folders and `cifar10-subset` only the pictures asked for are read.

    Raises:
        FileNotFoundError: The set is not there; the message says where it was looked for.
        ValueError: The name, the split, the choice of pictures or a file is wrong.
    """
    source = _open(name, split, data_root(root), download)
    positions = choose_positions(
        source, f"{name} {split}", n=n, indices=indices, seed=seed, balanced=balanced
    )
    if name == "digits28" and size is None:
        size = 28
    shape = (size, size) if isinstance(size, int) else size
    if shape is not None and (len(shape) != 2 or min(shape) < 1):
        raise ValueError(f"expected size = (height, width), both >= 1, got {size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"expected channels = 1, 3 or None (as stored), got {channels}")
    images: list[Tensor] = []
    for position in positions:
        image = _reshape(source.read(position), shape, channels)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"expected pictures of one size, got {tuple(images[0].shape)} in "
                f"{source.origin(positions[0])} and {tuple(image.shape)} in "
                f"{source.origin(position)}; pass size=(height, width)"
            )
        images.append(image)
    return ImageSet(
        images=torch.stack(images),
        labels=source.labels[positions],
        class_names=source.class_names,
        indices=source.indices[positions],
        name=name,
        split=split,
        checksum=listing_sha256(source.files(positions)),
        origins=tuple(source.origin(position) for position in positions),
    )


def _open(name: str, split: str, root: Path, download: bool) -> ImageSource:
    if name == "folder:PATH" or not (name in _DESCRIPTIONS or name.startswith("folder:")):
        raise ValueError(f"expected one of {', '.join(_DESCRIPTIONS)}; got {name!r}")
    if name.startswith("folder:"):
        return _open_user_folder(name.removeprefix("folder:"), split, root)
    splits = ("test",) if name == "cifar10-victims" else ("train", "test")
    if split not in splits:
        raise ValueError(f"expected a split of {name} among {', '.join(splits)}; got {split!r}")
    if name in ("digits", "digits28", "patches"):
        return open_embedded("patches" if name == "patches" else "digits", split)
    instead = "digits28" if "mnist" in name else "patches"
    subset = root / "cifar10-subset"
    try:
        if name == "cifar10-victims":
            return open_cifar10_victims(root / name)
        complete = download or (root / "cifar-10-batches-py").is_dir()
        if name == "cifar10" and subset.is_dir() and not complete:
            return open_cifar10_subset(subset, split)
        return open_torchvision(name, split, root, download=download)
    except FileNotFoundError as error:
        get = (
            f"load_images({name!r}, ..., download=True) fetches it where there is a network"
            if name in TORCHVISION_SETS
            else "lay it out as cifar10-victims/<class>/<number>.png"
        )
        if name == "cifar10":
            get += "; the folder cifar10-subset serves too"
        raise FileNotFoundError(
            f"{name} is not complete under the data root {root}: {error}. {get}; or put the files "
            "there (data/README.md shows the layout), or name another root by root=... or "
            f"LEAKLIB_DATA. The embedded set {instead!r} works without."
        ) from error


def _open_user_folder(path: str, split: str, root: Path) -> ImageSource:
    looked = [Path(path).expanduser(), root / path]
    folder = next((candidate for candidate in looked if path and candidate.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no folder {path!r}: looked for {' and '.join(map(str, looked))}; pass "
            "folder:PATH where PATH holds <class>/<picture>"
        )
    if split and Path(split).name == split and (folder / split).is_dir():
        return open_folder(folder / split)
    has_splits = (folder / "train").is_dir() or (folder / "test").is_dir()
    if split != "test" or has_splits:
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        kind = "split" if has_splits else "split 'test', as it holds classes:"
        raise ValueError(f"expected a {kind} {', '.join(there)} of {folder}, got {split!r}")
    return open_folder(folder)


def _reshape(image: Tensor, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """Convert and resize one picture `(channels, height, width)`."""
    if channels == 3 and len(image) == 1:
        image = image.expand(3, -1, -1)
    elif channels == 1 and len(image) == 3:
        image = torch.einsum("c,chw->hw", image.new_tensor(_GREY), image).unsqueeze(0)
    if size is not None and tuple(image.shape[1:]) != tuple(size):
        image = interpolate(image.unsqueeze(0), size=size, mode="bilinear", antialias=True)[0]
    return image.clamp(0, 1)
