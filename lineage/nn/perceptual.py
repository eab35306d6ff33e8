"""LPIPS, a perceptual distance of pictures (Zhang et al. 2018, arXiv:1801.03924).

The problem: a picture shifted by one pixel looks the same and differs in almost every pixel. What
is new: compare the features of a classifier, layer by layer, with a learnt weight for each channel.

    VGG16    the convolutions of Simonyan and Zisserman 2015 (arXiv:1409.1556); five feature maps
    LPIPS    section 3.2, equation 1, with features y^ of length one over the channels:
             d(x, x_0) = sum_l 1 / (H_l W_l) sum_hw |w_l * (y^_l - y^_0l)|^2

The networks come from files of the user: torchvision's `vgg16-*.pth`, and LPIPS's `vgg.pth`, which
holds the weights of the channels. They are not trained here and are part of no checkpoint.

Axes: B pictures, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.weights import read_tensors

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(channels, number of convolutions) at each resolution."""
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation of pixels in [-1, 1], as in the authors' code."""
EPSILON = 1e-10


class VGG16(nn.Module):
    """VGG16 without its classifier; parameters have torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.feature_layers: list[int] = []
        in_channels = 3
        for channels, num_convs in BLOCKS:
            for _ in range(num_convs):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
                in_channels = channels
            self.feature_layers.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> list[Tensor]:
        """Normalised (B, 3, H, W) -> five feature maps (B, C, H / 2^k, W / 2^k), each before the
        pooling of its resolution.
        """
        features, x = [], image
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.feature_layers:
                features.append(x)
        return features


class LPIPS(nn.Module):
    """The distance. All its tensors are buffers that no checkpoint holds.

    Args:
        vgg: The network, with trained weights.
        channel_weights: w_l^2 for each of its five feature maps, (C,) each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vgg: VGG16, channel_weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.vgg = vgg
        _parameters_to_buffers(vgg)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        for layer, weight in enumerate(channel_weights):
            self.register_buffer(f"channel_weights_{layer}", weight, persistent=False)

    @property
    def channel_weights(self) -> list[Tensor]:
        """w_l^2 of each feature map, (C,) each."""
        return [getattr(self, f"channel_weights_{layer}") for layer in range(len(BLOCKS))]

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Two batches of pictures (B, 3, H, W) in [-1, 1] -> (B,)."""
        distance = image.new_zeros(len(image), dtype=torch.float32)
        features = [self.vgg((x - self.mean) / self.std) for x in (image, other)]
        for a, b, weight in zip(*features, self.channel_weights, strict=True):
            squares = (_unit_length(a) - _unit_length(b)).square()
            distance = distance + (squares * weight[:, None, None]).sum(1).mean(dim=(1, 2))
        return distance


def _parameters_to_buffers(network: nn.Module) -> None:
    """Turn all parameters of `network` into buffers that are part of no checkpoint."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)


def _unit_length(features: Tensor) -> Tensor:
    """(B, C, H, W), each vector of C channels divided by its length."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True).sqrt() + EPSILON)


def load_lpips(files: tuple[str, ...]) -> LPIPS:
    """LPIPS from its files.

    Args:
        files: File of torchvision's VGG16 and, if there is a second one, file of the channels'
            weights. Without the second, each channel has weight 1 / C.

    Raises:
        UserError: a file cannot be read, or belongs to another network.
    """
    paths = [Path(file) for file in files]
    if len(paths) not in (1, 2):
        raise UserError(
            f"{', '.join(files)}: name the file of VGG16, and that of LPIPS if you have it."
        )
    vgg = VGG16()
    state = {k: v for k, v in read_tensors(paths[0]).items() if k.startswith("features.")}
    try:
        vgg.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{paths[0]} does not hold torchvision's VGG16.") from error
    if len(paths) == 1:
        return LPIPS(vgg, [torch.full((channels,), 1 / channels) for channels, _ in BLOCKS])
    saved = read_tensors(paths[1])
    weights = [saved.get(f"lin{layer}.model.1.weight") for layer in range(len(BLOCKS))]
    for weight, (channels, _) in zip(weights, BLOCKS, strict=True):
        if weight is None or weight.numel() != channels:
            raise UserError(f"{paths[1]} does not hold the weights of LPIPS on VGG16.")
    return LPIPS(vgg, [weight.flatten().float() for weight in weights if weight is not None])
