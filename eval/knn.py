"""k nearest neighbors by cosine, the ``dinov2-knn`` protocol: every k in one pass over the similarities.

Nothing is fitted; memory is bounded by chunks of queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# Oquab et al., "DINOv2", 2023, and Wu et al., "Unsupervised feature learning via non-parametric instance
# discrimination", 2018, section 3.4.
TEMPERATURE = 0.07
CHUNK = 1 << 24


@torch.no_grad()
def knn_probabilities(
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    ks: Sequence[int],
    *,
    device: str = "cpu",
) -> np.ndarray:
    """Vote of the k nearest training samples, each weighted by softmax(cosine / .07), for every k.

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


def _normalized(features: np.ndarray, device: str) -> torch.Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(features)).to(device, torch.float32)
    return torch.nn.functional.normalize(rows, dim=1)
