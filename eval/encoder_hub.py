"""Encoders of the Hugging Face Hub: timm's models, with the arguments their cards ask for, and Eosin's releases.

Files come through ``huggingface_hub``, which keeps them under HF_HOME and knows the user's token; nothing here reads or
prints a token, and no code of a repository is run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_json
from eosin.eval.encoder_sources import from_folder, short, timm_preprocessing
from eosin.eval.features import Network, timm_network

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
RELEASE = ("config.json", "model.safetensors", "preprocessing.json")
GATED = "the owner must grant access on its page; then log in with 'hf auth login'"


def from_hub(name: str) -> Network:
    """The network of ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.

    Raises:
        UserError: no such repository or no access to it, the Hub cannot be reached and the files are not here, or it
            holds no model that timm can build and fill.
    """
    if not (found := NAME.fullmatch(name)):
        raise UserError(f"'hf-hub:{name}' names no repository; give hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION")
    repository, revision = found.groups()
    with reached(f"'{repository}' of the Hub"):
        config = _download(repository, "config.json", revision)
        commit = config.parent.name  # all files are of this one, also where the repository changes meanwhile
        preprocessing = _optional(repository, "preprocessing.json", commit, config.parent)
        if preprocessing and "stain" in read_json(preprocessing, "the preprocessing of a release"):
            for file in RELEASE:
                _download(repository, file, commit)
            _optional(repository, "seen.json", commit, config.parent)
            return replace(from_folder(config.parent, trained=True), name=f"hf-hub:{name}")
    return _timm(name, repository, commit, config)


@contextlib.contextmanager
def reached(what: str) -> Iterator[None]:
    """Say in one line, and how to mend it, why something could not be had from the Hub."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    offline = f"{what} is not on this machine and the Hub cannot be reached; connect, or set HF_HOME to where it is"
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of its HTTP library, which changed its name
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells of each new attempt
    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"{what} is no name that the Hub allows; give hf-hub:OWNER/NAME as its page says") from None
    except errors.GatedRepoError:
        raise UserError(f"{what} is gated: {GATED}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what} does not exist or is private; if it is private, log in with 'hf auth login'") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what} has no such revision; leave @REVISION out, or give a branch or commit") from None
    except errors.LocalEntryNotFoundError:  # before the next, which it is one of
        raise UserError(offline) from None
    except errors.EntryNotFoundError:
        raise UserError(f"{what} has no config.json or no weights that timm knows; see 'module:function'") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        raise UserError(
            f"{what} cannot be had: the Hub answers {code}" + (f"; {GATED}" if code in (401, 403) else "; try later")
        ) from None
    except (errors.OfflineModeIsEnabled, ConnectionError):
        raise UserError(offline) from None
    except http_error as error:  # in the middle of a file
        said = type(error).__name__
        raise UserError(
            f"{what} cannot be had: the Hub stopped answering ({said}); run the same command again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def model_arguments(repository: str) -> dict[str, Any]:
    """What a model's card gives to ``timm.create_model`` beside its ``config.json``, which cannot hold layers."""
    from timm.layers import SwiGLUPacked
    from torch.nn import SiLU

    gated_mlp: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": SiLU}
    uni2: dict[str, Any] = {
        "img_size": 224,
        "patch_size": 14,
        "depth": 24,
        "num_heads": 24,
        "init_values": 1e-5,
        "embed_dim": 1536,
        "mlp_ratio": 2.66667 * 2,
        "num_classes": 0,
        "no_embed_class": True,
        "reg_tokens": 8,
        "dynamic_img_size": True,
    }
    cards: dict[str, dict[str, Any]] = {
        "mahmoodlab/uni": {"init_values": 1e-5, "dynamic_img_size": True},
        "mahmoodlab/uni2-h": uni2 | gated_mlp,
        "paige-ai/virchow": gated_mlp,
        "paige-ai/virchow2": gated_mlp,
        "bioptimus/h-optimus-0": {"init_values": 1e-5, "dynamic_img_size": False},
        "bioptimus/h-optimus-1": {"init_values": 1e-5, "dynamic_img_size": False},
        "bioptimus/h0-mini": gated_mlp,
    }
    return cards.get(repository.lower(), {})


def _timm(name: str, repository: str, commit: str, config: Path) -> Network:
    import timm

    described = read_json(config, "timm's description of a model")
    if not isinstance(described.get("architecture"), str) or not timm.is_model(described["architecture"].split(".")[0]):
        raise UserError(
            f"'{repository}' of the Hub does not describe a timm model in its config.json; load it in a function of "
            "your own and give 'module:function'"
        )
    try:
        with reached(f"'{repository}' of the Hub"):
            # With its classifier, since timm forgives missing weights where that differs.
            model = timm.create_model(f"hf-hub:{repository}@{commit}", pretrained=True, **model_arguments(repository))
    except (RuntimeError, TypeError, KeyError, ValueError, AssertionError, OSError) as error:
        raise UserError(
            f"timm cannot load '{repository}' of the Hub: {short(error)}; if its card asks for arguments, load it in a "
            "function of your own and give 'module:function'"
        ) from None
    model.reset_classifier(0)  # type: ignore[operator]
    return timm_network(f"hf-hub:{name}", model, timm_preprocessing(model))


def _download(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, revision=revision))


def _optional(repository: str, file: str, commit: str, snapshot: Path) -> Path | None:
    """A file that the repository may lack. Raises UserError where it cannot be known offline whether it does."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _download(repository, file, commit)
    except LocalEntryNotFoundError:
        # Every repository has .gitattributes: where that is, 'hf download' has brought everything.
        known = try_to_load_from_cache(repository, file, revision=commit) is _CACHED_NO_EXIST
        if known or (snapshot / ".gitattributes").exists():
            return None
        raise UserError(
            f"whether '{repository}' of the Hub has a {file} is not known offline; run 'hf download {repository}' once "
            "where there is a network"
        ) from None
    except EntryNotFoundError:
        return None
