"""A run's configuration: YAML recipes with ``base:``, dotted overrides, and strict validation.

OmegaConf loads and merges, pydantic validates. Every mistake is one line that names the key, what was given and what
is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eosin import configs
from eosin.data_tools.errors import UserError, nearest
from eosin.data_tools.files import atomic_path
from eosin.data_tools.mixture import CLUSTER
from eosin.data_tools.store import without_credentials

# What is given in place of what was there, never merged with it.
WHOLE = ("data.shards", "high_resolution.shards")
PLACES = (*WHOLE, "run.dir", "model.init_from", "stain.reference", "health.probe.shards")
MOST_COUNTED, MOST_SHARE = 1 << 40, 1e12


def _as_text(given: Any) -> Any:
    """The name of a folder that YAML takes for a number."""
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


def _as_shards(given: Any) -> Any:
    found = {_as_text(k): v for k, v in given.items()} if isinstance(given, dict) else _as_text(given)
    names, shares = (list(found), list(found.values())) if isinstance(found, dict) else ([found], [1.0])
    named = bool(names) and all(isinstance(name, str) and name for name in names)
    if not named or not all(type(share) in (int, float) and 0 < share <= MOST_SHARE for share in shares):
        raise ValueError("give a folder or URL, or {PATH: SHARE above 0, ...}")
    return found


Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e3)]
NonNegative = Annotated[float, Field(ge=0, le=1e3)]
Strength = Annotated[float, Field(ge=0, le=10)]
Divisor = Annotated[float, Field(ge=1e-3, le=1e3)]  # temperatures and deviations
Count = Annotated[int, Field(ge=1, le=MOST_COUNTED)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST_COUNTED)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Quality = Annotated[int, Field(ge=1, le=100)]
Pair = Field(min_length=2, max_length=2)
Range = Annotated[list[float], Pair]
RGB = Annotated[list[Probability], Field(min_length=3, max_length=3)]

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Place = Annotated[str, Field(min_length=1), BeforeValidator(_as_text)]
# Folder or URL of a shard set, or several with the share of draws that each has.
Shards = Annotated[str | dict[str, float], BeforeValidator(_as_shards)]


class Section(BaseModel):
    """A part of the configuration; unknown keys and loose types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """The backbone: a timm VisionTransformer."""

    architecture: str = "vit_small_patch16_224"
    args: dict[str, Any] = {}  # further arguments of timm's VisionTransformer, e.g. {reg_tokens: 4, depth: 6}
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the same rate in every block
    # Weights to begin with: the path of a file or folder, timm:NAME or hf-hub:OWNER/REPO[/FILE].
    init_from: Place | None = None
    init_partial: bool = False  # go on with what fits, where not all of the backbone does


class Crops(Section):
    """Multi-crop: sizes in pixels, scales as fractions of the tile's area."""

    global_size: Pixels = 224
    global_scale: Range = [0.32, 1.0]
    local_size: Pixels = 96
    local_scale: Range = [0.05, 0.32]
    local_count: CountOrZero = 8
    aspect: Range = [3 / 4, 4 / 3]  # width over height of a crop's box


class Augment(Section):
    """Batched augmentation on the training device; probabilities are per crop."""

    flips: bool = True
    rotate90: bool = True
    rotate: Probability = 0.0  # by any angle, with the border mirrored
    jitter: Probability = 0.8
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    gray: Probability = 0.2
    blur: Annotated[list[Probability], Field(min_length=3, max_length=3)] = [1.0, 0.1, 0.5]  # global 1, 2, local
    blur_sigma: Range = [0.1, 2.0]
    solarize: Probability = 0.0  # of the second global crop
    resolution: Probability = 0.0  # downsampled and brought back
    resolution_scale: Range = [0.5, 1.0]  # of a crop's side
    jpeg: Probability = 0.0  # compressed and decompressed
    jpeg_quality: Annotated[list[Quality], Pair] = [30, 95]
    mean: RGB = [0.485, 0.456, 0.406]
    std: Annotated[list[Divisor], Field(min_length=3, max_length=3)] = [0.229, 0.224, 0.225]


class Hed(Section):
    """HED jitter (Tellez 2019): alpha and beta within sigma."""

    op: Literal["hed"]
    p: Probability = 1.0
    sigma: Strength = 0.05


class Perturb(Section):
    """The tile's own stains moved: concentrations by alpha and beta, vectors by vector."""

    op: Literal["perturb"]
    p: Probability = 1.0
    alpha: Strength = 0.2
    beta: Strength = 0.2
    vector: Strength = 0.05


class RandStainNA(Section):
    """Lab statistics drawn from their distribution over slides (Shen 2022)."""

    op: Literal["randstainna"]
    p: Probability = 1.0
    spread: Strength = 1.0


class Reinhard(Section):
    """Lab statistics of another slide (RudolfV)."""

    op: Literal["reinhard"]
    p: Probability = 1.0


OPERATIONS: dict[Any, type[Section]] = {
    "hed": Hed,
    "perturb": Perturb,
    "randstainna": RandStainNA,
    "reinhard": Reinhard,
}
StainOperation = Annotated[Hed | Perturb | RandStainNA | Reinhard, Field(discriminator="op")]


class Stain(Section):
    """Stain operations; they switch off for slides that are not H&E. First normalization, then augmentation."""

    # YAML reads a bare `off` as false.
    normalize: Annotated[Literal["off", "tile", "slide"], BeforeValidator(lambda v: "off" if v is False else v)] = "off"
    method: Literal["macenko", "reinhard", "reinhard-modified"] = "macenko"
    convention: Literal["eosin", "torchstain", "tiatoolbox"] = "eosin"  # whose constants Macenko's method has
    reference: Place = "eosin"  # a name, or the path of a JSON, image, slide, shard set
    unfitted: Literal["keep_raw"] = "keep_raw"  # what cannot be fitted stays as it is, counted and listed
    # In this order, on each crop by itself.
    augment: Annotated[list[StainOperation], BeforeValidator(lambda v: [] if v == "none" else v)] = []


class Objective(Section):
    """DINO on crops, iBOT on masked patches, KoLeo or KDE on the student's class tokens."""

    dino: NonNegative = 1.0
    ibot: NonNegative = 1.0
    koleo: NonNegative = 0.1
    kde: NonNegative = 0.0
    kde_concentration: Positive = 5.0
    prototypes: Count = 65536
    hidden: Count = 2048
    bottleneck: Count = 256
    tied_heads: bool = True
    ibot_prototypes: Count | None = None  # of an iBOT head of its own; as DINO's where none is given
    ibot_bottleneck: Count | None = None
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    student_temperature: Divisor = 0.1
    teacher_temperature: Annotated[list[Divisor], Pair] = [0.04, 0.07]
    teacher_temperature_warmup: CountOrZero = 0  # steps
    mask_probability: Probability = 0.5
    mask_ratio: Range = [0.1, 0.5]
    momentum: Annotated[list[Probability], Pair] = [0.992, 1.0]  # of the EMA teacher, cosine over the run


class Optim(Section):
    """AdamW; the learning rate is ``lr`` times the scaling of the batch against 1,024."""

    lr: Positive = 4e-3
    scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    warmup: CountOrZero = 0  # steps
    final_lr: NonNegative = 1e-6
    weight_decay: Annotated[list[NonNegative], Pair] = [0.04, 0.4]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    patch_embed_lr: Positive = 0.2
    freeze_last_layer: CountOrZero = 0  # steps
    heads_only: CountOrZero = 0  # first steps in which the backbone stays as it is
    clip: Positive = 3.0
    # Parts of a process's share of a batch, one after the other to save memory; KoLeo and KDE see one part at a time.
    accumulate: Count = 1
    max_skipped: Count = 10  # steps in a row without a finite gradient before the run stops
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Pair] = [0.9, 0.999]


class Data(Section):
    """What is streamed."""

    shards: Shards
    batch: Count = 1024  # samples in a global batch, over all processes
    workers: CountOrZero = 4  # decoding processes a rank
    # Neighboring tiles that stay together in the shuffle, and tiles they are shuffled among; 1: a full shuffle.
    shuffle_block: Count = 1
    shuffle_window: Count = 16384
    # Columns of the slides table, or "cluster", from coarse to fine: each of their values is drawn equally often.
    balance: list[Annotated[str, Field(min_length=1)]] = []
    slide_cap: Count | None = None  # draws of a slide an epoch, at most
    weights: FileName | None = None  # weights-NAME.npy in each shard set: how often each tile is drawn
    clusters: FileName | None = None  # clusters-NAME.npy in each shard set: the cluster of each tile
    max_bad: Probability = 1e-3  # share of tiles that may be broken before the run stops


class Run(Section):
    """Length, place and bookkeeping of the run."""

    dir: Place
    steps: Count = 125_000
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    attention: Literal["sdpa", "varlen", "xformers"] = "sdpa"  # what computes it; the last two on a GPU only
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # of several processes; auto: ddp
    compile: bool = False
    checkpoint_activations: Literal["none", "blocks"] = "none"  # blocks: compute them again in the backward pass
    log_every: Count = 10
    checkpoint_every: Count = 1000
    keep: Count = 2  # newest checkpoints kept
    keep_every: Count | None = None  # and those at multiples of this step, for good


class OnlineProbe(Section):
    """Grouped k-NN on a labeled shard set while training goes on: advice, which changes nothing."""

    shards: Place
    label: Annotated[str, Field(min_length=1)] = "label"  # column of the tiles or of the slides table
    group: Annotated[str, Field(min_length=1)] = "patient"  # column; a tile is told by tiles of other groups only
    tiles: Count = 1000  # at most, kept in memory
    every: Count = 1000  # steps


class Health(Section):
    """What is looked at now and then; see :mod:`eosin.ssl.health` for what is said of it."""

    # Steps between pictures in TensorBoard: with each checkpoint where not given; 0 for none.
    pictures_every: CountOrZero | None = None
    probe: OnlineProbe | None = None
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of patients that are never trained on
    held_out_every: Count = 1000  # steps between losses on them


class HighResolution(Section):
    """The last steps of a run at another size, on tiles of their own where ``shards`` names them (UNI)."""

    steps: Count
    crops: Crops
    shards: Shards | None = None


class Config(Section):
    """Everything a run depends on."""

    model: Model = Model()
    crops: Crops = Crops()
    augment: Augment = Augment()
    stain: Stain = Stain()
    objective: Objective = Objective()
    optim: Optim = Optim()
    data: Data
    run: Run
    health: Health = Health()
    high_resolution: HighResolution | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        patch = patch_size(self.model)
        all_crops = {"crops": self.crops}
        if self.high_resolution:
            all_crops["high_resolution.crops"] = self.high_resolution.crops
            if self.high_resolution.steps >= self.run.steps:
                last, all_steps = self.high_resolution.steps, self.run.steps
                raise ValueError(f"high_resolution.steps: {last} are not fewer than run.steps={all_steps}; change one")
        for name, crops in all_crops.items():
            for key in ("global_size", "local_size"):
                size = getattr(crops, key)
                if size % patch and not (key == "local_size" and crops.local_count == 0):
                    below = max(size // patch, 1) * patch
                    raise ValueError(
                        f"{name}.{key}: {size} is not a multiple of the patch size {patch} of "
                        f"{self.model.architecture}; the nearest that are: {below}, {below + patch}"
                    )
        for section, key, part, least, most in [
            *((name, "global_scale", crops, 1e-6, 1) for name, crops in all_crops.items()),
            *((name, "local_scale", crops, 1e-6, 1) for name, crops in all_crops.items()),
            *((name, "aspect", crops, 0.01, 100) for name, crops in all_crops.items()),
            ("augment", "blur_sigma", self.augment, 0.01, 100),
            ("augment", "resolution_scale", self.augment, 0.01, 1),
            ("augment", "jpeg_quality", self.augment, 1, 100),
            ("objective", "mask_ratio", self.objective, 1e-6, 1),
        ]:
            low, high = getattr(part, key)
            if not least <= low <= high <= most:
                raise ValueError(f"{section}.{key}: [{low}, {high}] is not a range {least:g} <= low <= high <= {most}")
        for section, key in [("optim", "warmup"), ("optim", "freeze_last_layer"), ("optim", "heads_only")]:
            if getattr(getattr(self, section), key) > self.run.steps:
                longest = getattr(getattr(self, section), key)
                raise ValueError(
                    f"{section}.{key}: {longest} steps are more than run.steps={self.run.steps}; change one"
                )
        if self.run.keep_every and self.run.keep_every % self.run.checkpoint_every:
            every, saved = self.run.keep_every, self.run.checkpoint_every
            raise ValueError(f"run.keep_every: {every} is not a multiple of run.checkpoint_every={saved}; change one")
        for key in ("ibot_prototypes", "ibot_bottleneck"):
            if self.objective.tied_heads and getattr(self.objective, key) is not None:
                raise ValueError(f"objective.{key}: tied heads are one; set objective.tied_heads=false or leave it out")
        if self.objective.dino + self.objective.ibot == 0:
            raise ValueError("objective.dino: 0 with objective.ibot 0 leaves nothing to learn; set one above 0")
        if CLUSTER in self.data.balance and self.data.clusters is None:
            raise ValueError(
                f"data.balance: '{CLUSTER}' needs data.clusters=NAME, for clusters-NAME.npy beside the shards"
            )
        if CLUSTER not in self.data.balance and self.data.clusters is not None:
            raise ValueError(
                f"data.clusters: is used by data.balance=[..., {CLUSTER}, ...] only; add it there or leave clusters out"
            )
        return self


def patch_size(model: Model) -> int:
    """Patch size in pixels of the model's architecture, read from its arguments or timm's name for it."""
    import re

    if "patch_size" in model.args:
        given = model.args["patch_size"]
        if not isinstance(given, int) or given < 1:
            raise ValueError(f"model.args.patch_size: {given!r} is not valid: give a number of pixels, 1 or more")
        return given
    found = re.search(r"patch(\d+)", model.architecture)
    if not model.architecture.startswith("vit_") or not found:
        raise ValueError(f"model.architecture: '{model.architecture}' is not one of timm's vit_*_patch* names")
    return int(found.group(1))


def load_config(recipe: str, overrides: list[str]) -> Config:
    """Load a recipe (a shipped name or a path of a YAML file), apply ``key.sub=value`` overrides, validate.

    Raises UserError, in one line, for an unknown recipe, an unknown key, a wrong type or an impossible combination.
    """
    tree = _load_tree(_find(recipe), seen=())
    try:
        for override in overrides:
            tree = _override(tree, override)
        values = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"the overrides cannot be applied to {recipe}: {str(error).splitlines()[0]}") from None
    return _validate(values, recipe)


def read_run_config(run: Path | str) -> Config:
    """Read the resolved configuration of a run folder. Raises UserError when it holds none."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run: it has no config.yaml; make one with 'eosin train'")
    return _validate(_load_yaml(path), str(path))


def write_config(path: Path, config: Config) -> None:
    """Write the resolved configuration as YAML, atomically; URLs of shard sets without their credentials."""
    tree = config.model_dump()
    for section in (tree["data"], tree["high_resolution"] or {}):
        shards = section.get("shards")
        if isinstance(shards, dict):
            section["shards"] = {without_credentials(url): share for url, share in shards.items()}
        elif shards:
            section["shards"] = without_credentials(shards)
    with atomic_path(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(tree)), encoding="utf-8")


def _find(recipe: str) -> Path:
    for path in (Path(recipe), configs.path(recipe)):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    raise UserError(f"there is no recipe '{recipe}'; give the path of a YAML file, or {_shipped(recipe)}")


def _shipped(recipe: str) -> str:
    return nearest(Path(recipe).stem, configs.names())


def _override(tree: dict[Any, Any], override: str) -> dict[Any, Any]:
    key, given, text = override.partition("=")
    if not given:
        shown = "what looks like a URL" if "://" in override else f"'{override}'"  # which may hold a password
        raise UserError(f"{shown} is not an override; write key.sub=value, e.g. run.steps=1000")
    above = _plain(OmegaConf.from_dotlist([override]))
    if key in PLACES:
        *parents, last = key.split(".")
        inner = above
        for parent in parents:
            inner = inner[parent]
        if isinstance(inner[last], int | float):  # a name such as 2024_01, to be kept as it is written
            inner[last] = text
    # data.shards.PATH=SHARE changes one share.
    return _merge(tree, above, () if key.startswith(tuple(f"{w}." for w in WHOLE)) else WHOLE)


def _merge(below: dict[Any, Any], above: dict[Any, Any], whole: Sequence[str], key: str = "") -> dict[Any, Any]:
    """``above`` over ``below``: sections are merged, and anything else, and keys named in ``whole``, replaced."""
    merged = dict(below)
    for name, value in above.items():
        inner, old = f"{key}{name}", below.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and inner not in whole:
            value = _merge(old, value, whole, f"{inner}.")
        merged[name] = value
    return merged


def _load_tree(path: Path, seen: tuple[Path, ...]) -> dict[Any, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'base:' leads back to the file itself; break the circle")
    tree = _load_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / f"{base}.yaml"
    below = _load_tree(beside if beside.is_file() else _find(str(base)), (*seen, path.resolve()))
    return _merge(below, tree, WHOLE)


def _load_yaml(path: Path) -> dict[Any, Any]:
    try:
        tree = _plain(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} does not hold a mapping of keys to values")
    return tree


def _plain(tree: Any) -> Any:
    return OmegaConf.to_container(tree)  # references stay, until all is merged


def _validate(values: Any, source: str) -> Config:
    for section in ("data", "run"):
        values.setdefault(section, {})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_line(error.errors()[0])}") from None


def _line(error: Any) -> str:
    """One line for pydantic's first complaint: the key, what was given, what is valid."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:
            if isinstance(part, int) or part in OPERATIONS:  # a place in stain.augment, and the operation there
                section = OPERATIONS.get(part, section)
            else:
                kind = section.model_fields[part].annotation
                section = next((k for k in get_args(kind) if isinstance(k, type) and issubclass(k, Section)), kind)
        return f"there is no key '{key}'; {nearest(str(error['loc'][-1]), list(section.model_fields))}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if error["type"] in ("missing", "string_too_short"):
        return f"{key} is not set; give it as {key}=VALUE"
    # The URL of a shard set may hold a password.
    secret = "shards" in error["loc"] or "://" in str(error["input"])
    given = "what is given" if secret else repr(error["input"])
    return f"{key}: {given} is not valid: {error['msg'][0].lower()}{error['msg'][1:]}"
