"""Fingerprints name every real fault of a figure, and no harmless change."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from figure_cases import CURVES, ENDS, FIGURES, MANY, NOISE, frames, images
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from leaklib import figures
from leaklib.figures.fingerprints import (
    check_picture,
    compare_fingerprints,
    fingerprint,
    load_fingerprint,
    save_fingerprint,
)

STEPS = np.linspace(0.1, 10.0, 30)
POINTS = np.stack([STEPS, STEPS**2], 1)


def chart(**changes):
    """Lines, a band, an image, bars, points and whiskers, drawn with plain matplotlib."""
    picture = np.linspace(0, 1, 12).reshape(3, 4)
    value = {
        "line": np.exp(-STEPS), "colour": "#0173B2", "picture": picture, "bars": [0.2, 0.7, 0.4],
        "points": POINTS, "error": [0.1, 0.2, 0.1], "limit": 12.0,
        "band": 0.1, "second": True, "scale": "linear", "title": "rates", "note": "30 dB",
        "labels": ("DLG", "iDLG"), "style": "-", "clim": (0, 1), "ticks": ["a", "b", "c"],
        "hatch": "//", "marker": "o", "bar_colour": "green", "cmap": "gray", "dpi": 100,
    } | changes  # fmt: skip
    figure = Figure(figsize=(6, 4), dpi=value["dpi"], layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    first.plot(
        STEPS, value["line"], color=value["colour"], ls=value["style"], label=value["labels"][0]
    )
    if value["second"]:
        first.plot(STEPS, np.cos(STEPS), color="#DE8F05", label=value["labels"][1])
    first.fill_between(STEPS, value["line"] - value["band"], value["line"] + 0.1, alpha=0.2)
    first.set(xlim=(0, value["limit"]), yscale=value["scale"], title=value["title"])
    first.legend()
    first.annotate(value["note"], (5, 0.5))
    image = second.imshow(value["picture"], cmap=value["cmap"])
    image.set_clim(*value["clim"])
    third.bar([0, 1, 2], value["bars"], color=value["bar_colour"], hatch=value["hatch"])
    third.errorbar([0, 1, 2], [0.2, 0.7, 0.4], yerr=value["error"], fmt="none", capsize=3)
    third.set_xticks([0, 1, 2], value["ticks"])
    fourth.scatter(*value["points"].T, marker=value["marker"])
    return figure


REFERENCE = fingerprint(chart())
PICTURE = np.linspace(0, 1, 12).reshape(3, 4)
ONE_CELL = PICTURE.copy()
ONE_CELL[1, 2] *= 1.005

# What was changed, and the key that must be named.
FAULTS = {
    "line 0.5 % off": ({"line": 1.005 * np.exp(-STEPS)}, "ax0/line0/xy"),
    "image 0.5 % off": ({"picture": 1.005 * PICTURE}, "ax1/image0/array"),
    "one pixel 0.5 % off": ({"picture": ONE_CELL}, "ax1/image0/array"),
    "image upside down": ({"picture": PICTURE[::-1]}, "ax1/image0/array"),
    "image of other contrast": ({"clim": (0, 0.9)}, "ax1/image0/clim"),
    "other colour map": ({"cmap": "viridis"}, "ax1/image0/cmap"),
    "wrong colour": ({"colour": "#029E73"}, "ax0/line0/rgba"),
    "dashed": ({"style": "--"}, "ax0/line0/style"),
    "missing curve": ({"second": False}, "ax0/line1/xy"),
    "narrower band": ({"band": 0.09}, "ax0/collection0/xy"),
    "bar 2 % off": ({"bars": [0.2, 0.714, 0.4]}, "ax2/rectangle1/box"),
    "bars swapped": ({"bars": [0.7, 0.2, 0.4]}, "ax2/rectangle0/box"),
    "bar of wrong colour": ({"bar_colour": "red"}, "ax2/rectangle0/rgba"),
    "other hatch": ({"hatch": "xx"}, "ax2/rectangle2/hatch"),
    "shorter whisker": ({"error": [0.1, 0.19, 0.1]}, "ax2/collection0/xy"),
    "points 0.5 % off": ({"points": POINTS * (1, 1.005)}, "ax3/collection0/offsets"),
    "other marker": ({"marker": "s"}, "ax3/collection0/xy"),
    "other limit": ({"limit": 12.1}, "ax0/xlim"),
    "log axis": ({"scale": "symlog"}, "ax0/yscale"),
    "other title": ({"title": "rate"}, "ax0/title"),
    "other note": ({"note": "20 dB"}, "ax0/texts/strings"),
    "names swapped": ({"labels": ("iDLG", "DLG")}, "ax0/legend/strings"),
    "ticks renamed": ({"ticks": ["a", "c", "b"]}, "ax2/xticks/strings"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault):
    changes, key = FAULTS[fault]
    faults = compare_fingerprints(fingerprint(chart(**changes)), REFERENCE)
    assert any(line.startswith(f"{key}:") for line in faults), faults


@pytest.mark.parametrize("changes", [
    {"line": np.exp(-STEPS) * (1 + 1e-5)},
    {"picture": PICTURE * (1 + 1e-5)},
    {"bars": [0.2, 0.7 + 7e-6, 0.4]},
    {"limit": 12.0 * (1 + 1e-5)},
    {"dpi": 43},
    {"dpi": 311},
    {},
])  # fmt: skip
def test_drift_and_resolution_are_no_faults(changes):
    assert compare_fingerprints(fingerprint(chart(**changes)), REFERENCE) == []


def test_swapped_rows_and_one_changed_victim_of_a_strip_are_found():
    private, guesses = images(3), frames(3, 2)
    draw = figures.frames_strip
    reference = fingerprint(draw(private, guesses, counts=[0, 9], row_labels=["abc"] * 3))
    labels = ["abc"] * 3
    swapped = draw(private, guesses[[1, 0, 2]], counts=[0, 9], row_labels=labels)
    faults = compare_fingerprints(fingerprint(swapped), reference)
    assert {line.split(":")[0] for line in faults} == {
        f"ax0/image{place}/array" for place in (0, 1, 3, 4)
    }
    guesses = guesses.clone()
    guesses[2, 1] *= 0.995
    (fault,) = compare_fingerprints(
        fingerprint(draw(private, guesses, counts=[0, 9], row_labels=labels)), reference
    )
    assert fault.startswith("ax0/image7/array:")


@pytest.mark.parametrize(
    ("table", "column", "draw"),
    [
        (MANY, "estimate", lambda t: figures.rate_bars(
            t, category="network", hue="attack", **ENDS)),
        (NOISE, "low", lambda t: figures.rate_lines(t, x="noise", hue="attack", **ENDS)),
        (CURVES, "objective", lambda t: figures.convergence(t, y="objective", hue="attack")),
    ],
)  # fmt: skip
def test_one_changed_number_of_a_table_is_found_in_its_figure(table, column, draw):
    reference = fingerprint(draw(table))
    place = table[column].index[(table[column] > 0.2) & (table[column] < 0.8)][0]
    for factor, found in ((1.005, True), (1 + 1e-5, False)):
        changed = table.copy()
        changed.loc[place, column] *= factor
        assert bool(compare_fingerprints(fingerprint(draw(changed)), reference)) is found


@pytest.mark.parametrize("name", FIGURES)
def test_saving_a_figure_does_not_change_its_fingerprint(name):
    figure = FIGURES[name]()
    before = fingerprint(figure)
    for dpi in (50, 200):
        figure.savefig(io.BytesIO(), dpi=dpi)
    after, again = fingerprint(figure), fingerprint(FIGURES[name]())
    for other in (after, again):
        assert list(other) == list(before)
        assert all(np.array_equal(other[k], v, equal_nan=v.dtype.kind == "f")
                   for k, v in before.items())  # fmt: skip


def test_figures_of_pyplot_canvases_insets_and_subfigures_are_read():
    figure = Figure()
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2)
    left.suptitle("left")
    ax = right.subplots()
    ax.pcolormesh(np.arange(6.0).reshape(2, 3))
    inset = ax.inset_axes((0.5, 0.5, 0.4, 0.4))
    inset.plot([0, 1], [1, 2])
    ax.axhline(0.5)
    found = fingerprint(figure)
    assert found["sub0/figure/texts/strings"].tolist() == ["left"]
    assert found["ax0/collection0/array"].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert found["ax0/inset0/line0/xy"].tolist() == [[0, 1], [1, 2]]
    assert found["ax0/line0/xy"].tolist() == [[0, 0.5], [1, 0.5]]
    shown, axes = plt.subplots()
    axes.pie([1, 2])
    assert fingerprint(shown)["ax0/patch1/xy"].shape[1] == 2
    plt.close(shown)


def test_what_nobody_sees_is_not_read():
    figure = chart()
    figure.axes[0].lines[1].set_visible(False)
    figure.axes[3].set_visible(False)
    faults = compare_fingerprints(fingerprint(figure), REFERENCE)
    assert any(line.startswith("ax0/line1/xy: missing from the figure") for line in faults)
    assert any(line.startswith("ax3/collection0/offsets: missing") for line in faults)


def test_masked_and_missing_points_are_gaps():
    figure = Figure()
    figure.subplots().plot([0, 1, 2], np.ma.masked_equal([1.0, 5.0, 3.0], 5.0))
    np.testing.assert_array_equal(fingerprint(figure)["ax0/line0/xy"][:, 1], [1, np.nan, 3])


# compare_fingerprints itself, on arrays small enough to check by hand.


def test_a_deviation_is_reported_where_it_is_largest():
    reference = {"a": np.array([[1.0, 2.0], [3.0, 4.0]])}
    found = {"a": np.array([[1.01, 2.0], [3.5, 4.0]])}
    (fault,) = compare_fingerprints(found, reference)
    assert fault == (
        "a: 2 of 4 numbers differ, largest deviation 0.5 at (1, 0): found 3.5, reference 3 "
        "(rtol 0.001, atol 1e-06)"
    )


@pytest.mark.parametrize(
    ("here", "there", "agree"),
    [
        ([1.0009], [1.0], True),
        ([1.0011], [1.0], False),
        ([9e-7], [0.0], True),
        ([2e-6], [0.0], False),
        ([np.nan], [np.nan], True),
        ([np.nan], [0.0], False),
        ([0.0], [np.nan], False),
        ([np.inf], [np.inf], True),
        ([-np.inf], [np.inf], False),
        ([1.0, 2.0], [1.0], False),
        ([], [], True),
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        (["1"], [1.0], False),
        ([True], [False], False),
    ],
)
def test_agreement(here, there, agree):
    faults = compare_fingerprints({"k": np.array(here)}, {"k": np.array(there)})
    assert (faults == []) is agree
    assert all(line.startswith("k: ") for line in faults)


def test_missing_and_extra_keys_are_named_and_images_have_a_tolerance_of_their_own():
    one = np.ones(3)
    assert compare_fingerprints({"b": one}, {"a": one}) == [
        "a: missing from the figure",
        "b: not in the reference",
    ]
    found = {"ax0/image0/array": 0.5 + one / 100, "ax0/line0/xy": 0.5 + one / 100}
    reference = {"ax0/image0/array": 0.5 * one, "ax0/line0/xy": 0.5 * one}
    (fault,) = compare_fingerprints(found, reference, image_atol=0.02)
    assert fault.startswith("ax0/line0/xy")
    assert compare_fingerprints(found, reference, rtol=0.03) == []


def test_round_trip_through_a_file_is_exact_and_its_bytes_repeat(tmp_path):
    path = tmp_path / "deep" / "chart.npz"
    save_fingerprint(path, REFERENCE)
    found = load_fingerprint(path)
    assert list(found) == list(REFERENCE)
    assert compare_fingerprints(found, REFERENCE, rtol=0, atol=0) == []
    first = path.read_bytes()
    save_fingerprint(path, fingerprint(chart()))
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == ["chart.npz"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused_by_name(tmp_path, share):
    path = tmp_path / "chart.npz"
    save_fingerprint(path, REFERENCE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"chart\.npz.*damaged.*re-run"):
        load_fingerprint(path)


def test_flipped_byte_array_file_and_objects_are_refused(tmp_path):
    path = tmp_path / "chart.npz"
    save_fingerprint(path, REFERENCE)
    raw = bytearray(path.read_bytes())
    raw[200:240] = bytes(40)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        load_fingerprint(path)
    np.savez(path, a=np.array([{"b": 1}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        load_fingerprint(path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match="damaged"):
        load_fingerprint(path)
    with pytest.raises(FileNotFoundError, match="re-run the notebook"):
        load_fingerprint(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"\['a'\]"):
        save_fingerprint(path, {"a": np.array([None])})


def test_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "chart.npz"
    save_fingerprint(path, REFERENCE)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        save_fingerprint(path, {"a": np.ones(2)})
    assert path.read_bytes() == before


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_of_the_wrong_size_blank_or_broken_are_faults(tmp_path):
    good = figures.to_png(FIGURES["bar"]())
    with Image.open(io.BytesIO(good)) as opened:
        size = opened.size
    path = tmp_path / "bar.png"
    path.write_bytes(good)
    assert check_picture(good) == []
    assert check_picture(path, size=size) == []
    assert check_picture(str(path), size=(size[0] + 1, size[1])) == []
    (fault,) = check_picture(path, size=(size[0] + 2, size[1]))
    assert f"got {size[0]} x {size[1]}" in fault
    for broken in (good[: len(good) // 2], b"", b"not a picture", tmp_path / "none.png"):
        (fault,) = check_picture(broken)
        assert "readable picture" in fault
    blank = np.full((40, 40, 3), 200, np.uint8)
    assert "one colour" in check_picture(png(blank))[0]
    blank[0, 0] = 0
    assert "one colour" in check_picture(png(blank))[0]
    noise = torch.randint(0, 255, (40, 40, 3), generator=torch.Generator().manual_seed(0))
    assert check_picture(png(noise.to(torch.uint8).numpy())) == []


def test_a_blank_chart_is_caught_as_a_picture():
    figure = Figure()
    assert "one colour" in check_picture(figures.to_png(figure))[0]
