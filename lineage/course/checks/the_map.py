"""Checks of `00_the_map`: three questions about a catalogue, which is a dict from key to row."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lineage.catalog import CATALOG, Row
from lineage.course.checking import Wrong, exercise

Catalog = Mapping[str, Row]

LINKS = {
    "sketch": (),
    "paint": ("sketch",),
    "ink": ("paint",),
    "stamp": (),
    "print": ("stamp", "ink"),
    "poster": ("print", "sketch"),
    "wash": ("ink",),
    "seal": ("stamp",),
    "badge": ("stamp",),
}
"""A small catalogue: key -> keys that it builds on."""
TWINS = {"left": (), "right": (), "left child": ("left",), "right child": ("right",)}
"""One in which two systems have as many descendants."""


def _small(links: Mapping[str, tuple[str, ...]] = LINKS) -> dict[str, Row]:
    return {
        key: Row(
            key=key,
            title=key.title(),
            year=2001 + number,
            paper="",
            idea="",
            family="retrieval",
            builds_on=parents,
        )
        for number, (key, parents) in enumerate(links.items())
    }


def _ancestors(catalog: Catalog, key: str) -> set[str]:
    parents = catalog[key].builds_on
    return set(parents).union(*(_ancestors(catalog, parent) for parent in parents))


def _unchanged(answer: Any, catalog: dict[str, Row], *arguments: str) -> Any:
    """The answer; raises `Wrong` if it changes the catalogue or returns nothing."""
    before = copy.copy(catalog)
    value = answer(catalog, *arguments)
    if catalog != before:
        raise Wrong("changes the catalogue: it should only read it.")
    if value is None:
        raise Wrong("returns nothing: end it with `return`.")
    return value


def _names(keys: set[str]) -> str:
    return ", ".join(repr(key) for key in sorted(keys))


@exercise()
def all_ancestors(answer: Any) -> None:
    """The set of all that a system builds on, directly or not."""
    for catalog, keys in ((_small(), tuple(LINKS)), (dict(CATALOG), ("ddpm", "dit", "sd3"))):
        for key in keys:
            value = _unchanged(answer, catalog, key)
            if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
                raise Wrong(f"returns {type(value).__name__}, not a set of keys.")
            names, right = list(value), _ancestors(catalog, key)
            if any(not isinstance(one, str) for one in names):
                raise Wrong("returns rows where keys are expected: a key is a row's name.")
            if len(names) > len(set(names)):
                raise Wrong(f"names an ancestor of {key!r} twice: a set holds each once.")
            _compare_ancestors(catalog, key, set(names), right)


def _compare_ancestors(catalog: Catalog, key: str, names: set[str], right: set[str]) -> None:
    if names == right:
        return
    parents = catalog[key].builds_on
    children = {one for one in catalog if key in _ancestors(catalog, one)}
    if names - {key} == right:
        raise Wrong(f"counts {key!r} among its own ancestors.")
    if names and names <= children:
        raise Wrong(f"returns the descendants of {key!r}: follow `builds_on` from it.")
    if names == set(parents):
        raise Wrong(
            f"stops at what {key!r} builds on directly: those systems have ancestors themselves."
        )
    first = set()
    one = key
    while catalog[one].builds_on:
        one = catalog[one].builds_on[0]
        first.add(one)
    if names == first:
        raise Wrong(f"follows only the first of each `builds_on`: {_names(right - first)} is lost.")
    if missing := right - names:
        raise Wrong(f"misses {_names(missing)} among the ancestors of {key!r}.")
    raise Wrong(f"has {_names(names - right)} among the ancestors of {key!r}, which is not one.")


@exercise()
def most_built_on(answer: Any) -> None:
    """The key with most descendants, the oldest of those with as many."""
    for catalog in (_small(), _small(TWINS), dict(CATALOG)):
        value = _unchanged(answer, catalog)
        if not isinstance(value, str) or value not in catalog:
            raise Wrong(f"returns {value!r}, which is no key of the catalogue.")
        families = {key: _ancestors(catalog, key) for key in catalog}
        counts = {key: sum(key in family for family in families.values()) for key in catalog}
        right = max(counts, key=lambda key: counts[key])
        if value == right:
            continue
        direct = {key: sum(key in row.builds_on for row in catalog.values()) for key in catalog}
        first = {
            key: sum(row.builds_on[:1] == (key,) for row in catalog.values()) for key in catalog
        }
        ancestors = {key: len(family) for key, family in families.items()}
        start = f"returns {value!r}, which has {counts[value]} descendants"
        if counts[value] == counts[right]:
            raise Wrong(f"{start}, as many as {right!r}, but is not the oldest of them.")
        if value == max(ancestors, key=lambda key: ancestors[key]):
            raise Wrong(f"returns {value!r}, which has most ancestors: descendants are asked for.")
        for name, table in (("directly", direct), ("as the first", first)):
            if table[value] == max(table.values()):
                raise Wrong(
                    f"{start}: it is the one that most systems name {name}, but {right!r} has "
                    f"{counts[right]} when descendants of descendants count."
                )
        raise Wrong(f"{start}; {right!r} has {counts[right]}.")


@exercise(points=2)
def longest_line(answer: Any) -> None:
    """A longest list of keys in which each builds on the one before, ending in a key."""
    for catalog, keys in ((_small(), tuple(LINKS)), (dict(CATALOG), ("ddpm", "ldm", "sd3"))):
        for key in keys:
            value = _unchanged(answer, catalog, key)
            if isinstance(value, tuple):
                value = list(value)
            if not isinstance(value, list):
                raise Wrong(f"returns {type(value).__name__}, not a list of keys.")
            _check_line(catalog, key, value)


def _check_line(catalog: Catalog, key: str, line: list[Any]) -> None:
    if unknown := [one for one in line if not isinstance(one, str) or one not in catalog]:
        raise Wrong(f"has {unknown[0]!r} in its list, which is no key of the catalogue.")
    if not line:
        raise Wrong(f"returns an empty list for {key!r}: the line ends in the system itself.")
    if line[-1] != key:
        if line[0] == key and len(line) > 1:
            raise Wrong(f"begins with {key!r}: the oldest comes first and {key!r} last.")
        raise Wrong(f"does not end in {key!r}.")
    for before, after in zip(line, line[1:], strict=False):
        if before not in catalog[after].builds_on:
            raise Wrong(f"puts {before!r} before {after!r}, which does not build on it.")
    length = _length(catalog, key)
    if len(line) == length:
        return
    first = [key]
    while catalog[first[0]].builds_on:
        first.insert(0, catalog[first[0]].builds_on[0])
    why = ""
    if line == first:
        why = ": it follows only the first of each `builds_on`"
    elif catalog[line[0]].builds_on:
        why = f": it stops at {line[0]!r}, which builds on others"
    raise Wrong(f"returns a line of {len(line)} for {key!r}, and there is one of {length}{why}.")


def _length(catalog: Catalog, key: str) -> int:
    return 1 + max((_length(catalog, parent) for parent in catalog[key].builds_on), default=0)
