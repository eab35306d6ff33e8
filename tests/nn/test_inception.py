"""Inception v3: sizes, the two kinds of pooling, FID features in chunks, and weights from files."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.errors import UserError
from lineage.nn import inception
from lineage.nn.inception import InceptionFeatures, InceptionV3, fid_features, load_inception

PARAMETERS = {"imagenet": 23_834_568, "fid": 23_834_568 + 8 * (2048 + 1)}
KEEPS_SIDE = ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c")  # blocks with a branch_pool
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def networks() -> dict[str, InceptionV3]:
    """Both variants in evaluation mode, with the same random weights but for the last layer."""
    torch.manual_seed(0)
    built = {variant: InceptionV3(variant).eval() for variant in ("imagenet", "fid")}
    shared = {n: v for n, v in built["fid"].state_dict().items() if not n.startswith("fc.")}
    built["imagenet"].load_state_dict(shared, strict=False)
    return built


@pytest.fixture(scope="module")
def fid(networks: dict[str, InceptionV3]) -> InceptionV3:
    return networks["fid"]


def numbered(network: InceptionV3) -> State:
    """A state dict whose i-th tensor is i / 1000 everywhere; its file has one number for each."""
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    return {name: torch.tensor(i / 1000).expand(shapes[name]) for i, name in enumerate(shapes)}


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def pictures(count: int, side: int) -> Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8)


def convolution(inputs: int, outputs: int, pixels: int) -> int:
    """Parameters of a convolution without bias and its batch norm."""
    return inputs * outputs * pixels + 2 * outputs


def test_parameters_by_arithmetic(networks: dict[str, InceptionV3]) -> None:
    c = convolution
    reduce_35 = c(288, 384, 9) + c(288, 64, 1) + c(64, 96, 9) + c(96, 96, 9)
    reduce_17 = 2 * c(768, 192, 1) + c(192, 320, 9) + 2 * c(192, 192, 7) + c(192, 192, 9)

    def a(n: int, pooled: int) -> int:
        one = c(n, 64, 1) + c(n, 48, 1) + c(n, 64, 1) + c(n, pooled, 1)
        return one + c(48, 64, 25) + c(64, 96, 9) + c(96, 96, 9)

    def sevens(inner: int) -> int:
        one = 2 * c(768, 192, 1) + 2 * c(768, inner, 1)
        return one + 4 * c(inner, inner, 7) + 2 * c(inner, 192, 7)

    def e(n: int) -> int:
        one = c(n, 320, 1) + c(n, 384, 1) + c(n, 448, 1) + c(n, 192, 1)
        return one + 4 * c(384, 384, 3) + c(448, 384, 9)

    stem = c(3, 32, 9) + c(32, 32, 9) + c(32, 64, 9) + c(64, 80, 1) + c(80, 192, 9)
    blocks = [a(192, 32), a(256, 64), a(288, 64), reduce_35, sevens(128), sevens(160), sevens(160)]
    blocks += [sevens(192), reduce_17, e(1280), e(2048)]
    assert stem + sum(blocks) + 2048 * 1000 + 1000 == PARAMETERS["imagenet"]
    for variant, network in networks.items():
        children = dict(network.named_children())
        mixed = [child for name, child in children.items() if name.startswith("Mixed_")]
        assert [sum(p.numel() for p in block.parameters()) for block in mixed] == blocks
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[variant]


def test_names_are_those_of_the_published_weights(fid: InceptionV3) -> None:
    state = fid.state_dict()
    assert len(state) == 94 * 6 + 2  # a weight and five tensors of a batch norm; the linear layer
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.bn.bias": (192,),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert tuple(state[name].shape) == shape, name
    assert fid.Conv2d_1a_3x3.bn.eps == 0.001


@pytest.mark.parametrize(("side", "regions"), [(299, 17), (75, 3)])
@torch.no_grad()
def test_shapes(networks: dict[str, InceptionV3], side: int, regions: int) -> None:
    for variant, classes in (("imagenet", 1000), ("fid", 1008))[: 1 if side == 299 else 2]:
        features = networks[variant](torch.rand(1, 3, side, side) * 2 - 1)
        assert features.regions.shape == (1, 768, regions, regions)
        assert features.pooled.shape == (1, 2048)
        assert networks[variant].classify(features.pooled).shape == (1, classes)


def test_a_picture_that_is_too_small(fid: InceptionV3) -> None:
    with pytest.raises(UserError, match=r"75 pixels a side or more, not 80 x 74\."):
        fid(torch.zeros(1, 3, 80, 74))


def windows(x: Tensor, outside: float) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W, 9): the 3 x 3 pixels around each, `outside` beyond the edge."""
    around = F.pad(x, (1, 1, 1, 1), value=outside)
    return around.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2)


def naive_pool(x: Tensor, variant: str, block: str) -> Tensor:
    if variant == "imagenet":
        return windows(x, 0.0).mean(-1)
    if block == "7c":
        return windows(x, -torch.inf).amax(-1)
    return windows(x, torch.nan).nanmean(-1)


@pytest.mark.parametrize("variant", ["imagenet", "fid"])
@torch.no_grad()
def test_every_pool_is_that_of_its_variant(networks: dict[str, InceptionV3], variant: str) -> None:
    network = networks[variant]
    inputs_of: State = {}  # by the name of a module
    hooks = []
    for block in KEEPS_SIDE:
        for name in (f"Mixed_{block}", f"Mixed_{block}.branch_pool"):
            keep = partial(lambda key, _, inputs: inputs_of.update({key: inputs[0]}), name)
            hooks.append(network.get_submodule(name).register_forward_pre_hook(keep))
    network(torch.rand(1, 3, 139, 139) * 2 - 1)
    for hook in hooks:
        hook.remove()
    for block in KEEPS_SIDE:
        x, pooled = inputs_of[f"Mixed_{block}"], inputs_of[f"Mixed_{block}.branch_pool"]
        torch.testing.assert_close(pooled, naive_pool(x, variant, block), msg=block)
        other = naive_pool(x, "fid" if variant == "imagenet" else "imagenet", block)
        assert (pooled - other).abs().max() > 0.01 * pooled.abs().max(), block


@torch.no_grad()
def test_the_variants_differ_with_the_same_weights(networks: dict[str, InceptionV3]) -> None:
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    one, other = networks["imagenet"](x), networks["fid"](x)
    for a, b in ((one.regions, other.regions), (one.pooled, other.pooled)):
        assert (a - b).abs().mean() > 0.01 * a.abs().mean()


def scattered(*shape: int) -> Tensor:
    """Pseudorandom numbers in [-1/2, 1/2) from a formula, the same on every machine."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((12_345 * torch.sin(1 + count)) % 1 - 0.5).float().reshape(shape)


def by_formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the state dict from `scattered`, of a size that keeps the signal alive."""
    if len(shape) > 1:
        return scattered(*shape) * (24 / math.prod(shape[1:])) ** 0.5
    return scattered(*shape) + (1.0 if name.endswith(("running_var", "bn.weight")) else 0.0)


SOME = [101, 504, 900, 1301, 1700, 2000]  # one channel of each branch of the last block
POOLED = {  # their values in torchvision 0.29.2 and in pytorch-fid 0.3.0 with these weights
    "imagenet": [0.037662, 0.071804, 0.126616, 0.14621, 0.04375, 0.053622],
    "fid": [0.021572, 0.117914, 0.242884, 0.200954, 0.043888, 0.231441],
}
REGIONS = {  # and the mean over the regions of channels 60, 252, 444 and 636, one of each branch
    "imagenet": [0.058263, 0.169512, 0.064712, 0.022495],
    "fid": [0.062031, 0.213759, 0.06846, 0.03355],
}


@pytest.mark.parametrize("variant", ["imagenet", "fid"])
@torch.no_grad()
def test_the_numbers_of_the_public_implementations(variant: str) -> None:
    network = InceptionV3(variant).eval()
    for name, value in network.state_dict().items():
        value.copy_(by_formula(name, tuple(value.shape)))
    features = network(2 * scattered(1, 3, 107, 107))
    regions = features.regions[0, 60::192].mean((1, 2))
    for values, expected in ((features.pooled[0, SOME], POOLED), (regions, REGIONS)):
        torch.testing.assert_close(values, torch.tensor(expected[variant]), atol=0, rtol=1e-3)


def test_an_unknown_variant() -> None:
    with pytest.raises(UserError, match=r"no variant 'imagnet' of Inception v3: did you mean"):
        InceptionV3("imagnet")


def bilinear(image: Tensor, side: int) -> Tensor:
    """(C, S, S) -> (C, side, side), between the four nearest pixel centres."""
    size = image.shape[-1]
    at = ((torch.arange(side) + 0.5) * size / side - 0.5).clamp(0, size - 1)
    low = at.floor().long()
    high, share = (low + 1).clamp(max=size - 1), at - low
    rows = image[:, low] * (1 - share)[:, None] + image[:, high] * share[:, None]
    return rows[..., low] * (1 - share) + rows[..., high] * share


@pytest.mark.parametrize("side", [5, 299, 400])
def test_fid_features_prepare_pictures_as_pytorch_fid_does(
    fid: InceptionV3, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = []

    def forward(x: Tensor) -> InceptionFeatures:
        inputs.append(x)
        return InceptionFeatures(x, x.mean((2, 3)))

    monkeypatch.setattr(fid, "forward", forward)
    images = pictures(2, side)
    fid_features(fid, images)
    expected = torch.stack([bilinear(image / 255, 299) for image in images]) * 2 - 1
    torch.testing.assert_close(inputs[0], expected, atol=2e-4, rtol=0)


def test_fid_features_work_by_sixteen_without_gradients_in_evaluation_mode(
    fid: InceptionV3, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def forward(x: Tensor) -> InceptionFeatures:
        calls.append((len(x), fid.training, fid.Mixed_5b.training, torch.is_grad_enabled()))
        return InceptionFeatures(x, x[:, :, 0, 0])

    monkeypatch.setattr(fid, "forward", forward)
    fid.train()
    images = pictures(35, 8)
    features = fid_features(fid, images)
    assert calls == [(count, False, False, False) for count in (16, 16, 3)]
    assert fid.training and fid.Mixed_5b.training  # restored
    fid.eval()
    torch.testing.assert_close(features, images[:, :, 0, 0] / 127.5 - 1)


def test_chunks_give_the_same_rows(fid: InceptionV3, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(3, 32)
    whole = fid_features(fid, images)
    assert whole.shape == (3, 2048) and whole.dtype == torch.float32 and not whole.requires_grad
    monkeypatch.setattr(inception, "CHUNK", 2)
    torch.testing.assert_close(fid_features(fid, images), whole, atol=1e-4, rtol=1e-4)
    assert fid_features(fid, images[:0]).shape == (0, 2048)


def test_fid_features_of_other_tensors_are_an_error(fid: InceptionV3) -> None:
    for wrong, kind in (
        (torch.zeros(1, 3, 8, 8), r"float32 \(1, 3, 8, 8\)"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), r"uint8 \(1, 8, 8, 3\)"),
    ):
        with pytest.raises(UserError, match=f"uint8 pictures .* not of {kind}"):
            fid_features(fid, wrong)


@pytest.mark.parametrize("variant", ["imagenet", "fid"])
def test_weights_are_loaded_from_a_file(
    networks: dict[str, InceptionV3], variant: str, tmp_path: Path
) -> None:
    state = numbered(networks[variant])
    auxiliary = {"AuxLogits.conv0.conv.weight": torch.ones(2), "AuxLogits.fc.bias": torch.ones(2)}
    network = load_inception(saved(tmp_path / "weights.pth", {**auxiliary, **state}), variant)
    assert not network.training and network.variant == variant
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype).expand(value.shape)), name


def test_old_files_without_counters_of_batches(fid: InceptionV3, tmp_path: Path) -> None:
    state = {n: v for n, v in numbered(fid).items() if not n.endswith("num_batches_tracked")}
    old = {"_use_new_zipfile_serialization": False}
    network = load_inception(str(saved(tmp_path / "old.pth", state, **old)), "fid")
    assert torch.equal(network.fc.bias, state["fc.bias"])
    assert network.Mixed_7c.get_buffer("branch1x1.bn.num_batches_tracked") == 0


def test_weights_from_safetensors(fid: InceptionV3, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = {n: v.half() if v.is_floating_point() else v for n, v in fid.state_dict().items()}
    safetensors.torch.save_file(state, path)
    network = load_inception(path, "fid")
    path.unlink()  # 48 MB
    assert torch.equal(network.fc.weight, fid.fc.weight.half().float())


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


GIVE = {
    "imagenet": "give torchvision's inception_v3_google-0cc3c7bd.pth.",
    "fid": "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth.",
}


def assert_error(path: Path, variant: str, problem: str) -> None:
    """One sentence that begins with the file and ends with the right one."""
    with pytest.raises(UserError) as caught:
        load_inception(path, variant)
    sentence = str(caught.value)
    assert re.fullmatch(f"{re.escape(str(path))} {problem}; {re.escape(GIVE[variant])}", sentence)


@pytest.mark.parametrize("variant", ["imagenet", "fid"])
def test_a_missing_file(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "none.pth"
    with pytest.raises(UserError) as caught:
        load_inception(path, variant)
    assert str(caught.value) == f"There is no file {path}; {GIVE[variant]}"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cut.pth", "is text"),
        ("cut.safetensors", "is text"),
        ("folder.pth", "is a folder, not a file"),
    ],
)
def test_a_file_that_cannot_be_read(name: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    else:
        path.write_bytes(b"not weights at all")
    assert_error(path, "fid", f"{what}: name the file of weights")


def test_a_file_that_would_execute_code(tmp_path: Path) -> None:
    path = saved(tmp_path / "network.pth", torch.nn.Linear(1, 1))
    assert_error(path, "fid", r"is no checkpoint of tensors alone \([^\n]+\)")


@pytest.mark.parametrize(
    "value", [[1, 2], {"state_dict": {"a": torch.ones(1)}}, {1: torch.ones(1)}]
)
def test_a_file_without_a_state_dict(value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "other.pth", value)
    assert_error(path, "fid", r"is not a state dict \(names and their tensors\)")


def test_missing_and_unknown_tensors(fid: InceptionV3, tmp_path: Path) -> None:
    state = numbered(fid)
    path = saved(tmp_path / "a.pth", without(state, "fc.bias"))
    fits = "does not fit Inception v3"
    assert_error(path, "fid", rf"{fits}: tensors missing: 1, unknown: 0 \(fc\.bias\)")
    renamed = {f"module.{name}": value for name, value in state.items()}
    path = saved(tmp_path / "b.pth", renamed)
    first = r"Conv2d_1a_3x3\.conv\.weight, [\w.]+, [\w.]+"
    assert_error(path, "fid", rf"{fits}: tensors missing: 472, unknown: 566 \({first}\)")
    path = saved(tmp_path / "c.pth", {**state, "extra": torch.ones(1)})
    assert_error(path, "fid", rf"{fits}: tensors missing: 0, unknown: 1 \(extra\)")


@pytest.mark.parametrize(("variant", "other"), [("fid", "imagenet"), ("imagenet", "fid")])
def test_weights_of_the_other_variant(
    networks: dict[str, InceptionV3], variant: str, other: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "w.pth", numbered(networks[other]))
    classes = {"imagenet": 1000, "fid": 1008}[other]
    problem = rf"holds weights of variant '{other}' \({classes} classes\), not of '{variant}'"
    assert_error(path, variant, problem)


def test_a_tensor_of_another_shape(fid: InceptionV3, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {**numbered(fid), "fc.bias": torch.ones(10)})
    problem = r"does not fit Inception v3: fc\.bias is \(10,\), not \(1008,\)"
    assert_error(path, "fid", problem)
