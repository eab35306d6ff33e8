"""Ways that are here for speed only. Each computes a plain line, which its docstring states;
`tests/nn/test_fast.py` holds it to that line.

Axes: B batch, C channels, H W; of attention N queries, M keys, H heads, d width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last_on_cpu(x: Tensor, *, norms: bool = True) -> Tensor:
    """x (B, C, H, W), with its channels last in memory on a CPU.

    Convolutions are faster in this layout (measured on x86). Norms in bfloat16 are up to 50 times
    slower, so that a network with norms keeps x as it is there. On a GPU `train.channels_last`
    chooses the layout.

    Args:
        norms: If true, the network has group norms or batch norms.
    """
    in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or x.dtype == torch.float64 or (norms and not in_float32):
        return x
    return x.contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, computed faster where channels are last on a CPU.

        F.group_norm(x, num_groups, weight, bias, eps)

    PyTorch's kernel goes through the channels of one group at a time: slow where these are fewer
    than a vector has numbers, and always in bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        plain = x.dim() != 4 or x.is_cuda or x.is_contiguous() or self.weight is None
        few = x.shape[1] < 4 * self.num_groups or x.dtype == torch.bfloat16
        if plain or not few or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        rows = x.movedim(1, 3).flatten(1, 2)  # (B, N, C), N = H W
        y = _GroupNormOfRows.apply(rows, self.weight, self.bias, self.num_groups, self.eps)
        return y.unflatten(1, x.shape[2:]).movedim(3, 1)


class _GroupNormOfRows(torch.autograd.Function):
    """Group norm of rows (B, N, C), from sums over N alone.

    With the mean m and the inverse deviation r of a group of n numbers, y = (x - m) r w + b and

        dL/dx = r w dy - r (p + (x - m) r^2 q) / n,   p = sum(w dy),  q = sum(w dy (x - m))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
        rows, size = x.float(), x.shape[1] * x.shape[2] // groups
        mean = _of_groups(rows.sum(1), groups) / size  # (B, C), the same within a group
        square = _of_groups((rows * rows).sum(1), groups) / size
        rstd = (square - mean * mean).clamp(min=0).add(eps).rsqrt()
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.groups = groups
        scale = rstd * w
        return torch.addcmul((b - mean * scale)[:, None], rows, scale[:, None]).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, w, mean, rstd = ctx.saved_tensors
        rows, dy, size = x.float(), dy.float(), x.shape[1] * x.shape[2] // ctx.groups
        db = dy.sum(1)  # (B, C)
        centred = (rows * dy).sum(1) - mean * db
        p, q = _of_groups(w * db, ctx.groups), _of_groups(w * centred, ctx.groups)
        slope = rstd**3 * q / -size
        dx = torch.addcmul((-slope * mean - rstd * p / size)[:, None], dy, (rstd * w)[:, None])
        dx = dx.addcmul_(rows, slope[:, None]).to(x.dtype)
        return dx, (centred * rstd).sum(0), db.sum(0), None, None


def _of_groups(sums: Tensor, groups: int) -> Tensor:
    """Sums (B, C) of channels -> sums (B, C) of their groups."""
    by_group = sums.unflatten(1, (groups, -1))
    return by_group.sum(2, keepdim=True).expand_as(by_group).flatten(1)


def conv_of_upsampled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3 x 3 convolution with padding 1 of x at twice the side, (B, C, H, W) -> (B, C', 2H, 2W).

        conv(F.interpolate(x, scale_factor=2, mode="nearest"))

    Each of the four pixels that come from one input pixel depends on 2 x 2 input pixels only. Taps
    that fall on the same input pixel are therefore summed first: 4 / 9 of the products. A GPU has
    kernels for 3 x 3 convolutions and takes the plain line.
    """
    if x.is_cuda:
        upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(upsampled, conv.weight, conv.bias, padding=1)

    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    dim = 1 if channels_last else 0  # four channels of one pixel side by side, or four blocks
    kernels = [kernel for rows in _merged(conv.weight, 2) for kernel in _merged(rows, 3)]
    weight = torch.stack(kernels, dim).flatten(0, 1)  # (4 C', C, 2, 2)
    bias = None if conv.bias is None else torch.stack([conv.bias] * 4, dim).flatten()
    y = F.conv2d(x, weight, bias, padding=1)  # (B, 4 C', H + 1, W + 1)
    if channels_last:
        return F.pixel_shuffle(y, 2)[..., 1:-1, 1:-1]
    down_right, down_left, up_right, up_left = y.chunk(4, dim=1)
    upper = torch.stack([up_left[..., :-1, :-1], up_right[..., :-1, 1:]], dim=-1)
    lower = torch.stack([down_left[..., 1:, :-1], down_right[..., 1:, 1:]], dim=-1)
    return torch.stack([upper, lower], dim=3).flatten(4, 5).flatten(2, 3)


def _merged(kernel: Tensor, dim: int) -> list[Tensor]:
    """Kernels, along `dim`, of the second and of the first of the two pixels of one input pixel.

    In this order, because output k, of one more than there are inputs, reads inputs k - 1 and k: it
    holds the second pixel of the former and the first of the latter.
    """
    before, at, after = kernel.unbind(dim)
    return [torch.stack([before + at, after], dim), torch.stack([before, at + after], dim)]


MANY_QUERIES = 64  # from this number of queries and keys on the fused kernel is faster in float32


FEW_QUERIES = 8  # to fill up the keys of so few takes longer than their softmax


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention (B, H, N, d), (B, H, M, d), (B, H, M, d) -> (B, H, N, d), the faster of two ways.

        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    On a CPU two matrix products are faster than the fused kernel for few queries or keys, and in
    bfloat16. Its softmax takes keys in vectors of 16 (float32) or 32 (bfloat16) and the rest one by
    one, which is slower than to fill the last vector with keys of no weight. A query that may
    attend to no key gets zeros either way.
    """
    num_keys = key.shape[-2]
    in_float32 = query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if query.is_cuda or (in_float32 and min(query.shape[-2], num_keys) >= MANY_QUERIES):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    extra = -num_keys % (16 if in_float32 or num_keys <= 16 else 32)
    if query.shape[-2] < FEW_QUERIES:
        extra = 0
    if extra:
        key, value = F.pad(key, (0, 0, 0, extra)), F.pad(value, (0, 0, 0, extra))
    scores = (query * (1.0 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)  # (B, H, N, M)
    if scores.dtype == torch.bfloat16 and num_keys <= 16:
        scores = scores.float()
    if mask is not None or extra:
        scores = scores + _blocked_keys(mask, num_keys, extra, scores)
    if scores.dtype == torch.float32:
        attended = scores.softmax(-1).to(value.dtype) @ value
    else:  # the softmax of bfloat16 sums in float32 anyway: autocast need not convert it
        with torch.autocast(query.device.type, enabled=False):
            attended = scores.softmax(-1).to(value.dtype) @ value
    if mask is None:
        return attended
    has_key = mask.any(-1, keepdim=True)
    return attended if bool(has_key.all()) else attended * has_key


def _blocked_keys(mask: Tensor | None, num_keys: int, extra: int, like: Tensor) -> Tensor:
    """What is added to scores: a number far below 0 for keys outside of the mask, and for `extra`
    keys after the last.
    """
    blocked = like.new_zeros((*(() if mask is None else mask.shape[:-1]), num_keys + extra))
    lowest = torch.finfo(like.dtype).min / 2
    if mask is not None:
        blocked[..., :num_keys].masked_fill_(~mask, lowest)
    if extra:
        blocked[..., num_keys:] = lowest
    return blocked


def squared_lengths(x: Tensor, gram: Tensor) -> Tensor:
    """Squared lengths x^T G x of sums of vectors with weights x, (B, M, N), (B, N, N) -> (B, M).

        (x @ gram * x).sum(-1)

    G, the products of the vectors with each other, is symmetric: the gradient of x is 2 G x, and
    the forward pass has G x already.
    """
    result: Tensor = _SquaredLengths.apply(x, gram)
    return result


class _SquaredLengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gram: Tensor) -> Tensor:
        product = x @ gram
        ctx.save_for_backward(x, product)
        return (product * x).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, product = ctx.saved_tensors
        dgram = (x * dy[..., None]).mT @ x if ctx.needs_input_grad[1] else None
        return product.mul(2 * dy[..., None]), dgram


def linear_chunks(x: Tensor, linear: nn.Linear, chunks: int) -> list[Tensor]:
    """Equal parts of a linear layer's output, each as a product of its own.

        linear(x).chunk(chunks, dim=-1)

    On a CPU, smaller results that need no copy are faster to compute and to multiply.
    """
    weights = linear.weight.chunk(chunks)
    biases = [None] * chunks if linear.bias is None else linear.bias.chunk(chunks)
    return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


def parallel_linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Outputs of several layers for one input, as one product where that is faster.

        [layer(x) for layer in layers]

    Under autocast on a CPU one joined weight is cast to bfloat16 faster than several. Layers that
    are more than an `nn.Linear`, as with an adapter, take the plain line.
    """
    plain = [one for one in layers if type(one) is nn.Linear and not _has_hooks(one)]
    if x.is_cuda or not torch.is_autocast_enabled("cpu") or len(plain) < len(layers):
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in plain])
    bias = None if plain[0].bias is None else torch.cat([layer.bias for layer in plain])
    return list(F.linear(x, weight, bias).split([len(one.weight) for one in plain], dim=-1))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
