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
CHUNK = 1 << 24  # similarities at a time
BLOCK = 1 << 15  # training samples at a time
GROUP = 16  # similarities of which the largest stands for all
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
    weighted: bool = True,
    center: bool = False,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Votes of the k nearest training samples by cosine, for every k in one pass over the similarities.

    Each neighbor's vote weighs softmax(cosine / .07), the ``dinov2-knn`` protocol, or 1. Of normalized features the
    order by cosine is that by L2 distance. Beside the inputs memory holds one block of similarities, and the nearest
    found so far: inputs may be mapped from a file.

    Args:
        queries: [Q, D].
        train: [T, D].
        labels: [T], class numbers in [0, n_classes).
        ks: numbers of neighbors, each at most T.
        weighted: by similarity; else every neighbor counts the same.
        center: subtract the mean of ``train`` from both sides first, as ``uni-knn`` does.

    Returns:
        [len(ks), Q, n_classes], float32; each row sums to 1.
    """
    widest = max(ks)
    if widest > len(train):
        raise ValueError(f"k = {widest} exceeds the {len(train)} training samples")
    targets = torch.from_numpy(labels.astype(np.int64)).to(device)  # [T]
    mean = torch.from_numpy(_mean(train)).to(device) if center else None  # [D]
    block = max(widest, min(len(train), BLOCK))
    step = max(1, CHUNK // block)
    nearest = torch.full((len(queries), widest), -torch.inf, device=device)  # [Q, K], the nearest first
    classes = torch.zeros(len(queries), widest, dtype=torch.int32, device=device)
    for low in range(0, len(train), block):
        rows = _rows(train[low : low + block], mean, device)  # [t, D]
        lengths = torch.linalg.vector_norm(rows, dim=1).clamp(min=1e-12)
        for first in range(0, len(queries), step):
            part = slice(first, first + step)
            similarity = F.normalize(_rows(queries[part], mean, device), dim=1) @ rows.T  # [q, t]
            found, index = _largest(similarity.div_(lengths), min(widest, len(rows)))
            found, order = torch.cat([nearest[part], found], dim=1).topk(widest, dim=1)
            nearest[part] = found
            classes[part] = torch.cat([classes[part], targets[low + index].int()], dim=1).gather(1, order)
    votes = torch.zeros(len(ks), len(queries), n_classes, device=device)
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        weights = torch.ones_like(nearest[part])
        if weighted:
            weights = ((nearest[part] - nearest[part, :1]) / TEMPERATURE).exp()
        said = classes[part].long()
        for row, k in enumerate(ks):
            votes[row, part].scatter_add_(1, said[:, :k], weights[:, :k])
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


def _rows(features: np.ndarray, mean: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    """Some rows as float32, less the mean if there is one."""
    rows = torch.from_numpy(np.ascontiguousarray(features)).to(device, torch.float32)
    return rows if mean is None else rows - mean


def _mean(features: np.ndarray) -> np.ndarray:
    """Mean over [N, D] in double precision, a block at a time: [D] float32."""
    blocks = range(0, len(features), BLOCK)
    total = sum(features[low : low + BLOCK].sum(axis=0, dtype=np.float64) for low in blocks)
    return np.asarray(total / len(features), dtype=np.float32)


def _largest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of [n, m], in any order, and where they are.

    They lie in the k groups whose maxima are the largest; looking there only takes half the time of a long row.
    """
    groups = values.shape[1] // GROUP
    if groups < 4 * k:
        return values.topk(k, dim=1, sorted=False)
    whole = values[:, : groups * GROUP].unflatten(1, (GROUP, groups))  # [n, GROUP, groups]
    group = whole.amax(dim=1).topk(k, dim=1, sorted=False).indices  # [n, k]
    index = group.unsqueeze(1) + groups * torch.arange(GROUP, device=values.device).view(1, -1, 1)
    rest = torch.arange(groups * GROUP, values.shape[1], device=values.device).expand(len(values), -1)
    index = torch.cat([index.flatten(1), rest], dim=1)
    found, order = values.gather(1, index).topk(k, dim=1, sorted=False)
    return found, index.gather(1, order)
