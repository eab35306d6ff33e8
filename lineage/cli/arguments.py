"""Types of the commands' parameters, and faults of the command line in one sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import (
    App,
    Argument,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    Token,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from lineage import catalog
from lineage.errors import UserError, nearest

# --- types ----------------------------------------------------------------------------------------


def _typed(hint: str) -> Parameter:
    """A parameter that is checked as a configuration's field of type `hint` is."""

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        from lineage import config  # imports pydantic, which takes longer than `lineage list`

        return config.typed(getattr(config, hint), tokens[0].value, tokens[0].keyword or "")

    return Parameter(converter=convert)


def _pairs(flag: str, example: str) -> Parameter:
    """A parameter that is repeated: `["a.b=v", ...]` -> `{"a.b": "v"}`."""

    def convert(_: Any, tokens: Sequence[Token]) -> dict[str, str]:
        pairs = {}
        for token in tokens:
            name, equals, value = token.value.partition("=")
            if not equals or not name:
                raise UserError(f"{flag} {token.value!r} should read {example}.")
            pairs[name] = value
        return pairs

    return Parameter(name=flag, converter=convert)


Whole = Annotated[int, _typed("Int")]
Count = Annotated[int, _typed("PositiveInt")]
Minutes = Annotated[float, _typed("PositiveFloat")]
Flag = Annotated[bool, Parameter(show_default=False)]
if TYPE_CHECKING:
    Key = str
    Keys = list[str]
    Preset = str
    Settings = dict[str, str]
    Stages = dict[str, str]
else:
    Settings = Annotated[list[str], _pairs("--set", "name=value, as in --set optim.lr=3e-4")]
    Stages = Annotated[list[str], _pairs("--from", "STAGE=RUN, as in --from codec=runs/vqvae")]
    # What the shell completes; a command refuses other text itself, and says more than cyclopts.
    _key = Literal[tuple(catalog.working())]
    _text = Parameter(converter=lambda _, tokens: tokens[0].value)
    _texts = Parameter(converter=lambda _, tokens: [token.value for token in tokens])
    Key = Annotated[_key, _text, Parameter(show_choices=False)]
    Keys = Annotated[list[_key], _texts, Parameter(show_choices=False)]
    Preset = Annotated[Literal[catalog.PRESETS], _text]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# --- faults ---------------------------------------------------------------------------------------


def sentence(error: CycloptsError) -> str:
    """A fault of the command line in one sentence."""
    name = " ".join(error.command_chain or ())
    see = f"see lineage {name} --help."
    match error:
        case UnknownCommandError(unused_tokens=[token, *_], app=App() as place):
            return f"There is no command {token!r}: {nearest(token, commands(place, token))}"
        case UnknownOptionError(token=token):
            option = (token.keyword or token.value).partition("=")[0]
            names = [name for argument in error.argument_collection for name in argument.names]
            known = [name for name in names if name.startswith("-")]
            return f"{name} has no option {option}: {nearest(option, known)}"
        case MissingArgumentError(keyword=str() as option):
            return f"{option} needs a value; {see}"
        case MissingArgumentError(argument=Argument() as argument):
            return f"{name} needs {argument.name}; {see}"
        case UnusedCliTokensError(unused_tokens=[token, *_]):
            return f"{name} has no place for {token!r}; {see}"
    return f"{str(error).rstrip('.')}; {see}"


def commands(place: App, token: str = "") -> list[str]:
    """Names of commands, or of flags such as --help if `token` is written like one."""
    return [name for name in place if name.startswith("-") == token.startswith("-")]
