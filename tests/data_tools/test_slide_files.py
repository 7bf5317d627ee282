"""Series told from DICOM elements written here byte by byte; copies of slides, of one file and of several."""

import struct

import pytest

from eosin.data_tools import slide_files
from eosin.data_tools.slide_files import find_copies, join_series, series_of, sizes_of, with_companions

LONG = ("SQ", "UN", "OB")


def element(tag: int, kind: str, value: bytes, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode()
    return head + (struct.pack("<HI", 0, size) if kind in LONG else struct.pack("<H", size)) + value


def item(value: bytes, undefined: bool) -> bytes:
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) if undefined else b""
    return struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF if undefined else len(value)) + value + end


def sequence(tag: int, *items: bytes, undefined: bool) -> bytes:
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0) if undefined else b""
    return element(tag, "SQ", b"".join(items) + end, 0xFFFFFFFF if undefined else None)


def dicom(series: str, undefined: bool = False) -> bytes:
    """A file whose elements before the series' hold another series' UID at every depth of nesting."""
    other = element(0x0020000E, "UI", b"9.9.9.9")
    nested = item(sequence(0x00081199, item(other, undefined), undefined=undefined) + other, undefined)
    value = series.encode()
    return (
        bytes(128)
        + b"DICM"
        + element(0x00020010, "UI", b"1.2.840.10008.1.2.1\0")
        + sequence(0x00081115, nested, item(other, not undefined), undefined=undefined)
        + element(0x00100010, "PN", b"Doe^Jane")
        + element(0x0020000D, "UI", b"1.1\0")
        + element(0x0020000E, "UI", value + b"\0" * (len(value) % 2))
        + element(0x00200011, "IS", b"1 ")
    )


@pytest.mark.parametrize("undefined", [False, True])
def test_the_series_is_that_of_the_file_and_not_of_one_it_refers_to(undefined, tmp_path):
    file = tmp_path / "a.dcm"
    file.write_bytes(dicom("1.2.345", undefined))
    assert series_of(file) == "1.2.345"


def test_no_series_where_there_is_none(tmp_path):
    whole = dicom("1.2.345", undefined=True)
    (tmp_path / "other.dcm").write_bytes(b"II*\0" + bytes(400))
    assert series_of(tmp_path / "other.dcm") is None
    assert series_of(tmp_path / "absent.dcm") is None
    for length in range(len(whole) - len("1.2.345") - 11):
        (tmp_path / "cut.dcm").write_bytes(whole[:length])
        assert series_of(tmp_path / "cut.dcm") is None


def test_files_of_a_series_are_joined_within_their_folder(tmp_path):
    (tmp_path / "b").mkdir()
    names = ["1.dcm", "2.dcm", "3.dcm", "4.dcm", "5.svs", "b/1.dcm", "b/2.dcm"]
    for name, series in zip(names, ["1.1", "2.2", "1.1", None, None, "1.1", "1.1"]):
        (tmp_path / name).write_bytes(dicom(series) if series else b"nothing")
    joined = join_series([tmp_path / name for name in names])
    assert [[file.relative_to(tmp_path).as_posix() for file in files] for files in joined] == [
        *(["1.dcm", "3.dcm"], ["2.dcm"], ["4.dcm"], ["5.svs"], ["b/1.dcm", "b/2.dcm"])
    ]


def test_companions_of_mirax_and_vms(tmp_path):
    (tmp_path / "s").mkdir()
    for name in ("s.mrxs", "s/Slidedat.ini", "s/Data0001.dat", "i-1.jpg", "i-2.jpg", "i-3.jpg", "elsewhere.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "t.vms").write_text("[Virtual]\nImageFile=i-1.jpg\nImageFile(1,0)=i-2.jpg\nMapFile=no.jpg\nX=5\n")
    assert with_companions(tmp_path / "s.mrxs")[1:] == [tmp_path / "s/Data0001.dat", tmp_path / "s/Slidedat.ini"]
    assert with_companions(tmp_path / "t.vms")[1:] == [tmp_path / "i-1.jpg", tmp_path / "i-2.jpg"]
    assert with_companions(tmp_path / "i-1.jpg") == [tmp_path / "i-1.jpg"]
    assert with_companions(tmp_path / "absent.mrxs") == [tmp_path / "absent.mrxs"]


def test_copies_are_told_by_all_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_files, "END_BYTES", 4)
    contents = ["headXtail", "headYtail", "headXtail", "headXtai1", "headXtail+", "", "", "headYtail", "headXtail"]
    files = [tmp_path / str(number) for number in range(len(contents))]
    for file, content in zip(files, contents):
        file.write_text(content)
    assert find_copies([[file] for file in files], [sizes_of([file]) for file in files]) == [[0, 2, 8], [1, 7]]


def test_slides_of_several_files_are_copies_when_all_files_are(tmp_path):
    slides = []
    for name, thumbnail, pixels in (("a", b"t", b"123"), ("b", b"t", b"124"), ("c", b"t", b"123"), ("d", b"u", b"123")):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.mrxs").write_bytes(thumbnail)
        (tmp_path / name / "Data.dat").write_bytes(pixels)
        slides.append(with_companions(tmp_path / f"{name}.mrxs"))
    assert find_copies(slides, [sizes_of(files) for files in slides]) == [[0, 2]]


def test_files_of_different_sizes_are_never_read(tmp_path, monkeypatch):
    files = [tmp_path / str(number) for number in range(5)]
    for number, file in enumerate(files):
        file.write_bytes(bytes(number + 1))
    monkeypatch.setattr(slide_files, "_digest_file", lambda *_: pytest.fail("read a file"))
    assert find_copies([[file] for file in files], [sizes_of([file]) for file in files]) == []


def test_a_file_that_cannot_be_read_is_no_copy(tmp_path):
    files = [tmp_path / name for name in "abc"]
    files[0].write_bytes(b"same")
    assert find_copies([[file] for file in files], [[4], [4], [4]]) == []
