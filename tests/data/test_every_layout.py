"""Every working system on every layout, two steps a stage; a run on shards resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import MAKERS, save_picture, save_text

import lineage
from lineage import runs
from lineage.catalog import working
from lineage.config import OptimConfig, TrainConfig
from lineage.data import LAYOUTS, load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.data.tools import export
from lineage.errors import Interrupted
from lineage.recipes import find_recipe
from lineage.text.tokenizer import WordTokenizer
from lineage.training.loop import Trainer

SIZE = 16  # of preset smoke
TRAIN = TrainConfig(batch_size=3, precision="fp32", prefetch=0)


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CaptionedDataset]:
    """A small data set of each layout, by its name."""
    root = tmp_path_factory.mktemp("layouts")
    for number in range(4):
        save_picture(root / f"folder/{number}.png", number, (40, 32 - 4 * number))
        save_text(root / f"folder/{number}.txt", f"picture {number}")
    for kind in ("imagefolder", "wds"):
        export(load_dataset(str(root / "folder"), size=SIZE), root / kind, form=kind)
    for kind, make in MAKERS.items():
        make(root / kind)
    return {kind: load_dataset(f"{kind}:{root / kind}", "all", SIZE) for kind in LAYOUTS}


@pytest.mark.parametrize("key", working())
def test_every_system_trains_on_every_layout(
    key: str, data_sets: dict[str, CaptionedDataset]
) -> None:
    config = runs.configure(key, preset_name="smoke", settings={})
    for kind in LAYOUTS:
        data = data_sets[kind]
        tokenizer = WordTokenizer.train(data.all_captions(), 200)
        torch.manual_seed(1)
        for stage in find_recipe(key).stages(config, tokenizer):
            system: Any = stage.construct()
            if system.groups() and getattr(stage, "trains", True):
                trainer = Trainer(system, data, OptimConfig(warmup=0, decay="none"), TRAIN)
                for step in range(2):
                    losses = trainer.advance(trainer.loader.at(step))
                    assert losses and all(v.isfinite().all() for v in losses.values()), kind
            system.eval()


@pytest.mark.parametrize(("kind", "crop"), [("wds", ""), ("folder", "?crop=buckets")])
def test_a_run_resumes_bit_for_bit(
    kind: str,
    crop: str,
    data_sets: dict[str, CaptionedDataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On shards, whose position is the step, and on pictures of several shapes."""
    spec = f"{data_sets[kind].name}{crop}"
    assert not crop or len(load_dataset(spec).parts) > 1
    options: dict[str, Any] = {"preset": "smoke", "data": spec, "threads": 1}
    options["settings"] = {"train.batch_size": 3}
    whole = lineage.train("ddpm", steps=6, out=tmp_path / "whole", **options)
    advance = Trainer.advance

    def stop_at_3(self: Trainer, *arguments: Any) -> Any:
        self._stop_requested = self.step == 2
        return advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stop_at_3)
        with pytest.raises(Interrupted):
            lineage.train("ddpm", steps=6, out=tmp_path / "stopped", **options)
    stopped = lineage.train("ddpm", out=tmp_path / "stopped", resume=True, threads=1)
    weights = [(run / "model.safetensors").read_bytes() for run in (whole, stopped)]
    assert weights[0] == weights[1]
