"""Files of LoRA, read by the libraries whose forms they have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.diffusion.adapters.lora import LoRA, LowRank, adaptable, merged
from lineage.diffusion.networks.unet import UNetConfig, make_unet
from lineage.official.adm_unet import text_features
from lineage.official.lora import written_adapter
from lineage.official.stable_diffusion import our_unet
from lineage.training.store import write_json

LAYERS = ("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "conv1", "conv2", "conv")


@pytest.fixture(scope="module")
def both() -> tuple[nn.ModuleDict, Any]:
    """Our UNet and diffusers' with the same weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra, lineage-t2i[peers]")
    pytest.importorskip("peft", reason="peft is an extra, lineage-t2i[peers]")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    config = UNetConfig(
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0,),
        num_heads=2,
        conditioning="transformer",
        attend_padding=True,
        norm_groups=4,
        dropout=0.0,
    )
    ours = make_unet(config, 12, 12, 4, 4)
    ours.load_state_dict(our_unet(theirs.state_dict()))
    return nn.ModuleDict({"network": ours}).eval(), theirs.eval()


@pytest.fixture(scope="module")
def lora(both: tuple[nn.ModuleDict, Any]) -> LoRA:
    """An adapter whose alpha is not its rank."""
    weights = [(n, w) for n, w in adaptable(both[0]) if n.rpartition(".")[2] in LAYERS]
    adapter = LoRA({name: LowRank(weight.shape, 3, 4.5) for name, weight in weights})
    for change in adapter.changes().values():
        nn.init.normal_(change.up, std=0.2)
    return adapter


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
@torch.no_grad()
def test_other_libraries_draw_the_same_with_a_written_file(
    form: Any, both: tuple[nn.ModuleDict, Any], lora: LoRA, tmp_path: Path
) -> None:
    ours, theirs = both
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)

    def their_output(network: Any) -> Tensor:
        output: Tensor = network(x, t, encoder_hidden_states=words).sample
        return output

    plain = their_output(theirs)
    with merged(ours, [(lora, 1.0)]):
        expected = ours["network"](x, t, text_features(words))
    tensors, metadata = written_adapter(lora, form)
    if form == "peft":
        from peft import PeftModel

        save_file(tensors, tmp_path / "adapter_model.safetensors")
        write_json(tmp_path / "adapter_config.json", metadata)
        drawn = their_output(PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path))
    else:
        alphas = None
        if form == "kohya":
            from diffusers.loaders import lora_conversion_utils

            convert = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers
            tensors, alphas = convert(dict(tensors))
            theirs.load_lora_adapter(tensors, prefix="unet", network_alphas=alphas)
        else:
            save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", **metadata})
            theirs.load_lora_adapter(
                str(tmp_path), prefix="unet", weight_name="a.safetensors", use_safetensors=True
            )
        drawn = their_output(theirs)
        theirs.unload_lora()
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("output", ["eps_lora_conv", "merged_conv1", "hidden_lora", "ti_hidden"])
def test_a_wrong_output_fails_alone(output: str, changed: Any) -> None:
    """All agree with the official code, but for the one that was changed in the file."""
    check = changed("lora", lambda key, x: x + 0.1 if key == f"output/{output}" else x)
    assert [one.name for one in check.outputs if not one.passed] == [output]
    assert len(check.outputs) == 21
