"""Key map, verifier and import of StackGAN (hanzhanggit/StackGAN-Pytorch).

The classes of lineage/cgan/stackgan.py keep the order of the authors' layers, so their names differ
in few places: `upsample1.1` is `upsample.0.1`, `get_cond_logits.outlogits` is `cond_head`, and
`get_uncond_logits.outlogits.0` is `uncond_head`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lineage.cgan.stackgan import (
    GeneratorOutput,
    StackGANConfig,
    StackGANStage,
    StageOne,
    StageTwo,
)
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.nn.noise import NoiseStreams
from lineage.official.importing import CheckpointFile, Imported
from lineage.official.verify import NotComputed, Verifier, output
from lineage.recipes.stackgan import PRESETS
from lineage.text.contract import TextEncoder, TextFeatures


def stackgan_key(name: str) -> str:
    """An official parameter's name -> ours."""
    name = re.sub(r"^upsample(\d)\.", lambda m: f"upsample.{int(m[1]) - 1}.", name)
    name = name.replace("get_cond_logits.outlogits.", "cond_head.")
    return name.replace("get_uncond_logits.outlogits.0.", "uncond_head.")


def num_upsampled(state: Mapping[str, Tensor]) -> int:
    """Number of a generator's upsampling blocks."""
    return len({name.split(".")[0] for name in state if name.startswith("upsample")})


# --- verify ---------------------------------------------------------------------------------------


class RecordedNoise(NoiseStreams):
    """Noise of a reference file, in the order in which a system draws it."""

    def __init__(self, *noise: Tensor) -> None:
        super().__init__(())
        self._noise = iter(noise)

    def randn(self, *shape: int) -> Tensor:
        return next(self._noise)


class RecordedText(TextEncoder):
    """Placeholder for an encoder whose features are inputs of a reference file."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.word_dim = self.sentence_dim = dim

    def encode(self, captions: list[str]) -> TextFeatures:
        raise NotComputed("the file holds features, and no encoder")

    def null(self, count: int) -> TextFeatures:
        raise NotComputed("the file holds features, and no encoder")

    def tokens(self, caption: str) -> list[str]:
        return []


def enlarged(image: Tensor, side: int) -> Tensor:
    """(B, 3, s, s) -> (B, 3, side, side), every pixel repeated."""
    factor = side // image.shape[-1]
    return image.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def crop(verifier: Verifier, name: str, image: Tensor) -> Tensor:
    """The square of `image` that output `name` holds; its corner is stated in the file's sentence
    about it, and is at 96 pixels in both official programs.
    """
    sentence = str(verifier.reference.sentences.get(f"output/{name}", ""))
    stated = re.search(r"\[(\d+):\d+", sentence)
    start = int(stated[1]) if stated else 96
    part = slice(start, start + verifier.outputs[name].shape[-1])
    return image[..., part, part]


def sum_in_double(network: nn.Module) -> None:
    """Let the linear layers of `network` sum their products in float64 and round once.

    BatchNorm1d over a batch of two magnifies the last bits of the linear layers before it about a
    thousandfold, and in float32 those bits depend on the processor's order of summation.
    """

    def rounded_once(layer: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.double()
        summed = nn.functional.linear(args[0].double(), layer.weight.double(), bias)
        return summed.to(args[0].dtype)

    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(rounded_once)


class StackGANOutputs(Verifier):
    """Outputs of both stages; losses come from our own training step."""

    name = "stackgan"
    source = ("hanzhanggit/StackGAN",)

    @cached_property
    def gan_config(self) -> StackGANConfig:
        official = self.config
        return StackGANConfig(
            stage1_size=4 * 2 ** num_upsampled(self.state["STAGE1_G"]),
            z_dim=official["Z_DIM"],
            cond_dim=official["GAN.CONDITION_DIM"],
            gen_channels=official["GAN.GF_DIM"],
            disc_channels=official["GAN.DF_DIM"],
            num_res_blocks=official["GAN.R_NUM"],
            kl_weight=1.0,
        )

    @cached_property
    def stage1(self) -> StageOne:
        system = StageOne(self.gan_config, RecordedText(self.config["TEXT.DIMENSION"]))
        self._load(system.generator, "STAGE1_G")
        return system.eval()

    @cached_property
    def stage2(self) -> StageTwo:
        size = self.gan_config.stage1_size // 4 * 2 ** num_upsampled(self.state["STAGE2_G"])
        system = StageTwo(self.gan_config, self.stage1, size)
        self._load(system.generator, "STAGE2_G")
        return system.eval()

    def stage(self, number: str) -> StackGANStage:
        return self.stage1 if number == "1" else self.stage2

    def discriminator(self, number: str) -> ConditionalDiscriminator:
        """The discriminator of stage `number`, with the official weights."""
        disc = self.stage(number).discriminator
        self._load(disc, f"STAGE{number}_D")
        return disc

    def _load(self, network: nn.Module, name: str) -> None:
        network.load_state_dict({stackgan_key(k): v for k, v in self.state[name].items()})

    def sentence(self, number: str) -> Tensor:
        """Sentences of stage `number`; stage II takes the first rows."""
        sentence = self.inputs["txt_embedding"]
        return sentence if number == "1" else sentence[: len(self.inputs["eps_stage2"])]

    def noise(self, number: str) -> tuple[Tensor, ...]:
        """z and eps of stage I, and for stage II its own eps; each has the rows of `sentence`."""
        rows = len(self.sentence(number))
        noise = self.inputs["noise_z"][:rows], self.inputs["eps_stage1"][:rows]
        return noise if number == "1" else (*noise, self.inputs["eps_stage2"])

    def generated(self, number: str) -> GeneratorOutput:
        """Output of the generator of stage `number`, in evaluation mode."""
        noise = RecordedNoise(*self.noise(number))
        return self.stage(number).generator_output(self.sentence(number), noise)

    def generated_in_training(self, number: str) -> tuple[GeneratorOutput, nn.Module]:
        """The same in training mode, stage I's too, and the generator afterwards."""
        sentence, (z, eps, *eps2) = self.sentence(number), self.noise(number)
        stage1 = copy.deepcopy(self.stage1.generator).train()
        sum_in_double(stage1)
        small = stage1(sentence, z, eps)
        if number == "1":
            return small, stage1
        stage2 = copy.deepcopy(self.stage2.generator).train()
        sum_in_double(stage2)
        return stage2(small.image, sentence, *eps2), stage2

    def terms(self, number: str, real: Tensor) -> dict[str, Tensor]:
        """Loss terms of both turns of our training step, in evaluation mode."""
        sentence = self.sentence(number)
        ids = torch.ones(len(sentence), 1, dtype=torch.int64)
        text = TextFeatures(sentence[:, None], ids.bool(), sentence, ids)
        names = [str(row) for row in range(len(sentence))]
        noise = RecordedNoise(*self.noise(number))
        turns = self.stage(number).losses(Batch(real, names, None, names), text, noise)
        return {name: term for turn in turns for name, term in turn.terms.items()}

    def adversarial_terms(self, number: str) -> dict[str, Tensor]:
        """The same with the official discriminator and the file's real pictures."""
        self.discriminator(number)
        side = self.stage(number).size
        name = next(name for name in self.inputs if name.split("_")[0] == f"real{side}")
        return self.terms(number, enlarged(self.inputs[name], side))

    @output(r"(mu|logvar)_stage([12])")
    def gaussian(self, name: str, number: str) -> Tensor:
        value: Tensor = getattr(self.generated(number), name)
        return value

    @output("ca_c_code_stage1")
    def condition(self) -> Tensor:
        ca_net = self.stage1.generator.get_submodule("ca_net")
        c: Tensor = ca_net(self.sentence("1"), self.inputs["eps_stage1"])[0]
        return c

    @output(r"KL_stage([12])")
    def kl(self, number: str) -> Tensor:
        return self.terms(number, self.generated(number).image)["kl"]

    @output(r"img(\d+)_(eval|train)(_crop)?")
    def image(self, side: str, mode: str, cropped: str | None) -> Tensor:
        number = "1" if int(side) == self.gan_config.stage1_size else "2"
        if int(side) != self.stage(number).size:
            raise NotComputed(f"neither stage draws {side} pixels")
        if mode == "eval":
            image = self.generated(number).image
        else:
            image = self.generated_in_training(number)[0].image
        return crop(self, f"img{side}_{mode}_crop", image) if cropped else image

    @output(r"g([12])_after_train_(.+)")
    def buffer(self, number: str, name: str) -> Tensor:
        return self.generated_in_training(number)[1].get_buffer(stackgan_key(name))

    @output(r"d([12])_(feat|cond_prob|uncond_prob)_(eval|train)")
    def scores(self, number: str, kind: str, mode: str) -> Tensor:
        disc, fake = self.discriminator(number), self.generated(number)
        image = fake.image
        if mode == "train":
            disc = copy.deepcopy(disc).train()
            image = self.generated_in_training(number)[0].image
        features = disc.features(image)
        if kind == "feat":
            return features
        if kind == "cond_prob":
            return disc.cond_logits(features, fake.mu).sigmoid()
        return disc.uncond_logits(features).sigmoid()

    @output("d1_loss")
    def loss_1(self) -> Tensor:
        """The sum, and its parts without their weights."""
        terms = self.adversarial_terms("1")
        real, wrong, fake = terms["real"], terms["wrong"], terms["fake"]
        return torch.stack([real + wrong + fake, real, 2 * wrong, 2 * fake])

    @output("d2_loss")
    def loss_2(self) -> Tensor:
        """The sum, and its parts as the authors report them, means of two."""
        terms = self.adversarial_terms("2")
        real = terms["real"] + terms["real_uncond"]
        fake = terms["fake"] + terms["fake_uncond"]
        wrong = terms["wrong"]
        return torch.stack([real + wrong + fake, real, 3 * wrong, 3 / 2 * fake])

    @output(r"g([12])_loss")
    def generator_loss(self, number: str) -> Tensor:
        terms = self.adversarial_terms(number)
        return terms["cond"] + (terms["uncond"] if number == "2" else 0)


# --- published checkpoints ------------------------------------------------------------------------


def import_weights(files: Sequence[CheckpointFile]) -> Imported:
    """The generator of stage II as the authors publish it (`netG_epoch_N.pth`), stage I inside.

    The sizes are read off the tensors. The file holds neither the discriminator nor Reed's text
    encoder, whose sentences the generator was trained with: both stay untrained.

    Raises:
        UserError: the file is no such generator.
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
    paper = PRESETS["paper"]
    cond_dim = inner["ca_net.fc.weight"].shape[0] // 2
    channels = outer["encoder.0.weight"].shape[0]
    res_blocks = {key.split(".")[1] for key in outer if key.startswith("residual.")}
    config = replace(
        paper,
        encoder=replace(paper.encoder, width=inner["ca_net.fc.weight"].shape[1]),
        model=replace(
            paper.model,
            z_dim=inner["fc.0.weight"].shape[1] - cond_dim,
            cond_dim=outer["hr_joint.0.weight"].shape[1] - 4 * channels,
            gen_channels=channels,
            num_res_blocks=len(res_blocks),
        ),
    )
    weights = {f"stage1.{stackgan_key(key)}": value for key, value in inner.items()}
    weights |= {f"generator.{stackgan_key(key)}": value for key, value in outer.items()}
    return Imported(
        config,
        weights,
        absent=("text.", "discriminator.", "step"),
        note="The file holds no text encoder: until one is trained, captions have no effect.",
    )
