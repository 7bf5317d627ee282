"""Few labels: SimpleShot over many episodes at once, and a share of the labels.

SimpleShot (Wang et al. 2019, "SimpleShot: Revisiting nearest-neighbor classification for few-shot learning") classifies
by the nearest class mean of a few samples a class. Two forms are published under that name, and their numbers are not
comparable:

- ``uni`` (Chen et al. 2024, "Towards a general-purpose foundation model for computational pathology"): samples less the
  mean of all that were drawn, L2-normalized, then class means, nearest by L2; mean ± deviation over 1,000 episodes.
- ``thunder`` (Marza et al. 2025, "THUNDER: Tile-level histopathology image understanding benchmark"): samples less the
  same mean, class means, then L2-normalized, nearest by cosine; one prediction a sample, by majority over the draws.

Episodes are drawn from (seed, episode), so episode 17 is the same whether 20 or 1,000 are asked for. Nothing is chosen
here, and what is drawn comes from the training side only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from eosin.data_tools.draws import hash32, permute, purpose
from eosin.data_tools.errors import UserError
from eosin.eval.describe import PRIMARY
from eosin.eval.presets import names, preset
from eosin.eval.question import Answer, Question, conclude, each_fold, prepare
from eosin.eval.splits import Split
from eosin.eval.task import Task

Form = Literal["uni", "thunder"]
SHOTS = (1, 2, 4, 8, 16, 32)
EPISODES, MOST_EPISODES = 1000, 100_000
CHUNK = 1 << 21  # numbers in a chunk of episodes: of samples drawn, and of scores


def run_fewshot(
    question: Question,
    shots: Sequence[int] = SHOTS,
    name: str = "uni-simpleshot",
    episodes: int = EPISODES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Probe by SimpleShot in the form of a preset; write and return the results.

    In each fold every episode draws its samples from the training side and answers all that is scored; an episode's
    score is that of its answers in all folds of a pass.

    Args:
        shots: samples of each class, in turn.
        name: of a preset of the family simpleshot, whose form is taken, and whether its number is the mean over the
            episodes or that of their vote.
    """
    if (chosen := preset(name)).protocol != "simpleshot":
        raise UserError(f"preset '{name}' is of another kind; valid here: {', '.join(names('simpleshot'))}")
    if not 2 <= episodes <= MOST_EPISODES:
        raise UserError(f"--episodes {episodes} has no deviation, or no end; give 2 to {MOST_EPISODES}")
    task, split, leaks = prepare(question)
    shots = tuple(dict.fromkeys(shots))
    _check_shots(shots, task, split)
    form: Form = chosen.parameters["form"]
    answers = [
        _answer(question, task, split, number, count, form, episodes, device)
        for number in range(len(task.encoders))
        for count in shots
    ]
    parameters = {**chosen.parameters, "episodes": episodes, "shots": list(shots), "paper": chosen.paper}
    return conclude(question, task, split, leaks, answers, name, parameters, "tile", episodes=form == "uni")


def _check_shots(shots: Sequence[int], task: Task, split: Split) -> None:
    if min(shots) < 1:
        raise UserError(f"--shots {min(shots)} draws nothing; give 1 or more")
    counts = np.array([np.bincount(task.labels[learned], minlength=len(task.classes)) for learned, _ in split])
    fold, label = np.unravel_index(counts.argmin(), counts.shape)
    if counts.min() < max(shots):
        raise UserError(
            f"class '{task.classes[label]}' has {counts.min()} samples on the training side of fold {fold}, fewer than "
            f"{max(shots)} shots; give fewer --shots or leave the class out of the labels"
        )


def _answer(
    question: Question, task: Task, split: Split, number: int, shots: int, form: Form, episodes: int, device: str
) -> Answer:
    """Shares of the episodes that say each class, as probabilities, and what the episodes reach, in the details."""
    encoder, n_classes, passes = task.encoders[number], len(task.classes), split.passes
    shares = np.empty((len(split.rows), n_classes))
    reached = np.zeros((passes.max() + 1, episodes, 2))
    weights = np.empty((len(split.rows), 2))
    for one in np.unique(passes):
        weights[passes == one] = sample_weights(task.labels[split.rows[passes == one]])
    for fold, (rows, learned, scored) in enumerate(each_fold(split, f"{shots} shots, {encoder.name}")):
        seed = hash32(question.seed, purpose("few-shot fold"), fold)
        drawn = draw_episodes(task.labels[learned], n_classes, shots, episodes, seed)
        said = simpleshot(encoder.features[scored], encoder.features[learned], drawn, form, device=device)
        shares[rows] = votes(said, n_classes) / episodes
        reached[passes[rows.argmax()]] += weighted_hits(said, task.labels[scored], weights[rows])
    found = {
        metric: {"mean": float(values.mean()), "deviation": float(values.std(ddof=1))}
        for metric, values in zip(("accuracy", PRIMARY), np.moveaxis(reached, -1, 0))
    }
    details = {"shots": shots, "episodes": episodes, "over_episodes": found}
    return Answer(encoder.name, f"{shots} shot{'s' * (shots > 1)}", encoder.encoder, shares, details)


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
            said[first : first + step, low : low + block] = scores.max(dim=1).indices.cpu().numpy()
    return said


def episode_scores(said: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and balanced accuracy (the mean over the classes that occur in ``labels``) of each episode, [E] each.

    Args:
        said: [E, Q], class numbers.
        labels: [Q], the truth.
    """
    accuracy, balanced = weighted_hits(said, labels, sample_weights(labels)).T
    return accuracy, balanced


def sample_weights(labels: np.ndarray) -> np.ndarray:
    """What a right answer of each sample adds to accuracy and to balanced accuracy, [Q, 2]."""
    present, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.stack([np.full(len(labels), 1 / len(labels)), 1 / (len(present) * counts[codes])], axis=1)


def weighted_hits(said: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of the weights [Q, S] of what each episode gets right: [E, S]."""
    scores = np.empty((len(said), weights.shape[1]))
    step = max(1, CHUNK // len(labels))
    for first in range(0, len(said), step):
        scores[first : first + step] = (said[first : first + step] == labels) @ weights
    return scores


def votes(said: np.ndarray, n_classes: int) -> np.ndarray:
    """How many episodes say each class of each sample: [E, Q] -> [Q, K]. The largest is the majority."""
    return np.stack([(said == number).sum(axis=0) for number in range(n_classes)], axis=1)


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


def _features(features: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(features)).to(device, torch.float32)
