"""Checkpoints: a resumed run is the unbroken one to the byte; a broken or foreign checkpoint is an error that helps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from comcat_diffusion import bases, read_adapter
from comcat_diffusion.training import checkpoint
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import Silent, customize
from tests.quick_training import BARE

STEPS = 6
# Three pictures and batches of two: a pass ends in the middle of a batch. Everything with a state is switched on.
SETTINGS = {
    "max_train_steps": STEPS,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "use_ema": True,
    "skip_final_inference": True,
    "instance_prompt": "a photo of sks teddy",
    **BARE,
}


class Stop(Silent):
    """Presses Ctrl-C after a step."""

    def __init__(self, after=None):
        self.after, self.seen, self.notes = after, [], []

    def note(self, text):
        self.notes.append(text)

    def step(self, done, total, peak_bytes):
        self.seen.append(done.step)
        if done.step == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    for name in ("1.png", "2.png", "3.png"):
        shutil.copy(bases.assets() / "subject" / "train" / name, folder)
    return str(folder)


@pytest.fixture
def config(three):
    return lambda output, **more: TrainConfig(
        **{"instance_data_dir": three, "output_dir": str(output), **SETTINGS, **more}
    )


@pytest.fixture(scope="module")
def unbroken(three, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    settings = {"instance_data_dir": three, "output_dir": str(output), **SETTINGS}
    return customize(TrainConfig(**settings)).adapter.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4, STEPS - 1])
def test_a_resumed_run_writes_the_bytes_of_an_unbroken_one(config, tmp_path, unbroken, stop):
    first = customize(config(tmp_path), Stop(stop))
    assert first.interrupted and first.steps == stop and first.adapter.read_bytes() != unbroken
    watcher = Stop()
    second = customize(config(tmp_path, resume_from_checkpoint="latest"), watcher)
    assert watcher.seen == list(range(stop + 1, STEPS + 1))
    assert second.adapter.read_bytes() == unbroken
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def kept(three, tmp_path_factory):
    """The adapter of a run with a checkpoint every other step, and the checkpoints."""
    output = tmp_path_factory.mktemp("kept")
    settings = {"instance_data_dir": three, "output_dir": str(output), "checkpointing_steps": 2, **SETTINGS}
    return customize(TrainConfig(**settings)).adapter, checkpoint.listed(output / "checkpoints")


@pytest.mark.slow
def test_so_does_one_in_bfloat16(config, tmp_path, unbroken):
    few = {"mixed_precision": "bf16", "max_train_steps": 2, "lr_warmup_steps": 1}  # as most processors are slow at it
    whole = customize(config(tmp_path / "whole", **few)).adapter.read_bytes()
    customize(config(tmp_path / "cut", **few), Stop(1))
    resumed = customize(config(tmp_path / "cut", **few, resume_from_checkpoint="latest"))
    assert resumed.adapter.read_bytes() == whole != unbroken


@pytest.mark.slow
def test_a_run_that_replaces_another_has_its_own_checkpoints_alone(config, tmp_path):
    customize(config(tmp_path, max_train_steps=2, lr_warmup_steps=1, checkpointing_steps=2))
    more = {"overwrite": True, "seed": 1, "checkpoints_total_limit": 1, "max_train_steps": 2, "lr_warmup_steps": 1}
    customize(config(tmp_path, **more), Stop(1))
    assert [path.name for path in checkpoint.listed(tmp_path / "checkpoints")] == ["checkpoint-1"]
    assert customize(config(tmp_path, **more, resume_from_checkpoint="latest")).steps == 2


@pytest.mark.slow
def test_a_stop_within_a_step_leaves_the_last_checkpoint_as_it_is(config, tmp_path, unbroken, monkeypatch):
    reduced, reduce = [], Accelerator.reduce

    def stopped(self, *asked, **more):  # after the optimizer has taken the step, before anybody is told of it
        reduced.append(asked)
        if len(reduced) == 3:
            raise KeyboardInterrupt
        return reduce(self, *asked, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Accelerator, "reduce", stopped)
        customize(config(tmp_path, checkpointing_steps=2))
    assert [path.name for path in checkpoint.listed(tmp_path / "checkpoints")] == ["checkpoint-2"]
    again = customize(config(tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest"))
    assert again.adapter.read_bytes() == unbroken


@pytest.mark.slow
def test_another_number_of_processes_is_another_setting(config, tmp_path, two):
    record = two[0] / checkpoint.RECORD
    told = json.loads(record.read_text())
    assert told["settings"]["processes"] == 1
    told["settings"]["processes"] = 2
    record.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"processes \(was 2, is 1\)"):
        customize(config(tmp_path, resume_from_checkpoint=str(two[0])))


@pytest.mark.slow
def test_the_last_step_can_be_resumed_too(config, tmp_path, unbroken, kept):
    again = customize(config(tmp_path, resume_from_checkpoint=str(kept[1][-1])))
    assert again.adapter.read_bytes() == unbroken


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_file_of_its_step(unbroken, kept):
    adapter, folders = kept
    assert adapter.read_bytes() == unbroken  # to write the files changes nothing of the run
    files = [folder / adapter.name for folder in folders]
    assert [read_adapter(file).notes.training["steps"] for file in files] == [2, 4, STEPS]
    assert files[-1].read_bytes() == unbroken and files[1].read_bytes() != unbroken
    tensors = [load_file(folders[-1] / f"{name}.safetensors") for name in ("learned", "ema")]
    raw, mean = (sum(t.abs().sum().item() for name, t in found.items() if name != "steps") for found in tensors)
    assert raw != pytest.approx(mean, rel=1e-3)  # else nothing would tell that the file holds the running mean
    assert set(json.loads((folders[0] / checkpoint.RECORD).read_text())["files"]) >= {adapter.name}


@pytest.mark.parametrize("name", ["learned", "ema"])
def test_an_adapter_cannot_have_the_name_of_a_checkpoints_file(config, tmp_path, name):
    with pytest.raises(ValueError, match=f"--name {name} is what a checkpoint calls a file of its own"):
        customize(config(tmp_path, name=name))


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    customize(config(tmp_path, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=2))
    assert [path.name for path in checkpoint.listed(tmp_path / "checkpoints")] == ["checkpoint-2", "checkpoint-3"]


@pytest.fixture
def two(kept, tmp_path):
    """The first two checkpoints of one run, as if it had been cut after them, in a folder of the test's own."""
    shutil.copytree(kept[0].parent, tmp_path, dirs_exist_ok=True)
    *first, last = checkpoint.listed(tmp_path / "checkpoints")
    shutil.rmtree(last)
    return first


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_named(config, tmp_path, two):
    learned = two[1] / "learned.safetensors"
    learned.write_bytes(learned.read_bytes()[:-1] + b"x")
    settings = config(tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"learned\.safetensors is missing or changed; the last good one is .*-2\."):
        customize(settings)
    (two[0] / checkpoint.RECORD).write_text("{")
    with pytest.raises(ValueError, match="there is no good one"):
        customize(settings)


@pytest.mark.slow
def test_a_missing_checkpoint_is_no_fresh_start(config, tmp_path, two):
    with pytest.raises(ValueError, match=r"there is no checkpoint .*checkpoint-9; the last good one is .*-4"):
        customize(config(tmp_path, resume_from_checkpoint=str(two[0].with_name("checkpoint-9"))))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        customize(config(tmp_path / "elsewhere", resume_from_checkpoint="latest"))


@pytest.mark.slow
def test_other_settings_or_pictures_are_refused_by_name(config, tmp_path, two, three):
    asked = {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"learning_rate \(was 0\.005, is 0\.1\)"):
        customize(config(tmp_path, **asked, learning_rate=0.1))
    for number, (change, told) in enumerate(
        (
            (lambda folder: shutil.copy(folder / "1.png", folder / "3.png"), r"the pictures \(3\.png\)"),
            (lambda folder: (folder / "3.png").unlink(), r"the pictures \(3\.png\)"),
            (lambda folder: shutil.copy(folder / "1.png", folder / "0.png"), r"the pictures \(0\.png\)"),
            (lambda folder: Image.new("L", (256, 256), 9).save(folder / "2_mask.png"), r"the pictures \(2\.png\)"),
            (
                lambda folder: [(folder / f"{n}.txt").write_text("sks") for n in "123"],
                r"the pictures \(1\.png, 2\.png, 3",
            ),
        )
    ):
        other = tmp_path / f"pictures-{number}"
        shutil.copytree(three, other)
        change(other)
        with pytest.raises(ValueError, match=f"what is learned has changed: {told}") as caught:
            customize(config(tmp_path, **asked, instance_data_dir=str(other)))
        assert "instance_data_dir" not in str(caught.value)


@pytest.mark.slow
def test_the_same_pictures_in_another_place_are_the_same(config, tmp_path, three, unbroken, monkeypatch):
    """A slash at the end, a relative path, another folder, names in another Unicode form: it goes on, to the byte."""
    first = tmp_path / "Café"
    shutil.copytree(three, first), (first / "1.png").rename(first / f"{unicodedata.normalize('NFC', 'é')}.png")
    customize(config(tmp_path / "out", instance_data_dir=str(first)), Stop(STEPS - 1))
    whole = customize(config(tmp_path / "whole", instance_data_dir=str(first))).adapter.read_bytes()
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    (moved / f"{unicodedata.normalize('NFC', 'é')}.png").rename(moved / f"{unicodedata.normalize('NFD', 'é')}.png")
    monkeypatch.chdir(tmp_path)
    for number, spelled in enumerate((f"{first}/", "Café", "./moved/../Café", str(moved))):
        shutil.copytree("out", f"out-{number}")
        again = customize(config(f"out-{number}", instance_data_dir=spelled, resume_from_checkpoint="latest"))
        assert again.adapter.read_bytes() == whole != unbroken


@pytest.mark.slow
def test_a_base_or_an_adapter_that_has_moved_is_the_same(config, tmp_path):
    first = customize(config(tmp_path / "first", max_train_steps=1, lr_warmup_steps=0)).adapter
    shutil.copytree(bases.assets() / "tiny-sd", tmp_path / "base")
    own = {"pretrained_model_name_or_path": str(tmp_path / "base"), "init_adapter": str(first)}
    customize(config(tmp_path / "out", **own), Stop(STEPS - 1))
    whole = load_file(customize(config(tmp_path / "whole", **own)).adapter)
    os.rename(tmp_path / "base", tmp_path / "moved"), shutil.copy(first, tmp_path / "other.safetensors")
    there = {
        "pretrained_model_name_or_path": str(tmp_path / "moved"),
        "init_adapter": str(tmp_path / "other.safetensors"),
    }
    again = load_file(customize(config(tmp_path / "out", **there, resume_from_checkpoint="latest")).adapter)
    assert all((again[name] == tensor).all() for name, tensor in whole.items()) and again.keys() == whole.keys()
    weights = tmp_path / "moved" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    shutil.copy(
        customize(config(tmp_path / "more", max_train_steps=2, lr_warmup_steps=0)).adapter, there["init_adapter"]
    )
    with pytest.raises(ValueError, match=r"the base \(.*moved\), --init_adapter \(.*other\.safetensors\)"):
        customize(config(tmp_path / "out", **there, resume_from_checkpoint="latest"))


@pytest.mark.slow
def test_so_are_pictures_of_the_class_and_those_to_judge_by(config, tmp_path, three):
    shutil.copytree(three, tmp_path / "class"), shutil.copytree(three, tmp_path / "judge")
    own = {"class_data_dir": "class", "validation_data_dir": "judge", "num_class_images": 3, "everywhere": True}
    own |= {"prior": "images", "kind": "free", "max_train_steps": 4}

    def settings(more, **other):
        return config(
            tmp_path / "out", **{n: str(tmp_path / v) if "dir" in n else v for n, v in own.items()} | other, **more
        )

    customize(settings({}), Stop(2))
    for name in ("class", "judge"):
        os.rename(tmp_path / name, tmp_path / f"{name}-moved")
    moved = {
        f"{kind}_data_dir": str(tmp_path / f"{name}-moved")
        for kind, name in (("class", "class"), ("validation", "judge"))
    }
    resume = {"resume_from_checkpoint": "latest"}
    assert customize(settings(resume, **moved)).steps == 4
    for name, told in (("class", "the class pictures"), ("judge", "the held-out pictures")):
        shutil.copy(Path(three) / "1.png", tmp_path / f"{name}-moved" / "3.png")
        with pytest.raises(ValueError, match=rf"{told} \(3\.png\)"):
            customize(settings(resume, **moved))


@pytest.mark.slow
def test_another_number_of_threads_is_told(config, tmp_path, two):
    record = two[1] / checkpoint.RECORD
    told = json.loads(record.read_text())
    assert told["threads"] == torch.get_num_threads()
    asked, watcher = config(tmp_path, resume_from_checkpoint="latest"), Stop()
    customize(asked, watcher)
    assert not any("threads" in note for note in watcher.notes)
    record.write_text(json.dumps(told | {"threads": 64}))
    customize(asked, watcher)
    (note,) = [note for note in watcher.notes if "threads" in note]
    assert (
        f"was written with 64 threads and goes on with {torch.get_num_threads()}" in note
        and "OMP_NUM_THREADS=64" in note
    )


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_refused(config, tmp_path, two):
    record = two[1] / checkpoint.RECORD
    told = json.loads(record.read_text())
    del told["sources"]
    record.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"checkpoint-4 is of an earlier version; start from its weights"):
        customize(config(tmp_path, resume_from_checkpoint="latest"))


@pytest.mark.slow
def test_a_steady_schedule_can_be_made_longer(config, tmp_path):
    steady = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "max_bytes": 0}
    customize(config(tmp_path, max_train_steps=2, checkpointing_steps=2, **steady))
    watcher = Stop()
    customize(config(tmp_path, max_train_steps=3, resume_from_checkpoint="latest", **steady), watcher)
    assert watcher.seen == [3]


@pytest.mark.slow
def test_a_run_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    """A checkpoint is written at every step; the kill comes as soon as a write is seen that is not the first."""
    command = [sys.executable, "train_customize.py", "--max_train_steps", "4000", "--output_dir", str(tmp_path)]
    command += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "3"]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1]
    )
    folder = tmp_path / "checkpoints"
    until, caught = time.monotonic() + 60, False
    while not caught and time.monotonic() < until:
        time.sleep(0.001)
        caught = bool(list(folder.glob(".*.partial")) and list(folder.glob("checkpoint-*")))
    assert caught
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    there = checkpoint.listed(folder)
    assert there and checkpoint.damage(there[-1]) is None
