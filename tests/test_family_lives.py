"""What a subject goes through on a base of every family beyond the U-Nets: learned, resumed, drawn, judged."""

import inspect
import re
import shutil
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline
from PIL import Image, ImageChops
from torch.testing import assert_close

from comcat_diffusion import (
    ComcatConfig,
    bases,
    keep_background,
    listen,
    load_adapter,
    remember_prompts,
    save_adapter,
    set_regions,
    unload_adapters,
)
from comcat_diffusion.adapters import focus
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.placing import add_adapter, set_adapters
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.bench.config import BenchConfig
from comcat_diffusion.bench.run import bench
from comcat_diffusion.cli import main
from comcat_diffusion.evaluation.config import EvaluateConfig
from comcat_diffusion.evaluation.evaluate import evaluate
from comcat_diffusion.families.known import family_of, family_of_denoiser
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, use_sampler
from comcat_diffusion.training import learned
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.training.encode import Crop, posterior
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import held_out_loss
from comcat_diffusion.training.objective import objective_of
from comcat_diffusion.training.outline import Outliner, can_outline
from comcat_diffusion.training.suitable import refuse_pipeline
from comcat_diffusion.training.validate import validate
from comcat_diffusion.words import Subject
from tests import tiny_families
from tests.quick_training import BARE
from tests.slow import mostly, slow

PICTURES = str(bases.assets() / "subject" / "train")
PROMPT, OTHER = "a photo of sks teddy", "a photo of a teddy"
BASES = ("pixart", "sd3", "sd35", "sana", "klein", "z_image", "qwen_image", "flux1", "kolors", "chroma")
OFTEN = ("klein",)  # text within the picture's attention; beside it, it is in the U-Nets that other files are about
SUBJECTS = [Subject("sks", "teddy")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny base of every family, built when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Folders(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = getattr(tiny_families, name)(root / name)
            return self[name]

    return Folders()


@pytest.fixture(scope="module", params=mostly(BASES, *OFTEN))
def base(request, folders):
    """The folder of one."""
    return str(folders[request.param])


def settings(base, output, **more) -> TrainConfig:
    own = {
        "instance_data_dir": PICTURES,
        "instance_prompt": PROMPT,
        "validation_prompt": [PROMPT],
        "rank": 2,
        "kind": "tied",
    }
    return TrainConfig(
        **{
            "pretrained_model_name_or_path": base, "output_dir": str(output), "mixed_precision": "no",
            "max_train_steps": 4, "lr_warmup_steps": 0, "num_validation_images": 1, "thumbnail": False, **BARE,
        } | own | more
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(base, tmp_path_factory):
    """A run of forty quick steps on a base: its base and its file."""
    folder = tmp_path_factory.mktemp("taught")
    return base, customize(settings(base, folder, max_train_steps=40, learning_rate=0.02)).adapter


def held_out(pipe) -> float:
    """The loss on the training pictures."""
    side = bases.native_resolution(pipe)
    pictures = [Image.open(path).convert("RGB").resize((side, side)) for path in sorted(Path(PICTURES).glob("*.png"))]
    found = [posterior(pipe, picture) for picture in pictures]
    crops = [Crop(**one, prompt=PROMPT, name="", frame=(16, 16, 0, 0, 16, 16)) for one in found]
    learner = Learner(pipe, [PROMPT], train_text=False).eval()
    return held_out_loss(learner, crops, objective_of(pipe), torch.device("cpu"), draws=16)


def drawn(pipe, *prompts: str) -> list[Image.Image]:
    """One picture a prompt, all in one batch."""
    return list(draw(pipe, [Drawing(prompt, 3) for prompt in prompts], Sampling(2, 3.0)))


def differs(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is not None


@pytest.mark.slow
def test_training_teaches_the_pictures_and_leaves_other_prompts_alone_to_the_bit(taught):
    base, file = taught
    pipe = bases.load_base(base)
    before, alone, untaught = drawn(pipe, OTHER, PROMPT), drawn(pipe, OTHER), held_out(pipe)
    load_adapter(pipe, file, "dog")
    assert held_out(pipe) < untaught * 0.999
    assert not differs(drawn(pipe, OTHER)[0], alone[0])
    mixed = drawn(pipe, OTHER, PROMPT)
    assert not differs(mixed[0], before[0]) and differs(mixed[1], before[1])
    unload_adapters(pipe)
    assert [differs(*pair) for pair in zip(drawn(pipe, OTHER, PROMPT), before, strict=True)] == [False, False]


@pytest.mark.parametrize("kind", mostly(["tied", "foldable", "free", "cores"], "tied", "free"))
def test_what_has_learned_nothing_is_the_base(base, kind, tmp_path):
    pipe = bases.load_base(base)
    (before,) = drawn(pipe, PROMPT)
    learned.prepare(settings(base, tmp_path, kind=kind), pipe, SUBJECTS)
    if kind != "free":  # whose heads are wider: sums in another order
        assert not differs(drawn(pipe, PROMPT)[0], before)
    with torch.no_grad():
        for factor in factors(denoiser(pipe), learned.ADAPTER).values():
            factor.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    assert differs(drawn(pipe, PROMPT)[0], before)


RESUMED = tuple(zip(BASES[:-1], cycle(("foldable", "tied", "free", "cores")), strict=False))


@pytest.mark.parametrize(
    ("name", "kind"),
    [one if one[0] == "klein" else slow(*one) for one in RESUMED],
)
def test_a_resumed_run_writes_the_bytes_of_an_unbroken_one(folders, name, kind, tmp_path):
    base = str(folders[name])
    whole = customize(settings(base, tmp_path, kind=kind, checkpointing_steps=2, skip_final_inference=True)).adapter
    content = whole.read_bytes()
    whole.unlink()
    resume = str(tmp_path / "checkpoints" / "checkpoint-2")
    resumed = customize(settings(base, tmp_path, kind=kind, resume_from_checkpoint=resume, skip_final_inference=True))
    assert resumed.adapter.read_bytes() == content


def test_several_act_at_their_weights_and_where_their_regions_are(taught):
    base, file = taught
    pipe = bases.load_base(base)
    (before,) = drawn(pipe, PROMPT)
    load_adapter(pipe, file, "one")
    (alone,) = drawn(pipe, PROMPT)
    load_adapter(pipe, file, "two")
    (both,) = drawn(pipe, PROMPT)
    assert differs(both, alone)
    set_adapters(pipe, ["one", "two"], [0.25, 0.75])
    shares = list(drawn(pipe, PROMPT)[0].get_flattened_data())
    most = max(
        abs(a - b) for p, q in zip(shares, alone.get_flattened_data(), strict=True) for a, b in zip(p, q, strict=True)
    )
    assert most <= 1  # of 255: the same sum in another order
    set_adapters(pipe, ["one", "two"], [0.0, 0.0])
    assert not differs(drawn(pipe, PROMPT)[0], before)
    set_adapters(pipe, ["one"], [1.0])
    set_regions(pipe, {"one": torch.zeros(8, 8)})
    assert not differs(drawn(pipe, PROMPT)[0], before)
    set_regions(pipe, {"one": torch.ones(8, 8)})
    assert not differs(drawn(pipe, PROMPT)[0], alone)
    set_regions(pipe, {"one": torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1)})
    (half,) = drawn(pipe, PROMPT)
    assert differs(half, before) and differs(half, alone)
    with pytest.raises(ValueError, match="no adapter 'three'|three"):
        set_adapters(pipe, ["three"], [1.0])


def test_wide_pictures_are_what_its_own_pipeline_draws_and_other_steps_are_refused(taught, tmp_path):
    base, file = taught
    pipe = bases.load_base(base)
    step = max(16, bases.grain(pipe))  # the pipelines themselves want multiples of eight, which real grains are
    size = {"height": step, "width": 2 * step}
    drawing = {"num_images": 1, "num_inference_steps": 2, "guidance_scale": 3.0}
    own = {"adapter": [f"{file}:0"], "prompt": [OTHER], "any_prompt": True, "output_dir": str(tmp_path / "drawn")}
    own |= {"precision": "fp32"}
    (path,) = generate(GenerateConfig(**own, **drawing, **size)).files
    noise = [torch.Generator("cpu").manual_seed(0)]
    family = family_of(pipe)
    more = {"num_inference_steps": 2, "generator": noise, **family.guided(3.0), **family.drawing(pipe)}
    more |= family.negative(pipe, [family.nothing]) if family.nothing is not None else {}
    (alone,) = pipe(prompt=[OTHER], **size, **more).images
    assert alone.size == (2 * step, step) and not differs(Image.open(path), alone)
    taught_size = own | {"adapter": [str(file)], "prompt": [PROMPT]}
    (path,) = generate(GenerateConfig(**taught_size, **drawing, **size)).files
    assert differs(Image.open(path), alone)
    with pytest.raises(ValueError, match=f"--width {step + 1} must be a multiple of {bases.grain(pipe)} for this base"):
        generate(GenerateConfig(**own, width=step + 1))


@pytest.mark.slow
def test_the_commands_take_it_from_end_to_end(taught, tmp_path, capsys):
    base, file = taught
    report = validate(ValidateConfig(**vars(settings(base, tmp_path / "run"))))
    assert not report.errors and any("parameters on" in fact for fact in report.facts)
    assert main(["info", str(file)]) == 0
    assert "sks" in capsys.readouterr().out
    pictures = generate(
        GenerateConfig(
            adapter=[str(file)], prompt=["{subject}"], num_images=1, num_inference_steps=2, compare=True,
            output_dir=str(tmp_path / "drawn"),
        )
    )  # fmt: skip
    assert len(pictures.files) == 1 and len(set(Image.open(pictures.files[0]).size)) == 1
    judged = evaluate(
        EvaluateConfig(
            adapter=[str(file)], subject_dir=str(bases.assets() / "subject" / "held_out"), clip_model="embedded",
            dino_model="none", num_inference_steps=2, seeds=1, output_dir=str(tmp_path / "judged"),
        )
    )  # fmt: skip
    assert judged.rows[1].measures["pixel_drift"].mean == 0
    small = ["--output", str(tmp_path / "small.safetensors"), "--max_bytes", "2650"]
    assert main(["shrink", "--adapter", str(file), *small, "--pretrained_model_name_or_path", base]) == 0
    assert "of the adapter's effect" in capsys.readouterr().out
    bend = ["--output", str(tmp_path / "lora.safetensors"), "--approximate"]
    assert main(["export", "--adapter", str(file), *bend, "--pretrained_model_name_or_path", base]) == 2
    assert "do not read the text encoder's own states" in capsys.readouterr().err
    rows = bench(BenchConfig(pretrained_model_name_or_path=base, rounds=1)).rows
    assert [row.parameters > 0 for row in rows] == [False, True, True] * 2


@pytest.mark.parametrize("names", [("pixart", "sd3", "z_image"), slow(BASES)], ids=["three", "all"])
def test_a_file_of_one_family_is_refused_by_another(folders, names, tmp_path):
    pipes = {name: bases.load_base(str(folders[name])) for name in names}
    for name, pipe in pipes.items():
        add_adapter(denoiser(pipe), ComcatConfig(r=1), "dog")
        assert save_adapter(pipe, tmp_path / name, "dog", name).fingerprint["class"] == type(denoiser(pipe)).__name__
        unload_adapters(pipe)
    for name in names:
        for other in set(names) - {name}:
            with pytest.raises(AdapterFileError, match=f"was trained on '{name}' and does not fit"):
                load_adapter(pipes[other], tmp_path / name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train_text_encoder": True, "everywhere": True}, "--train_text_encoder: the text encoders of .* stay as"),
        ({"learn_name": True}, "--learn_name: the text encoders of .* stay as they are"),
        ({"up_blocks_only": True}, "--up_blocks_only is for U-Nets; the transformer of"),
        ({"convolutions": 8, "kind": "free"}, "--convolutions is for U-Nets; the transformer of"),
        ({"resolution": 18}, "--resolution 18 must be a multiple of (4|8|32) for this base"),
        ({"target_modules": ["nope"]}, "--target_modules nope:"),
    ],
)
def test_what_a_family_cannot_do_is_refused_in_a_sentence_by_check_and_run(base, more, message, tmp_path):
    asked = settings(base, tmp_path / "out", **more)
    if more.keys() & {"up_blocks_only", "convolutions"} and hasattr(bases.load_base(base), "unet"):
        assert not validate(ValidateConfig(**vars(asked))).errors
        return
    with pytest.raises(ValueError, match=message) as caught:
        customize(asked)
    assert "\n" not in str(caught.value)
    errors = validate(ValidateConfig(**vars(asked))).errors
    assert any(re.search(message, error) for error in errors)


def test_blocks_that_carry_no_adapter_are_refused_by_check_and_run(folders, tmp_path):
    asked = settings(str(folders["z_image"]), tmp_path / "out", target_modules=["attention"])
    message = "Cannot adapt '(noise|context)_refiner.0.attention'.*: adapters of this family are in the blocks"
    with pytest.raises(ValueError, match=message):
        customize(asked)
    assert any(re.search(message, error) for error in validate(ValidateConfig(**vars(asked))).errors)


def test_a_flow_has_no_signal_to_noise_ratio_and_samplers_of_its_own(folders, tmp_path):
    base = str(folders["sd3"])
    for more in ({"snr_gamma": 5.0}, {"noise_offset": 0.1}):
        with pytest.raises(ValueError, match=f"--{next(iter(more))} is for bases that predict noise"):
            customize(settings(base, tmp_path / "out", **more))
    pipe = bases.load_base(base)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler: Stable Diffusion 3 and 3.5 matches a flow"):
        use_sampler(pipe, "EulerDiscreteScheduler")
    use_sampler(pipe, "FlowMatchEulerDiscreteScheduler")
    assert len(drawn(pipe, PROMPT)) == 1


def test_a_missing_t5_is_told(folders, tmp_path):
    said = []
    config = {"prompt": [PROMPT], "num_images": 1, "num_inference_steps": 1, "output_dir": str(tmp_path)}
    for name in ("sd3", "sd35"):
        generate(GenerateConfig(pretrained_model_name_or_path=str(folders[name]), **config), note=said.append)
    assert said == ["This base has no T5 (text_encoder_3): it reads prompts by its two CLIPs alone, 77 tokens of them."]


def test_a_trigger_is_heard_by_every_text_encoder(folders):
    """Of 3.5's states, the CLIPs' and the T5's 256, those from the trigger on, each by its own tokens."""
    pipe = bases.load_base(str(folders["sd35"]))
    clips = pipe.tokenizer.model_max_length
    read = texts_of(pipe.tokenizer, family_of(pipe).reading(pipe)).read(PROMPT, clips + 256)
    acts = read.acts(["sks"])
    first = pipe.tokenizer(PROMPT).tokens().index("sks</w>")
    pieces = pipe.tokenizer_3(PROMPT, return_offsets_mapping=True)
    second = next(n for n, (_, end) in enumerate(pieces.offset_mapping) if end > PROMPT.index("sks"))
    assert acts[:clips].tolist() == [n >= first for n in range(clips)]
    assert acts[clips:].tolist() == [n >= second for n in range(256)]
    bare = bases.load_base(str(folders["sd3"]))
    read = texts_of(bare.tokenizer, family_of(bare).reading(bare)).read(PROMPT, clips + 256)
    assert read.acts(["sks"])[:clips].any() and not read.acts(["sks"])[clips:].any()


@torch.no_grad()
def test_behind_sanas_instruction_a_trigger_is_heard_where_it_stands(folders):
    """Its cats are no trigger, and a negative prompt, which has none, is read from its own beginning."""
    pipe = bases.load_base(str(folders["sana"]))
    load = ComcatConfig(r=1, foldable=True, tied=True, trigger=["cat"])
    add_adapter(denoiser(pipe), load, "dog")
    listen(pipe)
    gate, heard = pipe.comcat_gate, []
    tell = gate.begin

    def begin(model, args, kwargs):
        tell(model, args, kwargs)
        heard.append(here.heard)

    for hooks in (denoiser(pipe)._forward_pre_hooks,):
        for number in list(hooks):
            hooks[number] = begin
    how = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"}
    how["use_resolution_binning"] = False
    pipe("a red Cat!", negative_prompt="ugly cat", **how)
    negative, positive = heard[0].said
    assert (negative.text, positive.text) == ("ugly cat", "a red cat!")
    instruction = "\n".join(inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default)
    pieces = pipe.tokenizer(instruction + "a red cat!", return_offsets_mapping=True).offset_mapping
    first = next(n for n, (_, end) in enumerate(pieces) if end > len(instruction) + len("a red "))
    kept = [0, *range(len(pipe.tokenizer(instruction).input_ids) + 298 - 299, len(pieces))]
    acts = positive.acts(["cat"])
    assert acts.tolist() == [n >= first for n in kept] + [True] * (300 - len(kept))
    own = pipe.tokenizer("ugly cat", return_offsets_mapping=True).offset_mapping
    assert negative.acts(["cat"]).tolist().index(True) == next(n for n, (_, end) in enumerate(own) if end > 5)
    pipe("a dog", **how)
    assert not any(said.acts(["cat"]).any() for said in heard[-1].said)
    pipe("a red cat!", complex_human_instruction=None, **how)
    assert heard[-1].said[1].acts(["cat"]).tolist().index(True) < 20
    with pytest.raises(ValueError, match="leave complex_human_instruction as it is"):
        pipe("a red cat!", complex_human_instruction=["Draw: "], **how)


@torch.no_grad()
def test_where_prompts_are_filled_up_in_front_a_trigger_is_heard_where_it_stands(folders):
    """By the letters of a prompt, not their bytes; what is filled in sees all of the prompt, and acts with it."""
    pipe = bases.load_base(str(folders["kolors"]))
    family, long = family_of(pipe), "so " * 130
    texts = texts_of(pipe.tokenizer, family.reading(pipe))
    for prompt, word, before, its in (
        (PROMPT, "sks", "[gMASK] sop ▁a ▁photo ▁of", "▁sks"),
        ("雪 dög ﬁne\n sks 雪", "sks", "[gMASK] sop ▁ <0xE9> <0x9B> <0xAA> ▁ d <0xC3> <0xB6> g ▁ f in e", "▁sks"),
        ("a 雪 teddy", "雪", "[gMASK] sop ▁a ▁", "<0xE9> <0x9B> <0xAA>"),
        ("sks", "sks", "[gMASK] sop", "▁sks"),
        (f"sks {long}", "sks", "[gMASK] sop", "▁sks"),
    ):
        said = texts.read(prompt, 256)
        read = pipe.tokenizer(prompt, **FILLED)
        gone, pieces = 256 - sum(read.attention_mask), pipe.tokenizer.convert_ids_to_tokens(read.input_ids)
        first, count = gone + len(before.split()), len(its.split())
        assert pieces[gone : first + count] == f"{before} {its}".split()
        assert said.acts([word]).tolist() == [n < gone or n >= first for n in range(256)]
        assert said.within([word]).nonzero().flatten().tolist() == list(range(first, first + count))
    for prompt in ("a teddy", "", f"{long}sks"):  # the last is cut off
        assert not texts.read(prompt, 256).acts(["sks"]).any()
    one, other = family.encode(pipe, ["a photo of sks teddy", "a photo of red snow"])["states"]
    gone = [256 - sum(pipe.tokenizer(text, **FILLED).attention_mask) for text in (PROMPT, "a photo of red snow")]
    assert (one[: min(gone)] - other[: min(gone)]).abs().amax(-1).min() > 1e-3  # it has read what stands behind it,
    alike = [states[start : start + 5] for states, start in zip((one, other), gone, strict=True)]  # to "of"
    assert_close(*alike, rtol=1e-5, atol=1e-6)  # words have not


FILLED = {"padding": "max_length", "max_length": 256, "truncation": True}


@torch.no_grad()
def test_a_chatglm_tells_its_pipeline_which_prompts_it_draws(folders):
    """Also where text states are given, in another precision, and where there is nothing to subtract."""
    pipe = bases.load_base(str(folders["kolors"]))
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, tied=True, trigger=["sks"]), "dog")
    listen(pipe)
    heard = []
    denoiser(pipe).register_forward_hook(lambda *_: heard.append(here.heard.said), prepend=True)
    how = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "latent"}
    pipe([PROMPT, OTHER], negative_prompt=["ugly sks", ""], **how)
    assert [said.text for said in heard[0]] == ["ugly sks", "", PROMPT, OTHER]
    assert [bool(said.acts(["sks"]).any()) for said in heard[0]] == [True, False, True, False]
    states, away, pooled, away_pooled = pipe.encode_prompt(PROMPT, negative_prompt="snow")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    made = [one.to(torch.bfloat16).float() for one in (states, away, pooled, away_pooled)]
    pipe(**dict(zip(names, made, strict=True)), **how)
    assert [said.text for said in heard[1]] == ["snow", PROMPT]
    pipe.register_to_config(force_zeros_for_empty_prompt=True)  # for which its pipeline alone would fail
    assert len(drawn(pipe, PROMPT)) == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_kolors_keeps_backgrounds_and_finds_outlines(folders, monkeypatch):
    """By its U-Net's attentions on the way up, at words behind what prompts are filled up with."""
    pipe = bases.load_base(str(folders["kolors"]))
    outlined = Outliner(pipe, objective_of(pipe)).share(torch.zeros(4, 8, 8), SUBJECTS[0], (16, 16, 0, 0, 16, 16))
    assert can_outline(pipe) and set(outlined.unique().tolist()) <= {0.0, 1.0} and outlined.any()
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, trigger=["sks"]), "dog")
    for factor in factors(denoiser(pipe), "dog").values():
        factor.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    listen(pipe)
    prompt, how = "a photo of sks teddy on a green table", {"num_inference_steps": 2, "output_type": "latent"}
    how |= {"height": 16, "width": 16, "guidance_scale": 3.0}

    def run(call, scale: float) -> torch.Tensor:
        set_adapters(pipe, ["dog"], [scale])
        return call(prompt=prompt, generator=torch.Generator().manual_seed(3), **how).images

    before, free, asked = run(pipe, 0.0), run(pipe, 1.0), []

    def left(at, grown):
        asked.append(at)
        return torch.cat([torch.ones_like(at[..., :4]), torch.zeros_like(at[..., 4:])], dim=-1)

    monkeypatch.setattr(focus, "weights_of", left)
    kept = run(partial(keep_background, pipe, {"dog": ["sks teddy"]}), 1.0)
    assert torch.equal(kept[..., 4:], before[..., 4:]) and not torch.equal(free[..., 4:], before[..., 4:])
    assert (kept[..., :4] - before[..., :4]).abs().max() > 1e-3
    (at,) = asked
    assert at.max() - at.min() > 1e-6  # places look at the words more and less


def test_without_sentencepiece_a_kolors_is_refused_in_a_sentence(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.pipelines.kolors.tokenizer.is_sentencepiece_available", lambda: False)
    asked = settings(str(folders["kolors"]), tmp_path / "out")
    (error,) = validate(ValidateConfig(**vars(asked))).errors
    assert "wants a package that is not installed" in error and "pip install sentencepiece" in error
    with pytest.raises(ValueError, match="could not be loaded .*pip install sentencepiece"):
        customize(asked)


@torch.no_grad()
def test_of_texts_of_their_own_lengths_each_knows_its_trigger(folders):
    """In a chat, and of what it has alone; the states of a prompt are known again in another list."""
    pipe = bases.load_base(str(folders["z_image"]))
    words = ["sks", "user", "assistant"]
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, tied=True, trigger=words), "dog")
    listen(pipe)
    heard = []
    denoiser(pipe).register_forward_hook(lambda *_: heard.append(here.heard.said), prepend=True)
    how = {"num_inference_steps": 1, "height": 16, "width": 24, "output_type": "latent"}
    how |= {"guidance_scale": 3.0, **family_of(pipe).drawing(pipe)}
    prompts = ["a photo of a teddy", "a photo of (sks) teddy", "sks", "no such user"]
    pipe(prompt=list(prompts), negative_prompt=["ugly sks", "", "", ""], **how)  # it writes the chat into the list
    assert [said.text for said in heard[0]] == [*prompts, "ugly sks", "", "", ""]
    head = len("<|im_start|>user\n")
    for said in heard[0]:
        place = max(said.text.find("sks"), said.text.find("user"))
        whole = f"<|im_start|>user\n{said.text}<|im_end|>\n<|im_start|>assistant\n"
        own = pipe.tokenizer(whole, return_offsets_mapping=True).offset_mapping
        first = next((n for n, (_, end) in enumerate(own) if end - head > place), None) if place >= 0 else len(own)
        assert said.acts(words).tolist() == [n >= first for n in range(len(own))]
    states, away = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=48)
    assert away == [] and len({len(one) for one in states}) > 2
    pipe(prompt_embeds=[one.clone().to(torch.bfloat16).float() for one in states], **how | {"guidance_scale": 0.0})
    assert [said.text for said in heard[1]] == prompts
    strange = [torch.randn(5, 24)]
    with pytest.raises(ValueError, match="waits for 'sks', but these text states are of no prompt"):
        pipe(prompt_embeds=strange, **how | {"guidance_scale": 0.0})
    remember_prompts(pipe, strange, PROMPT)
    pipe(prompt_embeds=strange, **how | {"guidance_scale": 0.0})
    assert heard[-1][0].text == PROMPT
    with pytest.raises(ValueError, match="for 2 prompts: give one"):
        remember_prompts(pipe, strange, [PROMPT, OTHER])


@torch.no_grad()
def test_in_a_template_a_trigger_is_heard_in_what_the_user_says(folders):
    """Of texts that are filled up to the longest, known again at any length; words of the template are no trigger."""
    pipe = bases.load_base(str(folders["qwen_image"]))
    words = ["sks", "user", "color"]
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, tied=True, trigger=words), "dog")
    listen(pipe)
    heard = []
    denoiser(pipe).register_forward_hook(lambda *_: heard.append(here.heard.said), prepend=True)
    how = {"num_inference_steps": 2, "height": 16, "width": 24, "output_type": "latent"}
    prompts = ["a photo of a teddy", "a photo of (sks) teddy {}", "sks", "no such user"]
    pipe(prompt=prompts, negative_prompt=["ugly sks", "", "", ""], true_cfg_scale=3.0, **how)
    assert [said.text for said in heard[0]] == prompts
    assert [said.text for said in heard[1]] == ["ugly sks", "", "", ""]
    before = f"<|im_start|>system\n{tiny_families.DESCRIBED}<|im_end|>\n<|im_start|>user\n"
    most = max(len(pipe.tokenizer(text).input_ids) for text in prompts) + 5  # of the template's end
    for said in (*heard[0], *heard[1]):
        place = max(said.text.find("sks"), said.text.find("user"))
        own = pipe.tokenizer(before + said.text, return_offsets_mapping=True).offset_mapping[34:]
        first = next((n for n, (_, end) in enumerate(own) if end - len(before) > place), None) if place >= 0 else most
        acts = said.acts(words).tolist()
        assert acts == [n >= first for n in range(len(acts))]
    assert len(heard[0][0].ends) == most
    alone, _ = pipe.encode_prompt("sks")
    filled = torch.cat([alone, torch.zeros(1, 9, 24)], dim=1)
    mask = torch.arange(filled.shape[1])[None] < alone.shape[1]
    pipe(prompt_embeds=filled, prompt_embeds_mask=mask, **how)
    assert heard[-1][0].text == "sks" and heard[-1][0].acts(words).all()


def test_guidance_needs_something_to_subtract(folders, tmp_path):
    """Which is the empty prompt, where nothing else is asked; and drawings need two steps."""
    pipe = bases.load_base(str(folders["qwen_image"]))
    strong, weak = (next(draw(pipe, [Drawing(PROMPT, 3)], Sampling(2, strength))) for strength in (6.0, 1.0))
    (by_hand,) = pipe(PROMPT, negative_prompt="", true_cfg_scale=6.0, num_inference_steps=2, height=32, width=32,
                      generator=torch.Generator().manual_seed(3)).images  # fmt: skip
    assert differs(strong, weak) and not differs(strong, by_hand)
    one = {"num_inference_steps": 1, "prompt": [PROMPT], "num_images": 1, "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="--num_inference_steps 1: Qwen-Image draws in 2 or more"):
        generate(GenerateConfig(pretrained_model_name_or_path=str(folders["qwen_image"]), **one))


@torch.no_grad()
def test_behind_a_picture_an_adapter_acts_on_words_from_its_trigger_on(folders):
    """Of two samples of other lengths, in rows filled up to multiples of 32; a region is a part of the picture."""
    pipe = bases.load_base(str(folders["z_image"]))
    model, name = denoiser(pipe), "layers.0.attention"
    attention = model.get_submodule(name)
    add_adapter(model, ComcatConfig(r=1, foldable=True, tied=True, trigger=["sks"], target_modules=[name]), "dog")
    listen(pipe)
    for factor in factors(model, "dog").values():
        factor.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    long = "a photo of a red ball on a green table and sks teddy so far so good"
    family, seen, asked, prompts = family_of(pipe), [], [], [OTHER, "sks, " + "so " * 20, long]
    condition = family.encode(pipe, prompts)
    attention.register_forward_hook(lambda _, args, output: seen.append((asked[-1], output)))
    attention.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs | {"x": args[0]}), with_kwargs=True)
    latents = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(2))  # 4x6 tokens, and 8 more

    def run() -> torch.Tensor:
        pipe.comcat_gate.tell(condition["states"], prompts)
        return family.predict(model, latents, torch.tensor([500.0] * 3), condition, None)

    set_adapters(pipe, ["dog"], [0.0])
    before = run()
    set_adapters(pipe, ["dog"], [1.0])
    after = run()
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1]) and not torch.equal(after[2], before[2])
    (inputs, bare), (_, whole) = seen
    layer, rows = attention.comcat, inputs["x"].shape[1]
    assert rows == 32 + 64 and len({len(one) for one in condition["states"]}) == 3
    acts = torch.ones(3, rows, 1)
    for row, text, states in zip(acts, prompts, condition["states"], strict=True):
        said = texts_of(pipe.tokenizer).read(text, len(states)).acts(["sks"])
        row[32 : 32 + len(said), 0] = said.float()
    acts[0] = 0
    hidden, there = inputs["x"], inputs["attention_mask"]
    for down, core, projection in (
        (layer.comcat_k_down, layer.comcat_q_core, attention.to_k),
        (layer.comcat_v_down, layer.comcat_out_core, attention.to_v),
    ):
        change = hidden @ down["dog"].weight.T * core["dog"].weight.reshape(1, 1, -1)  # rank 1
        made = projection(hidden) + acts * change
        projection.forward = lambda _, made=made: made
    set_adapters(pipe, ["dog"], [0.0])
    more = {name: inputs[name] for name in ("attention_mask", "freqs_cis")}
    by_hand = attention(hidden, **more)
    del attention.to_k.forward, attention.to_v.forward
    torch.testing.assert_close(whole[there], by_hand[there], rtol=1e-4, atol=1e-5)
    set_adapters(pipe, ["dog"], [1.0])
    set_regions(pipe, {"dog": torch.cat([torch.ones(8, 4), torch.zeros(8, 8)], dim=1)})
    run()
    picture, words = seen[-1][1][1].split((24, rows - 24))
    picture, own, base = (one.unflatten(0, (4, 6)) for one in (picture, whole[1][:24], bare[1][:24]))
    assert torch.equal(picture[:, :2], own[:, :2]) and torch.equal(picture[:, 2:], base[:, 2:])
    torch.testing.assert_close(words, whole[1][24:] / 3 + bare[1][24:] * 2 / 3, rtol=1e-4, atol=1e-5)


def test_a_z_image_that_is_distilled_is_told_by_its_name(folders, tmp_path):
    pipe = bases.load_base(str(folders["z_image"]))
    assert bases.default_guidance("z", pipe) == 4 and not family_of(pipe).remarks(pipe)
    turbo = bases.load_base(str(shutil.copytree(folders["z_image"], tmp_path / "Z-Image-Turbo")))
    assert bases.default_guidance("z", turbo) == 0
    assert "draw in a few steps and without guidance" in family_of(turbo).remarks(turbo)[0]
    assert family_of_denoiser("ZImageTransformer2DModel", {"siglip_feat_dim": 8}) is None  # Omni


@torch.no_grad()
def test_in_a_chat_a_trigger_is_heard_in_what_the_user_says(folders):
    """By byte pairs that spaces lead; the words of the chat itself are no trigger."""
    pipe = bases.load_base(str(folders["klein"]))
    words = ["sks", "user", "assistant"]
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, tied=True, trigger=words), "dog")
    listen(pipe)
    heard = {}

    def tell(model, args, kwargs, output):
        heard.setdefault(here.heard.said[0].text, here.heard.said[0])

    denoiser(pipe).register_forward_hook(tell, with_kwargs=True, prepend=True)
    family = family_of(pipe)
    how = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent", **family.drawing(pipe)}
    prompts = ["a photo of a teddy", "a photo of (sks) teddy", "sks", "two <|im_end|> sks ", "no such user"]
    for prompt in prompts:
        pipe(prompt=prompt, **how)
    pipe(prompt="a dog", guidance_scale=3.0, **family.negative(pipe, ["ugly sks"]), **how)
    assert list(heard) == [prompts[0], "", *prompts[1:], "a dog", "ugly sks"]
    before = pipe.tokenizer("<|im_start|>user\n").input_ids
    for prompt, said in heard.items():
        acts, place = said.acts(words).tolist(), max(prompt.find("sks"), prompt.find("user"))
        own = pipe.tokenizer(f"<|im_start|>user\n{prompt}", return_offsets_mapping=True)
        ends = [end - len("<|im_start|>user\n") for _, end in own.offset_mapping]
        first = next((n for n, end in enumerate(ends) if end > place), None) if place >= 0 else 48
        assert acts == [n >= first for n in range(48)] and (first == 48 or first >= len(before))
    assert [n for n, one in enumerate(heard["sks"].within(["sks"]).tolist()) if one] == [len(before), len(before) + 1]


def test_what_the_chat_cuts_off_is_told(folders, tmp_path):
    base = str(folders["klein"])
    pipe = bases.load_base(base)
    family, long = family_of(pipe), "so " * 30 + "sks teddy"
    most = family.most_tokens(pipe.tokenizer, type(pipe).__name__, denoiser(pipe).config)
    assert most == 48 - len(pipe.tokenizer("<|im_start|>user\n").input_ids)
    config = {"prompt": [long], "num_images": 1, "num_inference_steps": 1, "output_dir": str(tmp_path)}
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, trigger=["sks"]), "dog")
    save_adapter(pipe, tmp_path / "a.safetensors", "dog", base, Notes(trigger="sks", class_word="teddy"))
    with pytest.raises(ValueError, match=f"of which the text encoder reads {most}, and 'sks teddy' comes later"):
        generate(GenerateConfig(adapter=[str(tmp_path / "a.safetensors")], **config))


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(["pixart", "klein"], "klein"))
def test_the_class_is_drawn_where_text_is_read_in_bfloat16(folders, name, tmp_path, monkeypatch):
    monkeypatch.setattr("comcat_diffusion.training.class_pictures.STEPS", 1)
    prior = {"prior": "images", "num_class_images": 2, "class_data_dir": str(tmp_path / "class"), "everywhere": True}
    asked = settings(str(folders[name]), tmp_path / "run", skip_final_inference=True, max_train_steps=1, **prior)
    assert customize(asked).adapter.is_file()
    first, second = (Image.open(path) for path in sorted((tmp_path / "class").glob("*.png")))
    assert differs(first, second)


def test_a_tokenizer_without_a_chat_is_told(folders, tmp_path):
    base = Path(shutil.copytree(folders["klein"], tmp_path / "base"))
    template = base / "tokenizer" / "chat_template.jinja"
    for content, message in (("{{ 'hello' }}", "does not say once what a user says"), (None, "has no chat template")):
        template.unlink() if content is None else template.write_text(content)
        asked = settings(str(base), tmp_path / "out")
        assert any(message in error for error in validate(ValidateConfig(**vars(asked))).errors)
        with pytest.raises(ValueError, match=message):
            customize(asked)


def test_the_words_of_flux_1_are_its_t5s(folders):
    """Of a prompt of both; one that only the T5 is told is refused."""
    pipe = bases.load_base(str(folders["flux1"]))
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, trigger=["sks"]), "dog")
    listen(pipe)
    how = {"num_inference_steps": 1, "height": 16, "width": 16, "max_sequence_length": 40, "output_type": "latent"}
    found = []
    denoiser(pipe).register_forward_hook(lambda *_: found.append(here.heard.said[0]), prepend=True)
    pipe(PROMPT, prompt_2=PROMPT, **how)
    pieces = pipe.tokenizer_2(PROMPT, return_offsets_mapping=True).offset_mapping
    first = next(n for n, (_, end) in enumerate(pieces) if end > PROMPT.index("sks"))
    assert found[0].acts(["sks"]).tolist() == [n >= first for n in range(40)]
    with pytest.raises(ValueError, match="leave `prompt_2` out"):
        pipe("a dog", prompt_2=PROMPT, **how)
    with pytest.raises(ValueError, match="--negative_prompt: FLUX.1 is drawn without subtracting anything"):
        list(draw(pipe, [Drawing(PROMPT, 3)], Sampling(1, 3.0, negative_prompt="snow")))


def test_schnell_is_told_of_no_guidance(tmp_path):
    pipe = bases.load_base(str(tiny_families.schnell(tmp_path)))
    assert bases.default_guidance("schnell", pipe) == 0
    tokenizer, family = tiny_families.t5_tokenizer(), family_of(pipe)
    most = [family.most_tokens(tokenizer, "FluxPipeline", {"guidance_embeds": told}) for told in (True, False)]
    assert most == [512, 256]
    assert "distilled to draw in a few steps" in family_of(pipe).remarks(pipe)[0]
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, trigger=["sks"]), "dog")
    listen(pipe)
    assert len(drawn(pipe, PROMPT, OTHER)) == 2


def test_a_distilled_base_is_told_and_draws_without_guidance(folders, tmp_path):
    pipe = bases.load_base(str(folders["klein"]))
    assert bases.default_guidance("klein", pipe) == 4 and not family_of(pipe).remarks(pipe)
    pipe.register_to_config(is_distilled=True)
    assert bases.default_guidance("klein", pipe) == 1
    assert "distilled to draw in a few steps" in family_of(pipe).remarks(pipe)[0]


@pytest.mark.parametrize("name", mostly(["sd3", "klein", "chroma", "z_image", "qwen_image"], "klein"))
def test_a_scale_in_the_call_and_a_negative_prompt_count(folders, name):
    pipe = bases.load_base(str(folders[name]))
    (before,) = drawn(pipe, PROMPT)
    (away,) = draw(pipe, [Drawing(PROMPT, 3)], Sampling(2, 3.0, negative_prompt="snow"))
    assert differs(away, before)
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True), "dog")
    with torch.no_grad():
        for factor in factors(denoiser(pipe), "dog").values():
            factor.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    (after,) = drawn(pipe, PROMPT)
    how = {"num_inference_steps": 2, "height": after.height, "width": after.width}
    how |= {**family_of(pipe).drawing(pipe), **family_of(pipe).guided(3.0)}
    how |= {"negative_prompt": ""} if name == "qwen_image" else {}
    scale = "attention_kwargs" if name in ("klein", "qwen_image") else "joint_attention_kwargs"

    def at(strength: float) -> Image.Image:
        generator = torch.Generator().manual_seed(3)
        return pipe(prompt=PROMPT, generator=generator, **{scale: {"scale": strength}}, **how).images[0]

    assert not differs(at(0.0), before) and not differs(at(1.0), after)
    half = at(0.5)
    assert differs(half, before) and differs(half, after)


@torch.no_grad()
def test_a_region_is_a_part_of_a_picture_that_is_a_row_of_tokens(folders):
    """Four rows of six: what the left half of them gives is the adapter's, what the right half gives the base's."""
    pipe = bases.load_base(str(folders["klein"]))
    model = denoiser(pipe)
    add_adapter(model, ComcatConfig(r=1, foldable=True), "dog")
    for factor in factors(model, "dog").values():
        factor.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    seen, attention = [], model.transformer_blocks[0].attn
    attention.register_forward_hook(lambda _, args, output: seen.append(output[0][0].unflatten(0, (4, 6))))
    latents, how = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([0.5])
    states = torch.randn(1, 5, 72, generator=torch.Generator().manual_seed(3))

    def run() -> torch.Tensor:
        return family_of(pipe).predict(model, latents, 1000 * how, {"states": states}, None)

    set_adapters(pipe, ["dog"], [0.0])
    run()
    set_adapters(pipe, ["dog"], [1.0])
    run()
    set_regions(pipe, {"dog": torch.cat([torch.ones(8, 6), torch.zeros(8, 6)], dim=1)})
    run()
    bare, whole, half = seen
    assert torch.equal(half[:, :3], whole[:, :3]) and torch.equal(half[:, 3:], bare[:, 3:])
    assert (whole - bare).abs().amax(-1).min() > 1e-3
    places = torch.cartesian_prod(torch.tensor([0, 10]), torch.arange(4), torch.arange(6), torch.arange(1))
    more = {"encoder_hidden_states": states, "timestep": how, "txt_ids": torch.zeros(5, 4), "img_ids": places}
    with pytest.raises(ValueError, match="48 tokens are no level of latents"):  # a picture to start from beside
        model(torch.zeros(1, 48, 16), **more)


@torch.no_grad()
def test_in_one_stream_an_adapter_acts_on_words_from_its_trigger_on_and_then_on_the_picture(folders):
    """Of two pictures on the one whose prompt has it, within its region; the words have the mean of the region."""
    pipe = bases.load_base(str(folders["klein"]))
    model, name = denoiser(pipe), "single_transformer_blocks.0.attn"
    attention = model.get_submodule(name)
    add_adapter(model, ComcatConfig(r=1, foldable=True, tied=True, trigger=["sks"], target_modules=[name]), "dog")
    listen(pipe)
    for factor in factors(model, "dog").values():
        factor.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    family, seen = family_of(pipe), []
    condition = family.encode(pipe, [OTHER, PROMPT])
    attention.register_forward_hook(lambda _, args, output: seen.append((asked[-1], output)))
    asked = []
    attention.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(2))

    def run() -> torch.Tensor:
        pipe.comcat_gate.tell(condition["states"], [OTHER, PROMPT])
        return family.predict(model, latents, torch.tensor([500.0, 500.0]), condition, None)

    set_adapters(pipe, ["dog"], [0.0])
    before = run()
    set_adapters(pipe, ["dog"], [1.0])
    after = run()
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    (inputs, bare), (_, whole) = seen
    weights = model.get_submodule(name).to_qkv_mlp_proj.weight
    layer = attention.comcat
    said = texts_of(pipe.tokenizer).read(PROMPT, 48).acts(["sks"])
    acts = torch.cat([said, torch.ones(24, dtype=torch.bool)]).float()[:, None]
    change = lora_layers_of_one(layer, "dog")
    hidden = inputs["hidden_states"][1:]
    made = hidden @ weights.T + acts * (hidden @ change.T)
    attention.to_qkv_mlp_proj.forward = lambda _: made
    set_adapters(pipe, ["dog"], [0.0])
    by_hand = attention(**inputs | {"hidden_states": hidden})
    del attention.to_qkv_mlp_proj.forward
    torch.testing.assert_close(whole[1:], by_hand, rtol=1e-4, atol=1e-5)
    set_adapters(pipe, ["dog"], [1.0])
    set_regions(pipe, {"dog": torch.cat([torch.ones(8, 4), torch.zeros(8, 8)], dim=1)})
    run()
    words, picture = seen[-1][1][1].split((48, 24))
    picture, own, base = (one.unflatten(0, (4, 6)) for one in (picture, whole[1][48:], bare[1][48:]))
    assert torch.equal(picture[:, :2], own[:, :2]) and torch.equal(picture[:, 2:], base[:, 2:])
    torch.testing.assert_close(words, whole[1][:48] / 3 + bare[1][:48] * 2 / 3, rtol=1e-4, atol=1e-5)


def lora_layers_of_one(layer, adapter) -> torch.Tensor:
    """The change of a stream's Linear, (9 * inner, C), that a tied adapter is: keys' rows, then values'."""
    inner, change = layer.heads * layer.width, 0.0
    for place, (down, core) in enumerate(
        ((layer.comcat_k_down, layer.comcat_q_core), (layer.comcat_v_down, layer.comcat_out_core)), start=1
    ):
        rows = torch.zeros(9 * inner, down[adapter].in_features)
        rows[place * inner : (place + 1) * inner] = core[adapter].weight.reshape(-1, 1) * down[adapter].weight  # rank 1
        change = change + rows
    return change


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(["klein", "flux1", "chroma"], "klein"))
def test_training_in_every_block_leaves_other_prompts_alone(folders, name, tmp_path):
    base = str(folders[name])
    file = customize(settings(base, tmp_path, kind="tied", target_modules=["attn"], learning_rate=0.02)).adapter
    pipe = bases.load_base(base)
    before = drawn(pipe, OTHER, PROMPT)
    load_adapter(pipe, file, "dog")
    assert [differs(*pair) for pair in zip(drawn(pipe, OTHER, PROMPT), before, strict=True)] == [False, True]


def test_bases_that_look_alike_are_refused_by_name(folders):
    pipe = bases.load_base(str(folders["klein"]))
    other = Flux2KleinInpaintPipeline(**pipe.components)
    with pytest.raises(ValueError, match="is a Flux2KleinInpaintPipeline, which starts from a picture"):
        refuse_pipeline(other, "klein")
    assert family_of_denoiser("Flux2Transformer2DModel", {"guidance_embeds": True}) is None  # FLUX.2 [dev]
    pipe.vae.register_to_config(latent_channels=8)
    with pytest.raises(ValueError, match="its transformer sees 16 channels, its VAE has 32"):
        refuse_pipeline(pipe, "klein")


def test_stable_diffusion_3_refuses_words_that_only_its_t5_is_told(folders):
    pipe = bases.load_base(str(folders["sd35"]))
    add_adapter(denoiser(pipe), ComcatConfig(r=1, foldable=True, trigger=["sks"]), "dog")
    listen(pipe)
    how = {"num_inference_steps": 1, "height": 16, "width": 16}
    assert pipe(PROMPT, prompt_3=PROMPT, **how).images
    with pytest.raises(ValueError, match="leave `prompt_3` out"):
        pipe("a dog", prompt_3=PROMPT, **how)


def test_half_precision_is_refused_where_a_family_overflows_in_it(folders, tmp_path):
    base = str(folders["sana"])
    config = {"prompt": [PROMPT], "num_images": 1, "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="--precision fp16: Sana 1.x overflows in it; use fp32 or bf16"):
        generate(GenerateConfig(pretrained_model_name_or_path=base, precision="fp16", **config))
    with pytest.raises(ValueError, match="--mixed_precision fp16"):
        customize(settings(base, tmp_path / "out", mixed_precision="fp16"))
    for name in BASES:
        half = "fp16" if name in ("pixart", "sd3", "sd35", "kolors") else "bf16"
        assert bases.asked_precision(None, "cuda", str(folders[name])) == half


def test_linear_attention_is_refused_by_name(folders):
    model = denoiser(bases.load_base(str(folders["sana"])))
    with pytest.raises(ValueError, match=r"attn1.*its attention is linear \(SanaLinearAttnProcessor2_0\)"):
        add_adapter(model, ComcatConfig(r=1, target_modules=["attn1"]), "dog")


@pytest.mark.parametrize("more", [{"resolution": 36}, {"resolution": 32, "aspect_ratio_buckets": True}])
def test_a_picture_larger_than_a_base_has_places_for_is_refused(folders, more, tmp_path):
    """Of a base with eight places of two latents of two pixels a side."""
    asked = settings(str(folders["sd3"]), tmp_path / "out", **more)
    with pytest.raises(ValueError, match=r"sides of up to \d+ pixels, and this base has places for 32"):
        customize(asked)
    assert any("places for 32" in error for error in validate(ValidateConfig(**vars(asked))).errors)


@pytest.mark.parametrize("name", mostly([name for name in BASES if name != "sd3"], "klein", "flux1"))
def test_what_is_heavy_reads_in_bfloat16_where_it_reads_for_training_alone(folders, name):
    part = {"sd35": "text_encoder_3", "flux1": "text_encoder_2"}.get(name, "text_encoder")
    for to_train, kind in ((True, torch.bfloat16), (False, torch.float32)):
        parts = bases.load_base(str(folders[name]), to_train=to_train).components
        kinds = {n: model.dtype for n, model in parts.items() if isinstance(model, torch.nn.Module)}
        assert kinds.pop(part) == kind and set(kinds.values()) == {torch.float32}
