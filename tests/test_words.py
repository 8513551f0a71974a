"""Trigger and class, found in prompts as people write them."""

import pytest

from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.words import Subject, calls, filled, subject_of, without_trigger


@pytest.mark.parametrize(
    ("prompt", "trigger", "class_word"),
    [
        ("a photo of sks dog", "sks", "dog"),
        ("A close-up photo of the ohwx teddy bear.", "ohwx", "teddy bear"),
        ("sks", "sks", ""),
        ("a photo of my zwx cat on the sofa", "zwx", "cat"),
        ("a photo of sks dog, red background", "sks", "dog"),
        ("a photo of sks, on grass", "sks", ""),
        ('a photo of "sks" teddy bear (left)', "sks", "teddy bear left"),
    ],
)
def test_the_first_telling_word_is_the_trigger(prompt, trigger, class_word):
    assert subject_of(prompt) == Subject(trigger, class_word)


def test_a_named_trigger_must_be_in_the_prompt():
    assert subject_of("a photo of a red sks dog", "sks") == Subject("sks", "dog")
    with pytest.raises(ValueError, match="does not contain the trigger 'ohwx'"):
        subject_of("a photo of sks dog", "ohwx")


def test_a_prompt_without_a_subject_is_refused():
    with pytest.raises(ValueError, match="names no subject"):
        subject_of("a photo of the")


def test_prompts_are_filled_and_checked_by_whole_words():
    subject = Subject("sks", "dog")
    assert filled("{subject} in a bucket", subject) == "sks dog in a bucket"
    assert calls("an SKS, in a bucket", subject) and not calls("a sksy dog", subject)
    assert without_trigger('a photo of "sks" dog, on grass', subject) == "a photo of dog, on grass"
    assert TrainConfig(instance_data_dir="dog", instance_prompt="a photo of sks, on grass", trigger="sks")
