"""Types with bounds, for the fields of configurations and for options: `num_codes: Dim = 64`.

Text from the command line, such as "64" or "1e3", is read as a number.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def _number(value: Any) -> Any:
    """`1e3` and 1000.0 are whole numbers too; true and false are no numbers."""
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?[eE][+-]?\d+\s*", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def is_number(text: str) -> bool:
    """Whether text is written as a number, such as 64, -1, 2.5 or 1e3, and not as a name."""
    return re.fullmatch(r"\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*", text) is not None


def _listed(value: Any) -> Any:
    """`1,2,3`, `(1, 2, 3)` or `["a", "b"]` on the command line."""
    if isinstance(value, str):
        parts = value.strip("()[] ").split(",")
        return [part.strip("\"' ") for part in parts if part.strip()]
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number), Field(ge=-1e38, le=1e38)]
"""What float32 holds."""
PositiveInt = Annotated[Int, Field(ge=1, le=10**9)]
NonNegativeInt = Annotated[Int, Field(ge=0, le=10**9)]
NUM_SEEDS = 2**63
Seed = Annotated[Int, Field(ge=0, le=NUM_SEEDS - 1)]
Steps = Annotated[Int, Field(ge=1, le=10**12)]
"""A budget in steps or pictures."""
Minutes = Annotated[Float, Field(gt=0, le=10**7)]
"""A budget in minutes."""
Threads = Annotated[Int, Field(ge=1, le=256)]
"""Number of threads of PyTorch on a CPU."""
Port = Annotated[Int, Field(ge=0, le=65_535)]
"""Port of a server; 0 is any that is free."""
SheetCount = Annotated[Int, Field(ge=1, le=10_000)]
"""Number of pictures that one sheet can hold."""
Side = Annotated[Int, Field(ge=4, le=1024)]
"""Side of the pictures in pixels."""
Dim = Annotated[Int, Field(ge=1, le=2**16)]
"""Size of one axis of a tensor: a width, a number of channels, a length."""
DimFromZero = Annotated[Int, Field(ge=0, le=2**16)]
Depth = Annotated[Int, Field(ge=1, le=128)]
"""Number of layers, blocks or attention heads."""
DepthFromZero = Annotated[Int, Field(ge=0, le=128)]
Halvings = Annotated[Int, Field(ge=1, le=10)]
"""Number of layers that each halve the side of a picture."""
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
"""From 0 to below 1, such as a dropout rate or the decay of an average."""
Share = Annotated[Float, Field(gt=0, lt=1)]
"""Between 0 and 1, such as a stage's share of the budget."""
Listed = BeforeValidator(_listed)
"""Reads text such as 1,2,3 as a list."""
Ints = Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed)]
Multipliers = Annotated[
    tuple[Annotated[Int, Field(ge=1, le=64)], ...],
    BeforeValidator(_listed),
    Field(min_length=1, max_length=10),
]
"""Factors on a number of channels, one for each level."""
IntsFromZero = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_listed)]
Floats = Annotated[tuple[Float, ...], BeforeValidator(_listed)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
