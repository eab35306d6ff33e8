"""The base of all systems, on a toy: options read from `sample`, batches, picture options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage.bounds import Floats, PositiveInt
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import EmbedsImages, Reconstructs, ScoresStages, System, Turn, Visualises
from lineage.text.contract import TextEncoder, TextFeatures

SIZE = 4


class Blank(TextEncoder):
    """No words."""

    word_dim = sentence_dim = 1

    def encode(self, captions: list[str]) -> TextFeatures:
        ids = torch.zeros(len(captions), 1, dtype=torch.int64)
        return TextFeatures(torch.zeros(len(captions), 1, 1), ids > 0, torch.zeros(1, 1), ids)


class Toy(System):
    """Pictures of noise, or of what the options say."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.size, self.layer = Blank(), SIZE, nn.Linear(1, 1)
        self.calls: list[dict[str, Any]] = []

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"layer": [self.layer]}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        yield Turn("layer", {"loss": self.layer.weight.sum()})

    def sample(
        self,
        captions: list[str],
        noise: NoiseStreams,
        steps: PositiveInt | None = None,
        share: float = 0.5,
        interval: Floats = (),
        name: str = "",
        image: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Pictures (B, 3, S, S).

        Args:
            steps: Number of steps,
                of which there are many.
            share, interval: Two options with one sentence.
            name: Name of something.
            image: (B, 3, S, S) picture to start from.
            mask: (B, 1, S, S) bool, True where to paint.

        Returns:
            Not an option: a picture.
        """
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append({"captions": captions, "image": image, "mask": mask, "steps": steps})
        pictures = noise.randn(3, SIZE, SIZE)
        return pictures if image is None else image


def test_options_are_read_from_the_signature() -> None:
    options = Toy().options()
    assert list(options) == ["steps", "share", "interval", "name", "image", "mask"]
    assert options["share"].default == 0.5 and options["share"].type is float
    assert options["steps"].sentence == "Number of steps, of which there are many."
    assert options["interval"].sentence == options["share"].sentence
    assert options["mask"].sentence == "(B, 1, S, S) bool, True where to paint."


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": "3", "share": "1e-1"}, {"steps": 3, "share": 0.1}),
        ({"interval": "0.3,5"}, {"interval": (0.3, 5.0)}),
        ({"interval": [1, 2]}, {"interval": (1.0, 2.0)}),
        ({"steps": None, "name": "7"}, {"name": "7"}),
        ({"steps": "none"}, {"steps": None}),
    ],
)
def test_text_becomes_the_type_of_the_option(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert Toy().typed_options(options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 3}, "Toy has no option 'step': did you mean 'steps'"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": "many"}, "steps='many' should be a whole number"),
        ({"share": "inf"}, "share='inf' should be a number"),
        ({"image": "picture.png"}, "image must be a tensor of pictures"),
        ({"image": torch.zeros(2, 3, SIZE, SIZE)}, r"image must be \(3, 3, 4, 4\), not \(2, 3, 4"),
        ({"image": torch.zeros(3, 3, SIZE, 5)}, "image must be"),
        ({"mask": torch.zeros(3, 3, SIZE, SIZE)}, r"mask must be \(3, 1, 4, 4\)"),
        ({"mask": torch.zeros(3, 1, SIZE, SIZE)}, "mask must be of bool"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Toy().generate(["a", "b", "c"], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_batches_split_captions_noise_and_pictures_alike(batch_size: int) -> None:
    toy = Toy()
    toy.sample_batch_size = batch_size
    captions = ["a", "b", "c", "d", "e"]
    expected = NoiseStreams.for_pictures(3, 5, "cpu").randn(3, SIZE, SIZE).clamp(-1, 1)
    finished: list[int] = []
    assert torch.equal(toy.generate(captions, seed=3, progress=finished.append), expected)
    assert sum(finished) == 5 and max(finished) <= batch_size
    assert [c for call in toy.calls for c in call["captions"]] == captions
    image = torch.rand(5, 3, SIZE, SIZE)
    assert torch.equal(toy.generate(captions, image=image), image)
    one = image[:1]
    assert torch.equal(toy.generate(captions, image=one), one.expand(5, -1, -1, -1))


def test_generate_restores_the_mode_even_after_an_error() -> None:
    toy = Toy().train()
    toy.generate("a")
    assert toy.training and torch.is_grad_enabled()
    with pytest.raises(UserError):
        toy.generate([])
    toy.sample = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        toy.generate("a")
    assert toy.training and torch.is_grad_enabled()


def test_protocols_tell_what_a_system_offers() -> None:
    class Rich(Toy):
        """Offers everything."""

        def visualise(self, caption: str, *, seed: int = 0) -> list[list[Any]]:
            return []

        def reconstruct(self, images: Tensor) -> Tensor:
            return images

        def image_embedding(self, images: Tensor) -> Tensor:
            return images

        def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
            return {}

    for protocol in (Visualises, Reconstructs, EmbedsImages, ScoresStages):
        assert isinstance(Rich(), protocol) and not isinstance(Toy(), protocol)


@pytest.mark.parametrize("seed", [-1, 2**63, 10**23, 1.5, "x", None])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(UserError, match=r"^seed="):
        Toy().generate("a", seed=seed)


def test_the_largest_seed_draws() -> None:
    assert len(Toy().generate("a", seed=2**63 - 1)) == 1
