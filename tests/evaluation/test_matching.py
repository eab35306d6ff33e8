"""Scores of a model that compares pictures with captions: a perfect one, a blind one, and CLIP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError
from lineage.evaluation.judge import Judge
from lineage.evaluation.matching import best_possible, matching, recalls, words_of_place
from lineage.evaluation.real import prompt_set
from lineage.evaluation.run import evaluate
from lineage.evaluation.scorer import clip_scorer


class Oracle:
    """Vectors of captions by their text; pictures have those of their own captions."""

    kind = "clip"

    def __init__(self, data: CaptionedDataset, count: int) -> None:
        examples = [data[i] for i in range(count)]
        self.vectors: dict[str, Tensor] = {}
        self.own = {e.image.numpy().tobytes(): e.captions[0] for e in examples}

    def text(self, captions: list[str]) -> Tensor:
        for caption in captions:
            generator = torch.Generator().manual_seed(len(self.vectors))
            self.vectors.setdefault(
                caption, F.normalize(torch.randn(64, generator=generator), dim=0)
            )
        return torch.stack([self.vectors[caption] for caption in captions])

    def image(self, images: Tensor) -> Tensor:
        return self.text([self.own[image.numpy().tobytes()] for image in images])


@pytest.fixture(scope="module")
def data() -> CaptionedDataset:
    return load_dataset("shapes", "validation")


def test_a_perfect_model_gets_everything(data: CaptionedDataset) -> None:
    scores = matching(Oracle(data, 120), data, max_pictures=120)  # type: ignore[arg-type]
    assert scores["r_precision"]["value"] == 1
    assert scores["words_of_place"]["all"]["value"] == 1
    assert {"left", "right", "above", "below"} < set(scores["words_of_place"])
    for name in ("text_to_image", "image_to_text"):
        assert [scores[name][k]["value"] for k in ("1", "5", "10")] == [1, 1, 1]


def test_ranks_of_a_few_pairs() -> None:
    """Cosines by hand; two pairs share a caption, so that neither is wrong for the other."""
    cosines = torch.tensor(
        [[0.5, 0.5, 0.6, 0.1], [0.9, 0.9, 0.0, 0.8], [0.2, 0.2, 0.3, 0.1], [0.0, 0.0, 0.9, 0.4]]
    )
    scores = recalls(cosines, torch.eye(4), ["a", "a", "b", "c"])
    assert scores["image_to_text"]["1"]["value"] == 0.5  # of pictures 1 and 2
    assert scores["image_to_text"]["5"]["value"] == 1
    # captions a, a: the best of their pictures is first; b and c: another picture fits better
    assert scores["text_to_image"]["1"]["value"] == 0.5


def test_words_of_place_are_compared_with_their_opposites() -> None:
    class Words:
        def text(self, captions: list[str]) -> Tensor:
            return torch.tensor([[float("left" in c), float("right" in c)] for c in captions])

    captions = ["a cat left of a dog", "a cat right of a dog", "a cat"]
    text = Words().text(captions)
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    scores: Any = words_of_place(Words(), image, text, captions)  # type: ignore[arg-type]
    assert scores["left"]["value"] == 1 and scores["right"]["value"] == 0
    assert scores["all"]["value"] == 0.5 and scores["all"]["n"] == 2
    assert words_of_place(Words(), image[2:], text[2:], ["a cat"]) == {}  # type: ignore[arg-type]


def test_captions_that_are_true_of_a_picture_limit_its_score(data: CaptionedDataset) -> None:
    """ "A and B" is true of "B left of A" and of "B and A", but not the other way round."""

    def scene(first: str, second: str, relation: str | None) -> Any:
        objects = [{"colour": "red", "shape": shape} for shape in (first, second)]
        meta = {"objects": objects, "relation": relation}
        return type("Example", (), {"meta": meta})()

    examples = [
        scene("circle", "square", "left"),
        scene("square", "circle", "right"),
        scene("circle", "square", "right"),
        scene("square", "circle", None),
        scene("circle", "cross", None),
    ]
    pools = torch.tensor([[j for j in range(5) if j != i] for i in range(5)])
    chances = best_possible(examples, pools).tolist()
    assert chances == pytest.approx([1 / 3, 1 / 3, 1 / 2, 1, 1])


@pytest.mark.slow
def test_the_package_s_clip_reads_shapes(data: CaptionedDataset) -> None:
    scorer = clip_scorer("pretrained:clip")
    prompts = prompt_set(data, None, Judge.load(), 0)
    scores = matching(scorer, data, prompts, max_pictures=500)
    assert scores["r_precision"]["value"] > 0.85
    assert 0.9 < scores["limit"]["value"] < 1  # about one picture in 14 has a second true caption
    for word in ("left", "right", "above", "below"):
        assert scores["words_of_place"][word]["value"] > 0.9
    assert scores["near_misses"]["colour"]["value"] > 0.9
    assert scores["near_misses"]["relation"]["value"] > 0.9
    for size in (16, 64):
        other = load_dataset("shapes", "validation", size)
        assert matching(scorer, other, max_pictures=200)["r_precision"]["value"] > 0.85


def test_a_run_of_clip_is_evaluated_by_what_it_matches(smoke_run: Any, tmp_path: Any) -> None:
    folder = smoke_run("clip").folder
    document = evaluate(folder, out=tmp_path, pictures=60)
    (run,) = document["runs"]
    assert run["system"] == "clip" and run["run"] == str(folder)
    assert {"r_precision", "limit", "words_of_place", "near_misses"} < set(run["matching"])
    assert run["cost"]["training"]["clip"]["steps"] == 20
    assert document["protocol"]["matching"]["pictures"] == 60
    assert (tmp_path / "scores.json").is_file() and not list(tmp_path.glob("*.png"))


def test_runs_that_draw_and_runs_that_match_are_not_in_one_table(
    smoke_run: Any, tmp_path: Any
) -> None:
    clip = smoke_run("clip").folder
    with pytest.raises(UserError, match=f"{clip.name} draws no pictures"):
        evaluate([smoke_run("ddpm").folder, clip], out=tmp_path / "out", pictures=60)
    assert not (tmp_path / "out").exists()
