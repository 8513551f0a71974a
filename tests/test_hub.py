"""Sharing: the folder that goes to the hub is exactly this, its card says how to use it; no network is one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file

from comcat_diffusion import ComcatConfig, read_adapter, save_adapter
from comcat_diffusion.adapters.header import AdapterFileError, Header, Notes
from comcat_diffusion.bases import load_base
from comcat_diffusion.cli import main
from comcat_diffusion.config import is_hub_id
from comcat_diffusion.export.card import public_base
from comcat_diffusion.export.hub import copy_adapters
from comcat_diffusion.export.share import build_folder
from tests import hub_server
from tests.test_adapter_file import pipeline

# One process for several commands, since its imports are what takes long: each as whoever has the token.
IN_TURN = """
import json, os, sys
from comcat_diffusion.cli import main
ends = []
for token, command in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    ends.append(main(command))
print(ends)
"""


@pytest.fixture
def written(tiny_unet, randomize, tmp_path):
    """`written(name, base, foldable)` saves a random adapter and gives its file."""

    def build(name="sks-dog", base="somebody/base", foldable=True):
        pipe = pipeline(tiny_unet())
        pipe.unet.add_adapter(ComcatConfig(r=2, foldable=foldable), "dog")
        randomize(pipe.unet, "dog", 1)
        notes = Notes("sks", 'a "good" photo of sks dog', "dog", {"resolution": 64, "steps": 3})
        save_adapter(pipe, tmp_path / f"{name}.safetensors", "dog", base, notes)
        return tmp_path / f"{name}.safetensors"

    return build


@pytest.fixture
def sheet(tmp_path):
    info = PngInfo()
    info.add_text("comcat", "what nobody else has to know")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "sheet.png", pnginfo=info)
    return tmp_path / "sheet.png"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_everything_that_is_shared_and_nothing_else(written, sheet, folder):
    file = written()
    build_folder(folder, "me/my-dog", file, sheet)
    lora = "sks-dog-lora.safetensors"  # by default, as it is one exactly
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", "sheet.png", file.name, lora])
    assert (folder / file.name).read_bytes() == file.read_bytes()
    with Image.open(folder / "sheet.png") as shared:
        assert not shared.text and np.asarray(shared).shape == (20, 30, 3)
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.base_model == "somebody/base" and card.data.instance_prompt == 'a "good" photo of sks dog'
    for words in (
        "# sks dog",
        "[somebody/base](https://huggingface.co/somebody/base)",
        "![Samples](sheet.png)",
        "comcat pull --repo_id me/my-dog",
        'comcat generate --adapter sks-dog.safetensors --prompt "a \\"good\\" photo of sks dog"',
        f'pipe.load_lora_weights("me/my-dog", weight_name="{lora}")',
        f"With ComfyUI, Forge, A1111, InvokeAI or SD.Next: put `{lora}`",
        "| comcat-diffusion, ComfyUI with the node pack COMCAT, Forge with the extension COMCAT | `sks-dog.",
        f"| ComfyUI, Forge, A1111, InvokeAI, SD.Next, diffusers, kohya's scripts | `{lora}` |",
        "| training | resolution 64, steps 3 |",
        "foldable, rank 2",
    ):
        assert words in card.text, words


def test_the_card_is_the_same_text_each_time_and_tells_no_path(written, folder, tmp_path):
    for base, told in (
        (str(tmp_path / "model"), "a base that is not on the hub"),
        ("models/mine.safetensors", "a base that is not on the hub"),
        ("./models/mine", "a base that is not on the hub"),
        ("embedded", "the embedded base of comcat-diffusion"),
    ):
        file, cards = written(base=base, foldable=False), []
        for _ in range(2):
            build_folder(folder, "me/my-dog", file)
            cards.append((folder / "README.md").read_text())
        assert cards[0] == cards[1] and told in cards[0] and str(tmp_path) not in cards[0]
        shared = folder / "sks-dog.safetensors"
        assert read_adapter(shared).base_model == Path(base).name and str(tmp_path).encode() not in shared.read_bytes()
        mine, theirs = load_file(file), load_file(shared)
        assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)
        assert (
            "base_model" not in cards[0] and "diffusers alone" not in cards[0] and "the folder of LoRAs" not in cards[0]
        )
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "sks-dog.safetensors"]


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("SG161222/Realistic_Vision_V5.1_noVAE", True),
        ("dreamlike-art/dreamlike-photoreal-2.0", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("models/mine.safetensors", False),
        ("tests/golden", False),  # a folder that is there
        ("/home/jane/base", False),
        ("./base", False),
        ("~/base", False),
        ("models\\base/mine", False),
        ("embedded", False),
        ("", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(base, shown, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert is_hub_id(base) == shown
    assert public_base(Header({}, base, "", {}, Notes(), {})) == (base if shown else "")
    if base not in ("tests/golden", "embedded", ""):  # the hub is asked for what reads so, and for nothing else
        with pytest.raises(FileNotFoundError, match="nor in the local cache" if shown else "a hub id reads owner/name"):
            load_base(base)


def test_what_cannot_be_shared_is_refused(written, folder, tmp_path, sheet):
    with pytest.raises(AdapterFileError, match="free adapter"):
        build_folder(folder, "me/my-dog", written(foldable=False), lora=True)
    with pytest.raises(AdapterFileError, match="no adapter file"):
        build_folder(folder, "me/my-dog", tmp_path / "nobody.safetensors")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        build_folder(folder, "me/my-dog", written(), written())
    with pytest.raises(HFValidationError):
        build_folder(folder, "me/my dog", written())


def test_only_adapters_are_fetched_and_no_other_file_is_replaced(written, folder, tmp_path):
    file, target = written(), tmp_path / "fetched"
    build_folder(folder, "me/my-dog", file, lora=True)
    assert copy_adapters(folder, target, "me/my-dog") == [target / file.name]
    assert copy_adapters(folder, target, "me/my-dog")  # the same file may be there
    assert read_adapter(target / file.name).notes.trigger == "sks" and len(list(target.iterdir())) == 1
    (target / file.name).write_bytes(b"mine")
    with pytest.raises(ValueError, match="is another file of this name"):
        copy_adapters(folder, target, "me/my-dog")
    assert (target / file.name).read_bytes() == b"mine"
    (folder / file.name).unlink()
    with pytest.raises(ValueError, match="me/my-dog holds no COMCAT adapter"):
        copy_adapters(folder, target, "me/my-dog")


@pytest.mark.slow
def test_an_adapter_goes_to_a_hub_and_comes_back(written, sheet, tmp_path):
    """By huggingface_hub's own requests, to a hub of ours: it takes address and token from the environment."""
    file, target, home = written(), tmp_path / "fetched", tmp_path / "home"
    push = ["push", "--adapter", str(file), "--sheet", str(sheet), "--private", "--no-lora", "--repo_id"]
    with hub_server.running("hf_mine") as hub:
        commands = (
            ("hf_of_somebody_else", [*push, "me/not-shared"]),
            (hub.token, [*push, "me/my-dog"]),
            ("hf_of_somebody_else", ["pull", "--repo_id", "me/my-dog", "--output_dir", str(tmp_path / "nothing")]),
            (hub.token, ["pull", "--repo_id", "me/my-dog", "--output_dir", str(target)]),
        )
        run = [sys.executable, "-c", IN_TURN, json.dumps(commands)]
        around = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(run, env=os.environ | around, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [2, 0, 2, 0]
    assert "The hub refused 'me/not-shared'" in done.stderr and "The hub refused 'me/my-dog'" in done.stderr
    assert hub.private == {"me/my-dog": True} and hub.files.keys() == {"me/my-dog"}
    shared = hub.files["me/my-dog"]
    assert sorted(shared) == ["README.md", "sheet.png", file.name] and shared[file.name] == file.read_bytes()
    assert [path.read_bytes() for path in target.iterdir()] == [file.read_bytes()]
    assert not (tmp_path / "nothing").exists()
    said = (done.stdout + done.stderr).encode()
    assert not any(b"hf_mine" in content or b"hf_of" in content for content in (said, *shared.values()))


def test_without_a_network_it_is_one_sentence_and_the_token_stays_untold(written, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    file = written()
    for command in (
        ["push", "--adapter", str(file), "--repo_id", "me/my-dog", "--private"],
        ["pull", "--repo_id", "me/my-dog", "--output_dir", str(tmp_path / "fetched")],
    ):
        assert main(command) == 2
        said = capsys.readouterr()
        assert "'me/my-dog'" in said.err and len(said.err.splitlines()) == 1 and "hf_secret" not in said.err + said.out
    assert not (tmp_path / "fetched").exists()
    assert main(["pull", "--repo_id", "a b"]) == 2 and "Traceback" not in capsys.readouterr().err
    for command, message in ((["push"], "--adapter is missing"), (["pull"], "--repo_id is missing")):
        assert main(command) == 2 and message in capsys.readouterr().err
