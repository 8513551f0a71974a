"""The training story on the embedded base, run tiny: what it leaves, that it learns, and what it refuses."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from comcat_diffusion import bases, load_adapter, read_adapter
from comcat_diffusion.config import read_toml
from comcat_diffusion.training import customize as story
from comcat_diffusion.training import learned, output
from comcat_diffusion.training import learner as learner_module
from comcat_diffusion.training.batching import Batch
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.training.customize import Silent, customize
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.output import prove, witness
from comcat_diffusion.training.precision import launched_precision
from comcat_diffusion.training.validate import validate
from tests.quick_training import QUICK
from tests.slow import slow

SUBJECT = bases.assets() / "subject"


class Listener(Silent):
    def __init__(self, stop_after=None):
        self.notes, self.steps, self.stop_after = [], [], stop_after

    def note(self, text):
        self.notes.append(text)

    def step(self, done, total, peak_bytes):
        assert peak_bytes > 1 << 20
        self.steps.append(done)
        if done.step == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def config(tmp_path):
    defaults = {"output_dir": str(tmp_path / "out"), "max_train_steps": 3, "skip_final_inference": True, **QUICK}
    return lambda **settings: TrainConfig(**{**defaults, **settings})


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_run_leaves_exactly_these_files_and_says_what_it_did(config, tmp_path):
    listener = Listener()
    outcome = customize(config(max_train_steps=2, skip_final_inference=False, num_validation_images=2), listener)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    samples = [f"out/samples/step-000002-00-{seed}.png" for seed in range(2)] + ["out/samples/step-000002.png"]
    assert left == ["out/metrics.jsonl", "out/run.toml", *samples, "out/sks-teddy.safetensors"]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] == [step.step for step in listener.steps]
    header = read_adapter(outcome.adapter)
    assert (header.notes.trigger, header.notes.class_word, header.base_model) == ("sks", "teddy", "embedded")
    threads = torch.get_num_threads()
    assert header.notes.training == {"resolution": 64, "steps": 2, "seed": 0, "pictures": 4, "threads": threads}
    assert (tmp_path / "out/run.toml").read_text().startswith(f"# Circumstances: device cpu, threads {threads}.\n")
    assert not outcome.interrupted and any("Learning 'sks teddy' from 4 pictures" in note for note in listener.notes)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_the_written_settings_repeat_the_run(config, tmp_path):
    first = customize(config()).adapter
    again = TrainConfig(**{**read_toml(TrainConfig, tmp_path / "out/run.toml"), "output_dir": str(tmp_path / "again")})
    assert digest(first) == digest(customize(again).adapter)
    assert digest(first) != digest(customize(config(seed=1, output_dir=str(tmp_path / "other"))).adapter)


@pytest.mark.slow
def test_the_pictures_are_fitted(config, tmp_path):
    """All runs see the same pictures and noise step by step; the one that hardly moves tells what the base does."""

    def losses(rate, kind):
        settings = {"max_train_steps": 32, "lr_scheduler": "constant", "learning_rate": rate, "kind": kind}
        settings |= {"train_batch_size": 4, "output_dir": str(tmp_path / f"{kind} {rate}")}
        customize(config(**settings), listener := Listener())
        return [step.loss for step in listener.steps]

    base = losses(1e-12, "tied")
    for kind in ("tied", "foldable", "free"):
        learned = losses(4e-3, kind)
        assert learned[0] == pytest.approx(base[0], rel=1e-5)
        assert sum(learned[-15:]) < 0.9 * sum(base[-15:])


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learned_and_it_goes_on_from_there(config, tmp_path):
    outcome = customize(config(max_train_steps=50), Listener(stop_after=2))
    assert outcome.interrupted and outcome.steps == 2 and read_adapter(outcome.adapter).notes.training["steps"] == 2
    more = config(init_adapter=str(outcome.adapter), output_dir=str(tmp_path / "more"))
    assert customize(more).adapter.read_bytes() != outcome.adapter.read_bytes()


@pytest.mark.slow
def test_an_adapter_that_is_learned_on_keeps_its_shape_and_its_subject(config, tmp_path):
    whole = {"max_bytes": 0, "target_modules": ["attn1", "attn2"]}
    first = customize(config(max_train_steps=2, kind="free", rank=2, alpha=1.0, **whole))
    start = {"init_adapter": str(first.adapter), "max_train_steps": 1}
    (tmp_path / "bare").mkdir()
    shutil.copy(SUBJECT / "train" / "1.png", tmp_path / "bare")
    more = customize(config(**start, output_dir=str(tmp_path / "more")))
    shape = {name: read_adapter(more.adapter).config["unet"][name] for name in ("r", "alpha", "foldable", "trigger")}
    assert shape == {"r": 2, "alpha": 1.0, "foldable": False, "trigger": ["sks"]}
    written = (tmp_path / "more" / "run.toml").read_text()
    assert 'kind = "free"' in written and "rank = 2" in written and "alpha = 1.0" in written
    for settings, message in (
        ({"rank": 3}, "stays what it is, with rank 2: leave --rank out"),
        ({"kind": "foldable"}, "with kind free: leave --kind out"),
        ({"everywhere": True}, "with everywhere False"),
        ({"alpha": 3.0}, "with alpha 1.0"),
        ({"target_modules": ["attn2"]}, "leave --target_modules and --up_blocks_only out"),
        ({"up_blocks_only": True}, "leave --target_modules and --up_blocks_only out"),
        (
            {"instance_data_dir": str(tmp_path / "bare"), "instance_prompt": "a photo of ohwx teddy"},
            "acts from 'sks' on, which is not in the prompts of 'ohwx'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            customize(config(**start, output_dir=str(tmp_path / "other"), **settings))


@pytest.mark.slow
def test_an_adapter_of_the_text_encoder_is_learned_on_with_it(config, tmp_path):
    both = customize(config(max_train_steps=1, train_text_encoder=True, everywhere=True))
    alone = customize(config(max_train_steps=1, everywhere=True, output_dir=str(tmp_path / "alone")))
    on = {"init_adapter": str(both.adapter), "max_train_steps": 1, "output_dir": str(tmp_path / "on")}
    assert set(read_adapter(customize(config(**on)).adapter).config) == {"unet", "text_encoder"}
    with pytest.raises(ValueError, match="with train_text_encoder False: leave --train_text_encoder out"):
        customize(config(**on | {"init_adapter": str(alone.adapter), "train_text_encoder": True, "everywhere": True}))


@pytest.mark.slow
def test_what_is_learned_on_in_bfloat16_is_not_rounded(config, tmp_path):
    first = customize(config(max_train_steps=3, save_precision="fp32", max_bytes=0))
    still = {"learning_rate": 1e-30, "adam_weight_decay": 0.0, "mixed_precision": "bf16", "save_precision": "fp32"}
    more = {"init_adapter": str(first.adapter), "max_train_steps": 1, "output_dir": str(tmp_path / "on")}
    before, after = (load_file(one.adapter) for one in (first, customize(config(**more, **still))))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_run_leaves_its_precision_to_nobody(config):
    customize(config(max_train_steps=1, mixed_precision="bf16"))
    assert Accelerator().mixed_precision == "no"


@pytest.mark.slow
def test_a_second_run_in_a_folder_and_a_refused_one_leave_what_is_there(config, tmp_path):
    customize(config(max_train_steps=1))
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert any(path.name == "run.toml" for path in written)
    with pytest.raises(ValueError, match="holds another run, whose settings.*--overwrite"):
        customize(config(max_train_steps=1, name="another"))
    with pytest.raises(ValueError, match="nope"):
        customize(config(max_train_steps=1, overwrite=True, target_modules=["nope"]))
    assert written == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"train_text_encoder": True, "everywhere": True}, {"learn_name": True}])
def test_samples_are_drawn_in_bfloat16_while_text_is_trained(config, more):
    drawn = {"skip_final_inference": False, "num_validation_images": 1}
    outcome = customize(config(max_train_steps=1, mixed_precision="bf16", **drawn, **more))
    assert outcome.samples.is_file()


@pytest.mark.slow
def test_the_command_line_survives_a_real_ctrl_c(tmp_path):
    command = [sys.executable, "train_customize.py", "--max_train_steps", "5000", "--output_dir", str(tmp_path)]
    running = subprocess.Popen(
        command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, cwd=SUBJECT.parents[1]
    )
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 1:
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "--resume_from_checkpoint latest" in said and "Traceback" not in said
    assert read_adapter(tmp_path / "sks-teddy.safetensors").notes.trigger == "sks"


@pytest.mark.slow
def test_options_change_what_is_trained(config, tmp_path):
    wide = {"target_modules": ["attn1", "attn2"], "rank": 2, "alpha": 1.0, "name": "mine", "save_precision": "fp32"}
    wide |= {"kind": "free", "everywhere": True}
    data = {"center_crop": False, "random_flip": True, "noise_offset": 0.05, "snr_gamma": 5.0}
    pace = {
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_weight_decay": 0.0,
        "adam_epsilon": 1e-7,
        "gradient_accumulation_steps": 2,
        "lr_warmup_steps": 1,
        "lr_scheduler": "cosine",
    }
    means = {"gradient_checkpointing": True, "mixed_precision": "bf16", "allow_tf32": True}
    outcome = customize(config(**wide, **data, **pace, **means))
    header = read_adapter(outcome.adapter)
    assert outcome.adapter.name == "mine.safetensors"
    assert header.config["unet"]["target_modules"] == ["attn1", "attn2"] and header.config["unet"]["alpha"] == 1.0


@pytest.mark.slow
def test_captions_that_are_always_left_out_teach_what_none_teach(config, tmp_path):
    """All but what a file says of its prompts, by the losses of each step; left out now and then they are others."""
    shutil.copytree(SUBJECT / "train", tmp_path / "plain", ignore=shutil.ignore_patterns("*.txt"))

    def losses(folder, rate, name):
        listener, own = Listener(), {"instance_data_dir": str(folder), "instance_prompt": "a photo of sks teddy"}
        customize(
            config(max_train_steps=2, caption_dropout_rate=rate, output_dir=str(tmp_path / name), **own), listener
        )
        return [step.loss for step in listener.steps]

    without = losses(tmp_path / "plain", 0.5, "none")
    assert losses(SUBJECT / "train", 1, "always") == without
    assert losses(SUBJECT / "train", 0, "never") != without


@pytest.mark.slow
def test_in_the_way_up_no_step_goes_back_through_the_way_down(config, monkeypatch):
    """Where adapters are there alone, what the way down and the middle give needs no gradient."""
    given, prepare = {}, learned.prepare

    def watch(unet, name):
        def keep(block, args, out):
            given.setdefault(name, out)  # the first one is the step's

        unet.get_submodule(name).register_forward_hook(keep)

    def watched(config, pipe, subjects):
        prepare(config, pipe, subjects)
        for name in ("down_blocks.0", "mid_block", "up_blocks.1"):
            watch(pipe.unet, name)

    monkeypatch.setattr(story.learned, "prepare", watched)
    header = read_adapter(customize(config(max_train_steps=1, up_blocks_only=True, max_bytes=0)).adapter)
    assert given.keys() == {"down_blocks.0", "mid_block", "up_blocks.1"}
    hidden, skipped = given["down_blocks.0"]
    assert not any(out.requires_grad for out in (hidden, *skipped, given["mid_block"]))
    assert given["up_blocks.1"].requires_grad
    assert header.config["unet"]["target_modules"] == r"up_blocks\..*\.(attn2)"


@pytest.mark.slow
def test_a_compiled_unet_learns_the_same(config, tmp_path, monkeypatch):
    # torch's cache does not know ATEN_CPU_CAPABILITY and would hand out what was compiled with other instructions.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()  # torch 2.13 cannot compile again, for all sizes, what an earlier test compiled for one
    # A large epsilon makes AdamW's step a smooth function of the gradient: otherwise the sign of a gradient that is
    # zero up to the compiler's rounding decides about a whole step.
    smooth = {"learning_rate": 3e-2, "adam_epsilon": 1e-1, "lr_scheduler": "constant", "kind": "tied"}
    losses = {}
    for compiled in (False, True):
        listener = Listener()
        customize(config(compile=compiled, **smooth, output_dir=str(tmp_path / str(compiled))), listener)
        losses[compiled] = [step.loss for step in listener.steps]
    # A sum of n float32 is off by up to n 2^-24 in another order; those of a gradient are over some 10^3 numbers.
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][0] != losses[True][-1]


@pytest.mark.slow
def test_trackers_get_the_loss(config, tmp_path):
    customize(config(report_to=["tensorboard"]))
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_a_file_that_does_not_reproduce_the_training_is_an_error(config):
    settings = config(pretrained_model_name_or_path="embedded")
    outcome = customize(settings)
    other = bases.load_base("embedded")
    load_adapter(other, outcome.adapter, "subject")
    noise = torch.randn(1, other.unet.config.in_channels, 8, 8)
    batch = Batch(noise, noise, torch.tensor([500]), torch.zeros(1, 6), None, ["a photo of sks teddy"], ["a"])
    learner = Learner(other, batch.prompts, train_text=False)
    prove(settings, witness(learner, batch), outcome.adapter)
    for parameter in other.unet.parameters():
        parameter.data *= 1.05
    with pytest.raises(RuntimeError, match="does not reproduce"):
        prove(settings, witness(learner, batch), outcome.adapter)


@pytest.mark.parametrize(
    ("gpu", "suited", "only_cpu", "base", "asked", "taken"),
    [
        (True, ("cuda", "embedded"), "false", None, None, "bf16"),
        (True, ("cpu", "embedded"), "false", None, None, "no"),
        (True, ("cuda", "sd-1.5"), "true", "sd-1.5", None, "no"),
        (True, ("cuda", "embedded"), "false", None, "no", "no"),
        (False, ("cpu", "sd-1.5"), "false", "sd-1.5", None, "bf16"),
        (False, ("cpu", "embedded"), "false", "sd-1.5", None, "no"),
        (False, ("cpu", "sd-1.5"), "false", "sd-1.5", "no", "no"),
    ],
)
def test_a_device_that_is_fast_in_bfloat16_trains_in_it_unless_another_is_asked_for(
    monkeypatch, gpu, suited, only_cpu, base, asked, taken
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(story.bases, "suits_bf16", lambda *asked: asked == suited)
    monkeypatch.setenv("ACCELERATE_USE_CPU", only_cpu)
    config = TrainConfig(
        pretrained_model_name_or_path=base, mixed_precision=asked, instance_data_dir="dog", instance_prompt="a sks dog"
    )
    assert story.with_precision(config).mixed_precision == taken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launched", "asked", "taken", "told"),
    [
        ("bf16", None, "bf16", "The precision is bf16, as accelerate launch says."),
        ("bf16", "no", "no", None),
        *(
            slow(*case)
            for case in (
                ("BF16", None, "bf16", "The precision is bf16, as accelerate launch says."),
                ("no", None, "no", None),
                ("no", "bf16", "bf16", None),
            )
        ),
    ],
)
def test_the_launchers_precision_is_taken_where_none_is_named(
    config, tmp_path, monkeypatch, launched, asked, taken, told
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    listener = Listener()
    asked_for = config(max_train_steps=1, mixed_precision=asked)
    outcome = customize(asked_for, listener)
    assert f'mixed_precision = "{taken}"' in (tmp_path / "out/run.toml").read_text()
    said = [note for note in listener.notes if "accelerate launch" in note or "launcher" in note]
    assert said == [told] * bool(told)
    facts = validate(ValidateConfig(mixed_precision=asked, output_dir="new")).facts
    assert [fact for fact in facts if "accelerate" in fact] == said
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    named = customize(config(max_train_steps=1, mixed_precision=taken, output_dir=str(tmp_path / "named")))
    assert named.adapter.read_bytes() == outcome.adapter.read_bytes()


def test_a_launchers_precision_that_is_none_is_refused_and_one_that_nobody_asked_for_is_told(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(
        ValueError, match="accelerate launch --mixed_precision fp8 is not supported: use no, fp16 or bf16"
    ):
        customize(config())
    assert any("fp8 is not supported" in error for error in validate(ValidateConfig()).errors)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        customize(config())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which the launcher also says if it was told nothing
    monkeypatch.setattr(story.bases, "suits_bf16", lambda *asked: True)
    (told,) = launched_precision(config())
    assert told == "The precision is bf16, as suits the device; --mixed_precision no keeps the launcher's."


@pytest.mark.slow
def test_each_part_is_on_the_accelerator_while_it_works_and_the_denoiser_in_the_precision_of_its_steps(
    config, monkeypatch
):
    moves, read, encoded = [], learner_module.read, story.encode_all

    def noted(self, *arguments, **more):
        where = [str(a) for a in (*arguments, *more.values())]
        moves.append((type(self).__name__, *where, *{p.dtype for p in self.parameters() if not p.requires_grad}))
        return moved(self, *arguments, **more)

    def marked(name, function):
        def run(*arguments):
            moves.append(name)
            return function(*arguments)

        return run

    moved = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", noted)
    monkeypatch.setattr(story, "encode_all", marked("encode", encoded))
    monkeypatch.setattr(learner_module, "read", marked("read", read))
    customize(config(max_train_steps=1, mixed_precision="bf16"))
    before, rest = moves[: moves.index("encode")], moves[moves.index("encode") :]
    assert ("AutoencoderKL", "cpu") in before and not {move[0] for move in before} & {"UNet2DConditionModel"}
    first, second = (index for index, move in enumerate(rest) if move == "read")  # of the run, and of the proof
    for reading in (first, second):
        unet = next(move for move in rest[reading:] if move[0] in ("UNet2DConditionModel", "Learner"))
        assert unet[1:] == ("cpu", torch.bfloat16)  # it is small by the time it is moved to where it works


@pytest.mark.slow
def test_the_trained_base_is_gone_before_the_proof_loads_another(config, monkeypatch):
    trained, alive = [], []
    taken, proved = output.witness, output.prove

    def watched(learner, batch):
        trained.append(weakref.ref(learner.denoiser))
        return taken(learner, batch)

    def watching(*arguments):
        alive.append(trained[0]() is not None)
        return proved(*arguments)

    monkeypatch.setattr(output, "witness", watched)
    monkeypatch.setattr(output, "prove", watching)
    customize(config())
    assert alive == [False]


@pytest.mark.slow
def test_stray_files_and_odd_pictures_are_told(config, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(SUBJECT / "train", folder, ignore=shutil.ignore_patterns("*.txt"))
    (folder / ".DS_Store").write_bytes(b"x")
    from PIL import Image

    Image.new("L", (9, 9)).save(folder / "5.png")
    listener = Listener()
    customize(config(instance_data_dir=str(folder), instance_prompt="a photo of sks teddy"), listener)
    said = " ".join(listener.notes)
    assert "Left aside: .DS_Store (a system file)" in said
    assert "5.png: converted from L to RGB" in said and "5.png (9 x 9) is smaller than the resolution of 64" in said


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_told(config, tmp_path):
    listener = Listener()
    prompt = "a photo of sks teddy " + "on the left " * 20
    customize(config(instance_data_dir=str(SUBJECT / "train"), instance_prompt=prompt), listener)
    assert any("of which the text encoder reads 32: the end is cut off" in note for note in listener.notes)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"instance_data_dir": "nowhere", "instance_prompt": "a photo of sks dog"},
            FileNotFoundError,
            "no folder nowhere",
        ),
        ({"mixed_precision": "fp16"}, ValueError, "needs a GPU"),
        ({"output_dir": "/proc/nope"}, OSError, "--output_dir /proc/nope cannot be written"),
        ({"init_adapter": "nope.safetensors"}, ValueError, "no adapter file"),
        (
            {"target_modules": ["nope"]},
            ValueError,
            "--target_modules nope: the U-Net has no such attention; it has attn1, attn2",
        ),
    ],
)
def test_bad_input_is_refused_before_the_first_step(config, settings, error, message):
    listener = Listener()
    with pytest.raises(error, match=message):
        customize(config(**settings), listener)
    assert listener.steps == []
