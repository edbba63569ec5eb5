"""The study's pictures: data in, `matplotlib.figure.Figure` out.

Nothing is computed here and no file is written. `look` holds the one look (sizes, type, colours by
role, PNG), `pictures` the strips and grids of images, `intervals` rates and means by category,
`curves` what runs along a number, `scatter` two quantities that should agree, `labels` texts beside
points, `network` a network's layers by what they leave open.
"""

from leaklib.figures.curves import convergence, rate_lines
from leaklib.figures.fingerprints import (
    check_picture,
    compare_fingerprints,
    fingerprint,
    load_fingerprint,
    save_fingerprint,
)
from leaklib.figures.intervals import dot_intervals, rate_bars
from leaklib.figures.labels import label_points
from leaklib.figures.look import (
    Look,
    colour,
    looks,
    make_axes,
    panel_label,
    to_png,
    use_style,
)
from leaklib.figures.network import network_diagram
from leaklib.figures.pictures import frames_strip, reconstruction_grid
from leaklib.figures.scatter import identity_scatter

__all__ = [
    "Look",
    "check_picture",
    "colour",
    "compare_fingerprints",
    "convergence",
    "dot_intervals",
    "fingerprint",
    "frames_strip",
    "identity_scatter",
    "label_points",
    "load_fingerprint",
    "looks",
    "make_axes",
    "network_diagram",
    "panel_label",
    "rate_bars",
    "rate_lines",
    "reconstruction_grid",
    "save_fingerprint",
    "to_png",
    "use_style",
]
