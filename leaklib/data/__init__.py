"""Data: named picture sets as tensors in [0, 1], and the private batches made of them."""

from leaklib.data.images import (
    ImageSet,
    Victims,
    available_sets,
    data_root,
    load_images,
    make_victims,
)

__all__ = ["ImageSet", "Victims", "available_sets", "data_root", "load_images", "make_victims"]
