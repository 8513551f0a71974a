"""The whole of `comcat evaluate` on the embedded base, tiny: what it leaves behind, going on after a cut, refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comcat_diffusion import ComcatConfig, bases, save_adapter
from comcat_diffusion.adapters.header import Notes
from comcat_diffusion.cli import main
from comcat_diffusion.evaluation.config import EvaluateConfig
from comcat_diffusion.evaluation.evaluate import evaluate
from comcat_diffusion.evaluation.report import Report
from comcat_diffusion.evaluation.world import Seen, see
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from tests import tiny_bases

ROOT = Path(__file__).parents[1]
HELD_OUT, TRAIN = (str(bases.assets() / "subject" / part) for part in ("held_out", "train"))
NOTES = Notes("sks", "a photo of sks teddy", "teddy", {"steps": 20})
CALLING = ["a photo of a big sks teddy on the left, red background", "{subject} at the top"]
UNRELATED = ["a photo of a small cat at the top, blue background"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, randomize):
    """A folder with an adapter of noise and the run.toml of its training, prompts, and one more adapter below."""
    folder = tmp_path_factory.mktemp("evaluate")
    pipe = bases.load_base("embedded")
    pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"]), "dog")
    randomize(pipe.unet, "dog", std=0.3)
    save_adapter(pipe, folder / "teddy.safetensors", "dog", "embedded", NOTES)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.1)
    save_adapter(pipe, folder / "other.safetensors", "dog", "another base", NOTES)
    (folder / "run.toml").write_text(f'instance_data_dir = "{TRAIN}"\n')
    (folder / "prompts.txt").write_text("\n".join(CALLING) + "\n\n")
    (folder / "unrelated.txt").write_text("\n".join(UNRELATED))
    return folder


@pytest.fixture(scope="module")
def config(place):
    settings = {
        "adapter": [str(place / "teddy.safetensors"), str(place / "teddy.safetensors:0")],
        "subject_dir": HELD_OUT,
        "prompts": str(place / "prompts.txt"),
        "drift_prompts": str(place / "unrelated.txt"),
        "seeds": 2,
        "num_inference_steps": 2,
        "output_dir": str(place / "evaluation"),
    }
    return lambda **more: EvaluateConfig(**{**settings, **more})


@pytest.fixture(scope="module")
def report(config) -> Report:
    """Of an adapter at its full scale and at none."""
    return evaluate(config())


def count(config) -> int:
    """How many pictures an evaluation draws."""
    drawn = []
    evaluate(config, on_picture=lambda done, total: drawn.append((done, total)))
    assert [done for done, _ in drawn] == list(range(1, len(drawn) + 1))
    return len(drawn)


def test_it_leaves_these_files_and_no_others(report):
    found = sorted(str(path.relative_to(report.folder)) for path in report.folder.rglob("*") if path.is_file())
    features = [name for name in found if name.startswith("features/")]
    prompts = (
        "a-photo-of-a-big-sks-teddy-on-the-left-red-background",
        "a-photo-of-a-small-cat-at-the-top-blue-background",
        "a-photo-of-teddy",
        "sks-teddy-at-the-top",
    )
    pictures = [name.rsplit("-", 2) for name in found if name.startswith("pictures/")]
    rows = ("before", "teddy", "teddy-x-0")
    assert {(name, seed) for name, _, seed in pictures} == {
        (f"pictures/{row}/{prompt}", f"{seed}.png") for row in rows for prompt in prompts for seed in (0, 1)
    }
    assert len(pictures) == 24
    assert set(found) - set(features) - {"-".join(parts) for parts in pictures} == {
        "plot.png", "report.json", "report.md", "sheet.png",
    }  # fmt: skip
    assert features and all(name.endswith(".safetensors") for name in features)


def test_the_report_says_everything_with_its_interval(report, place):
    told = json.loads((report.folder / "report.json").read_text())
    assert told["best"] is report.best is None  # an adapter of noise
    assert "learned x (1 - drift)" in told["rule"]
    before, full, off = told["rows"]
    assert (before["name"], full["name"], off["name"]) == ("before", "teddy", "teddy x 0")
    names = {
        "learned", "obeyed", "subject_fidelity", "subject_fidelity_clip", "copying", "prompt_fidelity", "drift",
        "drift_of_class", "pixel_drift", "diversity", "background_right", "place_right", "size_right", "shape",
        "colour_off", "background_moved",
    }  # fmt: skip
    assert set(full["measures"]) == names
    for found in full["measures"].values():
        assert found["low"] <= found["mean"] <= found["high"]
    assert full["bytes"] == (place / "teddy.safetensors").stat().st_size and full["trained"] == {"steps": 20}
    means = {name: found["mean"] for name, found in full["measures"].items()}
    kept = (1 - means["drift"]) * (1 - means["background_moved"] / 255) * (1 - means["colour_off"] / 255)
    assert full["score"] == pytest.approx(means["learned"] * kept * means["shape"])
    assert before["measures"]["background_moved"]["mean"] == 0 < means["background_moved"]
    assert told["held_out_pictures"] == 2 and told["training_pictures"] == 4
    assert told["prompts"]["of_class"] == ["a photo of teddy"] and told["subject"] == "sks teddy"
    around = told["circumstances"]
    assert around["base"] == "embedded" and around["device"] == "cpu" and around["precision"] == "fp32"
    assert around["steps"] == 2 and around["guidance"] == 2.0 and around["torch"] == torch.__version__
    page = (report.folder / "report.md").read_text()
    for part in ("details of subjects alone", "95% bootstrap", "sheet.png", "plot.png", UNRELATED[0], report.verdict):
        assert part in page
    assert len(Image.open(report.folder / "sheet.png").getcolors(1 << 20)) > 1000
    assert len(Image.open(report.folder / "plot.png").convert("RGB").getcolors(1 << 20)) > 10


def test_an_adapter_at_scale_zero_is_the_base_and_at_full_scale_is_not(report):
    before, full, off = report.rows
    for name, found in before.measures.items():
        assert off.measures[name].mean == pytest.approx(found.mean, abs=1e-5)
    for name in ("drift", "learned"):
        assert before.measures[name].mean == pytest.approx(0, abs=1e-5)
    for name in ("drift", "drift_of_class", "pixel_drift"):
        assert full.measures[name].mean > 0.005
    assert full.measures["subject_fidelity"].mean != pytest.approx(before.measures["subject_fidelity"].mean, abs=1e-3)


def test_prompts_that_leave_something_open_do_not_count_for_it(report):
    """Of the two prompts the first alone names a background; both name a place."""
    made = {name: report.rows[0].measures[f"{name}_right"].mean for name in ("background", "place")}
    folder = report.folder / "pictures/before"
    seen = [see(np.asarray(Image.open(path))) for path in sorted(folder.glob("*red-background*"))]
    assert made["background"] == sum(one.background == "red" for one in seen) / 2
    above = [see(np.asarray(Image.open(path))) for path in sorted(folder.glob("sks-teddy-at*"))]
    assert made["place"] == (sum(one.place == "left" for one in seen) + sum(one.place == "top" for one in above)) / 4
    whole = sum(one == Seen("red", "left", "big") for one in seen) + sum(one.place == "top" for one in above)
    assert report.rows[0].measures["obeyed"].mean == whole / 4


def test_what_is_there_is_not_drawn_again(report, config):
    files = {path: path.stat().st_mtime_ns for path in (report.folder / "pictures").rglob("*.png")}
    content = (report.folder / "report.json").read_bytes()
    assert count(config()) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert (report.folder / "report.json").read_bytes() == content


@pytest.mark.slow
def test_a_cut_evaluation_goes_on_and_makes_the_same_report(report, config, tmp_path):
    shutil.copytree(report.folder, tmp_path / "cut")
    first, second, *_ = sorted((tmp_path / "cut/pictures/teddy").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])
    (tmp_path / "cut/report.json").unlink()
    cut = config(output_dir=str(tmp_path / "cut"))
    assert count(cut) == 2
    again = json.loads((tmp_path / "cut/report.json").read_text())
    for ours, theirs in zip(again["rows"], report.rows, strict=True):
        # a batch of two instead of four may round a pixel the other way
        assert ours["score"] == pytest.approx(theirs.score, abs=5e-3)
    halved = config(output_dir=str(tmp_path / "cut"), adapter=[f"{config().adapter[0]}:0.5"])
    assert count(halved) == 8  # four prompts, two seeds; the base's pictures are there


@pytest.mark.slow
def test_a_run_is_its_checkpoints_by_their_steps_and_then_its_own_files(config, tmp_path):
    run = tmp_path / "run"
    settings = {"max_train_steps": 10, "train_batch_size": 1, "checkpointing_steps": 5, "skip_final_inference": True}
    subject = {"instance_data_dir": TRAIN, "instance_prompt": "a photo of sks teddy", "validation_data_dir": HELD_OUT}
    customize(TrainConfig(output_dir=str(run), **settings, **subject))
    shutil.copytree(run / "checkpoints/checkpoint-5", run / "checkpoints/.checkpoint-7.partial")
    said = []
    short = {"num_inference_steps": 1, "seeds": 1, "output_dir": str(tmp_path / "o")}
    made = evaluate(config(adapter=[], run_dir=str(run), **short), said.append)
    assert [row.name for row in made.rows] == [
        "before", "checkpoint-5/sks-teddy", "checkpoint-10/sks-teddy", "run/sks-teddy", "sks-teddy-best",
    ]  # fmt: skip
    assert "4 adapters" in said[0] and "checkpoints/checkpoint-5/sks-teddy.safetensors, " in said[0]
    assert made.train == 4 and "diversity" not in made.rows[1].measures
    assert made.rows[1].measures != made.rows[2].measures == made.rows[3].measures


@pytest.mark.slow
def test_another_base_is_judged_by_a_dinov2_and_a_clip(tmp_path, randomize):
    base = tiny_bases.sd1(tmp_path / "sd1")
    pipe = bases.load_base(str(base))
    pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"]), "dog")
    randomize(pipe.unet, "dog")
    save_adapter(pipe, tmp_path / "teddy.safetensors", "dog", str(base), NOTES)
    settings = {"num_inference_steps": 1, "seeds": 1, "output_dir": str(tmp_path / "o"), "subject_dir": HELD_OUT}
    dino = str(tiny_bases.dino(tmp_path / "dino"))
    config = EvaluateConfig(
        adapter=[str(tmp_path / "teddy.safetensors")], clip_model="embedded", dino_model=dino, **settings
    )
    report = evaluate(config)
    assert set(report.rows[1].measures) == {
        "learned", "obeyed", "subject_fidelity", "subject_fidelity_clip", "prompt_fidelity", "drift", "drift_of_class",
        "pixel_drift", "shape", "colour_off", "background_moved",
    }  # fmt: skip
    assert report.circumstances["base"] == "sd1" and report.circumstances["pictures compared by"] == "dino"
    assert "copying was not measured" in " ".join(report.notes) and "alone" not in " ".join(report.notes)
    assert report.prompts.calling[0] == "a photo of sks teddy on the beach"
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-base-patch32.*looked for its config.json"):
        evaluate(EvaluateConfig(adapter=[str(tmp_path / "teddy.safetensors")], dino_model=dino, **settings))
    with pytest.raises(ValueError, match=f"--clip_model {dino} knows no texts"):
        evaluate(EvaluateConfig(adapter=[str(tmp_path / "teddy.safetensors")], clip_model=dino, **settings))


def test_training_pictures_reward_copying_and_are_refused_unless_forced(config, tmp_path):
    for source, name in ((HELD_OUT, "1.png"), (TRAIN, "2.png")):
        Image.open(Path(source) / name).save(tmp_path / f"{Path(source).name}.png", compress_level=1)  # other bytes
    mixed = config(subject_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"train.png are training pictures.*--force"):
        evaluate(mixed)


@pytest.mark.slow
def test_if_forced_they_are_told_of(config, tmp_path):
    for source, name in ((HELD_OUT, "1.png"), (TRAIN, "2.png")):
        Image.open(Path(source) / name).save(tmp_path / f"{Path(source).name}.png", compress_level=1)
    forced = evaluate(config(subject_dir=str(tmp_path), force=True))
    assert any("1 of the 2 held-out pictures are training pictures" in note for note in forced.notes)


def test_training_pictures_can_be_named(config, place, tmp_path):
    shutil.copy(place / "teddy.safetensors", tmp_path / "teddy.safetensors")
    alone = {"adapter": [str(tmp_path / "teddy.safetensors")], "subject_dir": TRAIN}
    with pytest.raises(ValueError, match="1.png and 3 more are training pictures"):
        evaluate(config(**alone, instance_data_dir=TRAIN))
    with pytest.raises(FileNotFoundError, match="--instance_data_dir: There is no folder nowhere"):
        evaluate(config(**alone, instance_data_dir="nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subject_dir": None}, "--subject_dir is missing"),
        ({"subject_dir": "nowhere"}, "--subject_dir: There is no folder nowhere"),
        ({"subject_dir": "EMPTY"}, "--subject_dir: There are no pictures"),
        ({"adapter": []}, "--adapter is missing"),
        ({"adapter": ["nope.safetensors"]}, "no adapter file"),
        ({"adapter": ["teddy.safetensors", "other.safetensors"]}, "their bases differ, evaluate them apart"),
        ({"adapter": ["other.safetensors"], "pretrained_model_name_or_path": "embedded"}, "does not fit"),
        ({"adapter": [], "run_dir": "EMPTY"}, "holds no adapter file"),
        ({"adapter": [], "run_dir": "nowhere"}, "--run_dir: there is no folder nowhere"),
        ({"prompts": "nope.txt"}, "--prompts: there is no file nope.txt"),
        ({"prompts": "blank.txt"}, "--prompts: .*blank.txt holds no prompts"),
        ({"prompts": "unrelated.txt"}, "does not name the subject of .*: write 'sks teddy'"),
        ({"drift_prompts": "prompts.txt"}, "--drift_prompts: .* names the subject"),
        ({"prompts": "latin.txt"}, "latin.txt is not UTF-8"),
        ({"clip_model": "nobody/nothing"}, "looked for its config.json"),
        ({"scheduler": "NoSuchScheduler"}, "no scheduler of this name"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"class_prompt": " "}, "--class_prompt is empty"),
        ({"class_prompt": "a photo of sks teddy"}, "--class_prompt: .* names the subject"),
        ({"output_dir": "/proc/nope"}, "--output_dir"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_drawn(config, place, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(place)
    (place / "blank.txt").write_text("\n \n")
    (place / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    settings = {name: str(tmp_path) if value == "EMPTY" else value for name, value in settings.items()}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        evaluate(config(**{"output_dir": str(tmp_path / "o"), **settings}))
    assert "\n" not in str(caught.value) and not (tmp_path / "o/pictures").exists()


def test_the_command_prints_a_table_and_the_best(report, config, capsys):
    settings = config()
    arguments = [
        *("--adapter", *settings.adapter, "--subject_dir", HELD_OUT, "--prompts", settings.prompts, "--seeds", "2"),
        *("--drift_prompts", settings.drift_prompts, "--num_inference_steps", "2", "--output_dir", settings.output_dir),
    ]
    assert main(["evaluate", *arguments]) == 0
    said = capsys.readouterr().out
    assert "| teddy x 0 |" in said and "Best: " in said and "report.md" in said and "Drawing" not in said
    assert main(["evaluate", *arguments, "--run", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("comcat: --run_dir")


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(config, tmp_path):
    settings = config()
    arguments = [
        *("--adapter", settings.adapter[0], "--subject_dir", HELD_OUT, "--prompts", settings.prompts, "--seeds", "2"),
        *("--drift_prompts", settings.drift_prompts, "--num_inference_steps", "2", "--batch_size", "1"),
    ]
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [
            "-m",
            "comcat_diffusion.cli",
            "evaluate",
            *arguments,
            "--output_dir",
            str(tmp_path / str(processes)),
        ]
        around = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=around, check=False)
        assert done.returncode == 0 and done.stdout.count("Best: ") == 1, done.stderr
    one, two = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("1", "2"))
    assert one == two and len(one) > 20
