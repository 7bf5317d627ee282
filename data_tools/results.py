"""Results on disk: ``NAME.json`` (protocol, hyperparameters, metrics with intervals) and, beside it,
``NAME.predictions.parquet`` (one row a scored sample and encoder), so that encoders can be compared pairwise later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path, read_json

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
REQUIRED = (
    "protocol",
    "parameters",
    "label",
    "group",
    "n",
    "groups",
    "classes",
    "chance",
    "encoders",
    "comparisons",
)


def write_results(path: Path | str, results: dict[str, Any], predictions: pd.DataFrame) -> None:
    """Write results and their per-sample predictions.

    Args:
        path: of the JSON file; the predictions go beside it.
        results: at least the keys of :data:`REQUIRED`; ``encoders`` is a list of
            ``{"name", "fingerprint", "metrics": {metric: {"value", "low", "high"}}}``.
        predictions: columns encoder, key, group, fold, label, predicted, and the probability of each class.
    """
    missing = [key for key in REQUIRED if key not in results]
    if missing:
        raise ValueError(f"results lack {missing}")
    path = Path(path)
    text = json.dumps({"schema": SCHEMA, "kind": "eosin results"} | results, indent=1, allow_nan=False)
    # Both are written before either is renamed, so that figures never stand beside other figures' predictions.
    with atomic_path(path) as figures, atomic_path(predictions_path(path)) as samples:
        predictions.to_parquet(samples, index=False)
        figures.write_text(text + "\n", encoding="utf-8")


def read_results(path: Path | str) -> tuple[dict[str, Any], pd.DataFrame]:
    """Read results and their predictions. Raises UserError for anything that is not of this schema."""
    import pandas as pd

    path = Path(path)
    results = read_json(path, "results of 'eosin eval'")
    if results.get("kind") != "eosin results" or results.get("schema") != SCHEMA:
        raise UserError(f"{path} holds no results of schema {SCHEMA}; make it with 'eosin eval'")
    if not predictions_path(path).is_file():
        raise UserError(f"{predictions_path(path)} is missing; run 'eosin eval' again")
    return results, pd.read_parquet(predictions_path(path))


def predictions_path(path: Path) -> Path:
    """Path of the predictions that belong to the results at ``path``."""
    return path.with_suffix(".predictions.parquet")
