"""Cost of training so far: `cost.json` of a run folder, written with every checkpoint.

{stage: {"steps", "pictures", "seconds", "cpu_seconds", "pictures_per_second",
         "peak_memory_bytes", "device", "finished", and "flops" if they were counted}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineage.config import TrainConfig
from lineage.training.log import read_log
from lineage.training.loop import Trainer
from lineage.training.machine import peak_memory
from lineage.training.store import read_json_object, write_json

UNSHARED = 0.9
"""Share of its time for which a run has one core, at least, on a machine that does nothing else."""
NUMBERS = ("steps", "pictures", "seconds", "cpu_seconds", "pictures_per_second")


def read_cost(folder: Path) -> dict[str, dict[str, Any]]:
    """The cost of each stage; from the log, without memory, if `cost.json` is missing or broken."""
    saved = read_json_object(folder / "cost.json")
    if saved and all(_is_cost(entry) for entry in saved.values()):
        return saved
    last = {line["stage"]: line for line in read_log(folder / "metrics.jsonl")}
    entries = {
        stage: {
            "steps": line["step"],
            "pictures": line.get("pictures", 0),
            "seconds": line.get("seconds", 0.0),
            "cpu_seconds": line.get("cpu_seconds", 0.0),
            "pictures_per_second": line.get("pictures_per_second", 0.0),
            "peak_memory_bytes": 0,
            "device": "",
            "finished": False,
        }
        for stage, line in last.items()
    }
    return {stage: entry for stage, entry in entries.items() if _is_cost(entry)}


def _is_cost(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), (int, float)) for name in (*NUMBERS, "peak_memory_bytes")
    )


def budget_warnings(folder: Path, train: TrainConfig) -> list[str]:
    """What a reader of a run's scores must know of its budget: whether other processes took a part
    of its minutes.
    """
    stages = [stage for stage in read_cost(folder).values() if stage.get("device") == "cpu"]
    seconds = sum(stage["seconds"] for stage in stages)
    cpu_seconds = sum(stage["cpu_seconds"] for stage in stages)
    if train.minutes is None or cpu_seconds >= UNSHARED * seconds:
        return []
    steps = ", ".join(f"{stage['steps']:,}" for stage in stages)
    return [
        f"{folder} was trained beside other processes: it had the processor for {cpu_seconds:.0f} "
        f"of {seconds:.0f} seconds and made {steps} steps. --cpu-minutes or --steps give the same "
        "work."
    ]


def write_cost(folder: Path, trainer: Trainer) -> None:
    """Bring the entry of the trainer's stage up to date."""
    finished, cost = trainer.spent() >= 1, read_cost(folder)
    saved = read_json_object(folder / "cost.json").get(trainer.stage)
    before: dict[str, Any] = {"peak_memory_bytes": 0}
    if isinstance(saved, dict) and _is_cost(saved):
        before = saved
    if before.get("steps") == trainer.step and before.get("finished") == finished:
        return  # a finished run that was resumed has trained nothing
    pictures = trainer.step * trainer.batch_size
    peak = peak_memory(trainer.device)
    cost[trainer.stage] = {
        "steps": trainer.step,
        "pictures": pictures,
        "seconds": round(trainer.seconds, 3),
        "cpu_seconds": round(trainer.cpu_seconds, 3),
        "pictures_per_second": round(pictures / max(1e-9, trainer.seconds), 2),
        "peak_memory_bytes": max(peak, before["peak_memory_bytes"]),
        "device": trainer.device.type,
        "finished": finished,
    }
    if trainer.train.count_flops or trainer.train.max_flops:
        cost[trainer.stage]["flops"] = trainer.step * trainer.flops_per_step
    write_json(folder / "cost.json", cost)


def is_interrupted(folder: Path, stage: str) -> bool:
    """Whether the last stage of a run has a checkpoint, and some of its budget left."""
    cost = read_cost(folder).get(stage, {"finished": False})
    return (folder / "state.pt").exists() and not cost.get("finished", True)
