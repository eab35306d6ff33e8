"""Files that Git or a server put in place of others, and foreign files named like pictures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lineage.data.tools import check
from lineage.errors import UserError
from lineage.training.store import load_tensors, read_json

STAND_INS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\n", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s12--4665.png\n", "git annex get"),
    "page": (b"<!DOCTYPE html>\n<html>Not found</html>\n", "a web page: download the file itself"),
    "error": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<Error>Gone</Error>', "a web page: download"),
}


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


GOOD = {"good/g.png": picture(), "good/g.txt": b"good"}
ROW = json.dumps({"file_name": "g.png", "text": "good"}).encode()
TABLE = {"good/g.png": picture(), "good/metadata.jsonl": ROW}
SHARD = tar({"g.png": picture(), "g.txt": b"good"})
MAKERS: dict[str, Callable[[bytes], dict[str, bytes]]] = {
    "a.png": lambda raw: {**GOOD, "a.png": raw, "a.txt": b"x"},
    "a.txt": lambda raw: {**GOOD, "a.png": picture(), "a.txt": raw},
    "metadata.jsonl": lambda raw: {**TABLE, "metadata.jsonl": raw},
    "metadata.csv": lambda raw: {**TABLE, "metadata.csv": raw},
    "metadata.parquet": lambda raw: {**TABLE, "metadata.parquet": raw},
    "a.tar": lambda raw: {"good.tar": SHARD, "a.tar": raw},
    "a.tar.gz": lambda raw: {"good.tar": SHARD, "a.tar.gz": raw},
    "b.tar: a.txt": lambda raw: {"good.tar": SHARD, "b.tar": tar({"a.png": b"", "a.txt": raw})},
    "b.tar: a.json": lambda raw: {"good.tar": SHARD, "b.tar": tar({"a.png": b"", "a.json": raw})},
    "b.tar: b/a": lambda raw: {"good.tar": SHARD, "b.tar": tar({"a.png": raw, "a.txt": b"x"})},
}
"""Files of a data set with one good picture, with one file replaced, by the path that is named."""


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_stand_in_is_named_with_its_mend(tmp_path: Path, name: str, kind: str) -> None:
    raw, words = STAND_INS[kind]
    report = check(write(tmp_path, MAKERS[name](raw)), 8)
    reasons = [s["reason"] for s in report["skipped"] if s["path"] == name]
    assert report["loaded"] == report["captions"] == 1
    assert len(reasons) == 1 and words in reasons[0]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "an HEIC picture: convert it to PNG"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "no picture of a known format"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a drawing in SVG: convert it to PNG"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<svg width="8"/>', "a drawing in SVG"),
        (b"%PDF-1.7\n", "a PDF: convert it to PNG"),
        (b"PK\3\4" + bytes(40), "an archive: unpack it"),
        (b"<html><svg/></html>", "a web page"),
        (b"Not found", "no picture of a known format"),
    ],
)
def test_a_foreign_file_named_like_a_picture_is_recognised(
    tmp_path: Path, raw: bytes, words: str
) -> None:
    report = check(write(tmp_path, {**GOOD, "a.jpg": raw, "a.txt": b"x"}), 8)
    (skipped,) = report["skipped"]
    assert report["loaded"] == 1 and skipped["path"] == "a.jpg" and words in skipped["reason"]


@pytest.mark.parametrize("read", [load_tensors, read_json])
def test_a_stand_in_for_a_file_of_a_run_is_named(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    """As in a run that was cloned without Git LFS; to train again would be the wrong advice."""
    raw, words = STAND_INS["lfs"]
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "file")
    assert "train again" not in str(caught.value)
