"""A suite as YAML: tasks, each with its data, its question and its probes; strict, like a run's configuration.

Every mistake is one line that names the key, what was given and what is valid. Nothing is read here but the file.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator

from eosin import configs
from eosin.data_tools.errors import UserError, nearest
from eosin.eval.datasets import DATASETS
from eosin.ssl.config import Count, FileName, Section


class Probe(NamedTuple):
    """What runs a probe: a function of a question, of options, and of ``device`` where it has one.

    Attributes:
        family: of its presets, None for none; they are run in its place where its function takes none.
        spelled: options whose name is not that of the function's parameter.
    """

    module: str
    function: str
    family: str | None = None
    spelled: Mapping[str, str] = MappingProxyType({})


DENSE = "dense"  # the one that looks at tiles and masks, where the others read embeddings
PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "knn": Probe("eosin.eval.probe", "run_knn", "knn", {"k": "ks"}),
        "linear": Probe("eosin.eval.probe", "run_linear", "logistic"),
        "mlp": Probe("eosin.eval.probe", "run_mlp"),
        "fewshot": Probe("eosin.eval.fewshot", "run_fewshot", "simpleshot", {"preset": "name"}),
        "mil": Probe("eosin.eval.probe", "run_mil"),
        "retrieval": Probe("eosin.eval.retrieval", "run_retrieval", spelled={"top": "tops"}),
        "cluster": Probe("eosin.eval.clustering", "run_cluster"),
        "regress": Probe("eosin.eval.regress", "run_regress", "ridge", {"preset": "name"}),
        DENSE: Probe("eosin.eval.dense", "run_dense"),
    }
)
NOT_OPTIONS = {"question", "device", "encoders", "shards", "masks", "batch_size"}
BESIDE_PRESET = {"ratios"}  # options that a preset run in place of a probe has too

Text = Annotated[str, Field(min_length=1)]


def _as_probe(given: Any) -> Any:
    """``knn`` or ``{knn: {k: [20]}}`` as a mapping of one name to checked options."""
    asked = {given: {}} if isinstance(given, str) else given
    if not isinstance(asked, dict) or len(asked) != 1:
        raise ValueError("give the name of a probe, or {NAME: {OPTION: VALUE}}")
    ((name, options),) = asked.items()
    if name not in PROBES:
        raise ValueError(f"there is no probe '{name}'; {nearest(str(name), list(PROBES))}")
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ValueError(f"options of '{name}' are a mapping, e.g. {{{name}: {{OPTION: VALUE}}}}")
    model = _options_of(name)
    try:
        model.model_validate(options)
    except ValidationError as error:
        raise ValueError(_line(error.errors()[0], list(model.model_fields), (name,))) from None
    if options.get("preset") is not None:
        _check_preset(name, options)
    return {name: options}


class Task(Section):
    """One question, asked of every encoder by several probes; see :class:`eosin.eval.question.Question`."""

    about: str = ""
    data: Text | None = None  # folder of a shard set, or the name of a public set
    embeddings: Annotated[list[Text], Field(min_length=1)] | None = None  # files, in place of data and encoders
    label: Text | None = None  # of a public set: its own where not given, and so are group and side
    group: Text | None = None
    labels: Text | None = None
    masks: Text | None = None  # what a dense probe is held against, as 'eosin eval dense --masks'
    key: Literal["tile", "slide", "patient"] = "slide"
    split: Literal["kfold", "leave-one-group-out", "monte-carlo", "fixed"] = "kfold"
    folds: Count = 5
    repeats: Count = 10
    side: Text | None = None
    by: list[Text] = Field(default_factory=list)
    cluster: Text | None = None
    allow_leak: Text | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    probes: Annotated[list[Annotated[dict[str, dict[str, Any]], BeforeValidator(_as_probe)]], Field(min_length=1)]

    @property
    def dense(self) -> bool:
        """Whether one of the probes is dense."""
        return any(DENSE in probe for probe in self.probes)

    @property
    def embedded(self) -> bool:
        """Whether a probe reads embeddings."""
        return any(DENSE not in probe for probe in self.probes)

    @model_validator(mode="after")
    def _combinations(self) -> Task:
        if (self.data is None) == (self.embeddings is None):
            raise ValueError("give either data (a shard set or a public set) or embeddings (a list of files)")
        if self.masks and not self.dense:
            raise ValueError(f"masks are for the probe '{DENSE}', which is not asked; add it or leave masks out")
        if self.dense and self.data is None:
            raise ValueError(f"probe '{DENSE}' looks at patch tokens, which embeddings do not hold; give data")
        known = DATASETS.get(self.data or "")
        if self.dense and not self.masks and not (known and known.masks):
            raise ValueError(f"probe '{DENSE}' needs masks, a folder of annotations, which is not set")
        names = [name_of(probe) for probe in self.probes]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"probe '{twice}' is asked twice; give it a task of its own")
        return self


class Embedding(Section):
    """How every encoder embeds, where it has a choice; see :func:`eosin.eval.encoders.load_encoder`."""

    pooling: Literal["auto", "cls", "mean", "cls+mean"] = "auto"
    layers: Count = 1
    pretrained: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # YAML reads a bare `off` as false.
    stain: Annotated[Literal["off", "tile", "slide"] | None, BeforeValidator(lambda v: "off" if v is False else v)] = (
        None
    )


class Suite(Section):
    """Tasks × encoders."""

    name: FileName
    about: str = ""
    embedding: Embedding = Embedding()
    tasks: Annotated[dict[FileName, Task], Field(min_length=1)]


SECTIONS: Mapping[str, type[Section]] = MappingProxyType({"tasks": Task, "embedding": Embedding})


def load_suite(suite: str) -> Suite:
    """Read a suite: a shipped name, or the path of a YAML file.

    Raises UserError, in one line, for an unknown suite, key, probe or option, or a wrong type.
    """
    path = _find(suite)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a mapping of keys to values")
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        place = found["loc"][0] if len(found["loc"]) > 1 else None
        section = SECTIONS.get(str(place), Suite)
        raise UserError(f"{path}: {_line(found, list(section.model_fields))}") from None


def as_keys(message: str) -> str:
    """A message in which options of the command line are called as the suite's keys are."""
    known = {*Task.model_fields, *(key for name in PROBES for key in _options_of(name).model_fields)}

    def key(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return name if name in known else option[0]

    return re.sub(r"--([a-z][a-z-]*)", key, message)


def name_of(probe: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a probe of a task, and of its results: ``linear``, or ``linear-uni-linear`` of a preset."""
    ((name, options),) = probe.items()
    return f"{name}-{options['preset']}" if options.get("preset") else name


def _find(suite: str) -> Path:
    for path in (Path(suite), configs.path(suite, configs.SUITES)):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    shipped = nearest(Path(suite).stem, configs.names(configs.SUITES))
    raise UserError(f"there is no suite '{suite}'; give the path of a YAML file, or {shipped}")


def function_of(name: str) -> Any:
    """The function that runs a probe."""
    return getattr(importlib.import_module(PROBES[name].module), PROBES[name].function)


def _options_of(name: str) -> type[Section]:
    """The options of a probe: what its function takes beside the question, and a preset where it can be replaced."""
    function = function_of(name)
    hints, given = get_type_hints(function), inspect.signature(function).parameters
    options = {parameter: option for option, parameter in PROBES[name].spelled.items()}
    fields: dict[str, Any] = {options.get(p, p): (hints[p], given[p].default) for p in given if p not in NOT_OPTIONS}
    if PROBES[name].family and "preset" not in fields:
        fields["preset"] = (str | None, None)
    return create_model(name, __base__=Section, **fields)


def _check_preset(name: str, options: Mapping[str, Any]) -> None:
    from eosin.eval.presets import names

    valid = names(str(PROBES[name].family))
    if options["preset"] not in valid:
        raise ValueError(f"{name}.preset: there is no '{options['preset']}'; {nearest(options['preset'], valid)}")
    others = options.keys() - {"preset", *BESIDE_PRESET}
    if "preset" not in PROBES[name].spelled and others:
        raise ValueError(f"{name}.preset: a preset has its own {', '.join(sorted(others))}; leave that out")


def _line(error: Any, valid: list[str], within: tuple[str, ...] = ()) -> str:
    """One line for a complaint of pydantic: the key, what was given, what is valid."""
    key = ".".join(str(part) for part in (*within, *error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"there is no key '{key}'; {nearest(str(error['loc'][-1]), valid)}"
    if error["type"] == "missing":
        return f"{key} is not set"
    if error["type"] == "string_pattern_mismatch":
        return (
            f"{error['input']!r} is not a name; use letters, digits, '.', '_' and '-', and begin with one of the first"
        )
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key}: {error['input']!r} is not valid: {error['msg'][0].lower()}{error['msg'][1:]}"
