"""Help in two lengths, what is required, what was meant, and `comcat train my_dog/ "sks dog"`."""

import argparse
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import comcat_diffusion
from comcat_diffusion import read_adapter
from comcat_diffusion.cli import COMMANDS, _parser, main
from comcat_diffusion.config import FEW, flag_of, from_arguments
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.named import with_words
from tests.quick_training import FLAGS

ROOT = Path(__file__).parents[1]


def printed(capsys, *arguments, status=0):
    """What a command line that ends at once prints to stdout, or, if it is refused, its one sentence."""
    try:
        found = main(list(arguments))
    except SystemExit as stopped:
        found = stopped.code
    said = capsys.readouterr()
    assert found == status
    if status:
        assert not said.out
        (line,) = said.err.splitlines()
        return line
    return said.out


def settings(kind):
    return [item for item in fields(kind) if not item.metadata.get("file_only")]


def flags_in(text):
    return set(re.findall(r"^ +--(?!no-)(\w+)", text, re.M)) - {"config", "help"}


def test_comcat_alone_and_as_a_module_prints_its_help(capsys):
    alone = printed(capsys)
    assert alone == printed(capsys, "--help") and "comcat" in alone and "train" in alone
    done = subprocess.run(
        [sys.executable, "-m", "comcat_diffusion"], capture_output=True, text=True, cwd=ROOT, env={"COLUMNS": "80"}
    )
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["usage:", "comcat"])


def test_comcat_says_its_version(capsys):
    assert printed(capsys, "--version") == f"comcat-diffusion {comcat_diffusion.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_is_usual_and_all_of_it_when_asked(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    kind = COMMANDS[command][1]
    short, whole = printed(capsys, command, "--help"), printed(capsys, command, "--help-all")
    every = {flag_of(item) for item in settings(kind)}
    usual = {flag_of(item) for item in settings(kind) if item.metadata.get("usual") or item.metadata.get("required")}
    assert flags_in(whole) == every
    assert flags_in(short) == (every if len(every) <= FEW else usual) and len(flags_in(short)) <= 18
    left = len(every) - len(flags_in(short))
    assert (f"{left} more settings: comcat {command} --help-all" in short) == bool(left)
    assert "more settings" not in whole


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_slips(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for text in (printed(capsys, command, "--help-all"), printed(capsys, command, "--help")):
        assert not re.search(r"(?<!\.)\.\.(?!\.)|Default: (None|\[|True|False|\.)| {2}\.|Default:[^.]*Default:", text)
        told = re.findall(r"^ +--\w.*? {2,}(\S.*)$", text, re.M)
        assert all(sentence.endswith((".", "exit")) for sentence in told), [t for t in told if not t.endswith(".")]


def test_a_default_is_shown_also_where_it_is_nothing_much(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    whole = printed(capsys, "train", "--help-all")
    for flag, told in (("seed", "Default: 0."), ("center_crop", "Default: yes."), ("noise_offset", "Default: 0.0.")):
        (line,) = re.findall(rf"^ +--{flag}\b.*(?:\n {{10,}}.*)?", whole, re.M)
        assert told in line
    assert "Default: the one you are in." in printed(capsys, "pull", "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_required_is_marked_and_missed(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    kind, text = COMMANDS[command][1], printed(capsys, command, "--help")
    required = [item for item in settings(kind) if item.metadata.get("required")]
    (usage,) = re.findall(r"^usage: (.*)$", text, re.M)
    assert [flag for flag in re.findall(r"--(\w+) ", usage) if flag != "SETTING"] == [item.name for item in required]
    for item in required:
        assert re.search(rf"^ +--{item.name} .*(\n {{10,}}.*)*Required\.", text, re.M), item.name
    if required:
        assert f"--{required[0].name} is missing: " in printed(capsys, command, status=2)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("trian", "there is no command 'trian': did you mean train?"),
        ("Generate", "did you mean generate?"),
        ("qqq", "there is no command 'qqq'."),
        ("--rank 3", "--rank comes after a command"),
        ("train --rnak 3", "there is no --rnak: did you mean --rank?"),
        ("train --rnak=3", "there is no --rnak: did you mean --rank?"),
        ("train --learning-rate 1", "there is no --learning-rate: did you mean --learning_rate?"),
        ("train –rank 3", "there is no –rank: did you mean --rank?"),
        ("train --steps 3", "did you mean --max_train_steps or"),
        ("generate --promt x", "there is no --promt: did you mean --prompt?"),
        ("pull --zzzzzzz", "there is no --zzzzzzz. (comcat pull --help-all shows all.)"),
        ("generate -n 4 --prompt x", "there is no -n. (comcat generate --help-all shows all.)"),
        ("info --save x y", "no adapter file y"),
        ("train --rank two", "--rank: invalid int value: 'two'"),
        ("pull --repo_id", "--repo_id: expected one argument"),
        ("train --kind tide", "--kind: invalid choice: 'tide'"),
        ("generate dog.safetensors --prompt x", "'dog.safetensors' belongs to no flag of comcat generate"),
        ("train my_dog sks dog", "'dog' belongs to no flag of comcat train; what holds spaces stands in quotes."),
    ],
)
def test_a_slip_is_one_sentence_that_says_what_was_meant(line, sentence, capsys):
    said = printed(capsys, *line.split(), status=2)
    assert said.startswith("comcat: ") and sentence in said


def trained(*arguments):
    parsed = _parser().parse_args(["train", *arguments])
    return from_arguments(TrainConfig, with_words(parsed))


@pytest.mark.parametrize("place", [0, 2, 3], ids=["first", "between", "last"])
def test_a_folder_and_a_subject_are_enough(place):
    flags = ["--rank", "4", "--everywhere"]
    config = trained(*flags[:place], "my_dog/", "sks big dog", *flags[place:])
    assert (config.instance_data_dir, config.trigger) == ("my_dog/", "sks")
    assert config.instance_prompt == "a photo of sks big dog" and config.rank == 4 and config.everywhere


def test_a_flag_says_the_prompt_otherwise_and_a_file_the_rest(tmp_path):
    said = trained("my_dog", "sks dog", "--instance_prompt", "a painting of sks dog")
    assert (said.instance_prompt, said.trigger) == ("a painting of sks dog", "sks")
    (tmp_path / "run.toml").write_text('rank = 3\ninstance_prompt = "a photo of ohwx cat"\n')
    given = trained("--config", str(tmp_path / "run.toml"), "my_dog", "sks dog")
    assert (given.rank, given.instance_prompt) == (3, "a photo of sks dog")
    alone = trained("my_dog", "--config", str(tmp_path / "run.toml"))
    assert (alone.instance_data_dir, alone.instance_prompt) == ("my_dog", "a photo of ohwx cat")
    assert trained("my_dog", "--trigger", "ohwx").trigger == "ohwx"
    assert with_words(argparse.Namespace(config=None, rank=2)) == argparse.Namespace(config=None, rank=2)


@pytest.mark.parametrize("command", ["train", "validate"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x", "sks dog", "--instance_data_dir", "y"], "The folder is said twice, by 'x' and by --instance_data_dir"),
        (["x", "sks dog", "--trigger", "sks"], "The subject is said twice, by 'sks dog' and by --trigger"),
        (["x", "dog"], "'dog' is no subject: write a rare word that will call it, then what it is, like 'sks dog'."),
        (["x", " "], "' ' is no subject"),
        (["sks dog"], 'There is no folder sks dog. Name the folder, then its subject, as in: my_dog/ "sks dog".'),
        (["docs"], "What does docs show? Name the folder, then its subject"),
        (["x", "sks dog", "--instance_prompt", "a photo of a cat"], "does not contain the trigger 'sks'"),
    ],
)
def test_what_is_said_twice_or_not_at_all_is_one_sentence(command, words, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert sentence in printed(capsys, command, *words, "--output_dir", str(tmp_path), status=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_subject_is_validated_and_taught_by_two_words(tmp_path, capsys):
    words = [str(ROOT / "assets" / "subject" / "train"), "sks teddy", "--output_dir", str(tmp_path)]
    assert main(["validate", *words]) == 0
    assert "'sks teddy': 4 pictures" in capsys.readouterr().out
    assert main(["train", *words, "--max_train_steps", "1", "--skip_final_inference", *FLAGS]) == 0
    notes = read_adapter(tmp_path / "sks-teddy.safetensors").notes
    assert (notes.trigger, notes.class_word, notes.instance_prompt) == ("sks", "teddy", "a photo of sks teddy")
