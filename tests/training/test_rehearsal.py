"""Steps that are taken back: what they count, and that they leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lineage
from lineage.cli import main
from lineage.errors import UserError
from lineage.training.rehearsal import FlopCount
from lineage.training.store import read_json


def test_a_product_is_counted_forward_and_backward() -> None:
    """2 x 5 x 7 x 3 each: the result, and the gradient of the weights; not of the input."""
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    with FlopCount() as counted:
        loss = layer(x).square().sum()
        assert counted.total == 2 * 5 * 7 * 3
        torch.autograd.grad(loss, list(layer.parameters()))
    assert counted.total == 2 * 2 * 5 * 7 * 3


def test_a_convolution_is_counted() -> None:
    """2 x 4 x 4 results of 3 channels, each of 9 x 2 products."""
    with FlopCount() as counted, torch.no_grad():
        nn.Conv2d(2, 3, 3, padding=1)(torch.randn(1, 2, 4, 4))
    assert counted.total == 2 * 4 * 4 * 3 * 9 * 2


@pytest.mark.parametrize("key", ["gan_int_cls", "ldm"])
def test_counting_changes_no_run(key: str, tmp_path: Path) -> None:
    """Two stages of several turns, with a penalty on gradients, and buffers that count steps."""
    options: dict[str, Any] = {"preset": "smoke", "steps": 12, "threads": 1}
    plain = lineage.train(key, out=tmp_path / "plain", **options)
    settings = {"train.count_flops": True}
    counted = lineage.train(key, out=tmp_path / "counted", settings=settings, **options)
    weights = [(run / "model.safetensors").read_bytes() for run in (plain, counted)]
    assert weights[0] == weights[1]
    assert all("flops" not in stage for stage in read_json(plain / "cost.json").values())
    assert all(stage["flops"] > 1e5 for stage in read_json(counted / "cost.json").values())


def test_a_budget_of_operations_ends_a_run(tmp_path: Path) -> None:
    """After the first step that reaches it, and the same when the run is resumed."""
    run = lineage.train("ddpm", preset="smoke", max_flops=2e9, out=tmp_path / "run", threads=1)
    cost = read_json(run / "cost.json")["denoiser"]
    step = cost["flops"] / cost["steps"]
    assert 2e9 <= cost["flops"] < 2e9 + step and cost["steps"] > 4
    before = (run / "model.safetensors").read_bytes()
    lineage.train("ddpm", out=run, resume=True, threads=1)
    assert (run / "model.safetensors").read_bytes() == before
    assert read_json(run / "config.json")["train"]["minutes"] is None


def test_a_budget_of_operations_is_shared_by_stages(tmp_path: Path) -> None:
    run = lineage.train("vqvae", preset="smoke", max_flops=4e9, out=tmp_path / "run", threads=1)
    codec, prior = (stage["flops"] for stage in read_json(run / "cost.json").values())
    assert codec == pytest.approx(0.3 * 4e9, rel=0.15) and prior == pytest.approx(2.8e9, rel=0.15)


def test_a_budget_of_pictures_ends_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "ddpm", "--preset", "smoke", "--max-pictures", "50", "--out", str(run)]
    assert main(arguments) == 0
    assert read_json(run / "cost.json")["denoiser"]["pictures"] == 56  # seven batches of 8


def test_a_budget_is_above_zero(tmp_path: Path) -> None:
    for name in ("max_flops", "max_pictures"):
        with pytest.raises(UserError, match=name):
            lineage.train("ddpm", preset="smoke", out=tmp_path / "run", **{name: 0})
