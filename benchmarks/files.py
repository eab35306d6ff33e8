"""Speed of reading captioned pictures from files: the first pass, a second start, later passes, and
WebDataset shards beside the `webdataset` library.

    python benchmarks/files.py                 writes results/files.json; about two minutes
    python benchmarks/files.py --count 500 --out /tmp/trial.json

5,000 JPEGs of 500 x 375 pixels are made, in a folder with texts and in shards, and read at 64
pixels by two threads, with an empty cache. The library's loader decodes with Pillow, crops and
resizes, as its users do, in this process and in two workers. Ratios are of one run, in turn.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lineage.data import load_dataset
from lineage.evaluation.cost import machine
from lineage.training.loader import Loader
from lineage.training.store import write_json

OUT = Path(__file__).parent.parent / "results" / "files.json"
SIZE, SHARD = 64, 250


def jpegs(count: int) -> Iterator[bytes]:
    """Smooth pictures of random colours."""
    random = np.random.default_rng(0)
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        file = io.BytesIO()
        small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield file.getvalue()


def make(root: Path, count: int) -> None:
    """The same pictures and captions in a folder and in shards."""
    (root / "folder").mkdir(parents=True)
    (root / "shards").mkdir()
    archive: tarfile.TarFile | None = None
    for number, picture in enumerate(jpegs(count)):
        name, caption = f"{number:06d}", f"noise number {number}".encode()
        (root / "folder" / f"{name}.jpg").write_bytes(picture)
        (root / "folder" / f"{name}.txt").write_bytes(caption)
        if number % SHARD == 0:
            if archive:
                archive.close()
            shard = root / "shards" / f"{number // SHARD:05d}.tar"
            archive = tarfile.open(shard, "w")  # noqa: SIM115 - closed before the next
        for ending, content in (("jpg", picture), ("txt", caption)):
            info = tarfile.TarInfo(f"{name}.{ending}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))  # type: ignore[union-attr]
    if archive:
        archive.close()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ours(path: Path) -> None:
    """Load a data set, and read each of its pictures once, in shuffled batches."""
    data = load_dataset(str(path), size=SIZE)
    one_pass(Loader(data, 64, seed=0), len(data))


def one_pass(loader: Loader, count: int) -> None:
    for first in range(0, count // 64, 4):
        loader.several(first, 4)


def library(path: Path, workers: int) -> None:
    """The same with `webdataset`, as its documentation has it."""
    import webdataset as wds

    def transform(sample: tuple[Image.Image, str]) -> tuple[torch.Tensor, str]:
        image, caption = sample
        square = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)
        return pixels.float().div(127.5).sub(1), caption

    shards = [str(file) for file in sorted(path.glob("*.tar"))]
    pipeline = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil")
    pipeline = pipeline.to_tuple("jpg", "txt").map(transform).batched(64)
    for _ in torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers):
        pass


def measured(root: Path, count: int, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {}

    def note(name: str, time_taken: float) -> None:
        rates.setdefault(name, []).append(count / time_taken)

    for number in range(rounds):
        os.environ["LINEAGE_CACHE"] = str(root / f"cache{number}")
        note("folder, first pass", seconds(lambda: ours(root / "folder")))
        note("folder, second start and a pass", seconds(lambda: ours(root / "folder")))
        data = load_dataset(str(root / "folder"), size=SIZE)
        loader = Loader(data, 64, seed=0)
        one_pass(loader, count)
        note("folder, later passes", seconds(lambda: one_pass(loader, count)))  # noqa: B023
        note("shards, first pass", seconds(lambda: ours(root / "shards")))
        note("shards, second start and a pass", seconds(lambda: ours(root / "shards")))
        for workers in (0, 2):
            name = f"webdataset, {workers} workers"
            note(name, seconds(lambda: library(root / "shards", workers)))  # noqa: B023
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    best = max(value for name, value in medians.items() if name.startswith("webdataset"))
    return {
        "pictures_per_second": medians,
        "shards_first_pass_over_webdataset": round(medians["shards, first pass"] / best, 2),
        "shards_second_start_over_webdataset": round(
            medians["shards, second start and a pass"] / best, 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    made_by = machine()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.count)
        result = measured(Path(folder), options.count, options.rounds)
    document = {"pictures": options.count, "rounds": options.rounds, **result, "machine": made_by}
    write_json(options.out, document)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
