"""The page of what the systems of the package draw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lineage.catalog import CATALOG
from lineage.comparison import gallery
from lineage.errors import UserError


def test_the_page_shows_what_each_system_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve captions, two of each task, twice; `right` as often as the head of a column says."""
    assert {"retrieval", "stackgan", "vqvae", "ddpm", "ldm"} <= set(gallery.systems())
    assert not {"clip", "clipdraw", "ldm_emoji"} & set(gallery.systems())
    monkeypatch.setattr(gallery, "systems", lambda: ["retrieval", "vqvae"])
    gallery.write_gallery(tmp_path / "page" / "a.html")
    page = (tmp_path / "page" / "a.html").read_text()
    assert len(re.findall(r"<tr><th>", page)) == 1 + 12
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 2 * 12 * 2
    counts = [int(count) for count in re.findall(r"(\d+) of 24 right", page)]
    assert sum(counts) == page.count('<figure class="right">') == page.count(">right<")
    assert counts[0] > 20  # pictures that were cut out of real ones
    assert all(CATALOG[key].title in page for key in ("retrieval", "vqvae"))
    assert not re.search(r"<script|https?://", page)


def test_a_page_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        gallery.write_gallery(tmp_path / "file" / "a.html")


def test_a_fault_is_a_sentence_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["gallery", str(tmp_path / "file" / "a.html")])
    assert gallery.main() == 2
    assert capsys.readouterr().err.startswith("lineage: ")

    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gallery, "write_gallery", stop)
    monkeypatch.setattr("sys.argv", ["gallery"])
    assert gallery.main() == 130
