"""`import-weights ldm`: Stable Diffusion's two layouts give one run; faults are one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lineage
from lineage.diffusion.ldm import KLAutoencoder
from lineage.diffusion.networks.unet import UNet, UNetConfig, make_unet
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig
from lineage.official.adm_unet import official_names
from lineage.official.importing import import_weights
from lineage.official.ldm import kl_config
from lineage.official.stable_diffusion import original_autoencoder, original_unet
from lineage.training.store import load_tensors, read_json

WORD_DIM = 24
UNET = UNetConfig(
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=2,
    attention_levels=(0, 1),
    num_heads=8,
    conditioning="transformer",
    attend_padding=True,
    norm_groups=32,
    dropout=0.0,
)
VAE = kl_config(
    AutoencoderConfig(
        channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), z_channels=4
    ),
    latent_channels=4,
)

Networks = tuple[UNet, KLAutoencoder]


def moved(module: nn.Module) -> nn.Module:
    """`module` with no weight at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(scope="module")
def networks() -> Networks:
    torch.manual_seed(0)
    unet, vae = moved(make_unet(UNET, WORD_DIM, WORD_DIM, 4, 4)), moved(KLAutoencoder(VAE))
    assert isinstance(unet, UNet) and isinstance(vae, KLAutoencoder)
    return unet, vae


def vae_name(key: str) -> str:
    """CompVis' name of a tensor of the autoencoder above, which has three levels."""
    part, _, inner = key.partition(".")
    if part == "encoder":
        return key.replace(".resample.", ".downsample.")
    inner = inner.replace(".resample.", ".upsample.")
    return f"{part}." + re.sub(r"^up\.(\d)\.", lambda m: f"up.{2 - int(m[1])}.", inner)


def original(unet: UNet, vae: KLAutoencoder) -> dict[str, Tensor]:
    """Both under the names of a checkpoint."""
    names = official_names(unet.state_dict())
    state = {
        f"model.diffusion_model.{names[key]}": tensor.clone()
        for key, tensor in unet.state_dict().items()
    }
    for key, tensor in vae.state_dict().items():
        if key != "step":
            state[f"first_stage_model.{vae_name(key)}"] = tensor.clone()
    state["cond_stage_model.transformer.text_model.final_layer_norm.weight"] = torch.ones(3)
    return state


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def in_diffusers(key: str) -> str:
    """diffusers' name for a tensor of the UNet above: two levels of two blocks."""
    for ours, theirs in RESNET.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    head = {
        "time_embed.0.": "time_embedding.linear_1.",
        "time_embed.2.": "time_embedding.linear_2.",
    }
    head |= {"out.0.": "conv_norm_out.", "out.2.": "conv_out.", "input_blocks.0.0.": "conv_in."}
    head |= {"middle_block.0.": "mid_block.resnets.0.", "middle_block.2.": "mid_block.resnets.1."}
    head |= {"middle_block.1.": "mid_block.attentions.0."}
    for ours, theirs in head.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    side, number, part, rest = re.fullmatch(r"(\w+)_blocks\.(\d)\.(\d)\.(.*)", key).groups()  # type: ignore[union-attr]
    if side == "input":
        table = {1: (0, 0), 2: (0, 1), 4: (1, 0), 5: (1, 1)}
        if number == "3":
            return f"down_blocks.0.downsamplers.0.{rest.replace('op', 'conv')}"
        level, block = table[int(number)]
        return f"down_blocks.{level}.{('resnets', 'attentions')[int(part)]}.{block}.{rest}"
    level, block = divmod(int(number), 3)
    if part == "2":
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    return f"up_blocks.{level}.{('resnets', 'attentions')[int(part)]}.{block}.{rest}"


def vae_in_diffusers(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """diffusers' name and form for a tensor of the autoencoder above: three levels."""
    key = re.sub(r"encoder\.down\.(\d)\.block", r"encoder.down_blocks.\1.resnets", key)
    key = re.sub(r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0", key)
    key = re.sub(r"decoder\.up\.(\d)\.", lambda m: f"decoder.up_blocks.{2 - int(m[1])}.", key)
    key = key.replace(".block.", ".resnets.").replace(".upsample.", ".upsamplers.0.")
    key = key.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    key = key.replace("mid.block_1", "mid_block.resnets.0")
    key = key.replace("mid.block_2", "mid_block.resnets.1")
    if ".mid.attn_1." in key:
        names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}
        names["proj_out"] = "to_out.0"
        part, _, rest = key.partition(".mid.attn_1.")
        layer, kind = rest.rsplit(".", 1)
        key = f"{part}.mid_block.attentions.0.{names[layer]}.{kind}"
        tensor = tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor
    return key, tensor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, networks: Networks) -> Path:
    """A file of the original layout."""
    path = tmp_path_factory.mktemp("original") / "sd.safetensors"
    save_file(original(*networks), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, networks: Networks) -> Path:
    """A folder of diffusers' layout."""
    path = tmp_path_factory.mktemp("diffusers")
    state = original(*networks)
    unet = {
        in_diffusers(k.removeprefix("model.diffusion_model.")): v
        for k, v in state.items()
        if k.startswith("model.")
    }
    vae = dict(
        vae_in_diffusers(k.removeprefix("first_stage_model."), v)
        for k, v in state.items()
        if k.startswith("first_stage_model.")
    )
    for name, tensors in (("unet", unet), ("vae", vae)):
        (path / name).mkdir()
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, path / name / "diffusion_pytorch_model.safetensors")
    return path


def test_the_original_layout_gives_the_networks_back(
    checkpoint: Path, networks: Networks, tmp_path: Path
) -> None:
    note = import_weights("ldm", checkpoint, tmp_path / "run")
    assert "clip-vit-large-patch14" in note
    loaded = lineage.load(tmp_path / "run").state_dict()
    unet, vae = networks
    for key, tensor in unet.state_dict().items():
        assert torch.equal(loaded[f"network.{key}"], tensor), key
    for key, tensor in vae.state_dict().items():
        if key != "step":
            assert torch.equal(loaded[f"space.autoencoder.{key}"], tensor), key
    assert loaded["space.scale"].item() == pytest.approx(0.18215)


def test_both_layouts_give_the_same_run(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    import_weights("ldm", checkpoint, tmp_path / "one")
    import_weights("ldm", folder, tmp_path / "two")
    one, two = (lineage.load(tmp_path / n).state_dict() for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_autoencoder_of_an_imported_run_can_be_taken(checkpoint: Path, tmp_path: Path) -> None:
    """It is a finished stage, under its own name, for `--from autoencoder=RUN`."""
    import_weights("ldm", checkpoint, tmp_path / "run")
    stage = load_tensors(tmp_path / "run" / "stages" / "autoencoder" / "model.safetensors")
    loaded = lineage.load(tmp_path / "run").state_dict()
    assert stage and all(torch.equal(t, loaded[f"space.autoencoder.{n}"]) for n, t in stage.items())


def test_the_names_of_diffusers_are_mapped_one_to_one(networks: Networks) -> None:
    state = original(*networks)
    unet = {
        k.removeprefix("model.diffusion_model."): v for k, v in state.items() if "diffusion" in k
    }
    again = original_unet({in_diffusers(key): value for key, value in unet.items()})
    assert again.keys() == unet.keys() and all(torch.equal(again[k], unet[k]) for k in unet)
    vae = {k.removeprefix("first_stage_model."): v for k, v in state.items() if "first" in k}
    again = original_autoencoder(dict(vae_in_diffusers(*item) for item in vae.items()))
    assert again.keys() == vae.keys() and all(torch.equal(again[k], vae[k]) for k in vae)


def test_averaged_weights_are_preferred(networks: Networks, tmp_path: Path) -> None:
    state = original(*networks)
    averaged = torch.full_like(state["model.diffusion_model.time_embed.0.weight"], 0.25)
    state["model_ema.diffusion_modeltime_embed0weight"] = averaged
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "sd.ckpt")
    import_weights("ldm", tmp_path / "sd.ckpt", tmp_path / "run")
    loaded = lineage.load(tmp_path / "run").state_dict()
    assert torch.equal(loaded["network.time_embed.0.weight"], averaged)


def test_half_precision_becomes_single(networks: Networks, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in original(*networks).items()}
    save_file(state, tmp_path / "sd.safetensors")
    import_weights("ldm", tmp_path / "sd.safetensors", tmp_path / "run")
    loaded = lineage.load(tmp_path / "run").state_dict()
    assert {t.dtype for t in loaded.values() if t.is_floating_point()} == {torch.float32}


def test_a_folder_of_clip_beside_the_file_is_the_text_encoder(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "clip").mkdir()
    import_weights("ldm", [checkpoint, tmp_path / "clip"], tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json")["text"].endswith("clip")


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model."])
def test_a_missing_part_is_named(part: str, networks: Networks, tmp_path: Path) -> None:
    state = {k: v for k, v in original(*networks).items() if not k.startswith(part)}
    save_file(state, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=re.escape(part)):
        import_weights("ldm", tmp_path / "sd.safetensors", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_tensor_is_named(networks: Networks, tmp_path: Path) -> None:
    state = original(*networks)
    del state["model.diffusion_model.out.2.bias"]
    save_file(state, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"out\.2\.bias"):
        import_weights("ldm", tmp_path / "sd.safetensors", tmp_path / "run")


def test_a_folder_without_weights_and_too_many_files_are_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty" / "unet").mkdir(parents=True)
    with pytest.raises(UserError, match="diffusion_pytorch_model"):
        import_weights("ldm", tmp_path / "empty", tmp_path / "run")
    with pytest.raises(UserError, match="one file"):
        import_weights("ldm", [checkpoint, checkpoint], tmp_path / "run")
    with pytest.raises(UserError, match="one file"):
        import_weights("ldm", tmp_path, tmp_path / "run")


def test_a_later_version_is_refused(networks: Networks, tmp_path: Path) -> None:
    """Version 2 has layers where version 1 has 1 x 1 convolutions."""
    state = original(*networks)
    for key in [key for key in state if key.endswith("proj_in.weight")]:
        state[key] = state[key][:, :, 0, 0].contiguous()
    save_file(state, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match="only v1"):
        import_weights("ldm", tmp_path / "sd.safetensors", tmp_path / "run")
