"""Few labels: SimpleShot over many episodes at once, and a share of the labels.

SimpleShot (Wang et al. 2019, "SimpleShot: Revisiting nearest-neighbor classification for few-shot learning") classifies
by the nearest class mean of a few samples a class. Two forms are published under that name, and their numbers are not
comparable:

- ``uni`` (Chen et al. 2024, "Towards a general-purpose foundation model for computational pathology"): samples less the
  mean of all that were drawn, L2-normalized, then class means, nearest by L2; mean ± deviation over 1,000 episodes.
- ``thunder`` (Marza et al. 2025, "THUNDER: Tile-level histopathology image understanding benchmark"): samples less the
  same mean, class means, then L2-normalized, nearest by cosine; one prediction a sample, by majority over the draws.

Episodes are drawn from (seed, episode), so episode 17 is the same whether 20 or 1,000 are asked for. Nothing is fitted
or chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from eosin.data_tools.draws import permute, purpose
from eosin.data_tools.errors import UserError

Form = Literal["uni", "thunder"]
EPISODES = 1000
CHUNK = 1 << 22  # numbers in a chunk of episodes: of samples drawn, and of scores
# What learns from some samples and scores others: (queries [Q, D], features [T, D], labels [T], groups [T]) -> [Q, K].
Probe = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def draw_episodes(labels: np.ndarray, n_classes: int, shots: int, episodes: int, seed: int) -> np.ndarray:
    """Draw ``shots`` different samples of each class for each episode.

    Args:
        labels: [N], class numbers in [0, n_classes).

    Returns:
        Rows of the samples, [episodes, n_classes, shots] int64.

    Raises UserError when a class has fewer samples than ``shots``.
    """
    drawn = np.empty((episodes, n_classes, shots), dtype=np.int64)
    index = np.broadcast_to(np.arange(shots), (episodes, shots))
    episode = np.broadcast_to(np.arange(episodes)[:, None], (episodes, shots))
    for number in range(n_classes):
        members = np.flatnonzero(labels == number)
        if len(members) < shots:
            raise UserError(f"class {number} has {len(members)} samples, fewer than {shots} shots; give fewer shots")
        drawn[:, number] = members[permute(index, len(members), seed, purpose("few-shot episode"), episode, number)]
    return drawn


def prototypes(drawn: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of what each episode drew, [E, D], and its class prototypes less that mean, [E, K, D].

    Args:
        drawn: [E, K, S, D], features of the samples.
    """
    mean = drawn.mean(dim=(1, 2))
    if form == "uni":
        return mean, F.normalize(drawn - mean[:, None, None], dim=3).mean(dim=2)
    return mean, F.normalize(drawn.mean(dim=2) - mean[:, None], dim=2)


@torch.no_grad()
def simpleshot(
    queries: np.ndarray,
    support: np.ndarray,
    episodes: np.ndarray,
    form: Form = "uni",
    *,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The class that each episode says each query is of.

    Scores of a chunk of episodes are one product with the queries as they are: with m the mean of an episode and p a
    prototype, a query q lies nearest where (q - m) · p - ½ ‖q - m‖ ‖p‖² is largest (``uni``), or (q - m) · p
    (``thunder``). Memory is bounded by chunks.

    Args:
        queries: [Q, D].
        support: [N, D], from which samples were drawn.
        episodes: [E, K, S] rows of ``support``, see :func:`draw_episodes`.

    Returns:
        [E, Q], int16.
    """
    count, n_classes, shots = episodes.shape
    dimension = support.shape[1]
    said = np.empty((count, len(queries)), dtype=np.int16)
    # No answer changes when both sides move by the same offset, and float32 is finest around zero.
    offset = torch.from_numpy(support[episodes[0].reshape(-1)].mean(axis=0, dtype=np.float64)).to(device).float()
    block = max(1, min(len(queries), CHUNK // max(dimension, n_classes + 1)))
    step = max(1, min(CHUNK // (n_classes * shots * dimension), 4 * CHUNK // ((n_classes + 1) * block)))
    for low in range(0, len(queries), block):
        asked = _features(queries[low : low + block], device) - offset  # [q, D]
        squares = asked.square().sum(dim=1)  # [q]
        for first in range(0, count, step):
            rows = episodes[first : first + step]
            drawn = _features(support[rows.reshape(-1)], device) - offset
            mean, classes = prototypes(drawn.view(*rows.shape, dimension), form)
            shift = torch.einsum("ed,ekd->ek", mean, classes)
            if form == "uni":
                classes = torch.cat([classes, mean[:, None]], dim=1)  # [e, K + 1, D]
            scores = (classes.flatten(0, 1) @ asked.T).unflatten(0, classes.shape[:2])  # [e, K or K + 1, q]
            if form == "uni":
                length = (squares - 2 * scores[:, -1] + mean.square().sum(dim=1, keepdim=True)).clamp_(min=0).sqrt_()
                scores = scores[:, :-1]
                half = 0.5 * classes[:, :-1].square().sum(dim=2)  # [e, K]
                scores.sub_(shift[..., None]).addcmul_(length[:, None], half[..., None], value=-1)
            else:
                scores.sub_(shift[..., None])
            said[first : first + step, low : low + block] = scores.argmax(dim=1).cpu().numpy()
    return said


def episode_scores(said: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and balanced accuracy (the mean over the classes that occur in ``labels``) of each episode, [E] each.

    Args:
        said: [E, Q], class numbers.
        labels: [Q], class numbers.
    """
    counts = np.bincount(labels)
    balanced = 1 / (counts[labels] * np.count_nonzero(counts))  # [Q], what a right answer is worth
    shares = np.stack([np.full(len(labels), 1 / len(labels)), balanced], axis=1)
    scores = np.empty((len(said), 2))
    step = max(1, CHUNK // len(labels))
    for first in range(0, len(said), step):
        scores[first : first + step] = (said[first : first + step] == labels) @ shares
    return scores[:, 0], scores[:, 1]


def majority(said: np.ndarray, n_classes: int) -> np.ndarray:
    """The class that most episodes say, the first of those that tie, [Q] int64.

    Args:
        said: [E, Q], class numbers.
    """
    counts = np.stack([(said == number).sum(axis=0) for number in range(n_classes)])  # [K, Q]
    return counts.argmax(axis=0)


def label_share(labels: np.ndarray, groups: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Rows of whole groups, in a keyed order of the groups, until they hold a share of the samples.

    A smaller share is part of a larger one. Two groups at least are taken, and where a class would be missing the first
    group in that order which has it, so a small share may hold more than was asked for.

    Args:
        labels: [N], class numbers.
        groups: [N].
        ratio: share of the samples, in (0, 1].

    Returns:
        Rows, ascending.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"a share of labels of {ratio} is not in (0, 1]; give 0.01 for 1 %")
    names, members = np.unique(groups, return_inverse=True)
    place = permute(np.arange(len(names)), len(names), seed, purpose("label share"))
    order = np.argsort(place)
    before = np.concatenate([[0], np.cumsum(np.bincount(members)[order])[:-1]])  # samples in the groups before
    taken = np.zeros(len(names), dtype=bool)
    taken[order[before < ratio * len(labels)]] = True
    taken[order[:2]] = True
    for number in np.unique(labels):
        holders = np.unique(members[labels == number])
        if not taken[holders].any():
            taken[holders[place[holders].argmin()]] = True
    return np.flatnonzero(taken[members])


def few_ratio(
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    ratios: Sequence[float],
    seed: int,
    probe: Probe,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fit a probe on each share of the labels in turn; see :func:`label_share`.

    Args:
        queries: [Q, D].
        train: [T, D].
        labels, groups: [T].
        probe: for instance k nearest neighbors, or :func:`eosin.eval.linear.linear_probabilities`, with the rest given.

    Yields:
        The rows of ``train`` that were learned from, and probabilities [Q, K].
    """
    for ratio in ratios:
        rows = label_share(labels, groups, ratio, seed)
        yield rows, probe(queries, train[rows], labels[rows], groups[rows])


def _features(features: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(features)).to(device, torch.float32)
