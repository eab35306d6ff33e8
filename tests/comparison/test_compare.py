"""The comparison: one page with everything in it, its data as JSON, no work done twice."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lineage
from lineage.comparison import summary as summing
from lineage.comparison import training
from lineage.comparison.budget import runs_at_once
from lineage.comparison.figures import MAX_TERMS, as_svg, line_style, loss_figure, thinned
from lineage.comparison.report import (
    MAX_FAILURES,
    SystemPage,
    bars,
    embed,
    encoder_table,
    wall_time,
    write_report,
)
from lineage.comparison.training import reason_of
from lineage.errors import CheckFailed, Interrupted, UserError
from lineage.evaluation.scoring import ScoredRun
from lineage.evaluation.table import score_tables
from lineage.training.log import read_log
from lineage.training.store import read_json, write_json
from lineage.units import as_bytes, as_count, as_seconds

KEYS = ["retrieval", "gan_int_cls"]
STEPS = 2
PICTURES = 80  # for the scores: few, but more than the judge has features


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two systems."""
    out = tmp_path_factory.mktemp("compare") / "report"
    report = lineage.compare(KEYS, preset="smoke", steps=STEPS, out=out, pictures=PICTURES)
    assert report == out / "report.html"
    return out


class Page(HTMLParser):
    """Every tag and address of a page, and whether its tags are closed."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def addresses(self) -> Iterator[str]:
        for _, attributes in self.tags:
            for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                if attributes.get(name):
                    yield str(attributes[name])


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_one_file(folder: Path, page: Page) -> None:
    """It needs no network and no other file, so it can be sent by mail."""
    for address in page.addresses():
        assert address.startswith(("data:image/png;base64,", "#")), address[:80]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(\s*['\"]?(?!#|data:)", text)
    assert "@import" not in text
    assert not any(tag in ("script", "iframe", "link", "object") for tag, _ in page.tags)
    assert page.open == []


def test_long_words_wrap_except_in_tables_that_scroll(folder: Path) -> None:
    """A caption of one long word would make the page wider than a phone."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert re.search(r"\n  body {[^}]*overflow-wrap: anywhere", text)
    assert re.search(r"\n  table {[^}]*overflow-wrap: normal", text)
    assert not re.search(r"\n  (\.row[^{]*|p|h1|\.failures figcaption) {[^}]*nowrap", text)


def test_the_page_shows_every_picture(folder: Path, page: Page) -> None:
    """A real one for each caption, each system's at each seed, then those that failed; all with a
    description for blind readers."""
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    facts = read_json(folder / "report.json")
    captions, seeds = facts["captions"], facts["seeds"]
    assert len(captions) == summing.CAPTIONS and len(seeds) == len(summing.SEEDS) == 2
    described = [f"a real picture: {caption}" for caption in captions]
    described += [f"{key}: {caption}" for key in KEYS for caption in captions for _ in seeds]
    for key, scores in zip(KEYS, facts["scores"]["runs"], strict=True):
        assert len(scores["failed"]) > MAX_FAILURES  # two steps teach nothing
        described += [
            f"{key} on {failure['prompt']}" for failure in scores["failed"][:MAX_FAILURES]
        ]
    assert sorted(str(attributes["alt"]) for attributes in images) == sorted(described)
    for attributes in images:
        source = str(attributes["src"]).split(",", 1)[1]
        with Image.open(io.BytesIO(base64.b64decode(source))) as picture:
            assert picture.format == "PNG" and picture.size == (16, 16)
    assert len({attributes["src"] for attributes in images}) > len(captions)


def test_the_page_names_systems_captions_and_cost(folder: Path, page: Page) -> None:
    text = " ".join(page.words)
    facts = read_json(folder / "report.json")
    for caption in facts["captions"]:
        assert caption in text
    for key in KEYS:
        assert facts["systems"][key]["title"] in text
    assert f"{STEPS} steps" in text
    assert "None" not in text and "Undefined" not in text and "{{" not in text
    # Three figures of scores, and the GAN's losses; retrieval has none.
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "has no curve" in text


def test_the_page_shows_every_score(folder: Path, page: Page) -> None:
    """The shares as bars, one for each task, split and system; all scores as tables."""
    scores, text = read_json(folder / "report.json")["scores"], " ".join(page.words)
    assert [one["system"] for one in scores["runs"]] == KEYS
    tasks = {s: c["tasks"] for s, c in scores["runs"][0]["composition"].items()}
    classes = [attributes.get("class") for _, attributes in page.tags]
    assert classes.count("bar") == len(KEYS) * sum(len(names) + 1 for names in tasks.values())
    assert tasks.keys() == {"test", "heldout"}
    widths = [
        float(number)
        for _, attributes in page.tags
        for number in re.findall(r"(?:left|width): ([-\d.]+)%", attributes.get("style") or "")
    ]
    assert len(widths) == 3 * classes.count("bar") and all(0 <= width <= 100 for width in widths)
    tables = score_tables(scores)
    heads = [head for table in tables for head in table.heads]
    assert {"FID", "R-precision", "copying", "FLOPs"} <= set(heads)
    for table in tables:
        assert table.title in text and table.note in text
        assert set(KEYS) <= table.rows.keys()
        for cells in table.rows.values():
            assert all(cell in text for cell in cells)
    for one in scores["runs"]:
        for failure in one["failed"][:MAX_FAILURES]:
            assert f"detected: {failure['detected']}" in text
    assert scores["protocol"]["quality"]["generated"] == PICTURES
    assert all(warning in text for warning in scores["warnings"])


def test_the_report_has_the_data_of_the_runs(folder: Path) -> None:
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert facts["order"] == KEYS == list(facts["systems"])
    assert {n: v for n, v in facts["budget"].items() if v is not None} == {"steps": STEPS}
    assert (facts["preset"], facts["data"], facts["size"]) == ("smoke", "shapes", 16)
    for key in KEYS:
        system = facts["systems"][key]
        assert system["training"] == read_json(folder / key / "cost.json")
        assert system["config"]["key"] == key and system["config"]["train"]["max_steps"] == STEPS
        cost = system["sampling"]
        assert cost["model_bytes"] == (folder / key / "model.safetensors").stat().st_size
        loaded = lineage.load(folder / key)
        assert cost["parameters"]["all"] == sum(p.numel() for p in loaded.parameters())
        assert cost["sampling_seconds_per_picture_at_1"] > 0
    gan = facts["systems"]["gan_int_cls"]
    assert gan["training"]["gan"]["steps"] == STEPS and gan["sampling"]["flops_per_picture"] > 1000
    assert facts["systems"]["retrieval"]["sampling"]["flops_per_picture"] == 0
    assert {"processor", "threads", "torch", "lineage", "commit", "clean"} <= facts[
        "machine"
    ].keys()
    assert facts["reproduce"][0].startswith("lineage compare retrieval gan_int_cls")
    assert len(facts["reproduce"]) == 3


def test_each_system_has_its_own_encoder_unless_one_is_held(folder: Path, page: Page) -> None:
    """That of its recipe, as the report says."""
    facts, text = read_json(folder / "report.json"), " ".join(" ".join(page.words).split())
    assert facts["text"] == "historical"
    assert facts["systems"]["retrieval"]["encoder"]["name"] == "bag"
    assert facts["systems"]["gan_int_cls"]["encoder"] == {"name": "char_cnn_rnn", "width": 16}
    assert "--text" not in facts["reproduce"][0] and "text=" not in " ".join(facts["reproduce"])
    assert "with the text encoder of its recipe" in text and "with one text encoder" not in text
    table = encoder_table(facts)
    assert [table.rows[key][0] for key in KEYS] == ["bag", "char_cnn_rnn"]
    assert table.title in text and table.note in text and "char_cnn_rnn" in text


def test_the_page_names_an_encoder_that_is_held(folder: Path, tmp_path: Path) -> None:
    summary = read_json(folder / "report.json")
    summary["text"] = "pretrained:a<b>"
    for system in summary["systems"].values():
        system["encoder"] = {"name": "pretrained:a<b>", "width": 384}
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    empty = SystemPage([[picture]] * len(summary["captions"]), [], [], [])
    pages = dict.fromkeys(KEYS, empty)
    write_report(tmp_path / "page.html", summary, [picture] * len(summary["captions"]), pages)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.words).split())
    assert "with one text encoder, pretrained:a<b> ." in text and "of its recipe" not in text
    assert text.count("pretrained:a<b>") == 1 + len(KEYS) and text.count("384") == len(KEYS)
    assert "one encoder for all systems" in text


def test_the_captions_are_not_those_of_training(folder: Path) -> None:
    """They are of unseen pictures: memorised pictures must not look like skill."""
    facts = read_json(folder / "report.json")
    held_out = lineage.load_dataset("shapes", "validation", 16)
    captions = [example.captions[0] for example in held_out.showcase(summing.CAPTIONS)]
    assert facts["captions"] == captions


def test_the_sheet_is_a_picture(folder: Path) -> None:
    """Two captions a row, each with the real picture and two systems."""
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 2 * 3 * 80 and sheet.height > summing.CAPTIONS / 2 * 80
    for key in KEYS:
        for name in ("failed", "nearest"):
            assert (folder / f"{key}_{name}.png").is_file()


def test_a_page_holds_any_caption(folder: Path, tmp_path: Path) -> None:
    summary = read_json(folder / "report.json")
    summary["captions"] = ["a \ud800\0 circle", "\u202ereversed", "דוגמה", "x" * 5000]
    empty = SystemPage([[torch.zeros(3, 8, 8, dtype=torch.uint8)]] * 4, [], [], [])
    write_report(
        tmp_path / "page.html",
        summary,
        [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 4,
        dict.fromkeys(KEYS, empty),
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<p dir="auto">a \ufffd\ufffd circle</p>' in text and "\0" not in text


def test_the_page_shows_how_a_picture_is_made(
    folder: Path, smoke_run: Callable[[str], Any], tmp_path: Path
) -> None:
    """Rows of labelled pictures of the longest caption, of systems that can visualise it."""
    summary = read_json(folder / "report.json")
    scored = ScoredRun({}, [], [])
    examples = lineage.load_dataset("shapes", "validation", 16).showcase(summing.CAPTIONS)
    pages = {
        key: summing._page(smoke_run(system).folder, examples, scored)
        for key, system in zip(KEYS, ("retrieval", "vqvae"), strict=True)
    }
    rows = pages[KEYS[1]].visualisation
    assert rows and not pages[KEYS[0]].visualisation
    write_report(tmp_path / "page.html", summary, [e.image for e in examples], pages)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    text = " ".join(page.words)
    assert max(summary["captions"], key=len) in text.partition("How a picture is made")[2]
    described = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert all(f"{KEYS[1]}: {label}" in described for row in rows for label, _ in row)
    assert page.open == []


def test_a_second_comparison_does_not_train_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report can be made again without hours of training."""
    before = {
        key: (
            (folder / key / "model.safetensors").read_bytes(),
            read_json(folder / key / "cost.json"),
        )
        for key in KEYS
    }
    logs = {key: read_log(folder / key / "metrics.jsonl") for key in KEYS}
    lineage.compare(KEYS, preset="smoke", steps=STEPS, out=folder, pictures=PICTURES)
    for key in KEYS:
        weights, cost = before[key]
        assert (folder / key / "model.safetensors").read_bytes() == weights
        now = read_json(folder / key / "cost.json")
        for stage, facts in cost.items():
            assert now[stage]["steps"] == facts["steps"]
            assert now[stage]["seconds"] == facts["seconds"]
        assert read_log(folder / key / "metrics.jsonl") == logs[key]


def test_a_second_comparison_keeps_the_cost_of_training(folder: Path) -> None:
    """The peak memory of training is not that of loading a finished run."""
    measured = {}
    for key in KEYS:
        path = folder / key / "cost.json"
        cost = read_json(path)
        for facts in cost.values():
            facts["peak_memory_bytes"] = 123
        path.write_text(json.dumps(cost))
        measured[key] = cost
    lineage.compare(KEYS[:1], preset="smoke", steps=STEPS, out=folder, pictures=PICTURES)
    assert read_json(folder / KEYS[0] / "cost.json") == measured[KEYS[0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"settings": {"optim.lr": 0.01}}, "optim.lr=.*0.01 as asked"),
        ({"steps": 3}, "train.max_steps=2, not 3 as asked"),
        ({"minutes": 0.1, "steps": None}, "train.m"),
        ({"seed": 4}, "seed=0, not 4"),
        ({"preset": "tiny", "steps": 2}, "preset=smoke|tiny"),
        ({"text": "lstm"}, "text=bag, not lstm as asked"),
    ],
    ids=["rate", "steps", "minutes", "seed", "preset", "encoder"],
)
def test_runs_of_other_settings_are_not_reported(
    options: dict[str, Any], words: str, folder: Path
) -> None:
    """Neither trained on, nor shown under settings that they were not made with."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    asked = {"preset": "smoke", "steps": STEPS, "out": folder, "pictures": PICTURES, **options}
    with pytest.raises(UserError, match=words) as caught:
        lineage.compare(KEYS, **asked)
    assert "--out" in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_runs_with_another_number_of_threads_are_not_reported(folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"preset": "smoke", "steps": STEPS, "pictures": PICTURES}
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / "gan_int_cls" / "config.json"
    saved = read_json(config)
    saved["made_with"]["threads"] = 2
    write_json(config, saved)
    with pytest.raises(UserError, match="was trained with 2 threads, not 1: add --threads 2"):
        lineage.compare(["gan_int_cls"], out=copy, **asked, threads=1)


def test_an_old_comparison_in_minutes_of_the_clock_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / "gan_int_cls" / "config.json"
    saved = read_json(config)
    saved["train"] |= {"minutes": 0.1, "max_steps": None}
    write_json(config, saved)
    with pytest.raises(UserError, match=r"minutes of the clock, .*those of the processor"):
        lineage.compare(["gan_int_cls"], preset="smoke", minutes=0.1, pictures=PICTURES, out=copy)


@pytest.mark.parametrize(
    ("threads", "cores", "gigabytes", "count"),
    [(None, 8, 64, 1), (1, 8, 64, 8), (2, 8, 64, 4), (3, 2, 64, 1), (1, 8, 5, 2), (1, 8, 1, 1)],
)
def test_as_many_systems_at_a_time_as_cores_and_memory_allow(
    threads: int | None,
    cores: int,
    gigabytes: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lineage.comparison.budget.usable_cpus", lambda: cores)
    monkeypatch.setattr("lineage.comparison.budget.total_memory", lambda _: gigabytes * 10**9)
    assert runs_at_once(threads) == count


def test_systems_are_trained_at_a_time_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than allowed, each on a line of its own; a line that is free is used again."""
    running: dict[str, int] = {}
    started: list[tuple[str, int, int]] = []

    class Child:
        def __init__(self, key: str, polls: int) -> None:
            self.key, self.polls, self.returncode = key, polls, 0

        def poll(self) -> int | None:
            self.polls -= 1
            if self.polls > 0:
                return None
            running.pop(self.key, None)
            return 0

    def start(key: str, command: Sequence[str], place: int) -> Child:
        running[key] = place
        started.append((key, place, len(running)))
        return Child(key, {"ddpm": 9, "dit": 2}.get(key, 4))

    monkeypatch.setattr(training, "_start", start)
    monkeypatch.setattr(training, "POLL", 0.0)
    training.train_all({key: [key] for key in ("ddpm", "dit", "ldm", "vqvae")}, 2)
    assert started == [("ddpm", 0, 1), ("dit", 1, 2), ("ldm", 1, 2), ("vqvae", 1, 2)]


class Ended:
    """A process that has ended."""

    def __init__(self, code: int, said: str = "") -> None:
        self.returncode, self.stdout = code, io.StringIO(said)

    def poll(self) -> int:
        return self.returncode


def test_a_run_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = {"a": Ended(0), "b": Ended(1, "x\nStep 5 of dit: no number.\n"), "c": Ended(0)}
    monkeypatch.setattr(training, "_start", lambda name, *_: children[name])
    monkeypatch.setattr(training, "POLL", 0.0)
    failed = training.train_all({"a": ["ddpm"], "b": ["dit"], "c": ["ldm"]}, 2)
    assert failed == {"b": "Step 5 of dit: no number."}
    assert "b could not be trained: Step 5 of dit: no number." in capsys.readouterr().err


@pytest.mark.parametrize("code", [130, -15, -1])
def test_a_run_that_was_stopped_stops_all(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Running(Ended):
        def poll(self) -> None:  # type: ignore[override]
            return None

        def terminate(self) -> None:
            ended.append("asked")

        def wait(self) -> None:
            ended.append("waited for")

    children = {"a": Running(0), "b": Ended(code)}
    monkeypatch.setattr(training, "_start", lambda name, *_: children[name])
    with pytest.raises(Interrupted, match="same command again"):
        training.train_all({"a": ["ddpm"], "b": ["dit"]}, 2)
    assert ended == ["asked", "waited for"]


def test_minutes_are_those_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In each thread; a budget in --set is left as it is."""
    flags: dict[str, Sequence[str]] = {}

    def train_none(commands: dict[str, Sequence[str]], at_once: int) -> None:
        flags.update(commands)
        raise CheckFailed("enough")

    monkeypatch.setattr("lineage.comparison.run.train_all", train_none)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for options, words in (
        ({"minutes": 2}, ["--cpu-minutes", "2.0", "--threads", "1"]),
        ({"minutes": 2, "threads": 3}, ["--cpu-minutes", "6.0", "--threads", "3"]),
        ({"steps": 5}, ["--steps", "5", "--threads", "1"]),
        (
            {"settings": {"train.minutes": 0.5}},
            ["--threads", "1", "--set", "train.minutes=0.5"],
        ),
    ):
        with pytest.raises(CheckFailed, match="enough"):
            lineage.compare(["ddpm"], preset="smoke", out=tmp_path / "out", **options)  # type: ignore[arg-type]
        assert list(flags["ddpm"])[-len(words) - 4 : -4] == words
        assert "--minutes" not in flags["ddpm"]


# --- the text encoder -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [None, {"text": "lstm"}])
def test_one_encoder_for_all_systems(
    settings: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`--text` is a setting of every system, and of the commands that make the report again; so is
    the setting itself."""
    flags: dict[str, Sequence[str]] = {}
    facts: dict[str, Any] = {}

    def report(folder: Path, members: Any, config: Any, scoring: Any, all: Any) -> Path:
        facts.update(all)
        return folder

    def train_none(commands: dict[str, Sequence[str]], at_once: int) -> dict[str, str]:
        flags.update(commands)
        return {}

    monkeypatch.setattr("lineage.comparison.run.train_all", train_none)
    monkeypatch.setattr("lineage.comparison.run.write_all", report)
    asked: dict[str, Any] = {"preset": "smoke", "steps": 3, "out": tmp_path / "out"}
    held = {"settings": settings} if settings else {"text": "lstm"}
    lineage.compare(["ddpm", "gan_int_cls"], **asked, **held)
    assert facts["text"] == "lstm"
    for key in ("ddpm", "gan_int_cls"):
        assert list(flags[key])[-6:-4] == ["--set", "text=lstm"]
    whole, *single = facts["reproduce"]
    assert "--text lstm" in whole and "--set" not in whole
    assert len(single) == 2 and all("--set text=lstm" in line for line in single)


def test_data_without_two_captions_is_refused_before_training(tmp_path: Path) -> None:
    """And what the sentence says to do works."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a circle")
    asked: dict[str, Any] = {"data": str(data), "preset": "smoke", "steps": 1, "pictures": 8}
    with pytest.raises(UserError, match="--scorer none --features judge"):
        lineage.compare(["retrieval"], out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    asked |= {"scorer": "none", "features": "judge"}
    report = lineage.compare(["retrieval"], out=tmp_path / "out", **asked)
    reproduce = read_json(report.with_name("report.json"))["reproduce"]
    assert report.is_file() and "--features judge --scorer none" in reproduce[0]


def test_errors_come_before_anything_is_trained(tmp_path: Path) -> None:
    for keys, options, words in (
        ([], {}, "nothing to compare"),
        (["gan_int_cls", "ddmp"], {}, "'ddpm'"),
        ("ddmp", {}, "'ddpm'"),
        (["retrieval"], {"scorer": "foo"}, "no scorer 'foo'"),
        (["retrieval"], {"features": "foo"}, "no feature network 'foo'"),
        (["retrieval"], {"features": "inception:none.pth"}, "none.pth"),
        (["retrieval"], {"features": "scorer", "scorer": "none"}, "--scorer none"),
        (["gan_int_cls", "glide"], {}, "planned"),
        (["gan_int_cls", "retrieval"], {"preset": "paper"}, "'paper'"),
        (["gan_int_cls"], {"settings": {"model.gen": 3}}, "'model.gen'"),
        (["gan_int_cls"], {"data": "nowhere"}, "nowhere"),
        (["gan_int_cls"], {"text": "lstn"}, "no text encoder 'lstn': did you mean 'lstm'"),
        (["gan_int_cls"], {"text": "pretrained:"}, "lacks the model"),
        (["gan_int_cls"], {"text": "bag", "settings": {"text": "lstm"}}, "are two encoders"),
        (["gan_int_cls"], {"pictures": 0}, "pictures=0"),
    ):
        arguments: dict[str, Any] = {"preset": "smoke", "steps": 1, "out": tmp_path / "out"}
        with pytest.raises(UserError, match=words):
            lineage.compare(keys, **{**arguments, **options})
        assert not (tmp_path / "out").exists()


def test_a_system_that_cannot_be_trained_stops_the_comparison(tmp_path: Path) -> None:
    """Before the first one is trained, as far as it can be known; later with its exit code."""
    asked: dict[str, Any] = {"preset": "smoke", "steps": 1, "out": tmp_path / "a"}
    with pytest.raises(UserError, match="size=24"):
        lineage.compare(["retrieval", "gan_int_cls"], settings={"size": 24}, **asked)
    assert not (tmp_path / "a").exists()
    with pytest.raises(CheckFailed):
        lineage.compare(
            ["gan_int_cls"],
            preset="smoke",
            steps=30,
            out=tmp_path / "b",
            settings={"optim.lr": 1e30},
        )
    assert not (tmp_path / "report.html").exists()


# --- pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (35_746_307, "35.7 M"),
        (1_234_567, "1.23 M"),
        (5e9, "5 G"),
        (3.2e13, "32 T"),
        (999_999, "1 M"),
        (999_600_000, "1 G"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert as_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (0.9996, "1 s"), (1, "1 s"), (59.94, "59.9 s"), (0.0004, "0.4 ms")],
)
def test_seconds(value: float, text: str) -> None:
    assert as_seconds(value) == text


def test_long_times_are_not_powers_of_ten() -> None:
    """An hour of training is not `3.6e+03 s`."""
    for value in (1234.0, 3600.0, 86_400.0):
        assert "e+" not in as_seconds(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (8e9, "8 GB"),
        (2e12, "2 TB"),
        (999_999, "1 MB"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert as_bytes(value) == text


def test_embedded_pictures_are_the_pictures() -> None:
    image = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    with Image.open(io.BytesIO(base64.b64decode(embed(image).split(",")[1]))) as picture:
        assert picture.getpixel((2, 1)) == tuple(image[:, 1, 2].tolist())


def composition(value: float) -> dict[str, Any]:
    """A composition of one task; its share and its mean are `value`."""
    share = {"value": value, "interval": [value - 0.1, value + 0.1], "n": 9}
    return {"test": {"tasks": {"two_objects": share}, "overall": share, "parts": {}}}


def test_bars_have_a_floor_and_a_ceiling() -> None:
    """Each bar is a system's own share, in the order of the comparison; the floor is that of
    shuffled prompts, not of real ones."""
    scores = {
        "runs": [{"composition": composition(0.3)}, {"composition": composition(0.6)}],
        "real": {"composition": composition(0.9)},
        "shuffled": {"composition": composition(0.1)},
    }
    (panel,) = bars(scores, ["one", "two"])
    assert [task["name"] for task in panel["tasks"]] == ["two objects", "overall"]
    for task in panel["tasks"]:
        assert [(bar["key"], bar["value"]) for bar in task["bars"]] == [("one", 0.3), ("two", 0.6)]
        assert (task["real"], task["floor"]) == (0.9, 0.1)
    assert bars({**scores, "real": {}}, ["one", "two"]) == []  # data without a judge


def svg_of(log: list[dict[str, Any]]) -> str | None:
    figure = loss_figure(log)
    return None if figure is None else as_svg(figure)


def log_of(**terms: float) -> list[dict[str, Any]]:
    return [
        {"stage": "s", "step": i, "seconds": 60.0 * i, "gradient/g": 1.0, "metric/a": 2.0}
        | {name.replace("__", "/"): value / (i + 1) for name, value in terms.items()}
        for i in range(5)
    ]


def test_a_curve_shows_every_loss_and_no_gradient() -> None:
    figure = svg_of(log_of(g__one=1.0, d__two=2.0))
    assert figure is not None and figure.startswith("<svg")
    assert "g/one" in figure and "d/two" in figure
    assert "gradient" not in figure and "metric" not in figure
    assert "currentColor" in figure and "#0a0b0c" not in figure
    assert svg_of([]) is None and svg_of(log_of()) is None


def test_a_curve_of_several_stages_shows_them_all() -> None:
    """A later stage has other losses than the first."""
    first = [{**line, "stage": "one"} for line in log_of(a__x=1.0)]
    figure = svg_of(first + [{**line, "stage": "two"} for line in log_of(b__y=1.0)])
    assert figure is not None and "a/x" in figure and "b/y" in figure


def test_curves_differ_in_colour_and_dash() -> None:
    styles = [line_style(number) for number in range(24)]
    assert len(set(styles)) == 24
    for one, other in zip(styles, styles[1:], strict=False):
        assert one[0] != other[0] and one[1] != other[1]
    figure = svg_of(log_of(**{f"g__{'abcdefghijkl'[k]}": 1.0 + k for k in range(MAX_TERMS)}))
    assert figure is not None
    drawn = re.findall(r'clip-path="[^"]*" style="([^"]*stroke-width: 1.2[^"]*)"', figure)
    assert len(set(drawn)) == len(drawn) == MAX_TERMS


def test_a_curve_below_zero_is_drawn() -> None:
    assert svg_of(log_of(g__one=-1.0)) is not None


def test_thinning_keeps_the_mean() -> None:
    points = [(float(i), float(i * i)) for i in range(600)]
    thin = thinned(points)
    assert len(thin) == 120
    assert sum(y for _, y in thin) / 120 == pytest.approx(sum(y for _, y in points) / 600)
    assert thinned(points[:7]) == points[:7]


def test_the_time_of_training_is_summed_over_systems_and_stages() -> None:
    runs = {
        "a": [{"cost": {"training": {"one": {"seconds": 1.5}, "two": {"seconds": 2}}}}],
        "b": 2 * [{"cost": {"training": {"one": {"seconds": 4}}}}],
    }
    assert wall_time({"runs": runs}) == 11.5


def test_many_terms_are_summed_by_group() -> None:
    """A curve for each discriminator and the generator, not for each of their terms."""
    names = [f"d{k}/{term}" for k in range(3) for term in ("real", "wrong", "fake", "alone", "r1")]
    log = [{"stage": "gan", "seconds": float(s), **dict.fromkeys(names, 0.5)} for s in range(1, 4)]
    figure = svg_of(log)
    assert figure is not None
    assert all(f"d{k}" in figure for k in range(3)) and "d0/real" not in figure
    few = svg_of([{k: v for k, v in line.items() if not k.endswith("1")} for line in log[:2]])
    assert few is not None and "d0/real" in few


def test_a_system_that_was_killed_is_told_by_its_signal() -> None:
    reason = reason_of(Ended(-9))  # type: ignore[arg-type]
    assert re.search(r"was ended by signal 9 .*same command again", reason)
    assert reason_of(Ended(1)) == "its process ended with exit code 1"  # type: ignore[arg-type]
