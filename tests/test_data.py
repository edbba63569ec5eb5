"""Choosing pictures of a set, their size and channels, and sets that torchvision reads."""

import gzip
import hashlib
import http.server
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from leaklib.data import available_sets, data_root, load_images

REPOSITORY = Path(__file__).resolve().parents[1]


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_first_n_and_all():
    everything = load_images("patches")
    assert everything.indices.tolist() == list(range(80))
    first = load_images("patches", 7)
    assert first.indices.tolist() == list(range(7))
    assert torch.equal(first.images, everything.images[:7])
    assert (first.name, first.split, len(first)) == ("patches", "test", 7)


def test_seeded_draw_is_repeatable_without_replacement_and_leaves_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = load_images("digits", 50, split="train", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.indices.unique().numel() == 50
    assert torch.equal(drawn.indices, load_images("digits", 50, split="train", seed=3).indices)
    assert not torch.equal(drawn.indices, load_images("digits", 50, split="train", seed=4).indices)
    # a larger draw continues the smaller one: adding victims keeps those already studied
    assert torch.equal(load_images("digits", 60, split="train", seed=3).indices[:50], drawn.indices)
    by_index = load_images("digits", split="train", indices=drawn.indices)
    assert torch.equal(by_index.images, drawn.images)
    assert by_index.origins == drawn.origins


def test_seeded_draw_reaches_every_picture_equally():
    hits = torch.zeros(80)
    for seed in range(60):
        hits[load_images("patches", 20, seed=seed).indices] += 1
    # binomial with mean 15 and standard deviation 3.4
    assert hits.min() >= 2
    assert hits.max() <= 30


@given(st.lists(st.integers(0, 79), min_size=1, max_size=8, unique=True))
def test_indices_keep_their_order(indices):
    part = load_images("patches", indices=indices)
    assert part.indices.tolist() == indices
    assert part.labels.tolist() == [index % 10 for index in indices]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("n", [4, 10, 25])
def test_balanced_counts_differ_by_one_at_most(n, seed):
    part = load_images("digits", n, split="train", seed=seed, balanced=True)
    counts = torch.bincount(part.labels, minlength=10)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1
    assert part.indices.unique().numel() == n


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "digit"}, ValueError, r"expected one of digits, .*, folder:PATH; got 'digit'"),
        ({"name": "folder:PATH"}, ValueError, "expected one of"),
        ({"split": "validation"}, ValueError, "among train, test; got 'validation'"),
        ({"n": 81}, ValueError, "n from 1 to 80, the pictures of patches test here, got 81"),
        ({"n": 0}, ValueError, "n from 1 to 80"),
        ({"n": -3}, ValueError, "n from 1 to 80"),
        ({"n": 2.5}, TypeError, "whole numbers for n, got 2.5"),
        ({"n": True}, TypeError, "whole numbers for n"),
        ({"n": 3, "seed": 0.5}, TypeError, "whole numbers for seed"),
        ({"indices": [-1]}, ValueError, "has indices 0 to 79; got -1"),
        ({"indices": [3, 80]}, ValueError, "has indices 0 to 79; got 80"),
        ({"indices": [3, 4, 3]}, ValueError, "got 3 twice"),
        ({"indices": []}, ValueError, "at least one index"),
        ({"indices": [0.0]}, TypeError, "whole numbers for indices"),
        ({"indices": [True, False]}, TypeError, "whole numbers for indices"),
        ({"indices": [1], "n": 1}, ValueError, "either indices or n"),
        ({"indices": [1], "seed": 1}, ValueError, "either indices or n"),
        ({"seed": 1}, ValueError, "pass n"),
        ({"balanced": True}, ValueError, "pass n"),
        ({"n": 1, "size": 0}, ValueError, "size = "),
        ({"n": 1, "size": (4, 4, 4)}, ValueError, "size = "),
        ({"n": 1, "channels": 2}, ValueError, "channels = 1, 3"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    arguments = {"name": "patches"} | arguments
    with pytest.raises(error, match=message):
        load_images(arguments.pop("name"), **arguments)


def test_channels_and_size():
    grey = load_images("patches", 2, channels=1)
    colour = load_images("patches", 2)
    red, green, blue = colour.images.double().unbind(1)
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(grey.images[:, 0].double(), expected, rtol=0, atol=1e-6)
    three = load_images("digits", 2, channels=3).images
    assert three.shape == (2, 3, 8, 8)
    assert torch.equal(three[:, 0], three[:, 2])
    assert load_images("digits", 2, channels=1).images.shape == (2, 1, 8, 8)
    assert load_images("digits28", 1, size=(9, 12)).images.shape == (1, 1, 9, 12)
    assert torch.equal(load_images("patches", 2, size=32).images, colour.images)


def test_shrinking_averages_like_pillow():
    picture = load_images("patches", 1, channels=1).images[0, 0].numpy()
    for height, width in ((16, 16), (8, 20), (5, 3)):
        found = load_images("patches", 1, channels=1, size=(height, width)).images[0, 0].numpy()
        expected = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


def test_available_sets_are_those_that_load():
    known = available_sets()
    assert {"digits", "digits28", "patches", "mnist", "fashion_mnist", "cifar10", "cifar100"} < {
        *known
    }
    for name, line in known.items():
        assert line
        assert "\n" not in line
        if line.startswith("embedded"):
            assert len(load_images(name, 1)) == 1


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.delenv("LEAKLIB_DATA", raising=False)
    assert data_root() == data_root("") == REPOSITORY / "data" / "sets"
    monkeypatch.setenv("LEAKLIB_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root("other") == Path("other")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_set_says_where_and_how(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKLIB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load_images(name, 1)
    for part in (str(tmp_path), "download=True", "data/README.md", "LEAKLIB_DATA", "embedded set"):
        assert part in str(caught.value)


def test_missing_victims_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar10-victims/<class>/<number>.png"):
        load_images("cifar10-victims", root=tmp_path)
    with pytest.raises(ValueError, match="among test; got 'train'"):
        load_images("cifar10-victims", root=tmp_path, split="train")


def idx_file(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def fake_mnist():
    return {
        "train-images-idx3-ubyte": idx_file(noise(0, 7, 28, 28)),
        "train-labels-idx1-ubyte": idx_file(np.arange(7, dtype=np.uint8)),
        "t10k-images-idx3-ubyte": idx_file(noise(1, 5, 28, 28)),
        "t10k-labels-idx1-ubyte": idx_file(np.arange(5, dtype=np.uint8) + 4),
    }


def write_mnist(root, kind="MNIST"):
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    for name, content in fake_mnist().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_layout(name, kind, tmp_path):
    folder = write_mnist(tmp_path, kind)
    part = load_images(name, root=tmp_path, indices=[4, 0])
    assert part.labels.tolist() == [8, 4]
    np.testing.assert_array_equal(
        (part.images[:, 0] * 255).round().numpy(), noise(1, 5, 28, 28)[[4, 0]]
    )
    assert part.class_names[3] == {"mnist": "3", "fashion_mnist": "Dress"}[name]
    before = load_images(name, 2, root=tmp_path, split="train").checksum
    assert load_images(name, 2, root=tmp_path, split="train", seed=1).checksum == before
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_file(np.zeros(7, np.uint8)))
    assert load_images(name, 2, root=tmp_path, split="train").checksum != before


@pytest.mark.parametrize("kept", [0, 3, 100, 5 * 784])
def test_truncated_mnist_is_refused(kept, tmp_path):
    path = write_mnist(tmp_path) / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"original files of mnist.*remove that folder"):
        load_images("mnist", 1, root=tmp_path)


def test_mnist_with_a_file_missing_or_too_few_labels(tmp_path):
    folder = write_mnist(tmp_path)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_file(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="5 pictures but 3 labels"):
        load_images("mnist", 1, root=tmp_path)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*t10k-labels-idx1-ubyte"):
        load_images("mnist", 1, root=tmp_path)


def test_download_goes_through_torchvision(tmp_path, monkeypatch):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in fake_mnist().items()}
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)

    class Mirror(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = packed[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with pytest.raises(FileNotFoundError, match="download=True"):
        load_images("mnist", 2, root=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        part = load_images("mnist", 2, root=tmp_path, download=True)
        server.shutdown()
    assert part.labels.tolist() == [4, 5]
    assert load_images("mnist", 2, root=tmp_path).labels.tolist() == [4, 5]


def test_failed_download_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{(tmp_path / 'nowhere').as_uri()}/"])
    with pytest.raises(FileNotFoundError, match=r"the download into .* failed"):
        load_images("mnist", 2, root=tmp_path, download=True)
