"""The verifiers of quantisers and transformers: on the official numbers, and on files of other
sizes, made here by the steps of the public codes, written out again in double precision."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from lineage.official.verify import FileCheck, as_text, verify
from lineage.official.vqvae import (
    autoencoder_config,
    autoencoder_key,
    autoencoder_state,
    dvae_key,
    gpt2_state,
    mingpt_state,
)
from lineage.vqvae.dalle import DVAEConfig, DVAEDecoder, DVAEEncoder
from lineage.vqvae.transformer import GPT, TransformerConfig

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "reference"
SOURCES = {
    "gpt2": "huggingface/transformers GPT2LMHeadModel",
    "taming_mingpt": "CompVis/taming-transformers (mingpt.py)",
    "vq_ema": "lucidrains/vector-quantize-pytorch",
    "dalle_dvae": "openai/DALL-E",
    "taming_vqgan": "CompVis/taming-transformers (vqgan.py)",
}

State = dict[str, Tensor]


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("gpt2", 7), ("taming_mingpt", 6), ("vq_ema", 14), ("dalle_dvae", 8), ("taming_vqgan", 23)],
)
def test_the_official_numbers_are_ours(name: str, outputs: int) -> None:
    path = BESIDE / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip("the reference files are not beside this checkout")
    (check,) = verify([path])
    assert check.passed, as_text(check)
    assert len(check.outputs) == outputs and check.system == name and check.covered


# --- files of our own -------------------------------------------------------------------------


def doubled(tensors: Mapping[str, Tensor]) -> State:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def whole_file(state: Mapping[str, Tensor], given: State, outputs: Mapping[str, Tensor]) -> State:
    made = {f"state/{name}": tensor for name, tensor in state.items()}
    made |= {f"input/{name}": tensor for name, tensor in given.items()}
    for name, tensor in outputs.items():
        made[f"output/{name}"] = tensor.float() if tensor.is_floating_point() else tensor
    return made


Check = Callable[..., FileCheck]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Write a reference file and verify it."""

    def check(system: str, config: Mapping[str, Any], tensors: State) -> FileCheck:
        path = tmp_path / "made.safetensors"
        metadata = {"source": SOURCES[system], "config": json.dumps(config)}
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, metadata)
        (found,) = verify([path])
        assert found.system == system
        return found

    return check


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


def shifted(tensors: State, only: str = "output/") -> State:
    """Every output off by a little, numbers of codes by one."""
    return {
        name: tensor
        if not name.startswith(only)
        else tensor + 0.01 * tensor.abs().max().clamp(min=1)
        if tensor.is_floating_point()
        else tensor + 1
        if tensor.dtype != torch.bool
        else ~tensor
        for name, tensor in tensors.items()
    }


def drawn(shapes: Mapping[str, tuple[int, ...]], gain: float = 1.0) -> State:
    """Kernels by fan-in, norm scales near one, biases near zero."""
    found = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            found[name] = gain * torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        elif name.endswith("weight"):
            found[name] = 1 + 0.2 * torch.randn(shape)
        else:
            found[name] = 0.2 * torch.randn(shape)
    return found


# --- transformers, a row, a head and a place at a time ----------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor, kind: str) -> Tensor:
    if kind == "tanh":
        return x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
    return x / 2 * (1 + (x / 2**0.5).erf())


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, look: list[list[bool]]
) -> Tensor:
    """(N, D) each; `look[place]` says where it may look."""
    found, each = torch.zeros_like(query), query.shape[1] // heads
    for first in range(0, query.shape[1], each):
        part = slice(first, first + each)
        for place, row in enumerate(look):
            seen = [other for other, may in enumerate(row) if may]
            if seen:
                scores = key[seen, part] @ query[place, part] / each**0.5
                found[place, part] = scores.softmax(0) @ value[seen, part]
    return found


Part = Callable[[int, str], tuple[Tensor, Tensor]]  # weight (out, in) and bias of a block's layer


def through(
    x: Tensor, layers: int, heads: int, part: Part, look: list[list[bool]], kind: str
) -> list[Tensor]:
    """What goes into each block, and what comes out of the last; one row (N, D)."""

    def linear(x: Tensor, layer: int, name: str) -> Tensor:
        weight, bias = part(layer, name)
        return x @ weight.mT + bias

    states = [x]
    for layer in range(layers):
        seen = layer_norm(x, *part(layer, "ln1"))
        three = (linear(seen, layer, name) for name in ("query", "key", "value"))
        x = x + linear(attention(*three, heads, look), layer, "proj")
        inner = gelu(linear(layer_norm(x, *part(layer, "ln2")), layer, "up"), kind)
        x = x + linear(inner, layer, "down")
        states.append(x)
    return states


def causal(length: int, opened: int = 0, padding: int = 0) -> list[list[bool]]:
    return [
        [(j <= i or max(i, j) < opened) and j >= padding for j in range(length)]
        for i in range(length)
    ]


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    picked = logits.log_softmax(-1).gather(-1, ids[..., None])
    return -picked.mean()


GPT2 = {"vocab_size": 11, "n_positions": 9, "n_embd": 6, "n_layer": 3, "n_head": 2}
MINGPT = {"vocab_size": 10, "block_size": 9, "n_layer": 3, "n_head": 2, "n_embd": 6}


def gpt2_shapes(layers: int = 3, width: int = 6, words: int = 11, places: int = 9) -> Any:
    """Matrices of the blocks are (in, out)."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (words, width),
        "transformer.wpe.weight": (places, width),
    }
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        for name, (a, b) in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes |= {f"{block}.{name}.weight": (a, b), f"{block}.{name}.bias": (b,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    return shapes | {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}


def gpt2_weights() -> State:
    state = drawn(gpt2_shapes())
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def gpt2_read(
    state: State, row: Tensor, kind: str, padding: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """GPT2LMHeadModel of a row of tokens (N): logits and hidden states."""
    width = GPT2["n_embd"]
    thirds = {"query": 0, "key": 1, "value": 2}
    names = {"ln1": "ln_1", "ln2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}

    def part(layer: int, name: str) -> tuple[Tensor, Tensor]:
        block = f"transformer.h.{layer}."
        if name in thirds:
            columns = slice(thirds[name] * width, (thirds[name] + 1) * width)
            weight = state[block + "attn.c_attn.weight"][:, columns]
            return weight.mT, state[block + "attn.c_attn.bias"][columns]
        block += names.get(name, "attn.c_proj")
        weight = state[f"{block}.weight"]
        return (weight.mT if weight.dim() == 2 else weight), state[f"{block}.bias"]

    place = (torch.arange(len(row)) - padding).clamp(min=0)
    x = state["transformer.wte.weight"][row] + state["transformer.wpe.weight"][place]
    look = causal(len(row), padding=padding)
    states = through(x, GPT2["n_layer"], GPT2["n_head"], part, look, kind)
    states[-1] = layer_norm(
        states[-1], state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]
    )
    return states[-1] @ state["lm_head.weight"].mT, states


def written(read: Callable[[Tensor], Tensor], ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, length) and the logits that chose each."""
    rows, chosen = [], []
    for row in ids:
        logits = []
        while len(row) < length:
            logits.append(read(row)[-1])
            row = torch.cat([row, logits[-1].argmax()[None]])
        rows.append(row)
        chosen.append(torch.stack(logits))
    return torch.stack(rows), torch.stack(chosen)


def gpt2_file(kind: str = "tanh") -> State:
    torch.manual_seed(7)
    weights, ids = gpt2_weights(), torch.randint(11, (3, 6))
    state, pads = doubled(weights), torch.tensor([2, 0, 4])
    counted = torch.arange(6)[None] - pads[:, None]
    read = [gpt2_read(state, row, kind) for row in ids]
    logits = torch.stack([r[0] for r in read])
    padded = [gpt2_read(state, row, kind, int(pad))[0] for row, pad in zip(ids, pads, strict=True)]
    tokens, _ = written(lambda row: gpt2_read(state, row, kind)[0], ids, 9)
    outputs = {
        "logits": logits,
        "loss": cross_entropy(logits[:, :-1], ids[:, 1:]),
        "hidden_states": torch.stack([torch.stack(r[1]) for r in read], dim=1),
        "logits_left_padded": torch.stack(padded),
        "greedy_cache": tokens,
        "greedy_nocache": tokens,
        "cached_last_logits": logits[:, -1],
    }
    given = {
        "input_ids": ids,
        "attention_mask_left": (counted >= 0).long(),
        "position_ids_left": counted.clamp(min=0),
    }
    return whole_file(weights, given, outputs)


@pytest.mark.parametrize(
    ("activation", "kind"), [("gelu_new (tanh)", "tanh"), ("gelu_new", "tanh"), ("gelu", "exact")]
)
def test_another_gpt2_passes(activation: str, kind: str, check: Check) -> None:
    """Of other sizes; `gelu_new` is the library's name of the approximation."""
    found = check("gpt2", {**GPT2, "activation": activation}, gpt2_file(kind))
    assert found.passed and len(found.outputs) == 7, as_text(found)


def test_a_gpt2_file_may_leave_outputs_out(check: Check) -> None:
    left = ("greedy", "padded", "_left")
    tensors = {n: t for n, t in gpt2_file().items() if not any(word in n for word in left)}
    found = check("gpt2", GPT2, tensors)
    assert found.passed and len(found.outputs) == 4, as_text(found)


def mingpt_shapes(layers: int = 3, width: int = 6, words: int = 10, places: int = 9) -> Any:
    shapes: dict[str, tuple[int, ...]] = {
        "pos_emb": (1, places, width),
        "tok_emb.weight": (words, width),
        "head.weight": (words, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for layer in range(layers):
        for name, (b, a) in {
            **{f"attn.{n}": (width, width) for n in ("key", "query", "value", "proj")},
            "mlp.0": (4 * width, width),
            "mlp.2": (width, 4 * width),
        }.items():
            shapes |= {f"blocks.{layer}.{name}.weight": (b, a), f"blocks.{layer}.{name}.bias": (b,)}
        for name in ("ln1", "ln2"):
            shapes |= {f"blocks.{layer}.{name}.{n}": (width,) for n in ("weight", "bias")}
    return shapes


def mingpt_weights() -> State:
    """With the masks that the public code keeps in its state."""
    masks = {f"blocks.{n}.attn.mask": torch.ones(9, 9).tril()[None, None] for n in range(3)}
    return drawn(mingpt_shapes()) | masks


def mingpt_read(state: State, row: Tensor, opened: int = 0, before: Tensor | None = None) -> Tensor:
    """GPT of a row of tokens (N), vectors `before` it: logits."""
    names = {"up": "mlp.0", "down": "mlp.2", "ln1": "ln1", "ln2": "ln2"}

    def part(layer: int, name: str) -> tuple[Tensor, Tensor]:
        block = f"blocks.{layer}.{names.get(name, f'attn.{name}')}"
        return state[f"{block}.weight"], state[f"{block}.bias"]

    x = state["tok_emb.weight"][row]
    x = x if before is None else torch.cat([before, x])
    x = x + state["pos_emb"][0, : len(x)]
    look = causal(len(x), opened)
    x = through(x, MINGPT["n_layer"], MINGPT["n_head"], part, look, "exact")[-1]
    return layer_norm(x, state["ln_f.weight"], state["ln_f.bias"]) @ state["head.weight"].mT


def mingpt_file() -> State:
    torch.manual_seed(8)
    weights, ids = mingpt_weights(), torch.randint(10, (3, 8))
    state, targets, put = doubled(weights), torch.randint(10, (3, 8)), torch.randn(3, 2, 6)
    logits = torch.stack([mingpt_read(state, row) for row in ids])
    tokens, steps = written(lambda row: mingpt_read(state, row), ids[:, :3], 8)
    outputs = {
        "logits": logits,
        "loss": cross_entropy(logits, targets),
        "logits_with_embeddings": torch.stack(
            [
                mingpt_read(state, row[:5], before=vectors)
                for row, vectors in zip(ids, put.double(), strict=True)
            ]
        ),
        "greedy_tokens": tokens,
        "cached_step_logits": steps,
    }
    for opened in (3, 6):
        outputs[f"logits_n_unmasked{opened}"] = torch.stack(
            [mingpt_read(state, row, opened) for row in ids]
        )
    return whole_file(weights, {"idx": ids, "targets": targets, "embeddings": put}, outputs)


def test_another_mingpt_passes(check: Check) -> None:
    found = check("taming_mingpt", MINGPT, mingpt_file())
    assert found.passed and len(found.outputs) == 7, as_text(found)


# --- the codebook of averages, by hand --------------------------------------------------------

EMA = {"dim": 2, "codebook_size": 5, "decay": 0.7, "commitment_weight": 0.4, "eps": 1e-5}


def ema_file() -> State:
    """Numbers of Python, a vector at a time."""
    torch.manual_seed(9)
    embed, average = torch.randn(1, 5, 2), torch.randn(1, 5, 2)
    x, counts = torch.randn(3, 4, 2), torch.tensor([[1.0, 0.5, 2.0, 0.25, 3.0]])
    state = {
        "_codebook.initted": torch.tensor(True),
        "_codebook.cluster_size": counts,
        "_codebook.embed": embed,
        "_codebook.embed_avg": average,
    }
    codes, sums = embed[0].tolist(), average[0].tolist()
    sizes, vectors = counts[0].tolist(), x.view(-1, 2).tolist()
    outputs: State = {}
    for prefix in ("after", "after2"):
        near = [min(range(5), key=lambda k, v=v: math.dist(v, codes[k])) for v in vectors]
        if prefix == "after":
            ids = torch.tensor(near).view(3, 4)
            values = torch.tensor([codes[k] for k in near]).view(3, 4, 2)
            gap = sum(math.dist(v, codes[k]) ** 2 for v, k in zip(vectors, near, strict=True))
            outputs |= {"eval_indices": ids, "train_indices": ids}
            outputs |= {"eval_quantized": values, "train_quantized": values}
            outputs |= {"eval_loss": torch.tensor(0.0)}
            outputs |= {"train_commit_loss": torch.tensor(0.4 * gap / 24)}
        for k in range(5):
            mine = [v for v, number in zip(vectors, near, strict=True) if number == k]
            sizes[k] = 0.7 * sizes[k] + 0.3 * len(mine)
            for d in range(2):
                sums[k][d] = 0.7 * sums[k][d] + 0.3 * sum(v[d] for v in mine)
        total = sum(sizes)
        smoothed = [(n + 1e-5) / (total + 5e-5) * total for n in sizes]
        codes = [[s / n for s in row] for row, n in zip(sums, smoothed, strict=True)]
        outputs |= {
            f"{prefix}/_codebook.cluster_size": torch.tensor([sizes]),
            f"{prefix}/_codebook.embed_avg": torch.tensor([sums]),
            f"{prefix}/_codebook.embed": torch.tensor([codes]),
            f"{prefix}/_codebook.initted": torch.tensor(True),
        }
    return whole_file(state, {"x": x}, outputs)


def test_another_codebook_of_averages_passes(check: Check) -> None:
    found = check("vq_ema", EMA, ema_file())
    assert found.passed and len(found.outputs) == 14, as_text(found)


# --- DALL-E's dVAE ----------------------------------------------------------------------------

DALLE = {"n_hid": 4, "n_init": 5, "vocab_size": 9, "n_blk_per_group": 1, "group_count": 4}


def dalle_shapes(network: str, blocks: int = 1, hid: int = 4, init: int = 5, words: int = 9) -> Any:
    """Of Encoder or Decoder, by official names."""
    encoder = network == "Encoder"
    first, kernels = (hid, (3, 3, 3, 1)) if encoder else (init, (1, 3, 3, 3))
    widths = [hid, 2 * hid, 4 * hid, 8 * hid] if encoder else [8 * hid, 4 * hid, 2 * hid, hid]
    convs = {"input": (first, 3, 7) if encoder else (first, words, 1)}
    width = first
    for group, outputs in enumerate(widths, start=1):
        for block in range(1, blocks + 1):
            name = f"group_{group}.block_{block}"
            if width != outputs:
                convs[f"{name}.id_path"] = (outputs, width, 1)
            inner = (width, *[outputs // 4] * 3, outputs)
            for k in range(4):
                convs[f"{name}.res_path.conv_{k + 1}"] = (inner[k + 1], inner[k], kernels[k])
            width = outputs
    convs["output.conv"] = (words if encoder else 6, width, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (b, a, kernel) in convs.items():
        shapes |= {f"blocks.{name}.w": (b, a, kernel, kernel), f"blocks.{name}.b": (b,)}
    return shapes


def dalle_run(state: State, x: Tensor, encoder: bool) -> tuple[Tensor, Tensor]:
    """Encoder or decoder: what comes out, and what comes out of its first group."""

    def conv(x: Tensor, name: str) -> Tensor:
        kernel = state[f"blocks.{name}.w"]
        return F.conv2d(x, kernel, state[f"blocks.{name}.b"], padding=kernel.shape[-1] // 2)

    x, first = conv(x, "input"), x
    for group in range(1, 5):
        name = f"group_{group}.block_1"
        inner = x
        for k in range(1, 5):
            inner = conv(inner * (inner > 0), f"{name}.res_path.conv_{k}")
        beside = conv(x, f"{name}.id_path") if f"blocks.{name}.id_path.w" in state else x
        x = beside + inner / 16
        if group < 4 and encoder:
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        elif group < 4:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        first = x if group == 1 else first
    return conv(x * (x > 0), "output.conv"), first


def dalle_file() -> State:
    torch.manual_seed(10)
    weights = {
        f"{network}/{name}": tensor
        for network in ("Encoder", "Decoder")
        for name, tensor in drawn(dalle_shapes(network), 1.5).items()
    }
    state, image, wild = doubled(weights), torch.rand(2, 3, 16, 24), torch.rand(3, 2) * 1.6 - 0.3
    nets = {
        network: {n.split("/")[1]: t for n, t in state.items() if n.startswith(network)}
        for network in ("Encoder", "Decoder")
    }
    mapped = 0.1 + 0.8 * image.double()
    logits, first = dalle_run(nets["Encoder"], mapped, encoder=True)
    tokens = logits.argmax(1)
    out, _ = dalle_run(nets["Decoder"], torch.eye(9).double()[tokens].movedim(3, 1), encoder=False)
    soft, _ = dalle_run(nets["Decoder"], (logits / 0.7).softmax(1), encoder=False)
    outputs = {
        "map_pixels": mapped,
        "unmap_pixels": ((wild.double() - 0.1) / 0.8).clamp(0, 1),
        "logits": logits,
        "tokens": tokens,
        "decoder_out": out,
        "decoder_out_soft": soft,
        "reconstruction": ((out[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1),
        "enc_group1": first[..., ::2, ::2],
    }
    return whole_file(weights, {"image01": image, "unmap_in": wild}, outputs)


def test_another_dvae_passes(check: Check) -> None:
    found = check("dalle_dvae", DALLE, dalle_file())
    assert found.passed and len(found.outputs) == 8, as_text(found)


# --- VQGAN ------------------------------------------------------------------------------------

DD = {"z_channels": 6, "resolution": 8, "in_channels": 3, "out_ch": 3, "double_z": False}
DD |= {"ch": 32, "ch_mult": [1, 2, 1], "num_res_blocks": 1, "attn_resolutions": [8, 2]}
VQGAN = {
    "ddconfig": DD,
    "embed_dim": 5,
    "n_embed": 10,
    "beta": 0.4,
    "legacy": True,
    "discriminator": {"input_nc": 3, "ndf": 3, "n_layers": 1},
}


def vqgan_shapes() -> tuple[dict[str, tuple[int, ...]], ...]:
    """Encoder and decoder of VQModel, whose decoder counts its sides from the largest."""
    widths, convs, norms = (32, 64, 32), {}, {}

    def block(name: str, a: int, b: int) -> None:
        norms.update({f"{name}.norm1": a, f"{name}.norm2": b})
        convs.update({f"{name}.conv1": (b, a, 3), f"{name}.conv2": (b, b, 3)})
        if a != b:
            convs[f"{name}.nin_shortcut"] = (b, a, 1)

    def attn(name: str, width: int) -> None:
        norms[f"{name}.norm"] = width
        convs.update({f"{name}.{n}": (width, width, 1) for n in ("q", "k", "v", "proj_out")})

    convs |= {"encoder.conv_in": (32, 3, 3), "decoder.conv_in": (32, 6, 3)}
    convs |= {"encoder.conv_out": (6, 32, 3), "decoder.conv_out": (3, 32, 3)}
    norms |= {"encoder.norm_out": 32, "decoder.norm_out": 32}
    for part in ("encoder", "decoder"):
        block(f"{part}.mid.block_1", 32, 32)
        attn(f"{part}.mid.attn_1", 32)
        block(f"{part}.mid.block_2", 32, 32)
    width = 32
    for level in range(3):
        block(f"encoder.down.{level}.block.0", width, widths[level])
        width = widths[level]
        if level in (0, 2):
            attn(f"encoder.down.{level}.attn.0", width)
        if level < 2:
            convs[f"encoder.down.{level}.downsample.conv"] = (width, width, 3)
    for level in (2, 1, 0):
        for number in (0, 1):
            block(f"decoder.up.{level}.block.{number}", width, widths[level])
            width = widths[level]
            if level in (0, 2):
                attn(f"decoder.up.{level}.attn.{number}", width)
        if level:
            convs[f"decoder.up.{level}.upsample.conv"] = (width, width, 3)
    convs |= {"quant_conv": (5, 6, 1), "post_quant_conv": (6, 5, 1)}
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (10, 5)}
    for name, (b, a, kernel) in convs.items():
        shapes |= {f"{name}.weight": (b, a, kernel, kernel), f"{name}.bias": (b,)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    look = {"main.0.weight": (3, 3, 4, 4), "main.0.bias": (3,), "main.2.weight": (6, 3, 4, 4)}
    look |= {f"main.3.{n}": (6,) for n in ("weight", "bias", "running_mean")}
    return shapes, look | {"main.5.weight": (1, 6, 4, 4), "main.5.bias": (1,)}


class Taming:
    """VQModel's encoder and decoder, step by step, on the weights by official names."""

    def __init__(self, state: State) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = self.state[f"{name}.weight"]
        padding = 0 if stride == 2 else kernel.shape[-1] // 2
        return F.conv2d(x, kernel, self.state[f"{name}.bias"], stride, padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (32, -1))
        centred = groups - groups.mean((2, 3, 4), keepdim=True)
        scaled = centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-6).sqrt()
        weight, bias = (self.state[f"{name}.{n}"][:, None, None] for n in ("weight", "bias"))
        return scaled.flatten(1, 2) * weight + bias

    def inner(self, x: Tensor, name: str) -> Tensor:
        """A residual block without its shortcut."""
        for k in (1, 2):
            x = self.norm(x, f"{name}.norm{k}")
            x = self.conv(x * x.sigmoid(), f"{name}.conv{k}")
        return x

    def block(self, x: Tensor, name: str) -> Tensor:
        there = f"{name}.nin_shortcut.weight" in self.state
        return self.inner(x, name) + (self.conv(x, f"{name}.nin_shortcut") if there else x)

    def read(self, x: Tensor, name: str) -> Tensor:
        """Attention without its shortcut."""
        seen = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(seen, f"{name}.{n}").flatten(2) for n in ("q", "k", "v"))
        shares = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(2)
        found = torch.einsum("bij,bcj->bci", shares, v).view_as(x)
        return self.conv(found, f"{name}.proj_out")

    def level(self, x: Tensor, name: str, blocks: int) -> Tensor:
        for number in range(blocks):
            x = self.block(x, f"{name}.block.{number}")
            if f"{name}.attn.{number}.q.weight" in self.state:
                x = x + self.read(x, f"{name}.attn.{number}")
        return x

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.block(x, f"{name}.block_1")
        return self.block(x + self.read(x, f"{name}.attn_1"), f"{name}.block_2")

    def out(self, x: Tensor, part: str) -> Tensor:
        x = self.norm(x, f"{part}.norm_out")
        return self.conv(x * x.sigmoid(), f"{part}.conv_out")

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in")
        for level in range(3):
            x = self.level(x, f"encoder.down.{level}", 1)
            if level < 2:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", 2)
        return self.conv(self.out(self.middle(x, "encoder.mid"), "encoder"), "quant_conv")

    def decode(self, z: Tensor) -> Tensor:
        x = self.middle(
            self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in"), "decoder.mid"
        )
        for level in (2, 1, 0):
            x = self.level(x, f"decoder.up.{level}", 2)
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(x, f"decoder.up.{level}.upsample.conv")
        return self.out(x, "decoder")


def patches(state: State, x: Tensor) -> Tensor:
    """NLayerDiscriminator in eval mode."""
    x = F.leaky_relu(F.conv2d(x, state["main.0.weight"], state["main.0.bias"], 2, 1), 0.2)
    x = F.conv2d(x, state["main.2.weight"], None, 1, 1)
    w, b, mean, var = (
        state[f"main.3.{n}"][:, None, None]
        for n in ("weight", "bias", "running_mean", "running_var")
    )
    x = F.leaky_relu((x - mean) / (var + 1e-5).sqrt() * w + b, 0.2)
    return F.conv2d(x, state["main.5.weight"], state["main.5.bias"], 1, 1)


def vqgan_file() -> State:
    torch.manual_seed(11)
    shapes, seen_by = vqgan_shapes()
    look = drawn(seen_by, 1.5) | {
        "main.3.running_var": torch.rand(6) + 0.5,
        "main.3.num_batches_tracked": torch.tensor(2),
    }
    average = {
        "embedding.weight": torch.randn(10, 5),
        "embedding.cluster_size": torch.rand(10) * 4 + 0.5,
        "embedding.embed_avg": torch.randn(10, 5) * 3,
    }
    weights = drawn(shapes) | {"quantize.embedding.weight": torch.randn(10, 5)}
    image, small = torch.rand(2, 3, 8, 8) * 2 - 1, 0.003 * torch.randn(2, 32, 3, 3)
    state, judge = doubled(weights), doubled(look)
    net, codes = Taming(state), state["quantize.embedding.weight"]
    z = net.encode(image.double())
    vectors = z.movedim(1, 3).reshape(-1, 5)
    squares = (vectors[:, None] - codes).square().sum(2)
    two, ids = squares.sort(1).values, squares.argmin(1)
    flat = codes[ids]
    code = flat.view(2, 2, 2, 5).movedim(3, 1)
    gap, size = (code - z), z.numel()
    drawn_image = net.decode(code)
    real, fake = (
        patches(judge, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        for x in (image.double(), drawn_image)
    )
    loss = 1.4 * gap.square().mean()
    outputs = {
        "z_e": z,
        "z_q": code,
        "indices": ids,
        "distance_margin_min": (two[:, 1] - two[:, 0]).min(),
        "codebook_loss": loss,
        "codebook_loss_legacy_false": loss,
        "reconstruction": drawn_image,
        "disc_real": real,
        "disc_fake": fake,
        "hinge_d_loss": ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2,
        "vanilla_d_loss": ((1 + (-real).exp()).log().mean() + (1 + fake.exp()).log().mean()) / 2,
        "small_mid_block_1": net.inner(small.double(), "encoder.mid.block_1"),
        "small_mid_attn_1": net.read(small.double(), "encoder.mid.attn_1"),
    }
    for name, of_z, of_codes in (("legacy", 1.0, 0.4), ("fixed", 0.4, 1.0)):
        outputs[f"grad_z_{name}"] = 2 / size * (code - of_z * gap)
        moved = of_codes * 2 / size * (flat - vectors)
        outputs[f"grad_codebook_{name}"] = torch.zeros(10, 5).double().index_add(0, ids, moved)
    averages = doubled(average)
    near = (vectors[:, None] - averages["embedding.weight"]).square().sum(2).argmin(1)
    one_hot = torch.eye(10).double()[near]
    sizes = 0.9 * averages["embedding.cluster_size"] + 0.1 * one_hot.sum(0)
    sums = 0.9 * averages["embedding.embed_avg"] + 0.1 * one_hot.mT @ vectors
    smoothed = (sizes + 1e-5) / (sizes.sum() + 10e-5) * sizes.sum()
    share = one_hot.mean(0)
    outputs |= {
        "ema_indices": near,
        "ema_loss": 0.4 * (averages["embedding.weight"][near] - vectors).square().mean(),
        "ema_perplexity": (-(share * (share + 1e-10).log()).sum()).exp(),
        "ema_after/embedding.cluster_size": sizes,
        "ema_after/embedding.embed_avg": sums,
        "ema_after/embedding.weight": sums / smoothed[:, None],
    }
    named = {"VQModel": weights, "NLayerDiscriminator": look, "EMAVectorQuantizer": average}
    every = {f"{net}/{name}": t for net, part in named.items() for name, t in part.items()}
    return whole_file(every, {"image": image, "small": small}, outputs)


def test_another_vqgan_passes(check: Check) -> None:
    found = check("taming_vqgan", VQGAN, vqgan_file())
    assert found.passed and len(found.outputs) == 23, as_text(found)


# --- what is wrong fails ----------------------------------------------------------------------

FILES: dict[str, tuple[dict[str, Any], Callable[[], State]]] = {
    "gpt2": (GPT2, gpt2_file),
    "taming_mingpt": (MINGPT, mingpt_file),
    "vq_ema": (EMA, ema_file),
    "dalle_dvae": (DALLE, dalle_file),
    "taming_vqgan": (VQGAN, vqgan_file),
}


@pytest.mark.parametrize("system", FILES)
def test_every_output_that_is_wrong_fails(system: str, check: Check) -> None:
    """A verifier that returned what the file holds would pass anything."""
    config, make = FILES[system]
    found = check(system, config, shifted(make()))
    assert not any(output.passed for output in found.outputs), as_text(found)


@pytest.mark.parametrize(
    ("system", "name", "reached", "not_reached"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight", {"logits", "hidden_states", "loss"}, set()),
        ("gpt2", "transformer.h.2.mlp.c_proj.bias", {"logits_left_padded"}, set()),
        ("gpt2", "transformer.wpe.weight", {"cached_last_logits", "logits"}, set()),
        ("taming_mingpt", "blocks.0.attn.key.weight", {"logits", "cached_step_logits"}, set()),
        ("taming_mingpt", "pos_emb", {"logits_with_embeddings"}, set()),
        ("vq_ema", "_codebook.embed_avg", {"after/_codebook.embed"}, {"eval_quantized"}),
        ("vq_ema", "_codebook.embed", {"eval_quantized", "train_commit_loss"}, set()),
        ("dalle_dvae", "Encoder/blocks.group_3.block_1.id_path.w", {"logits"}, {"enc_group1"}),
        (
            "dalle_dvae",
            "Decoder/blocks.group_2.block_1.res_path.conv_1.w",
            {"decoder_out", "decoder_out_soft"},
            {"logits", "tokens"},
        ),
        ("taming_vqgan", "VQModel/encoder.down.2.attn.0.k.weight", {"z_e"}, {"small_mid_attn_1"}),
        ("taming_vqgan", "VQModel/decoder.up.0.block.1.conv1.weight", {"reconstruction"}, {"z_e"}),
        ("taming_vqgan", "VQModel/encoder.mid.attn_1.q.bias", {"small_mid_attn_1"}, {"disc_real"}),
        ("taming_vqgan", "NLayerDiscriminator/main.2.weight", {"disc_fake"}, {"reconstruction"}),
        (
            "taming_vqgan",
            "EMAVectorQuantizer/embedding.embed_avg",
            {"ema_after/embedding.weight"},
            {"z_q", "ema_loss"},
        ),
    ],
)
def test_other_weights_fail_where_they_reach(
    system: str, name: str, reached: set[str], not_reached: set[str], check: Check
) -> None:
    (config, make), name = FILES[system], f"state/{name}"
    tensors = make()
    noise = torch.randn(tensors[name].shape).abs()
    failed = failing(check(system, config, {**tensors, name: tensors[name] + noise}))
    assert reached <= failed and not failed & not_reached


@pytest.mark.parametrize(
    ("system", "change"),
    [
        ("gpt2", {"n_layer": 2}),
        ("taming_mingpt", {"n_embd": 8}),
        ("vq_ema", {"codebook_size": 6}),
        ("dalle_dvae", {"n_blk_per_group": 2}),
        ("taming_vqgan", {"ddconfig": {**DD, "attn_resolutions": [4]}}),
    ],
)
def test_a_configuration_of_other_networks_fails_as_a_whole(
    system: str, change: dict[str, Any], check: Check
) -> None:
    config, make = FILES[system]
    found = check(system, {**config, **change}, make())
    assert len(failing(found)) == len(found.outputs) and "could not be built" in found.note


@pytest.mark.parametrize(
    ("system", "change", "failed"),
    [
        ("gpt2", {"n_head": 3}, {"logits", "loss"}),
        ("gpt2", {"activation": "gelu"}, {"logits"}),
        ("taming_mingpt", {"n_head": 1}, {"logits"}),
        ("vq_ema", {"decay": 0.6}, {"after/_codebook.cluster_size", "after2/_codebook.embed"}),
        ("vq_ema", {"commitment_weight": 1.0}, {"train_commit_loss"}),
        ("taming_vqgan", {"beta": 0.3}, {"codebook_loss", "grad_z_fixed", "grad_codebook_legacy"}),
    ],
)
def test_other_settings_fail_where_they_reach(
    system: str, change: dict[str, Any], failed: set[str], check: Check
) -> None:
    config, make = FILES[system]
    found = failing(check(system, {**config, **change}, make()))
    assert failed <= found
    assert "commitment_weight" not in change or found == failed
    assert "beta" not in change or not found & {"grad_z_legacy", "grad_codebook_fixed", "z_q"}


# --- names ------------------------------------------------------------------------------------


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(t, "shape", t)) for name, t in state.items()}


def gpt2_official(ours: Mapping[str, Tensor]) -> State:
    """Our weights by GPT-2's names, written the other way round on purpose."""
    found = {}
    for name, tensor in ours.items():
        name = re.sub(r"^(tok|pos)_emb", lambda m: f"transformer.w{m[1][0]}e", name)
        name = name.replace("head.", "lm_head.").replace(".blocks.", ".h.")
        name = re.sub(r"\.ln([12])\.", r".ln_\1.", name)
        name = name.replace(".qkv.", ".c_attn.").replace(".attn.proj.", ".attn.c_proj.")
        name = name.replace(".mlp.0.", ".mlp.c_fc.").replace(".mlp.2.", ".mlp.c_proj.")
        turn = ".c_" in name and tensor.dim() == 2
        found[name] = tensor.mT if turn else tensor
    return found


def mingpt_official(ours: Mapping[str, Tensor]) -> State:
    found = {}
    for name, tensor in ours.items():
        name = name.removeprefix("transformer.")
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[name.replace("qkv", part)] = third
        elif name == "pos_emb.weight":
            found["pos_emb"] = tensor[None]
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("layers", [1, 3, 12])
@pytest.mark.parametrize("system", ["gpt2", "mingpt"])
def test_names_of_the_transformers_are_mapped_one_to_one(system: str, layers: int) -> None:
    """Ours -> official -> ours again, values too; official -> ours -> official likewise."""
    tied = system == "gpt2"
    there, back = (gpt2_official, gpt2_state) if tied else (mingpt_official, mingpt_state)
    ours = GPT(TransformerConfig(6, layers, 2), 11, 9, tied).state_dict()
    theirs = there(ours)
    expected = (gpt2_shapes if tied else mingpt_shapes)(layers, words=11)
    expected |= {"lm_head.weight": (11, 6)} if tied else {}
    assert shapes(theirs) == expected
    again = back(theirs)
    assert again.keys() == ours.keys() and all(torch.equal(again[n], ours[n]) for n in ours)
    given = drawn(expected)
    there_again = there(back(given))
    assert there_again.keys() == given.keys()
    assert all(torch.equal(there_again[n], given[n]) for n in given)


def dvae_official(name: str) -> str:
    name = re.sub(
        r"groups\.(\d)\.(\d)", lambda m: f"group_{int(m[1]) + 1}.block_{int(m[2]) + 1}", name
    )
    name = re.sub(r"path\.(\d)", lambda m: f"res_path.conv_{(int(m[1]) + 1) // 2}", name)
    name = name.replace("identity", "id_path").replace("output.", "output.conv.")
    return "blocks." + re.sub(r"(weight|bias)$", lambda m: m[1][0], name)


@pytest.mark.parametrize("network", ["Encoder", "Decoder"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_names_of_the_dvae_are_mapped_one_to_one(network: str, blocks: int) -> None:
    kind = DVAEEncoder if network == "Encoder" else DVAEDecoder
    with torch.device("meta"):
        ours = kind(DVAEConfig(9, 4, 5, blocks)).state_dict()
    theirs = dalle_shapes(network, blocks)
    assert {dvae_official(name): shape for name, shape in shapes(ours).items()} == theirs
    assert [dvae_key(dvae_official(name)) for name in ours] == list(ours)
    assert {dvae_official(dvae_key(name)) for name in theirs} == set(theirs)


def taming_official(name: str, part: str, levels: int) -> str:
    way = "downsample" if part == "encoder" else "upsample"
    name = re.sub(r"^up\.(\d+)", lambda m: f"up.{levels - int(m[1]) - 1}", name)
    return f"{part}.{name.replace('resample', way)}"


def both_ways(config: AutoencoderConfig, theirs: Mapping[str, tuple[int, ...]]) -> None:
    """Of all tensors of the encoder and of the decoder."""
    levels = len(config.multipliers)
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "encoder": Encoder(config, config.latent),
            "decoder": Decoder(config),
        }
    for part, network in networks.items():
        ours, names = shapes(network.state_dict()), [n for n in theirs if n.startswith(part)]
        assert len(ours) == len(names)
        assert {taming_official(n, part, levels): s for n, s in ours.items()} == {
            n: tuple(theirs[n]) for n in names
        }
        for name in ours:
            official = taming_official(name, part, levels).removeprefix(f"{part}.")
            assert autoencoder_key(official, levels) == name
        for name in names:
            mine = autoencoder_key(name.removeprefix(f"{part}."), levels)
            assert taming_official(mine, part, levels) == name
        given: Any = {name: torch.empty(theirs[name], device="meta") for name in theirs}
        assert shapes(autoencoder_state(given, part, levels)) == ours


def test_names_of_the_vqgan_are_mapped_one_to_one() -> None:
    config = autoencoder_config(DD)
    assert config == AutoencoderConfig(32, (1, 2, 1), 1, (8, 2), 8, 6)
    both_ways(config, vqgan_shapes()[0])


@pytest.mark.parametrize("network", ["taming_vqgan_imagenet_f16_1024", "dalle_dvae"])
def test_names_at_the_papers_sizes(network: str) -> None:
    """Every tensor that the public code has, with its shape."""
    path = BESIDE / "paper_keys.json"
    if not path.is_file():
        pytest.skip("the reference files are not beside this checkout")
    keys = json.loads(path.read_text())
    if network.startswith("taming"):
        both_ways(AutoencoderConfig(), keys[network])
        return
    with torch.device("meta"):
        both = {"Encoder": DVAEEncoder(DVAEConfig()), "Decoder": DVAEDecoder(DVAEConfig())}
    for part, ours in both.items():
        theirs = {dvae_key(n): tuple(shape) for n, shape in keys[f"{network}/{part}"].items()}
        assert theirs == shapes(ours.state_dict())
