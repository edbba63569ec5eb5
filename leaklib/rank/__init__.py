"""Rank analysis: how many independent equations each layer poses about its input.

A layer whose equations determine its input can be undone by a recursive attack; what is missing,
layer by layer, makes the security index. Counting needs sizes only; singular values hold for the
weights and gradients at hand.

    report = rank_analysis(build("cnn6-d"), (3, 32, 32))
    report.table()      # one row a layer
    report.index        # −233.33

Source: Zhu & Blaschko 2021 (R-GAP), section 3.1.2; the counting formula is ours.
"""

from leaklib.rank.analysis import LayerRank, RankReport, rank_analysis
from leaklib.rank.blocks import pooling_rank, residual_rank
from leaklib.rank.counting import RankCount, generic_rank, naive_deficit
from leaklib.rank.index import security_index
from leaklib.rank.singular import SingularRank, singular_rank, singular_weight_rank

__all__ = [
    "LayerRank",
    "RankCount",
    "RankReport",
    "SingularRank",
    "generic_rank",
    "naive_deficit",
    "pooling_rank",
    "rank_analysis",
    "residual_rank",
    "security_index",
    "singular_rank",
    "singular_weight_rank",
]
