"""`lineage verify` on small files with known results, and on the real ones if present."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.official import verify as module
from lineage.official.verify import (
    NotComputed,
    Reference,
    Verifier,
    as_json,
    as_text,
    check_reference,
    exit_code,
    identify,
    output,
    read_reference,
    run,
    tolerance,
    verifiers,
    verify,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "reference"
TOY = "toy_linear"


def toy_tensors() -> dict[str, Tensor]:
    """A linear layer as its official code might have saved it."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "state/NET/weight": torch.randn(4, 3, generator=g),
        "state/NET/bias": torch.randn(4, generator=g),
        "input/x": torch.randn(2, 3, generator=g),
    }
    y = nn.functional.linear(
        tensors["input/x"], tensors["state/NET/weight"], tensors["state/NET/bias"]
    )
    tensors["output/y"] = y
    tensors["output/loss"] = y.square().mean()
    tensors["output/argmax"] = y.argmax(1)
    tensors["output/sum64"] = y.double().sum(0)
    return tensors


class Toy(Verifier):
    """Computes the outputs of the toy; `changes` replaces some."""

    source = ("someone/toy",)
    changes: ClassVar[dict[str, Any]] = {}

    @cached_property
    def y(self) -> Tensor:
        layer = nn.Linear(self.config["in"], 4)
        layer.load_state_dict(self.state["NET"], strict=True)
        return layer(self.inputs["x"])

    @output("y", "zero", "inf", "fid")
    def whole(self) -> Any:
        return self.y

    @output("loss")
    def loss(self) -> Tensor:
        return self.y.square().mean()

    @output("argmax")
    def argmax(self) -> Tensor:
        return self.y.argmax(1)

    @output(r"sum(\d+)")
    def total(self, bits: str) -> Tensor:
        return self.y.to(getattr(torch, f"float{bits}")).sum(0)

    @output("gradient", grad=True)
    def gradient(self) -> Tensor:
        x = self.inputs["x"].clone().requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0]

    def compute(self, name: str) -> Any:
        if name not in self.changes:
            return super().compute(name)
        value = self.changes[name]
        return value() if callable(value) and not isinstance(value, Tensor) else value


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a reference file; keywords replace metadata, None removes it."""

    def write(tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> Path:
        path = tmp_path / f"file{len(list(tmp_path.iterdir()))}.safetensors"
        meta: dict[str, str | None] = {
            "source": "someone/toy",
            "system": TOY,
            "config": json.dumps({"in": 3}),
            "tensors": "{}",
        }
        strings = {key: value for key, value in {**meta, **metadata}.items() if value is not None}
        save_file(toy_tensors() if tensors is None else tensors, path, strings)
        return path

    return write


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**verifiers(), TOY: Toy}
    monkeypatch.setattr(module, "verifiers", lambda: known)
    monkeypatch.setattr(Toy, "changes", {})


def compute_instead(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the toy verifier return `changes` in place of its own outputs."""
    monkeypatch.setattr(Toy, "changes", changes)


def test_reading(write: Callable[..., Path]) -> None:
    single = {"state/a.weight": torch.ones(1), "output/o": torch.ones(1), "check/u": torch.ones(2)}
    reference = read_reference(write(single))
    assert reference.state.keys() == {""} and reference.state[""].keys() == {"a.weight"}
    assert reference.checks["u"].shape == (2,)
    deep = {"state/DiT-XL/2/x.weight": torch.ones(1), "output/a/b": torch.ones(1)}
    reference = read_reference(write(deep))
    assert reference.state["DiT-XL/2"].keys() == {"x.weight"}
    assert reference.outputs.keys() == {"a/b"}
    assert reference.config == {"in": 3} and reference.source == "someone/toy"


def test_agreement(write: Callable[..., Path]) -> None:
    path = write()
    out = io.StringIO()
    assert run([path], out=out) == 0
    text = out.getvalue()
    assert text.count("  pass  ") == 4 and "FAIL" not in text and "4 of 4 outputs agree" in text
    assert "2x4" in text and "scalar" in text and "exact" in text and "2e-05 rel" in text


@pytest.mark.parametrize(
    ("name", "change", "passes"),
    [
        ("y", 1e-5, True),
        ("y", 4e-5, False),
        ("loss", 8e-5, True),
        ("loss", 2e-4, False),
        ("sum64", 1e-10, True),
        ("sum64", 1e-8, False),
    ],
)
def test_perturbation(write: Callable[..., Path], name: str, change: float, passes: bool) -> None:
    tensors = toy_tensors()
    value = tensors[f"output/{name}"]
    tensors[f"output/{name}"] = value + change * value.abs().max()
    checks = verify([write(tensors)])
    failed = [check.name for check in checks[0].outputs if not check.passed]
    assert failed == ([] if passes else [name])
    assert exit_code(checks) == (0 if passes else 1)


def test_integers_are_exact(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = toy_tensors()["output/argmax"]
    compute_instead(monkeypatch, argmax=right.int())
    assert verify([write()])[0].passed
    for wrong in (right + torch.tensor([0, 1]), right.double() + 1e-9):
        compute_instead(monkeypatch, argmax=wrong)
        (check,) = (c for c in verify([write()])[0].outputs if not c.passed)
        assert check.name == "argmax" and "entries differ" in check.reason


def raises() -> Tensor:
    raise KeyError("no such layer")


def not_here() -> Tensor:
    raise NotComputed("the backbone is not here")


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (torch.zeros(2, 5), "wrong shape: ours is 2x5"),
        (torch.full((2, 4), math.nan), "NaN"),
        (torch.full((2, 4), math.inf), "infinity"),
        (not_here, "not computed: the backbone is not here"),
        (raises, "KeyError: 'no such layer' (test_verify.py, line"),
        (torch.zeros(2, 4, dtype=torch.complex64), "complex"),
        (object(), "not a tensor"),
    ],
)
def test_bad_output_is_one_failed_line(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, outcome: Any, reason: str
) -> None:
    compute_instead(monkeypatch, y=outcome)
    (check,) = verify([write()])
    assert [c.name for c in check.outputs if not c.passed] == ["y"]
    assert reason in as_text(check) and exit_code([check]) == 1
    json.dumps(as_json([check]), allow_nan=False)


def test_zeros_and_infinities_in_the_reference(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite = torch.tensor([math.inf, math.nan, 1.0])
    tensors = {"output/zero": torch.zeros(3), "output/inf": infinite}
    for outcomes, passes in [
        ({"zero": torch.full((3,), 1e-7), "inf": infinite.clone()}, True),
        ({"zero": torch.full((3,), 1e-5), "inf": infinite.clone()}, False),
        ({"zero": torch.zeros(3), "inf": torch.tensor([-math.inf, math.nan, 1.0])}, False),
        ({"zero": torch.zeros(3), "inf": torch.ones(3)}, False),
    ]:
        compute_instead(monkeypatch, **outcomes)
        (check,) = verify([write(tensors)])
        assert check.passed == passes, as_text(check)
        json.dumps(as_json([check]), allow_nan=False)


def test_a_file_is_named_without_control_sequences(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_instead(monkeypatch, fid=0.25)
    path = write({"output/fid": torch.tensor(0.25).double()})
    (check,) = verify([path.rename(path.with_name("a\x1b[31m.safetensors"))])
    assert check.passed and "\x1b" not in as_text(check) and "a\\x1b[31m" in as_text(check)


def test_python_number_is_a_value(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_instead(monkeypatch, fid=0.25)
    assert verify([write({"output/fid": torch.tensor(0.25).double()})])[0].passed


def test_class_that_cannot_load_fails_every_output(write: Callable[..., Path]) -> None:
    tensors = toy_tensors()
    tensors["state/NET/extra"] = torch.ones(1)
    (check,) = verify([write(tensors)])
    assert len(check.outputs) == 4 and not any(c.passed for c in check.outputs)
    assert as_text(check).count("RuntimeError") == 4
    assert exit_code([check]) == 1


def test_only_outputs_of_the_file_are_computed_each_alone(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with fewer outputs passes, and an output without a method fails alone."""
    monkeypatch.setattr(Toy, "loss", raises)
    tensors = {n: v for n, v in toy_tensors().items() if n != "output/loss"}
    assert verify([write(tensors)])[0].passed
    tensors["output/other"] = torch.ones(1)
    (check,) = verify([write(tensors)])
    assert [(c.name, c.reason) for c in check.outputs if not c.passed] == [
        ("other", "not computed: no class here computes it")
    ]
    missing = {n: v for n, v in toy_tensors().items() if n not in ("input/x", "output/loss")}
    missing["output/gradient"] = torch.ones(1)
    (check,) = verify([write(missing)])
    assert not any(c.passed for c in check.outputs)
    assert all("KeyError: 'x'" in c.reason for c in check.outputs)


def test_numbers_in_names_and_gradients(write: Callable[..., Path]) -> None:
    """Groups of a pattern reach the method, which runs with gradients only where it says so."""
    tensors = toy_tensors()
    tensors["output/sum32"] = tensors["output/y"].sum(0)
    tensors["output/gradient"] = 2 * tensors["input/x"]
    assert verify([write(tensors)])[0].passed


def test_not_covered(write: Callable[..., Path]) -> None:
    out = io.StringIO()
    path = write(source="nobody/nothing", system=None)
    assert run([path], out=out) == 1
    assert "Not covered yet" in out.getvalue()
    assert verify([path])[0].system is None


def test_json_is_one_document(write: Callable[..., Path]) -> None:
    good, other = write(), write(source="nobody/nothing", system=None)
    out = io.StringIO()
    assert run([good, other], json_output=True, out=out) == 1
    document = json.loads(out.getvalue())
    assert document["passed"] is False
    assert [file["passed"] for file in document["files"]] == [True, False]
    assert document["files"][0]["outputs"][0].keys() == {
        *("name", "shape", "absolute", "relative", "tolerance", "kind", "passed", "reason")
    }


def test_faults_of_the_user(write: Callable[..., Path], tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header")
    whole = write().read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) - 8])
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    odd = {**toy_tensors(), "weights": torch.ones(1)}
    no_output = {"state/a": torch.ones(1)}
    for path, words in [
        (tmp_path / "absent.safetensors", "does not exist"),
        (tmp_path, "is a folder"),
        (corrupt, "not a readable safetensors file"),
        (cut, "not a readable safetensors file"),
        (empty, "not a readable safetensors file"),
        (write(config=None), "lacks 'config'"),
        (write(source=None, config=None), "lacks 'source' and 'config'"),
        (write(config="{"), "not JSON"),
        (write(config="[1]"), "not a JSON object"),
        (write(odd), "'weights'"),
        (write(no_output), "nothing to verify"),
    ]:
        out = io.StringIO()
        with pytest.raises(UserError, match=words) as caught:
            run([write(), path], out=out)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
        assert out.getvalue() == ""  # before anything is computed
    with pytest.raises(UserError, match="at least one"):
        run([])


def test_a_file_is_known_by_its_source() -> None:
    sources = {
        "adm_unet": "openai/guided-diffusion (guided_diffusion/unet.py UNetModel)",
        "guided_diffusion": "openai/guided-diffusion (gaussian_diffusion.py, respace.py)",
        "diffusers_schedulers": "diffusers 1.0 (huggingface/diffusers)",
        "gpt2": "huggingface/transformers 6.0 GPT2LMHeadModel",
    }
    for system, source in sources.items():
        assert identify({"source": source}) == system
        assert identify({"source": source, "system": "another name"}) == system
    assert identify({"source": "x", "system": "stackgan"}) == "stackgan"


@pytest.mark.parametrize(
    ("name", "tensor", "sentence", "limit", "kind"),
    [
        ("img64", torch.ones(2), "", 2e-5, "relative"),
        ("img64_train", torch.ones(2), "", 2e-4, "relative"),
        ("g1_after_train_fc.1.running_mean", torch.ones(2), "", 2e-4, "relative"),
        ("after2/embed", torch.ones(2), "after a second train-mode forward", 2e-4, "relative"),
        ("constrained", torch.ones(2), "", 2e-5, "relative"),
        ("euler/traj", torch.ones(2), "", 1e-4, "relative"),
        ("ddim_x_inter", torch.ones(2), "", 1e-4, "relative"),
        ("d1_loss", torch.ones(2), "", 1e-4, "relative"),
        ("KL_stage1", torch.ones(()), "", 1e-4, "relative"),
        ("small_resblock", torch.ones(2), "", 1e-4, "relative"),
        ("betas", torch.ones(2).double(), "", 1e-9, "relative"),
        ("fid_first10", torch.ones(()).double(), "rows; tolerance 1e-3", 1e-3, "relative"),
        ("fid_self", torch.tensor(7e-15).double(), "", 1e-6, "absolute"),
        ("prior_bpd", torch.tensor([4e-7]), "", 1e-4, "relative"),
        ("prior_bpd", torch.tensor([4e-3]), "", 1e-4, "relative"),
        ("eps", torch.tensor([4e-7]), "", 2e-5, "relative"),
        ("tokens", torch.ones(2).long(), "", 0.0, "exact"),
        ("initted", torch.ones(2).bool(), "", 0.0, "exact"),
    ],
)
def test_tolerance(name: str, tensor: Tensor, sentence: str, limit: float, kind: str) -> None:
    reference = Reference(
        path=Path("x"),
        metadata={"source": "someone/toy"},
        config={},
        state={},
        inputs={},
        outputs={name: tensor},
        sentences={f"output/{name}": sentence},
    )
    allowed = tolerance(reference, name, tensor)
    assert (allowed.limit, allowed.kind) == (limit, kind)


@pytest.mark.parametrize(
    ("size", "change", "passes"),
    [(4e-7, 9e-7, True), (4e-7, 3e-6, False), (1.0, 9e-5, True), (1.0, 2e-4, False)],
)
def test_bound_terms_near_zero_have_an_absolute_tolerance(
    size: float, change: float, passes: bool
) -> None:
    """They are differences of nearly equal numbers, so rounding is large beside them."""
    reference = Reference(Path("x"), {"source": "someone/toy"}, {}, {}, {}, {})
    theirs = torch.tensor([size])
    allowed = tolerance(reference, "prior_bpd", theirs)
    assert module.compare("prior_bpd", theirs + change, theirs, allowed).passed == passes
    assert tolerance(reference, "x", theirs).floor == 0


def test_networks_of_full_size_have_their_own_tolerance() -> None:
    metadata = {"source": "official repositories, see README"}
    reference = Reference(Path("x"), metadata, {}, {}, {}, {})
    assert tolerance(reference, "sd_v1_unet/eps", torch.ones(2)).limit == 1e-4
    assert tolerance(reference, "gpt2_small/argmax", torch.ones(2).long()).kind == "exact"


COVERED = {
    *("stackgan", "attngan", "vq_ema", "taming_vqgan", "taming_mingpt", "dalle_dvae", "gpt2"),
    *("guided_diffusion", "k_diffusion", "diffusers_schedulers", "adm_unet", "glide_text2im"),
    *("ldm_unet", "ldm_vae", "ldm_bert", "dit", "metrics", "paper_size"),
}


@pytest.mark.skipif(not REAL.is_dir(), reason="the reference files are not beside this checkout")
def test_every_real_file_is_known_or_reported() -> None:
    files = sorted(REAL.glob("*.safetensors"))
    assert files
    for path in files:
        reference = read_reference(path)
        if path.stem in COVERED:
            assert identify(reference.metadata) == path.stem
            named = {k: v for k, v in reference.metadata.items() if k != "system"}
            assert identify(named) == path.stem
        if identify(reference.metadata) is None:
            check = check_reference(reference)
            assert not check.passed and "Not covered yet" in check.note
        for name, tensor in reference.outputs.items():
            stated = "tolerance" in str(reference.sentences.get(f"output/{name}", ""))
            assert stated or tolerance(reference, name, tensor).limit <= 1e-3


def test_every_covered_system_has_a_verifier() -> None:
    assert verifiers().keys() >= COVERED
