"""Languages of `shapes`, and the spec that names a level and languages.

    shapes:hard              English
    shapes:easy:zh           Chinese; `ru` is Russian, `en` English
    shapes:easy:en,ru        each visit of a picture draws one of the languages
    shapes:easy:all          all languages: `en,zh,ru`
    shapes:easy?lang=zh      the same as `shapes:easy:zh`; some shells need quotes around a `?`

Scenes and pictures are the same in every language. The names that a data set has (in the cache,
in the record of a run) are `shapes:easy` for English and `shapes:easy:zh`, `shapes:easy:en,zh,ru`
and so on for others.
"""

from __future__ import annotations

from collections.abc import Callable

from lineage.data import shapes_captions_en, shapes_captions_ru, shapes_captions_zh
from lineage.data.shapes_captions import CaptionPlan, SceneWords, plan_caption
from lineage.errors import UserError, nearest

GRAMMARS: dict[str, Callable[[CaptionPlan], str]] = {
    "en": shapes_captions_en.realise,
    "zh": shapes_captions_zh.realise,
    "ru": shapes_captions_ru.realise,
}
"""Plan of a caption -> text, for each language (ISO 639-1)."""

ENGLISH = ("en",)
ALL = tuple(GRAMMARS)


def caption(scene: SceneWords, u: list[float] | None, language: str = "en") -> str:
    """One caption of a scene; `u` as in `plan_caption`."""
    return GRAMMARS[language](plan_caption(scene, u))


def parse_rest(rest: str) -> tuple[str, tuple[str, ...]]:
    """Level and languages of what follows `shapes:` or `shapes` in a spec.

    Raises:
        UserError: an option or a language is unknown, stands in the place of the level, or is named
            twice.
    """
    rest, question, options = rest.partition("?")
    level, colon, names = rest.partition(":")
    if question:
        option, _, value = options.partition("=")
        if option != "lang":
            raise UserError(f"shapes has no option {option!r}: {nearest(option, ['lang'])}")
        if colon:
            raise UserError(f"shapes:{rest}?{options} names languages twice: write shapes:{rest}.")
        names = value
    level = level or "easy"
    if level in (*GRAMMARS, "all"):
        raise UserError(
            f"shapes has no level {level!r}: write shapes:easy:{level} for the language."
        )
    return level, languages_of(names) if colon or question else ENGLISH


def languages_of(names: str) -> tuple[str, ...]:
    """`zh` or `en,ru` or `all` -> names of languages.

    Raises:
        UserError: a language is unknown or named twice.
    """
    if names == "all":
        return ALL
    languages = tuple(names.split(","))
    for name in languages:
        if name not in GRAMMARS:
            raise UserError(f"shapes has no language {name!r}: {nearest(name, ['all', *GRAMMARS])}")
    if len(set(languages)) < len(languages):
        raise UserError(f"{names!r} names a language twice: name each once.")
    return languages


def name_of(level: str, languages: tuple[str, ...]) -> str:
    """The spec of a level in these languages, always the same for the same captions."""
    return f"shapes:{level}" if languages == ENGLISH else f"shapes:{level}:{','.join(languages)}"
