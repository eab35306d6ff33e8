"""The StackGAN verifier: on the official numbers, and on files of other sizes made here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.cgan.stackgan import (
    StackGANConfig,
    StageOneGenerator,
    StageTwoGenerator,
)
from lineage.official.cgan import stackgan_key
from lineage.official.verify import FileCheck, as_text, verify

REAL = Path(__file__).resolve().parents[3] / "shared" / "reference" / "stackgan.safetensors"
WIDTH, FIRST, SECOND = 20, 5, 3  # of the sentence; rows of each stage
OFFICIAL = {
    "TEXT.DIMENSION": WIDTH,
    "GAN.CONDITION_DIM": 6,
    "GAN.GF_DIM": 8,
    "GAN.DF_DIM": 3,
    "GAN.R_NUM": 1,
    "Z_DIM": 7,
    "batch_stage1": FIRST,
    "batch_stage2": SECOND,
}
CONFIG = StackGANConfig(start=64, noise=7, condition=6, generator=8, discriminator=3, residual=1)


@pytest.mark.skipif(not REAL.is_file(), reason="the reference files are not beside this checkout")
def test_the_official_numbers_are_ours() -> None:
    """Every output of hanzhanggit/StackGAN-Pytorch, in evaluation and in training mode."""
    (check,) = verify([REAL])
    assert check.passed, as_text(check)
    assert len(check.outputs) == 25 and check.system == "stackgan"


# --- a file of our own ------------------------------------------------------------------------


def official(name: str) -> str:
    """Our name of a parameter -> the official one, written the other way round on purpose."""
    name = re.sub(r"^upsample\.(\d)\.", lambda m: f"upsample{int(m[1]) + 1}.", name)
    name = re.sub(r"^joint\.", "get_cond_logits.outlogits.", name)
    return re.sub(r"^alone\.", "get_uncond_logits.outlogits.0.", name)


def lively(network: nn.Module) -> nn.Module:
    """Statistics and weights that no layer may leave out unnoticed."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("running_mean") or tensor.dim() == 1:
                tensor.normal_(float(name.endswith("weight")), 0.3)
    return network.eval()


def bce(probability: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy(probability, torch.full_like(probability, target))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Weights, inputs and outputs, in the order of the authors' `trainer.py`: on probabilities, and
    with every term written out."""
    torch.manual_seed(4)
    one, two = StageOneGenerator(CONFIG, WIDTH), StageTwoGenerator(CONFIG, WIDTH, 256)
    judge_one, judge_two = CONFIG.look(WIDTH, 64, False), CONFIG.look(WIDTH, 256, True)
    networks = {"STAGE1_G": one, "STAGE2_G": two, "STAGE1_D": judge_one, "STAGE2_D": judge_two}
    made = {
        f"state/{name}/{official(key)}": tensor.clone()
        for name, network in networks.items()
        for key, tensor in lively(network).state_dict().items()
    }
    given = {
        "txt_embedding": torch.randn(FIRST, WIDTH),
        "noise_z": torch.randn(FIRST, 7),
        "eps_stage1": torch.randn(FIRST, 6),
        "eps_stage2": torch.randn(SECOND, 6),
        "real64_8x8": torch.rand(FIRST, 3, 8, 8) * 2 - 1,
        "real256_16x16": torch.rand(SECOND, 3, 16, 16) * 2 - 1,
    }
    text, z, eps, own = list(given.values())[:4]
    real64 = F.interpolate(given["real64_8x8"], scale_factor=8, mode="nearest")
    real256 = F.interpolate(given["real256_16x16"], scale_factor=16, mode="nearest")
    few = slice(SECOND)

    def fake256() -> Any:
        return two(one(text[few], z[few], eps[few]).image, text[few], own)

    def probability(judge: nn.Module, image: Tensor, mu: Tensor) -> Tensor:
        return judge.score(judge.features(image), mu).sigmoid()

    with torch.no_grad():
        small, large = one(text, z, eps), fake256()
        mu, log_variance = small.mu, small.log_variance
        real = bce(probability(judge_one, real64, mu), 1)
        wrong = bce(probability(judge_one, real64[:-1], mu[1:]), 0)
        fake = bce(probability(judge_one, small.image, mu), 0)
        outputs = {
            "ca_c_code_stage1": mu + (0.5 * log_variance).exp() * eps,
            "mu_stage1": mu,
            "logvar_stage1": log_variance,
            "KL_stage1": -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).mean(),
            "img64_eval": small.image,
            "mu_stage2": large.mu,
            "logvar_stage2": large.log_variance,
            "img256_eval": large.image,
            "d1_feat_eval": judge_one.features(small.image),
            "d1_cond_prob_eval": probability(judge_one, small.image, mu),
            "d1_loss": torch.stack([real + (wrong + fake) / 2, real, wrong, fake]),
            "g1_loss": bce(probability(judge_one, small.image, mu), 1),
        }
        shown, drawn = judge_two.features(real256), judge_two.features(large.image)
        real = bce(judge_two.score(shown, large.mu).sigmoid(), 1)
        wrong = bce(judge_two.score(shown[:-1], large.mu[1:]).sigmoid(), 0)
        right = judge_two.score(drawn, large.mu).sigmoid()
        alone = judge_two.score_alone(drawn).sigmoid()
        real_alone = bce(judge_two.score_alone(shown).sigmoid(), 1)
        whole = (real + real_alone) / 2 + (bce(right, 0) + wrong + bce(alone, 0)) / 3
        parts = [whole, (real + real_alone) / 2, wrong, (bce(right, 0) + bce(alone, 0)) / 2]
        outputs |= {
            "d2_feat_eval": drawn,
            "d2_cond_prob_eval": right,
            "d2_uncond_prob_eval": alone,
            "d2_loss": torch.stack(parts),
            "g2_loss": bce(right, 1) + bce(alone, 1),
        }
        kept = {name: tensor.clone() for name, tensor in one.state_dict().items()}
        one.train(), two.train()
        outputs["img256_train_crop"] = fake256().image[:, :, 96:160, 96:160]
        one.load_state_dict(kept)
        trained = one(text, z, eps)
        outputs["img64_train"] = trained.image
        outputs |= {
            f"g1_after_train_{official(name)}": tensor
            for name, tensor in one.named_buffers()
            if name.startswith(("fc.1", "upsample.3"))
        }
        outputs["d1_feat_train"] = judge_one.train().features(trained.image)
        outputs["d1_cond_prob_train"] = judge_one.score(outputs["d1_feat_train"], mu).sigmoid()
    made |= {f"input/{name}": tensor for name, tensor in given.items()}
    return made | {f"output/{name}": tensor.clone() for name, tensor in outputs.items()}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., FileCheck]:
    """Write a reference file and verify it."""

    def check(tensors: dict[str, Tensor], **changes: int) -> FileCheck:
        path = tmp_path / "made.safetensors"
        metadata = {
            "source": "hanzhanggit/StackGAN-Pytorch",
            "config": json.dumps({**OFFICIAL, **changes}),
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        (found,) = verify([path])
        return found

    return check


def test_other_widths_and_batches_pass(
    tensors: dict[str, Tensor], check: Callable[..., FileCheck]
) -> None:
    """The verifier reads the sizes off the file; the official ones are not built in."""
    found = check(tensors)
    assert found.passed, as_text(found)
    assert len(found.outputs) == 27 and found.system == "stackgan"


def test_every_output_that_is_wrong_fails(
    tensors: dict[str, Tensor], check: Callable[..., FileCheck]
) -> None:
    """A verifier that returned what the file holds would pass anything."""
    wrong = {
        name: (tensor + 0.01 * tensor.abs().max() if tensor.is_floating_point() else tensor + 1)
        if name.startswith("output/")
        else tensor
        for name, tensor in tensors.items()
    }
    found = check(wrong)
    assert not any(output.passed for output in found.outputs), as_text(found)


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("state/STAGE1_G/upsample2.1.weight", {"img64_eval", "img256_eval", "img64_train"}),
        ("state/STAGE2_G/hr_joint.0.weight", {"img256_eval", "d2_feat_eval"}),
        ("state/STAGE1_D/get_cond_logits.outlogits.0.weight", {"d1_cond_prob_eval", "g1_loss"}),
        ("state/STAGE2_D/get_uncond_logits.outlogits.0.bias", {"d2_uncond_prob_eval", "g2_loss"}),
        ("input/eps_stage2", {"img256_eval"}),
    ],
)
def test_other_weights_fail_where_they_reach(
    name: str,
    reached: set[str],
    tensors: dict[str, Tensor],
    check: Callable[..., FileCheck],
) -> None:
    found = check({**tensors, name: tensors[name] + 0.3})
    failed = {output.name for output in found.outputs if not output.passed}
    assert failed >= reached and len(failed) < len(found.outputs)
    if "STAGE2" in name or "stage2" in name:
        assert not {n for n in failed if "1" in n.split("_")[0] or "64" in n}


@pytest.mark.parametrize("change", [{"GAN.R_NUM": 2}, {"GAN.GF_DIM": 4}, {"Z_DIM": 6}], ids=str)
def test_a_configuration_of_other_networks_fails_as_a_whole(
    change: dict[str, int], tensors: dict[str, Tensor], check: Callable[..., FileCheck]
) -> None:
    found = check(tensors, **change)
    assert not any(output.passed for output in found.outputs)
    assert "could not be built and run" in found.note


def test_names_are_mapped_one_to_one() -> None:
    """Ours -> official -> ours again, for every network."""
    for network in (
        StageOneGenerator(CONFIG, WIDTH),
        StageTwoGenerator(CONFIG, WIDTH, 256),
        CONFIG.look(WIDTH, 256, True),
    ):
        names = list(network.state_dict())
        assert [stackgan_key(official(name)) for name in names] == names
