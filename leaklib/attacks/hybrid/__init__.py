"""The layer-wise hybrid attack (COPA): linear systems, corrected by gradient matching."""

from leaklib.attacks.hybrid.attack import hybrid
from leaklib.attacks.hybrid.settings import PUBLISHED, Correction

__all__ = ["PUBLISHED", "Correction", "hybrid"]
