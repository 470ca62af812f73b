"""Captions of the small world: a description to a caption, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from l2p_export.world.scenes import BACKGROUNDS, COLOURS, SHAPES, Description, Thing
from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

PHRASES: Mapping[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""Relation to its phrases, the plain one first."""

_PLAIN = 0.7
"""Probability of the plain wording; the random wordings include it too."""

_SPEAKS_OF = {phrase: relation for relation, phrases in PHRASES.items() for phrase in phrases}
_THING = rf"(?:(?:a|an|the|one) )?(?P<colour{{0}}>{'|'.join(COLOURS)}) (?P<shape{{0}}>{'|'.join(SHAPES)})"
_RELATION = "|".join(sorted(_SPEAKS_OF, key=len, reverse=True))
_CAPTION = re.compile(
    rf"{_THING.format(1)}(?: (?:is )?(?P<relation>{_RELATION}) {_THING.format(2)})?"
    rf"(?:,? (?:on|against) (?:(?:a|the) )?(?P<background>{'|'.join(BACKGROUNDS)}|gray) background)?"
)


def caption(description: Description, random: np.random.Generator | None = None) -> str:
    """Write the caption of a description: in the plain wording, or with `random` sometimes in another.

    >>> caption(Description((Thing("red", "circle"), Thing("blue", "square")), "left"))
    'a red circle to the left of a blue square'
    """
    article, phrase = "a ", 0
    if random is not None and random.random() >= _PLAIN:
        article = ("a ", "")[random.integers(2)]
        phrase = int(random.integers(2))
    words = f"{article}{description.things[0].colour} {description.things[0].shape}"
    if description.relation is not None:
        second = description.things[1]
        words += f" {PHRASES[description.relation][phrase]} {article}{second.colour} {second.shape}"
    if description.background is not None:
        words += f" on a {description.background} background"
    return words


def describe(text: str) -> Description:
    """Parse a caption of the small world, in any case and spacing.

    Raises:
        UsageError: it names something that the small world does not have, or the same thing twice.
    """
    words = re.sub(r"\s+", " ", text).strip().rstrip(".").lower()
    found = _CAPTION.fullmatch(words)
    if found is None:
        raise UsageError(
            f"the caption {text[:200]!r} is none of the small world",
            hint=f"say `a COLOUR SHAPE`, or `a COLOUR SHAPE RELATION a COLOUR SHAPE`, and after it, if you like, `on a "
            f"BACKGROUND background`; colours are {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; relations "
            f"{', '.join(_SPEAKS_OF)}; backgrounds {', '.join(BACKGROUNDS)}",
        )
    things: tuple[Thing, ...] = (Thing(found["colour1"], found["shape1"]),)
    relation = None
    if found["relation"] is not None:
        things += (Thing(found["colour2"], found["shape2"]),)
        relation = _SPEAKS_OF[found["relation"]]
    if len(set(things)) < len(things):
        raise UsageError(f"the caption {text[:200]!r} names one thing twice", hint="name two different things")
    background = found["background"]
    return Description(things, relation, "grey" if background == "gray" else background)
