"""Key maps and verifiers of the conditional GANs.

The classes of `lineage/cgan/stackgan.py` keep the order of the authors' layers, so their names
differ in few places: `upsample1.1` is `upsample.0.1`, `get_cond_logits.outlogits` is `joint`, and
`get_uncond_logits.outlogits.0` is `alone`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lineage.cgan.stackgan import Drawn, StackGANConfig, StageOneGenerator, StageTwoGenerator
from lineage.errors import UserError
from lineage.nn.conditional_discriminator import Discriminator, discriminator_terms, kl_term
from lineage.nn.gan import accepted, convinced, rejected
from lineage.official import Outputs
from lineage.official.importing import Given, Imported
from lineage.official.verify import Reference
from lineage.recipes.stackgan import PRESETS

STAGE_ONE, STAGE_TWO = 64, 256  # sides of the official networks' pictures


def stackgan_config(official: Mapping[str, Any]) -> StackGANConfig:
    """Our configuration for the official one."""
    return StackGANConfig(
        start=STAGE_ONE,
        noise=official["Z_DIM"],
        condition=official["GAN.CONDITION_DIM"],
        generator=official["GAN.GF_DIM"],
        discriminator=official["GAN.DF_DIM"],
        residual=official["GAN.R_NUM"],
    )


def stackgan_key(official: str) -> str:
    """An official parameter's name -> ours."""
    name = re.sub(r"^upsample(\d)\.", lambda m: f"upsample.{int(m[1]) - 1}.", official)
    name = name.replace("get_cond_logits.outlogits.", "joint.")
    return name.replace("get_uncond_logits.outlogits.0.", "alone.")


def load_official(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load official weights strictly; returns the network in evaluation mode."""
    network.load_state_dict({stackgan_key(key): value for key, value in state.items()})
    return network.eval()


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@torch.no_grad()
def stackgan(reference: Reference) -> Outputs:
    """Every output of hanzhanggit/StackGAN-Pytorch that a reference file may hold."""
    config, given = stackgan_config(reference.config), reference.inputs
    width = reference.config["TEXT.DIMENSION"]
    one = StageOneGenerator(config, width)
    two = StageTwoGenerator(config, width, STAGE_TWO)
    judge_one = config.look(width, STAGE_ONE, alone=False)
    judge_two = config.look(width, STAGE_TWO, alone=True)
    for name, network in (
        ("STAGE1_G", one),
        ("STAGE2_G", two),
        ("STAGE1_D", judge_one),
        ("STAGE2_D", judge_two),
    ):
        load_official(network, reference.state[name])

    sentence, noise, eps = given["txt_embedding"], given["noise_z"], given["eps_stage1"]
    rows = len(given["eps_stage2"])

    def draw(first: StageOneGenerator, second: StageTwoGenerator) -> tuple[Drawn, Drawn]:
        small = first(sentence, noise, eps)
        inner = first(sentence[:rows], noise[:rows], eps[:rows])
        return small, second(inner.image, sentence[:rows], given["eps_stage2"])

    small, large = draw(one, two)
    code, mu, log_variance = one.ca_net(sentence, eps)
    outputs: dict[str, Any] = {
        "ca_c_code_stage1": code,
        "mu_stage1": mu,
        "logvar_stage1": log_variance,
        "KL_stage1": kl_term(mu, log_variance),
        "img64_eval": small.image,
        "mu_stage2": large.mu,
        "logvar_stage2": large.log_variance,
        "img256_eval": large.image,
    }
    outputs |= _stage_one_losses(judge_one, given["real64_8x8"], small)
    outputs |= _stage_two_losses(judge_two, given["real256_16x16"], large)
    return {**outputs, **_training_mode(reference, one, two, judge_one, mu)}


def enlarged(image: Tensor, side: int) -> Tensor:
    """(B, 3, s, s) -> (B, 3, side, side), every pixel repeated."""
    factor = side // image.shape[-1]
    return image.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _stage_one_losses(judge: Discriminator, real: Tensor, drawn: Drawn) -> dict[str, Tensor]:
    features = judge.features(drawn.image)
    seen = judge.features(enlarged(real, STAGE_ONE))
    logits = {
        "real": judge.score(seen, drawn.mu),
        "wrong": judge.score(seen[:-1], drawn.mu[1:]),
        "fake": judge.score(features, drawn.mu),
    }
    return {
        "d1_feat_eval": features,
        "d1_cond_prob_eval": logits["fake"].sigmoid(),
        "d1_loss": torch.stack(
            [
                _sum(discriminator_terms(logits)),
                accepted(logits["real"], "log").mean(),
                rejected(logits["wrong"], "log").mean(),
                rejected(logits["fake"], "log").mean(),
            ]
        ),
        "g1_loss": convinced(logits["fake"]),
    }


def _stage_two_losses(judge: Discriminator, real: Tensor, drawn: Drawn) -> dict[str, Tensor]:
    features = judge.features(drawn.image)
    seen = judge.features(enlarged(real, STAGE_TWO))
    logits = {
        "real": judge.score(seen, drawn.mu),
        "wrong": judge.score(seen[:-1], drawn.mu[1:]),
        "fake": judge.score(features, drawn.mu),
        "real_alone": judge.score_alone(seen),
        "fake_alone": judge.score_alone(features),
    }
    own = {name: accepted(logits[name], "log").mean() for name in ("real", "real_alone")}
    others = {n: rejected(logits[n], "log").mean() for n in ("wrong", "fake", "fake_alone")}
    return {
        "d2_feat_eval": features,
        "d2_cond_prob_eval": logits["fake"].sigmoid(),
        "d2_uncond_prob_eval": logits["fake_alone"].sigmoid(),
        "d2_loss": torch.stack(  # the parts as the authors report them, means of two
            [
                _sum(discriminator_terms(logits)),
                (own["real"] + own["real_alone"]) / 2,
                others["wrong"],
                (others["fake"] + others["fake_alone"]) / 2,
            ]
        ),
        "g2_loss": convinced(logits["fake"]) + convinced(logits["fake_alone"]),
    }


def _training_mode(
    reference: Reference,
    one: StageOneGenerator,
    two: StageTwoGenerator,
    judge: Discriminator,
    mu: Tensor,
) -> dict[str, Any]:
    """What the networks give in training mode, and batch statistics after one such pass."""
    given = reference.inputs
    sentence, noise, eps = given["txt_embedding"], given["noise_z"], given["eps_stage1"]
    rows = len(given["eps_stage2"])
    trained, judging = copy.deepcopy(one).train(), copy.deepcopy(judge).train()
    image = trained(sentence, noise, eps).image
    features = judging.features(image)
    outputs: dict[str, Any] = {
        "img64_train": image,
        "d1_feat_train": features,
        "d1_cond_prob_train": judging.score(features, mu).sigmoid(),
    }
    buffers = dict(trained.named_buffers())
    for name in reference.outputs:
        if name.startswith("g1_after_train_"):
            outputs[name] = buffers[stackgan_key(name.removeprefix("g1_after_train_"))]

    @torch.no_grad()
    def crop() -> Tensor:
        inner = copy.deepcopy(one).train()(sentence[:rows], noise[:rows], eps[:rows]).image
        image = copy.deepcopy(two).train()(inner, sentence[:rows], given["eps_stage2"]).image
        return image[:, :, 96:160, 96:160]

    outputs["img256_train_crop"] = crop
    return outputs


# --- published checkpoints ------------------------------------------------------


def import_stackgan(files: Sequence[Given]) -> Imported:
    """The generator of stage II as the authors publish it (`netG_epoch_N.pth`), stage I inside.

    The sizes are read off the tensors. The sentence vectors that it was trained with come from
    Reed's encoder, which is not in the file, nor is a discriminator: both are left untrained.

    Raises:
        UserError: the file holds something else.
    """
    state, path = files[0].tensors, files[0].path
    if len(files) > 1:
        raise UserError(f"import-weights stackgan needs one file; {files[1].path} is one too many.")
    inner = {k.removeprefix("STAGE1_G."): v for k, v in state.items() if k.startswith("STAGE1_G.")}
    outer = {k: v for k, v in state.items() if not k.startswith("STAGE1_G.")}
    if "hr_joint.0.weight" not in outer or "fc.0.weight" not in inner:
        raise UserError(
            f"{path} is no generator of StackGAN's stage II, which holds stage I under STAGE1_G.*; "
            "give the authors' netG_epoch_N.pth of stage II."
        )
    condition = inner["ca_net.fc.weight"].shape[0] // 2
    joined, width = outer["hr_joint.0.weight"].shape[1], outer["encoder.0.weight"].shape[0]
    blocks = {key.split(".")[1] for key in outer if key.startswith("residual.")}
    config = replace(
        PRESETS["paper"],
        encoder=replace(PRESETS["paper"].encoder, width=inner["ca_net.fc.weight"].shape[1]),
        model=StackGANConfig(
            start=STAGE_ONE,
            noise=inner["fc.0.weight"].shape[1] - condition,
            condition=joined - 4 * width,
            generator=width,
            residual=len(blocks),
        ),
    )
    weights = {f"first.{stackgan_key(key)}": value for key, value in inner.items()}
    weights |= {f"generator.{stackgan_key(key)}": value for key, value in outer.items()}
    return Imported(
        config,
        weights,
        ("text.", "discriminator.", "steps"),
        "The file holds no text encoder: until one is trained, captions ask for nothing.",
    )
