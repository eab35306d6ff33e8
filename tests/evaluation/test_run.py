"""`lineage evaluate`: one document, the same each time, and errors in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lineage
from lineage.cli import main
from lineage.errors import UserError
from lineage.evaluation import features, scorer, table
from lineage.evaluation.prompts import TASKS
from lineage.evaluation.protocol import warnings_of
from lineage.evaluation.table import tables
from lineage.training.store import read_json

PICTURES = 80  # more than the judge has features, fewer than it warns below
EXAMPLE = Path(lineage.__file__).parent.parent / "data" / "example"


@pytest.fixture(scope="module")
def run(smoke_run: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("scored") / "gan"
    return Path(shutil.copytree(smoke_run("gan_int_cls").folder, folder))


@pytest.fixture(scope="module")
def document(run: Path) -> dict[str, Any]:
    return dict(lineage.evaluate(run, pictures=PICTURES, out=run / "evaluation"))


def numbers(value: Any, path: str = "") -> dict[str, dict[str, Any]]:
    """Every score of a document by its path."""
    if isinstance(value, dict):
        if "value" in value:
            return {path: value}
        scores: dict[str, dict[str, Any]] = {}
        for name, below in value.items():
            scores |= numbers(below, f"{path}/{name}")
        return scores
    return {}


def test_every_number_has_an_interval_and_a_protocol(document: dict[str, Any]) -> None:
    """Without both it cannot be compared with any other."""
    for row in (*document["runs"], document["real"], document["shuffled"]):
        for section in ("composition", "quality", "diversity", "memorisation", "text_fit"):
            scores = numbers(row.get(section, {}))
            assert scores or row is not document["runs"][0]
            assert section in document["protocol"]
            for path, score in scores.items():
                low, high = score["interval"]
                assert low <= score["value"] <= high, path
                assert score["n"] > 0, path
    assert document["protocol"]["cost"]["machine"]["torch"] == torch.__version__
    assert document["runs"][0]["cost"]["sampling"]["sampling_peak_memory_bytes"] > 10_000_000


def test_real_pictures_are_the_ceiling_and_shuffled_ones_the_floor(
    document: dict[str, Any],
) -> None:
    for split in ("test", "heldout"):
        rows = [document[row]["composition"][split] for row in ("real", "shuffled")]
        for task in TASKS:
            assert rows[0]["tasks"][task]["value"] >= 0.9
            assert rows[1]["tasks"][task]["value"] <= 0.2
        of_run = document["runs"][0]["composition"][split]["overall"]["value"]
        assert rows[0]["overall"]["value"] > of_run + 0.5  # twenty steps teach nothing
    real, shuffled = (document[row]["text_fit"]["r_precision"] for row in ("real", "shuffled"))
    assert real["value"] > 0.5 > 0.1 > shuffled["value"]
    quality = document["runs"][0]["quality"], document["real"]["quality"]
    assert quality[0]["fid"]["value"] > 5 * quality[1]["fid"]["value"]
    assert document["runs"][0]["memorisation"]["nearer_than_unseen_real"]["value"] < 0.1


def test_the_document_has_the_exam_of_the_judge(document: dict[str, Any]) -> None:
    exam = document["judge"]
    assert set(exam["accepted"]) == set(exam["near_misses"]) == set(TASKS)
    assert min(exam["accepted"].values()) >= 0.98
    assert max(exam["near_misses"].values()) <= 0.02


def test_scoring_twice_gives_the_same_json(run: Path, document: dict[str, Any]) -> None:
    """No score depends on the time, and seconds are measured once."""
    assert lineage.evaluate(run, pictures=PICTURES) == document


def test_another_batch_size_gives_the_same_json(run: Path, document: dict[str, Any]) -> None:
    again = lineage.evaluate([run], pictures=PICTURES, batch_size=7)
    assert json.dumps(again) == json.dumps(document)


def test_another_seed_draws_other_pictures(run: Path, document: dict[str, Any]) -> None:
    again = lineage.evaluate(run, pictures=PICTURES, seed=5)
    assert again["runs"][0]["quality"]["fid"] != document["runs"][0]["quality"]["fid"]


def test_results_for_real_pictures_are_cached(
    run: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second evaluation computes neither features of training pictures nor the exam."""

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(features, "save_tensors", fail)
    monkeypatch.setattr(features, "write_json", fail)
    lineage.evaluate(run, pictures=PICTURES)


def test_files_are_written(run: Path, document: dict[str, Any]) -> None:
    folder = run / "evaluation"
    assert read_json(folder / "scores.json") == document
    assert (folder / f"{run.name}_failed.png").exists()
    assert (folder / f"{run.name}_nearest.png").exists()


def test_the_table_has_the_scores_of_the_json(document: dict[str, Any]) -> None:
    text = tables(document)
    for word in ("gan_int_cls", "real pictures", "shuffled captions", "FID", "R-precision", *TASKS):
        assert word in text
    assert f"{document['runs'][0]['quality']['fid']['value']:.2f}" in text
    assert document["warnings"] and all(warning in text for warning in document["warnings"])
    assert max(map(len, text.splitlines())) < 400


def test_a_table_has_no_control_sequences(document: dict[str, Any]) -> None:
    """Two runs of one system are told apart by the names of their folders."""
    runs = [{**document["runs"][0], "run": name} for name in ("a\x1b[31m", "b\udcff")]
    text = tables({**document, "runs": runs, "warnings": ["\x1b[31m"]})
    assert "\x1b" not in text and "a\\x1b[31m" in text and "b\\xff" in text


def test_json_alone_is_on_standard_output(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And no bar on standard error, which is no terminal here."""
    assert main(["evaluate", str(run), "--pictures", str(PICTURES), "--json"]) == 0
    out, errors = capfd.readouterr()
    assert json.loads(out)["runs"][0]["system"] == "gan_int_cls"
    assert "drawing" not in errors


def test_too_few_pictures_have_no_fid(run: Path) -> None:
    document = lineage.evaluate(run, pictures=20, scorer="none")
    assert "fid" not in document["runs"][0]["quality"]
    assert "20 pictures are too few for 64 features" in document["runs"][0]["quality"]["reason"]
    assert "text_fit" not in document["runs"][0]


def test_other_data_has_a_scorer_and_no_judge(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pictures has no scenes to check, but different captions."""
    monkeypatch.setattr(scorer, "STEPS", 5)
    document = lineage.evaluate(run, data=str(EXAMPLE))
    assert "composition" not in document["runs"][0] and "judge" not in document
    assert (
        document["runs"][0]["text_fit"]["r_precision"]["n"]
        == document["protocol"]["quality"]["real"]
    )
    assert "CLIP of" in document["protocol"]["quality"]["features"]
    assert "reason" in document["runs"][0]["quality"]
    assert "memorisation says nothing" in " ".join(document["warnings"])
    assert tables(document)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "vgg"}, ("vgg", "inception:FILE")),
        ({"features": "inception:none.pth"}, ("none.pth", "pt_inception")),
        ({"features": "scorer", "scorer": "none"}, ("--scorer none",)),
        ({"scorer": "best"}, ("best", "hub:")),
        ({"prompts": "none.jsonl"}, ("none.jsonl",)),
        ({"data": str(EXAMPLE), "prompts": "none.jsonl"}, ("--prompts", "other data")),
        ({"pictures": 0}, ("pictures=0", "at least 1")),
        ({"batch_size": -1}, ("batch_size=-1", "at least 1")),
        ({"picture": 9}, ("'picture'", "'pictures'")),
    ],
)
def test_errors_are_one_sentence(run: Path, options: dict[str, Any], words: tuple[str]) -> None:
    with pytest.raises(UserError) as error:
        lineage.evaluate(run, **options)
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text


def test_runs_of_different_data_are_not_in_one_table(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = read_json(other / "config.json")
    (other / "config.json").write_text(json.dumps({**config, "data": "shapes:hard"}))
    with pytest.raises(UserError, match=r"cannot be in one table .*shapes:hard"):
        lineage.evaluate([run, other])
    with pytest.raises(UserError, match=r"There is no .*config\.json"):
        lineage.evaluate(tmp_path / "none")
    with pytest.raises(UserError, match="at least one"):
        lineage.evaluate([])


def test_own_prompts_are_read(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    entry = {"class": "circle", "count": 1, "color": "red"}
    path.write_text(json.dumps({"tag": "mine", "include": [entry], "prompt": "a red circle"}))
    document = lineage.evaluate(run, prompts=str(path), pictures=PICTURES, scorer="none")
    assert list(document["real"]["composition"]["test"]["tasks"]) == ["mine"]
    assert document["protocol"]["composition"]["prompts"] == "mine.jsonl"
    assert "mine" in tables(document)


@pytest.mark.parametrize(("ceiling", "has_warning"), [(0.2, True), (0.9, False)])
def test_a_scorer_that_fails_on_real_pictures_has_a_warning(
    ceiling: float, has_warning: bool
) -> None:
    """Its scores must not look like any other."""
    pictures = SimpleNamespace(data=SimpleNamespace(split="validation", name="x"), scorer=object())
    real = {"quality": {}, "text_fit": {"r_precision": {"value": ceiling}}}
    warnings = warnings_of(pictures, {"real": real, "runs": []})  # type: ignore[arg-type]
    assert any("20% of unseen real pictures" in text for text in warnings) == has_warning


# --- the tables -------------------------------------------------------------------------------


def test_scores_without_a_value_have_a_dash() -> None:
    """A score that no row has makes no table, and a row without any is left out."""
    fid = {"value": 3.0, "interval": [2.0, 4.0], "n": 9}
    rows = {"one": {"quality": {"fid": fid}}, "two": {}}
    columns = {"FID": ("quality", "fid"), "KID": ("quality", "kid")}
    scores = table._score_table("title", columns, rows, "note")
    assert scores.rows == {"one": ["3.00 ±1.00", "–"]}
    assert str(scores).splitlines() == [
        "title",
        "            FID  KID",
        "one  3.00 ±1.00    –",
        "(note)",
    ]
    assert not table._score_table("title", {"KID": ("quality", "kid")}, rows, "").rows
