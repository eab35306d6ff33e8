"""The best of several: which pictures are drawn, and which of them is selected."""

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
from lineage.text.contract import TextFeatures

CAPTIONS = ["red", "green", "blue", "grey"]
COLOURS = torch.cat([torch.eye(3), torch.ones(1, 3)])  # those that the captions name
CPU = torch.device("cpu")


class Colours(System):
    """Draws plain pictures of a random colour."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.weight = 8, nn.Parameter(torch.zeros(()))
        self.captions: list[str] = []

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        yield from ()

    def sample(
        self,
        captions: list[str],
        noise: NoiseStreams,
        brightness: float = 1.0,
        image: Tensor | None = None,
    ) -> Tensor:
        """Pictures (B, 3, 8, 8).

        Args:
            brightness: Factor on the colour.
            image: Picture to add twice.
        """
        self.captions += captions
        colour = 2 * brightness * noise.rand(3) - 1
        pictures = colour[:, :, None, None].expand(-1, 3, 8, 8)
        return pictures if image is None else pictures + 2 * image


class ColourScorer:
    """A scorer whose features are the shares of red, green and blue."""

    name, kind, width, protocol = "colour", "clip", 3, {}

    def image(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.device == CPU
        return F.normalize(images.float().mean((2, 3)), dim=1)

    def text(self, captions: list[str]) -> Tensor:
        return F.normalize(COLOURS, dim=1)[[CAPTIONS.index(caption) for caption in captions]]


class ConstantScorer(ColourScorer):
    """A scorer whose features are the same for all pictures."""

    def image(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 3), 3**-0.5)


@pytest.mark.parametrize("candidates", [1, 2, 7])
def test_the_best_by_loops(candidates: int) -> None:
    """Of each caption's own candidates, the one that fits its own words best."""
    system, scorer = Colours(), ColourScorer()
    images, cosines = best_of(system, CAPTIONS, scorer, candidates, seed=3)
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert cosines.shape == (4, candidates)
    assert sorted(system.captions) == sorted(CAPTIONS * candidates)
    every = to_bytes(Colours().generate(["x"] * 4 * candidates, seed=3))
    for row, caption in enumerate(CAPTIONS):
        own = [one for one, of in zip(every, system.captions, strict=True) if of == caption]
        expected = [float(scorer.image(one[None])[0] @ scorer.text([caption])[0]) for one in own]
        assert cosines[row].tolist() == pytest.approx(expected)
        assert torch.equal(images[row], own[expected.index(max(expected))])


def test_of_more_candidates_the_best_is_better() -> None:
    few, many = (best_of(Colours(), CAPTIONS, ColourScorer(), n)[1].amax(1) for n in (1, 40))
    assert (many > few).all() and many.min() > 0.9


def test_of_candidates_that_fit_alike_it_is_the_first() -> None:
    system = Colours()
    images, cosines = best_of(system, CAPTIONS[:3], ConstantScorer(), 3, seed=5)
    assert cosines.min() == cosines.max()
    every = to_bytes(Colours().generate(["x"] * 9, seed=5))
    assert torch.equal(images, every[[system.captions.index(c) for c in CAPTIONS[:3]]])


def test_one_candidate_is_what_generate_draws() -> None:
    images, _ = best_of(Colours(), CAPTIONS, ColourScorer(), 1, seed=5)
    assert torch.equal(images, to_bytes(Colours().generate(CAPTIONS, seed=5)))


def test_the_first_candidates_are_what_generate_draws() -> None:
    """A choice only ever improves on `generate`."""
    images, _ = best_of(Colours(), CAPTIONS[:3], ConstantScorer(), 3, seed=5)
    assert torch.equal(images, to_bytes(Colours().generate(CAPTIONS[:3], seed=5)))


def test_the_seed_and_options_reach_the_system() -> None:
    def best(seed: int = 1, **options: Any) -> Tensor:
        return best_of(Colours(), CAPTIONS, ColourScorer(), 3, seed=seed, **options)[0]

    assert torch.equal(best(), best()) and not torch.equal(best(), best(seed=2))
    assert best(brightness="0.5").max() <= 128 < best().max()
    with pytest.raises(UserError, match="'brightnes'"):
        best(brightnes=1)


def test_one_picture_option_serves_all_candidates() -> None:
    black = torch.full((1, 3, 8, 8), -1.0)
    images, cosines = best_of(Colours(), CAPTIONS, ConstantScorer(), 3, image=black)
    assert images.max() == 0 and cosines.shape == (4, 3)


@pytest.mark.parametrize("sample_batch_size", [1, 4, 5, 64])
def test_batches_change_nothing(sample_batch_size: int) -> None:
    system = Colours()
    system.sample_batch_size = sample_batch_size
    images, cosines = best_of(system, CAPTIONS, ColourScorer(), 3, seed=3)
    expected = best_of(Colours(), CAPTIONS, ColourScorer(), 3, seed=3)
    assert torch.equal(images, expected[0]) and torch.equal(cosines, expected[1])


def test_nothing_to_choose_from_is_refused() -> None:
    for candidates in (0, -2):
        with pytest.raises(UserError, match=f"{candidates} candidates"):
            best_of(Colours(), CAPTIONS, ColourScorer(), candidates)
    with pytest.raises(UserError, match="at least one caption"):
        best_of(Colours(), [], ColourScorer(), 3)


# --- scorers of runs ------------------------------------------------------------------------------


def test_the_scorer_of_a_run(smoke_run: Callable[[str], Any]) -> None:
    """It is the one of the run's data, as in `lineage evaluate`; its features are unit vectors."""
    folder, system = smoke_run("vqvae")
    scorer = scorer_of_run("auto", folder, CPU)
    for caption in ("a red circle", "", "a zorp"):
        images, cosines = best_of(system, [caption], scorer, 5, seed=1)
        candidates = to_bytes(system.generate([caption] * 5, seed=1))
        expected = F.cosine_similarity(scorer.image(candidates), scorer.text([caption]), dim=1)
        torch.testing.assert_close(cosines, expected[None], rtol=1e-4, atol=1e-5)
        assert torch.equal(images[0], candidates[expected.argmax()])
    images, cosines = best_of(system, ["a red circle"] * 3, scorer, 2, seed=1)  # as with --count 3
    assert images.shape == (3, 3, 16, 16) and cosines.shape == (3, 2) and len(cosines.unique()) == 6


def test_the_matching_model_of_another_run_chooses_too(smoke_run: Callable[[str], Any]) -> None:
    damsm = scorer_of_run(f"damsm:{smoke_run('attngan').folder}", smoke_run("vqvae").folder, CPU)
    assert damsm.kind == "damsm"
    images, cosines = best_of(smoke_run("vqvae").system, ["a red circle"], damsm, 3)
    assert images.shape == (1, 3, 16, 16) and cosines.abs().max() <= 1 + 1e-5
    assert len(cosines.unique()) > 1


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
def test_an_unknown_scorer_is_refused(
    name: str, words: tuple[str, ...], smoke_run: Callable[[str], Any]
) -> None:
    with pytest.raises(UserError) as fault:
        scorer_of_run(name, smoke_run("vqvae").folder, CPU)
    assert all(word in str(fault.value) for word in words) and "\n" not in str(fault.value)


def test_a_run_without_a_matching_model_is_refused(smoke_run: Callable[[str], Any]) -> None:
    folder = smoke_run("vqvae").folder
    with pytest.raises(UserError, match="without a DAMSM"):
        scorer_of_run(f"damsm:{folder}", folder, CPU)


def test_one_string_is_one_caption() -> None:
    system, scorer = Colours(), ColourScorer()
    one, _ = best_of(system, "red", scorer, 3)
    assert torch.equal(one, best_of(system, ["red"], scorer, 3)[0]) and len(one) == 1
