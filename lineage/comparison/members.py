"""The runs of a comparison: which system each is of, and where it lies.

A system is compared by one run, or by several that differ in their seed alone.

    OUT/KEY/           the run of the first seed
    OUT/KEY_seed_4/    that of seed 4, where there are several
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lineage.catalog import CATALOG
from lineage.config import RunConfig, flat
from lineage.errors import UserError
from lineage.evaluation.run import run_names
from lineage.plan import read_config
from lineage.pretrained import run_folder, run_name

MAX_SEEDS = 20


@dataclass(frozen=True)
class Member:
    """One run of a comparison.

    Attributes:
        system: Name of its system in the report: the key, or that of a run where several systems
            have the same key.
        key: Key of the system.
        seed: Seed of the run.
        folder: Run folder.
        name: Name of the run: that of the system, and the seed if there are several.
    """

    system: str
    key: str
    seed: int
    folder: Path
    name: str


def members_to_train(keys: Sequence[str], first_seed: int, seeds: int, out: Path) -> list[Member]:
    """A run of each system with each seed, by seed, so that a comparison that is stopped has as
    many whole rounds as possible.

    Args:
        keys: Keys of the systems.
        first_seed: The first seed; the others follow it.
        seeds: Number of seeds.
        out: Folder of the comparison.
    """
    members = []
    for seed in range(first_seed, first_seed + seeds):
        for key in keys:
            folder = out / (key if seed == first_seed else f"{key}_seed_{seed}")
            name = key if seeds == 1 else f"{key}, seed {seed}"
            members.append(Member(key, key, seed, folder, name))
    return members


def finished_members(runs: Sequence[str | Path]) -> list[Member]:
    """Finished runs; those that differ in their seed alone are of one system.

    Raises:
        UserError: a folder is no run, is named twice, or is of a system that draws no pictures.
    """
    folders = [run_folder(run, "run") for run in runs]
    names = run_names(folders)
    configs = [read_config(folder) for folder in folders]
    kinds: dict[str, int] = {}  # settings of a system -> its number
    numbers = [kinds.setdefault(_kind(config), len(kinds)) for config in configs]
    members: list[Member] = []
    for folder, config, number in zip(folders, configs, numbers, strict=True):
        if not CATALOG[config.key].draws:
            raise UserError(f"{run_name(folder)} draws no pictures that could be compared.")
        of_key = {n for n, one in zip(numbers, configs, strict=True) if one.key == config.key}
        first = names[numbers.index(number)]
        system = config.key if len(of_key) == 1 else first
        several = numbers.count(number) > 1
        own = f"{system}, seed {config.seed}" if several else system
        if any((one.system, one.seed) == (system, config.seed) for one in members):
            raise UserError(
                f"{run_name(folder)} and another run of {system} have the same settings and the "
                f"seed {config.seed}: leave one out."
            )
        members.append(Member(system, config.key, config.seed, folder, own))
    return members


def _kind(config: RunConfig) -> str:
    """All settings but the seed, as a text."""
    return repr(sorted((n, repr(v)) for n, v in flat(config).items() if n != "seed"))


def by_system(members: Sequence[Member]) -> dict[str, list[Member]]:
    """The runs of each system, in the order of the systems, and of their seeds."""
    systems: dict[str, list[Member]] = {}
    for member in members:
        systems.setdefault(member.system, []).append(member)
    return {name: sorted(own, key=lambda one: one.seed) for name, own in systems.items()}
