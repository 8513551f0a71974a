"""Trigger and class, found in prompts as people write them."""

import pytest

from comcat_diffusion.words import Subject, calls, filled, subject_of


@pytest.mark.parametrize(
    ("prompt", "trigger", "class_word"),
    [
        ("a photo of sks dog", "sks", "dog"),
        ("A close-up photo of the ohwx teddy bear.", "ohwx", "teddy bear"),
        ("sks", "sks", ""),
        ("a photo of my zwx cat on the sofa", "zwx", "cat"),
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
