"""Trigger and class, found in prompts as people write them."""

import pytest

from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.words import Subject, calls, filled, places, says_more, subject_of, without_trigger


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
        ("a photograph of sks dog", "sks", "dog"),
        ("a selfie of ohwx man", "ohwx", "man"),
        ("ein Foto von sks Hund", "sks", "hund"),
        ("une photo de mon chien sks", "sks", ""),
        ("la foto de zwx perro", "zwx", "perro"),
        ("a daguerreotype of sks dog", "sks", "dog"),
        ("a cartoon of xyz123 robot dancing", "xyz123", "robot dancing"),
        ("a photo of Bella", "bella", ""),
        ("sks corgi", "sks", "corgi"),
        ("a rusty zwx gramophone", "zwx", "gramophone"),
        ("a rusty ohwx gramophone", "ohwx", "gramophone"),
        ("a photo of sks-teddy", "sks", "teddy"),
        ("(sks:1.2) dog", "sks", "dog"),
        ("a,sks,dog", "sks", ""),
        ("sks's bowl", "sks", "bowl"),
        ("a photo of <my-cat>, red", "<my-cat>", ""),
    ],
)
def test_the_trigger_is_the_word_that_no_other_thing_is_called_by(prompt, trigger, class_word):
    assert subject_of(prompt) == Subject(trigger, class_word)


@pytest.mark.parametrize("prompt", ["photos of my cat", "a photo of our house", "cat", "a daguerreotype of my dog"])
def test_an_everyday_word_is_no_trigger_and_the_way_out_is_said(prompt):
    kind = prompt.split()[-1]
    with pytest.raises(
        ValueError, match=rf"is any {kind}'s.*'a photo of sks {kind}'.*--trigger sks --class_word {kind}"
    ):
        subject_of(prompt)


def test_where_several_words_could_be_the_trigger_none_is_guessed():
    with pytest.raises(ValueError, match="may call the subject 'tom' or 'jerry'.*--trigger"):
        subject_of("a photo of tom and jerry")
    assert subject_of("a photo of tom and jerry", "tom") == Subject("tom", "")


def test_trigger_and_class_that_are_named_need_no_prompt():
    (one,) = TrainConfig(instance_data_dir="dog", trigger="cat", class_word="pet").all_subjects()
    assert one.prompt == "a photo of cat pet"
    assert subject_of(one.prompt, one.trigger, one.class_word) == Subject("cat", "pet")
    assert subject_of("a photo of sks in a bucket", "sks", "dog") == Subject("sks", "dog")
    with pytest.raises(ValueError, match="--class_word is empty"):
        TrainConfig(instance_data_dir="dog", trigger="sks", class_word=" ")


@pytest.mark.parametrize("text", ["a,sks,b", "[sks]", "(sks:1.2)", "sks's", "sks-teddy", "SKS", "x_sks_y", "«sks»"])
def test_marks_beside_a_word_leave_it_one(text):
    assert places("sks", text) == [(text.lower().index("sks"), text.lower().index("sks") + 3)]


@pytest.mark.parametrize("text", ["masks", "tusks", "flasks", "sks1", "1sks", "sksé", "sksy", "sks\u0301"])
def test_a_word_inside_another_one_is_none(text):
    assert not places("sks", text)


def test_words_with_marks_or_spaces_of_their_own_are_found():
    assert places("<my-cat>", "a <my-cat>, b") == [(2, 10)]
    assert places("sks dog", "two sks  dogs; sks\n dog") == [(15, 23)]
    assert places("sks1", "sks10 sks1") == [(6, 10)]
    assert places("café", "cafe\u0301") == [(0, 4)]


@pytest.mark.parametrize(
    "prompt",
    [
        "sks dog",
        "a photo of sks dog",
        "A PHOTO OF (SKS dog:1.2).",
        "a watercolour of a big sks",
        "a dog",
        "",
        "sks dog, ",
    ],
)
def test_prompts_that_name_the_subject_say_no_more(prompt):
    assert not says_more(prompt, ["sks dog", "sks"])


@pytest.mark.parametrize(
    "prompt",
    ["sks dog in the snow", "snow, sks dog", "a photo of sks dog, 8k", "sks dog's bowl", "sks, not cats", "Snow: sks"],
)
def test_prompts_that_say_where_the_subject_is_say_more(prompt):
    assert says_more(prompt, ["sks dog", "sks"])


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
    assert without_trigger("a (sks:1.2) dog, sks-teddy, sks's bowl, masks", subject) == "a dog, teddy bowl, masks"
    assert TrainConfig(instance_data_dir="dog", instance_prompt="a photo of sks, on grass", trigger="sks")
