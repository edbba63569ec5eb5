"""CIFAR-10 from its original batches and from its subset, and the real sets where they are."""

import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from leaklib.data import data_root, load_images, sources
from leaklib.data.selection import choose_positions


def save_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


BATCH, KEPT = 12, {"train": 3, "test": 5}


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """CIFAR-10 with batches of 12: the complete set in one root, its subset in another."""
    monkeypatch.setattr(sources, "CIFAR10_BATCH", BATCH)
    monkeypatch.setattr(sources, "CIFAR10_SUBSET", KEPT)
    complete, subset = tmp_path / "complete", tmp_path / "subset"
    folder = complete / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums, pictures = {}, {"train": [], "test": []}
    for name in [f"data_batch_{b}" for b in range(1, 6)] + ["test_batch"]:
        split = "test" if name == "test_batch" else "train"
        pixels = noise(len(sums), BATCH, 3, 32, 32)
        labels = np.random.default_rng(len(sums)).integers(0, 10, BATCH).tolist()
        pictures[split] += list(zip(pixels, labels, strict=True))
        content = pickle.dumps({"data": pixels.reshape(BATCH, -1), "labels": labels})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
        for k in range(KEPT[split]):
            number = k + KEPT[split] * (len(sums) - 1 if split == "train" else 0)
            label = sources.CIFAR10_CLASSES[labels[k]]
            path = subset / "cifar10-subset" / split / label / f"{number:05d}.png"
            save_png(path, pixels[k].transpose(1, 2, 0))
    content = pickle.dumps({"label_names": list(sources.CIFAR10_CLASSES)})
    (folder / "batches.meta").write_bytes(content)
    meta = datasets.CIFAR10.meta | {"md5": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    names = [[name, sums[name]] for name in sums]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", names[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", names[5:])
    return complete, subset, pictures


@pytest.mark.parametrize("split", ["train", "test"])
def test_subset_has_the_original_indices(small_cifar10, split):
    complete, subset, pictures = small_cifar10
    part = load_images("cifar10", root=subset, split=split)
    batches = 5 if split == "train" else 1
    expected = [b * BATCH + j for b in range(batches) for j in range(KEPT[split])]
    assert part.indices.tolist() == expected
    for index, image, label in zip(expected, part.images, part.labels, strict=True):
        pixels, wanted = pictures[split][index]
        assert label == wanted
        np.testing.assert_array_equal((image * 255).round().numpy(), pixels)
    whole = load_images("cifar10", root=complete, split=split, indices=expected)
    assert torch.equal(whole.images, part.images)
    assert torch.equal(whole.labels, part.labels)
    assert len(load_images("cifar10", root=complete, split=split)) == batches * BATCH


@pytest.mark.parametrize("how", [{"n": 4}, {"n": 5, "seed": 0}, {"n": 3, "seed": 7}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_one_setting_names_the_same_pictures_with_either_source(small_cifar10, split, how):
    complete, subset, _ = small_cifar10
    one, other = (load_images("cifar10", root=r, split=split, **how) for r in (complete, subset))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_choice_from_blocks_starts_with_the_first_block(seed, balanced):
    labels = (torch.arange(40) * 7 + torch.arange(40) // 10) % 5
    first = torch.arange(40) % 10 < 4
    whole = fake_source(labels, (first.nonzero()[:, 0], (~first).nonzero()[:, 0]))
    part = fake_source(labels[first], (), first.nonzero()[:, 0])
    for n in (3, 10, 15):
        chosen = [
            source.indices[choose_positions(source, "set", n=n, seed=seed, balanced=balanced)]
            for source in (whole, part)
        ]
        assert torch.equal(*chosen)
    assert choose_positions(whole, "set") == list(range(40))
    with pytest.raises(ValueError, match=r"n <= 15 for a balanced choice .* has 3 pictures"):
        choose_positions(part, "set", n=16, balanced=True)


def fake_source(labels, blocks, indices=None):
    return sources.ImageSource(
        class_names=tuple("abcde"),
        labels=labels,
        indices=torch.arange(len(labels)) if indices is None else indices,
        read=lambda position: torch.zeros(1, 1, 1),
        origin=str,
        files=lambda positions: {},
        blocks=blocks,
    )


def test_index_outside_the_subset_is_a_clear_error(small_cifar10):
    _, subset, _ = small_cifar10
    for split, index in (("train", 3), ("test", 5)):
        with pytest.raises(ValueError, match=rf"cifar10-subset \(download=True .* got {index}"):
            load_images("cifar10", root=subset, split=split, indices=[index])


def test_damaged_cifar10(small_cifar10):
    complete, subset, _ = small_cifar10
    folder = subset / "cifar10-subset" / "train"
    for path in folder.glob("*/00014.png"):
        path.unlink()
    with pytest.raises(ValueError, match="each of the 5 training batches"):
        load_images("cifar10", 1, root=subset, split="train")
    for path in folder.glob("*/00007.png"):
        path.unlink()
    with pytest.raises(ValueError, match="none numbered 7"):
        load_images("cifar10", 1, root=subset, split="train")
    save_png(folder / "zebra" / "00007.png", noise(0, 32, 32, 3))
    with pytest.raises(ValueError, match="folder 'zebra'"):
        load_images("cifar10", 1, root=subset, split="train")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="not complete under the data root"):
        load_images("cifar10", 1, root=subset, split="train")
    (complete / "cifar-10-batches-py" / "test_batch").write_bytes(b"short")
    with pytest.raises(ValueError, match="original files of cifar10"):
        load_images("cifar10", 1, root=complete)


def test_victims_folder_is_in_the_authors_order_with_cifar10_labels(tmp_path):
    order = ["frog", "cat", "truck", "cat"]  # not all ten classes: labels must not shift
    for number, name in enumerate(order):
        path = tmp_path / "cifar10-victims" / name / f"{number:03d}.png"
        save_png(path, noise(number, 32, 32, 3))
    part = load_images("cifar10-victims", root=tmp_path)
    assert [part.class_names[label] for label in part.labels] == order
    assert part.labels.tolist() == [6, 3, 9, 3]
    assert part.indices.tolist() == [0, 1, 2, 3]
    for number, image in enumerate(part.images):
        expected = noise(number, 32, 32, 3).transpose(2, 0, 1)
        np.testing.assert_array_equal((image * 255).round().numpy(), expected)
    save_png(tmp_path / "cifar10-victims" / "dog" / "3.png", noise(9, 32, 32, 3))
    with pytest.raises(ValueError, match="named by one number each"):
        load_images("cifar10-victims", root=tmp_path)


def real_root(*parts):
    root = data_root()
    if not root.joinpath(*parts).exists():
        pytest.skip(f"no {'/'.join(parts)} under {root}")
    return root


@pytest.mark.data
def test_real_mnist():
    root = real_root("MNIST", "raw", "t10k-images-idx3-ubyte")
    part = load_images("mnist", 4, root=root)
    assert part.labels.tolist() == [7, 2, 1, 0]
    raw = (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    assert hashlib.md5(raw).hexdigest() == "2646ac647ad5339dbf082846283269ea"
    expected = np.frombuffer(raw, np.uint8, offset=16).reshape(10_000, 28, 28)
    np.testing.assert_array_equal((part.images[:, 0] * 255).round().numpy(), expected[:4])
    assert load_images("mnist", 5, root=root, split="train").labels.tolist() == [5, 0, 4, 1, 9]
    assert load_images("mnist", root=root).images.shape == (10_000, 1, 28, 28)
    tens = load_images("mnist", 20, root=root, seed=0, balanced=True)
    assert torch.bincount(tens.labels).tolist() == [2] * 10


@pytest.mark.data
def test_real_cifar10_subset():
    root = real_root("cifar10-subset", "test")
    # the first ten test labels and the first of each training batch, known from the original files
    test = load_images("cifar10", root=root, indices=range(10))
    assert test.labels.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    train = load_images("cifar10", root=root, split="train", indices=[0, 1, 2, 3, 4, 10_000])
    assert train.labels.tolist() == [6, 9, 9, 4, 1, 1]
    assert train.images.shape == (6, 3, 32, 32)
    if not (root / "cifar-10-batches-py").exists():
        path = next((root / "cifar10-subset" / "train").glob("*/00932.png"))
        expected = np.asarray(Image.open(path)).transpose(2, 0, 1)
        np.testing.assert_array_equal((train.images[5] * 255).round().numpy(), expected)
        with pytest.raises(ValueError, match="first 932 of each batch of 10000"):
            load_images("cifar10", root=root, split="train", indices=[932])


@pytest.mark.data
def test_real_cifar10_victims():
    root = real_root("cifar10-victims")
    part = load_images("cifar10-victims", root=root)
    assert part.images.shape == (128, 3, 32, 32)
    for index, label, origin in zip(part.indices, part.labels, part.origins, strict=True):
        assert origin == f"cifar10-victims/{part.class_names[label]}/{index:03d}.png"
    assert os.fspath(root) not in part.origins[0]
