"""T5's encoder: the official numbers, published checkpoints of every form, counts at full size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.official.glide import tokenizer_of_size
from lineage.official.t5_encoder import official_key, t5_config, t5_encoder, t5_state
from lineage.official.verify import FileCheck, as_text, verify
from lineage.text.t5 import T5Encoder

Check = Callable[..., FileCheck]
Copy = Callable[..., Path]
NAME = "t5_encoder"
kinds = pytest.mark.parametrize("kind", ["relu", "gated"])


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the official numbers -------------------------------------------------------------------------


def test_every_output_agrees_with_the_official_code(reference_file: Callable[[str], Path]) -> None:
    (check,) = verify([reference_file(f"{NAME}.safetensors")])
    assert check.system == NAME and len(check.outputs) == 29
    assert check.passed, as_text(check)


def test_every_wrong_output_fails(changed: Check) -> None:
    def off(key: str, tensor: Tensor) -> Tensor:
        if not key.startswith("output/"):
            return tensor
        return tensor + (0.01 * tensor.abs().max() if tensor.is_floating_point() else 1)

    check = changed(NAME, off)
    assert not any(output.passed for output in check.outputs), as_text(check)


def test_one_network_alone_may_leave_out_its_name(changed_copy: Copy) -> None:
    """Its config is then the whole config, and no other network is needed."""

    def flatten(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for key in list(tensors):
            part, _, rest = key.partition("/")
            value = tensors.pop(key)
            if rest.startswith("relu/"):
                tensors[f"{part}/{rest.removeprefix('relu/')}"] = value
            elif part == "input":
                tensors[key] = value
        metadata["config"] = json.dumps(json.loads(metadata["config"])["relu"])

    (check,) = verify([changed_copy(NAME, flatten)])
    assert check.passed and len(check.outputs) == 9, as_text(check)


@pytest.mark.parametrize("network", ["relu", "gated"])
def test_one_network_of_the_two_is_enough(network: str, changed: Check) -> None:
    other = {"relu": "gated", "gated": "relu"}[network]
    check = changed(NAME, lambda key, tensor: None if f"/{other}/" in key else tensor)
    assert check.passed and len(check.outputs) == 20, as_text(check)


def test_rows_without_a_mask_need_none(changed: Check) -> None:
    check = changed(NAME, lambda key, t: None if key == "input/attention_mask" else t)
    parts = {name.rsplit("/", 1)[-1] for name in failing(check)}
    assert parts == {
        *("last_hidden_state", "hidden_states", "attention_probs", "block0_after_attention"),
        "last_hidden_state_row0_all_masked",
    }


def test_other_rows_and_blocks_are_read_from_the_names(changed_copy: Copy) -> None:
    """`row2`, after a swap of rows 0 and 2; a table of fewer positions; the norm's own eps."""

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        order = torch.tensor([2, 1, 0])
        for key in ("input/input_ids", "input/attention_mask"):
            tensors[key] = tensors[key][order]
        rows = tensors["output/relu/last_hidden_state_row0_all_masked"][order]
        buckets = tensors["output/buckets/causal_16_20"][150:251]  # -50 ... 50
        for key in [key for key in tensors if key.startswith("output/")]:
            del tensors[key]
        tensors["output/relu/last_hidden_state_row2_all_masked"] = rows
        tensors["output/buckets/causal_16_20"] = buckets

    (check,) = verify([changed_copy(NAME, change)])
    assert check.passed and len(check.outputs) == 2, as_text(check)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("layer_norm_epsilon", 1e-2), ("relative_attention_max_distance", 20)],
)
def test_other_settings_fail_where_they_matter(
    setting: str, value: float, changed_copy: Copy
) -> None:
    """And only in the network that has them."""

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        config = json.loads(metadata["config"])
        config["gated"][setting] = value
        metadata["config"] = json.dumps(config)

    (check,) = verify([changed_copy(NAME, change)])
    failed = failing(check)
    assert "gated/last_hidden_state" in failed and "gated/embeddings" not in failed
    assert all(name.startswith("gated/") for name in failed)


def test_another_activation_is_not_computed(changed: Check) -> None:
    """UL2 has SiLU, which the tensors do not show."""
    check = changed(NAME, gated={"feed_forward_proj": "gated-silu"})
    failed = {o for o in check.outputs if not o.passed}
    assert {o.name.split("/")[0] for o in failed} == {"gated"}
    assert all("feed_forward_proj" in o.reason for o in failed)


# --- transformers itself, at other sizes ----------------------------------------------------------


def official_model(seed: int, **sizes: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return model


@pytest.mark.parametrize(
    "sizes",
    [
        {
            "vocab_size": 30,
            "d_model": 20,
            "d_kv": 3,
            "d_ff": 11,
            "num_layers": 4,
            "num_heads": 5,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 6,
        },
        {
            "vocab_size": 17,
            "d_model": 8,
            "d_kv": 16,
            "d_ff": 5,
            "num_layers": 1,
            "num_heads": 1,
            "feed_forward_proj": "relu",
            "layer_norm_epsilon": 1e-3,
        },
    ],
    ids=["gated", "relu"],
)
@torch.no_grad()
def test_a_file_of_other_sizes_made_by_transformers_agrees(
    sizes: dict[str, Any], tmp_path: Path
) -> None:
    model = official_model(3, **sizes)
    ids = torch.randint(1, sizes["vocab_size"], (2, 40))
    mask = (torch.arange(40) < torch.tensor([[25], [40]])).long()
    outputs = {
        "last_hidden_state": model(input_ids=ids, attention_mask=mask).last_hidden_state,
        "last_hidden_state_no_mask": model(input_ids=ids).last_hidden_state,
        "last_hidden_state_short": model(input_ids=ids[:, :3]).last_hidden_state,
    }
    rows = mask.clone()
    rows[1] = 0
    whole = model(input_ids=ids, attention_mask=rows).last_hidden_state
    outputs["last_hidden_state_row1_all_masked"] = whole
    tensors = {f"state/one/{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"output/one/{name}": value for name, value in outputs.items()}
    tensors |= {"input/input_ids": ids, "input/input_ids_short": ids[:, :3].contiguous()}
    tensors["input/attention_mask"] = mask
    metadata = {
        "source": "huggingface/transformers T5EncoderModel",
        "config": json.dumps({"one": sizes}),
    }
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "one.safetensors", metadata)
    (check,) = verify([tmp_path / "one.safetensors"])
    assert check.system == NAME and check.passed, as_text(check)


@kinds
@torch.no_grad()
def test_a_checkpoint_of_transformers_gives_its_vectors(kind: str) -> None:
    """Of the encoder alone and of the whole T5, whose decoder and head are left out."""
    proj = {"relu": "relu", "gated": "gated-gelu"}[kind]
    sizes = {"vocab_size": 19, "d_model": 12, "d_kv": 5, "d_ff": 7, "num_layers": 2, "num_heads": 3}
    model = official_model(5, **sizes, feed_forward_proj=proj)
    import transformers

    config = transformers.T5Config(
        **sizes, feed_forward_proj=proj, tie_word_embeddings=False, decoder_start_token_id=0
    )
    whole = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in whole.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter) + 1)
    ids = torch.randint(1, 19, (3, 9))
    for theirs in (model, whole):
        encoder = t5_encoder(theirs.state_dict())
        expected = theirs.get_encoder()(input_ids=ids).last_hidden_state
        words = encoder.stack(encoder.token_emb(ids))
        torch.testing.assert_close(words, expected, atol=2e-5, rtol=2e-5)


# --- published state dicts ------------------------------------------------------------------------


def small(kind: str = "gated", **sizes: Any) -> T5Encoder:
    config = TextConfig(
        **{"width": 12, "num_layers": 2, "num_heads": 3, "head_dim": 5, "ff_dim": 7, **sizes},
        feed_forward=kind,
    )
    return T5Encoder(config, tokenizer_of_size(11)).eval()


def published(kind: str = "gated", **sizes: Any) -> dict[str, Tensor]:
    """Random weights under official names."""
    return {official_key(name): value for name, value in small(kind, **sizes).state_dict().items()}


@kinds
def test_a_state_dict_gives_its_sizes_and_weights(kind: str) -> None:
    state = published(kind)
    config = t5_config(state)
    assert (config.width, config.num_layers, config.num_heads) == (12, 2, 3)
    assert (config.head_dim, config.ff_dim, config.feed_forward) == (5, 7, kind)
    assert config.vocab_size == 11
    encoder = t5_encoder(state, max_distance=50, eps=1e-3)
    assert {official_key(n): v for n, v in t5_state(state).items()} == state
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[official_key(name)]), name
    assert not encoder.training and all(p.requires_grad for p in encoder.parameters())
    assert encoder.stack.config.max_distance == 50 and encoder.stack.norm.eps == 1e-3
    text = encoder.encode(["w1 w2", ""])
    assert text.words.shape == (2, 2, 12) and text.words.isfinite().all()


def test_the_embedding_has_one_of_two_names_or_both() -> None:
    state = published()
    shared = state["shared.weight"]
    alone = {k: v for k, v in state.items() if k != "shared.weight"}
    alone["encoder.embed_tokens.weight"] = shared
    both = {**state, "encoder.embed_tokens.weight": shared.clone()}
    for one in (state, alone, both):
        assert torch.equal(t5_state(one)["token_emb.weight"], shared)


def test_the_rest_of_a_whole_t5_is_left_out() -> None:
    """Decoder, head, and a bias of the norm that old files hold."""
    state = published()
    rest = {
        "lm_head.weight": torch.ones(11, 12),
        "decoder.embed_tokens.weight": torch.ones(11, 12),
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(15, 12),
        "decoder.final_layer_norm.weight": torch.ones(12),
        "encoder.block.0.layer.0.layer_norm.bias": torch.zeros(12),
        "encoder.final_layer_norm.bias": torch.zeros(12),
    }
    assert t5_state({**rest, **state}).keys() == t5_state(state).keys()


QUERIES = "encoder.block.1.layer.0.SelfAttention.q.weight"
POSITIONS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict.clear, "lacks shared.weight"),
        # the head is never taken for the embedding
        (lambda s: s.update({"lm_head.weight": s.pop("shared.weight")}), "lacks shared.weight"),
        (
            lambda s: s.update({"encoder.embed_tokens.weight": 0 * s["shared.weight"]}),
            "are not the same",
        ),
        (lambda s: s.pop(POSITIONS.format(0)), "lacks .*relative_attention_bias"),
        # umT5 has a table in every block
        (lambda s: s.update({POSITIONS.format(1): torch.ones(32, 3)}), "is no tensor of T5"),
        (lambda s: s.pop(QUERIES), f"lacks {QUERIES}"),
        (lambda s: s.update({QUERIES: torch.ones(15, 11)}), r"shape \(15, 11\), not \(15, 12\)"),
        (lambda s: s.update({QUERIES: torch.ones(15)}), r"shape \(15,\)"),
        (lambda s: s.update({POSITIONS.format(0): torch.ones(32, 4)}), "15 rows .* 4 heads"),
        (lambda s: s.update({POSITIONS.format(0): torch.ones(32)}), "should be a matrix"),
        (lambda s: s.update({POSITIONS.format(0): torch.ones(3, 3)}), "num_buckets=3"),
        (lambda s: s.update({QUERIES: s[QUERIES].to(torch.int8)}), "quantised"),
        (
            lambda s: s.update({"encoder.block.0.layer.1.DenseReluDense.wi.weight": torch.ones(7)}),
            "is no tensor of T5",
        ),
        (lambda s: s.update({"pooler.weight": torch.ones(3)}), "pooler.weight is no tensor of T5"),
        (
            lambda s: [s.pop(k) for k in list(s) if ".block." in k and "relative" not in k],
            "lacks .*SelfAttention.q.weight",
        ),
    ],
)
def test_what_is_not_t5_is_refused_in_a_sentence(
    change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    state = published()
    change(state)
    for read in (t5_state, t5_encoder):
        with pytest.raises(UserError, match=reason) as caught:
            read(state)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_weights_keep_their_precision_and_are_not_copied() -> None:
    """The largest encoder has 19 GB in float32."""
    state = {key: value.to(torch.bfloat16) for key, value in published().items()}
    encoder = t5_encoder(state)
    assert encoder.token_emb.weight.data_ptr() == state["shared.weight"].data_ptr()
    assert encoder.encode(["w1"]).words.dtype == torch.bfloat16


# --- full size ------------------------------------------------------------------------------------

# Raffel et al. 2020, section 3.7, and the configurations of the published checkpoints:
# width, width of the feed-forward layers, width of a head, heads, blocks; parameters of the encoder
PUBLISHED = {
    "t5_small": ("relu", 512, 2048, 64, 8, 6, 35_330_816),
    "t5_base": ("relu", 768, 3072, 64, 12, 12, 109_628_544),
    "t5_large": ("relu", 1024, 4096, 64, 16, 24, 334_939_648),
    "t5_3b": ("relu", 1024, 16384, 128, 32, 24, 1_240_909_824),
    "t5_11b": ("relu", 1024, 65536, 128, 128, 24, 4_864_791_552),
    "t5_v1_1_small": ("gated", 512, 1024, 64, 6, 8, 35_332_800),
    "t5_v1_1_base": ("gated", 768, 2048, 64, 12, 12, 109_628_544),
    "t5_v1_1_large": ("gated", 1024, 2816, 64, 16, 24, 341_231_104),
    "t5_v1_1_xl": ("gated", 2048, 5120, 64, 32, 24, 1_223_527_424),
    "t5_v1_1_xxl": ("gated", 4096, 10240, 64, 64, 24, 4_762_310_656),
}


def full_size(name: str) -> T5Encoder:
    kind, width, ff_dim, head_dim, num_heads, num_layers, _ = PUBLISHED[name]
    config = TextConfig(
        vocab_size=32128, width=width, num_layers=num_layers, num_heads=num_heads,
        head_dim=head_dim, ff_dim=ff_dim, feed_forward=kind,
    )  # fmt: skip
    with torch.device("meta"):
        return T5Encoder(config, tokenizer_of_size(32128))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_published_encoders(name: str) -> None:
    encoder = full_size(name)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == PUBLISHED[name][-1]


def test_counts_are_those_of_the_official_code(reference_file: Callable[[str], Path]) -> None:
    saved = json.loads(reference_file(f"sizes/{NAME}.json").read_text(encoding="utf-8"))
    counts = {name.split()[0]: entry["params"] for name, entry in saved.items()}
    assert counts == {name: sizes[-1] for name, sizes in PUBLISHED.items()}


def test_keys_are_those_of_the_largest_checkpoint(reference_file: Callable[[str], Path]) -> None:
    """Every key and shape; the embedding is there under both of its names."""
    saved = json.loads(reference_file(f"keys/{NAME}.json").read_text(encoding="utf-8"))
    official = {key: torch.empty(shape, device="meta") for key, shape in saved.items()}
    shared = official["shared.weight"]
    state = t5_state({**official, "encoder.embed_tokens.weight": shared})
    expected = full_size("t5_v1_1_xxl").state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in expected.items()}
    assert {*map(official_key, expected), "encoder.embed_tokens.weight"} == set(official)
