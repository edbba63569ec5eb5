"""One look for the whole study: sizes, type, colours by role, PNG.

Type is 12 pt on a figure at most 7 inches wide: body size beside the text of a page, and still
8 px high where a phone shrinks the figure to 360 px. Every series differs from the others by
colour, line style, marker and hatch, so that a grey print keeps them apart. The font ships with
matplotlib.
"""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

WIDTHS = {"column": 4.8, "page": 7.0}  # inches
SCREEN_DPI = 100  # one inch of figure is 100 CSS pixels on a page
PNG_DPI = 200  # two image pixels per CSS pixel: sharp on a phone, enough for print
TEXT_PT = 12.0
SMALL_PT = 11.0
INK = "#222222"
FAINT = "#666666"


@dataclass(frozen=True)
class Look:
    """How one series is drawn: apart from the others in colour and in grey."""

    colour: str
    linestyle: str | tuple[int, tuple[float, ...]] = "-"
    marker: str = "o"
    hatch: str = ""


# Each role keeps its look in every figure of the study. The colours stay apart for each kind of
# colour-blindness; the tests measure by how much.
ROLES = {
    "plain": Look("#5B6B7B"),
    "private": Look("#000000", "-", "*"),
    "dlg": Look("#0173B2", "-", "o"),
    "idlg": Look("#DE8F05", (0, (5, 1.6)), "s", "//"),
    "cosine": Look("#029E73", (0, (6, 1.5, 1.2, 1.5)), "D", ".."),
    "analytic": Look("#882255", (0, (1.2, 1.2)), "^", "xx"),
}
ATTACKS = ("dlg", "idlg", "cosine", "analytic")
OTHERS = (
    Look("#D55E00", "-", "v", "\\\\"),
    Look("#56B4E9", (0, (5, 1.6)), "P", "--"),
    Look("#8C5A2B", (0, (1.2, 1.2)), "X", "++"),
    Look("#949494", (0, (6, 1.5, 1.2, 1.5)), "<", "oo"),
    Look("#333333", (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)), ">", "||"),
)

CYCLE = (*(ROLES[role] for role in ATTACKS), *OTHERS)

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": TEXT_PT,
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": TEXT_PT,
    "axes.labelsize": TEXT_PT,
    "axes.titlelocation": "left",
    "xtick.labelsize": SMALL_PT,
    "ytick.labelsize": SMALL_PT,
    "legend.fontsize": SMALL_PT,
    "legend.title_fontsize": SMALL_PT,
    "legend.frameon": False,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.4,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.prop_cycle": cycler(
        color=[ROLES[role].colour for role in ATTACKS] + [look.colour for look in OTHERS]
    ),
    "lines.linewidth": 1.9,
    "lines.markersize": 6.5,
    "hatch.linewidth": 1.0,
    "image.interpolation": "nearest",
    "image.cmap": "gray",
    "figure.dpi": SCREEN_DPI,
    "savefig.dpi": PNG_DPI,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
}


def looks(names: Iterable[object]) -> dict[str, Look]:
    """One look per name: a role keeps its own, other names take the fallback cycle in order.

    A name belongs to a role if its first word is the role, in any case: "cosine + TV" is "cosine".
    A second name of the same role is treated as another name: no two names look alike.

    Args:
        names: series in drawing order; anything that `str` accepts.

    Raises:
        ValueError: more than nine names, which nobody could tell apart.
    """
    unique = list(dict.fromkeys(str(name) for name in names))
    chosen: dict[str, Look] = {}
    for name in unique:
        words = re.findall(r"[a-z0-9]+", name.casefold())
        role = ROLES.get(words[0]) if words else None
        if role is not None and role not in chosen.values():
            chosen[name] = role
    spare = [ROLES[role] for role in ATTACKS if ROLES[role] not in chosen.values()]
    cycle = [*OTHERS, *reversed(spare)]
    others = [name for name in unique if name not in chosen]
    if len(others) > len(cycle):
        raise ValueError(
            f"hue: expected at most {len(CYCLE)} series in one figure, got {len(unique)}; split "
            "the table into panels"
        )
    chosen |= dict(zip(others, cycle, strict=False))
    return {name: chosen[name] for name in unique}


def colour(name: str) -> str:
    """Hex colour of one role ("dlg", "idlg", "cosine", "analytic", "private", "plain").

    Any other name gets the first colour of the fallback cycle; use `looks` for several of them.

    >>> colour("DLG"), colour("iDLG")
    ('#0173B2', '#DE8F05')
    """
    return looks([name])[name].colour


def use_style() -> None:
    """Set the study's look for figures made by hand and, in a notebook, for how figures are shown.

    The functions of this package carry the look themselves. In a notebook a figure that ends a cell
    is shown as PNG of its full, uncropped size, with its width in CSS pixels, so that the page does
    not enlarge a narrow figure.
    """
    matplotlib.style.use(["default", STYLE])
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        # Imported first: the inline backend sets its own (cropping) formatter once, when imported.
        import matplotlib_inline.backend_inline  # noqa: F401

        shell.display_formatter.formatters["image/png"].for_type(Figure, _notebook_png)


def _notebook_png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    return to_png(figure), {"width": round(figure.get_figwidth() * SCREEN_DPI)}


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes, 200 pixels per inch, without date or version inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, bbox_inches=None, metadata={"Software": None})
    return buffer.getvalue()


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run `draw` under the study's style, whatever the caller's matplotlib settings are."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def width_in_inches(width: str | float) -> float:
    """'column' (4.8), 'page' (7.0) or a number of inches between 2 and 7."""
    inches = WIDTHS.get(width) if isinstance(width, str) else float(width)
    if inches is None or not 2.0 <= inches <= WIDTHS["page"]:
        raise ValueError(
            f"width: expected 'column', 'page' or 2 to 7 inches, got {width!r}; wider figures "
            "become unreadable on a phone, so split them instead"
        )
    return inches


@styled
def make_axes(
    *,
    width: str | float = "column",
    height: float | None = None,
    rows: int = 1,
    columns: int = 1,
) -> tuple[Figure, np.ndarray]:
    """A figure with `(rows, columns)` axes for the functions that take `ax`.

    Args:
        width: 'column', 'page' or inches.
        height: inches; by default 0.72 of the width of one panel, for each row.
        rows: panels down.
        columns: panels across.

    Returns:
        The figure and its axes, an object array of shape `(rows, columns)`.
    """
    inches = width_in_inches(width)
    tall = rows * max(2.4, 0.72 * inches / columns) if height is None else height
    figure = Figure(figsize=(inches, tall), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def panel_label(ax: Axes, label: str) -> None:
    """Write a bold panel letter at the upper left of the axes, clear of its tick labels."""
    ax.annotate(
        label,
        (0, 1),
        xycoords="axes fraction",
        xytext=(-8, 6),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=TEXT_PT,
        fontweight="bold",
    )
