"""The command line: `lineage` and `python -m lineage`.

    arguments   types of parameters, and faults in one sentence
    imports     import of PyTorch without the collector
    data        `lineage data show`, `check`, `export`
    train       `lineage train`
    sample      `lineage sample`; drawing, prompt_drawing: its parts that need PyTorch
    search      `lineage search`
    web         `lineage app`
    score       `lineage evaluate`, `prompts`, `compare`
    official    `lineage verify`, `import-weights`, `export-adapter`
    course      `lineage grade`, `course`

A command is a function. Its signature is what the command takes, its docstring is the command's
help; cyclopts reads both. PyTorch is imported only when a command that needs it runs, so that
`lineage list` and help answer at once.

Exit codes: 0 done, 1 a check did not hold, 2 the user's input or environment is at fault (one
sentence on standard error), 130 interrupted. With `--json`, standard output holds one JSON document
and nothing else.
"""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Literal

from cyclopts import App, CycloptsError, Group, Parameter

from lineage import __version__, catalog
from lineage.characters import OutputError, plain, protect
from lineage.cli import course, data, official, sample, score, search, train, web
from lineage.cli.arguments import Flag, commands, print_json, sentence
from lineage.errors import UserError, say

SEE = Group("See", sort_key=0)
TRAIN = Group("Train and draw", sort_key=2)
SCORE = Group("Score", sort_key=3)
OFFICIAL = Group("Official code and weights", sort_key=4)
TEACH = Group("Teach", sort_key=5)
HELP = Group("Help", sort_key=6)

app = App(
    "lineage",
    help="The history of text-to-image generation, from scratch: train every milestone on the "
    "same captions.",
    version=f"lineage {__version__}",
    help_format="plaintext",
    group_commands=HELP,
    default_parameter=Parameter(negative=()),
)


def main(arguments: Sequence[str] | None = None, tell: Callable[[object], None] = say) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: The command line; that of the process if None.
        tell: Function that tells the user the sentence about a fault.
    """
    code = 0
    with protect():
        try:
            code = _run(sys.argv[1:] if arguments is None else list(arguments), tell)
            sys.stdout.flush()  # a reader that has gone is noticed here and not when Python ends
        except OutputError as error:
            if not error.unread:
                say(f"Standard output cannot be written ({error}): send it to another file.")
                return 2
    return code


def _run(arguments: list[str], tell: Callable[[object], None]) -> int:
    """Run one command and say what went wrong; returns the exit code."""
    try:
        _let_signals_interrupt()
        command, bound = _parse(arguments)
        return command(*bound.args, **bound.kwargs) or 0
    except UserError as error:
        tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; what was saved before is whole.")
        return 130
    except (MemoryError, RuntimeError) as error:  # of PyTorch, for tensors that do not fit
        if not _is_lack_of_memory(error):
            raise
        tell("There is not enough memory: lower the batch (--set train.batch_size) or a size.")
        return 2
    except SystemExit as end:  # of --help and --version
        return int(end.code or 0)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        tell(f"{error.strerror or error}{where}.")
        return 2


def _is_lack_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def _let_signals_interrupt() -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, unless they are ignored or handled."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)


def _parse(arguments: list[str]) -> tuple[Callable[..., int | None], inspect.BoundArguments]:
    """The command's function and its arguments."""
    try:
        chain, apps, rest = app.parse_commands(arguments)
        if not rest and apps[-1].default_command is None:  # `lineage` or `lineage data` alone
            names = ", ".join(commands(apps[-1]))
            raise UserError(f"{' '.join(['lineage', *chain])} needs one of the commands {names}.")
        command, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise UserError(sentence(error)) from None
    return command, bound


@app.command(name="list", group=SEE)
def list_(*, tree: Flag = False, json: Flag = False) -> None:
    """List the systems of the history, and which of them work.

    Args:
        tree: If true, sort by what builds on what.
        json: If true, print one JSON document.
    """
    if json:
        print_json(catalog.as_json())
    else:
        print(catalog.as_tree() if tree else catalog.as_table())


app.command(data.data)
app.command(train.train, group=TRAIN, sort_key=0)
app.command(sample.sample, group=TRAIN, sort_key=1)
app.command(search.search, group=TRAIN, sort_key=2)
app.command(web.app, group=TRAIN, sort_key=3)
app.command(score.evaluate, group=SCORE, sort_key=0)
app.command(score.prompts, group=SCORE, sort_key=1)
app.command(score.compare, group=SCORE, sort_key=2)
app.command(official.verify, group=OFFICIAL, sort_key=0)
app.command(official.import_weights, group=OFFICIAL, sort_key=1)
app.command(official.export_adapter, group=OFFICIAL, sort_key=2)
app.command(course.grade, group=TEACH, sort_key=0)
app.command(course.course, group=TEACH, sort_key=1)


@app.command(name="--install-completion")
def install_completion(*, shell: Literal["bash", "zsh", "fish"] | None = None) -> None:
    """Let the shell complete commands, options, keys and presets.

    Args:
        shell: Shell to write for; the one that runs if left out.
    """
    from cyclopts.completion import ShellDetectionError

    try:
        path = app.install_completion(shell=shell)
    except ShellDetectionError:
        raise UserError("The shell is not known: add --shell bash, zsh or fish.") from None
    print(f"{plain(path)}: written; it works in new shells")
