"""Which samples a probe learns from and which it is scored on: whole groups, never rows.

Every split that is made here is by group (patient, slide), so no group can stand on both sides. A set that cannot be
split so is refused with its reason; nothing here falls back to splitting rows. A split that is given is looked through
for what stands on both sides.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from eosin.data_tools.draws import generator, hash32, purpose
from eosin.data_tools.errors import UserError

ATTEMPTS = 20
# What a sample is in a pass where it is not scored: learned from, or left aside.
LEARN, ASIDE = -1, -2
SIDES = {"train": LEARN, "test": 0, "val": ASIDE}
SYNONYMS = {"training": "train", "testing": "test", "valid": "val", "validation": "val"}


@dataclass(frozen=True)
class Split:
    """Folds, each with a side to learn from and a side to be scored.

    Attributes:
        kind: kfold, leave-one-group-out, monte-carlo or fixed.
        assigned: [P, N], one row a pass: the fold that scores the sample, or :data:`LEARN`, or :data:`ASIDE`. A fold
            learns from what other folds of its pass score, and from what the pass only learns from. The folds of one
            pass are scored together; what several passes give is averaged.
    """

    kind: str
    assigned: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The sample of each answer, [M]: pass by pass, in the order of the samples."""
        return np.concatenate([np.flatnonzero(folds >= 0) for folds in self.assigned])

    @property
    def passes(self) -> np.ndarray:
        """The pass of each answer, [M]."""
        return np.repeat(np.arange(len(self.assigned)), (self.assigned >= 0).sum(axis=1))

    @property
    def folds(self) -> np.ndarray:
        """The fold of each answer, [M], counted through all passes."""
        first = np.cumsum([0, *(self.assigned.max(axis=1) + 1)])[:-1]
        return np.concatenate([folds[folds >= 0] + start for folds, start in zip(self.assigned, first)])

    def __len__(self) -> int:
        return int((self.assigned.max(axis=1) + 1).sum())

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The two sides of each fold, learned from and scored, [N] bool each."""
        for folds in self.assigned:
            for fold in range(int(folds.max()) + 1):
                scored = folds == fold
                yield (folds >= LEARN) & ~scored, scored

    def describe(self, labels: np.ndarray, groups: np.ndarray, classes: list[str]) -> dict[str, Any]:
        """Kind and folds, with the sizes of both sides and the classes that a side lacks."""
        folds = []
        for learned, scored in self:
            absent = [
                [c for c, n in zip(classes, np.bincount(labels[side], minlength=len(classes))) if not n]
                for side in (learned, scored)
            ]
            folds.append(
                {
                    "train": int(learned.sum()),
                    "train_groups": len(np.unique(groups[learned])),
                    "train_lacks": absent[0],
                    "scored": int(scored.sum()),
                    "scored_groups": len(np.unique(groups[scored])),
                    "scored_lacks": absent[1],
                }
            )
        return {"kind": self.kind, "passes": len(self.assigned), "folds": folds}


def kfold(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> Split:
    """Every sample scored once, by :func:`grouped_folds`."""
    return Split("kfold", grouped_folds(labels, groups, folds, seed)[None])


def leave_one_group_out(labels: np.ndarray, groups: np.ndarray) -> Split:
    """Every group (a site, say) a fold of its own.

    Raises UserError where a fold would have fewer than two classes to learn from.
    """
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"there is 1 group only ('{names[0]}'); leaving it out leaves nothing to learn from")
    classes, codes = np.unique(labels, return_inverse=True)
    held = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(held, (members, codes), 1)
    poor = np.flatnonzero(((held.sum(axis=0) - held) > 0).sum(axis=1) < 2)
    if len(poor):
        raise UserError(f"without group '{names[poor[0]]}' one class only is left to learn from; give another --group")
    return Split("leave-one-group-out", members[None])


def monte_carlo(labels: np.ndarray, groups: np.ndarray, folds: int, repeats: int, seed: int) -> Split:
    """``repeats`` times, one in ``folds`` of the groups is scored, drawn anew: stratified, as :func:`grouped_folds`.

    Raises UserError as that does, and where each pass scores one class only.
    """
    if repeats < 1:
        raise UserError(f"--repeats {repeats} scores nothing; give 1 or more")
    passes = np.full((repeats, len(labels)), LEARN, dtype=np.int64)
    for number in range(repeats):
        drawn = hash32(seed, purpose("monte carlo"), number)
        # The largest groups are dealt to the first folds, so that the fold is drawn too.
        chosen = int(generator(drawn).integers(folds)) if folds > 1 else 0
        passes[number, grouped_folds(labels, groups, folds, drawn) == chosen] = 0
    if all(len(np.unique(labels[p == 0])) < 2 for p in passes):
        raise UserError(f"one in {folds} of the groups holds one class only in every pass; give fewer --folds")
    return Split("monte-carlo", passes)


def fixed(sides: np.ndarray, labels: np.ndarray, column: str) -> Split:
    """The split that a column names: train, test, or val, which is neither learned from nor scored.

    Args:
        sides: [N], text; an empty one is left aside like val.
        labels: [N].
        column: for messages.

    Raises UserError for another word, where a side is empty, or where a side has one class only.
    """
    names = [s.lower() for s in sides]
    codes = np.array([SIDES.get(SYNONYMS.get(s, s), ASIDE if not s else 9) for s in names], dtype=np.int64)
    if (codes == 9).any():
        raise UserError(f"column '{column}' says '{sides[(codes == 9).argmax()]}'; the sides are train, val and test")
    for side in ("train", "test"):
        if not (codes == SIDES[side]).any():
            raise UserError(f"column '{column}' names no labeled sample '{side}'; a fixed split needs train and test")
    learned = np.unique(labels[codes == LEARN])
    if len(learned) < 2:
        raise UserError(f"the train side of '{column}' has one class only ('{learned[0]}'); a probe needs two or more")
    scored = np.unique(labels[codes == 0])
    if len(scored) < 2:
        raise UserError(f"the test side of '{column}' has one class only ('{scored[0]}'); nothing can be told apart")
    return Split("fixed", codes[None])


def find_leaks(split: Split, identities: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """What stands on both sides of a fold.

    Args:
        split: of N samples.
        identities: what must not (patient, slide, image) -> [N], text; what is empty is unknown and not looked at.

    Returns:
        For each kind that leaks: ``what``, ``count`` of those that do, an ``example``, and how many ``samples`` of
        the scored sides it touches.
    """
    found = []
    for what, names in identities.items():
        known = np.flatnonzero(names != "")
        values, codes = np.unique(names[known], return_inverse=True)
        leaking = np.zeros(len(values), dtype=bool)
        touched = np.zeros(len(names), dtype=bool)
        for folds in split.assigned[:, known]:
            used = folds >= LEARN
            low, high = np.full(len(values), len(names)), np.full(len(values), ASIDE)
            np.minimum.at(low, codes[used], folds[used])
            np.maximum.at(high, codes[used], folds[used])
            leaking |= low < high
            touched[known] |= (low < high)[codes] & (folds >= 0)
        if leaking.any():
            example = str(values[leaking.argmax()])
            found.append({"what": what, "count": int(leaking.sum()), "example": example, "samples": int(touched.sum())})
    return found


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
    """Assign samples to folds by group, as :class:`sklearn.model_selection.StratifiedGroupKFold`.

    Raises UserError when every class has fewer samples than there are folds; nothing else is checked.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if np.unique(codes, return_counts=True)[1].max() < folds:
        raise UserError(f"every class has fewer than {folds} samples, too few for {folds} folds; label more samples")
    assigned = np.empty(len(codes), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # It warns of a class with fewer samples than folds, which only means that some folds do not score it.
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, scored) in enumerate(splitter.split(np.empty((len(codes), 0)), codes, groups)):
            assigned[scored] = fold
    return assigned
