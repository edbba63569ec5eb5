"""Attacks: what a curious server does with a shared gradient. One attack a file."""

from leaklib.attacks.adam import AdamSettings
from leaklib.attacks.analytic import analytic, invert_linear, invert_row
from leaklib.attacks.bottleneck_noise import recover_noise
from leaklib.attacks.driver import RunSettings
from leaklib.attacks.feature_inversion import encoder_features, feature_inversion
from leaklib.attacks.hybrid import Correction, hybrid
from leaklib.attacks.ignore import CVB_STEPS, DIA_STEPS, PRECODE_STEPS, ignore_stochastic
from leaklib.attacks.known_noise import match_known_noise
from leaklib.attacks.labels import expected_probabilities, recover_label, recover_labels
from leaklib.attacks.matching import dlg, idlg, invert_gradients
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.patch_embedding import invert_patches
from leaklib.attacks.rank_one import rank_one
from leaklib.attacks.rank_one_limit import expected_overlap, noise_limit
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
    "encoder_features",
    "expected_overlap",
    "expected_probabilities",
    "feature_inversion",
    "hybrid",
    "idlg",
    "ignore_stochastic",
    "invert_gradients",
    "invert_linear",
    "invert_patches",
    "invert_row",
    "match_known_noise",
    "nearest_tokens",
    "noise_limit",
    "rank_one",
    "recover_label",
    "recover_labels",
    "recover_noise",
    "rgap",
]
