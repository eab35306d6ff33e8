"""Published CLIPs: the official numbers, names of OpenAI's and Hugging Face's files, import."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import lineage
from lineage.cli import main
from lineage.clip.clip import CLIP, CLIPConfig
from lineage.clip.image_towers import ResNetConfig, ViTConfig
from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.nn import transformer
from lineage.official import clip as official
from lineage.official.clip import clip_state, image_sizes, text_sizes, text_tower
from lineage.official.glide import tokenizer_of_size
from lineage.official.importing import import_weights
from lineage.official.verify import FileCheck, as_text, verify
from lineage.text.clip_text import CLIPTextEncoder
from lineage.text.clip_tokenizer import CLIPTokenizer
from lineage.training.store import read_json

Check = Callable[..., FileCheck]
State = dict[str, Tensor]
NUM_OUTPUTS = {"clip_openai": 7, "clip_hf_text": 5, "open_clip_text": 11}
FILES = list(NUM_OUTPUTS)


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the official numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_output_agrees_with_the_official_code(
    name: str, reference_file: Callable[[str], Path]
) -> None:
    (check,) = verify([reference_file(f"{name}.safetensors")])
    assert check.system == name and len(check.outputs) == NUM_OUTPUTS[name]
    assert check.passed, as_text(check)


@pytest.mark.parametrize("name", FILES)
def test_every_wrong_output_fails(name: str, changed: Check) -> None:
    def off(key: str, tensor: Tensor) -> Tensor:
        return tensor + 0.01 * tensor.abs().max() if key.startswith("output/") else tensor

    check = changed(name, off)
    assert not any(output.passed for output in check.outputs), as_text(check)


@pytest.mark.parametrize(
    ("name", "setting", "untouched"),
    [
        ("clip_openai", {"transformer_heads": 1}, {"image_features"}),
        ("clip_hf_text", {"hidden_act": "gelu"}, set()),
        ("clip_hf_text", {"num_attention_heads": 2}, set()),
        ("clip_hf_text", {"layer_norm_eps": 1e-2}, set()),
        ("open_clip_text", {"hidden_act": "quick_gelu"}, set()),
        ("open_clip_text", {"heads": 2}, set()),
    ],
    ids=str,
)
def test_another_setting_fails(
    name: str, setting: dict[str, Any], untouched: set[str], changed: Check
) -> None:
    check = changed(name, **setting)
    assert failing(check) == {output.name for output in check.outputs} - untouched


def test_another_place_of_pooling_fails(changed: Check) -> None:
    """The end token is told by the config: with a learnt token the largest id is another."""
    name = "open_clip_text"
    assert failing(changed(name, eos_token_id=60)) == {"hf_pooled_eos_new_token"}
    assert failing(changed(name, eos_token_id=58)) == {"hf_pooled_eos_new_token"}  # the start
    assert failing(changed("clip_hf_text", eos_token_id=57)) == {"pooler_output", "text_embeds"}
    assert not failing(changed("clip_hf_text", eos_token_id=2))  # old files: the largest id


def test_padding_is_not_masked_by_default(changed: Check) -> None:
    """`last_hidden_state_masked` alone reads the mask."""
    check = changed(
        "clip_hf_text",
        lambda key, tensor: torch.ones_like(tensor) if key == "input/attention_mask" else tensor,
    )
    assert failing(check) == {"last_hidden_state_masked"}


def test_the_activation_of_the_image_tower_matters(
    reference_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transformer.GELUS, "quick_gelu", torch.nn.GELU)
    (check,) = verify([reference_file("clip_openai.safetensors")])
    assert {"image_features", "text_features", "logits_per_text"} <= failing(check)


# --- names ----------------------------------------------------------------------------------------

LETTERS = {"attn.to_out": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2",
           "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}  # fmt: skip
OUTER = {
    "text.tower.token_emb.weight": "token_embedding.weight",
    "text.tower.pos_emb": "positional_embedding",
    "text.tower.norm": "ln_final",
    "text.tower.text_proj": "text_projection",
    "image_tower.patch_emb.weight": "visual.conv1.weight",
    "image_tower.class_emb": "visual.class_embedding",
    "image_tower.pos_emb": "visual.positional_embedding",
    "image_tower.norm_pre": "visual.ln_pre",
    "image_tower.norm_post": "visual.ln_post",
    "image_tower.proj": "visual.proj",
}


def openai(ours: State) -> State:
    """OpenAI's names of our tensors, with the entries that its files hold beside the weights."""
    theirs: State = {}
    for name, tensor in ours.items():
        stem, _, kind = name.rpartition(".")
        if name == "logit_scale":
            theirs[name] = tensor
        elif ".blocks." in name:
            match = re.fullmatch(r"(text\.tower|image_tower)\.blocks\.(\d+)\.(.+)", stem)
            assert match is not None
            tower = "transformer" if match[1] == "text.tower" else "visual.transformer"
            block = f"{tower}.resblocks.{match[2]}"
            if match[3] == "attn.to_q":
                three = [ours[f"{stem[:-1]}{letter}.{kind}"] for letter in "qkv"]
                theirs[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
            elif match[3] not in ("attn.to_k", "attn.to_v"):
                theirs[f"{block}.{LETTERS[match[3]]}.{kind}"] = tensor
        elif name.startswith(("image_tower.stem", "image_tower.groups", "image_tower.pool")):
            theirs[f"visual.{resnet_name(name.removeprefix('image_tower.'))}"] = tensor
        else:
            theirs[OUTER.get(name) or f"{OUTER[stem]}.{kind}"] = tensor
    extra = {"input_resolution": 32, "context_length": 9, "vocab_size": 520}
    return {**theirs, **{key: torch.tensor(value) for key, value in extra.items()}}


def resnet_name(name: str) -> str:
    """`groups.1.0.shortcut.2.weight` -> `layer2.0.downsample.1.weight`."""
    if match := re.fullmatch(r"stem\.(\d)\.(.+)", name):
        number = int(match[1])
        return f"{'bn' if number % 3 else 'conv'}{number // 3 + 1}.{match[2]}"
    if match := re.fullmatch(r"groups\.(\d)\.(\d+)\.(.+)", name):
        rest = re.sub(r"shortcut\.(\d)", lambda m: f"downsample.{int(m[1]) - 1}", match[3])
        return f"layer{int(match[1]) + 1}.{match[2]}.{rest}"
    name = name.replace("pool.pos_emb", "attnpool.positional_embedding")
    name = name.replace("pool.attn.to_out", "attnpool.c_proj")
    return re.sub(r"pool\.attn\.to_(\w)", r"attnpool.\1_proj", name)


HF = {
    "text.tower.token_emb.weight": "text_model.embeddings.token_embedding.weight",
    "text.tower.pos_emb": "text_model.embeddings.position_embedding.weight",
    "text.tower.norm": "text_model.final_layer_norm",
    "text.tower.text_proj": "text_projection.weight",
    "image_tower.patch_emb": "vision_model.embeddings.patch_embedding",
    "image_tower.class_emb": "vision_model.embeddings.class_embedding",
    "image_tower.pos_emb": "vision_model.embeddings.position_embedding.weight",
    "image_tower.norm_pre": "vision_model.pre_layrnorm",
    "image_tower.norm_post": "vision_model.post_layernorm",
    "image_tower.proj": "visual_projection.weight",
    "logit_scale": "logit_scale",
}


def hugging_face(ours: State) -> State:
    """transformers' names of our tensors, with the positions that old files hold."""
    theirs: State = {}
    for name, tensor in ours.items():
        stem, _, kind = name.rpartition(".")
        if ".blocks." in name:
            for a, b in {
                "text.tower.blocks": "text_model.encoder.layers",
                "image_tower.blocks": "vision_model.encoder.layers",
                "attn.to_out": "self_attn.out_proj",
                "attn.to_": "self_attn.",
                "norm": "layer_norm",
                "mlp.0": "mlp.fc1",
                "mlp.2": "mlp.fc2",
            }.items():
                name = name.replace(a, b)
            theirs[re.sub(r"self_attn\.(q|k|v)\.", r"self_attn.\1_proj.", name)] = tensor
        else:
            key = HF.get(name) or f"{HF[stem]}.{kind}"
            theirs[key] = tensor.T if "projection" in key else tensor
    theirs["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    theirs["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return theirs


MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("#", "#</w>"), ("ca", "t</w>"), ("o", "n")]
NUM_TOKENS = 512 + len(MERGES)
WIDTH = 128  # of two heads: the files do not say how many


def make(image: str = "vit", context: int = 9) -> CLIP:
    """A small CLIP whose projections are square, so that a forgotten transpose loads."""
    sizes: dict[str, Any] = {"projection_dim": WIDTH}
    if image == "vit":
        vit = ViTConfig(patch_size=16, width=WIDTH, num_layers=2, num_heads=2)
        sizes |= {"image": "vit", "vit": vit}
    else:
        resnet = ResNetConfig(width=4, num_blocks=(1, 2, 1, 1), num_heads=2)
        sizes |= {"image": "resnet", "resnet": resnet}
    text = TextConfig(
        vocab_size=NUM_TOKENS, max_words=context, width=WIDTH, num_layers=2, num_heads=2,
        projection_dim=WIDTH,
    )  # fmt: skip
    torch.manual_seed(1)
    encoder = CLIPTextEncoder(text, CLIPTokenizer(MERGES))
    model = CLIP(CLIPConfig(**sizes), encoder, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
                parameter.copy_(scale * torch.randn_like(parameter) + (parameter.dim() == 1))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


FORMS: dict[str, tuple[str, Callable[[State], State]]] = {
    "OpenAI": ("vit", openai),
    "OpenAI's ResNet": ("resnet", openai),
    "Hugging Face": ("vit", hugging_face),
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_names_are_mapped_back(form: str) -> None:
    """Each tensor, bit for bit, and none more."""
    image, rename = FORMS[form]
    ours = make(image).state_dict()
    theirs = rename(ours)
    assert not set(theirs) & set(ours) - {"logit_scale"}
    mapped = clip_state(theirs)
    assert mapped.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(mapped[name], tensor), name


@forms
def test_sizes_are_read_from_the_tensors(form: str) -> None:
    image, rename = FORMS[form]
    model = make(image)
    state = clip_state(rename(model.state_dict()))
    text = text_sizes(state)
    assert (text.vocab_size, text.max_words, text.width) == (NUM_TOKENS, 9, WIDTH)
    assert (text.num_layers, text.num_heads, text.projection_dim) == (2, 2, WIDTH)
    fields, size = image_sizes(state)
    assert size == 32 and fields["image"] == image and fields["projection_dim"] == WIDTH
    assert fields[image] == getattr(model.config, image)


@pytest.mark.parametrize("width", [64, 80, 96, 128])
def test_heads_of_the_resnets_pool(width: int) -> None:
    """32, 40, 48 and 64 in RN50, RN50x4, RN50x16 and RN50x64: 64 channels a head."""
    with torch.device("meta"):
        config = CLIPConfig(
            image="resnet", resnet=ResNetConfig(width=width, num_blocks=(1, 1, 1, 1), num_heads=1)
        )
        model = CLIP(config, CLIPTextEncoder(TextConfig(), tokenizer_of_size(9)), 32)
    fields, _ = image_sizes(model.state_dict())
    assert fields["resnet"].num_heads == 32 * width // 64


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.0.weight",
        "transformer.resblocks.0.attn.zorp.weight",
        "visual.layer1.0.conv1",
        "visual.zorp.weight",
        "visual.attnpool.zorp.weight",
        "text_model.encoder.layers.0.zorp.weight",
        "vision_model.zorp.weight",
    ],
)
def test_a_name_of_neither_form_is_no_clip(key: str) -> None:
    state = clip_state_or_none({key: torch.ones(2)})
    assert state is None or not state.keys() & make().state_dict().keys()


def clip_state_or_none(state: State) -> State | None:
    try:
        return clip_state(state)
    except KeyError:
        return None


def test_a_text_model_alone_has_a_tower() -> None:
    """With a projection or without: then the sentence is the state itself."""
    model = make()
    theirs = {k: v for k, v in hugging_face(model.state_dict()).items() if "text" in k}
    ids = torch.tensor([[518, 300, 519], [518, 519, 0]])
    end = torch.tensor([2, 1])
    for state in (theirs, {k: v for k, v in theirs.items() if "projection" not in k}):
        tower = text_tower(state, 2, "quick_gelu")
        states = tower.hidden_states(ids)
        words = tower.words(states)[torch.arange(2), end]
        assert isinstance(model.text, CLIPTextEncoder)
        whole = "text_projection.weight" in state
        weights = model.text.tower.text_proj if whole else torch.eye(WIDTH)
        torch.testing.assert_close(tower.pool(states, end), words @ weights)


# --- transformers itself --------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_vectors_and_logits_are_those_of_transformers(act: Any) -> None:
    library: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    common = {"intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = library.CLIPConfig(
        text_config={
            **common, "hidden_size": WIDTH, "vocab_size": 40, "max_position_embeddings": 7,
            "hidden_act": act, "bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 39,
        },
        vision_config={
            **common, "hidden_size": WIDTH, "image_size": 32, "patch_size": 16, "hidden_act": act,
        },
        projection_dim=24,
    )  # fmt: skip
    theirs = library.CLIPModel(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    state = clip_state(theirs.state_dict())
    fields, size = image_sizes(state)
    sizes = text_sizes(state, gelu=act)
    model = CLIP(CLIPConfig(**fields), CLIPTextEncoder(sizes, tokenizer_of_size(38)), size).eval()
    if act == "gelu":  # of OpenCLIP's models; the configuration has OpenAI's alone
        for module in model.image_tower.modules():
            if isinstance(module, torch.nn.Sequential) and len(module) == 3:
                module[1] = torch.nn.GELU()
    model.load_state_dict(state)
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[38, 5, 6, 39, 39], [38, 3, 4, 9, 39]])
    output = theirs(input_ids=ids, pixel_values=pixels)
    image = F.normalize(model.image_tower(pixels), dim=-1)
    assert isinstance(model.text, CLIPTextEncoder)
    _, text = model.text(ids, torch.tensor([[1, 1, 1, 1, 0], [1] * 5]).bool())
    text = F.normalize(text, dim=-1)
    torch.testing.assert_close(image, output.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text, output.text_embeds, atol=1e-5, rtol=1e-5)
    logits = model.scale() * image @ text.T
    torch.testing.assert_close(logits, output.logits_per_image, atol=1e-4, rtol=1e-4)


# --- import ---------------------------------------------------------------------------------------


def save(state: State, path: Path, half: bool = False) -> Path:
    whole = {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }
    if path.suffix == ".safetensors":
        save_file(whole, path)
    else:
        torch.save(whole, path)
    return path


def merges_file(folder: Path, first: str = "#version: 0.2") -> Path:
    path = folder / "merges.txt"
    path.write_text("\n".join([first, *(" ".join(pair) for pair in MERGES), ""]), "utf-8")
    return path


CAPTIONS = ["a red cat", "## on a red cat by a car of 12 dogs", "", "Ünïcode ☃"]


@forms
@torch.no_grad()
def test_a_published_file_becomes_a_run_with_the_same_vectors(form: str, tmp_path: Path) -> None:
    image, rename = FORMS[form]
    source = make(image)
    state = rename(source.state_dict())
    suffix = ".safetensors" if form == "Hugging Face" else ".pt"
    paths = [save(state, tmp_path / f"clip{suffix}"), merges_file(tmp_path)]
    assert import_weights("clip", paths, tmp_path / "run") == ""
    model = lineage.load(tmp_path / "run", device="cpu")
    assert isinstance(model, CLIP) and not model.training
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    assert torch.equal(model.encode_image(images), source.encode_image(images))
    assert torch.equal(model.encode_text(CAPTIONS), source.encode_text(CAPTIONS))
    assert model.encode_text(CAPTIONS).std(0).min() > 1e-3
    assert torch.equal(model.scale(), source.scale())
    assert model.text.tokens("red cat") == ["<start>", "red", "cat", "<end>"]
    assert not model.config.spatial_negatives and model.config.degrade == 0
    config = read_json(tmp_path / "run" / "config.json")
    assert config["key"] == "clip" and config["preset"] == "paper" and config["size"] == 32


def test_half_precision_and_the_prefix_of_a_wrapper(tmp_path: Path) -> None:
    """As OpenAI's weights are stored, and as a checkpoint of training in parallel names them."""
    source = make()
    state = {f"module.{k}": v for k, v in openai(source.state_dict()).items()}
    path = save(state, tmp_path / "clip.pt", half=True)
    import_weights("clip", [merges_file(tmp_path), path], tmp_path / "run")
    model = lineage.load(tmp_path / "run", device="cpu")
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float()), name


class Published(torch.nn.Module):
    """Tensors by their names, as a tree of modules."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def tree_of(state: State) -> Published:
    root = Published()
    for name, tensor in state.items():
        *places, leaf = name.split(".")
        module: torch.nn.Module = root
        for place in places:
            if not hasattr(module, place):
                module.add_module(place, Published())
            module = getattr(module, place)
        if tensor.is_floating_point():
            module.register_parameter(leaf, torch.nn.Parameter(tensor))
        else:
            module.register_buffer(leaf, tensor)
    return root


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_the_form_in_which_openai_published_its_models(image: str, tmp_path: Path) -> None:
    """A TorchScript program: its tensors are read, and the program is not."""
    source = make(image)
    tree = tree_of({k: v.clone() for k, v in openai(source.state_dict()).items()})
    torch.jit.save(torch.jit.trace(tree, torch.ones(1)), tmp_path / "clip.pt")
    import_weights("clip", [tmp_path / "clip.pt", merges_file(tmp_path)], tmp_path / "run")
    model = lineage.load(tmp_path / "run", device="cpu")
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_without_merges_the_user_is_told(tmp_path: Path) -> None:
    path = save(openai(make().state_dict()), tmp_path / "clip.pt")
    note = import_weights("clip", path, tmp_path / "run")
    assert "merges.txt" in note and "\n" not in note
    model = lineage.load(tmp_path / "run", device="cpu")
    assert torch.equal(model.state_dict()["text.tower.pos_emb"], make().text.tower.pos_emb)  # type: ignore[union-attr, operator]


def test_the_command_makes_a_run_that_searches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With OpenAI's own first line."""
    from PIL import Image

    paths = [save(hugging_face(make().state_dict()), tmp_path / "model.safetensors")]
    paths.append(merges_file(tmp_path, '"bpe_simple_vocab_16e6.txt#version: 0.2'))
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    assert main(["import-weights", "clip", *map(str, paths), "--out", str(run)]) == 0
    out, errors = capfd.readouterr()
    assert out.strip() == str(run) and errors == ""
    pictures.mkdir()
    for name, colour in {"r": "red", "b": "blue"}.items():
        Image.new("RGB", (40, 30), colour).save(pictures / f"{name}.png")
    assert main(["search", str(run), str(pictures), "a red cat", "--json"]) == 0
    hits = json.loads(capfd.readouterr().out)["a red cat"]
    assert {hit["name"] for hit in hits} == {"r.png", "b.png"}
    assert hits[0]["cosine"] > hits[1]["cosine"]


def lacking(key: str) -> Callable[[State], State]:
    return lambda state: {name: t for name, t in state.items() if name != key}


def only(part: str) -> Callable[[State], State]:
    return lambda state: {name: t for name, t in state.items() if part in name}


@pytest.mark.parametrize(
    ("rename", "change", "reason"),
    [
        (openai, lambda s: {}, "Name one checkpoint"),
        (openai, lambda s: {"weight": torch.ones(2, 2)}, "weight"),
        (openai, lacking("visual.proj"), "image_tower.proj"),
        (openai, lacking("positional_embedding"), "text.tower.pos_emb"),
        (openai, lacking("logit_scale"), "logit_scale"),
        (openai, lacking("transformer.resblocks.0.ln_1.bias"), "blocks.0.norm1.bias"),
        (openai, lambda s: {**s, "more": torch.ones(1)}, "more"),
        (openai, lambda s: {**s, "visual.proj": torch.ones(3)}, "other shapes"),
        (openai, lambda s: {**s, "visual.proj": torch.ones(7, WIDTH)}, "image_tower.proj"),
        (hugging_face, only("text"), "holds no image tower"),
        (hugging_face, only("vision"), "text.tower.pos_emb"),
        (hugging_face, lacking("visual_projection.weight"), "image_tower.proj"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_no_clip_is_refused_in_a_sentence(
    rename: Callable[[State], State],
    change: Callable[[State], State],
    reason: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = save(change(rename(make().state_dict())), tmp_path / "clip.pt")
    run = tmp_path / "run"
    assert main(["import-weights", "clip", str(path), "--out", str(run)]) == 2
    out, errors = capfd.readouterr()
    (line,) = errors.strip().splitlines()
    assert out == "" and line.startswith("lineage: ") and reason in line, line
    assert not run.exists()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["merges.txt"], "Name one checkpoint"),
        (["clip.pt", "clip.pt"], "Name one checkpoint"),
        (["clip.pt", "merges.txt", "merges.txt"], "at most one list"),
        (["clip.pt", "short.txt"], f"gives {NUM_TOKENS - 1} tokens"),
        (["clip.pt", "gpt2.txt"], "of another tokeniser"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    names: list[str], reason: str, tmp_path: Path
) -> None:
    save(openai(make().state_dict()), tmp_path / "clip.pt")
    lines = merges_file(tmp_path).read_text("utf-8").splitlines()
    (tmp_path / "short.txt").write_text("\n".join(lines[:-1]), "utf-8")
    (tmp_path / "gpt2.txt").write_text("\n".join(["#version: 0.2", *["Ġ t"] * 6]), "utf-8")
    with pytest.raises(UserError, match=reason) as caught:
        import_weights("clip", [tmp_path / name for name in names], tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_key_maps_have_no_name_twice() -> None:
    for names in (official.OPENAI_LAYERS, official.HF_LAYERS, official.OPENAI_OUTER,
                  official.HF_OUTER, official.RESNET_STEM, official.RESNET_POOL):  # fmt: skip
        assert len(set(names.values())) == len(names)
