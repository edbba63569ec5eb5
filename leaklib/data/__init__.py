"""Data: named picture sets as tensors in [0, 1], sentences, and private batches of them."""

from leaklib.data.images import (
    ImageSet,
    available_sets,
    data_root,
    load_images,
    make_victims,
)
from leaklib.data.sentences import SentenceSet, load_sentences, split_words
from leaklib.data.victims import PrivateInputs, Victims

__all__ = [
    "ImageSet",
    "PrivateInputs",
    "SentenceSet",
    "Victims",
    "available_sets",
    "data_root",
    "load_images",
    "load_sentences",
    "make_victims",
    "split_words",
]
