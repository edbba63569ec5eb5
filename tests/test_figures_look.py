"""Figures are legible, in one look, and refuse what they cannot draw."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from figure_cases import (
    ATTACKS,
    CURVES,
    DOTS,
    ENDS,
    FIGURES,
    MANY,
    NOISE,
    ONE,
    frames,
    images,
    panels,
)
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from skimage.color import rgb2lab

from leaklib import figures
from leaklib.figures.fingerprints import check_picture, compare_fingerprints, fingerprint
from leaklib.figures.lettering import number_texts, text_inches, wrap
from leaklib.figures.look import OTHERS, PNG_DPI, ROLES
from leaklib.figures.ticks import round_ticks


def written(figure):
    """Every text a reader sees, with its box in pixels."""
    figure.draw_without_rendering()
    hidden = {id(text) for ax in figure.axes if not ax.axison for text in axis_texts(ax)}
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    hidden |= {id(tick.label1), id(tick.label2)}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    return [(t, t.get_window_extent()) for t in texts if id(t) not in hidden]


def axis_texts(ax):
    return [*ax.xaxis.findobj(Text), *ax.yaxis.findobj(Text)]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_legible_picture(name):
    figure = FIGURES[name]()
    size = np.rint(figure.get_size_inches() * PNG_DPI).astype(int)
    assert check_picture(figures.to_png(figure), size=tuple(size)) == []
    assert figure.get_figwidth() <= 7.0 + 1e-9
    found = written(figure)
    page = figure.bbox
    for text, box in found:
        across, up = (box.x0, page.x1 - box.x1), (box.y0, page.y1 - box.y1)
        inside = min(*across, *up) >= -0.5
        assert inside, f"{text.get_text()!r} is cut off at {box}"
        assert text.get_fontsize() >= 7.5
    for place, (text, box) in enumerate(found):
        for other, against in found[place + 1 :]:
            wide = min(box.x1, against.x1) - max(box.x0, against.x0)
            high = min(box.y1, against.y1) - max(box.y0, against.y0)
            # Boxes include the room for descenders, so that stacked lines may touch by a pixel.
            assert wide < 1 or high < 2, f"{text.get_text()!r} overlaps {other.get_text()!r}"


@pytest.mark.parametrize("name", ["strip of one", "bars of many", "rate lines", "scatter of many"])
def test_type_is_seven_and_a_half_pixels_high_on_a_phone(name):
    figure = FIGURES[name]()
    points = min(text.get_fontsize() for text, _ in written(figure))
    assert points / 72 * 360 / figure.get_figwidth() >= 7.5


def test_a_role_keeps_its_look_in_any_company():
    for name in ("DLG", "iDLG", "cosine + TV", "analytic"):
        alone = figures.looks([name])[name]
        assert figures.looks(["something", *ATTACKS[::-1], "else"])[name] == alone
        assert figures.colour(name) == alone.colour
    assert figures.colour("dlg") != figures.colour("dlgs")


def test_names_drawn_together_differ_in_colour_and_in_grey():
    names = [*ATTACKS, "sigmoid", "ReLU", "tanh", "softplus", "none"]
    chosen = figures.looks(names)
    assert list(chosen) == names
    assert len({look.colour for look in chosen.values()}) == 9
    assert len({look.marker for look in chosen.values()}) == 9
    assert len({look.hatch for look in chosen.values()}) == 9
    twice = figures.looks(["DLG", "DLG (known label)"])
    assert len({look.colour for look in twice.values()}) == 2
    assert len({look.colour for look in figures.looks(range(9)).values()}) == 9
    with pytest.raises(ValueError, match="at most 9 series"):
        figures.looks(range(10))


# Linear RGB seen without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
CONES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


@pytest.mark.parametrize("cones", [*CONES, "all"])
@pytest.mark.parametrize("family", ["roles", "others"])
def test_colours_differ_for_colour_blind_readers(cones, family):
    chosen = (
        [ROLES[n] for n in ("dlg", "idlg", "cosine", "analytic")] if family == "roles" else OTHERS
    )
    rgb = np.array([to_rgb(look.colour) for look in chosen])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = linear if cones == "all" else linear @ np.array(CONES[cones]).T
    seen = np.clip(seen, 0, 1)
    seen = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen[None])[0]
    gaps = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert gaps[np.triu_indices(len(chosen), 1)].min() > 18


@pytest.mark.parametrize("name", ["bars of many", "strip of one", "rate lines", "scatter of many"])
def test_the_readers_own_settings_neither_change_a_figure_nor_are_changed(name):
    expected, picture = fingerprint(FIGURES[name]()), figures.to_png(FIGURES[name]())
    theirs = {"font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red", "figure.dpi": 37}
    with mpl.rc_context(theirs):
        found = FIGURES[name]()
        assert {key: mpl.rcParams[key] for key in theirs} == theirs
        assert figures.to_png(found) == picture
    assert compare_fingerprints(fingerprint(found), expected) == []


def test_tables_are_not_changed():
    for table, draw in (
        (MANY, "bars of many"),
        (CURVES, "convergence of many"),
        (NOISE, "rate lines"),
    ):
        before = table.copy()
        FIGURES[draw]()
        pd.testing.assert_frame_equal(table, before)


BAD = {
    "images without channels": (
        lambda: figures.reconstruction_grid({"x": torch.rand(3, 8, 8)}), "1 or 3 channels"),
    "two channels": (
        lambda: figures.reconstruction_grid({"x": torch.rand(3, 2, 8, 8)}), "1 or 3 channels"),
    "bytes": (
        lambda: figures.reconstruction_grid({"x": np.zeros((1, 3, 8, 8), np.uint8)}), "uint8"),
    "no rows": (lambda: figures.reconstruction_grid({}), "one or more rows"),
    "rows of different length": (
        lambda: figures.reconstruction_grid({"a": images(2), "b": images(3)}), "of one shape"),
    "captions of nobody": (
        lambda: figures.reconstruction_grid({"a": images(2)}, captions={"b": [1, 2]}), "'b'"),
    "captions of too few": (
        lambda: figures.reconstruction_grid({"a": images(2)}, captions={"a": [1]}), "1 x 2"),
    "counts of too few": (
        lambda: figures.frames_strip(images(1), frames(1, 3), counts=[1]), "counts: expected 3"),
    "other victims": (
        lambda: figures.frames_strip(images(2), frames(1, 3), counts=[1, 2, 3]), "originals and"),
    "too many frames": (
        lambda: figures.frames_strip(images(1), frames(1, 40), counts=range(40)), "fewer columns"),
    "caption too long": (
        lambda: figures.reconstruction_grid({"a": images(8)}, captions={"a": ["w" * 40] * 8}),
        "shorten"),
    "too wide": (
        lambda: figures.rate_bars(ONE, category="network", **ENDS, width=12), "phone"),
    "unknown width": (
        lambda: figures.rate_bars(ONE, category="network", **ENDS, width="huge"), "'page'"),
    "unknown column": (lambda: figures.rate_bars(ONE, category="net", **ENDS), "attack"),
    "empty table": (lambda: figures.rate_bars(ONE[:0], category="network", **ENDS), "one row"),
    "repeated row": (lambda: figures.rate_bars(MANY, category="network", **ENDS), "hue or group"),
    "nameless row": (
        lambda: figures.rate_bars(ONE.assign(network=None), category="network", **ENDS), "missing"),
    "percentages": (
        lambda: figures.rate_bars(ONE.assign(estimate=90, high=95), category="network", **ENDS),
        "100"),
    "interval beside the rate": (
        lambda: figures.rate_bars(ONE.assign(low=0.95), category="network", **ENDS), "low <= est"),
    "dot outside its interval": (
        lambda: figures.dot_intervals(ONE.assign(high=0.1), category="network", **DOTS), "<= high"),
    "dots without a value": (
        lambda: figures.dot_intervals(ONE.assign(estimate=np.nan), category="network", **DOTS),
        "finite value"),
    "unknown legend": (
        lambda: figures.rate_lines(NOISE, x="noise", hue="attack", legend="up", **ENDS), "'none'"),
    "runs mixed up": (
        lambda: figures.convergence(CURVES, y="objective"), "tells the runs apart"),
    "nothing to draw": (
        lambda: figures.convergence(CURVES.assign(objective=np.nan), y="objective", hue="attack"),
        "one row"),
    "negative on a log axis": (
        lambda: figures.rate_lines(NOISE.assign(noise=NOISE.noise - 1), x="noise", hue="attack",
                                   log_x=True, **ENDS), "log_x=False"),
    "repeated point": (lambda: figures.rate_lines(NOISE, x="noise", **ENDS), "as hue"),
    "zero error": (
        lambda: figures.identity_scatter([0.0], [1.0], x_label="", y_label=""), "positive"),
    "lengths": (
        lambda: figures.identity_scatter([1.0], [1.0, 2.0], x_label="", y_label=""), "1, 2 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_is_refused_with_a_way_out(name):
    draw, message = BAD[name]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        draw()


def test_png_is_the_same_bytes_every_time():
    assert figures.to_png(FIGURES["dot"]()) == figures.to_png(FIGURES["dot"]())


def test_panels_share_one_figure_and_letters_stand_above_them():
    figure = panels()
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2
    assert len(figure.legends) == 1
    figure.draw_without_rendering()
    for ax in figure.axes:
        letter = next(text for text in ax.texts if text.get_text() in "ab")
        assert letter.get_window_extent().y0 >= ax.bbox.y1
        assert letter.get_window_extent().x1 <= ax.bbox.x0


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.0, 57.0, False, [10, 20, 30, 40, 50]),
        (0.2, 0.7, True, [0.2, 0.5]),
        (1e-11, 1e3, True, [1e-11, 1e-8, 1e-5, 1e-2, 1e1]),
    ],
)
def test_ticks_are_round_numbers(low, high, log, expected):
    np.testing.assert_allclose(round_ticks(low, high, log=log), expected)


def test_ticks_of_a_log_axis_with_zero_begin_at_its_smallest_number():
    assert round_ticks(-0.5, 2000.0, log=True, knee=1.0).tolist() == [0, 1, 10, 100, 1000]


def test_labels_are_broken_and_measured():
    assert wrap("ResNet-18 with BatchNorm", 14).splitlines() == ["ResNet-18 with", "BatchNorm"]
    assert wrap("unbreakable", 4) == "unbreakable"
    assert "".join(wrap("a_b c-d/e", 3).split()) == "a_bc-d/e"
    assert text_inches("mmmm") == pytest.approx(2 * text_inches("mm"), rel=0.1)
    assert text_inches("wide\nw") == text_inches("wide")
    assert number_texts(np.array([1e-5, 2.5e-5])) == ["$10^{-5}$", r"$2.5{\cdot}10^{-5}$"]


NOTEBOOK = """
import os
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
import base64, io
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
from leaklib import figures
from PIL import Image
figures.use_style()
figure, axes = figures.make_axes(width="column", height=2.0)
axes[0, 0].plot([0, 1])
data, metadata = shell.display_formatter.format(figure)
png = data["image/png"]
png = base64.b64decode(png) if isinstance(png, str) else png
print(Image.open(io.BytesIO(png)).size, metadata["image/png"], "image/svg+xml" in data)
"""


def test_notebooks_show_the_whole_figure_at_its_width_on_the_page():
    pytest.importorskip("IPython")
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("(960, 400) {'width': 480} False"), done.stderr
