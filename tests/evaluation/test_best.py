"""The best of several: what is drawn, who chooses, and that the choice is what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.data.contract import Batch, to_bytes
from lineage.errors import UserError
from lineage.evaluation.best import best_of, scorer_of_run
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import NoText, TextFeatures

CAPTIONS = ["red", "green", "blue", "grey"]
WANTED = torch.cat([torch.eye(3), torch.ones(1, 3)])  # the colours that they name
CPU = torch.device("cpu")


class Colours(System):
    """NoiseStreams a colour of chance and nothing else; `strength` dims it."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.weight = NoText(), nn.Parameter(torch.zeros(()))
        self.drawn: list[str] = []

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        yield from ()

    def draw(self, captions: list[str], draws: NoiseStreams, strength: float = 1.0) -> Tensor:
        self.drawn += captions
        colour = 2 * strength * draws.rand(3) - 1
        return colour[:, :, None, None].expand(-1, 3, 8, 8)


class Eye:
    """A scorer that sees how red, green and blue a picture is."""

    name, kind, width, protocol = "eye", "clip", 3, {}

    def image(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.device == CPU
        return F.normalize(images.float().mean((2, 3)), dim=1)

    def text(self, captions: list[str]) -> Tensor:
        return F.normalize(WANTED, dim=1)[[CAPTIONS.index(caption) for caption in captions]]


class Blind(Eye):
    """All pictures are one to it."""

    def image(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 3), 3**-0.5)


@pytest.mark.parametrize("candidates", [1, 2, 7])
def test_the_best_by_loops(candidates: int) -> None:
    """Of each caption's own candidates the one that fits its own words best."""
    system, eye = Colours(), Eye()
    images, fit = best_of(system, CAPTIONS, eye, candidates, seed=3)
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert fit.shape == (4, candidates)
    assert sorted(system.drawn) == sorted(CAPTIONS * candidates)
    every = to_bytes(Colours().generate(["x"] * 4 * candidates, seed=3))
    for row, caption in enumerate(CAPTIONS):
        own = [one for one, of in zip(every, system.drawn, strict=True) if of == caption]
        cosines = [float(eye.image(one[None])[0] @ eye.text([caption])[0]) for one in own]
        assert fit[row].tolist() == pytest.approx(cosines)
        assert torch.equal(images[row], own[cosines.index(max(cosines))])


def test_of_more_candidates_the_best_is_better() -> None:
    few, many = (best_of(Colours(), CAPTIONS, Eye(), n)[1].amax(1) for n in (1, 40))
    assert (many > few).all() and many.min() > 0.9


def test_of_candidates_that_fit_alike_it_is_the_first() -> None:
    system = Colours()
    images, fit = best_of(system, CAPTIONS[:3], Blind(), 3, seed=5)
    assert fit.min() == fit.max()
    every = to_bytes(Colours().generate(["x"] * 9, seed=5))
    assert torch.equal(images, every[[system.drawn.index(c) for c in CAPTIONS[:3]]])


def test_one_candidate_is_what_is_drawn_alone() -> None:
    images, _ = best_of(Colours(), CAPTIONS, Eye(), 1, seed=5)
    assert torch.equal(images, to_bytes(Colours().generate(CAPTIONS, seed=5)))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_first_candidate_is_what_is_drawn_without_a_choice(row: int) -> None:
    """As `best_of` says of its candidates: so that a choice only ever improves on `generate`."""
    images, _ = best_of(Colours(), CAPTIONS[:3], Blind(), 3, seed=5)
    alone = Colours().generate(CAPTIONS[row], seed=5)[0]
    among = Colours().generate(CAPTIONS[:3], seed=5)[row]
    assert any(torch.equal(images[row], to_bytes(one)) for one in (alone, among))


def test_seeds_and_knobs_reach_what_is_drawn() -> None:
    first, again, other = (best_of(Colours(), CAPTIONS, Eye(), 3, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    dim, _ = best_of(Colours(), CAPTIONS, Eye(), 3, seed=1, strength="0.5")
    assert dim.max() <= 128 < first.max()
    with pytest.raises(UserError, match="'strenth'"):
        best_of(Colours(), CAPTIONS, Eye(), 3, strenth=1)


@pytest.mark.parametrize("at_once", [1, 4, 5, 64])
def test_parts_change_nothing(at_once: int) -> None:
    system = Colours()
    system.at_once = at_once
    images, fit = best_of(system, CAPTIONS, Eye(), 3, seed=3)
    expected = best_of(Colours(), CAPTIONS, Eye(), 3, seed=3)
    assert torch.equal(images, expected[0]) and torch.equal(fit, expected[1])


def test_nothing_to_choose_from_is_told() -> None:
    for candidates in (0, -2):
        with pytest.raises(UserError, match=f"{candidates} candidates"):
            best_of(Colours(), CAPTIONS, Eye(), candidates)
    with pytest.raises(UserError, match="at least one caption"):
        best_of(Colours(), [], Eye(), 3)


# --- of runs ----------------------------------------------------------------------------------


def test_the_scorer_of_a_run(smoke_run: Callable[[str], Any]) -> None:
    """The one of its data, as `lineage evaluate` has it; whose words and pictures are unit
    vectors of one width."""
    folder, system = smoke_run("vqvae")
    scorer = scorer_of_run("auto", folder, CPU)
    for caption in ("a red circle", "", "a zorp"):
        images, fit = best_of(system, [caption], scorer, 5, seed=1)
        drawn = to_bytes(system.generate([caption] * 5, seed=1))
        expected = F.cosine_similarity(scorer.image(drawn), scorer.text([caption]), dim=1)
        torch.testing.assert_close(fit, expected[None], rtol=1e-4, atol=1e-5)
        assert torch.equal(images[0], drawn[expected.argmax()])
    images, fit = best_of(system, ["a red circle"] * 3, scorer, 2, seed=1)  # as --count has it
    assert images.shape == (3, 3, 16, 16) and fit.shape == (3, 2) and len(fit.unique()) == 6


def test_the_matching_model_of_a_run_chooses_too(smoke_run: Callable[[str], Any]) -> None:
    """Also for another run's pictures."""
    damsm = scorer_of_run(f"damsm:{smoke_run('attngan').folder}", smoke_run("vqvae").folder, CPU)
    assert damsm.kind == "damsm"
    images, fit = best_of(smoke_run("vqvae").system, ["a red circle"], damsm, 3)
    assert images.shape == (1, 3, 16, 16) and fit.abs().max() <= 1 + 1e-5
    assert len(fit.unique()) > 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", ("--best-of", "hub:MODEL")),
        ("best", ("'best'", "hub:MODEL")),
        ("", ("''",)),
        ("damsm:nowhere", ("nowhere",)),
        ("damsm:", ()),
    ],
)
def test_scorers_that_there_are_not_are_told(
    name: str, words: tuple[str, ...], smoke_run: Callable[[str], Any]
) -> None:
    with pytest.raises(UserError) as fault:
        scorer_of_run(name, smoke_run("vqvae").folder, CPU)
    assert all(word in str(fault.value) for word in words) and "\n" not in str(fault.value)


def test_a_run_without_a_matching_model_is_told(smoke_run: Callable[[str], Any]) -> None:
    folder = smoke_run("vqvae").folder
    with pytest.raises(UserError, match="without a DAMSM"):
        scorer_of_run(f"damsm:{folder}", folder, CPU)
