"""The linear system that one layer poses about its input, and its solutions."""

from leaklib.layer_system.geometry import Geometry, conv_geometry
from leaklib.layer_system.least_squares import LeastSquares, least_squares
from leaklib.layer_system.operators import LayerSystem, balanced_scale
from leaklib.layer_system.solve import LayerSolution, solve_layer
from leaklib.layer_system.split import solve_split

__all__ = [
    "Geometry",
    "LayerSolution",
    "LayerSystem",
    "LeastSquares",
    "balanced_scale",
    "conv_geometry",
    "least_squares",
    "solve_layer",
    "solve_split",
]
