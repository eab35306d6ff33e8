"""The AttnGAN verifier: on the official numbers, and on a file of other sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.attngan.attngan import AttnGANConfig, Generator
from lineage.attngan.damsm import (
    DAMSMConfig,
    RegionHeads,
    region_contexts,
    sentence_similarity,
    word_similarity,
)
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.official.attngan import (
    AttnGANOutputs,
    discriminator_key,
    generator_key,
    generator_state,
    text_encoder,
    text_key,
)
from lineage.official.verify import FileCheck, as_text, read_reference, verify
from lineage.text.contract import TextFeatures

REAL = Path(__file__).resolve().parents[3] / "shared" / "reference" / "attngan.safetensors"
WIDTH, EMBED_DIM, VOCAB_SIZE = 8, 7, 23
GF, DF, RES_BLOCKS, Z_DIM, COND_DIM, SIDES = 3, 2, 1, 5, 4, (64, 128)
TEXTS, ROWS, PAIRS = 4, 3, 5  # captions of the encoder, of the generator, and of the DAMSM
GAMMA1, GAMMA2, GAMMA3, LAMBDA = 3.0, 4.0, 6.0, 2.0
OFFICIAL = {
    "TEXT.EMBEDDING_DIM": WIDTH,
    "GAN.CONDITION_DIM": COND_DIM,
    "GAN.GF_DIM": GF,
    "GAN.DF_DIM": DF,
    "GAN.R_NUM": RES_BLOCKS,
    "GAN.Z_DIM": Z_DIM,
    "TREE.BRANCH_NUM": len(SIDES),
    "vocab(ntoken)": VOCAB_SIZE,
    "ninput": EMBED_DIM,
    "SMOOTH": {"GAMMA1": GAMMA1, "GAMMA2": GAMMA2, "GAMMA3": GAMMA3, "LAMBDA": LAMBDA},
}
DAMSM_CONFIG = DAMSMConfig(gamma1=GAMMA1, gamma2=GAMMA2, gamma3=GAMMA3)

State = dict[str, Tensor]


@pytest.mark.skipif(not REAL.is_file(), reason="the reference files are not beside this checkout")
def test_our_numbers_are_the_official_ones() -> None:
    """Every output of taoxugit/AttnGAN: text, pictures with three kinds of masks, the DAMSM, the
    discriminators and all losses."""
    (check,) = verify([REAL])
    assert check.passed, as_text(check)
    assert len(check.outputs) == 48 and check.system == "attngan" and check.covered


# --- names, ours -> official, the inverse of the key map ----------------------------------------


def of_generator(name: str) -> str:
    name = re.sub(
        r"^first_stage\.upsample\.(\d)\.", lambda m: f"h_net1.upsample{int(m[1]) + 1}.", name
    )
    name = re.sub(r"^first_stage\.", "h_net1.", name)
    name = re.sub(r"^next_stages\.(\d)\.", lambda m: f"h_net{int(m[1]) + 2}.", name)
    name = name.replace("attention.project_words", "att.conv_context")
    return re.sub(r"^image_heads\.(\d)\.", lambda m: f"img_net{int(m[1]) + 1}.img.", name)


LAYERS_AFTER_16 = {64: [], 128: ["s32", "s32_1"], 256: ["s32", "s64", "s64_1", "s64_2"]}
"""Names of the authors' blocks below 4 x 4 times 16, for each side of the picture."""


def of_discriminator(name: str, side: int) -> str:
    def block(match: re.Match[str]) -> str:
        layer = int(match[1])
        if layer < 11:
            return f"img_code_s16.{layer}."
        number, inner = divmod(layer - 11, 3)
        return f"img_code_{LAYERS_AFTER_16[side][number]}.{inner}."

    name = re.sub(r"^encode_img\.(\d+)\.", block, name)
    name = re.sub(r"^cond_head\.3\.", "COND_DNET.outlogits.0.", name)
    name = re.sub(r"^cond_head\.", "COND_DNET.jointConv.", name)
    return re.sub(r"^uncond_head\.", "UNCOND_DNET.outlogits.0.", name)


def of_text(name: str) -> str:
    return name.replace("token_emb.", "encoder.")


def official_state(network: nn.Module, name: Callable[[str], str]) -> State:
    state = {name(key): tensor.clone() for key, tensor in network.state_dict().items()}
    return {k: t[..., None, None] if ".att." in k else t for k, t in state.items()}


# --- a file of other sizes --------------------------------------------------------------------


def enlarged(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def randomised(network: nn.Module) -> nn.Module:
    """Batch statistics and norms at random, so that every layer shows in the outputs."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or (tensor.dim() == 1 and "rnn" not in name):
                tensor.normal_(float(name.endswith("weight")), 0.3)
            elif tensor.dim() == 4:
                tensor.normal_(0, 1.5 / tensor[0].numel() ** 0.5)
    return network.eval()


def bce(probability: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy(probability, torch.full_like(probability, target))


def discriminator_loss(
    disc: ConditionalDiscriminator, real: Tensor, fake: Tensor, sentence: Tensor
) -> Tensor:
    """As the public code's: on probabilities, with every term written out."""
    real_features, fake_features = disc.features(real), disc.features(fake)
    cond_real = bce(disc.cond_logits(real_features, sentence).sigmoid(), 1)
    cond_wrong = bce(disc.cond_logits(real_features[:-1], sentence[1:]).sigmoid(), 0)
    cond_fake = bce(disc.cond_logits(fake_features, sentence).sigmoid(), 0)
    real_loss = bce(disc.uncond_logits(real_features).sigmoid(), 1)
    fake_loss = bce(disc.uncond_logits(fake_features).sigmoid(), 0)
    return (real_loss + cond_real) / 2 + (fake_loss + cond_fake + cond_wrong) / 3


def two_losses(similarity: Tensor, classes: Tensor | None) -> Tensor:
    """Both cross-entropies of the DAMSM, without pairs of one class."""
    count = len(similarity)
    if classes is not None:
        similarity = similarity.clone()
        for i in range(count):
            for j in range(count):
                if i != j and classes[i] == classes[j]:
                    similarity[i, j] = -torch.inf
    target = torch.arange(count)
    return torch.stack(
        [F.cross_entropy(similarity, target), F.cross_entropy(similarity.mT, target)]
    )


def own_attention(words: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """One caption (D, L) on one picture (D, H, W): contexts (D, L), attention (L, H, W)."""
    mask = torch.ones(1, words.shape[1], dtype=torch.bool)
    contexts, attention = region_contexts(words.mT[None], mask, regions.flatten(1).mT[None], GAMMA1)
    return contexts[0, 0].mT, attention[0, 0].unflatten(1, regions.shape[1:])


def make_inputs() -> State:
    cap_lens, gen_lens = torch.tensor([6, 4, 4, 1]), torch.tensor([5, 2, 3])
    return {
        "captions": torch.randint(1, VOCAB_SIZE, (TEXTS, 7))
        * (torch.arange(7) < cap_lens[:, None]),
        "cap_lens": cap_lens,
        "gen_words": torch.randn(ROWS, WIDTH, 5),
        "gen_mask": (torch.arange(5) >= gen_lens[:, None]).long(),
        "gen_sent": torch.randn(ROWS, WIDTH),
        "z": torch.randn(ROWS, Z_DIM),
        "eps": torch.randn(ROWS, COND_DIM),
        "mixed_6e": torch.randn(2, 768, 2, 3),
        "pool_2048": torch.randn(2, 2048),
        "func_attention_query": torch.randn(2, WIDTH, 4),
        "func_attention_context": torch.randn(2, WIDTH, 3, 5),
        "damsm_words": torch.randn(PAIRS, WIDTH, 6),
        "damsm_sent": torch.randn(PAIRS, WIDTH),
        "damsm_cap_lens": torch.tensor([4, 6, 1, 3, 6]),
        "damsm_class_ids": torch.tensor([2, 7, 2, 7, 5]),
        "damsm_regions": torch.randn(PAIRS, WIDTH, 3, 4),
        "damsm_cnn_code": torch.randn(PAIRS, WIDTH),
        **{f"real{side}_16x16": torch.rand(ROWS, 3, 16, 16) * 2 - 1 for side in SIDES},
    }


def text_outputs(inputs: State, encoders: Mapping[str, nn.Module]) -> State:
    """Words and sentences of a caption at a time, without padding."""
    outputs: State = {}
    lengths = inputs["cap_lens"].tolist()
    for suffix, encoder in encoders.items():
        words, sentences = torch.zeros(TEXTS, WIDTH, max(lengths)), []
        for row, length in enumerate(lengths):
            ids = inputs["captions"][row : row + 1, :length]
            own_words, sentence = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
            words[row, :, :length] = own_words[0].mT
            sentences.append(sentence[0])
        outputs |= {f"words_emb{suffix}": words, f"sent_emb{suffix}": torch.stack(sentences)}
    return outputs


def generator_outputs(inputs: State, make: Callable[[bool], Generator]) -> State:
    words, sentence, mask = inputs["gen_words"].mT, inputs["gen_sent"], inputs["gen_mask"] == 0

    def generate(mask: Tensor, official_mask: bool = False, train: bool = False) -> Any:
        text = TextFeatures(words, mask, sentence, mask.long())
        return make(official_mask).train(train)(text, inputs["z"], inputs["eps"])

    result, everywhere = generate(mask), torch.ones_like(mask)
    generator = make(False)
    c, mu, logvar = generator.ca_net(sentence, inputs["eps"])
    outputs = {
        "c_code": c,
        "mu": mu,
        "logvar": logvar,
        "KL": -0.5 * (1 + logvar - mu**2 - logvar.exp()).mean(),
        "h_code1_stride4": generator.first_stage(inputs["z"], c)[..., ::4, ::4],
        "img64": result.images[0],
        "img128_stride2": result.images[1][..., ::2, ::2],
        "img128_crop": result.images[1][..., 96:144, 96:144],
        "att1_stride3": result.attention[0][..., ::3, ::3],
    }
    for prefix, result in (
        ("nomask", generate(everywhere)),
        ("officialmask", generate(mask, official_mask=True)),
        ("train", generate(everywhere, train=True)),
    ):
        outputs[f"{prefix}_img128_stride4"] = result.images[1][..., ::4, ::4]
        outputs[f"{prefix}_att1_stride5"] = result.attention[0][..., ::5, ::5]
    return outputs


def similarities(inputs: State, rows: int) -> tuple[Tensor, Tensor]:
    """gamma_3 R of words and of sentences, of the first pairs."""
    lengths = inputs["damsm_cap_lens"][:rows]
    words, regions = inputs["damsm_words"][:rows].mT, inputs["damsm_regions"][:rows].flatten(2).mT
    mask = torch.arange(words.shape[1]) < lengths[:, None]
    return (
        GAMMA3 * word_similarity(DAMSM_CONFIG, words, mask, regions),
        GAMMA3 * sentence_similarity(inputs["damsm_sent"][:rows], inputs["damsm_cnn_code"][:rows]),
    )


def loss_outputs(
    inputs: State, small: Tensor, discs: Mapping[int, ConditionalDiscriminator]
) -> State:
    """Losses of the DAMSM, of the discriminators and of the generator."""
    outputs: State = {}
    classes, sentence = inputs["damsm_class_ids"], inputs["gen_sent"]
    for name, similarity in zip(("words", "sent"), similarities(inputs, PAIRS), strict=True):
        outputs[f"{name}_loss"] = two_losses(similarity, None)
        outputs[f"{name}_loss_classmask"] = two_losses(similarity, classes)
    total = torch.zeros(())
    for side, disc in discs.items():
        real, fake = enlarged(inputs[f"real{side}_16x16"], side // 16), enlarged(small, side // 64)
        features = disc.features(real)
        outputs |= {
            f"D_NET{side}_feat": features,
            f"D_NET{side}_cond": disc.cond_logits(features, sentence).sigmoid(),
            f"D_NET{side}_uncond": disc.uncond_logits(features).sigmoid(),
            f"D_NET{side}_loss": discriminator_loss(disc, real, fake, sentence),
        }
        features, cond = disc.features(fake), inputs["damsm_sent"][:ROWS]
        total += bce(disc.cond_logits(features, cond).sigmoid(), 1)
        total += bce(disc.uncond_logits(features).sigmoid(), 1)
    for similarity in similarities(inputs, ROWS):
        total += LAMBDA * two_losses(similarity, classes[:ROWS]).sum()
    return {**outputs, "generator_loss_total": total}


@pytest.fixture(scope="module")
def tensors() -> State:
    """A whole file."""
    torch.manual_seed(4)
    encoders = {
        f"_{cell}" if cell == "gru" else "": text_encoder(VOCAB_SIZE, EMBED_DIM, WIDTH, cell)
        for cell in ("lstm", "gru")
    }
    for encoder in encoders.values():
        with torch.no_grad():
            for parameter in encoder.rnn.parameters():
                parameter.mul_(3)
    heads = randomised(RegionHeads(WIDTH, WIDTH))
    discs = {side: ConditionalDiscriminator(DF, WIDTH, side, True) for side in SIDES}
    config = {"num_scales": len(SIDES), "z_dim": Z_DIM, "cond_dim": COND_DIM, "gen_channels": GF}
    config |= {"num_res_blocks": RES_BLOCKS}
    generator = Generator(AttnGANConfig(**config), WIDTH, WIDTH, SIDES[-1])
    state = randomised(generator).state_dict()

    def make(official_mask: bool) -> Generator:
        own = AttnGANConfig(**config, official_mask=official_mask)
        copy = Generator(own, WIDTH, WIDTH, SIDES[-1])
        copy.load_state_dict({key: tensor.clone() for key, tensor in state.items()})
        return copy.eval()

    networks = {
        "G_NET": official_state(generator, of_generator),
        "RNN_ENCODER": official_state(encoders[""], of_text),
        "RNN_ENCODER_GRU": official_state(encoders["_gru"], of_text),
        "CNN_ENCODER": official_state(heads, str),
    }
    for side, disc in discs.items():
        name = lambda key, side=side: of_discriminator(key, side)  # noqa: E731
        networks[f"D_NET{side}"] = official_state(randomised(disc), name)

    inputs = make_inputs()
    with torch.no_grad():
        outputs = text_outputs(inputs, encoders)
        image = heads(inputs["mixed_6e"], inputs["pool_2048"])
        outputs["region_features"] = image.regions.mT.unflatten(2, (2, 3))
        outputs["cnn_code"] = image.global_vector
        pairs = list(
            zip(inputs["func_attention_query"], inputs["func_attention_context"], strict=True)
        )
        contexts, attention = zip(*(own_attention(*pair) for pair in pairs), strict=True)
        outputs["func_attention_weighted"] = torch.stack(contexts)
        outputs["func_attention_map"] = torch.stack(attention)
        outputs |= generator_outputs(inputs, make)
        for row in (0, 1, 4):
            words = inputs["damsm_words"][row, :, : int(inputs["damsm_cap_lens"][row])]
            attention = own_attention(words, inputs["damsm_regions"][row])[1]
            outputs[f"damsm_att_map{row}"] = attention[None]
        outputs |= loss_outputs(inputs, outputs["img64"], discs)

    file = {f"state/{net}/{key}": t for net, part in networks.items() for key, t in part.items()}
    file |= {f"input/{name}": tensor for name, tensor in inputs.items()}
    return file | {f"output/{name}": tensor.clone() for name, tensor in outputs.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a reference file."""

    def write(tensors: State, **changes: Any) -> Path:
        path = tmp_path / "file.safetensors"
        metadata = {"source": "taoxugit/AttnGAN", "config": json.dumps({**OFFICIAL, **changes})}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        return path

    return write


@pytest.fixture
def check(write: Callable[..., Path]) -> Callable[..., FileCheck]:
    """Write a reference file and verify it."""

    def check(tensors: State, **changes: Any) -> FileCheck:
        (result,) = verify([write(tensors, **changes)])
        return result

    return check


def failed_outputs(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the file ---------------------------------------------------------------------------------


def test_other_widths_and_batches_pass(tensors: State, check: Callable[..., FileCheck]) -> None:
    """Sizes, batches and scales are the file's; the official ones are not built in."""
    result = check(tensors)
    assert result.passed, as_text(result)
    assert len(result.outputs) == 39 and result.system == "attngan"
    assert tensors["output/words_loss"][0] != tensors["output/words_loss_classmask"][0]
    mixed, unmasked = (
        tensors[f"output/{name}att1_stride5"] for name in ("officialmask_", "nomask_")
    )
    assert (mixed - unmasked).abs().max() > 0.01


def test_files_with_fewer_networks_and_outputs_pass(
    tensors: State, check: Callable[..., FileCheck]
) -> None:
    """The GRU is an option of the public code; every other part stands alone too."""
    result = check({name: t for name, t in tensors.items() if "gru" not in name.lower()})
    assert result.passed and len(result.outputs) == 37, as_text(result)
    some = {"img128_crop", "D_NET64_loss", "KL", "words_loss", "generator_loss_total"}
    fewer = {name: t for name, t in tensors.items() if "output" not in name or name[7:] in some}
    result = check(fewer)
    assert result.passed and len(result.outputs) == 5, as_text(result)
    without = {n: t for n, t in fewer.items() if "D_NET128" not in n and "ENCODER" not in n}
    assert failed_outputs(check(without)) == {"generator_loss_total"}


def test_every_wrong_output_fails(tensors: State, check: Callable[..., FileCheck]) -> None:
    """A verifier that returned the file's outputs would pass anything."""
    wrong = {
        name: tensor + 0.01 * tensor.abs().max() if name.startswith("output/") else tensor
        for name, tensor in tensors.items()
    }
    result = check(wrong)
    assert not any(output.passed for output in result.outputs), as_text(result)


@pytest.mark.parametrize(
    ("name", "affected"),
    [
        ("state/G_NET/h_net1.upsample3.1.weight", {"img64", "h_code1_stride4", "train_img128"}),
        ("state/G_NET/h_net2.att.conv_context.weight", {"att1_stride3", "img128_crop"}),
        ("state/G_NET/h_net2.residual.0.block.4.running_var", {"img128_crop"}),
        ("state/G_NET/img_net2.img.0.weight", {"img128_stride2", "officialmask_img128"}),
        ("state/RNN_ENCODER/rnn.weight_hh_l0_reverse", {"words_emb", "sent_emb"}),
        ("state/RNN_ENCODER_GRU/encoder.weight", {"words_emb_gru", "sent_emb_gru"}),
        ("state/CNN_ENCODER/emb_features.weight", {"region_features"}),
        ("state/D_NET64/COND_DNET.jointConv.0.weight", {"D_NET64_cond", "D_NET64_loss"}),
        ("state/D_NET128/img_code_s32_1.0.weight", {"D_NET128_feat", "generator_loss_total"}),
        ("state/D_NET128/UNCOND_DNET.outlogits.0.bias", {"D_NET128_uncond", "D_NET128_loss"}),
        ("input/damsm_sent", {"sent_loss", "sent_loss_classmask", "generator_loss_total"}),
        ("input/damsm_words", {"words_loss", "damsm_att_map4"}),
        ("input/eps", {"c_code", "img64", "nomask_img128"}),
    ],
)
def test_a_wrong_tensor_fails_the_outputs_that_depend_on_it(
    name: str, affected: set[str], tensors: State, check: Callable[..., FileCheck]
) -> None:
    tensor = tensors[name]
    result = check({**tensors, name: tensor + 0.3 * torch.randn(tensor.shape).abs()})
    failed = failed_outputs(result)
    assert all(any(f.startswith(word) for f in failed) for word in affected), as_text(result)
    assert len(failed) < len(result.outputs) / 2
    network = name.split("/")[1]
    if network.startswith("D_NET"):
        assert all(f.startswith(network) or f == "generator_loss_total" for f in failed)
    if network == "G_NET" and "h_net1" not in name:
        assert not failed & {"img64", "mu", "h_code1_stride4"}


def test_classes_are_for_the_masked_losses_alone(
    tensors: State, check: Callable[..., FileCheck]
) -> None:
    failed = failed_outputs(
        check({**tensors, "input/damsm_class_ids": torch.tensor([1, 1, 1, 2, 3])})
    )
    assert failed == {"words_loss_classmask", "sent_loss_classmask", "generator_loss_total"}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"GAN.R_NUM": 2}, {"img64", "mu", "KL", "img128_crop"}),
        ({"GAN.GF_DIM": 4}, {"img64", "att1_stride3", "h_code1_stride4"}),
        ({"TREE.BRANCH_NUM": 3}, {"img64", "att1_stride3", "generator_loss_total"}),
        ({"TEXT.EMBEDDING_DIM": 6}, {"img64", "words_emb", "D_NET64_cond", "region_features"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_a_configuration_of_other_networks_fails(
    change: dict[str, int], failed: set[str], tensors: State, check: Callable[..., FileCheck]
) -> None:
    """Outputs of the networks that it changes, and no losses of words alone."""
    result = failed_outputs(check(tensors, **change))
    assert result >= failed
    assert not result & {"words_loss", "sent_loss", "func_attention_map", "damsm_att_map0"}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"GAMMA1": 2.0}, {"func_attention_map", "damsm_att_map0", "words_loss"}),
        ({"GAMMA3": 2.0}, {"words_loss", "sent_loss", "generator_loss_total"}),
        ({"LAMBDA": 1.0}, {"generator_loss_total"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_other_factors_fail_the_outputs_that_depend_on_them(
    change: dict[str, float],
    failed: set[str],
    tensors: State,
    check: Callable[..., FileCheck],
) -> None:
    result = failed_outputs(check(tensors, SMOOTH={**OFFICIAL["SMOOTH"], **change}))
    assert result >= failed and not any("img" in name for name in result)
    assert "LAMBDA" not in change or result == failed


# --- names ------------------------------------------------------------------------------------


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_configuration_is_ours(tensors: State, write: Callable[..., Path]) -> None:
    config = AttnGANOutputs(read_reference(write(tensors))).gan_config
    assert (config.num_scales, config.z_dim, config.cond_dim) == (len(SIDES), Z_DIM, COND_DIM)
    assert (config.gen_channels, config.disc_channels, config.num_res_blocks) == (GF, DF, 1)
    assert config.damsm_weight == LAMBDA


@pytest.mark.parametrize("num_scales", [2, 3, 4])
def test_keys_of_the_generator_are_mapped_one_to_one(num_scales: int) -> None:
    """Ours -> official -> ours again; a projection of words is the authors' 1 x 1 convolution."""
    config = AttnGANConfig(num_scales=num_scales, gen_channels=GF)
    with torch.device("meta"):
        generator = Generator(config, WIDTH, WIDTH, 64 * 2 ** (num_scales - 1))
    ours, theirs = generator.state_dict(), official_state(generator, of_generator)
    assert [generator_key(name) for name in theirs] == list(ours)
    assert len(theirs) == len(ours) and shapes(generator_state(theirs)) == shapes(ours)


@pytest.mark.parametrize("side", [64, 128, 256])
def test_keys_of_the_discriminators_are_mapped_one_to_one(side: int) -> None:
    with torch.device("meta"):
        ours = ConditionalDiscriminator(DF, WIDTH, side, unconditional=True).state_dict()
    names = [of_discriminator(name, side) for name in ours]
    assert len(set(names)) == len(names) and [discriminator_key(n) for n in names] == list(ours)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_keys_of_the_text_encoder_are_mapped_one_to_one(cell: str) -> None:
    ours = text_encoder(VOCAB_SIZE, EMBED_DIM, WIDTH, cell).state_dict()
    assert [text_key(of_text(name)) for name in ours] == list(ours)
