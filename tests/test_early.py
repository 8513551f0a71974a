"""What flags, headers and folders can refuse is refused before torch and the libraries on it are waited for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from tests.quick_training import QUICK

ROOT = Path(__file__).parents[1]
# Runs every command line of a list in one process, and tells of each its status, its words and what it has imported.
PROGRAM = """
import contextlib, io, json, sys
from comcat_diffusion.cli import main
told = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main(arguments)
        except SystemExit as stopped:
            status = stopped.code
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "starlette"} & set(sys.modules)
    told.append([status, said.getvalue(), sorted(heavy)])
print(json.dumps(told))
"""


def told(*commands, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([list(map(str, command)) for command in commands]),
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A file of every kind, and the folder of a run."""
    folder, files = tmp_path_factory.mktemp("adapters"), {}
    kinds = {
        "tied": {},
        "free": {"kind": "free", "everywhere": True},
        "foldable": {"kind": "foldable", "everywhere": True},
    }
    for name, kind in kinds.items():
        settings = {"output_dir": str(folder / name), "max_train_steps": 1, "skip_final_inference": True, **QUICK}
        files[name] = customize(TrainConfig(**settings, **kind)).adapter
    return files


@pytest.mark.slow
def test_a_refusal_waits_for_nothing_that_it_does_not_need(adapters, tmp_path):
    tied, free, foldable = (adapters[name] for name in ("tied", "free", "foldable"))
    out, prompt = tmp_path / "out.safetensors", ["--prompt", "sks teddy"]
    pictures = ROOT / "assets" / "subject" / "train"
    (tmp_path / "empty").mkdir()
    expected = {
        ("generate", "--adapter", "README.md", *prompt): "is not a safetensors file",
        ("generate", "--adapter", "nope.safetensors", *prompt): "no adapter file",
        ("generate", "--adapter", tied): "--prompt is missing",
        ("generate", "--adapter", tied, "--prompt", "a dog"): "does not name the subject",
        ("generate", "--adapter", tied, *prompt, "--merge"): "acts from its trigger on",
        ("generate", "--adapter", tied, *prompt, "--lora", "nope.safetensors"): "no such .safetensors file",
        ("generate", "--adapter", tied, *prompt, "--region", "cat=x.png"): "there is no adapter 'cat'",
        ("generate", "--adapter", tied, *prompt, "--region", f"{tied.stem}=x.png"): "cannot be read as a picture",
        ("generate", "--adapter", tied, *prompt, "--pretrained_model_name_or_path", "nowhere"): "no base at 'nowhere'",
        ("generate", "--adapter", tied, *prompt, "--output_dir", "README.md/x"): "--output_dir",
        ("export", "--adapter", tied, "--output", out): "acts from 'sks' on",
        ("export", "--adapter", free, "--output", out): "is a free adapter",
        ("export", "--adapter", foldable, "--output", out, "--approximate"): "is foldable already",
        ("merge", "--adapter", free, "--output_dir", tmp_path / "merged"): "is a free adapter",
        ("merge", "--adapter", foldable, "--output_dir", "docs"): "holds something already",
        ("combine", "--adapter", free, foldable, "--output", out): "are of different kinds, free and foldable",
        ("combine", "--adapter", tied, free, "--output", out): "and they cannot be one file",
        ("combine", "--adapter", f"{free}:0", "--output", out): "must be a finite number other than zero",
        ("shrink", "--adapter", "README.md", "--output", out, "--max_bytes", 9): "is not a safetensors file",
        ("train", "nowhere", "sks dog"): "There is no folder nowhere.",
        ("train", tmp_path / "empty", "sks dog"): "There are no pictures",
        ("train", "--output_dir", tied.parent): "is there already",
        ("train", pictures, "sks dog", "--pretrained_model_name_or_path", "nowhere"): "no base at 'nowhere'",
        ("train", "--init_adapter", free, "--rank", 3): "stays what it is",
        ("validate", "nowhere", "sks dog"): "There is no folder nowhere.",
        ("evaluate", "--adapter", tied, "--subject_dir", "nowhere"): "There is no folder nowhere.",
        ("evaluate", "--adapter", tied, "--subject_dir", pictures): "are training pictures",
        (
            "evaluate",
            "--adapter",
            tied,
            "--subject_dir",
            pictures,
            "--prompts",
            "nope.txt",
        ): "there is no file nope.txt",
        ("evaluate", "--run_dir", "nowhere", "--subject_dir", pictures): "there is no folder nowhere",
        ("compress", "--model", "embedded", "--part", "unet-attention", "--output_dir", "docs"): "holds something",
        ("compress", "--model", "a/b", "--train_dir", "nowhere"): "--train_dir nowhere is no folder",
        ("compress", "--model", "nowhere", "--part", "unet-attention"): "no base at 'nowhere'",
        ("bench", "--pretrained_model_name_or_path", "nowhere"): "no base at 'nowhere'",
        ("push", "--adapter", "README.md", "--repo_id", "me/x"): "is not a safetensors file",
        ("push", "--adapter", tied, "--repo_id", "me x"): "Repo id must",
        ("push", "--adapter", tied, "--repo_id", "me/x", "--lora"): "acts from 'sks' on",
        ("push", "--adapter", tied, "--repo_id", "me/x", "--sheet", "README.md"): "cannot be read as a picture",
        ("pull", "--repo_id", "me x"): "Repo id must",
        ("import", "--weights", "no.pt", "--output", out, "--pretrained_model_name_or_path", "a/b"): "no file no.pt",
        ("ui", "--port", 0): "--port must be 1 to 65535",
    }
    for command, (status, said, heavy) in zip(expected, told(*expected), strict=True):
        assert (status, heavy) == (2, []) and expected[command] in said, (command, status, said, heavy)
    assert not out.exists() and not (tmp_path / "merged").exists()
