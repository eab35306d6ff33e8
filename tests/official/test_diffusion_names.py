"""Key maps of diffusion networks, against lists of the official names of any size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from official_shapes import (
    Shapes,
    add_attention_block,
    bert_shapes,
    dit_shapes,
    kl_shapes,
    unet_shapes,
    xf_shapes,
)
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.diffusion.ldm import KLAutoencoder
from lineage.diffusion.networks.dit import DiT, DiTConfig
from lineage.diffusion.networks.unet import UNet, UNetConfig, make_unet
from lineage.official.adm_unet import (
    attention_state,
    official_names,
    unet_config,
    unet_state,
)
from lineage.official.dit import dit_network, dit_state
from lineage.official.glide import text_state, tokenizer_of_size
from lineage.official.ldm import bert_state, kl_config, kl_state
from lineage.official.vqgan import autoencoder_config
from lineage.recipes import ldm
from lineage.text.padded import BertEncoder, GlideEncoder, PaddedEncoder

State = dict[str, Tensor]


def numbered(shapes: Shapes) -> State:
    """Tensors in which no number occurs twice."""
    state, first = {}, 0
    for name, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        state[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape)
        first += count
    return state


def assert_each_number_once(official: State, ours: Mapping[str, Tensor], network: Any) -> None:
    """All numbers of the official tensors are in ours, each once, in tensors that fit."""
    assert shapes_of(ours) == shapes_of(network.state_dict())
    theirs, own = (torch.cat([t.flatten() for t in s.values()]) for s in (official, ours))
    assert torch.equal(own.sort().values, theirs.sort().values)


class CountingMapping(Mapping[str, Tensor]):
    """Official tensors that count how often each is read."""

    def __init__(self, state: State) -> None:
        self.state, self.reads = state, Counter[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.state[name]

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def on_meta(shapes: Shapes) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# --- UNets ------------------------------------------------------------------------------------

LDM = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 4,
    "num_heads": 2,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 6,
}
SIZES: list[dict[str, Any]] = [
    {"channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [1]},
    {"channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": []},
    {"channel_mult": [1, 2], "num_res_blocks": 2, "attention_resolutions": [2]},
    {"channel_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attention_resolutions": [4, 2, 1]},
    {"channel_mult": [1, 3, 2], "num_res_blocks": 3, "attention_resolutions": [4]},
    {
        "channel_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [1, 4],
        "transformer_depth": 3,
        "out_channels": 8,
    },
]


def meta_unet(official: Mapping[str, Any], conditioning: str, text_dim: int) -> UNet:
    config = unet_config(official, conditioning)
    channels = official["in_channels"], official["out_channels"]
    with torch.device("meta"):
        return make_unet(config, text_dim, text_dim, *channels)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(list(sizes.values())))
def test_names_of_latent_diffusions_unet_are_mapped_one_to_one(sizes: dict[str, Any]) -> None:
    """Every official tensor is read once, and is one tensor of ours."""
    settings = {**LDM, **sizes}
    unet, official = meta_unet(settings, "transformer", 6), numbered(unet_shapes(settings))
    names = official_names(unet.state_dict())
    assert Counter(names.values()) == Counter(list(official))
    counting = CountingMapping(official)
    assert_each_number_once(official, unet_state(unet, counting), unet)
    assert counting.reads == Counter(list(official))


GUIDED = {
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 8,
    "num_heads": 2,
    "num_head_channels": 4,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


@pytest.mark.parametrize("context", [0, 6], ids=["guided-diffusion", "glide"])
@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "parts first"])
@pytest.mark.parametrize(
    "sizes",
    [
        *SIZES[:5],
        {**SIZES[3], "resblock_updown": False, "use_scale_shift_norm": False},
        {**SIZES[2], "num_head_channels": -1},
    ],
    ids=lambda sizes: str(list(sizes.values())),
)
def test_names_of_guided_unets_are_mapped_one_to_one(
    sizes: dict[str, Any], heads_first: bool, context: int
) -> None:
    settings = {**GUIDED, **sizes, **({"xf_width": context} if context else {})}
    unet = meta_unet(settings, "joint" if context else "none", 6)
    official = CountingMapping(numbered(unet_shapes(settings)))
    ours = unet_state(unet, official, heads_first)
    assert official.reads == Counter(list(official))
    sentence: State = {}
    if unet.sentence_proj is not None:
        layer = unet.sentence_proj.state_dict()
        sentence = {f"sentence_proj.{n}": -1.0 - torch.rand(t.shape) for n, t in layer.items()}
    expected = official.state | {n: t.double() for n, t in sentence.items()}
    assert_each_number_once(expected, ours | {n: t.double() for n, t in sentence.items()}, unet)


@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "parts first"])
def test_queries_keys_and_values_are_split_by_heads(heads_first: bool) -> None:
    """By heads first, as guided-diffusion's older attention and GLIDE's order them, or by parts."""
    width, num_heads = 12, 3
    config = UNetConfig(channels=width, channel_mult=(1,), attention_levels=(), num_heads=num_heads)
    shapes: Shapes = {}
    add_attention_block(shapes, "middle_block.1", width, 5)
    official = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours = attention_state(config, official, "middle_block.1", heads_first)
    head_dim = width // num_heads
    qkv, kv = (official[f"middle_block.1.{n}.weight"][..., 0] for n in ("qkv", "encoder_kv"))
    for head in range(num_heads):
        at = slice(head_dim * head, head_dim * (head + 1))

        def rows(tensor: Tensor, part: int, parts: int, head: int = head) -> Tensor:
            start = part * width + head * head_dim
            if heads_first:
                start = (head * parts + part) * head_dim
            return tensor[start : start + head_dim]

        for part, name in enumerate("qkv"):
            weight = ours[f"joint_attn.to_{name}.weight"]
            assert torch.equal(weight[at], rows(qkv, part, 3)), name
        for part, name in enumerate("kv"):
            weight = ours[f"joint_attn.add_{name}_proj.weight"]
            assert torch.equal(weight[at], rows(kv, part, 2)), name


# --- autoencoder, text encoders and DiT -------------------------------------------------------


class WithoutStep(nn.Module):
    """An autoencoder without its counter of steps."""

    def __init__(self, autoencoder: KLAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        state = self.autoencoder.state_dict()
        del state["step"]
        return state


KL = [
    (8, [1], 1, [], 8, 3, 2),
    (4, [1, 2], 2, [4], 8, 5, 3),
    (4, [1, 2, 4, 4], 1, [], 32, 4, 4),
    (4, [2, 1, 3], 3, [16, 8, 4], 16, 4, 1),
]


@pytest.mark.parametrize("sizes", KL, ids=str)
def test_names_of_the_autoencoder_are_mapped_one_to_one(sizes: tuple[Any, ...]) -> None:
    names = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
    ddconfig, embed_dim = dict(zip(names, sizes, strict=False)), sizes[-1]
    official = numbered(kl_shapes(ddconfig, embed_dim))
    ours = WithoutStep(KLAutoencoder(kl_config(autoencoder_config(ddconfig), embed_dim)))
    state = kl_state(official, len(ddconfig["ch_mult"]))
    assert_each_number_once(official, state, ours)


def text_encoder(kind: type[PaddedEncoder], official: Mapping[str, Any]) -> PaddedEncoder:
    config = TextConfig(
        width=official["n_embed"],
        max_words=official["max_seq_len"],
        num_layers=official["n_layer"],
        num_heads=official.get("heads", 4),
    )
    with torch.device("meta"):
        return kind(config, tokenizer_of_size(official["vocab_size"]))


@pytest.mark.parametrize("kind", [BertEncoder, GlideEncoder])
@pytest.mark.parametrize(("width", "layers", "heads"), [(4, 1, 1), (8, 3, 4), (12, 2, 3)])
def test_names_of_text_encoders_are_mapped_one_to_one(
    kind: type[PaddedEncoder], width: int, layers: int, heads: int
) -> None:
    official = {"n_embed": width, "n_layer": layers, "vocab_size": 11, "max_seq_len": 5}
    glide = {"xf_width": width, "xf_layers": layers, "n_vocab": 11, "text_ctx": 5}
    encoder = text_encoder(kind, {**official, "heads": heads})
    shapes = bert_shapes(official) if kind is BertEncoder else xf_shapes(glide)
    counting = CountingMapping(numbered(shapes))
    if isinstance(encoder, GlideEncoder):
        ours = text_state(encoder, counting)
    else:
        assert isinstance(encoder, BertEncoder)
        ours = bert_state(encoder, counting)
    assert counting.reads == Counter(list(counting))
    assert_each_number_once(counting.state, ours, encoder)


@pytest.mark.parametrize("vocab_size", [4, 5, 50, 30_522])
def test_a_tokenizer_of_a_size(vocab_size: int) -> None:
    assert len(tokenizer_of_size(vocab_size)) == vocab_size


TABLE = "y_embedder.embedding_table.weight"


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("width", "depth", "patch_size"), [(8, 1, 2), (12, 3, 4), (16, 2, 1)])
def test_names_of_dit_are_mapped_one_to_one(
    width: int, depth: int, patch_size: int, learn_sigma: bool
) -> None:
    """Its table of classes is transposed; a bias that it does not have is zero."""
    official = {
        "hidden_size": width,
        "depth": depth,
        "num_heads": 2,
        "patch_size": patch_size,
        "in_channels": 3,
        "input_size": 8,
        "learn_sigma": learn_sigma,
        "num_classes": 6,
    }
    net, counting = dit_network(official, 7), CountingMapping(numbered(dit_shapes(official)))
    ours = dit_state(net, counting)
    assert set(counting.reads) == set(counting)
    bias = ours["sentence_proj.bias"]
    assert not bias.any()
    assert_each_number_once(counting.state | {"zero": bias}, ours, net)
    assert torch.equal(ours["sentence_proj.weight"].T, counting.state[TABLE])
    parts = counting.state["blocks.0.attn.qkv.weight"].chunk(3)
    for name, part in zip("qkv", parts, strict=True):
        assert torch.equal(ours[f"blocks.0.attn.to_{name}.weight"], part)


# --- names at the papers' sizes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def paper_keys(reference_file: Callable[[str], Path]) -> dict[str, Shapes]:
    saved = json.loads(reference_file("paper_keys.json").read_text())
    return {net: {n: tuple(s) for n, s in keys.items()} for net, keys in saved.items()}


@pytest.fixture(scope="module")
def paper_sizes(reference_file: Callable[[str], Path]) -> dict[str, Any]:
    sizes: dict[str, Any] = json.loads(reference_file("paper_sizes.json").read_text())
    return sizes


def test_names_of_stable_diffusions_unet(
    paper_keys: dict[str, Shapes], paper_sizes: dict[str, Any]
) -> None:
    """All 686 tensors of version 1, each read once by the preset `paper`; and the lists of names
    here are the official ones."""
    keys = paper_keys["ldm_sd_v1_unet"]
    assert unet_shapes(paper_sizes["ldm_sd_v1_unet"]["config"]) == keys
    with torch.device("meta"):
        unet = make_unet(ldm.PRESETS["paper"].model.unet, 768, 768, 4, 4)
    assert len(keys) == 686
    assert Counter(official_names(unet.state_dict()).values()) == Counter(list(keys))
    assert shapes_of(unet_state(unet, on_meta(keys))) == shapes_of(unet.state_dict())


def test_names_of_stable_diffusions_autoencoder(
    paper_keys: dict[str, Shapes], paper_sizes: dict[str, Any]
) -> None:
    keys = paper_keys["ldm_kl_f8_autoencoder"]
    official = paper_sizes["ldm_kl_f8_autoencoder (SD v1 VAE)"]["config"]
    assert kl_shapes(official, official["embed_dim"]) == keys and len(keys) == 248
    theirs = on_meta(keys)
    ours = kl_state(theirs, 4)
    read = Counter(id(tensor) for tensor in ours.values())
    assert read == Counter(id(tensor) for tensor in theirs.values())
    with torch.device("meta"):
        autoencoder = KLAutoencoder(ldm.PRESETS["paper"].autoencoder)
    expected = shapes_of(autoencoder.state_dict())
    del expected["step"]
    expected = {n: s for n, s in expected.items() if not n.startswith("discriminator.")}
    assert shapes_of(ours) == expected


def test_names_of_dit_xl_2(paper_keys: dict[str, Shapes]) -> None:
    """All but the fixed table of positions, which is ours too."""
    keys = dict(paper_keys["DiT-XL/2"])
    positions = keys.pop("pos_embed")
    official = {
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "patch_size": 2,
        "in_channels": 4,
        "input_size": 32,
        "learn_sigma": True,
        "num_classes": 1000,
    }
    assert dit_shapes(official) == keys
    with torch.device("meta"):
        net = DiT(DiTConfig(max_words=0), 1, 1001, (4, 32, 32), 8)
    counting = CountingMapping(on_meta(keys))
    ours = dit_state(net, counting)
    assert set(counting.reads) == set(keys)
    assert shapes_of(ours) == shapes_of(net.state_dict())
    assert (1, *net.grid_pos_emb.shape) == positions


def test_names_of_the_text_encoder_of_latent_diffusion(
    paper_keys: dict[str, Shapes], paper_sizes: dict[str, Any]
) -> None:
    """All but the head, which predicts BERT's tokens."""
    name = "ldm_txt2img_1p4B_BERTEmbedder"
    keys = {n.removeprefix("transformer."): s for n, s in paper_keys[name].items()}
    head = {n: keys.pop(n) for n in ("to_logits.weight", "to_logits.bias")}
    official = paper_sizes[name]["config"]
    assert bert_shapes(official) == keys and head["to_logits.weight"] == (30_522, 1280)
    encoder, counting = text_encoder(BertEncoder, official), CountingMapping(on_meta(keys))
    assert isinstance(encoder, BertEncoder)
    ours = bert_state(encoder, counting)
    assert counting.reads == Counter(list(keys))
    assert shapes_of(ours) == shapes_of(encoder.state_dict())


def test_unets_of_the_papers_have_as_many_parameters(paper_sizes: dict[str, Any]) -> None:
    """Of latent diffusion: Stable Diffusion's, that of the text-to-image model, that of
    ImageNet."""
    counts = {"ldm_sd_v1_unet": 859_520_964, "ldm_txt2img_1p4B_unet": 872_300_484}
    counts["ldm_cin256_unet"] = 400_920_579
    for name, expected in counts.items():
        official = paper_sizes[name]["config"]
        unet = meta_unet(official, "transformer", official["context_dim"])
        assert paper_sizes[name]["params"] == expected
        assert sum(p.numel() for p in unet.parameters()) == expected, name
