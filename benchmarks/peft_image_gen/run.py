"""COMCAT in PEFT's own image-generation benchmark, by PEFT's own code, on a machine that has its base and its pictures.

    python -m benchmarks.peft_image_gen.run PEFT/method_comparison/image-gen tied-rank1 -v

The folder is of a checkout of PEFT; what comes behind the experiment goes to its run.py. What is added: the method is
made known to PEFT, and the pipeline listens to its prompts, so that the adapter knows its trigger. README.md, beside
this file, says what is measured and what we expect.
"""

import functools
import importlib
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from comcat_diffusion import listen

OWN = Path(__file__).parent / "experiments"


def listening(get_pipeline: Callable[..., object]) -> Callable[..., object]:
    """What loads the benchmark's pipeline, with its adapter already, and lets it listen to prompts."""

    @functools.wraps(get_pipeline)
    def get(*args: object, **kwargs: object) -> object:
        pipe = get_pipeline(*args, **kwargs)
        listen(pipe)
        return pipe

    return get


def main(folder: str, experiment: str, more: Sequence[str]) -> None:
    """Run one of our experiments in the benchmark's folder. Raises ValueError if one of the two is not there."""
    there, own = Path(folder).expanduser().resolve(), OWN / experiment
    if not (there / "run.py").is_file():
        raise ValueError(f"{folder} holds no run.py: name method_comparison/image-gen of a checkout of PEFT.")
    if not own.is_dir():
        raise ValueError(
            f"There is no experiment '{experiment}', but {', '.join(sorted(p.name for p in OWN.iterdir()))}."
        )
    path = Path("experiments") / "comcat" / f"flux2-klein-{experiment}"  # a form that it insists on
    shutil.copytree(own, there / path, dirs_exist_ok=True)
    os.chdir(there)
    sys.path.insert(0, str(there))
    utils = importlib.import_module("utils")
    utils.get_pipeline = listening(utils.get_pipeline)
    sys.argv = ["run.py", *more, str(path)]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(f"usage: python -m benchmarks.peft_image_gen.run FOLDER EXPERIMENT ...\n\n{__doc__}")
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except ValueError as error:
        raise SystemExit(f"peft_image_gen: {error}") from error
