"""Protocols under the names that papers gave them: which function, which hyperparameters, which paper.

A preset is data. Two numbers are comparable when they come from one preset, and not because both say "linear" or "kNN".
Each is tested against its objective or an identity. Where a paper leaves something open, nothing is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from eosin.data_tools.errors import UserError, nearest

UNI = "Chen et al. 2024, 'Towards a general-purpose foundation model for computational pathology'"


@dataclass(frozen=True)
class Preset:
    """A named protocol.

    Attributes:
        protocol: the family: knn, logistic, simpleshot or ridge.
        parameters: hyperparameters, as they go into the results.
        paper: where they come from.
    """

    protocol: str
    parameters: Mapping[str, Any]
    paper: str


def _preset(protocol: str, paper: str, **parameters: Any) -> Preset:
    return Preset(protocol, MappingProxyType(parameters), paper)


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
        "uni-simpleshot": _preset("simpleshot", UNI, form="uni", episodes=1000, answer="mean over episodes"),
        "thunder-simpleshot": _preset(
            "simpleshot",
            "Marza et al. 2025, 'THUNDER: Tile-level histopathology image understanding benchmark'",
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


def preset_probabilities(
    name: str,
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Score queries by a preset of the families knn and logistic, which choose nothing.

    Args:
        queries: [Q, D].
        train: [T, D].
        labels: [T], class numbers in [0, n_classes).

    Returns:
        Probabilities [R, Q, n_classes], a row a value of k, or one; zero for a class that ``labels`` lack. And for each
        row what it was made with, such as C.

    Raises UserError for a preset of another family.
    """
    chosen = preset(name)
    if chosen.protocol == "knn":
        from eosin.ssl.metrics import knn_probabilities

        given = dict(chosen.parameters)
        ks = given.pop("k")
        found = knn_probabilities(queries, train, labels, n_classes, ks, device=device, **given)
        return found, [{"k": k} for k in ks]
    if chosen.protocol == "logistic":
        fit, details, present = _logistic(chosen, train, labels, device)
        probabilities = np.zeros((1, len(queries), n_classes))
        probabilities[0][:, present] = fit.probabilities(queries)
        return probabilities, [details]
    valid = ", ".join(n for n, p in PRESETS.items() if p.protocol in ("knn", "logistic"))
    raise UserError(f"preset '{name}' gives no probabilities of classes; valid: {valid}")


def _logistic(
    chosen: Preset, train: np.ndarray, labels: np.ndarray, device: torch.device | str
) -> tuple[Any, dict[str, Any], np.ndarray]:
    """The fit, what it was made with, and the classes that it knows."""
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
