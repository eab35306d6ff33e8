"""The recipes of a codec and its prior: `vqvae`, `dalle`, `vqgan` at every preset."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage import runs
from lineage.cli import main
from lineage.config import field_names, from_dict, to_dict, with_field
from lineage.data import load_dataset
from lineage.data.contract import Batch
from lineage.data.tools import export
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.recipes import find_recipe, preset
from lineage.text.contract import TextFeatures
from lineage.text.encoders import ENCODERS
from lineage.text.tokenizer import WordTokenizer
from lineage.training.stage import Stage, content_key
from lineage.training.store import save_tensors, write_json
from lineage.vqvae.ar_prior import Prior
from lineage.vqvae.codec import Codec, Codes

KEYS = ("vqvae", "dalle", "vqgan")
NAMES = ("smoke", "tiny", "small", "paper")
BOTH = [(key, name) for key in KEYS for name in NAMES]


def stages_of(config: Any, tokenizer: WordTokenizer) -> list[Stage]:
    return find_recipe(config.key).stages(config, tokenizer)


def on_meta(config: Any, tokenizer: WordTokenizer) -> Any:
    """The untrained system, without its memory."""
    with torch.device("meta"):
        return runs.build(stages_of(config, tokenizer))


def size_of(*modules: nn.Module) -> int:
    unique = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in unique.values())


# --- what each preset is ----------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_every_preset_is_a_whole(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """Places, codes and widths of codec and prior agree; the transformer has GPT-2's sizes."""
    config: Any = preset(key, name)
    prior = on_meta(config, tokenizer)
    assert isinstance(prior, Prior)
    side, codes = config.size // config.codec.factor, prior.codec.codes
    assert side * config.codec.factor == config.size and prior.side == side
    assert prior.codec.factor == config.codec.factor
    width, layers = config.model.transformer.width, config.model.transformer.layers
    assert prior.row.weight.shape == prior.column.weight.shape == (side, width)
    assert prior.code.weight.shape == prior.code_head.weight.shape == (codes, width)
    assert prior.place.weight.shape == (config.model.places, width)
    assert prior.read.weight.shape == (width, config.encoder.width)
    assert prior.writes_text and prior.text_head.weight.shape == (prior.text.tokens, width)
    by_hand = layers * (12 * width**2 + 13 * width) + 2 * width
    assert size_of(prior.transformer) == by_hand
    assert len(prior.transformer.blocks) == layers


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_every_preset_is_saved_and_read_again(key: str, name: str) -> None:
    config = preset(key, name)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    assert config.without_files() == config


@pytest.mark.parametrize(
    ("key", "name", "places", "codes"),
    [
        *((key, "small", 64, 1024) for key in KEYS),
        ("vqvae", "paper", 32 * 32, 512),
        ("dalle", "paper", 32 * 32, 8192),
        ("vqgan", "paper", 16 * 16, 1024),
    ],
)
def test_grids_are_those_that_the_presets_speak_of(
    key: str, name: str, places: int, codes: int, tokenizer: WordTokenizer
) -> None:
    prior = on_meta(preset(key, name), tokenizer)
    assert (prior.side**2, prior.codec.codes) == (places, codes)
    assert name != "small" or prior.codec.factor == 8


def test_dalle_paper_is_of_twelve_billion_parameters(tokenizer: WordTokenizer) -> None:
    """64 layers of 62 heads of 64, and OpenAI's published codec to the parameter."""
    config: Any = preset("dalle", "paper")
    transformer = config.model.transformer
    assert (transformer.layers, transformer.heads, transformer.width) == (64, 62, 62 * 64)
    prior = on_meta(config, tokenizer)
    trained = size_of(*(module for modules in prior.groups().values() for module in modules))
    assert trained == pytest.approx(12e9, rel=0.03)
    assert size_of(prior.codec.encoder) == 53_786_240
    assert size_of(prior.codec.decoder) == 43_829_766
    assert config.model.places + prior.side**2 == 1280  # the sequence that the paper speaks of


def test_vqgan_paper_is_the_published_one(tokenizer: WordTokenizer) -> None:
    """Codec, discriminator and the blocks of the largest transformer, to the parameter."""
    prior = on_meta(preset("vqgan", "paper"), tokenizer)
    codec = prior.codec
    own = (codec.encoder, codec.decoder, codec.quant_conv, codec.post_quant_conv)
    assert size_of(codec.encoder) == 29_298_176 and size_of(codec.decoder) == 42_449_795
    assert size_of(*own, codec.quantiser) == 72_141_699
    assert size_of(codec.discriminator) == 2_765_633
    tables = 1024 * 1024 * 2 + 512 * 1024  # codes, head and places of theirs
    assert size_of(prior.transformer) == 304_932_864 - tables


def test_vqvae_paper_is_section_4_1(tokenizer: WordTokenizer) -> None:
    """Two strided convolutions, two residual blocks, 256 channels; K = 512 of 64."""
    config: Any = preset("vqvae", "paper")
    codec, quantiser = config.codec, config.codec.quantiser
    assert (config.size, codec.factor, codec.channels, codec.blocks) == (128, 4, 256, 2)
    assert quantiser.codes == 512 and quantiser.codebook == "loss"
    assert (config.codec_optim.name, config.codec_optim.lr) == ("adam", 2e-4)
    assert config.codec_batch == 128


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_captions_of_the_world_fit_the_places_of_the_prior(key: str, name: str) -> None:
    """What is cut off cannot be drawn: but for a last word of very few."""
    config: Any = preset(key, name)
    captions = list(load_dataset(config.data, "train", 16).all_captions(4000))
    tokenizer: Any = runs.make_tokenizer(
        config.encoder.tokenizer, captions, config.encoder.vocabulary
    )
    cut = sum(len(tokenizer.encode(caption)) > config.model.places for caption in captions)
    assert cut < 0.002 * len(captions)


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), BOTH)
def test_the_budget_is_shared_out(key: str, name: str, tokenizer: WordTokenizer) -> None:
    """Codec and prior share it; the codes of `kept` pictures are found beside it."""
    config: Any = preset(key, name)
    codec, codes, prior = stages_of(config, tokenizer)
    assert [stage.name for stage in (codec, codes, prior)] == ["codec", "codes", "prior"]
    assert (codec.needs, codes.needs, prior.needs) == ((), ("codec",), ("codes",))
    assert codec.share == config.codec_share and codec.share + prior.share == pytest.approx(1)
    one, look, other = (stage.budgeted() for stage in (codec, codes, prior))
    if config.train.steps:
        assert one.steps and other.steps and abs(one.steps + other.steps - config.train.steps) <= 1
    if config.train.minutes:
        assert one.minutes and other.minutes
        assert one.minutes + other.minutes == pytest.approx(config.train.minutes)
    assert (look.steps, look.minutes, look.pictures) == (None, None, config.kept)
    assert (one.batch, other.batch) == (config.codec_batch, config.train.batch)
    assert (codec.optim, prior.optim) == (config.codec_optim, config.optim)


def test_the_steps_of_dalle_paper_are_the_papers(tokenizer: WordTokenizer) -> None:
    codec, _, prior = stages_of(preset("dalle", "paper"), tokenizer)
    assert (codec.budgeted().steps, prior.budgeted().steps) == (3_000_000, 430_000)


@pytest.mark.parametrize("key", KEYS)
def test_a_budget_that_is_asked_for_changes_no_look_at_the_data(
    key: str, tokenizer: WordTokenizer
) -> None:
    for given in ({"minutes": 2.0}, {"steps": 10}, {"settings": {"train.pictures": 400}}):
        config = runs.configure(key, preset_name="tiny", **given)  # type: ignore[arg-type]
        codec, codes, prior = (s.budgeted() for s in stages_of(config, tokenizer))
        assert (codes.steps, codes.minutes, codes.pictures) == (None, None, 8192)
        for limit in ("steps", "minutes"):
            both = [getattr(stage, limit) for stage in (codec, prior)]
            whole = getattr(config.train, limit)
            assert both == [None, None] if whole is None else sum(both) == pytest.approx(whole)


# --- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [17, 18, 22, 31])
def test_sizes_that_do_not_divide_are_told(
    key: str, size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one sentence with both numbers, before anything is written."""
    config: Any = preset(key, "smoke")
    factor = config.codec.factor
    if not size % factor:
        pytest.skip("it divides")
    out = tmp_path / "run"
    arguments = ["train", key, "--preset", "smoke", "--out", str(out), "--set", f"size={size}"]
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"size={size}" in line and f"{factor} pixels" in line and not out.exists()


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("vqvae", "codec.halvings", 5),  # of 16 pixels
        ("dalle", "codec.groups", 6),
        ("vqgan", "codec.net.multipliers", "1,1,1,1,1,1"),
    ],
)
def test_a_codec_with_places_larger_than_the_picture_is_told(
    key: str, name: str, value: Any, tokenizer: WordTokenizer
) -> None:
    with pytest.raises(UserError, match=r"(16|32) pixels") as caught:
        stages_of(with_field(preset(key, "smoke"), name, value), tokenizer)
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
        ("codec_batch", 0),
        ("kept", 0),
        ("kept", -1),
        ("model.places", 0),
        ("model.text_weight", 1),
        ("model.drop_text", 1),
        ("model.temperature", -1),
        ("model.top_p", 0),
        ("model.top_k", -1),
        ("model.guidance", -1),
        ("model.transformer.heads", 3),
        ("model.transformer.layers", 0),
    ],
)
def test_settings_that_cannot_be_are_told(key: str, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name.split(".")[-1]) as caught:
        with_field(preset(key, "smoke"), name, value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("vqvae", {"codec.halvings": 3}),
        ("dalle", {"codec.groups": 4}),
        ("dalle", {"codec.groups": 1}),
        ("vqgan", {"codec.net.multipliers": "1,1,1,1", "codec.layers": 1}),
        ("vqgan", {}),
        ("vqgan", {"codec.layers": 1}),
        ("vqgan", {"codec.layers": 3}),
        ("vqgan", {"codec.layers": 3, "codec.adversary": 0, "codec.perceptual": 0}),
        ("vqgan", {"size": 16, "codec.layers": 6}),
    ],
    ids=str,
)
def test_the_smallest_pictures_are_trained_on_or_refused(
    key: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Down to a single place. A discriminator of patches needs a picture that is larger than its
    patches: that is told in a sentence and not by a convolution."""
    settings = {"size": 8, "train.batch": 2, "codec_batch": 2, **settings}
    export(load_dataset("shapes", "train", 16), tmp_path / "data", 8)
    settings["data"] = f"imagefolder:{tmp_path / 'data'}"
    out, said = tmp_path / "run", ""
    try:
        runs.train(key, preset="smoke", out=out, steps=2, settings=settings)
    except UserError as refused:
        said = str(refused)
    assert out.exists() == (not said) and (not said or "size" in said or "layers" in said)


# --- codes are kept as they are ---------------------------------------------------------------


class Many(Codec):
    """K codes, of which a picture's brightness chooses."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.codes, self.factor = codes, 2
        self.weight = nn.Parameter(torch.ones(1))

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Any:
        yield from ()

    def encode(self, image: Tensor) -> Tensor:
        level = (image[:, 0, ::2, ::2].double() + 1) / 2
        return (level * (self.codes - 1)).round().long()

    def decode(self, ids: Tensor) -> Tensor:
        level = ids / max(1, self.codes - 1) * 2 - 1
        return (
            level[:, None]
            .float()
            .expand(-1, 3, -1, -1)
            .repeat_interleave(2, 2)
            .repeat_interleave(2, 3)
        )


@pytest.mark.parametrize("codes", [1, 2, 32_767, 32_768, 32_769, 40_000, 65_536, 100_000])
def test_codes_are_kept_as_they_are(codes: int) -> None:
    """However many there are; a codebook that is too large for the memory must be refused."""
    image = torch.rand(3, 3, 4, 4) * 2 - 1
    image[0], image[1] = 1.0, -1.0  # the last code and the first
    batch = Batch(image, ["a", "b", "c"], None, ["a", "b", "c"])
    codec = Many(codes)
    try:
        kept = Codes(codec, 4, 3).eval()
    except UserError:
        return
    text = kept.text.encode(batch.caption)
    list(kept.losses(batch, text, NoiseStreams.for_pictures(0, 3, "cpu")))
    assert int(kept.memory.count) == 3
    assert torch.equal(kept.of(batch), codec.encode(image))
    again = Codes(Many(codes), 4, 3)
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again.of(batch), codec.encode(image))


# --- what is found again ----------------------------------------------------------------------


def keys_of(
    config: Any, tokenizer: WordTokenizer, changed: dict[str, Any] | None = None
) -> dict[str, str]:
    """The content key of every stage, as a run would find them."""
    settings = to_dict(config)
    origin = {name: settings[name] for name in ("data", "size", "seed")} | (changed or {})
    keys: dict[str, str] = {}
    for stage in stages_of(config, tokenizer):
        keys[stage.name] = content_key(stage, origin, keys)
    return keys


def another(config: Any, name: str, tokenizer: WordTokenizer) -> Any:
    """The configuration with the setting `name` changed to something else that is possible."""
    value: Any = to_dict(config)
    for part in name.split("."):
        value = value[part]
    texts = {
        "data": ["shapes:hard"],
        "text": [encoder for encoder in ENCODERS if encoder != value],
        "device": ["cpu"],
        "preset": ["tiny"],
    }
    leaf = name.split(".")[-1]
    choices: list[Any]
    if isinstance(value, bool):
        choices = [not value]
    elif isinstance(value, dict):
        choices = [{"codec": 0.5}]
    elif isinstance(value, list):
        choices = [[*value[:-1], (value[-1] if value else 1) * 2], ["a"]]
    elif isinstance(value, str):
        known = ("adam", "muon", "linear", "loss", "normal", "bpe", "gru", "exact", "fp32", "off")
        choices = texts.get(leaf, list(known))
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


def expected(name: str) -> set[str]:
    """Which stages a setting changes."""
    every = {"codec", "codes", "prior"}
    if name.startswith("train."):
        budget = ("minutes", "steps", "pictures", "precision", "channels_last")
        leaf = name.split(".")[1]
        return every if leaf in budget else {"prior"} if leaf == "batch" else set()
    if name.startswith(("codec", "data", "size", "seed")):
        return every
    if name == "kept":
        return {"codes", "prior"}
    return set() if name == "preset" else {"prior"}


@pytest.mark.parametrize("key", KEYS)
def test_each_setting_makes_those_stages_new_that_depend_on_it(
    key: str, tokenizer: WordTokenizer
) -> None:
    """A codec is shared by all priors on it, and never by runs that would train another one."""
    config: Any = preset(key, "smoke")
    before, wrong = keys_of(config, tokenizer), {}
    names = [name for name in field_names(config) if name not in ("key", "codec_from")]
    assert len(names) > 60
    for name in names:
        after = keys_of(another(config, name, tokenizer), tokenizer)
        changed = {stage for stage in before if before[stage] != after[stage]}
        if changed != expected(name):
            wrong[name] = sorted(changed)
    assert not wrong


def test_the_same_again_has_the_same_keys(tokenizer: WordTokenizer) -> None:
    """And no two systems or presets share a stage."""
    every: list[str] = []
    for key, name in BOTH:
        keys = keys_of(preset(key, name), tokenizer)
        assert keys == keys_of(preset(key, name), tokenizer)
        every += keys.values()
    assert len(every) == len(set(every)) == 3 * len(BOTH)


def test_keys_depend_on_words_and_program(tokenizer: WordTokenizer) -> None:
    config = preset("vqvae", "smoke")
    before = keys_of(config, tokenizer)
    for origin in ({"tokenizer": 1}, {"lineage": "9"}, {"fingerprint": "x"}):
        after = keys_of(config, tokenizer, origin)
        assert all(before[stage] != after[stage] for stage in before)


def test_a_codec_that_is_taken_is_known_by_its_file(
    tokenizer: WordTokenizer, tmp_path: Path
) -> None:
    """Not by the folder's name, and without the stage that would train it."""
    config: Any = preset("vqvae", "smoke")
    taken = []
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_tensors(tmp_path / name / "model.safetensors", {"codec.error": torch.tensor(value)})
        write_json(tmp_path / name / "config.json", to_dict(config))
        changed = with_field(config, "codec_from", str(tmp_path / name))
        taken.append(keys_of(changed, tokenizer))
        stages = stages_of(changed, tokenizer)
        assert [(s.name, s.needs) for s in stages] == [("codes", ()), ("prior", ("codes",))]
        assert stages[-1].share == 1 and stages[-1].budgeted().steps == 20
        assert set(stages[0].settings) <= set(to_dict(changed))
    a, b, c = taken
    assert a == b and a["codes"] != c["codes"] and a["prior"] != c["prior"]
    own = keys_of(config, tokenizer)
    assert a["codes"] != own["codes"] and a["prior"] != own["prior"]
    again = keys_of(with_field(changed, "model.transformer.layers", 1), tokenizer)
    assert again["codes"] == c["codes"] and again["prior"] != c["prior"]


# --- the recipe of a collapse -----------------------------------------------------------------


def test_the_collapse_stands_beside_other_settings() -> None:
    """They may be given in any order, and win."""
    settings = {"codec.quantiser.restart": 0.5, "recipe": "collapse"}
    for given in (settings, dict(reversed(settings.items()))):
        config: Any = runs.configure("vqvae", preset_name="smoke", settings=given)
        quantiser = config.codec.quantiser
        assert (quantiser.restart, quantiser.start) == (0.5, "normal")


def test_recipes_that_do_not_exist_are_told() -> None:
    with pytest.raises(UserError, match=r"colapse.*collapse"):
        with_field(preset("vqvae", "smoke"), "recipe", "colapse")
    for key in ("dalle", "vqgan"):
        with pytest.raises(UserError, match="recipe"):
            with_field(preset(key, "smoke"), "recipe", "collapse")


def test_recipes_of_codes_are_light_to_read(command: Callable[..., Any]) -> None:
    """`lineage list` tells of them without building anything."""
    process = command("list", "--json")
    out, _ = process.communicate(timeout=60)
    rows = {row["key"]: row for row in json.loads(out)}
    assert all(rows[key]["status"] == "works" for key in KEYS)
    for key in KEYS:
        assert set(rows[key]["presets"]) == set(NAMES) == set(find_recipe(key).PRESETS)
        assert tuple(rows[key]["stages"]) == ("codec", "codes", "prior")
