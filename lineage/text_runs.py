"""`text=clip:RUN`: a run's settings are completed by what they need to know of the CLIP that they
name, so that the trained run no longer needs that folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lineage.config import RunConfig, to_dict
from lineage.errors import UserError
from lineage.plan import read_config, read_tokenizer
from lineage.pretrained import run_folder
from lineage.text.encoders import CLIP_RUN
from lineage.text.joined import JOINED, split_names
from lineage.training.cost import is_interrupted
from lineage.training.store import fingerprint

OF_ALL = {"encoder.layer", "encoder.join", "encoder.runs"}
"""Settings of the encoder that concern the text tower of another run too."""


def with_clip_runs(config: RunConfig, settings: Iterable[str] = ()) -> RunConfig:
    """`config`, with an entry in `encoder.runs` for each run of CLIP that `text` names.

    Args:
        config: The run's configuration.
        settings: Names of the settings that the user gave.

    Raises:
        UserError: there is no such run, it is of another system, or a setting has no effect.
    """
    if config.text.startswith(JOINED):
        parts = split_names(config.text, config.encoder.width)
    else:
        parts = [(config.text, config.encoder.width)]
    names = [name for name, _ in parts]
    runs = [name.removeprefix(CLIP_RUN) for name in names if name.startswith(CLIP_RUN)]
    idle = [name for name in settings if name.startswith("encoder.") and name not in OF_ALL]
    if idle and len(runs) == len(names):
        raise UserError(
            f"{idle[0]} has no effect with text={config.text}: the sizes are those of that run."
        )
    known = dict(config.encoder.runs)
    for run in runs:
        if run not in known:
            known[run] = _description(run)
        own = known[run]["encoder"]["width"]
        if f"{CLIP_RUN}{run}@" in config.text and (f"{CLIP_RUN}{run}", own) not in parts:
            raise UserError(
                f"text={config.text}: {CLIP_RUN}{run} has the width {own} of that run; leave out "
                "its @."
            )
    if known == config.encoder.runs:
        return config
    return replace(config, encoder=replace(config.encoder, runs=known))


def _description(run: str) -> dict[str, Any]:
    """Name, sizes and tokeniser of a run's text tower, and where its weights lie."""
    folder = run_folder(run, "text=clip:RUN")
    config: Any = read_config(folder)
    if config.key != "clip":
        raise UserError(
            f"text={CLIP_RUN}{run} names a run of {config.key}: name one of clip, which "
            "`lineage train clip` makes."
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{run} has no weights yet: go on with it first (--resume).")
    if is_interrupted(folder, "clip"):
        raise UserError(
            f"{run} is not finished, and its tower would change: go on with it first (--resume)."
        )
    sizes = replace(config.encoder, projection_dim=config.model.projection_dim)
    return {
        "text": config.text,
        "encoder": to_dict(sizes.without_files()),
        "tokenizer": read_tokenizer(folder).to_json(),
        "weights": str(weights.resolve()),
        "hash": fingerprint(weights.read_bytes()),
    }
