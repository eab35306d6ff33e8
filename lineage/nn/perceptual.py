"""LPIPS: how far apart two pictures look (Zhang et al. 2018, arXiv:1801.03924).

The problem: two pictures that differ by a shift of one pixel are far apart by their pixels. What is
new: compare what a classifier sees in them, layer by layer, with a weight for each channel that was
learnt from what people find alike.

    `VGG16`   the convolutions of Simonyan and Zisserman 2015, with five places to look
    `LPIPS`   section 3.2, equation 1: sum_l mean_hw |w_l (y_l - y'_l)|^2, of channels of length one

The networks come from files that the user has: torchvision's `vgg16-*.pth`, and the weights of the
channels, `vgg.pth` of LPIPS. Nothing here is trained.

Axes: B pictures, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lineage.errors import UserError

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, convolutions) at each side
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
EPSILON = 1e-10


class VGG16(nn.Module):
    """What VGG16 sees of a picture before each of its poolings; names are torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends, inputs = [], 3
        for channels, count in BLOCKS:
            for _ in range(count):
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
                inputs = channels
            self.ends.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> five of (B, C, H / 2^k, W / 2^k)."""
        seen = []
        for number, layer in enumerate(self.features):
            image = layer(image)
            if number in self.ends:
                seen.append(image)
        return seen


class LPIPS(nn.Module):
    """The distance. It is not trained, but a gradient flows to the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = VGG16()
        self.weights = nn.ParameterList(torch.ones(channels) for channels, _ in BLOCKS)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))
        self.mean: Tensor
        self.deviation: Tensor
        self.requires_grad_(False)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B,)."""
        total = one.new_zeros(len(one), dtype=torch.float32)
        pair = [self.vgg((image - self.mean) / self.deviation) for image in (one, other)]
        for a, b, weight in zip(*pair, self.weights, strict=True):
            squares = (_directions(a) - _directions(b)).square()
            total = total + (squares * weight[:, None, None]).sum(1).mean(dim=(1, 2))
        return total


def _directions(seen: Tensor) -> Tensor:
    """Channels (B, C, H, W) as vectors of length one."""
    seen = seen.float()
    return seen / (seen.square().sum(1, keepdim=True).sqrt() + EPSILON)


def load_lpips(files: tuple[str, ...]) -> LPIPS:
    """LPIPS from torchvision's VGG16 and, if there is a second file, the weights of its channels;
    without one all channels weigh the same, divided by their number.

    Raises:
        UserError: a file cannot be read, or is of another network.
    """
    paths = [Path(file) for file in files]
    if len(paths) not in (1, 2):
        raise UserError(f"{', '.join(files)}: give the file of VGG16, and if you have it, LPIPS's.")
    found = LPIPS()
    vgg = {k: v for k, v in _read(paths[0]).items() if k.startswith("features.")}
    try:
        found.vgg.load_state_dict(vgg)
    except RuntimeError as error:
        raise UserError(f"{paths[0]} does not hold torchvision's VGG16.") from error
    for number, (weight, (channels, _)) in enumerate(zip(found.weights, BLOCKS, strict=True)):
        weight.div_(channels)
        if len(paths) == 2:
            given = _read(paths[1]).get(f"lin{number}.model.1.weight")
            if given is None or given.numel() != channels:
                raise UserError(f"{paths[1]} does not hold the weights of LPIPS on VGG16.")
            weight.copy_(given.flatten())
    return found


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except Exception as error:  # of a dozen kinds, for files that are foreign or cut short
        raise UserError(f"{path} is no checkpoint of tensors alone.") from error
    whole = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not whole:
        raise UserError(f"{path} holds no dictionary of tensors by name.")
    return state
