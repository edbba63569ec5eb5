"""Network diagrams show every layer's deficit, legibly and in one scale of colours."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from test_figures_look import CONES, written

from leaklib.figures import fingerprint, to_png
from leaklib.figures.fingerprints import check_picture, compare_fingerprints
from leaklib.figures.look import PNG_DPI
from leaklib.figures.network import SHARES, network_diagram

MINUS = "\N{MINUS SIGN}"


def table(*layers):
    """Rows (name, input, unknowns, deficit)."""
    rows = pd.DataFrame(layers, columns=["layer", "input", "unknowns", "deficit"])
    return rows.assign(
        kind=["residual" if name.startswith("block") else "conv" for name in rows.layer]
    )


FULL = table(
    ("conv1", "3x32x32", 3072, 0), ("conv2", "12x17x17", 3468, 0), ("conv3", "36x9x9", 2916, 0),
    ("conv4", "36x9x9", 2916, 0), ("conv5", "36x9x9", 2916, 0), ("conv6", "64x5x5", 1600, 0),
    ("fc", "3200", 3200, 0),
)  # fmt: skip
SHORT = FULL.assign(deficit=[-30, -280, -1000, -2000, 0, 0, 0])
BLOCKS = table(
    ("conv1", "3x16x16", 768, 0), ("block1", "8x16x16", 2048, -100), ("block2", "8x16x16", 2048, 0),
    ("fc", "2048", 2048, 0),
)  # fmt: skip
CUT = table(
    ("conv1", "3x16x16", 768, 0), ("stage.block1.conv1", "8x16x16", 2048, 0),
    ("stage.block1.conv2", "8x16x16", 2048, 0), ("fc", "2048", 2048, 0),
)  # fmt: skip
ONE = table(("conv1", "1x28x28", 784, -784))

FIGURES = {
    "one layer": lambda: network_diagram({"one": ONE}, width=2.4),
    "two networks": lambda: network_diagram(
        {"cnn6": FULL, "cnn6-d": SHORT}, notes={"cnn6-d": f"c(M) = {MINUS}233.33"}),
    "narrow": lambda: network_diagram({"cnn6": FULL[:4], "cnn6-d": SHORT[:3]}, width="column"),
    "blocks": lambda: network_diagram({"skips": BLOCKS, "skips cut": CUT}, last="logits"),
    "many layers": lambda: network_diagram({"deep": pd.concat([SHORT, SHORT[:3]])}),
}  # fmt: skip


def boxes(figure, layers):
    """The boxes of the first layers, in drawing order."""
    found = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    return found[:layers]


@pytest.mark.parametrize("name", FIGURES)
def test_every_diagram_is_a_legible_picture(name):
    figure = FIGURES[name]()
    size = np.rint(figure.get_size_inches() * PNG_DPI).astype(int)
    assert check_picture(to_png(figure), size=tuple(size)) == []
    found = written(figure)
    for place, (text, box) in enumerate(found):
        inside = min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= -0.5
        assert inside, f"{text.get_text()!r} is cut off"
        assert text.get_fontsize() >= 7.5
        for other, against in found[place + 1 :]:
            wide = min(box.x1, against.x1) - max(box.x0, against.x0)
            high = min(box.y1, against.y1) - max(box.y0, against.y0)
            assert wide < 1 or high < 2, f"{text.get_text()!r} overlaps {other.get_text()!r}"


def test_numbers_stand_inside_their_boxes_and_boxes_apart():
    figure = FIGURES["two networks"]()
    drawn = boxes(figure, 14)
    numbers = [pair for pair in written(figure) if pair[0].get_text().lstrip(MINUS).isdigit()]
    numbers = [pair for pair in numbers if pair[0].get_text() != "3200"][:14]
    for box, (text, place) in zip(drawn, numbers, strict=True):
        around = box.get_window_extent()
        assert around.x0 <= place.x0, text
        assert place.x1 <= around.x1, text
    edges = [(box.get_x(), box.get_x() + box.get_width()) for box in drawn[:7]]
    assert all(right < left for (_, right), (left, _) in pairwise(edges))


def test_deficits_are_printed_and_coloured_by_their_share():
    figure = FIGURES["two networks"]()
    texts = [text.get_text() for text in figure.axes[0].texts]
    for number in (30, 280, 1000, 2000):
        assert f"{MINUS}{number}" in texts
    colours = [SHARES[place][1] for place in (1, 2, 3, 4, 0, 0, 0)]
    faces = [box.get_facecolor()[:3] for box in boxes(figure, 14)]
    assert faces == [to_rgb("#FFFFFF")] * 7 + [to_rgb(colour) for colour in colours]
    assert f"c(M) = {MINUS}233.33" in texts
    assert {"12×", "17×17", "3200"} <= set(texts)


def test_boxes_suggest_the_sizes():
    image, second, third, *_, vector = boxes(FIGURES["two networks"](), 7)
    assert image.get_height() > second.get_height() > third.get_height()
    assert image.get_width() < second.get_width() < third.get_width()
    assert vector.get_width() < image.get_width()


def test_skips_are_drawn_for_residual_blocks_alone():
    figure = FIGURES["blocks"]()
    assert len(figure.axes[0].lines) == 2
    assert not FIGURES["two networks"]().axes[0].lines
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"block1", "conv2", "logits"} <= set(texts)
    assert "stage" not in texts


def test_a_report_is_drawn_like_its_table():
    class Report:
        def table(self):
            return SHORT

    drawn = [fingerprint(network_diagram({"a": item})) for item in (SHORT, Report())]
    assert compare_fingerprints(*drawn) == []
    changed = SHORT.assign(deficit=[-30, -281, -1000, -2000, 0, 0, 0])
    faults = compare_fingerprints(fingerprint(network_diagram({"a": changed})), drawn[0])
    assert any(fault.startswith("ax0/texts/strings:") for fault in faults)


@pytest.mark.parametrize("cones", [*CONES, "grey"])
def test_shares_darken_step_by_step_for_every_reader(cones):
    rgb = np.array([to_rgb(colour) for _, colour, _ in SHARES])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = linear if cones == "grey" else np.clip(linear @ np.array(CONES[cones]).T, 0, 1)
    luminance = seen @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(luminance) - 16
    assert (np.diff(lightness) < -8).all(), lightness


def test_numbers_contrast_with_their_boxes():
    figure = FIGURES["two networks"]()
    inks = {t.get_text(): t.get_color() for t in figure.axes[0].texts}

    def luminance(colour):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for number, (_, face, _) in zip((0, 30, 280, 1000, 2000), SHARES, strict=True):
        ink = luminance(inks[f"{MINUS}{number}" if number else "0"])
        light, dark = max(ink, luminance(face)) + 0.05, min(ink, luminance(face)) + 0.05
        assert light / dark >= 4.5


BAD = {
    "no network": ({}, {}, "one or more names to tables, got none"),
    "a bare table": (SHORT, {}, "got DataFrame; pass"),
    "no rows": ({"a": SHORT[:0]}, {}, "'a': expected one row or more.*got 0"),
    "a missing column": ({"a": SHORT.drop(columns="unknowns")}, {}, "without .'unknowns'"),
    "a surplus": ({"a": FULL.assign(deficit=312)}, {}, "between −unknowns and 0"),
    "a deficit beyond its input": ({"a": ONE.assign(deficit=-785)}, {}, r"got \[-785\]"),
    "a note on nobody": ({"a": ONE}, {"notes": {"b": "!"}}, r"names among \['a'\], got \['b'\]"),
    "too many layers": (
        {"a": pd.concat([SHORT] * 3)}, {}, "21 layers leave .* too few to read; draw the page"),
    "too wide": ({"a": ONE}, {"width": 12}, "phone"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_is_refused_with_a_way_out(name):
    networks, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        network_diagram(networks, **options)
