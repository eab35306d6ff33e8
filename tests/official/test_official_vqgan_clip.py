"""VQGAN+CLIP: official numbers, wrong ones, and files with fewer steps, cutouts and prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.official.verify import as_text, verify
from lineage.official.vqgan_clip import resized_size

REAL = Path(__file__).resolve().parents[3] / "shared" / "reference" / "vqgan_clip.safetensors"
Copy = Callable[..., Path]
Tensors = dict[str, Tensor]


def failing(path: Path) -> set[str]:
    (check,) = verify([path])
    assert check.covered and check.system == "vqgan_clip"
    return {output.name for output in check.outputs if not output.passed}


@pytest.mark.skipif(not REAL.is_file(), reason="the reference files are not beside this checkout")
def test_our_numbers_are_the_official_ones() -> None:
    """Kernels, resampling, clamping, quantiser, prompts, cutouts, warps, and two optimisations."""
    (check,) = verify([REAL])
    assert check.passed, as_text(check)
    assert len(check.outputs) == 45 and check.system == "vqgan_clip"


def test_every_wrong_output_fails(changed_copy: Copy) -> None:
    """A verifier that returned the file's values would pass anything."""

    def off(tensors: Tensors, metadata: dict[str, str]) -> None:
        for name in tensors:
            if name.startswith("output/"):
                tensors[name] = tensors[name] + (
                    1 if not tensors[name].is_floating_point() else tensors[name].abs().max() * 1e-3
                )

    (check,) = verify([changed_copy("vqgan_clip", off)])
    assert not any(output.passed for output in check.outputs), as_text(check)


def test_a_wrong_input_fails_what_depends_on_it(changed_copy: Copy) -> None:
    """Each draw of the file is used, and each weight of the networks."""

    def changed(name: str) -> set[str]:
        def change(tensors: Tensors, metadata: dict[str, str]) -> None:
            tensors[name] = tensors[name].roll(1, 0) + (
                0.1 if tensors[name].is_floating_point() else 0
            )

        return failing(changed_copy("vqgan_clip", change))

    both = {f"traj/{m}/{w}" for m in ("latest", "original") for w in ("z", "losses", "grads")}
    pictures = {"traj/latest/images", "traj/original/images"}
    assert changed("input/cut/offset_x") == changed("input/cut/u") == {"cut/original"}
    assert {"traj/original/z", "traj/original/losses"} <= changed("input/traj/cut_offset_y")
    assert {"traj/latest/z", "traj/latest/losses"} <= changed("input/traj/noise_fac")
    assert both | {"traj/text_embeds"} <= changed("input/traj/prompt_ids") | pictures
    assert both <= changed("state/clip/vision_model.encoder.layers.1.mlp.fc2.weight") | pictures
    assert both | pictures <= changed("state/vqgan/decoder.conv_mid.weight")
    assert both | pictures <= changed("input/traj/init_indices")


def test_a_file_with_less_of_everything_agrees(changed_copy: Copy) -> None:
    """Two steps in place of three, three cutouts, two prompts, three resampled rows."""

    def less(tensors: Tensors, metadata: dict[str, str]) -> None:
        config = json.loads(metadata["config"])
        config["prompts"] = config["prompts"][1:3]
        for number in (3, 4, 0):
            for name in [n for n in tensors if n.endswith(f"{number}") and "/prompt/" in n]:
                del tensors[name]
        for name in [n for n in tensors if "/prompt/" in n and n[-1] in "12"]:
            tensors[f"{name[:-1]}{int(name[-1]) - 1}"] = tensors.pop(name)
        for name, tensor in list(tensors.items()):
            if "/traj/" in name and len(tensor) == 3:
                tensors[name] = tensor[:2]
            elif ("/cut/" in name and len(tensor) == 4) or name.endswith(("resize/in", "/size")):
                tensors[name] = tensor[1:]
        del tensors["output/ramp_0.5_2"], tensors["output/traj/latest/grads"]
        metadata["config"] = json.dumps({**config, "cutn": 3})
        del metadata["tensors"]

    path = changed_copy("vqgan_clip", less)
    assert failing(path) == set()
    (check,) = verify([path])
    assert len(check.outputs) == 34


@pytest.mark.parametrize("settings", [{"lr": 0.05}, {"optimiser": "AdamW"}, {"noise_weight": 0.2}])
def test_other_settings_give_other_latents(settings: dict[str, Any], changed_copy: Copy) -> None:
    def change(tensors: Tensors, metadata: dict[str, str]) -> None:
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **settings})

    assert {"traj/latest/z", "traj/original/z"} <= failing(changed_copy("vqgan_clip", change))


def test_a_resized_picture_keeps_its_ratio_and_never_grows() -> None:
    assert resized_size(100, 50, (48, 32)) == (55, 28)
    assert resized_size(30, 40, (48, 32)) == (30, 40)
    assert torch.prod(torch.tensor(resized_size(64, 64, (48, 32)))) <= 48 * 32
