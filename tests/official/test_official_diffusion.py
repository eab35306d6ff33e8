"""The verifiers of diffusion: they pass on the official numbers and fail on any other; and the maps
of names, against lists of the official names that are written out here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.diffusion.ldm import KLAutoencoder, KLConfig
from lineage.diffusion.networks.dit import DiT, DiTConfig
from lineage.diffusion.networks.unet import UNet, UNetConfig
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official.latent import dit_names, dit_network, dit_rest, dit_state, kl_state
from lineage.official.unets import (
    attention_state,
    gathered,
    guided_state,
    padded_state,
    tokens_only,
    unet_config,
    unet_names,
)
from lineage.official.verify import FileCheck, as_text, verify
from lineage.recipes import ldm
from lineage.text.padded import BertEncoder, GlideEncoder, PaddedEncoder

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "reference"
OUTPUTS = {
    "adm_unet": 1,
    "glide_text2im": 4,
    "ldm_unet": 16,
    "ldm_vae": 12,
    "ldm_bert": 2,
    "dit": 7,
}

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def reference(name: str) -> Path:
    path = BESIDE / name
    if not path.is_file():
        pytest.skip("the reference files are not beside this checkout")
    return path


# --- the official numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_official_numbers_are_ours(name: str) -> None:
    (check,) = verify([reference(f"{name}.safetensors")])
    assert check.passed, as_text(check)
    assert check.covered and check.system == name and not check.note
    assert len(check.outputs) == OUTPUTS[name]


Check = Callable[..., FileCheck]


@pytest.fixture
def changed(tmp_path: Path) -> Check:
    """Verify an official file of which some tensors, or settings, were changed."""

    def check(
        name: str,
        change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
        **settings: Any,
    ) -> FileCheck:
        with safe_open(reference(f"{name}.safetensors"), framework="pt") as file:
            metadata = dict(file.metadata())
            tensors = {key: change(key, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **settings})
        path = tmp_path / "changed.safetensors"
        save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata)
        (found,) = verify([path])
        assert found.system == name
        return found

    return check


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


def off(tensor: Tensor) -> Tensor:
    """A tensor a little beside itself."""
    if not tensor.is_floating_point():
        return tensor + 1
    size = tensor[tensor.isfinite()].abs().max().clamp(min=1e-3)
    return tensor + 0.01 * size


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_that_is_wrong_fails(name: str, changed: Check) -> None:
    """A verifier that returned what the file holds would pass anything."""
    found = changed(name, lambda key, t: off(t) if key.startswith("output/") else t)
    assert not any(output.passed for output in found.outputs), as_text(found)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("adm_unet", "out"),
        ("glide_text2im", "out_all_padding"),
        ("ldm_unet", "small_spatial_transformer"),
        ("ldm_vae", "nll_of_sample"),
        ("ldm_bert", "logits"),
        ("dit", "cfg_out"),
    ],
)
def test_one_output_that_is_wrong_fails_alone(name: str, output: str, changed: Check) -> None:
    """One entry of it is enough."""

    def change(key: str, tensor: Tensor) -> Tensor:
        if key == f"output/{output}":
            largest = tensor.abs().max()
            tensor.view(-1)[tensor.numel() // 2] += 1e-3 * largest
        return tensor

    assert failing(changed(name, change)) == {output}


EVERY: dict[str, dict[str, set[str]]] = {
    "adm_unet": {
        "time_embed.2.bias": {"out"},
        "label_emb.weight": {"out"},
        "input_blocks.0.0.weight": {"out"},
        "input_blocks.2.0.emb_layers.1.weight": {"out"},
        "input_blocks.3.1.qkv.weight": {"out"},
        "output_blocks.1.2.in_layers.2.weight": {"out"},
    },
    "glide_text2im": {
        "transformer_proj.weight": {"out", "out_all_padding", "xf_proj"},
        "token_embedding.weight": {"out", "xf_out", "xf_proj"},
        "padding_embedding": {"out", "out_all_padding", "xf_out"},
        "transformer.resblocks.1.attn.c_qkv.weight": {"out", "out_all_padding", "xf_out"},
        "output_blocks.0.1.encoder_kv.weight": {"out", "out_all_padding"},
    },
    "ldm_unet": {
        "middle_block.1.transformer_blocks.0.attn2.to_v.weight": {"eps", "ddim_pred_x0"},
        "input_blocks.3.1.transformer_blocks.0.ff.net.0.proj.weight": {"eps"},
        "output_blocks.1.2.conv.weight": {"eps", "eps_fractional_t"},
        "input_blocks.1.1.norm.bias": {"spatial_transformer_out", "eps"},
        "input_blocks.3.0.emb_layers.1.weight": {"resblock_out", "ddim_x_inter"},
    },
}
"""Weights, and outputs that each must reach."""


@pytest.mark.parametrize(
    ("name", "weight"), [(name, weight) for name, some in EVERY.items() for weight in some]
)
def test_one_weight_that_is_wrong_fails_where_it_reaches(
    name: str, weight: str, changed: Check
) -> None:
    noise = torch.Generator().manual_seed(1)

    def change(key: str, tensor: Tensor) -> Tensor:
        if key == f"state/{weight}":
            tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
        return tensor

    failed = failing(changed(name, change))
    assert EVERY[name][weight] <= failed
    assert not failed & {"betas", "time_embedding", "alphas_cumprod"}


@pytest.mark.parametrize("name", ["ldm_bert", "dit", "ldm_vae"])
def test_every_single_weight_counts(name: str, changed: Check) -> None:
    """Whichever tensor of the state is another, an output shows it; but for the fixed table. In the
    file of the autoencoder 32 channels are 32 groups, whose norms take most biases away."""
    with safe_open(reference(f"{name}.safetensors"), framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith("state/")]  # noqa: SIM118
    keys = [key for key in keys if name != "ldm_vae" or key.endswith(".weight")]
    keys = keys[:: max(1, len(keys) // 20)]
    silent = []
    for key in keys:
        noise = torch.Generator().manual_seed(1)

        def change(
            other: str, tensor: Tensor, key: str = key, noise: torch.Generator = noise
        ) -> Tensor:
            if other != key:
                return tensor
            return tensor + 0.1 * torch.randn(tensor.shape, generator=noise)

        if not failing(changed(name, change)):
            silent.append(key)
    assert silent == (["state/pos_embed"] if "state/pos_embed" in keys else [])


@pytest.mark.parametrize(
    ("name", "settings", "failed"),
    [
        ("ldm_unet", {"num_heads": 2}, {"eps", "spatial_transformer_out"}),
        ("ldm_unet", {"guidance": 2.0}, {"ddim_x_inter", "ddim_pred_x0"}),
        ("ldm_unet", {"linear_end": 0.013}, {"betas", "ddim_alphas"}),
        ("adm_unet", {"num_head_channels": 32}, {"out"}),
        ("adm_unet", {"use_new_attention_order": True}, {"out"}),
        ("glide_text2im", {"xf_heads": 2}, {"xf_out", "out"}),
        ("dit", {"num_heads": 2}, {"out", "block0", "small_block0"}),
        ("dit", {"cfg_scale": 3.0}, {"cfg_out"}),
        ("dit", {"depth": 1}, {"out", "cfg_out"}),
        ("ldm_bert", {"n_layer": 1}, {"z", "logits"}),
    ],
    ids=str,
)
def test_other_settings_fail_where_they_reach(
    name: str, settings: dict[str, Any], failed: set[str], changed: Check
) -> None:
    found = failing(changed(name, **settings))
    assert failed <= found
    if "cfg_scale" in settings or "guidance" in settings:
        assert found == failed


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adm_unet", {"channel_mult": [1, 3]}),
        ("glide_text2im", {"xf_layers": 3}),
        ("ldm_unet", {"transformer_depth": 2}),
        ("ldm_vae", {"embed_dim": 3}),
        ("ldm_bert", {"n_layer": 3}),
        ("dit", {"depth": 3}),
        ("dit", {"patch_size": 4}),
    ],
    ids=str,
)
def test_a_configuration_of_other_networks_fails_as_a_whole(
    name: str, settings: dict[str, Any], changed: Check
) -> None:
    """Weights that do not fit, or are missing, are no network of ours."""
    found = changed(name, **settings)
    assert "could not be built" in found.note and len(failing(found)) == OUTPUTS[name]


@pytest.mark.parametrize(
    ("name", "given", "failed"),
    [
        ("ldm_unet", "ddim_noise", {"ddim_eta0.7_x_inter"}),
        ("ldm_vae", "eps", {"sample", "nll_of_sample", "rec_sample"}),
    ],
)
def test_other_noise_fails_where_it_is_drawn(
    name: str, given: str, failed: set[str], changed: Check
) -> None:
    """And nowhere else: the file's own draws are used, in their order."""
    found = changed(name, lambda key, t: t.flip(0) if key == f"input/{given}" else t)
    assert failing(found) == failed


# --- names of the UNets -----------------------------------------------------------------------


def both(shapes: Shapes, name: str, *shape: int) -> None:
    """A layer with a bias."""
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]


def norm(shapes: Shapes, name: str, channels: int) -> None:
    both(shapes, name, channels)


def residual(shapes: Shapes, at: str, inputs: int, outputs: int, time: int, shift: bool) -> None:
    """`ResBlock` of openaimodel.py and of guided-diffusion's unet.py."""
    norm(shapes, f"{at}.in_layers.0", inputs)
    both(shapes, f"{at}.in_layers.2", outputs, inputs, 3, 3)
    both(shapes, f"{at}.emb_layers.1", 2 * outputs if shift else outputs, time)
    norm(shapes, f"{at}.out_layers.0", outputs)
    both(shapes, f"{at}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        both(shapes, f"{at}.skip_connection", outputs, inputs, 1, 1)


def spatial(shapes: Shapes, at: str, width: int, context: int, depth: int) -> None:
    """`SpatialTransformer` of attention.py."""
    norm(shapes, f"{at}.norm", width)
    both(shapes, f"{at}.proj_in", width, width, 1, 1)
    for number in range(depth):
        block = f"{at}.transformer_blocks.{number}"
        for name, keys in (("attn1", width), ("attn2", context)):
            shapes[f"{block}.{name}.to_q.weight"] = (width, width)
            shapes[f"{block}.{name}.to_k.weight"] = (width, keys)
            shapes[f"{block}.{name}.to_v.weight"] = (width, keys)
            both(shapes, f"{block}.{name}.to_out.0", width, width)
        both(shapes, f"{block}.ff.net.0.proj", 8 * width, width)
        both(shapes, f"{block}.ff.net.2", width, 4 * width)
        for name in ("norm1", "norm2", "norm3"):
            norm(shapes, f"{block}.{name}", width)
    both(shapes, f"{at}.proj_out", width, width, 1, 1)


def plain(shapes: Shapes, at: str, width: int, context: int) -> None:
    """`AttentionBlock` of guided-diffusion, and of GLIDE with `context`."""
    norm(shapes, f"{at}.norm", width)
    both(shapes, f"{at}.qkv", 3 * width, width, 1)
    both(shapes, f"{at}.proj_out", width, width, 1)
    if context:
        both(shapes, f"{at}.encoder_kv", 2 * width, context, 1)


def unet_shapes(official: Mapping[str, Any]) -> Shapes:
    """Every tensor of `UNetModel`, in the order in which its constructor makes them."""
    shapes: Shapes = {}
    width, multipliers = official["model_channels"], official["channel_mult"]
    time, blocks = 4 * width, official["num_res_blocks"]
    shift, updown = official.get("use_scale_shift_norm"), official.get("resblock_updown")

    def attention(at: str, channels: int) -> None:
        if official.get("use_spatial_transformer"):
            spatial(shapes, at, channels, official["context_dim"], official["transformer_depth"])
        else:
            plain(shapes, at, channels, official.get("xf_width", 0))

    def block(at: str, inputs: int, outputs: int) -> None:
        residual(shapes, at, inputs, outputs, time, bool(shift))

    both(shapes, "time_embed.0", time, width)
    both(shapes, "time_embed.2", time, time)
    both(shapes, "input_blocks.0.0", width, official["in_channels"], 3, 3)
    current, kept, halved, number = width, [width], 1, 0
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            number += 1
            block(f"input_blocks.{number}.0", current, multiplier * width)
            current = multiplier * width
            if halved in official["attention_resolutions"]:
                attention(f"input_blocks.{number}.1", current)
            kept.append(current)
        if level < len(multipliers) - 1:
            number += 1
            if updown:
                block(f"input_blocks.{number}.0", current, current)
            else:
                both(shapes, f"input_blocks.{number}.0.op", current, current, 3, 3)
            kept.append(current)
            halved *= 2
    block("middle_block.0", current, current)
    attention("middle_block.1", current)
    block("middle_block.2", current, current)
    number = 0
    for level in reversed(range(len(multipliers))):
        for place in range(blocks + 1):
            outputs = multipliers[level] * width
            block(f"output_blocks.{number}.0", current + kept.pop(), outputs)
            current, inner = outputs, 1
            if halved in official["attention_resolutions"]:
                attention(f"output_blocks.{number}.1", current)
                inner = 2
            if level and place == blocks:
                if updown:
                    block(f"output_blocks.{number}.{inner}", current, current)
                else:
                    both(shapes, f"output_blocks.{number}.{inner}.conv", current, current, 3, 3)
                halved //= 2
            number += 1
    norm(shapes, "out.0", current)
    both(shapes, "out.2", official["out_channels"], width, 3, 3)
    return shapes


def numbered(shapes: Shapes) -> State:
    """Tensors in which no number stands twice."""
    state, first = {}, 0
    for name, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        state[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape)
        first += count
    return state


def assert_each_number_once(official: State, ours: Mapping[str, Tensor], network: Any) -> None:
    """All numbers of the official tensors stand in ours, each once, in tensors that fit."""
    assert {name: t.shape for name, t in ours.items()} == {
        name: t.shape for name, t in network.state_dict().items()
    }
    given, found = (torch.cat([t.flatten() for t in s.values()]) for s in (official, ours))
    assert torch.equal(found.sort().values, given.sort().values)


class Counted(Mapping[str, Tensor]):
    """Official tensors that count how often each is asked for."""

    def __init__(self, state: State) -> None:
        self.state, self.asked = state, Counter[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.asked[name] += 1
        return self.state[name]

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


LDM = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 4,
    "num_heads": 2,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 6,
}
SPATIAL: list[dict[str, Any]] = [
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


def unet_of(official: Mapping[str, Any], conditioning: str, text: int) -> UNet:
    config = unet_config(official, conditioning)
    with torch.device("meta"):
        return UNet(config, text, official["in_channels"], official["out_channels"])


@pytest.mark.parametrize("sizes", SPATIAL, ids=lambda sizes: str(list(sizes.values())))
def test_names_of_latent_diffusions_unet_are_mapped_one_to_one(sizes: dict[str, Any]) -> None:
    """UNets of several sizes: every official tensor is read once, and fills one place."""
    settings = {**LDM, **sizes}
    unet, official = unet_of(settings, "transformer", 6), numbered(unet_shapes(settings))
    names = unet_names(unet)
    assert Counter(name for parts in names.values() for name in parts) == Counter(list(official))
    assert_each_number_once(official, gathered(names, official), unet)


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
@pytest.mark.parametrize("first", [True, False], ids=["heads first", "parts first"])
@pytest.mark.parametrize(
    "sizes",
    [
        *SPATIAL[:5],
        {**SPATIAL[3], "resblock_updown": False, "use_scale_shift_norm": False},
        {**SPATIAL[2], "num_head_channels": -1},
    ],
    ids=lambda sizes: str(list(sizes.values())),
)
def test_names_of_guided_unets_are_mapped_one_to_one(
    sizes: dict[str, Any], first: bool, context: int
) -> None:
    settings = {**GUIDED, **sizes, **({"xf_width": context} if context else {})}
    conditioning = "joint" if context else "none"
    unet = unet_of(settings, conditioning, 6)
    official = numbered(unet_shapes(settings))
    sentence = {}
    if unet.sentence is not None:
        sentence = {n: -1.0 - torch.rand(t.shape) for n, t in unet.sentence.state_dict().items()}
    counted = Counted(official)
    ours = guided_state(unet, counted, first, sentence)
    assert counted.asked == Counter(list(official))
    told = {f"sentence.{name}": tensor.double() for name, tensor in sentence.items()}
    assert_each_number_once(official | told, {n: t.double() for n, t in ours.items()}, unet)


@pytest.mark.parametrize("first", [True, False], ids=["heads first", "parts first"])
def test_queries_keys_and_values_are_told_apart(first: bool) -> None:
    """By heads first, as guided-diffusion's older attention and GLIDE's have them, or by parts."""
    config = UNetConfig(12, (1,), 1, (), 3, conditioning="joint", padding=True)
    unet, width, heads = UNet(config, 5), 12, 3
    shapes: Shapes = {}
    plain(shapes, "middle_block.1", width, 5)
    official = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours = attention_state(unet, official, first)
    each = width // heads
    whole, told = (official[f"middle_block.1.{n}.weight"][..., 0] for n in ("qkv", "encoder_kv"))
    for head in range(heads):
        at = slice(each * head, each * (head + 1))

        def rows(tensor: Tensor, part: int, parts: int, head: int = head) -> Tensor:
            start = (head * parts + part) * each if first else part * width + head * each
            return tensor[start : start + each]

        pixels = "middle.0.attention.pixels"
        assert torch.equal(ours[f"{pixels}.query.weight"][at], rows(whole, 0, 3))
        key, value = ours[f"{pixels}.key_value.weight"].chunk(2)
        assert torch.equal(key[at], rows(whole, 1, 3))
        assert torch.equal(value[at], rows(whole, 2, 3))
        key, value = ours["middle.0.attention.words_joint.weight"].chunk(2)
        assert torch.equal(key[at], rows(told, 0, 2)) and torch.equal(value[at], rows(told, 1, 2))


# --- names of autoencoder, text encoders and DiT ----------------------------------------------


def half_shapes(official: Mapping[str, Any], part: str) -> Shapes:
    """Every tensor of CompVis' `Encoder` or `Decoder` in model.py."""
    shapes: Shapes = {}
    width, multipliers = official["ch"], official["ch_mult"]
    blocks, side = official["num_res_blocks"], official["resolution"]

    def block(at: str, inputs: int, outputs: int) -> None:
        norm(shapes, f"{at}.norm1", inputs)
        both(shapes, f"{at}.conv1", outputs, inputs, 3, 3)
        norm(shapes, f"{at}.norm2", outputs)
        both(shapes, f"{at}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            both(shapes, f"{at}.nin_shortcut", outputs, inputs, 1, 1)

    def attention(at: str, channels: int) -> None:
        norm(shapes, f"{at}.norm", channels)
        for layer in ("q", "k", "v", "proj_out"):
            both(shapes, f"{at}.{layer}", channels, channels, 1, 1)

    def middle(channels: int) -> None:
        block(f"{part}.mid.block_1", channels, channels)
        attention(f"{part}.mid.attn_1", channels)
        block(f"{part}.mid.block_2", channels, channels)

    levels, largest = list(enumerate(multipliers)), width * multipliers[-1]
    if part == "encoder":
        both(shapes, f"{part}.conv_in", width, 3, 3, 3)
        current = width
        for level, multiplier in levels:
            for number in range(blocks):
                at = f"{part}.down.{level}"
                block(f"{at}.block.{number}", current, width * multiplier)
                current = width * multiplier
                if side // 2**level in official["attn_resolutions"]:
                    attention(f"{at}.attn.{number}", current)
            if level < len(multipliers) - 1:
                both(shapes, f"{part}.down.{level}.downsample.conv", current, current, 3, 3)
        middle(current)
        norm(shapes, f"{part}.norm_out", current)
        both(shapes, f"{part}.conv_out", 2 * official["z_channels"], current, 3, 3)
        return shapes
    both(shapes, f"{part}.conv_in", largest, official["z_channels"], 3, 3)
    middle(largest)
    current = largest
    for level, multiplier in reversed(levels):
        for number in range(blocks + 1):
            at = f"{part}.up.{level}"
            block(f"{at}.block.{number}", current, width * multiplier)
            current = width * multiplier
            if side // 2**level in official["attn_resolutions"]:
                attention(f"{at}.attn.{number}", current)
        if level:
            both(shapes, f"{part}.up.{level}.upsample.conv", current, current, 3, 3)
    norm(shapes, f"{part}.norm_out", current)
    both(shapes, f"{part}.conv_out", 3, current, 3, 3)
    return shapes


def kl_shapes(official: Mapping[str, Any], width: int) -> Shapes:
    latent = official["z_channels"]
    shapes = half_shapes(official, "encoder") | half_shapes(official, "decoder")
    both(shapes, "quant_conv", 2 * width, 2 * latent, 1, 1)
    both(shapes, "post_quant_conv", latent, width, 1, 1)
    return shapes


class Weights(nn.Module):
    """An autoencoder without its counter of steps."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.whole = KLAutoencoder(config)

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        state = self.whole.state_dict()
        del state["steps"]
        return state


KL = [
    (8, [1], 1, [], 8, 3, 2),
    (4, [1, 2], 2, [4], 8, 5, 3),
    (4, [1, 2, 4, 4], 1, [], 32, 4, 4),
    (4, [2, 1, 3], 3, [16, 8, 4], 16, 4, 1),
]


@pytest.mark.parametrize("sizes", KL, ids=str)
def test_names_of_the_autoencoder_are_mapped_one_to_one(sizes: tuple[Any, ...]) -> None:
    channels, multipliers, blocks, attention, side, latent, width = sizes
    official = {
        "ch": channels,
        "ch_mult": multipliers,
        "num_res_blocks": blocks,
        "attn_resolutions": attention,
        "resolution": side,
        "z_channels": latent,
    }
    given = numbered(kl_shapes(official, width))
    net = AutoencoderConfig(channels, tuple(multipliers), blocks, tuple(attention), side, latent)
    ours = Weights(KLConfig(net, width, adversary=0.0, perceptual=0.0))
    assert_each_number_once(given, kl_state(given, len(multipliers)), ours)


def bert_shapes(official: Mapping[str, Any]) -> Shapes:
    """`TransformerWrapper` of x_transformer.py, without its head."""
    width, shapes = official["n_embed"], dict[str, tuple[int, ...]]()
    shapes["token_emb.weight"] = (official["vocab_size"], width)
    shapes["pos_emb.emb.weight"] = (official["max_seq_len"], width)
    for number in range(official["n_layer"]):
        attention, feed = (f"attn_layers.layers.{2 * number + k}" for k in (0, 1))
        norm(shapes, f"{attention}.0", width)
        for part in "qkv":
            shapes[f"{attention}.1.to_{part}.weight"] = (512, width)
        both(shapes, f"{attention}.1.to_out", width, 512)
        norm(shapes, f"{feed}.0", width)
        both(shapes, f"{feed}.1.net.0.0", 4 * width, width)
        both(shapes, f"{feed}.1.net.2", width, 4 * width)
    norm(shapes, "norm", width)
    return shapes


def xf_shapes(official: Mapping[str, Any]) -> Shapes:
    """GLIDE's text transformer."""
    width, shapes = official["n_embed"], dict[str, tuple[int, ...]]()
    shapes["token_embedding.weight"] = (official["vocab_size"], width)
    for name in ("positional_embedding", "padding_embedding"):
        shapes[name] = (official["max_seq_len"], width)
    for number in range(official["n_layer"]):
        block = f"transformer.resblocks.{number}"
        both(shapes, f"{block}.attn.c_qkv", 3 * width, width)
        both(shapes, f"{block}.attn.c_proj", width, width)
        both(shapes, f"{block}.mlp.c_fc", 4 * width, width)
        both(shapes, f"{block}.mlp.c_proj", width, 4 * width)
        norm(shapes, f"{block}.ln_1", width)
        norm(shapes, f"{block}.ln_2", width)
    norm(shapes, "final_ln", width)
    return shapes


def text_encoder(kind: type[PaddedEncoder], official: Mapping[str, Any]) -> PaddedEncoder:
    sizes = TextConfig(
        width=official["n_embed"],
        words=official["max_seq_len"],
        layers=official["n_layer"],
        heads=official.get("heads", 4),
    )
    with torch.device("meta"):
        return kind(sizes, tokens_only(official["vocab_size"]))


@pytest.mark.parametrize("kind", [BertEncoder, GlideEncoder])
@pytest.mark.parametrize(("width", "layers", "heads"), [(4, 1, 1), (8, 3, 4), (12, 2, 3)])
def test_names_of_text_encoders_are_mapped_one_to_one(
    kind: type[PaddedEncoder], width: int, layers: int, heads: int
) -> None:
    official = {"n_embed": width, "n_layer": layers, "vocab_size": 11, "max_seq_len": 5}
    encoder = text_encoder(kind, {**official, "heads": heads})
    shapes = (bert_shapes if kind is BertEncoder else xf_shapes)(official)
    given = Counted(numbered(shapes))
    ours = padded_state(encoder, given)
    assert given.asked == Counter(list(given.state))
    assert_each_number_once(given.state, ours, encoder)


@pytest.mark.parametrize("count", [4, 5, 50, 30_522])
def test_a_tokeniser_of_so_many_tokens(count: int) -> None:
    assert len(tokens_only(count)) == count


def dit_shapes(official: Mapping[str, Any]) -> Shapes:
    """`DiT` of models.py, without the fixed table."""
    width, patch = official["hidden_size"], official["patch_size"]
    channels, shapes = official["in_channels"], dict[str, tuple[int, ...]]()
    both(shapes, "x_embedder.proj", width, channels, patch, patch)
    both(shapes, "t_embedder.mlp.0", width, 256)
    both(shapes, "t_embedder.mlp.2", width, width)
    shapes["y_embedder.embedding_table.weight"] = (official["num_classes"] + 1, width)
    for number in range(official["depth"]):
        block = f"blocks.{number}"
        both(shapes, f"{block}.attn.qkv", 3 * width, width)
        both(shapes, f"{block}.attn.proj", width, width)
        both(shapes, f"{block}.mlp.fc1", 4 * width, width)
        both(shapes, f"{block}.mlp.fc2", width, 4 * width)
        both(shapes, f"{block}.adaLN_modulation.1", 6 * width, width)
    outputs = channels * (2 if official["learn_sigma"] else 1)
    both(shapes, "final_layer.linear", patch**2 * outputs, width)
    both(shapes, "final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize(("width", "depth", "patch"), [(8, 1, 2), (12, 3, 4), (16, 2, 1)])
def test_names_of_dit_are_mapped_one_to_one(
    width: int, depth: int, patch: int, learnt: bool
) -> None:
    """Its table of classes is turned; a bias that it does not have is zero."""
    official = {
        "hidden_size": width,
        "depth": depth,
        "num_heads": 2,
        "patch_size": patch,
        "in_channels": 3,
        "input_size": 8,
        "learn_sigma": learnt,
        "num_classes": 6,
    }
    net, given = dit_network(official), Counted(numbered(dit_shapes(official)))
    ours = dit_state(net, given)
    assert set(given.asked) == set(given.state)
    assert not ours["sentence.bias"].any()
    zero = {"zero": ours["sentence.bias"]}
    assert_each_number_once(given.state | zero, ours, net)
    table = given.state["y_embedder.embedding_table.weight"]
    assert torch.equal(ours["sentence.weight"].T, table)
    query, key, value = given.state["blocks.0.attn.qkv.weight"].chunk(3)
    assert torch.equal(ours["blocks.0.attn.query.weight"], query)
    assert torch.equal(ours["blocks.0.attn.key_value.weight"], torch.cat([key, value]))


# --- names at the papers' sizes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def paper_keys() -> dict[str, Shapes]:
    path = reference("paper_keys.json")
    saved = json.loads(path.read_text())
    return {net: {n: tuple(s) for n, s in keys.items()} for net, keys in saved.items()}


@pytest.fixture(scope="module")
def paper_sizes() -> dict[str, Any]:
    sizes: dict[str, Any] = json.loads(reference("paper_sizes.json").read_text())
    return sizes


def on_meta(shapes: Shapes) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_names_of_stable_diffusions_unet(
    paper_keys: dict[str, Shapes], paper_sizes: dict[str, Any]
) -> None:
    """All 686 tensors of version 1, each read once by the preset `paper`; and the list of names
    above is the official one."""
    keys = paper_keys["ldm_sd_v1_unet"]
    assert unet_shapes(paper_sizes["ldm_sd_v1_unet"]["config"]) == keys
    with torch.device("meta"):
        unet = UNet(ldm.PRESETS["paper"].model.unet, 768, 4)
    names = unet_names(unet)
    assert len(keys) == 686
    assert Counter(name for parts in names.values() for name in parts) == Counter(list(keys))
    assert shapes_of(gathered(names, on_meta(keys))) == shapes_of(unet.state_dict())


def test_names_of_stable_diffusions_autoencoder(
    paper_keys: dict[str, Shapes], paper_sizes: dict[str, Any]
) -> None:
    keys = paper_keys["ldm_kl_f8_autoencoder"]
    official = paper_sizes["ldm_kl_f8_autoencoder (SD v1 VAE)"]["config"]
    assert kl_shapes(official, official["embed_dim"]) == keys and len(keys) == 248
    given = on_meta(keys)
    ours = kl_state(given, 4)
    taken = Counter(id(tensor) for tensor in ours.values())
    assert taken == Counter(id(tensor) for tensor in given.values())
    config = ldm.PRESETS["paper"].autoencoder
    with torch.device("meta"):
        autoencoder = KLAutoencoder(config)
    expected = shapes_of(autoencoder.state_dict())
    del expected["steps"]
    expected = {n: s for n, s in expected.items() if not n.startswith("discriminator.")}
    assert shapes_of(ours) == expected


def test_names_of_dit_xl_2(paper_keys: dict[str, Shapes]) -> None:
    """All but the fixed table, which is ours too."""
    keys = dict(paper_keys["DiT-XL/2"])
    table = keys.pop("pos_embed")
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
        net = DiT(DiTConfig(words=0), 1001, (4, 32, 32), 8)
    given = Counted(on_meta(keys))
    ours = gathered(dit_names(net), given) | dit_rest(net, given)
    once = {name for name in keys if name != "y_embedder.embedding_table.weight"}
    assert set(given.asked) == set(keys) and all(given.asked[name] == 1 for name in once)
    assert shapes_of(ours) == shapes_of(net.state_dict())
    assert (1, *net.places.shape) == table


def test_names_of_the_text_encoder_of_latent_diffusion(
    paper_keys: dict[str, Shapes], paper_sizes: dict[str, Any]
) -> None:
    """All but the head that would write BERT's tokens."""
    name = "ldm_txt2img_1p4B_BERTEmbedder"
    keys = {n.removeprefix("transformer."): s for n, s in paper_keys[name].items()}
    head = {n: keys.pop(n) for n in ("to_logits.weight", "to_logits.bias")}
    official = paper_sizes[name]["config"]
    assert bert_shapes(official) == keys and head["to_logits.weight"] == (30_522, 1280)
    encoder, given = text_encoder(BertEncoder, official), Counted(on_meta(keys))
    ours = padded_state(encoder, given)
    assert given.asked == Counter(list(keys))
    assert shapes_of(ours) == shapes_of(encoder.state_dict())


def test_unets_of_the_papers_have_as_many_parameters(paper_sizes: dict[str, Any]) -> None:
    """Of latent diffusion: Stable Diffusion's, that of the text-to-image model, that of
    ImageNet."""
    count = {"ldm_sd_v1_unet": 859_520_964, "ldm_txt2img_1p4B_unet": 872_300_484}
    count["ldm_cin256_unet"] = 400_920_579
    for name, expected in count.items():
        official = paper_sizes[name]["config"]
        unet = unet_of(official, "transformer", official["context_dim"])
        assert paper_sizes[name]["params"] == expected
        assert sum(p.numel() for p in unet.parameters()) == expected, name
