"""The backbone: timm's VisionTransformer, with a block that runs crops of several sizes in one pass.

A packed pass concatenates the tokens of all crops for everything that works token by token (norms, linear layers) and
splits them by crop size for attention only. Drop path takes the crops it drops out of a branch, which saves their work.
The last block finishes only the tokens that are wanted: after its attention, no token learns from another.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models import create_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.errors import UserError
from eosin.ssl.attention import BACKENDS, Attend, Groups
from eosin.ssl.config import Config, Model

DROP_PATH = purpose("drop path")


class Kept(NamedTuple):
    """The crops that one residual branch works on: the others are dropped by drop path, and cost nothing.

    Attributes:
        groups: (crops, tokens a crop) for each crop size.
        tokens: [T'] int64, where their tokens are among all; None for all of them.
        scale: what the branch's result is multiplied by, so that its mean stays.
    """

    groups: Groups
    tokens: torch.Tensor | None
    scale: float


class Wanted(NamedTuple):
    """The tokens that the last block finishes, W of them, and what its branches do for them.

    Attributes:
        tokens: [W] int64, where they are among all.
        rows: [R] int64, where those whose crops attention keeps are among the tokens that it works on.
        attended, mapped: [R], [R'] int64, where those whose crops attention or the MLP keeps are among the W; None for
            all of them.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    attended: torch.Tensor | None
    mapped: torch.Tensor | None


def keep_all(groups: Groups, blocks: int) -> list[tuple[Kept, Kept]]:
    """Both branches of every block on all crops."""
    kept = Kept(groups, None, 1.0)
    return [(kept, kept)] * blocks


def drop_path(groups: Groups, keys: torch.Tensor, rate: float, blocks: int) -> list[tuple[Kept, Kept]]:
    """The crops that each block's two branches work on: each is dropped with probability ``rate``, by its own key.

    The rate is the same in every block, as in DINOv2, where a fixed share of the batch is dropped; here a crop's drops
    depend on itself alone.

    Args:
        groups: (crops, tokens a crop) for each crop size, in order.
        keys: [crops in all] int64.
    """
    if rate == 0:
        return keep_all(groups, blocks)
    places = torch.arange(2 * blocks, device=keys.device).unsqueeze(1)
    # One transfer for all blocks: how many crops are kept decides shapes.
    kept = (uniform(keys, places // 2, places % 2, DROP_PATH) >= rate).cpu()  # [2 · blocks, crops]
    lengths = torch.tensor([t for n, t in groups for _ in range(n)])
    starts = lengths.cumsum(0) - lengths
    sizes = [n for n, _ in groups]
    branches = []
    for row in kept:
        counts = [int(part.sum()) for part in row.split(sizes)]
        own, length = starts[row], lengths[row]
        first = (length.cumsum(0) - length).repeat_interleave(length)
        tokens = own.repeat_interleave(length) + torch.arange(int(length.sum())) - first
        some = [(n, t) for n, (_, t) in zip(counts, groups)]
        branches.append(Kept(some, tokens.to(keys.device, non_blocking=True), 1 / (1 - rate)))
    return list(zip(branches[::2], branches[1::2]))


def finish(tokens: torch.Tensor, kept: tuple[Kept, Kept]) -> Wanted:
    """What the last block, whose branches work on the crops ``kept``, does for no more than ``tokens``, [W] int64."""

    def among(all_kept: torch.Tensor | None) -> torch.Tensor | None:
        return None if all_kept is None else torch.isin(tokens, all_kept).nonzero().squeeze(1)

    reads, maps = (branch.tokens for branch in kept)
    attended = among(reads)
    # Kept tokens are in ascending order.
    rows = tokens if reads is None else torch.searchsorted(reads, tokens[attended])
    return Wanted(tokens, rows, attended, among(maps))


class PackedBlock(Block):
    """timm's transformer block; with ``kept``, its input [1, T, D] holds the tokens of many crops."""

    def __init__(self, *args: Any, attend: Attend, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attend = attend

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        kept: tuple[Kept, Kept] | None = None,
        wanted: Wanted | None = None,
    ) -> torch.Tensor:
        """Plain timm without ``kept``; with it, a packed pass whose two branches work on the crops kept.

        With ``wanted``, the result is of those tokens only, [1, W, D].
        """
        if kept is None:
            return super().forward(x, attn_mask, is_causal)
        attn: Any = self.attn
        first, second = kept
        reads, maps = first.tokens, second.tokens
        change = self._attend(self.norm1(_some(x, reads)), first.groups)
        if wanted is not None:
            x, change = _some(x, wanted.tokens), _some(change, wanted.rows)
            reads, maps = wanted.attended, wanted.mapped
        x = _plus(x, reads, self.ls1(attn.proj(attn.norm(change))), first.scale)
        return _plus(x, maps, self.ls2(self.mlp(self.norm2(_some(x, maps)))), second.scale)

    def _attend(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        attn: Any = self.attn
        q, k, v = attn.qkv(x[0]).view(-1, 3, attn.num_heads, attn.head_dim).unbind(1)  # [T, H, C]
        return self.attend(attn.q_norm(q), attn.k_norm(k), v, groups).flatten(1).unsqueeze(0)


def _some(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """Some tokens of ``x``, [1, T, D], or all."""
    return x if tokens is None else x.index_select(1, tokens)


def _plus(x: torch.Tensor, tokens: torch.Tensor | None, change: torch.Tensor, scale: float) -> torch.Tensor:
    """``x``, [1, T, D], plus the change of some of its tokens, or of all."""
    return x + change if tokens is None else x.index_add(1, tokens, change.to(x.dtype), alpha=scale)


def model_arguments(model: Model) -> dict[str, Any]:
    """Arguments that rebuild the plain timm model of a configuration: ``create_model(**model_arguments(m))``."""
    return {"model_name": model.architecture, "num_classes": 0, "dynamic_img_size": True} | model.args


def build_backbone(config: Config, *, packed: bool = False) -> VisionTransformer:
    """Build the backbone of a configuration, randomly initialized by torch's generator.

    Args:
        packed: build it of :class:`PackedBlock`, for training; the weights' names are the same.

    Raises:
        UserError: timm does not know the architecture or one of ``model.args``.
    """
    arguments = {"img_size": config.crops.global_size} | model_arguments(config.model)
    if packed:
        arguments["block_fn"] = partial(PackedBlock, attend=BACKENDS[config.run.attention])
    try:
        backbone = create_model(**arguments)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise UserError(
            f"model: timm cannot build '{config.model.architecture}' with args {config.model.args}: "
            f"{str(error).splitlines()[0] if str(error) else 'an assertion failed'}"
        ) from None
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"model.architecture: '{config.model.architecture}' is not one of timm's VisionTransformers")
    return backbone


def embed(
    backbone: VisionTransformer, images: torch.Tensor, mask: torch.Tensor | None, token: nn.Parameter
) -> torch.Tensor:
    """Tokens that enter the blocks, [N, prefix + P, D].

    Patches where ``mask``, [N, P], is true are replaced by ``token``, [D].
    """
    x = backbone.patch_embed(images)  # [N, H, W, D]
    if mask is not None:
        x = torch.where(mask.view(*x.shape[:3], 1), token.to(x.dtype), x)
    # timm adds prefix tokens and interpolated positions in this one method and offers no public name for it.
    return backbone.norm_pre(backbone._pos_embed(x))


def packed_features(
    backbone: VisionTransformer, groups: list[torch.Tensor], keys: torch.Tensor, rate: float, wanted: torch.Tensor
) -> torch.Tensor:
    """Run embedded tokens of several crop sizes through all blocks in one packed pass.

    Args:
        groups: [n_i, t_i, D] for each crop size; their tokens, T in all, are numbered in this order.
        keys: [sum of n_i] int64.
        wanted: [W] int64 in [0, T), each once: the tokens to return.

    Returns:
        Normalized tokens, [W, D].
    """
    sizes = [(len(g), g.shape[1]) for g in groups]
    x = torch.cat([g.flatten(0, 1) for g in groups]).unsqueeze(0)  # [1, T, D]
    *before, last = drop_path(sizes, keys, rate, len(backbone.blocks))
    finished = finish(wanted, last)  # before the blocks, since a GPU is waited for
    for block, kept in zip(backbone.blocks, before):
        x = block(x, kept=kept)
    return backbone.norm(backbone.blocks[-1](x, kept=last, wanted=finished))[0]
