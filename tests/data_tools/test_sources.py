"""Names and lists of inputs, tables joined by hand, copies, parts; more on tables is in the tests of tiling."""

import os
import random
import struct
from pathlib import Path

import pytest

from eosin.data_tools.errors import UserError
from eosin.data_tools.files import read_csv
from eosin.data_tools.sources import (
    Source,
    Summary,
    find_slides,
    fingerprint,
    join_table,
    leave_out_frozen,
    parse_part,
    part_of,
    shorten,
    unique_names,
)

DX, TS = "TCGA-A6-2680-01Z-00-DX1.u.svs", "TCGA-A6-2680-11A-01-TSA.v.svs"


def write(folder: Path, **contents: str | bytes) -> None:
    """Files of a folder; ``__`` in a name is a slash, and other underscores are dots."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def dicom(series: str) -> bytes:
    value = series.encode() + b"\0" * (len(series) % 2)
    return bytes(128) + b"DICM" + struct.pack("<HH2sH", 0x20, 0xE, b"UI", len(value)) + value


def test_names_are_unique_and_short():
    def names(*paths: str) -> list[str]:
        return unique_names([(Path(Path(path).name), Path(path)) for path in paths])

    assert names("a/TCGA-1.x.svs", "b/c.tif") == ["TCGA-1.x", "c"]
    assert names("p1/s.tif", "p2/s.tif", "t.tif") == ["p1/s", "p2/s", "t"]
    assert names("s.tif", "s.svs") == ["s.tif", "s.svs"]
    assert len(set(names("s.tif", "s.svs", "s.tif.svs", "x/s.tif"))) == 4


def test_names_that_cannot_be_told_apart():
    with pytest.raises(UserError, match=r"two files are both called 's\.tif'"):
        unique_names([(Path("s.tif"), Path("s.tif"))] * 2)


def test_folders_prefer_slides_to_pictures(tmp_path):
    (tmp_path / "case" / ".cache").mkdir(parents=True)
    for name in ("b.svs", "case/a.TIF", "macro.png", ".hidden.svs", "case/.cache/c.svs", "notes.txt"):
        (tmp_path / name).touch()
    assert [source.listed for source in find_slides([tmp_path])] == ["b.svs", "a.TIF"]
    assert [source.listed for source in find_slides([tmp_path / "macro.png"])] == ["macro.png"]
    (tmp_path / "b.svs").unlink()
    (tmp_path / "case" / "a.TIF").unlink()
    assert [source.slide for source in find_slides([tmp_path])] == ["macro"]


def test_what_cannot_be_read_is_never_passed_over(tmp_path, monkeypatch):
    write(tmp_path, a_svs="a", b_svs="b")
    (tmp_path / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    assert [source.listed for source in find_slides([tmp_path])] == ["a.svs", "b.svs", "gone.svs"]
    os.mkfifo(tmp_path / "pipe.svs")
    with pytest.raises(UserError, match=r"pipe\.svs is no file"):
        find_slides([tmp_path / "pipe.svs"])
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
        find_slides([tmp_path])


def test_pictures_of_an_earlier_tiling_are_no_slides(tmp_path):
    write(tmp_path, a_png="a", out__dataset_json="{}", parts_unfinished__settings_json="{}", qc__c_png="c")
    for folder in ("out", "parts.unfinished"):
        (tmp_path / folder / "qc").mkdir()
        (tmp_path / folder / "qc" / "a.png").touch()
    assert [source.listed for source in find_slides([tmp_path])] == ["a.png", "c.png"]


def test_a_name_with_line_breaks_stays_on_one_line():
    assert str(Summary([], [("a\nb.svs", "broken")])).splitlines() == ["refused: 1", r"  a\nb.svs: broken"]


def test_fingerprint_follows_names_sizes_and_order(tmp_path):
    one, two = tmp_path / "1.svs", tmp_path / "2.svs"
    one.write_bytes(b"a")
    two.write_bytes(b"bb")
    first = fingerprint([one, two])
    assert first == fingerprint([one, two])
    assert first != fingerprint([two, one])
    one.write_bytes(b"aa")
    assert first != fingerprint([one, two])


def test_shorten():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten(list("abcdefg"), limit=2) == "a, b and 5 more"


def test_copies_are_refused_and_the_first_by_name_is_kept(tmp_path):
    write(tmp_path, x__s_svs="same", y__s_svs="same", b_svs="same", a_svs="other", c_svs="size", e_svs="", f_svs="")
    given = [tmp_path / name for name in ("y", "x", "b.svs", "a.svs", "c.svs", "e.svs", "f.svs")]
    original = ("the same bytes as b", tmp_path / "b.svs")
    for order in (given, given[::-1]):
        assert {source.slide: (source.refused, source.same_as) for source in find_slides(order)} == {
            **dict.fromkeys("abcef", ("", None)),
            **dict.fromkeys(("x/s", "y/s"), original),
        }


def test_a_dicom_series_is_one_slide_called_as_its_folder(tmp_path):
    write(tmp_path, s__1_dcm=dicom("1.1"), s__2_dcm=dicom("1.1") + b"more", t__1_dcm=dicom("2.2"), a_svs="a")
    write(tmp_path, u__1_dcm=dicom("3.3"), u__2_dcm=dicom("4.4"), u__3_dcm=dicom("3.3"))
    (tmp_path / "s").rename(tmp_path / "1.2.840.5")
    found = find_slides([tmp_path])
    assert {source.slide: source.path.relative_to(tmp_path).as_posix() for source in found} == {
        **{"1.2.840.5": "1.2.840.5/1.dcm", "a": "a.svs", "t/1": "t/1.dcm", "u/1": "u/1.dcm", "2": "u/2.dcm"},
    }
    series = next(source for source in found if source.slide == "1.2.840.5")
    assert (series.listed, series.nbytes) == ("1.2.840.5", 2 * len(dicom("1.1")) + 4)
    assert [s.slide for s in find_slides(sorted((tmp_path / "1.2.840.5").iterdir()))] == ["1.2.840.5"]
    (tmp_path / "t.csv").write_text("path,stain\n1.2.840.5,IHC\n")
    joined, notices = join_table(found, tmp_path / "t.csv")
    assert next(source.facts for source in joined if source.slide == "1.2.840.5") == {"stain": "IHC"}
    assert notices == ["no row in t.csv: a.svs, 1.dcm, 1.dcm, 2.dcm"]


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    name = b"sl\xe4de.svs"
    (tmp_path / os.fsdecode(name)).write_bytes(b"same")
    write(tmp_path, a_svs="same")
    found = find_slides([tmp_path])
    assert [(source.slide, source.refused) for source in found] == [
        ("a", ""),
        (r"sl\xe4de", "its path is not UTF-8; rename it"),
    ]
    str([source.listed for source in found]).encode()
    assert len(fingerprint(source.path for source in found)) == 64


def test_names_say_what_the_table_leaves_out(tmp_path):
    write(tmp_path, b_svs="b", c_svs="c")
    for number, name in enumerate((DX, TS)):
        (tmp_path / name).write_text(str(number))
    said = {source.listed: source.facts for source in find_slides([tmp_path])}
    tcga = {"patient": "TCGA-A6-2680", "site": "TCGA-A6"}
    assert said[DX] == tcga | {"sample_type": "Primary Solid Tumor", "preparation": "FFPE"}
    assert said["b.svs"] == {}
    table = tmp_path / "t.csv"
    table.write_text(
        f"slide,patient,preparation,batch,mpp\n{DX},P1,,7,0.25\nb.svs,,frozen ,,\nTCGA-A6-9999-06Z-00-DX1.svs,,,8,\n"
    )
    joined, notices = join_table(find_slides([tmp_path]), table)
    by_name = {source.listed: source for source in joined}
    assert by_name[DX].facts == said[DX] | {"patient": "P1", "batch": "7"}
    assert by_name[DX].mpp == 0.25
    assert by_name["b.svs"].facts == {"patient": "", "preparation": "frozen ", "batch": ""}
    assert by_name[TS].facts == said[TS]
    absent = by_name["TCGA-A6-9999-06Z-00-DX1.svs"]
    assert (absent.path, absent.refused) == (None, "listed in the table, but no such file was given")
    assert (absent.facts["patient"], absent.facts["sample_type"], absent.facts["batch"]) == (
        *("TCGA-A6-9999", "Metastatic", "8"),
    )
    assert notices == [f"no row in t.csv: {TS}, c.svs"]
    kept, left_out = leave_out_frozen(joined)
    assert [source.listed for source in kept] == [DX, "c.svs", absent.listed]
    assert [source.listed for source in left_out] == [TS, "b.svs"]


def test_a_table_changes_no_refusal(tmp_path):
    write(tmp_path, a_svs="same", b_svs="same", t_csv="path,slide,stain\nb.svs,second,IHC\na.svs,first,IHC\n")
    copy = join_table(find_slides([tmp_path]), tmp_path / "t.csv")[0][1]
    assert (copy.slide, copy.refused, copy.same_as) == ("second", "the same bytes as a", tmp_path / "a.svs")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"path,a\ns\0.svs,1\n", "not readable as a CSV file in UTF-8: it holds a NUL byte"),
        (b"path,\0\ns.svs,1\n", "it holds a NUL byte"),
        ("path,a\ns.svs,1\n".encode("utf-16"), "not readable as a CSV file in UTF-8"),
        (b"path,a\ns.svs,\xe4\n", "not readable as a CSV file in UTF-8"),
    ],
)
def test_a_table_of_strange_bytes_is_one_line(content, reason, tmp_path):
    write(tmp_path, s_svs="s", t_csv=content)
    with pytest.raises(UserError, match=reason) as raised:
        join_table(find_slides([tmp_path]), tmp_path / "t.csv")
    assert "\n" not in str(raised.value)


def test_quoted_line_breaks_stay(tmp_path):
    write(tmp_path, t_csv='slide,note\r\na,"one\r\ntwo"\r\n')
    assert read_csv(tmp_path / "t.csv", ["slide"]) == [{"slide": "a", "note": "one\r\ntwo"}]


def test_parts_hold_every_slide_once_whatever_the_order():
    rng = random.Random(0)
    sizes = [round(rng.lognormvariate(7, 1), -2) for _ in range(101)]  # many are equal
    slides = [Source(f"s{number}", Path("s"), "s", nbytes=int(size)) for number, size in enumerate(sizes)]
    shuffled = rng.sample(slides, len(slides))
    for parts in (1, 2, 7, 200):
        dealt = [part_of(slides, part, parts) for part in range(1, parts + 1)]
        assert sorted(source.slide for part in dealt for source in part) == sorted(source.slide for source in slides)
        assert [sorted(s.slide for s in part_of(shuffled, n + 1, parts)) for n in range(parts)] == [
            sorted(source.slide for source in part) for part in dealt
        ]
    sizes = [sum(source.nbytes for source in part_of(slides, part, 7)) for part in range(1, 8)]
    assert max(sizes) < 1.1 * min(sizes)


def test_the_largest_are_dealt_first_and_refused_ones_weigh_nothing():
    slides = [Source(name, Path(name), name, nbytes=size) for name, size in zip("abcdef", (10, 60, 30, 50, 20, 40))]
    slides.append(Source("g", Path("g"), "g", refused="a copy", nbytes=100))
    dealt = [[source.slide for source in part_of(slides, part, 3)] for part in (1, 2, 3)]
    assert dealt == [["a", "b", "g"], ["d", "e"], ["c", "f"]]


def test_parse_part():
    assert parse_part("3/8") == (3, 8)
    assert parse_part("1/1") == (1, 1)
    for text in ("0/8", "9/8", "3", "3/", "/8", "a/b", "-1/8", "1.5/8", "3/8\n", " 3/8", "٣/٨", "1/10000000"):
        with pytest.raises(UserError, match="is not k/n with 1 <= k <= n, such as 3/8"):
            parse_part(text)
