"""The backbone: timm's VisionTransformer, with a block that runs crops of several sizes in one pass.

A packed pass concatenates the tokens of all crops for everything that works token by token (norms, linear layers) and
splits them by crop size for attention only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import create_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from eosin.data_tools.draws import purpose, uniform
from eosin.data_tools.errors import UserError
from eosin.ssl.config import Config, Model

DROP_PATH = purpose("drop path")


@dataclass
class Layout:
    """How packed tokens divide into crops.

    Attributes:
        groups: (crops, tokens a crop) for each crop size, in order.
        keys: [crops in all] int64, each crop's key for drop path.
        rate: drop path rate; 0 outside training.
    """

    groups: list[tuple[int, int]]
    keys: torch.Tensor
    rate: float

    def keep(self, block: int, branch: int) -> torch.Tensor | None:
        """Factor of each token for one residual branch, [1, T, 1]: 0 for dropped crops, 1 / (1 - rate) for others."""
        if self.rate == 0:
            return None
        kept = (uniform(self.keys, block, branch, DROP_PATH) >= self.rate).float() / (1 - self.rate)
        tokens = torch.tensor([t for n, t in self.groups for _ in range(n)], device=self.keys.device)
        return kept.repeat_interleave(tokens, output_size=sum(n * t for n, t in self.groups)).view(1, -1, 1)


class PackedBlock(Block):
    """timm's transformer block; with a layout, its input [1, T, D] holds the tokens of many crops."""

    def __init__(self, dim: int, *, depth: int = 0, **kwargs: Any) -> None:
        super().__init__(dim, depth=depth, **kwargs)
        self.depth = depth

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        layout: Layout | None = None,
    ) -> torch.Tensor:
        """Plain timm without a layout; with one, a packed pass over its crops."""
        if layout is None:
            return super().forward(x, attn_mask, is_causal)
        x = x + _scaled(self.ls1(self._attend(self.norm1(x), layout)), layout.keep(self.depth, 0))
        return x + _scaled(self.ls2(self.mlp(self.norm2(x))), layout.keep(self.depth, 1))

    def _attend(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        attn: Any = self.attn
        qkv = attn.qkv(x[0]).view(-1, 3, attn.num_heads, attn.head_dim)  # [T, 3, H, D/H]
        outputs = []
        for part, (crops, tokens) in zip(qkv.split([n * t for n, t in layout.groups]), layout.groups):
            q, k, v = part.view(crops, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
            outputs.append(out.transpose(1, 2).reshape(crops * tokens, attn.attn_dim))
        return attn.proj(attn.norm(torch.cat(outputs))).unsqueeze(0)


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
        arguments["block_fn"] = PackedBlock
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
    backbone: VisionTransformer, groups: list[torch.Tensor], keys: torch.Tensor, rate: float
) -> list[torch.Tensor]:
    """Run embedded tokens of several crop sizes through all blocks in one packed pass.

    Args:
        groups: [n_i, t_i, D] for each crop size.
        keys: [sum of n_i] int64.

    Returns:
        Normalized tokens, in the shapes of ``groups``.
    """
    layout = Layout([(len(g), g.shape[1]) for g in groups], keys, rate)
    x = torch.cat([g.flatten(0, 1) for g in groups]).unsqueeze(0)  # [1, T, D]
    for block in backbone.blocks:
        x = block(x, layout=layout)
    x = backbone.norm(x)[0]
    parts = x.split([n * t for n, t in layout.groups])
    return [part.view(n, t, -1) for part, (n, t) in zip(parts, layout.groups)]


def _scaled(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return x if factor is None else x * factor.to(x.dtype)
