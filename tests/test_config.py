"""Configurations: every field has a dotted name, JSON is read back unchanged, and a wrong value
raises one sentence that names it.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import FrozenInstanceError, field
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineage.bounds import (
    Float,
    Floats,
    Fraction,
    Int,
    Ints,
    IntsFromZero,
    Multipliers,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    Texts,
)
from lineage.catalog import CATALOG, working
from lineage.config import (
    OptimConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
    configuration,
    field_names,
    from_dict,
    to_dict,
    typed,
    with_field,
)
from lineage.errors import UserError, nearest
from lineage.plan import build, plan
from lineage.recipes import find_recipe, preset
from lineage.text.tokenizer import WordTokenizer

PRESETS = [(key, name) for key in working() for name in CATALOG[key].presets]


@configuration
class Inner:
    """Fields of the types that other configurations use."""

    depth: PositiveInt = 2
    table: dict[str, PositiveFloat] = field(default_factory=dict)


@configuration
class Model:
    """Fields of all types."""

    whole: Int = 1
    natural: NonNegativeInt = 0
    number: Float = 0.5
    positive: PositiveFloat = 0.5
    switch: bool = False
    word: str = "a"
    loss: Literal["log", "hinge"] = "log"
    several: Ints = (1, 2)
    factors: Multipliers = (1, 2)
    indices: IntsFromZero = (0, 1)
    numbers: Floats = (0.5,)
    words: Texts = ("a", "b")
    limit: NonNegativeFloat | None = None
    fraction: Fraction = 0.1
    share: Share = 0.5
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.natural > 100 * self.share:
            raise UserError(f"natural={self.natural} does not fit share={self.share}.")


@configuration
class Config(RunConfig):
    model: Model = field(default_factory=Model)


CONFIG = Config(key="x", preset="smoke")
DIFFUSION = preset("ddpm", "smoke")


def value_of(config: Any, name: str) -> Any:
    """The value of the field with a dotted name."""
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def is_one_sentence(message: str) -> bool:
    """A capital or a name first, one line, an end; a list of suggestions is not empty."""
    start, end = r"(?:[A-Z]|'|[\w.]+(?:=| must | is | does ))", r"(?:[.?]|: .*\w|NAME=VALUE)"
    return re.fullmatch(f"{start}.*{end}", message) is not None and "  " not in message


# --- presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name"), PRESETS)
def test_a_preset_is_read_back_from_its_json(key: str, name: str) -> None:
    """`lineage.load` builds the same networks again from `config.json` alone."""
    config = preset(key, name)
    saved = json.loads(json.dumps(to_dict(config)))
    back = from_dict(find_recipe(key).Config, saved)
    assert back == config and type(back) is type(config)
    assert to_dict(back) == saved


@pytest.mark.parametrize(("key", "name"), PRESETS)
def test_key_and_preset_are_filled_in_by_their_place(key: str, name: str) -> None:
    config = preset(key, name)
    assert (config.key, config.preset) == (key, name)
    assert find_recipe(key).PRESETS[name].key in ("", key)


@pytest.mark.parametrize(("key", "name"), PRESETS)
def test_each_field_of_a_preset_can_be_set_by_its_name(key: str, name: str) -> None:
    """`--set NAME=VALUE` with the present value, as text, changes nothing."""
    config = preset(key, name)
    names = field_names(config)
    assert len(names) == len(set(names))
    assert {"optim.lr", "train.checkpoint_every", "text", "encoder.width"} <= set(names)
    for dotted in names:
        value = value_of(to_dict(config), dotted)
        if isinstance(value, dict):
            continue  # an empty table of multipliers
        if dotted == "recipe":
            continue  # a name for several fields; tests/cgan/test_stackgan.py tests them
        text = "none" if value is None else json.dumps(value).strip('"')
        assert with_field(config, dotted, text) == config, dotted


WRONG: tuple[Any, ...] = ("", "x,y", "-7.5", "nan", True, None, ["x"], {"x": "y"})


@pytest.mark.parametrize("key", working())
def test_any_value_is_accepted_or_refused_in_one_sentence(key: str) -> None:
    """For each field of each system: no other exception, and an accepted value is saved as JSON."""
    config = preset(key, "smoke")
    for dotted in field_names(config):
        for value in WRONG:
            try:
                changed = with_field(config, dotted, value)
            except UserError as error:
                message = str(error)
                assert is_one_sentence(message), (dotted, value, message)
                assert dotted.rpartition(".")[2] in message, (dotted, value, message)
            else:
                assert from_dict(type(config), to_dict(changed)) == changed


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model.whole", "7", 7),
        ("model.whole", " 7 ", 7),
        ("model.whole", "1e3", 1000),
        ("model.whole", "7.0", 7),
        ("model.whole", 7.0, 7),
        ("model.whole", "-2", -2),
        ("model.number", "3e-4", 3e-4),
        ("model.number", "2", 2.0),
        ("model.number", 2, 2.0),
        ("model.switch", "true", True),
        ("model.switch", "Yes", True),
        ("model.switch", "on", True),
        ("model.switch", "0", False),
        ("model.word", "b=c", "b=c"),
        ("model.word", "none", "none"),
        ("model.word", "", ""),
        ("model.loss", "hinge", "hinge"),
        ("model.several", "4,5,6", (4, 5, 6)),
        ("model.several", "(4, 5)", (4, 5)),
        ("model.several", "[4]", (4,)),
        ("model.several", "1e3,2", (1000, 2)),
        ("model.several", "", ()),
        ("model.several", [8, 9], (8, 9)),
        ("model.indices", "0,0", (0, 0)),
        ("model.numbers", "1,2.5", (1.0, 2.5)),
        ("model.words", "c, d", ("c", "d")),
        ("model.limit", "0.25", 0.25),
        ("model.limit", "none", None),
        ("model.limit", None, None),
        ("model.fraction", "0", 0.0),
        ("model.inner.depth", "3", 3),
        ("model.inner.table.generator", "2", 2.0),
        ("model.inner.table", {"a": 1}, {"a": 1.0}),
        ("train.minutes", "5", 5.0),
        ("train.max_steps", 12, 12),
        ("seed", "3", 3),
        ("optim.lr_multipliers.generator", "2", 2.0),
    ],
)
def test_text_becomes_the_type_of_the_field(name: str, text: Any, value: Any) -> None:
    changed = value_of(with_field(CONFIG, name, text), name)
    assert changed == value and type(changed) is type(value)


def test_setting_a_field_changes_a_copy_and_no_other_field() -> None:
    before = to_dict(CONFIG)
    changed = with_field(CONFIG, "optim.lr", "0.5")
    assert to_dict(CONFIG) == before
    expected = json.loads(json.dumps(before))
    expected["optim"]["lr"] = 0.5
    assert to_dict(changed) == expected
    assert isinstance(changed, Config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.whole", "1.5", "model.whole='1.5' should be a whole number."),
        ("model.whole", 1.5, "model.whole=1.5 should be a whole number."),
        ("model.whole", "many", "model.whole='many' should be a whole number."),
        ("model.whole", "true", "model.whole='true' should be a whole number."),
        ("model.whole", True, "model.whole=True should be a number."),
        ("model.whole", "", "model.whole='' should be a whole number."),
        ("model.whole", None, "model.whole=None should be a whole number."),
        ("model.natural", "-1", "model.natural=-1 must be at least 0."),
        ("model.number", "nan", "model.number='nan' should be a number."),
        ("model.number", "inf", "model.number='inf' should be a number."),
        ("model.number", "1e999", "model.number=inf should be a number."),
        ("model.number", "fast", "model.number='fast' should be a number."),
        ("model.number", False, "model.number=False should be a number."),
        ("model.positive", "0", "model.positive=0 must be above 0."),
        ("model.switch", "maybe", "model.switch='maybe' should be true or false."),
        ("model.switch", 3, "model.switch=3 should be true or false."),
        ("model.word", 3, "model.word=3 should be text."),
        ("model.loss", "hing", "model.loss='hing' is not possible: did you mean 'hinge'?"),
        ("model.loss", 3, "model.loss=3 is not possible: there is: hinge, log"),
        ("model.several", "1,x", "model.several.1='x' should be a whole number."),
        ("model.several", "1,0", "model.several.1=0 must be at least 1."),
        ("model.several", [True], "model.several.0=True should be a number."),
        ("model.several", 5, "model.several=5 should be a list, as in 1,2,3."),
        ("model.indices", "-1", "model.indices.0=-1 must be at least 0."),
        ("model.numbers", "nan", "model.numbers.0='nan' should be a number."),
        ("model.limit", "-1", "model.limit=-1 must be at least 0."),
        ("model.fraction", "1", "model.fraction=1 must be below 1."),
        ("model.fraction", "-0.1", "model.fraction=-0.1 must be at least 0."),
        ("model.share", "0", "model.share=0 must be above 0."),
        ("model.inner.depth", "0", "model.inner.depth=0 must be at least 1."),
        ("model.inner.table.a", "0", "model.inner.table.a=0 must be above 0."),
        ("model.natural", 51, "natural=51 does not fit share=0.5."),
        ("optim.lr_multipliers.generator", "fast", ".generator='fast' should be a number."),
        ("optim.name", "sgd", "optim.name='sgd' is not possible: there is: adam, adamw, muon"),
        ("optim.decay", "step", "optim.decay='step' is not possible"),
        ("optim.lr", "0", "optim.lr=0 must be above 0."),
        ("optim.lr", "-1", "optim.lr=-1 must be above 0."),
        ("optim.ema_decay", "1", "optim.ema_decay=1 must be below 1."),
        ("optim.beta1", "2", "optim.beta1=2 must be below 1."),
        ("optim.grad_clip", "-1", "optim.grad_clip=-1 must be at least 0."),
        ("optim.warmup", "-5", "optim.warmup=-5 must be at least 0."),
        ("train.max_steps", "0", "train.max_steps=0 must be at least 1."),
        ("train.minutes", "-1", "train.minutes=-1 must be above 0."),
        ("train.batch_size", "0", "train.batch_size=0 must be at least 1."),
        ("train.log_every", "-1", "train.log_every=-1 must be at least 0."),
        ("train.precision", "fp8", "train.precision='fp8' is not possible"),
        ("size", "0", "size=0 must be at least 4."),
        ("size", "-16", "size=-16 must be at least 4."),
        ("seed", "-1", "seed=-1 must be at least 0."),
        ("seed", str(10**23), "must be at most 9223372036854775807."),
        ("seed", "1e23", "must be at most 9223372036854775807."),
        ("size", "1e12", "size=1e12 must be at most 1024."),
        ("encoder.width", "1e6", "encoder.width=1e6 must be at most 65536."),
        ("encoder.num_layers", "1000", "encoder.num_layers=1000 must be at most 128."),
        ("train.batch_size", "1e12", "must be at most 1000000000."),
        ("train.max_steps", "1e13", "must be at most 1000000000000."),
        ("train.minutes", "1e9", "train.minutes=1e9 must be at most 10000000."),
        ("train.prefetch", "1e9", "train.prefetch=1e9 must be at most 128."),
        ("optim.lr", "1e39", "must be at most 1e+38."),
        ("model.factors", "", "model.factors='' must have 1 or more entries."),
        ("model.factors", "1,100", "model.factors.1=100 must be at most 64."),
        ("text", "x" * 1001, "text must have at most 1000 characters, not 1001."),
        ("key", "dit", "key=dit cannot be set: name the system in its place"),
        ("preset", "paper", "preset=paper cannot be set: use --preset"),
        ("encoder.dropout", "1", "encoder.dropout=1 must be below 1."),
        ("encoder.vocab_size", "3", "encoder.vocab_size=3 must be at least 4."),
    ],
)
def test_a_wrong_value_is_named_with_its_bound(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        with_field(CONFIG, name, value)
    assert message in str(caught.value)
    assert is_one_sentence(str(caught.value))


@pytest.mark.parametrize("name", ["optim", "model", "model.inner", "optim.lr_multipliers"])
@pytest.mark.parametrize("value", ["big", 3, None, [1]])
def test_a_group_cannot_be_set_as_a_whole(name: str, value: Any) -> None:
    """The error lists its fields."""
    with pytest.raises(UserError, match=rf"'{name}' is a group of settings.*{name}\.\w+"):
        with_field(CONFIG, name, value)


def test_a_wrong_value_is_named_relative_to_the_configuration_that_is_built() -> None:
    with pytest.raises(UserError, match=r"^depth=0 must be at least 1\.$"):
        Inner(depth=0)
    with pytest.raises(UserError, match=r"^inner\.depth=0 must be at least 1\.$"):
        Model(inner={"depth": 0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^guidance='x' should be a number\.$"):
        typed(Float, "x", "guidance")


def test_a_configuration_takes_keywords_only_and_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        Inner(3)  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Inner().depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tokenizer", "smallest"), [("word", 4), ("bpe", 260)], ids=["word", "bpe"]
)
def test_a_vocabulary_has_room_for_its_special_tokens(tokenizer: Any, smallest: int) -> None:
    assert TextConfig(tokenizer=tokenizer, vocab_size=smallest).vocab_size == smallest
    with pytest.raises(UserError, match=f"must be at least {smallest}"):
        TextConfig(tokenizer=tokenizer, vocab_size=smallest - 1)


def test_a_large_seed_keeps_all_its_digits() -> None:
    """Through a float, 2^53 + 1 would become 2^53, which is another run."""
    number = 2**53 + 1
    assert with_field(CONFIG, "seed", str(number)).seed == number


def test_a_number_that_python_does_not_write_is_named() -> None:
    with pytest.raises(UserError, match="seed=a number of thousands of digits must be at most"):
        with_field(CONFIG, "seed", 10**5000)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    name=st.sampled_from([name for name in field_names(DIFFUSION) if name not in ("key", "data")]),
    value=st.one_of(
        st.text(max_size=20),
        st.integers(-(10**25), 10**25).map(str),
        st.floats().map(repr),
        st.lists(st.integers(0, 10**6), max_size=12).map(lambda row: ",".join(map(str, row))),
    ),
)
def test_any_text_is_refused_or_gives_a_system_that_is_built(
    name: str, value: str, tokenizer: WordTokenizer
) -> None:
    """On the meta device, as before a run starts."""
    with contextlib.suppress(UserError), torch.device("meta"):
        build(plan(with_field(DIFFUSION, name, value), tokenizer))


def test_defaults_set_no_budget_and_pass_their_own_checks() -> None:
    assert (TrainConfig().minutes, TrainConfig().max_steps, TrainConfig().max_pictures) == (
        None,
        None,
        None,
    )
    assert OptimConfig().lr_multipliers == {}
    assert OptimConfig().lr_multipliers is not OptimConfig().lr_multipliers


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.lrr", "'optim.lr'"),
        ("train.step", "'train.max_steps'"),
        ("steps", "'train.max_steps'"),
        ("lr", "'optim.lr'"),
        ("lrr", "'optim.lr'"),
        ("batch", "'train.batch_size'"),
        ("checkpoint_every", "'train.checkpoint_every'"),
        ("train.checkpoint", "'train.checkpoint_every'"),
        ("modle.whole", "'model.whole'"),
        ("optim.lr.x", "'optim.lr'"),
        ("optim..lr", "'optim.lr'"),
        ("model.inner.depht", "'model.inner.depth'"),
        ("sed", "'seed'"),
        ("zzzzz", "there is: data"),
        ("", "there is: data"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        with_field(CONFIG, name, "1")
    assert repr(name) in str(caught.value) and hint in str(caught.value)
    assert is_one_sentence(str(caught.value))


def test_nearest() -> None:
    assert nearest("ddmp", ["ddpm", "dit", "clip"]) == "did you mean 'ddpm'?"
    assert nearest("zzz", ["b", "a"]) == "there is: a, b"
    assert nearest("a.steps", ["train.steps", "other"]) == "did you mean 'train.steps'?"
    assert nearest("lr", ["train.minutes", "optim.lr"]) == "did you mean 'optim.lr'?"


# --- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"colour": 3}, "colour"),
        ({"optim": {"lr": 1e-3, "nesterov": True}}, "optim.nesterov"),
        ({"optim": [1, 2]}, "optim=[1, 2]"),
        ({"optim": None}, "optim=None"),
        ({"model": {"several": "x"}}, "model.several.0='x'"),
        ({"model": {"inner": {"depth": 0}}}, "model.inner.depth=0"),
        ({"model": {"inner": 3}}, "model.inner=3"),
        ({"model": {"several": 3}}, "model.several=3"),
        ({"model": {3: 4}}, "model.3=3"),
        ({"seed": None}, "seed=None"),
        ({"seed": {}}, "seed={}"),
        ({"optim": {"lr_multipliers": [1]}}, "optim.lr_multipliers=[1]"),
    ],
    ids=str,
)
def test_a_saved_configuration_that_does_not_fit_is_refused(
    change: dict[str, Any], name: str
) -> None:
    """It may be of another version, or edited by hand."""
    with pytest.raises(UserError) as caught:
        from_dict(Config, {**to_dict(CONFIG), **change})
    assert name in str(caught.value) and is_one_sentence(str(caught.value))


def test_a_saved_configuration_may_lack_fields_that_have_defaults() -> None:
    """Fields that were added later; required ones are named."""
    saved = to_dict(CONFIG)
    del saved["optim"], saved["model"]["inner"]
    assert from_dict(Config, saved) == CONFIG

    @configuration
    class Required:
        depth: PositiveInt

    with pytest.raises(UserError, match="lacks the field 'depth'"):
        from_dict(Required, {})


def test_values_are_checked_quickly() -> None:
    """A sweep sets thousands of fields."""
    start = time.perf_counter()
    for number in range(1, 51):
        with_field(CONFIG, "model.inner.depth", number)
    assert time.perf_counter() - start < 2
