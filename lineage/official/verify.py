"""`lineage verify`: hold our classes against numbers that the official code computed.

A reference file is a safetensors file of

    state/<key> or state/<network>/<key>    the weights of the official network, under its own names
    input/<name>                            what it was given, every random draw included
    output/<name>                           what it returned
    check/<name>                            excerpts by which a recomputed input can be checked

with, as metadata, `source` (the official code), `config` (JSON) and optionally `system`, `paper`,
`note`, `seed` and `tensors` (JSON: a sentence about each tensor). The verifier of a system (see
`lineage/official/__init__.py`) builds our class from the config, loads the state strictly and
computes the outputs; this file reads, compares and prints.

The error of an output is max|ours - reference| / max|reference| over the whole tensor. `tolerance`
says how large it may be and holds all the rules.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lineage.errors import UserError
from lineage.official import SOURCES, VERIFIERS, Outcome, Outputs, Verifier

# ------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Reference:
    """One reference file, read.

    Attributes:
        path: where it lies.
        metadata: the file's strings, as they are.
        config: the official configuration.
        state: weights by network, then by official key; the network of a file with only one is "".
        inputs, outputs, checks: tensors by name, without the prefix.
        sentences: what the file says about a tensor, by its full name (`output/img64`).
    """

    path: Path
    metadata: dict[str, str]
    config: dict[str, Any]
    state: dict[str, dict[str, Tensor]] = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)
    outputs: dict[str, Tensor] = field(repr=False)
    checks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    sentences: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> str:
        return self.metadata["source"]

    @property
    def system(self) -> str | None:
        """The system's key in `SOURCES`, whatever the file is called; None if not known."""
        return identify(self.metadata)


def identify(metadata: dict[str, str]) -> str | None:
    """The system a file belongs to: by its `system`, or else by the official code in `source`."""
    named = metadata.get("system", "")
    if named in SOURCES or named in VERIFIERS:
        return named
    source = metadata["source"].casefold()
    fits = {
        system: sum(map(len, words))
        for system, words in SOURCES.items()
        if all(word.casefold() in source for word in words)
    }
    return max(fits, key=lambda system: fits[system]) if fits else None


def read_reference(path: str | Path) -> Reference:
    """Read a reference file.

    Raises:
        UserError: if there is no such file, or it is not a safetensors file of the form above.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; name a reference file to verify.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {_line(error)}") from error
    if "source" not in metadata or "config" not in metadata:
        missing = " and ".join(repr(n) for n in ("source", "config") if n not in metadata)
        raise UserError(f"{path} is not a reference file: its metadata lacks {missing}.")

    groups: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}, "check": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        if group not in groups or not rest:
            raise UserError(
                f"{path} is not a reference file: its tensor {name!r} is none of "
                "state/…, input/…, output/…, check/…"
            )
        groups[group][rest] = tensor
    if not groups["output"]:
        raise UserError(f"{path} holds no output/… tensor, so there is nothing to verify.")

    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in groups["state"].items():
        network, _, key = name.rpartition("/")
        state.setdefault(network, {})[key] = tensor
    return Reference(
        path=path,
        metadata=metadata,
        config=_json_object(path, metadata, "config"),
        state=state,
        inputs=groups["input"],
        outputs=groups["output"],
        checks=groups["check"],
        sentences=_json_object(path, {"tensors": "{}", **metadata}, "tensors"),
    )


def _json_object(path: Path, metadata: dict[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[name])
    except ValueError as error:
        raise UserError(f"{path}: the metadata {name!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: the metadata {name!r} is not a JSON object.")
    return value


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------- tolerance


@dataclass(frozen=True)
class Tolerance:
    """How large the error of an output may be; `kind` is relative, absolute or exact."""

    limit: float
    kind: str = "relative"

    def __str__(self) -> str:
        return "exact" if self.kind == "exact" else f"{self.limit:.0e} {self.kind[:3]}"


FORWARD = 2e-5  # one forward pass, eval mode
TRAIN = 2e-4  # one forward pass with batch statistics
CHAINED = 1e-4  # sampler trajectories, chained passes, losses, small*, networks of full size
DOUBLE = 1e-9  # tables in float64
NEAR_ZERO = 1e-6  # absolute, for VLB and prior terms no larger than this
ROUNDING = 1e-12  # a reference this small is a zero: there is nothing to be relative to

_BOUND_WORDS = {"vb", "vlb", "prior", "bpd"}
_CHAINED_WORDS = _BOUND_WORDS | {
    *("traj", "trajectory", "inter", "x0"),  # sampling; `pred_x0` is a sampler's estimate
    *("loss", "losses", "nll", "kl", "mse", "perplexity", "grad"),  # losses and their gradients
    *("rec", "reconstruction", "cached", "greedy"),  # a decoder after an encoder, step by step
}
_SENTENCE_TOLERANCE = re.compile(r"\btolerance (\d[\d.]*(?:e-?\d+)?)")
_SENTENCE_TRAIN = re.compile(r"\btrain[- ]mode\b")


def tolerance(reference: Reference, name: str, tensor: Tensor) -> Tolerance:
    """What output `name` with the value `tensor` allows. The first rule that fits holds.

    1. integers and booleans                                       exact
    2. a tolerance stated in the file's sentence about the tensor  that, relative
    3. zero up to rounding; VLB and prior terms of 1e-6 or less    1e-6, absolute
    4. float64                                                     1e-9
    5. networks at full size (`paper_size`)                        1e-4
    6. a name that says `train`, a sentence that says train mode   2e-4
    7. trajectories, losses, chained passes, names in `small…`     1e-4
    8. anything else, which is one forward pass in eval mode       2e-5
    """
    if not tensor.is_floating_point():
        return Tolerance(0.0, "exact")
    sentence = str(reference.sentences.get(f"output/{name}", ""))
    words = set(re.split(r"[/_.\-]", name.casefold()))
    largest = _largest(tensor)
    if stated := _SENTENCE_TOLERANCE.search(sentence):
        return Tolerance(float(stated[1]))
    if largest <= ROUNDING or (largest <= NEAR_ZERO and words & _BOUND_WORDS):
        return Tolerance(NEAR_ZERO, "absolute")
    if tensor.dtype == torch.float64:
        return Tolerance(DOUBLE)
    if reference.system == "paper_size":
        return Tolerance(CHAINED)
    if "train" in words or _SENTENCE_TRAIN.search(sentence):
        return Tolerance(TRAIN)
    if words & _CHAINED_WORDS or name.rsplit("/", 1)[-1].startswith("small"):
        return Tolerance(CHAINED)
    return Tolerance(FORWARD)


def _largest(tensor: Tensor) -> float:
    """max|tensor| over its finite entries."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


# ---------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class OutputCheck:
    """One output, compared. `absolute` and `relative` are None if there was nothing to compare."""

    name: str
    shape: tuple[int, ...]
    tolerance: Tolerance
    passed: bool
    absolute: float | None = None
    relative: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class FileCheck:
    """One reference file, compared.

    Attributes:
        path: the file.
        system: what it was recognised as, if it was.
        covered: whether our classes can answer it.
        outputs: every output of the file by name; empty if it is not covered.
        note: one sentence about the file as a whole, where there is something to say.
    """

    path: str
    system: str | None
    covered: bool
    outputs: tuple[OutputCheck, ...] = ()
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.covered and bool(self.outputs) and all(c.passed for c in self.outputs)


def compare(name: str, outcome: Outcome | None, theirs: Tensor, allowed: Tolerance) -> OutputCheck:
    """Hold our outcome against the reference value. Nothing that is wrong with ours raises."""

    def failed(reason: str) -> OutputCheck:
        return OutputCheck(name, tuple(theirs.shape), allowed, passed=False, reason=reason)

    if outcome is None:
        return failed("not computed")
    if callable(outcome) and not isinstance(outcome, Tensor):
        try:
            outcome = outcome()
        except Exception as error:  # a defect in one output is that output's failure
            return failed(_fault(error))
    if isinstance(outcome, str):
        return failed(f"not computed: {outcome}")
    if not isinstance(outcome, Tensor):
        try:
            outcome = torch.as_tensor(outcome, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return failed(f"is a {type(outcome).__name__}, not a tensor")
    ours = outcome.detach().cpu()
    if ours.shape != theirs.shape:
        return failed(f"wrong shape: ours is {_shape(ours.shape)}")
    if ours.is_complex():
        return failed("is complex")
    return _measure(name, ours, theirs, allowed)


def _measure(name: str, ours: Tensor, theirs: Tensor, allowed: Tolerance) -> OutputCheck:
    """The errors of two tensors of one shape."""
    a, b = ours.double(), theirs.double()
    finite = b.isfinite()
    reason = ""
    if not torch.allclose(a[~finite], b[~finite], rtol=0, atol=0, equal_nan=True):
        reason = "differs where the reference is not finite"
    elif not a[finite].isfinite().all():
        reason = "holds NaN or infinity"
    if reason:
        return OutputCheck(name, tuple(theirs.shape), allowed, passed=False, reason=reason)

    absolute = _largest(a[finite] - b[finite])
    largest = _largest(b)
    relative = absolute / largest if largest else (0.0 if absolute == 0 else math.inf)
    if allowed.kind == "exact":
        passed = bool((ours == theirs)[finite].all())
        wrong = int((ours != theirs).sum())
        reason = "" if passed else f"{wrong} of {theirs.numel()} entries differ"
    else:
        passed = (absolute if allowed.kind == "absolute" else relative) <= allowed.limit
        reason = "" if passed else "error above the tolerance"
    return OutputCheck(name, tuple(theirs.shape), allowed, passed, absolute, relative, reason)


def _fault(error: Exception) -> str:
    """An exception in a few words, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_line(error)}{place}"


def find_verifier(system: str | None) -> Verifier | None:
    """The verifier of a system, imported now; None if the system is not covered."""
    entry = VERIFIERS.get(system) if system is not None else None
    if not isinstance(entry, str):
        return entry
    module, _, function = entry.partition(":")
    return cast("Verifier", getattr(importlib.import_module(module), function))


def check_reference(reference: Reference) -> FileCheck:
    """Run the verifier of a file's system and compare every output of the file."""
    path, system = str(reference.path), reference.system
    verifier = find_verifier(system)
    if system is None:
        note = f"Not covered yet: no system here is known by the source {reference.source!r}."
        return FileCheck(path, None, covered=False, note=note)
    if verifier is None:
        note = f"Not covered yet: there is no class to verify for {system} ({reference.source})."
        return FileCheck(path, system, covered=False, note=note)

    note = ""
    outcomes: Outputs = {}
    try:
        outcomes = verifier(reference)
    except Exception as error:  # a class that cannot be built or loaded does not agree
        note = f"The class could not be built and run: {_fault(error)}"
    checks = tuple(
        compare(name, outcomes.get(name), theirs, tolerance(reference, name, theirs))
        for name, theirs in sorted(reference.outputs.items())
    )
    return FileCheck(path, system, covered=True, outputs=checks, note=note)


def verify(paths: Iterable[str | Path]) -> list[FileCheck]:
    """Verify reference files.

    Raises:
        UserError: for no file, or one that cannot be read; told before anything is computed.
    """
    return [check_reference(reference) for reference in _read_all(paths)]


def _read_all(paths: Iterable[str | Path]) -> list[Reference]:
    references = [read_reference(path) for path in paths]
    if not references:
        raise UserError("Name at least one reference file to verify.")
    return references


# ----------------------------------------------------------------------------------- printing


def exit_code(checks: Sequence[FileCheck]) -> int:
    """0 if every output of every file agrees, else 1."""
    return 0 if checks and all(check.passed for check in checks) else 1


def as_text(check: FileCheck) -> str:
    """A file as lines: its name, one line for each output, and the count of those that agree."""
    lines = [f"{check.path}: {check.system or 'unknown'}"]
    lines += [check.note] if check.note else []
    if not check.covered:
        return "\n".join(lines)
    name_width = max(len(c.name) for c in check.outputs)
    shape_width = max(len(_shape(c.shape)) for c in check.outputs)
    for c in check.outputs:
        verdict = "pass" if c.passed else "FAIL"
        line = f"  {verdict}  {c.name:<{name_width}}  {_shape(c.shape):<{shape_width}}"
        if c.absolute is not None and c.relative is not None:
            line += f"  abs {c.absolute:.1e}  rel {c.relative:.1e}"
        line += f"  tolerance {c.tolerance}"
        lines.append(line + (f"  {c.reason}" if c.reason else ""))
    agree = sum(c.passed for c in check.outputs)
    lines.append(f"  {agree} of {len(check.outputs)} outputs agree.")
    return "\n".join(lines)


def as_json(checks: Sequence[FileCheck]) -> dict[str, Any]:
    """All files as one document of plain values; an error that is not a number is null."""
    return {
        "passed": exit_code(checks) == 0,
        "files": [
            {
                "path": check.path,
                "system": check.system,
                "covered": check.covered,
                "passed": check.passed,
                "note": check.note,
                "outputs": [
                    {
                        "name": c.name,
                        "shape": list(c.shape),
                        "absolute": _number(c.absolute),
                        "relative": _number(c.relative),
                        "tolerance": c.tolerance.limit,
                        "kind": c.tolerance.kind,
                        "passed": c.passed,
                        "reason": c.reason,
                    }
                    for c in check.outputs
                ],
            }
            for check in checks
        ],
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def run(paths: Iterable[str | Path], json_output: bool = False, out: TextIO | None = None) -> int:
    """What the command does: verify, print file by file (or one JSON document), give the exit code.

    Raises:
        UserError: as `verify`.
    """
    out, checks = out or sys.stdout, []
    for reference in _read_all(paths):
        checks.append(check_reference(reference))
        if not json_output:
            print(as_text(checks[-1]), file=out, flush=True)
    if json_output:
        print(json.dumps(as_json(checks), indent=2, allow_nan=False), file=out)
    elif len(checks) > 1:
        agree = sum(check.passed for check in checks)
        print(f"{agree} of {len(checks)} files agree.", file=out)
    return exit_code(checks)
