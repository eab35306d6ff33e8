"""The StackGAN verifier: on the official numbers, and on a file of other sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.cgan.stackgan import (
    GeneratorOutput,
    StackGANConfig,
    StageOneGenerator,
    StageTwoGenerator,
)
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.official.stackgan import stackgan_key
from lineage.official.verify import FileCheck, as_text, verify

REAL = Path(__file__).resolve().parents[3] / "shared" / "reference" / "stackgan.safetensors"
SENTENCE_DIM, ROWS1, ROWS2 = 20, 5, 3  # width of the sentence; rows of each stage
OFFICIAL = {
    "TEXT.DIMENSION": SENTENCE_DIM,
    "GAN.CONDITION_DIM": 6,
    "GAN.GF_DIM": 8,
    "GAN.DF_DIM": 3,
    "GAN.R_NUM": 1,
    "Z_DIM": 7,
    "batch_stage1": ROWS1,
    "batch_stage2": ROWS2,
}
CONFIG = StackGANConfig(
    stage1_size=64, z_dim=7, cond_dim=6, gen_channels=8, disc_channels=3, num_res_blocks=1
)

State = dict[str, Tensor]


@pytest.mark.skipif(not REAL.is_file(), reason="the reference files are not beside this checkout")
def test_our_numbers_are_the_official_ones() -> None:
    """Every output of hanzhanggit/StackGAN-Pytorch, in evaluation and in training mode."""
    (check,) = verify([REAL])
    assert check.passed, as_text(check)
    assert len(check.outputs) == 25 and check.system == "stackgan"


# --- a file of other sizes --------------------------------------------------------------------


def official(name: str) -> str:
    """Our name of a parameter -> the official one, the inverse of `stackgan_key`."""
    name = re.sub(r"^upsample\.(\d)\.", lambda m: f"upsample{int(m[1]) + 1}.", name)
    name = re.sub(r"^cond_head\.", "get_cond_logits.outlogits.", name)
    return re.sub(r"^uncond_head\.", "get_uncond_logits.outlogits.0.", name)


def randomised(network: nn.Module) -> nn.Module:
    """Batch statistics and norms at random, so that every layer shows in the outputs."""
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
def tensors() -> State:
    """Weights, inputs and outputs, in the order of the authors' `trainer.py`: losses on
    probabilities, with every term written out."""
    torch.manual_seed(4)
    stage1 = StageOneGenerator(CONFIG, SENTENCE_DIM)
    stage2 = StageTwoGenerator(CONFIG, SENTENCE_DIM, 256)
    disc1, disc2 = (ConditionalDiscriminator(3, 6, side, side > 64) for side in (64, 256))
    networks = {"STAGE1_G": stage1, "STAGE2_G": stage2, "STAGE1_D": disc1, "STAGE2_D": disc2}
    file = {
        f"state/{name}/{official(key)}": tensor.clone()
        for name, network in networks.items()
        for key, tensor in randomised(network).state_dict().items()
    }
    inputs = {
        "txt_embedding": torch.randn(ROWS1, SENTENCE_DIM),
        "noise_z": torch.randn(ROWS1, 7),
        "eps_stage1": torch.randn(ROWS1, 6),
        "eps_stage2": torch.randn(ROWS2, 6),
        "real64_8x8": torch.rand(ROWS1, 3, 8, 8) * 2 - 1,
        "real256_16x16": torch.rand(ROWS2, 3, 16, 16) * 2 - 1,
    }
    text, z, eps, eps2 = list(inputs.values())[:4]
    real64 = F.interpolate(inputs["real64_8x8"], scale_factor=8, mode="nearest")
    real256 = F.interpolate(inputs["real256_16x16"], scale_factor=16, mode="nearest")

    def generate256() -> GeneratorOutput:
        small = stage1(text[:ROWS2], z[:ROWS2], eps[:ROWS2]).image
        result: GeneratorOutput = stage2(small, text[:ROWS2], eps2)
        return result

    def probability(disc: ConditionalDiscriminator, image: Tensor, mu: Tensor) -> Tensor:
        return disc.cond_logits(disc.features(image), mu).sigmoid()

    with torch.no_grad():
        small, large = stage1(text, z, eps), generate256()
        mu, logvar = small.mu, small.logvar
        real = bce(probability(disc1, real64, mu), 1)
        wrong = bce(probability(disc1, real64[:-1], mu[1:]), 0)
        fake = bce(probability(disc1, small.image, mu), 0)
        outputs = {
            "ca_c_code_stage1": mu + (0.5 * logvar).exp() * eps,
            "mu_stage1": mu,
            "logvar_stage1": logvar,
            "KL_stage1": -0.5 * (1 + logvar - mu**2 - logvar.exp()).mean(),
            "img64_eval": small.image,
            "mu_stage2": large.mu,
            "logvar_stage2": large.logvar,
            "img256_eval": large.image,
            "d1_feat_eval": disc1.features(small.image),
            "d1_cond_prob_eval": probability(disc1, small.image, mu),
            "d1_loss": torch.stack([real + (wrong + fake) / 2, real, wrong, fake]),
            "g1_loss": bce(probability(disc1, small.image, mu), 1),
        }
        real_features, fake_features = disc2.features(real256), disc2.features(large.image)
        real = bce(disc2.cond_logits(real_features, large.mu).sigmoid(), 1)
        real_uncond = bce(disc2.uncond_logits(real_features).sigmoid(), 1)
        wrong = bce(disc2.cond_logits(real_features[:-1], large.mu[1:]).sigmoid(), 0)
        cond = disc2.cond_logits(fake_features, large.mu).sigmoid()
        uncond = disc2.uncond_logits(fake_features).sigmoid()
        total = (real + real_uncond) / 2 + (bce(cond, 0) + wrong + bce(uncond, 0)) / 3
        parts = [total, (real + real_uncond) / 2, wrong, (bce(cond, 0) + bce(uncond, 0)) / 2]
        outputs |= {
            "d2_feat_eval": fake_features,
            "d2_cond_prob_eval": cond,
            "d2_uncond_prob_eval": uncond,
            "d2_loss": torch.stack(parts),
            "g2_loss": bce(cond, 1) + bce(uncond, 1),
        }
        before = {name: tensor.clone() for name, tensor in stage1.state_dict().items()}
        stage1.train(), stage2.train()
        outputs["img256_train_crop"] = generate256().image[:, :, 96:160, 96:160]
        stage1.load_state_dict(before)
        trained = stage1(text, z, eps)
        outputs["img64_train"] = trained.image
        outputs |= {
            f"g1_after_train_{official(name)}": tensor
            for name, tensor in stage1.named_buffers()
            if name.startswith(("fc.1", "upsample.3"))
        }
        outputs["d1_feat_train"] = disc1.train().features(trained.image)
        outputs["d1_cond_prob_train"] = disc1.cond_logits(outputs["d1_feat_train"], mu).sigmoid()
    file |= {f"input/{name}": tensor for name, tensor in inputs.items()}
    return file | {f"output/{name}": tensor.clone() for name, tensor in outputs.items()}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., FileCheck]:
    """Write a reference file and verify it."""

    def check(tensors: State, **changes: int) -> FileCheck:
        path = tmp_path / "file.safetensors"
        metadata = {
            "source": "hanzhanggit/StackGAN-Pytorch",
            "config": json.dumps({**OFFICIAL, **changes}),
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        (result,) = verify([path])
        return result

    return check


def failed_outputs(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


def test_other_widths_and_batches_pass(tensors: State, check: Callable[..., FileCheck]) -> None:
    """The verifier reads the sizes off the file; the official ones are not built in."""
    result = check(tensors)
    assert result.passed, as_text(result)
    assert len(result.outputs) == 27 and result.system == "stackgan"


def test_every_wrong_output_fails(tensors: State, check: Callable[..., FileCheck]) -> None:
    """A verifier that returned the file's outputs would pass anything."""
    wrong = {
        name: (tensor + 0.01 * tensor.abs().max() if tensor.is_floating_point() else tensor + 1)
        if name.startswith("output/")
        else tensor
        for name, tensor in tensors.items()
    }
    result = check(wrong)
    assert not any(output.passed for output in result.outputs), as_text(result)


@pytest.mark.parametrize(
    ("name", "affected"),
    [
        ("state/STAGE1_G/upsample2.1.weight", {"img64_eval", "img256_eval", "img64_train"}),
        ("state/STAGE2_G/hr_joint.0.weight", {"img256_eval", "d2_feat_eval"}),
        ("state/STAGE1_D/get_cond_logits.outlogits.0.weight", {"d1_cond_prob_eval", "g1_loss"}),
        ("state/STAGE2_D/get_uncond_logits.outlogits.0.bias", {"d2_uncond_prob_eval", "g2_loss"}),
        ("input/eps_stage2", {"img256_eval"}),
    ],
)
def test_a_wrong_tensor_fails_the_outputs_that_depend_on_it(
    name: str, affected: set[str], tensors: State, check: Callable[..., FileCheck]
) -> None:
    failed = failed_outputs(check({**tensors, name: tensors[name] + 0.3}))
    assert failed >= affected and len(failed) < len(check(tensors).outputs)
    if "STAGE2" in name or "stage2" in name:
        assert not {n for n in failed if "1" in n.split("_")[0] or "64" in n}


def test_a_missing_network_fails_its_own_outputs_alone(
    tensors: State, check: Callable[..., FileCheck]
) -> None:
    without = {name: tensor for name, tensor in tensors.items() if "STAGE2_D" not in name}
    scores = {"d2_feat_eval", "d2_cond_prob_eval", "d2_uncond_prob_eval"}
    assert failed_outputs(check(without)) == scores | {"d2_loss", "g2_loss"}


@pytest.mark.parametrize(
    "change",
    [{"GAN.GF_DIM": 4}, {"Z_DIM": 6}],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_a_configuration_of_other_networks_fails(
    change: dict[str, int], tensors: State, check: Callable[..., FileCheck]
) -> None:
    result = check(tensors, **change)
    assert not any(output.passed for output in result.outputs)
    assert all("RuntimeError" in output.reason for output in result.outputs)


def test_a_fault_in_stage_two_leaves_stage_one(
    tensors: State, check: Callable[..., FileCheck]
) -> None:
    failed = failed_outputs(check(tensors, **{"GAN.R_NUM": 2}))
    assert failed == {n for n in failed if n[:2] in ("d2", "g2") or "256" in n or "stage2" in n}
    assert {"img256_eval", "mu_stage2", "d2_loss"} <= failed


def test_keys_are_mapped_one_to_one() -> None:
    """Ours -> official -> ours again, for every network."""
    for network in (
        StageOneGenerator(CONFIG, SENTENCE_DIM),
        StageTwoGenerator(CONFIG, SENTENCE_DIM, 256),
        ConditionalDiscriminator(3, 6, 256, unconditional=True),
    ):
        names = list(network.state_dict())
        assert [stackgan_key(official(name)) for name in names] == names
