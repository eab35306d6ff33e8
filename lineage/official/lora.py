"""LoRA (Hu et al. 2021) of Stable Diffusion: the key forms of public adapters, and the outputs of
kohya-ss/sd-scripts.

An adapter comes in four forms. D is the layer's name in diffusers, K the same with `_` for `.`:

    kohya           lora_unet_K.lora_down.weight, .lora_up.weight, .alpha; lora_te_K of the text
                    encoder. For SDXL, K are the names of the original UNet
    diffusers       unet.D.lora_A.weight (down), .lora_B.weight (up); text_encoder.D; no alpha, but
                    in the metadata of newer files
    diffusers_old   unet.….processor.to_q_lora.down.weight and unet.D.lora.down.weight;
                    text_encoder.D.lora_linear_layer.down.weight
    peft            base_model.model.D.lora_A.weight, of the UNet alone; alpha in
                    adapter_config.json beside it

In kohya's form every change must have its alpha: files without one were made by programs that lost
it, and are too strong. In the other forms alpha is the rank where nothing states it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.diffusion.adapters.lora import LoRA, LowRank, adaptable, check_fits, merged
from lineage.diffusion.networks.unet import UNetConfig, make_unet
from lineage.diffusion.process import Process, ProcessConfig
from lineage.errors import UserError
from lineage.official.adm_unet import official_names, text_features
from lineage.official.clip import HF_LAYERS, text_tower
from lineage.official.stable_diffusion import diffusers_layer, our_unet
from lineage.official.verify import Verifier, output

Form = Literal["kohya", "diffusers", "peft"]
"""Form in which an adapter is written."""

# --- names ----------------------------------------------------------------------------------------

UNET, TEXT = "network.", "text.tower.blocks."


def diffusers_name(name: str) -> str | None:
    """Name in diffusers, with `unet.` or `text_encoder.`, of a layer of a model; None if it has
    none there.
    """
    if name.startswith(UNET):
        return f"unet.{diffusers_layer(name.removeprefix(UNET))}"
    if name.startswith(TEXT):
        number, _, layer = name.removeprefix(TEXT).partition(".")
        theirs = {ours: one for one, ours in HF_LAYERS.items()}
        if layer in theirs:
            return f"text_encoder.text_model.encoder.layers.{number}.{theirs[layer]}"
    return None


def known_names(model: nn.Module) -> dict[str, str]:
    """Our name of each layer, by every name that a file may have for it."""
    ours = [name for name, _ in adaptable(model)]
    unet = [name.removeprefix(UNET) for name in ours if name.startswith(UNET)]
    original = official_names(f"{name}.weight" for name in unet)
    names: dict[str, str] = {}
    for name in ours:
        if (theirs := diffusers_name(name)) is None:
            continue
        part, _, inner = theirs.partition(".")
        names |= {theirs: name, f"{KOHYA[part]}{inner.replace('.', '_')}": name}
        if part == "unet":
            old = original[f"{name.removeprefix(UNET)}.weight"].removesuffix(".weight")
            names[f"{KOHYA[part]}{old.replace('.', '_')}"] = name
    return names


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_KOHYA_KEY = re.compile(r"(lora_(?:unet|te)_\w+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_NEW_KEY = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_OLD_KEY = re.compile(r"(.+?)(?:\.processor)?(?:\.(to_\w+)_lora|\.lora(?:_linear_layer)?)"
                      r"\.(down|up)\.weight")  # fmt: skip
_PART = {"A": "down", "B": "up", "lora_down.weight": "down", "lora_up.weight": "up"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _split(key: str) -> tuple[str, str] | None:
    """Layer and part (`down`, `up`, `alpha`) of a key; None if it is of no form."""
    if match := _KOHYA_KEY.fullmatch(key):
        return match[1], _PART.get(match[2], match[2])
    key = key.removeprefix("base_model.model.")
    if not key.startswith(("unet.", "text_encoder.")):
        key = f"unet.{key}"  # peft's own files hold one model
    if match := _NEW_KEY.fullmatch(key):
        return match[1], _PART[match[2]]
    if match := _OLD_KEY.fullmatch(key):
        layer, projection, part = match.groups()
        if projection and layer.startswith("text_encoder."):
            layer += f".{_OLD_TEXT[projection]}"
        elif projection:
            layer += f".{'to_out.0' if projection == 'to_out' else projection}"
        return layer, part
    return None


# --- reading and writing --------------------------------------------------------------------------


def read_adapter(
    tensors: Mapping[str, Tensor], model: nn.Module, alpha: Mapping[str, float] | None = None
) -> LoRA:
    """An adapter for a model, from a file of any form.

    Args:
        tensors: Contents of the file.
        model: Model that it is for: a system, or anything with a UNet under `network`.
        alpha: Factor alpha of the forms that hold none, for `unet` and for `text_encoder`.

    Raises:
        UserError: the file is no adapter, or one of another model.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (split := _split(key)) is None:
            raise UserError(f"This is no LoRA: {key!r} is a key of none of its forms.")
        parts.setdefault(split[0], {})[split[1]] = tensor
    if not parts:
        raise UserError("This is no LoRA: it holds no tensors.")
    names = known_names(model)
    if unknown := [layer for layer in parts if layer not in names]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"The adapter was made for another model: it changes {unknown[0]}{more}, of "
            f"{len(parts)} layers in all, which this model does not have."
        )
    changes = {}
    for layer, own in parts.items():
        kohya = layer.startswith(tuple(KOHYA.values()))
        needed = ("down", "up", "alpha") if kohya else ("down", "up")
        if lacking := [part for part in needed if part not in own]:
            raise UserError(f"The adapter is not whole: its change of {layer} lacks {lacking[0]}.")
        rank = len(own["down"])
        stated = own.get("alpha", (alpha or {}).get(layer.partition(".")[0], rank))
        change = LowRank((len(own["up"]), *own["down"].shape[1:]), rank, float(stated) or rank)
        if change.up.shape != own["up"].shape:
            raise UserError(
                f"The adapter is damaged: the two parts of its change of {layer} have the ranks "
                f"{rank} and {own['up'].shape[1]}."
            )
        with torch.no_grad():
            change.down.copy_(own["down"])
            change.up.copy_(own["up"])
        changes[names[layer]] = change
    lora = LoRA(changes)
    check_fits(model, lora)
    return lora


def stated_alpha(metadata: Mapping[str, str]) -> dict[str, float]:
    """Factor alpha that the metadata of a file in diffusers' form states, by part."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {
            key.removesuffix(".lora_alpha"): float(value)
            for key, value in config.items()
            if key.endswith(".lora_alpha")
        }
    except (ValueError, AttributeError, TypeError):
        raise UserError(
            "The adapter is damaged: its metadata lora_adapter_metadata cannot be read."
        ) from None


def written_adapter(lora: LoRA, form: Form) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and metadata in a public form.

    Returns:
        Tensors by key; and for `diffusers` the file's metadata, for `peft` the contents of
        adapter_config.json.

    Raises:
        UserError: it changes a layer that the form has no name for, or has several alphas where the
            form holds one.
    """
    changes, tensors = lora.changes(), dict[str, Tensor]()
    layers: dict[str, list[str]] = {}  # names without their part, by part
    for name, change in changes.items():
        theirs = diffusers_name(name)
        if theirs is None or (form == "peft" and not theirs.startswith("unet.")):
            raise UserError(f"The form {form} has no name for {name}.")
        part, _, inner = theirs.partition(".")
        layers.setdefault(part, []).append(inner)
        down, up = change.down.detach().clone(), change.up.detach().clone()
        if form == "kohya":
            key = f"{KOHYA[part]}{inner.replace('.', '_')}"
            own = {"lora_down.weight": down, "lora_up.weight": up, "alpha": change.alpha.clone()}
        else:
            key = theirs if form == "diffusers" else f"base_model.model.{inner}"
            own = {"lora_A.weight": down, "lora_B.weight": up}
        tensors |= {f"{key}.{end}": tensor for end, tensor in own.items()}
    if form == "kohya":
        return tensors, {}
    sizes = {(change.rank, change.alpha.item()) for change in changes.values()}
    if len(sizes) > 1:
        raise UserError(f"The form {form} holds one rank and one alpha: write kohya's.")
    ((rank, alpha),) = sizes
    configs = {
        part: {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(own)}
        for part, own in layers.items()
    }
    if form == "peft":
        return tensors, configs["unet"]
    stated = {f"{part}.{n}": v for part, own in configs.items() for n, v in own.items()}
    return tensors, {"lora_adapter_metadata": json.dumps(stated, sort_keys=True)}


# --- outputs --------------------------------------------------------------------------------------


class LoRAOutputs(Verifier):
    """Outputs of kohya's LoRA on diffusers' UNet and transformers' CLIP."""

    name = "lora"
    source = ("kohya-ss/sd-scripts", "networks/lora.py")

    @cached_property
    def model(self) -> Any:
        """The UNet and the text tower under the names that they have in a system."""
        config, text = self.config, self.config["text"]
        unet = make_unet(
            UNetConfig(
                channels=config["block_out_channels"][0],
                channel_mult=tuple(
                    n // config["block_out_channels"][0] for n in config["block_out_channels"]
                ),
                num_res_blocks=config["layers_per_block"],
                attention_levels=tuple(
                    level for level, kind in enumerate(config["down_block_types"])
                    if kind.startswith("CrossAttn")
                ),
                num_heads=config["attention_head_dim"],
                conditioning="transformer",
                attend_padding=True,
                norm_groups=config["norm_num_groups"],
                dropout=0.0,
            ),
            config["cross_attention_dim"],
            config["cross_attention_dim"],
            config["in_channels"],
            config["out_channels"],
        )  # fmt: skip
        unet.load_state_dict(our_unet(self.state["unet"]))
        tower = text_tower(
            self.state["text_encoder"], text["num_attention_heads"], text["hidden_act"]
        )
        return nn.ModuleDict({"network": unet, "text": nn.ModuleDict({"tower": tower})}).eval()

    def adapter(self, *forms: str) -> LoRA:
        """The adapter of the file, from its first form or from several files together."""
        tensors = {key: value for form in forms for key, value in self.state[form].items()}
        return read_adapter(tensors, self.model)

    @cached_property
    def kohya(self) -> LoRA:
        return self.adapter("kohya")

    def hidden(self, lora: LoRA | None, scale: float = 1.0) -> Tensor:
        with merged(self.model, [] if lora is None else [(lora, scale)]):
            tower = self.model["text"]["tower"]
            return tower.words(tower.hidden_states(self.inputs["ids"]))

    def eps(self, lora: LoRA | None, scale: float, hidden: Tensor) -> Tensor:
        with merged(self.model, [] if lora is None else [(lora, scale)]):
            return self.model["network"](self.inputs["x"], self.inputs["t"], text_features(hidden))

    @property
    def scale(self) -> float:
        return float(self.config["multiplier"])

    @output("hidden_base")
    def hidden_base(self) -> Tensor:
        return self.hidden(None)

    @output("hidden_lora")
    def hidden_lora(self) -> Tensor:
        return self.hidden(self.kohya, self.scale)

    @output("eps_base")
    def eps_base(self) -> Tensor:
        return self.eps(None, 1.0, self.hidden(None))

    @output("eps_lora")
    def eps_lora(self) -> Tensor:
        return self.eps(self.kohya, self.scale, self.hidden_lora())

    @output("eps_lora_unet_only")
    def eps_lora_unet_only(self) -> Tensor:
        return self.eps(self.kohya, self.scale, self.hidden(None))

    @output("eps_lora_negative")
    def eps_lora_negative(self) -> Tensor:
        return self.eps(self.kohya, -self.scale, self.hidden(self.kohya, -self.scale))

    @output("eps_lora_conv")
    def eps_lora_conv(self) -> Tensor:
        whole = self.adapter("kohya", "kohya_conv_extra")
        return self.eps(whole, self.scale, self.hidden_lora())

    @output("merged_(to_q|proj_in|ff|conv1)")
    def merged_weight(self, which: str) -> Tensor:
        block = "down_blocks.0.attentions.0"
        layer = {
            "to_q": f"{block}.transformer_blocks.0.attn1.to_q",
            "proj_in": f"{block}.proj_in",
            "ff": f"{block}.transformer_blocks.0.ff.net.0.proj",
            "conv1": "down_blocks.0.resnets.0.conv1",
        }[which]
        forms = ("kohya", "kohya_conv_extra") if which == "conv1" else ("kohya",)
        name = known_names(self.model)[f"unet.{layer}"]
        with merged(self.model, [(self.adapter(*forms), self.scale)]):
            return self.model.get_parameter(f"{name}.weight").clone()

    # --- textual inversion ---

    @output("ti_hidden")
    def ti_hidden(self) -> Tensor:
        """The text tower with the learned vectors as rows behind the vocabulary."""
        tower = self.model["text"]["tower"]
        table = tower.token_emb.weight
        tower.token_emb.weight = nn.Parameter(torch.cat([table, self.inputs["ti_vectors"]]))
        try:
            return tower.words(tower.hidden_states(self.inputs["ti_ids"]))
        finally:
            tower.token_emb.weight = table

    # --- losses of DreamBooth ---

    def process(self, prediction: str) -> Process:
        return Process(
            ProcessConfig(
                schedule="scaled_linear",
                prediction=prediction,  # type: ignore[arg-type]
                weighting="min_snr",
                snr_gamma=self.config["snr_gamma"],
            )
        )

    @output("snr")
    def snr(self) -> Tensor:
        alphas_cumprod = self.process("noise").alphas_cumprod[self.inputs["db_t"]]
        return (alphas_cumprod / (1 - alphas_cumprod)).float()

    @output("min_snr_weight_(eps|v)")
    def min_snr_weight(self, kind: str) -> Tensor:
        process = self.process("noise" if kind == "eps" else "v")
        return process.loss_weight(self.inputs["db_t"])

    @output("min_snr_weight_v_dreambooth")
    def min_snr_weight_v_dreambooth(self) -> Tensor:
        """What diffusers' script has in place of the paper's weight."""
        snr = self.snr()
        return snr.clamp(max=self.config["snr_gamma"]) / snr + 1

    @output("db_noisy")
    def noisy(self) -> Tensor:
        names = ("db_latents", "db_noise", "db_t")
        return self.process("noise").add_noise(*(self.inputs[name] for name in names))

    @cached_property
    def squared_errors(self) -> Tensor:
        """(B,) of instance pictures, then of class pictures."""
        pair = self.inputs["db_pred"], self.inputs["db_noise"]
        return F.mse_loss(*pair, reduction="none").flatten(1).mean(1)

    @output("db_loss(_instance|_prior)?")
    def dreambooth_loss(self, part: str | None) -> Tensor:
        instance, prior = (half.mean() for half in self.squared_errors.chunk(2))
        if part is not None:
            return instance if part == "_instance" else prior
        return instance + self.config["prior_loss_weight"] * prior

    @output("min_snr_loss")
    def min_snr_loss(self) -> Tensor:
        return (self.min_snr_weight("eps") * self.squared_errors).mean()
