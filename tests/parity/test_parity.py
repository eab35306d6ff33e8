"""Our classes against numbers of the official code, from the files beside this test.

Each file agrees in full; and it may be renamed, shortened or damaged, and each output still passes
or fails alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lineage.official.reference import read_reference
from lineage.official.verify import exit_code, tolerance, verify

HERE = Path(__file__).parent
NAMES = (
    "clip_hf_text",
    "diffusers_schedulers",
    "gpt2",
    "guided_diffusion",
    "k_diffusion",
    "metrics",
    "taming_mingpt",
    "vq_ema",
)

Copy = Callable[..., Path]
"""(name, change) -> a changed copy of a reference file."""


def outputs_of(name: str) -> list[str]:
    return sorted(read_reference(HERE / f"{name}.safetensors").outputs)


def failed_outputs(path: Path) -> set[str]:
    (check,) = verify([path])
    assert check.covered
    return {output.name for output in check.outputs if not output.passed}


# --- the files --------------------------------------------------------------------------------


def test_every_file_beside_this_test_is_tested() -> None:
    assert {path.stem for path in HERE.glob("*.safetensors")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_output_agrees_with_the_official_code(name: str) -> None:
    (check,) = verify([HERE / f"{name}.safetensors"])
    assert check.system == name and [output.name for output in check.outputs] == outputs_of(name)
    assert [(o.name, o.reason) for o in check.outputs if not o.passed] == []
    assert exit_code([check]) == 0


def test_the_page_names_every_file_and_its_versions() -> None:
    """Versions of the official code stand in the metadata of the files."""
    page = (HERE / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"`{name}`" in page
        source = read_reference(HERE / f"{name}.safetensors").source
        for word in source.replace("(", " ").split():
            if word[0].isdigit():
                assert word in page, (name, word)


# --- changed files ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_file_may_hold_fewer_outputs(name: str, part: int, changed_copy: Copy) -> None:
    """Every third output, and only what they need is computed."""
    rest = set(outputs_of(name)[part::3])

    def shorten(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for key in list(tensors):
            if key.startswith("output/") and key.removeprefix("output/") not in rest:
                del tensors[key]

    (check,) = verify([changed_copy(name, shorten)])
    assert {output.name for output in check.outputs} == rest
    assert check.passed, [(o.name, o.reason) for o in check.outputs if not o.passed]


@pytest.mark.parametrize("name", NAMES)
def test_a_renamed_file_is_recognised_by_its_source(name: str, changed_copy: Copy) -> None:
    """Without the name of the system in its metadata."""

    def anonymise(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata.pop("system", None)
        first = outputs_of(name)[0]
        for key in list(tensors):
            if key.startswith("output/") and key != f"output/{first}":
                del tensors[key]

    (check,) = verify([changed_copy(name, anonymise)])
    assert check.system == name and check.passed


@pytest.mark.parametrize(
    ("name", "key", "affected"),
    [
        ("gpt2", "input/attention_mask_left", "logits_left_padded"),
        ("taming_mingpt", "input/embeddings", "logits_with_embeddings"),
        ("taming_mingpt", "input/targets", "loss"),
        ("metrics", "input/clip_text", "clip_score"),
        ("metrics", "input/is_probs", "inception_score"),
        ("metrics", "input/rprec_image", "r"),  # r_precision, rprec_cosine
        ("k_diffusion", "input/dpmpp_sde/noise", "dpmpp_sde/"),
        ("guided_diffusion", "input/bpd_noise", "bpd/"),
        ("diffusers_schedulers", "input/ddim_sd_eps_eta1/noise", "ddim_sd_eps_eta1/"),
        ("diffusers_schedulers", "input/add_noise/x0", "add_noise/"),
    ],
)
def test_a_missing_input_fails_only_the_outputs_that_need_it(
    name: str, key: str, affected: str, changed_copy: Copy
) -> None:
    def remove(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        del tensors[key]

    failed = failed_outputs(changed_copy(name, remove))
    assert failed and all(output.startswith(affected) for output in failed)
    others = {output for output in outputs_of(name) if not output.startswith(affected)}
    assert others and not failed & others


@pytest.mark.parametrize("name", ["gpt2", "taming_mingpt"])
def test_a_missing_weight_fails_the_outputs_of_its_network(name: str, changed_copy: Copy) -> None:
    """Weights are loaded strictly."""

    def remove(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        del tensors[
            min(key for key in tensors if key.endswith("0.mlp.0.weight") or ".ln_1." in key)
        ]

    failed = failed_outputs(changed_copy(name, remove))
    assert failed == set(outputs_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_number_fails_alone(name: str, changed_copy: Copy) -> None:
    """An error of three times the tolerance, at the largest entry of one output."""
    reference = read_reference(HERE / f"{name}.safetensors")
    chosen = max(
        (o for o, value in reference.outputs.items() if value.is_floating_point()),
        key=lambda o: (float(reference.outputs[o].abs().max()) > 1e-3, o),
    )
    limit = tolerance(reference, chosen, reference.outputs[chosen]).limit

    def disturb(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        values = tensors[f"output/{chosen}"].reshape(-1)
        largest = int(torch.where(values.isfinite(), values, 0).abs().argmax())
        values[largest] *= 1 + 3 * limit

    assert failed_outputs(changed_copy(name, disturb)) == {chosen}


@pytest.mark.parametrize("name", ["gpt2", "taming_mingpt"])
def test_a_wrong_weight_is_noticed(name: str, changed_copy: Copy) -> None:
    """One entry in ten thousand, changed by a tenth of the matrix's deviation."""

    def disturb(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        key = max(
            (k for k in tensors if k.startswith("state/") and tensors[k].is_floating_point()),
            key=lambda k: (tensors[k].dim() == 2 and "0" in k, k),
        )
        tensors[key][0, 0] += 0.1 * tensors[key].std()

    assert "logits" in failed_outputs(changed_copy(name, disturb))


def test_an_output_that_no_class_computes_fails_alone(changed_copy: Copy) -> None:
    def add(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors["output/temperature"] = torch.ones(3)

    failed = failed_outputs(changed_copy("vq_ema", add))
    assert failed == {"temperature"}


def test_a_number_of_steps_in_a_name_is_read(changed_copy: Copy) -> None:
    """`discrete/sigmas_n8` is a part of what `n5` would be computed from."""

    def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for key in [key for key in tensors if key.startswith("output/")]:
            if key != "output/discrete/sigmas_n8":
                del tensors[key]
        sigmas = tensors.pop("output/discrete/sigmas_n8")
        ends = sigmas[[0, -2, -1]]  # two noise levels: the highest, the lowest, then 0
        tensors["output/discrete/sigmas_n2"] = ends

    assert not failed_outputs(changed_copy("k_diffusion", rename))


def test_a_subset_of_rows_in_a_name_is_read(changed_copy: Copy) -> None:
    """The kernel distance of all rows is that of the first 200 of both."""

    def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        value = tensors["output/kid_unbiased"]
        for key in [key for key in tensors if key.startswith("output/")]:
            del tensors[key]
        tensors["output/kid_unbiased_first_200"] = value

    assert not failed_outputs(changed_copy("metrics", rename))


def test_shapes_in_the_metadata_are_those_of_the_tensors() -> None:
    for name in NAMES:
        reference = read_reference(HERE / f"{name}.safetensors")
        shapes = json.loads(reference.metadata["shapes"])
        for output, value in reference.outputs.items():
            assert shapes[f"output/{output}"] == list(value.shape)
