"""Encoders: tiles in, features out, with a fingerprint that says exactly what made them.

    run folder       the newest checkpoint's teacher, with the run's input size, colors and stain normalization
    release folder   timm's config.json and model.safetensors, with preprocessing.json where the model has one
    random:FOLDER    the same network and preprocessing with untrained weights: what the architecture alone is worth
    timm:NAME        any timm model; random weights unless pretrained ones are asked for
    color            twelve color statistics: what color alone is worth

Weights load in full or not at all; nothing here trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eosin.data_tools.draws import purpose
from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import read_json
from eosin.ssl.whole_tiles import preprocess

POOLINGS = ("cls", "mean", "cls+mean")
KINDS = "a run folder, a release folder, random:FOLDER, timm:NAME or color"
INIT_SEED = purpose("random encoder")


@dataclass(frozen=True)
class Encoder:
    """A function from tiles to features.

    Attributes:
        name: for tables and plots.
        fingerprint: plain data; equal fingerprints give equal features on one device.
        stain: the stain normalization that tiles need first, None for none
            (see :func:`~eosin.ssl.stain.normalizer.describe`).
        device: where tiles must be.
        function: uint8 tiles [B, 3, H, W] -> features [B, D].
    """

    name: str
    fingerprint: dict[str, Any]
    stain: dict[str, Any] | None
    device: torch.device
    function: Callable[[torch.Tensor], torch.Tensor]

    @torch.inference_mode()
    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """Features [B, D], float32, of stain-normalized uint8 tiles [B, 3, H, W]."""
        return self.function(tiles).float()


def load_encoder(
    encoder: str, *, pooling: str = "cls", pretrained: bool = False, device: torch.device | str = "cpu"
) -> Encoder:
    """Load the encoder named by ``encoder``, one of the forms in this module's docstring.

    Args:
        pooling: "cls" (class token), "mean" (of patch tokens; of the whole map for models without tokens) or
            "cls+mean" (both, concatenated).
        pretrained: for ``timm:NAME``, use timm's released weights.

    Raises:
        UserError: no such encoder, weights that do not fit, or a pooling that the model cannot give.
    """
    device = torch.device(device)
    kind, _, rest = encoder.partition(":")
    if encoder == "color":
        fingerprint = {"name": "color", "statistics": "mean, deviation, 10th and 90th percentile of R, G and B"}
        return Encoder("color", fingerprint, None, device, color_statistics)
    if kind == "timm":
        return _timm_encoder(rest, pooling, pretrained, device)
    if kind == "random":
        return _folder_encoder(Path(rest), pooling, device, trained=False)
    return _folder_encoder(Path(encoder), pooling, device, trained=True)


def pick_device(name: str) -> torch.device:
    """The device of ``--device``: "auto" is the GPU where there is one. Raises UserError for one that is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"there is no device '{name}' here; give --device auto, cpu or cuda") from None
    return device


def color_statistics(tiles: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, 10th and 90th percentile of R, G and B of uint8 tiles [B, 3, H, W]: [B, 12] in [0, 1].

    A percentile is the smallest value that at least that share of the pixels does not exceed.
    """
    values = tiles.flatten(2).flatten(0, 1).long()  # [B·3, H·W]
    rows = torch.arange(len(values), device=tiles.device).unsqueeze(1)
    counts = torch.bincount((values + 256 * rows).flatten(), minlength=256 * len(values)).view(len(values), 256)
    shares = counts.double() / values.shape[1]
    level = torch.arange(256, device=tiles.device, dtype=torch.float64)
    mean = shares @ level
    deviation = ((level - mean.unsqueeze(1)).square() * shares).sum(dim=1).sqrt()
    reached = counts.cumsum(dim=1)
    percentiles = [(reached < q * values.shape[1]).sum(dim=1) for q in (0.1, 0.9)]
    statistics = torch.stack([mean, deviation, *percentiles]) / 255  # [4, B·3]
    return statistics.view(4, len(tiles), 3).transpose(0, 1).flatten(1)


def pool(model: nn.Module, tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """Features [B, D] of what a timm model's ``forward_features`` returned, [B, N, D] or a map."""
    prefix = getattr(model, "num_prefix_tokens", 0) if tokens.dim() == 3 else 0
    if "cls" in pooling and not prefix:
        raise UserError("the model has no class token; give --pooling mean")
    if tokens.dim() != 3:
        return model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
    # Models built to pool their patches keep the last norm behind the pooling.
    norm = getattr(model, "fc_norm", nn.Identity())
    parts = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, prefix:].mean(dim=1)}
    return torch.cat([norm(parts[part]()) for part in pooling.split("+")], dim=1)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights; a run and its release have the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _timm_encoder(name: str, pooling: str, pretrained: bool, device: torch.device) -> Encoder:
    import timm
    from timm.data import resolve_model_data_config

    base = name.split(".")[0]
    if not timm.is_model(base):
        raise UserError(f"timm has no model '{name}'; {nearest(base, timm.list_models())}")
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(INIT_SEED)
            model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"timm cannot load '{name}'{' with pretrained weights' if pretrained else ''}: {_short(error)}"
        ) from None
    found = resolve_model_data_config(model)
    preprocessing = {"size": found["input_size"][-1], "mean": list(found["mean"]), "std": list(found["std"])}
    title = f"timm:{name}" if pretrained else f"random:{name}"
    return _model_encoder(title, model, preprocessing, None, pooling, device)


def _folder_encoder(folder: Path, pooling: str, device: torch.device, *, trained: bool) -> Encoder:
    if (folder / "config.yaml").is_file():
        model, preprocessing, stain = _load_run(folder, trained)
    elif (folder / "config.json").is_file():
        model, preprocessing, stain = _load_release(folder, trained)
    else:
        what = "holds neither config.yaml (a run) nor config.json (a release)" if folder.is_dir() else "does not exist"
        raise UserError(f"no encoder '{folder}': the folder {what}; give {KINDS}")
    name = folder.resolve().name
    return _model_encoder(name if trained else f"random:{name}", model, preprocessing, stain, pooling, device)


def _load_run(run: Path, trained: bool) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    """A run's backbone. Untrained, it holds the random weights that training begins with where it has no init_from."""
    from eosin.ssl.backbone import build_backbone
    from eosin.ssl.checkpoint import TEACHER, latest, load_teacher
    from eosin.ssl.config import read_run_config
    from eosin.ssl.stain.normalizer import describe_run

    config = read_run_config(run)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.run.seed)
        model = build_backbone(config)
    if trained:
        load_teacher(latest(run) / TEACHER, model)
    preprocessing = {"size": config.crops.global_size, "mean": config.augment.mean, "std": config.augment.std}
    return model, preprocessing, describe_run(run, config.stain)


def _load_release(folder: Path, trained: bool) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    import timm

    from eosin.ssl.checkpoint import load_teacher

    config = read_json(folder / "config.json", "timm's description of a model")
    try:
        arguments = {"num_classes": config["num_classes"]} | config.get("model_args", {})
        with torch.random.fork_rng([]):
            torch.manual_seed(INIT_SEED)
            model = timm.create_model(config["architecture"], **arguments)
        found = config["pretrained_cfg"]
        preprocessing = {"size": found["input_size"][-1], "mean": found["mean"], "std": found["std"]}
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} has no key {error}; it does not describe a timm model") from None
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"timm cannot build the model of {folder / 'config.json'}: {_short(error)}") from None
    if trained:
        load_teacher(folder / "model.safetensors", model)
    model.reset_classifier(0)  # type: ignore[operator]
    return model, preprocessing, _release_stain(folder / "preprocessing.json")


def _release_stain(path: Path) -> dict[str, Any] | None:
    """The stain normalization of a release; folders of other makers have none."""
    from eosin.ssl.stain.normalizer import read_normalization

    stain = read_json(path, "the preprocessing of a release").get("stain") if path.is_file() else None
    return None if stain is None else read_normalization(stain, path)


def _model_encoder(
    name: str,
    model: nn.Module,
    preprocessing: dict[str, Any],
    stain: dict[str, Any] | None,
    pooling: str,
    device: torch.device,
) -> Encoder:
    model = model.eval().requires_grad_(False)
    fingerprint = {
        "name": name,
        "weights": weights_sha256(model),
        "preprocessing": preprocessing,
        "stain": stain["mode"] if stain else "off",
        "normalizer": stain,
        "pooling": pooling,
    }
    model = model.to(device)

    def function(tiles: torch.Tensor) -> torch.Tensor:
        return pool(model, model.forward_features(preprocess(tiles, **preprocessing)), pooling)  # type: ignore[operator]

    function(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device))  # refuses an impossible pooling early
    return Encoder(name, fingerprint, stain, device, function)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
