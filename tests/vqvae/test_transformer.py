"""The decoder-only transformer: masks, cache, GPT-2's sizes, weights and numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.official.gpt2 import gpt2_state, greedy
from lineage.vqvae.transformer import GPT, KVCache, Transformer, TransformerConfig, causal_mask

VOCAB, LENGTH = 13, 12
CONFIG = TransformerConfig(width=12, num_layers=2, num_heads=3)


def make_gpt(tied: bool = True) -> GPT:
    """Weights large enough that attention to a wrong position would show."""
    model = GPT(CONFIG, VOCAB, LENGTH, tied).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def random_ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (rows, length))


def make_cache(model: GPT, rows: int, length: int) -> KVCache:
    return KVCache(model.transformer.config, rows, length, like=model.head.weight)


def next_token_loss(model: GPT, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# --- the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 9, [9], [4, 3, 2], [3, 1, 5], [1, 8]], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("max_length", [9, 12])
def test_cached_logits_are_those_without(chunks: list[int], rows: int, max_length: int) -> None:
    """Token by token and in chunks, also in a cache that is not full."""
    model, ids = make_gpt(), random_ids(rows)
    cache, logits, first = make_cache(model, rows, max_length), [], 0
    for chunk in chunks:
        logits.append(model(ids[:, first : first + chunk], cache))
        first += chunk
        assert cache.length == first
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), rtol=1e-4, atol=1e-5)


def test_a_full_cache_is_an_error() -> None:
    model, ids = make_gpt(), random_ids()
    cache = make_cache(model, 3, 5)
    model(ids[:, :5], cache)
    with pytest.raises(UserError, match="6 positions do not fit into a cache of 5"):
        model(ids[:, 5:6], cache)


@pytest.mark.parametrize("chunks", [[6, 1, 1, 1], [7, 2]], ids=str)
@pytest.mark.parametrize("num_prefix", [4, 6])
def test_cache_with_a_prefix(chunks: list[int], num_prefix: int) -> None:
    """The prefix is part of the first chunk, as a caption before its picture is."""
    model, ids = make_gpt(), random_ids()
    cache, logits, first = make_cache(model, 3, 9), [], 0
    for chunk in chunks:
        mask = causal_mask(first + chunk, chunk, num_prefix=num_prefix)
        logits.append(model(ids[:, first : first + chunk], cache, mask))
        first += chunk
    expected = model(ids, mask=causal_mask(9, num_prefix=num_prefix))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-5)


# --- masks ------------------------------------------------------------------------------------


def influences(model: GPT, num_prefix: int, length: int = 7) -> list[list[bool]]:
    """[position][token]: whether another token there changes the logits at the position."""
    ids, mask = random_ids(1, length), causal_mask(length, num_prefix=num_prefix)
    before, columns = model(ids, mask=mask), []
    for position in range(length):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % VOCAB
        columns.append((model(other, mask=mask) != before).any(-1)[0])
    return torch.stack(columns, dim=1).tolist()


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 4, 7, 9])
def test_logits_depend_on_earlier_tokens_and_on_the_whole_prefix(num_prefix: int) -> None:
    expected = [[j <= i or max(i, j) < num_prefix for j in range(7)] for i in range(7)]
    assert influences(make_gpt(), num_prefix) == expected


@pytest.mark.parametrize("new", [1, 2, 5])
def test_causal_mask_of_new_positions_is_the_end_of_the_whole(new: int) -> None:
    whole = causal_mask(5, num_prefix=3)
    assert torch.equal(causal_mask(5, new, num_prefix=3), whole[5 - new :])


@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_changes_nothing(cached: bool) -> None:
    """Rows of several lengths in one batch have the logits of each alone, with a cache too."""
    model, lengths, longest = make_gpt(), [9, 6, 1], 9
    rows = [random_ids(1, length) for length in lengths]
    ids = torch.cat([torch.cat([random_ids(1, longest - r.shape[1]), r], dim=1) for r in rows])
    positions = torch.arange(longest)[None] - (longest - torch.tensor(lengths)[:, None])
    mask = causal_mask(longest) & (positions >= 0)[:, None, None, :]  # (B, 1, N, N)
    position_ids = positions.clamp(min=0)
    if cached:
        cache = make_cache(model, 3, longest)
        logits = torch.cat(
            [
                model(ids[:, a:b], cache, mask[:, :, a:b, :b], position_ids[:, a:b])
                for a, b in ((0, 5), (5, 8), (8, 9))
            ],
            dim=1,
        )
    else:
        logits = model(ids, mask=mask, position_ids=position_ids)
    for number, row in enumerate(rows):
        alone = model(row)[0]
        torch.testing.assert_close(logits[number, -len(alone) :], alone, rtol=1e-4, atol=1e-5)
    assert logits.isfinite().all()
    assert not torch.allclose(model(ids)[1, -1], logits[1, -1], atol=1e-3)


def test_embeddings_of_positions() -> None:
    model, ids = make_gpt(), random_ids(2, 4)
    position_ids = torch.tensor([[0, 1, 2, 3], [5, 2, 2, 0]])
    expected = model.tok_emb.weight[ids] + model.pos_emb.weight[position_ids]
    assert torch.equal(model.embed(ids, position_ids), expected)
    assert torch.equal(model.embed(ids), model.embed(ids, torch.arange(4).expand(2, 4)))
    assert torch.equal(model.embed(ids, first=3), model.embed(ids, torch.arange(3, 7).expand(2, 4)))


# --- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "exact"])
def test_each_gelu_by_hand(kind: Any) -> None:
    """x Phi(x), or its approximation by a tanh; they differ by less than a thousandth."""
    config = TransformerConfig(width=4, num_layers=1, num_heads=1, gelu=kind)
    x = torch.linspace(-3, 3, 25)
    exact = [v * (1 + math.erf(v / 2**0.5)) / 2 for v in x.tolist()]
    tanh = [
        v * (1 + math.tanh((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3))) / 2 for v in x.tolist()
    ]
    values = Transformer(config).blocks[0].mlp[1](x).tolist()
    expected, other = (tanh, exact) if kind == "tanh" else (exact, tanh)
    assert values == pytest.approx(expected, abs=1e-6)
    assert values != pytest.approx(other, abs=1e-5) and values == pytest.approx(other, abs=1e-3)


def test_dropout_is_for_training_alone() -> None:
    network = Transformer(TransformerConfig(width=12, num_layers=2, num_heads=3, dropout=0.5))
    x = torch.randn(1, 4, 12)
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


# --- sizes and weights ------------------------------------------------------------------------


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_of_gpt2_small() -> None:
    """The tied head is counted once."""
    with torch.device("meta"):
        model = GPT(TransformerConfig(width=768, num_layers=12, num_heads=12), 50257, 1024)
    assert count(model) == 124_439_808


def test_parameters_of_vqgan_s_transformer() -> None:
    """taming-transformers' DRIN model, with a head of its own."""
    config = TransformerConfig(width=1024, num_layers=24, num_heads=16, gelu="exact")
    with torch.device("meta"):
        model = GPT(config, 1024, 512, tied=False)
    assert count(model) == 304_932_864


def test_a_tied_head_is_the_token_embedding() -> None:
    tied, untied = make_gpt(), make_gpt(tied=False)
    assert tied.head.weight is tied.tok_emb.weight
    assert untied.head.weight is not untied.tok_emb.weight
    assert count(untied) == count(tied) + VOCAB * 12
    ids, reloaded = torch.full((1, 4), 2), make_gpt()
    before = tied(ids)
    tied.tok_emb.weight.data[0] += 1  # a token that does not occur
    assert torch.equal(tied(ids)[..., 1:], before[..., 1:])
    assert (tied(ids)[..., 0] != before[..., 0]).all()
    reloaded.load_state_dict(tied.state_dict())
    assert reloaded.head.weight is reloaded.tok_emb.weight
    assert torch.equal(reloaded(ids), tied(ids))


@pytest.mark.parametrize("layers", [1, 4])
def test_initial_weights_are_gpt2s(layers: int) -> None:
    """N(0, 0.02), in the last layer of each branch smaller by sqrt(2 layers); norms and biases at
    one and zero."""
    config = TransformerConfig(width=64, num_layers=layers, num_heads=2)
    for name, parameter in GPT(config, 200, 200, tied=False).named_parameters():
        if parameter.dim() == 1:
            value = float(".ln" in name and name.endswith("weight"))
            assert (parameter == value).all(), name
            continue
        ends_branch = name.endswith(("attn.proj.weight", "mlp.2.weight"))
        std = 0.02 / (2 * layers) ** 0.5 if ends_branch else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.06), name
        assert parameter.mean().item() == pytest.approx(0, abs=1e-3), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width=0 must be at least 1"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"width": 10, "num_heads": 4}, "width=10 cannot be shared by 4 heads"),
        ({"gelu": "relu"}, "gelu='relu' is not possible"),
        ({"dropout": 1.0}, "dropout=1.0 must be below 1"),
        ({"dropout": -0.1}, "dropout=-0.1 must be at least 0"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransformerConfig(**changes)


# --- learning ---------------------------------------------------------------------------------


def test_eight_sequences_are_learnt_by_heart() -> None:
    """Each is continued from its first token, which no two share."""
    ids = torch.cat([torch.arange(8)[:, None], torch.randint(8, (8, 7))], dim=1)
    model = GPT(TransformerConfig(width=32, num_layers=2, num_heads=4), 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    assert next_token_loss(model, ids).item() == pytest.approx(math.log(8), rel=0.02)
    for _ in range(80):
        loss = next_token_loss(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    with torch.no_grad():
        assert torch.equal(greedy(model, ids[:, :1], 8), ids)


# --- the original -----------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_are_those_of_transformers_gpt2() -> None:
    """Logits, loss, left padding and greedy tokens with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=12,
        n_layer=2,
        n_head=3,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    ours = GPT(CONFIG, VOCAB, LENGTH).eval()
    ours.load_state_dict(gpt2_state(theirs.state_dict()))
    ids, close = random_ids(), {"rtol": 1e-4, "atol": 1e-5}
    expected = theirs(ids, labels=ids)
    torch.testing.assert_close(ours(ids), expected.logits, **close)
    assert next_token_loss(ours, ids).item() == pytest.approx(expected.loss.item(), rel=1e-5)
    is_token = torch.arange(9)[None] >= torch.tensor([0, 2, 5])[:, None]
    position_ids = (is_token.cumsum(1) - 1).clamp(min=0)
    padded = theirs(ids, attention_mask=is_token.long(), position_ids=position_ids).logits
    mask = causal_mask(9) & is_token[:, None, None, :]
    logits = ours(ids, mask=mask, position_ids=position_ids)
    torch.testing.assert_close(logits[is_token], padded[is_token], **close)
    tokens = theirs.generate(ids[:, :4], max_length=LENGTH, do_sample=False, pad_token_id=0)
    for cached in (True, False):
        assert torch.equal(greedy(ours, ids[:, :4], LENGTH, cached), tokens)
