"""Networks that are chains: their stages in order, and how to undo each."""

from leaklib.chain.inverses import Inverse, affine_map, invert_activation
from leaklib.chain.reading import read_chain
from leaklib.chain.stages import (
    ConvStage,
    ElementwiseStage,
    LinearStage,
    PoolStage,
    ReshapeStage,
    ResidualStage,
    Stage,
)

__all__ = [
    "ConvStage",
    "ElementwiseStage",
    "Inverse",
    "LinearStage",
    "PoolStage",
    "ReshapeStage",
    "ResidualStage",
    "Stage",
    "affine_map",
    "invert_activation",
    "read_chain",
]
