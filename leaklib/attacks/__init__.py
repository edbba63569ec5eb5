"""Attacks: what a curious server does with a shared gradient. One attack a file."""

from leaklib.attacks.adam import AdamSettings
from leaklib.attacks.analytic import analytic, invert_linear, invert_row
from leaklib.attacks.driver import RunSettings
from leaklib.attacks.hybrid import Correction, hybrid
from leaklib.attacks.ignore import CVB_STEPS, DIA_STEPS, PRECODE_STEPS, ignore_stochastic
from leaklib.attacks.labels import expected_probabilities, recover_label, recover_labels
from leaklib.attacks.matching import dlg, idlg, invert_gradients
from leaklib.attacks.patch_embedding import invert_patches
from leaklib.attacks.problem import Matching
from leaklib.attacks.rank_one import rank_one
from leaklib.attacks.reconstruction import Reconstruction
from leaklib.attacks.recursive import LayerReport, RecursiveReconstruction, rgap
from leaklib.attacks.tokens import nearest_tokens

__all__ = [
    "CVB_STEPS",
    "DIA_STEPS",
    "PRECODE_STEPS",
    "AdamSettings",
    "Correction",
    "LayerReport",
    "Matching",
    "Reconstruction",
    "RecursiveReconstruction",
    "RunSettings",
    "analytic",
    "dlg",
    "expected_probabilities",
    "hybrid",
    "idlg",
    "ignore_stochastic",
    "invert_gradients",
    "invert_linear",
    "invert_patches",
    "invert_row",
    "nearest_tokens",
    "rank_one",
    "recover_label",
    "recover_labels",
    "rgap",
]
