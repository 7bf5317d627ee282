"""Measures of features and of runs, shared by the training monitors and the probes. Nothing is fitted or trained."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from eosin.data_tools.draws import generator, purpose

# Of k-NN: Oquab et al., "DINOv2", 2023, and Wu et al., "Unsupervised feature learning via non-parametric instance
# discrimination", 2018, section 3.4.
TEMPERATURE = 0.07
CHUNK = 1 << 24
RESAMPLED = 200  # draws of the bootstrap behind an error
# Dense bfloat16 peak of a GPU, TFLOP/s, by words of its name, the more specific first: NVIDIA's data sheets, where
# those that state it with sparsity are halved.
PEAKS = {
    "A10": 125,
    "A30": 165,
    "A40": 149.7,
    "A100": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "B200": 2250,
}


def effective_rank(features: torch.Tensor) -> float:
    """RankMe: exp of the entropy of the normalized singular values of ``features``, [N, D], in [1, min(N, D)].

    Garrido et al. 2023, "RankMe", eq. 1 and 2. Features are centered first, so that a common offset does not count as
    a direction. NaN where a feature is not finite.
    """
    if not torch.isfinite(features).all():
        return float("nan")
    centered = features.float() - features.float().mean(dim=0)
    singular = torch.linalg.svdvals(centered)
    shares = singular / singular.sum().clamp(min=1e-12)
    return float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()))


def mean_cosine(features: torch.Tensor) -> float:
    """Mean cosine of all pairs of different rows of ``features``, [N, D], in [-1, 1]; 1 means collapse to a point."""
    unit = F.normalize(features.float(), dim=1)
    count = len(unit)
    return float((unit.sum(dim=0).square().sum() - count) / max(count * (count - 1), 1))


def same_group_rate(features: torch.Tensor, groups: torch.Tensor, k: int) -> tuple[float, float, float]:
    """How often the k nearest neighbors of a row share its group; how often by chance; and how often at most.

    At most, since a row has no more neighbors of its group than the group has other rows here.

    Args:
        features: [N, D].
        groups: [N] int64, e.g. slide numbers.
        k: neighbors, fewer than N.
    """
    unit = F.normalize(features.float(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    nearest = similarity.topk(k, dim=1).indices  # [N, k]
    rate = float((groups[nearest] == groups.unsqueeze(1)).float().mean())
    counts = torch.bincount(groups.unique(return_inverse=True)[1]).double()
    chance = float((counts * (counts - 1)).sum() / (len(groups) * (len(groups) - 1)))
    most = float((counts * (counts - 1).clamp(max=k)).sum() / (len(groups) * k))
    return rate, chance, most


def expected_usage(draws: int, prototypes: int) -> float:
    """Share of ``prototypes`` that ``draws`` even, independent draws are expected to hit: 1 - (1 - 1/K)^n."""
    return 1 - (1 - 1 / prototypes) ** draws


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s at most of a GPU by its name, e.g. "NVIDIA H100 80GB HBM3"; None where it is not known.

    A part of a GPU (MIG) is not known.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    found = [tflops for name, tflops in PEAKS.items() if words >= set(name.split())]
    return None if "MIG" in words or not found else found[0] * 1e12


@torch.no_grad()
def knn_probabilities(
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    ks: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Vote of the k nearest training samples by cosine, the ``dinov2-knn`` protocol, each weighted by
    softmax(cosine / .07), for every k in one pass over the similarities. Memory is bounded by chunks of queries.

    Args:
        queries: [Q, D].
        train: [T, D].
        labels: [T], class numbers in [0, n_classes).
        ks: numbers of neighbors, each at most T.

    Returns:
        [len(ks), Q, n_classes], float32; each row sums to 1.
    """
    widest = max(ks)
    if widest > len(train):
        raise ValueError(f"k = {widest} exceeds the {len(train)} training samples")
    targets = torch.from_numpy(labels).to(device)  # [T]
    memory = _normalized(train, device).T.contiguous()  # [D, T]
    votes = torch.zeros(len(ks), len(queries), n_classes, device=device)
    step = max(1, CHUNK // len(train))
    for first in range(0, len(queries), step):
        similarity = _normalized(queries[first : first + step], device) @ memory  # [q, T]
        nearest, index = similarity.topk(widest, dim=1)  # [q, K], the nearest first
        weights = ((nearest - nearest[:, :1]) / TEMPERATURE).exp()
        classes = targets[index]  # [q, K]
        for row, k in enumerate(ks):
            votes[row, first : first + step].scatter_add_(1, classes[:, :k], weights[:, :k])
    return (votes / votes.sum(dim=2, keepdim=True)).cpu().numpy()


def knn_across_groups(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int,
    k: int,
    *,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The class that k nearest neighbors of other groups vote each row of ``features``, [N, D], into: [N] int64."""
    said = np.empty(len(labels), dtype=np.int64)
    for group in np.unique(groups):
        own = groups == group
        votes = knn_probabilities(features[own], features[~own], labels[~own], n_classes, [k], device=device)
        said[own] = votes[0].argmax(axis=1)
    return said


def balanced_accuracy(labels: np.ndarray, said: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Mean over classes of the share that was told right, and its standard error from drawing groups.

    The error is the deviation over :data:`RESAMPLED` draws of whole groups with replacement (cluster bootstrap), since
    tiles of a patient are not independent; a draw without a class leaves it out.

    Args:
        labels, said: [N], class numbers.
        groups: [N], group numbers in [0, G).
    """
    cells = np.zeros((2, groups.max() + 1, labels.max() + 1))
    np.add.at(cells[0], (groups, labels), 1)
    np.add.at(cells[1], (groups, labels), said == labels)
    count = cells.shape[1]
    weights = generator(purpose("balanced accuracy"), count).multinomial(count, np.full(count, 1 / count), RESAMPLED)
    every, right = np.vstack([np.ones(count), weights]) @ cells  # [1 + draws, C] each
    recalls = np.divide(right, every, out=np.full_like(right, np.nan), where=every > 0)
    values = np.nanmean(recalls, axis=1)
    return float(values[0]), float(values[1:].std())


def _normalized(features: np.ndarray, device: torch.device | str) -> torch.Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(features)).to(device, torch.float32)
    return F.normalize(rows, dim=1)
