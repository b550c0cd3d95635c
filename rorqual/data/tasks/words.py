"""Word lists and name generators the task families draw from. Nothing here is about real people or places."""

from __future__ import annotations

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONSETS = _words("b br d dr f g gr h j k kr l m n p pr r s sk t tr v w z")
_VOWELS = _words("a e i o u")
_CODAS = _words("l m n r s x nd rn th k")

JOBS = _words(
    "baker potter weaver sailor miller tailor farmer smith painter teacher doctor judge barber butcher "
    "carpenter fisher gardener hunter jeweller librarian mason nurse pilot printer roofer shepherd singer "
    "surveyor tanner translator clerk plumber"
)
INSTRUMENTS = _words(
    "violin cello flute oboe clarinet trumpet tuba harp piano organ guitar banjo lute drum fiddle mandolin "
    "viola horn bassoon accordion zither ukulele whistle cornet lyre bugle harmonica xylophone tambourine "
    "trombone recorder sitar"
)
NOUNS = _words(
    "lantern ribbon candle basket mirror hammer bucket ladder feather button pillow carpet bottle kettle "
    "saddle anchor blanket compass curtain drawer engine fountain garden helmet island jacket kitten lemon "
    "marble needle orchard pepper quilt rocket spoon ticket umbrella valley window yarn apple bridge castle "
    "dragon eagle forest glove honey insect jungle kite leaf mountain nest ocean pencil queen river stone "
    "tower urn violet wagon zebra"
)
COLOURS = _words("red blue green yellow white black brown grey pink purple orange silver")
FILLER = _words(
    "the a of to and in on at with from by for it that this was had were would could then there when while "
    "after before again always often soon later slowly quietly early late near far above below between under "
    "over road house water morning evening winter summer people children letter story market field light "
    "sound paper table door wall hand voice word year day night time place way work walk talk look keep "
    "bring carry hold leave stay turn open close small large old new long short warm cold bright dark "
    "quiet loud simple strange good plain"
)


def syllable(rng: random.Random, *, closed: float = 0.3) -> str:
    text = rng.choice(_ONSETS) + rng.choice(_VOWELS)
    return text + rng.choice(_CODAS) if rng.random() < closed else text


def invented_word(rng: random.Random, syllables: int = 2) -> str:
    """A pronounceable lower-case word that means nothing, e.g. `velmar`."""
    return "".join(syllable(rng, closed=0.15) for _ in range(syllables - 1)) + syllable(rng, closed=0.7)


def distinct_words(rng: random.Random, count: int, taken: set[str], *, syllables: int = 2, tail: str = "") -> list[str]:
    """`count` invented words not in `taken` (which they join), each with `tail` appended, capitalised."""
    found: list[str] = []
    while len(found) < count:
        word = (invented_word(rng, syllables) + tail).capitalize()
        if word not in taken:
            taken.add(word)
            found.append(word)
    return found
