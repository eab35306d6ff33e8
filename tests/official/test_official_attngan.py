"""The AttnGAN verifier: on the official numbers, and on a file of other sizes, made here by the
steps of the public code, written out again in double precision."""

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
from lineage.config import TextConfig
from lineage.nn.conditional_discriminator import Discriminator
from lineage.official.attngan import (
    attngan_config,
    discriminator_key,
    generator_key,
    generator_state,
    text_key,
)
from lineage.official.verify import FileCheck, as_text, verify
from lineage.text.encoders import LSTMEncoder
from lineage.text.tokenizer import SPECIAL, WordTokenizer

REAL = Path(__file__).resolve().parents[3] / "shared" / "reference" / "attngan.safetensors"
WIDTH, INPUTS, VOCABULARY = 8, 7, 23
GF, DF, BLOCKS, NOISE, CONDITION, SIDES = 3, 2, 1, 5, 4, (64, 128)
TEXTS, ROWS, PAIRS = 4, 3, 5  # captions read, drawn, and matched
GAMMA1, GAMMA2, GAMMA3, LAMBDA = 3.0, 4.0, 6.0, 2.0
OFFICIAL = {
    "TEXT.EMBEDDING_DIM": WIDTH,
    "GAN.CONDITION_DIM": CONDITION,
    "GAN.GF_DIM": GF,
    "GAN.DF_DIM": DF,
    "GAN.R_NUM": BLOCKS,
    "GAN.Z_DIM": NOISE,
    "TREE.BRANCH_NUM": len(SIDES),
    "vocab(ntoken)": VOCABULARY,
    "ninput": INPUTS,
    "SMOOTH": {"GAMMA1": GAMMA1, "GAMMA2": GAMMA2, "GAMMA3": GAMMA3, "LAMBDA": LAMBDA},
}
CONFIG = AttnGANConfig(
    scales=len(SIDES),
    noise=NOISE,
    condition=CONDITION,
    generator=GF,
    discriminator=DF,
    residual=BLOCKS,
    damsm=LAMBDA,
)

State = dict[str, Tensor]


@pytest.mark.skipif(not REAL.is_file(), reason="the reference files are not beside this checkout")
def test_the_official_numbers_are_ours() -> None:
    """Every output of taoxugit/AttnGAN: text, pictures with three kinds of masks, the DAMSM, the
    discriminators and all losses."""
    (check,) = verify([REAL])
    assert check.passed, as_text(check)
    assert len(check.outputs) == 48 and check.system == "attngan" and check.covered


# --- the weights of a file of our own, by official names --------------------------------------


def conv(name: str, inputs: int, outputs: int, kernel: int, bias: bool = False) -> State:
    fan = inputs * kernel**2
    made = {f"{name}.weight": torch.randn(outputs, inputs, kernel, kernel) * 1.5 / fan**0.5}
    return made | ({f"{name}.bias": torch.randn(outputs)} if bias else {})


def norm(name: str, channels: int) -> State:
    return {
        f"{name}.weight": 1 + 0.3 * torch.randn(channels),
        f"{name}.bias": 0.3 * torch.randn(channels),
        f"{name}.running_mean": 0.3 * torch.randn(channels),
        f"{name}.running_var": torch.rand(channels) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(3),
    }


def both(name: str, first: int, inputs: int, outputs: int, kernel: int) -> State:
    """A convolution and its norm, at two neighbouring places of a `Sequential`."""
    made = conv(f"{name}.{first}", inputs, outputs, kernel)
    return made | norm(f"{name}.{first + 1}", outputs)


def generator_tensors(scales: int = len(SIDES)) -> State:
    """G_NET."""
    wide = 16 * GF
    made = {
        "ca_net.fc.weight": torch.randn(4 * CONDITION, WIDTH) / WIDTH**0.5,
        "ca_net.fc.bias": torch.randn(4 * CONDITION),
        "h_net1.fc.0.weight": torch.randn(2 * wide * 16, CONDITION + NOISE) / 3,
        **norm("h_net1.fc.1", 2 * wide * 16),
    }
    for k in range(1, 5):
        made |= both(f"h_net1.upsample{k}", 1, wide // 2 ** (k - 1), wide // 2 ** (k - 1), 3)
    for k in range(2, scales + 1):
        made |= conv(f"h_net{k}.att.conv_context", WIDTH, GF, 1)
        for block in range(BLOCKS):
            place = f"h_net{k}.residual.{block}.block"
            made |= both(place, 0, 2 * GF, 4 * GF, 3) | both(place, 3, 2 * GF, 2 * GF, 3)
        made |= both(f"h_net{k}.upsample", 1, 2 * GF, 2 * GF, 3)
    for k in range(1, scales + 1):
        made |= conv(f"img_net{k}.img.0", GF, 3, 3)
    return made


def discriminator_tensors(side: int) -> State:
    """D_NET64, D_NET128 or D_NET256."""
    made = conv("img_code_s16.0", 3, DF, 4)
    for k in range(3):
        made |= both("img_code_s16", 3 * k + 2, DF * 2**k, DF * 2 ** (k + 1), 4)
    if side >= 128:
        made |= both("img_code_s32", 0, 8 * DF, 16 * DF, 4)
    if side == 128:
        made |= both("img_code_s32_1", 0, 16 * DF, 8 * DF, 3)
    if side == 256:
        made |= both("img_code_s64", 0, 16 * DF, 32 * DF, 4)
        made |= both("img_code_s64_1", 0, 32 * DF, 16 * DF, 3)
        made |= both("img_code_s64_2", 0, 16 * DF, 8 * DF, 3)
    made |= both("COND_DNET.jointConv", 0, 8 * DF + WIDTH, 8 * DF, 3)
    for head in ("COND_DNET", "UNCOND_DNET"):
        made |= conv(f"{head}.outlogits.0", 8 * DF, 1, 4, bias=True)
    return made


def recurrent(cell: str) -> nn.LSTM | nn.GRU:
    kind = nn.LSTM if cell == "lstm" else nn.GRU
    return kind(INPUTS, WIDTH // 2, bidirectional=True, batch_first=True)


def text_tensors(cell: str) -> State:
    """RNN_ENCODER."""
    weights = {f"rnn.{name}": 3 * t.detach() for name, t in recurrent(cell).state_dict().items()}
    return {"encoder.weight": torch.randn(VOCABULARY, INPUTS), **weights}


# --- the public code, step by step ------------------------------------------------------------


def gate(x: Tensor) -> Tensor:
    value, let_through = x.chunk(2, 1)
    return value * let_through.sigmoid()


def convolved(x: Tensor, state: State, name: str, stride: int = 1) -> Tensor:
    kernel = state[f"{name}.weight"]
    padding = 0 if stride == 4 else kernel.shape[-1] // 2 if stride == 1 else 1
    return F.conv2d(x, kernel, state.get(f"{name}.bias"), stride, padding)


def normed(x: Tensor, state: State, name: str, train: bool = False) -> Tensor:
    """With the statistics kept, or with those of the batch."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, variance = (state[f"{name}.{what}"] for what in ("running_mean", "running_var"))
    if train:
        over = [d for d in range(x.dim()) if d != 1]
        mean, variance = x.mean(over), x.var(over, correction=0)
    scaled = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def layer(
    x: Tensor, state: State, name: str, first: int, stride: int = 1, train: bool = False
) -> Tensor:
    x = convolved(x, state, f"{name}.{first}", stride)
    return normed(x, state, f"{name}.{first + 1}", train)


def twice(x: Tensor, state: State, name: str, train: bool) -> Tensor:
    return gate(layer(enlarged(x, 2), state, name, 1, train=train))


def enlarged(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def attend(x: Tensor, words: Tensor, padding: Tensor | None, kernel: Tensor) -> Any:
    """GlobalAttentionGeneral: `padding` (B, L) is repeated row after row, as in the public code."""
    batch, channels, height, width = x.shape
    source = F.conv2d(words[..., None], kernel)[..., 0]  # (B, G, L)
    scores = torch.bmm(x.flatten(2).mT, source).flatten(0, 1)
    if padding is not None:
        scores = scores.masked_fill(padding.repeat(height * width, 1), -torch.inf)
    shares = scores.softmax(1).view(batch, height * width, -1).mT
    read = torch.bmm(source, shares).view(batch, channels, height, width)
    return read, shares.reshape(batch, -1, height, width)


def conditioned(state: State, given: State) -> tuple[Tensor, Tensor, Tensor]:
    both = gate(given["gen_sent"] @ state["ca_net.fc.weight"].mT + state["ca_net.fc.bias"])
    mu, log_variance = both[:, :CONDITION], both[:, CONDITION:]
    return mu + (0.5 * log_variance).exp() * given["eps"], mu, log_variance


def draw(state: State, given: State, padding: Tensor | None, train: bool = False) -> State:
    """G_NET: pictures and attention."""
    x = torch.cat([conditioned(state, given)[0], given["z"]], dim=1)
    x = gate(normed(x @ state["h_net1.fc.0.weight"].mT, state, "h_net1.fc.1", train))
    x = x.view(-1, 16 * GF, 4, 4)
    for k in range(1, 5):
        x = twice(x, state, f"h_net1.upsample{k}", train)
    found = {"h_code1": x, "img64": convolved(x, state, "img_net1.img.0").tanh()}
    for k in range(2, len(SIDES) + 1):
        net = f"h_net{k}"
        kernel = state[f"{net}.att.conv_context.weight"]
        read, found[f"att{k - 1}"] = attend(x, given["gen_words"], padding, kernel)
        x = torch.cat([x, read], dim=1)
        for block in range(BLOCKS):
            place = f"{net}.residual.{block}.block"
            inner = gate(layer(x, state, place, 0, train=train))
            x = x + layer(inner, state, place, 3, train=train)
        x = twice(x, state, f"{net}.upsample", train)
        found[f"img{SIDES[k - 1]}"] = convolved(x, state, f"img_net{k}.img.0").tanh()
    return found


def one_by_one(state: State, given: State) -> State:
    """Each row alone with its own mask, which is what the masks are meant to do."""
    names = ("gen_words", "gen_sent", "z", "eps")
    parts = []
    for row in range(ROWS):
        alone = {name: given[name][row : row + 1] for name in names}
        parts.append(draw(state, alone, given["gen_mask"][row : row + 1] > 0))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def look(state: State, image: Tensor) -> Tensor:
    """A D_NET's features."""
    x = F.leaky_relu(convolved(image, state, "img_code_s16.0", 2), 0.2)
    for place in (2, 5, 8):
        x = F.leaky_relu(layer(x, state, "img_code_s16", place, 2), 0.2)
    for name, stride in (("s32", 2), ("s32_1", 1)):
        if f"img_code_{name}.0.weight" in state:
            x = F.leaky_relu(layer(x, state, f"img_code_{name}", 0, stride), 0.2)
    return x


def score(state: State, features: Tensor, sentence: Tensor) -> Tensor:
    told = sentence[:, :, None, None].expand(-1, -1, 4, 4)
    x = layer(torch.cat([features, told], dim=1), state, "COND_DNET.jointConv", 0)
    return convolved(F.leaky_relu(x, 0.2), state, "COND_DNET.outlogits.0", 4).flatten().sigmoid()


def score_alone(state: State, features: Tensor) -> Tensor:
    return convolved(features, state, "UNCOND_DNET.outlogits.0", 4).flatten().sigmoid()


def bce(probability: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy(probability, torch.full_like(probability, target))


def discriminator_loss(state: State, real: Tensor, fake: Tensor, sentence: Tensor) -> Tensor:
    seen, drawn = look(state, real), look(state, fake)
    right = bce(score(state, seen, sentence), 1)
    wrong = bce(score(state, seen[:-1], sentence[1:]), 0)
    fitting = bce(score(state, drawn, sentence), 0)
    alone, drawn_alone = bce(score_alone(state, seen), 1), bce(score_alone(state, drawn), 0)
    return (alone + right) / 2 + (drawn_alone + fitting + wrong) / 3


def read(state: State, given: State, cell: str) -> tuple[Tensor, Tensor]:
    """RNN_ENCODER, a caption at a time and without padding: words (B, D, L), sentence (B, D)."""
    network = recurrent(cell).double()
    network.load_state_dict({name[4:]: t for name, t in state.items() if name.startswith("rnn.")})
    lengths = given["cap_lens"].tolist()
    words, sentence = torch.zeros(TEXTS, WIDTH, max(lengths)).double(), []
    for row, length in enumerate(lengths):
        table = state["encoder.weight"]
        states, _ = network(table[given["captions"][row : row + 1, :length]])
        words[row, :, :length] = states[0].mT
        sentence.append(torch.cat([states[0, -1, : WIDTH // 2], states[0, 0, WIDTH // 2 :]]))
    return words, torch.stack(sentence)


def func_attention(query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D, L), (B, D, H, W) -> contexts (B, D, L), attention (B, L, H, W)."""
    places = context.flatten(2)
    over_words = torch.bmm(places.mT, query).softmax(2)  # (B, N, L)
    over_places = (GAMMA1 * over_words.mT).softmax(2)  # (B, L, N)
    return torch.bmm(places, over_places.mT), over_places.unflatten(2, context.shape[2:])


def word_match(given: State, rows: int) -> tuple[Tensor, list[Tensor]]:
    """words_loss up to its cross-entropies: a caption at a time, on all pictures."""
    columns, maps = [], []
    for i in range(rows):
        length = int(given["damsm_cap_lens"][i])
        query = given["damsm_words"][i : i + 1, :, :length].expand(rows, -1, -1)
        contexts, attention = func_attention(query, given["damsm_regions"][:rows])
        fit = F.cosine_similarity(query.mT, contexts.mT, dim=2, eps=1e-8)
        columns.append((GAMMA2 * fit).exp().sum(1).log())
        maps.append(attention[i : i + 1])
    return GAMMA3 * torch.stack(columns, dim=1), maps


def sentence_match(given: State, rows: int) -> Tensor:
    code, sentence = given["damsm_cnn_code"][:rows], given["damsm_sent"][:rows]
    norms = code.norm(dim=1)[:, None] * sentence.norm(dim=1)[None]
    return GAMMA3 * (code @ sentence.mT) / norms.clamp(min=1e-8)


def two_losses(match: Tensor, classes: Tensor | None) -> Tensor:
    """Both cross-entropies, with pairs of one class left out of the sums."""
    count = len(match)
    if classes is not None:
        match = match.clone()
        for i in range(count):
            for j in range(count):
                if i != j and classes[i] == classes[j]:
                    match[i, j] = -torch.inf
    true = torch.arange(count)
    return torch.stack([F.cross_entropy(match, true), F.cross_entropy(match.mT, true)])


def inputs() -> State:
    lengths, drawn = torch.tensor([6, 4, 4, 1]), torch.tensor([5, 2, 3])
    matched, longest = torch.tensor([4, 6, 1, 3, 6]), 6
    return {
        "captions": torch.randint(1, VOCABULARY, (TEXTS, 7)) * (torch.arange(7) < lengths[:, None]),
        "cap_lens": lengths,
        "gen_words": torch.randn(ROWS, WIDTH, 5),
        "gen_mask": (torch.arange(5) >= drawn[:, None]).long(),
        "gen_sent": torch.randn(ROWS, WIDTH),
        "z": torch.randn(ROWS, NOISE),
        "eps": torch.randn(ROWS, CONDITION),
        "mixed_6e": torch.randn(2, 768, 2, 3),
        "pool_2048": torch.randn(2, 2048),
        "func_attention_query": torch.randn(2, WIDTH, 4),
        "func_attention_context": torch.randn(2, WIDTH, 3, 5),
        "damsm_words": torch.randn(PAIRS, WIDTH, longest),
        "damsm_sent": torch.randn(PAIRS, WIDTH),
        "damsm_cap_lens": matched,
        "damsm_class_ids": torch.tensor([2, 7, 2, 7, 5]),
        "damsm_regions": torch.randn(PAIRS, WIDTH, 3, 4),
        "damsm_cnn_code": torch.randn(PAIRS, WIDTH),
        **{f"real{side}_16x16": torch.rand(ROWS, 3, 16, 16) * 2 - 1 for side in SIDES},
    }


def doubled(tensors: Mapping[str, Tensor]) -> State:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


@pytest.fixture(scope="module")
def tensors() -> State:
    """A whole file."""
    torch.manual_seed(4)
    networks = {
        "G_NET": generator_tensors(),
        "RNN_ENCODER": text_tensors("lstm"),
        "RNN_ENCODER_GRU": text_tensors("gru"),
        "CNN_ENCODER": {
            "emb_features.weight": torch.randn(WIDTH, 768, 1, 1) / 20,
            "emb_cnn_code.weight": torch.randn(WIDTH, 2048) / 40,
            "emb_cnn_code.bias": torch.randn(WIDTH),
        },
        **{f"D_NET{side}": discriminator_tensors(side) for side in SIDES},
    }
    kept = inputs()
    state, given = {name: doubled(net) for name, net in networks.items()}, doubled(kept)
    net = state["G_NET"]
    outputs: State = {}
    for suffix, cell in (("", "lstm"), ("_gru", "gru")):
        words, sentence = read(state["RNN_ENCODER" + suffix.upper()], given, cell)
        outputs |= {f"words_emb{suffix}": words, f"sent_emb{suffix}": sentence}
    heads = state["CNN_ENCODER"]
    outputs["region_features"] = F.conv2d(given["mixed_6e"], heads["emb_features.weight"])
    code = given["pool_2048"] @ heads["emb_cnn_code.weight"].mT + heads["emb_cnn_code.bias"]
    outputs["cnn_code"] = code
    found = func_attention(given["func_attention_query"], given["func_attention_context"])
    outputs["func_attention_weighted"], outputs["func_attention_map"] = found

    code, mu, log_variance = conditioned(net, given)
    kl = -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).mean()
    outputs |= {"c_code": code, "mu": mu, "logvar": log_variance, "KL": kl}
    drawn, padding = one_by_one(net, given), given["gen_mask"] > 0
    outputs |= {
        "h_code1_stride4": drawn["h_code1"][..., ::4, ::4],
        "img64": drawn["img64"],
        "img128_stride2": drawn["img128"][..., ::2, ::2],
        "img128_crop": drawn["img128"][..., 96:144, 96:144],
        "att1_stride3": drawn["att1"][..., ::3, ::3],
    }
    for prefix, mask, train in (
        ("nomask", None, False),
        ("officialmask", padding, False),
        ("train", None, True),
    ):
        drawn = draw(net, given, mask, train)
        outputs[f"{prefix}_img128_stride4"] = drawn["img128"][..., ::4, ::4]
        outputs[f"{prefix}_att1_stride5"] = drawn["att1"][..., ::5, ::5]

    for suffix, classes in (("", None), ("_classmask", given["damsm_class_ids"])):
        match, maps = word_match(given, PAIRS)
        outputs[f"words_loss{suffix}"] = two_losses(match, classes)
        outputs[f"sent_loss{suffix}"] = two_losses(sentence_match(given, PAIRS), classes)
    outputs |= {f"damsm_att_map{row}": maps[row] for row in (0, 1, 4)}

    total = torch.zeros(()).double()
    for side in SIDES:
        judge, name = state[f"D_NET{side}"], f"D_NET{side}"
        real = enlarged(given[f"real{side}_16x16"], side // 16)
        fake, seen = enlarged(outputs["img64"], side // 64), look(judge, real)
        told = given["gen_sent"]
        outputs |= {
            f"{name}_feat": seen,
            f"{name}_cond": score(judge, seen, told),
            f"{name}_uncond": score_alone(judge, seen),
            f"{name}_loss": discriminator_loss(judge, real, fake, told),
        }
        shown = look(judge, fake)
        total += bce(score(judge, shown, given["damsm_sent"][:ROWS]), 1)
        total += bce(score_alone(judge, shown), 1)
    for match in (word_match(given, ROWS)[0], sentence_match(given, ROWS)):
        total += LAMBDA * two_losses(match, given["damsm_class_ids"][:ROWS]).sum()
    outputs["generator_loss_total"] = total

    made = {f"state/{net}/{key}": t for net, part in networks.items() for key, t in part.items()}
    made |= {f"input/{name}": tensor for name, tensor in kept.items()}
    return made | {f"output/{name}": t.detach().float() for name, t in outputs.items()}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., FileCheck]:
    """Write a reference file and verify it."""

    def check(tensors: State, **changes: Any) -> FileCheck:
        path = tmp_path / "made.safetensors"
        metadata = {"source": "taoxugit/AttnGAN", "config": json.dumps({**OFFICIAL, **changes})}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        (found,) = verify([path])
        return found

    return check


# --- the file ---------------------------------------------------------------------------------


def test_other_widths_and_batches_pass(tensors: State, check: Callable[..., FileCheck]) -> None:
    """Sizes, batches and scales are the file's; the official ones are not built in."""
    found = check(tensors)
    assert found.passed, as_text(found)
    assert len(found.outputs) == 39 and found.system == "attngan"
    assert tensors["output/words_loss"][0] != tensors["output/words_loss_classmask"][0]
    mixed, unmasked = (
        tensors[f"output/{name}att1_stride5"] for name in ("officialmask_", "nomask_")
    )
    assert (mixed - unmasked).abs().max() > 0.01


def test_a_file_without_the_gru_passes(tensors: State, check: Callable[..., FileCheck]) -> None:
    """It is an option of the public code that a file may leave out."""
    found = check({name: t for name, t in tensors.items() if "gru" not in name.lower()})
    assert found.passed and len(found.outputs) == 37, as_text(found)


def test_every_output_that_is_wrong_fails(tensors: State, check: Callable[..., FileCheck]) -> None:
    """A verifier that returned what the file holds would pass anything."""
    wrong = {
        name: tensor + 0.01 * tensor.abs().max() if name.startswith("output/") else tensor
        for name, tensor in tensors.items()
    }
    found = check(wrong)
    assert not any(output.passed for output in found.outputs), as_text(found)


@pytest.mark.parametrize(
    ("name", "reached"),
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
def test_other_weights_fail_where_they_reach(
    name: str, reached: set[str], tensors: State, check: Callable[..., FileCheck]
) -> None:
    tensor = tensors[name]
    found = check({**tensors, name: tensor + 0.3 * torch.randn(tensor.shape).abs()})
    failed = {output.name for output in found.outputs if not output.passed}
    assert all(any(f.startswith(word) for f in failed) for word in reached), as_text(found)
    assert len(failed) < len(found.outputs) / 2
    network = name.split("/")[1]
    if network.startswith("D_NET"):
        assert all(f.startswith(network) or f == "generator_loss_total" for f in failed)
    if network == "G_NET" and "h_net1" not in name:
        assert not failed & {"img64", "mu", "h_code1_stride4"}


def test_classes_are_for_the_masked_losses_alone(
    tensors: State, check: Callable[..., FileCheck]
) -> None:
    found = check({**tensors, "input/damsm_class_ids": torch.tensor([1, 1, 1, 2, 3])})
    failed = {output.name for output in found.outputs if not output.passed}
    assert failed == {"words_loss_classmask", "sent_loss_classmask", "generator_loss_total"}


@pytest.mark.parametrize(
    "change",
    [{"GAN.R_NUM": 2}, {"GAN.GF_DIM": 4}, {"TREE.BRANCH_NUM": 3}, {"TEXT.EMBEDDING_DIM": 6}],
    ids=str,
)
def test_a_configuration_of_other_networks_fails_as_a_whole(
    change: dict[str, int], tensors: State, check: Callable[..., FileCheck]
) -> None:
    found = check(tensors, **change)
    assert not any(output.passed for output in found.outputs)
    assert "could not be built and run" in found.note


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"GAMMA1": 2.0}, {"func_attention_map", "damsm_att_map0", "words_loss"}),
        ({"GAMMA3": 2.0}, {"words_loss", "sent_loss", "generator_loss_total"}),
        ({"LAMBDA": 1.0}, {"generator_loss_total"}),
    ],
    ids=str,
)
def test_other_factors_fail_where_they_reach(
    change: dict[str, float],
    failed: set[str],
    tensors: State,
    check: Callable[..., FileCheck],
) -> None:
    found = check(tensors, SMOOTH={**OFFICIAL["SMOOTH"], **change})  # type: ignore[dict-item]
    wrong = {output.name for output in found.outputs if not output.passed}
    assert wrong >= failed and not any("img" in name for name in wrong)
    assert "LAMBDA" not in change or wrong == failed


# --- names ------------------------------------------------------------------------------------


def official(name: str) -> str:
    """Our name of a generator's parameter -> G_NET's, written the other way round on purpose."""
    name = re.sub(r"^first\.upsample\.(\d)\.", lambda m: f"h_net1.upsample{int(m[1]) + 1}.", name)
    name = re.sub(r"^first\.", "h_net1.", name)
    name = re.sub(r"^next\.(\d)\.", lambda m: f"h_net{int(m[1]) + 2}.", name)
    name = name.replace("attention.project", "att.conv_context")
    return re.sub(r"^pictures\.(\d)\.", lambda m: f"img_net{int(m[1]) + 1}.img.", name)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_configuration_is_ours() -> None:
    assert attngan_config(OFFICIAL) == CONFIG


@pytest.mark.parametrize("scales", [2, 3, 4])
def test_names_of_the_generator_are_mapped_one_to_one(scales: int) -> None:
    """Ours -> official -> ours again; and every official tensor has its place and shape here."""
    config = AttnGANConfig(scales, NOISE, CONDITION, GF, DF, BLOCKS)
    with torch.device("meta"):
        ours = Generator(config, WIDTH, 64 * 2 ** (scales - 1)).state_dict()
    theirs = generator_tensors(scales)
    assert [generator_key(official(name)) for name in ours] == list(ours)
    assert {official(name) for name in ours} == set(theirs)
    assert shapes(generator_state(theirs)) == shapes(ours)
    context = theirs["h_net2.att.conv_context.weight"]
    assert torch.equal(
        generator_state(theirs)["next.0.attention.project.weight"], context[:, :, 0, 0]
    )


@pytest.mark.parametrize("side", [64, 128, 256])
def test_names_of_the_discriminators_are_mapped_one_to_one(side: int) -> None:
    with torch.device("meta"):
        ours = Discriminator(DF, WIDTH, side, alone=True).state_dict()
    theirs = discriminator_tensors(side)
    mapped = {discriminator_key(name): tensor for name, tensor in theirs.items()}
    assert len(mapped) == len(theirs) and shapes(mapped) == shapes(ours)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_names_of_the_text_encoder_are_mapped_one_to_one(cell: str) -> None:
    words = WordTokenizer([str(n) for n in range(VOCABULARY - len(SPECIAL))])
    encoder = LSTMEncoder(TextConfig(width=WIDTH, inputs=INPUTS, cell=cell), words)
    theirs = text_tensors(cell)
    mapped = {text_key(name): tensor for name, tensor in theirs.items()}
    assert len(mapped) == len(theirs) and shapes(mapped) == shapes(encoder.state_dict())
