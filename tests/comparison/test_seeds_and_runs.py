"""Comparisons of several seeds and of finished runs, learning curves, and what the page says."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import lineage
from lineage.catalog import CATALOG
from lineage.cli import main
from lineage.comparison.bibliography import bibtex, entry
from lineage.comparison.curves import SHARES
from lineage.comparison.glance import answers, difference_table, differs
from lineage.comparison.members import finished_members, members_to_train
from lineage.comparison.parts import as_csv, as_tex, file_name
from lineage.comparison.run import compare_runs
from lineage.errors import CheckFailed, UserError
from lineage.evaluation import run as scoring
from lineage.evaluation.intervals import as_score
from lineage.evaluation.table import ScoreTable
from lineage.training.store import load_tensors, read_json

KEYS = ["retrieval", "ddpm"]
OPTIONS: dict[str, Any] = {"preset": "smoke", "steps": 16, "pictures": 80}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two systems over two seeds."""
    out = tmp_path_factory.mktemp("seeds") / "report"
    lineage.compare(KEYS, out=out, seeds=2, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder / "report.json"))


# --- seeds ------------------------------------------------------------------------------------


def test_each_system_is_trained_with_each_seed(folder: Path, facts: dict[str, Any]) -> None:
    assert facts["run_seeds"] == {"retrieval": [0, 1], "ddpm": [0, 1]}
    for key in KEYS:
        assert read_json(folder / key / "config.json")["seed"] == 0
        assert read_json(folder / f"{key}_seed_1" / "config.json")["seed"] == 1
    weights = [folder / name / "model.safetensors" for name in ("ddpm", "ddpm_seed_1")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    assert "--seeds 2" in facts["reproduce"][0] and "--seeds" not in facts["reproduce"][1]


def test_each_run_is_compared_with_its_own_training_pictures(facts: dict[str, Any]) -> None:
    """A seed gives `shapes` other training pictures; the unseen ones are the same for all."""
    one, other = (run["memorisation"] for run in facts["runs"]["retrieval"])
    assert one["distance_of_unseen_real"] != other["distance_of_unseen_real"]


def test_scores_are_those_of_the_runs_together(facts: dict[str, Any]) -> None:
    for merged, own in zip(facts["scores"]["runs"], facts["runs"].values(), strict=True):
        values = [run["quality"]["kid"]["value"] for run in own]
        kid = merged["quality"]["kid"]
        assert kid["runs"] == 2 and kid["value"] == pytest.approx(sum(values) / 2, rel=1e-3)
        assert merged["composition"]["test"]["overall"]["runs"] == 2


def test_a_run_has_the_scores_that_it_has_alone(
    folder: Path, facts: dict[str, Any], tmp_path: Path
) -> None:
    """To the digit, whether trained by `compare` or by `train`, scored alone or among others."""
    run = lineage.train("ddpm", preset="smoke", steps=16, out=tmp_path / "own", threads=1)
    alone, among = lineage.evaluate(run, pictures=80)["runs"][0], facts["runs"]["ddpm"][0]
    for section in ("composition", "quality", "diversity", "memorisation", "text_fit", "failed"):
        assert alone[section] == among[section], section


def test_a_seed_is_added_to_a_finished_comparison(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not trained again, and not scored again."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    scored: list[str] = []
    score = scoring._score

    def noted(run: Path, *rest: Any) -> Any:
        scored.append(run.name)
        return score(run, *rest)

    monkeypatch.setattr(scoring, "_score", noted)
    lineage.compare(["ddpm"], out=copy, seeds=3, **OPTIONS)
    costs = [(place / "ddpm" / "cost.json").read_bytes() for place in (folder, copy)]
    assert costs[0] == costs[1]
    assert scored == ["ddpm_seed_2"]


def test_a_number_of_seeds_has_bounds(tmp_path: Path) -> None:
    for seeds, words in ((0, "seeds=0"), (21, "seeds=21 must be at most 20")):
        with pytest.raises(UserError, match=words):
            lineage.compare(["ddpm"], out=tmp_path / "out", seeds=seeds, **OPTIONS)


def test_a_seed_among_the_settings_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of all runs, which would then be the same one twice."""
    commands: dict[str, list[str]] = {}

    def train_none(asked: dict[str, list[str]], at_once: int) -> dict[str, str]:
        commands.update(asked)
        return dict.fromkeys(asked, "enough")

    monkeypatch.setattr("lineage.comparison.run.train_all", train_none)
    with pytest.raises(CheckFailed, match="enough"):
        lineage.compare(["ddpm"], out=tmp_path / "out", seeds=2, settings={"seed": 5}, **OPTIONS)
    seeds = [command[command.index("--seed") + 1] for command in commands.values()]
    assert seeds == ["5", "6"]
    assert not any("seed=" in flag for command in commands.values() for flag in command)


def test_rounds_of_seeds_come_one_after_the_other() -> None:
    members = members_to_train(["a", "b"], 4, 2, Path("out"))
    names = ["a, seed 4", "b, seed 4", "a, seed 5", "b, seed 5"]
    assert [member.name for member in members] == names
    assert [member.folder.name for member in members] == ["a", "b", "a_seed_5", "b_seed_5"]
    assert members_to_train(["a"], 4, 1, Path("out"))[0].name == "a"


# --- a run that fails -------------------------------------------------------------------------


def test_a_system_that_fails_stays_in_the_report(tmp_path: Path) -> None:
    """With its reason; the command ends with a sentence and the exit code of a failed check."""
    with pytest.raises(CheckFailed, match=r"gan_int_cls could not be trained, .*has the others"):
        lineage.compare(
            ["retrieval", "gan_int_cls"],
            out=tmp_path / "out",
            settings={"optim.lr": 1e30},
            **{**OPTIONS, "steps": 40},
        )
    facts = read_json(tmp_path / "out" / "report.json")
    assert facts["order"] == ["retrieval"]
    failed = facts["failed"]["gan_int_cls"]
    assert failed["title"] == "GAN-INT-CLS" and re.search(r"Step \d+ of", failed["reason"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<strong>GAN-INT-CLS</strong> could not be trained: " in page
    assert page.count("<th>GAN-INT-CLS</th>") > 3  # a column of dashes in every table
    table = (tmp_path / "out" / "tables" / "quality_diversity_and_memorisation.csv").read_text()
    assert re.search(r"^GAN-INT-CLS,,", table, re.MULTILINE)


# --- learning curves --------------------------------------------------------------------------


def test_a_run_is_scored_on_the_way(facts: dict[str, Any]) -> None:
    points = facts["curves"]["ddpm"]
    assert [point["share"] for point in points] == [*SHARES, 1.0]
    pictures = [point["pictures"] for point in points]
    assert [count / pictures[0] for count in pictures] == [1, 2, 4, 8]
    clocks = [point["cpu_seconds"] for point in points]
    assert clocks == sorted(clocks) and len(set(clocks)) == 4
    assert points[-1]["score"] == facts["scores"]["runs"][1]["composition"]["test"]["overall"]


def test_snapshots_change_nothing(folder: Path, tmp_path: Path) -> None:
    plain = lineage.train("ddpm", preset="smoke", steps=16, out=tmp_path / "plain", threads=1)
    whole = (folder / "ddpm" / "model.safetensors").read_bytes()
    assert (plain / "model.safetensors").read_bytes() == whole


def test_a_snapshot_is_the_run_at_that_share(tmp_path: Path) -> None:
    """Its weights are those of a run with half of the steps, if the rate is constant."""
    options: dict[str, Any] = {"preset": "smoke", "threads": 1}
    constant = {"optim.decay": "none"}
    snapshots = {**constant, "train.snapshots": "0.25,0.5"}
    long = lineage.train("ddpm", steps=8, out=tmp_path / "8", settings=snapshots, **options)
    short = lineage.train("ddpm", steps=4, out=tmp_path / "4", settings=constant, **options)
    halfway = load_tensors(long / "snapshots" / "0.5" / "model.safetensors")
    expected = load_tensors(short / "model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in halfway.items())
    quarter = load_tensors(long / "snapshots" / "0.25" / "model.safetensors")
    assert not all(tensor.equal(expected[name]) for name, tensor in quarter.items())


def test_a_system_of_several_stages_has_snapshots_in_its_last(tmp_path: Path) -> None:
    settings = {"train.snapshots": "0.125,0.25,0.5,0.75"}
    run = lineage.train("vqvae", preset="smoke", steps=16, out=tmp_path / "run", settings=settings)
    shares = sorted(path.name for path in (run / "snapshots").iterdir())
    assert shares == ["0.5", "0.75"]  # the codec has 0.3 of the budget
    costs = [read_json(run / "snapshots" / share / "cost.json") for share in shares]
    steps = read_json(run / "cost.json")["prior"]["steps"]
    done = [cost["prior"]["steps"] for cost in costs]
    assert 0 < done[0] < done[1] < steps and all(cost["codec"]["finished"] for cost in costs)
    assert lineage.load(run / "snapshots" / "0.5").generate("a red circle").shape == (1, 3, 16, 16)


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "2"])
def test_a_snapshot_lies_within_the_budget(value: str, tmp_path: Path) -> None:
    settings = {"train.snapshots": value}
    with pytest.raises(UserError, match="between 0 and 1"):
        lineage.train("ddpm", preset="smoke", steps=2, out=tmp_path / "run", settings=settings)


# --- finished runs ----------------------------------------------------------------------------


def test_finished_runs_are_compared_without_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that differ in their seed alone are of one system."""
    monkeypatch.setattr("lineage.comparison.run.train_all", None)
    names = ("ddpm", "retrieval", "ddpm_seed_1")
    report = compare_runs([folder / name for name in names], out=tmp_path / "out", pictures=80)
    facts = read_json(report.with_name("report.json"))
    assert facts["run_seeds"] == {"ddpm": [0, 1], "retrieval": [0]}
    assert facts["reproduce"][0].count("--from") == 3
    assert "with a budget of its own" in report.read_text()
    assert facts["curves"]["ddpm"][0]["share"] == SHARES[0]


def test_two_systems_of_one_key_are_told_apart(folder: Path, tmp_path: Path) -> None:
    settings = {"text": "bag"}
    other = lineage.train("ddpm", preset="smoke", steps=2, out=tmp_path / "b", settings=settings)
    members = finished_members([folder / "ddpm", other, "pretrained:retrieval"])
    assert [member.system for member in members] == ["report_ddpm", "0_b", "retrieval"] or [
        member.system for member in members
    ] == ["ddpm", "b", "retrieval"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (copy / name).write_bytes((folder / "ddpm" / name).read_bytes())
    with pytest.raises(UserError, match="same settings and the seed 0: leave one out"):
        finished_members([folder / "ddpm", copy])


def test_runs_that_cannot_be_compared_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    run = str(folder / "ddpm")
    for arguments, words in (
        (["--from", "pretrained:clip"], "draws no pictures"),
        (["--from", run, "--from", "pretrained:ddpm"], "cannot be in one table"),
        (["--from", run, "--from", run], "the same folder: name it once"),
        (["--from", str(tmp_path)], "a run folder?"),
        (["--from", run, "--steps", "3"], "leave --steps out"),
        (["--from", run, "--text", "bag"], "leave --text out"),
        (["--from", run, "--preset", "tiny"], "leave --preset out"),
        (["--from", run, "--set", "optim.lr=1"], "leave --set out"),
        (["ddpm", "--from", run], "leave systems out"),
    ):
        assert main(["compare", *arguments, *out]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()


# --- what the page says -----------------------------------------------------------------------


def scores_of(*verdicts: str, kid: float, seconds: float) -> dict[str, Any]:
    tasks = dict(zip(("colors", "position"), verdicts, strict=True))
    means = {name: own.count("1") / len(own) for name, own in tasks.items()}
    test = {
        "tasks": {name: as_score(value, value, value, 40) for name, value in means.items()},
        "overall": as_score(sum(means.values()) / 2, 0, 1, 80),
        "verdicts": tasks,
    }
    return {
        "composition": {"test": test},
        "quality": {"kid": as_score(kid, kid - 0.1, kid + 0.1, 80)},
        "cost": {"sampling": {"sampling_seconds_per_picture_at_16": seconds}},
    }


A = scores_of("1" * 30 + "0" * 10, "1" * 20 + "0" * 20, kid=0.5, seconds=0.01)
B = scores_of("0" * 11 + "1" * 29, "1" * 20 + "0" * 20, kid=0.45, seconds=0.2)
C = scores_of("1" * 4 + "0" * 36, "1" * 10 + "0" * 30, kid=2.0, seconds=0.05)
TITLES = {"a": "Alpha", "b": "Beta", "c": "Gamma"}


def said(systems: dict[str, Any]) -> dict[str, str]:
    """The answers by the first word of their question's second half."""
    runs = {name: [one] for name, one in systems.items()}
    return {one.question: one.answer for one in answers(systems, runs, TITLES)}


def test_no_difference_is_claimed_that_is_none() -> None:
    texts = said({"a": A, "b": B, "c": C})
    follows = "Alpha: 0.62 of the six tasks, which is no more than chance above Beta (0.61)."
    assert texts["Which follows captions best?"] == follows
    assert texts["Which draws pictures most like real ones?"] == (
        "Beta and Alpha: no KID differs from the lowest beyond chance."
    )
    assert texts["Which draws fastest?"] == (
        "Alpha: 10 ms a picture; Beta takes 200 ms, 20 times as long."
    )
    close = said(
        {
            "a": A,
            "b": {**B, "cost": A["cost"]},
            "c": scores_of("1" * 40, "1" * 40, kid=1.0, seconds=0.011),
        }
    )
    assert close["Which draws fastest?"] == "No system stands out: a picture takes 10 ms to 11 ms."
    weakest = "Alpha in position (0.50); Beta in position (0.50); Gamma in colors (0.10)."
    assert texts["Where does each fail most?"] == weakest
    table = difference_table({"a": [A], "b": [B], "c": [C]}, "test", TITLES)
    assert table is not None and list(table.heads) == ["Alpha", "Beta"]
    beta, gamma = table.rows["Beta minus"], table.rows["Gamma minus"]
    assert beta[0].startswith("= -0.01") and beta[1] == ""
    assert all(cell.startswith("-0.4") for cell in gamma)


def test_a_difference_is_claimed_with_its_interval() -> None:
    texts = said({"a": A, "c": C})
    assert re.fullmatch(
        r"Alpha: 0\.62 of the six tasks, 0\.45 more than Gamma, the next "
        r"\(95 % interval 0\.3\d to 0\.5\d\)\.",
        texts["Which follows captions best?"],
    )
    assert texts["Which draws pictures most like real ones?"] == "Alpha: the lowest KID."


def test_one_system_differs_from_none() -> None:
    assert list(said({"a": A}).values()) == [
        "Alpha: 0.62 of the six tasks.",
        "Alpha in position (0.50).",
    ]
    assert difference_table({"a": [A]}, "test", TITLES) is None
    assert difference_table({"a": [A], "b": [B]}, "heldout", TITLES) is None  # no such prompts


@pytest.mark.parametrize(
    ("interval", "expected"),
    [([0.1, 0.2], True), ([-0.2, -0.1], True), ([-0.1, 0.1], False), ([0.0, 0.1], False)],
)
def test_an_interval_that_holds_0_is_no_difference(interval: list[float], expected: bool) -> None:
    assert differs({"interval": interval}) is expected


# --- parts for a report of one's own ----------------------------------------------------------


def test_parts_are_beside_the_page(folder: Path) -> None:
    for name in ("score_over_time", "score_over_drawing", "losses_of_ddpm"):
        assert (folder / "figures" / f"{name}.svg").read_text().count("<svg") == 1
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    tables = {path.stem for path in (folder / "tables").glob("*.csv")}
    assert {"cost", "text_fit", "differences_combinations_in_training"} <= tables
    assert tables == {path.stem for path in (folder / "tables").glob("*.tex")}
    assert "@misc{ddpm," in (folder / "systems.bib").read_text()


TABLE = ScoreTable(
    "A & B", ["share", "5 % _x_"], {"ddpm": ["0.50 ±0.10", "3"], "=1+1": ["–", "-x"]}, "n = {3}"
)


def test_a_table_as_csv() -> None:
    """Values and intervals in columns of their own, empty where there is none; no formula."""
    rows = list(csv.reader(io.StringIO(as_csv(TABLE, {"ddpm": "DDPM, a"}))))
    assert rows == [
        ["system", "share", "share ±", "5 % _x_"],
        ["DDPM, a", "0.50", "0.10", "3"],
        ["'=1+1", "", "", "'-x"],
    ]


def test_a_table_as_latex() -> None:
    text = as_tex(TABLE, {"ddpm": "DDPM"})
    assert r"\caption{A \& B (n = \{3\}).}" in text and r"5 \% \_x\_" in text
    assert r"DDPM & 0.50 $\pm$0.10 & 3 \\" in text and r"=1+1 & -- & -x \\" in text


def test_names_of_files_are_plain() -> None:
    assert file_name("Exactly the prompt's scene, 5 %") == "exactly_the_prompt_s_scene_5"


@pytest.mark.parametrize("key", CATALOG)
def test_every_paper_is_an_entry(key: str) -> None:
    text = entry(CATALOG[key])
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", text, re.MULTILINE))
    assert text.startswith("@") and text.count("{") == text.count("}")
    assert fields["title"].startswith("{") and re.fullmatch(r"(19|20)\d\d", fields["year"])
    assert ("eprint" in fields) != ("booktitle" in fields)
    assert "et al" not in text and fields["author"].split(" and ")[0]


def test_entries() -> None:
    ddpm, retrieval = bibtex(["ddpm", "retrieval", "ddpm"]).split("\n\n")
    assert "author = {Ho and Jain and Abbeel}" in ddpm and "eprint = {2006.11239}" in ddpm
    assert "title = {{Denoising Diffusion Probabilistic Models}}" in ddpm
    assert "year = {2020}" in ddpm and ddpm.startswith("@misc{ddpm,")
    assert "booktitle = {AAAI}" in retrieval
