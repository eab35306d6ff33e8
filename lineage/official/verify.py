"""`lineage verify`: compare our classes with numbers that the official code computed.

A reference file is a safetensors file of

    state/<key> or state/<network>/<key>    weights of the official network, under its own names
    input/<name>                            its inputs, every random draw included
    output/<name>                           its outputs
    check/<name>                            excerpts by which a recomputed input can be checked

with, as metadata, `source` (the official code), `config` (JSON) and optionally `system`, `paper`,
`note`, `seed` and `tensors` (JSON: a sentence about each tensor). A `Verifier` builds our class
from the config, loads the state strictly and computes the outputs that the file holds, each alone,
so that one that cannot run fails alone; this file reads, compares and prints.

The error of an output is max|ours - reference| / max|reference| over the whole tensor; `tolerance`
holds the rules for how large it may be.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TextIO, TypeVar

import torch
from torch import Tensor

from lineage.characters import plain
from lineage.errors import UserError
from lineage.official.reference import Reference, first_line, read_reference
from lineage.threads import use_free_threads

# ---------------------------------------------------------------------------------- verifiers

M = TypeVar("M", bound=Callable[..., Any])


class NotComputed(Exception):
    """Raised by a verifier for an output that it cannot compute; the text says why."""


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    method: str
    grad: bool


def output(*patterns: str, grad: bool = False) -> Callable[[M], M]:
    """Mark a method of a `Verifier` as the one that computes some outputs.

    Args:
        patterns: Regular expressions of the outputs' names (full match); their groups are passed to
            the method as strings.
        grad: If true, the method runs with gradients.
    """

    def mark(method: M) -> M:
        method.outputs = (patterns, grad)  # type: ignore[attr-defined]
        return method

    return mark


class Verifier:
    """Computes the outputs of one official system with our classes.

    A subclass names the system, states words that all stand in the `source` of its files, and has a
    method marked with `@output` for each kind of output. Shared pieces are cached properties, so
    that only what the file asks for is built.

    Attributes:
        name: Name of the system.
        source: Words that identify the official code.
        config, inputs, outputs, state: Parts of the reference file.
    """

    name: ClassVar[str]
    source: ClassVar[tuple[str, ...]]
    _rules: ClassVar[list[_Rule]]

    def __init_subclass__(cls) -> None:
        cls._rules = [
            _Rule(re.compile(pattern), name, marked[1])
            for name in dir(cls)
            if (marked := getattr(getattr(cls, name, None), "outputs", None)) is not None
            and isinstance(marked, tuple)
            for pattern in marked[0]
        ]

    def __init__(self, reference: Reference) -> None:
        self.reference, self.config = reference, reference.config
        self.inputs, self.outputs, self.state = reference.inputs, reference.outputs, reference.state

    def compute(self, name: str) -> Tensor | float:
        """Output `name`, as our classes compute it.

        Raises:
            NotComputed: no method computes it.
        """
        for rule in self._rules:
            if match := rule.pattern.fullmatch(name):
                with torch.set_grad_enabled(rule.grad):
                    value: Tensor | float = getattr(self, rule.method)(*match.groups())
                return value
        raise NotComputed("no class here computes it")


@cache
def verifiers() -> Mapping[str, type[Verifier]]:
    """All verifiers by name, found in the modules of `lineage.official`."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"lineage.official.{module.name}")
    return {one.name: one for one in Verifier.__subclasses__() if hasattr(one, "name")}


def identify(metadata: Mapping[str, str]) -> str | None:
    """Name of the verifier for a file: its `system`, or else the longest fit of its `source`."""
    known = verifiers()
    if metadata.get("system") in known:
        return metadata["system"]
    source = metadata["source"].casefold()
    fits = {
        name: sum(map(len, one.source))
        for name, one in known.items()
        if all(word.casefold() in source for word in one.source)
    }
    return max(fits, key=lambda name: fits[name]) if fits else None


# ---------------------------------------------------------------------------------- tolerance


@dataclass(frozen=True)
class Tolerance:
    """Largest error of an output; `kind` is relative, absolute or exact.

    Attributes:
        floor: Absolute error that a relative tolerance always allows.
    """

    limit: float
    kind: str = "relative"
    floor: float = 0.0

    def __str__(self) -> str:
        if self.kind == "exact":
            return "exact"
        return f"{self.limit:.0e} {self.kind[:3]}" + (f", {self.floor:.0e} abs" * (self.floor > 0))

    def allows(self, absolute: float, relative: float) -> bool:
        """Whether errors are within the tolerance."""
        if self.kind == "absolute":
            return absolute <= self.limit
        return relative <= self.limit or absolute <= self.floor


FORWARD = 2e-5  # one forward pass, eval mode
TRAIN = 2e-4  # one forward pass with batch statistics
CHAINED = 1e-4  # sampler trajectories, chained passes, losses, small*, networks of full size
DOUBLE = 1e-9  # tables in float64
NEAR_ZERO = 1e-6  # absolute, for VLB and prior terms near zero
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
    """Tolerance of output `name` with the value `tensor`; the first rule that fits holds.

    1. integers and booleans                                       exact
    2. a tolerance stated in the file's sentence about the tensor  that, relative
    3. zero up to rounding                                         1e-6, absolute
    4. VLB and prior terms, differences of nearly equal numbers    1e-4, or 1e-6 absolute
    5. float64                                                     1e-9
    6. networks at full size (`paper_size`)                        1e-4
    7. a name that says `train`, a sentence that says train mode   2e-4
    8. trajectories, losses, chained passes, names in `small…`     1e-4
    9. anything else, which is one forward pass in eval mode       2e-5
    """
    if not tensor.is_floating_point():
        return Tolerance(0.0, "exact")
    sentence = str(reference.sentences.get(f"output/{name}", ""))
    words = set(re.split(r"[/_.\-]", name.casefold()))
    largest = _largest(tensor)
    if stated := _SENTENCE_TOLERANCE.search(sentence):
        return Tolerance(float(stated[1]))
    if largest <= ROUNDING:
        return Tolerance(NEAR_ZERO, "absolute")
    if words & _BOUND_WORDS:
        return Tolerance(CHAINED, floor=NEAR_ZERO)
    if tensor.dtype == torch.float64:
        return Tolerance(DOUBLE)
    if identify(reference.metadata) == "paper_size":
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
        path: Path of the file.
        system: Name of its verifier, if there is one.
        covered: Whether there is a verifier.
        outputs: Every output of the file by name; empty if it is not covered.
        note: A sentence about the file as a whole, or nothing.
    """

    path: str
    system: str | None
    covered: bool
    outputs: tuple[OutputCheck, ...] = ()
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.covered and bool(self.outputs) and all(c.passed for c in self.outputs)


def compare(name: str, ours: Any, theirs: Tensor, allowed: Tolerance) -> OutputCheck:
    """Compare our value with the reference; nothing that is wrong with ours raises."""

    def failed(reason: str) -> OutputCheck:
        return OutputCheck(name, tuple(theirs.shape), allowed, passed=False, reason=reason)

    if not isinstance(ours, Tensor):
        try:
            ours = torch.as_tensor(ours, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return failed(f"is a {type(ours).__name__}, not a tensor")
    ours = ours.detach().cpu()
    if ours.shape != theirs.shape:
        return failed(f"wrong shape: ours is {_shape(ours.shape)}")
    if ours.is_complex():
        return failed("is complex")
    return _measure(name, ours, theirs, allowed)


def _measure(name: str, ours: Tensor, theirs: Tensor, allowed: Tolerance) -> OutputCheck:
    """Compare two tensors of one shape."""
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
        passed = allowed.allows(absolute, relative)
        reason = "" if passed else "error above the tolerance"
    return OutputCheck(name, tuple(theirs.shape), allowed, passed, absolute, relative, reason)


def _fault(error: Exception) -> str:
    """An exception in a few words, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def check_reference(reference: Reference) -> FileCheck:
    """Compute and compare every output of a reference file."""
    path, system = str(reference.path), identify(reference.metadata)
    if system is None:
        note = f"Not covered yet: no class here is known by the source {reference.source!r}."
        return FileCheck(path, None, covered=False, note=note)
    verifier = verifiers()[system](reference)
    checks = tuple(
        _check_output(verifier, name, theirs) for name, theirs in sorted(reference.outputs.items())
    )
    return FileCheck(path, system, covered=True, outputs=checks)


@use_free_threads()
def _check_output(verifier: Verifier, name: str, theirs: Tensor) -> OutputCheck:
    """Compute and compare one output; a defect in it is that output's failure alone."""
    allowed = tolerance(verifier.reference, name, theirs)
    try:
        ours = verifier.compute(name)
    except NotComputed as error:
        reason = f"not computed: {error}"
    except Exception as error:
        reason = _fault(error)
    else:
        return compare(name, ours, theirs, allowed)
    return OutputCheck(name, tuple(theirs.shape), allowed, passed=False, reason=reason)


def verify(paths: Iterable[str | Path]) -> list[FileCheck]:
    """Verify reference files.

    Raises:
        UserError: for no file, or one that cannot be read, before anything is computed.
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
        return "\n".join(map(plain, lines))
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
    return "\n".join(map(plain, lines))


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
    """Verify, print file by file (or one JSON document), and return the exit code.

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
