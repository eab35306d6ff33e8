"""Inception v3 (Szegedy et al. 2015, arXiv:1512.00567, table 1), as its published weights have it.

A picture of 299 x 299 passes through

    stem                       3 -> 192 channels    299 -> 35 a side
    Mixed_5b 5c 5d (A)       192 -> 288             35         figure 5, one 5x5 not factored
    Mixed_6a       (B)       288 -> 768             35 -> 17   figure 10
    Mixed_6b .. 6e (C)       768 -> 768             17         figure 6, n = 7
    Mixed_7a       (D)       768 -> 1280            17 -> 8    figure 10, with a factored 7x7
    Mixed_7b 7c    (E)      1280 -> 2048            8          figure 7
    mean over the pixels, one linear layer

There are two variants, which differ in pooling and in the number of classes:

    "imagenet"   torchvision's network (1000 classes). An average pool divides by 9 everywhere.
    "fid"        the TensorFlow network of 2015-12-05 (1008 classes) of FID (Heusel et al. 2017), as
                 in pytorch-fid. An average pool does not count the padding, and the last block has
                 a max pool.

The modules have the names of the published weights. Departures from the paper: the stem and the 5x5
of block A are those of the published weights, not of table 1; there is no auxiliary head and no
dropout, as the classifier is not trained here; without weights the convolutions start from He et
al. 2015 (the paper gives no initialisation).

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError, nearest
from lineage.weights import read_tensors

CLASSES = {"imagenet": 1000, "fid": 1008}
PUBLISHED = {
    "imagenet": "torchvision's inception_v3_google-0cc3c7bd.pth",
    "fid": "pytorch-fid's pt_inception-2015-12-05-6726825d.pth",
}
SIDE = 299  # pixels a side in training
MIN_SIDE = 75  # a smaller picture has no pixel left after the reductions
CHUNK = 16  # pictures of `fid_features` in one pass, so that memory is limited

Kernel = int | tuple[int, int]  # side, or (height, width)
Stage = tuple[int, Kernel] | tuple[int, Kernel, Kernel]  # channels, and kernel of a unit or of two
Branches = dict[str, list[Stage]]  # stages by the branch's name in the published weights


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, C, H, W) -> (B, C', H', W').

    Args:
        padded: If true, the picture is padded with zeros, so that a `stride` of 1 keeps H and W.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Kernel,
        stride: int = 1,
        padded: bool = True,
    ) -> None:
        super().__init__()
        padding = "same" if padded else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


BLOCK_A: Branches = {
    "branch1x1": [(64, 1)],
    "branch5x5": [(48, 1), (64, 5)],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
}
BLOCK_B: Branches = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
BLOCK_D: Branches = {
    "branch3x3": [(192, 1), (320, 3)],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
}
BLOCK_E: Branches = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
    "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))],
}


def block_c(channels: int) -> Branches:
    """Block C with `channels` channels between the factors of its 7x7."""
    wide, tall = (1, 7), (7, 1)
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(channels, 1), (channels, wide), (192, tall)],
        "branch7x7dbl": [
            (channels, 1),
            (channels, tall),
            (channels, wide),
            (channels, tall),
            (192, wide),
        ],
    }


class Mixed(nn.Module):
    """Branches of units and a pool on the same input; their channels are concatenated.

    Args:
        in_channels: C.
        branches: Units of each branch. Two kernels in a stage are two units on the same input.
        pool: Pool that keeps H and W; None for a block that halves them: the last unit of each
            branch and a max pool then have stride 2.
        pool_channels: Number of channels of the unit after `pool`.
    """

    def __init__(
        self,
        in_channels: int,
        branches: Branches,
        pool: nn.Module | None = None,
        pool_channels: int = 192,
    ) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride=2) if pool is None else pool
        self.branches = [
            self._add(name, in_channels, branches[name], downsample=pool is None)
            for name in branches
        ]
        self.branch_pool = nn.Identity() if pool is None else Unit(in_channels, pool_channels, 1)

    def _add(
        self, name: str, in_channels: int, stages: list[Stage], downsample: bool
    ) -> list[list[str]]:
        """Add the units of a branch; returns their names, stage by stage."""
        names = []
        for number, (channels, *kernels) in enumerate(stages, start=1):
            stem = name if len(stages) == 1 else f"{name}_{number}"
            names.append([stem] if len(kernels) == 1 else [f"{stem}a", f"{stem}b"])
            last = downsample and number == len(stages)
            for label, kernel in zip(names[-1], kernels, strict=True):
                unit = Unit(in_channels, channels, kernel, 1 + last, padded=not last)
                self.add_module(label, unit)
            in_channels = channels
        return names

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W), or half the pixels a side."""
        outputs = []
        for stages in self.branches:
            parts = [x]
            for names in stages:  # only the last stage has two units
                parts = [self.get_submodule(name)(parts[0]) for name in names]
            outputs += parts
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


@dataclass(frozen=True)
class InceptionFeatures:
    """Features of B pictures."""

    regions: Tensor  # (B, 768, H, W) after Mixed_6e; 17 x 17 for pictures of 299 x 299
    pooled: Tensor  # (B, 2048), the mean over the pixels after Mixed_7c


class InceptionV3(nn.Module):
    """Pictures -> regions, pooled features and, through `classify`, logits.

    Args:
        variant: "imagenet" or "fid"; any other raises `UserError`.
    """

    def __init__(self, variant: str) -> None:
        super().__init__()
        if variant not in CLASSES:
            hint = nearest(variant, CLASSES)
            raise UserError(f"There is no variant {variant!r} of Inception v3: {hint}")
        self.variant = variant
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=variant == "imagenet")
        last = nn.MaxPool2d(3, stride=1, padding=1) if variant == "fid" else average

        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padded=False)
        self.Mixed_5b = Mixed(192, BLOCK_A, average, 32)
        self.Mixed_5c = Mixed(256, BLOCK_A, average, 64)
        self.Mixed_5d = Mixed(288, BLOCK_A, average, 64)
        self.Mixed_6a = Mixed(288, BLOCK_B)
        self.Mixed_6b = Mixed(768, block_c(128), average)
        self.Mixed_6c = Mixed(768, block_c(160), average)
        self.Mixed_6d = Mixed(768, block_c(160), average)
        self.Mixed_6e = Mixed(768, block_c(192), average)
        self.Mixed_7a = Mixed(768, BLOCK_D)
        self.Mixed_7b = Mixed(1280, BLOCK_E, average)
        self.Mixed_7c = Mixed(2048, BLOCK_E, last)
        self.fc = nn.Linear(2048, CLASSES[variant])

    def forward(self, x: Tensor) -> InceptionFeatures:
        """Pictures (B, 3, H, W) in [-1, 1], 75 x 75 or more (else `UserError`) -> features.

        The sizes in the comments are those of a picture of 299 x 299.
        """
        if min(x.shape[2:]) < MIN_SIDE:
            size = " x ".join(map(str, x.shape[2:]))
            raise UserError(f"Inception v3 needs {MIN_SIDE} pixels a side or more, not {size}.")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        regions = self.Mixed_6e(x)  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(regions)))  # (B, 2048, 8, 8)
        return InceptionFeatures(regions, x.mean((2, 3)))

    def classify(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, 2048) -> logits (B, 1000), or (B, 1008) for variant "fid"."""
        return self.fc(pooled)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}"


@torch.no_grad()
def fid_features(network: InceptionV3, images: Tensor) -> Tensor:
    """Features as in pytorch-fid: uint8 pictures (B, 3, S, S) -> float32 (B, 2048).

    The pictures are resized to 299 x 299 by bilinear interpolation without antialiasing, corners
    not aligned, and scaled to [-1, 1]; pictures of another kind raise `UserError`. The network is
    in evaluation mode for this; its mode is restored afterwards. The features are on its device.
    Only those of variant "fid" with its published weights compare with published FIDs.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        kind = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise UserError(f"FID features are taken of uint8 pictures (B, 3, S, S), not of {kind}.")
    device, training = network.fc.weight.device, network.training
    network.eval()
    try:
        rows = [network(_prepared(part.to(device))).pooled for part in images.split(CHUNK)]
    finally:
        network.train(training)
    return torch.cat(rows)


def _prepared(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) -> (B, 3, 299, 299) in [-1, 1]."""
    unit = images.float() / 255
    return 2 * F.interpolate(unit, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def load_inception(path: Path | str, variant: str) -> InceptionV3:
    """The network with weights from a file, on the CPU, in evaluation mode.

    Tensors of the auxiliary head (`AuxLogits.*`) are left out. Counters of batches may be missing,
    as in old files.

    Args:
        path: A safetensors file, or one that `torch.load` reads without executing code.

    Raises:
        UserError: the file is missing, damaged, not a state dict, or of another network.
    """
    network = InceptionV3(variant)
    try:
        state = read_tensors(Path(path))
    except UserError as error:
        raise UserError(f"{str(error)[:-1]}; give {PUBLISHED[variant]}.") from error.__cause__
    try:
        state = {name: value for name, value in state.items() if not name.startswith("AuxLogits.")}
        _check(state, network)
    except UserError as error:
        raise UserError(f"{path} {error}; give {PUBLISHED[variant]}.") from error.__cause__
    network.load_state_dict(state)
    return network.eval()


def _check(state: dict[str, Tensor], network: InceptionV3) -> None:
    """Raise `UserError` if `state` differs from the weights of `network`."""
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    missing = [n for n in shapes if n not in state and not n.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in shapes]
    if missing or unknown:
        first = ", ".join([*missing, *unknown][:3])
        counts = f"tensors missing: {len(missing)}, unknown: {len(unknown)}"
        raise UserError(f"does not fit Inception v3: {counts} ({first})")
    wrong = [name for name in state if state[name].shape != shapes[name]]
    names, rows = {count: name for name, count in CLASSES.items()}, state["fc.bias"].numel()
    if set(wrong) == {"fc.weight", "fc.bias"} and rows in names:
        variant = f"variant {names[rows]!r} ({rows} classes)"
        raise UserError(f"holds weights of {variant}, not of {network.variant!r}")
    if wrong:
        actual, expected = tuple(state[wrong[0]].shape), tuple(shapes[wrong[0]])
        raise UserError(f"does not fit Inception v3: {wrong[0]} is {actual}, not {expected}")
