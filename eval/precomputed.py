"""Features that other programs made, brought into one embeddings file.

    .npz            features or embeddings [N, D]; every other array of N numbers or texts becomes a column
    .safetensors    the same
    .h5, .hdf5      features [N, D] or [1, N, D] and coords [N, 2], a file a slide (TRIDENT, CLAM, UNI)
    .pt, .pth       a tensor [N, D], a file a slide (CLAM), or a dictionary as in .npz
    a folder        of such files, one a slide, which is named by its file

A row's key is that of the tile: slide, x, y and, where the file says it, µm per pixel; without places it is the slide
and the row's number. Nothing is unpickled, and nothing is computed: the features are the file's, as float32.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eosin.data_tools.embeddings import KEYS_ONLY, Embeddings, write_embeddings
from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_csv, sha256
from eosin.data_tools.progress import progress
from eosin.data_tools.shards import slide_key, tile_key
from eosin.eval.embed_parts import Summary, made_already

if TYPE_CHECKING:
    import pandas as pd
    import torch

FEATURES = ("features", "embeddings", "feats")
COORDS = "coords"
# What others call a column -> what it is called here.
COLUMNS = {
    "labels": "label",
    "keys": "key",
    "filenames": "key",
    "slides": "slide",
    "slide_id": "slide",
    "patients": "patient",
    "groups": "group",
}
BOUNDS = {"x": (-(2.0**53), 2.0**53), "y": (-(2.0**53), 2.0**53), "mpp": (1e-6, 1e6)}  # of what a row says of its place
MPP = ("mpp", "target_mpp", "patch_mpp")  # attributes that say µm per pixel of the tiles
SUFFIXES = (".npz", ".safetensors", ".h5", ".hdf5", ".pt", ".pth")


def import_features(path: Path, out: Path, slides: Path | None = None, name: str | None = None) -> Summary:
    """Write the embeddings file ``out`` of the features in ``path``, a file or a folder with a file a slide.

    Does nothing when ``out`` holds these already.

    Args:
        slides: CSV with a column ``slide``, whose other columns are added to the tiles of each slide.
        name: the encoder's, by default that of the file or folder.

    Raises:
        UserError: ``out`` holds something else, a file is broken or holds no features, dimensions differ, a value is
            not finite, two rows have one key, or the CSV knows none of the slides.
    """
    import pandas as pd

    files = _files(path)
    fingerprint: dict[str, Any] = {"name": name or path.resolve().stem, "precomputed": _content(files)}
    if slides is not None:
        fingerprint["slides"] = sha256(_is_file(slides))
    one_a_slide = path.is_dir()
    features: list[np.ndarray] = []
    tables = []
    for file in progress(files, total=len(files), desc="read", unit="files"):
        arrays, mpp = _read(file)
        found = _features(arrays, file)
        if features and found.shape[1] != features[0].shape[1]:
            raise UserError(
                f"{file} holds features of {found.shape[1]} numbers and {files[0]} of {features[0].shape[1]}; "
                "one file of embeddings holds those of one encoder"
            )
        features.append(found)
        tables.append(_table(arrays, len(found), file, mpp, one_a_slide))
    table = pd.concat(tables, ignore_index=True)
    twice = table["key"].duplicated()
    if twice.any():
        raise UserError(f"{path} holds two rows of the key '{table['key'][twice.argmax()]}'; keys must be unique")
    # Files of other encoders on the same tiles have the same; of ours, only the keys can be compared.
    fingerprint["shards"] = KEYS_ONLY + hashlib.sha256("\n".join(sorted(table["key"])).encode()).hexdigest()
    if there := made_already(out, fingerprint):
        return there
    if slides is not None:
        table = _joined(table, slides)
    joined = np.concatenate(features)
    write_embeddings(out, Embeddings(joined, table, fingerprint))
    return Summary(len(joined), joined.shape[1])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is of no kind that is known; valid: {', '.join(SUFFIXES)}, or a folder of these")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a file or a folder of features")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    kinds = sorted({f.suffix.lower() for f in files})
    if not files:
        below = sorted({f.parent.name for f in path.glob("*/*") if f.suffix.lower() in SUFFIXES})
        raise UserError(
            f"{path} holds no {', '.join(SUFFIXES)}" + (f"; give one of its folders: {', '.join(below)}" * bool(below))
        )
    if len(kinds) > 1:
        raise UserError(f"{path} holds files of several kinds ({', '.join(kinds)}); put those of one kind in a folder")
    return files


def _content(files: list[Path]) -> str:
    """SHA-256 over names and contents: the same wherever they lie."""
    return hashlib.sha256("\n".join(f"{f.name} {sha256(f)}" for f in files).encode()).hexdigest()


def _read(file: Path) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of a file by name, and µm per pixel of its tiles, NaN where it does not say."""
    kind = file.suffix.lower()
    try:
        if kind == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}, np.nan
        if kind == ".safetensors":
            from safetensors.torch import load_file

            return _arrays(load_file(file)), np.nan
        return _read_torch(file) if kind in (".pt", ".pth") else _read_hdf5(file)
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own for a broken file
        text = " ".join(str(error).split()).split(". ")[0][:120] or type(error).__name__
        raise UserError(f"{file} is not readable as {kind[1:]} without unpickling: {text}") from None


def _read_torch(file: Path) -> tuple[dict[str, np.ndarray], float]:
    import torch

    found = torch.load(file, map_location="cpu", weights_only=True)
    tensors = found if isinstance(found, dict) else {FEATURES[0]: found}
    return _arrays({name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}), np.nan


def _arrays(tensors: dict[Any, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors as arrays, floats as float32, since NumPy has no bfloat16."""
    plain = {str(name): value.detach() for name, value in tensors.items()}
    return {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in plain.items()}


def _read_hdf5(file: Path) -> tuple[dict[str, np.ndarray], float]:
    import h5py

    with h5py.File(file, "r") as archive:
        # A link or a dataset may lead to other files, which the user did not give.
        own = [name for name in archive if isinstance(archive.get(name, getlink=True), h5py.HardLink)]
        data = {name: archive[name] for name in own if isinstance(archive[name], h5py.Dataset)}
        led = (set(archive) - set(own)) | {name for name, d in data.items() if d.is_virtual or d.external}
        data = {name: d for name, d in data.items() if name not in led}
        if led & set(FEATURES) and not data.keys() & set(FEATURES):
            raise UserError(f"{file}: its features lie elsewhere, behind a link that is not followed; copy them in")
        # Beside features and places a column is one value a row.
        data = {name: d for name, d in data.items() if name in (*FEATURES, COORDS) or d.ndim == 1}
        attributes = dict(archive.attrs) | {k: v for d in data.values() for k, v in d.attrs.items()}
        arrays = {name: (v.asstr()[()] if h5py.check_string_dtype(v.dtype) else v[()]) for name, v in data.items()}
    said = [float(attributes[name]) for name in MPP if name in attributes]
    return arrays, said[0] if said else np.nan


def _features(arrays: dict[str, np.ndarray], file: Path) -> np.ndarray:
    """Features [N, D], float32."""
    if any(name.startswith("column/") for name in arrays):
        raise UserError(f"{file} is a file of 'eosin embed' already; give it to 'eosin eval' as it is")
    name = next((n for n in FEATURES if n in arrays), None)
    if name is None:
        raise UserError(f"{file} holds no {' or '.join(FEATURES)}; it has: {', '.join(sorted(arrays)) or 'nothing'}")
    found = arrays[name]
    if found.ndim == 3 and len(found) == 1:
        found = found[0]
    if found.ndim != 2 or not found.size or found.dtype.kind not in "fiu":
        raise UserError(f"{file}: {name} is {found.dtype} of shape {list(found.shape)}, not numbers [N, D]")
    with np.errstate(over="ignore"):  # what is too large is refused as infinite
        found = found.astype(np.float32)
    bad = ~np.isfinite(found).all(axis=1)
    if bad.any():
        raise UserError(f"{file} holds values that are not finite in {bad.sum()} of {len(bad)} rows; embed these again")
    return found


def _table(arrays: dict[str, np.ndarray], rows: int, file: Path, mpp: float, one_a_slide: bool) -> pd.DataFrame:
    """What is known of the rows of a file: at least slide, key, x, y and mpp."""
    import pandas as pd

    places = arrays.get(COORDS)
    if places is not None:
        places = places[0] if places.ndim == 3 and len(places) == 1 else places
        if places.ndim != 2 or len(places) != rows or places.shape[1] < 2 or places.dtype.kind not in "iuf":
            raise UserError(f"{file}: {COORDS} of shape {list(places.shape)} do not belong to {rows} features")
    columns: dict[str, Any] = {}
    for name, values in arrays.items():
        if name not in FEATURES and values.shape == (rows,) and values.dtype.kind in "biufUOS":
            texts = values.dtype.kind in "UOS"
            called = COLUMNS.get(name, name)
            if called in columns:
                raise UserError(f"{file} holds the column '{called}' twice, under different names; leave one out")
            columns[called] = [_text(v, file) for v in values.tolist()] if texts else values
    if places is not None:
        columns |= {"x": places[:, 0], "y": places[:, 1]}
    if not np.isnan(mpp):
        columns.setdefault("mpp", np.full(rows, mpp))
    for name, (low, high) in BOUNDS.items():
        if name in columns:
            columns[name] = _numbers(columns[name], low, high, f"{file}: {name}")
    placed = {"x", "y"} <= set(columns) and np.isfinite([columns["x"], columns["y"]]).all()
    if placed:
        columns |= {name: columns[name].astype(np.int64) for name in ("x", "y")}
    # Tiles of one file are of one slide only where that is how such files are made.
    slide = file.stem if one_a_slide or places is not None else ""
    unknown = np.full(rows, np.nan)
    table = {"slide": [slide] * rows, "key": [], "x": unknown, "y": unknown, "mpp": unknown} | columns
    if "key" not in columns:
        table["key"] = _keys(table) if placed else [f"{slide_key(file.stem)}_{i}" for i in range(rows)]
    return pd.DataFrame(table).astype({"key": str, "slide": str})


def _keys(table: dict[str, Any]) -> list[str]:
    """The keys that 'eosin tile' gives to these tiles; without the scale where that is not known."""
    return [
        f"{slide_key(str(slide))}_{int(x)}_{int(y)}" if np.isnan(mpp) else tile_key(str(slide), int(x), int(y), mpp)
        for slide, x, y, mpp in zip(table["slide"], table["x"], table["y"], np.asarray(table["mpp"], dtype=float))
    ]


def _joined(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with the columns that a CSV has of each slide; these go before its own, but for those of a tile."""
    import pandas as pd

    rows = pd.DataFrame(read_csv(path, ["slide"]))
    twice = rows["slide"].duplicated() if len(rows) else pd.Series(dtype=bool)
    if twice.any():
        raise UserError(f"{path} names slide '{rows['slide'][twice.argmax()]}' twice; one row each")
    known = set(rows["slide"]) if len(rows) else set()
    missing = sorted(set(table["slide"]) - known)
    if missing:
        raise UserError(
            f"{path} has no row of {len(missing)} of the {table['slide'].nunique()} slides, such as '{missing[0]}'; "
            "a slide's name is that of its file without the ending"
        )
    added = rows.drop(columns=["key", *BOUNDS], errors="ignore")
    added = added.set_index("slide").loc[table["slide"]].reset_index(drop=True)
    return pd.concat([table[[c for c in table.columns if c not in added.columns]], added], axis=1)


def _numbers(values: Any, low: float, high: float, what: str) -> np.ndarray:
    """Values as float64, NaN where they are not known. Raises UserError for texts and what is out of range."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except ValueError:
        raise UserError(f"{what} holds what is no number; leave it out, or mend it") from None
    bad = ~np.isnan(found) & ~((low <= found) & (found <= high))
    if bad.any():
        raise UserError(f"{what} holds {found[bad][0]:g}, which cannot be; leave it out, or mend it")
    return found


def _text(value: Any, file: Path) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise UserError(f"{file} holds a text that is not UTF-8, {value!r}; write it again") from None


def _is_file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a CSV file with a column 'slide'")
    return path
