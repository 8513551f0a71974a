"""No room for what is written: a sentence with the bytes, the older one intact, nothing half-written left behind.

A limit on the length of a file stands for the full disk; every library meets it in its own way.
"""

import contextlib
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from comcat_diffusion import ComcatConfig, atomic, bases, save_adapter
from comcat_diffusion.cli import main
from comcat_diffusion.compression import compress, load_compressed, save_compressed
from comcat_diffusion.compression.store import TENSORS
from comcat_diffusion.export.checkpoint import merge_to_folder
from comcat_diffusion.training import checkpoint
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import Silent, customize
from tests.compression_models import built
from tests.quick_training import FLAGS, QUICK


@contextlib.contextmanager
def longest_file(size):
    """No file of this process grows beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def adapted(tiny_unet):
    unet = tiny_unet()
    unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"]), "dog")
    return unet


def test_an_adapter_file_stays_what_it_was(adapted, tmp_path):
    file = tmp_path / "dog.safetensors"
    with longest_file(1000), pytest.raises(OSError, match="nothing was left behind"):
        save_adapter(adapted, file, "dog")
    assert names(tmp_path) == []
    save_adapter(adapted, file, "dog")
    before = file.read_bytes()
    told = rf"{file} could not be written \(.+\): it needs at least {len(before):,} bytes, [\d,]+ are free; .* intact"
    with longest_file(len(before) - 1), pytest.raises(OSError, match=told):
        save_adapter(adapted, file, "dog")
    assert names(tmp_path) == [file.name] and file.read_bytes() == before
    with longest_file(len(before)):
        save_adapter(adapted, file, "dog")


class FullAfter(Silent):
    """Lets the disk be full from a step on."""

    def __init__(self, stack, step, size):
        self.stack, self.at, self.size = stack, step, size

    def step(self, done, total, peak_bytes):
        if done.step == self.at:
            self.stack.enter_context(longest_file(self.size))


@pytest.mark.slow
def test_the_checkpoint_before_stays_and_the_run_goes_on_from_it(tmp_path):
    settings = {"max_train_steps": 3, "checkpointing_steps": 1, "skip_final_inference": True, "use_ema": True}
    settings |= {**QUICK, "kind": "free"}  # whose tensors are most of a checkpoint
    wanted = customize(TrainConfig(output_dir=str(tmp_path / "whole"), **settings)).adapter.read_bytes()
    folder, run = tmp_path / "run/checkpoints", {"output_dir": str(tmp_path / "run"), **settings}
    told = r"checkpoint-3 could not be written .* left behind\. The last good checkpoint is .*checkpoint-2\."
    with contextlib.ExitStack() as stack, pytest.raises(OSError, match=told) as raised:
        customize(TrainConfig(**run), FullAfter(stack, 2, 50_000))
    whole = sum(path.stat().st_size for path in (folder / "checkpoint-2").iterdir())
    needed = int(str(raised.value).partition("at least ")[2].partition(" bytes")[0].replace(",", ""))
    assert 0.8 * whole < needed <= whole
    assert names(folder) == ["checkpoint-1", "checkpoint-2"] and checkpoint.damage(folder / "checkpoint-2") is None
    assert customize(TrainConfig(**run, resume_from_checkpoint="latest")).adapter.read_bytes() == wanted


def test_a_merged_folder_is_whole_or_not_there(tmp_path):
    pipe, file = bases.load_base("embedded"), tmp_path / "dog.safetensors"
    pipe.unet.add_adapter(ComcatConfig(r=1, target_modules=["attn2"], foldable=True), "dog")
    save_adapter(pipe, file, "dog")
    with longest_file(1_000_000), pytest.raises(OSError, match="merged could not be written .* nothing was left"):
        merge_to_folder(bases.load_base("embedded"), [(file, 1.0)], tmp_path / "merged")
    assert names(tmp_path) == [file.name]


def test_a_compressed_model_is_written_after_the_disk_has_room(tmp_path):
    low, plan = compress(built("vit").float(), 0.4)
    with longest_file(1000), pytest.raises(OSError, match=rf"{TENSORS} could not be written .* nothing was left"):
        save_compressed(low, plan, tmp_path / "low")
    assert names(tmp_path / "low") == []
    save_compressed(low, plan, tmp_path / "low")
    assert load_compressed(tmp_path / "low")[1] == plan


def test_the_compress_command_names_its_folder_and_leaves_none(tmp_path, capsys):
    built("vit").float().save_pretrained(tmp_path / "dense")
    with longest_file(10_000):
        arguments = ["--model", str(tmp_path / "dense"), "--reduction", "0.4", "--output_dir", str(tmp_path / "low")]
        assert main(["compress", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"comcat: {tmp_path / 'low'} could not be written") and "nothing was left behind" in said
    assert names(tmp_path) == ["dense"]


def test_the_command_line_says_it_in_a_sentence(tmp_path, capsys):
    file = tmp_path / "sks-teddy.safetensors"
    file.write_bytes(b"older")
    settings = ["--max_train_steps", "1", "--skip_final_inference", "--overwrite", "--output_dir", str(tmp_path)]
    settings += FLAGS
    with longest_file(10_000):
        assert main(["train", *settings]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"comcat: {file} could not be written") and "intact" in said
    assert file.read_bytes() == b"older" and not list(tmp_path.glob(".*"))


def library_errors(folder):
    tensor = torch.zeros(100_000)
    yield SafetensorError, lambda: save_file({"a": tensor}, folder / "a")
    yield RuntimeError, lambda: torch.save(tensor, folder / "a")
    yield OSError, lambda: (folder / "a").write_bytes(bytes(400_000))


def test_every_librarys_way_to_say_it_is_understood_and_other_errors_pass(tmp_path):
    for kind, write in library_errors(tmp_path):
        with longest_file(1000):
            with pytest.raises(kind):
                write()
            with pytest.raises(OSError, match="needs at least 5 bytes"), atomic.writing(tmp_path / "b", 5):
                write()
    for error in (ValueError("no"), PermissionError(13, "no"), RuntimeError("no")):
        with pytest.raises(type(error), match="no"), atomic.writing(tmp_path / "b", 5):
            raise error
