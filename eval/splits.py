"""Which samples a probe learns from and which it is scored on: whole groups, never rows.

Every split here is by group (patient, slide), so no group can stand on both sides. A set that cannot be split so is
refused with its reason; nothing here falls back to splitting rows.
"""

from __future__ import annotations

import warnings

import numpy as np

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError

ATTEMPTS = 20


def grouped_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign every sample to one fold, by group and with classes spread as evenly as the groups allow.

    Args:
        labels: [N], class names or numbers.
        groups: [N].
        folds: number of folds, at least 2.
        seed: of the shuffle; the assignment depends on nothing else.

    Returns:
        [N] fold numbers in [0, folds). Each fold scores something, and what is left of the set without it holds
        every class.

    Raises:
        UserError: fewer than two classes, fewer groups than folds, a class that occurs in one group only, or no
            assignment found that leaves every class on every training side.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    names, members = np.unique(groups, return_inverse=True)
    if folds < 2:
        raise UserError(f"{folds} folds cannot be split into a training and a scored side; give --folds 2 or more")
    if len(classes) < 2:
        raise UserError(f"the label has one class only ('{classes[0]}'); a probe needs two or more")
    if len(names) < folds:
        raise UserError(f"{len(names)} groups cannot fill {folds} folds; give --folds {len(names)} or fewer")
    present = np.zeros((len(classes), len(names)), dtype=bool)
    present[codes, members] = True
    lonely = np.flatnonzero(present.sum(axis=1) == 1)
    if len(lonely):
        where = names[np.flatnonzero(present[lonely[0]])[0]]
        raise UserError(
            f"class '{classes[lonely[0]]}' occurs in 1 group only ('{where}'), so a grouped split cannot hold it on "
            "both sides; leave the class out of the labels or group by something finer"
        )
    for attempt in range(ATTEMPTS):
        assigned = stratified_folds(codes, members, folds, hash32(seed, purpose("folds"), attempt))
        held = np.zeros((folds, len(classes)), dtype=np.int64)
        np.add.at(held, (assigned, codes), 1)  # [folds, classes]
        if (held.sum(axis=1) > 0).all() and (held.sum(axis=0) - held > 0).all():
            return assigned
    raise UserError(
        f"no assignment of {len(names)} groups to {folds} folds leaves every class on every training side; "
        "give fewer --folds"
    )


def stratified_folds(codes: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign samples to folds by group, as :class:`sklearn.model_selection.StratifiedGroupKFold`, without checks."""
    from sklearn.model_selection import StratifiedGroupKFold

    assigned = np.empty(len(codes), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # It warns of a class with fewer samples than folds, which only means that some folds do not score it.
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, scored) in enumerate(splitter.split(np.empty((len(codes), 0)), codes, groups)):
            assigned[scored] = fold
    return assigned
