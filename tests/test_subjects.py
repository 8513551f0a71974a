"""What is learned besides one folder: captions, masks, buckets, several subjects, priors, new tokens, text encoders."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from comcat_diffusion import bases, load_adapter, read_adapter, unload_adapters
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.config import read_toml
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.training.backgrounds import EACH
from comcat_diffusion.training.config import SubjectConfig, TrainConfig
from comcat_diffusion.training.customize import Silent, customize
from comcat_diffusion.training.dataset import read_dataset
from tests import tiny_bases
from tests.quick_training import BARE, QUICK

TRAIN = bases.assets() / "subject" / "train"
BASE = bases.assets() / "tiny-sd"


class Listener(Silent):
    def __init__(self):
        self.notes, self.steps = [], []

    def note(self, text):
        self.notes.append(text)

    def step(self, done, total, peak_bytes):
        self.steps.append(done)


@functools.cache
def without_captions():
    folder = Path(tempfile.mkdtemp()) / "pictures"
    shutil.copytree(TRAIN, folder, ignore=shutil.ignore_patterns("*.txt"))
    return folder


def run(output, **settings):
    listener = Listener()
    defaults = {"max_train_steps": 2, "skip_final_inference": True, **QUICK, "train_batch_size": 2}
    if "subjects" not in settings:
        defaults |= {"instance_data_dir": str(without_captions()), "instance_prompt": "a photo of sks teddy"}
    outcome = customize(TrainConfig(**{**defaults, "output_dir": str(output), **settings}), listener)
    return outcome, listener


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(without_captions(), folder)
    return folder


@pytest.mark.slow
def test_captions_are_what_is_learned(tmp_path, pictures):
    for path in sorted(pictures.glob("*.png")):
        path.with_suffix(".txt").write_text(f"sks teddy number {path.stem}")
    captioned, listener = run(tmp_path / "a", instance_data_dir=str(pictures), instance_prompt=None, trigger="sks")
    plain, _ = run(tmp_path / "b")
    assert captioned.adapter.read_bytes() != plain.adapter.read_bytes()
    assert read_adapter(captioned.adapter).notes.trigger == "sks"
    assert not any("does not contain" in note for note in listener.notes)


@pytest.mark.slow
def test_a_caption_without_the_trigger_is_told(tmp_path, pictures):
    for path in sorted(pictures.glob("*.png")):
        path.with_suffix(".txt").write_text("a teddy" if path.stem == "2" else "sks teddy")
    _, listener = run(tmp_path / "a", instance_data_dir=str(pictures))
    assert any("The caption of 2.png does not contain 'sks'" in note for note in listener.notes)


def test_captions_without_the_trigger_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"No caption in .*subject/train contains 'ohwx'"):
        run(tmp_path / "a", instance_data_dir=str(TRAIN), instance_prompt="a photo of ohwx teddy")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_what_a_mask_leaves_out_is_not_learned(tmp_path, pictures):
    """Painting over what the mask hides changes nothing of the adapter; painting over what it shows does."""
    made = {}
    for name, box in (("as is", None), ("hidden", (0, 0, 64, 256)), ("shown", (192, 0, 256, 256))):
        folder = tmp_path / name
        shutil.copytree(pictures, folder)
        for path in sorted(folder.glob("*.png")):
            picture = Image.open(path).convert("RGB")
            if box:
                picture.paste((255, 0, 255), box)
            picture.save(path)
            mask = np.zeros((picture.height, picture.width), dtype=np.uint8)
            mask[:, 128:] = 255
            Image.fromarray(mask).save(path.with_name(f"{path.stem}-mask.png"))
        # With a prediction of the clean latents themselves, no other place would matter to a place; the U-Net's view
        # of the noisy neighbours does, so the loss alone is compared, at a rate that leaves the base as it is.
        # What is painted is no background that could be another, so all three learn from the pictures themselves.
        alone = {"unmasked_weight": 0.0, "learning_rate": 1e-12, "background_augmentation": False}
        _, listener = run(tmp_path / f"out {name}", instance_data_dir=str(folder), **alone)
        made[name] = listener.steps[0].loss
    assert abs(made["hidden"] - made["as is"]) < 0.2 * abs(made["shown"] - made["as is"])


@pytest.mark.slow
def test_the_alpha_channel_can_be_the_mask(tmp_path, pictures):
    for path in sorted(pictures.glob("*.png")):
        picture = Image.open(path).convert("RGBA")
        picture.putalpha(Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))))
        picture.save(path)
    plain, _ = run(tmp_path / "a", instance_data_dir=str(pictures))
    masked, _ = run(tmp_path / "b", instance_data_dir=str(pictures), alpha_mask=True)
    assert plain.adapter.read_bytes() != masked.adapter.read_bytes()


def test_a_mask_that_hides_everything_is_refused(tmp_path, pictures):
    Image.new("L", (256, 256)).save(pictures / "1-mask.png")
    with pytest.raises(ValueError, match="nothing would be learned"):
        run(tmp_path / "a", instance_data_dir=str(pictures), unmasked_weight=0.0)


@pytest.mark.slow
def test_buckets_train_pictures_of_several_shapes(tmp_path, pictures):
    Image.open(pictures / "1.png").resize((300, 150)).save(pictures / "wide.png")
    outcome, listener = run(
        tmp_path / "a", instance_data_dir=str(pictures), aspect_ratio_buckets=True, max_train_steps=5
    )
    assert len(listener.steps) == 5 and outcome.adapter.is_file()


@pytest.mark.slow
def test_two_subjects_in_one_run_from_a_file(tmp_path, pictures):
    (tmp_path / "run.toml").write_text(
        f"""
        output_dir = {json.dumps(str(tmp_path / "out"))}
        max_train_steps = 2
        skip_final_inference = true
        [[subjects]]
        instance_data_dir = {json.dumps(str(TRAIN))}
        instance_prompt = "a photo of sks teddy"
        repeats = 2
        [[subjects]]
        instance_data_dir = {json.dumps(str(pictures))}
        instance_prompt = "a photo of ohwx bear"
        """
    )
    config = TrainConfig(**read_toml(TrainConfig, tmp_path / "run.toml"))
    assert config.subjects[0] == SubjectConfig(
        instance_data_dir=str(TRAIN), instance_prompt="a photo of sks teddy", repeats=2
    )
    outcome = customize(config)
    assert outcome.adapter.name == "sks-teddy-ohwx-bear.safetensors"
    written = TrainConfig(**read_toml(TrainConfig, tmp_path / "out" / "run.toml"))
    assert written.subjects == config.subjects
    for prompt in ("sks teddy", "ohwx bear"):
        draw = {"num_images": 1, "num_inference_steps": 1, "output_dir": str(tmp_path / "drawn")}
        assert generate(GenerateConfig(adapter=[str(outcome.adapter)], prompt=[prompt], **draw)).files
    with pytest.raises(ValueError, match="Two subjects have the trigger 'sks'"):
        run(tmp_path / "b", subjects=[config.subjects[0], config.subjects[0]])


@pytest.mark.slow
def test_the_teachers_loss_is_zero_at_the_start_and_then_holds_the_class(tmp_path):
    def class_drift(name, **settings):
        settings |= {"kind": "free", "everywhere": True, "learning_rate": 2e-3, "lr_scheduler": "constant"}
        outcome, listener = run(tmp_path / name, max_train_steps=25, **settings)
        pipe = bases.load_base("embedded")
        states, _ = pipe.encode_prompt(["a photo of teddy"], "cpu", 1, False)
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = pipe.unet(noise, 600, states).sample
            load_adapter(pipe, outcome.adapter)
            return (pipe.unet(noise, 600, states).sample - before).norm().item(), listener

    free, listener = class_drift("free")
    assert all(step.prior_loss is None for step in listener.steps)
    held, listener = class_drift("held", prior="teacher", prior_loss_weight=10.0)
    # Not exactly zero: with an adapter, though it adds nothing, attention runs in wider heads, which round otherwise.
    assert listener.steps[0].prior_loss < 1e-12 and listener.steps[-1].prior_loss > 1e-6
    assert 0 < held < 0.9 * free


@pytest.mark.slow
def test_class_pictures_are_drawn_once_counted_and_learned(tmp_path):
    settings = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "num_class_images": 3}
    settings |= {"everywhere": True}
    _, listener = run(tmp_path / "a", **settings)
    assert any("Drawing 3 pictures of 'a photo of teddy'" in note for note in listener.notes)
    assert listener.steps[0].prior_loss > 0
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    (tmp_path / "class" / "class-000001.png").unlink()  # from the middle
    _, listener = run(tmp_path / "b", **settings)
    assert any("Drawing 1 pictures" in note for note in listener.notes)
    again = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert again.keys() == drawn.keys() and again["class-000002.png"] == drawn["class-000002.png"]
    # drawn alone instead of with two others, kernels may sum in another order, which rounds a pixel now and then
    one, other = (np.asarray(Image.open(io.BytesIO(kept["class-000001.png"]))).astype(int) for kept in (again, drawn))
    assert np.abs(one - other).max() <= 1


def test_a_prior_without_a_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--class_prompt is missing"):
        run(tmp_path / "a", prior="teacher", everywhere=True, instance_prompt="a photo of sks")


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [1, 2])
def test_a_new_token_travels_with_the_adapter(tmp_path, vectors):
    settings = {"placeholder_token": "<my-teddy>", "initializer_token": "teddy", "token_lr": 0.1}
    outcome, _ = run(
        tmp_path / "a", instance_prompt="a photo of <my-teddy>", num_vectors=vectors, max_train_steps=3, **settings
    )
    pipe = bases.load_base("embedded")
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    known = len(pipe.tokenizer)
    header = load_adapter(pipe, outcome.adapter)
    assert header.tokens == ["<my-teddy>"] and len(pipe.tokenizer) == known + vectors
    table = pipe.text_encoder.get_input_embeddings().weight
    teddy = before[pipe.tokenizer("teddy", add_special_tokens=False).input_ids[0]]
    assert torch.equal(table[: len(before)], before) and (table[-1] - teddy).abs().max() > 0.05
    with pytest.raises(ValueError, match="already has the token '<my-teddy>'"):
        load_adapter(pipe, outcome.adapter, "again")
    unload_adapters(pipe)
    assert len(pipe.tokenizer) == known
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[: len(before)], before)
    drawn = {"num_images": 1, "num_inference_steps": 1, "output_dir": str(tmp_path / "drawn")}
    assert generate(GenerateConfig(adapter=[str(outcome.adapter)], prompt=["a photo of {subject}"], **drawn)).files


@pytest.mark.slow
def test_the_name_of_a_subject_can_be_learned_as_one_word(tmp_path):
    pipe = bases.load_base("embedded")
    class_ids = pipe.tokenizer("teddy", add_special_tokens=False).input_ids
    teddy = pipe.text_encoder.get_input_embeddings().weight[class_ids[0]].detach().clone()
    without = ("a photo of two masks teddy", "a photo of a teddy", "sks")
    read = {prompt: pipe.tokenizer(prompt).input_ids for prompt in without}
    still, moved = (
        run(tmp_path / str(rate), learn_name=True, token_lr=rate, save_precision="fp32", max_bytes=0)[0].adapter
        for rate in (1e-12, 0.1)
    )
    for file, far in ((still, 0), (moved, 0.05)):
        header = load_adapter(pipe, file)
        assert header.tokens == ["sks teddy"] and header.config["unet"]["trigger"] == ["sks teddy", "sks"]
        (name,) = pipe.tokenizer("SKS Teddy", add_special_tokens=False).input_ids
        row = pipe.text_encoder.get_input_embeddings().weight[name]
        assert far <= (row - teddy).abs().max() <= far * 10 + 1e-6  # it starts as its class
        assert {prompt: pipe.tokenizer(prompt).input_ids for prompt in without} == read
        unload_adapters(pipe)
        assert len(pipe.tokenizer("sks teddy", add_special_tokens=False).input_ids) == 2
    more, _ = run(tmp_path / "more", init_adapter=str(moved), token_lr=1e-12, save_precision="fp32")
    kept = [load_file(file)["token.0.text_encoder"] for file in (moved, more.adapter)]
    assert torch.allclose(*kept, atol=1e-6)  # and goes on from what an adapter has learned
    again, _ = run(tmp_path / "again", init_adapter=str(moved), learn_name=True)
    assert read_adapter(again.adapter).tokens == ["sks teddy"]


@pytest.mark.slow
def test_an_adapter_that_waits_for_a_part_of_the_name_learns_no_name(tmp_path):
    deaf, _ = run(tmp_path / "a")
    with pytest.raises(ValueError, match="--learn_name makes one word of the name.*leave one of the two out"):
        run(tmp_path / "b", init_adapter=str(deaf.adapter), learn_name=True)


@pytest.mark.slow
def test_every_subject_can_have_a_learned_name(tmp_path):
    folder = str(without_captions())
    both = [SubjectConfig(instance_data_dir=folder, instance_prompt=f"a {name}") for name in ("sks teddy", "ohwx cat")]
    outcome, _ = run(tmp_path / "a", learn_name=True, subjects=both)
    assert read_adapter(outcome.adapter).tokens == ["sks teddy", "ohwx cat"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"everywhere": True}, "--learn_name is for adapters that act from the trigger on"),
        ({"placeholder_token": "<t>", "initializer_token": "cat", "instance_prompt": "a <t>"}, "leave one of them out"),
        ({"instance_prompt": "a photo of sks"}, "--learn_name starts from the class, and none stands after 'sks'"),
    ],
)
def test_a_name_that_cannot_be_learned_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a", learn_name=True, **settings)


def test_a_token_that_cannot_be_learned_is_refused(tmp_path):
    token = {"placeholder_token": "<t>", "instance_prompt": "a photo of <t>"}
    with pytest.raises(ValueError, match="'extraordinary' is .* tokens"):
        run(tmp_path / "a", **token, initializer_token="extraordinary")
    with pytest.raises(ValueError, match="already has the token 'cat</w>'"):
        run(tmp_path / "a", placeholder_token="cat</w>", initializer_token="dog", instance_prompt="a photo of cat</w>")
    with pytest.raises(ValueError, match="belong together"):
        TrainConfig(placeholder_token="<t>")
    with pytest.raises(ValueError, match="does not contain '<t>'"):
        TrainConfig(placeholder_token="<t>", initializer_token="cat", instance_prompt="a photo of sks cat")


@pytest.mark.slow
def test_the_text_encoder_can_be_adapted_at_its_own_rate(tmp_path):
    settings = {"train_text_encoder": True, "everywhere": True, "kind": "free"}
    outcome, _ = run(tmp_path / "a", **settings, text_encoder_lr=1e-2, save_precision="fp32")
    header = read_adapter(outcome.adapter)
    assert set(header.config) == {"unet", "text_encoder"}
    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    load_adapter(pipe, outcome.adapter, "dog")
    moved = max(f.abs().max() for name, f in factors(pipe.text_encoder, "dog").items() if name.endswith("out_up"))
    assert moved > 5e-3  # AdamW's first steps are about as large as the rate


@pytest.mark.slow
def test_sdxl_trains_with_both_text_encoders_and_a_token(tmp_path):
    base = tiny_bases.sdxl(tmp_path / "sdxl")
    settings = {"placeholder_token": "<my-teddy>", "initializer_token": "teddy", "train_text_encoder": True}
    settings |= {"everywhere": True}
    outcome, _ = run(
        tmp_path / "a",
        pretrained_model_name_or_path=str(base),
        instance_prompt="a photo of <my-teddy>",
        skip_final_inference=False,
        num_validation_images=1,
        **settings,
    )
    header = read_adapter(outcome.adapter)
    assert set(header.config) == {"unet", "text_encoder", "text_encoder_2"} and header.tokens == ["<my-teddy>"]
    assert outcome.samples.is_file()
    plain, _ = run(tmp_path / "b", pretrained_model_name_or_path=str(base), skip_final_inference=False)
    drawn = {"num_images": 1, "num_inference_steps": 2, "output_dir": str(tmp_path / "drawn")}
    assert generate(GenerateConfig(adapter=[str(plain.adapter)], prompt=["{subject}"], **drawn)).files


@pytest.mark.slow
def test_the_held_out_loss_chooses_the_best(tmp_path):
    outcome, _ = run(tmp_path, max_train_steps=6, validation_fraction=0.25, validation_steps=2, num_validation_images=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    judged = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(judged) == [2, 4, 6]
    best = outcome.adapter.with_name("sks-teddy-best.safetensors")
    assert read_adapter(best).notes.training["steps"] == min(judged, key=judged.get)
    before, later = (tmp_path / "samples" / f"step-00000{step}-00-0.png" for step in (0, 2))
    assert before.read_bytes() != later.read_bytes() and not (tmp_path / "samples/step-000006.png").exists()
    with pytest.raises(ValueError, match="leaves 0 to judge"):
        run(tmp_path / "b", validation_fraction=0.01)


def test_no_subject_is_kept_out_whole(tmp_path):
    pictures = sorted((bases.assets() / "subject" / "train").glob("*.png"))
    for name, some in (("one", pictures[:2]), ("two", pictures[2:4])):
        (tmp_path / name).mkdir()
        for picture in some:
            shutil.copy(picture, tmp_path / name)
    subjects = [
        SubjectConfig(instance_data_dir=str(tmp_path / name), instance_prompt=f"a photo of {word} teddy")
        for name, word in (("one", "sks"), ("two", "zwx"))
    ]
    with pytest.raises(ValueError, match="keeps out all pictures of"):
        for seed in range(20):
            read_dataset(TrainConfig(subjects=subjects, validation_fraction=0.5, seed=seed))


@pytest.mark.slow
def test_a_resumed_run_does_not_replace_its_best_adapter_by_a_worse_one(tmp_path):
    settings = {"max_train_steps": 4, "validation_fraction": 0.25, "validation_steps": 2, "num_validation_images": 1}
    settings |= {"max_bytes": 0}  # with a budget, nothing that was judged before the cut counts
    run(tmp_path, **settings, checkpointing_steps=2)
    best, metrics = tmp_path / "sks-teddy-best.safetensors", tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for earlier, kept in ((-1.0, True), (1e9, False)):  # nothing, and anything, is better than that
        records = [line | {"held_out_loss": earlier} if "held_out_loss" in line else line for line in lines]
        metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        best.write_bytes(b"the best so far")
        run(tmp_path, **settings, resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
        assert (best.read_bytes() == b"the best so far") == kept


@pytest.mark.slow
def test_pictures_of_another_folder_can_be_the_judge_and_prompts_are_drawn_in_order(tmp_path, pictures):
    prompts = ["sks teddy on the left", "a teddy"]
    settings = {"validation_data_dir": str(pictures.parent / "judges"), "validation_prompt": prompts}
    shutil.copytree(bases.assets() / "subject" / "held_out", tmp_path / "judges")
    outcome, _ = run(tmp_path / "a", **settings, skip_final_inference=False, num_validation_images=1)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["held_out_loss"] > 0
    drawn = [Image.open(tmp_path / "a" / "samples" / f"step-000002-0{n}-0.png") for n in (0, 1)]
    assert [picture.text["parameters"].splitlines()[0] for picture in drawn] == prompts
    assert outcome.samples.name == "step-000002.png"


@pytest.mark.slow
def test_a_sample_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch):
    from comcat_diffusion.training.preview import Preview

    def fail(*whatever):
        raise torch.OutOfMemoryError("no room left")

    monkeypatch.setattr(Preview, "_one", fail)
    outcome, listener = run(tmp_path, skip_final_inference=False)
    assert outcome.steps == 2 and any("No samples at step 2: no room left" in note for note in listener.notes)


@pytest.mark.slow
def test_the_running_mean_is_what_is_saved(tmp_path):
    plain, _ = run(tmp_path / "a", max_train_steps=4)
    mean, _ = run(tmp_path / "b", max_train_steps=4, use_ema=True, ema_decay=0.9)
    assert plain.adapter.read_bytes() != mean.adapter.read_bytes()


@pytest.mark.slow
def test_the_cache_gives_the_same_run_and_notices_a_changed_picture(tmp_path, pictures):
    own = {"instance_data_dir": str(pictures), "background_augmentation": True}
    cached = {"cache_dir": str(tmp_path / "cache"), **own}
    first, _ = run(tmp_path / "a", **cached)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 4 * (1 + EACH)  # before its own background and others
    second, _ = run(tmp_path / "b", **cached)
    assert second.adapter.read_bytes() == first.adapter.read_bytes() and sorted((tmp_path / "cache").iterdir()) == kept
    kept[0].write_bytes(b"damaged")
    third, _ = run(tmp_path / "c", **cached)
    assert third.adapter.read_bytes() == first.adapter.read_bytes()
    Image.open(pictures / "1.png").transpose(Image.Transpose.ROTATE_90).save(pictures / "1.png")
    run(tmp_path / "d", **cached)
    assert len(list((tmp_path / "cache").iterdir())) == 5 * (1 + EACH)


@pytest.mark.slow
def test_an_adapter_is_not_overwritten_unless_asked(tmp_path):
    first, _ = run(tmp_path)
    with pytest.raises(ValueError, match="is there already.*--overwrite"):
        run(tmp_path, seed=1)
    before = first.adapter.read_bytes()
    again, _ = run(tmp_path, seed=1, overwrite=True)
    assert again.adapter.read_bytes() != before


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path):
    from comcat_diffusion.training.output import locked

    with locked(tmp_path), pytest.raises(ValueError, match="Another run is writing"):
        run(tmp_path)
    run(tmp_path)


@pytest.mark.slow
def test_two_processes_learn_what_one_with_the_larger_batch_learns(tmp_path):
    settings = {"max_train_steps": 2, "save_precision": "fp32", "skip_final_inference": True, "kind": "tied"}
    # A large epsilon makes AdamW's step a smooth function of the gradient: otherwise the sign of a gradient that is
    # zero up to rounding would decide about a whole step.
    settings |= {"learning_rate": 1e-1, "adam_epsilon": 1e-1, "lr_scheduler": "constant"}
    alone = customize(TrainConfig(output_dir=str(tmp_path / "1"), train_batch_size=4, **BARE, **settings), Listener())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["train_customize.py", "--output_dir", str(tmp_path / "2"), "--train_batch_size", "2"]
    command += [f"--no-{name}" for name in BARE]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value)) if text != "True"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(file) for file in (alone.adapter, tmp_path / "2" / "sks-teddy.safetensors"))
    moved = max(factor.abs().max().item() for name, factor in one.items() if name.endswith("out_core"))  # from zero
    assert moved > 1e-5
    for name, factor in one.items():
        torch.testing.assert_close(two[name], factor, rtol=1e-4, atol=1e-2 * moved)
