"""Pseudonyms against HMAC as RFC 2104 writes it; keys made by several processes at once; columns that give ids away."""

import hashlib
import multiprocessing
import stat
from pathlib import Path

import pytest

from eosin.data_tools.errors import UserError
from eosin.data_tools.pseudonyms import ids_of, pseudonym, pseudonymize, read_key, refuse_ids
from eosin.data_tools.sources import Source

KEY = bytes(range(32))


def hmac_sha256(key: bytes, message: bytes) -> str:
    """RFC 2104, section 2: H(K xor opad, H(K xor ipad, text)), K padded to the hash's block of 64 bytes."""
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).hexdigest()


def slides() -> list[Source]:
    return [
        Source("TCGA-A6-2680-01Z-00-DX1.u", Path("a/TCGA-A6-2680-01Z-00-DX1.u.svs"), "TCGA-A6-2680-01Z-00-DX1.u.svs",
               {"patient": "TCGA-A6-2680", "site": "TCGA-A6", "grade": "2"}, 0.5),
        Source("TCGA-A6-2680-01Z-00-DX2.v", Path("a/TCGA-A6-2680-01Z-00-DX2.v.svs"), "TCGA-A6-2680-01Z-00-DX2.v.svs",
               {"patient": "TCGA-A6-2680", "site": "TCGA-A6", "grade": "3"}),
        Source("x", Path("a/x.svs"), "x.svs", {"patient": "", "site": "B", "grade": "2"}),
    ]  # fmt: skip


def test_names_and_patients_become_keyed_hashes_and_the_rest_stays():
    first, second, third = pseudonymize(slides(), KEY)
    assert first.slide == first.listed == "s" + hmac_sha256(KEY, b"s\0TCGA-A6-2680-01Z-00-DX1.u")[:16]
    patient = "p" + hmac_sha256(KEY, b"p\0TCGA-A6-2680")[:16]
    assert first.facts == {"patient": patient, "site": "TCGA-A6", "grade": "2"}
    assert second.facts["patient"] == patient
    assert second.slide != first.slide
    assert third.facts == {"patient": "", "site": "B", "grade": "2"}
    assert [source.path for source in (first, second, third)] == [source.path for source in slides()]
    assert first.mpp == 0.5
    assert pseudonymize(slides()[:1], bytes(32))[0].slide != first.slide


def test_no_original_id_is_left():
    written = [(s.slide, s.listed, s.facts, s.refused) for s in pseudonymize(slides(), KEY)]
    assert not [text for source in slides() for text in ids_of(source) if len(text) > 1 and text in str(written)]


def test_a_copy_names_its_original_by_pseudonym():
    first, second, _ = slides()
    copy = Source(
        "copy", Path("a/copy.svs"), "copy.svs", same_as=first.path, refused=f"the same bytes as {first.slide}"
    )
    result = pseudonymize([first, second, copy], KEY)
    assert result[2].refused == f"the same bytes as {result[0].slide}"


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("barcode", ["TCGA-A6-2680-01Z", "", ""]),
        ("note", ["", "seen with tcga-a6-2680", ""]),
        ("file", ["", "", "/data/a/TCGA-A6-2680-01Z-00-DX1.u.svs"]),
        ("related", ["", "", "other; TCGA-A6-2680"]),
        ("file name", ["TCGA-A6-2680-01Z-00-DX1.u.svs", "TCGA-A6-2680-01Z-00-DX2.v.svs", "x.svs"]),
    ],
)
def test_columns_that_hold_ids_are_refused(column, values):
    rows = slides()
    for source, value in zip(rows, values):
        source.facts[column] = value
    with pytest.raises(UserError, match=f"the column '{column}' holds ids"):
        pseudonymize(rows, KEY)


def test_short_ids_give_a_column_away_only_as_a_copy():
    rows = [Source(f"s{n}", None, f"s{n}", {"patient": str(n), "age": str(age)}) for n, age in ((1, 1), (2, 71))]
    pseudonymize(rows, KEY)
    rows[0].facts["case"], rows[1].facts["case"] = "1", "2"
    with pytest.raises(UserError, match="the column 'case' is that of the slides or patients"):
        pseudonymize(rows, KEY)


def test_columns_of_tiles_are_held_to_the_same():
    source = slides()[0]
    refuse_ids([({"spot": "AAACAAGT-1", "gene": "3"}, ids_of(source))])
    with pytest.raises(UserError, match="the column 'spot'"):
        refuse_ids([({"spot": "TCGA-A6-2680_1"}, ids_of(source))])


def test_a_key_is_made_once_and_for_its_owner(tmp_path):
    file = tmp_path / "keys" / "key"
    key = read_key(file)
    assert len(key) == 32
    assert file.read_bytes() == key == read_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["key"]
    assert read_key(tmp_path / "other") != key


def test_processes_that_start_at_once_read_one_key(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        keys = pool.map(read_key, [tmp_path / "key"] * 16, chunksize=1)
    assert set(keys) == {(tmp_path / "key").read_bytes()}
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_what_is_no_key_is_one_line(tmp_path):
    (tmp_path / "short").write_bytes(b"secret")
    (tmp_path / "long").write_bytes(bytes(5000))
    for name, reason in (("short", "holds 6 bytes"), ("long", "holds more than 4096 bytes"), (".", "cannot be read")):
        with pytest.raises(UserError, match=reason):
            read_key(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        read_key(tmp_path / "short" / "key")
    with pytest.raises(UserError, match="cannot be made: File name too long"):
        read_key(tmp_path / ("k" * 255))


def test_kinds_of_names_never_meet():
    assert pseudonym("s", "7", KEY)[1:] != pseudonym("p", "7", KEY)[1:]
