"""`vqgan_clip`: prompts, the step by hand, and pictures that depend on nothing but their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lineage
from lineage import notes, runs
from lineage.catalog import CATALOG
from lineage.clip.clip import CLIP
from lineage.clip.prompts import (
    Prompt,
    PromptFeatures,
    noise_prompt,
    prompt_losses,
    spherical_distance,
    split_prompt,
    split_prompts,
)
from lineage.clip.vqgan_clip import (
    VQGANCLIP,
    LatentCodec,
    VQGANCLIPConfig,
    gradient_picture,
    vector_quantise,
)
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.official.reference import read_reference
from lineage.recipes import clip as clip_recipe
from lineage.recipes import vqgan as vqgan_recipe
from lineage.recipes import vqgan_clip as recipe
from lineage.text.tokenizer import WordTokenizer
from lineage.vqvae.dalle import DVAE, DVAEConfig
from lineage.vqvae.vqgan import VQGAN
from lineage.vqvae.vqvae import VQVAE, VQVAEConfig

SIZE = 16
CAPTIONS = ["a red circle", "a blue square above a green triangle", ""]


@pytest.fixture(scope="module")
def parts(tokenizer: WordTokenizer) -> tuple[CLIP, VQGAN]:
    """An untrained CLIP and codec at preset smoke, with weights as large as trained ones."""
    torch.manual_seed(1)
    clip, codec, _ = (stage for stage in recipe.stages(recipe.PRESETS["smoke"], tokenizer))
    systems = clip.construct(), codec.construct()
    with torch.no_grad():
        for parameter in [p for system in systems for p in system.parameters()]:
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    assert isinstance(systems[0], CLIP) and isinstance(systems[1], VQGAN)
    return systems[0], systems[1]


@pytest.fixture(scope="module")
def make(parts: tuple[CLIP, VQGAN]) -> Callable[..., VQGANCLIP]:
    """Settings -> the system."""

    def build(**settings: Any) -> VQGANCLIP:
        config = VQGANCLIPConfig(**{"num_steps": 3, "cutouts": 4, **settings})
        return VQGANCLIP(config, *parts, SIZE).eval()

    return build


def steps_of(system: VQGANCLIP, caption: str = CAPTIONS[0], **options: Any) -> list[Any]:
    """The steps of one picture."""
    noise = NoiseStreams.for_pictures(0, 1, "cpu")
    with system.inference():
        z, cut = system.initial_latents(noise), system.cutter(noise)
        return list(system.optimise(z, system.encode_prompts([caption]), cut, **options))


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", ("a fox", 1.0, -math.inf)),
        ("a fox:-0.5", ("a fox", -0.5, -math.inf)),
        ("a fox:2:0.5", ("a fox", 2.0, 0.5)),
        ("a fox:1:-inf", ("a fox", 1.0, -math.inf)),
        ("style: ink:1.5:-1", ("style: ink", 1.5, -1.0)),
        (" a fox : 2 : .5 ", ("a fox", 2.0, 0.5)),  # blanks
        ("style: ink", ("style: ink", 1.0, -math.inf)),  # words behind a colon
        ("scheme://host/a.png", ("scheme://host/a.png", 1.0, -math.inf)),
        ("a:b:c:1e-1", ("a:b:c", 0.1, -math.inf)),
        ("from here:to infinity", ("from here:to infinity", 1.0, -math.inf)),
        ("a fox:nan", ("a fox:nan", 1.0, -math.inf)),  # no weight, though Python's float reads it
        ("", ("", 1.0, -math.inf)),
        ("two\nlines:3", ("two\nlines", 3.0, -math.inf)),
    ],
)
def test_a_prompt_has_a_text_a_weight_and_a_stop(
    text: str, expected: tuple[str, float, float]
) -> None:
    assert split_prompt(text) == Prompt(*expected)


def test_prompts_split_as_the_public_program_splits_them(
    reference_file: Callable[[str], Path],
) -> None:
    stored = read_reference(reference_file("vqgan_clip.safetensors")).config["split_prompt"]
    assert stored
    for text, (words, weight, stop) in stored.items():
        assert split_prompt(text) == Prompt(words, weight, float(stop))


def test_a_caption_is_split_at_bars() -> None:
    assert [p.text for p in split_prompts("a fox | in snow:2| ")] == ["a fox", "in snow"]
    assert split_prompts(" | ") == [Prompt("")]


def test_a_prompt_of_noise_is_that_of_the_public_program(
    reference_file: Callable[[str], Path],
) -> None:
    reference = read_reference(reference_file("vqgan_clip.safetensors"))
    stored = reference.inputs["traj/noise_prompt"]
    ours = noise_prompt(reference.config["noise_seed"], stored.shape[1])
    torch.testing.assert_close(ours, stored)


# --- losses ---------------------------------------------------------------------------------------


def test_the_distance_is_half_the_squared_angle() -> None:
    for angle in (0.0, 0.3, math.pi / 2, 3.0, math.pi):
        u = 5 * torch.tensor([1.0, 0.0])
        v = torch.tensor([math.cos(angle), math.sin(angle)])
        assert float(spherical_distance(u, v)) == pytest.approx(angle**2 / 2, rel=1e-4, abs=1e-6)


def prompts_of(features: Tensor, *numbers: tuple[float, float]) -> PromptFeatures:
    weight, stop = torch.tensor(numbers).T
    return PromptFeatures(features, weight, stop, torch.zeros(len(numbers), dtype=torch.int64))


def test_a_loss_is_a_mean_and_a_negative_weight_turns_its_sign() -> None:
    features = torch.randn(1, 5, 7)
    embed = torch.randn(2, 7)
    plain, away = prompt_losses(
        features, prompts_of(embed[:1].expand(2, -1), (2.0, -math.inf), (-2.0, -math.inf))
    )
    distances = spherical_distance(features[0], embed[:1])
    torch.testing.assert_close(plain, 2 * distances.mean())
    torch.testing.assert_close(away, -plain)


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_a_stop_takes_the_gradient_of_near_pairs_and_leaves_the_value(weight: float) -> None:
    angles = torch.tensor([0.4, 1.2])
    features = torch.stack([angles.cos(), angles.sin()], 1)[None].requires_grad_()
    embed = torch.tensor([[1.0, 0.0]])
    stop = math.copysign(0.8**2 / 2, weight)
    (loss,) = prompt_losses(features, prompts_of(embed, (weight, stop)))
    expected = weight * (angles.square() / 2).mean()
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, features)
    stopped = gradient[0].abs().sum(1) == 0
    # the signed distances are 0.08 and 0.72, or their negatives
    assert stopped.tolist() == ([True, False] if weight > 0 else [False, True])


# --- latents --------------------------------------------------------------------------------------


def test_a_vector_becomes_its_nearest_code_and_its_gradient_stays() -> None:
    codebook, z = torch.randn(9, 5), torch.randn(2, 3, 4, 5, requires_grad=True)
    z_q = vector_quantise(z, codebook)
    nearest = torch.cdist(z.detach().reshape(-1, 5), codebook).argmin(1)
    torch.testing.assert_close(z_q.detach(), codebook[nearest].view(z.shape))
    weight = torch.randn(z.shape)
    (gradient,) = torch.autograd.grad((z_q * weight).sum(), z)
    assert torch.equal(gradient, weight)


def test_codecs_whose_codes_are_vectors_fit_and_others_do_not(parts: tuple[CLIP, VQGAN]) -> None:
    assert isinstance(parts[1], LatentCodec)
    with torch.device("meta"):
        assert isinstance(VQVAE(VQVAEConfig()), LatentCodec)
        assert not isinstance(DVAE(DVAEConfig()), LatentCodec)  # its codes are one-hot


def test_latents_decode_as_codes_do(parts: tuple[CLIP, VQGAN]) -> None:
    """The methods of the protocol are the codec's own `encode` and `decode`, taken apart."""
    image = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    for codec in (parts[1].eval(), VQVAE(VQVAEConfig()).eval()):
        with torch.no_grad():
            z_q = vector_quantise(codec.encode_latents(image), codec.codebook)
            decoded = codec.decode_latents(z_q).clamp(-1, 1)
            torch.testing.assert_close(decoded, codec.decode(codec.encode(image)))


def test_a_gradient_picture_is_cut_to_bytes() -> None:
    picture = gradient_picture(np.array([100, 9, 200, 50]), 3, 4)
    assert picture.shape == (3, 4, 3)
    assert picture[:, :, 0].tolist() == [[0, 3, 6, 9]] * 3  # red, to the right
    assert picture[:, 0, 1].tolist() == [0, 100, 200]  # green, downward
    assert picture[:, 3, 2].tolist() == [100, 75, 50]


# --- the step -------------------------------------------------------------------------------------


def test_a_step_is_one_of_adam_within_the_range_of_the_codebook(
    make: Callable[..., VQGANCLIP],
) -> None:
    """Adam's first step has the size of the rate, against the sign of the gradient."""
    system = make(lr=0.05)
    codebook = system.codec.codebook
    low, high = codebook.amin(0), codebook.amax(0)
    noise = NoiseStreams.for_pictures(0, 1, "cpu")
    z = system.initial_latents(noise)
    (step,) = steps_of(system, steps=1)
    assert step.grad.abs().amin() > 1e-7  # else the size of Adam's step would be less
    moved = z - 0.05 * step.grad.sign()
    expected = torch.maximum(torch.minimum(moved, high), low)
    torch.testing.assert_close(step.z, expected, atol=2e-3, rtol=0)
    assert (step.z <= high).all() and (step.z >= low).all() and not torch.equal(moved, expected)


def test_the_gradient_is_that_of_the_losses(make: Callable[..., VQGANCLIP]) -> None:
    """Of the prompts, through cutouts, clamping, decoder and quantiser; and of the pull to 0."""
    system = make(init_weight=0.6, augmentations=())
    noise = NoiseStreams.for_pictures(0, 1, "cpu")
    z = system.initial_latents(noise).requires_grad_()
    cutouts = system.cutter(noise)(system.synthesise(z))
    features = system.clip.encode_image(2 * cutouts[0] - 1)
    target = system.clip.encode_text([CAPTIONS[0]])
    loss = spherical_distance(features, target).mean() + 0.6 / 2 * z.square().mean()
    (gradient,) = torch.autograd.grad(loss, z)
    first, second, third = steps_of(system)
    torch.testing.assert_close(first.grad, gradient, atol=1e-6, rtol=1e-4)
    for i, step in enumerate((first, second, third)):
        before = z if i == 0 else (first, second)[i - 1].z
        pull = 0.6 / (2 * (2 * i + 1)) * before.square().mean()
        torch.testing.assert_close(step.init_loss, pull.detach()[None])


def test_the_loss_falls(make: Callable[..., VQGANCLIP]) -> None:
    """Ten steps are nearer to the caption, as CLIP measures it on the whole picture."""
    system = make(lr=0.05, cutouts=8)

    def angle(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            features = system.clip.encode_image(pictures)
            return spherical_distance(features, system.clip.encode_text(CAPTIONS * 4)).mean()

    before, after = (system.generate(CAPTIONS * 4, steps=n, seed=2) for n in (1, 30))
    assert angle(after) < 0.97 * angle(before)


@pytest.mark.parametrize("method", ["latest", "original"])
def test_both_kinds_of_cutouts_draw(method: str, make: Callable[..., VQGANCLIP]) -> None:
    pictures = make(method=method).generate(CAPTIONS)
    assert pictures.shape == (3, 3, SIZE, SIZE) and pictures.isfinite().all()


@pytest.mark.parametrize("optimiser", ["adamw", "adamax", "adagrad", "rmsprop"])
def test_every_optimiser_moves(optimiser: str, make: Callable[..., VQGANCLIP]) -> None:
    one, other = steps_of(make(optimiser=optimiser), steps=2)
    assert (one.z - other.z).abs().max() > 1e-3


# --- a picture and its own ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["latest", "original"])
def test_a_picture_does_not_depend_on_its_batch(
    method: str, make: Callable[..., VQGANCLIP]
) -> None:
    """Nor on other captions, whose prompts may be more or fewer."""
    system = make(method=method, noise_seeds=(3,), noise_weights=(0.2,))
    system.sample_batch_size = 8
    together = system.generate(CAPTIONS, seed=5)
    others = ["two | prompts:-0.5", CAPTIONS[1], "x", "y"]
    torch.testing.assert_close(system.generate(others, seed=5)[1], together[1], atol=1e-4, rtol=0)
    system.sample_batch_size = 1
    torch.testing.assert_close(system.generate(CAPTIONS, seed=5), together, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_the_seed_sets_the_start_and_the_cutouts(make: Callable[..., VQGANCLIP]) -> None:
    for init in ("codes", "gradient"):
        system = make(init=init)
        one, again, other = (system.generate(CAPTIONS[0], seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one, again) and (one - other).abs().max() > 1e-3


def test_drawing_changes_no_weight_and_needs_no_gradient_outside(
    make: Callable[..., VQGANCLIP],
) -> None:
    system = make()
    before = {name: value.clone() for name, value in system.state_dict().items()}
    assert not any(p.requires_grad for p in system.parameters())
    with torch.inference_mode(False), torch.no_grad():
        assert not system.generate(CAPTIONS[0]).requires_grad
        assert not torch.is_grad_enabled()
    assert all(torch.equal(before[name], value) for name, value in system.state_dict().items())
    assert all(p.grad is None for p in system.parameters())


# --- options --------------------------------------------------------------------------------------


def test_an_image_is_the_start(make: Callable[..., VQGANCLIP]) -> None:
    system = make(lr=1e-6)
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pictures = system.generate(CAPTIONS[:2], image=image)
    torch.testing.assert_close(pictures, system.reconstruct(image).clamp(-1, 1), atol=1e-3, rtol=0)


def test_prompts_with_weights_negative_and_reference_add_to_the_loss(
    make: Callable[..., VQGANCLIP],
) -> None:
    """The features, weights, stops and rows of all prompts of two pictures."""
    system = make(noise_seeds=(3,), noise_weights=(0.2,))
    noise = NoiseStreams.for_pictures(0, 2, "cpu")
    reference = torch.zeros(2, 3, SIZE, SIZE)
    with torch.no_grad():
        prompts = system.encode_prompts(
            ["a:2:0.5 | b", "c"], "d:0.5 | e", system.cutter(noise), reference, -0.8
        )
        texts = system.clip.encode_text(["a", "b", "c", "d", "e", "d", "e"])
    rows = [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    weights = [2, 1, 1, -0.5, -1, -0.5, -1, 0.2, 0.2, *[-0.2] * 8]
    assert prompts.row.tolist() == rows
    assert prompts.weight.tolist() == pytest.approx(weights)
    assert prompts.stop.tolist() == [0.5] + [-math.inf] * 16
    torch.testing.assert_close(prompts.features[:7], texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(prompts.features[7:9], noise_prompt(3, 16).expand(2, -1))


def test_options_change_the_picture(make: Callable[..., VQGANCLIP]) -> None:
    system = make(lr=0.5)
    plain = system.generate(CAPTIONS[0])
    picture = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    for options in (
        {"steps": 2},
        {"cutouts": 5},
        {"lr": 2.0},
        {"negative": "a green star"},
        {"image": picture},
        {"reference": picture},
    ):
        assert (system.generate(CAPTIONS[0], **options) - plain).abs().max() > 1e-3, options
    assert list(system.options()) == [
        *("steps", "cutouts", "lr", "negative", "image", "reference", "reference_weight")
    ]


def test_a_weight_without_a_picture_is_named_as_idle(make: Callable[..., VQGANCLIP]) -> None:
    system, picture = make(), torch.zeros(1, 3, SIZE, SIZE)
    assert set(system.idle_options(["a"], {"reference_weight": 0.5})) == {"reference_weight"}
    assert system.idle_options(["a"], {"reference_weight": 0.5, "reference": picture}) == {}
    assert system.idle_options(["a"], {"reference_weight": 1.0}) == {}


def test_weights_are_no_unknown_words(make: Callable[..., VQGANCLIP]) -> None:
    system = make()
    found = notes.unread_text(system.text, system.texts(["a red circle:2 | a zorp: -0.5"]))
    assert found == ["unknown words: zorp"]


def test_each_stage_is_scored(make: Callable[..., VQGANCLIP]) -> None:
    """CLIP's cosine is that of the pair; a codec that decodes exactly would have no finite PSNR."""
    system = make()
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        scores = system.stage_scores(Batch(images, CAPTIONS[:2], None, ["0", "1"]))
        cosines = system.clip.similarity(images, CAPTIONS[:2])
        error = (system.codec.decode(system.codec.encode(images)) - images).square()
    torch.testing.assert_close(scores["cosine"], cosines.diag())
    torch.testing.assert_close(scores["psnr"], 10 * (4 / error.flatten(1).mean(1)).log10())


def test_few_pictures_at_once_have_many_cutouts(make: Callable[..., VQGANCLIP]) -> None:
    """The cutouts of a step need most of the memory."""
    assert make(cutouts=4).sample_batch_size == 64
    assert make(cutouts=100).sample_batch_size == 2**20 // (100 * 3 * SIZE**2)
    assert make(cutouts=60_000).sample_batch_size == 1


def test_a_film_ends_with_the_picture(make: Callable[..., VQGANCLIP]) -> None:
    system = make(num_steps=20)
    film, views = system.visualise(CAPTIONS[0], seed=4)
    assert film[0].label.startswith("step 0, loss") and film[-1].label == "step 20"
    assert len(film) == 8 and len(views) == 4
    torch.testing.assert_close(film[-1].image, system.generate(CAPTIONS[0], seed=4)[0])


# --- settings and runs ----------------------------------------------------------------------------


def test_wrong_settings_are_refused(parts: tuple[CLIP, VQGAN]) -> None:
    with pytest.raises(UserError, match="as many entries"):
        VQGANCLIPConfig(noise_seeds=(1, 2), noise_weights=(0.5,))
    with pytest.raises(UserError, match="size=18 must be a multiple of 4"):
        VQGANCLIP(VQGANCLIPConfig(), *parts, 18)
    with pytest.raises(UserError, match="augmentations"):
        VQGANCLIPConfig(augmentations=("flip",))  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_public_program() -> None:
    config = recipe.PRESETS["paper"]
    assert (config.model.num_steps, config.model.lr, config.model.cutouts) == (500, 0.1, 32)
    assert (config.model.method, config.model.optimiser) == ("latest", "adam")
    assert (config.size, config.clip_size, config.codec.net.factor) == (512, 224, 16)
    assert (config.clip.vit.patch_size, config.codec.quantiser.num_codes) == (32, 16_384)


def test_the_stages_are_those_of_clip_and_vqgan(tokenizer: WordTokenizer) -> None:
    """So that a run with the same budget finds them again."""
    for name in recipe.PRESETS:
        stages = recipe.stages(recipe.PRESETS[name], tokenizer)
        assert [stage.name for stage in stages] == ["clip", "codec", "drawing"]
        assert sum(stage.share for stage in stages) == 1 and not stages[-1].trains
        if name == "paper":
            continue  # it draws larger pictures
        clip = clip_recipe.stages(clip_recipe.PRESETS[name], tokenizer)[0]
        codec = vqgan_recipe.stages(vqgan_recipe.PRESETS[name], tokenizer)[0]
        for ours, theirs in zip(stages, (clip, codec), strict=False):
            assert ours.build is theirs.build
            assert ours.optim == theirs.optim
            assert runs.to_dict(ours.train)["batch_size"] == theirs.train.batch_size
            plain, other = (
                json.dumps({k: str(v) for k, v in stage.arguments.items() if k != "encoder"})
                for stage in (ours, theirs)
            )
            assert plain == other


@pytest.mark.slow
def test_both_stages_may_come_from_other_runs(
    smoke_run: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = replace(CATALOG["vqgan_clip"], status="works", presets=("smoke",))
    monkeypatch.setitem(CATALOG, "vqgan_clip", works)
    clip, vqgan = smoke_run("clip"), smoke_run("vqgan")
    sources = {"clip": clip.folder, "codec": vqgan.folder}
    folder = runs.train("vqgan_clip", preset="smoke", out=tmp_path / "run", stages_from=sources)
    system = lineage.load(folder)
    for name, source in (("clip", clip.system), ("codec", vqgan.system.codec)):
        ours = getattr(system, name).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in source.state_dict().items())
    assert system.generate("a red circle").shape == (1, 3, SIZE, SIZE)
    assert list((folder / "samples").glob("*.png"))
    with pytest.raises(UserError, match="needs a LatentCodec"):
        runs.train(
            "vqgan_clip",
            preset="smoke",
            out=tmp_path / "other",
            stages_from={"codec": smoke_run("dalle").folder},
        )
