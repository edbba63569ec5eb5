"""The networks of the papers as geometries alone, and the deficits that were measured for them."""

from leaklib.layer_system import Geometry

REST = ((36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1))


def chain(image, *layers):
    """Geometries of (filters, kernel, stride, padding) after another."""
    shape, found = image, []
    for filters, kernel, stride, padding in layers:
        found.append(
            Geometry(shape, filters, (kernel,) * 2, stride=(stride,) * 2, padding=(padding,) * 2)
        )
        shape = found[-1].output_shape
    return found


def cnn6(second=36, side=32):
    return chain((3, side, side), (12, 4, 2, 2), (second, 3, 2, 1), *REST)


def lenet(widths, image=(3, 32, 32)):
    return chain(image, *((f, 5, s, 2) for f, s in zip(widths, (2, 2, 1), strict=True)))


# name: (layers, deficits, c(M)); R-GAP's networks and their variants, then COPA's
NETWORKS = {
    "cnn6": (cnn6(), (0, 0, 0, 0, 0, 0), 0.0),
    "cnn6-d": (cnn6(20), (0, -280, 0, 0, 0, 0), -233.33),
    "cnn6 with 24": (cnn6(24), (0, 0, 0, 0, 0, 0), 0.0),
    "cnn6 with 28": (cnn6(28), (0, 0, 0, 0, 0, 0), 0.0),
    "lenet mnist": (lenet((12, 12, 12), (1, 28, 28)), (0, 0, 0), 0.0),
    "lenet 12-12-12": (lenet((12, 12, 12)), (0, 0, 0), 0.0),
    "lenet 8-12-12": (lenet((8, 12, 12)), (-488, 0, 0), -488.0),
    "lenet 6-12-12": (lenet((6, 12, 12)), (-1122, 0, 0), -1122.0),
    "lenet 12-8-12": (lenet((12, 8, 12)), (0, -320, 0), -213.33),
    "cnn6 at 40": (cnn6(side=40), (0, 0, 0, 0, 0, 0), 0.0),
    "cnn6 at 48": (cnn6(side=48), (0, 0, 0, 0, 0, 0), 0.0),
    "cnn6 at 64": (cnn6(side=64), (0, -72, 0, 0, 0, 0), -60.0),
    "cnn2_c1": (chain((3, 32, 32), (6, 3, 1, 0)), (0,), 0.0),
    "cnn2_c2": (chain((3, 32, 32), (6, 4, 2, 0)), (-1470,), -1470.0),
    "cnn2_c4": (chain((3, 32, 32), (1, 3, 1, 0)), (-2146,), -2146.0),
    "cnn3_c1": (chain((3, 32, 32), (6, 3, 1, 0), (3, 4, 2, 0)), (0, -4533), -2266.5),
    "cnn3_c2": (chain((3, 32, 32), (6, 4, 2, 0), (3, 3, 2, 0)), (-1470, -1050), -1995.0),
    "cnn4_c1": (
        chain((3, 32, 32), (6, 3, 1, 0), (5, 4, 2, 0), (3, 4, 1, 0)), (0, -3965, -386), -2772.0),
    "cnn4_c2": (
        chain((3, 32, 32), (16, 5, 1, 0), (6, 5, 2, 0), (32, 5, 1, 2)), (0, -9316, 0), -6210.67),
    "lenet2": (
        chain((3, 32, 32), (12, 3, 2, 1), (12, 5, 2, 2), (12, 5, 1, 2)), (0, 0, 0), 0.0),
}  # fmt: skip
