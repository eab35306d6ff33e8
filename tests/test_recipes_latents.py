"""The recipes of an autoencoder and a denoiser of its latents: `ldm` and `dit`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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
from lineage.diffusion.ldm import KLAutoencoder, LatentDenoiser
from lineage.errors import UserError
from lineage.recipes import find_recipe, preset
from lineage.text.encoders import ENCODERS
from lineage.text.tokenizer import WordTokenizer
from lineage.training.stage import Stage, content_key
from lineage.training.store import read_json

KEYS = ("ldm", "dit")
NAMES = ("smoke", "tiny", "small", "paper")
BOTH = [(key, name) for key in KEYS for name in NAMES]
STAGES = ("autoencoder", "latents", "denoiser")


def stages_of(config: Any, tokenizer: WordTokenizer) -> list[Stage]:
    return find_recipe(config.key).stages(config, tokenizer)


# --- what each preset is ----------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_every_preset_is_a_whole(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """Autoencoder, latents and denoiser fit together, on the meta device; a picture becomes latents
    and comes back."""
    config: Any = preset(key, name)
    with torch.device("meta"):
        made: dict[str, Any] = {}
        for stage in stages_of(config, tokenizer):
            made[stage.name] = stage.build(made)
        autoencoder, latents, system = (made[stage] for stage in STAGES)
        assert isinstance(autoencoder, KLAutoencoder) and isinstance(system, LatentDenoiser)
        found = autoencoder.encode(torch.empty(1, 3, config.size, config.size))
        drawn = autoencoder.decode(found.mean)
    side = config.size // config.autoencoder.factor
    assert side * config.autoencoder.factor == config.size
    shape = (config.autoencoder.width, side, side)
    assert system.shape == latents.shape == shape == found.mean.shape[1:]
    assert drawn.shape == (1, 3, config.size, config.size)
    assert latents.memory.kept == config.kept
    assert latents.memory.values.shape[1:] == (2 * shape[0], side, side)
    assert system.autoencoder is autoencoder is latents.autoencoder
    assert system.known == [latents] and system.size == config.size


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_every_preset_is_saved_and_read_again(key: str, name: str) -> None:
    config = preset(key, name)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    assert config.without_files() == config


@pytest.mark.parametrize("name", NAMES)
def test_the_two_have_one_autoencoder(name: str) -> None:
    """So that a comparison of them is one of their denoisers."""
    one, other = (preset(key, name) for key in KEYS)
    for setting in ("autoencoder", "autoencoder_optim", "autoencoder_batch"):
        assert getattr(one, setting) == getattr(other, setting), setting
    if name != "paper":  # there each has the pictures of its paper
        for setting in ("size", "kept", "autoencoder_share", "train"):
            assert getattr(one, setting) == getattr(other, setting), setting


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_latents_have_no_threshold_of_pixels(key: str, name: str) -> None:
    """They have deviation 1 and no largest value, so clipping at 1 would cut a third of them."""
    config: Any = preset(key, name)
    assert config.model.threshold == "none"


@pytest.mark.parametrize("key", KEYS)
def test_the_memory_of_a_preset_fits_a_machine(key: str, tokenizer: WordTokenizer) -> None:
    """It lies beside the networks, and is saved with each checkpoint of its stage."""
    for name in NAMES:
        config: Any = preset(key, name)
        with torch.device("meta"):
            made: dict[str, Any] = {}
            for stage in stages_of(config, tokenizer)[:2]:
                made[stage.name] = stage.build(made)
        memory = made["latents"].memory
        assert not memory.values.numel()  # room is taken when there is something to keep
        each = math.prod(memory.values.shape[1:]) * memory.values.element_size()
        assert memory.kept * each < 4 * 2**30, name


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_the_budget_is_shared_out(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """Autoencoder and denoiser share it; the latents of `kept` pictures are found beside it."""
    config: Any = preset(key, name)
    stages = stages_of(config, tokenizer)
    autoencoder, latents, denoiser = stages
    assert tuple(stage.name for stage in stages) == STAGES
    assert tuple(stage.needs for stage in stages) == ((), ("autoencoder",), ("latents",))
    assert autoencoder.share == config.autoencoder_share and latents.share == 0
    assert autoencoder.share + denoiser.share == pytest.approx(1)
    one, look, other = (stage.budgeted() for stage in stages)
    if config.train.steps:
        assert one.steps and other.steps and abs(one.steps + other.steps - config.train.steps) <= 1
    if config.train.minutes:
        assert one.minutes and other.minutes
        assert one.minutes + other.minutes == pytest.approx(config.train.minutes)
    assert (look.steps, look.minutes, look.pictures) == (None, None, config.kept)
    assert (one.batch, other.batch) == (config.autoencoder_batch, config.train.batch)
    assert one.sample_every == look.sample_every == 0  # neither draws from captions
    assert (autoencoder.optim, denoiser.optim) == (config.autoencoder_optim, config.optim)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_budget_that_is_asked_for_changes_no_look_at_the_data(
    key: str, share: float, tokenizer: WordTokenizer
) -> None:
    for given in ({"minutes": 2.0}, {"steps": 10}, {"settings": {"train.pictures": 400}}):
        config: Any = runs.configure(key, preset_name="tiny", **given)  # type: ignore[arg-type]
        config = with_field(config, "autoencoder_share", share)
        one, look, other = (s.budgeted() for s in stages_of(config, tokenizer))
        assert (look.steps, look.minutes, look.pictures) == (None, None, config.kept)
        for limit in ("steps", "minutes", "pictures"):
            whole, both = getattr(config.train, limit), [getattr(s, limit) for s in (one, other)]
            if whole is None:
                assert both == [None, None]
            else:
                assert both == pytest.approx([share * whole, (1 - share) * whole])


# --- what is found again ----------------------------------------------------------------------

WORDS = (
    *("adam", "muon", "adamw", "none", "linear", "absolute", "square", "noise", "v", "cosine"),
    *("min_snr", "fixed_large", "euler", "karras", "clip", "joint", "exact", "tanh", "bpe", "gru"),
    *("fp32", "off", "shapes:hard", "cpu", "tiny", *ENCODERS),
)


def another(config: Any, name: str, tokenizer: WordTokenizer) -> Any:
    """The configuration with the setting `name` changed to something else that is possible."""
    value: Any = to_dict(config)
    for part in name.split("."):
        value = value[part]
    choices: list[Any]
    if isinstance(value, bool):
        choices = [not value]
    elif isinstance(value, dict):
        choices = [{"autoencoder": 0.5}]
    elif isinstance(value, list):
        choices = [[*value[:-1], (value[-1] if value else 1) * 2], ["a"], [0], []]
    elif isinstance(value, str):
        choices = list(WORDS)
    else:
        choices = [1] if value is None else [value * 2, value + 1, value - 1, value / 2 + 0.01]
    for choice in choices:
        try:
            changed = with_field(config, name, choice)
            stages_of(changed, tokenizer)
        except UserError:
            continue
        if changed != config:
            return changed
    raise AssertionError(f"no other value for {name}={value!r}")


def keys_of(
    config: Any, tokenizer: WordTokenizer, changed: dict[str, Any] | None = None
) -> dict[str, str]:
    """The content key of every stage, as a run would find them."""
    origin = {name: getattr(config, name) for name in ("data", "size", "seed")} | (changed or {})
    keys: dict[str, str] = {}
    for stage in stages_of(config, tokenizer):
        keys[stage.name] = content_key(stage, origin, keys)
    return keys


def depends(name: str) -> set[str]:
    """Which stages a setting changes."""
    if name.startswith("train."):
        leaf = name.removeprefix("train.")
        budget = ("minutes", "steps", "pictures", "precision", "channels_last")
        return set(STAGES) if leaf in budget else {"denoiser"} if leaf == "batch" else set()
    if name.startswith(("autoencoder", "data", "size", "seed")):
        return set(STAGES)
    if name == "kept":
        return {"latents", "denoiser"}
    return set() if name == "preset" else {"denoiser"}


def read_again(config: Any) -> Any:
    """As a run folder gives it back, or any `--set` leaves it."""
    return from_dict(type(config), to_dict(config))


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_a_preset_is_known_by_what_it_says(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """Untouched, or read again from a run folder, or with a setting set to what it was: 0 and 0.0
    are one autoencoder."""
    config = preset(key, name)
    before = keys_of(config, tokenizer)
    assert keys_of(read_again(config), tokenizer) == before
    assert keys_of(with_field(config, "seed", config.seed), tokenizer) == before


@pytest.mark.parametrize("key", KEYS)
def test_each_setting_makes_those_stages_new_that_depend_on_it(
    key: str, tokenizer: WordTokenizer
) -> None:
    """An autoencoder is shared by all denoisers on it, and never by runs that would train another
    one."""
    config: Any = with_field(preset(key, "smoke"), "autoencoder.layers", 1)
    before, wrong = keys_of(config, tokenizer), {}
    names = [name for name in field_names(config) if name != "key"]
    assert len(names) > 70
    for name in names:
        after = keys_of(another(config, name, tokenizer), tokenizer)
        changed = {stage for stage in before if before[stage] != after[stage]}
        if changed != depends(name):
            wrong[name] = sorted(changed)
    assert not wrong


@pytest.mark.parametrize("name", ["smoke", "tiny", "small"])
def test_the_two_share_autoencoder_and_latents(name: str, tokenizer: WordTokenizer) -> None:
    """And never a denoiser; another preset shares nothing."""
    one, other = (keys_of(preset(key, name), tokenizer) for key in KEYS)
    assert one["autoencoder"] == other["autoencoder"] and one["latents"] == other["latents"]
    assert one["denoiser"] != other["denoiser"]
    assert one == keys_of(preset("ldm", name), tokenizer)
    paper = keys_of(preset("ldm", "paper"), tokenizer)
    assert not set(paper.values()) & set(one.values())


@pytest.mark.parametrize("key", KEYS)
def test_keys_depend_on_words_and_program(key: str, tokenizer: WordTokenizer) -> None:
    before = keys_of(preset(key, "smoke"), tokenizer)
    for origin in ({"tokenizer": 1}, {"lineage": "9"}, {"fingerprint": "x"}):
        after = keys_of(preset(key, "smoke"), tokenizer, origin)
        assert all(before[stage] != after[stage] for stage in before)


def test_a_second_run_takes_what_the_first_has_made(
    train_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another denoiser, even of the other system, trains neither autoencoder nor latents, and
    learns from the very same; another autoencoder is trained anew."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 24)
    data = f"imagefolder:{tmp_path / 'data'}"
    cases = [
        ("ldm", {}, STAGES),  # without any --set
        ("ldm", {"model.drop_text": 0.2, "optim.lr": 1e-3, "text": "lstm"}, STAGES[2:]),
        ("dit", {"model.net.layers": 1}, STAGES[2:]),
        ("dit", {"kept": 20}, STAGES[1:]),
        ("ldm", {"autoencoder.kl": 0.01}, STAGES),
    ]
    found = []
    for number, (key, settings, trained) in enumerate(cases):
        run = train_run(tmp_path / str(number), key, settings, steps=4, data=data)
        assert tuple(read_json(run.folder / "cost.json")) == trained, settings
        found.append(run.system)
    states = [{"scale": s.scale, **s.autoencoder.state_dict()} for s in found]
    for other in states[1:3]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["decoder.conv_in.weight"], states[4]["decoder.conv_in.weight"])
    for system in found:
        assert system.scale.item() not in (0.0, 1.0)


def test_a_finite_data_set_is_encoded_once(train_run: Callable[..., Any], tmp_path: Path) -> None:
    """All of its pictures are known when the denoiser learns; the encoder is not asked again."""
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 12)
    settings = {"kept": 64, "train.precision": "fp32", "train.batch": 4}
    data = f"imagefolder:{tmp_path / 'data'}"
    system = train_run(tmp_path / "run", "dit", settings, steps=6, data=data).system
    (latents,) = system.known
    assert int(latents.memory.count) == 12
    dataset = load_dataset(data, "train", 16)
    batch = dataset.batch(range(12), [0] * 12, 0)
    expected = system.autoencoder.encode(batch.image).mean
    torch.testing.assert_close(latents.of(batch).mean, expected, atol=1e-5, rtol=1e-4)

    def refused(image: Any) -> Any:
        raise AssertionError("a picture was encoded again")

    system.autoencoder.encode = refused
    assert latents.of(batch).mean.shape == expected.shape


# --- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "settings", "factor"),
    [
        ("ldm", {"size": 17}, 2),
        ("dit", {"size": 31}, 2),
        ("ldm", {"size": 18, "autoencoder.net.patch": 2}, 4),
        ("dit", {"size": 20, "autoencoder.net.multipliers": "1,1,1,1"}, 8),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_told(
    key: str, settings: dict[str, Any], factor: int, tokenizer: WordTokenizer
) -> None:
    """In one sentence with both numbers, in whatever order they are given."""
    for given in (settings, dict(reversed(settings.items()))):
        config = runs.configure(key, preset_name="smoke", settings=given)
        with pytest.raises(UserError) as caught:
            stages_of(config, tokenizer)
        sentence = str(caught.value)
        assert f"size={settings['size']}" in sentence and f"{factor} pixels" in sentence
        assert "\n" not in sentence


def test_a_size_that_does_not_divide_is_told_before_anything_is_written(
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
        ("autoencoder_batch", 0),
        ("kept", 0),
        ("kept", -1),
        ("autoencoder.width", 0),
        ("autoencoder.error", "cubic"),
        ("autoencoder.kl", -1),
        ("autoencoder.adversary", -1),
        ("autoencoder.perceptual", -1),
        ("autoencoder.net.patch", 0),
        ("autoencoder.net.channels", 0),
        ("autoencoder.net.multipliers", "1,0"),
        ("model.steps", 0),
        ("model.drop_text", 1),
        ("model.threshold", "sometimes"),
    ],
)
def test_settings_that_cannot_be_are_told(key: str, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name.split(".")[-1]) as caught:
        with_field(preset(key, "smoke"), name, value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_an_autoencoder_is_called_by_its_setting() -> None:
    """By a name that `--set` knows."""
    with pytest.raises(UserError) as caught:
        with_field(preset("ldm", "smoke"), "autoencoder.net.channels", 0)
    assert "codec" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("ldm", {}),
        ("dit", {}),
        ("dit", {"model.net.patch": 4}),
        ("ldm", {"autoencoder.net.multipliers": "1,1,1", "model.unet.attention": ""}),
        ("ldm", {"autoencoder.net.multipliers": "1,1,1,1"}),
        ("dit", {"autoencoder.adversary": 0.5, "autoencoder.layers": 1}),
        ("ldm", {"autoencoder.adversary": 0.5, "autoencoder.layers": 3}),
        ("dit", {"autoencoder.perceptual": 1.0, "autoencoder.layers": 3}),
    ],
    ids=str,
)
def test_the_smallest_pictures_are_trained_on_or_refused(
    key: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Down to a single place. A discriminator of patches needs a picture that is larger than its
    patches: that is told in a sentence and not by a convolution."""
    small = {"size": 8, "train.batch": 2, "autoencoder_batch": 2, "autoencoder.adversary_from": 0}
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 8)
    settings = {**small, **settings, "data": f"imagefolder:{tmp_path / 'data'}"}
    out, said = tmp_path / "run", ""
    try:
        runs.train(key, preset="smoke", out=out, steps=2, settings=settings)
    except UserError as refused:
        said = str(refused)
    assert out.exists() == (not said)
    assert not said or any(word in said for word in ("size", "layers", "side", "divide"))


# --- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_smoke_run_is_loaded_as_it_was_trained(key: str, smoke_run: Callable[..., Any]) -> None:
    """All that drawing needs lies in one file: it is drawn with where no stage is kept."""
    folder, system = smoke_run(key)
    loaded: Any = lineage.load(folder)
    captions = ["a red circle", "", "two small blue squares"]
    assert torch.equal(loaded.generate(captions, seed=7), system.generate(captions, seed=7))
    state, saved = system.state_dict(), loaded.state_dict()
    assert state.keys() == saved.keys() and not any("memory" in name for name in state)
    assert all(torch.equal(state[name], saved[name]) for name in state)
    assert loaded.scale.item() not in (0.0, 1.0)
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
            autoencoder = stages_of(config, tokenizer)[0].build({})
        assert isinstance(autoencoder, nn.Module)
        groups = list(autoencoder.groups())
        paper = ["autoencoder", "discriminator"]
        assert groups == (paper if name == "paper" else ["autoencoder"])
