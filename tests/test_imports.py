"""Which part may import which, read from the files themselves, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lineage
from lineage.catalog import FAMILIES

PACKAGE = Path(lineage.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LINES = 450

BASE = {"errors", "characters"}  # import nothing of ours
FILES_TOO = BASE | {"files"}
CONTRACTS = {"errors", "bounds", "config", "system", "data.contract", "text.contract", "nn"}
"""Modules that a family may import beside its own."""

MAY = {
    "errors": {"characters"},
    "characters": set(),
    "files": BASE,
    "cache": FILES_TOO,
    "units": set(),
    "pretrained": FILES_TOO | {"catalog"},
    "bounds": set(),
    "config": BASE | {"bounds"},
    "catalog": BASE,
    "fonts": BASE,
    "sheets": FILES_TOO | {"fonts"},
    "system": {
        "bounds",
        "config",
        "errors",
        "data.contract",
        "nn.noise",
        "text.contract",
        "threads",
    },
    "cores": set(),
    "threads": BASE | {"cores"},
    "weights": FILES_TOO,
    "nn": BASE | {"bounds", "config", "weights"},
    "data": FILES_TOO | {"cache", "bounds", "config", "threads"},
    "text": FILES_TOO | {"nn", "bounds", "config", "weights"},
    "training": FILES_TOO
    | {"cache", "bounds", "config", "system", "data.contract", "nn", "text.contract", "threads"},
    **dict.fromkeys(FAMILIES, CONTRACTS),
}
"""For each part, the modules or packages of ours that it may import beside its own. Parts that are
not listed (recipes, evaluation, comparison, official, runs, cli) sit on top."""


EXTRA = {
    "data.tools": {"sheets"},  # it draws contact sheets
    "data.cleaning_output": {"sheets"},  # its page shows pictures
    "clip.clip": {"text.opposites"},  # of words of place
}
LONG = {"catalog"}  # a table, not a program


def name_of(path: Path) -> str:
    """`lineage/data/shapes.py` -> `data.shapes`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it, as `data.contract`."""
    package = name_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = ["lineage", *package][: len(package) + 2 - node.level]
                module = ".".join([*base, *filter(None, [module])])
            below = [f"{module}.{alias.name}" for alias in node.names]
            inner = {b for b in below if is_module(b)}
            modules |= inner
            if len(inner) < len(below):
                modules.add(module)
    return {m.removeprefix("lineage.") for m in modules if m.startswith("lineage.")}


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def allowed(module: str, may: set[str]) -> bool:
    return any(module == m or module.startswith(f"{m}.") for m in may)


def part_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_part_imports_only_its_own_and_the_contracts(path: Path) -> None:
    """A family that reaches into another cannot be read alone, nor changed alone."""
    part = part_of(name_of(path))
    if part in MAY:
        may = MAY[part] | {part} | EXTRA.get(name_of(path), set())
        foreign = {m for m in imported(path) if not allowed(m, may)}
        assert not foreign, f"{name_of(path)} imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_recipes_join_families(path: Path) -> None:
    """Everything else takes a system, a codec or a scorer as an argument. (`official` maps the
    published weights of each, and `course` checks exercises about each, so they name them too.)"""
    part = part_of(name_of(path))
    known = {part_of(m) for m in imported(path)} & set(FAMILIES)
    if part not in ("recipes", "official", "course", *FAMILIES):
        assert not known, f"{name_of(path)} imports {', '.join(sorted(known))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_the_command_line(path: Path) -> None:
    if part_of(name_of(path)) not in ("__main__", "cli"):
        assert not any(part_of(m) == "cli" for m in imported(path))


def test_every_way_of_importing_is_read(tmp_path: Path) -> None:
    """A rule that misses an import is no rule."""
    path = PACKAGE / "cgan" / "made_up.py"
    source = tmp_path / "made_up.py"
    source.write_text(
        "import lineage.training.loop\n"
        "from lineage import runs\n"
        "from lineage.data import contract, load_dataset\n"
        "def f():\n    from lineage.diffusion.networks.unet import UNet\n"
        "import torch\n"
    )

    class Elsewhere(type(path)):  # type: ignore[misc]
        """A path in the package with the content of another file."""

        def read_text(self, *arguments: object, **keywords: object) -> str:
            return source.read_text()

    modules = imported(Elsewhere(path))
    assert modules == {"training.loop", "runs", "data.contract", "data", "diffusion.networks.unet"}
    foreign = {m for m in modules if not allowed(m, MAY["cgan"] | {"cgan"})}
    assert foreign == modules - {"data.contract"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES or name_of(path) in LONG, f"{name_of(path)} has {lines} lines"


def test_every_part_has_rules() -> None:
    """A new package must be given its rules."""
    top = {
        "",
        "__main__",
        "cli",
        "plan",
        "options",
        "resume",
        "runs",
        "stepping",
        "model_inputs",
        "text_runs",
        "notes",
        "search",
        "course",
        "recipes",
        "evaluation",
        "comparison",
        "official",
    }
    assert {part_of(name_of(path)) for path in FILES} - top <= set(MAY)
