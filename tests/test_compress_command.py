"""`comcat compress` from the settings to the folder it leaves, on tiny models; and what it refuses, in one sentence."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoImageProcessor, BertConfig, BertModel, ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from comcat_diffusion import ComcatConfig, bases
from comcat_diffusion.cli import main
from comcat_diffusion.compression import cost, learning, load_compressed
from comcat_diffusion.compression.calibrate import checked
from comcat_diffusion.compression.config import UNET, CompressConfig
from comcat_diffusion.compression.diffusion import Diffusion, default_prompts, recorded
from comcat_diffusion.compression.finetune import Finetune
from comcat_diffusion.compression.pictures import Batches, Shot, find_labelled, labels_of
from comcat_diffusion.compression.rank_search import RankSearch
from comcat_diffusion.compression.ranks import Bar, grid, picture_of_ranks, place_of
from comcat_diffusion.compression.run import run
from comcat_diffusion.config import read_toml
from comcat_diffusion.generation.pictures import Drawing, Sampling
from tests import tiny_bases
from tests.compression_models import CLASSES, built, out

FILES = {"compressed.safetensors", "plan.json", "report.json", "report.md", "run.toml", "ranks.png"}
LOADERS = {"config.json", "modeling_comcat.py"}  # by which transformers loads a vision model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder of a tiny ViT with its image processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    built("vit").float().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense():
    return built("vit").float()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, dense):
    """Folders of classes as the dense model sees them, so that its top-1 is 100."""
    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(48):
        values = np.kron(noise.integers(0, 256, (4, 4, 3)), np.ones((2, 2, 1))).astype(np.uint8)  # 8, 8, 3
        pixels = torch.from_numpy(values).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            label = int(dense(pixels).logits.argmax())
        folder = root / f"LABEL_{label}" / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / f"{number:02d}.png")
    assert len(list(root.iterdir())) > 1
    return root


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return tiny_bases.sd1(tmp_path_factory.mktemp("bases") / "sd1")


@pytest.fixture
def ask(tmp_path):
    """Run with these settings, into `tmp_path/small`."""

    def asked(model, note=lambda text: None, **more):
        return run(CompressConfig(model=str(model), output_dir=str(tmp_path / "small"), **more), note)

    return asked


def files(folder):
    return {path.name for path in Path(folder).iterdir()}


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_a_classifier_becomes_a_folder_and_its_report_can_be_computed_again(classifier, dense, pictures, ask):
    report = ask(classifier, reduction=0.74, calibration_dir=str(pictures), eval_dir=str(pictures), batch_size=16)
    assert files(report.folder) == FILES | LOADERS | {"preprocessor_config.json"}
    small, plan = load_compressed(report.folder)
    # the budget
    assert count(small) == plan.parameters_after == report.after.parameters <= math.floor((1 - 0.74) * count(dense))
    assert report.counted == report.before.parameters == count(dense) and 0.74 <= report.removed < 0.74 + 0.02
    # the work of one picture
    one = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    assert report.before.multiply_adds == cost.multiply_adds(dense, one)
    assert report.after.multiply_adds == cost.multiply_adds(small, one) < report.before.multiply_adds
    # the top-1, picture by picture
    processor, right = AutoImageProcessor.from_pretrained(report.folder, backend="pil"), []
    for path in pictures.rglob("*.png"):
        with torch.no_grad():
            logits = small(**processor(Image.open(path), return_tensors="pt")).logits
        right.append(path.parts[-3] == f"LABEL_{int(logits.argmax())}")
    assert report.quality.top1_before == 100 and len(right) == 48
    assert 20 < report.quality.top1_after == 100 * sum(right) / 48 < 100
    # the files say the same
    again = CompressConfig(**read_toml(CompressConfig, report.folder / "run.toml"))
    assert again.reduction == 0.74 and again.calibration_dir == str(pictures) and again.train_dir is None
    said = json.loads((report.folder / "report.json").read_text())
    assert said["widths"] == plan.widths and said["after"]["parameters"] == count(small)
    assert said["model"] == plan.model_id == "tiny-vit" and said["calibrated_on"] == "48 pictures"
    assert report.table() in (report.folder / "report.md").read_text()
    assert min(said["before"]["samples_a_second"], said["speedup"], said["circumstances"]["rounds"]) > 0


def test_calibration_takes_so_many_pictures_at_random_and_they_change_the_result(classifier, pictures, ask):
    report = ask(classifier, calibration_dir=str(pictures), calibration_pictures=20)
    assert report.calibrated_on == "20 pictures"
    with_pictures = load_compressed(report.folder)[0].state_dict()
    for path in report.folder.iterdir():
        path.unlink()  # an empty folder may be filled
    plain = ask(classifier)
    assert plain.calibrated_on == "nothing" and plain.quality.top1_after is None
    assert "top-1" in report.table() or "top-1" not in plain.table()
    other = load_compressed(plain.folder)[0].state_dict()
    assert any(a.shape != other[n].shape or not torch.equal(a, other[n]) for n, a in with_pictures.items())


@pytest.mark.parametrize("method", ["search", "uniform", "matrix"])
def test_every_method_holds_the_budget(classifier, dense, pictures, ask, method):
    report = ask(
        classifier, method=method, train_dir=str(pictures), search_steps=4, batch_size=12, reduction=0.4, multiple=2
    )
    small, plan = load_compressed(report.folder)
    assert plan.method == method and count(small) <= 0.6 * count(dense)
    assert all(width is None or width % 2 == 0 for width in plan.widths.values())


@pytest.mark.slow
def test_fine_tuning_brings_the_model_nearer_and_leaves_the_random_numbers(classifier, pictures, ask):
    said, state = [], torch.get_rng_state()
    report = ask(
        classifier, said.append, reduction=0.7, train_dir=str(pictures), eval_dir=str(pictures), batch_size=10,
        finetune_epochs=8, learning_rate=3e-3,
    )  # fmt: skip
    assert report.finetuning.steps == 8 * 5 and report.finetuning.last_loss < report.finetuning.first_loss
    assert sum(text.startswith("Fine-tuning: pass") for text in said) == 8
    assert torch.equal(torch.get_rng_state(), state)
    assert "Fine-tuned for 40 steps" in (report.folder / "report.md").read_text()
    assert report.quality.top1_after > 60 and not load_compressed(report.folder)[0].training


def test_every_pass_has_its_own_order_with_every_picture_once(classifier, pictures):
    processor = AutoImageProcessor.from_pretrained(classifier, backend="pil")
    shots = find_labelled(pictures, "train_dir", {f"LABEL_{n}": n for n in range(CLASSES)}, CLASSES)
    assert all(shot.path.parts[-3] == f"LABEL_{shot.label}" for shot in shots)
    two = Batches(shots, 20, processor, epochs=2, seed=0)
    assert [len(batch["labels"]) for batch in two] == [20, 20, 8] * 2
    passes = [torch.cat([two[i]["pixel_values"] for i in part]) for part in ((0, 1, 2), (3, 4, 5))]
    assert not torch.equal(*passes)
    assert_close(*(one.flatten(1).double().sum(1).sort().values for one in passes))
    assert torch.equal(two[4]["pixel_values"], two[4]["pixel_values"])


PROMPTS = ["a red fox", "a big owl"]


@pytest.fixture(scope="module")
def unet_report(sd1, tmp_path_factory):
    """Of one compression of the base's attentions, for the tests that look at its folder."""
    settings = {"part": UNET, "reduction": 0.5, "num_inference_steps": 3, "batch_size": 2}
    output = tmp_path_factory.mktemp("runs") / "small"
    return run(CompressConfig(model=str(sd1), calibration_prompt=PROMPTS, output_dir=str(output), **settings))


@pytest.mark.slow
def test_a_unet_becomes_a_folder_with_a_sheet_and_its_drift(sd1, unet_report):
    report = unet_report
    rest = {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert files(report.folder) == FILES | {"sheet.png"} | rest and files(report.folder / "unet") == {"config.json"}
    small, _ = load_compressed(report.folder)
    unet = StableDiffusionPipeline.from_pretrained(sd1).unet
    attention = sum(unit.dense for unit in cost.units(unet, ("attention",)))
    assert report.counted == attention and count(unet) - count(small) >= 0.5 * attention
    assert report.calibrated_on == "3 U-Net calls of 2 prompts"  # two latents and their two without text in a call
    # the drift, on the calls that calibration did not see
    drawings = [Drawing(prompt, 2 + number) for number, prompt in enumerate(PROMPTS)]
    calls, _ = recorded(bases.load_base(str(sd1)), drawings, Sampling(3, 7.5, batch_size=2))
    with torch.no_grad():
        pairs = [(unet(**call).sample, small(**call).sample) for call in calls]
    wanted, found = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    assert 0 < report.quality.drift < 1
    assert report.quality.drift == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-5)
    one = {name: value[:1] if value.ndim else value for name, value in calls[0].items()}
    assert report.after.multiply_adds == cost.multiply_adds(small, one) < report.before.multiply_adds
    assert 'bases.load_base("small")' in (report.folder / "report.md").read_text()


@pytest.mark.slow
def test_a_sheet_is_drawn_with_the_guidance_that_the_base_is_drawn_with(sd1, unet_report, tmp_path):
    about = json.loads(Image.open(unet_report.folder / "sheet.png").text["comcat"])
    assert about["guidance_scale"] == 7.5 == bases.default_guidance(str(sd1))
    config = CompressConfig(model="embedded", part=UNET)
    assert Diffusion(config).sampling.guidance_scale == 2.0 == bases.default_guidance("embedded")
    (tmp_path / "plan.json").write_text(json.dumps({"plan": {"model_id": "embedded"}}))
    assert bases.default_guidance(str(tmp_path)) == 2.0 and bases.default_guidance(str(unet_report.folder)) == 7.5


@pytest.mark.slow
def test_a_compressed_base_is_a_base_for_every_command(sd1, unet_report, tmp_path, capsys):
    """An adapter is trained on it and drawn with; the dense base, whose heads are wider, refuses it."""
    small = ["--pretrained_model_name_or_path", str(unet_report.folder)]
    subject = ["--instance_data_dir", str(bases.assets() / "subject" / "train")]
    subject += ["--instance_prompt", "a photo of sks teddy"]
    assert main(["validate", *small, *subject, "--output_dir", str(tmp_path / "out")]) == 0
    steps = ["--max_train_steps", "2", "--resolution", "64", "--skip_final_inference"]
    assert main(["train", *small, *subject, *steps, "--output_dir", str(tmp_path / "out")]) == 0
    asked = ["--adapter", str(tmp_path / "out" / "sks-teddy.safetensors"), "--prompt", "sks teddy"]
    drawn = ["--num_inference_steps", "2", "--output_dir", str(tmp_path / "drawn")]
    assert main(["generate", *small, *asked, *drawn]) == 0 and (tmp_path / "drawn" / "sheet.png").is_file()
    capsys.readouterr()
    assert main(["generate", "--pretrained_model_name_or_path", str(sd1), *asked, *drawn]) != 0
    assert "base" in capsys.readouterr().err
    with pytest.raises(ValueError, match="compressed already; start from the dense model"):
        run(CompressConfig(model=str(unet_report.folder), part=UNET, output_dir=str(tmp_path / "smaller")))
    foldable = ["--kind", "foldable", "--everywhere", "--output_dir", str(tmp_path / "foldable")]
    assert main(["train", *small, *subject, *steps, *foldable]) == 0
    merged = ["--adapter", str(tmp_path / "foldable" / "sks-teddy.safetensors"), "--output_dir", str(tmp_path / "m")]
    assert main(["merge", *small, *merged]) != 0
    assert "no stock shapes" in capsys.readouterr().err and not (tmp_path / "m").exists()
    pipe = bases.load_base(str(unet_report.folder), "bf16")
    assert pipe.unet.dtype == torch.bfloat16 and count(pipe.unet) == unet_report.after.parameters
    configs = [unet_report.folder / "model_index.json", *unet_report.folder.glob("*/config.json")]
    assert len(configs) > 3 and not any(str(sd1) in path.read_text() for path in configs)


@pytest.mark.slow
def test_a_search_that_was_cut_goes_on_and_ends_as_if_it_was_not(classifier, pictures, ask, tmp_path, monkeypatch):
    settings = {"method": "search", "train_dir": str(pictures), "search_steps": 60, "batch_size": 12}
    whole = ask(classifier, **settings)
    whole.folder.rename(tmp_path / "whole")
    real, notes = RankSearch.steps, []

    def cut(self, *arguments):
        for step in real(self, *arguments):
            yield step
            if step.step == 53:
                raise KeyboardInterrupt

    monkeypatch.setattr(RankSearch, "steps", cut)
    with pytest.raises(KeyboardInterrupt):
        ask(classifier, **settings)
    monkeypatch.setattr(RankSearch, "steps", real)
    (state,) = [path for path in tmp_path.iterdir() if path.name.startswith(".small")]
    more = ask(classifier, notes.append, **settings)
    assert any("Going on with the search" in note for note in notes) and not state.exists()
    assert more.plan == whole.plan and files(tmp_path) >= {"whole", "small"}
    for name in ("compressed.safetensors", "plan.json"):
        assert (more.folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_fine_tuning_that_harms_is_told(pictures, ask, tmp_path):
    built("dinov2").float().save_pretrained(tmp_path / "dinov2")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "dinov2")
    settings = {"train_dir": str(pictures), "finetune_epochs": 1, "batch_size": 16, "method": "energy"}
    for rate, harms in ((1.0, True), (1e-6, False)):
        said = []
        made = ask(tmp_path / "dinov2", said.append, reduction=0.5, learning_rate=rate, **settings)
        made.folder.rename(tmp_path / f"at {rate}")
        assert any("has made the model worse" in text and "far below 1," in text for text in said) == harms


@pytest.mark.slow
def test_a_fine_tuning_that_was_cut_goes_on_and_ends_as_if_it_was_not(pictures, ask, tmp_path, monkeypatch):
    built("dinov2").float().save_pretrained(tmp_path / "dinov2")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "dinov2")
    settings = {"train_dir": str(pictures), "finetune_epochs": 3, "random_crop": True, "batch_size": 16}
    settings |= {"reduction": 0.5, "calibration_pictures": 16, "method": "energy"}
    whole = ask(tmp_path / "dinov2", **settings)
    whole.folder.rename(tmp_path / "whole")
    real, notes = Finetune.steps, []

    def cut(self, *arguments, **named):
        for step in real(self, *arguments, **named):
            yield step
            if step.step == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(learning, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(Finetune, "steps", cut)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "dinov2", **settings)
    monkeypatch.setattr(Finetune, "steps", real)
    (state,) = [path for path in tmp_path.iterdir() if path.name.startswith(".small")]
    content = state.read_bytes()
    with safe_open(state, framework="pt") as opened:
        about = opened.metadata()
    assert json.loads(about["comcat"])[1] == 2e-5  # features' own rate, at which a fitted DINOv2 holds
    losses, said = {"losses": torch.zeros(5)}, []
    others = ({}, {"comcat": "{}"}, {"comcat": "[8, 2e-05, 0, {}]"}, {"comcat": "[" * 9999})
    for wrong in (content[:-9], *(safetensors.torch.save(losses, about) for about in others)):
        state.write_bytes(wrong)
        with pytest.raises(ValueError, match="not the state of this fine-tuning; take it away"):
            ask(tmp_path / "dinov2", said.append, **settings)
        assert not (tmp_path / "small").exists() and not said  # before anything is compressed
    one_rate = about | {"rates": json.dumps(json.loads(about["rates"]) | {"rates": [1e-5]})}  # of an earlier version
    for wrong in ({"comcat": "[9, 2e-05, 0, {}]"}, one_rate):  # the student's shapes tell, and how many rates there are
        state.write_bytes(safetensors.torch.save(losses, wrong))
        with pytest.raises(ValueError, match="not the state of this fine-tuning; take it away"):
            ask(tmp_path / "dinov2", **settings)
    state.write_bytes(content)
    more = ask(tmp_path / "dinov2", notes.append, **settings)
    assert any("Going on with the fine-tuning" in note for note in notes) and not state.exists()
    assert more.finetuning == whole.finetuning and whole.finetuning.steps == 9
    name = "compressed.safetensors"
    assert (more.folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_squares_are_cut_anew_every_pass_and_the_same_for_the_same_seed(tmp_path):
    ramp = torch.arange(40 * 30).view(30, 40) % 256
    Image.fromarray(ramp.to(torch.uint8).numpy()).convert("RGB").save(tmp_path / "ramp.png")
    sizes = []

    def processor(pictures, return_tensors):
        sizes.extend(picture.size for picture in pictures)
        return {"pixel_values": torch.stack([torch.tensor(picture.resize((4, 4)).getdata()) for picture in pictures])}

    first, again = (Batches([Shot(tmp_path / "ramp.png")], 1, processor, 20, 0, cropped=True) for _ in range(2))
    seen = [first[place]["pixel_values"] for place in range(20)]
    assert all(torch.equal(again[place]["pixel_values"], seen[place]) for place in (3, 7))
    assert len({tuple(one.flatten().tolist()) for one in seen}) == 20
    assert all(width == height and 15 <= width <= 30 for width, height in sizes) and len(set(sizes)) > 5


@pytest.mark.slow
def test_an_adapter_can_be_trained_on_a_compressed_unet(sd1, unet_report):
    pipe = bases.load_base(str(sd1))
    pipe.unet = load_compressed(unet_report.folder)[0].requires_grad_(False)
    calls, before = recorded(pipe, [Drawing("a fox", 0)], Sampling(2, 5.0))
    wanted = pipe.unet(**calls[0]).sample + 0.1
    pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"]), "fox")
    assert_close(pipe.unet(**calls[0]).sample + 0.1, wanted, rtol=0, atol=1e-6)  # nothing learned yet
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(5):
        losses.append((pipe.unet(**calls[0]).sample - wanted).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trained and losses[-1] < losses[0]
    pictures = recorded(pipe, [Drawing("a fox", 0)], Sampling(2, 5.0))[1]
    assert pictures[0].size == before[0].size


@pytest.mark.slow
def test_a_unet_can_be_searched_and_fine_tuned(sd1, ask):
    report = ask(
        sd1, part=UNET, method="search", search_steps=3, finetune_epochs=2, calibration_prompt=["a fox"],
        num_inference_steps=2, reduction=0.5,
    )  # fmt: skip
    assert report.plan.method == "search" and report.removed >= 0.5
    assert report.finetuning.steps == 4 and count(load_compressed(report.folder)[0]) == report.after.parameters


@pytest.mark.slow
def test_a_base_with_added_conditions(tmp_path, ask):
    base = tiny_bases.sdxl(tmp_path / "sdxl")
    report = ask(base, part=UNET, calibration_prompt=["a fox"], num_inference_steps=2, reduction=0.5)
    assert report.removed >= 0.5 and 0 < report.quality.drift < 1


def test_prompts_of_its_own():
    own, others = default_prompts("embedded"), default_prompts("someone/base")
    assert len(own) == 16 and all("background" in prompt for prompt in own)
    assert len(others) > 1 and not set(own) & set(others)


def test_the_picture_of_the_ranks_has_a_bar_for_every_unit(dense):
    units = cost.units(dense)
    widths = {unit.name: None if unit.part == "classifier" else max(1, unit.full // 2) for unit in units}
    rows = grid(units, widths)
    assert list(rows) == ["vit.layers.0", "vit.layers.1", ""]
    assert rows["vit.layers.0"]["attention:vo"] == Bar(4, 8) and rows[""]["classifier"] == Bar(None, 5)
    drawn, full = (picture_of_ranks(units, w, "tiny") for w in (widths, dict.fromkeys(widths)))
    blue = [(np.asarray(picture) == (66, 125, 190)).all(-1).sum() for picture in (drawn, full)]
    assert drawn.size == full.size and blue[1] == 0 and blue[0] > 8 * 0.4 * 150 * 15


@pytest.mark.parametrize(
    "unit, place",
    [
        ("vit.layers.11.mlp.fc1", ("vit.layers.11", "mlp.fc1")),
        ("down.0.blocks.1.attn1:both", ("down.0.blocks.1", "attn1:both")),
        ("down.0.blocks.1.attn1.to_out.0", ("down.0.blocks.1", "attn1.to_out.0")),
        ("classifier", ("", "classifier")),
    ],
)
def test_the_place_of_a_unit(unit, place):
    assert place_of(unit) == place


def test_folders_are_classes_by_name_by_number_or_in_order():
    classes = {"cat": 2, "dog": 0, "owl": 1}
    assert labels_of(["dog", "cat"], "x", classes, 3) == {"dog": 0, "cat": 2}
    assert labels_of(["10", "9"], "x", classes, 11) == {"10": 10, "9": 9}
    assert labels_of(["n01", "n03", "n02"], "x", classes, 3) == {"n01": 0, "n02": 1, "n03": 2}
    for names, told in (
        (["cat", "cow"], "'cow' of --eval_dir x is none of the classifier's 3 classes"),
        (["0", "3"], "'3' of --eval_dir x is none of the classifier's 3 classes"),
        (["n01", "n02"], "2 folders, none of a name that the classifier knows .* there must be 3"),
        (["n01", "n02", "n03", "n04"], "4 folders"),
    ):
        with pytest.raises(ValueError, match=told):
            labels_of(names, "--eval_dir x", classes, 3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": None}, "--model is missing"),
        ({"reduction": 0.0}, "--reduction must lie between 0 and 1"),
        ({"reduction": 1.0}, "--reduction must lie between 0 and 1"),
        ({"reduction": math.nan}, "--reduction must lie between 0 and 1"),
        ({"multiple": 0}, "--multiple must be at least 1"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"finetune_epochs": -1}, "--finetune_epochs must be at least 0"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0"),
        ({"finetune_epochs": 1}, "name a --train_dir"),
        ({"random_crop": True}, "--random_crop is for the fine-tuning"),
        ({"part": UNET, "finetune_epochs": 1, "random_crop": True}, "--random_crop is for vision models"),
        ({"method": "search"}, "name a --train_dir"),
        ({"calibration_prompt": ["a fox"]}, "is for --part unet-attention"),
        ({"model": "embedded"}, "with --part unet-attention"),
        ({"part": UNET, "eval_dir": "x"}, "--eval_dir is for vision models"),
        ({"part": UNET, "method": "output"}, "--method output is for vision models"),
        ({"part": UNET, "budget": "latency"}, "--budget latency is for vision models"),
        ({"method": "output"}, "--method output needs pictures to measure on"),
        ({"budget": "latency", "method": "energy", "train_dir": "x"}, "--budget latency is for --method output"),
        ({"part": UNET, "calibration_pictures": 9}, "--calibration_pictures is for vision models"),
        ({"part": UNET, "calibration_prompt": [" "]}, "--calibration_prompt is empty"),
    ],
)
def test_settings_that_do_not_fit(settings, told):
    with pytest.raises(ValueError, match=told):
        CompressConfig(**({"model": "owner/name"} | settings))


def spoiled(classifier, folder, change):
    """A copy of the classifier after a change to the model."""
    model = built("vit").float()
    change(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((classifier / "preprocessor_config.json").read_bytes())
    return folder


def refused(ask, tmp_path, told, *arguments, **settings):
    """One sentence, and nothing left behind."""
    with pytest.raises((ValueError, OSError), match=told) as refusal:
        ask(*arguments, **settings)
    error = refusal.value
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    assert "\n" not in said and said.endswith(".")
    assert not [path for path in tmp_path.iterdir() if "small" in path.name]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"a.png": b"no picture"}, r"a\.png cannot be read as a picture"),
        ({"notes.txt": b"hello"}, "holds no pictures"),
        ({}, "holds no pictures"),
        (None, "is no folder"),
    ],
)
def test_calibration_pictures_that_are_none(classifier, ask, tmp_path, content, told):
    folder = tmp_path / "pictures"
    if content is not None:
        (folder / "deep").mkdir(parents=True)
        for name, data in content.items():
            (folder / "deep" / name).write_bytes(data)
    refused(ask, tmp_path, told, classifier, calibration_dir=str(folder))


def test_a_picture_that_breaks_off_is_named_and_nothing_is_left(classifier, ask, tmp_path):
    folder, noise = tmp_path / "pictures", np.random.default_rng(1)
    folder.mkdir()
    Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:3000])
    refused(ask, tmp_path, r"half\.png cannot be read", classifier, calibration_dir=str(folder))


def test_labels_outside_the_classifier(classifier, ask, tmp_path):
    for name in ("LABEL_0", "LABEL_5"):
        (tmp_path / "eval" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "eval" / name / "a.png")
    refused(
        ask, tmp_path, "'LABEL_5' .*none of the classifier's 5 classes", classifier, eval_dir=str(tmp_path / "eval")
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "eval" / "b.png")
    refused(ask, tmp_path, r"b\.png lies in no folder of a class", classifier, eval_dir=str(tmp_path / "eval"))


def test_a_bad_picture_is_found_before_the_work(classifier, ask, tmp_path):
    (tmp_path / "eval" / "LABEL_0").mkdir(parents=True)
    (tmp_path / "eval" / "LABEL_0" / "bad.png").write_bytes(b"no picture")
    said = []
    refused(ask, tmp_path, r"bad\.png cannot be read", classifier, said.append, eval_dir=str(tmp_path / "eval"))
    assert said == ["Gathering the calibration data."]


def test_a_reduction_that_cannot_be_reached_says_the_limit_before_any_picture_is_read(classifier, ask, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "bad.png").write_bytes(b"never read")
    refused(ask, tmp_path, "ask for at most", classifier, reduction=0.99, calibration_dir=str(tmp_path / "pictures"))


def test_models_that_cannot_be_compressed(classifier, sd1, ask, tmp_path):
    def bad_weight(model):
        model.vit.layers[1].mlp.fc2.weight.data[0, 0] = torch.nan

    refused(ask, tmp_path, r"vit\.layers\.1\.mlp\.fc2\.weight", spoiled(classifier, tmp_path / "nan", bad_weight))
    refused(ask, tmp_path, "no model at 'nowhere'", "nowhere")
    refused(ask, tmp_path, "check the name and the connection", "owner/name")
    refused(ask, tmp_path, "with --part unet-attention", sd1)
    refused(ask, tmp_path, "no model_index.json", classifier, part=UNET)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "text")
    refused(ask, tmp_path, "a BertModel, which takes no pictures", tmp_path / "text")
    spoiled(classifier, tmp_path / "half", lambda model: delattr(model, "classifier"))
    refused(ask, tmp_path, "no trained ViTForImageClassification.*classifier.bias", tmp_path / "half")


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_a_feature_extractor_is_compressed_and_judged_by_its_features(kind, pictures, ask, tmp_path):
    dense, said = built(kind).float(), []
    dense.save_pretrained(tmp_path / kind)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / kind)
    folders = {"calibration_dir": str(pictures), "eval_dir": str(pictures)}
    report = ask(tmp_path / kind, said.append, reduction=0.5, batch_size=16, **folders)
    small, plan = load_compressed(report.folder)
    assert plan.method == "output" and type(small) is type(dense)
    assert 0.5 < report.quality.cosine_first < 0.9999 and report.quality.top1_after is None
    assert "cosine of the features, first token" in report.table()
    assert any("has no classes" in text for text in said)
    pixels = AutoImageProcessor.from_pretrained(report.folder, backend="pil")
    shots = [pixels(Image.open(path), return_tensors="pt")["pixel_values"] for path in sorted(pictures.rglob("*.png"))]
    found, wanted = (out(model, torch.cat(shots))[:, 0] for model in (small, dense))
    assert report.quality.cosine_first == pytest.approx(float(torch.cosine_similarity(found, wanted).mean()), abs=1e-5)


def test_a_feature_extractor_learns_back_from_pictures_without_classes(pictures, ask, tmp_path):
    built("dinov2").float().save_pretrained(tmp_path / "dinov2")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "dinov2")
    report = ask(
        tmp_path / "dinov2", reduction=0.5, train_dir=str(pictures), eval_dir=str(pictures), batch_size=12,
        finetune_epochs=6, learning_rate=1e-3,
    )  # fmt: skip
    assert report.finetuning.last_loss < report.finetuning.first_loss


def test_models_with_nothing_to_compress(sd1, ask, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(sd1)
    plain = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4, "mid_block_type": None}
    pipe.unet = tiny_bases.unet(**plain)
    pipe.save_pretrained(tmp_path / "bare")
    refused(ask, tmp_path, "nothing to compress.*no attention of a known kind", tmp_path / "bare", part=UNET)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    refused(ask, tmp_path, "cannot be reached", tmp_path / "resnet")


def test_numbers_within_a_nested_argument_are_looked_at(tiny_unet):
    inputs = {name: value.float() for name, value in tiny_unet.inputs().items()}
    (again,) = checked(tiny_unet(), [inputs | {"added": {"text": torch.ones(2, dtype=torch.float64)}}])
    assert again["added"]["text"].dtype == torch.float32
    with pytest.raises(ValueError, match="'added' of batch 1 holds NaN"):
        list(checked(tiny_unet(), [inputs | {"added": {"text": torch.tensor([1.0, torch.nan])}}]))


def test_pictures_without_a_processor(classifier, pictures, ask, tmp_path):
    built("vit").float().save_pretrained(tmp_path / "bare")
    refused(ask, tmp_path, r"has no preprocessor_config\.json", tmp_path / "bare", calibration_dir=str(pictures))
    assert files(ask(tmp_path / "bare").folder) == FILES | LOADERS


def test_a_folder_that_holds_something_is_left_alone(classifier, ask, tmp_path):
    report = ask(classifier)
    before = {path.name: path.read_bytes() for path in report.folder.iterdir()}
    with pytest.raises(FileExistsError) as refusal:
        ask(classifier, reduction=0.3)
    assert "holds something already" in refusal.value.strerror
    assert {path.name: path.read_bytes() for path in report.folder.iterdir()} == before
    with pytest.raises(ValueError, match="holds a compressed model; start from the dense one"):
        run(CompressConfig(model=str(report.folder), output_dir=str(tmp_path / "smaller")))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as refusal:
        run(CompressConfig(model=str(classifier), output_dir=str(tmp_path / "file" / "small")))
    assert "cannot be made" in refusal.value.strerror


@pytest.mark.slow
def test_the_settings_import_no_torch_and_the_function_keeps_its_name():
    code = (
        "import sys, comcat_diffusion.compression.config\nassert 'torch' not in sys.modules\n"
        "import comcat_diffusion.compression.store\nfrom comcat_diffusion.compression import compress, cost\n"
        "assert callable(compress) and cost.units"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
