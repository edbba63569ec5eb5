"""R-GAP, the recursive gradient attack: a picture in closed form, layer by layer."""

from leaklib.attacks.recursive.attack import rgap
from leaklib.attacks.recursive.report import LayerReport, RecursiveReconstruction

__all__ = ["LayerReport", "RecursiveReconstruction", "rgap"]
