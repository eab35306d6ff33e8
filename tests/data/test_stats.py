"""Numbers about a data set, as text, JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from miniatures import make_cub, save_picture, save_text

from lineage.cli import main
from lineage.data import load_dataset, pictures, stats
from lineage.data.stats import nearest_colours, spread, statistics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "<b>data"
    save_picture(root / "a.png", 0, (40, 20))
    save_text(root / "a.txt", "A red kite", "a <script>x</script> kite")
    save_picture(root / "b.png", 22, (60, 30))
    save_text(root / "b.txt", "A red kite")
    save_text(root / "lonely.txt", "x")
    return root


def test_what_is_counted(folder: Path) -> None:
    numbers = statistics(load_dataset(f"folder:{folder}", "all", 16))
    assert (numbers["pictures"], numbers["read"], numbers["captions"]) == (2, 2, 3)
    assert numbers["captions_per_picture"] == {"min": 1, "median": 1, "p95": 2, "max": 2}
    assert numbers["words_per_caption"] == {"min": 3, "median": 3, "p95": 5, "max": 5}
    assert numbers["repeated_captions"] == round(1 / 3, 4)
    assert numbers["vocabulary"] == 5
    assert numbers["words"]["kite"] == 1 and numbers["words"]["script"] == round(1 / 3, 4)
    assert (numbers["width"]["max"], numbers["height"]["min"]) == (60, 20)
    assert numbers["colours"]["black"] == 0.5 and numbers["colours"]["red"] == 0.5
    assert numbers["splits"] == {"train": 2} and numbers["left_out"] == 1
    assert numbers["num_labels"] == 0


def test_labels_have_the_names_of_their_classes(tmp_path: Path) -> None:
    numbers = statistics(load_dataset(f"cub:{make_cub(tmp_path)}", "all", 16))
    assert numbers["labels"] == {"7.Tern": 2, "2.Wren": 2, "9.Auk": 1, "4.Jay": 1}
    assert numbers["splits"] == {"train": 3, "test": 3}


def test_of_a_large_data_set_the_first_pictures_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MAX_PICTURES", 5)
    numbers = statistics(load_dataset("shapes", "train", 16))
    assert numbers["read"] == 5 and numbers["pictures"] > 5 and numbers["width"] is None
    assert "of which the first 5 are read here" in stats.lines(numbers)[0]


def test_a_broken_picture_of_a_streamed_data_set_has_no_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "b.png").write_bytes(b"broken")
    monkeypatch.setattr(pictures, "STREAM_FROM", 1)
    numbers = statistics(load_dataset(f"folder:{folder}", "all", 16))
    assert numbers["width"] == {"min": 40, "median": 40, "p95": 40, "max": 40}


def test_spread_and_colours() -> None:
    values = {"min": 1, "median": 50, "p95": 95, "max": 100}
    assert spread(range(1, 101)) == values
    assert spread([]) is None
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[2, :, 16:] = 200
    colours = nearest_colours(image)
    assert colours["black"] == colours["blue"] == 128 and sum(colours.values()) == 256


def test_the_page_escapes_what_users_wrote(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["data", "stats", f"folder:{folder}", "--out", str(out), "--size", "16"]) == 0
    html = out.read_text(encoding="utf-8")
    assert "&lt;b&gt;data" in html and "<b>data" not in html and "<script" not in html
    assert "http" not in html.replace("data:image/png", "")
    printed = capsys.readouterr().out
    assert "2 pictures" in printed and f"Open {out}" in printed


def test_json_alone_is_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", f"folder:{folder}", "--json", "--size", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 3


def test_where_a_page_cannot_be_written_is_told_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "page.html"
    assert main(["data", "stats", f"folder:{folder}", "--out", str(out)]) == 2
    assert "page.html" in capsys.readouterr().err
