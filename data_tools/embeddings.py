"""Embeddings on disk: one safetensors file a shard set and encoder.

``features`` is [N, D]; every other tensor is one column, row for row: numbers as they are, strings as zero-padded
UTF-8 of shape [N, width], uint8. The metadata carry the encoder's fingerprint. Never a file a tile. Features are mapped
from the file and not read before they are used, so a million rows cost no memory until somebody asks for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "1"
KEYS_ONLY = "keys "  # begins what a fingerprint says of ``shards`` where nothing is known of the tiles but their keys
TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass
class Embeddings:
    """Features and what is known of each row.

    Attributes:
        features: [N, D], float32 or float16; of a file that was read, mapped from it: changes stay in memory.
        table: N rows; at least key, slide, x, y and mpp.
        encoder: the fingerprint: name, weights' sha256, preprocessing, normalizer, pooling.
        path: where it was read from, None before it is written.
    """

    features: np.ndarray
    table: pd.DataFrame
    encoder: dict[str, Any]
    path: Path | None = None

    @property
    def name(self) -> str:
        """The encoder's name, for tables and plots."""
        return self.encoder["name"]


def write_embeddings(path: Path | str, embeddings: Embeddings) -> None:
    """Write embeddings to ``path``, atomically."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if len(embeddings.features) != len(embeddings.table):
        raise ValueError(f"{len(embeddings.features)} features for {len(embeddings.table)} rows")
    tensors = {"features": np.ascontiguousarray(embeddings.features)}
    strings = []
    for column in embeddings.table.columns:
        values = embeddings.table[column]
        if values.dtype.kind in "biuf":
            tensors[f"column/{column}"] = np.ascontiguousarray(values.to_numpy())
        else:
            strings.append(column)
            tensors[f"column/{column}"] = _encode(["" if v is None or v != v else str(v) for v in values])
    metadata = {
        "schema": SCHEMA,
        "kind": "eosin embeddings",
        "encoder": json.dumps(embeddings.encoder, sort_keys=True),
        "columns": json.dumps(list(map(str, embeddings.table.columns))),
        "strings": json.dumps(strings),
    }
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # how it says that the disk is full
            raise UserError(f"cannot write {path}: {error}; free some space and run the same command again") from None
        _sort_header(temporary)
        temporary.chmod(0o644)  # safetensors makes it readable by its owner only


def read_embeddings(path: Path | str) -> Embeddings:
    """Read embeddings from ``path``.

    Raises UserError when the file is missing, is no embeddings file, or is of another schema version.
    """
    import pandas as pd
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with 'eosin embed ENCODER SHARDS --out {path}'")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != "eosin embeddings" or metadata.get("schema") != SCHEMA:
                raise UserError(f"{path} is not an embeddings file of schema {SCHEMA}; make it with 'eosin embed'")
            strings = set(json.loads(metadata["strings"]))
            columns = {
                name: _decode(file.get_tensor(f"column/{name}"))
                if name in strings
                else file.get_tensor(f"column/{name}")
                for name in json.loads(metadata["columns"])
            }
    except SafetensorError as error:
        raise UserError(f"{path} is not readable as safetensors: {error}") from None
    return Embeddings(_mapped(path, "features"), pd.DataFrame(columns), json.loads(metadata["encoder"]), path)


def _sort_header(path: Path) -> None:
    """Sort the header's keys, whose order safetensors leaves to chance, so that equal content is equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise ValueError(f"the header of {path} has {len(text)} bytes when sorted, and {length} before")
        file.seek(8)
        file.write(text.ljust(length))  # the format pads with spaces


def _mapped(path: Path, name: str) -> np.ndarray:
    """A tensor of a safetensors file that is known to be sound, mapped copy-on-write.

    The file begins with the length of a JSON header, which says where each tensor lies behind it.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in TYPES:
        raise UserError(f"{path} holds {name} of type {entry['dtype']}; valid: {', '.join(TYPES)}")
    if 0 in shape:  # nothing can be mapped
        return np.empty(shape, dtype=TYPES[entry["dtype"]])
    offset = 8 + length + entry["data_offsets"][0]
    return np.asarray(np.memmap(path, TYPES[entry["dtype"]], "c", offset, shape))


def _encode(values: list[str]) -> np.ndarray:
    encoded = np.array([v.encode() for v in values], dtype=bytes)
    width = max(encoded.dtype.itemsize, 1)
    return encoded.astype(f"S{width}").view(np.uint8).reshape(len(values), width)  # [N, width]


def _decode(rows: np.ndarray) -> list[str]:
    width = rows.shape[1]
    return [v.decode() for v in np.ascontiguousarray(rows).view(f"S{width}").ravel()]
