"""The command line as a person meets it: fast help, one sentence for a mistake, an exit status for scripts."""

import hashlib
import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from comcat_diffusion import bases, commands, load_adapter, read_adapter
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.cli import COMMANDS, main
from comcat_diffusion.training.loop import Step
from tests.quick_training import FLAGS

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom comcat_diffusion.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    )
    done = run("-c", code + "assert not {'torch', 'diffusers', 'peft', 'numpy'} & set(sys.modules)")
    assert done.returncode == 0 and "--instance_data_dir" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [*COMMANDS, "info"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and "usage: comcat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--rank", "0"], "--rank must be at least 1"),
        (["train", "--max_train_steps", "0"], "--max_train_steps"),
        (["train", "--instance_data_dir", "nowhere", "--instance_prompt", "a photo of sks dog"], "no folder nowhere"),
        (["generate", "--adapter", "nope.safetensors", "--prompt", "sks dog"], "no adapter file nope.safetensors"),
        (["generate", "--adapter", "README.md", "--prompt", "sks dog"], "README.md"),
        (["generate", "--adapter", "x", "--prompt", "sks dog", "--scale", "nan"], "--scale must be a finite number"),
        (["generate", "--adapter", "x", "--prompt", "sks dog", "--scale", "inf"], "--scale must be a finite number"),
        (["generate", "--adapter", "x:inf", "--prompt", "sks dog"], "must be a finite number"),
        (["generate", "--adapter", "x", "--prompt", "sks dog", "--scale", "1e30"], "from -100 to 100"),
        (["generate", "--adapter", "", "--prompt", "sks dog"], "--adapter is empty"),
        (["generate", "--adapter", "x", "--prompt", "sks dog", "--seed", "-1"], "--seed must be at least 0"),
        (["generate", "--adapter", "x", "--prompt", "sks dog", "--num_inference_steps", "2000"], "at most 1000"),
        (["train", "--seed", "99999999999999999999999"], "--seed must be at least 0 and below"),
        (["train", "--alpha", "0"], "--alpha must be above 0"),
        (["train", "--learning_rate", "1e300"], "--learning_rate must be a finite number"),
        (["train", "--adam_beta1", "1.5"], "--adam_beta1 must be at least 0 and below 1"),
        (["train", "--adam_weight_decay", "-1"], "--adam_weight_decay must be at least 0"),
        (["train", "--num_vectors", "3"], "--num_vectors is of a --placeholder_token"),
        (
            ["train", "--instance_data_dir", "assets/subject/train", "--instance_prompt", ""],
            "--instance_prompt is empty",
        ),
        (["train", "--name", "../evil"], "--name '../evil' makes no file name"),
        (["train", "--name", ".hidden"], "makes no file name"),
        (["train", "--placeholder_token", "teddy", "--initializer_token", "cat"], "already has the token 'teddy'"),
        (["validate", "--validation_fraction", "0.5", "--validation_data_dir", "x"], "exclude each other"),
        (["shrink", "--adapter", "x", "--output", "README.md", "--max_bytes", "9000"], "is there already"),
        (["combine", "--adapter", "x", "--output", "README.md"], "is there already"),
        (["export", "--adapter", "x", "--output", "docs"], "--output docs is a folder"),
        (["export", "--adapter", "x", "--output", "no/where.safetensors"], "there is no folder no; make it first"),
        (["bench", "--output", "no/where.json"], "there is no folder no; make it first"),
        (["info", "nope.safetensors"], "no adapter file"),
        (["train", "--config", "nope.toml"], "no file nope.toml"),
        (["export", "--adapter", "nope.safetensors", "--output", "x"], "no adapter file"),
        (["export", "--adapter", "x"], "--output is missing"),
        (["merge", "--output_dir", "x"], "--adapter is missing"),
        (["combine", "--adapter", "nope.safetensors:loud", "--output", "x"], "'loud' after the colon"),
        (["shrink", "--adapter", "x", "--output", "y"], "--max_bytes is missing"),
        (["import", "--weights", "x.pt", "--output", "y"], "--pretrained_model_name_or_path is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    written = ["--output_dir", str(tmp_path)] if arguments[0] == "train" else []
    assert main([*arguments, *written]) == 2
    assert not list(tmp_path.iterdir())
    captured = capsys.readouterr()
    said = captured.err.splitlines()[-1]
    assert message in said and said.startswith("comcat: ") and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("train", 'save_precision = "x"', "--save_precision must be one of fp16, bf16, fp32, not 'x'"),
        ("train", 'kind = "x"', "--kind must be one of"),
        ("train", 'prior = "x"', "--prior must be one of"),
        ("train", 'mixed_precision = "fp8"', "--mixed_precision must be one of no, fp16, bf16"),
        ("train", 'lr_scheduler = "foo"', "--lr_scheduler must be one of"),
        ("generate", 'precision = "x"\nprompt = ["sks"]', "--precision must be one of"),
        ("train", '[[subjects]]\ninstance_prompt = "a photo of sks dog"', "subjects[0] needs instance_data_dir"),
    ],
)
def test_a_toml_file_has_the_choices_of_the_flags(command, text, message, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert main([command, "--config", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]


@pytest.mark.slow
def test_no_file_of_the_user_is_replaced_unless_asked(tmp_path, capsys):
    assert (
        main(["train", "--output_dir", str(tmp_path / "a b"), "--max_train_steps", "1", "--skip_final_inference"]) == 0
    )
    adapter, other = tmp_path / "a b" / "sks-teddy.safetensors", tmp_path / "mine.safetensors"
    assert f"--adapter '{adapter}'" in capsys.readouterr().out  # what to try can be pasted
    other.write_bytes(b"mine")
    command = ["shrink", "--adapter", str(adapter), "--output", str(other), "--max_bytes", "30000"]
    assert main(command) == 2 and other.read_bytes() == b"mine"
    assert main([*command, "--overwrite"]) == 0 and read_adapter(other).notes.trigger == "sks"


def test_info_tells_the_whole_header_without_torch_and_saves_the_thumbnail(tmp_path, capsys):
    from PIL import Image

    sample = ["--max_train_steps", "1", "--num_validation_images", "1", "--thumbnail", *FLAGS]
    assert main(["train", "--output_dir", str(tmp_path), *sample]) == 0
    file, preview = tmp_path / "sks-teddy.safetensors", tmp_path / "preview.jpg"
    code = f"import sys\nfrom comcat_diffusion.cli import main\nassert main(['info', {str(file)!r}]) == 0\n"
    done = run("-c", code + "assert not {'torch', 'diffusers', 'peft', 'PIL'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
    header = read_adapter(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    told = ["sks teddy", "a photo of sks teddy", "embedded", "UNet2DConditionModel", "rank 8", "attn2", digest]
    told += [header.fingerprint["layout"], *header.versions.values(), "resolution 64", "steps 1", "seed 0"]
    assert all(word in done.stdout for word in told)
    assert main(["info", str(file), "--save_preview", str(preview)]) == 0
    assert Image.open(preview).size == (64, 64) and 500 < preview.stat().st_size <= 15_000
    drawn = np.asarray(Image.open(tmp_path / "samples" / "step-000001-00-0.png")).astype(int)
    assert np.abs(np.asarray(Image.open(preview)).astype(int) - drawn).mean() < 5
    load_adapter(bases.load_base("embedded"), file)
    shrink(file, tmp_path / "small.safetensors", 40_000)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "small.safetensors"), "--save_preview", str(preview)]) == 2
    assert "has no thumbnail" in capsys.readouterr().err
    edited = tmp_path / "edited.safetensors"
    edited.write_bytes(file.read_bytes().replace(b"data:image/jpeg", b"data:text/plain"))
    assert main(["info", str(edited)]) == 2 and "thumbnail is no picture" in capsys.readouterr().err
    for bare in (["--skip_final_inference"], ["--max_bytes", "30000"]):
        assert main(["train", "--thumbnail", *bare]) == 2
        assert "--thumbnail needs a final sample" in capsys.readouterr().err


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--rnak", "2"])
    assert stopped.value.code == 2 and "--rnak" in capsys.readouterr().err


def test_the_two_scripts_are_the_two_commands():
    for script, flag in (("train_customize.py", "--instance_prompt"), ("inference.py", "--adapter")):
        done = run(script, "--help")
        assert done.returncode == 0 and flag in done.stdout
    done = run("train_customize.py", "nowhere/", "sks dog")
    assert (done.returncode, done.stderr) == (2, "comcat: There is no folder nowhere.\n")


def test_train_generate_and_info_from_any_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--max_train_steps", "2", "--output_dir", "o", "--num_validation_images", "1"]) == 0
    said, shown = capfd.readouterr()
    assert "Saved o/sks-teddy.safetensors" in said and "checked on a fresh base" in said
    for part in ("loss=", "lr=", "s/step=", "peak="):
        assert part in shown
    prompt = ["--prompt", "{subject} on the left", "--num_images", "1", "--num_inference_steps", "2"]
    assert main(["generate", "--adapter", "o/sks-teddy.safetensors:0.8", *prompt]) == 0
    assert "pictures/sheet.png" in capfd.readouterr().out
    assert main(["info", "o/sks-teddy.safetensors"]) == 0
    told = capfd.readouterr().out
    assert "sks teddy" in told and "on attn2 (7 attentions), with terms beside" in told


@pytest.mark.slow
def test_an_adapter_becomes_every_other_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = ["--max_train_steps", "3", "--skip_final_inference", "--learning_rate", "1e-2"]
    assert main(["train", "--kind", "foldable", "--everywhere", "--output_dir", "o", *steps]) == 0
    adapter = "o/sks-teddy.safetensors"
    for form in ("diffusers-lora", "kohya"):
        assert main(["export", "--adapter", adapter, "--output", f"{form}.safetensors", "--format", form]) == 0
    assert main(["merge", "--adapter", f"{adapter}:0.5", "--output_dir", "merged"]) == 0
    assert main(["combine", "--adapter", adapter, f"{adapter}:0.5", "--output", "sum.safetensors"]) == 0
    assert main(["shrink", "--adapter", adapter, "--output", "small.safetensors", "--max_bytes", "30000"]) == 0
    assert (tmp_path / "small.safetensors").stat().st_size <= 30_000
    assert main(["info", "small.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "side by side" not in said
    twice = ["small.safetensors", "small.safetensors"]
    assert main(["combine", "--adapter", *twice, "--output", "both.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "side by side" not in told and (tmp_path / "both.safetensors").stat().st_size <= 60_000
    assert main(["combine", "--adapter", *twice, "--rank", "16", "--output", "dense.safetensors"]) == 0
    assert "side by side" in capsys.readouterr().out
    assert main(["info", "both.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "by head and piece" in told and "format version 3" in told
    assert "Wrote kohya.safetensors" in said and "rank 16, 100.00% of the energy" in said and "by head" in said
    pipe = bases.load_base("embedded")
    pipe.load_lora_weights("diffusers-lora.safetensors")
    pipe.unload_lora_weights()
    for file in ("sum", "small"):
        load_adapter(pipe, f"{file}.safetensors", file)
    assert bases.load_base("merged")
    assert main(["merge", "--adapter", adapter, "--output_dir", "merged"]) == 2
    assert "holds something already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_free_adapter_is_not_exported_as_if_it_were_foldable(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = ["--max_train_steps", "3", "--skip_final_inference", "--learning_rate", "1e-2"]
    assert main(["train", "--kind", "free", "--everywhere", "--output_dir", "o", *steps]) == 0
    export = ["export", "--adapter", "o/sks-teddy.safetensors", "--output", "x.safetensors"]
    assert main(export) == 2 and main([*export, "--approximate"]) == 2
    assert not (tmp_path / "x.safetensors").exists()
    assert "of its effect, more than the 10%" in capsys.readouterr().err
    assert main([*export, "--approximate", "--force"]) == 0 and (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
def test_a_run_does_not_end_over_letters_that_its_output_cannot_hold(tmp_path):
    flags = ["--max_train_steps", "1", "--skip_final_inference", "--output_dir", str(tmp_path / "out")]
    flags += ["--instance_data_dir", str(tmp_path / "雪"), "--instance_prompt", "a photo of 狗狗 teddy"]
    (tmp_path / "雪").mkdir()
    shutil.copy(ROOT / "assets/subject/train/1.png", tmp_path / "雪" / "雪.png")
    own = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "train_customize.py", *flags], capture_output=True, cwd=ROOT, env=own)
    assert done.returncode == 0, done.stderr
    assert "'\\u72d7\\u72d7 teddy'" in done.stdout.decode("cp1252")
    assert (tmp_path / "out" / "狗狗-teddy.safetensors").is_file()


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"\u72d7 teddy"), ("gbk", "狗 teddy"), ("utf-8", "狗 teddy")]
)
def test_letters_that_an_output_can_hold_are_written_as_they_are(monkeypatch, encoding, shown):
    log = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", log)
    asked = ["--instance_data_dir", str(ROOT / "assets/subject/held_out"), "--instance_prompt", "a 狗 teddy"]
    assert main(["validate", *asked]) == 2  # the captions there are of another trigger
    log.flush()
    assert f"'{shown.split()[0]}'" in log.buffer.getvalue().decode(encoding)


@pytest.mark.slow
def test_a_run_goes_on_where_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", None), monkeypatch.setattr("sys.stderr", None)
    flags = ["--max_train_steps", "1", "--skip_final_inference", "--output_dir", str(tmp_path / "out")]
    assert main(["train", *flags]) == 0 and (tmp_path / "out" / "sks-teddy.safetensors").is_file()


def test_settings_are_read_as_they_were_written_whatever_the_locale(tmp_path):
    (tmp_path / "run.toml").write_text('instance_prompt = "a 狗 teddy"', "utf-8")
    code = "from comcat_diffusion.config import *; from comcat_diffusion.training.config import TrainConfig as T\n"
    own = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", f"{code}print(read_toml(T, {str(tmp_path / 'run.toml')!r}))"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=own)
    assert done.stdout.decode().strip() == "{'instance_prompt': 'a 狗 teddy'}", done.stderr


def test_in_a_log_a_progress_bar_is_a_line_in_ten_seconds(monkeypatch):
    """At a terminal it is drawn as before; two hundred steps of a tenth of a second take twenty, by a clock of ours."""

    class Screen(io.StringIO):
        def isatty(self):
            return True

    drawn = {}
    for kind in (io.StringIO, Screen):
        clock, stream = itertools.count(0, 0.05), kind()
        monkeypatch.setattr("tqdm.std.time", lambda clock=clock: next(clock)), monkeypatch.setattr("sys.stderr", stream)
        terminal = commands._Terminal()
        for step in range(1, 201):
            terminal.step(Step(step, 0.1, None, 1e-3, None, 0.1), 200, 1 << 30)
        terminal.close()
        drawn[kind] = stream.getvalue().count("\r")
    assert 2 <= drawn[io.StringIO] <= 5 < 50 < drawn[Screen]
