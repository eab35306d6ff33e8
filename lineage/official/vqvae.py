"""Key maps and verifiers of the discrete family: quantisers and transformers.

The transformer of `lineage/vqvae/transformer.py` has GPT-2's block. GPT-2 keeps its matrices
turned, and minGPT keeps query, key and value apart; that is all in which their weights differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.official import Outcome, Outputs
from lineage.official.verify import Reference
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser
from lineage.vqvae.transformer import GPT, Cache, TransformerConfig, next_token_loss

# --- transformers ----------------------------------------------------------------


def gpt2_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' `GPT2LMHeadModel` by our names."""
    names = {"wte": "tok_emb", "wpe": "pos_emb"}
    inner = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "ln_1": "ln1", "ln_2": "ln2"}
    inner |= {"mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    state = {}
    for key, value in official.items():
        if found := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", key):
            number, part, kind = found.groups()
            turned = value.T if ".c_" in f".{part}" and kind == "weight" else value
            state[f"transformer.blocks.{number}.{inner[part]}.{kind}"] = turned
        elif key.startswith("transformer.ln_f"):
            state[key] = value
        else:
            name = key.removeprefix("transformer.").removesuffix(".weight")
            state[f"{names.get(name, 'head')}.weight"] = value
    return state


def mingpt_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of taming-transformers' `GPT` by our names."""
    state = {
        "pos_emb.weight": official["pos_emb"][0],
        "tok_emb.weight": official["tok_emb.weight"],
        "head.weight": official["head.weight"],
    }
    for key, value in official.items():
        if key.startswith("ln_f."):
            state[f"transformer.{key}"] = value
        elif found := re.fullmatch(r"blocks\.(\d+)\.attn\.query\.(weight|bias)", key):
            number, kind = found.groups()
            parts = [
                official[f"blocks.{number}.attn.{n}.{kind}"] for n in ("query", "key", "value")
            ]
            state[f"transformer.blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
        elif re.match(r"blocks\.\d+\.(ln|mlp|attn\.proj)", key):
            state[f"transformer.{key}"] = value
    return state


@torch.no_grad()
def gpt2(reference: Reference) -> Outputs:
    """Every output of transformers' GPT-2 that a reference file may hold."""
    official, given = reference.config, reference.inputs
    gelu = "tanh" if "tanh" in str(official.get("activation", "gelu_new (tanh)")) else "exact"
    config = TransformerConfig(official["n_embd"], official["n_layer"], official["n_head"], gelu)
    model = GPT(config, official["vocab_size"], official["n_positions"])
    model.load_state_dict(gpt2_state(reference.state[""]))
    model.eval()
    ids = given["input_ids"]
    logits = model(ids)
    outputs: dict[str, Outcome] = {
        "logits": logits,
        "loss": next_token_loss(logits, ids),
        "hidden_states": torch.stack(model.transformer.states(model.embed(ids))),
    }
    if "attention_mask_left" in given:
        mask, place = given["attention_mask_left"] == 1, given["position_ids_left"]
        outputs["logits_left_padded"] = model(ids, mask=mask, place=place)
    for name, cached in (("greedy_cache", True), ("greedy_nocache", False)):
        if name in reference.outputs:
            length = reference.outputs[name].shape[1]
            outputs[name] = model.greedy(ids, length, cached)
    cache = Cache(config, len(ids), ids.shape[1], logits)
    model(ids[:, :-1], cache)
    outputs["cached_last_logits"] = model(ids[:, -1:], cache)[:, -1]
    return outputs


@torch.no_grad()
def mingpt(reference: Reference) -> Outputs:
    """Every output of taming-transformers' minGPT that a reference file may hold."""
    official, given = reference.config, reference.inputs
    sizes = (official["n_embd"], official["n_layer"], official["n_head"])
    config = TransformerConfig(*sizes, gelu="exact")
    model = GPT(config, official["vocab_size"], official["block_size"], tied=False)
    model.load_state_dict(mingpt_state(reference.state[""]))
    model.eval()
    ids = given["idx"]
    logits = model(ids)
    outputs: dict[str, Outcome] = {
        "logits": logits,
        "loss": F.cross_entropy(logits.flatten(0, 1), given["targets"].flatten()),
    }
    for name in reference.outputs:
        if found := re.fullmatch(r"logits_n_unmasked(\d+)", name):
            outputs[name] = model(ids, open_places=int(found[1]))
    if "logits_with_embeddings" in reference.outputs:
        put = given["embeddings"]
        length = reference.outputs["logits_with_embeddings"].shape[1]
        tokens = model.tok_emb(ids[:, : length - put.shape[1]])
        x = torch.cat([put, tokens], 1) + model.pos_emb.weight[:length]
        outputs["logits_with_embeddings"] = model.head(model.transformer(x))
    if "greedy_tokens" in reference.outputs:
        greedy = reference.outputs["greedy_tokens"]
        steps = reference.outputs["cached_step_logits"].shape[1]
        start, length = greedy.shape[1] - steps, greedy.shape[1]
        outputs["greedy_tokens"] = model.greedy(ids[:, :start], length, cached=False)
        cache = Cache(config, len(ids), length, logits)
        found_logits = [model(greedy[:, :start], cache)[:, -1]]
        for place in range(start, length - 1):
            found_logits.append(model(greedy[:, place : place + 1], cache)[:, -1])
        outputs["cached_step_logits"] = torch.stack(found_logits, 1)
    return outputs


# --- quantisers ---------------------------------------------------------------------


@torch.no_grad()
def vq_ema(reference: Reference) -> Outputs:
    """Every output of lucidrains/vector-quantize-pytorch that a reference file may hold."""
    official, state = reference.config, reference.state[""]
    config = QuantiserConfig(
        codes=official["codebook_size"],
        width=official["dim"],
        beta=official["commitment_weight"],
        decay=official["decay"],
        start="normal",
        restart=0.0,
    )
    ours = {"embed": "codes", "cluster_size": "counts", "embed_avg": "sums"}
    quantiser = VectorQuantiser(config)
    loaded = {ours[n]: state[f"_codebook.{n}"][0] for n in ours}
    quantiser.load_state_dict({**loaded, "begun": torch.tensor(True)})
    x = reference.inputs["x"]

    def codebook(prefix: str) -> dict[str, Tensor]:
        now = {f"{prefix}/_codebook.{n}": getattr(quantiser, ours[n])[None].clone() for n in ours}
        return {**now, f"{prefix}/_codebook.initted": quantiser.begun.clone()}

    found = quantiser.eval()(x)
    outputs: dict[str, Any] = {
        "eval_indices": found.ids,
        "eval_quantized": found.values,
        "eval_loss": torch.zeros(()),  # not asked for outside training
    }
    found = quantiser.train()(x)
    outputs |= {
        "train_indices": found.ids,
        "train_quantized": found.values,
        "train_commit_loss": found.terms["commitment"],
        **codebook("after"),
    }
    quantiser(x)
    return {**outputs, **codebook("after2")}


def taming_quantiser(reference: Reference, misplaced_beta: bool) -> VectorQuantiser:
    """taming's `VectorQuantizer2` with the codes of the file."""
    official = reference.config
    config = QuantiserConfig(
        codes=official["n_embed"],
        width=official["embed_dim"],
        beta=official["beta"],
        codebook="loss",
        start="normal",
        restart=0.0,
        misplaced_beta=misplaced_beta,
    )
    quantiser = VectorQuantiser(replace(config))
    with torch.no_grad():
        quantiser.codes.copy_(reference.state["VQModel"]["quantize.embedding.weight"])
    return quantiser.eval()
