"""`lineage app` without its page: controls, drawings, verdicts, masks and the queue."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field

from lineage.bounds import Float, PositiveInt
from lineage.catalog import CATALOG
from lineage.comparison import app_html
from lineage.comparison.app_controls import (
    MAX_NUMBER,
    MAX_TEXT,
    UNSET,
    control_of,
    controls_of,
    options_from,
)
from lineage.comparison.app_drawing import (
    MAX_PICTURES,
    Result,
    draw_each,
    draw_request,
    level_of,
    repaint_each,
    runs_at,
    square_mask,
    square_picture,
    verdicts_of,
    visualisation_of,
)
from lineage.comparison.app_queue import DrawingQueue
from lineage.comparison.app_runs import AppRun, example_captions, open_runs, packaged_runs
from lineage.comparison.app_sessions import MAX_SESSIONS, Sessions
from lineage.data import load_dataset
from lineage.errors import UserError
from lineage.pretrained import run_folder
from lineage.system import Option

RED_CIRCLE = "a red circle"


def packaged(*keys: str) -> list[AppRun]:
    return open_runs([run_folder(f"pretrained:{key}") for key in keys], "cpu")[0]


@pytest.fixture(scope="module")
def runs() -> dict[str, AppRun]:
    """Four runs by key."""
    keys = ("retrieval", "vqvae", "attngan", "ddpm")
    return dict(zip(keys, packaged(*keys), strict=True))


# --- runs -----------------------------------------------------------------------------------------


def test_all_packaged_runs_that_draw_are_opened_before_any_weight_is_read() -> None:
    opened, faults = open_runs(packaged_runs())
    assert faults == [] and "clip" not in {run.folder.name for run in opened}
    assert all(run._system is None for run in opened)
    assert [run.year for run in opened] == [CATALOG[run.folder.name].year for run in opened]


def test_a_broken_run_is_named_and_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    folders = [broken, run_folder("pretrained:clip"), run_folder("pretrained:retrieval")]
    opened, faults = open_runs(folders)
    assert [run.title for run in opened] == ["Cut and paste"]
    assert "config.json" in faults[0] and "draws no pictures" in faults[1]
    with pytest.raises(UserError, match=r"config\.json"):
        open_runs([broken])


def test_damaged_weights_are_a_sentence_when_the_run_draws(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder("pretrained:gan_int_cls"), copy)
    (copy / "model.safetensors").write_bytes(b"no weights")
    (whole, damaged), faults = open_runs([copy, run_folder("pretrained:retrieval")], "cpu")
    assert faults == []
    results = list(draw_each({0: damaged, 1: whole}, draw_request(RED_CIRCLE)))
    assert "model.safetensors" in results[0].error and not results[0].images
    assert results[1].error == "" and len(results[1].images) == 1


def test_two_runs_of_one_system_have_two_names(tmp_path: Path) -> None:
    shutil.copytree(run_folder("pretrained:gan_int_cls"), tmp_path / "copy")
    opened, _ = open_runs([tmp_path / "copy", run_folder("pretrained:gan_int_cls")])
    assert len({run.label for run in opened}) == 2


def test_examples_are_captions_of_the_data(runs: dict[str, AppRun]) -> None:
    captions = example_captions(list(runs.values()))
    assert len(captions) == 8
    assert captions[0] == load_dataset("shapes", "validation", 32).showcase(8)[0].captions[0]
    other = packaged("retrieval")
    other[0].data = "folder:pictures"
    assert example_captions(other) == []


# --- controls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "default", "kind"),
    [
        (bool, True, "flag"),
        (str, "", "text"),
        (str | None, None, "text"),
        (Literal["a", "b"] | None, None, "choice"),
        (PositiveInt | None, None, "number"),
        (float, 1.0, "number"),
        (Annotated[Float, Field(ge=0, le=1)], 0.5, "slider"),
        (Annotated[float, Field(gt=0, le=1)] | None, None, "number"),
    ],
)
def test_a_control_fits_the_type(hint: Any, default: Any, kind: str) -> None:
    control = control_of(Option("name", hint, default, "What it does."))
    assert control.kind == kind and control.help.startswith("What it does.")


def test_bounds_and_defaults_are_in_the_help() -> None:
    steps = control_of(Option("steps", PositiveInt | None, None, "Number of steps."), 25)
    assert steps.help == f"Number of steps. Default: 25. At least 1 and at most {MAX_NUMBER}."
    share = control_of(Option("top_p", Annotated[Float, Field(gt=0, le=1)] | None, None, ""), 1.0)
    assert (share.kind, share.value, share.minimum, share.maximum) == ("slider", 1.0, 0.05, 1.0)


def test_only_what_was_set_is_passed(runs: dict[str, AppRun]) -> None:
    controls = controls_of(runs["ddpm"])
    names = [control.name for control in controls]
    assert "sampler" in names and not {"image", "mask", "strength"} & set(names)
    shown = {control.name: control.value for control in controls}
    assert options_from(controls, shown) == {}
    changed = {**shown, "sampling_steps": " 5 ", "spacing": "karras", "guidance": None}
    assert options_from(controls, changed) == {"sampling_steps": "5", "spacing": "karras"}
    assert shown["spacing"] == UNSET


@pytest.mark.parametrize("value", ["1001", "1e9", "inf"])
def test_a_number_that_would_take_for_ever_is_refused(value: str, runs: dict[str, AppRun]) -> None:
    with pytest.raises(UserError, match=r"sampling_steps must be at most 1,000"):
        options_from(controls_of(runs["ddpm"]), {"sampling_steps": value})


def test_every_option_of_every_packaged_run_has_a_control_or_a_place() -> None:
    for run in open_runs(packaged_runs())[0]:
        named = {control.name for control in controls_of(run)}
        rest = {"image", "mask", "reference", "control", "strength", "keep"}
        assert named | rest >= run.options.keys()
        assert all(control.help for control in controls_of(run))


# --- drawing --------------------------------------------------------------------------------------


def test_pictures_are_those_of_generate(runs: dict[str, AppRun]) -> None:
    request = draw_request(f" {RED_CIRCLE} ", 2, 3, {1: {"sampling_steps": "4"}})
    places = {0: runs["retrieval"], 1: runs["ddpm"]}
    results = list(draw_each(places, request, threads=1))
    assert [len(result.images) for result in results] == [2, 2]
    want = runs["ddpm"].system.generate([RED_CIRCLE] * 2, seed=3, sampling_steps=4)
    torch.testing.assert_close(
        torch.stack(results[1].images).float(), (want + 1) * 127.5, atol=2, rtol=0
    )
    assert all(result.seconds > 0 and len(result.verdicts) == 2 for result in results)


def test_a_wrong_value_is_a_sentence_of_its_system(runs: dict[str, AppRun]) -> None:
    request = draw_request(RED_CIRCLE, options={0: {"sampler": "ddimm"}})
    results = list(draw_each({0: runs["ddpm"], 1: runs["retrieval"]}, request))
    assert "did you mean 'ddim'" in results[0].error and results[1].images


def test_a_defect_does_not_stop_the_others(
    runs: dict[str, AppRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(runs["retrieval"].system, "generate", generate)
    results = list(draw_each({0: runs["retrieval"], 1: runs["vqvae"]}, draw_request(RED_CIRCLE)))
    assert "defect" in results[0].error and results[1].images
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_unread_words_and_idle_options_are_noted(runs: dict[str, AppRun]) -> None:
    request = draw_request("a red zorp", options={0: {"guidance": "1", "negative": "a star"}})
    (result,) = draw_each({0: runs["ddpm"]}, request)
    assert result.notes[0] == "Unknown words: zorp, star."
    assert "negative has no effect" in result.notes[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", 1, 0), "write a caption"),
        ((None, 1, 0), "write a caption"),
        (("a" * (MAX_TEXT + 1), 1, 0), "501 letters"),
        ((RED_CIRCLE, MAX_PICTURES + 1, 0), "from 1 to 8"),
        ((RED_CIRCLE, 0, 0), "from 1 to 8"),
        ((RED_CIRCLE, 1, -1), "seed"),
    ],
)
def test_a_request_beyond_its_bounds_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        draw_request(*arguments)


def test_no_system_is_a_sentence(runs: dict[str, AppRun]) -> None:
    with pytest.raises(UserError, match="tick at least one"):
        runs_at(list(runs.values()), [])
    assert list(runs_at(list(runs.values()), [2, 0])) == [0, 2]


# --- the judge ------------------------------------------------------------------------------------


def test_the_judge_reads_real_pictures() -> None:
    data = load_dataset("shapes", "validation", 32)
    examples = [data[i] for i in range(12)]
    for example in examples:
        (verdict,) = verdicts_of(example.image[None], example.captions[0], "shapes")
        assert verdict.is_right and verdict.wrong == "" and verdict.detected
    single = next(
        e for e in examples if e.captions[0].startswith("a ") and " and " not in e.captions[0]
    )
    (verdict,) = verdicts_of(single.image[None], "three green stars", "shapes")
    assert verdict.is_right is False and "count" in verdict.wrong


def test_what_the_judge_cannot_read_has_no_verdict() -> None:
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    (verdict,) = verdicts_of(image, "a house at dawn", "shapes:easy")
    assert verdict.is_right is None and verdict.detected == "nothing"
    assert verdicts_of(image, RED_CIRCLE, "emoji") == []
    assert verdicts_of(image[..., :16], RED_CIRCLE, "shapes") == []


@pytest.mark.parametrize(
    ("data", "level"),
    [
        ("shapes", "easy"),
        ("shapes:hard", "hard"),
        ("shapes:medium:zh", "medium"),
        ("shapes?lang=zh", "easy"),
        ("emoji", None),
        ("folder:shapes", None),
    ],
)
def test_the_level_of_a_run(data: str, level: str | None) -> None:
    assert level_of(data) == level


# --- repainting -----------------------------------------------------------------------------------


def enlarged(image: torch.Tensor) -> Image.Image:
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    return pil.resize((320, 320), Image.Resampling.NEAREST)


def test_only_the_painted_part_changes(runs: dict[str, AppRun]) -> None:
    image = load_dataset("shapes", "validation", 32)[0].image
    mask = np.zeros((320, 320), dtype=bool)
    mask[:, :160] = True
    places = {0: runs["ddpm"], 1: runs["vqvae"], 2: runs["attngan"]}
    request = draw_request("a green square", options={0: {"sampling_steps": "4"}})
    painted, continued, neither = repaint_each(places, request, enlarged(image), mask, 1.0, 0.5)
    assert torch.equal(painted.images[0][..., 16:], image[..., 16:])
    assert not torch.equal(painted.images[0][..., :16], image[..., :16])
    prior = runs["vqvae"].system
    want = prior.generate("a green square", image=(image[None] / 127.5 - 1), keep=0.5)
    assert (continued.images[0].float() - (want[0] + 1) * 127.5).abs().max() < 2
    assert "neither" in neither.error


def test_without_a_mask_the_picture_is_changed_and_not_replaced(runs: dict[str, AppRun]) -> None:
    image = load_dataset("shapes", "validation", 32)[0].image
    request = draw_request("a green square")
    (result,) = repaint_each({0: runs["ddpm"]}, request, enlarged(image), None, 1.0)
    want = runs["ddpm"].system.generate("a green square", image=(image[None] / 127.5 - 1))
    assert (result.images[0].float() - (want[0] + 1) * 127.5).abs().max() < 2


def test_a_picture_of_any_shape_becomes_a_square() -> None:
    image = Image.new("RGBA", (300, 100), (255, 0, 0, 255))
    image.paste((0, 255, 0, 255), (100, 0, 200, 100))
    square = square_picture(image, 32)
    assert square.shape == (3, 32, 32) and (square[1] == 255).all() and (square[0] == 0).all()
    assert (square_picture(Image.new("RGBA", (50, 50)), 32) == 255).all()  # transparent
    assert square_picture(Image.new("L", (1, 1)), 32).shape == (3, 32, 32)
    with pytest.raises(UserError, match="million pixels"):
        square_picture(Image.new("1", (5000, 5000)), 32)


def test_a_mask_is_read_as_the_picture_is() -> None:
    mask = np.zeros((100, 300), dtype=bool)
    assert square_mask(mask, 32) is None
    mask[:, :150] = True
    small = square_mask(mask, 32)
    assert small is not None and small[0, 0, :, :16].all() and not small[0, 0, :, 16:].any()
    speck = np.zeros((320, 320), dtype=bool)
    speck[0, 0] = True
    with pytest.raises(UserError, match="Too little"):
        square_mask(speck, 32)
    with pytest.raises(UserError, match="leave a part"):
        square_mask(np.ones((320, 320), dtype=bool), 32)


# --- how a picture came about ---------------------------------------------------------------------


def test_the_last_frame_is_the_picture(runs: dict[str, AppRun]) -> None:
    for key in ("ddpm", "vqvae"):
        shown = visualisation_of(runs[key], draw_request(RED_CIRCLE, 1, 5))
        want = runs[key].system.generate(RED_CIRCLE, seed=5)[0]
        assert len(shown.frames) >= 25 and len({len(frame) for frame in shown.frames}) == 1
        torch.testing.assert_close(shown.frames[-1][-1].image, want, atol=0.02, rtol=0)


def test_attention_is_in_rows_and_one_step_has_nothing_to_show(
    runs: dict[str, AppRun],
) -> None:
    shown = visualisation_of(runs["attngan"], draw_request(RED_CIRCLE))
    assert shown.frames == [] and len(shown.rows) == 3
    assert [run.shows_how for run in runs.values()] == [False, True, True, True]
    with pytest.raises(UserError, match="one step"):
        visualisation_of(runs["retrieval"], draw_request(RED_CIRCLE))


# --- cards and the queue --------------------------------------------------------------------------


def test_a_card_says_right_and_wrong_in_words_and_escapes_text(runs: dict[str, AppRun]) -> None:
    data = load_dataset("shapes", "validation", 32)[0]
    right = verdicts_of(data.image[None], data.captions[0], "shapes")
    wrong = verdicts_of(data.image[None], "three green squares", "shapes")
    for verdicts, words in ((right, "✓ right"), (wrong, "✗ wrong: ")):
        html = app_html.cards([Result(runs["ddpm"], [data.image], 0.5, verdicts)], "<b>&</b>")
        assert words in html and "detected: 1 " in html and "500 ms" in html
        assert "<b>" not in html and "&lt;b&gt;" in html
    assert "&lt;x&gt;" in app_html.cards([Result(runs["ddpm"], error="<x>")], "")


def test_a_large_picture_is_made_smaller_on_the_page(runs: dict[str, AppRun]) -> None:
    image = torch.randint(0, 256, (3, 1024, 1024), dtype=torch.uint8)
    assert len(app_html.cards([Result(runs["ddpm"], [image])], "a")) < 1.5e6


def test_visitors_wait_in_the_order_in_which_they_come() -> None:
    queue = DrawingQueue()
    assert queue.enter("one") == "" and queue.enter("one") == ""
    queue.begin("one", "DDPM draws")
    assert queue.enter("two") == "Waiting: one drawing is ahead of yours (DDPM draws)."
    assert queue.enter("three").startswith("Waiting: 2 drawings are ahead of yours")
    queue.leave("two")  # has closed the page
    queue.leave("one")
    assert queue.enter("three") == "" and queue.enter("four").endswith("ahead of yours.")


def test_only_the_sessions_that_were_used_last_are_remembered() -> None:
    sessions = Sessions()
    sessions["first"].frames = ["a"]
    sessions["second"].frames = ["b"]
    for number in range(MAX_SESSIONS - 1):
        assert sessions["first"].frames == ["a"] and sessions[str(number)].frames == []
    assert sessions["second"].frames == []
    sessions.forget("first")
    sessions.forget("nobody")
    assert sessions["first"].frames == []


def test_runs_are_sorted_by_age() -> None:
    folders = [run_folder(f"pretrained:{key}") for key in ("ldm", "retrieval", "vqvae")]
    assert [run.year for run in open_runs(folders)[0]] == [2007, 2017, 2021]
