"""Reading a figure's artists: what it shows, as numbers and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import Collection, QuadMesh
from matplotlib.colors import to_rgba, to_rgba_array
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Annotation, Text

Fingerprint = dict[str, np.ndarray]
A = TypeVar("A", bound=Artist)


def fingerprint(figure: Figure | SubFigure) -> Fingerprint:
    """Everything visible in a figure, read before it is saved.

    Keys name the artist and what was read of it: `ax0/line1/xy`, `ax0/line1/rgba`, `ax0/xlim`,
    `ax2/image0/array`, `ax0/legend/strings`. Values are numbers or arrays of text, in a fixed
    order. The figure is laid out first, at 100 dots per inch whatever its own resolution, because
    tick labels exist only then; where the layout puts the axes is left out, because it depends on
    the font renderer.

    Args:
        figure: any matplotlib figure or subfigure.
    """
    root = figure.get_figure(root=True)
    if root is not None:
        _lay_out(root)
    found: Fingerprint = {}
    if root is figure:
        found["figure/inches"] = np.array(figure.get_size_inches(), dtype=float)
    _read_texts(found, "figure/texts", figure.texts)
    _read_lines(found, "figure", figure.lines)
    _read_patches(found, "figure", figure.patches)
    for place, legend in enumerate(_visible(figure.legends)):
        _read_legend(found, f"figure/legend{place}", legend)
    for place, ax in enumerate(_visible(figure.get_axes())):
        _read_axes(found, f"ax{place}", ax)
    for place, part in enumerate(figure.subfigs):
        # A figure lists the axes of its subfigures too: only what lies outside axes is new.
        outside = {key: value for key, value in fingerprint(part).items() if key[:2] != "ax"}
        found |= {f"sub{place}/{key}": value for key, value in outside.items()}
    return found


def _lay_out(figure: Figure) -> None:
    """Lay the figure out at one resolution, since the number of ticks can depend on it."""
    theirs = figure.get_dpi()
    try:
        figure.set_dpi(100)
        figure.draw_without_rendering()
    finally:
        figure.set_dpi(theirs)


def _visible(artists: Iterable[A]) -> list[A]:
    return [artist for artist in artists if artist.get_visible()]


def _read_axes(found: Fingerprint, name: str, ax: Axes) -> None:
    if ax.axison:
        for which, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
            _read_axis(found, f"{name}/{which}", axis)
    found[f"{name}/xlim"] = np.array(ax.get_xlim(), dtype=float)
    found[f"{name}/ylim"] = np.array(ax.get_ylim(), dtype=float)
    found[f"{name}/title"] = np.array([ax.get_title(loc) for loc in ("left", "center", "right")])
    _read_lines(found, name, ax.lines)
    _read_patches(found, name, ax.patches)
    _read_images(found, name, [image for image in ax.images if isinstance(image, AxesImage)])
    for place, collection in enumerate(_visible(ax.collections)):
        _read_collection(found, f"{name}/collection{place}", collection)
    _read_texts(found, f"{name}/texts", ax.texts)
    if (legend := ax.get_legend()) is not None and legend.get_visible():
        _read_legend(found, f"{name}/legend", legend)
    others = [*_visible(ax.artists), *_visible(ax.tables)]
    if others:
        found[f"{name}/others"] = np.array([type(other).__name__ for other in others])
    for place, inset in enumerate(_visible(a for a in ax.child_axes if isinstance(a, Axes))):
        _read_axes(found, f"{name}/inset{place}", inset)


def _read_axis(found: Fingerprint, name: str, axis: Axis) -> None:
    found[f"{name}scale"] = np.array([axis.get_scale()])
    found[f"{name}label"] = np.array([axis.get_label().get_text()])
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * (high - low)
    ticks = [
        (tick.get_loc(), label.get_text())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if label.get_visible() and label.get_text()
        if low - margin <= tick.get_loc() <= high + margin
    ]
    found[f"{name}ticks/at"] = np.array([at for at, _ in ticks], dtype=float)
    found[f"{name}ticks/strings"] = np.array([text for _, text in ticks], dtype=str)
    if offset := axis.get_offset_text().get_text():
        found[f"{name}ticks/offset"] = np.array([offset])


def _read_lines(found: Fingerprint, name: str, lines: Sequence[Line2D]) -> None:
    for place, line in enumerate(_visible(lines)):
        key = f"{name}/line{place}"
        found[f"{key}/xy"] = _numbers(line.get_xydata())
        found[f"{key}/rgba"] = np.array(to_rgba(line.get_color(), line.get_alpha()))
        found[f"{key}/width"] = np.array([line.get_linewidth(), line.get_markersize()], float)
        marker = line.get_marker()
        marker = str(marker) if isinstance(marker, str | int) else "path"
        found[f"{key}/style"] = np.array([line.get_linestyle(), marker, line.get_drawstyle()])


def _read_patches(found: Fingerprint, name: str, patches: Sequence[Patch]) -> None:
    for place, patch in enumerate(_visible(patches)):
        if isinstance(patch, Rectangle):
            key = f"{name}/rectangle{place}"
            corner = (*patch.get_xy(), patch.get_width(), patch.get_height())
            found[f"{key}/box"] = np.array(corner, dtype=float)
        else:
            key = f"{name}/patch{place}"
            outline = patch.get_patch_transform().transform_path(patch.get_path())
            found[f"{key}/xy"] = _numbers(outline.vertices)
        # An invisible edge or face has alpha 0; its colour is of no account.
        found[f"{key}/rgba"] = _shown(np.array([patch.get_facecolor(), patch.get_edgecolor()]))
        if hatch := patch.get_hatch():
            found[f"{key}/hatch"] = np.array([hatch])


def _read_images(found: Fingerprint, name: str, images: Sequence[AxesImage]) -> None:
    for place, image in enumerate(_visible(images)):
        key = f"{name}/image{place}"
        array = image.get_array()
        found[f"{key}/array"] = _numbers(np.empty((0, 0)) if array is None else array)
        found[f"{key}/extent"] = np.array(image.get_extent(), dtype=float)
        if array is not None and array.ndim == 2:
            found[f"{key}/clim"] = np.array(image.get_clim(), dtype=float)
            found[f"{key}/cmap"] = np.array([image.get_cmap().name])


def _read_collection(found: Fingerprint, key: str, collection: Collection) -> None:
    """Scatter points, bands, error bars, meshes: offsets, outlines, colours, mapped values."""
    if isinstance(collection, QuadMesh):
        found[f"{key}/xy"] = _numbers(collection.get_coordinates()).reshape(-1, 2)
    else:
        vertices = [_numbers(path.vertices) for path in collection.get_paths()]
        found[f"{key}/xy"] = np.concatenate(vertices) if vertices else np.empty((0, 2))
    found[f"{key}/offsets"] = _numbers(collection.get_offsets())
    found[f"{key}/face"] = _shown(to_rgba_array(collection.get_facecolor()))
    found[f"{key}/edge"] = _shown(to_rgba_array(collection.get_edgecolor()))
    if (sizes := getattr(collection, "get_sizes", lambda: None)()) is not None:
        found[f"{key}/sizes"] = _numbers(sizes)
    if (array := collection.get_array()) is not None:
        found[f"{key}/array"] = _numbers(array)
        found[f"{key}/clim"] = np.array(collection.get_clim(), dtype=float)


def _read_texts(found: Fingerprint, key: str, texts: Sequence[Text]) -> None:
    written = [text for text in _visible(texts) if text.get_text()]
    if not written:
        return
    found[f"{key}/strings"] = np.array([text.get_text() for text in written])
    found[f"{key}/xy"] = np.array([_place(text) for text in written], dtype=float)
    found[f"{key}/rgba"] = np.array(
        [to_rgba(text.get_color(), text.get_alpha()) for text in written]
    )


def _place(text: Text) -> tuple[Any, Any]:
    """The point a text stands at or, for an annotation, the point it speaks of."""
    x, y = text.xy if isinstance(text, Annotation) else text.get_position()
    return text.convert_xunits(x), text.convert_yunits(y)


def _read_legend(found: Fingerprint, key: str, legend: Legend) -> None:
    texts = [legend.get_title(), *legend.get_texts()]
    found[f"{key}/strings"] = np.array([text.get_text() for text in texts])
    colours = [_handle_colour(handle) for handle in legend.legend_handles if handle is not None]
    found[f"{key}/rgba"] = np.array(colours, dtype=float).reshape(-1, 4)


def _handle_colour(handle: Any) -> tuple[float, ...]:
    if isinstance(handle, Line2D):
        return to_rgba(handle.get_color(), handle.get_alpha())
    face = getattr(handle, "get_facecolor", lambda: "none")()
    return tuple([*to_rgba_array(face).tolist(), [0.0] * 4][0])


def _numbers(values: Any) -> np.ndarray:
    """A plain array: masked entries become NaN, and the array is a copy."""
    if np.ma.isMaskedArray(values):
        mask = np.ma.getmaskarray(values)
        return np.where(mask, np.nan, values.data) if mask.any() else np.array(values.data)
    return np.array(values)


def _shown(rgba: np.ndarray) -> np.ndarray:
    """Colours with alpha 0 made equal: nobody sees which one it was."""
    return np.where(rgba[:, 3:] == 0, 0.0, rgba) if rgba.size else rgba.reshape(-1, 4)
