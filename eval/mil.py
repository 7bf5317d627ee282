"""Bags of tiles to one answer a slide: mean pooling, and gated attention (Ilse et al. 2018).

Bags are packed, all tiles of a batch in one [T, D] tensor with the bag number of each row, so nothing is padded and no
bag is cut. Training runs a fixed number of epochs and never looks at the scored side; scoring has no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from eosin.data_tools.draws import generator, hash32, purpose
from eosin.eval.linear import Scale


@dataclass(frozen=True)
class AttentionProtocol:
    """Every number of the attention probe; what the results carry."""

    width: int = 64
    attention_width: int = 64
    dropout: float = 0.25
    epochs: int = 30
    bags_per_step: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    repeats: int = 3


class GatedAttention(nn.Module):
    """Features -> hidden tile vectors -> attention-weighted mean of each bag -> class scores.

    Attention is equation 9 of Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", 2018:
    ``a_k = softmax_k(w · (tanh(V h_k) * sigmoid(U h_k)))``.
    """

    def __init__(self, dimension: int, n_classes: int, protocol: AttentionProtocol) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dimension, protocol.width), nn.ReLU())
        self.value = nn.Linear(protocol.width, protocol.attention_width)
        self.gate = nn.Linear(protocol.width, protocol.attention_width)
        self.score = nn.Linear(protocol.attention_width, 1)
        self.classify = nn.Sequential(nn.Dropout(protocol.dropout), nn.Linear(protocol.width, n_classes))

    def forward(self, tiles: torch.Tensor, bags: torch.Tensor, n_bags: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Score bags.

        Args:
            tiles: [T, D], the tiles of all bags.
            bags: [T], int64, the bag of each tile, in [0, n_bags); every bag has a tile.

        Returns:
            Class scores [n_bags, C], and the attention of each tile, [T], which sums to 1 over a bag.
        """
        hidden = self.embed(tiles)  # [T, H]
        scores = self.score(torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden)))[:, 0]  # [T]
        attention = segment_softmax(scores, bags, n_bags)  # [T]
        pooled = hidden.new_zeros(n_bags, hidden.shape[1]).index_add(0, bags, attention[:, None] * hidden)  # [B, H]
        return self.classify(pooled), attention


def segment_softmax(scores: torch.Tensor, segments: torch.Tensor, n_segments: int) -> torch.Tensor:
    """Softmax of [T] scores within each segment; ``segments`` is [T], int64."""
    # index_select and not scores[segments]: the latter's backward adds in no fixed order.
    peak = scores.detach().new_full((n_segments,), -torch.inf).scatter_reduce(0, segments, scores.detach(), "amax")
    weights = (scores - peak.index_select(0, segments)).exp()
    total = weights.new_zeros(n_segments).index_add(0, segments, weights)
    return weights / total.index_select(0, segments)


def mean_pool(features: np.ndarray, bags: np.ndarray, n_bags: int) -> np.ndarray:
    """Mean of the tiles of each bag: [T, D] and [T] -> [n_bags, D], float32."""
    order = np.argsort(bags, kind="stable")
    counts = np.bincount(bags, minlength=n_bags)
    starts = np.cumsum(counts) - counts
    sums = np.add.reduceat(features[order].astype(np.float64), starts, axis=0)
    return (sums / counts[:, None]).astype(np.float32)


def attention_probabilities(
    features: np.ndarray,
    bags: np.ndarray,
    labels: np.ndarray,
    scored: np.ndarray,
    n_classes: int,
    seed: int,
    protocol: AttentionProtocol,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Train gated attention on the bags that are not scored, several times from other seeds, and score the rest.

    Args:
        features: [T, D].
        bags: [T], the bag of each tile, in [0, B).
        labels: [B], class numbers in [0, n_classes).
        scored: [B], bool; these bags' tiles and labels are not touched in training.

    Returns:
        Probabilities [repeats, scored bags, n_classes] in the order of the bags, and the attention of every tile of
        the scored bags, [scored tiles] in the order of the tiles, the mean over repeats.
    """
    learn = ~scored[bags]
    scale = Scale.of(features[learn])
    train = torch.from_numpy(scale(features[learn])).to(device)
    query = torch.from_numpy(scale(features[~learn])).to(device)
    train_bags = _renumbered(bags[learn], ~scored, device)
    query_bags = _renumbered(bags[~learn], scored, device)
    targets = torch.from_numpy(labels[~scored]).to(device)
    probabilities, attentions = [], []
    for repeat in range(protocol.repeats):
        model = fit_attention(train, train_bags, targets, n_classes, hash32(seed, purpose("mil"), repeat), protocol)
        with torch.no_grad():
            logits, attention = model(query, query_bags, int(scored.sum()))
        probabilities.append(logits.softmax(dim=1).cpu().numpy())
        attentions.append(attention.cpu().numpy())
    return np.stack(probabilities), np.mean(attentions, axis=0)


def fit_attention(
    tiles: torch.Tensor,
    bags: torch.Tensor,
    labels: torch.Tensor,
    n_classes: int,
    seed: int,
    protocol: AttentionProtocol,
) -> GatedAttention:
    """Train :class:`GatedAttention` with AdamW under a cosine schedule; return it ready for scoring.

    Args:
        tiles: [T, D], standardized.
        bags: [T], int64, in [0, B).
        labels: [B], int64.
    """
    n_bags = len(labels)
    sizes = torch.bincount(bags, minlength=n_bags)
    rows = torch.argsort(bags, stable=True).split(sizes.tolist())  # the tiles of each bag
    steps = protocol.epochs * -(-n_bags // protocol.bags_per_step)
    devices = [tiles.device] if tiles.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model = GatedAttention(tiles.shape[1], n_classes, protocol).to(tiles.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), protocol.learning_rate, weight_decay=protocol.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(protocol.epochs):
            order = generator(seed, epoch).permutation(n_bags)
            for first in range(0, n_bags, protocol.bags_per_step):
                chosen = order[first : first + protocol.bags_per_step].tolist()
                taken = torch.cat([rows[b] for b in chosen])
                numbers = torch.arange(len(chosen), device=bags.device).repeat_interleave(sizes[chosen])
                logits, _ = model(tiles.index_select(0, taken), numbers, len(chosen))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def _renumbered(bags: np.ndarray, kept: np.ndarray, device: str) -> torch.Tensor:
    """Number the kept bags from 0 without gaps."""
    return torch.from_numpy((np.cumsum(kept) - 1)[bags]).to(device)
