"""The recipes of an autoencoder and a denoiser of its latents: `ldm` and `dit`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lineage
from lineage import runs
from lineage.cli import main
from lineage.config import field_names, from_dict, to_dict, with_field
from lineage.data import load_dataset
from lineage.data.tools import export
from lineage.diffusion.ldm import KLAutoencoder, LatentDiffusionModel
from lineage.errors import UserError
from lineage.recipes import find_recipe, preset
from lineage.recipes.latent_diffusion import with_latents
from lineage.text.encoders import ENCODERS
from lineage.text.tokenizer import WordTokenizer
from lineage.training.stage import Stage
from lineage.training.store import read_json

KEYS = ("ldm", "dit")
NAMES = ("smoke", "tiny", "small", "paper")
BOTH = [(key, name) for key in KEYS for name in NAMES]
STAGES = ("autoencoder", "denoiser")


def stages_of(config: Any, tokenizer: WordTokenizer) -> list[Stage]:
    return find_recipe(config.key).stages(config, tokenizer)


def build_on_meta(config: Any, tokenizer: WordTokenizer) -> tuple[Any, Any]:
    """The untrained autoencoder and denoiser."""
    stages = stages_of(config, tokenizer)
    with torch.device("meta"):
        stages[-1].construct()
    return tuple(stage.system for stage in stages)  # type: ignore[return-value]


# --- what each preset is ----------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_every_preset_fits_together(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """Autoencoder and denoiser, on the meta device; a picture becomes latents and comes back."""
    config: Any = preset(key, name)
    autoencoder, model = build_on_meta(config, tokenizer)
    assert isinstance(autoencoder, KLAutoencoder) and isinstance(model, LatentDiffusionModel)
    with torch.device("meta"):
        posterior = autoencoder.encode(torch.empty(1, 3, config.size, config.size))
        decoded = autoencoder.decode(posterior.mean)
    side = config.size // config.autoencoder.net.factor
    assert side * config.autoencoder.net.factor == config.size
    shape = (config.autoencoder.latent_channels, side, side)
    assert model.space.shape == shape == posterior.mean.shape[1:]
    assert decoded.shape == (1, 3, config.size, config.size)
    assert model.space.autoencoder is autoencoder and model.size == config.size


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_every_preset_is_saved_and_read_again(key: str, name: str) -> None:
    config = preset(key, name)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    assert config.without_files() == config


@pytest.mark.parametrize("name", NAMES)
def test_the_two_have_one_autoencoder(name: str) -> None:
    """So that comparing them compares their denoisers."""
    one, other = (preset(key, name) for key in KEYS)
    for setting in ("autoencoder", "autoencoder_optim", "autoencoder_batch_size"):
        assert getattr(one, setting) == getattr(other, setting), setting
    if name != "paper":  # there each has the pictures of its paper
        for setting in ("size", "cache_size", "autoencoder_share", "train"):
            assert getattr(one, setting) == getattr(other, setting), setting


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_latents_have_no_threshold_of_pixels(key: str, name: str) -> None:
    """They have standard deviation 1 and no bounds, so clipping at 1 would cut a third of them."""
    config: Any = preset(key, name)
    assert config.model.threshold == "none"


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_the_cache_of_a_preset_fits_into_memory(
    key: str, name: str, tokenizer: WordTokenizer
) -> None:
    config: Any = preset(key, name)
    _, model = build_on_meta(config, tokenizer)
    floats = 2 * math.prod(model.space.shape)  # means and log variances
    assert config.cache_size * floats * 4 < 4 * 2**30


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_the_budget_is_shared(key: str, name: str, tokenizer: WordTokenizer) -> None:
    config: Any = preset(key, name)
    stages = stages_of(config, tokenizer)
    autoencoder, denoiser = stages
    assert tuple(stage.name for stage in stages) == STAGES
    assert [stage.earlier() for stage in stages] == [[], [autoencoder]]
    assert autoencoder.share == config.autoencoder_share
    assert autoencoder.share + denoiser.share == pytest.approx(1)
    one, other = (stage.budgeted() for stage in stages)
    if config.train.max_steps:
        assert one.max_steps and other.max_steps
        assert abs(one.max_steps + other.max_steps - config.train.max_steps) <= 1
    if config.train.minutes:
        assert one.minutes and other.minutes
        assert one.minutes + other.minutes == pytest.approx(config.train.minutes)
    batch_sizes = (config.autoencoder_batch_size, config.train.batch_size)
    assert (one.batch_size, other.batch_size) == batch_sizes
    assert one.sample_every == 0  # an autoencoder has no captions to sample
    assert (autoencoder.optim, denoiser.optim) == (config.autoencoder_optim, config.optim)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_budget_of_the_user_is_shared(key: str, share: float, tokenizer: WordTokenizer) -> None:
    budgets: list[dict[str, Any]] = [
        {"minutes": 2.0},
        {"steps": 10},
        {"settings": {"train.max_pictures": 400}},
    ]
    for budget in budgets:
        config: Any = runs.configure(key, preset_name="tiny", **budget)
        config = with_field(config, "autoencoder_share", share)
        one, other = (s.budgeted() for s in stages_of(config, tokenizer))
        for limit in ("max_steps", "minutes", "max_pictures"):
            whole, both = getattr(config.train, limit), [getattr(s, limit) for s in (one, other)]
            if whole is None:
                assert both == [None, None]
            else:
                assert both == pytest.approx([share * whole, (1 - share) * whole])


# --- cache keys -------------------------------------------------------------------------------

WORDS = (
    *("adam", "muon", "adamw", "none", "linear", "l1", "l2", "noise", "v", "cosine", "karras"),
    *("min_snr", "fixed_large", "euler", "clip", "joint", "exact", "tanh", "bpe", "gru"),
    *("sequence", "relu", "gelu", "penultimate", "fp32", "off", "shapes:hard", "cpu", "tiny"),
    *ENCODERS,
)


def another(config: Any, name: str, tokenizer: WordTokenizer) -> Any:
    """The configuration with another possible value of the setting `name`."""
    if name == "preset":  # which only the command line and `configure` set
        return replace(config, preset="tiny")
    value: Any = to_dict(config)
    for part in name.split("."):
        value = value[part]
    choices: list[Any]
    if isinstance(value, bool):
        choices = [not value]
    elif isinstance(value, dict):
        run = {"text": "bag", "encoder": {"runs": {}}, "tokenizer": {}, "hash": "0"}
        choices = [{"autoencoder": 0.5}, {"RUN": run}]
    elif isinstance(value, list):
        choices = [[*value[:-1], (value[-1] if value else 1) * 2], ["a"], [0], [], [0.5]]
    elif isinstance(value, str):
        choices = list(WORDS)
    else:
        choices = [1] if value is None else [value * 2, value + 1, value - 1, value / 2 + 0.01]
    for choice in choices:
        try:
            changed = with_field(config, name, choice)
        except UserError:
            continue
        if changed != config:
            return changed
    raise AssertionError(f"no other value for {name}={value!r}")


def keys_of(
    config: Any, tokenizer: WordTokenizer, changed: dict[str, Any] | None = None
) -> dict[str, str]:
    """The cache key of every stage."""
    data = {name: getattr(config, name) for name in ("data", "size", "seed")} | (changed or {})
    return {stage.name: stage.key(data) for stage in stages_of(config, tokenizer)}


def stages_that_depend_on(name: str) -> set[str]:
    if name.startswith("train."):
        leaf = name.removeprefix("train.")
        budget = (
            "minutes",
            "cpu_minutes",
            "max_steps",
            "max_pictures",
            "max_flops",
            "precision",
            "channels_last",
        )
        return set(STAGES) if leaf in budget else {"denoiser"} if leaf == "batch_size" else set()
    if name.startswith(("autoencoder", "data", "size", "seed")):
        return set(STAGES)
    return set() if name in ("preset", "cache_size") else {"denoiser"}


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_equal_settings_have_equal_keys(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """Untouched, or read from a run folder, or with a setting set to its own value."""
    config = preset(key, name)
    before = keys_of(config, tokenizer)
    assert keys_of(from_dict(type(config), to_dict(config)), tokenizer) == before
    assert keys_of(with_field(config, "seed", config.seed), tokenizer) == before


@pytest.mark.parametrize("key", KEYS)
def test_each_setting_changes_the_keys_of_the_stages_that_depend_on_it(
    key: str, tokenizer: WordTokenizer
) -> None:
    """An autoencoder is shared by all denoisers on it, and never by runs that would train another
    one."""
    config: Any = with_field(preset(key, "smoke"), "autoencoder.disc_layers", 1)
    before, wrong = keys_of(config, tokenizer), {}
    names = [name for name in field_names(config) if name != "key"]
    assert len(names) > 70
    for name in names:
        after = keys_of(another(config, name, tokenizer), tokenizer)
        changed = {stage for stage in before if before[stage] != after[stage]}
        if changed != stages_that_depend_on(name):
            wrong[name] = sorted(changed)
    assert not wrong


@pytest.mark.parametrize("name", ["smoke", "tiny", "small"])
def test_the_two_share_their_autoencoder(name: str, tokenizer: WordTokenizer) -> None:
    """And never a denoiser; another preset shares nothing."""
    one, other = (keys_of(preset(key, name), tokenizer) for key in KEYS)
    assert one["autoencoder"] == other["autoencoder"]
    assert one["denoiser"] != other["denoiser"]
    assert one == keys_of(preset("ldm", name), tokenizer)
    paper = keys_of(preset("ldm", "paper"), tokenizer)
    assert not set(paper.values()) & set(one.values())


@pytest.mark.parametrize("key", KEYS)
def test_keys_depend_on_words_and_program(key: str, tokenizer: WordTokenizer) -> None:
    before = keys_of(preset(key, "smoke"), tokenizer)
    for data in ({"tokenizer": 1}, {"lineage": "9"}, {"fingerprint": "x"}):
        after = keys_of(preset(key, "smoke"), tokenizer, data)
        assert all(before[stage] != after[stage] for stage in before)


def test_a_second_run_takes_the_autoencoder_of_the_first(
    train_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another denoiser, even of the other system, is trained on the same autoencoder and scale;
    other settings of the autoencoder train a new one."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 24)
    data = f"imagefolder:{tmp_path / 'data'}"
    cases: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        ("ldm", {}, STAGES),  # without any --set
        ("ldm", {"model.cond_drop_prob": 0.2, "optim.lr": 1e-3, "text": "lstm"}, STAGES[1:]),
        ("dit", {"model.net.depth": 1}, STAGES[1:]),
        ("dit", {"cache_size": 20}, STAGES[1:]),
        ("ldm", {"autoencoder.kl_weight": 0.01}, STAGES),
    ]
    states = []
    for number, (key, settings, trained) in enumerate(cases):
        run = train_run(tmp_path / str(number), key, settings, steps=4, data=data)
        assert tuple(read_json(run.folder / "cost.json")) == trained, settings
        states.append(run.system.space.state_dict())
        assert states[-1]["scale"].item() not in (0.0, 1.0)
    for other in states[1:4]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())
    name = "autoencoder.decoder.conv_in.weight"
    assert not torch.equal(states[0][name], states[4][name])


def test_a_finite_data_set_is_encoded_once(make_system: Callable[..., Any], tmp_path: Path) -> None:
    """The denoiser's data set has all latents after one epoch; the encoder is not called again."""
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 12)
    dataset = load_dataset(f"imagefolder:{tmp_path / 'data'}", "train", 16)
    model, config = make_system("dit", cache_size=64)
    cached = with_latents(dataset, model, config.cache_size)
    assert model.space.scale.item() not in (0.0, 1.0)
    expected = model.space.autoencoder.encode(dataset.batch(range(12), [0] * 12, 0).image).mean

    def refuse(image: Any) -> Any:
        raise AssertionError("a picture was encoded again")

    model.space.autoencoder.encode = refuse
    for epoch in (0, 1):
        posterior = model.space.posterior(cached.batch(range(12), [epoch] * 12, 0))
        torch.testing.assert_close(posterior.mean, expected, atol=1e-5, rtol=1e-4)


# --- impossible settings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "settings", "factor"),
    [
        ("ldm", {"size": 17}, 2),
        ("dit", {"size": 31}, 2),
        ("ldm", {"size": 18, "autoencoder.net.patch_size": 2}, 4),
        ("dit", {"size": 20, "autoencoder.net.channel_mult": "1,1,1,1"}, 8),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_named(
    key: str, settings: dict[str, Any], factor: int, tokenizer: WordTokenizer
) -> None:
    """In one sentence with both numbers, in whatever order they are set."""
    for ordered in (settings, dict(reversed(settings.items()))):
        config = runs.configure(key, preset_name="smoke", settings=ordered)
        with pytest.raises(UserError) as caught:
            build_on_meta(config, tokenizer)
        sentence = str(caught.value)
        assert f"size={settings['size']}" in sentence and f"multiple of {factor}," in sentence
        assert "\n" not in sentence


def test_a_size_that_does_not_divide_is_named_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["--preset", "smoke", "--out", str(out), "--set", "size=17"]
    assert main(["train", "ldm", *flags]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "size=17" in line and not out.exists()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("autoencoder_share", 0),
        ("autoencoder_share", 1),
        ("autoencoder_share", -0.5),
        ("autoencoder_share", math.nan),
        ("autoencoder_batch_size", 0),
        ("cache_size", 0),
        ("cache_size", -1),
        ("autoencoder.latent_channels", 0),
        ("autoencoder.pixel_loss", "cubic"),
        ("autoencoder.kl_weight", -1),
        ("autoencoder.disc_weight", -1),
        ("autoencoder.perceptual_weight", -1),
        ("autoencoder.net.patch_size", 0),
        ("autoencoder.net.channels", 0),
        ("autoencoder.net.channel_mult", "1,0"),
        ("model.sampling_steps", 0),
        ("model.cond_drop_prob", 1),
        ("model.threshold", "sometimes"),
    ],
)
def test_impossible_settings_are_named(key: str, name: str, value: Any) -> None:
    """By the name that `--set` knows."""
    with pytest.raises(UserError, match=name) as caught:
        with_field(preset(key, "smoke"), name, value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("ldm", {}),
        ("dit", {}),
        ("dit", {"model.net.patch_size": 4}),
        ("ldm", {"autoencoder.net.channel_mult": "1,1,1", "model.unet.attention_levels": ""}),
        ("ldm", {"autoencoder.net.channel_mult": "1,1,1,1"}),
        ("dit", {"autoencoder.disc_weight": 0.5, "autoencoder.disc_layers": 1}),
        ("ldm", {"autoencoder.disc_weight": 0.5, "autoencoder.disc_layers": 3}),
        ("dit", {"autoencoder.perceptual_weight": 1.0, "autoencoder.disc_layers": 3}),
    ],
    ids=str,
)
def test_the_smallest_pictures_are_trained_on_or_refused(
    key: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Down to a single latent. A discriminator of patches needs a picture that is larger than its
    patches: that is a sentence and not an error of a convolution."""
    small = {
        "size": 8,
        "train.batch_size": 2,
        "autoencoder_batch_size": 2,
        "autoencoder.disc_start": 0,
    }
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 8)
    settings = {**small, **settings, "data": f"imagefolder:{tmp_path / 'data'}"}
    out, sentence = tmp_path / "run", ""
    try:
        runs.train(key, preset="smoke", out=out, steps=2, settings=settings)
    except UserError as error:
        sentence = str(error)
    assert out.exists() == (not sentence)
    words = ("size", "layers", "side", "divide")
    assert not sentence or any(word in sentence for word in words)


# --- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_smoke_run_is_loaded_as_it_was_trained(key: str, smoke_run: Callable[..., Any]) -> None:
    """One file holds everything that sampling needs."""
    folder, model = smoke_run(key)
    loaded: Any = lineage.load(folder)
    captions = ["a red circle", "", "two small blue squares"]
    assert torch.equal(loaded.generate(captions, seed=7), model.generate(captions, seed=7))
    state, saved = model.state_dict(), loaded.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in state)
    assert loaded.space.scale.item() not in (0.0, 1.0)
    scores = loaded.stage_scores(load_dataset("shapes", "test", 16).batch(range(4), [0] * 4, 0))
    assert list(scores) == ["psnr"] and scores["psnr"].isfinite().all()


def test_recipes_of_latents_are_listed(command: Callable[..., Any]) -> None:
    process = command("list", "--json")
    out, _ = process.communicate(timeout=60)
    rows = {row["key"]: row for row in json.loads(out)}
    for key in KEYS:
        assert rows[key]["status"] == "works" and tuple(rows[key]["stages"]) == STAGES
        assert set(rows[key]["presets"]) == set(NAMES) == set(find_recipe(key).PRESETS)


def test_the_autoencoders_of_the_small_presets_have_no_discriminator(
    tokenizer: WordTokenizer,
) -> None:
    """Sharp textures are of no use to flat pictures; at `paper` there is one."""
    for key, name in BOTH:
        config: Any = preset(key, name)
        with torch.device("meta"):
            autoencoder = stages_of(config, tokenizer)[0].construct()
        assert isinstance(autoencoder, nn.Module)
        groups = list(autoencoder.groups())
        paper = ["autoencoder", "discriminator"]
        assert groups == (paper if name == "paper" else ["autoencoder"])
