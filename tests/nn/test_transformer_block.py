"""The transformer block of the text encoders, compared with torch's own layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lineage.nn.transformer import TransformerBlock

B, N, D, HEADS = 3, 5, 12, 3


def randomise(block: nn.Module) -> None:
    """No weight has a value that hides a mistake."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def torchs_own(block: TransformerBlock) -> nn.Module:
    """torch's layer with the same weights."""
    layer = nn.TransformerEncoderLayer(
        D, HEADS, 4 * D, 0.0, "gelu", batch_first=True, norm_first=True
    ).eval()
    linears = (block.attn.to_q, block.attn.to_k, block.attn.to_v)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
    pairs = [(layer.self_attn.out_proj, block.attn.to_out), (layer.norm1, block.norm1)]
    pairs += [(layer.norm2, block.norm2), (layer.linear1, block.mlp[0])]  # type: ignore[list-item]
    for theirs, ours in [*pairs, (layer.linear2, block.mlp[2])]:
        theirs.load_state_dict(ours.state_dict())
    return layer


@pytest.mark.parametrize("mask", [None, torch.ones(N, N, dtype=torch.bool).tril()], ids=str)
def test_a_block_equals_torchs_own(mask: Tensor | None) -> None:
    """Without a mask and with a causal one, whose True torch's layer writes as False."""
    block = TransformerBlock(D, HEADS)
    randomise(block)
    x = torch.randn(B, N, D)
    expected = torchs_own(block)(x, src_mask=None if mask is None else ~mask)
    torch.testing.assert_close(block(x, mask), expected, atol=1e-5, rtol=1e-5)


def test_heads_may_be_wider_than_the_sequence_and_without_biases() -> None:
    block = TransformerBlock(D, HEADS, inner_dim=24, bias=False)
    shapes = {name: tuple(p.shape) for name, p in block.attn.named_parameters()}
    assert shapes == {
        "to_q.weight": (24, D),
        "to_k.weight": (24, D),
        "to_v.weight": (24, D),
        "to_out.weight": (D, 24),
        "to_out.bias": (D,),
    }
    assert block(torch.randn(B, N, D)).shape == (B, N, D)
