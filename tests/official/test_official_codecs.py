"""GPT-2, minGPT, quantisers, VQGAN and DALL-E's dVAE: official numbers, wrong ones, other sizes,
key maps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from official_names import (
    autoencoder_name,
    dvae_name,
    dvae_official,
    gpt2_official,
    mingpt_official,
    vqgan_official,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from lineage.official.dalle import dvae_key
from lineage.official.gpt2 import gpt2_state, greedy
from lineage.official.verify import FileCheck, as_text, verify
from lineage.official.vqgan import (
    autoencoder_config,
    autoencoder_key,
    autoencoder_state,
    mingpt_state,
)
from lineage.vqvae.dalle import DVAE, DVAEConfig, DVAEDecoder, DVAEEncoder, map_pixels
from lineage.vqvae.quantise import QuantiserConfig
from lineage.vqvae.transformer import GPT, TransformerConfig, causal_mask
from lineage.vqvae.vqgan import VQGAN, VQGANConfig

OUTPUTS = {"gpt2": 7, "taming_mingpt": 6, "vq_ema": 14, "dalle_dvae": 8, "taming_vqgan": 23}
SOURCES = {
    "gpt2": "huggingface/transformers GPT2LMHeadModel",
    "taming_mingpt": "CompVis/taming-transformers (mingpt.py)",
    "dalle_dvae": "openai/DALL-E",
    "taming_vqgan": "CompVis/taming-transformers (vqgan.py)",
}
State = dict[str, Tensor]
Changed = Callable[..., FileCheck]


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the official numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_agrees(name: str, changed: Changed) -> None:
    check = changed(name)
    assert check.passed and len(check.outputs) == OUTPUTS[name], as_text(check)


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_wrong_output_fails(name: str, changed: Changed) -> None:
    """A verifier that returned the file's values would pass anything."""

    def off(key: str, tensor: Tensor) -> Tensor:
        if not key.startswith("output/"):
            return tensor
        if tensor.is_floating_point():
            return tensor + 0.01 * tensor.abs().max().clamp(min=1)
        return ~tensor if tensor.dtype == torch.bool else tensor + 1

    check = changed(name, off)
    assert not any(output.passed for output in check.outputs), as_text(check)


@pytest.mark.parametrize(
    ("name", "key", "affected", "unaffected"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight", {"logits", "hidden_states", "loss"}, set()),
        ("gpt2", "transformer.h.1.mlp.c_proj.bias", {"logits_left_padded"}, set()),
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
        ("taming_vqgan", "VQModel/encoder.down.1.attn.0.k.weight", {"z_e"}, {"small_mid_attn_1"}),
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
def test_other_weights_fail_the_outputs_that_depend_on_them(
    name: str, key: str, affected: set[str], unaffected: set[str], changed: Changed
) -> None:
    def off(full: str, tensor: Tensor) -> Tensor:
        return tensor + torch.randn(tensor.shape).abs() if full == f"state/{key}" else tensor

    failed = failing(changed(name, off))
    assert affected <= failed and not failed & unaffected


@pytest.mark.parametrize(
    ("name", "settings", "affected"),
    [
        ("gpt2", {"n_head": 2}, {"logits", "loss"}),
        ("gpt2", {"activation": "gelu"}, {"logits"}),
        ("gpt2", {"layer_norm_epsilon": 0.1}, {"logits"}),
        ("taming_mingpt", {"n_head": 1}, {"logits"}),
        ("vq_ema", {"decay": 0.6}, {"after/_codebook.cluster_size", "after2/_codebook.embed"}),
        ("vq_ema", {"commitment_weight": 1.0}, {"train_commit_loss"}),
        ("taming_vqgan", {"beta": 0.3}, {"codebook_loss", "grad_z_fixed", "grad_codebook_legacy"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_other_settings_fail_the_outputs_that_depend_on_them(
    name: str, settings: dict[str, Any], affected: set[str], changed: Changed
) -> None:
    failed = failing(changed(name, **settings))
    assert affected <= failed
    assert "commitment_weight" not in settings or failed == affected
    assert "beta" not in settings or not failed & {"grad_z_legacy", "grad_codebook_fixed", "z_q"}


@pytest.mark.parametrize(
    ("name", "settings", "unaffected"),
    [
        ("gpt2", {"n_layer": 3}, set()),
        ("taming_mingpt", {"n_embd": 8}, set()),
        ("vq_ema", {"codebook_size": 6}, {"eval_loss"}),
        ("dalle_dvae", {"n_blk_per_group": 1}, {"map_pixels", "unmap_pixels"}),
        ("dalle_dvae", {"group_count": 3}, {"map_pixels", "unmap_pixels"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_weights_of_another_network_are_not_loaded(
    name: str, settings: dict[str, Any], unaffected: set[str], changed: Changed
) -> None:
    check = changed(name, **settings)
    assert {output.name for output in check.outputs if output.passed} == unaffected


# --- files of other sizes ---------------------------------------------------------------------


def test_other_lengths_of_gpt2(changed: Changed) -> None:
    """One row of the batch, and shorter greedy continuations."""
    lengths = {"greedy_cache": 15, "greedy_nocache": 11}

    def shorten(key: str, tensor: Tensor) -> Tensor | None:
        name = key.removeprefix("output/")
        if key.startswith("input/") or name in ("logits", "logits_left_padded"):
            return tensor[:1]
        if name == "cached_last_logits":
            return tensor[:1]
        if name in lengths:
            return tensor[:1, : lengths[name]]
        return None if key.startswith("output/") else tensor

    check = changed("gpt2", shorten)
    assert check.passed and len(check.outputs) == 5, as_text(check)


def test_other_lengths_of_mingpt(changed: Changed) -> None:
    """Shorter continuations; a prefix of one token is no prefix."""

    def shorten(key: str, tensor: Tensor) -> Tensor:
        lengths = {"output/greedy_tokens": 9, "output/cached_step_logits": 5}
        return tensor[:, : lengths[key]] if key in lengths else tensor

    assert changed("taming_mingpt", shorten).passed


def test_a_single_output_of_a_vqgan(changed: Changed) -> None:
    """The step of the moving averages needs no other output of the file."""

    def only(key: str, tensor: Tensor) -> Tensor | None:
        is_other = key.startswith("output/") and key != "output/ema_after/embedding.weight"
        return None if is_other else tensor

    check = changed("taming_vqgan", only)
    assert check.passed and len(check.outputs) == 1, as_text(check)


@pytest.fixture
def check_file(tmp_path: Path) -> Callable[..., FileCheck]:
    """Write a reference file and verify it."""

    def check(
        system: str, config: Mapping[str, Any], tensors: State, sentences: Mapping[str, str]
    ) -> FileCheck:
        metadata = {
            "source": SOURCES[system],
            "config": json.dumps(config),
            "tensors": json.dumps(sentences),
        }
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "file.safetensors", metadata)
        (checked,) = verify([tmp_path / "file.safetensors"])
        assert checked.system == system
        return checked

    return check


def perturbed(network: nn.Module) -> nn.Module:
    """No weight at a value, such as 0 or 1, that hides a mistake."""
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


def named(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_a_gpt2_of_other_sizes(gelu: Any, check_file: Callable[..., FileCheck]) -> None:
    config = TransformerConfig(width=6, num_layers=3, num_heads=2, gelu=gelu)
    model: Any = perturbed(GPT(config, 11, 9))
    ids = torch.randint(11, (3, 6))
    outputs = {"logits": model(ids), "greedy_cache": greedy(model, ids, 9)}
    state = named("state", gpt2_official(model.state_dict()))
    tensors = state | {"input/input_ids": ids} | named("output", outputs)
    sizes = {"vocab_size": 11, "n_positions": 9, "n_embd": 6, "n_layer": 3, "n_head": 2}
    activation = "gelu" if gelu == "exact" else "gelu_new"
    check = check_file("gpt2", {**sizes, "activation": activation}, tensors, {})
    assert check.passed, as_text(check)


def test_a_mingpt_of_other_sizes(check_file: Callable[..., FileCheck]) -> None:
    """The length of the prompt is read from the number of steps, or from the sentence."""
    config = TransformerConfig(width=6, num_layers=3, num_heads=2, gelu="exact")
    model: Any = perturbed(GPT(config, 10, 9, tied=False))
    ids = torch.randint(10, (3, 8))
    tokens = greedy(model, ids[:, :3], 9)
    steps = torch.stack([model(tokens[:, :n])[:, -1] for n in range(3, 9)], 1)
    outputs = {"greedy_tokens": tokens, "cached_step_logits": steps}
    for prefix in (0, 5):
        mask = causal_mask(8, num_prefix=prefix)
        outputs[f"logits_n_unmasked{prefix}"] = model(ids, mask=mask)
    state = named("state", mingpt_official(model.state_dict()))
    sizes = {"vocab_size": 10, "block_size": 9, "n_layer": 3, "n_head": 2, "n_embd": 6}
    for sentences in ({}, {"output/greedy_tokens": "greedy continuation of idx[:, :3]"}):
        tensors = state | {"input/idx": ids} | named("output", outputs)
        check = check_file("taming_mingpt", sizes, tensors, sentences)
        assert check.passed, as_text(check)
        outputs.pop("cached_step_logits", None)


def test_a_dvae_of_other_sizes(check_file: Callable[..., FileCheck]) -> None:
    """Three groups, another temperature, another stride, a later group."""
    config = DVAEConfig(
        num_codes=9, hidden_channels=8, init_channels=5, blocks_per_group=1, num_groups=3
    )
    codec: Any = perturbed(DVAE(config))
    image = torch.rand(1, 3, 16, 24)
    logits = codec.encoder(map_pixels(image))
    x = codec.encoder.groups[0](codec.encoder.input(map_pixels(image)))
    x = codec.encoder.groups[1](nn.functional.max_pool2d(x, 2))
    outputs = {
        "tokens": logits.argmax(1),
        "decoder_out_soft": torch.cat(codec.decoder((logits / 1.3).softmax(1)), 1),
        "enc_group2": nn.functional.max_pool2d(x, 2)[..., ::3, ::3],
    }
    state = named("state/Encoder", dvae_official(codec.encoder.state_dict()))
    state |= named("state/Decoder", dvae_official(codec.decoder.state_dict()))
    tensors = state | {"input/image01": image} | named("output", outputs)
    sizes = {"n_hid": 8, "n_init": 5, "vocab_size": 9, "n_blk_per_group": 1, "group_count": 3}
    sentences = {
        "output/decoder_out_soft": "decoder on softmax(logits/1.3)",
        "output/enc_group2": "after group_2 incl. pooling, [..., ::3, ::3]",
    }
    check = check_file("dalle_dvae", sizes, tensors, sentences)
    assert check.passed, as_text(check)
    without = check_file("dalle_dvae", sizes, tensors, {})
    assert failing(without) == {"decoder_out_soft", "enc_group2"}


DDCONFIG = {
    "z_channels": 6,
    "resolution": 8,
    "in_channels": 3,
    "out_ch": 3,
    "double_z": False,
    "ch": 32,
    "ch_mult": [1, 2, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [8, 2],
}


def test_a_vqgan_of_other_sizes(check_file: Callable[..., FileCheck]) -> None:
    """Three resolutions, attention at two of them, another discriminator."""
    quantiser = QuantiserConfig(
        num_codes=10, code_dim=5, update="loss", init="normal", restart_threshold=0.0
    )
    net = autoencoder_config(DDCONFIG)
    codec: Any = perturbed(VQGAN(VQGANConfig(net=net, quantiser=quantiser, disc_channels=3)))
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    z_e = codec.quant_conv(codec.encoder(image))
    outputs = {
        "z_e": z_e,
        "indices": codec.encode(image).flatten(),
        "reconstruction": codec.decode_latents(codec.quantiser.lookup(codec.encode(image))),
        "disc_real": codec.discriminator(image.repeat_interleave(4, 2).repeat_interleave(4, 3)),
    }
    official = vqgan_official(codec.state_dict(), 3)
    disc = "loss.discriminator."
    state = named("state/VQModel", {k: v for k, v in official.items() if not k.startswith(disc)})
    state |= {
        f"state/NLayerDiscriminator/{k.removeprefix(disc)}": v
        for k, v in official.items()
        if k.startswith(disc)
    }
    sizes = {
        "ddconfig": DDCONFIG,
        "embed_dim": 5,
        "n_embed": 10,
        "beta": 0.4,
        "discriminator": {"input_nc": 3, "ndf": 3, "n_layers": 3},
    }
    tensors = state | {"input/image": image} | named("output", outputs)
    sentences = {"output/disc_real": "patch logits of the image enlarged 4x (nearest)"}
    check = check_file("taming_vqgan", sizes, tensors, sentences)
    assert check.passed, as_text(check)


# --- key maps ---------------------------------------------------------------------------------


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(t, "shape", t)) for name, t in state.items()}


@pytest.mark.parametrize("layers", [1, 3, 12])
@pytest.mark.parametrize("system", ["gpt2", "mingpt"])
def test_names_of_transformers_are_mapped_one_to_one(system: str, layers: int) -> None:
    """There and back, values too."""
    tied = system == "gpt2"
    there, back = (gpt2_official, gpt2_state) if tied else (mingpt_official, mingpt_state)
    config = TransformerConfig(width=6, num_layers=layers, num_heads=2)
    ours = GPT(config, 11, 9, tied).state_dict()
    again = back(there(ours))
    assert again.keys() == ours.keys() and all(torch.equal(again[n], ours[n]) for n in ours)


@pytest.mark.parametrize("network", [DVAEEncoder, DVAEDecoder])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_names_of_the_dvae_are_mapped_one_to_one(
    network: Callable[[DVAEConfig], nn.Module], blocks: int
) -> None:
    config = DVAEConfig(num_codes=9, hidden_channels=4, init_channels=5, blocks_per_group=blocks)
    with torch.device("meta"):
        ours = network(config).state_dict()
    assert [dvae_key(dvae_name(name)) for name in ours] == list(ours)
    assert len({dvae_name(name) for name in ours}) == len(ours)


def assert_autoencoder_names(
    config: AutoencoderConfig, official: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """All names of encoder and decoder, there and back; with the shapes of `official`."""
    levels = len(config.channel_mult)
    with torch.device("meta"):
        networks = {"encoder": Encoder(config, config.z_channels), "decoder": Decoder(config)}
    for part, network in networks.items():
        ours = shapes(network.state_dict())
        theirs = {autoencoder_name(name, part, levels): shape for name, shape in ours.items()}
        if official is not None:
            assert theirs == {n: tuple(s) for n, s in official.items() if n.startswith(part)}
        for name in ours:
            inner = autoencoder_name(name, part, levels).removeprefix(f"{part}.")
            assert autoencoder_key(inner, levels) == name
        state: Any = {name: torch.empty(shape, device="meta") for name, shape in theirs.items()}
        assert shapes(autoencoder_state(state, part, levels)) == ours


def test_names_of_the_vqgan_are_mapped_one_to_one() -> None:
    config = autoencoder_config(DDCONFIG)
    assert config == AutoencoderConfig(
        channels=32,
        channel_mult=(1, 2, 1),
        num_res_blocks=1,
        attn_resolutions=(8, 2),
        resolution=8,
        z_channels=6,
    )
    assert_autoencoder_names(config)


@pytest.mark.parametrize("network", ["taming_vqgan_imagenet_f16_1024", "dalle_dvae"])
def test_names_at_the_papers_sizes(network: str, reference_file: Callable[[str], Path]) -> None:
    """Every tensor of the public code, with its shape."""
    keys = json.loads(reference_file("paper_keys.json").read_text())
    if network.startswith("taming"):
        assert_autoencoder_names(AutoencoderConfig(), keys[network])
        return
    with torch.device("meta"):
        both = {"Encoder": DVAEEncoder(DVAEConfig()), "Decoder": DVAEDecoder(DVAEConfig())}
    for part, ours in both.items():
        theirs = {dvae_key(n): tuple(shape) for n, shape in keys[f"{network}/{part}"].items()}
        assert theirs == shapes(ours.state_dict())
