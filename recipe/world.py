"""What exists in the embedded base's world, and how it is said in words.

A scene is one object (sometimes two) of a named size, at a named place, on a background of a named colour. Because
every attribute is named in the caption and visible in the pixels, what the base has learned can be measured exactly.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

PIXELS = 64

# The name in captions -> the Unicode character whose Noto glyph is drawn.
OBJECTS = {
    "cat": "\U0001f431", "dog": "\U0001f436", "fox": "\U0001f98a", "panda": "\U0001f43c",
    "frog": "\U0001f438", "owl": "\U0001f989", "teddy": "\U0001f9f8", "robot": "\U0001f916",
    "fish": "\U0001f420", "turtle": "\U0001f422", "duck": "\U0001f986", "apple": "\U0001f34e",
    "banana": "\U0001f34c", "strawberry": "\U0001f353", "mushroom": "\U0001f344", "cactus": "\U0001f335",
    "sunflower": "\U0001f33b", "car": "\U0001f697", "boat": "\u26f5", "balloon": "\U0001f388",
    "ball": "\u26bd", "crown": "\U0001f451", "teapot": "\U0001fad6", "house": "\U0001f3e0",
}  # fmt: skip

BACKGROUNDS = {
    "white": (245, 245, 240), "gray": (150, 150, 155), "black": (30, 30, 34), "red": (205, 60, 60),
    "yellow": (245, 215, 90), "green": (90, 175, 95), "blue": (80, 130, 215), "pink": (245, 165, 195),
}  # fmt: skip

TINTS = {
    "red": (215, 45, 45), "orange": (245, 140, 40), "yellow": (240, 205, 60),
    "green": (60, 165, 80), "blue": (60, 110, 220), "violet": (140, 80, 200),
}  # fmt: skip

PLACES = {
    "left": "on the left", "right": "on the right", "top": "at the top",
    "bottom": "at the bottom", "middle": "in the middle",
}  # fmt: skip

SIZES = {"small": 26, "big": 40}  # longest side in pixels
PAIR_SIZE = 28

# Words without a meaning of their own, free to become somebody's trigger. The base sees them now and then in front of
# an object, so that "sks teddy" is a teddy before anyone has trained on it.
RARE_WORDS = ("sks", "ohwx", "zwx", "xjq", "vkp", "qrt")


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its name, its tint (None: the glyph's own colours), its place and its size in words."""

    name: str
    tint: str | None
    place: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One or two things on a background of a named colour."""

    things: tuple[Thing, ...]
    background: str

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from every training stage (one single-object scene in twenty)."""
        if len(self.things) > 1:
            return False
        digest = hashlib.sha256(repr((self.things, self.background)).encode()).digest()
        return digest[0] % 20 == 0


def random_scene(rng: random.Random, contrast: Callable[[str, str | None, str], bool]) -> Scene:
    """Draw a scene; `contrast(name, tint, background) -> bool` rejects objects that melt into the background."""
    background = rng.choice(list(BACKGROUNDS))
    names = list(OBJECTS)
    places = rng.choice((("left", "right"), ("top", "bottom"))) if rng.random() < 0.12 else (rng.choice(list(PLACES)),)
    things = []
    while len(things) < len(places):
        name, tint = rng.choice(names), rng.choice(list(TINTS)) if rng.random() < 0.3 else None
        if tint != background and contrast(name, tint, background):
            size = rng.choice(list(SIZES))
            things.append(Thing(name, tint, places[len(things)], size))
    return Scene(tuple(things), background)


def _noun(thing: Thing, rng: random.Random, with_size: bool) -> str:
    words = [thing.size] if with_size else []
    if thing.tint:
        words.append(thing.tint)
    if rng.random() < 0.1:
        words.append(rng.choice(RARE_WORDS))
    words.append(thing.name)
    phrase = " ".join(words)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """Describe the scene in words; unless `complete`, each attribute but the object is sometimes left unsaid."""
    single = len(scene.things) == 1

    def said(probability: float) -> bool:
        return complete or rng.random() < probability

    phrases = []
    for thing in scene.things:
        phrase = _noun(thing, rng, with_size=single and said(0.75))
        phrases.append(f"{phrase} {PLACES[thing.place]}" if said(0.8) else phrase)
    text = " and ".join(phrases)
    if rng.random() < 0.5:
        text = "a photo of " + text
    if said(0.85):
        text += rng.choice((f", {scene.background} background", f" on a {scene.background} background"))
    return text


def prompt(scene: Scene) -> str:
    """The one fixed wording that scores are measured with."""
    thing = scene.things[0]
    noun = " ".join(filter(None, (thing.size, thing.tint, thing.name)))
    article = "an" if noun[0] in "aeiou" else "a"
    return f"a photo of {article} {noun} {PLACES[thing.place]}, {scene.background} background"
