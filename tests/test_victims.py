"""Victims: grouping, selecting, converting, and refusing what is wrong."""

import pytest
import torch

from leaklib.data import Victims, load_images, make_victims


def test_make_victims_groups_consecutive_pictures():
    part = load_images("patches", 6)
    victims = make_victims(part, batch=3)
    assert victims.images.shape == (2, 3, 3, 32, 32)
    assert victims.labels.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(victims.images[1, 2], part.images[5])
    assert (len(victims), victims.batch, victims.image_shape) == (2, 3, (3, 32, 32))
    assert make_victims(part).images.shape == (6, 1, 3, 32, 32)
    for batch in (0, -1, 4, 7):
        with pytest.raises(ValueError, match="divides 6 pictures"):
            make_victims(part, batch=batch)


def test_victims_by_slice_list_number_and_mask():
    victims = make_victims(load_images("patches", 6), batch=2)
    assert torch.equal(victims[1:].images, victims.images[1:])
    assert victims[[2, 0]].labels.tolist() == [[4, 5], [0, 1]]
    assert victims[torch.tensor([False, True, False])].labels.tolist() == [[2, 3]]
    assert victims[-1].images.shape == (1, 2, 3, 32, 32)
    assert [one.labels.tolist() for one in victims] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    with pytest.raises(IndexError, match="below 3, got 3"):
        victims[3]
    with pytest.raises(ValueError, match="non-empty"):
        victims[[]]


def test_victims_to_dtype_and_device():
    victims = make_victims(load_images("digits", 2))
    double = victims.to(dtype=torch.float64)
    assert (double.images.dtype, double.labels.dtype) == (torch.float64, torch.int64)
    assert victims.to("cpu").images.dtype == torch.float32
    soft = Victims(victims.images, torch.full((2, 1, 4), 0.25))
    assert soft.to(dtype=torch.float64).labels.dtype == torch.float64
    with pytest.raises(TypeError, match="floating-point images"):
        victims.to(dtype=torch.int64)


IMAGES = torch.full((3, 2, 1, 4, 4), 0.5)
LABELS = torch.zeros(3, 2, dtype=torch.int64)


def changed(where, value):
    images = IMAGES.clone()
    images[where] = value
    return images


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        ((IMAGES * 255).to(torch.uint8), LABELS, TypeError, r"float\(\) / 255"),
        (IMAGES[0], LABELS, ValueError, r"\(victims, batch, channels, height, width\)"),
        (IMAGES[:0], LABELS[:0], ValueError, "non-empty"),
        (changed((1, 0, 0, 2, 3), float("nan")), LABELS, ValueError, "NaN or infinity in victim 1"),
        (changed((2, 1), float("inf")), LABELS, ValueError, "NaN or infinity in victim 2"),
        (changed((1, 1, 0, 0, 0), 1.5), LABELS, ValueError, r"victim 1 in \[0.5, 1.5\]"),
        (changed((0, 1, 0, 0, 0), -1e-3), LABELS, ValueError, "victim 0 in"),
        (IMAGES, LABELS.int(), TypeError, r"labels.long\(\)"),
        (IMAGES, LABELS[:, 0], ValueError, r"labels \(victims, batch\) = \(3, 2\), got \(3,\)"),
        (IMAGES, LABELS[:2], ValueError, r"got \(2, 2\)"),
        (IMAGES, LABELS - torch.tensor([[0], [0], [1]]), ValueError, "in victim 2; count classes"),
        (IMAGES, LABELS.float(), ValueError, "soft labels"),
        (IMAGES, torch.full((3, 2, 4), 0.3), ValueError, "sum to one, got .* in victim 0"),
        (IMAGES, torch.tensor([1.5, -0.5]).expand(3, 2, 2), ValueError, "rows >= 0"),
        (IMAGES, torch.full((3, 2, 4), float("nan")), ValueError, "rows >= 0"),
        (IMAGES, torch.zeros(3, 2, 0), ValueError, "rows >= 0"),
        (IMAGES, LABELS.to("meta"), ValueError, "labels on cpu like the images, got meta"),
    ],
)
def test_victims_refuse_what_is_wrong(images, labels, error, message):
    with pytest.raises(error, match=message):
        Victims(images, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_labels_in_every_precision(dtype):
    logits = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(0))
    Victims(IMAGES.to(dtype), logits.softmax(-1).to(dtype))


def test_victims_keep_the_boundary_values():
    images = torch.zeros(1, 1, 1, 2, 2)
    images[..., 0] = 1
    assert torch.equal(Victims(images, torch.zeros(1, 1, dtype=torch.int64)).images, images)
