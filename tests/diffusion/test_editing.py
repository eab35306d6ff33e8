"""Editing with `image`, `mask` and `strength`: unmasked pixels stay to the bit, masked pixels leave
no trace, and the result follows the caption."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import RunConfig, TextConfig
from lineage.data.contract import CaptionedDataset
from lineage.diffusion.ddpm import DDPMConfig, build_ddpm
from lineage.diffusion.ldm import LatentDiffusionModel
from lineage.diffusion.model import DiffusionModel
from lineage.diffusion.networks.unet import UNetConfig
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.base import Estimate
from lineage.diffusion.schedules import NoiseLevel
from lineage.errors import UserError
from lineage.system import System
from lineage.text.contract import TextFeatures
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import WordTokenizer

UNET = UNetConfig(
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    patch_size=2,
    dropout=0.0,
)
COSINE = ProcessConfig(num_timesteps=100, schedule="cosine", prediction="x0")
FLOW = ProcessConfig(num_timesteps=100, schedule="flow", prediction="flow")
CAPTIONS = ["a red circle", "a blue square above a green triangle", "two small yellow stars"]
S = 16


def make_ddpm(
    tokenizer: WordTokenizer, process: ProcessConfig = COSINE, **changes: Any
) -> DiffusionModel:
    """A small system whose network has moved away from the zeros at which it starts."""
    torch.manual_seed(0)
    config = DDPMConfig(**{"unet": UNET, "process": process, "sampling_steps": 10, **changes})
    model = build_ddpm(config, make_encoder("bag", TextConfig(width=16), tokenizer), S).eval()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model(tokenizer: WordTokenizer) -> DiffusionModel:
    return make_ddpm(tokenizer)


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


def edit(model: DiffusionModel, images: Tensor, **options: Any) -> Tensor:
    return model.generate(CAPTIONS, image=images, **options)


class BestEstimate(torch.nn.Module):
    """The best estimate of x_0 for pictures of grey noise with standard deviation 0.5, whatever
    the caption; records its inputs."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.unused = process, torch.nn.Parameter(torch.zeros(()))
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.inputs.append((x_t, t))
        level = self.process.level(round(t[0].item()))
        return level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.sigma**2) * x_t


def make_best(tokenizer: WordTokenizer, **changes: Any) -> DiffusionModel:
    """A system with the best network, without a threshold."""
    model = make_ddpm(tokenizer, guidance=1.0, threshold="none", **changes)
    model.network = BestEstimate(model.process)
    return model


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


# --- pixels that stay -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("strength", [None, 0.5])
def test_outside_the_mask_every_bit_stays(
    sampler: str, strength: float | None, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """And inside it nearly all is new."""
    model = make_ddpm(tokenizer, FLOW, sampler=sampler, sampling_steps=4)
    mask = box().expand(-1, 3, -1, -1)
    edited = edit(model, images, mask=box(), strength=strength)
    assert edited.shape == images.shape and edited.dtype == torch.float32
    assert torch.equal(edited[~mask], images[~mask])
    assert torch.isfinite(edited).all() and edited.abs().max() <= 1
    assert (edited[mask] != images[mask]).float().mean() > 0.9
    assert not edited.requires_grad


def test_an_empty_mask_gives_the_picture_back(model: DiffusionModel, images: Tensor) -> None:
    before = images.clone()
    edited = edit(model, images, mask=torch.zeros(3, 1, S, S, dtype=torch.bool))
    assert torch.equal(edited, images) and torch.equal(images, before)


def test_one_pixel_can_be_painted(model: DiffusionModel, images: Tensor) -> None:
    mask = torch.zeros(3, 1, S, S, dtype=torch.bool)
    mask[:, :, 7, 5] = True
    edited = edit(model, images, mask=mask)
    assert ((edited != images).any(1, keepdim=True) == mask).all()


def test_a_full_mask_is_no_mask(model: DiffusionModel, images: Tensor) -> None:
    """At the same strength."""
    full = torch.ones(3, 1, S, S, dtype=torch.bool)
    for strength in (0.4, 1.0):
        masked = edit(model, images, mask=full, strength=strength)
        assert torch.equal(masked, edit(model, images, strength=strength))


def test_the_callers_tensors_do_not_change(model: DiffusionModel, images: Tensor) -> None:
    before, mask = images.clone(), box()
    edit(model, images, mask=mask)
    assert torch.equal(images, before) and torch.equal(mask, box())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m", "euler_ancestral"])
def test_the_network_gets_the_picture_around_the_mask(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """With the noise of every level, so that what it paints can follow the surroundings."""
    model = make_best(tokenizer, sampler=sampler, spacing="trailing")
    edit(model, images, mask=box())
    around, inputs = ~box().expand(-1, 3, -1, -1), model.network.inputs
    assert len(inputs) >= 10  # type: ignore[arg-type]
    for x_t, t in inputs:  # type: ignore[union-attr]
        level = model.process.level(round(t[0].item()))
        if abs(level.timestep - t[0].item()) < 1e-3:  # else it is between two timesteps
            eps = ((x_t - level.alpha * images) / level.sigma)[around]
            assert eps.mean().item() == pytest.approx(0, abs=0.1), level
            assert eps.std().item() == pytest.approx(1, abs=0.1), level


# --- strength -------------------------------------------------------------------------------------


def test_strength_is_the_distance_from_the_picture(
    images: Tensor, tokenizer: WordTokenizer
) -> None:
    model, strengths = make_best(tokenizer, sampling_steps=50), (0.02, 0.2, 0.4, 0.6, 0.8, 1.0)
    distances = [distance(edit(model, images, strength=s), images) for s in strengths]
    assert distances == sorted(distances), distances
    assert distances[0] < 0.05 and distances[-1] > 0.5, distances


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_euler"])
def test_little_strength_stays_near_the_picture(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """As near as the noise of the level at which sampling starts."""
    model = make_best(tokenizer, sampling_steps=20, sampler=sampler, spacing="even")
    sigma = model.process.sampling_schedule(20).levels[-4].karras_sigma
    assert distance(edit(model, images, strength=0.15), images) < 1.5 * sigma < 0.5


def test_strength_is_a_number_of_steps(model: DiffusionModel, images: Tensor) -> None:
    """Rounded, and at least one."""
    timesteps: list[float] = []
    model.network.register_forward_hook(lambda _, args, __: timesteps.append(args[1][0].item()))
    levels = model.process.sampling_schedule(10).levels[:-1]
    for strength, steps in ((0.01, 1), (0.1, 1), (0.3, 3), (0.56, 6), (0.999, 10), (1.0, 10)):
        timesteps.clear()
        edit(model, images, strength=strength)
        assert timesteps == [level.timestep for level in levels[-steps:]], strength


def test_the_default_strength(model: DiffusionModel, images: Tensor) -> None:
    """0.6 without a mask, 1 with one."""
    plain, masked = edit(model, images), edit(model, images, mask=box())
    assert torch.equal(plain, edit(model, images, strength=0.6))
    assert torch.equal(masked, edit(model, images, mask=box(), strength=1.0))
    assert not torch.equal(plain, edit(model, images, strength=1.0))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_full_strength_leaves_no_trace_of_masked_pixels(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """Another picture under the mask gives the same result, also where the first level is not pure
    noise."""
    mask = box()
    model = make_ddpm(tokenizer, FLOW, sampler=sampler, sampling_steps=4, spacing="karras")
    assert model.process.sampling_schedule(4, "karras").levels[0].alpha > 0
    other = torch.where(mask, -images.flip(0), images)
    assert torch.equal(edit(model, images, mask=mask), edit(model, other, mask=mask))
    half = [edit(model, image, mask=mask, strength=0.5) for image in (images, other)]
    assert distance(*half) > 1e-3  # at half strength there is a trace


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_euler"])
def test_full_strength_without_a_mask_is_generation(
    sampler: str, images: Tensor, tokenizer: WordTokenizer
) -> None:
    """From the same noise."""
    process = ProcessConfig(num_timesteps=100, schedule="cosine", prediction="v", zero_snr=True)
    model = make_ddpm(tokenizer, process, sampler=sampler, spacing="trailing", sampling_steps=5)
    edited = edit(model, images, strength=1.0, seed=4)
    torch.testing.assert_close(edited, model.generate(CAPTIONS, seed=4), atol=1e-4, rtol=0)


# --- rows, seeds and options ----------------------------------------------------------------------


def test_a_picture_does_not_depend_on_its_batch(model: DiffusionModel, images: Tensor) -> None:
    """With noise in every step, so that the streams matter."""
    options: dict[str, Any] = {"seed": 3, "sampler": "ddpm", "strength": 0.7}
    together = edit(model, images, mask=box(), **options)
    assert torch.equal(edit(model, images, mask=box(), **options), together)
    alone = model.generate(CAPTIONS[0], image=images[:1], mask=box()[:1], **options)
    torch.testing.assert_close(alone[0], together[0], atol=1e-3, rtol=0)
    for sample_batch_size in (1, 2):
        model.sample_batch_size = sample_batch_size
        parts = edit(model, images, mask=box(), **options)
        torch.testing.assert_close(parts, together, atol=1e-3, rtol=0)
    others = images.flip(1)
    others[1] = images[1]
    captions = ["", CAPTIONS[1], "a zorp"]
    edited = model.generate(captions, image=others, mask=box(), **options)
    torch.testing.assert_close(edited[1], together[1], atol=1e-3, rtol=0)
    other_seed = edit(model, images, mask=box(), **{**options, "seed": 4})
    assert not torch.equal(other_seed, together)


def test_each_row_has_its_own_caption(model: DiffusionModel, images: Tensor) -> None:
    plain = edit(model, images, mask=box())
    captions = [CAPTIONS[0], "a green ring", CAPTIONS[2]]
    other = model.generate(captions, image=images, mask=box())
    moved = (plain - other).abs().amax((1, 2, 3))
    assert moved[1] > 1e-3 and moved[[0, 2]].max() < 1e-4


CHANGES: list[dict[str, Any]] = [
    {"sampling_steps": 5},
    {"guidance": 5.0},
    {"sampler": "ddpm"},
    {"negative": "a green ring"},
    {"spacing": "trailing"},
    {"eta": 1.0},
    {"rescale": 1.0, "guidance": 5.0},
    {"interval": (0.3, 3.0)},
    {"threshold": "dynamic", "guidance": 9.0},
]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_options_of_sampling_act_on_an_edit(
    options: dict[str, Any], model: DiffusionModel, images: Tensor
) -> None:
    """Each changes the picture, alike as a value and as text."""
    plain = edit(model, images, mask=box())
    changed = edit(model, images, mask=box(), **options)
    assert distance(plain, changed) > 1e-5
    text = {name: str(value).strip("()") for name, value in options.items()}
    assert torch.equal(edit(model, images, mask=box(), **text), changed)


def test_rows_of_the_network(model: DiffusionModel, images: Tensor) -> None:
    """One for each picture, or two with guidance."""
    rows: list[int] = []
    model.network.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    edit(model, images, guidance=1.0, sampling_steps=4, strength=0.5)
    edit(model, images, guidance=2.0, sampling_steps=4, strength=0.5)
    assert rows == [3, 3, 6, 6]


def test_one_picture_serves_all_captions(model: DiffusionModel, images: Tensor) -> None:
    one = edit(model, images[:1], mask=box()[:1])
    assert torch.equal(one, edit(model, images[:1].expand(3, -1, -1, -1), mask=box()[[0, 0, 0]]))


def test_training_mode_is_restored(model: DiffusionModel, images: Tensor) -> None:
    """Dropout is off during sampling, and on again after it."""
    unet = replace(UNET, dropout=0.5)
    assert isinstance(model.config, DDPMConfig)
    other = build_ddpm(replace(model.config, unet=unet), model.text, S)
    other.load_state_dict(model.state_dict())
    assert other.training
    assert torch.equal(edit(other, images), edit(model, images))
    assert other.training and not model.training


def test_learned_variances_edit_too(images: Tensor, tokenizer: WordTokenizer) -> None:
    mask = box().expand(-1, 3, -1, -1)
    for variance in ("learned", "learned_range"):
        model = make_ddpm(tokenizer, replace(COSINE, variance=variance), sampler="ddpm")
        edited = edit(model, images, mask=box())
        assert torch.equal(edited[~mask], images[~mask]) and torch.isfinite(edited).all()


# --- in latents -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent(make_system: Any) -> LatentDiffusionModel:
    """An untrained `ldm` whose network has moved away from the zeros at which it starts."""
    built: tuple[System, RunConfig] = make_system("ldm")
    model = built[0].eval()
    assert isinstance(model, LatentDiffusionModel)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_in_latents_too_every_bit_outside_the_mask_stays(
    latent: LatentDiffusionModel, images: Tensor
) -> None:
    """Though a latent covers many pixels."""
    assert latent.space.shape[-1] < latent.size == S
    mask = box().expand(-1, 3, -1, -1)
    edited = edit(latent, images, mask=box())
    assert torch.equal(edited[~mask], images[~mask])
    assert (edited[mask] != images[mask]).float().mean() > 0.9
    empty = torch.zeros(3, 1, S, S, dtype=torch.bool)
    assert torch.equal(edit(latent, images, mask=empty), images)


def test_a_latent_with_one_masked_pixel_is_repainted(
    latent: LatentDiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, and those without one not at all: they are the picture's own."""
    outputs: list[Tensor] = []
    space, decode = latent.space, latent.space.decode

    def constant(x: Tensor, level: NoiseLevel) -> Estimate:
        return Estimate(torch.full_like(x, 0.3))

    def record(x0: Tensor) -> Tensor:
        outputs.append(x0)
        return decode(x0)

    monkeypatch.setattr(latent, "denoiser", lambda *_: constant)
    monkeypatch.setattr(space, "decode", record)
    mask = torch.zeros(3, 1, S, S, dtype=torch.bool)
    mask[:, :, 5, 7:10] = True
    edit(latent, images, mask=mask, strength=0.9)
    factor = S // space.shape[-1]
    assert factor > 1
    with torch.no_grad():
        own = space.encode_image(images)
    for y in range(space.shape[1]):
        for x in range(space.shape[2]):
            cell = mask[:, :, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            expected = torch.full_like(own[..., y, x], 0.3) if cell.any() else own[..., y, x]
            torch.testing.assert_close(outputs[0][..., y, x], expected)


def test_in_latents_too_masked_pixels_leave_no_trace(
    latent: LatentDiffusionModel, images: Tensor
) -> None:
    """They must not reach the latents around them through the encoder."""
    mask = box()
    other = torch.where(mask, -images.flip(0), images)
    torch.testing.assert_close(edit(latent, images, mask=mask), edit(latent, other, mask=mask))


# --- impossible options ---------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.nan])
@pytest.mark.parametrize("masked", [False, True])
def test_an_impossible_strength_is_named(
    strength: float, masked: bool, model: DiffusionModel, images: Tensor
) -> None:
    mask = box() if masked else None
    with pytest.raises(UserError, match=f"strength={strength} (must be|should be) a"):
        edit(model, images, mask=mask, strength=strength)


@pytest.mark.parametrize("options", [{"mask": box()}, {"strength": 0.5}], ids=["mask", "strength"])
def test_an_option_that_needs_an_image_is_named(
    options: dict[str, Any], model: DiffusionModel
) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} .*image") as caught:
        model.generate(CAPTIONS, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shape", [(2, 3, S, S), (3, 1, S, S), (3, 3, S, 8), (3, 3, 32, 32), (3, S, S), (0, 3, S, S)]
)
def test_pictures_of_another_shape_are_refused(
    shape: tuple[int, ...], model: DiffusionModel
) -> None:
    with pytest.raises(UserError, match=r"image must be \(3, 3, 16, 16\)"):
        edit(model, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 3, S, S), (3, S, S), (3, 1, 8, 8), (S, S), (2, 1, S, S)])
def test_a_mask_of_another_shape_is_refused(
    shape: tuple[int, ...], model: DiffusionModel, images: Tensor
) -> None:
    with pytest.raises(UserError, match=r"mask must be \(3, 1, 16, 16\)"):
        edit(model, images, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8, torch.int64])
def test_a_mask_of_numbers_is_refused(
    kind: torch.dtype, model: DiffusionModel, images: Tensor
) -> None:
    """Half a pixel cannot be painted."""
    with pytest.raises(UserError, match="mask"):
        edit(model, images, mask=box().to(kind))


def test_no_caption_is_no_picture(model: DiffusionModel) -> None:
    with pytest.raises(UserError, match="at least one caption"):
        model.generate([], image=torch.zeros(0, 3, S, S))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"flavour": 1}, "has no option 'flavour'"),
        ({"sampling_steps": 0}, "sampling_steps=0"),
        ({"sampling_steps": "many"}, "sampling_steps='many'"),
        ({"sampler": "dimm"}, "did you mean 'ddim'"),
        ({"eta": 1.0, "sampler": "heun"}, "takes no eta"),
        ({"interval": (1.0,)}, "must be two sigmas"),
    ],
    ids=str,
)
def test_impossible_options_are_named(
    options: dict[str, Any], match: str, model: DiffusionModel, images: Tensor
) -> None:
    with pytest.raises(UserError, match=match):
        edit(model, images, **options)
