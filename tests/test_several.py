"""Several subjects in one file, each with ranks and words of its own."""

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.effect import predictions
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.bases import load_base
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.order import with_initial
from comcat_diffusion.words import Subject
from tests.slow import mostly

PROMPTS = ["a photo of sks teddy", "a photo of ohwx cat", "a photo of sks teddy and ohwx cat", "a photo of a ball"]
KINDS = {"tied": {"foldable": True, "tied": True}, "foldable": {"foldable": True}, "free": {}}


@pytest.fixture(scope="module")
def base():
    return load_base("embedded")


@pytest.fixture(scope="module", params=mostly(KINDS, "tied"))
def files(request, tmp_path_factory, randomize, base):
    """Two adapters of one kind that wait for words of their own, the second one shrunk to ranks that differ."""
    folder, found = tmp_path_factory.mktemp(request.param), []
    for number, (word, rank) in enumerate((("sks", 2), ("ohwx", 3))):
        target = ["attn1", "attn2"] if request.param == "free" else ["attn2"]
        config = ComcatConfig(r=rank, alpha=3.0, trigger=[word], target_modules=target, **KINDS[request.param])
        base.unet.add_adapter(config, "dog")
        randomize(base.unet, "dog", number, std=0.2)
        found.append(folder / f"{word}.safetensors")
        save_adapter(base, found[-1], "dog", "embedded", Notes(word, f"a photo of {word} teddy", "teddy"))
        unload_adapters(base)
    shrink(found[1], folder / "small.safetensors", int(0.5 * found[1].stat().st_size))
    return found[0], folder / "small.safetensors"


def test_one_file_does_what_two_side_by_side_do_each_from_its_own_word_on(files, base, tmp_path):
    both = tmp_path / "both.safetensors"
    combine([(files[0], 0.8), (files[1], 1.0)], both, dtype=torch.float32)
    header = read_adapter(both)
    (config,) = header.config.values()
    assert config["trigger"] == ["sks", "ohwx"]
    assert [words for words, _ in config["trigger_ranks"]] == [["sks"], ["ohwx"]]
    assert header.notes.trigger == "sks" and header.notes.others == [{"trigger": "ohwx", "class_word": "teddy"}]
    noisy, plain = predictions(base, PROMPTS, steps=2)
    for number, file in enumerate(files):
        load_adapter(base, file, f"one{number}")
    base.unet.set_adapters(["one0", "one1"], [0.8, 1.0])
    expected = predictions(base, PROMPTS, noisy, steps=2)[1]
    unload_adapters(base)
    load_adapter(base, both, "both")
    found = predictions(base, PROMPTS, noisy, steps=2)[1]
    unload_adapters(base)
    assert_close(found, expected, rtol=0, atol=2e-4)
    assert (expected - plain).abs().max() > 0.1


def test_ranks_of_three_files_stay_apart_and_save_as_they_were(files, base, tmp_path, randomize):
    both, three = tmp_path / "both.safetensors", tmp_path / "three.safetensors"
    combine([(files[0], 1.0), (files[1], 1.0)], both)
    combine([(both, 1.0), (files[0], 0.5)], three)
    (config,) = read_adapter(three).config.values()
    assert [words for words, _ in config["trigger_ranks"]] == [["sks"], ["ohwx"], ["sks"]]
    load_adapter(base, three, "three")
    save_adapter(base, tmp_path / "again.safetensors", "three", "embedded")
    unload_adapters(base)
    assert read_adapter(tmp_path / "again.safetensors").config["unet"]["trigger_ranks"] == config["trigger_ranks"]


def test_what_would_mix_them_is_refused(files, base, tmp_path):
    both = tmp_path / "both.safetensors"
    with pytest.raises(ValueError, match="leave --rank out"):
        combine([(files[0], 1.0), (files[1], 1.0)], both, rank=2)
    combine([(files[0], 1.0), (files[1], 1.0)], both)
    with pytest.raises(AdapterFileError, match="holds several subjects.*shrinking would mix them"):
        shrink(both, tmp_path / "small.safetensors", 9000)
    with pytest.raises(ValueError, match="holds several subjects: learn on one"):
        with_initial(TrainConfig(init_adapter=str(both)), [Subject("sks", "teddy")])
    load_adapter(base, both, "both")
    with pytest.raises(ValueError, match="no weighted sum"):
        from comcat_diffusion.adapters.weighted import weighted_sum

        weighted_sum(base.unet, [("both", 1.0)], "cat", None)
    unload_adapters(base)


@pytest.mark.parametrize(
    "wrong", [[[["sks"], 2]], [[["sks"], 2], [["cat"], 2]], [["sks", 4]], [[["sks"], 0], [["ohwx"], 4]], [4], "sks"]
)
def test_shares_that_make_no_sense_are_refused(wrong):
    right = [[["sks"], 1], [["ohwx"], 3]]
    assert ComcatConfig(r=4, trigger=["sks", "ohwx"], trigger_ranks=right).trigger_ranks == right
    with pytest.raises(ValueError, match="must share 4 ranks out among the words"):
        ComcatConfig(r=4, trigger=["sks", "ohwx"], trigger_ranks=wrong)
    with pytest.raises(ValueError, match="exclude each other"):
        ComcatConfig(r=4, trigger=["sks", "ohwx"], trigger_ranks=right, rank_pattern={"attn1": 2})
