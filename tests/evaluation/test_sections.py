"""The sections of an evaluation, by hand: scores, counts and reasons."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lineage.evaluation import metrics, sections
from lineage.evaluation.prompts import TASKS, ObjectSpec, Prompt
from lineage.evaluation.sections import wrong_captions

Verdict = dict[str, bool]


def rows(count: int, width: int = 4, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + shift


# --- composition -----------------------------------------------------------


def prompt(tag: str, split: str = "test") -> Prompt:
    return Prompt(tag, "a circle", (ObjectSpec("circle"),), "easy", split)


def answer(strict: bool, **parts: bool) -> Verdict:
    return {"strict": strict, "object": True, "count": True, **parts}


ANSWERS: list[tuple[Prompt, Verdict]] = [
    (prompt("colors"), answer(True, colour=True)),
    (prompt("position", "heldout"), answer(False, relation=False)),
    (prompt("colors"), answer(False, colour=True, object=False)),
    (prompt("colors"), answer(False, colour=False)),
    (prompt("position"), answer(True, relation=True)),
    (prompt("colors"), answer(False, colour=False, count=False)),
    (prompt("position", "heldout"), answer(True, relation=True)),
    (prompt("my own"), answer(True)),
]


def test_composition_by_hand() -> None:
    """Tasks have equal weight in `overall`; parts are shares of the prompts that mention them."""
    result = sections.composition(*zip(*ANSWERS, strict=True))
    assert list(result) == ["test", "heldout"]
    test, heldout = result["test"], result["heldout"]
    assert {task: (s["value"], s["n"]) for task, s in test["tasks"].items()} == {
        "colors": (0.25, 4),
        "position": (1.0, 1),
        "my own": (1.0, 1),
    }
    assert (test["overall"]["value"], test["overall"]["n"]) == (0.75, 6)
    assert {part: (s["value"], s["n"]) for part, s in test["parts"].items()} == {
        "object": (0.8333, 6),
        "colour": (0.5, 4),
        "count": (0.8333, 6),
        "relation": (1.0, 1),
    }
    assert heldout["tasks"]["position"]["value"] == heldout["overall"]["value"] == 0.5
    assert set(heldout["parts"]) == {"object", "count", "relation"}
    assert heldout["parts"]["relation"]["n"] == 2


def test_composition_has_the_tasks_in_order_and_no_empty_split() -> None:
    """So tables of different runs can be compared."""
    prompts = [prompt(tag) for tag in reversed(TASKS)]
    result = sections.composition(prompts, [answer(True)] * len(prompts))
    assert list(result) == ["test"]
    assert list(result["test"]["tasks"]) == list(TASKS)


def test_composition_needs_a_verdict_for_every_prompt() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        sections.composition([prompt("colors")] * 3, [answer(True)] * 2)


# --- quality ---------------------------------------------------------------

NUMBERS = ("fid", "kid", "precision", "recall", "density", "coverage")


@pytest.mark.parametrize(("real", "fake"), [(16, 200), (200, 16), (5, 5)])
def test_too_few_pictures_give_a_reason_and_no_number(real: int, fake: int) -> None:
    """With no more pictures than features the covariance is singular, and FID means nothing."""
    result = sections.quality(rows(real, 16), rows(fake, 16, seed=1))
    assert set(result) == {"reason"}
    assert f"{min(real, fake)} pictures" in result["reason"] and "16 features" in result["reason"]


@pytest.mark.parametrize(
    ("real", "fake", "has_warning"),
    [(17, 200, True), (200, 159, True), (159, 200, True), (160, 160, False), (300, 200, False)],
)
def test_few_pictures_give_numbers_with_a_warning(real: int, fake: int, has_warning: bool) -> None:
    result = sections.quality(rows(real, 16), rows(fake, 16, seed=1))
    assert set(result) - {"warning"} == set(NUMBERS)
    assert ("warning" in result) == has_warning
    if has_warning:
        assert f"{min(real, fake)} pictures for 16 features" in result["warning"]


def test_each_score_of_quality_is_of_the_right_pictures() -> None:
    """Precision and density are of generated pictures, recall and coverage of real ones."""
    real, fake = rows(90), rows(70, seed=1, shift=0.6)
    result = sections.quality(real, fake)
    precision, recall = (v.mean().item() for v in metrics.precision_recall(real, fake, 3))
    density, coverage = (v.mean().item() for v in metrics.density_coverage(real, fake, 5))
    expected = {
        "fid": (metrics.frechet_distance(real, fake), 70),
        "kid": (metrics.kernel_distance(real, fake), 70),
        "precision": (precision, 70),
        "recall": (recall, 90),
        "density": (density, 70),
        "coverage": (coverage, 90),
    }
    assert len({round(value, 3) for value, _ in expected.values()}) == 6  # all differ
    for name, (value, count) in expected.items():
        assert result[name]["value"] == pytest.approx(value, rel=1e-3), name
        assert result[name]["n"] == count, name
        low, high = result[name]["interval"]
        assert low <= result[name]["value"] <= high, name


def test_worse_pictures_score_worse() -> None:
    real, near, far = rows(150), rows(150, seed=1), rows(150, seed=2, shift=1.5)
    good, bad = sections.quality(real, near), sections.quality(real, far)
    for name in ("fid", "kid"):
        assert good[name]["interval"][1] < bad[name]["interval"][0], name
    for name in ("precision", "recall", "density", "coverage"):
        assert good[name]["interval"][0] > bad[name]["interval"][1], name
    low, high = good["kid"]["interval"]
    assert low < 0 < high  # the same source: no distance


# --- text fit --------------------------------------------------------------


def test_wrong_captions_differ_from_the_true_one() -> None:
    """Many pictures share a caption; a wrong one with the true words would be a coin flip."""
    captions = [f"caption {i % 150}" for i in range(400)]
    wrong = wrong_captions(captions)
    assert wrong.shape == (400, 99)
    for number, row in enumerate(wrong.tolist()):
        others = [captions[i] for i in row]
        assert captions[number] not in others
        assert len(set(others)) == 99  # none occurs twice
    assert len({captions[i] for i in wrong.flatten().tolist()}) == 150  # every caption is used
    first, second = wrong[0].tolist(), wrong[150].tolist()  # of one caption
    assert set(first) != set(second)


@pytest.mark.parametrize(("different", "expected"), [(2, 1), (40, 39), (100, 99), (101, 99)])
def test_wrong_captions_are_at_most_all_others(different: int, expected: int) -> None:
    captions = [str(i % different) for i in range(2 * different + 1)]
    wrong = wrong_captions(captions)
    assert wrong.shape == (len(captions), expected)
    assert all(captions[i] not in [captions[j] for j in row] for i, row in enumerate(wrong))


def test_wrong_captions_depend_on_the_seed_alone() -> None:
    captions = [str(i) for i in range(130)]
    first = wrong_captions(captions, 3)
    torch.manual_seed(9)
    assert torch.equal(first, wrong_captions(captions, 3))
    assert not torch.equal(first, wrong_captions(captions, 4))


def test_captions_that_are_all_the_same_give_a_reason() -> None:
    with pytest.raises(ValueError, match="same"):
        wrong_captions(["a circle"] * 5)
    result = sections.text_fit(rows(5), rows(5), ["a circle"] * 5, "clip")
    assert set(result) == {"reason"} and "same" in result["reason"]


def test_text_fit_of_perfect_and_of_foreign_embeddings() -> None:
    """1 if each picture is at its caption, 1 in 100 if it is at none."""
    captions = [f"caption {i}" for i in range(1000)]
    text = rows(1000, 32)
    perfect = sections.text_fit(3 * text, text, captions, "damsm")
    assert set(perfect) == {"r_precision", "pool"}
    assert (perfect["r_precision"]["value"], perfect["r_precision"]["n"]) == (1.0, 1000)
    assert perfect["pool"] == 100
    for image in (text.roll(1, 0), rows(1000, 32, seed=1)):
        shuffled = sections.text_fit(image, text, captions, "damsm")["r_precision"]
        assert shuffled["value"] < 0.03
        assert shuffled["interval"][0] <= 0.01 <= shuffled["interval"][1]


def test_text_fit_when_half_of_the_pictures_fit() -> None:
    captions = [f"caption {i}" for i in range(200)]
    text = rows(200, 32)
    image = torch.cat([text[:100], -text[100:]])  # opposite to their captions
    result = sections.text_fit(image, text, captions, "clip")
    assert result["r_precision"]["value"] == 0.5
    assert result["clip_score"]["value"] == 50.0  # 100 for half, and 0 for the others


# --- diversity -------------------------------------------------------------


def test_diversity_by_hand() -> None:
    """The mean distance of two samples of one caption, against that of real pictures."""
    samples = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]], [[1.0, 1.0]] * 3])
    real = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [0.0, 4.0]], [[5.0, 5.0]] * 2 + [[5.0, 6.0]]])
    result = sections.diversity(samples, real)
    first = (5 + 5 + 10) / 3
    assert result["spread"]["value"] == pytest.approx(first / 2, rel=1e-3)
    assert result["spread"]["n"] == 2
    real_spread = ((2 + 2 + 4) / 3 + (0 + 1 + 1) / 3) / 2
    assert result["spread_of_real"]["value"] == pytest.approx(real_spread, rel=1e-3)
    assert result["spread_against_real"]["value"] == pytest.approx(
        first / 2 / real_spread, rel=1e-3
    )


def test_diversity_without_real_groups_has_a_reason() -> None:
    result = sections.diversity(torch.zeros(4, 3, 2), None)
    assert result["spread"]["value"] == 0.0
    assert result["spread_of_real"]["value"] is None and result["spread_of_real"]["reason"]
    assert "spread_against_real" not in result


def test_diversity_is_low_for_similar_samples() -> None:
    real = torch.stack([rows(6, seed=i, shift=i) for i in range(12)])
    similar = real[:, :1] + 0.01 * torch.stack([rows(6, seed=100 + i) for i in range(12)])
    assert sections.diversity(similar, real)["spread_against_real"]["value"] < 0.05
    fresh = torch.stack([rows(6, seed=200 + i, shift=i) for i in range(12)])
    low, high = sections.diversity(fresh, real)["spread_against_real"]["interval"]
    assert low < 1 < high


# --- memorisation ----------------------------------------------------------


def test_memorisation_by_hand() -> None:
    """Points on a line: distances to training pictures, against those of unseen real ones."""
    train = torch.tensor([[0.0], [10.0]])
    unseen = torch.tensor([[1.0], [12.0], [16.0]])  # 1, 2 and 6 away
    fake = torch.tensor([[0.5], [8.5], [12.0], [-9.0]])  # 0.5, 1.5, 2 and 9 away
    result = sections.memorisation(train, unseen, fake)
    shares = (1 + 2 / 3 + (1 / 3 + 1 / 6) + 0) / 4  # of unseen ones that are farther, ties by half
    assert result["nearer_than_unseen_real"]["value"] == pytest.approx(shares, rel=1e-3)
    assert result["nearer_than_unseen_real"]["n"] == 4
    assert result["distance"]["value"] == 3.25
    assert result["distance_of_unseen_real"]["value"] == 3.0
    assert result["distance_of_unseen_real"]["n"] == 3


def test_memorisation_separates_copies_from_fresh_pictures() -> None:
    """1 for copies of training pictures, a half for fresh ones of the same data, 0 for others."""
    train, unseen = rows(400), rows(300, seed=1)
    copies = sections.memorisation(train, unseen, train[:200])
    assert copies["nearer_than_unseen_real"]["value"] == 1.0
    assert copies["distance"]["value"] == 0.0
    almost = train[:200] + 0.01 * rows(200, seed=2)
    assert sections.memorisation(train, unseen, almost)["nearer_than_unseen_real"]["value"] > 0.97
    low, high = sections.memorisation(train, unseen, rows(300, seed=3))["nearer_than_unseen_real"][
        "interval"
    ]
    assert low < 0.5 < high and high - low < 0.15
    far = sections.memorisation(train, unseen, rows(200, seed=4, shift=20.0))
    assert far["nearer_than_unseen_real"]["value"] == 0.0
