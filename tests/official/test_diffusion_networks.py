"""Verifiers of diffusion networks: they pass on the official numbers, fail on any others, and
compute the outputs of files of other sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_shapes import (
    Shapes,
    bert_shapes,
    dit_shapes,
    kl_shapes,
    unet_shapes,
    xf_shapes,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineage.official.verify import FileCheck, as_text, verify

NUM_OUTPUTS = {
    "adm_unet": 1,
    "glide_text2im": 4,
    "ldm_unet": 16,
    "ldm_vae": 12,
    "ldm_bert": 2,
    "dit": 7,
}

Check = Callable[..., FileCheck]


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the official numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NUM_OUTPUTS)
def test_the_official_numbers_are_ours(name: str, reference_file: Callable[[str], Path]) -> None:
    (check,) = verify([reference_file(f"{name}.safetensors")])
    assert check.passed, as_text(check)
    assert check.covered and check.system == name and not check.note
    assert len(check.outputs) == NUM_OUTPUTS[name]


@pytest.mark.parametrize("name", NUM_OUTPUTS)
def test_every_wrong_output_fails(name: str, changed: Check) -> None:
    """A verifier that returned the file's values would pass anything."""

    def off(key: str, tensor: Tensor) -> Tensor:
        if not key.startswith("output/"):
            return tensor
        largest = tensor[tensor.isfinite()].abs().max().clamp(min=1e-3)
        return tensor + (0.01 * largest if tensor.is_floating_point() else 1)

    check = changed(name, off)
    assert not any(output.passed for output in check.outputs), as_text(check)


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
def test_one_wrong_output_fails_alone(name: str, output: str, changed: Check) -> None:
    """One entry of it is enough."""

    def change(key: str, tensor: Tensor) -> Tensor:
        if key == f"output/{output}":
            largest = tensor.abs().max()
            tensor.view(-1)[tensor.numel() // 2] += 1e-3 * largest
        return tensor

    assert failing(changed(name, change)) == {output}


@pytest.mark.parametrize(
    ("name", "missing", "failed"),
    [
        ("glide_text2im", "input/x", {"out", "out_all_padding"}),
        ("glide_text2im", "state/out.2.bias", {"out", "out_all_padding"}),
        ("ldm_unet", "input/uncond_context", {"ddim_x_inter", "ddim_pred_x0"}),
        ("ldm_unet", "input/t", {"eps", "time_embedding"}),
        ("ldm_vae", "input/eps", {"sample", "nll_of_sample", "rec_sample"}),
        ("ldm_bert", "state/transformer.to_logits.bias", {"logits"}),
        ("dit", "input/small_tokens", {"small_block0"}),
    ],
)
def test_an_output_that_cannot_be_computed_fails_alone(
    name: str, missing: str, failed: set[str], changed: Check
) -> None:
    check = changed(name, lambda key, tensor: None if key == missing else tensor)
    assert failing(check) == failed, as_text(check)


REACHES: dict[str, dict[str, set[str]]] = {
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
"""Weights, and outputs that depend on each."""


@pytest.mark.parametrize(
    ("name", "weight"), [(name, weight) for name, weights in REACHES.items() for weight in weights]
)
def test_one_wrong_weight_fails_the_outputs_that_depend_on_it(
    name: str, weight: str, changed: Check
) -> None:
    generator = torch.Generator().manual_seed(1)

    def change(key: str, tensor: Tensor) -> Tensor:
        if key == f"state/{weight}":
            tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        return tensor

    failed = failing(changed(name, change))
    assert REACHES[name][weight] <= failed
    assert not failed & {"betas", "time_embedding", "alphas_cumprod"}


@pytest.mark.parametrize("name", ["ldm_bert", "dit", "ldm_vae"])
def test_every_single_weight_counts(
    name: str, changed: Check, reference_file: Callable[[str], Path]
) -> None:
    """But for the fixed table of positions. In the file of the autoencoder 32 channels are 32
    groups, whose norms remove most biases."""
    with safe_open(reference_file(f"{name}.safetensors"), framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith("state/")]  # noqa: SIM118
    keys = [key for key in keys if name != "ldm_vae" or key.endswith(".weight")]
    keys = keys[:: max(1, len(keys) // 20)]
    without_effect = []
    for key in keys:
        generator = torch.Generator().manual_seed(1)

        def change(
            other: str, tensor: Tensor, key: str = key, generator: torch.Generator = generator
        ) -> Tensor:
            if other != key:
                return tensor
            return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

        if not failing(changed(name, change)):
            without_effect.append(key)
    assert without_effect == (["state/pos_embed"] if "state/pos_embed" in keys else [])


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
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_other_settings_fail_where_they_matter(
    name: str, settings: dict[str, Any], failed: set[str], changed: Check
) -> None:
    failed_now = failing(changed(name, **settings))
    assert failed <= failed_now
    if "cfg_scale" in settings or "guidance" in settings:
        assert failed_now == failed


@pytest.mark.parametrize(
    ("name", "settings", "passed"),
    [
        ("adm_unet", {"channel_mult": [1, 3]}, set()),
        ("glide_text2im", {"xf_layers": 3}, set()),
        ("ldm_unet", {"transformer_depth": 2}, {"betas", "alphas_cumprod", "time_embedding"}),
        ("ldm_vae", {"embed_dim": 3}, set()),
        ("ldm_bert", {"n_layer": 3}, set()),
        ("dit", {"depth": 3}, set()),
        ("dit", {"patch_size": 4}, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_a_configuration_of_another_network_fails(
    name: str, settings: dict[str, Any], passed: set[str], changed: Check
) -> None:
    """Weights that do not fit, or are missing; tables that need no network still agree."""
    check = changed(name, **settings)
    passing = {output.name for output in check.outputs if output.passed}
    if name == "ldm_unet":
        assert passed <= passing and "eps" not in passing and "resblock_out" not in passing
    else:
        assert passing == passed


@pytest.mark.parametrize(
    ("name", "tensor", "failed"),
    [
        ("ldm_unet", "ddim_noise", {"ddim_eta0.7_x_inter"}),
        ("ldm_vae", "eps", {"sample", "nll_of_sample", "rec_sample"}),
    ],
)
def test_the_noise_of_the_file_is_used(
    name: str, tensor: str, failed: set[str], changed: Check
) -> None:
    """In its order, and nowhere else."""
    check = changed(name, lambda key, t: t.flip(0) if key == f"input/{tensor}" else t)
    assert failing(check) == failed


# --- files of other sizes ---------------------------------------------------------------------

ADM = {
    "in_channels": 1,
    "out_channels": 2,
    "model_channels": 32,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 1, 8],  # a factor that no level has is ignored
    "channel_mult": [1, 1, 2],
    "num_head_channels": -1,
    "num_heads": 2,
}
GLIDE = {
    "text_ctx": 5,
    "xf_width": 24,
    "xf_layers": 1,
    "xf_heads": 3,
    "n_vocab": 9,
    **ADM,
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
LDM = {
    **ADM,
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 1,
    "context_dim": 5,
    "use_spatial_transformer": True,
    "transformer_depth": 2,
    "attention_resolutions": [1, 2],
    "ddim_steps": 4,
    "guidance": 1.0,
    "linear_start": 0.001,
    "linear_end": 0.01,
}
DDCONFIG = {
    "ch": 32,
    "ch_mult": [1, 1, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [8],
    "resolution": 16,
    "z_channels": 3,
    "in_channels": 3,
    "out_ch": 3,
    "double_z": True,
}
BERT = {"n_embed": 20, "n_layer": 3, "vocab_size": 17, "max_seq_len": 4}
DIT = {
    "input_size": 6,
    "patch_size": 3,
    "in_channels": 4,
    "hidden_size": 24,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 4,
    "learn_sigma": False,
    "cfg_scale": 2.0,
    "mlp_ratio": 2.0,
    "class_dropout_prob": 0.0,
}

SENTENCES = {
    "output/eps_fractional_t": "t = 7.25 for every sample",
    "output/resblock_out": "module output_blocks.1.0 on its own",
    "output/spatial_transformer_out": "module middle_block.1 on its own",
}


def other_file(name: str) -> tuple[Shapes, dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Shapes of the state, config, inputs, and shapes of the outputs of a file of another size."""
    x, t, many = torch.randn(3, 1, 16, 16), torch.tensor([0, 5, 999]), (3, 2, 16, 16)
    if name == "adm_unet":
        inputs = {"x": x, "t": t}
        return unet_shapes(ADM), ADM, inputs, {"out": many}
    if name == "glide_text2im":
        shapes = unet_shapes(GLIDE) | xf_shapes(GLIDE)
        shapes |= {"transformer_proj.weight": (128, 24), "transformer_proj.bias": (128,)}
        mask = torch.arange(5)[None] < torch.tensor([2, 5, 1])[:, None]
        inputs = {"x": x, "t": t, "tokens": torch.randint(9, (3, 5)), "mask": mask}
        outputs = {"out": many, "out_all_padding": many, "xf_out": (3, 24, 5), "xf_proj": (3, 128)}
        return shapes, GLIDE, inputs, outputs
    if name == "ldm_unet":
        x, context = torch.randn(3, 3, 8, 8), torch.randn(3, 6, 5)
        block = {"resblock_in": torch.randn(3, 96, 4, 4), "resblock_emb": torch.randn(3, 128)}
        inputs = {"x": x, "t": t, "context": context, "x_T": x, **block}
        inputs |= {"spatial_transformer_in": torch.randn(3, 64, 2, 2)}
        inputs |= {"ddim_noise": torch.randn(4, *x.shape)}
        outputs = {"eps": x.shape, "eps_fractional_t": x.shape, "resblock_out": (3, 64, 4, 4)}
        outputs |= {"spatial_transformer_out": (3, 64, 2, 2), "ddim_pred_x0": (4, *x.shape)}
        outputs |= {"ddim_eta0.25_x_inter": (5, *x.shape), "ddim_sigmas_eta0.25": (4,)}
        return unet_shapes(LDM), LDM, inputs, outputs | {"ddim_x_inter": (5, *x.shape)}
    if name == "ldm_vae":
        config = {"ddconfig": DDCONFIG, "embed_dim": 2}
        inputs = {"image": torch.randn(3, 3, 24, 24), "eps": torch.randn(3, 2, 6, 6)}
        outputs = {"moments": (3, 4, 6, 6), "kl": (3,), "rec_sample": (3, 3, 24, 24)}
        return kl_shapes(DDCONFIG, 2), config, inputs, outputs
    if name == "ldm_bert":
        shapes = {f"transformer.{key}": shape for key, shape in bert_shapes(BERT).items()}
        shapes |= {"transformer.to_logits.weight": (17, 20), "transformer.to_logits.bias": (17,)}
        inputs = {"tokens": torch.randint(17, (3, 4))}
        return shapes, BERT, inputs, {"z": (3, 4, 20), "logits": (3, 4, 17)}
    x, classes = torch.randn(1, 4, 6, 6), torch.tensor([3, 0])
    inputs = {"x": x, "t": t[:1], "y": classes[:1], "small_tokens": torch.randn(1, 4, 24)}
    inputs |= {"cfg_x": x, "cfg_t": t[:2], "cfg_y": classes}
    outputs = {"out": x.shape, "tokens0": (1, 4, 24), "t_emb": (1, 24), "y_emb": (1, 24)}
    outputs |= {"block0": (1, 4, 24), "small_block0": (1, 4, 24), "cfg_out": (2, 4, 6, 6)}
    return dit_shapes(DIT), DIT, inputs, outputs


SOURCES = {
    "adm_unet": "openai/guided-diffusion (guided_diffusion/unet.py)",
    "glide_text2im": "openai/glide-text2im",
    "ldm_unet": "CompVis/latent-diffusion (openaimodel.py)",
    "ldm_vae": "CompVis/latent-diffusion (autoencoder.py)",
    "ldm_bert": "CompVis/latent-diffusion (x_transformer.py)",
    "dit": "facebookresearch/DiT",
}


@pytest.mark.parametrize("name", NUM_OUTPUTS)
def test_outputs_of_a_file_of_another_size_are_computed(name: str, tmp_path: Path) -> None:
    """Other widths, depths, batch sizes and numbers in names. The file's values are zeros, so every
    output differs from them, in the right shape."""
    shapes, config, inputs, outputs = other_file(name)
    tensors = {f"state/{k}": 0.1 * torch.randn(shape) for k, shape in shapes.items()}
    tensors |= {f"input/{k}": tensor.clone() for k, tensor in inputs.items()}
    tensors |= {f"output/{k}": torch.zeros(shape) for k, shape in outputs.items()}
    metadata = {"source": SOURCES[name], "config": json.dumps(config)}
    metadata["tensors"] = json.dumps(SENTENCES)
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    (check,) = verify([tmp_path / "other.safetensors"])
    assert check.system == name
    reasons = {output.name: output.reason for output in check.outputs}
    assert set(reasons.values()) == {"error above the tolerance"}, reasons
