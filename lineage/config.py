"""Configurations: frozen dataclasses, reachable by dotted names, saved as JSON.

`RunConfig` is what every run has; a recipe extends it with `model`, the configuration of its
system. Whatever a field's type is, `--set a.b=value` reaches it by name, and a run folder's
`config.json` builds it again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lineage.errors import UserError, nearest

C = TypeVar("C")
R = TypeVar("R", bound="RunConfig")


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a text encoder.

    Attributes:
        tokenizer: `word` or `bpe`.
        vocabulary: the most tokens that the tokeniser may have.
        words: captions are cut after this many tokens.
        width: D of words and sentence.
        layers: of the LSTM or the transformer.
        heads: of the transformer.
        letters: that `char_cnn_rnn` reads of a caption.
        channels: of its first convolution.
        inputs: width of the word vectors that the `lstm` reads; 0 is D.
        cell: of the `lstm`: `lstm` or `gru`.
        dropout: share of the word vectors' entries that the `lstm` does not see while it learns.
    """

    tokenizer: str = "word"
    vocabulary: int = 4096
    words: int = 32
    width: int = 128
    layers: int = 1
    heads: int = 4
    letters: int = 201
    channels: int = 384
    inputs: int = 0
    cell: str = "lstm"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        one_of("encoder.tokenizer", self.tokenizer, ("word", "bpe"))
        one_of("encoder.cell", self.cell, ("lstm", "gru"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"encoder.dropout={self.dropout} must be from 0 to below 1.")
        least = {
            "inputs": 0,
            "words": 1,
            "width": 1,
            "layers": 1,
            "heads": 1,
            "letters": 1,
            "channels": 1,
        }
        least["vocabulary"] = (
            4 if self.tokenizer == "word" else 260
        )  # special tokens, bytes, one more
        for name, value in least.items():
            at_least("encoder." + name, getattr(self, name), value)


@dataclass(frozen=True)
class OptimConfig:
    """How each loss is minimised.

    Attributes:
        name: `adamw`, `adam`, or `muon` (Jordan 2024) for the matrices of hidden linear layers and
            `adamw` for all else.
        lr: rate of every group, before warm-up and decay.
        rates: factor on `lr` for single groups, by name, e.g. {"discriminator": 2.0}.
        beta1, beta2: decay of the first and second moments.
        weight_decay: for matrices and kernels; biases and scales have none.
        warmup: steps over which the rate rises from zero.
        decay: `cosine` or `linear` to zero over the budget, or `none`.
        clip: largest norm of a group's gradient; 0 clips nothing.
        average: decay of the moving average of the weights that is sampled from; 0 keeps none.
    """

    name: str = "adamw"
    lr: float = 1e-3
    rates: dict[str, float] = field(default_factory=dict)
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    warmup: int = 100
    decay: str = "cosine"
    clip: float = 1.0
    average: float = 0.995

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, ("adamw", "adam", "muon"))
        one_of("optim.decay", self.decay, ("cosine", "linear", "none"))
        if not self.lr > 0:
            raise UserError(f"optim.lr={self.lr} must be above 0.")
        for name in ("beta1", "beta2", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"optim.{name}={getattr(self, name)} must be at least 0 and below 1."
                )
        for name in ("weight_decay", "warmup", "clip"):
            at_least("optim." + name, getattr(self, name), 0)


@dataclass(frozen=True)
class TrainConfig:
    """The budget of a run, and how the loop goes about it. Where two budgets are given, the first
    to be spent ends it.

    Attributes:
        minutes, steps, pictures: the budget; None sets no limit.
        batch: pictures a step, in each process of a `torchrun`.
        checkpoint_every, sample_every, log_every: in steps; 0 never (a finished run is always
            saved). What a line of the log says beside losses and gradients is taken of some of its
            steps.
        precision: `fp32`, `bf16` (autocast), or `auto`: bf16 where the machine has the instructions
            for it.
        channels_last: memory layout of weights and pictures: `on`, `off`, or `auto`: on for CUDA.
        compile: hand the networks to torch.compile (a minute of warm-up).
        prefetch: batches prepared ahead in a thread; 0 prepares each when it is asked for; None is
            2 for a GPU and 0 for a CPU, where a thread beside the arithmetic slows both.
        device: `cpu`, `cuda`, `mps`, or `auto`: the best there is.
    """

    minutes: float | None = None
    steps: int | None = None
    pictures: int | None = None
    batch: int = 32
    checkpoint_every: int = 500
    sample_every: int = 1000
    log_every: int = 20
    precision: str = "auto"
    channels_last: str = "auto"
    compile: bool = False
    prefetch: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("train.channels_last", self.channels_last, ("auto", "on", "off"))
        for name in ("minutes", "steps", "pictures"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"train.{name}={value} must be above 0.")
        at_least("train.batch", self.batch, 1)
        for name in ("checkpoint_every", "sample_every", "log_every", "prefetch"):
            at_least("train." + name, getattr(self, name) or 0, 0)


@dataclass(frozen=True)
class RunConfig:
    """What every run has. Recipes add `model`.

    Attributes:
        key: the system.
        preset: `smoke`, `tiny`, `small` or `paper`.
        data: spec of the data set.
        size: side of the pictures.
        seed: of the weights, the order of the data and the noise.
        text: name of the text encoder.
        encoder: its sizes.
    """

    key: str
    preset: str
    data: str = "shapes"
    size: int = 32
    seed: int = 0
    text: str = "bag"
    encoder: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        at_least("size", self.size, 4)
        at_least("seed", self.seed, 0)

    def without_files(self: R) -> R:
        """The same run without files to start from, which lie in its weights once it is trained."""
        return self


def at_least(name: str, value: float, least: float) -> None:
    """Raises `UserError` if the setting `name` is below `least`, or not a number."""
    if not value >= least:
        raise UserError(f"{name}={value} must be at least {least}.")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `UserError` if the setting `name` is none of the known values."""
    if value not in known:
        raise UserError(f"{name}={value!r} is not possible: {nearest(value, known)}")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[C], saved: dict[str, Any], at: str = "") -> C:
    """Build `cls` from what `to_dict` gave.

    Raises `UserError` for an unknown name or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    for name in saved:
        if name not in hints:
            raise UserError(f"The configuration has no field {at + name!r}: {nearest(name, hints)}")
    for field_ in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field_.default is field_.default_factory is dataclasses.MISSING
        if required and field_.name not in saved:
            raise UserError(f"The configuration lacks the field {at + field_.name!r}.")
    return cls(**{name: typed(hints[name], value, at + name) for name, value in saved.items()})


def with_field(config: C, path: str, value: Any) -> C:
    """A copy of `config` with the field at the dotted `path` set to `value`, which may be text.

    Raises:
        UserError: for a name that does not exist (the nearest ones are suggested) or a value of the
            wrong type.
    """
    together = getattr(config, f"with_{path}", None)  # one name that sets several fields
    if together is not None:
        several: C = together(str(value))
        return several
    changed = to_dict(config)
    known = set(field_names(config))
    *parents, leaf = path.split(".")
    place, hint = changed, type(config)
    for depth, name in enumerate(parents):
        place = place[name] if isinstance(place, dict) and name in place else None  # type: ignore[assignment]
        if not isinstance(place, dict):
            raise UserError(f"There is no setting {path!r}: {nearest(path, known)}")
        hint = _inner(hint, parents[depth])
    if dataclasses.is_dataclass(hint) and leaf not in place:
        raise UserError(f"There is no setting {path!r}: {nearest(path, known)}")
    if isinstance(place.get(leaf), dict) and not isinstance(value, dict):
        inside = sorted(name for name in known if name.startswith(path + "."))
        hint_text = ", ".join(inside) or f"{path}.NAME=VALUE"
        raise UserError(f"{path!r} is a group of settings; set one of them: {hint_text}")
    place[leaf] = value
    return from_dict(type(config), changed)


def field_names(config: Any, at: str = "") -> list[str]:
    """Every dotted name that `with_field` reaches."""
    names: list[str] = []
    for name, value in (config if isinstance(config, dict) else to_dict(config)).items():
        names += (
            field_names(value, f"{at}{name}.") if isinstance(value, dict) and value else [at + name]
        )
    return names


def _inner(hint: Any, name: str) -> Any:
    """The type of the field `name` of a dataclass, or of the values of a dict."""
    if dataclasses.is_dataclass(hint):
        return typing.get_type_hints(hint)[name]
    return typing.get_args(hint)[1]


def typed(hint: Any, value: Any, at: str) -> Any:
    """`value`, which may be text from the command line, as the type that `hint` asks for.

    Raises:
        UserError: if it cannot be read as one; the sentence calls it `at`.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{at}={value!r} should be a group of settings.")
        return from_dict(hint, value, at + ".")  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        if value is None or (value == "none" and type(None) in inner):
            return None
        return typed(next(h for h in inner if h is not type(None)), value, at)
    if origin is tuple:
        parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise UserError(f"{at}={value!r} should be a list, as in {at}=1,2,3.")
        return tuple(typed(inner[0], part, at) for part in parts if part != "")
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{at}={value!r} should be a group of settings, as in {at}.NAME=VALUE.")
        return {name: typed(inner[1], part, f"{at}.{name}") for name, part in value.items()}
    return _plain(hint, value, at)


def _plain(hint: Any, value: Any, at: str) -> Any:
    wrong = UserError(f"{at}={value!r} should be {_KINDS.get(hint, hint.__name__)}.")
    if hint is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return text in ("true", "yes", "on", "1")
        raise wrong
    if hint is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if hint is int and re.fullmatch(r"[+-]?\d+", str(value)):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise wrong from None
    if not math.isfinite(number) or isinstance(value, bool):
        raise wrong
    if hint is int:
        if number != int(number):
            raise wrong
        return int(number)
    return number


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
