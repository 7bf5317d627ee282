"""How features come out of a network: its input, its class token and patches, several layers, and its fingerprint.

A :class:`Network` is what a source of encoders gives (:mod:`eosin.eval.encoder_sources`); nothing here loads one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eosin.data_tools.errors import UserError
from eosin.ssl.seen import Seen
from eosin.ssl.whole_tiles import preprocess

NO_CLASS = "the model has no class token; give --pooling mean"


@dataclass(frozen=True)
class Network:
    """A model with what it needs around it.

    Attributes:
        name: for tables and plots.
        model: moved to a device and made ready by whoever uses it; None for a plain function.
        identity: what tells this network from others, plain data: at least weights or source.
        prepare: uint8 tiles [B, 3, H, W] -> the model's input.
        read: (input, pooling, layers) -> features [B, D].
        tokens: input -> patch tokens [B, h, w, D], None where these inputs have none.
        default: the pooling that "auto" stands for.
        stain: the stain normalization that came with it (see :func:`~eosin.ssl.stain.normalizer.describe`).
        seen: what its pretraining saw; None where that is not known.
    """

    name: str
    model: nn.Module | None
    identity: dict[str, Any]
    prepare: Callable[[torch.Tensor], torch.Tensor]
    read: Callable[[torch.Tensor, str, int], torch.Tensor]
    tokens: Callable[[torch.Tensor], torch.Tensor | None]
    default: str
    stain: dict[str, Any] | None = None
    seen: Seen | None = None


def timm_network(
    name: str,
    model: nn.Module,
    preprocessing: dict[str, Any],
    stain: dict[str, Any] | None = None,
    seen: Seen | None = None,
) -> Network:
    """The network of a timm model, or of one with the same methods; ``preprocessing`` is of :func:`prepared`."""
    return Network(
        name,
        model,
        {"weights": weights_sha256(model), "preprocessing": preprocessing},
        partial(prepared, **preprocessing),
        partial(read_timm, model),
        lambda images: patch_tokens(model, model.forward_features(images)),  # type: ignore[operator]
        "cls" if _has_class(model) else "mean",
        stain,
        seen,
    )


def prepared(
    tiles: torch.Tensor,
    size: int,
    mean: list[float],
    std: list[float],
    resize: int | None = None,
    interpolation: str = "bicubic",
) -> torch.Tensor:
    """A network's input [B, 3, size, size] of square uint8 tiles: resized (antialiased), center-cropped, standardized.

    Args:
        resize: side to which tiles are brought before ``size`` is cut out of their middle; None for no cut.
        interpolation: "bicubic" or "bilinear".
    """
    side = resize or size
    if interpolation == "bilinear" and tiles.shape[-2:] != (side, side):
        tiles = F.interpolate(tiles.float(), (side, side), mode="bilinear", antialias=True)
    images = preprocess(tiles, side, mean, std)
    first = round((side - size) / 2)
    return images[..., first : first + size, first : first + size]


def read_timm(model: nn.Module, images: torch.Tensor, pooling: str, layers: int) -> torch.Tensor:
    """Features [B, D] of a timm model; ``layers`` > 1: class tokens of its last blocks, as DINOv2's linear evaluation.

    These stand from the first of the blocks to the last, each after the final norm; with pooling "cls+mean" the mean
    of the last block's patches follows. Raises UserError for what the model cannot give.
    """
    if layers == 1:
        return pool(model, model.forward_features(images), pooling)  # type: ignore[operator]
    if not (_has_class(model) and hasattr(model, "forward_intermediates")):
        raise UserError("the model has no blocks with a class token, of which --layers could take several")
    if "cls" not in pooling:
        raise UserError(f"--layers takes class tokens, not --pooling {pooling}; give --pooling cls or cls+mean")
    try:
        found = model.forward_intermediates(  # type: ignore[operator]
            images, indices=layers, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
    except (AssertionError, IndexError):
        raise UserError(f"the model has fewer than {layers} blocks for --layers; give a smaller number") from None
    norm = getattr(model, "fc_norm", nn.Identity())
    parts = [prefix[:, 0] for _, prefix in found] + ([found[-1][0].float().mean(dim=1)] if "mean" in pooling else [])
    return torch.cat([norm(part.float()) for part in parts], dim=1)


def pool(model: nn.Module, tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """Features [B, D] of what a timm model's ``forward_features`` returned, [B, N, D] or a map.

    Raises UserError for a pooling that the model cannot give, and for models of several scales at once.
    """
    if not isinstance(tokens, torch.Tensor):
        raise UserError("the model gives several maps or token lists at once, of which no one is its features")
    if "cls" in pooling and (tokens.dim() != 3 or not _has_class(model)):
        raise UserError(NO_CLASS)
    if tokens.dim() != 3:
        return model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
    # Models built to pool their patches keep the last norm behind the pooling.
    norm = getattr(model, "fc_norm", nn.Identity())
    return pool_tokens(tokens, pooling, _prefix(model), norm)


def pool_tokens(
    tokens: torch.Tensor, pooling: str, prefix: int, norm: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Features [B, D] of tokens [B, prefix + P, D], the class token first; ``norm`` is applied to each part."""
    tokens = tokens.float()  # of reduced precision, a mean of them loses
    parts = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, prefix:].mean(dim=1)}
    found = [parts[part]() for part in pooling.split("+")]
    return torch.cat([norm(part) for part in found] if norm else found, dim=1)


def patch_tokens(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor | None:
    """Patch tokens [B, h, w, D] of what ``forward_features`` returned of square images, None where they make no grid.

    Those of vision transformers come after the last norm; of convolutional networks this is the last map.
    """
    if tokens.dim() == 4:
        return tokens if getattr(model, "output_fmt", "NCHW") == "NHWC" else tokens.permute(0, 2, 3, 1)
    found = grid(tokens, _prefix(model))
    return None if found is None else getattr(model, "fc_norm", nn.Identity())(found)


def grid(tokens: torch.Tensor, prefix: int) -> torch.Tensor | None:
    """Tokens [B, prefix + P, D] as [B, h, w, D], None where P is no square number or 0."""
    side = math.isqrt(tokens.shape[1] - prefix)
    if tokens.dim() != 3 or not side or side * side != tokens.shape[1] - prefix:
        return None
    return tokens[:, prefix:].unflatten(1, (side, side))


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights; a run and its release have the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _has_class(model: nn.Module) -> bool:
    """Whether a timm model's first token is a class token; it can have registers alone."""
    return bool(getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None))


def _prefix(model: nn.Module) -> int:
    return getattr(model, "num_prefix_tokens", int(_has_class(model)))
