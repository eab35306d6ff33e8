"""CLIP (Radford et al. 2021): key maps of OpenAI's and Hugging Face's files, import, and outputs.

    OpenAI, OpenCLIP   `visual.transformer.resblocks.0.attn.in_proj_weight`: queries, keys and
                       values stacked; projections (D, P), used as x W
    Hugging Face       `vision_model.encoder.layers.0.self_attn.q_proj.weight`: three layers;
                       projections transposed

OpenAI's models have `quick_gelu`, most of OpenCLIP's `gelu`: no tensor says which. `import_weights`
takes OpenAI's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.clip.clip import CLIP, CLIPConfig, contrastive_loss
from lineage.clip.image_towers import ResNetConfig, ViTConfig
from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.official.glide import tokenizer_of_size
from lineage.official.importing import CheckpointFile, Imported
from lineage.official.verify import Verifier, output
from lineage.recipes.clip import Config
from lineage.text.clip_text import CLIPTextEncoder, CLIPTextTower
from lineage.text.clip_tokenizer import CLIPTokenizer

# --- key maps -------------------------------------------------------------------------------------

OPENAI_LAYERS = {
    "attn.out_proj": "attn.to_out",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.0",
    "mlp.c_proj": "mlp.2",
}
HF_LAYERS = {
    "self_attn.q_proj": "attn.to_q",
    "self_attn.k_proj": "attn.to_k",
    "self_attn.v_proj": "attn.to_v",
    "self_attn.out_proj": "attn.to_out",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
TEXT, IMAGE = "text.tower", "image_tower"
OPENAI_OUTER = {
    "token_embedding.weight": f"{TEXT}.token_emb.weight",
    "positional_embedding": f"{TEXT}.pos_emb",
    "ln_final.weight": f"{TEXT}.norm.weight",
    "ln_final.bias": f"{TEXT}.norm.bias",
    "text_projection": f"{TEXT}.text_proj",
    "logit_scale": "logit_scale",
    "visual.conv1.weight": f"{IMAGE}.patch_emb.weight",
    "visual.class_embedding": f"{IMAGE}.class_emb",
    "visual.positional_embedding": f"{IMAGE}.pos_emb",
    "visual.ln_pre.weight": f"{IMAGE}.norm_pre.weight",
    "visual.ln_pre.bias": f"{IMAGE}.norm_pre.bias",
    "visual.ln_post.weight": f"{IMAGE}.norm_post.weight",
    "visual.ln_post.bias": f"{IMAGE}.norm_post.bias",
    "visual.proj": f"{IMAGE}.proj",
}
HF_OUTER = {
    "text_model.embeddings.token_embedding.weight": f"{TEXT}.token_emb.weight",
    "text_model.embeddings.position_embedding.weight": f"{TEXT}.pos_emb",
    "text_model.final_layer_norm.weight": f"{TEXT}.norm.weight",
    "text_model.final_layer_norm.bias": f"{TEXT}.norm.bias",
    "text_projection.weight": f"{TEXT}.text_proj",
    "logit_scale": "logit_scale",
    "vision_model.embeddings.patch_embedding.weight": f"{IMAGE}.patch_emb.weight",
    "vision_model.embeddings.class_embedding": f"{IMAGE}.class_emb",
    "vision_model.embeddings.position_embedding.weight": f"{IMAGE}.pos_emb",
    "vision_model.pre_layrnorm.weight": f"{IMAGE}.norm_pre.weight",  # spelt so in their files
    "vision_model.pre_layrnorm.bias": f"{IMAGE}.norm_pre.bias",
    "vision_model.post_layernorm.weight": f"{IMAGE}.norm_post.weight",
    "vision_model.post_layernorm.bias": f"{IMAGE}.norm_post.bias",
    "visual_projection.weight": f"{IMAGE}.proj",
}
RESNET_STEM = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
RESNET_POOL = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "c_proj": "attn.to_out",
}
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
"""Ends of the names of entries that some files hold beside the weights."""


def clip_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a published CLIP, or of its text model alone, under the names of our `CLIP`.

    Raises:
        KeyError: a tensor has a name of neither form.
    """
    state: dict[str, Tensor] = {}
    for key, value in official.items():
        if key.rpartition(".")[2] in NOT_WEIGHTS:
            continue
        is_hf = key in HF_OUTER or re.match(r"(text|vision)_model\.", key) is not None
        for name, tensor in (_hugging_face if is_hf else _openai)(key, value).items():
            state[name] = tensor
    return state


def _hugging_face(key: str, value: Tensor) -> dict[str, Tensor]:
    if key in HF_OUTER:
        is_projection = key.endswith("_projection.weight")
        return {HF_OUTER[key]: value.T.contiguous() if is_projection else value}
    match = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None or match[3] not in HF_LAYERS:
        raise KeyError(key)
    tower = TEXT if match[1] == "text" else IMAGE
    return {f"{tower}.blocks.{match[2]}.{HF_LAYERS[match[3]]}.{match[4]}": value}


def _openai(key: str, value: Tensor) -> dict[str, Tensor]:
    if key == "visual.conv1.weight" and value.shape[-1] == 3:  # the first of the ResNet's stem
        return {f"{IMAGE}.stem.0.weight": value}
    if key in OPENAI_OUTER:
        return {OPENAI_OUTER[key]: value}
    if match := re.fullmatch(
        r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key
    ):
        block = f"{IMAGE if match[1] else TEXT}.blocks.{match[2]}"
        if match[3] == "attn.in_proj":
            parts = zip("qkv", value.chunk(3), strict=True)
            return {f"{block}.attn.to_{name}.{match[4]}": part for name, part in parts}
        return {f"{block}.{OPENAI_LAYERS[match[3]]}.{match[4]}": value}
    if key.startswith("visual."):
        return {f"{IMAGE}.{_resnet_name(key.removeprefix('visual.'))}": value}
    raise KeyError(key)


def _resnet_name(key: str) -> str:
    """`layer2.0.downsample.0.weight` -> `groups.1.0.shortcut.1.weight`."""
    layer, _, rest = key.partition(".")
    if layer in RESNET_STEM:
        return f"stem.{RESNET_STEM[layer]}.{rest}"
    if layer == "attnpool":
        if rest == "positional_embedding":
            return "pool.pos_emb"
        name, _, kind = rest.partition(".")
        return f"pool.{RESNET_POOL[name]}.{kind}"
    if match := re.fullmatch(r"layer(\d)", layer):
        rest = rest.replace("downsample.0.", "shortcut.1.").replace("downsample.1.", "shortcut.2.")
        return f"groups.{int(match[1]) - 1}.{rest}"
    raise KeyError(f"visual.{key}")


# --- sizes ----------------------------------------------------------------------------------------


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number N in names that begin with `prefix` and `N.`."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    numbers = [int(match[1]) for name in state if (match := pattern.match(name))]
    return max(numbers, default=-1) + 1


def text_sizes(state: Mapping[str, Tensor], **changes: Any) -> TextConfig:
    """Sizes of the text tower of `clip_state`'s weights."""
    length, width = state[f"{TEXT}.pos_emb"].shape
    sizes = {
        "vocab_size": len(state[f"{TEXT}.token_emb.weight"]) - 2,
        "max_words": length,
        "width": width,
        "num_layers": count_layers(state, f"{TEXT}.blocks."),
        "num_heads": max(1, width // 64),
        "projection_dim": state[f"{TEXT}.text_proj"].shape[1],
        "tokenizer": "word",  # of the run; the checkpoint's own has no limit
    }
    return TextConfig(**{**sizes, **changes})


def image_sizes(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """(fields of `CLIPConfig`, side of the pictures) of `clip_state`'s weights."""
    if f"{IMAGE}.class_emb" in state:
        width, _, patch, _ = state[f"{IMAGE}.patch_emb.weight"].shape
        num_places = len(state[f"{IMAGE}.pos_emb"]) - 1
        vit = ViTConfig(
            patch_size=patch,
            width=width,
            num_layers=count_layers(state, f"{IMAGE}.blocks."),
            num_heads=max(1, width // 64),
        )
        size = patch * round(num_places**0.5)
        projection_dim = state[f"{IMAGE}.proj"].shape[1]
        return {"image": "vit", "vit": vit, "projection_dim": projection_dim}, size
    width = len(state[f"{IMAGE}.stem.6.weight"])
    num_blocks = tuple(count_layers(state, f"{IMAGE}.groups.{n}.") for n in range(4))
    resnet = ResNetConfig(width=width, num_blocks=num_blocks, num_heads=max(1, width // 2))
    size = 32 * round((len(state[f"{IMAGE}.pool.pos_emb"]) - 1) ** 0.5)
    projection_dim = len(state[f"{IMAGE}.pool.attn.to_out.weight"])
    return {"image": "resnet", "resnet": resnet, "projection_dim": projection_dim}, size


def import_weights(files: Sequence[CheckpointFile]) -> Imported:
    """A published CLIP: its weights, and its tokeniser's list of merges (`.txt`) if there is one.

    Raises:
        UserError: no file holds a whole CLIP.
    """
    tensors = [file.tensors for file in files if file.tensors]
    lists = [file for file in files if file.lines is not None]
    if len(tensors) != 1 or len(lists) > 1:
        raise UserError(
            "Name one checkpoint, and at most one list of merges (merges.txt, or OpenAI's "
            "bpe_simple_vocab_16e6.txt, unpacked)."
        )
    state = {name: tensor.float() for name, tensor in clip_state(tensors[0]).items()}
    if not any(name.startswith(IMAGE) for name in state):
        raise UserError(f"{files[0].path} holds no image tower: name the file of a whole CLIP.")
    encoder = text_sizes(state)
    fields, size = image_sizes(state)
    num_tokens = encoder.vocab_size
    tokenizer: Any = tokenizer_of_size(num_tokens)
    note = (
        "Captions cannot be read without the list of merges: import again with merges.txt beside "
        "the checkpoint."
    )
    if lists:
        tokenizer = CLIPTokenizer.from_lines(lists[0].lines or [], num_tokens)
        note = ""
    config = Config(
        size=size, encoder=encoder, model=CLIPConfig(**fields, spatial_negatives=False, degrade=0.0)
    )
    return Imported(config, state, note=note, tokenizer=tokenizer)


# --- outputs --------------------------------------------------------------------------------------


class CLIPOutputs(Verifier):
    """Outputs of OpenAI's `CLIP`."""

    name = "clip_openai"
    source = ("openai/CLIP",)

    @cached_property
    def model(self) -> CLIP:
        config, state = self.config, clip_state(self.state[""])
        heads = config["transformer_heads"]
        sizes = text_sizes(state, num_heads=heads)
        fields, size = image_sizes(state)
        encoder = CLIPTextEncoder(sizes, tokenizer_of_size(sizes.vocab_size))
        model = CLIP(CLIPConfig(**fields), encoder, size)
        model.load_state_dict(state)
        return model.eval()

    @cached_property
    def tower(self) -> CLIPTextTower:
        encoder = self.model.text
        assert isinstance(encoder, CLIPTextEncoder)
        return encoder.tower

    @cached_property
    def states(self) -> list[Tensor]:
        return self.tower.hidden_states(self.inputs["tokens"])

    @cached_property
    def text(self) -> Tensor:
        return self.tower.pool(self.states, self.inputs["tokens"].argmax(1))

    @cached_property
    def image(self) -> Tensor:
        return self.model.image_tower(self.inputs["image"])

    @output("image_features")
    def image_features(self) -> Tensor:
        return self.image

    @output("text_features")
    def text_features(self) -> Tensor:
        return self.text

    @output("text_hidden")
    def text_hidden(self) -> Tensor:
        return self.tower.words(self.states)

    @output("text_hidden_before_ln_final")
    def text_hidden_before_norm(self) -> Tensor:
        return self.states[-1]

    @property
    def logits(self) -> Tensor:
        cosines = F.normalize(self.image, dim=-1) @ F.normalize(self.text, dim=-1).T
        return self.model.logit_scale.exp() * cosines

    @output("logits_per_image")
    def logits_per_image(self) -> Tensor:
        return self.logits

    @output("logits_per_text")
    def logits_per_text(self) -> Tensor:
        return self.logits.T

    @output("contrastive_loss")
    def loss(self) -> Tensor:
        return contrastive_loss(self.logits, torch.zeros_like(self.logits, dtype=torch.bool))


def text_tower(
    state: Mapping[str, Tensor], num_heads: int, gelu: Any, norm_eps: float = 1e-5
) -> CLIPTextTower:
    """The text tower of a published text model."""
    own = {n.removeprefix(f"{TEXT}."): t for n, t in clip_state(state).items() if TEXT in n}
    width = own["pos_emb"].shape[1]
    own.setdefault("text_proj", torch.eye(width))  # a text model without a projection
    tower = CLIPTextTower(
        vocab_size=len(own["token_emb.weight"]),
        context_length=len(own["pos_emb"]),
        width=width,
        num_layers=count_layers(own, "blocks."),
        num_heads=num_heads,
        projection_dim=own["text_proj"].shape[1],
        mlp_dim=len(own["blocks.0.mlp.0.weight"]),
        gelu=gelu,
    )
    tower.load_state_dict(own)
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = norm_eps
    return tower.eval()


class HuggingFaceTextOutputs(Verifier):
    """Outputs of transformers' `CLIPTextModelWithProjection`."""

    name = "clip_hf_text"
    source = ("huggingface/transformers", "CLIPTextModel")

    @cached_property
    def tower(self) -> CLIPTextTower:
        config = self.config
        gelu = config.get("hidden_act", "quick_gelu")
        eps = config.get("layer_norm_eps", 1e-5)
        return text_tower(self.state[""], config["num_attention_heads"], gelu, eps)

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]

    @cached_property
    def end(self) -> Tensor:
        """Position of the first end token; files with `eos_token_id` 2 pool at the largest id."""
        eos = self.config["eos_token_id"]
        return self.ids.argmax(1) if eos == 2 else (self.ids == eos).int().argmax(1)

    @cached_property
    def states(self) -> list[Tensor]:
        return self.tower.hidden_states(self.ids)

    @output("hidden_states")
    def hidden_states(self) -> Tensor:
        return torch.stack(self.states)

    @output("last_hidden_state")
    def last_hidden_state(self) -> Tensor:
        return self.tower.words(self.states)

    @output("last_hidden_state_masked")
    def last_hidden_state_masked(self) -> Tensor:
        mask = self.inputs["attention_mask"] == 1
        return self.tower.words(self.tower.hidden_states(self.ids, mask))

    @output("pooler_output")
    def pooler_output(self) -> Tensor:
        return self.tower.words(self.states)[torch.arange(len(self.ids)), self.end]

    @output("text_embeds")
    def text_embeds(self) -> Tensor:
        return self.tower.pool(self.states, self.end)


class OpenCLIPTextOutputs(Verifier):
    """Outputs of OpenCLIP's text tower, as Stable Diffusion 2 and SDXL take them."""

    name = "open_clip_text"
    source = ("mlfoundations/open_clip",)

    def tower_of(self, network: str) -> CLIPTextTower:
        gelu = self.config.get("hidden_act", "gelu")
        eps = self.config.get("layer_norm_eps", 1e-5)
        return text_tower(self.state[network], self.config["heads"], gelu, eps)

    @cached_property
    def tower(self) -> CLIPTextTower:
        return self.tower_of("open_clip")

    def states(self, ids: str) -> list[Tensor]:
        return self.tower.hidden_states(self.inputs[f"ids{ids}"])

    def pool(self, ids: str) -> Tensor:
        return self.tower.pool(self.states(ids), self.inputs[f"ids{ids}"].argmax(1))

    @output("last_block")
    def last_block(self) -> Tensor:
        return self.states("")[-1]

    @output("penultimate(_padded_with_eos)?")
    def penultimate(self, ids: str | None) -> Tensor:
        return self.tower.words(self.states(ids or ""), "penultimate_raw")

    @output("sd2_penultimate")
    def sd2_penultimate(self) -> Tensor:
        return self.tower.words(self.states(""), "penultimate")

    @output("sd2_last")
    def sd2_last(self) -> Tensor:
        return self.tower.words(self.states(""))

    @output("pooled(_padded_with_eos)?")
    def pooled(self, ids: str | None) -> Tensor:
        return self.pool(ids or "")

    @output("pooled_argmax(_new_token)")
    def pooled_argmax(self, ids: str) -> Tensor:
        return self.pool(ids)

    @output("text_features")
    def text_features(self) -> Tensor:
        return F.normalize(self.pool(""), dim=-1)

    @output("hf_hidden_states")
    def hf_hidden_states(self) -> Tensor:
        return torch.stack(self.tower_of("hf").hidden_states(self.inputs["ids"]))

    @output("hf_pooled_eos(_new_token)?")
    def hf_pooled_eos(self, ids: str | None) -> Tensor:
        """Pooled at the first end token, whatever other ids are larger."""
        tower, tokens = self.tower_of("hf"), self.inputs[f"ids{ids or ''}"]
        end = (tokens == self.config["eos_token_id"]).int().argmax(1)
        return tower.pool(tower.hidden_states(tokens), end)
