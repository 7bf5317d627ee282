"""Where encoders come from: folders of runs and releases, timm and torchvision. The Hub is in ``encoder_hub``.

Each gives a :class:`~eosin.eval.features.Network` whose input is made as the model's makers say: of a run or release
the whole tile, of timm and torchvision their resizing and center crop. Weights load in full or not at all.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eosin.data_tools.draws import purpose
from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import read_json
from eosin.eval.features import NO_CLASS, Network, grid, pool_tokens, prepared, timm_network, weights_sha256
from eosin.ssl.seen import NOTHING, read_seen

INIT_SEED = purpose("random encoder")
INTERPOLATIONS = ("bicubic", "bilinear")
LARGEST = 4096  # pixels, of a release's input


def from_folder(folder: Path, *, trained: bool, step: int | None = None) -> Network:
    """The network of a run's or a release's folder; with ``trained`` false, the same one without training.

    Args:
        step: of a run's checkpoint, None for the newest.

    Raises:
        UserError: neither a run nor a release, no such checkpoint, or weights that do not fit.
    """
    if (folder / "config.yaml").is_file():
        model, preprocessing, stain = _load_run(folder, trained, step)
    elif (folder / "config.json").is_file() and step is None:
        model, preprocessing, stain = _load_release(folder, trained)
    else:
        what = "holds neither config.yaml (a run) nor config.json (a release)" if folder.is_dir() else "does not exist"
        raise UserError(
            f"no encoder '{folder}': the folder {what}; give a run folder, a release folder, random:FOLDER, "
            "timm:NAME, hf-hub:OWNER/NAME, torchvision:NAME, module:function, precomputed:PATH or color"
        )
    name = folder.resolve().name + ("" if step is None else f"@{step}")
    if not trained:
        return timm_network(f"random:{name}", model, preprocessing, stain, NOTHING)
    return timm_network(name, model, preprocessing, stain, read_seen(folder))


def from_timm(name: str, pretrained: bool) -> Network:
    """The network of a timm model, with random weights that are always the same, or its released ones."""
    import timm

    from eosin.eval.encoder_hub import reached

    base = name.split(".")[0]
    if not timm.is_model(base):
        raise UserError(f"timm has no model '{name}'; {nearest(base, timm.list_models())}")
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(INIT_SEED)
            if pretrained:
                with reached(f"timm's pretrained '{name}'"):
                    # With its classifier, since timm forgives missing weights where that differs.
                    model = timm.create_model(name, pretrained=True)
                model.reset_classifier(0)  # type: ignore[operator]
            else:
                model = timm.create_model(name, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"timm cannot load '{name}'{' with pretrained weights' if pretrained else ''}: {short(error)}"
        ) from None
    title = f"timm:{name}" if pretrained else f"random:{name}"
    return timm_network(title, model, timm_preprocessing(model), seen=None if pretrained else NOTHING)


def from_torchvision(name: str, pretrained: bool) -> Network:
    """The network of a torchvision classifier: what its last linear layer receives.

    Args:
        name: such as ``resnet50``, or ``resnet50.IMAGENET1K_V1`` for other weights than the newest.
    """
    from torchvision import models

    base, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if base not in known:
        raise UserError(f"torchvision has no classifier '{base}'; {nearest(base, known)}")
    sets = models.get_model_weights(base)
    if tag and tag not in sets.__members__:
        raise UserError(f"torchvision has no weights '{tag}' of '{base}'; valid: {', '.join(sets.__members__)}")
    weights = sets[tag or "DEFAULT"]
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(INIT_SEED)
            model = models.get_model(base, weights=weights if pretrained else None)
    except (RuntimeError, OSError) as error:
        raise UserError(f"torchvision cannot load the weights of '{name}': {short(error)}; connect") from None
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"torchvision's '{base}' has no linear layer whose input could be features")
    parent, _, last = linear[-1].rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    found = weights.transforms()
    preprocessing = {"size": found.crop_size[0], "mean": found.mean, "std": found.std, "resize": found.resize_size[0]}
    preprocessing = _plain(preprocessing, found.interpolation.value)
    transformer = isinstance(model, models.VisionTransformer)
    # Where tokens are seen: what comes out of a transformer, or into the pooling of the last map.
    place = model.encoder if transformer else getattr(model, "avgpool", None)

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen: list[torch.Tensor] = []
        hook = place and place.register_forward_hook(
            lambda _, inputs, output: seen.append(output if transformer else inputs[0])
        )
        try:
            return model(images).flatten(1), seen[-1] if seen else None
        finally:
            if hook:
                hook.remove()

    def read(images: torch.Tensor, pooling: str, layers: int) -> torch.Tensor:
        if layers > 1:
            raise UserError("--layers is for timm's models; torchvision's give one layer")
        features, found = run(images)
        if transformer and found is not None:
            return pool_tokens(found, pooling, prefix=1)
        if "cls" in pooling:
            raise UserError(NO_CLASS)
        return features

    def tokens(images: torch.Tensor) -> torch.Tensor | None:
        _, found = run(images)
        if found is None:
            return None
        return grid(found, 1) if transformer else found.permute(0, 2, 3, 1)

    return Network(
        f"torchvision:{name}" if pretrained else f"random:torchvision:{base}",
        model,
        {"weights": weights_sha256(model), "preprocessing": preprocessing},
        lambda tiles: prepared(tiles, **preprocessing),
        read,
        tokens,
        "cls" if transformer else "mean",
        seen=None if pretrained else NOTHING,
    )


def timm_preprocessing(model: nn.Module) -> dict[str, Any]:
    """What timm says of a model's input, as :func:`~eosin.eval.features.prepared` takes it.

    Raises UserError for what is not a square RGB image.
    """
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model)
    channels, height, width = found["input_size"]
    if channels != 3 or height != width:
        raise UserError(f"the model takes images of {channels} x {height} x {width}; here it must be square and RGB")
    values = {"size": height, "mean": list(found["mean"]), "std": list(found["std"])}
    return _plain(values | {"resize": int(height / found["crop_pct"])}, found["interpolation"])


def short(error: Exception) -> str:
    """An error as a part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _plain(preprocessing: dict[str, Any], interpolation: str) -> dict[str, Any]:
    """Preprocessing without what says nothing: a cut of everything, the usual interpolation."""
    if interpolation not in INTERPOLATIONS:
        raise UserError(f"the model's images are resized by '{interpolation}'; valid: {', '.join(INTERPOLATIONS)}")
    if preprocessing["resize"] <= preprocessing["size"]:
        del preprocessing["resize"]
    return preprocessing | ({"interpolation": interpolation} if interpolation != "bicubic" else {})


def _load_run(
    run: Path, trained: bool, step: int | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    """A run's backbone. Untrained, it holds the random weights that training begins with where it has no init_from."""
    from eosin.ssl.backbone import build_backbone
    from eosin.ssl.checkpoint import TEACHER, load_teacher
    from eosin.ssl.config import read_run_config
    from eosin.ssl.stain.normalizer import describe_run

    config = read_run_config(run)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.run.seed)
        model = build_backbone(config)
    if trained:
        load_teacher(_checkpoint(run, step) / TEACHER, model)
    preprocessing = {"size": config.crops.global_size, "mean": config.augment.mean, "std": config.augment.std}
    return model, preprocessing, describe_run(run, config.stain)


def _checkpoint(run: Path, step: int | None) -> Path:
    """The newest checkpoint of a run, or that of a step."""
    from eosin.ssl.checkpoint import latest, step_of, steps

    if step is None:
        return latest(run)
    found = {step_of(folder): folder for folder in steps(run)}
    if step not in found:
        there = f"there are: {', '.join(map(str, found))}" if found else "there is none yet"
        raise UserError(f"{run} has no checkpoint of step {step}; {there}")
    return found[step]


def _load_release(folder: Path, trained: bool) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    import timm

    from eosin.ssl.checkpoint import load_teacher

    config = read_json(folder / "config.json", "timm's description of a model")
    try:
        arguments = {"num_classes": config["num_classes"]} | config.get("model_args", {})
        architecture = str(config["architecture"])
        if not timm.is_model(architecture.split(".")[0]):  # timm would ask the Hub for some
            raise UserError(f"{folder / 'config.json'} names the architecture '{architecture}', which timm has not")
        with torch.random.fork_rng([]):
            torch.manual_seed(INIT_SEED)
            # Said here, so that the file cannot ask for weights of elsewhere.
            model = timm.create_model(architecture, pretrained=False, checkpoint_path="", **arguments)
        preprocessing = _release_input(config["pretrained_cfg"], folder / "config.json")
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} has no key {error}; it does not describe a timm model") from None
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"timm cannot build the model of {folder / 'config.json'}: {short(error)}") from None
    if trained:
        load_teacher(folder / "model.safetensors", model)
    model.reset_classifier(0)  # type: ignore[operator]
    return model, preprocessing, _release_stain(folder / "preprocessing.json")


def _release_input(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Size, mean and deviation of a release's input, for :func:`~eosin.eval.features.prepared`."""
    size, mean, std = found["input_size"], found["mean"], found["std"]
    numbers = [*mean, *std] if len(mean) == len(std) == 3 else []
    fits = len(size) == 3 and isinstance(size[-1], int) and 0 < size[-1] <= LARGEST
    if not fits or not numbers or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) or 0 in std:
        raise UserError(f"{path} describes no input: input_size {size}, mean {mean}, std {std}")
    return {"size": size[-1], "mean": mean, "std": std}


def _release_stain(path: Path) -> dict[str, Any] | None:
    """The stain normalization of a release; folders of other makers have none."""
    from eosin.ssl.stain.normalizer import read_normalization

    stain = read_json(path, "the preprocessing of a release").get("stain") if path.is_file() else None
    return None if stain is None else read_normalization(stain, path)
