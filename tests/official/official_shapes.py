"""Names and shapes of every tensor of the official diffusion networks, for any size, written out
from the constructors of the official classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def add_layer(shapes: Shapes, name: str, *shape: int) -> None:
    """A layer with a bias, or a norm."""
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]


# --- UNets ----------------------------------------------------------------------------------------


def add_resblock(
    shapes: Shapes, at: str, inputs: int, outputs: int, time: int, scale_shift: bool
) -> None:
    """`ResBlock` of openaimodel.py and of guided-diffusion's unet.py."""
    add_layer(shapes, f"{at}.in_layers.0", inputs)
    add_layer(shapes, f"{at}.in_layers.2", outputs, inputs, 3, 3)
    add_layer(shapes, f"{at}.emb_layers.1", 2 * outputs if scale_shift else outputs, time)
    add_layer(shapes, f"{at}.out_layers.0", outputs)
    add_layer(shapes, f"{at}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        add_layer(shapes, f"{at}.skip_connection", outputs, inputs, 1, 1)


def add_spatial_transformer(shapes: Shapes, at: str, width: int, context: int, depth: int) -> None:
    """`SpatialTransformer` of attention.py."""
    add_layer(shapes, f"{at}.norm", width)
    add_layer(shapes, f"{at}.proj_in", width, width, 1, 1)
    for number in range(depth):
        block = f"{at}.transformer_blocks.{number}"
        for name, keys in (("attn1", width), ("attn2", context)):
            shapes[f"{block}.{name}.to_q.weight"] = (width, width)
            shapes[f"{block}.{name}.to_k.weight"] = (width, keys)
            shapes[f"{block}.{name}.to_v.weight"] = (width, keys)
            add_layer(shapes, f"{block}.{name}.to_out.0", width, width)
        add_layer(shapes, f"{block}.ff.net.0.proj", 8 * width, width)
        add_layer(shapes, f"{block}.ff.net.2", width, 4 * width)
        for name in ("norm1", "norm2", "norm3"):
            add_layer(shapes, f"{block}.{name}", width)
    add_layer(shapes, f"{at}.proj_out", width, width, 1, 1)


def add_attention_block(shapes: Shapes, at: str, width: int, context: int) -> None:
    """`AttentionBlock` of guided-diffusion, and of GLIDE with `context`."""
    add_layer(shapes, f"{at}.norm", width)
    add_layer(shapes, f"{at}.qkv", 3 * width, width, 1)
    add_layer(shapes, f"{at}.proj_out", width, width, 1)
    if context:
        add_layer(shapes, f"{at}.encoder_kv", 2 * width, context, 1)


def unet_shapes(official: Mapping[str, Any]) -> Shapes:
    """`UNetModel`, in the order in which its constructor makes the tensors."""
    shapes: Shapes = {}
    width, multipliers = official["model_channels"], official["channel_mult"]
    time, num_blocks = 4 * width, official["num_res_blocks"]
    scale_shift, updown = official.get("use_scale_shift_norm"), official.get("resblock_updown")

    def attention(at: str, channels: int) -> None:
        if official.get("use_spatial_transformer"):
            context, depth = official["context_dim"], official["transformer_depth"]
            add_spatial_transformer(shapes, at, channels, context, depth)
        else:
            add_attention_block(shapes, at, channels, official.get("xf_width", 0))

    def block(at: str, inputs: int, outputs: int) -> None:
        add_resblock(shapes, at, inputs, outputs, time, bool(scale_shift))

    add_layer(shapes, "time_embed.0", time, width)
    add_layer(shapes, "time_embed.2", time, time)
    add_layer(shapes, "input_blocks.0.0", width, official["in_channels"], 3, 3)
    current, skips, factor, number = width, [width], 1, 0
    for level, multiplier in enumerate(multipliers):
        for _ in range(num_blocks):
            number += 1
            block(f"input_blocks.{number}.0", current, multiplier * width)
            current = multiplier * width
            if factor in official["attention_resolutions"]:
                attention(f"input_blocks.{number}.1", current)
            skips.append(current)
        if level < len(multipliers) - 1:
            number += 1
            if updown:
                block(f"input_blocks.{number}.0", current, current)
            else:
                add_layer(shapes, f"input_blocks.{number}.0.op", current, current, 3, 3)
            skips.append(current)
            factor *= 2
    block("middle_block.0", current, current)
    attention("middle_block.1", current)
    block("middle_block.2", current, current)
    number = 0
    for level in reversed(range(len(multipliers))):
        for index in range(num_blocks + 1):
            outputs = multipliers[level] * width
            block(f"output_blocks.{number}.0", current + skips.pop(), outputs)
            current, inner = outputs, 1
            if factor in official["attention_resolutions"]:
                attention(f"output_blocks.{number}.1", current)
                inner = 2
            if level and index == num_blocks:
                at = f"output_blocks.{number}.{inner}"
                if updown:
                    block(at, current, current)
                else:
                    add_layer(shapes, f"{at}.conv", current, current, 3, 3)
                factor //= 2
            number += 1
    add_layer(shapes, "out.0", current)
    add_layer(shapes, "out.2", official["out_channels"], width, 3, 3)
    return shapes


# --- autoencoder ----------------------------------------------------------------------------------


def half_shapes(official: Mapping[str, Any], part: str) -> Shapes:
    """CompVis' `Encoder` or `Decoder` in model.py."""
    shapes: Shapes = {}
    width, multipliers = official["ch"], official["ch_mult"]
    num_blocks, side = official["num_res_blocks"], official["resolution"]

    def block(at: str, inputs: int, outputs: int) -> None:
        add_layer(shapes, f"{at}.norm1", inputs)
        add_layer(shapes, f"{at}.conv1", outputs, inputs, 3, 3)
        add_layer(shapes, f"{at}.norm2", outputs)
        add_layer(shapes, f"{at}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            add_layer(shapes, f"{at}.nin_shortcut", outputs, inputs, 1, 1)

    def attention(at: str, channels: int) -> None:
        add_layer(shapes, f"{at}.norm", channels)
        for layer in ("q", "k", "v", "proj_out"):
            add_layer(shapes, f"{at}.{layer}", channels, channels, 1, 1)

    def middle(channels: int) -> None:
        block(f"{part}.mid.block_1", channels, channels)
        attention(f"{part}.mid.attn_1", channels)
        block(f"{part}.mid.block_2", channels, channels)

    levels, largest = list(enumerate(multipliers)), width * multipliers[-1]
    if part == "encoder":
        add_layer(shapes, f"{part}.conv_in", width, 3, 3, 3)
        current = width
        for level, multiplier in levels:
            at = f"{part}.down.{level}"
            for number in range(num_blocks):
                block(f"{at}.block.{number}", current, width * multiplier)
                current = width * multiplier
                if side // 2**level in official["attn_resolutions"]:
                    attention(f"{at}.attn.{number}", current)
            if level < len(multipliers) - 1:
                add_layer(shapes, f"{at}.downsample.conv", current, current, 3, 3)
        middle(current)
        add_layer(shapes, f"{part}.norm_out", current)
        add_layer(shapes, f"{part}.conv_out", 2 * official["z_channels"], current, 3, 3)
        return shapes
    add_layer(shapes, f"{part}.conv_in", largest, official["z_channels"], 3, 3)
    middle(largest)
    current = largest
    for level, multiplier in reversed(levels):
        at = f"{part}.up.{level}"
        for number in range(num_blocks + 1):
            block(f"{at}.block.{number}", current, width * multiplier)
            current = width * multiplier
            if side // 2**level in official["attn_resolutions"]:
                attention(f"{at}.attn.{number}", current)
        if level:
            add_layer(shapes, f"{at}.upsample.conv", current, current, 3, 3)
    add_layer(shapes, f"{part}.norm_out", current)
    add_layer(shapes, f"{part}.conv_out", 3, current, 3, 3)
    return shapes


def kl_shapes(official: Mapping[str, Any], embed_dim: int) -> Shapes:
    """`AutoencoderKL`."""
    z_channels = official["z_channels"]
    shapes = half_shapes(official, "encoder") | half_shapes(official, "decoder")
    add_layer(shapes, "quant_conv", 2 * embed_dim, 2 * z_channels, 1, 1)
    add_layer(shapes, "post_quant_conv", z_channels, embed_dim, 1, 1)
    return shapes


# --- transformers ---------------------------------------------------------------------------------


def bert_shapes(official: Mapping[str, Any]) -> Shapes:
    """`TransformerWrapper` of x_transformer.py, without its head."""
    width, shapes = official["n_embed"], dict[str, tuple[int, ...]]()
    shapes["token_emb.weight"] = (official["vocab_size"], width)
    shapes["pos_emb.emb.weight"] = (official["max_seq_len"], width)
    for number in range(official["n_layer"]):
        attention, feed_forward = (f"attn_layers.layers.{2 * number + k}" for k in (0, 1))
        add_layer(shapes, f"{attention}.0", width)
        for part in "qkv":
            shapes[f"{attention}.1.to_{part}.weight"] = (512, width)
        add_layer(shapes, f"{attention}.1.to_out", width, 512)
        add_layer(shapes, f"{feed_forward}.0", width)
        add_layer(shapes, f"{feed_forward}.1.net.0.0", 4 * width, width)
        add_layer(shapes, f"{feed_forward}.1.net.2", width, 4 * width)
    add_layer(shapes, "norm", width)
    return shapes


def xf_shapes(official: Mapping[str, Any]) -> Shapes:
    """GLIDE's text transformer."""
    width, shapes = official["xf_width"], dict[str, tuple[int, ...]]()
    shapes["token_embedding.weight"] = (official["n_vocab"], width)
    for name in ("positional_embedding", "padding_embedding"):
        shapes[name] = (official["text_ctx"], width)
    for number in range(official["xf_layers"]):
        block = f"transformer.resblocks.{number}"
        add_layer(shapes, f"{block}.attn.c_qkv", 3 * width, width)
        add_layer(shapes, f"{block}.attn.c_proj", width, width)
        add_layer(shapes, f"{block}.mlp.c_fc", 4 * width, width)
        add_layer(shapes, f"{block}.mlp.c_proj", width, 4 * width)
        add_layer(shapes, f"{block}.ln_1", width)
        add_layer(shapes, f"{block}.ln_2", width)
    add_layer(shapes, "final_ln", width)
    return shapes


def dit_shapes(official: Mapping[str, Any]) -> Shapes:
    """`DiT` of models.py, without the fixed table of positions."""
    width, patch_size = official["hidden_size"], official["patch_size"]
    hidden = int(width * official.get("mlp_ratio", 4.0))
    channels, shapes = official["in_channels"], dict[str, tuple[int, ...]]()
    add_layer(shapes, "x_embedder.proj", width, channels, patch_size, patch_size)
    add_layer(shapes, "t_embedder.mlp.0", width, 256)
    add_layer(shapes, "t_embedder.mlp.2", width, width)
    no_class = int(official.get("class_dropout_prob", 0.1) > 0)
    table = (official["num_classes"] + no_class, width)
    shapes["y_embedder.embedding_table.weight"] = table
    for number in range(official["depth"]):
        block = f"blocks.{number}"
        add_layer(shapes, f"{block}.attn.qkv", 3 * width, width)
        add_layer(shapes, f"{block}.attn.proj", width, width)
        add_layer(shapes, f"{block}.mlp.fc1", hidden, width)
        add_layer(shapes, f"{block}.mlp.fc2", width, hidden)
        add_layer(shapes, f"{block}.adaLN_modulation.1", 6 * width, width)
    outputs = channels * (2 if official["learn_sigma"] else 1)
    add_layer(shapes, "final_layer.linear", patch_size**2 * outputs, width)
    add_layer(shapes, "final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes
