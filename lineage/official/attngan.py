"""Key map, verifier and import of AttnGAN (taoxugit/AttnGAN).

Layers keep the authors' order, so that only names differ. A discriminator's `img_code_s16` ends at
the eleventh layer of ours, and each block after it has three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lineage.attngan.attngan import AttnGAN, AttnGANConfig, Generator, GeneratorOutput
from lineage.attngan.damsm import (
    DAMSM,
    DAMSMConfig,
    ImageFeatures,
    RegionHeads,
    matching_losses,
    region_contexts,
    sentence_similarity,
    word_similarity,
)
from lineage.config import TextConfig
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.official.importing import CheckpointFile, Imported
from lineage.official.stackgan import RecordedNoise, RecordedText, crop, enlarged
from lineage.official.verify import NotComputed, Verifier, output
from lineage.recipes.attngan import PRESETS
from lineage.text.contract import TextFeatures
from lineage.text.encoders import LSTMEncoder
from lineage.text.tokenizer import SPECIAL, WordTokenizer

SMALLEST_SIDE = 64  # of the official pictures

# --- names ----------------------------------------------------------------------------------------


def generator_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `G_NET` by our names."""
    return {generator_key(k): v.flatten(1) if ".att." in k else v for k, v in official.items()}


def generator_key(name: str) -> str:
    """A name in `G_NET` -> ours."""
    name = re.sub(
        r"^h_net1\.upsample(\d)\.", lambda m: f"first_stage.upsample.{int(m[1]) - 1}.", name
    )
    name = name.replace("h_net1.", "first_stage.")
    name = re.sub(r"^h_net(\d)\.", lambda m: f"next_stages.{int(m[1]) - 2}.", name)
    name = name.replace("att.conv_context", "attention.project_words")
    return re.sub(r"^img_net(\d)\.img\.", lambda m: f"image_heads.{int(m[1]) - 1}.", name)


def discriminator_key(name: str) -> str:
    """A name in `D_NET64`, `D_NET128`, ... -> ours."""

    def layer(match: re.Match[str]) -> str:
        halvings = int(match[1]).bit_length() - 5  # after 16: s32 has one, s64 two
        narrowing = int(match[2] or 0)  # 1 for the first block back to fewer channels
        first = 11 + 3 * (halvings - 1 + narrowing) if halvings else 0
        return f"encode_img.{first + int(match[3])}."

    name = re.sub(r"^img_code_s(\d+)(?:_(\d))?\.(\d+)\.", layer, name)
    name = name.replace("UNCOND_DNET.outlogits.0.", "uncond_head.")
    name = name.replace("COND_DNET.jointConv.", "cond_head.")
    return name.replace("COND_DNET.outlogits.0.", "cond_head.3.")


def text_key(name: str) -> str:
    """A name in `RNN_ENCODER` -> ours."""
    return name.replace("encoder.weight", "token_emb.weight")


def text_encoder(vocab_size: int, embed_dim: int, width: int, cell: str) -> LSTMEncoder:
    """The authors' text encoder in evaluation mode, with numbers as its words."""
    words = [str(number) for number in range(vocab_size - len(SPECIAL))]
    config = TextConfig(width=width, embed_dim=embed_dim, cell=cast(Any, cell))
    return LSTMEncoder(config, WordTokenizer(words)).eval()


# --- verify ---------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """Placeholder for a network whose output is in the reference file."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *inputs: Any) -> Any:
        return self.value


def own_regions(words: Tensor, places: Tensor, gamma1: float) -> tuple[Tensor, Tensor]:
    """Each caption's words (B, L, D) on its own picture's places (B, D, H, W): contexts (B, L, D),
    attention (B, L, H, W).
    """
    rows = torch.arange(len(words))
    mask = torch.ones(words.shape[:2], dtype=torch.bool)
    contexts, attention = region_contexts(words, mask, places.flatten(2).mT, gamma1)
    return contexts[rows, rows], attention[rows, rows].unflatten(2, places.shape[2:])


class AttnGANOutputs(Verifier):
    """Outputs of all networks; adversarial losses come from our own training step."""

    name = "attngan"
    source = ("taoxugit/AttnGAN",)

    @cached_property
    def gan_config(self) -> AttnGANConfig:
        official = self.config
        return AttnGANConfig(
            num_scales=official["TREE.BRANCH_NUM"],
            z_dim=official["GAN.Z_DIM"],
            cond_dim=official["GAN.CONDITION_DIM"],
            gen_channels=official["GAN.GF_DIM"],
            disc_channels=official["GAN.DF_DIM"],
            num_res_blocks=official["GAN.R_NUM"],
            damsm_weight=official["SMOOTH"]["LAMBDA"],
            kl_weight=1.0,
        )

    @cached_property
    def damsm_config(self) -> DAMSMConfig:
        smooth = self.config["SMOOTH"]
        return DAMSMConfig(
            gamma1=smooth["GAMMA1"], gamma2=smooth["GAMMA2"], gamma3=smooth["GAMMA3"], same="class"
        )

    @property
    def width(self) -> int:
        """Width of words and sentence."""
        return int(self.config["TEXT.EMBEDDING_DIM"])

    @property
    def size(self) -> int:
        """Side of the largest picture."""
        return SMALLEST_SIDE * 2 ** (self.gan_config.num_scales - 1)

    # --- text and regions -------------------------------------------------------------------------

    @output(r"(words|sent)_emb(_gru)?")
    def text(self, kind: str, gru: str | None) -> Tensor:
        official = self.config
        encoder = text_encoder(
            official["vocab(ntoken)"], official["ninput"], self.width, "gru" if gru else "lstm"
        )
        state = self.state["RNN_ENCODER" + (gru or "").upper()]
        encoder.load_state_dict({text_key(k): v for k, v in state.items()})
        ids, lengths = self.inputs["captions"], self.inputs["cap_lens"]
        ids = ids[:, : int(lengths.max())]
        words, sentence = encoder(ids, torch.arange(ids.shape[1]) < lengths[:, None])
        return words.mT if kind == "words" else sentence

    @output("(region_features|cnn_code)")
    def image_features(self, name: str) -> Tensor:
        heads = RegionHeads(self.width, self.width)
        heads.load_state_dict(self.state["CNN_ENCODER"])
        grid = self.inputs["mixed_6e"]
        image = heads(grid, self.inputs["pool_2048"])
        regions = image.regions.mT.unflatten(2, grid.shape[2:])
        return regions if name == "region_features" else image.global_vector

    @output("func_attention_(weighted|map)")
    def func_attention(self, kind: str) -> Tensor:
        query, places = self.inputs["func_attention_query"], self.inputs["func_attention_context"]
        contexts, attention = own_regions(query.mT, places, self.damsm_config.gamma1)
        return contexts.mT if kind == "weighted" else attention

    # --- the generator ----------------------------------------------------------------------------

    def generator(self, official_mask: bool = False) -> Generator:
        """The generator with the official weights, in evaluation mode."""
        config = replace(self.gan_config, official_mask=official_mask)
        generator = Generator(config, self.width, self.width, self.size)
        generator.load_state_dict(generator_state(self.state["G_NET"]))
        return generator.eval()

    def generator_text(self, masked: bool) -> TextFeatures:
        """The generator's captions, with their masks or with none."""
        mask = self.inputs["gen_mask"] == 0
        mask = mask if masked else torch.ones_like(mask)
        return TextFeatures(self.inputs["gen_words"].mT, mask, self.inputs["gen_sent"], mask.long())

    def generated(self, mode: str) -> GeneratorOutput:
        """Output of the generator: in evaluation mode with each caption's own mask (""), with none
        (`nomask_`) or with those of the public code (`officialmask_`), or in training mode with
        none (`train_`).
        """
        generator = self.generator(official_mask=mode == "officialmask_")
        generator.train(mode == "train_")
        text = self.generator_text(masked=mode in ("", "officialmask_"))
        generated: GeneratorOutput = generator(text, self.inputs["z"], self.inputs["eps"])
        return generated

    @output(r"(nomask_|officialmask_|train_|)(img|att)(\d+)(?:_(crop)|_stride(\d+))?")
    def pictures(
        self, mode: str, kind: str, number: str, cropped: str | None, stride: str | None
    ) -> Tensor:
        """`img64` by its side, `att1` by its number; whole, a crop, or every n-th pixel."""
        generated = self.generated(mode)
        tensors = {f"img{image.shape[-1]}": image for image in generated.images}
        tensors |= {f"att{k}": weights for k, weights in enumerate(generated.attention, 1)}
        if f"{kind}{number}" not in tensors:
            raise NotComputed(f"the generator has no {kind}{number}")
        return self._part(f"{mode}{kind}{number}", tensors[f"{kind}{number}"], cropped, stride)

    @output(r"h_code1(?:_(crop)|_stride(\d+))?")
    def hidden(self, cropped: str | None, stride: str | None) -> Tensor:
        hidden = self.generator().first_stage(self.inputs["z"], self.gaussian("c_code"))
        return self._part("h_code1", hidden, cropped, stride)

    def _part(self, name: str, x: Tensor, cropped: str | None, stride: str | None) -> Tensor:
        if cropped:
            return crop(self, f"{name}_crop", x)
        return x[..., :: int(stride or 1), :: int(stride or 1)]

    @output("(c_code|mu|logvar)")
    def gaussian(self, name: str) -> Tensor:
        ca_net = self.generator().ca_net
        values = ca_net(self.inputs["gen_sent"], self.inputs["eps"])
        return cast(Tensor, dict(zip(("c_code", "mu", "logvar"), values, strict=True))[name])

    # --- the DAMSM --------------------------------------------------------------------------------

    def damsm_pairs(self, rows: int | None = None) -> tuple[TextFeatures, ImageFeatures, Tensor]:
        """The first captions and pictures of the DAMSM's inputs, and their classes (B,)."""
        part = slice(rows)
        words, lengths = self.inputs["damsm_words"].mT[part], self.inputs["damsm_cap_lens"][part]
        mask = torch.arange(words.shape[1]) < lengths[:, None]
        text = TextFeatures(words, mask, self.inputs["damsm_sent"][part], mask.long())
        regions = self.inputs["damsm_regions"][part].flatten(2).mT
        image = ImageFeatures(regions, self.inputs["damsm_cnn_code"][part])
        return text, image, self.inputs["damsm_class_ids"][part]

    @output(r"(words|sent)_loss(_classmask)?")
    def matching_loss(self, kind: str, classmask: str | None) -> Tensor:
        config, (text, image, classes) = self.damsm_config, self.damsm_pairs()
        if kind == "words":
            similarity = word_similarity(config, text.words, text.mask, image.regions)
        else:
            similarity = sentence_similarity(text.sentence, image.global_vector)
        own = torch.eye(len(text), dtype=torch.bool)
        same = classes[:, None] == classes[None] if classmask else own
        return torch.stack(matching_losses(config.gamma3 * similarity, same))

    @output(r"damsm_att_map(\d+)")
    def attention_map(self, number: str) -> Tensor:
        row = slice(int(number), int(number) + 1)
        length = int(self.inputs["damsm_cap_lens"][row])
        words = self.inputs["damsm_words"].mT[row, :length]
        return own_regions(words, self.inputs["damsm_regions"][row], self.damsm_config.gamma1)[1]

    # --- adversarial losses -----------------------------------------------------------------------

    def system(self, config: AttnGANConfig, image: ImageFeatures | None = None) -> AttnGAN:
        """Our system in evaluation mode; its image encoder returns `image`."""
        damsm = SimpleNamespace(
            text=RecordedText(self.width), image_encoder=Recorded(image), config=self.damsm_config
        )
        return AttnGAN(config, cast(DAMSM, damsm), self.size).eval()

    def batch(self, real: Tensor, classes: Tensor | None = None) -> Batch:
        """Real pictures, enlarged, with captions that all differ."""
        names = [str(row) for row in range(len(real))]
        return Batch(enlarged(real, self.size), names, classes, names)

    def load_discriminator(self, disc: ConditionalDiscriminator, side: int) -> None:
        state = self.state[f"D_NET{side}"]
        disc.load_state_dict({discriminator_key(key): value for key, value in state.items()})

    def fakes(self) -> GeneratorOutput:
        """The smallest generated pictures, enlarged to every side."""
        small = self.outputs["img64"] if "img64" in self.outputs else self.generated("").images[0]
        sides = self.gan_config.sides(self.size)
        none = torch.zeros(len(small), self.gan_config.cond_dim)
        return GeneratorOutput([enlarged(small, side) for side in sides], [], none, none)

    def real(self, side: str) -> Tensor:
        """Real pictures of a side, possibly stored smaller."""
        name = next(name for name in self.inputs if name.split("_")[0] == f"real{side}")
        return self.inputs[name]

    @output(r"D_NET(\d+)_(feat|cond|uncond)")
    def scores(self, side: str, kind: str) -> Tensor:
        disc = ConditionalDiscriminator(self.gan_config.disc_channels, self.width, int(side), True)
        self.load_discriminator(disc.eval(), int(side))
        features = disc.features(enlarged(self.real(side), int(side)))
        if kind == "feat":
            return features
        if kind == "cond":
            return disc.cond_logits(features, self.inputs["gen_sent"]).sigmoid()
        return disc.uncond_logits(features).sigmoid()

    @output(r"D_NET(\d+)_loss")
    def discriminator_loss(self, side: str) -> Tensor:
        """The turn of one discriminator in our training step, on pictures of the file."""
        system = self.system(self.gan_config)
        system.generator = cast(Generator, Recorded(self.fakes()))
        disc = system.discs()[system.sides.index(int(side))]
        self.load_discriminator(disc, int(side))
        batch, text = self.batch(self.real(side)), self.generator_text(masked=True)
        noise = RecordedNoise(self.inputs["z"], self.inputs["eps"])
        turns = system.losses(batch, text, noise)
        terms = next(turn.terms for turn in turns if turn.group == f"discriminator{side}")
        return torch.stack(list(terms.values())).sum()

    @output("generator_loss_total")
    def generator_loss(self) -> Tensor:
        """The generator's terms in our training step, without KL, on pictures of the file."""
        fakes = self.fakes()
        text, image, classes = self.damsm_pairs(len(fakes.mu))
        system = self.system(self.gan_config, image)
        for side, disc in zip(system.sides, system.discs(), strict=True):
            self.load_discriminator(disc, side)
        terms = system.generator_terms(fakes, self.batch(fakes.images[0], classes), text)
        return torch.stack([term for name, term in terms.items() if name != "kl"]).sum()

    @output("KL")
    def kl(self) -> Tensor:
        generated = self.generated("")
        system = self.system(replace(self.gan_config, damsm_weight=0.0))
        batch, text = self.batch(generated.images[0]), self.generator_text(masked=True)
        return system.generator_terms(generated, batch, text)["kl"]


# --- published checkpoints ------------------------------------------------------------------------


def import_weights(files: Sequence[CheckpointFile]) -> Imported:
    """The authors' generator (`bird_AttnGAN2.pth`), their text encoder (`text_encoder200.pth`), and
    the words of their vocabulary, one a line in the order of their ids.

    The sizes are read off the tensors. These files hold neither the image encoder nor the
    discriminators, which stay untrained.

    Raises:
        UserError: one of the three is missing, or they do not belong together.
    """
    generator = _the(files, "ca_net.fc.weight", "generator (bird_AttnGAN2.pth)").tensors
    text = _the(files, "rnn.weight_ih_l0", "text encoder (text_encoder200.pth)").tensors
    lists = [file for file in files if file.lines is not None]
    if len(lists) != 1:
        raise UserError(
            "import-weights attngan needs the list of words, a text file of one a line."
        )
    words = [line.strip() for line in cast(list[str], lists[0].lines)]
    words = words[1:] if words[:1] == ["<end>"] else words
    table = text["encoder.weight"]
    if len(words) != len(table) - 1:
        raise UserError(
            f"{lists[0].path} has {len(words):,} words, but the text encoder was trained with "
            f"{len(table) - 1:,}: give its list of words, in its order."
        )
    token_emb = torch.zeros(len(words) + len(SPECIAL), table.shape[1])
    token_emb[len(SPECIAL) :] = table[1:]
    width = 2 * text["rnn.weight_hh_l0"].shape[1]
    cell = "gru" if text["rnn.weight_ih_l0"].shape[0] == 3 * width // 2 else "lstm"
    num_scales = sum(key.startswith("img_net") for key in generator)
    res_blocks = {key.split(".")[2] for key in generator if key.startswith("h_net2.residual.")}
    cond_dim = generator["ca_net.fc.weight"].shape[0] // 4
    paper = PRESETS["paper"]
    config = replace(
        paper,
        size=SMALLEST_SIDE * 2 ** (num_scales - 1),
        encoder=replace(
            paper.encoder,
            width=width,
            embed_dim=table.shape[1],
            cell=cast(Any, cell),
            vocab_size=len(token_emb),
        ),
        model=replace(
            paper.model,
            num_scales=num_scales,
            z_dim=generator["h_net1.fc.0.weight"].shape[1] - cond_dim,
            cond_dim=cond_dim,
            gen_channels=generator["img_net1.img.0.weight"].shape[1],
            num_res_blocks=len(res_blocks),
        ),
    )
    weights = {f"generator.{key}": value for key, value in generator_state(generator).items()}
    weights |= {f"text.{text_key(key)}": value for key, value in text.items()}
    return Imported(
        config,
        weights | {"text.token_emb.weight": token_emb},
        absent=("image_encoder.", "discriminators.", "step"),
        note="The files hold no image encoder and no discriminators: those are untrained.",
        tokenizer=WordTokenizer(words, drop_unknown=True),
    )


def _the(files: Sequence[CheckpointFile], key: str, what: str) -> CheckpointFile:
    """The one file that has a tensor `key`."""
    fitting = [file for file in files if key in file.tensors]
    if len(fitting) != 1:
        raise UserError(f"import-weights attngan needs the authors' {what}, among other files.")
    return fitting[0]
