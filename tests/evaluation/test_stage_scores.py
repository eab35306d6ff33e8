"""The section `stages` (codec and prior apart), from a system's numbers to the table."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lineage
from lineage.data.contract import Batch, to_bytes, to_unit
from lineage.evaluation import real, sections
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import ObjectSpec, Prompt, read_prompts
from lineage.evaluation.real import PromptSet, evenly_spaced, unseen_split
from lineage.evaluation.run import _stages
from lineage.evaluation.table import tables
from lineage.vqvae.ar_prior import Prior

PICTURES = 20
NUMBERS = ("psnr", "nats_per_code", "accuracy", "bits_per_dim")
TITLE = "Codec and prior apart"


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few prompts, one of them of a combination that training never shows."""
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    lines = [
        {
            "tag": "colors",
            "include": [{"class": shape, "count": 1, "color": "red"}],
            "prompt": f"a red {shape}",
            "split": split,
        }
        for shape, split in (("circle", "test"), ("square", "test"), ("cross", "heldout"))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """The other sections are made fast; they are not tested here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(real, "TRAINING_PICTURES", 40)
        patched.setattr(real, "EXAM_REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def evaluated(smoke_run: Callable[[str], Any], prompt_file: Path) -> Callable[..., dict[str, Any]]:
    """(keys) -> the document of these smoke runs."""

    def score(*keys: str, **options: Any) -> dict[str, Any]:
        settings = {"pictures": PICTURES, "scorer": "none", "prompts": str(prompt_file)} | options
        return lineage.evaluate([smoke_run(key).folder for key in keys], **settings)

    return score


@pytest.fixture(scope="module")
def both(evaluated: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The document of a system with stages and of one without."""
    return evaluated("vqvae", "retrieval")


# --- the section ------------------------------------------------------------------------------


def prompt_of(tag: str, split: str = "test") -> Prompt:
    return Prompt(tag, "a circle", (ObjectSpec("circle"),), "easy", split)


def test_stages_by_hand() -> None:
    values = {"psnr": torch.tensor([10.0, 20.0, 60.0]), "accuracy": torch.tensor([0.0, 1.0, 0.5])}
    prompts = [
        prompt_of("colors"),
        prompt_of("colors"),
        prompt_of("counting"),
        prompt_of("colors", "heldout"),
    ]
    verdicts = [{"strict": s, "object": True} for s in (True, False, True, False)]
    result = sections.stages(values, prompts, verdicts)
    assert list(result) == ["psnr", "accuracy", "reconstruction"]
    assert (result["psnr"]["value"], result["psnr"]["n"]) == (30.0, 3)
    assert (result["accuracy"]["value"], result["accuracy"]["n"]) == (0.5, 3)
    low, high = result["psnr"]["interval"]
    assert 10 <= low < 30 < high <= 60
    assert result["reconstruction"] == sections.composition(prompts, verdicts)
    assert result["reconstruction"]["test"]["overall"]["value"] == 0.75  # of tasks, not pictures
    assert result["reconstruction"]["heldout"]["overall"]["value"] == 0.0


def test_stages_without_a_judge_or_without_numbers() -> None:
    assert list(sections.stages({"psnr": torch.ones(3)}, [], [])) == ["psnr"]
    assert list(sections.stages({"psnr": torch.ones(3)}, [prompt_of("colors")], [])) == ["psnr"]
    assert sections.stages({}, [], []) == {}


# --- of a run ---------------------------------------------------------------------------------


def test_the_scores_are_means_of_unseen_pictures(
    both: dict[str, Any], smoke_run: Callable[[str], Any]
) -> None:
    """One picture at a time, of the split that training does not use."""
    data, system = unseen_split("shapes", 16, 0), smoke_run("vqvae").system
    assert isinstance(system, Prior) and data.split == "validation"
    section = both["runs"][0]["stages"]
    with torch.no_grad():
        scores = []
        for number in evenly_spaced(len(data), PICTURES):
            one = data[number]
            batch = Batch(to_unit(one.image[None]), [one.captions[0]], None, [one.id])
            scores.append({name: v.item() for name, v in system.stage_scores(batch).items()})
    assert set(section) == {*NUMBERS, "reconstruction"}
    for name in NUMBERS:
        mean = sum(score[name] for score in scores) / PICTURES
        assert section[name]["value"] == pytest.approx(mean, rel=1e-3), name
        assert section[name]["n"] == PICTURES
        low, high = section[name]["interval"]
        assert low <= section[name]["value"] <= high, name
    protocol = both["protocol"]["stages"]
    assert (protocol["pictures"], protocol["real_split"]) == (PICTURES, "validation")


def test_reconstructions_are_judged(
    both: dict[str, Any], smoke_run: Callable[[str], Any], prompt_file: Path
) -> None:
    """Real pictures of the prompts, those of the row of real pictures, encoded and decoded."""
    system, judge = smoke_run("vqvae").system, Judge.load()
    prompts = read_prompts(prompt_file, "easy")
    pictures = PromptSet(judge, prompts, "", 16, 0).pictures
    with torch.no_grad():
        back = to_bytes(system.codec.decode(system.codec.encode(to_unit(pictures))))
    verdicts = [verdict(r, p) for r, p in zip(judge.detect(back), prompts, strict=True)]
    assert both["runs"][0]["stages"]["reconstruction"] == sections.composition(prompts, verdicts)
    for split, count in (("test", 2), ("heldout", 1)):
        assert both["runs"][0]["stages"]["reconstruction"][split]["overall"]["n"] == count


def test_a_codec_that_loses_nothing_is_as_good_as_real_pictures(
    both: dict[str, Any],
    evaluated: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Prior, "reconstruct", lambda self, images: images)
    document = evaluated("vqvae")
    reconstruction = document["runs"][0]["stages"]["reconstruction"]
    assert reconstruction == document["real"]["composition"]
    assert document["real"] == both["real"]


def test_systems_of_one_stage_have_no_such_section(
    both: dict[str, Any], evaluated: Callable[..., dict[str, Any]]
) -> None:
    assert "stages" not in both["runs"][1] and "stages" in both["protocol"]
    alone = evaluated("retrieval")
    assert "stages" not in alone["runs"][0] and "stages" not in alone["protocol"]
    assert TITLE not in tables(alone)


def test_stages_do_not_depend_on_the_batch(
    both: dict[str, Any], evaluated: Callable[..., dict[str, Any]]
) -> None:
    assert evaluated("vqvae", batch_size=7)["runs"][0]["stages"] == both["runs"][0]["stages"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_stages_of_data_without_a_judge(batch_size: int, smoke_run: Callable[[str], Any]) -> None:
    """No reconstruction is judged; one picture is enough; nothing is trained."""
    system = copy.deepcopy(smoke_run("vqvae").system)
    system.sample_batch_size = batch_size
    for count in (1, 4):
        images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)
        pictures: Any = SimpleNamespace(images=images, captions=["a thing"] * count)
        section = _stages(system, pictures, None)
        assert list(section) == list(NUMBERS)
        assert all(section[name]["n"] == count for name in NUMBERS)
    assert all(p.grad is None for p in system.parameters())


def test_no_pictures_of_prompts_are_drawn_for_a_system_without_stages(
    smoke_run: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: Any) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr(PromptSet, "pictures", property(fail))
    pictures: Any = SimpleNamespace(
        images=torch.zeros(2, 3, 16, 16, dtype=torch.uint8), captions=["a", "b"]
    )
    prompts = PromptSet(Judge.load(), [prompt_of("colors")], "", 16, 0)
    assert _stages(smoke_run("retrieval").system, pictures, prompts) == {}


# --- the table --------------------------------------------------------------------------------


def section_of(text: str) -> list[str]:
    """The lines of the table, from its title to its note."""
    (section,) = [part for part in text.split("\n\n") if part.startswith(TITLE)]
    return section.splitlines()


def test_the_table_has_the_stages(both: dict[str, Any]) -> None:
    document = copy.deepcopy(both)
    stages = document["runs"][0]["stages"]
    for split, value in (("test", 0.75), ("heldout", 0.25)):
        stages["reconstruction"][split]["overall"]["value"] = value
    title, heads, *rows, note = section_of(tables(document))
    assert title == TITLE and note.startswith("(") and note.endswith(")")
    assert [row.split()[0] for row in rows] == ["vqvae"]  # no other run has two stages
    for word in ("reconstructed", "held out", "PSNR", "nats/code", "accuracy", "bits/dim"):
        assert word in heads
    values = [cell for cell in rows[0].split()[1:] if not cell.startswith("±")]
    expected = [0.75, 0.25, *(stages[name]["value"] for name in NUMBERS)]
    assert [float(cell) for cell in values] == pytest.approx(expected, abs=0.006)


def test_the_table_without_a_judge_has_dashes(both: dict[str, Any]) -> None:
    document = copy.deepcopy(both)
    del document["runs"][0]["stages"]["reconstruction"]
    _, _, row, _ = section_of(tables(document))
    assert row.split()[1:3] == ["–", "–"] and row.count("–") == 2


def test_runs_of_one_system_have_their_folders_names(both: dict[str, Any]) -> None:
    document = copy.deepcopy(both)
    second = copy.deepcopy(document["runs"][0])
    document["runs"][0]["run"], second["run"] = "runs/one", "runs/two"
    document["runs"].append(second)
    _, _, *rows, _ = section_of(tables(document))
    assert [row.split()[0] for row in rows] == ["runs/one", "runs/two"]
