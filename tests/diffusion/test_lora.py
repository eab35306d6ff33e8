"""LoRA: the change of a weight, training on a frozen base, merging, and the files of adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lineage
from lineage import runs
from lineage.diffusion.adapters.lora import (
    LoRA,
    LoRAConfig,
    LoRAModel,
    LowRank,
    adaptable,
    make_lora,
    merge,
    merged,
    unmerge,
)
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.official.adapters import add_adapters, export_adapter, parsed, read_lora
from lineage.official.lora import (
    diffusers_name,
    known_names,
    read_adapter,
    stated_alpha,
    written_adapter,
)
from lineage.official.stable_diffusion import our_unet
from lineage.recipes import find_recipe, preset
from lineage.text.tokenizer import WordTokenizer
from lineage.training.store import load_tensors, read_json, write_json

CAPTIONS = ["a red circle", "a blue square above a green triangle"]
CONVS = (*("to_q", "proj_in"), *("conv1", "conv_shortcut", "time_emb_proj"))


def fill(lora: LoRA, seed: int = 0) -> LoRA:
    """Random numbers in place of the zeros of every `up`."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for change in lora.changes().values():
            change.up.copy_(torch.randn(change.up.shape, generator=noise))
            change.down.copy_(torch.randn(change.down.shape, generator=noise))
    return lora


@pytest.fixture
def base(make_system: Any) -> DiffusionModel:
    """An untrained `ldm` without zero layers, behind which no change would show."""
    model: DiffusionModel = make_system("ldm")[0].eval()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture
def adapter(base: DiffusionModel) -> LoRA:
    """An adapter of attention and convolutions, whose alpha is not its rank."""
    return fill(make_lora(base, LoRAConfig(rank=3, alpha=1.5, target_modules=CONVS)))


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


# --- the change of a weight -------------------------------------------------------------------


def test_a_linear_layer_changes_by_equation_3() -> None:
    change = LowRank((5, 7), rank=2, alpha=3.0)
    x = torch.randn(4, 7)
    assert not change.delta().any()  # B is zero at first
    with torch.no_grad():
        change.up.normal_()
    by_hand = 3.0 / 2 * (x @ change.down.T) @ change.up.T
    torch.testing.assert_close(F.linear(x, change.delta()), by_hand)


def test_a_convolution_changes_by_a_thin_one_and_a_1_x_1_one() -> None:
    change = LowRank((6, 4, 3, 3), rank=2, alpha=2.0)
    with torch.no_grad():
        change.up.normal_()
    x = torch.randn(2, 4, 9, 9)
    for stride in (1, 2):
        thin = F.conv2d(x, change.down, stride=stride, padding=1)
        merged_kernel = F.conv2d(x, change.delta(), stride=stride, padding=1)
        torch.testing.assert_close(merged_kernel, F.conv2d(thin, change.up), atol=1e-5, rtol=1e-4)


def test_layers_are_chosen_by_the_last_part_of_their_name(base: DiffusionModel) -> None:
    names = make_lora(base, LoRAConfig(target_modules=("to_q", "proj_in"))).changes()
    assert {name.rpartition(".")[2] for name in names} == {"to_q", "proj_in"}
    assert all(name.startswith("network.") for name in names)  # neither text nor autoencoder
    with pytest.raises(UserError, match=r"query names no layer of the network.*to_q"):
        make_lora(base, LoRAConfig(target_modules=("query",)))


def test_the_published_size(tokenizer: WordTokenizer) -> None:
    """diffusers' script for Stable Diffusion v1 trains 797,184 parameters at rank 4."""
    with torch.device("meta"):
        model = runs.build(find_recipe("lora").stages(preset("lora", "paper"), tokenizer))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 797_184


# --- a base with an adapter -------------------------------------------------------------------


def test_a_new_adapter_draws_the_pictures_of_the_base(base: DiffusionModel) -> None:
    before = base.generate(CAPTIONS, seed=1)
    model = LoRAModel(base, LoRAConfig()).eval()
    assert torch.equal(model.generate(CAPTIONS, seed=1), before)
    with torch.no_grad():  # the changed weights were cached, and are computed again
        for change in model.adapter.changes().values():
            change.up.normal_()
    assert not torch.equal(model.generate(CAPTIONS, seed=1), before)
    assert torch.equal(base.generate(CAPTIONS, seed=1), before)
    drawn = model.generate(CAPTIONS, seed=1)
    other = fill(make_lora(base, LoRAConfig()), seed=3)
    with merged(base, [(other, 1.0)]):  # so are they when the base has changed
        assert not torch.equal(model.generate(CAPTIONS, seed=1), drawn)
    assert torch.equal(model.generate(CAPTIONS, seed=1), drawn)


def test_an_adapter_is_no_base(base: DiffusionModel) -> None:
    with pytest.raises(UserError, match="is an adapter itself"):
        LoRAModel(LoRAModel(base, LoRAConfig()), LoRAConfig())


def test_gradients_reach_the_adapter_alone(base: DiffusionModel) -> None:
    model = LoRAModel(base, LoRAConfig())
    fill(model.adapter)
    text = model.text.encode(CAPTIONS)
    x, t = torch.randn(2, *model.space.shape), torch.tensor([3, 500])
    model.network(x, t, text).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora" in n or n.startswith("adapter") for n in with_gradient)
    assert all(p.grad.any() for p in model.adapter.parameters())


# --- merging ----------------------------------------------------------------------------------


def test_merged_weights_give_the_same_pictures(base: DiffusionModel) -> None:
    model = LoRAModel(base, LoRAConfig(rank=2, alpha=1.0)).eval()
    fill(model.adapter)
    apart = model.generate(CAPTIONS, seed=2)
    with merged(base, [(model.adapter, 1.0)]):
        assert torch.equal(base.generate(CAPTIONS, seed=2), apart)


def test_merging_and_back_leaves_the_bytes(base: DiffusionModel, adapter: LoRA) -> None:
    before = bytes_of(base)
    first = merge(base, [(adapter, 0.7)])
    changed = bytes_of(base)
    assert {n for n in before if before[n] != changed[n]} == {
        f"{name}.weight" for name in adapter.changes()
    }
    unmerge(base, first)
    assert bytes_of(base) == before
    merge(base, [(adapter, 0.7)])
    assert bytes_of(base) == changed


def test_a_failure_within_leaves_the_bytes(base: DiffusionModel, adapter: LoRA) -> None:
    before = bytes_of(base)
    with pytest.raises(KeyError), merged(base, [(adapter, 1.0)]):
        raise KeyError
    assert bytes_of(base) == before


def test_scale_0_changes_nothing(base: DiffusionModel, adapter: LoRA) -> None:
    before = bytes_of(base)
    with torch.no_grad():
        next(adapter.parameters()).fill_(torch.inf)  # 0 times infinity would be no number
    merge(base, [(adapter, 0.0)])
    assert bytes_of(base) == before


def test_changes_of_several_adapters_add_up(base: DiffusionModel, adapter: LoRA) -> None:
    other = fill(make_lora(base, LoRAConfig(rank=1, alpha=2.0)), seed=5)
    name = next(n for n in adapter.changes() if n.endswith("to_q"))
    weight = base.get_parameter(f"{name}.weight").detach().clone()
    expected = weight + 0.5 * adapter.changes()[name].delta() - 2 * other.changes()[name].delta()
    merge(base, [(adapter, 0.5), (other, -2.0)])
    torch.testing.assert_close(base.get_parameter(f"{name}.weight"), expected)


def test_an_adapter_of_another_shape_is_refused_before_anything_changes(
    base: DiffusionModel, adapter: LoRA
) -> None:
    before = bytes_of(base)
    name = next(iter(adapter.changes()))
    wider = LoRA({name: LowRank((99, 7), 2, 2.0)})
    with pytest.raises(UserError, match=rf"another model: its change of {name} is \(99, 7\)"):
        merge(base, [(adapter, 1.0), (wider, 1.0)])
    assert bytes_of(base) == before


# --- key forms --------------------------------------------------------------------------------


def test_every_layer_of_a_unet_has_its_name_in_diffusers(tokenizer: WordTokenizer) -> None:
    """The names lead back to ours, through the map by which whole models are read."""
    with torch.device("meta"):
        system = runs.build(find_recipe("ldm").stages(preset("ldm", "paper"), tokenizer))
    ours = [name for name, _ in adaptable(system) if name.startswith("network.")]
    theirs = [diffusers_name(name) for name in ours]
    assert len(set(theirs)) == len(ours) > 250
    keys = {f"{name.removeprefix('unet.')}.weight": Tensor() for name in theirs if name}
    assert [f"network.{key}" for key in our_unet(keys)] == [f"{name}.weight" for name in ours]


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_a_written_adapter_is_read_as_it_was(
    form: Any, base: DiffusionModel, adapter: LoRA
) -> None:
    tensors, metadata = written_adapter(adapter, form)
    alpha = {"unet": metadata["lora_alpha"]} if form == "peft" else stated_alpha(metadata)
    read = read_adapter(tensors, base, alpha)
    for name, delta in adapter.deltas().items():
        assert torch.equal(read.deltas()[name], delta), name
    assert {c.alpha.item() for c in read.changes().values()} == {1.5}


def test_the_original_names_of_a_unet_are_read(base: DiffusionModel, adapter: LoRA) -> None:
    """As kohya's files for SDXL have them: lora_unet_input_blocks_1_1_…"""
    names = [n for n, ours in known_names(base).items() if "_blocks_" in n and "down" not in n]
    original = {known_names(base)[n]: n for n in names if "input_blocks" in n}
    name = next(n for n in adapter.changes() if n in original and n.endswith("to_q"))
    assert original[name].startswith("lora_unet_input_blocks_")
    assert original[name].endswith("_transformer_blocks_0_attn1_to_q")
    change = adapter.changes()[name]
    file = {
        f"{original[name]}.lora_down.weight": change.down.detach(),
        f"{original[name]}.lora_up.weight": change.up.detach(),
        f"{original[name]}.alpha": change.alpha,
    }
    assert list(read_adapter(file, base).changes()) == [name]


def test_alpha_is_the_rank_where_a_form_states_none(base: DiffusionModel, adapter: LoRA) -> None:
    tensors, _ = written_adapter(adapter, "diffusers")
    assert {c.alpha.item() for c in read_adapter(tensors, base).changes().values()} == {3.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(next(k for k in t if k.endswith("alpha"))), "not whole.*lacks alpha"),
        (lambda t: t.pop(next(k for k in t if "lora_up" in k)), "not whole.*lacks up"),
        (lambda t: t.update({"lora_unet_nowhere.alpha": torch.ones(())}), "lora_unet_nowhere"),
        (lambda t: t.update({"model.weight": torch.ones(2)}), "'model.weight' is a key of none"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_a_wrong_file_is_refused(
    change: Callable[[dict[str, Tensor]], Any],
    words: str,
    base: DiffusionModel,
    adapter: LoRA,
) -> None:
    tensors, _ = written_adapter(adapter, "kohya")
    change(tensors)
    with pytest.raises(UserError, match=words):
        read_adapter(tensors, base)


def test_parts_of_different_ranks_are_refused(base: DiffusionModel, adapter: LoRA) -> None:
    tensors, _ = written_adapter(adapter, "kohya")
    key = next(k for k in tensors if "to_q.lora_up" in k)
    tensors[key] = tensors[key][:, :2]
    with pytest.raises(UserError, match="ranks 3 and 2"):
        read_adapter(tensors, base)


def test_a_form_that_cannot_hold_an_adapter_is_refused(base: DiffusionModel) -> None:
    name = next(n for n, _ in adaptable(base) if n.endswith("to_q") and n.startswith("network."))
    other = name.replace("to_q", "to_out")
    shapes = {n: tuple(base.get_parameter(f"{n}.weight").shape) for n in (name, other)}
    uneven = LoRA({n: LowRank(shape, 2, float(i + 1)) for i, (n, shape) in
                   enumerate(shapes.items())})  # fmt: skip
    assert written_adapter(uneven, "kohya")
    with pytest.raises(UserError, match="one rank and one alpha: write kohya's"):
        written_adapter(uneven, "diffusers")
    with pytest.raises(UserError, match=r"no name for text\.words"):
        written_adapter(LoRA({"text.words": LowRank((2, 2), 1, 1.0)}), "kohya")


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, smoke_run: Any) -> tuple[Path, Path]:
    """A run of `ldm`, and one of `lora` on it."""
    base = smoke_run("ldm").folder
    out = tmp_path_factory.mktemp("lora") / "adapter"
    lineage.train("lora", preset="smoke", steps=12, out=out, stages_from={"base": base})
    return base, out


def test_a_run_saves_the_adapter_alone(folders: tuple[Path, Path]) -> None:
    base, run = folders
    saved = load_tensors(run / "model.safetensors")
    assert saved and all(name.startswith("adapter.network.") for name in saved)
    assert any(name.endswith(".up") and tensor.any() for name, tensor in saved.items())
    size = (run / "model.safetensors").stat().st_size
    assert size < (base / "model.safetensors").stat().st_size / 4
    assert list(read_json(run / "cost.json")) == ["adapter"]  # neither autoencoder nor base


def test_the_base_is_drawn_with_the_adapter_by_either_name(folders: tuple[Path, Path]) -> None:
    base, run = folders
    pictures = lineage.load(run).generate(CAPTIONS, seed=3)
    system = lineage.load(base)
    plain = system.generate(CAPTIONS, seed=3)
    add_adapters(system, base, [str(run)])
    assert torch.equal(system.generate(CAPTIONS, seed=3), pictures)
    assert not torch.equal(plain, pictures)


@pytest.mark.parametrize("key", ["ddpm", "dit"])
def test_other_diffusion_models_have_adapters_too(key: str, smoke_run: Any, tmp_path: Path) -> None:
    base, out = smoke_run(key).folder, tmp_path / "run"
    lineage.train("lora", preset="smoke", steps=4, out=out, stages_from={"base": base})
    pictures = lineage.load(out).generate(CAPTIONS)
    assert torch.equal(lineage.load(base, adapters=[str(out)]).generate(CAPTIONS), pictures)
    assert not torch.equal(lineage.load(base).generate(CAPTIONS), pictures)


def test_a_run_without_its_copy_of_the_base_reads_the_base(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, run = folders
    alone = shutil.copytree(run, tmp_path / "alone", ignore=lambda *a: {"stages"} & {*a[1]})
    pictures = lineage.load(run).generate(CAPTIONS)
    assert torch.equal(lineage.load(alone).generate(CAPTIONS), pictures)
    config = read_json(alone / "config.json")
    moved = shutil.copytree(base, tmp_path / "moved")
    config["stages_from"]["base"]["run"] = str(moved)
    write_json(alone / "config.json", config)
    other = load_tensors(moved / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in other.items()}, moved / "model.safetensors")
    with pytest.raises(UserError, match="which has other weights now"):
        lineage.load(alone)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="there is no such run"):
        lineage.load(alone)


def test_an_adapter_of_another_base_is_refused(
    folders: tuple[Path, Path], smoke_run: Any, tmp_path: Path
) -> None:
    base, run = folders
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_tensors(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "model.safetensors")
    with pytest.raises(UserError, match=f"{run} was trained on {base}, whose weights are others"):
        add_adapters(lineage.load(other), other, [str(run)])
    with pytest.raises(UserError, match="is a run of ldm, which is no adapter"):
        add_adapters(lineage.load(base), base, [str(other)])
    retrieval = smoke_run("retrieval").folder
    with pytest.raises(UserError, match="is a run of retrieval, and adapters change diffusion"):
        add_adapters(lineage.load(retrieval), retrieval, [str(run)])


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_an_exported_adapter_draws_the_same(
    form: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, run = folders
    file = export_adapter(run, tmp_path / "adapter.safetensors", form)
    systems = [lineage.load(base) for _ in range(2)]
    for system, adapter in zip(systems, (run, file), strict=True):
        add_adapters(system, base, [f"{adapter}:0.5"])
    pictures = [system.generate(CAPTIONS) for system in systems]
    assert torch.equal(*pictures)
    if form == "kohya":
        alphas = {t.item() for n, t in load_file(file).items() if n.endswith("alpha")}
        assert alphas == {2.0}


def test_files_that_are_no_adapter_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = folders
    system = lineage.load(base)
    pickled = tmp_path / "adapter.pt"
    torch.save({"lora_unet_x.alpha": torch.ones(())}, pickled)
    with pytest.raises(UserError, match=r"adapter\.pt is neither.*pickled files are not read"):
        add_adapters(system, base, [str(pickled)])
    with pytest.raises(UserError, match="There is no run folder and no file nowhere"):
        add_adapters(system, base, ["nowhere:0.5"])
    folder = export_adapter(run, tmp_path / "peft", "peft")
    write_json(folder / "adapter_config.json", {"r": 2})
    with pytest.raises(UserError, match="states no lora_alpha"):
        add_adapters(system, base, [str(folder)])
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"--adapter .*other\.safetensors: This is no LoRA: 'x'"):
        add_adapters(system, base, [f"{tmp_path / 'other.safetensors'}:2"])


def test_text_changes_that_cannot_be_used_are_named(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = folders
    tensors, _ = written_adapter(read_lora(run), "kohya")
    of_text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {f"{of_text}.lora_down.weight": torch.ones(2, 4)}
    tensors |= {f"{of_text}.lora_up.weight": torch.ones(8, 2), f"{of_text}.alpha": torch.ones(())}
    save_file(tensors, tmp_path / "both.safetensors")
    capsys.readouterr()
    add_adapters(lineage.load(base), base, [str(tmp_path / "both.safetensors")])
    assert "text encoder (3 tensors) are left out" in capsys.readouterr().err


def test_the_scale_stands_behind_the_last_colon() -> None:
    assert parsed("runs/style") == ("runs/style", 1.0)
    assert parsed("runs/style:0.8") == ("runs/style", 0.8)
    assert parsed("pretrained:style") == ("pretrained:style", 1.0)
    assert parsed("pretrained:style:-1") == ("pretrained:style", -1.0)
    assert parsed("C:\\style") == ("C:\\style", 1.0)
    with pytest.raises(UserError, match="finite"):
        parsed("style:nan")


def test_the_command_line(folders: tuple[Path, Path], call: Any, tmp_path: Path) -> None:
    base, run = folders
    out = tmp_path / "a.png"
    answer = call("sample", base, "a red circle", "--adapter", f"{run}:0", "--out", out)
    assert answer.code == 0
    call("sample", base, "a red circle", "--out", tmp_path / "b.png")
    assert out.read_bytes() == (tmp_path / "b.png").read_bytes()
    call("sample", base, "a red circle", "--adapter", run, "--out", out)
    assert out.read_bytes() != (tmp_path / "b.png").read_bytes()
    file = tmp_path / "style.safetensors"
    assert call("export-adapter", run, "--form", "diffusers", "--out", file).code == 0
    assert all("lora_A" in key or "lora_B" in key for key in load_file(file))


def test_a_base_of_another_size_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size=32 is not the size of the base, which draws 16"):
        lineage.train("lora", steps=2, out=tmp_path / "out", stages_from={"base": folders[0]})
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_all_leaves_adapters_out() -> None:
    from lineage.comparison.run import _compared

    assert "lora" not in _compared() and "ldm" in _compared()
