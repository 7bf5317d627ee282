"""Encoders of the user's own code: ``module:function``, any Python function that makes one.

The function takes nothing and returns one of
    a function   uint8 tiles [B, 3, H, W] -> features [B, D]
    a module     a timm model gets its own preprocessing, any other module the same tiles as a function
    (model, transform)   ``transform`` makes a tensor of one PIL image, as timm's and torchvision's do
The module named on the command line is imported, from the working directory too; nothing else here runs foreign code.
What such a function does beside its weights and its own source file cannot be seen, so it is not in the fingerprint.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import sha256
from eosin.eval.encoder_sources import short, timm_preprocessing
from eosin.eval.features import Network, patch_tokens, prepared, read_timm, weights_sha256

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
CONTRACT = "it takes uint8 tiles [B, 3, H, W] and gives features [B, D]"


def is_code(encoder: str) -> bool:
    """Whether ``encoder`` has the form ``module:function``."""
    return NAME.fullmatch(encoder) is not None


def from_code(encoder: str) -> Network:
    """The network that a user's function makes.

    Raises:
        UserError: no such module or function, an error in it, or a result that is no encoder.
    """
    made = _made(encoder)
    model, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(model) or not (transform is None or callable(transform)):
        raise UserError(
            f"'{encoder}' returned {_kind(made)}; an encoder is a function, a module or (model, transform): {CONTRACT}"
        )
    module = model if isinstance(model, nn.Module) else None
    like_timm = module is not None and hasattr(module, "forward_features") and hasattr(module, "forward_head")
    identity: dict[str, Any] = {"source": _source_sha256(encoder)}
    if module is not None:
        identity["weights"] = weights_sha256(module)
    prepare: Callable[[torch.Tensor], torch.Tensor] = _as_they_are
    if transform is not None:
        # A function in it shows its address, which differs each time.
        identity["preprocessing"] = {"transform": re.sub(r" at 0x[0-9a-f]+", "", str(transform))}
        prepare = partial(_transformed, encoder, transform)
    elif like_timm and getattr(module, "pretrained_cfg", None):
        identity["preprocessing"] = timm_preprocessing(module)  # type: ignore[arg-type]
        prepare = partial(prepared, **identity["preprocessing"])

    dimensions: set[int] = set()

    def read(images: torch.Tensor, pooling: str, layers: int) -> torch.Tensor:
        if pooling == "own" and layers == 1:
            with blamed(encoder):
                features = _checked(encoder, model(images), len(images))
            dimensions.add(features.shape[1])
            if len(dimensions) > 1:
                raise UserError(f"'{encoder}' gave features of {sorted(dimensions)} numbers; all must have as many")
            return features
        if not like_timm:
            raise UserError(f"--pooling and --layers need a timm model; '{encoder}' decides that itself")
        with blamed(encoder):
            return read_timm(module, images, "cls" if pooling == "own" else pooling, layers)  # type: ignore[arg-type]

    def tokens(images: torch.Tensor) -> torch.Tensor | None:
        with blamed(encoder):
            return patch_tokens(module, module.forward_features(images)) if like_timm else None  # type: ignore

    return Network(encoder, module, identity, prepare, read, tokens, "own")


@contextlib.contextmanager
def blamed(encoder: str) -> Iterator[None]:
    """Say in one line that an error is of the user's code, and where in it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # a batch that is too large is mended by whoever chose its size
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = ([frame for frame in frames if frame.filename == _file(encoder)] or frames)[-1]
        raise UserError(
            f"'{encoder}' failed with {type(error).__name__}: {short(error)} "
            f"({Path(place.filename).name} line {place.lineno}); {CONTRACT}"
        ) from None


def _made(encoder: str) -> Any:
    name, _, attribute = encoder.partition(":")
    if name.endswith(".py"):
        raise UserError(f"no encoder '{encoder}': a module goes without its ending; give {name[:-3]}:{attribute}")
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109 - entries are text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        with blamed(encoder):
            module = importlib.import_module(name)
    except UserError as error:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise UserError(
                f"no encoder '{encoder}': there is no Python module '{name}' in the working directory or installed"
            ) from None
        raise error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"module '{name}' has no function '{attribute}'; {nearest(attribute, known)}")
    with blamed(encoder):
        return function()


def _source_sha256(encoder: str) -> str:
    """SHA-256 of the module's file; of one without a file, of its name."""
    file = _file(encoder)
    return sha256(file) if file else encoder


def _file(encoder: str) -> str | None:
    return getattr(sys.modules.get(encoder.partition(":")[0]), "__file__", None)


def _as_they_are(tiles: torch.Tensor) -> torch.Tensor:
    return tiles


def _transformed(encoder: str, transform: Callable[[Any], torch.Tensor], tiles: torch.Tensor) -> torch.Tensor:
    from PIL import Image

    with blamed(encoder):
        pictures = [Image.fromarray(tile) for tile in tiles.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.stack([transform(picture) for picture in pictures]).to(tiles.device)


def _checked(encoder: str, features: Any, count: int) -> torch.Tensor:
    fits = isinstance(features, torch.Tensor) and features.dim() == 2 and len(features) == count
    if not fits or not features.shape[1] or features.is_complex():
        raise UserError(f"'{encoder}' gave {_kind(features)} for {count} tiles; {CONTRACT}")
    return features


def _kind(value: Any) -> str:
    return f"a tensor of {list(value.shape)}" if isinstance(value, torch.Tensor) else f"'{type(value).__name__}'"
