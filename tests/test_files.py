"""Files at the edges: paths, and files whose size is not known before they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lineage.cache import cache_folder
from lineage.errors import UserError
from lineage.files import TooLargeError, expanded, read_regular


def test_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a"
    assert expanded("a/~b") == Path("a/~b")
    assert expanded(Path("a b")) == Path("a b")


@pytest.mark.parametrize(
    ("path", "words"),
    [("", "--out is empty"), ("  ", "--out is empty"), ("~nosuchuser/x", "~nosuchuser/x begins")],
)
def test_a_path_that_is_none_is_refused(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        expanded(path, "--out")


def test_a_path_with_a_character_0_is_refused() -> None:
    with pytest.raises(UserError, match=r"a\\x00b is no path"):
        expanded("a\0b")


def test_a_home_folder_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without a name."""

    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(UserError, match="~/x begins with a home folder that is not known"):
        expanded("~/x")


@pytest.mark.parametrize("value", [None, "", "~/kept", "kept"])
def test_the_cache_is_where_its_variable_says(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty variable is none, as for XDG's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LINEAGE_CACHE")
    if value is not None:
        monkeypatch.setenv("LINEAGE_CACHE", value)
    expected = {"~/kept": tmp_path / "kept", "kept": Path("kept")}
    assert cache_folder("x") == expected.get(value or "", tmp_path / ".cache" / "lineage") / "x"


def test_a_file_is_not_read_beyond_its_limit() -> None:
    """Files of /proc have the size 0, whatever they hold."""
    file = Path("/proc/self/maps")
    if not file.exists() or file.stat().st_size:
        pytest.skip("this system has no files without a size")
    with pytest.raises(TooLargeError):
        read_regular(file, 10)
