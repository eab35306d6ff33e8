"""Who may import whom, read from the files themselves, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lineage
from lineage.catalog import FAMILIES

PACKAGE = Path(lineage.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LINES = 450

BASE = {"errors"}  # imports nothing of ours
CONTRACTS = {"errors", "config", "system", "data.contract", "text.contract", "nn"}
"""What a family may know beside itself."""

MAY = {
    "errors": set(),
    "config": BASE,
    "catalog": BASE,
    "system": {"config", "errors", "data.contract", "nn.noise", "text.contract"},
    "sheets": BASE,
    "units": set(),
    "nn": BASE,
    "data": BASE,
    "text": BASE | {"nn", "config"},
    "training": BASE | {"config", "system", "data.contract", "nn", "text.contract"},
    **dict.fromkeys(FAMILIES, CONTRACTS),
}
"""For each part, the modules or packages of ours that it may import beside itself. Parts that are
not listed (recipes, evaluation, comparison, official, runs, cli) sit on top and are held to less."""


EXTRA = {"data.tools": {"sheets"}}  # it draws contact sheets
LONG = {"catalog"}  # a table, not a program


def name_of(path: Path) -> str:
    """`lineage/data/shapes.py` -> `data.shapes`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it, as `data.contract`."""
    package = name_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = ["lineage", *package][: len(package) + 2 - node.level]
                module = ".".join([*base, *filter(None, [module])])
            below = [f"{module}.{alias.name}" for alias in node.names]
            inner = {b for b in below if is_module(b)}
            found |= inner
            if len(inner) < len(below):
                found.add(module)
    return {m.removeprefix("lineage.") for m in found if m.startswith("lineage.")}


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def allowed(module: str, may: set[str]) -> bool:
    return any(module == m or module.startswith(f"{m}.") for m in may)


def part_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_part_knows_only_what_it_may(path: Path) -> None:
    """A family that reaches into another cannot be read alone, nor changed alone."""
    part = part_of(name_of(path))
    if part in MAY:
        may = MAY[part] | {part} | EXTRA.get(name_of(path), set())
        strange = {m for m in imported(path) if not allowed(m, may)}
        assert not strange, f"{name_of(path)} imports {', '.join(sorted(strange))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_recipes_join_families(path: Path) -> None:
    """Everything else takes a system, a codec or a scorer as an argument. (`official` maps the
    published weights of each, so it names them too.)"""
    part = part_of(name_of(path))
    known = {part_of(m) for m in imported(path)} & set(FAMILIES)
    if part not in ("recipes", "official", *FAMILIES):
        assert not known, f"{name_of(path)} imports {', '.join(sorted(known))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_the_command_line(path: Path) -> None:
    if name_of(path) != "__main__":
        assert not any(part_of(m) == "cli" for m in imported(path))


def test_the_rules_would_be_seen_to_be_broken(tmp_path: Path) -> None:
    """The reader finds every way of importing; a rule that is never applied is no rule."""
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
        """Named as if it lay in the package."""

        def read_text(self, *arguments: object, **keywords: object) -> str:
            return source.read_text()

    found = imported(Elsewhere(path))
    assert found == {"training.loop", "runs", "data.contract", "data", "diffusion.unet"}
    assert {m for m in found if not allowed(m, MAY["cgan"] | {"cgan"})} == found - {"data.contract"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES or name_of(path) in LONG, f"{name_of(path)} has {lines} lines"


def test_every_part_is_known_here() -> None:
    """A new package must be given its rules."""
    top = {"", "__main__", "cli", "runs", "recipes", "evaluation", "comparison", "official"}
    assert {part_of(name_of(path)) for path in FILES} - top <= set(MAY)
