"""GPT-2 (Radford et al. 2019) of huggingface/transformers: key map and outputs.

The blocks of `lineage/vqvae/transformer.py` are GPT-2's; the official weights differ only in that
GPT-2 stores its matrices transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.official.verify import Verifier, output
from lineage.vqvae.transformer import GPT, KVCache, TransformerConfig, causal_mask

LAYERS = {
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.proj",
    "ln_1": "ln1",
    "ln_2": "ln2",
    "mlp.c_fc": "mlp.0",
    "mlp.c_proj": "mlp.2",
}
EMBEDDINGS = {
    "transformer.wte.weight": "tok_emb.weight",
    "transformer.wpe.weight": "pos_emb.weight",
    "lm_head.weight": "head.weight",
}


def gpt2_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' `GPT2LMHeadModel` under our names."""
    state = {}
    for key, value in official.items():
        if match := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", key):
            number, layer, kind = match.groups()
            is_transposed = ".c_" in f".{layer}" and kind == "weight"
            name = f"transformer.blocks.{number}.{LAYERS[layer]}.{kind}"
            state[name] = value.T if is_transposed else value
        elif key.startswith("transformer.ln_f"):
            state[key] = value
        else:
            state[EMBEDDINGS[key]] = value
    state.setdefault("head.weight", state["tok_emb.weight"])  # tied, so some files leave it out
    return state


def greedy(model: GPT, ids: Tensor, length: int, cached: bool = True) -> Tensor:
    """Prompt (B, n) -> (B, length): the likeliest next token, again and again."""
    config = model.transformer.config
    cache = KVCache(config, len(ids), length, like=model.head.weight) if cached else None
    new = ids
    while ids.shape[1] < length:
        likeliest = model(new, cache)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, likeliest], dim=1)
        new = likeliest if cached else ids
    return ids


class GPT2Outputs(Verifier):
    """Outputs of transformers' `GPT2LMHeadModel`."""

    name = "gpt2"
    source = ("huggingface/transformers", "GPT2LMHeadModel")

    @cached_property
    def model(self) -> GPT:
        config = TransformerConfig(
            width=self.config["n_embd"],
            num_layers=self.config["n_layer"],
            num_heads=self.config["n_head"],
            gelu="exact" if self.config.get("activation") == "gelu" else "tanh",
        )
        model = GPT(config, self.config["vocab_size"], self.config["n_positions"])
        model.load_state_dict(gpt2_state(self.state[""]))
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = self.config.get("layer_norm_epsilon", module.eps)
        return model.eval()

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]

    @output("logits")
    def logits(self) -> Tensor:
        return self.model(self.ids)

    @output("loss")
    def loss(self) -> Tensor:
        logits = self.model(self.ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())

    @output("hidden_states")
    def hidden_states(self) -> Tensor:
        """Inputs of all blocks, and the output of the final norm."""
        transformer, x = self.model.transformer, self.model.embed(self.ids)
        states = [x]
        for block in transformer.blocks:
            x = block(x, causal_mask(x.shape[1]))
            states.append(x)
        return torch.stack([*states[:-1], transformer.ln_f(x)])

    @output("logits_left_padded")
    def logits_left_padded(self) -> Tensor:
        attention_mask = self.inputs["attention_mask_left"] == 1  # (B, N)
        mask = causal_mask(self.ids.shape[1]) & attention_mask[:, None, None, :]
        return self.model(self.ids, mask=mask, position_ids=self.inputs["position_ids_left"])

    @output("greedy_(cache|nocache)")
    def greedy(self, cache: str) -> Tensor:
        length = self.outputs[f"greedy_{cache}"].shape[1]
        return greedy(self.model, self.ids, length, cached=cache == "cache")

    @output("cached_last_logits")
    def cached_last_logits(self) -> Tensor:
        """Logits of the last token, after a cache of all others."""
        config, (rows, length) = self.model.transformer.config, self.ids.shape
        cache = KVCache(config, rows, length, like=self.model.head.weight)
        self.model(self.ids[:, :-1], cache)
        return self.model(self.ids[:, -1:], cache)[:, -1]
