"""The embedded sets against scikit-learn, scikit-image and the script that makes them."""

import csv
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn
import torch
from PIL import Image
from skimage.transform import resize, resize_local_mean
from sklearn.datasets import load_digits

from leaklib.data import load_images
from leaklib.data.embedded import embedded_folder

REPOSITORY = Path(__file__).resolve().parents[1]
EMBEDDED = REPOSITORY / "data" / "embedded"
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
PHOTOGRAPHS = {
    "astronaut": SKIMAGE / "astronaut.png",
    "chelsea": SKIMAGE / "chelsea.png",
    "coffee": SKIMAGE / "coffee.png",
    "hubble_deep_field": SKIMAGE / "hubble_deep_field.jpg",
    "ihc": SKIMAGE / "ihc.png",
    "motorcycle_left": SKIMAGE / "motorcycle_left.png",
    "retina": SKIMAGE / "retina.jpg",
    "rocket": SKIMAGE / "rocket.jpg",
    "china": SKLEARN / "china.jpg",
    "flower": SKLEARN / "flower.jpg",
}


@pytest.fixture
def maker():
    spec = importlib.util.spec_from_file_location(
        "make_embedded", REPOSITORY / "data" / "make_embedded.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def embedded_copy(tmp_path, monkeypatch):
    folder = tmp_path / "embedded"
    shutil.copytree(EMBEDDED, folder)
    monkeypatch.setenv("LEAKLIB_EMBEDDED", str(folder))
    return folder


def table(name):
    with (EMBEDDED / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_digits_are_those_of_scikit_learn_each_once():
    pixels, labels = load_digits(return_X_y=True)
    seen = []
    for split, count in (("train", 1437), ("test", 360)):
        digits = load_images("digits", split=split)
        rows = [int(origin.removeprefix("load_digits row ")) for origin in digits.origins]
        assert digits.images.shape == (count, 1, 8, 8)
        assert digits.images.dtype == torch.float32
        expected = torch.tensor(pixels[rows]).reshape(-1, 1, 8, 8) / 16
        torch.testing.assert_close(digits.images.double(), expected, rtol=0, atol=0)
        assert digits.labels.tolist() == labels[rows].tolist()
        assert digits.labels.dtype == digits.indices.dtype == torch.int64
        assert digits.class_names == tuple("0123456789")
        seen += rows
    assert sorted(seen) == list(range(1797))


def test_test_digits_are_stratified_and_come_in_turn():
    labels = load_images("digits").labels
    assert torch.bincount(labels).tolist() == [36] * 10
    assert labels.tolist() == [i % 10 for i in range(360)]


def test_digits28_is_bilinear_interpolation():
    small, large = load_images("digits", 6), load_images("digits28", 6)
    assert large.images.shape == (6, 1, 28, 28)
    for before, after in zip(small.images, large.images, strict=True):
        expected = resize(before[0].double().numpy(), (28, 28), order=1, mode="edge")
        np.testing.assert_allclose(after[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("index", range(10))
def test_first_patches_are_the_whole_squares(index):
    patches = load_images("patches", 10)
    name = patches.class_names[patches.labels[index]]
    assert index == patches.labels[index] == list(PHOTOGRAPHS).index(name)
    photograph = np.asarray(Image.open(PHOTOGRAPHS[name]).convert("RGB"))
    height, width = photograph.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = photograph[top : top + side, left : left + side].astype(float)
    expected = resize_local_mean(square, (32, 32)) / 255
    found = patches.images[index].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 0.5 / 255 + 1e-6


def test_every_patch_is_the_crop_that_its_row_names():
    pictures = {
        name: np.asarray(Image.open(path).convert("RGB")) for name, path in PHOTOGRAPHS.items()
    }
    loaded = {split: load_images("patches", split=split) for split in ("train", "test")}
    assert {split: len(part) for split, part in loaded.items()} == {"train": 240, "test": 80}
    for row in table("patches"):
        part, index = loaded[row["split"]], int(row["index"])
        top, left, side = int(row["top"]), int(row["left"]), int(row["side"])
        crop = pictures[row["photograph"]][top : top + side, left : left + side].astype(float)
        assert crop.shape == (side, side, 3)
        expected = resize_local_mean(crop, (32, 32)) / 255
        worst = np.abs(part.images[index].permute(1, 2, 0).numpy() - expected).max()
        assert worst <= 0.5 / 255 + 1e-6, row
        assert part.class_names[part.labels[index]] == row["photograph"]
        assert part.origins[index].startswith(f"{row['photograph']}: square at row {top},")


def test_drawn_test_crops_share_no_pixel_with_training_crops():
    drawn = [row for row in table("patches") if row["split"] == "train" or int(row["index"]) >= 10]
    for name in PHOTOGRAPHS:
        covered = {split: np.zeros((1500, 1500), bool) for split in ("train", "test")}
        for row in drawn:
            if row["photograph"] == name:
                top, left, side = int(row["top"]), int(row["left"]), int(row["side"])
                covered[row["split"]][top : top + side, left : left + side] = True
        assert covered["train"].any(), name
        assert covered["test"].any(), name
        assert not (covered["train"] & covered["test"]).any(), name


def test_crops_come_at_several_scales():
    sides = {int(row["side"]) for row in table("patches") if row["photograph"] == "astronaut"}
    assert sides == {512, 170, 128, 85}


def test_committed_files_are_what_the_script_makes(maker, tmp_path):
    script = REPOSITORY / "data" / "make_embedded.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True)
    assert len(list(tmp_path.iterdir())) == 8
    for path in tmp_path.iterdir():
        if path.name != "SHA256SUMS":  # of the bytes, which depend on the version of Pillow
            same, verdict = maker.compare(path.name, path.read_bytes(), EMBEDDED / path.name)
            assert same, f"{path.name}: {verdict}"
    sizes = [path.stat().st_size for path in EMBEDDED.iterdir()]
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 1_500_000


def test_check_finds_what_is_missing_damaged_or_changed(maker, embedded_copy, capsys, monkeypatch):
    made = {path.name: path.read_bytes() for path in embedded_copy.iterdir()}
    monkeypatch.setattr(
        maker, "make", lambda: {name: made[name] for name in made if name[0] != "."}
    )
    assert maker.main(["--check", "--out", str(embedded_copy)]) == 0

    def status(name, content):
        (embedded_copy / name).write_bytes(content)
        outcome = maker.main(["--check", "--out", str(embedded_copy)]), capsys.readouterr().out
        (embedded_copy / name).write_bytes(made[name])
        return outcome

    assert status("digits.csv", made["digits.csv"] + b"x")[0] == 1
    assert status("digits-test.png", made["digits-test.png"][:500])[0] == 1
    assert status("SHA256SUMS", b"")[0] == 1
    with Image.open(embedded_copy / "patches-test.png") as sheet:
        pixels = np.array(sheet)
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(embedded_copy / "patches-test.png")
    code, said = status("patches-test.png", (embedded_copy / "patches-test.png").read_bytes())
    assert code == 1
    assert "differs by up to 1 of 255" in said
    (embedded_copy / "digits.csv").unlink()
    assert maker.main(["--check", "--out", str(embedded_copy)]) == 1
    assert "digits.csv: missing" in capsys.readouterr().out


@pytest.mark.parametrize("side", [32, 50, 85, 96, 427])
def test_area_average_is_the_exact_mean(maker, side):
    square = noise(side, side, side, 3)
    # the same mean by brute force: every pixel 32 times, then blocks of `side`
    rows = np.repeat(square.astype(object), 32, axis=0).reshape(32, side, side, 3).sum(axis=1)
    both = np.repeat(rows, 32, axis=1).reshape(32, 32, side, 3).sum(axis=2)
    expected = [int(total * 2 + side**2) // (2 * side**2) for total in both.reshape(-1)]
    assert maker.area_average(square).reshape(-1).tolist() == expected


def test_checksums_are_those_of_the_files():
    names = {"digits": ["digits-test.png", "digits.csv"]}
    for name, files in names.items():
        listing = "".join(
            f"{hashlib.sha256((EMBEDDED / file).read_bytes()).hexdigest()}  {file}\n"
            for file in files
        )
        assert load_images(name, 1).checksum == hashlib.sha256(listing.encode()).hexdigest()
    assert load_images("digits", 1).checksum != load_images("digits", 1, split="train").checksum


@pytest.mark.parametrize("name", ["patches-test.png", "patches.csv"])
def test_changed_embedded_file_is_refused(embedded_copy, name):
    content = (embedded_copy / name).read_bytes()
    (embedded_copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name} to have the SHA-256 .* restore it"):
        load_images("patches", 1)
    assert len(load_images("digits", 1)) == 1


def test_truncated_and_missing_embedded_files_are_refused(embedded_copy):
    assert embedded_folder() == embedded_copy
    sheet = embedded_copy / "digits-train.png"
    sheet.write_bytes(sheet.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or changed"):
        load_images("digits", 1, split="train")
    sheet.unlink()
    with pytest.raises(FileNotFoundError, match=r"make_embedded.py.*LEAKLIB_EMBEDDED"):
        load_images("digits", 1, split="train")
    (embedded_copy / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match="SHA-256 None of SHA256SUMS"):
        load_images("digits", 1)
