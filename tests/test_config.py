"""Configurations: every field is reached by its dotted name, and what is saved comes back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from lineage.catalog import CATALOG, working
from lineage.config import (
    OptimConfig,
    RunConfig,
    TrainConfig,
    field_names,
    from_dict,
    to_dict,
    with_field,
)
from lineage.errors import UserError, nearest
from lineage.recipes import find_recipe

PRESETS = [(key, name) for key in working() for name in CATALOG[key].presets]


@dataclass(frozen=True)
class Inner:
    """All kinds of fields."""

    whole: int = 1
    number: float = 0.5
    switch: bool = False
    word: str = "a"
    several: tuple[int, ...] = (1, 2)
    limit: float | None = None


@dataclass(frozen=True)
class Outer(RunConfig):
    model: Inner = field(default_factory=Inner)


CONFIG = Outer(key="x", preset="smoke")


@pytest.mark.parametrize(("key", "name"), PRESETS)
def test_every_preset_comes_back_from_its_json(key: str, name: str) -> None:
    """`config.json` is all that `lineage.load` has to build the same networks again."""
    recipe = find_recipe(key)
    config = recipe.PRESETS[name]
    saved = json.loads(json.dumps(to_dict(config)))
    back = from_dict(recipe.Config, saved)
    assert back == config and type(back) is type(config)
    assert to_dict(back) == saved


@pytest.mark.parametrize(("key", "name"), PRESETS)
def test_every_field_of_a_preset_is_reached_by_its_name(key: str, name: str) -> None:
    """`--set NAME=VALUE` with the value it has already, as text, changes nothing."""
    config = find_recipe(key).PRESETS[name]
    names = field_names(config)
    assert len(names) == len(set(names))
    assert {"optim.lr", "train.checkpoint_every", "text", "encoder.width"} <= set(names)
    for dotted in names:
        value: Any = to_dict(config)
        for part in dotted.split("."):
            value = value[part]
        if isinstance(value, dict):
            continue  # an empty table of rates
        if dotted == "recipe":
            continue  # a name for several fields; what it sets is in tests/cgan/test_stackgan.py
        text = "none" if value is None else json.dumps(value).strip('"')
        assert with_field(config, dotted, text) == config, dotted


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model.whole", "7", 7),
        ("model.whole", "1e3", 1000),
        ("model.whole", "-2", -2),
        ("model.number", "3e-4", 3e-4),
        ("model.number", "2", 2.0),
        ("model.switch", "true", True),
        ("model.switch", "Yes", True),
        ("model.switch", "on", True),
        ("model.switch", "0", False),
        ("model.word", "b=c", "b=c"),
        ("model.several", "4,5,6", (4, 5, 6)),
        ("model.several", "(4, 5)", (4, 5)),
        ("model.several", "[4]", (4,)),
        ("model.several", "", ()),
        ("model.several", [8, 9], (8, 9)),
        ("model.limit", "0.25", 0.25),
        ("model.limit", "none", None),
        ("model.limit", None, None),
        ("train.minutes", "5", 5.0),
        ("train.steps", 12, 12),
        ("seed", "3", 3),
        ("optim.rates.generator", "2", 2.0),
    ],
)
def test_text_becomes_the_type_of_the_field(name: str, text: Any, value: Any) -> None:
    changed: Any = with_field(CONFIG, name, text)
    for part in name.split("."):
        changed = changed[part] if isinstance(changed, dict) else getattr(changed, part)
    assert changed == value and type(changed) is type(value)


def test_a_copy_is_changed_and_nothing_else() -> None:
    before = to_dict(CONFIG)
    changed = with_field(CONFIG, "optim.lr", "0.5")
    assert to_dict(CONFIG) == before
    expected = json.loads(json.dumps(before))
    expected["optim"]["lr"] = 0.5
    assert to_dict(changed) == expected
    assert isinstance(changed, Outer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.whole", "1.5"),
        ("model.whole", "many"),
        ("model.whole", "true"),
        ("model.whole", True),
        ("model.whole", ""),
        ("model.number", "nan"),
        ("model.number", "inf"),
        ("model.number", "fast"),
        ("model.switch", "maybe"),
        ("model.word", 3),
        ("model.several", "1,x"),
        ("model.several", 5),
        ("model", "big"),
        ("optim", 3),
        ("optim.rates", "fast"),
        ("optim.rates.generator", "fast"),
        ("optim.name", "sgd"),
        ("optim.decay", "step"),
        ("optim.lr", "0"),
        ("optim.lr", "-1"),
        ("optim.average", "1"),
        ("optim.beta1", "2"),
        ("optim.clip", "-1"),
        ("optim.warmup", "-5"),
        ("train.steps", "0"),
        ("train.minutes", "-1"),
        ("train.batch", "0"),
        ("train.log_every", "-1"),
        ("train.precision", "fp8"),
        ("size", "0"),
        ("size", "-16"),
    ],
)
def test_a_value_that_cannot_be_is_told(name: str, value: Any) -> None:
    """In one sentence that names the field."""
    with pytest.raises(UserError) as caught:
        with_field(CONFIG, name, value)
    message = str(caught.value)
    assert name in message and "\n" not in message
    assert not message.endswith(": ")  # an empty list of suggestions helps nobody


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.lrr", "'optim.lr'"),
        ("train.step", "'train.steps'"),
        ("lr", "'optim.lr'"),
        ("checkpoint_every", "'train.checkpoint_every'"),
        ("train.checkpoint", "'train.checkpoint_every'"),
        ("modle.whole", "'model.whole'"),
        ("optim.lr.x", "'optim.lr'"),
        ("sed", "'seed'"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        with_field(CONFIG, name, "1")
    assert repr(name) in str(caught.value) and hint in str(caught.value)


def test_a_group_is_not_set_as_a_whole() -> None:
    with pytest.raises(UserError, match=r"optim\.lr"):
        with_field(CONFIG, "optim", "fast")


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 3},
        {"optim": {"lr": 1e-3, "nesterov": True}},
        {"optim": [1, 2]},
        {"model": {"several": "x"}},
        {"seed": None},
        {"seed": {}},
        {"model": {"several": 3}},
        {"optim": {"rates": [1]}},
    ],
    ids=str,
)
def test_a_saved_configuration_that_does_not_fit_is_told(change: dict[str, Any]) -> None:
    """Of another version, or edited by hand."""
    with pytest.raises(UserError):
        from_dict(Outer, {**to_dict(CONFIG), **change})


def test_a_saved_configuration_that_lacks_a_name_is_told() -> None:
    saved = to_dict(CONFIG)
    del saved["preset"]
    with pytest.raises(UserError, match="preset"):
        from_dict(Outer, saved)


def test_a_large_seed_is_kept_to_the_digit() -> None:
    """Read through a float, 2^53 + 1 would become 2^53: another run than the one asked for."""
    number = 2**53 + 1
    assert with_field(CONFIG, "seed", str(number)).seed == number


def test_defaults_have_no_budget_and_pass_their_own_checks() -> None:
    assert (TrainConfig().minutes, TrainConfig().steps, TrainConfig().pictures) == (None,) * 3
    assert OptimConfig().rates == {} and OptimConfig().rates is not OptimConfig().rates


def test_nearest() -> None:
    assert nearest("ddmp", ["ddpm", "dit", "clip"]) == "did you mean 'ddpm'?"
    assert nearest("zzz", ["b", "a"]) == "there is: a, b"
    assert nearest("a.steps", ["train.steps", "other"]) == "did you mean 'train.steps'?"
