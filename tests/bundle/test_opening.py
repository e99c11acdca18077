"""What opening a bundle refuses, folder or zip."""

import errno
import shutil
import zipfile
from pathlib import Path

import pytest
from bundles import FILES, edit_manifest, listing, replace_listed
from images import zipped
from tiny import Tiny

from gcvit_edge import Bundle, open_bundle
from gcvit_edge.errors import CheckFailed, UserError

# opening


@pytest.mark.parametrize("path", ["../outside.bin", "golden/../../outside.bin", "/etc/hostname", "..\\outside.bin"])
def test_paths_that_lead_outside_are_refused(path: str, copy: Path) -> None:
    edit_manifest(copy, lambda data: data["files"][0].update(path=path))
    with pytest.raises(UserError, match="lies outside the bundle; do not use it"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format_version": 1}',
        b'\xff\xfe{"format_version": 1}',
        b'{"format_version": 1, "files": 3}',
        b"[" * 200_000,
    ],
)
def test_damaged_manifest(content: bytes, copy: Path) -> None:
    (copy / "bundle.json").write_bytes(content)
    with pytest.raises(CheckFailed, match=r"bundle\.json of .*copy is damaged: .*; get the bundle again"):
        open_bundle(copy)
    # of a zip that is the zip, not where it was unpacked
    with pytest.raises(CheckFailed, match=r"bundle\.json of .*mine\.zip is damaged: .*; get the bundle again"):
        open_bundle(zipped(copy, copy.parent / "mine.zip"))


def test_unknown_manifest_key(copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(surprise=1))
    with pytest.raises(CheckFailed, match="is damaged"):
        open_bundle(copy)


@pytest.mark.parametrize("version", [2, 99])
def test_newer_format(version: int, copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(format_version=version, new_key="of the new format"))
    with pytest.raises(UserError, match=f"has bundle format {version}, this gcvit-edge reads 1; update it"):
        open_bundle(copy)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no bundle; give a folder or zip"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no bundle\.json, so it is no bundle"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(UserError, match="file is no bundle"):
        open_bundle(tmp_path / "file")


def test_a_bundle_one_folder_down_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """As `zip -r demo.zip demo` makes it."""
    shutil.copytree(bundle.root, tmp_path / "all" / "demo")
    with pytest.raises(UserError, match=r"all is no bundle, but .*demo is; give that"):
        open_bundle(tmp_path / "all")
    with pytest.raises(UserError, match=r"all\.zip holds a bundle in its folder demo; zip what is in that folder"):
        open_bundle(zipped(tmp_path / "all", tmp_path / "all.zip"))


# files that are read only when they are needed

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["report.json", "golden/input.npy", "golden/onnx.int8.npy"])
@pytest.mark.parametrize("content", [None, POINTER, b"", b"half"])
def test_a_missing_or_damaged_file_is_named(name: str, content: bytes | None, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    opened = open_bundle(copy)
    read = {
        "report.json": lambda: opened.report,
        "golden/input.npy": opened.golden_input,
        "golden/onnx.int8.npy": lambda: opened.golden_logits(opened.artifact()),
    }
    state = "is missing from the bundle; get the bundle again" if content is None else "of the bundle is damaged; get the bundle again"
    with pytest.raises(CheckFailed, match=f"^{name} {state}"):
        read[name]()


# zip


def test_zipped_bundle_opens_verifies_and_predicts_alike(bundle: Bundle, tiny: Tiny, tmp_path: Path) -> None:
    opened = open_bundle(zipped(bundle.root, tmp_path / "bundle.zip"))
    assert opened.manifest == bundle.manifest
    assert opened.verify()["onnx.int8"].sqnr_db > 60
    images = [tiny.image("red"), tiny.image("blue")]
    assert opened.predict(images) == bundle.predict(images)


def test_predicting_with_a_file_that_is_not_the_artifact(copy: Path, tiny: Tiny) -> None:
    """One that a runtime would refuse with words of its own, or one that it would run."""
    model = open_bundle(copy).artifact("onnx").path
    whole = model.read_bytes()
    for content in (b"version https://git-lfs.github.com/spec/v1\n", bytes([*whole[:-100], whole[-100] ^ 1, *whole[-99:]])):
        model.write_bytes(content)
        changed = rf"model\.int8\.onnx was changed .*: got {len(content)} bytes .* {len(whole)} bytes .*\(out of Git: with git lfs pull\)"
        with pytest.raises(CheckFailed, match=changed):
            open_bundle(copy).predict([tiny.image("red")])
    model.unlink()
    with pytest.raises(CheckFailed, match=r"model\.int8\.onnx is missing from the bundle; get the bundle again"):
        open_bundle(copy).predict([tiny.image("red")])


def test_truncated_zip(bundle: Bundle, tmp_path: Path) -> None:
    file = zipped(bundle.root, tmp_path / "bundle.zip")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckFailed, match=r"bundle\.zip is no whole zip file, as if it had been cut off on its way"):
        open_bundle(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_with_damaged_content(method: int, bundle: Bundle, tmp_path: Path) -> None:
    file = zipped(bundle.root, tmp_path / "bundle.zip", method)
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo("model.int8.onnx")
    data = bytearray(file.read_bytes())
    middle = entry.header_offset + entry.compress_size // 2
    data[middle : middle + 400] = b"\xff" * 400
    file.write_bytes(data)
    with pytest.raises((UserError, CheckFailed), match=r"bundle\.zip"):
        open_bundle(file).verify()


def test_zip_members_stay_inside(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zipped(bundle.root, tmp_path / "bundle.zip")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../escaped.txt", "x")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    opened = open_bundle(file)
    assert opened.root.is_relative_to(deep)
    assert listing(opened.root) == FILES
    assert not list(tmp_path.rglob("escaped.txt"))
    with pytest.raises(CheckFailed, match=r"does not list: \.\./\.\./escaped\.txt"):
        opened.verify()


def test_zip_members_that_are_not_listed_are_not_unpacked(bundle: Bundle, tmp_path: Path) -> None:
    file = zipped(bundle.root, tmp_path / "bundle.zip")
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("golden/large.bin", bytes(10**7))
    opened = open_bundle(file)
    assert listing(opened.root) == FILES
    with pytest.raises(CheckFailed, match=r"does not list: golden/large\.bin"):
        opened.verify()


@pytest.mark.parametrize("name", ["bundle.json", "model.int8.onnx"])
def test_zip_members_are_no_larger_than_listed(name: str, copy: Path) -> None:
    with (copy / name).open("ab") as file:
        file.write(b" " * 2**24)
    size = (copy / name).stat().st_size
    with pytest.raises(CheckFailed, match=rf"^{name} in .*mine\.zip has {size} bytes, expected at most \d+; get the bundle again"):
        open_bundle(zipped(copy, copy.parent / "mine.zip"))


def test_zip_without_a_listed_file(copy: Path) -> None:
    (copy / "report.json").unlink()
    with pytest.raises(CheckFailed, match=r"report\.json is missing from the bundle"):
        open_bundle(zipped(copy, copy.parent / "mine.zip")).verify()


def test_no_room_to_unpack_a_zip(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = zipped(bundle.root, tmp_path / "bundle.zip")
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space left on device"):  # of which the command line makes exit code 4
        open_bundle(file)


def test_a_small_zip_of_a_large_file(bundle: Bundle, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed as large as it is: nothing of it is unpacked, and nothing is left."""
    monkeypatch.setattr("gcvit_edge.bundle.bundle._MAX_MANIFEST_BYTES", 100_000)
    monkeypatch.setattr("gcvit_edge.bundle.bundle._MOST_UNPACKED", 10)
    replace_listed(copy, "labels.txt", bytes(10**8))
    file = zipped(copy, tmp_path / "bundle.zip")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(CheckFailed, match=r"bundle\.zip lists 10\d+ bytes and has \d+, far too few for weights"):
        open_bundle(file)
    claimed = bytearray(file.read_bytes())  # a zip may also say that its members are packed worse, or have the same bytes in several
    entry = claimed.rindex(b"labels.txt") - 46
    assert claimed[entry : entry + 4] == b"PK\1\2"
    claimed[entry + 20 : entry + 24] = (2 * 10**7).to_bytes(4, "little")
    file.write_bytes(claimed)
    with pytest.raises(CheckFailed, match="far too few for weights"):
        open_bundle(file)
    assert list((tmp_path / "temporary").iterdir()) == []
