"""What `vqvae`, `dalle` and `vqgan` share: a codec, the codes of the data, and their prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from lineage.config import OptimConfig, RunConfig, at_least, from_dict, to_dict
from lineage.errors import UserError
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage, content
from lineage.training.store import fingerprint, load_tensors, read_json
from lineage.vqvae.ar_prior import Prior, PriorConfig
from lineage.vqvae.codec import Codec, Codes
from lineage.vqvae.transformer import TransformerConfig

CODEC, CODES, PRIOR = "codec", "codes", "prior"

# One prior for the three at each preset, so that comparing them compares their codecs.
SMOKE_PRIOR = PriorConfig(TransformerConfig(16, 2, 2), places=8)
TINY_PRIOR = PriorConfig(
    TransformerConfig(128, 5, 4, "exact"), places=16, temperature=0.5, guidance=2.0
)
SMALL_PRIOR = PriorConfig(TransformerConfig(384, 8, 6), places=32, temperature=0.9, guidance=2.0)

C = TypeVar("C", bound="CodesConfig")


@dataclass(frozen=True)
class CodesConfig(RunConfig):
    """A run of a codec and its prior. Recipes add `codec`, the codec's configuration.

    Attributes:
        codec_from: a run folder whose codec is taken as it is, in place of training one; setting it
            sets `codec` too.
        codec_share: of the budget, for the codec.
        codec_optim, codec_batch: how it is trained.
        kept: pictures whose codes are kept between the two.
        model: the prior.
    """

    codec_from: str = ""
    codec_share: float = 0.3
    codec_optim: OptimConfig = field(default_factory=OptimConfig)
    codec_batch: int = 32
    kept: int = 8192
    model: PriorConfig = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.codec_share < 1:
            raise UserError(f"codec_share={self.codec_share} must be between 0 and 1.")
        for name in ("codec_batch", "kept"):
            at_least(name, getattr(self, name), 1)

    def with_codec_from(self: C, folder: str) -> C:
        """The same run on the codec of the run in `folder`."""
        if not folder:
            return replace(self, codec_from="")
        saved = read_json(Path(folder) / "config.json")
        if not isinstance(saved, dict) or saved.get("key") != self.key:
            raise UserError(f"{folder} holds no run of {self.key}, so no codec for one.")
        if not isinstance(saved.get("codec"), dict):
            raise UserError(f"{folder} has a config.json without a codec.")
        codec = from_dict(get_type_hints(type(self))["codec"], saved["codec"])
        changed = {"codec_from": folder, "codec": codec}
        return replace(self, **changed)

    def without_files(self: C) -> C:
        return replace(self, codec_from="")


def codec_stages(
    config: CodesConfig, tokenizer: Tokenizer, build: Callable[[], Codec]
) -> list[Stage]:
    """`codec`, `codes`, `prior`; without the first if the codec is there already.

    The codes are found in one look at `kept` pictures.
    """
    factor = config.codec.factor  # type: ignore[attr-defined]
    if config.size % factor:  # here, so that size and codec may be set in any order
        raise UserError(
            f"size={config.size} does not divide into places of {factor} pixels: choose a "
            "multiple of it."
        )
    settings: dict[str, Any] = to_dict(config)
    train = replace(config.train, batch=config.codec_batch, sample_every=0)
    look = replace(train, minutes=None, steps=None, pictures=config.kept, batch=64)
    given = Path(config.codec_from) / "model.safetensors" if config.codec_from else None
    known = {} if given is None else {"codec": settings["codec"], "codec_from": file_print(given)}
    codec = Stage(
        name=CODEC,
        build=lambda made: build(),
        optim=config.codec_optim,
        train=train,
        settings={"codec": settings["codec"]},
        share=config.codec_share,
    )
    codes = Stage(
        name=CODES,
        build=lambda made: Codes(
            cast(Codec, made[CODEC]) if given is None else taken(build(), given),
            config.size,
            config.kept,
        ),
        optim=replace(config.codec_optim, average=0.0),
        train=look,
        settings={"kept": config.kept, **known},
        needs=(CODEC,) if given is None else (),
        share=0.0,
    )
    prior = Stage(
        name=PRIOR,
        build=lambda made: Prior(
            config.model,
            cast(Codes, made[CODES]),
            make_encoder(config.text, config.encoder, tokenizer),
            config.size,
        ),
        optim=config.optim,
        train=config.train,
        settings=content(config),
        needs=(CODES,),
        share=1 - config.codec_share if given is None else 1.0,
    )
    return [codec, codes, prior] if given is None else [codes, prior]


def file_print(path: Path) -> str:
    """What identifies a file's content. Raises `UserError` if there is none."""
    try:
        return fingerprint(path.read_bytes())
    except OSError as error:
        raise UserError(f"codec_from: there is no {path}; name a trained run.") from error


def taken(codec: Codec, path: Path) -> Codec:
    """The codec with the weights that it has in a run's file."""
    state = load_tensors(path)
    own = {k.removeprefix("codec."): v for k, v in state.items() if k.startswith("codec.")}
    wanted = codec.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in wanted.items()}:
        raise UserError(f"{path} holds no codec of the sizes in `codec`.")
    if not next(codec.parameters()).is_meta:  # else only to see whether it can be built
        codec.load_state_dict(own)
    return codec
