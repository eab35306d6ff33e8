"""Pictures of the notebooks, and training that one can watch."""

from __future__ import annotations

import io
from typing import Any

import IPython.display
import pytest
import torch
from PIL import Image
from torch import Tensor

import lineage
from lineage.course import begin, film, show, slider, source, watch
from lineage.course.display import SIDE, STILL, Picture
from lineage.errors import UserError
from lineage.nn.attention import Attention
from lineage.system import LabelledImage
from lineage.vqvae.quantise import VectorQuantiser

RED = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 32, 32)


def pixels(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(picture._repr_png_())).convert("RGB")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that is displayed, in order, updates too."""
    shown: list[Any] = []

    class Place:
        def update(self, value: Any) -> None:
            shown.append(value)

    def display(value: Any, display_id: bool = False) -> Place | None:
        shown.append(value)
        return Place() if display_id else None

    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_the_first_line_says_where_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    begin("08_ddpm", minutes=1.5)
    out = capsys.readouterr().out
    assert "08_ddpm: PyTorch" in out and "about 1.5 minutes" in out


def test_pictures_keep_their_colours() -> None:
    for images in ([RED, -RED], torch.stack([RED, -RED]), [RED.add(1).mul(127.5).byte(), -RED]):
        picture = pixels(show(images, ["red", "not red"]))
        assert picture.getpixel((20, 20)) == (255, 0, 0)
        assert picture.getpixel((20 + SIDE + 10, 20)) == (0, 255, 255)


def test_a_map_of_one_channel_is_grey_and_values_outside_are_clipped() -> None:
    picture = pixels(show([torch.full((1, 32, 32), -7.0), torch.full((1, 32, 32), 7.0)]))
    assert picture.getpixel((20, 20)) == (0, 0, 0)
    assert picture.getpixel((20 + SIDE + 10, 20)) == (255, 255, 255)


def test_each_picture_has_its_label() -> None:
    with pytest.raises(UserError, match="2 pictures need as many labels, not 1"):
        show([RED, RED], ["red"])


def test_rows_of_labelled_pictures() -> None:
    rows = [[LabelledImage("a", RED)], [LabelledImage("b", RED), LabelledImage("c", -RED)]]
    assert pixels(show(rows)).height > 2 * SIDE


def test_a_saved_picture_is_small() -> None:
    noise = torch.rand(8, 3, 32, 32) * 2 - 1
    assert len(show(noise)._repr_png_()) < 40_000


def test_a_film_needs_a_system_that_shows_something() -> None:
    system = lineage.load("pretrained:retrieval")
    with pytest.raises(UserError, match="nothing to visualise"):
        film(system, "a red circle")


def test_source_shows_the_lines_that_are_installed() -> None:
    shown = source(Attention.forward)
    text = shown._repr_markdown_()
    assert "lineage/nn/attention.py, line " in text and "\n```python\ndef forward" in text
    assert "forward</span>" in shown._repr_html_()


def test_source_of_a_decorated_function_is_its_own() -> None:
    assert "lineage/vqvae/quantise.py" in source(VectorQuantiser.ema_update)._repr_markdown_()


def test_source_begins_and_ends_where_it_is_told() -> None:
    text = source(show, "pictures = ", "return Picture(sheet")._repr_markdown_()
    lines = text.splitlines()
    assert lines[2].startswith("pictures = ") and lines[-2].startswith("return Picture(sheet")
    with pytest.raises(UserError, match="No line"):
        source(show, "no such line")


def test_watching_shows_a_row_for_each_caption(shown: list[Any]) -> None:
    captions = ["a red circle", "two blue squares"]
    steps = lineage.training_steps("ddpm", preset="smoke", steps=9)
    watched = watch(steps, captions, looks=4, sampling_steps=2)
    assert [step for step, _ in watched.losses] == [1, 3, 6, 9]
    assert [len(row) for row in watched.pictures] == [4, 4]
    assert [label for label, _ in watched.pictures[1]] == ["step 1", "step 3", "step 6", "step 9"]
    assert sum(isinstance(value, Picture) for value in shown) == 4
    assert watched.system.generate(captions[:1]).shape == (1, 3, 16, 16)


def test_watching_stages_that_draw_nothing_tells_the_step(shown: list[Any]) -> None:
    watched = watch(lineage.training_steps("vqvae", preset="smoke", steps=6), ["a red circle"])
    assert any("codec: step 1" in getattr(value, "data", "") for value in shown)
    assert watched.pictures and isinstance(shown[-1], Picture)


def test_nothing_to_watch_is_an_error(shown: list[Any]) -> None:
    with pytest.raises(UserError, match="no step"):
        watch([], ["a red circle"])


def test_a_slider_draws_what_it_stands_at(
    shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(STILL, raising=False)
    drawn: list[float] = []

    def draw(value: float) -> Tensor:
        drawn.append(value)
        return RED * value

    picture = slider(draw, "scale", [0.0, 0.5, 1.0], still=[1.0])
    move, place = shown[0].children
    before = place.value
    move.value = 0.5
    assert place.value != before
    move.value = 0.0
    assert place.value == before
    assert drawn == [0.0, 1.0, 0.5]  # each position once
    assert pixels(picture).getpixel((20, 20)) == (255, 0, 0)


def test_without_anybody_there_is_no_slider(
    shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STILL, "1")
    slider(lambda value: RED * value, "scale", [0.0, 1.0], still=[1.0])
    assert shown == []
