"""Recipes of a codec and its prior: `vqvae`, `dalle`, `vqgan` at every preset."""

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

from lineage import runs
from lineage.cli import main
from lineage.config import field_names, from_dict, to_dict, with_field
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.data.tools import export
from lineage.errors import UserError
from lineage.recipes import find_recipe, preset
from lineage.text.encoders import ENCODERS
from lineage.text.tokenizer import WordTokenizer
from lineage.training.stage import NOT_IN_KEY, Stage
from lineage.vqvae.ar_prior import Prior

KEYS = ("vqvae", "dalle", "vqgan")
NAMES = ("smoke", "tiny", "small", "paper")
BOTH = [(key, name) for key in KEYS for name in NAMES]


def stages_of(config: Any, tokenizer: WordTokenizer) -> list[Stage]:
    return find_recipe(config.key).stages(config, tokenizer)


def prior_on_meta(config: Any, tokenizer: WordTokenizer) -> Any:
    """The untrained system, without memory."""
    with torch.device("meta"):
        return runs.build(stages_of(config, tokenizer))


def count(*modules: nn.Module) -> int:
    unique = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in unique.values())


# --- presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_sizes_of_codec_and_prior_agree(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """And the transformer has as many parameters as GPT-2's formula gives."""
    config: Any = preset(key, name)
    prior = prior_on_meta(config, tokenizer)
    assert isinstance(prior, Prior)
    side, num_codes = config.size // prior.codec.factor, prior.codec.num_codes
    assert side * prior.codec.factor == config.size == prior.size and prior.grid_size == side
    width, layers = config.model.transformer.width, config.model.transformer.num_layers
    assert prior.row_emb.weight.shape == prior.column_emb.weight.shape == (side, width)
    assert prior.code_emb.weight.shape == prior.code_head.weight.shape == (num_codes, width)
    assert prior.pos_emb.weight.shape == (config.model.text_len, width)
    assert prior.text_proj.weight.shape == (width, config.encoder.width)
    assert prior.text_head is not None
    assert prior.text_head.weight.shape == (prior.text.vocab_size, width)
    assert count(prior.transformer) == layers * (12 * width**2 + 13 * width) + 2 * width
    assert len(prior.transformer.blocks) == layers


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_a_preset_is_saved_and_read_again(key: str, name: str) -> None:
    config = preset(key, name)
    assert (config.key, config.preset) == (key, name)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    assert config.without_files() == config


@pytest.mark.parametrize(
    ("key", "name", "cells", "num_codes"),
    [
        *((key, "small", 64, 1024) for key in KEYS),
        ("vqvae", "paper", 32 * 32, 512),
        ("dalle", "paper", 32 * 32, 8192),
        ("vqgan", "paper", 16 * 16, 1024),
    ],
)
def test_grids_are_those_that_the_presets_state(
    key: str, name: str, cells: int, num_codes: int, tokenizer: WordTokenizer
) -> None:
    prior = prior_on_meta(preset(key, name), tokenizer)
    assert (prior.grid_size**2, prior.codec.num_codes) == (cells, num_codes)
    assert name != "small" or prior.codec.factor == 8


def test_dalle_paper_has_twelve_billion_parameters(tokenizer: WordTokenizer) -> None:
    """64 layers of 62 heads of 64, and OpenAI's published codec to the parameter."""
    config: Any = preset("dalle", "paper")
    transformer = config.model.transformer
    sizes = (transformer.num_layers, transformer.num_heads, transformer.width)
    assert sizes == (64, 62, 62 * 64)
    prior = prior_on_meta(config, tokenizer)
    trained = count(*(module for modules in prior.groups().values() for module in modules))
    assert trained == pytest.approx(12e9, rel=0.03)
    assert count(prior.codec.encoder) == 53_786_240
    assert count(prior.codec.decoder) == 43_829_766
    assert config.model.text_len + prior.grid_size**2 == 1280  # length of the paper's sequence


def test_vqgan_paper_has_the_published_parameters(tokenizer: WordTokenizer) -> None:
    """Codec, discriminator and the blocks of the largest transformer."""
    prior = prior_on_meta(preset("vqgan", "paper"), tokenizer)
    codec = prior.codec
    parts = (codec.encoder, codec.decoder, codec.quant_conv, codec.post_quant_conv)
    assert count(codec.encoder) == 29_298_176 and count(codec.decoder) == 42_449_795
    assert count(*parts, codec.quantiser) == 72_141_699
    assert count(codec.discriminator) == 2_765_633
    embeddings = 1024 * 1024 * 2 + 512 * 1024  # codes, head and positions of the published one
    assert count(prior.transformer) == 304_932_864 - embeddings


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_captions_of_the_world_fit_the_positions_for_text(key: str, name: str) -> None:
    """All but very few: words that are cut cannot be drawn."""
    config: Any = preset(key, name)
    captions = list(load_dataset(config.data, "train", 16).all_captions(4000))
    encoder = config.encoder
    tokenizer = runs.make_tokenizer(encoder.tokenizer, captions, encoder.vocab_size)
    cut = sum(len(tokenizer.encode(caption)) > config.model.text_len for caption in captions)
    assert cut < 0.002 * len(captions)


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_codec_and_prior_share_the_budget(key: str, name: str, tokenizer: WordTokenizer) -> None:
    config: Any = preset(key, name)
    codec, prior = stages_of(config, tokenizer)
    assert (codec.name, prior.name) == ("codec", "prior")
    assert codec.earlier() == [] and prior.earlier() == [codec]
    assert codec.share == config.codec_share and codec.share + prior.share == pytest.approx(1)
    first, second = codec.budgeted(), prior.budgeted()
    if config.train.max_steps:
        assert first.max_steps and second.max_steps
        assert abs(first.max_steps + second.max_steps - config.train.max_steps) <= 1
    if config.train.minutes:
        assert first.minutes and second.minutes
        assert first.minutes + second.minutes == pytest.approx(config.train.minutes)
    sizes = (first.batch_size, second.batch_size)
    assert sizes == (config.codec_batch_size, config.train.batch_size)
    assert first.sample_every == 0  # a codec draws no captions
    assert (codec.optim, prior.optim) == (config.codec_optim, config.optim)


def test_the_steps_of_dalle_paper_are_the_papers(tokenizer: WordTokenizer) -> None:
    codec, prior = stages_of(preset("dalle", "paper"), tokenizer)
    assert (codec.budgeted().max_steps, prior.budgeted().max_steps) == (3_000_000, 430_000)


# --- codes of the data set --------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_the_prior_s_data_set_has_the_codes_of_the_codec(
    key: str, shapes: CaptionedDataset, tokenizer: WordTokenizer
) -> None:
    """In full precision, whatever precision the loop trains in."""
    _, stage = stages_of(preset(key, "smoke"), tokenizer)
    prior: Any = stage.construct().train()
    assert stage.prepare is not None
    data = stage.prepare(shapes, prior)
    image = shapes.batch(range(32), [0] * 32, 0).image
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = data.batch(range(32), [0] * 32, 0)
    codes = batch.extra["codes"]
    assert codes.dtype == torch.int64 and codes.shape == (32, prior.grid_size, prior.grid_size)
    with torch.no_grad():
        assert torch.equal(codes, prior.codec.encode(image))
    assert not any(p.requires_grad or p.grad is not None for p in prior.codec.parameters())


def test_cached_codes_are_computed_once(
    tokenizer: WordTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many pictures as `cache_size` says, in a data set that ends."""
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 24)
    dataset = load_dataset(f"imagefolder:{tmp_path / 'data'}", "train", 16)
    _, stage = stages_of(with_field(preset("vqvae", "smoke"), "cache_size", 20), tokenizer)
    prior: Any = stage.construct()
    data, calls = stage.prepare(dataset, prior), []  # type: ignore[misc]
    original = prior.codec.encode
    monkeypatch.setattr(prior.codec, "encode", lambda x: calls.append(len(x)) or original(x))
    first = data.batch(range(24), [0] * 24, 0).extra["codes"]
    calls.clear()
    again = data.batch(range(20), [1] * 20, 1).extra["codes"]
    assert not calls and torch.equal(again, first[:20])
    data.batch(range(20, 24), [1] * 4, 1)
    assert calls


# --- refused settings -------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [17, 18, 22, 31])
def test_a_size_that_the_factor_does_not_divide_is_refused(
    key: str, size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one sentence with both numbers, before anything is written."""
    config: Any = preset(key, "smoke")
    factor = config.codec.net.factor if key == "vqgan" else config.codec.factor
    if not size % factor:
        pytest.skip("it is divisible")
    out = tmp_path / "run"
    arguments = ["train", key, "--preset", "smoke", "--out", str(out), "--set", f"size={size}"]
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"size={size} is not divisible by {factor}" in line and not out.exists()


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("vqvae", "codec.num_downsamples", 5),  # of 16 pixels
        ("dalle", "codec.num_groups", 6),
        ("vqgan", "codec.net.channel_mult", "1,1,1,1,1,1"),
    ],
)
def test_a_factor_larger_than_the_picture_is_refused(
    key: str, name: str, value: Any, tokenizer: WordTokenizer
) -> None:
    with pytest.raises(UserError, match="is not divisible by 32") as caught:
        prior_on_meta(with_field(preset(key, "smoke"), name, value), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codec_share", 0),
        ("codec_share", 1),
        ("codec_share", -0.5),
        ("codec_share", 1.5),
        ("codec_share", math.nan),
        ("codec_batch_size", 0),
        ("cache_size", 0),
        ("cache_size", -1),
        ("model.text_len", 0),
        ("model.text_weight", 1),
        ("model.cond_drop_prob", 1),
        ("model.sampling.temperature", -1),
        ("model.sampling.top_p", 0),
        ("model.sampling.top_k", -1),
        ("model.sampling.guidance", -1),
        ("model.transformer.num_heads", 3),
        ("model.transformer.num_layers", 0),
    ],
)
def test_impossible_settings_are_refused(key: str, name: str, value: Any) -> None:
    """The sentence has the setting's dotted name, or, for two settings together, its value."""
    with pytest.raises(UserError) as caught:
        with_field(preset(key, "smoke"), name, value)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert name in sentence or (name.endswith("num_heads") and "3 heads" in sentence)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("vqvae", {"codec.num_downsamples": 3}),
        ("dalle", {"codec.num_groups": 4}),
        ("dalle", {"codec.num_groups": 1}),
        ("vqgan", {"codec.net.channel_mult": "1,1,1,1", "codec.disc_layers": 1}),
        ("vqgan", {}),
        ("vqgan", {"codec.disc_layers": 1}),
        ("vqgan", {"codec.disc_layers": 3}),
        (
            "vqgan",
            {"codec.disc_layers": 3, "codec.disc_weight": 0, "codec.perceptual_weight": 0},
        ),
        ("vqgan", {"size": 16, "codec.disc_layers": 6}),
    ],
    ids=str,
)
def test_the_smallest_pictures_train_or_are_refused(
    key: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Down to a single code; a discriminator that is too large is named in a sentence."""
    settings = {"size": 8, "train.batch_size": 2, "codec_batch_size": 2, **settings}
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 8)
    settings["data"] = f"imagefolder:{tmp_path / 'data'}"
    out, sentence = tmp_path / "run", ""
    try:
        runs.train(key, preset="smoke", out=out, steps=2, settings=settings)
    except UserError as error:
        sentence = str(error)
    assert out.exists() == (not sentence)
    assert not sentence or "size" in sentence or "layers" in sentence


# --- cache keys -------------------------------------------------------------------------------


def keys_of(config: Any, tokenizer: WordTokenizer) -> dict[str, str]:
    """Cache key of every stage."""
    settings = to_dict(config)
    data = {name: settings[name] for name in ("data", "size", "seed")}
    return {stage.name: stage.key(data) for stage in stages_of(config, tokenizer)}


def changed(config: Any, name: str, tokenizer: WordTokenizer) -> Any:
    """The configuration with another possible value of the setting `name`."""
    if name == "preset":  # which only the command line and `configure` set
        return replace(config, preset="tiny")
    value: Any = to_dict(config)
    for part in name.split("."):
        value = value[part]
    leaf = name.split(".")[-1]
    choices: list[Any]
    if isinstance(value, bool):
        choices = [not value]
    elif isinstance(value, dict):
        run = {"text": "bag", "encoder": {"runs": {}}, "tokenizer": {}, "hash": "0"}
        choices = [{"codec": 0.5}, {"RUN": run}]
    elif isinstance(value, list):
        choices = [[*value[:-1], (value[-1] if value else 1) * 2], ["a"], [0.5]]
    elif isinstance(value, str):
        texts = {
            "data": ["shapes:hard"],
            "text": [encoder for encoder in ENCODERS if encoder != value],
            "device": ["cpu"],
        }
        words = ("adam", "muon", "linear", "loss", "normal", "bpe", "gru", "exact", "fp32", "off")
        choices = texts.get(leaf, [*words, "sequence", "relu", "gelu", "penultimate"])
    else:
        choices = [1] if value is None else [value * 2, value + 1, value - 1, value / 2 + 0.01]
    for choice in choices:
        try:
            other = with_field(config, name, choice)
            prior_on_meta(other, tokenizer)
        except (UserError, OSError):
            continue
        if other != config:
            return other
    raise AssertionError(f"no other value for {name}={value!r}")


def dependent_stages(name: str) -> set[str]:
    """Stages whose result depends on a setting."""
    leaf = name.split(".")[-1]
    if leaf in (*NOT_IN_KEY, "preset"):
        return set()
    if name.startswith("train."):
        return {"prior"} if leaf == "batch_size" else {"codec", "prior"}
    if name.startswith(("codec", "data", "size", "seed")):
        return {"codec", "prior"}
    return {"prior"}


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_changes_the_keys_of_the_stages_that_depend_on_it(
    key: str, tokenizer: WordTokenizer
) -> None:
    """All priors of one codec share it, and no others."""
    config: Any = preset(key, "smoke")
    before, wrong = keys_of(config, tokenizer), {}
    names = [name for name in field_names(config) if name not in ("key", "codec.lpips")]
    assert len(names) > 60
    for name in names:
        after = keys_of(changed(config, name, tokenizer), tokenizer)
        different = {stage for stage in before if before[stage] != after[stage]}
        if different != dependent_stages(name):
            wrong[name] = sorted(different)
    assert not wrong


def test_keys_of_systems_and_presets_differ(tokenizer: WordTokenizer) -> None:
    """And are the same each time."""
    keys: list[str] = []
    for key, name in BOTH:
        own = keys_of(preset(key, name), tokenizer)
        assert own == keys_of(preset(key, name), tokenizer)
        keys += own.values()
    assert len(keys) == len(set(keys)) == 2 * len(BOTH)


# --- the recipe of a collapse -----------------------------------------------------------------


def test_settings_beside_the_recipe_collapse_win_in_any_order() -> None:
    settings = {"codec.quantiser.restart_threshold": 0.5, "recipe": "collapse"}
    for ordered in (settings, dict(reversed(settings.items()))):
        config: Any = runs.configure("vqvae", preset_name="smoke", settings=ordered)
        quantiser = config.codec.quantiser
        assert (quantiser.restart_threshold, quantiser.init) == (0.5, "normal")


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(UserError, match=r"colapse.*collapse"):
        with_field(preset("vqvae", "smoke"), "recipe", "colapse")
    for key in ("dalle", "vqgan"):
        with pytest.raises(UserError, match="recipe"):
            with_field(preset(key, "smoke"), "recipe", "collapse")


def test_the_list_names_presets_and_stages(command: Callable[..., Any]) -> None:
    process = command("list", "--json")
    out, _ = process.communicate(timeout=60)
    rows = {row["key"]: row for row in json.loads(out)}
    for key in KEYS:
        assert rows[key]["status"] == "works"
        assert set(rows[key]["presets"]) == set(NAMES) == set(find_recipe(key).PRESETS)
        assert tuple(rows[key]["stages"]) == ("codec", "prior")
