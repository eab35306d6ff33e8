"""Controls of a system's options, and the options that their values stand for.

A control is made from an option's type, default and sentence. An option whose control is left as it
was is not passed, so that the system's own default holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from lineage.comparison.app_runs import AppRun
from lineage.errors import UserError
from lineage.system import PICTURE_OPTIONS, Option

Kind = Literal["choice", "flag", "slider", "number", "text"]

MAX_NUMBER = 1000  # such as a number of steps, which decides how long a drawing takes
MAX_TEXT = 500  # letters of a caption
LARGEST = 1e37  # beyond are bounds of float32, which no reader wants to see
WITH_IMAGE = ("strength", "keep")
"""Options that need an image to start from; they have their own controls."""
UNSET = "as the run has it"
"""Choice that leaves an option out."""


@dataclass(frozen=True)
class Control:
    """One control.

    Attributes:
        name: Name of the option.
        kind: `choice` of some texts, `flag`, `slider` for numbers between two near bounds, `number`
            for others (written as text, so that it can be empty), or `text`.
        value: What the control shows at first; an empty text where the option is not set.
        help: What the option does, its default and its bounds.
        choices: Texts of a `choice`.
        minimum, maximum, step: Numbers of a `slider`.
    """

    name: str
    kind: Kind
    value: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float = 0.0
    maximum: float = 1.0
    step: float = 0.05


def controls_of(run: AppRun) -> list[Control]:
    """Controls of all options of a run that are no pictures and need none."""
    left_out = (*PICTURE_OPTIONS, *WITH_IMAGE)
    options = [option for name, option in run.options.items() if name not in left_out]
    return [control_of(option, run.defaults.get(option.name)) for option in options]


def control_of(option: Option, configured: Any = None) -> Control:
    """The control of one option.

    Args:
        configured: What the run's configuration has where the default is None or empty.
    """
    unset = option.default is None or option.default in ("", ())
    default = configured if unset else option.default
    schema = _schema(option.type)
    sentence = option.sentence
    if default not in (None, "", ()):
        sentence = f"{sentence} Default: {default}.".strip()
    if "enum" in schema:
        names = tuple(name for name in schema["enum"] if name)
        return Control(option.name, "choice", UNSET, sentence, (UNSET, *names))
    if schema.get("type") == "boolean":
        return Control(option.name, "flag", bool(default), sentence)
    if schema.get("type") in ("integer", "number"):
        return _number(option.name, schema, default, sentence)
    return Control(option.name, "text", "", sentence)


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type, without the alternative None."""
    schema = TypeAdapter(hint).json_schema()
    kinds = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    return dict(kinds[0])


def _number(name: str, schema: Mapping[str, Any], default: Any, sentence: str) -> Control:
    # bounds of types with a validator of ours have pydantic's names, others have JSON schema's
    low = _bound(schema, "minimum", "ge")
    above = _bound(schema, "exclusiveMinimum", "gt")
    high = _bound(schema, "maximum", "le")
    if schema["type"] == "integer":
        high = min(high or MAX_NUMBER, MAX_NUMBER)
    elif high == 1 and 0 in (low, above) and default is not None:
        least = 0.05 if above == 0 else 0.0  # the first step keeps off a bound that is excluded
        return Control(name, "slider", float(default), sentence, minimum=least)
    words = {"at least": low, "above": above, "at most": high}
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)
    help_text = f"{sentence} {bounds[0].upper()}{bounds[1:]}." if bounds else sentence
    return Control(name, "number", "", help_text.strip())


def _bound(schema: Mapping[str, Any], *names: str) -> float | None:
    values = [schema[name] for name in names if name in schema]
    return float(values[0]) if values and abs(values[0]) < LARGEST else None


def options_from(controls: list[Control], values: Mapping[str, Any]) -> dict[str, Any]:
    """Options that somebody has set.

    Args:
        values: What the controls show now, by name.

    Raises:
        UserError: a number is too large, or a text too long. All else is checked by the system.
    """
    options: dict[str, Any] = {}
    for control in controls:
        value = values.get(control.name)
        value = value.strip() if isinstance(value, str) else value
        if value in (None, "", UNSET) or value == control.value:
            continue
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise UserError(f"{control.name} must have at most {MAX_TEXT} letters.")
        if control.kind == "number" and _as_number(value) > MAX_NUMBER:
            raise UserError(f"{control.name} must be at most {MAX_NUMBER:,} on this page.")
        options[control.name] = value
    return options


def _as_number(value: Any) -> float:
    """A value as a number; 0 if it is none, which the system then says."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
