"""Editing: what is to stay stays to the bit, what is to go leaves no trace, and the rest follows
the caption."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import RunConfig, TextConfig
from lineage.data.contract import CaptionedDataset
from lineage.diffusion.ddpm import DDPM, DDPMConfig
from lineage.diffusion.ldm import LDM
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.k_diffusion import Estimate
from lineage.diffusion.schedules import Point
from lineage.errors import UserError
from lineage.system import System
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer

UNET = UNetConfig(16, (1, 2), blocks=1, attention=(1,), heads=2, patch=2, dropout=0.0)
COSINE = ProcessConfig(100, "cosine", "x0")
LINE = ProcessConfig(100, "flow", "flow")
CAPTIONS = ["a red circle", "a blue square above a green triangle", "two small yellow stars"]
S = 16


def system(tokenizer: WordTokenizer, process: ProcessConfig = COSINE, **changes: Any) -> DDPM:
    """A small system whose network has been moved from the zero it starts at."""
    torch.manual_seed(0)
    config = DDPMConfig(**{"unet": UNET, "process": process, "steps": 10, **changes})
    one = DDPM(config, make_encoder("bag", TextConfig(width=16), tokenizer), S).eval()
    with torch.no_grad():
        for parameter in one.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return one


@pytest.fixture
def one(tokenizer: WordTokenizer) -> DDPM:
    return system(tokenizer)


@pytest.fixture
def images(shapes: CaptionedDataset) -> Tensor:
    """(3, 3, S, S)"""
    return shapes.batch(range(3), [0] * 3, 0).image


def box(count: int = 3) -> Tensor:
    """(B, 1, S, S), True in a rectangle that is elsewhere in each row."""
    mask = torch.zeros(count, 1, S, S, dtype=torch.bool)
    for row in range(count):
        mask[row, :, 3 + row : 9 + row, 2:11] = True
    return mask


class Best(torch.nn.Module):
    """The best estimate of x_0 for pictures that are grey noise of deviation 0.5, whatever the
    caption; and what it was asked."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.nothing = process, torch.nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, noised: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.asked.append((noised, t))
        point = self.process.point(round(t[0].item()))
        a, b = point.signal, point.noise
        return a * 0.25 / (a**2 * 0.25 + b**2) * noised


def best(tokenizer: WordTokenizer, **changes: Any) -> DDPM:
    """A system with the best network, which clips nothing."""
    one = system(tokenizer, guidance=1.0, threshold="none", **changes)
    one.network = Best(one.process)
    return one


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


# --- what stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("strength", [None, 0.5])
def test_outside_the_mask_every_bit_stays(
    sampler: str, strength: float | None, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """And inside it nearly all is new."""
    one = system(tokenizer, LINE, sampler=sampler, steps=4)
    mask = box().expand(-1, 3, -1, -1)
    edited = one.edit(CAPTIONS, images, mask=box(), strength=strength)
    assert edited.shape == images.shape and edited.dtype == torch.float32
    assert torch.equal(edited[~mask], images[~mask])
    assert torch.isfinite(edited).all() and edited.abs().max() <= 1
    assert (edited[mask] != images[mask]).float().mean() > 0.9
    assert not edited.requires_grad


def test_an_empty_mask_gives_the_picture_back(one: DDPM, images: Tensor) -> None:
    before = images.clone()
    edited = one.edit(CAPTIONS, images, mask=torch.zeros(3, 1, S, S, dtype=torch.bool))
    assert torch.equal(edited, images) and torch.equal(images, before)


def test_one_pixel_can_be_painted(one: DDPM, images: Tensor) -> None:
    mask = torch.zeros(3, 1, S, S, dtype=torch.bool)
    mask[:, :, 7, 5] = True
    edited = one.edit(CAPTIONS, images, mask=mask)
    assert ((edited != images).any(1, keepdim=True) == mask).all()


def test_a_full_mask_is_no_mask(one: DDPM, images: Tensor) -> None:
    """At the same strength."""
    full = torch.ones(3, 1, S, S, dtype=torch.bool)
    for strength in (0.4, 1.0):
        masked = one.edit(CAPTIONS, images, mask=full, strength=strength)
        assert torch.equal(masked, one.edit(CAPTIONS, images, strength=strength))


def test_the_picture_s_own_tensor_is_left_alone(one: DDPM, images: Tensor) -> None:
    before, mask = images.clone(), box()
    one.edit(CAPTIONS, images, mask=mask)
    assert torch.equal(images, before) and torch.equal(mask, box())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m", "euler_ancestral"])
def test_the_network_sees_the_picture_around_the_mask(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """Noised as much as all else at every level: what it paints can follow the surroundings."""
    one = best(tokenizer, sampler=sampler, spacing="trailing")
    one.edit(CAPTIONS, images, mask=box())
    around = ~box().expand(-1, 3, -1, -1)
    assert len(one.network.asked) >= 10
    for noised, t in one.network.asked:
        point = one.process.point(round(t[0].item()))
        if abs(point.time - t[0].item()) < 1e-3:  # else it is asked between two steps
            eps = ((noised - point.signal * images) / point.noise)[around]
            assert eps.mean().item() == pytest.approx(0, abs=0.1), point
            assert eps.std().item() == pytest.approx(1, abs=0.1), point


# --- strength -------------------------------------------------------------------------------------


def test_strength_is_the_way_from_the_picture(images: Tensor, tokenizer: WordTokenizer) -> None:
    """From hardly to wholly another."""
    one, strengths = best(tokenizer, steps=50), (0.02, 0.2, 0.4, 0.6, 0.8, 1.0)
    ways = [distance(one.edit(CAPTIONS, images, strength=s), images) for s in strengths]
    assert ways == sorted(ways) and ways[0] < 0.05 and ways[-1] > 0.5, ways


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_euler"])
def test_little_strength_stays_near_the_picture(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """As near as the noise of the level from which it comes back."""
    one = best(tokenizer, steps=20, sampler=sampler, spacing="even")
    sigma = one.process.path(20).points[-4].sigma
    assert distance(one.edit(CAPTIONS, images, strength=0.15), images) < 1.5 * sigma < 0.5


def test_strength_counts_steps(one: DDPM, images: Tensor) -> None:
    """Rounded, and never none."""
    asked: list[float] = []
    one.network.register_forward_hook(lambda module, given, out: asked.append(given[1][0].item()))
    times = [point.time for point in one.process.path(10).points[:-1]]
    for strength, steps in ((0.01, 1), (0.1, 1), (0.3, 3), (0.56, 6), (0.999, 10), (1.0, 10)):
        asked.clear()
        one.edit(CAPTIONS, images, strength=strength)
        assert asked == times[-steps:], strength


def test_strength_unless_told(one: DDPM, images: Tensor) -> None:
    """0.6 of the way without a mask, all of it with one."""
    plain, masked = one.edit(CAPTIONS, images), one.edit(CAPTIONS, images, mask=box())
    assert torch.equal(plain, one.edit(CAPTIONS, images, strength=0.6))
    assert torch.equal(masked, one.edit(CAPTIONS, images, mask=box(), strength=1.0))
    assert not torch.equal(plain, one.edit(CAPTIONS, images, strength=1.0))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_all_strength_leaves_no_trace_of_what_was_there(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """Another picture under the mask, the same result, also where not all is noise at the start."""
    mask, one = box(), system(tokenizer, LINE, sampler=sampler, steps=4, spacing="karras")
    assert one.process.path(4, "karras").points[0].signal > 0
    other = torch.where(mask, -images.flip(0), images)
    assert torch.equal(one.edit(CAPTIONS, images, mask=mask), one.edit(CAPTIONS, other, mask=mask))
    half = [one.edit(CAPTIONS, given, mask=mask, strength=0.5) for given in (images, other)]
    assert distance(*half) > 1e-3  # here there is to be a trace


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_euler"])
def test_all_strength_without_a_mask_is_generating(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """From the same noise."""
    process = ProcessConfig(100, "cosine", "v", zero_snr=True)
    one = system(tokenizer, process, sampler=sampler, spacing="trailing", steps=5)
    edited = one.edit(CAPTIONS, images, strength=1.0, seed=4)
    torch.testing.assert_close(edited, one.generate(CAPTIONS, seed=4), atol=1e-4, rtol=0)


# --- rows, seeds and knobs ------------------------------------------------------------------------


def test_a_picture_knows_nothing_of_its_batch(one: DDPM, images: Tensor) -> None:
    """With noise on the way, so that the streams matter."""
    how: dict[str, Any] = {"seed": 3, "sampler": "ddpm", "strength": 0.7}
    together = one.edit(CAPTIONS, images, mask=box(), **how)
    assert torch.equal(one.edit(CAPTIONS, images, mask=box(), **how), together)
    alone = one.edit(CAPTIONS[0], images[:1], mask=box()[:1], **how)
    torch.testing.assert_close(alone[0], together[0], atol=1e-3, rtol=0)
    for at_once in (1, 2):
        one.at_once = at_once
        found = one.edit(CAPTIONS, images, mask=box(), **how)
        torch.testing.assert_close(found, together, atol=1e-3, rtol=0)
    others = images.flip(1)
    others[1] = images[1]
    found = one.edit(["", CAPTIONS[1], "a zorp"], others, mask=box(), **how)
    torch.testing.assert_close(found[1], together[1], atol=1e-3, rtol=0)
    assert not torch.equal(one.edit(CAPTIONS, images, mask=box(), **{**how, "seed": 4}), together)


def test_each_row_has_its_own_caption(one: DDPM, images: Tensor) -> None:
    plain = one.edit(CAPTIONS, images, mask=box())
    other = one.edit([CAPTIONS[0], "a green ring", CAPTIONS[2]], images, mask=box())
    moved = (plain - other).abs().amax((1, 2, 3))
    assert moved[1] > 1e-3 and moved[[0, 2]].max() < 1e-4


CHANGES: list[dict[str, Any]] = [
    {"steps": 5},
    {"guidance": 5.0},
    {"sampler": "ddpm"},
    {"negative": "a green ring"},
    {"spacing": "trailing"},
    {"eta": 1.0},
    {"rescale": 1.0, "guidance": 5.0},
    {"interval": (0.3, 3.0)},
    {"threshold": "dynamic", "guidance": 9.0},
]


@pytest.mark.parametrize("knobs", CHANGES, ids=str)
def test_knobs_are_passed_on(knobs: dict[str, Any], one: DDPM, images: Tensor) -> None:
    """Each makes another picture, the same whether it comes as itself or as text."""
    plain = one.edit(CAPTIONS, images, mask=box())
    changed = one.edit(CAPTIONS, images, mask=box(), **knobs)
    assert distance(plain, changed) > 1e-5
    text = {name: str(value).strip("()") for name, value in knobs.items()}
    assert torch.equal(one.edit(CAPTIONS, images, mask=box(), **text), changed)


def test_rows_that_the_network_is_asked_for(one: DDPM, images: Tensor) -> None:
    rows: list[int] = []
    one.network.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    one.edit(CAPTIONS, images, guidance=1.0, steps=4, strength=0.5)
    one.edit(CAPTIONS, images, guidance=2.0, steps=4, strength=0.5)
    assert rows == [3, 3, 6, 6]


def test_one_caption_is_one_picture(one: DDPM, images: Tensor) -> None:
    text = one.edit(CAPTIONS[0], images[:1])
    assert torch.equal(text, one.edit(CAPTIONS[:1], images[:1])) and len(text) == 1


def test_training_goes_on_as_it_was(one: DDPM, images: Tensor) -> None:
    """Dropout is off on the way, and on again after it."""
    unet = replace(UNET, dropout=0.5)
    other = DDPM(replace(one.config, unet=unet), one.text, S)
    other.load_state_dict(one.state_dict())
    assert other.training
    assert torch.equal(other.edit(CAPTIONS, images), one.edit(CAPTIONS, images))
    assert other.training and not one.training


def test_a_diffusion_system_says_that_it_edits(one: DDPM) -> None:
    assert one.begun == "edit" and System.begun == "complete"


def test_learnt_variances_edit_too(images: Tensor, tokenizer: WordTokenizer) -> None:
    for variance in ("learned", "learned_range"):
        one = system(tokenizer, replace(COSINE, variance=variance), sampler="ddpm")
        mask = box().expand(-1, 3, -1, -1)
        edited = one.edit(CAPTIONS, images, mask=box())
        assert torch.equal(edited[~mask], images[~mask]) and torch.isfinite(edited).all()


# --- in latents -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent(make_system: Any) -> LDM:
    """An untrained `ldm`, whose network has been moved from the zero it starts at."""
    made: tuple[System, RunConfig] = make_system("ldm")
    one = made[0].eval()
    assert isinstance(one, LDM)
    with torch.no_grad():
        for parameter in one.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return one


def test_in_latents_too_every_bit_outside_the_mask_stays(latent: LDM, images: Tensor) -> None:
    """Though a latent is of many pixels."""
    assert latent.shape[-1] < latent.size == S
    mask = box().expand(-1, 3, -1, -1)
    edited = latent.edit(CAPTIONS, images, mask=box())
    assert torch.equal(edited[~mask], images[~mask])
    assert (edited[mask] != images[mask]).float().mean() > 0.9
    empty = torch.zeros(3, 1, S, S, dtype=torch.bool)
    assert torch.equal(latent.edit(CAPTIONS, images, mask=empty), images)


def test_a_latent_with_one_pixel_to_paint_is_painted(
    latent: LDM, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wholly, and those without one not at all: they are the picture's own."""
    seen: list[Tensor] = []
    decode = latent.to_pictures

    def says(x: Tensor, level: Point) -> Estimate:
        return Estimate(torch.full_like(x, 0.3))

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return decode(x)

    monkeypatch.setattr(latent, "denoise", lambda *_: says)
    monkeypatch.setattr(latent, "to_pictures", keep)
    mask = torch.zeros(3, 1, S, S, dtype=torch.bool)
    mask[:, :, 5, 7:10] = True
    latent.edit(CAPTIONS, images, mask=mask, strength=0.9)
    factor = S // latent.shape[-1]
    assert factor > 1
    with torch.no_grad():
        known = latent.from_pictures(images)
    for y in range(latent.shape[1]):
        for x in range(latent.shape[2]):
            cell = mask[:, :, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            wanted = torch.full_like(known[..., y, x], 0.3) if cell.any() else known[..., y, x]
            torch.testing.assert_close(seen[0][..., y, x], wanted)


def test_in_latents_too_no_trace_is_left(latent: LDM, images: Tensor) -> None:
    """What the autoencoder sees under the mask must not reach the latents around it."""
    mask = box()
    other = torch.where(mask, -images.flip(0), images)
    torch.testing.assert_close(
        latent.edit(CAPTIONS, images, mask=mask), latent.edit(CAPTIONS, other, mask=mask)
    )


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.nan])
@pytest.mark.parametrize("masked", [False, True])
def test_a_strength_that_cannot_be_is_told(
    strength: float, masked: bool, one: DDPM, images: Tensor
) -> None:
    mask = box() if masked else None
    with pytest.raises(UserError, match=f"strength={strength} must be above 0 and at most 1"):
        one.edit(CAPTIONS, images, mask=mask, strength=strength)


@pytest.mark.parametrize(
    "shape", [(2, 3, S, S), (3, 1, S, S), (3, 3, S, 8), (3, 3, 32, 32), (3, S, S), (0, 3, S, S)]
)
def test_pictures_of_another_shape_are_told(shape: tuple[int, ...], one: DDPM) -> None:
    with pytest.raises(UserError, match="3 captions need as many pictures of 16 x 16"):
        one.edit(CAPTIONS, torch.zeros(shape))


@pytest.mark.parametrize(
    "shape", [(3, 3, S, S), (1, 1, S, S), (3, S, S), (3, 1, 8, 8), (S, S), (2, 1, S, S)]
)
def test_a_mask_of_another_shape_is_told(shape: tuple[int, ...], one: DDPM, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"mask must be \(3, 1, 16, 16\)"):
        one.edit(CAPTIONS, images, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8, torch.int64])
def test_a_mask_of_numbers_is_told(kind: torch.dtype, one: DDPM, images: Tensor) -> None:
    """Half a pixel cannot be painted."""
    with pytest.raises(UserError, match="mask"):
        one.edit(CAPTIONS, images, mask=box().to(kind))


def test_no_caption_is_no_picture(one: DDPM) -> None:
    with pytest.raises(UserError, match="at least one caption"):
        one.edit([], torch.zeros(0, 3, S, S))


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"flavour": 1}, "has no knob 'flavour'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": "many"}, "steps='many'"),
        ({"sampler": "dimm"}, "did you mean 'ddim'"),
        ({"eta": 1.0, "sampler": "heun"}, "takes no eta"),
        ({"interval": (1.0,)}, "must be two sigmas"),
    ],
    ids=str,
)
def test_knobs_that_cannot_be_are_told(
    knobs: dict[str, Any], match: str, one: DDPM, images: Tensor
) -> None:
    with pytest.raises(UserError, match=match):
        one.edit(CAPTIONS, images, **knobs)
