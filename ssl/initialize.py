"""Continued training: a backbone that begins with released weights instead of random ones.

    FILE                        .safetensors, or .pth, .pt, .bin, .ckpt as torch.save writes them
    FOLDER                      a run (its newest teacher), or a release (model.safetensors)
    timm:NAME                   timm's released weights
    hf-hub:OWNER/REPO[/FILE]    a file on the Hugging Face Hub

Read are the names of timm, DINO, iBOT and DINOv2, bare or within a training checkpoint, where the teacher is taken.
Heads always begin afresh. Nothing is unpickled but tensors and plain containers.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import read_json
from eosin.ssl import distributed
from eosin.ssl.checkpoint import TEACHER, latest
from eosin.ssl.config import Model, read_run_config
from eosin.ssl.network import StudentTeacher

KEY = "model.init_from"
SAFE = ".safetensors"
TORCH = (".pth", ".pt", ".bin", ".ckpt")
RELEASE = ("model.safetensors", "pytorch_model.bin")  # in a release folder or repository, the better one first
DEPTH = 4  # of the dictionaries of a training checkpoint
ANCHOR = re.compile(r"((?:.*?\.)?)(?:cls_token$|pos_embed$|patch_embed\.proj\.|blocks\.\d+\.)")
RENAMED = [
    (r"\b_orig_mod\.", ""),  # torch.compile
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's chunks for FSDP keep a block's number in the whole
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # iBOT
]
MASK_TOKENS = ("mask_token", "masked_embed")
# Left out, these change what the backbone computes; everything else that it lacks is a head or a decoder.
BACKBONE = re.compile(r"(cls_token|reg_token|pos_embed)$|patch_embed\.|blocks\.|norm_pre\.")
LAYER_SCALE = re.compile(r"blocks\.\d+\.ls[12]\.gamma$")
SHOWN = 5


@dataclass
class Weights:
    """Tensors of a source by the names they have there, nested dictionaries joined by dots."""

    tensors: dict[str, torch.Tensor]
    heads: int | None = None  # attention heads, which no tensor tells; None where the source does not say


@dataclass
class Fit:
    """What a source has for a backbone.

    Attributes:
        state: timm's names to tensors of the backbone's shapes.
        mask_token: [D] or None.
        prefix: where in the source the backbone was found.
        interpolated: how many of ``state`` were resampled.
        ones: LayerScales that the source does without.
        complaints: what of the backbone is missing, misshapen or left over.
        extra: number of tensors left out, heads and decoders.
    """

    state: dict[str, torch.Tensor]
    mask_token: torch.Tensor | None
    prefix: str
    interpolated: int = 0
    ones: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    extra: int = 0


def initialize(model: StudentTeacher, settings: Model) -> None:
    """Let student and teacher begin with the weights of ``settings.init_from``, if it is set; rank 0 says how far.

    Every process calls this. Rank 0 alone reads: a file need not be on every machine, and a download is done once.

    Raises:
        UserError: the source cannot be read, or does not fill the backbone and ``settings.init_partial`` is off.
    """
    if settings.init_from is None:
        return
    student = model.student
    error: UserError | None = None
    if distributed.rank() == 0:
        try:
            fit = fit_weights(read_weights(settings.init_from), student.backbone)
            line = describe(fit, student.backbone, settings)
            student.backbone.load_state_dict(fit.state, strict=False)
            if fit.mask_token is not None:
                student.mask_token.data.copy_(fit.mask_token)
            print(line)
        except UserError as raised:
            error = raised
    # Others would wait for weights that never come.
    if distributed.any_rank(error is not None):
        raise error or UserError(f"{KEY}: '{settings.init_from}' was refused by rank 0, which says why")
    if distributed.ranks() > 1:
        for tensor in (*student.backbone.state_dict().values(), student.mask_token.data):
            torch.distributed.broadcast(tensor, src=0)
    model.teacher.load_state_dict(student.state_dict())


def read_weights(source: str) -> Weights:
    """Read one of the forms in this module's docstring. Raises UserError, in one line, for what cannot be read."""
    kind, _, rest = source.partition(":")
    if kind == "timm":
        return _read_timm(rest)
    if kind == "hf-hub":
        return Weights(_read_file(_download(rest)))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"{KEY}: {path} does not exist; give a file, a folder, timm:NAME or hf-hub:OWNER/REPO[/FILE]")
    return Weights(_read_file(path))


def fit_weights(weights: Weights, backbone: VisionTransformer) -> Fit:
    """Find the backbone in ``weights``, in timm's names, and bring it to the shapes of ``backbone``.

    Position embeddings are interpolated to its grid and the patch embedding is resampled to its patch size.

    Raises:
        UserError: there is no vision transformer in ``weights``.
    """
    prefix = _find_backbone(weights.tensors)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.tensors.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            found[name] = tensor.float()
    extra = len(weights.tensors) - len(found)
    masks = [found.pop(name).flatten() for name in MASK_TOKENS if name in found]
    own = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    fit = Fit({}, next((m for m in masks if len(m) == backbone.embed_dim), None), prefix)

    fit.interpolated = _adapt_positions(found, backbone) + _adapt_patches(found, backbone)
    # A network without LayerScale computes what one does whose LayerScale is one.
    if not any(LAYER_SCALE.match(name) for name in found):
        fit.ones = [name for name in own if LAYER_SCALE.match(name)]
    found |= {name: torch.ones_like(own[name]) for name in fit.ones}

    for name, tensor in own.items():
        if name not in found:
            fit.complaints.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            fit.complaints.append(f"{name} is {_shape(found[name])} there and {_shape(tensor)} here")
        elif not found[name].isfinite().all():
            fit.complaints.append(f"{name} is not finite")
        else:
            fit.state[name] = found[name]
    left = [name for name in found if name not in own]
    fit.complaints += [f"{name} has no place" for name in left if BACKBONE.match(name)]
    fit.extra = extra + sum(not BACKBONE.match(name) for name in left)
    heads = _heads(backbone)
    if weights.heads not in (None, heads):
        fit.complaints.insert(0, f"attention has {weights.heads} heads there and {heads} here")
    return fit


def describe(fit: Fit, backbone: VisionTransformer, settings: Model) -> str:
    """One line on what is loaded. Raises UserError when that is too little: nothing, or not all without leave."""
    total = len(backbone.state_dict())
    where = f"{settings.init_from}" + (f" ('{fit.prefix.rstrip('.')}')" if fit.prefix else "")
    loaded = len(fit.state)
    if fit.complaints and (not settings.init_partial or loaded == len(fit.ones)):
        shown = ", ".join(fit.complaints[:SHOWN])
        more = len(fit.complaints) - SHOWN
        mend = "give the model.architecture and model.args of these weights"
        if loaded > len(fit.ones):
            mend += ", or model.init_partial=true to go on with what fits"
        raise UserError(
            f"{KEY}: {loaded} of {total} backbone tensors fit from {where}: {shown}"
            f"{f' and {more} more' if more > 0 else ''}; {mend}"
        )
    facts = [f"{fit.interpolated} interpolated"]
    if fit.ones:
        facts.append(f"{len(fit.ones)} LayerScales set to 1")
    if fit.mask_token is not None:
        facts.append("with the mask token")
    facts.append(f"{fit.extra} other tensors left out")
    return f"{loaded} of {total} backbone tensors loaded from {where} ({', '.join(facts)}); heads begin afresh"


def _find_backbone(tensors: Mapping[str, torch.Tensor]) -> str:
    """What precedes the names of the backbone: the teacher's, where there is one, and the largest."""
    found = Counter(match.group(1) for match in map(ANCHOR.match, tensors) if match)
    if not found:
        raise UserError(
            f"{KEY}: there is no vision transformer in it, in the names of timm, DINO, iBOT or DINOv2 "
            f"({len(tensors)} tensors{', the first is ' + next(iter(tensors)) if tensors else ''})"
        )

    def rank(prefix: str) -> tuple[int, int]:
        parts = prefix.split(".")
        return ("teacher" in parts) - ("student" in parts), found[prefix]

    return max(found, key=rank)


def _adapt_positions(found: dict[str, torch.Tensor], backbone: VisionTransformer) -> bool:
    """Bring ``pos_embed``, [1, prefix tokens it covers + patches, D], to the backbone's grid and prefix, in place.

    Where another part of the prefix tokens is covered, their positions become part of the tokens, which is exact.

    Returns:
        Whether the grid is another one.
    """
    positions = found.get("pos_embed")
    if backbone.pos_embed is None or positions is None:
        return False
    tokens = [found[name] for name in ("cls_token", "reg_token", "pos_embed") if name in found]
    if any(t.ndim != 3 or t.shape[::2] != (1, positions.shape[-1]) for t in tokens):
        return False
    cls, registers = (found[name].shape[1] if name in found else 0 for name in ("cls_token", "reg_token"))
    own = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    # Which tokens are covered is not written down; the patches are a square, and the model's own reading goes first.
    ways = sorted({0, cls, cls + registers}, key=lambda covered: (covered != own, covered))
    covered = next((way for way in ways if _is_square(positions.shape[1] - way)), None)
    if covered is None:
        return False
    prefix, patches = positions[:, :covered], positions[:, covered:]
    if covered != own:
        for name, part in (("cls_token", prefix[:, :cls]), ("reg_token", prefix[:, cls:])):
            if part.shape[1]:
                found[name] = found[name] + part
        prefix = positions.new_zeros(1, own, positions.shape[2])
    grid = list(backbone.patch_embed.grid_size)
    resampled = resample_abs_pos_embed(patches, grid, num_prefix_tokens=0)
    found["pos_embed"] = torch.cat([prefix, resampled], dim=1)
    return resampled.shape != patches.shape


def _adapt_patches(found: dict[str, torch.Tensor], backbone: VisionTransformer) -> bool:
    """Resample the patch embedding, [D, 3, p, p], to the backbone's patch size, in place; whether it had another."""
    name, size = "patch_embed.proj.weight", backbone.patch_embed.patch_size
    if name not in found or found[name].ndim != 4 or found[name].shape[2:] == size:
        return False
    found[name] = resample_patch_embed(found[name], list(size))
    return True


def _is_square(count: int) -> bool:
    return count > 0 and int(count**0.5 + 0.5) ** 2 == count


def _heads(network: Any) -> int | None:
    blocks = getattr(network, "blocks", None)
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{KEY}: {path} is not a file")
    path.open("rb").close()  # what may not be read says so here; further on it would pass for damaged
    if path.suffix == SAFE:
        return _read_safetensors(path)
    if path.suffix in TORCH:
        return _read_torch(path)
    raise UserError(f"{KEY}: {path} has the ending '{path.suffix}'; {', '.join((SAFE, *TORCH))} are read")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _tensors(load_file(path))
    except SafetensorError as error:
        raise UserError(
            f"{KEY}: {path} is not a safetensors file, or is cut short ({' '.join(str(error).split())}); fetch it again"
        ) from None


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{KEY}: {path} is no archive of torch.save, which has been a zip since PyTorch 1.6: a bare pickle, text, "
            "or cut short; fetch it again, or save its weights as safetensors"
        )
    try:
        # DINO and iBOT keep their command line in a Namespace, which holds attributes and does nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError:
        raise UserError(
            f"{KEY}: {path} holds Python objects beside tensors and is not unpickled, since that runs its code; "
            "save its weights alone, as safetensors"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise UserError(
            f"{KEY}: {path} cannot be read ({' '.join(str(error).split())[:200]}); fetch it again"
        ) from None


def _tensors(tree: Any, prefix: str = "", depth: int = DEPTH) -> dict[str, torch.Tensor]:
    """Floating-point tensors of nested dictionaries, by dotted names."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor) and value.is_floating_point():
            flat[prefix + name] = value.detach()
        elif isinstance(name, str) and depth:
            flat |= _tensors(value, f"{prefix}{name}.", depth - 1)
    return flat


def _read_folder(folder: Path) -> Weights:
    """A run or a release, with the number of heads that its configuration tells."""
    from eosin.ssl.backbone import build_backbone

    if (folder / "config.yaml").is_file():
        with torch.device("meta"):
            network = build_backbone(read_run_config(folder))
        return Weights(_read_file(latest(folder) / TEACHER), _heads(network))
    for name in (TEACHER, *RELEASE):
        if (folder / name).is_file():
            return Weights(_read_file(folder / name), _release_heads(folder / "config.json"))
    raise UserError(
        f"{KEY}: {folder} is neither a run (config.yaml) nor a release ({' or '.join(RELEASE)}); name a file"
    )


def _release_heads(path: Path) -> int | None:
    """Heads of the timm model that ``config.json`` describes; None where it describes something else."""
    import timm

    config = read_json(path, "timm's description of a model") if path.is_file() else {}
    try:
        with torch.device("meta"):
            return _heads(timm.create_model(config["architecture"], **config.get("model_args", {})))
    except (KeyError, RuntimeError, TypeError, AssertionError, ValueError):
        return None


def _read_timm(name: str) -> Weights:
    import timm

    base = name.split(".")[0]
    if not timm.is_model(base):
        raise UserError(f"{KEY}: timm has no model '{name}'; {nearest(base, timm.list_models())}")
    try:
        with torch.random.fork_rng([]):
            network: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{KEY}: timm cannot load released weights of '{name}' ({type(error).__name__}); "
            "see that the name has any and that the Hub is reached"
        ) from None
    return Weights(_tensors(network.state_dict()), _heads(network))


def _download(name: str) -> Path:
    """Fetch OWNER/REPO or OWNER/REPO/FILE. The hub's own messages may hold a signed address and are never shown."""
    import huggingface_hub
    from huggingface_hub import errors

    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise UserError(f"{KEY}: 'hf-hub:{name}' is not hf-hub:OWNER/REPO or hf-hub:OWNER/REPO/FILE")
    for candidate in [file] if file else RELEASE:
        try:
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{repository}", candidate))
        except errors.GatedRepoError:
            raise UserError(
                f"{KEY}: hf-hub:{name} asks for consent; give it on its page and log in to the Hub"
            ) from None
        except errors.RepositoryNotFoundError:
            raise UserError(f"{KEY}: the Hub has no {owner}/{repository}, or it is private; see its name") from None
        except errors.LocalEntryNotFoundError:
            raise UserError(f"{KEY}: hf-hub:{name} is not in the cache and the Hub is not reached") from None
        except errors.EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{KEY}: hf-hub:{name} cannot be fetched ({type(error).__name__})") from None
    raise UserError(f"{KEY}: {owner}/{repository} holds no {file or ' or '.join(RELEASE)}; give hf-hub:OWNER/REPO/FILE")
