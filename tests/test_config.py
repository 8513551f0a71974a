"""One dataclass makes flags, TOML and checks; every message names its flag."""

import argparse
from dataclasses import fields

import pytest

from comcat_diffusion.config import add_arguments, from_arguments, read_toml, to_toml
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.training.config import TrainConfig


def parsed(kind, *flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind)
    return from_arguments(kind, parser.parse_args(flags))


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "run.toml").write_text("rank = 8\nseed = 3\nlearning_rate = 1\nreport_to = ['tensorboard']\n")
    config = parsed(TrainConfig, "--config", str(tmp_path / "run.toml"), "--seed", "5", "--no-center_crop")
    assert (config.rank, config.seed, config.learning_rate, config.center_crop) == (8, 5, 1.0, False)
    assert config.report_to == ["tensorboard"] and config.max_train_steps == TrainConfig().max_train_steps


def test_a_setting_is_known_by_the_name_that_it_had(tmp_path):
    (tmp_path / "run.toml").write_text("way_up = true\n")
    for flags in (["--way_up"], ["--up_blocks_only"], ["--config", str(tmp_path / "run.toml")]):
        config = parsed(TrainConfig, *flags)
        assert config.up_blocks_only and "way_up" not in to_toml(config)


@pytest.mark.parametrize("kind", [TrainConfig, GenerateConfig])
def test_what_is_written_is_read_back(tmp_path, kind):
    config = (
        TrainConfig(rank=3, snr_gamma=5.0, random_flip=True)
        if kind is TrainConfig
        else GenerateConfig(prompt=["a", "b"], adapter=["x"])
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert kind(**read_toml(kind, tmp_path / "run.toml")) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rnak = 2", "unknown settings: rnak"),
        ("rank = 'two'", "rank must be int, not 'two'"),
        ("rank = true", "rank must be int"),
        ("report_to = 'tensorboard'", "report_to must be a list of str"),
        ("rank = ", "is not TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path, content, message):
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_toml(TrainConfig, tmp_path / "run.toml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_toml(TrainConfig, tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "--rank must be at least 1"),
        ({"max_train_steps": 0}, "--max_train_steps must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps"),
        ({"train_batch_size": 0}, "--train_batch_size"),
        ({"resolution": -64}, "--resolution"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm"),
        ({"lr_warmup_steps": 400}, "--lr_warmup_steps 400 must be shorter than --max_train_steps 400"),
        ({"snr_gamma": 0.0}, "--snr_gamma"),
        ({"alpha": float("inf")}, "--alpha"),
        ({"instance_data_dir": "dog"}, "--instance_prompt is missing"),
        ({"pretrained_model_name_or_path": "a/b"}, "--instance_data_dir is missing"),
        ({"instance_prompt": "a photo of sks dog", "trigger": "ohwx"}, "does not contain the trigger 'ohwx'"),
    ],
)
def test_training_settings_that_cannot_work_are_refused_by_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "--prompt is missing"),
        ({"prompt": [" "]}, "--prompt is empty"),
        ({"num_images": 0}, "--num_images"),
        ({"num_inference_steps": 0}, "--num_inference_steps"),
        ({"batch_size": 0}, "--batch_size"),
        ({"scale": float("nan")}, "--scale must be a finite number"),
        ({"guidance_scale": float("inf")}, "--guidance_scale"),
        ({"adapter": []}, "--adapter is missing"),
        ({"adapter": [], "pretrained_model_name_or_path": "x", "merge": True}, "--merge needs an --adapter"),
    ],
)
def test_generation_settings_that_cannot_work_are_refused_by_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**{"prompt": ["a cat"], "adapter": ["x.safetensors"], **settings})


@pytest.mark.parametrize("kind", [TrainConfig, GenerateConfig])
def test_every_setting_has_a_sentence_of_help(kind):
    assert all(item.metadata["help"].endswith((".", "'", ")")) for item in fields(kind))
