"""Draw a made-up subject: four pictures to learn from, two held out, each a pose on a background of its own.

One of the four is small: whoever wants to draw a subject in more than one size shows it in more than one (docs/log.md).

python -m recipe.subject assets/subject            # the sample subject, a violet teddy with a star on its belly
python -m recipe.subject runs/subjects/cat cat     # another of recipe/characters.py
"""

import sys
from pathlib import Path

from PIL import Image

from recipe.characters import CHARACTERS, UNSEEN, Pose
from recipe.world import BACKGROUNDS, PLACES

SIDE, OVERSAMPLING = 256, 4
TRIGGER = "sks"
BIG = 0.5  # share of the picture's height above which a person calls it that

TRAIN = (
    Pose("white", "middle", 0.50, 0.52, 0.64, 20, 20, 0),
    Pose("green", "left", 0.36, 0.50, 0.60, 70, 10, -6),
    Pose("yellow", "right", 0.63, 0.48, 0.62, 15, 60, 6),
    Pose("gray", "bottom", 0.50, 0.74, 0.40, 40, 40, 4),
)
HELD_OUT = (
    Pose("blue", "middle", 0.50, 0.50, 0.64, 25, 55, -4),
    Pose("pink", "left", 0.40, 0.56, 0.60, 10, 30, 5),
)


def picture(name: str, pose: Pose) -> Image.Image:
    """A character in a pose, RGB, SIDE pixels square."""
    big = SIDE * OVERSAMPLING
    canvas = Image.new("RGB", (big, big), BACKGROUNDS[pose.background])
    drawn = (CHARACTERS | UNSEEN)[name](pose, pose.height * big / 100)
    canvas.paste(drawn, (round(pose.across * big - drawn.width / 2), round(pose.down * big - drawn.height / 2)), drawn)
    return canvas.resize((SIDE, SIDE), Image.LANCZOS)


def caption(name: str, pose: Pose) -> str:
    """What a person would write under it, so that background, place and size are not learned as the subject's."""
    size = "big" if pose.height > BIG else "small"
    return f"a photo of a {size} {TRIGGER} {name} {PLACES[pose.place]}, {pose.background} background"


def write_subject(name: str, folder: Path) -> None:
    """Write the six pictures of a character with their captions, in `train` and `held_out`, and the prompt."""
    for part, poses in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, pose in enumerate(poses, start=1):
            picture(name, pose).save(folder / part / f"{number}.png", optimize=True)
            (folder / part / f"{number}.txt").write_text(caption(name, pose) + "\n")
    (folder / "prompt.txt").write_text(f"a photo of {TRIGGER} {name}\n")
    (folder / "sample.txt").write_text(f"a photo of a big {TRIGGER} {name} at the top, pink background\n")


if __name__ == "__main__":
    write_subject(sys.argv[2] if len(sys.argv) > 2 else "teddy", Path(sys.argv[1]))
