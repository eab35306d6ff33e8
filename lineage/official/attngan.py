"""Key maps, verifier and importer of AttnGAN (taoxugit/AttnGAN).

Layers keep the authors' order, so that names are all that differs. A discriminator's `img_code_s16`
ends at the eleventh layer of ours, and each block after it has three.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lineage.attngan.attngan import AttnGANConfig, Drawn, Generator
from lineage.attngan.damsm import (
    DAMSMConfig,
    RegionHeads,
    Regions,
    matching_terms,
    region_contexts,
    sentence_similarity,
    word_similarity,
)
from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.nn.conditional_discriminator import (
    Discriminator,
    discriminator_terms,
    generator_terms,
    kl_term,
    pair_logits,
)
from lineage.official import Outputs
from lineage.official.cgan import enlarged
from lineage.official.importing import Given, Imported
from lineage.official.verify import Reference
from lineage.recipes.attngan import PRESETS
from lineage.text.contract import TextFeatures
from lineage.text.encoders import LSTMEncoder
from lineage.text.tokenizer import SPECIAL, WordTokenizer

START = 64  # side of the smallest official picture


def attngan_config(official: Mapping[str, Any]) -> AttnGANConfig:
    """Our configuration for the official one."""
    return AttnGANConfig(
        scales=official["TREE.BRANCH_NUM"],
        noise=official["GAN.Z_DIM"],
        condition=official["GAN.CONDITION_DIM"],
        generator=official["GAN.GF_DIM"],
        discriminator=official["GAN.DF_DIM"],
        residual=official["GAN.R_NUM"],
        damsm=official["SMOOTH"]["LAMBDA"],
    )


# --- names --------------------------------------------------------------------


def generator_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `G_NET` by our names."""
    return {generator_key(k): v.flatten(1) if ".att." in k else v for k, v in official.items()}


def generator_key(name: str) -> str:
    """A name in `G_NET` -> ours."""
    name = re.sub(r"^h_net1\.upsample(\d)\.", lambda m: f"first.upsample.{int(m[1]) - 1}.", name)
    name = name.replace("h_net1.", "first.")
    name = re.sub(r"^h_net(\d)\.", lambda m: f"next.{int(m[1]) - 2}.", name)
    name = name.replace("att.conv_context", "attention.project")
    return re.sub(r"^img_net(\d)\.img\.", lambda m: f"pictures.{int(m[1]) - 1}.", name)


def discriminator_key(name: str) -> str:
    """A name in `D_NET64`, `D_NET128`, ... -> ours."""

    def layer(found: re.Match[str]) -> str:
        halvings = int(found[1]).bit_length() - 5  # after 16: s32 has one, s64 two
        narrowing = int(found[2] or 0)  # 1 for the first block back to fewer channels
        first = 11 + 3 * (halvings - 1 + narrowing) if halvings else 0
        return f"encode_img.{first + int(found[3])}."

    name = re.sub(r"^img_code_s(\d+)(?:_(\d))?\.(\d+)\.", layer, name)
    name = name.replace("UNCOND_DNET.outlogits.0.", "alone.")
    return name.replace("COND_DNET.jointConv.", "joint.").replace(
        "COND_DNET.outlogits.0.", "joint.3."
    )


def text_key(name: str) -> str:
    """A name in `RNN_ENCODER` -> ours."""
    return name.replace("encoder.weight", "table.weight").replace("rnn.", "lstm.")


# --- verify -------------------------------------------------------------------


@torch.no_grad()
def attngan(reference: Reference) -> Outputs:
    """Every output of taoxugit/AttnGAN that a reference file may hold."""
    given, config = reference.inputs, attngan_config(reference.config)
    smooth = reference.config["SMOOTH"]
    damsm = DAMSMConfig(
        gamma1=smooth["GAMMA1"], gamma2=smooth["GAMMA2"], gamma3=smooth["GAMMA3"], same="class"
    )
    heads = RegionHeads(reference.config["TEXT.EMBEDDING_DIM"])
    heads.load_state_dict(reference.state["CNN_ENCODER"])
    regions = heads(given["mixed_6e"], given["pool_2048"])
    height, width = given["mixed_6e"].shape[2:]
    outputs: dict[str, Any] = {
        "region_features": regions.local.mT.unflatten(2, (height, width)),
        "cnn_code": regions.whole,
        **_text(reference, "RNN_ENCODER", "lstm", ""),
        **_text(reference, "RNN_ENCODER_GRU", "gru", "_gru"),
    }
    looked, weights = _own_regions(
        given["func_attention_query"].mT, given["func_attention_context"], damsm.gamma1
    )
    outputs["func_attention_weighted"] = looked.mT
    outputs["func_attention_map"] = weights
    outputs |= _generator(reference, config)
    outputs |= _matching(given, damsm)
    return outputs | _losses(reference, config, damsm)


def _text(reference: Reference, network: str, cell: str, suffix: str) -> dict[str, Tensor]:
    """Words (B, D, L) and sentence (B, D) of one of the two encoders."""
    if network not in reference.state:
        return {}
    official = reference.config
    encoder = text_encoder(
        official["vocab(ntoken)"], official["ninput"], official["TEXT.EMBEDDING_DIM"], cell
    )
    encoder.load_state_dict({text_key(k): v for k, v in reference.state[network].items()})
    ids, lengths = reference.inputs["captions"], reference.inputs["cap_lens"]
    ids = ids[:, : int(lengths.max())]
    words, sentence = encoder(ids, torch.arange(ids.shape[1]) < lengths[:, None])
    return {f"words_emb{suffix}": words.mT, f"sent_emb{suffix}": sentence}


def text_encoder(vocabulary: int, inputs: int, width: int, cell: str) -> LSTMEncoder:
    """The authors' text encoder, in evaluation mode, with words that nobody will ask for."""
    words = [str(number) for number in range(vocabulary - len(SPECIAL))]
    config = TextConfig(width=width, inputs=inputs, cell=cell)
    return LSTMEncoder(config, WordTokenizer(words)).eval()


def _own_regions(words: Tensor, places: Tensor, gamma1: float) -> tuple[Tensor, Tensor]:
    """Each caption's words (B, L, D) at its own picture's places (B, D, H, W): contexts (B, L, D),
    attention (B, L, H, W).
    """
    own = torch.arange(len(words))
    every = torch.ones(words.shape[:2], dtype=torch.bool)
    contexts, attention = region_contexts(words, every, places.flatten(2).mT, gamma1)
    return contexts[own, own], attention[own, own].unflatten(2, places.shape[2:])


def _generator(reference: Reference, config: AttnGANConfig) -> dict[str, Any]:
    """Pictures and attention in evaluation mode (with each caption's own mask, with none, and with
    those of the public code), and in training mode.
    """
    given = reference.inputs
    size = START * 2 ** (config.scales - 1)
    width = reference.config["TEXT.EMBEDDING_DIM"]

    def network(official_mask: bool = False) -> Generator:
        made = Generator(replace(config, official_mask=official_mask), width, size)
        made.load_state_dict(generator_state(reference.state["G_NET"]))
        return made.eval()

    words = given["gen_words"].mT  # (B, L, D)
    own = given["gen_mask"] == 0
    ids = own.long()
    masked = TextFeatures(words, own, given["gen_sent"], ids)
    unmasked = replace(masked, mask=torch.ones_like(own))

    def draw(generator: Generator, text: TextFeatures) -> Drawn:
        return generator(text, given["z"], given["eps"])

    generator = network()
    drawn = draw(generator, masked)
    code, mu, log_variance = generator.ca_net(masked.sentence, given["eps"])
    every = {
        "": drawn,
        "nomask_": draw(generator, unmasked),
        "officialmask_": draw(network(official_mask=True), masked),
        "train_": draw(copy.deepcopy(generator).train(), unmasked),
    }
    full: dict[str, Tensor] = {"h_code1": generator.first(given["z"], code)}
    for prefix, one in every.items():
        full |= {f"{prefix}img{image.shape[-1]}": image for image in one.images}
        full |= {f"{prefix}att{k}": weights for k, weights in enumerate(one.attention, 1)}
    outputs: dict[str, Any] = {name: _excerpt(name, full) for name in reference.outputs}
    outputs = {name: value for name, value in outputs.items() if value is not None}
    return {
        **outputs,
        "c_code": code,
        "mu": mu,
        "logvar": log_variance,
        "KL": kl_term(mu, log_variance),
    }


def _excerpt(name: str, full: Mapping[str, Tensor]) -> Tensor | None:
    """The output `name` from a whole tensor: every n-th pixel of it, or a piece of its middle."""
    if name in full:
        return full[name]
    base, _, how = name.rpartition("_")
    if base not in full:
        return None
    if how == "crop":
        return full[base][..., 96:144, 96:144]
    step = int(how.removeprefix("stride"))
    return full[base][..., ::step, ::step]


def _matching(given: Mapping[str, Tensor], config: DAMSMConfig) -> dict[str, Tensor]:
    """The DAMSM's losses, without and with classes, and what two captions look at."""
    text, regions, classes = _pairs(given)
    words, sentence = _similarities(config, text, regions)
    alone = torch.eye(len(text), dtype=torch.bool)
    outputs: dict[str, Tensor] = {}
    for suffix, same in (("", alone), ("_classmask", classes)):
        outputs[f"words_loss{suffix}"] = torch.stack(matching_terms(words, same))
        outputs[f"sent_loss{suffix}"] = torch.stack(matching_terms(sentence, same))
    places = given["damsm_regions"]
    for row, length in enumerate(given["damsm_cap_lens"].tolist()):
        _, weights = _own_regions(
            text.words[row : row + 1, :length], places[row : row + 1], config.gamma1
        )
        outputs[f"damsm_att_map{row}"] = weights
    return outputs


def _pairs(given: Mapping[str, Tensor]) -> tuple[TextFeatures, Regions, Tensor]:
    """The captions and pictures of the DAMSM's inputs, and which have the same class (B, B)."""
    words, lengths = given["damsm_words"].mT, given["damsm_cap_lens"]
    mask = torch.arange(words.shape[1]) < lengths[:, None]
    text = TextFeatures(words, mask, given["damsm_sent"], mask.long())
    regions = Regions(given["damsm_regions"].flatten(2).mT, given["damsm_cnn_code"])
    classes = given["damsm_class_ids"]
    return text, regions, classes[:, None] == classes[None]


def _similarities(
    config: DAMSMConfig, text: TextFeatures, regions: Regions
) -> tuple[Tensor, Tensor]:
    """gamma_3 times both, (B, B) each."""
    words = word_similarity(config, text.words, text.mask, regions.local)
    return config.gamma3 * words, config.gamma3 * sentence_similarity(text.sentence, regions.whole)


def _losses(reference: Reference, config: AttnGANConfig, damsm: DAMSMConfig) -> dict[str, Tensor]:
    """Discriminators and their losses, and the whole loss of the generator."""
    given = reference.inputs
    outputs: dict[str, Tensor] = {}
    told, fake = given["gen_sent"], reference.outputs["img64"]
    rows = len(told)
    text, regions, classes = _pairs(given)
    total = torch.zeros(())
    for k in range(config.scales):
        side = START * 2**k
        look = Discriminator(config.discriminator, told.shape[1], side, alone=True)
        state = reference.state[f"D_NET{side}"]
        look.load_state_dict({discriminator_key(key): value for key, value in state.items()})
        look.eval()
        real, drawn = enlarged(given[f"real{side}_16x16"], side), enlarged(fake, side)
        seen = look.features(real)
        terms = discriminator_terms(pair_logits(look, real, drawn, told))
        outputs |= {
            f"D_NET{side}_feat": seen,
            f"D_NET{side}_cond": look.score(seen, told).sigmoid(),
            f"D_NET{side}_uncond": look.score_alone(seen).sigmoid(),
            f"D_NET{side}_loss": torch.stack(list(terms.values())).sum(),
        }
        total += sum(generator_terms(look, drawn, text.sentence[:rows]).values())
    few = slice(rows)
    for similarity in _similarities(
        damsm, text[few], Regions(regions.local[few], regions.whole[few])
    ):
        total += config.damsm * sum(matching_terms(similarity, classes[few, few]))
    return {**outputs, "generator_loss_total": total}


# --- published checkpoints ------------------------------------------------------


def import_attngan(files: Sequence[Given]) -> Imported:
    """The authors' generator (`bird_AttnGAN2.pth`), their text encoder (`text_encoder200.pth`), and
    the words of their vocabulary, a line each in the order of their numbers.

    The sizes are read off the tensors. The image encoder and the discriminators are not in these
    files: they are left untrained.

    Raises:
        UserError: one of the three is missing, or they do not belong together.
    """
    drawing = _the(files, "ca_net.fc.weight", "generator (bird_AttnGAN2.pth)")
    reading = _the(files, "rnn.weight_ih_l0", "text encoder (text_encoder200.pth)")
    lists = [file for file in files if file.lines is not None]
    if len(lists) != 1:
        raise UserError(
            "import-weights attngan needs the list of words, a text file of one a line."
        )
    words = [line.strip() for line in cast(list[str], lists[0].lines)]
    words = words[1:] if words[:1] == ["<end>"] else words
    generator, text = drawing.tensors, reading.tensors
    table = text["encoder.weight"]
    if len(words) != len(table) - 1:
        raise UserError(
            f"{lists[0].path} has {len(words):,} words, but the text encoder knows "
            f"{len(table) - 1:,}: give the list that it was trained with, in its order."
        )
    rows = torch.zeros(len(words) + len(SPECIAL), table.shape[1])
    rows[len(SPECIAL) :] = table[1:]
    sentence = 2 * text["rnn.weight_hh_l0"].shape[1]
    cell = "gru" if text["rnn.weight_ih_l0"].shape[0] == 3 * sentence // 2 else "lstm"
    scales = sum(key.startswith("img_net") for key in generator)
    blocks = {key.split(".")[2] for key in generator if key.startswith("h_net2.residual.")}
    condition = generator["ca_net.fc.weight"].shape[0] // 4
    paper = PRESETS["paper"]
    config = replace(
        paper,
        size=START * 2 ** (scales - 1),
        encoder=replace(
            paper.encoder, width=sentence, inputs=table.shape[1], cell=cell, vocabulary=len(rows)
        ),
        model=replace(
            paper.model,
            scales=scales,
            noise=generator["h_net1.fc.0.weight"].shape[1] - condition,
            condition=condition,
            generator=generator["img_net1.img.0.weight"].shape[1],
            residual=len(blocks),
        ),
    )
    weights = {f"generator.{key}": value for key, value in generator_state(generator).items()}
    weights |= {f"text.{text_key(key)}": value for key, value in text.items()}
    return Imported(
        config,
        weights | {"text.table.weight": rows},
        ("matcher.", "discriminators.", "steps"),
        "The files hold no image encoder and no discriminators: those are untrained.",
        WordTokenizer(words, drop=True),
    )


def _the(files: Sequence[Given], key: str, what: str) -> Given:
    """The one file that has a tensor `key`."""
    found = [file for file in files if key in file.tensors]
    if len(found) != 1:
        raise UserError(f"import-weights attngan needs the authors' {what}, among other files.")
    return found[0]
