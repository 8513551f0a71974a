"""Exports for the programs that people draw in: one file for all, the closest LoRA and its cost, what goes along."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, load_adapter, places, read_adapter, save_adapter
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.cli import main
from comcat_diffusion.config import BaseSettings, read_toml, to_toml
from comcat_diffusion.export.approximate import approximate
from comcat_diffusion.export.beside import files_beside
from comcat_diffusion.export.card import Shared, card
from comcat_diffusion.export.clients import CLIENTS, format_of, readers
from comcat_diffusion.export.config import ExportConfig
from comcat_diffusion.export.everywhere import STAY, act_everywhere, bend
from comcat_diffusion.export.fit import is_exact, needs_base
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.export.space import build_space
from comcat_diffusion.export.spread import shells
from comcat_diffusion.families.known import FAMILIES
from comcat_diffusion.families.stable_diffusion import StableDiffusion
from comcat_diffusion.training.becomes import becomes, lora_bytes
from comcat_diffusion.training.config import TrainConfig
from tests.test_approximate import predicted

NOTES = Notes("sks", "a photo of sks teddy", "teddy", {"resolution": 64, "steps": 3, "pictures": 4})
PROMPT = "a photo of sks teddy"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, randomize):
    """Files of random adapters on the embedded base, by name: what each does can be seen in its predictions."""
    folder, files = tmp_path_factory.mktemp("adapters"), {}
    for name, options in {
        "everywhere": {"foldable": True, "tied": True},
        "waiting": {"foldable": True, "tied": True, "trigger": ["sks"]},
        "foldable": {"foldable": True},
        "free": {},
        "free waiting": {"trigger": ["sks"]},
    }.items():
        pipe = bases.load_base("embedded")
        pipe.unet.add_adapter(ComcatConfig(r=2, alpha=3.0, **options), "dog")
        randomize(pipe.unet, "dog", 1, std=0.15)
        files[name] = folder / f"{name}.safetensors"
        save_adapter(pipe, files[name], "dog", "embedded", NOTES)
    return files


def test_every_program_gets_the_names_that_it_reads(adapters, tmp_path):
    for client in CLIENTS:
        target = tmp_path / f"{client}.safetensors"
        export_adapter(adapters["foldable"], target, format_of(client, None))
        ends = {name.partition(".")[0] for name in load_file(target)}
        assert all(end.startswith("lora_unet_") for end in ends) or (client == "diffusers" and ends == {"unet"})
    for client, format in (("all", "diffusers-lora"), ("diffusers", "kohya"), ("comfyui", "kohya")):
        assert format_of(client, format) == format
    assert format_of("invokeai", None, "FLUX.1") == format_of("all", None, "Z-Image") == "kohya"
    assert {format_of("invokeai", None, name) for name in ("FLUX.2 [klein]", "Z-Image")} == {"diffusers-lora"}
    told = {name for client in CLIENTS.values() for name in (*client.others, *client.lacks)}
    assert told <= {family.name for family in FAMILIES}
    with pytest.raises(ValueError, match="--format kohya is not what InvokeAI reads"):
        format_of("invokeai", "kohya", "Z-Image")
    for family in ("FLUX.2 [klein]", "Z-Image", "Qwen-Image"):  # Forge of June 2025 has no engine for them
        with pytest.raises(ValueError, match="There are no LoRAs of .* for Forge"):
            format_of("forge", None, family)
    with pytest.raises(ValueError, match=r"no LoRAs of Z-Image for kohya's sd-scripts"):
        format_of("kohya", None, "Z-Image")
    with pytest.raises(ValueError, match=r"no LoRAs of Stable Diffusion 3 and 3\.5 for InvokeAI"):
        format_of("invokeai", None, "Stable Diffusion 3 and 3.5")
    with pytest.raises(ValueError, match="--format diffusers-lora is not what ComfyUI reads"):
        ExportConfig(adapter="a", output="b", for_="comfyui", format="diffusers-lora")


def test_nobody_is_sent_to_train_what_a_program_or_a_family_has_not(adapters, tmp_path, capsys):
    pipe = bases.load_base("embedded-flow")
    pipe.transformer.add_adapter(ComcatConfig(r=2, trigger=["sks"]), "dog")
    save_adapter(pipe, tmp_path / "flow.safetensors", "dog", "embedded-flow", NOTES)
    ask = ["export", "--output", str(tmp_path / "lora.safetensors"), "--adapter"]
    assert main([*ask, str(tmp_path / "flow.safetensors"), "--for", "a1111"]) == 2
    assert "no LoRAs of FLUX.2 [klein] for A1111" in capsys.readouterr().err
    assert main([*ask, str(tmp_path / "flow.safetensors")]) == 2
    assert capsys.readouterr().err.endswith("its ComfyUI node, or train it again with --as lora.\n")
    assert main([*ask, str(adapters["waiting"])]) == 2
    assert "--as lora, or take the closest LoRA (export --approximate)." in capsys.readouterr().err
    assert not (tmp_path / "lora.safetensors").exists()


def test_those_are_named_that_read_a_file(adapters, tmp_path, capsys, randomize):
    assert [*readers("Stable Diffusion 1.x and 2.x", "kohya")] == [name for name in CLIENTS if name != "all"]
    assert [*readers("FLUX.2 [klein]", "diffusers-lora")] == ["invokeai", "diffusers"]
    pipe = bases.load_base("embedded-flow")
    targets = ["transformer_blocks.0.attn"]
    pipe.transformer.add_adapter(ComcatConfig(r=1, foldable=True, target_modules=targets), "dog")
    randomize(pipe.transformer, "dog", 1)
    file = tmp_path / "flow.safetensors"
    save_adapter(pipe, file, "dog", "embedded-flow", NOTES)
    told = []
    for adapter, more in ((file, []), (adapters["foldable"], []), (file, ["--for", "invokeai"])):
        assert not main(
            ["export", "--adapter", str(adapter), "--output", str(tmp_path / f"{len(told)}.safetensors"), *more]
        )
        told.append(capsys.readouterr().out.splitlines()[-1].partition(":")[0])
    assert told == [
        "For ComfyUI, SD.Next and diffusers",
        "For every program",
        "For InvokeAI",
    ]
    text = card(read_adapter(file), Shared("me/dog", "flow.safetensors", 9, lora="flow-lora.safetensors"))
    assert "\nWith ComfyUI or SD.Next: put" in text
    assert "| ComfyUI, SD.Next, diffusers | `flow-lora.safetensors` |" in text
    assert "| comcat-diffusion, ComfyUI with the node pack COMCAT | `flow.safetensors` |" in text


def test_a_tied_adapter_exports_exactly_from_its_base_s_configuration(adapters, tmp_path):
    file, header = adapters["everywhere"], read_adapter(adapters["everywhere"])
    assert is_exact(header) and needs_base(header)
    with pytest.raises(AdapterFileError, match="is tied: name its base"):
        export_adapter(file, tmp_path / "lora.safetensors")
    made = export_adapter(file, tmp_path / "lora.safetensors", models=shells(BaseSettings(), header, file))
    assert made.metadata["ss_network_dim"] == "2"  # all heads share the text side, so the rank stays
    stock, live = bases.load_base("embedded"), bases.load_base("embedded")
    before = predicted(stock)
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    load_adapter(live, file)
    assert_close(predicted(stock), predicted(live), rtol=0, atol=2e-5)
    assert (predicted(live) - before).abs().max() > 0.05


def test_a_tied_adapter_of_another_base_is_not_spread(adapters, tmp_path):
    header = read_adapter(adapters["everywhere"])
    header.fingerprint["layout"] = "0" * 16
    with pytest.raises(AdapterFileError, match="trained on 'embedded'"):
        shells(BaseSettings(), header, adapters["everywhere"])


# From the trigger on -> everywhere


def test_the_text_side_is_bent_by_the_least_squares_of_two_kinds_of_tokens():
    noise = torch.Generator().manual_seed(0)
    called, others, down = (torch.randn(n, 6, generator=noise, dtype=torch.float64) for n in (9, 7, 2))
    grams = called.T @ called, others.T @ others
    stay = STAY * (grams[0] + grams[1]).trace() / 6

    def loss(bent):
        off = ((bent - down) @ called.T).square().sum() + (bent @ others.T).square().sum()
        return off + stay * (bent - down).square().sum()

    bent = (down @ bend(*grams)).requires_grad_()
    (slope,) = torch.autograd.grad(loss(bent), bent)
    assert slope.abs().max() < 1e-10 and loss(bent) < 0.9 * loss(down)


@pytest.mark.slow
def test_an_adapter_that_waits_becomes_one_for_everywhere_and_says_what_that_costs(adapters, tmp_path):
    target, pipe = tmp_path / "everywhere.safetensors", bases.load_base("embedded")
    before = predicted(pipe)
    made = act_everywhere(pipe, adapters["waiting"], target, [PROMPT])
    assert torch.equal(predicted(pipe), before)
    header = read_adapter(target)
    assert is_exact(header) and header.notes == NOTES and "trigger" not in header.config["unet"]
    assert made.drift > 0.05 and f"keeps {max(made.kept, 0):.0%} of what" in made.told
    simple = act_everywhere_unbent(adapters["waiting"], tmp_path)
    assert made.kept > simple.kept + 0.05 and made.drift < simple.drift
    with pytest.raises(AdapterFileError, match="acts everywhere already"):
        act_everywhere(pipe, target, tmp_path / "x.safetensors", [PROMPT])
    with pytest.raises(ValueError, match="does nothing on 'a photo of a ball': name prompts with its trigger 'sks'"):
        act_everywhere(pipe, adapters["waiting"], tmp_path / "x.safetensors", ["a photo of a ball"])
    assert not (tmp_path / "x.safetensors").exists()


def act_everywhere_unbent(file, folder):
    """The same without bending: what the closest LoRA is compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comcat_diffusion.export.everywhere.text_grams", lambda *_, exclude: (None, None))
        patch.setattr("comcat_diffusion.export.everywhere.bend", lambda *_: torch.eye(128, dtype=torch.float64))
        return act_everywhere(bases.load_base("embedded"), file, folder / "unbent.safetensors", [PROMPT], least=-1e9)


@pytest.mark.slow
def test_the_command_exports_what_waits_if_asked_to(adapters, tmp_path, capsys):
    export = ["export", "--adapter", str(adapters["waiting"]), "--output", str(tmp_path / "dog.safetensors")]
    assert main(export) == 2
    assert "train it again with --as lora" in capsys.readouterr().err
    assert main([*export, "--approximate", "--for", "a1111"]) == 0
    said = capsys.readouterr().out
    assert "Acting everywhere keeps" in said and "For A1111: stable-diffusion-webui/models/Lora." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dog.json", "dog.safetensors"]
    assert json.loads((tmp_path / "dog.json").read_text())["activation text"] == "sks teddy"
    bases.load_base("embedded").load_lora_weights(tmp_path, weight_name="dog.safetensors")
    (tmp_path / "dog.safetensors").unlink()
    assert main([*export, "--approximate", "--for", "a1111"]) == 2
    assert "dog.json is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_kept_is_measured_against_the_adapter_that_was_meant(adapters, tmp_path):
    pipe, target, closest = bases.load_base("embedded"), tmp_path / "x.safetensors", tmp_path / "closest.safetensors"
    approximate(pipe, adapters["free waiting"], closest, [PROMPT], 10.0)
    with pytest.raises(ValueError, match=r"free waiting.safetensors would keep .* or force it") as refused:
        act_everywhere(pipe, closest, target, [PROMPT], adapters["free waiting"], 0.99)
    assert not target.exists()
    own = act_everywhere(pipe, closest, target, [PROMPT], least=-1e9)
    assert int(re.search(r"keep (\d+)%", str(refused.value))[1]) < 100 * own.kept - 2


# What a file says, and what stands beside it


def test_galleries_know_the_file_again_and_what_it_is_of(adapters, tmp_path):
    told = export_adapter(adapters["foldable"], tmp_path / "dog.safetensors").metadata
    content = (tmp_path / "dog.safetensors").read_bytes()
    weights = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert told["sshs_model_hash"] == weights and told["modelspec.hash_sha256"] == f"0x{weights}"
    assert told["ss_num_train_images"] == "4" and told["ss_max_train_steps"] == "3"
    assert told["modelspec.trigger_phrase"] == "sks" and told["modelspec.resolution"] == "64x64"


def test_a_picture_stands_beside_the_file(adapters, tmp_path):
    header = read_adapter(adapters["foldable"])
    assert not files_beside(tmp_path / "dog.safetensors", header, "comfyui", None)
    Image.new("RGB", (4, 3), "red").save(tmp_path / "red.jpg")
    (picture,) = files_beside(tmp_path / "dog.safetensors", header, "comfyui", tmp_path / "red.jpg").items()
    assert picture[0] == tmp_path / "dog.png" and picture[1].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"--preview .* cannot be read as a picture"):
        files_beside(tmp_path / "dog.safetensors", header, "comfyui", adapters["foldable"])


# Before training


def test_as_lora_is_foldable_and_everywhere(tmp_path):
    config = TrainConfig(as_="lora", instance_data_dir="x", instance_prompt="a photo of sks dog")
    assert (config.kind, config.everywhere) == ("foldable", True)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert "as =" in to_toml(config) and TrainConfig(**read_toml(TrainConfig, tmp_path / "run.toml")) == config
    with pytest.raises(ValueError, match="--kind free is outside of what a LoRA can express"):
        TrainConfig(as_="lora", kind="free")
    with pytest.raises(ValueError, match="--as must be one of lora"):
        TrainConfig(as_="lycoris")


def test_what_an_adapter_becomes_is_known_before(adapters, tmp_path):
    unet = bases.load_base("embedded").unet
    export_adapter(adapters["foldable"], tmp_path / "lora.safetensors")
    written = load_file(tmp_path / "lora.safetensors")
    shapes = {
        name.removeprefix("unet."): tuple(factor.shape) for name, factor in load_file(adapters["foldable"]).items()
    }
    assert lora_bytes(shapes, 2, StableDiffusion()) == sum(
        t.nbytes for name, t in written.items() if not name.endswith(".alpha")
    )
    tied = becomes(TrainConfig(kind="tied"), unet)
    assert "say --as lora" in tied and "29 kB" in tied
    assert "say --as lora" in becomes(TrainConfig(), unet) and "20 kB at most" in becomes(TrainConfig(), unet)
    assert "exactly, a LoRA" in becomes(TrainConfig(as_="lora"), unet)
    assert "node (about" in becomes(TrainConfig(kind="free"), unet)
    assert "for this tool and its ComfyUI node (about" in becomes(TrainConfig(kind="cores"), unet)


# The hub


def test_a_space_holds_all_that_it_needs(adapters, tmp_path, monkeypatch):
    pipe = bases.load_base("embedded")
    load_adapter(pipe, adapters["waiting"], "dog")
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", str(tmp_path), Notes("<dog>", "a <dog>", ""))
    with pytest.raises(AdapterFileError, match="of a base that is not on the hub"):
        build_space(tmp_path / "space", "me/my-dog", tmp_path / "dog.safetensors")
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "somebody/base", Notes("<dog>", "a <dog>", ""))
    made = build_space(tmp_path / "space", "me/my-dog", tmp_path / "dog.safetensors")
    names = ["Dockerfile", "README.md", "app.py", "comcat_diffusion", "requirements.txt", "studio"]
    assert sorted(path.name for path in made.iterdir()) == names
    compile((made / "app.py").read_text(), "app.py", "exec")
    assert r"# \<dog\>" in (made / "README.md").read_text() and 'title: "<dog>"' in (made / "README.md").read_text()
    needed = (made / "requirements.txt").read_text()
    assert "diffusers" in needed and "uvicorn" in needed and "pytest" not in needed
    assert (made / "studio" / "adapters" / "dog.safetensors").is_file()
    monkeypatch.setattr(places, "_PACKAGE", made / "comcat_diffusion")  # which comes without the embedded base
    assert not places.is_embedded("somebody/base") and not places.is_of_embedded("somebody/base")
    with pytest.raises(FileNotFoundError, match="embedded base is missing"):
        places.place_of("embedded")
    with pytest.raises(FileExistsError):
        build_space(made, "me/my-dog", tmp_path / "dog.safetensors")


@pytest.mark.slow
def test_a_space_of_the_embedded_base_draws_with_what_is_in_it(adapters, tmp_path):
    made = build_space(tmp_path / "space", "me/my-dog", adapters["waiting"])
    card = ModelCard((made / "README.md").read_text())
    assert card.data.models == ["me/my-dog"] and "on the embedded base of comcat-diffusion" in card.text
    assert [path.name for path in (made / "comcat_diffusion" / "assets").iterdir()] == ["tiny-sd"]
    adapter = f"studio/adapters/{adapters['waiting'].name}"
    ask = ["generate", "--adapter", adapter, "--prompt", "a photo of sks dog", "--output_dir", "drawn"]
    ask += ["--num_inference_steps", "2"]
    code = f"import comcat_diffusion, comcat_diffusion.cli as c; print(comcat_diffusion.__file__); c.main({ask!r})"
    environment = {**os.environ, "PYTHONPATH": str(made), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run([sys.executable, "-c", code], cwd=made, env=environment, capture_output=True, text=True)
    assert told.stdout.splitlines()[0].startswith(str(made)), told.stderr
    assert [path.suffix for path in (made / "drawn").iterdir()].count(".png") >= 1
