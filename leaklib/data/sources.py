"""Opened image sets: labels and names at once, pixels one picture at a time when asked for.

An `ImageSource` is one split of a set, opened but not read. This file opens torchvision's own
sets and folders of pictures; `embedded.py` opens the two sets of the repository, and `data.py`
chooses among the pictures and gives them one shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TORCHVISION_SETS = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
# What the folder cifar10-subset holds: the first pictures of each original batch of 10,000. The
# complete CIFAR-10 gives these out first, so that a setting means the same pictures with either.
CIFAR10_SUBSET = {"train": 932, "test": 846}
CIFAR10_BATCH = 10_000


@dataclass(frozen=True, eq=False)
class ImageSource:
    """One split of an image set, opened but not read.

    Attributes:
        class_names: Name of each class.
        labels: Class of every picture, int64 `(population,)`.
        indices: Position of every picture in the original split, int64 `(population,)`.
        read: Position in `labels` -> picture `(channels, height, width)`, float32 in [0, 1].
        origin: Position -> where the picture comes from, in words.
        files: Positions -> the files that hold them, by the name under which they are hashed.
        blocks: Positions in the order in which "n pictures" takes them: all of one block before
            any of the next, a seeded draw mixing each block in itself. Empty: one block of all.
        holds: Which part of the original split is there, in words; empty: all of it.
    """

    class_names: tuple[str, ...]
    labels: Tensor
    indices: Tensor
    read: Callable[[int], Tensor]
    origin: Callable[[int], str]
    files: Callable[[Sequence[int]], dict[str, Path]]
    blocks: tuple[Tensor, ...] = ()
    holds: str = ""


@lru_cache(maxsize=4096)
def _sha256_of_state(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; computed again only when its size or time has changed."""
    state = path.stat()
    return _sha256_of_state(path, state.st_size, state.st_mtime_ns)


def listing_sha256(files: dict[str, Path]) -> str:
    """Return the SHA-256 of the listing `<sha256>  <name>` of files, sorted by name."""
    lines = (f"{file_sha256(path)}  {name}\n" for name, path in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_picture(path: Path) -> Tensor:
    """Read one 8-bit picture file as RGB, turned upright as its camera says.

    Returns:
        float32 `(3, height, width)` in [0, 1].

    Raises:
        ValueError: The file is no picture, is damaged, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(
                    f"expected a picture of 8 bits per channel, got mode {picture.mode!r} in "
                    f"{path}; convert it to 8 bits first"
                )
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected a readable picture, got a damaged or foreign file {path} ({error}); "
            "replace it or remove it"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _torchvision_files(name: str, root: Path, split: str) -> tuple[dict[str, Path], list[Path]]:
    """Return the files of one split, and all files that torchvision wants to see."""
    from torchvision import datasets

    dataset = getattr(datasets, TORCHVISION_SETS[name])
    if hasattr(dataset, "mirrors"):  # MNIST and its relatives: four files, two a split
        folder = root / dataset.__name__ / "raw"
        names = [Path(resource).stem for resource, _ in dataset.resources]
        own = [name for name in names if name.startswith("train") == (split == "train")]
    else:
        folder = root / dataset.base_folder
        own = [name for name, _ in (dataset.train_list if split == "train" else dataset.test_list)]
        names = [name for name, _ in dataset.train_list + dataset.test_list]
        names.append(dataset.meta["filename"])
    return {name: folder / name for name in own}, [folder / name for name in names]


def open_torchvision(name: str, split: str, root: Path, *, download: bool) -> ImageSource:
    """Open one of torchvision's sets under a data root.

    Raises:
        FileNotFoundError: Files are missing, or could not be downloaded.
        ValueError: Files are there but damaged.
    """
    from torchvision import datasets  # slow to import, and the embedded sets need none of it

    own, wanted = _torchvision_files(name, root, split)
    missing = [path for path in wanted if not path.is_file()]
    if missing and not download:
        raise FileNotFoundError(f"no file {missing[0]}")
    try:
        kind = getattr(datasets, TORCHVISION_SETS[name])
        dataset = kind(str(root), train=split == "train", download=download)
        pixels = torch.as_tensor(dataset.data)  # (images, height, width[, channels]) uint8
        labels = torch.as_tensor(dataset.targets, dtype=torch.int64)
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} pictures but {len(labels)} labels")
    except Exception as error:  # what torchvision raises on damage depends on where it sits
        if missing:
            raise FileNotFoundError(f"the download into {root} failed ({error})") from error
        raise ValueError(
            f"expected the original files of {name}, got damaged ones under {wanted[0].parent} "
            f"({error}); remove that folder and load with download=True, or copy them again"
        ) from error
    pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels.unsqueeze(1)
    names = tuple("0123456789") if name == "mnist" else tuple(dataset.classes)
    indices = torch.arange(len(labels))
    folder = wanted[0].parent.relative_to(root)
    blocks: tuple[Tensor, ...] = ()
    if name == "cifar10":
        in_subset = indices % CIFAR10_BATCH < CIFAR10_SUBSET[split]
        blocks = (indices[in_subset], indices[~in_subset])
    return ImageSource(
        class_names=names,
        labels=labels,
        indices=indices,
        read=lambda position: pixels[position].float() / 255,
        origin=lambda position: f"{folder}, {split} picture {position}",
        files=lambda positions: own,
        blocks=blocks,
    )


def open_folder(folder: Path) -> ImageSource:
    """Open a folder `<class>/<picture>` with torchvision's `ImageFolder`, sorted by class and file.

    Raises:
        FileNotFoundError: The folder is missing or has no class folders with pictures.
    """
    from torchvision.datasets import ImageFolder

    try:
        dataset = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no pictures as <class>/<picture> in {folder} ({error})"
        ) from error
    return _of_files(folder, dataset.samples, tuple(dataset.classes), range(len(dataset.samples)))


def _of_files(
    folder: Path,
    samples: Iterable[tuple[str, int]],
    class_names: tuple[str, ...],
    indices: Iterable[int],
    holds: str = "",
) -> ImageSource:
    paths = [Path(path) for path, _ in samples]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return ImageSource(
        class_names=class_names,
        labels=torch.tensor([label for _, label in samples]),
        indices=torch.tensor(list(indices)),
        read=lambda position: read_picture(paths[position]),
        origin=lambda position: f"{folder.name}/{names[position]}",
        files=lambda positions: {names[position]: paths[position] for position in positions},
        holds=holds,
    )


def _open_numbered(folder: Path) -> list[tuple[str, int]]:
    """List a folder `<CIFAR-10 class>/<number>.png`, sorted by the number, which runs from 0."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder), allow_empty=True)
    strange = sorted(set(dataset.classes) - set(CIFAR10_CLASSES))
    if strange:
        raise ValueError(
            f"expected the classes of CIFAR-10 in {folder}, got the folder {strange[0]!r}; "
            f"the classes are {', '.join(CIFAR10_CLASSES)}"
        )
    numbered: dict[int, tuple[str, int]] = {}
    for path, label in dataset.samples:
        stem = Path(path).stem
        if not stem.isdecimal() or int(stem) in numbered:
            raise ValueError(
                f"expected files named by one number each in {folder}, got {path}; "
                "lay the folder out again"
            )
        # not ImageFolder's own number: a class without a picture would shift it
        numbered[int(stem)] = (path, CIFAR10_CLASSES.index(dataset.classes[label]))
    if not numbered:
        raise FileNotFoundError(f"no pictures as <class>/<number>.png in {folder}")
    missing = next((i for i in range(len(numbered)) if i not in numbered), None)
    if missing is not None:
        raise ValueError(
            f"expected pictures 0 to {len(numbered) - 1} in {folder}, got none numbered {missing}; "
            "lay the folder out again"
        )
    return [numbered[i] for i in range(len(numbered))]


def open_cifar10_subset(folder: Path, split: str) -> ImageSource:
    """Open `cifar10-subset/<split>/<class>/<number>.png` under the original indices of CIFAR-10.

    The numbers count the first pictures of each original batch, batch after batch. With m pictures
    of each of the five training batches, number k is picture k mod m of batch b = k div m, which
    is picture b 10000 + (k mod m) of the training split; test numbers are test indices.

    Raises:
        ValueError: The numbers have gaps, or five batches cannot share them equally.
    """
    samples = _open_numbered(folder / split)
    batches = 5 if split == "train" else 1
    per_batch, rest = divmod(len(samples), batches)
    if rest:
        raise ValueError(
            f"expected as many pictures of each of the 5 training batches in {folder / split}, "
            f"got {len(samples)} in all; lay the folder out again"
        )
    indices = [k // per_batch * CIFAR10_BATCH + k % per_batch for k in range(len(samples))]
    holds = (
        f"only the first {per_batch} of each batch of {CIFAR10_BATCH} in cifar10-subset "
        "(download=True gets the complete set)"
    )
    return _of_files(folder, samples, CIFAR10_CLASSES, indices, holds)


def open_cifar10_victims(folder: Path) -> ImageSource:
    """Open `cifar10-victims/<class>/<number>.png` in the authors' order, that of the numbers."""
    samples = _open_numbered(folder)
    return _of_files(folder, samples, CIFAR10_CLASSES, range(len(samples)))
