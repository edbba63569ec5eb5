"""Folders of pictures: order, sizes, kinds of picture, damage."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import resize_local_mean

from leaklib.data import load_images


def save_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for name, sizes in {"bird": [(8, 8), (8, 8)], "ant": [(8, 8)]}.items():
        for k, (height, width) in enumerate(sizes):
            path = tmp_path / "photos" / name / f"{k}.png"
            save_png(path, noise(10 * len(name) + k, height, width, 3))
    return tmp_path / "photos"


def test_folder_is_sorted_by_class_and_file(folder):
    part = load_images(f"folder:{folder}")
    assert part.class_names == ("ant", "bird")
    assert part.labels.tolist() == [0, 1, 1]
    assert part.origins == ("photos/ant/0.png", "photos/bird/0.png", "photos/bird/1.png")
    expected = noise(41, 8, 8, 3).transpose(2, 0, 1)
    np.testing.assert_array_equal((part.images[2] * 255).round().numpy(), expected)
    assert part.images.dtype == torch.float32


def test_only_the_pictures_asked_for_are_read(folder):
    (folder / "bird" / "0.png").write_bytes(b"no picture")
    assert load_images(f"folder:{folder}", indices=[2, 0]).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"readable picture.*bird.0\.png"):
        load_images(f"folder:{folder}", 2)


def test_checksum_of_a_folder_follows_what_was_read(folder):
    one = load_images(f"folder:{folder}", 1).checksum
    assert one != load_images(f"folder:{folder}", 2).checksum
    save_png(folder / "bird" / "1.png", noise(99, 8, 8, 3))
    assert one == load_images(f"folder:{folder}", 1).checksum


def test_folder_with_splits(folder, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "split" / split)
    assert len(load_images(f"folder:{tmp_path / 'split'}", split="val")) == 3
    with pytest.raises(ValueError, match=r"a split train, val of .* got 'test'"):
        load_images(f"folder:{tmp_path / 'split'}")
    with pytest.raises(ValueError, match=r"'test', as it holds classes: ant, bird .* got 'train'"):
        load_images(f"folder:{folder}", split="train")


def test_relative_folder_and_missing_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_images("folder:photos")) == 3
    monkeypatch.chdir(folder)
    assert len(load_images("folder:photos", root=tmp_path)) == 3
    with pytest.raises(FileNotFoundError, match="looked for"):
        load_images("folder:nothing")
    with pytest.raises(FileNotFoundError, match="looked for"):
        load_images("folder:")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"<class>/<picture>"):
        load_images(f"folder:{tmp_path / 'empty'}")


def test_pictures_of_two_sizes_need_a_size(folder):
    save_png(folder / "bird" / "2.png", noise(0, 12, 20, 3))
    with pytest.raises(ValueError, match=r"ant/0.png and \(3, 12, 20\) in .*bird/2.png; pass size"):
        load_images(f"folder:{folder}")
    part = load_images(f"folder:{folder}", size=(6, 10), channels=1)
    assert part.images.shape == (4, 1, 6, 10)
    # exactly half in each direction: an antialiased triangle, close to a mean of 2 x 2
    wanted = noise(0, 12, 20, 3) @ np.array([0.299, 0.587, 0.114]) / 255
    wanted = resize_local_mean(wanted, (6, 10))
    assert np.abs(part.images[3, 0].numpy() - wanted).mean() < 0.08


def test_grey_palette_and_turned_pictures(tmp_path):
    pixels = noise(3, 6, 4)
    save_png(tmp_path / "grey" / "a.png", pixels)
    Image.fromarray(noise(4, 6, 4, 3)).quantize(16).save(tmp_path / "grey" / "b.png")
    grey = load_images(f"folder:{tmp_path}")
    assert grey.images.shape == (2, 3, 6, 4)
    np.testing.assert_array_equal((grey.images[0, 1] * 255).round().numpy(), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated clockwise by 90 degrees
    Image.fromarray(noise(4, 6, 4, 3)).save(tmp_path / "grey" / "c.png", exif=exif)
    turned = load_images(f"folder:{tmp_path}", indices=[2])
    expected = np.rot90(noise(4, 6, 4, 3), -1).transpose(2, 0, 1)
    np.testing.assert_array_equal((turned.images[0] * 255).round().numpy(), expected)


def test_sixteen_bit_and_truncated_pictures_are_refused(tmp_path):
    save_png(tmp_path / "x" / "a.png", (noise(0, 8, 8).astype(np.uint16) << 8))
    with pytest.raises(ValueError, match="8 bits per channel"):
        load_images(f"folder:{tmp_path}")
    save_png(tmp_path / "x" / "a.png", noise(0, 64, 64, 3))
    content = (tmp_path / "x" / "a.png").read_bytes()
    for kept in (0, 30, len(content) // 2):
        (tmp_path / "x" / "a.png").write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"readable picture.*a\.png"):
            load_images(f"folder:{tmp_path}")
