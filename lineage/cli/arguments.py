"""Types of the commands' parameters, and faults of the command line in one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import (
    App,
    Argument,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    Token,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from lineage import catalog
from lineage.characters import holds_unicode, plain
from lineage.errors import UserError, nearest
from lineage.files import expanded
from lineage.pretrained import run_folder

# --- types ----------------------------------------------------------------------------------------


def _typed(hint: str) -> Parameter:
    """A parameter that is checked as a configuration's field of type `hint` is."""

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        from lineage import bounds, config  # their pydantic takes longer than `lineage list`

        return config.typed(getattr(bounds, hint), tokens[0].value, tokens[0].keyword or "")

    return Parameter(converter=convert)


def _path(_: Any, tokens: Sequence[Token]) -> Path:
    """A path, `~` expanded."""
    return expanded(tokens[0].value, tokens[0].keyword or "The path")


def _counts_and_folders(_: Any, tokens: Sequence[Token]) -> tuple[int | Path, ...]:
    """Whole numbers, and folders whose names are not written as numbers."""
    from lineage import bounds, config

    def one(text: str, name: str) -> int | Path:
        if bounds.is_number(text):
            return int(config.typed(bounds.PositiveInt, text, name))
        return expanded(text, name)

    return tuple(one(token.value, token.keyword or "") for token in tokens)


def _run(_: Any, tokens: Sequence[Token]) -> Path:
    """The folder of a run."""
    return run_folder(tokens[0].value, tokens[0].keyword or "The run")


Seed = Annotated[int, _typed("Seed")]
Count = Annotated[int, _typed("PositiveInt")]
SheetCount = Annotated[int, _typed("SheetCount")]
Steps = Annotated[int, _typed("Steps")]
Threads = Annotated[int, _typed("Threads")]
Port = Annotated[int, _typed("Port")]
Minutes = Annotated[float, _typed("Minutes")]
Seconds = Annotated[float, _typed("PositiveFloat")]
Flops = Annotated[float, _typed("PositiveFloat")]
PathName = Annotated[Path, Parameter(converter=_path)]
"""A file or folder."""
Pictures = Annotated[
    tuple[int | Path, ...], Parameter(converter=_counts_and_folders, show_default=False)
]
"""Numbers of pictures, and folders of them. The converter is that of the whole tuple, because
cyclopts replaces the sentences of one for elements of several types."""
RunName = Annotated[Path, Parameter(converter=_run)]
"""A run folder, or `pretrained:KEY`."""
Flag = Annotated[bool, Parameter(show_default=False)]
Settings = Annotated[list[str], Parameter(name="--set")]
Preset = Literal["smoke", "tiny", "small", "paper"]
if TYPE_CHECKING:
    Key = str
    Keys = list[str]
else:  # the shell completes one that works; `catalog.lookup` refuses others in better sentences
    Key = Annotated[Literal[tuple(catalog.working())] | str, Parameter(show_choices=False)]
    Keys = Annotated[list[Key], Parameter(show_choices=False)]


def pairs(items: Sequence[str] | None, should: str) -> dict[str, str]:
    """`["a.b=v", ...]` -> `{"a.b": "v"}`; `should` says how an item should read."""
    values = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UserError(f"{item!r} should read {should}.")
        values[name] = value
    return values


def settings_of(items: Sequence[str] | None) -> dict[str, str]:
    """The values of --set by name."""
    return pairs(items, "name=value, as in --set optim.lr=3e-4")


def print_json(value: Any) -> None:
    """Print one JSON document: `\\u` escapes for characters that the terminal would not show, null
    for numbers that JSON does not have (NaN, infinity).
    """
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2, ensure_ascii=not holds_unicode(sys.stdout))
    print("".join(c if c == "\n" or plain(c) == c else json.dumps(c)[1:-1] for c in text))


# --- faults ---------------------------------------------------------------------------------------


def sentence(error: CycloptsError) -> str:
    """A fault of the command line in one sentence."""
    name = " ".join(error.command_chain or ())
    see = f"see {f'lineage {name}'.strip()} --help."
    match error:
        case UnknownCommandError(unused_tokens=[token, *_], app=App() as place):
            return f"There is no command {token!r}: {nearest(token, commands(place, token))}"
        case UnknownOptionError(token=token):
            option = (token.keyword or token.value).partition("=")[0]
            names = [name for argument in error.argument_collection for name in argument.names]
            known = [name for name in names if name.startswith("-")]
            return f"{name} has no option {option}: {nearest(option, known)}"
        case CoercionError(token=Token(value=value), argument=Argument() as argument) if (
            choices := argument.get_choices(force=True)
        ):
            return f"{argument.name}={value!r} is not possible: {nearest(value, choices)}"
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
