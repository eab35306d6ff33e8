"""The command line: `lineage` and `python -m lineage`.

Exit codes: 0 done, 1 a check did not hold, 2 the user's input or environment is at fault (one
sentence on standard error), 130 interrupted. With `--json`, standard output holds one JSON document
and nothing else.

Answers in text need no PyTorch, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lineage import __version__
from lineage.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from lineage.system import System


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = _parser().parse_args(
            _known_command(sys.argv[1:] if arguments is None else arguments)
        )
        command: Callable[[argparse.Namespace], int | None] = options.command
        return command(options) or 0
    except UserError as error:
        print(f"lineage: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lineage: interrupted; what was saved before is whole.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lineage list | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"lineage: {error.strerror or error}:{where}.", file=sys.stderr)
        return 2


# --- the commands ----------------------------------------------------------


def _list(options: argparse.Namespace) -> None:
    from lineage import catalog

    if options.json:
        _print_json(catalog.as_json())
    else:
        print(catalog.as_tree() if options.tree else catalog.as_table())


def _data_show(options: argparse.Namespace) -> None:
    from lineage.data import load_dataset
    from lineage.data.tools import contact_sheet
    from lineage.runs import save_picture

    dataset = load_dataset(options.spec, options.split, options.size, options.seed)
    out = Path(options.out)
    save_picture(contact_sheet(dataset, options.count, options.columns), out)
    print(
        f"{out}: {min(options.count, len(dataset))} of {len(dataset):,} pictures of {options.spec}"
    )


def _data_check(options: argparse.Namespace) -> None:
    from lineage.data.tools import check

    report = check(options.spec, options.size)
    if options.json:
        _print_json(report)
    else:
        print(f"{options.spec}: {report['loaded']:,} pictures, {report['captions']:,} captions")
        for skipped in report["skipped"]:
            print(f"  left out {skipped['path']}: {skipped['reason']}")
    if not report["loaded"]:
        raise UserError(f"{options.spec} holds no picture with a caption that can be read.")


def _data_export(options: argparse.Namespace) -> None:
    from lineage.data import load_dataset
    from lineage.data.tools import export

    dataset = load_dataset(options.spec, options.split, options.size, options.seed)
    written = export(dataset, Path(options.out), options.count)
    print(f"{options.out}: {written:,} pictures in imagefolder form")


def _train(options: argparse.Namespace) -> None:
    from lineage.runs import train

    arguments = _run_arguments(options)
    folder = train(options.key, out=options.out, resume=options.resume, **arguments)
    print(f'{folder}: trained; draw with: lineage sample {folder} "a caption"')


def _sample(options: argparse.Namespace) -> None:
    from lineage.data.contract import to_bytes
    from lineage.runs import load, save_picture
    from lineage.sheets import picture, rows_sheet, sheet

    system = load(options.run, options.device)
    captions = [caption for caption in options.captions for _ in range(options.count)]
    unknown = system.text.unknown(options.captions)
    if unknown:
        print(f"lineage: not seen in training: {', '.join(unknown)}", file=sys.stderr)
    out, knobs = Path(options.out), system.typed_knobs(_settings(options.set))
    _agreeing(options)
    if options.inside:
        rows = system.inside(captions[0], seed=options.seed)
        if not rows:
            raise UserError(f"{options.run}: this system has no inside to show.")
        drawn = [[(name, to_bytes(image).cpu()) for name, image in row] for row in rows]
        save_picture(rows_sheet(drawn), out)
        print(out)
        return
    images = _drawn(options, system, captions, knobs)
    if options.single:
        paths = [
            out.with_name(f"{out.stem}_{i:03d}{out.suffix or '.png'}") for i in range(len(images))
        ]
        for image, path in zip(images, paths, strict=True):
            save_picture(picture(image), path)
        print("\n".join(map(str, paths)))
    else:
        columns = options.count if options.count > 1 else 8
        save_picture(sheet(list(images), captions, columns), out)
        print(out)


def _agreeing(options: argparse.Namespace) -> None:
    """Raises `UserError` for options of `sample` of which one would be passed over in silence."""
    several = (options.best_of or 1) > 1
    if options.inside and (
        options.set or options.single or options.count > 1 or options.init or several
    ):
        raise UserError("--inside shows one picture and takes no other option but --seed.")
    if options.init and several:
        raise UserError("--init goes on with one picture: leave out --best-of.")
    for name in ("keep", "mask", "strength"):
        if getattr(options, name) is not None and not options.init:
            raise UserError(f"--{name} says what to do with the picture that --init names.")
    if options.keep is not None and (options.mask or options.strength is not None):
        raise UserError("--keep completes a picture, --mask and --strength change it: choose one.")
    if options.scorer is not None and options.best_of is None:
        raise UserError("--scorer chooses among several: add --best-of 8.")


def _drawn(
    options: argparse.Namespace, system: System, captions: list[str], knobs: dict[str, Any]
) -> Tensor:
    """Pictures (B, 3, S, S) uint8 of captions, as the options of `sample` ask for them."""
    from lineage.data.contract import to_bytes

    if options.init:
        begun = _given_picture(Path(options.init), Path(options.run))
        begun = begun.expand(len(captions), -1, -1, -1)
        changed = options.mask or options.strength is not None
        if changed or (options.keep is None and system.begun == "edit"):
            mask = None
            if options.mask:  # white is to be painted anew
                given = _given_picture(Path(options.mask), Path(options.run))
                mask = (given.mean(1, keepdim=True) > 0).expand(len(captions), -1, -1, -1)
            how = {"mask": mask, "strength": options.strength, "seed": options.seed}
            return to_bytes(system.edit(captions, begun, **how, **knobs)).cpu()
        keep = 0.5 if options.keep is None else options.keep
        images = system.complete(captions, begun, keep=keep, seed=options.seed, **knobs)
        return to_bytes(images).cpu()
    if (options.best_of or 1) > 1:
        from lineage.evaluation.best import best_of, scorer_of_run

        name = "auto" if options.scorer is None else options.scorer
        scorer = scorer_of_run(name, Path(options.run), system.device)
        return best_of(system, captions, scorer, options.best_of, seed=options.seed, **knobs)[0]
    return to_bytes(system.generate(captions, seed=options.seed, **knobs)).cpu()


def _given_picture(path: Path, run: Path) -> Tensor:
    """A picture file as (1, 3, S, S) in [-1, 1], at the size of the run."""
    import torch

    from lineage.data.contract import to_unit
    from lineage.data.pictures import decode
    from lineage.runs import read_config

    try:
        pixels = decode(path, read_config(run).size)
    except FileNotFoundError:
        raise UserError(f"There is no picture {path}.") from None
    except Exception as error:  # Pillow raises a dozen kinds for files that are broken or foreign
        raise UserError(f"{path} is no picture that can be read ({error}).") from error
    return to_unit(torch.from_numpy(pixels.copy()))[None]


def _evaluate(options: argparse.Namespace) -> None:
    from lineage.evaluation.run import evaluate
    from lineage.evaluation.table import tables

    names = ("data", "pictures", "seed", "prompts", "features", "scorer", "device", "batch", "out")
    document = evaluate(options.runs, **{name: getattr(options, name) for name in names})
    if options.json:
        _print_json(document)
    else:
        print(tables(document))


def _compare(options: argparse.Namespace) -> None:
    from lineage.comparison.run import compare

    arguments = _run_arguments(options)
    report = compare(options.keys, out=options.out, pictures=options.pictures, **arguments)
    print(report)


def _verify(options: argparse.Namespace) -> int:
    from lineage.official.verify import run

    return run(options.files, json_output=options.json)


def _import_weights(options: argparse.Namespace) -> None:
    from lineage.official.importing import import_weights

    note = import_weights(options.key, options.files, options.out)
    if note:
        print(f"lineage: {note}", file=sys.stderr)
    print(options.out)


# --- parsing ---------------------------------------------------------------


def _run_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What `train` and `compare` have in common; see `_run_options`."""
    names = ("data", "preset", "minutes", "steps", "seed", "device")
    return {name: getattr(options, name) for name in names} | {"settings": _settings(options.set)}


def _settings(given: list[str]) -> dict[str, str]:
    """`["a.b=v", ...]` -> `{"a.b": "v"}`."""
    settings = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UserError(f"--set {item!r} should read name=value, as in --set optim.lr=3e-4.")
        settings[name] = value
    return settings


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


_COMMANDS = ("list", "data", "train", "sample", "evaluate", "compare", "verify", "import-weights")


def _known_command(arguments: Sequence[str]) -> Sequence[str]:
    """Suggests the nearest command for a mistyped one; argparse would print them all."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        raise UserError(f"There is no command {arguments[0]!r}: {nearest(arguments[0], _COMMANDS)}")
    return arguments


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _parser() -> Parser:
    parser = Parser(
        prog="lineage",
        description="The history of text-to-image generation, from scratch: "
        "train every milestone on the same captions.",
    )
    parser.add_argument("--version", action="version", version=f"lineage {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(
        name: str, run: Callable[[argparse.Namespace], Any], text: str, to: Any = commands
    ) -> Parser:
        command: Parser = to.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        return command

    command = add("list", _list, "the systems of the history, and which of them work")
    command.add_argument("--tree", action="store_true", help="by what builds on what")
    command.add_argument("--json", action="store_true")

    data = commands.add_parser(
        "data", help="look at a data set, check it, write it", description="Data sets."
    )
    actions = data.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    show = add("show", _data_show, "draw a contact sheet with captions", actions)
    show.add_argument("--out", default="data.png", help="the picture to write (data.png)")
    show.add_argument("--count", type=_number, default=24, help="pictures (24)")
    show.add_argument("--columns", type=_number, default=6, help="pictures in a row (6)")
    check = add(
        "check", _data_check, "count, and name every rejected file with its reason", actions
    )
    check.add_argument("--json", action="store_true")
    export = add("export", _data_export, "write any data set as an imagefolder", actions)
    export.add_argument("--out", required=True, help="the folder to write")
    export.add_argument("--count", type=_number, help="at most so many pictures")
    for command in (show, check, export):
        command.add_argument(
            "spec", help="shapes, shapes:hard, a path, folder:PATH, imagefolder:PATH"
        )
        command.add_argument(
            "--size", type=_number, default=32, help="side of the pictures in pixels (32)"
        )
    for command in (show, export):
        command.add_argument(
            "--split", default="train", help="train, validation, test, ... (train)"
        )
        command.add_argument("--seed", type=int, default=0)

    command = add("train", _train, "train all stages of a system")
    command.add_argument("key", help="the system, as in `lineage list`")
    command.add_argument("--out", help="the run folder (runs/KEY)")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    _run_options(command)

    command = add("sample", _sample, "draw captions with a trained system")
    command.add_argument("run", help="a run folder", metavar="RUN")
    command.add_argument("captions", nargs="+", metavar="CAPTION")
    command.add_argument("--out", default="sample.png", help="the sheet to write (sample.png)")
    command.add_argument("--count", type=_number, default=1, help="pictures of each caption (1)")
    command.add_argument(
        "--single", action="store_true", help="one file a picture, without caption"
    )
    command.add_argument(
        "--inside",
        action="store_true",
        help="show what happens on the way to the first caption's picture, such as attention",
    )
    command.add_argument(
        "--init",
        metavar="PICTURE",
        help="start from a picture: go on with its upper part, or edit it",
    )
    command.add_argument(
        "--mask", metavar="MASK", help="a picture as large as --init, white where to paint anew"
    )
    command.add_argument(
        "--strength", type=float, help="how far to leave --init, to 1 (0.6; with --mask 1)"
    )
    command.add_argument(
        "--keep", type=float, help="share of --init that is given, from above (0.5)"
    )
    command.add_argument(
        "--best-of", type=_number, help="draw so many for each and keep the best (1)"
    )
    command.add_argument(
        "--scorer", help="who chooses of --best-of: hub:MODEL, damsm:RUN or auto (auto)"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="auto")
    command.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="as in guidance=3"
    )

    command = add("evaluate", _evaluate, "score runs: composition, quality, text fit, cost")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders of the same data")
    command.add_argument("--json", action="store_true")
    command.add_argument("--out", help="a folder for scores.json and sheets of failed pictures")
    command.add_argument("--pictures", type=_number, default=1000, help="to draw, at most (1000)")
    command.add_argument("--data", help="another data set than the runs' own")
    command.add_argument("--prompts", metavar="FILE", help="prompts in GenEval's line schema")
    command.add_argument(
        "--features", default="auto", help="judge, scorer, inception:FILE or auto (auto)"
    )
    command.add_argument(
        "--scorer",
        default="auto",
        help="hub:MODEL (a path or an id), damsm:RUN, none or auto (auto)",
    )
    command.add_argument("--batch", type=_number, help="pictures drawn at once; changes no score")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="auto")

    command = add(
        "compare", _compare, "train several systems on one budget each and write a report"
    )
    command.add_argument("keys", nargs="*", metavar="KEY", help="the systems (all that work)")
    command.add_argument("--out", default="runs/compare", help="the folder to write (runs/compare)")
    command.add_argument(
        "--pictures", type=_number, default=1000, help="to draw for the scores, at most (1000)"
    )
    _run_options(command)

    command = add("verify", _verify, "check our classes against numbers of the official code")
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--json", action="store_true")

    command = add("import-weights", _import_weights, "turn a published checkpoint into a run")
    command.add_argument("key", metavar="KEY", help="the system, as in `lineage list`")
    files = "the published .pth, .pt or .safetensors; attngan also takes a .txt of words"
    command.add_argument("files", nargs="+", metavar="FILE", help=files)
    command.add_argument("--out", required=True, help="the run folder to write")
    return parser


def _run_options(command: Parser) -> None:
    command.add_argument("--data", help="a data set (shapes)")
    command.add_argument("--preset", default="tiny", help="smoke, tiny, small or paper (tiny)")
    command.add_argument(
        "--minutes", type=float, help="budget of each system in minutes of training"
    )
    command.add_argument("--steps", type=int, help="budget in steps")
    command.add_argument("--seed", type=int)
    command.add_argument("--device", help="cpu, cuda, mps or auto (auto)")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="as in optim.lr=3e-4"
    )
