"""Configurations: frozen dataclasses with bounds, reachable by dotted names, saved as JSON.

configuration   the decorator: keywords only, every value checked by pydantic, each error
                in one sentence
RunConfig       what every run has; a recipe extends it with `model`, its system's configuration
with_field      a copy with one field changed by its dotted name, as `--set a.b=value` does
to_dict, from_dict   plain JSON values and back, as a run folder's `config.json` holds them
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from lineage.bounds import (
    Depth,
    DepthFromZero,
    Dim,
    DimFromZero,
    Floats,
    Fraction,
    Minutes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Side,
    Steps,
)
from lineage.errors import UserError, nearest

MAX_TEXT = 1000
"""Largest number of characters of a setting."""

C = TypeVar("C")
R = TypeVar("R", bound="RunConfig")
T = TypeVar("T")


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    field_specifiers=(dataclasses.field, dataclasses.Field),
)
def configuration(cls: type[C]) -> type[C]:
    """Make `cls` a frozen dataclass that is built with keywords only and checks every value.

    Bounds are part of the annotations (`PositiveInt`, `Literal["log", "hinge"]`); what concerns
    several fields is checked in `__post_init__`, which raises `UserError`.

    Raises (when built):
        UserError: a value is of the wrong type or out of bounds, or a name is unknown; one sentence
            names it.
    """
    checks = ConfigDict(extra="forbid", allow_inf_nan=False)
    built: Any = pydantic_dataclass(frozen=True, kw_only=True, config=checks)(cls)
    checked_init = built.__init__

    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            checked_init(self, **values)
        except ValidationError as error:
            raise UserError(sentence(error, built)) from None

    __init__.__wrapped__ = checked_init  # type: ignore[attr-defined]
    built.__init__ = __init__
    return typing.cast(type[C], built)


def sentence(error: ValidationError, hint: Any, at: str = "") -> str:
    """The first fault of a validation in one sentence, under its dotted name below `at`."""
    fault = error.errors(include_url=False)[0]
    places = [str(place) for place in fault["loc"] if "[" not in str(place)]
    name = ".".join([*filter(None, [at]), *places])
    value, kind, bounds = fault["input"], fault["type"], fault.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"The configuration has no field {name!r}: {nearest(name, _names(hint, at))}"
    if kind in ("missing", "missing_keyword_only_argument"):
        return f"The configuration lacks the field {name!r}."
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(bounds["expected"]))
        return f"{name}={value!r} is not possible: {nearest(str(value), known)}"
    for key, words in _BOUNDS.items():
        if key in bounds:
            bound = bounds[key]
            shown = bound if isinstance(bound, int) else f"{bound:g}"
            return f"{name}={_shown(value, str)} must be {words} {shown}."
    if kind in ("too_short", "too_long"):
        least, most = bounds.get("min_length"), bounds.get("max_length")
        words = f"{least} or more" if most is None else f"at most {most}"
        return f"{name}={_shown(value)} must have {words} entries."
    for part, words in _KINDS.items():
        if kind.startswith(part):
            return f"{name}={_shown(value)} should be {words}."
    return f"{name}={_shown(value)}: {fault['msg'].removeprefix('Value error, ')}."


def _shown(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A value as text, cut if it is long."""
    try:
        text = write(value)
    except ValueError:  # Python refuses to write a number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


_BOUNDS = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most"}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "value_error": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list, as in 1,2,3",
    "dict": "a group of settings, as in NAME.KEY=VALUE",
    "dataclass": "a group of settings",
}


def _names(hint: Any, at: str) -> list[str]:
    """Every field's dotted name, as far as types tell."""
    if not dataclasses.is_dataclass(hint):
        return []
    hints = typing.get_type_hints(hint)
    names = []
    for one in dataclasses.fields(hint):
        name = f"{at}.{one.name}" if at else one.name
        names += [name, *_names(hints[one.name], name)]
    return names


# --- what every run has ---------------------------------------------------------------------------


_RUN = {"text": str, "encoder": dict, "tokenizer": dict, "hash": str}
"""Entries that `TextConfig.runs` has of each run, and their types."""


@configuration
class TextConfig:
    """Sizes of a text encoder.

    Attributes:
        tokenizer: `word` or `bpe`.
        vocab_size: Largest number of tokens of the tokeniser.
        max_words: Number of tokens after which a caption is cut.
        width: Width of the vectors of words and sentence.
        num_layers: Number of layers of the LSTM or the transformer.
        num_heads: Number of attention heads of the transformer.
        max_chars: Number of characters after which `char_cnn_rnn` cuts a caption.
        conv_channels: Number of channels of its first convolution.
        embed_dim: Width of the word vectors that the `lstm` reads; 0 is `width`.
        cell: Kind of recurrent cell of the `lstm` encoder: `lstm` or `gru`.
        dropout: Share of the word vectors' entries that are dropped in training (`lstm`).
        join: How `joined:` puts the words of its encoders together: `channels`, as SDXL, or
            `sequence`, as SD3.
        projection_dim: Width of the sentence of the `clip` encoder; 0 is `width`.
        gelu: Activation of the `clip` encoder: `quick_gelu` (OpenAI's models) or `gelu` (OpenCLIP).
        layer: Layer of a `clip` encoder whose states are the words: `last`; `penultimate`, behind
            the final norm, as in Stable Diffusion 2; or `penultimate_raw`, before it, as in SDXL.
        runs: Name, sizes and tokeniser of each run that `clip:RUN` names; filled in.
        feed_forward: Kind of the feed-forward layers of `t5`: `relu`, or `gated`, as version 1.1.
        head_dim: Width of a head of `t5`; 0 is `width` / `num_heads`.
        ff_dim: Width inside the feed-forward layers of `t5`; 0 is 4 `width` for `relu` and
            8/3 `width` for `gated`.
    """

    tokenizer: Literal["word", "bpe"] = "word"
    vocab_size: PositiveInt = 4096
    max_words: Dim = 32
    width: Dim = 128
    num_layers: Depth = 1
    num_heads: Depth = 4
    max_chars: Dim = 201
    conv_channels: Dim = 384
    embed_dim: DimFromZero = 0
    cell: Literal["lstm", "gru"] = "lstm"
    dropout: Fraction = 0.0
    join: Literal["channels", "sequence"] = "channels"
    projection_dim: DimFromZero = 0
    gelu: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer: Literal["last", "penultimate", "penultimate_raw"] = "last"
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    feed_forward: Literal["relu", "gated"] = "gated"
    head_dim: DimFromZero = 0
    ff_dim: DimFromZero = 0

    def __post_init__(self) -> None:
        smallest = 4 if self.tokenizer == "word" else 260  # special tokens, bytes, one more
        if self.vocab_size < smallest:
            raise UserError(f"encoder.vocab_size={self.vocab_size} must be at least {smallest}.")
        for name, run in self.runs.items():
            if not all(isinstance(run.get(key), kind) for key, kind in _RUN.items()):
                raise UserError(f"encoder.runs.{name} is damaged: restore it, or train again.")

    def without_files(self) -> TextConfig:
        """The same sizes, without the places where weights of runs lie."""
        runs = {
            name: {key: value for key, value in run.items() if key != "weights"}
            for name, run in self.runs.items()
        }
        return dataclasses.replace(self, runs=runs)


@configuration
class OptimConfig:
    """How each loss is minimised.

    Attributes:
        name: `adamw`, `adam`, or `muon` (Jordan 2024) for the matrices of hidden linear layers and
            `adamw` for all else.
        lr: Learning rate of every group, before warm-up and decay.
        lr_multipliers: Factor on `lr` of single groups, by name, e.g. {"discriminator": 2.0}.
        beta1, beta2: Decay of the first and second moments.
        weight_decay: Weight decay of matrices and kernels; biases and scales have none.
        warmup: Number of steps over which the rate rises from zero.
        decay: Shape of the rate over the budget: `cosine` or `linear` to zero, or `none`.
        grad_clip: Largest norm of a group's gradient; 0 clips nothing.
        ema_decay: Decay of the moving average of the weights, which is sampled from; 0 keeps none.
    """

    name: Literal["adamw", "adam", "muon"] = "adamw"
    lr: PositiveFloat = 1e-3
    lr_multipliers: dict[str, PositiveFloat] = field(default_factory=dict)
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    weight_decay: NonNegativeFloat = 0.01
    warmup: NonNegativeInt = 100
    decay: Literal["cosine", "linear", "none"] = "cosine"
    grad_clip: NonNegativeFloat = 1.0
    ema_decay: Fraction = 0.995


@configuration
class TrainConfig:
    """The budget of a run, and how the loop spends it. Where several budgets are given, the first
    to be spent ends the run.

    Attributes:
        minutes, max_steps, max_pictures, cpu_minutes, max_flops: The budget; None sets no limit.
            Minutes of the clock give fewer steps beside other processes; those of the processor,
            with one thread, hardly do. FLOPs are those of matrix products, convolutions and
            attention.
        batch_size: Number of pictures of a step, in each process of a `torchrun`.
        checkpoint_every, sample_every, log_every: Number of steps between two checkpoints, sheets
            and lines of the log; 0 for never (a finished run is always saved). Metrics are
            collected on some of the steps of a line.
        precision: `fp32`, `bf16` (autocast), or `auto`: bf16 where the machine has the instructions
            for it.
        channels_last: Memory layout of weights and pictures: `on`, `off`, or `auto`: on for CUDA.
        compile: If true, networks go through torch.compile (a minute of warm-up).
        prefetch: Number of batches prepared ahead in a thread; 0 prepares each when it is asked
            for; None is 2 for a GPU and 0 for a CPU, where a thread beside the arithmetic slows
            both.
        device: `cpu`, `cuda`, `mps`, or `auto`: the best there is.
        snapshots: Shares of the whole run's budget at which the averaged weights are saved, each in
            a run folder of its own in `snapshots/`, if the last stage is then being trained.
        count_flops: If true, the FLOPs of a step are counted for `cost.json`; a budget of them
            counts them anyway.
        text_cache: Folder that keeps the features of captions for other runs, in full precision, if
            the text encoder is frozen; empty for none.
    """

    minutes: Minutes | None = None
    max_steps: Steps | None = None
    max_pictures: Steps | None = None
    cpu_minutes: Minutes | None = None
    max_flops: PositiveFloat | None = None
    batch_size: PositiveInt = 32
    checkpoint_every: NonNegativeInt = 500
    sample_every: NonNegativeInt = 1000
    log_every: NonNegativeInt = 20
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: Literal["auto", "on", "off"] = "auto"
    compile: bool = False
    prefetch: DepthFromZero | None = None
    device: str = "auto"
    snapshots: Floats = ()
    count_flops: bool = False
    text_cache: str = ""

    def __post_init__(self) -> None:
        for share in self.snapshots:
            if not 0 < share < 1:
                raise UserError(
                    f"train.snapshots={share:g} must be a share of the budget, between 0 and 1."
                )

    @property
    def is_timed(self) -> bool:
        """Whether the number of steps depends on the machine, so that no two runs are the same."""
        return self.minutes is not None or self.cpu_minutes is not None

    @property
    def has_budget(self) -> bool:
        """Whether the run ends."""
        return self.is_timed or any((self.max_steps, self.max_pictures, self.max_flops))

    def spent(
        self, *, step: int, pictures: int, seconds: float, cpu_seconds: float, flops: float = 0.0
    ) -> float:
        """Share of the budget that is spent: 1 or more when a run is done, 0 without a budget."""
        budgets = (
            (seconds, self.minutes and 60 * self.minutes),
            (cpu_seconds, self.cpu_minutes and 60 * self.cpu_minutes),
            (step, self.max_steps),
            (pictures, self.max_pictures),
            (flops, self.max_flops),
        )
        return max(0.0, 0.0, *(amount / budget for amount, budget in budgets if budget))


@configuration
class RunConfig:
    """What every run has. Recipes add `model`.

    Attributes:
        key: Key of the system, filled in by its recipe's place.
        preset: `smoke`, `tiny`, `small` or `paper`, filled in likewise.
        data: Spec of the data set.
        size: Side of the pictures in pixels.
        seed: Seed of the weights, the order of the data and the noise.
        text: Name of the text encoder.
        encoder: Sizes of the text encoder.
    """

    key: str = ""
    preset: str = ""
    data: str = "shapes"
    size: Side = 32
    seed: Seed = 0
    text: str = "bag"
    encoder: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def without_files(self: R) -> R:
        """The same run without files to start from: a trained run's weights hold what they gave."""
        return dataclasses.replace(self, encoder=self.encoder.without_files())


# --- JSON, and dotted names -----------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[C], saved: Mapping[str, Any]) -> C:
    """The configuration that `to_dict` wrote.

    Raises:
        UserError: for an unknown name or a wrong value, under its dotted name.
    """
    return typed(cls, dict(saved))


def typed(hint: type[T] | Any, value: Any, at: str = "") -> T:
    """`value`, which may be text from the command line, as the type `hint`.

    Raises:
        UserError: it cannot be read as one; the sentence calls it `at`.
    """
    if value == "none" and type(None) in typing.get_args(hint):
        return typing.cast(T, None)
    try:
        own = None if dataclasses.is_dataclass(hint) else ConfigDict(allow_inf_nan=False)
        adapter: TypeAdapter[T] = TypeAdapter(hint, config=own)
        return adapter.validate_python(value)
    except ValidationError as error:
        raise UserError(sentence(error, hint, at)) from None


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
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(f"{path} must have at most {MAX_TEXT} characters, not {len(value)}.")
    changed, known = to_dict(config), set(field_names(config))
    if path in _PLACES and value != changed.get(path):
        raise UserError(f"{path}={_shown(value, str)} cannot be set: {_PLACES[path]}.")
    *parents, leaf = path.split(".")
    group: Any = changed
    for name in parents:
        group = group.get(name) if isinstance(group, dict) else None
    mapping = isinstance(group, dict) and _origin(type(config), parents) is dict
    if not isinstance(group, dict) or (leaf not in group and not mapping):
        raise UserError(f"There is no setting {path!r}: {nearest(path, known)}")
    if isinstance(group.get(leaf), dict) and not isinstance(value, dict):
        inner = sorted(name for name in known if name.startswith(path + "."))
        names = ", ".join(inner) or f"{path}.NAME=VALUE"
        raise UserError(f"{path!r} is a group of settings; set one of them: {names}")
    hints = () if mapping else typing.get_args(_hint_at(type(config), path.split(".")))
    group[leaf] = None if value == "none" and type(None) in hints else value
    return from_dict(type(config), changed)


_PLACES = {
    "key": "name the system in its place, as in `lineage train dit`",
    "preset": "use --preset, as in `lineage train dit --preset small`",
}
"""Fields that say where a configuration comes from, and what sets them."""


def _hint_at(cls: Any, path: list[str]) -> Any:
    """The annotation of the field at `path`."""
    for name in path:
        cls = typing.get_type_hints(cls)[name]
    return cls


def _origin(cls: Any, path: list[str]) -> Any:
    return typing.get_origin(_hint_at(cls, path))


def flat(config: Any, at: str = "") -> dict[str, Any]:
    """Every setting of a configuration, by its dotted name."""
    settings: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else to_dict(config)).items():
        nested = isinstance(value, dict) and value
        settings |= flat(value, f"{at}{name}.") if nested else {at + name: value}
    return settings


def field_names(config: Any) -> list[str]:
    """Every dotted name that `with_field` reaches."""
    return list(flat(config))
