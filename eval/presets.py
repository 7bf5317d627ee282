"""Protocols under the names that papers gave them: which function, which hyperparameters, which paper.

A preset is data. Two numbers are comparable when they come from one preset, and not because both say "linear" or "kNN".
Each is tested against its objective or an identity. Where a paper leaves something open, nothing is added here; where
ours differs from what was published, the preset says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from eosin.data_tools.errors import UserError, nearest

if TYPE_CHECKING:  # the command line reads the names without waiting for either
    import numpy as np
    import torch

THUNDER = "Marza et al. 2025, 'THUNDER: Tile-level histopathology image understanding benchmark'"
UNI = "Chen et al. 2024, 'Towards a general-purpose foundation model for computational pathology'"


@dataclass(frozen=True)
class Preset:
    """A named protocol.

    Attributes:
        protocol: the family: knn, logistic, simpleshot or ridge.
        parameters: hyperparameters, as they go into the results; of a logistic preset with an ``optimizer`` those of a
            :class:`~eosin.eval.sgd.Recipe`.
        paper: where they come from.
        differs: what is not as published, because a grouped split or frozen features leave no choice.
    """

    protocol: str
    parameters: Mapping[str, Any]
    paper: str
    differs: str = ""


def _preset(protocol: str, paper: str, differs: str = "", **parameters: Any) -> Preset:
    return Preset(protocol, MappingProxyType(parameters), paper, differs)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "dinov2-knn": _preset(
            "knn",
            "Oquab et al. 2023, 'DINOv2'; Wu et al. 2018, section 3.4",
            k=(10, 20, 100, 200),
            weighted=True,
            center=False,
        ),
        "uni-knn": _preset("knn", UNI, k=(20,), weighted=False, center=True),
        # C = dimension · classes / 100; the norm of the weights is not squared.
        "uni-linear": _preset("logistic", UNI, penalty="norm", C="D * K / 100", balanced=False),
        "pathobench-linear": _preset(
            "logistic",
            "Zhang et al. 2025, 'Accelerating data processing and benchmarking of AI models for pathology'",
            penalty="squared norm",
            C=0.5,
            balanced=True,
        ),
        # Both grids as in THUNDER's configuration of frozen linear probing.
        "thunder-linear": _preset(
            "logistic",
            THUNDER,
            "the head and its epoch are chosen on a grouped fold of the training side, not on a given validation side",
            optimizer="adam",
            learning_rates=(1e-3, 1e-4, 1e-5),
            weight_decays=(0.0, 1e-3, 1e-4),
            batch=64,
            epochs=200,
            choose="macro_f1",
        ),
        "eva-linear": _preset(
            "logistic",
            "Gatopoulos et al. 2024, 'eva: Evaluation framework for pathology foundation models', later configurations",
            "the epoch is chosen on a grouped fold of the training side, another one in each run, where eva takes the "
            "validation side, which for some of its data sets is the side that it scores",
            optimizer="adamw",
            learning_rates=(3e-4,),
            weight_decays=(1e-2,),  # torch.optim.AdamW's own
            batch=256,
            steps=12_500,
            choose="balanced_accuracy",
            patience=0.2,
            runs=5,
        ),
        # Learning rates times batch / 256, of 128 samples on each of 8 GPUs.
        "dinov2-linear": _preset(
            "logistic",
            "Oquab et al. 2023, 'DINOv2', section B.3, and its linear evaluation",
            "one vector a tile, as it was embedded, where DINOv2 also tries the last four blocks and the mean of the "
            "patches; no random crops; the head is chosen on a grouped fold of the training side, where DINOv2 takes "
            "the side it scores",
            optimizer="sgd",
            learning_rates=tuple(
                rate * 1024 / 256
                for rate in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
            ),
            weight_decays=(0.0,),
            batch=1024,
            steps=12_500,
            cosine=True,
            across=True,
            choose="accuracy",
            every_epoch=False,
            deviation=0.01,
        ),
        "uni-simpleshot": _preset("simpleshot", UNI, form="uni", episodes=1000, answer="mean over episodes"),
        "thunder-simpleshot": _preset(
            "simpleshot",
            THUNDER,
            form="thunder",
            episodes=1000,
            answer="majority over episodes",
        ),
        "hest-ridge": _preset("ridge", "Jaume et al. 2024, 'HEST-1k'", components=256, penalty=100.0),
    }
)


def preset(name: str) -> Preset:
    """The preset of a name. Raises UserError when there is none."""
    if name not in PRESETS:
        raise UserError(f"no preset '{name}'; {nearest(name, list(PRESETS))}")
    return PRESETS[name]


def names(protocol: str) -> list[str]:
    """The presets of a family."""
    return [name for name, known in PRESETS.items() if known.protocol == protocol]


def preset_probabilities(
    name: str,
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    device: torch.device | str = "cpu",
    *,
    groups: np.ndarray,
    seed: int = 0,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Score queries by a preset of the families knn and logistic.

    Args:
        queries: [Q, D].
        train: [T, D].
        labels: [T], class numbers in [0, n_classes).
        groups: [T], by which those that choose something hold an inner fold out.
        seed: of that fold, and of training.

    Returns:
        Probabilities [R, Q, n_classes], a row a value of k, or one; zero for a class that ``labels`` lack. And for each
        row what it was made with, such as C.

    Raises UserError for a preset of another family.
    """
    import numpy as np

    chosen = preset(name)
    if chosen.protocol == "knn":
        from eosin.ssl.metrics import knn_probabilities

        given = dict(chosen.parameters)
        ks = given.pop("k")
        found = knn_probabilities(queries, train, labels, n_classes, ks, device=device, **given)
        return found, [{"k": k} for k in ks]
    if "optimizer" in chosen.parameters:
        from eosin.eval.sgd import Recipe, head_probabilities

        recipe = Recipe(**chosen.parameters)
        found, details = head_probabilities(queries, train, labels, groups, n_classes, recipe, seed, device)
        return found[None], [details]
    if chosen.protocol == "logistic":
        fit, details, present = _logistic(chosen, train, labels, device)
        probabilities = np.zeros((1, len(queries), n_classes))
        probabilities[0][:, present] = fit.probabilities(queries)
        return probabilities, [details]
    valid = ", ".join(names("knn") + names("logistic"))
    raise UserError(f"preset '{name}' gives no probabilities of classes; valid: {valid}")


def _logistic(
    chosen: Preset, train: np.ndarray, labels: np.ndarray, device: torch.device | str
) -> tuple[Any, dict[str, Any], np.ndarray]:
    """The fit, what it was made with, and the classes that it knows."""
    import numpy as np

    from eosin.eval.logistic import (
        balanced_weights,
        equal_strength,
        logistic_path,
        norm_penalized,
        scikit_strength,
        uni_strength,
    )

    present, codes = np.unique(labels, return_inverse=True)
    if chosen.parameters["penalty"] == "norm":
        strength = uni_strength(train.shape[1], len(present))
        fit = norm_penalized(train, codes, strength, device=device)
        return fit, {"C": strength, "scikit-learn's C": equal_strength(strength, fit.norm, len(codes))}, present
    strength = chosen.parameters["C"]
    weights = balanced_weights(codes) if chosen.parameters["balanced"] else None
    (fit,) = logistic_path(
        train, codes, [scikit_strength(strength, len(present))], sample_weights=weights, device=device
    )
    return fit, {"C": strength}, present
