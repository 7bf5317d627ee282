"""Encoders: tiles in, features out, with a fingerprint that says exactly what made them.

    run folder       the newest checkpoint's teacher, with the run's input size, colors and stain normalization
    RUN@STEP         the same of another checkpoint that is still there
    release folder   timm's config.json and model.safetensors, with preprocessing.json where the model has one
    random:FOLDER    the same network and preprocessing with untrained weights: what the architecture alone is worth
    timm:NAME        any timm model; random weights unless pretrained ones are asked for
    torchvision:NAME the same of torchvision's classifiers
    hf-hub:OWNER/NAME  a timm model or a release on the Hugging Face Hub, with its weights
    module:function  what a function of the user's own makes, see :mod:`eosin.eval.encoder_code`
    color            twelve color statistics: what color alone is worth

Features are float32 whatever the precision: a reduced one costs no more than it must, and probes compute in float32.
Weights load in full or not at all; nothing here trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eosin.data_tools.errors import UserError
from eosin.eval.color import color_statistics
from eosin.eval.encoder_code import from_code, is_code
from eosin.eval.encoder_hub import from_hub
from eosin.eval.encoder_sources import from_folder, from_timm, from_torchvision, short
from eosin.eval.features import Network, weights_sha256
from eosin.ssl.seen import NOTHING, Seen

__all__ = ["PRECISIONS", "Encoder", "color_statistics", "load_encoder", "pick_device", "weights_sha256"]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE = 8  # pixels, of the black tile by which a network shows what it can give


@dataclass(frozen=True)
class Encoder:
    """A function from tiles to features.

    Attributes:
        name: for tables and plots.
        fingerprint: plain data; equal fingerprints give equal features on one device, but for what a function of the
            user's own does outside its weights and source file.
        stain: the stain normalization that tiles need first, None for none
            (see :func:`~eosin.ssl.stain.normalizer.describe`).
        device: where tiles must be.
        function: uint8 tiles [B, 3, H, W] -> features [B, D].
        tokens: uint8 tiles [B, 3, H, W] -> patch tokens [B, h, w, D], float32, after the last norm and without the
            class token and registers; of a convolutional network its last map. None where there are none.
        seen: what pretraining saw; None where that is not known.
    """

    name: str
    fingerprint: dict[str, Any]
    stain: dict[str, Any] | None
    device: torch.device
    function: Callable[[torch.Tensor], torch.Tensor]
    tokens: Callable[[torch.Tensor], torch.Tensor] | None = None
    seen: Seen | None = None

    @torch.inference_mode()
    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """Features [B, D], float32, of stain-normalized uint8 tiles [B, 3, H, W]."""
        return self.function(tiles).float()


def load_encoder(
    encoder: str,
    *,
    pooling: str = "auto",
    layers: int = 1,
    pretrained: bool = False,
    precision: str = "auto",
    stain: str | None = None,
    device: torch.device | str = "cpu",
    name: str | None = None,
) -> Encoder:
    """Load the encoder named by ``encoder``, one of the forms in this module's docstring.

    Args:
        pooling: "cls" (class token), "mean" (of patch tokens; of the whole map for models without tokens), "cls+mean"
            (both, concatenated), or "auto": the class token where there is one, else the mean; of a function of the
            user's own, what it gives.
        layers: the class tokens of so many last blocks, concatenated (timm's models; as DINOv2's linear evaluation).
        pretrained: for ``timm:NAME`` and ``torchvision:NAME``, use released weights.
        precision: of the network, one of PRECISIONS; "auto" is bf16 on a GPU and else fp32.
        stain: "tile" or "slide": Macenko's normalization to Eosin's reference, "off", or None: what the encoder
            itself asks for.
        name: for tables and plots, in place of the encoder's own.

    Raises:
        UserError: no such encoder, weights that do not fit, or a pooling that the model cannot give.
    """
    device = torch.device(device)
    if layers < 1:
        raise UserError(f"--layers {layers} is not a number of blocks; give 1 or more")
    if encoder == "color":
        fingerprint = {"name": name or "color", "statistics": "mean, deviation, 10th and 90th percentile of R, G and B"}
        own = _stain(stain, None, encoder)
        fingerprint |= _stain_fingerprint(own) if own else {}
        return Encoder(name or "color", fingerprint, own, device, color_statistics, seen=NOTHING)
    network = _network(encoder, pretrained)
    network = replace(network, name=name) if name else network
    return _encoder(network, pooling, layers, precision, stain, device)


def pick_device(name: str) -> torch.device:
    """The device of ``--device``: "auto" is the GPU where there is one. Raises UserError for one that is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # which "meta" cannot
    except (RuntimeError, AssertionError):
        raise UserError(f"there is no device '{name}' here; give --device auto, cpu or cuda") from None
    return device


def _network(encoder: str, pretrained: bool) -> Network:
    kind, _, rest = encoder.partition(":")
    if kind == "timm":
        return from_timm(rest, pretrained)
    if kind == "torchvision":
        return from_torchvision(rest, pretrained)
    if kind == "hf-hub":
        return from_hub(rest)
    if kind == "random":
        return from_folder(Path(rest), trained=False)
    if kind == "precomputed":
        raise UserError(f"'{encoder}' is features, not an encoder; 'eosin embed {encoder} --out E.safetensors'")
    if is_code(encoder) and not Path(encoder).exists():
        return from_code(encoder)
    run, _, number = encoder.rpartition("@")
    at_step = number.isascii() and number.isdigit() and not Path(encoder).exists()
    folder, step = (Path(run), int(number)) if at_step else (Path(encoder), None)
    return from_folder(folder, trained=True, step=step)


def _encoder(
    network: Network, pooling: str, layers: int, precision: str, stain: str | None, device: torch.device
) -> Encoder:
    if network.model is not None:
        network.model.eval().requires_grad_(False).to(device)
    pooling = network.default if pooling == "auto" else pooling
    if precision == "auto":  # functions of the user's own choose theirs
        precision = "bf16" if device.type == "cuda" and network.model is not None else "fp32"
    normalization = _stain(stain, network.stain, network.name)
    fingerprint = {
        "name": network.name,
        **network.identity,
        **_stain_fingerprint(normalization),
        "pooling": pooling,
        "precision": precision,
    } | ({"layers": layers} if layers > 1 else {})

    def run(what: Callable[..., Any], tiles: torch.Tensor, *options: Any) -> Any:
        images = network.prepare(tiles)
        dtype = PRECISIONS[precision]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return what(images, *options)

    def function(tiles: torch.Tensor) -> torch.Tensor:
        return run(network.read, tiles, pooling, layers)

    @torch.inference_mode()
    def tokens(tiles: torch.Tensor) -> torch.Tensor:
        found = run(network.tokens, tiles)
        if found is None:
            raise UserError(f"'{network.name}' has no grid of patch tokens")
        return found.float()

    gives_tokens = True
    if "source" not in network.identity:  # code of the user's own may take tiles of one size only
        black = torch.zeros(1, 3, PROBE, PROBE, dtype=torch.uint8, device=device)
        try:
            with torch.inference_mode():
                function(black)  # refuses an impossible pooling early
                gives_tokens = run(network.tokens, black) is not None
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"'{network.name}' cannot be run on its own input size: {short(error)}") from None
    elif network.model is None:
        gives_tokens = False
    return Encoder(
        network.name,
        fingerprint,
        normalization,
        device,
        function,
        tokens if gives_tokens else None,
        network.seen,
    )


def _stain(asked: str | None, own: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """The stain normalization to use: the encoder's own where none is asked for."""
    from eosin.ssl.config import Stain
    from eosin.ssl.stain.normalizer import describe

    if asked is None:
        return own
    if own is not None:
        raise UserError(f"'{name}' comes with its own stain normalization; leave --stain {asked} out")
    return describe(Stain.model_validate({"normalize": asked}))


def _stain_fingerprint(stain: dict[str, Any] | None) -> dict[str, Any]:
    return {"stain": stain["mode"] if stain else "off", "normalizer": stain}
