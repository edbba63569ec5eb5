"""Every figure draws the numbers and images that it was given, where they belong."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from figure_cases import ATTACKS, DOTS, ENDS, GROUPED, MANY, NOISE, X, frames, images
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.text import Text
from PIL import Image

from leaklib import figures
from leaklib.figures.fingerprints import fingerprint
from leaklib.figures.look import PNG_DPI


def shown_images(figure):
    return [(image.get_array(), image.get_extent()) for image in figure.axes[0].images]


def test_strip_shows_each_frame_in_its_row_and_the_private_image_last():
    private, guesses = images(2), frames(2, 3)
    figure = figures.frames_strip(private, guesses, counts=[0, 5, 10])
    by_place = sorted(shown_images(figure), key=lambda item: (item[1][3], item[1][0]))
    expected = torch.cat([guesses, private[:, None]], dim=1).flatten(0, 1)
    assert len(by_place) == 8
    for (array, _), image in zip(by_place, expected, strict=True):
        np.testing.assert_array_equal(array, image.permute(1, 2, 0))


def test_pixels_of_the_picture_are_pixels_of_the_images():
    private, guess = images(2, size=8), images(2, size=8, seed=5)
    figure = figures.reconstruction_grid({"private": private, "DLG": guess})
    path = np.asarray(Image.open(io.BytesIO(figures.to_png(figure))))
    tops = sorted({extent[3] for _, extent in shown_images(figure)})
    for array, (left, right, bottom, top) in shown_images(figure):
        stack = (private, guess)[tops.index(top)]
        # The centre of each image pixel: an independent reading of the saved picture.
        step = (right - left) / 8
        rows = np.rint(top + step * (np.arange(8) + 0.5)).astype(int)
        columns = np.rint(left + step * (np.arange(8) + 0.5)).astype(int)
        seen = path[np.ix_(rows, columns)][..., :3] / 255
        match = [
            np.abs(seen - image.permute(1, 2, 0).numpy()).max() < 1.01 / 255 for image in stack
        ]
        assert sum(match) == 1
        assert bottom - top == right - left
        assert array.shape == (8, 8, 3)


def test_values_are_clamped_and_grey_is_black_to_white():
    image = torch.tensor([[[[-1.0, 0.5], [0.25, 7.0]]]])
    figure = figures.reconstruction_grid({"x": image})
    (drawn,) = figure.axes[0].images
    np.testing.assert_array_equal(drawn.get_array(), [[0.0, 0.5], [0.25, 1.0]])
    assert drawn.get_clim() == (0.0, 1.0)
    assert drawn.get_interpolation() == "nearest"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_image_that_is_not_finite_is_a_hatched_tile_in_its_place(bad):
    rows = images(3)
    rows[1, 2, 0, 0] = bad
    figure = figures.reconstruction_grid({"DLG": rows})
    whole = figures.reconstruction_grid({"DLG": images(3)})
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert len(figure.axes[0].images) == 2
    (tile,) = hatched
    left, right, _, top = whole.axes[0].images[1].get_extent()
    assert (*tile.get_xy(), tile.get_width()) == (left, top, right - left)
    assert "failed" in [text.get_text() for text in figure.axes[0].texts]


def test_captions_stand_below_their_own_picture():
    values = np.arange(6.0).reshape(2, 3)
    figure = figures.frames_strip(images(2), frames(2, 3), counts=[0, 1, 2], captions=values)
    ax = figure.axes[0]
    extents = sorted((e for _, e in shown_images(figure)), key=lambda e: (e[3], e[0]))
    for row in range(2):
        for column in range(3):
            left, right, bottom, _ = extents[4 * row + column]
            (text,) = [t for t in ax.texts if t.get_text() == f"{values[row, column]:.1f}"]
            x, y = text.get_position()
            assert x == pytest.approx((left + right) / 2)
            assert bottom < y < bottom + 0.25 * PNG_DPI


def test_small_images_are_drawn_in_whole_pixels():
    for size in (8, 28, 32):
        figure = figures.reconstruction_grid({"x": images(4, size=size)})
        left, right, *_ = figure.axes[0].images[0].get_extent()
        assert (right - left) % size == 0


def bar_boxes(figure):
    groups = [c for c in figure.axes[0].containers if isinstance(c, BarContainer)]
    return [(bar.get_y() + bar.get_height() / 2, bar.get_width(), bar) for g in groups for bar in g]


def test_bars_are_the_table_from_top_to_bottom():
    table = MANY.iloc[::-1]
    figure = figures.rate_bars(table, category="network", hue="attack", n="n", **ENDS)
    bars = sorted(bar_boxes(figure), key=lambda bar: bar[0])
    assert [bar[1] for bar in bars] == pytest.approx(table.estimate.tolist())
    look = figures.looks(ATTACKS)
    colours = [to_hex(bar[2].get_facecolor()).upper() for bar in bars]
    assert colours == [look[attack].colour for attack in table.attack]
    assert figure.axes[0].get_xlim() == (0.0, 1.0)
    top, bottom = figure.axes[0].get_ylim()[::-1]
    assert top == 0.0
    assert top < bars[0][0] < bars[-1][0] < bottom


def test_whiskers_are_the_interval_of_their_bar():
    figure = figures.rate_bars(MANY, category="network", hue="attack", **ENDS)
    whiskers = {
        round(float(segment[0, 1]), 6): sorted(segment[:, 0])
        for collection in figure.axes[0].collections
        for segment in collection.get_segments()
    }
    intervals = {
        tuple(np.round([e, low, high], 6))
        for e, low, high in MANY[["estimate", "low", "high"]].to_numpy()
    }
    drawn = {
        tuple(np.round([width, *whiskers[round(y, 6)]], 6)) for y, width, _ in bar_boxes(figure)
    }
    assert drawn == intervals


def test_group_headings_stand_above_their_settings_even_if_names_repeat():
    figure = figures.rate_bars(GROUPED, category="setting", group="factor", **ENDS)
    assert [bar[1] for bar in bar_boxes(figure)] == pytest.approx(GROUPED.estimate.tolist())
    headings = {t.get_text(): t.xy[1] for t in figure.axes[0].texts}
    ys = [bar[0] for bar in bar_boxes(figure)]
    assert ys == sorted(ys)
    assert headings["activation"] < ys[0] < ys[2] < headings["batch size"] < ys[3]


def test_trial_counts_stand_right_of_the_axes_beside_their_bars():
    figure = figures.rate_bars(MANY, category="network", hue="attack", n="n", **ENDS)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    counts = {round(t.xy[1], 6): t for t in ax.texts}
    rows = sorted(bar_boxes(figure), key=lambda bar: bar[0])
    for (y, *_), trials in zip(rows, MANY.n, strict=True):
        text = counts[round(y, 6)]
        assert text.get_text().removeprefix("n = ") == str(trials)
        assert text.get_window_extent().x0 > ax.bbox.x1


def test_row_without_data_is_named_as_such():
    table = MANY.copy()
    table.loc[5, ["estimate", "low", "high"]] = np.nan
    figure = figures.rate_bars(table, category="network", hue="attack", **ENDS)
    assert len(bar_boxes(figure)) == len(MANY) - 1
    assert [t.get_text() for t in figure.axes[0].texts] == ["no data"]
    empty = table.assign(estimate=np.nan, low=np.nan, high=np.nan)
    figures.to_png(figures.rate_bars(empty, category="network", hue="attack", **ENDS))


def test_dots_and_their_intervals_are_the_table():
    figure = figures.dot_intervals(MANY, category="network", hue="attack", **DOTS)
    found = fingerprint(figure)
    points = np.concatenate(
        [
            found[f"{key}/xy"]
            for key in {k.rsplit("/", 1)[0] for k in found if "/line" in k}
            if found[f"{key}/style"][1] in {"o", "s", "D", "^"}
        ]
    )
    order = np.argsort(points[:, 1])
    np.testing.assert_allclose(points[order, 0], MANY.estimate)


def test_median_of_runs_with_their_own_points_is_read_off_their_lines():
    slopes, ends = [1.0, 3.0, 2.0], [100.0, 90.0, 20.0]
    rows = [
        (run, x, slope * x)
        for run, (slope, end) in enumerate(zip(slopes, ends, strict=True))
        for x in np.linspace(1 + run, end, 7 + run)
    ]
    table = pd.DataFrame(rows, columns=["victim", "evaluations", "y"])
    figure = figures.convergence(table, y="y", log_x=False, log_y=False)
    *thin, median = figure.axes[0].lines
    assert len(thin) == 3
    for line, slope in zip(thin, slopes, strict=True):
        np.testing.assert_allclose(line.get_ydata(), slope * line.get_xdata())
    x, y = median.get_data()
    # Runs begin at 1, 2 and 3; the third stops at 20 with 40 and keeps it. The second stops at 90.
    held = np.where(x <= 20, 2 * x, 40.0)
    begun = np.where(x >= 3, held, np.nan)
    every = np.stack([x, np.minimum(3 * x, 270.0), begun])
    np.testing.assert_allclose(y, np.nanmedian(every, axis=0))
    assert x[0] == 2
    assert x[-1] == 100


def test_median_on_a_log_axis_follows_straight_lines_in_the_logarithm():
    table = pd.DataFrame({"victim": 0, "evaluations": [1.0, 3.0], "y": [1.0, 1e-4]})
    table = pd.concat(
        [
            table,
            table.assign(victim=1),
            pd.DataFrame({"victim": 2, "evaluations": [1.0, 2.0, 3.0], "y": [1.0, 5.0, 5.0]}),
        ]
    )
    figure = figures.convergence(table, y="y", log_x=False)
    x, y = figure.axes[0].lines[-1].get_data()
    np.testing.assert_allclose(y[x == 2.0], 1e-2)


def test_zero_stands_beside_the_smallest_noise_on_a_log_axis():
    figure = figures.rate_lines(NOISE, x="noise", hue="attack", log_x=True, **ENDS)
    ax = figure.axes[0]
    assert ax.get_xscale() == "symlog"
    place = ax.transData.transform([(x, 0.5) for x in (0, 1e-4, 1e-3, 1e-2, 1e-1)])[:, 0]
    gaps = np.diff(place)
    assert (gaps > 0.5 * gaps[-1]).all()
    assert fingerprint(figure)["ax0/xticks/at"].tolist() == [0, 1e-4, 1e-3, 1e-2, 1e-1]
    assert ax.get_ylim() == (0.0, 1.0)


def test_numbers_name_their_lines_in_ascending_order_whatever_the_order_of_rows():
    table = NOISE.assign(batch=NOISE.attack.map(dict(zip(ATTACKS, (8, 1, 4, 2), strict=True))))
    for shuffled in (table, table.iloc[::-1]):
        figure = figures.rate_lines(shuffled, x="noise", hue="batch", **ENDS)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["1", "2", "4", "8"]
        assert legend.get_title().get_text() == "batch"


def test_identity_line_runs_from_corner_to_corner_of_equal_axes():
    ax = figures.identity_scatter(X, 3 * X, x_label="x", y_label="y").axes[0]
    assert ax.get_xlim() == ax.get_ylim()
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.array([ax.get_xlim()] * 2).T)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.stack([X, 3 * X], axis=1))
    for values, (low, high) in ((X, ax.get_xlim()), (3 * X, ax.get_ylim())):
        assert low < values.min()
        assert values.max() < high


def test_marks_are_kept_across_figures_whatever_the_series_in_each():
    marks = figures.looks(ATTACKS[::-1])
    for some in (NOISE, NOISE[NOISE.attack.isin(ATTACKS[1:3])]):
        figure = figures.rate_lines(some, x="noise", hue="attack", marks=marks, **ENDS)
        legend = [t.get_text() for t in figure.legends[0].get_texts()]
        assert legend == list(some.attack.unique())
        drawn = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
        assert [line.get_color() for line in drawn] == [marks[name].colour for name in legend]
    curves = pd.DataFrame({"evaluations": [1, 2], "cost": [2.0, 1.0], "attack": "b", "victim": 0})
    figure = figures.convergence(curves, y="cost", hue="attack", marks=figures.looks("ab"))
    assert figure.axes[0].lines[-1].get_color() == figures.looks("ab")["b"].colour
    with pytest.raises(ValueError, match=r"look for every series, got none for \['b'\]"):
        figures.convergence(curves, y="cost", hue="attack", marks=figures.looks("a"))


def test_without_ends_a_rate_has_no_band():
    figure = figures.rate_lines(NOISE, x="noise", hue="attack", estimate=ENDS["estimate"])
    assert not figure.axes[0].collections
    assert len(figure.axes[0].lines) == NOISE.attack.nunique()
    one_sided = figures.rate_lines(
        NOISE, x="noise", hue="attack", estimate=ENDS["estimate"], low=ENDS["low"]
    )
    assert len(one_sided.axes[0].collections) == NOISE.attack.nunique()


CROWD = np.array([(0.68, 96.4), (0.67, 96.2), (0.65, 96.2), (0.69, 96.5), (0.5, 94.1), (0.5, 93.1),
                  (0.48, 92.1), (0.34, 94.4), (0.999, 80.1), (0.001, 99.9)])  # fmt: skip


def boxes_of(figure, texts):
    """Where texts came to stand, read from the drawn figure."""
    figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in texts]


def test_labels_cover_neither_points_nor_each_other_and_stay_inside():
    figure, ((ax,),) = figures.make_axes(width=3.5, height=3.5)
    ax.plot(*CROWD.T, "o", ms=7)
    ax.set(xlim=(0, 1), ylim=(80, 100))
    names = ["0.001", "", "0.001", "", "0.01", "0.9", "0.9", "0.01", "0.1", "0.99"]
    written = figures.label_points(ax, CROWD, names, colours=["#222222"] * 10)
    assert [text.get_text() for text in written] == [name for name in names if name]
    boxes = boxes_of(figure, written)
    middles = ax.transData.transform(CROWD)
    for n, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:n]), written[n]
        assert not any(box.contains(*at) for at in middles), written[n]
        assert ax.get_window_extent().padded(2).count_contains(box.corners()) == 4, written[n]
    bars = np.column_stack([CROWD[:, 1] - 3, CROWD[:, 1] + 3])
    with pytest.raises(ValueError, match=r"got points \(10, 2\), 10 texts.* bars \(9, 2"):
        figures.label_points(ax, CROWD, names, colours=["#222222"] * 10, bars=bars[1:])


def test_a_label_without_room_stands_off_with_a_line_and_clear_of_bars():
    _, ((ax,),) = figures.make_axes(width=3.5, height=3.5)
    grid = np.stack(np.meshgrid([0.44, 0.5, 0.56], [0.44, 0.5, 0.56]), axis=-1).reshape(-1, 2)
    names = [""] * 4 + ["0.5"] + [""] * 4
    ax.set(xlim=(0, 1), ylim=(0, 1))
    (close,) = figures.label_points(ax, grid[4:5], ["0.5"], colours=["k"])
    (far,) = figures.label_points(ax, grid, names, colours=["k"] * 9)
    assert close.arrow_patch is None
    assert far.arrow_patch is not None
    bars = np.array([[0.5, 0.5], [0.2, 0.8]])
    barred, ((ax,),) = figures.make_axes(width=3.5, height=3.5)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    points = np.array([[0.4, 0.5], [0.45, 0.3]])  # the second one's bar stands right of the first
    written = figures.label_points(ax, points, ["0.5", ""], colours=["k"] * 2, bars=bars)
    (box,) = boxes_of(barred, written)
    across = ax.transData.transform((0.45, 0.5))[0]
    assert not box.x0 < across < box.x1
