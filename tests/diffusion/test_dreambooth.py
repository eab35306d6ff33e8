"""DreamBooth: the loss on subject and class, the mixed batches, and what its runs hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lineage
from lineage.data.contract import CaptionedDataset, to_bytes
from lineage.data.prior import WithPrior
from lineage.diffusion.adapters.dreambooth import DreamBoothConfig, DreamBoothModel
from lineage.diffusion.adapters.lora import LoRAConfig
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.official.adapters import add_adapters
from lineage.training.loader import Loader
from lineage.training.store import load_tensors

CAPTIONS = ["a red circle", "a blue square above a green triangle"]


@pytest.fixture
def base(make_system: Any) -> DiffusionModel:
    model: DiffusionModel = make_system("ldm")[0].eval()
    return model


def rows_of(base: DiffusionModel, data: CaptionedDataset, rows: int) -> torch.Tensor:
    """The loss of the base on each row of a batch by itself, in the noise of that row."""
    batch = data.batch(range(rows), [0] * rows, 0)
    losses = []
    for row, one in enumerate(batch.split(1)):
        (turn,) = base.losses(one, base.text.encode(one.caption), NoiseStreams([row]))
        losses.append(turn.terms["mse_x0"])
    return torch.stack(losses)


def turn_of(model: DreamBoothModel, data: CaptionedDataset, rows: int) -> Any:
    batch = data.batch(range(rows), [0] * rows, 0)
    (turn,) = model.losses(batch, model.text.encode(batch.caption), NoiseStreams(range(rows)))
    return turn


def test_the_loss_weighs_the_rows_of_the_class(
    base: DiffusionModel, shapes: CaptionedDataset
) -> None:
    model = DreamBoothModel(base, DreamBoothConfig(prior_weight=0.3), LoRAConfig())
    terms = turn_of(model, shapes, 6).terms
    rows = rows_of(base, shapes, 6)
    torch.testing.assert_close(terms["subject"], rows[[0, 2, 4]].mean())
    torch.testing.assert_close(terms["prior"], 0.3 * rows[[1, 3, 5]].mean())
    with pytest.raises(UserError, match="batch of 1 holds no picture of the class"):
        turn_of(model, shapes, 1)


def test_an_odd_batch_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A loader reads several batches at once, so rows of odd ones would change their kind."""
    settings: dict[str, Any] = {"train.batch_size": 5}
    options: dict[str, Any] = {"preset": "smoke", "steps": 2, "out": tmp_path / "run"}
    with pytest.raises(UserError, match="batch_size=5 must be even"):
        lineage.train("dreambooth", settings=settings, **options)
    assert not (tmp_path / "run").exists()


def test_without_prior_preservation_all_rows_are_of_the_subject(
    base: DiffusionModel, shapes: CaptionedDataset
) -> None:
    model = DreamBoothModel(base, DreamBoothConfig(prior_weight=0.0), LoRAConfig())
    rows = rows_of(base, shapes, 5)
    terms = turn_of(model, shapes, 5).terms
    assert list(terms) == ["subject"]
    torch.testing.assert_close(terms["subject"], rows.mean())


def test_the_network_is_a_copy(base: DiffusionModel) -> None:
    before = base.generate(CAPTIONS, seed=1)
    model = DreamBoothModel(base, DreamBoothConfig(), LoRAConfig()).eval()
    assert torch.equal(model.generate(CAPTIONS, seed=1), before)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert torch.equal(base.generate(CAPTIONS, seed=1), before)
    assert not torch.equal(model.generate(CAPTIONS, seed=1), before)


# --- the data set -----------------------------------------------------------------------------


class Five(CaptionedDataset):
    """Five pictures of another data set."""

    def __init__(self, data: CaptionedDataset) -> None:
        self.data, self.name, self.split, self.size = data, "five", "train", data.size
        self.skipped = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def test_every_second_picture_is_of_the_class(shapes: CaptionedDataset) -> None:
    pictures = torch.stack([shapes[100 + i].image for i in range(3)])
    data = WithPrior(Five(shapes), pictures, ["a", "b", "c"])
    loader = Loader(data, batch_size=4, seed=0)
    seen: set[str] = set()
    for number, batch in enumerate(loader.several(0, 12)):  # read together, and one by one
        alone = loader.at(number)
        assert batch.id == alone.id and torch.equal(batch.image, alone.image)
        assert [one.startswith("prior/") for one in batch.id] == [False, True, False, True]
        for row in (1, 3):
            which = int(batch.id[row].removeprefix("prior/"))
            assert batch.caption[row] == "abc"[which]
            assert torch.equal(to_bytes(batch.image[row]), pictures[which])
        seen |= set(batch.id)
    assert len(seen) == 5 + 3
    assert len(data) == 5 and data[0].id == shapes[0].id  # sheets and scores see the subject


def test_other_shapes_are_refused(shapes: CaptionedDataset, monkeypatch: Any) -> None:
    five = Five(shapes)
    monkeypatch.setattr(Five, "parts", [five, five])
    with pytest.raises(UserError, match="leave crop=buckets out"):
        WithPrior(five, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"])


# --- runs -------------------------------------------------------------------------------------


def test_a_run_trains_on_what_its_base_draws(
    smoke_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = smoke_run("ldm").folder
    made: list[WithPrior] = []
    original = WithPrior.__init__

    def record(self: WithPrior, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(WithPrior, "__init__", record)
    settings = {"adapter.num_prior": 3, "adapter.prior_captions": "a red circle,a blue square"}
    lineage.train(
        "dreambooth",
        preset="smoke",
        steps=6,
        out=tmp_path / "run",
        settings=settings,
        stages_from={"base": base},
    )
    assert made[0].captions == ["a red circle", "a blue square", "a red circle"]
    drawn = to_bytes(lineage.load(base).generate(made[0].captions, seed=0))
    assert torch.equal(made[0].pictures, drawn)
    with pytest.raises(UserError, match="is a whole network and no low-rank adapter"):
        add_adapters(lineage.load(base), base, [str(tmp_path / "run")])
    style: dict[str, Any] = {"preset": "smoke", "steps": 4, "out": tmp_path / "style"}
    lineage.train("lora", stages_from={"base": base}, **style)
    plain = lineage.load(tmp_path / "run").generate(CAPTIONS)
    both = lineage.load(tmp_path / "run", adapters=[f"{tmp_path / 'style'}:5"])
    assert not torch.equal(both.generate(CAPTIONS), plain)


def test_a_low_rank_run_is_an_adapter_of_its_base(smoke_run: Any, tmp_path: Path) -> None:
    base, out = smoke_run("ldm").folder, tmp_path / "run"
    lineage.train(
        "dreambooth",
        preset="smoke",
        steps=6,
        out=out,
        settings={"adapter.use_lora": True},
        stages_from={"base": base},
    )
    assert all(n.endswith(("up", "down", "alpha")) for n in load_tensors(out / "model.safetensors"))
    system = lineage.load(base)
    add_adapters(system, base, [str(out)])
    assert torch.equal(system.generate(CAPTIONS), lineage.load(out).generate(CAPTIONS))
