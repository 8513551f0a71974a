"""Several adapters as one file: the sum exactly, or cut to a rank; nothing that does not belong together."""

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.model import factors
from tests.slow import slow
from tests.test_adapter_file import pipeline

CLEAR = 0.01  # an effect on the output this large cannot be rounding
CLOSE = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(params=[pytest.param(False, id="free"), slow(True, id="foldable")])
def foldable(request):
    return request.param


@pytest.fixture
def written(tiny_unet, tiny_clip, randomize, tmp_path, foldable):
    """`written(name, rank, seed)` saves a random adapter in float64 and gives its file."""

    def build(name, rank, seed, text=False, kind=None, **options):
        pipe = pipeline(tiny_unet(), tiny_clip())
        options = {"alpha": 1.5 * rank, "foldable": foldable if kind is None else kind} | options
        pipe.unet.add_adapter(ComcatConfig(r=rank, **options), name)
        randomize(pipe.unet.double(), name, seed)
        if text:
            pipe.text_encoder.add_adapter(ComcatConfig(r=1, foldable=options["foldable"]), name)
            randomize(pipe.text_encoder.double(), name, seed + 50)
        file = tmp_path / f"{name}.safetensors"
        save_adapter(pipe, file, name, "somebody/base", Notes(name, f"a photo of {name}", "dog", {"resolution": 64}))
        return file

    return build


@pytest.fixture
def output_of(tiny_unet, tiny_clip):
    """What a base gives with adapter files at weights, in float64."""

    def run(*adapters):
        pipe = pipeline(tiny_unet(torch.float64), tiny_clip(torch.float64))
        for index, (file, weight) in enumerate(adapters):
            load_adapter(pipe, file, f"adapter_{index}")
            for part in (pipe.unet, pipe.text_encoder):
                for module in part.modules():
                    if hasattr(module, "comcat"):
                        module.comcat.set_scale(f"adapter_{index}", weight)
        with torch.no_grad():
            return torch.cat([tiny_unet.run(pipe.unet).flatten(), tiny_clip.run(pipe.text_encoder).flatten()])

    return run


def test_the_sum_is_exact_by_concatenated_ranks(written, output_of, tmp_path):
    one = written("one", 2, 1, rank_pattern={"mid_block.*": 3})
    two = written("two", 1, 2, text=True)
    made = combine([(one, 0.7), (two, -0.4)], tmp_path / "both.safetensors", dtype=torch.float64)
    live = output_of((one, 0.7), (two, -0.4))
    assert_close(output_of((tmp_path / "both.safetensors", 1.0)), live, **CLOSE)
    assert made.energy_kept == 1.0 and made.rank == 4
    for alone in (one, two):
        assert (output_of((alone, 1.0)) - live).abs().max() > CLEAR


def test_the_default_precision_is_exact_to_rounding(written, output_of, tmp_path):
    one, two = written("one", 2, 1), written("two", 1, 2)
    combine([(one, 0.7), (two, 1.0)], tmp_path / "both.safetensors")
    assert_close(output_of((tmp_path / "both.safetensors", 1.0)), output_of((one, 0.7), (two, 1.0)), rtol=0, atol=2e-5)
    assert (output_of((one, 0.7)) - output_of((one, 0.7), (two, 1.0))).abs().max() > CLEAR


def test_a_sufficient_rank_is_exact_and_a_smaller_one_says_what_it_kept(written, output_of, tmp_path):
    one, two = written("one", 2, 1), written("two", 1, 2)
    live = output_of((one, 0.7), (two, 1.0))
    target = tmp_path / "both.safetensors"
    errors, kept = [], []
    for rank in (1, 2, 3):
        made = combine([(one, 0.7), (two, 1.0)], target, rank, torch.float64)
        assert made.rank == rank and made.header.config["unet"]["r"] == rank
        errors.append((output_of((target, 1.0)) - live).abs().max().item())
        kept.append(made.energy_kept)
    assert 0 < kept[0] < kept[1] < 1 and kept[2] == pytest.approx(1, abs=1e-12)
    assert errors[0] > errors[1] > CLEAR and errors[2] < 1e-10


def test_the_cut_is_the_best_of_its_rank(written, tmp_path):
    """The kept energy is that of the largest singular values of the products, formed in full."""
    one = written("one", 3, 1, kind=False)
    made = combine([(one, 1.0)], tmp_path / "cut.safetensors", 1, torch.float64)
    whole = best = 0.0
    from safetensors.torch import load_file

    tensors = load_file(one)
    for name in {key.rpartition(".")[0] for key in tensors}:
        down, up = (tensors[f"{name}.{factor}"].unflatten(0, (2, 3)) for factor in ("q_down", "k_down"))
        value, out = tensors[f"{name}.v_down"].unflatten(0, (2, 3)), tensors[f"{name}.out_up"].T.unflatten(0, (2, 3))
        for product in (down.mT @ up, value.mT @ out):
            values = torch.linalg.svdvals(1.5 * product).square()
            whole, best = whole + values.sum().item(), best + values[:, 0].sum().item()
    assert made.energy_kept == pytest.approx(best / whole, rel=1e-10) and best / whole < 0.9


def test_the_file_says_what_went_into_it(written, tmp_path):
    one, two = written("one", 2, 1), written("two", 1, 2)
    combine([(one, 0.7), (two, 1.0)], tmp_path / "both.safetensors")
    header = read_adapter(tmp_path / "both.safetensors")
    assert (header.base_model, header.notes.trigger) == ("somebody/base", "one")
    assert header.notes.others == [{"trigger": "two", "class_word": "dog"}]  # whom a prompt may call too
    told = header.notes.training
    assert told["resolution"] == 64
    assert [(x["file"], x["weight"], x["trigger"]) for x in told["combined"]] == [
        ("one.safetensors", 0.7, "one"),
        ("two.safetensors", 1.0, "two"),
    ]


def test_what_does_not_belong_together_is_refused(written, tiny_unet, tmp_path, foldable, randomize):
    one, target = written("one", 2, 1), tmp_path / "both.safetensors"
    other_kind = written("two", 1, 2, kind=not foldable)
    with pytest.raises(ValueError, match="different kinds"):
        combine([(one, 1.0), (other_kind, 1.0)], target)
    pipe = pipeline(tiny_unet())
    for parameter in pipe.unet.parameters():
        parameter.data *= 1.3
    pipe.unet.add_adapter(ComcatConfig(r=1, foldable=foldable), "dog")
    save_adapter(pipe, tmp_path / "other.safetensors", "dog", "another/base")
    with pytest.raises(ValueError, match=r"somebody/base.*another/base.*different bases.*other weights"):
        combine([(one, 1.0), (tmp_path / "other.safetensors", 1.0)], target)
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number other than zero"):
            combine([(one, weight)], target)
    with pytest.raises(ValueError, match="rank must be"):
        combine([(one, 1.0)], target, rank=0)
    with pytest.raises(ValueError, match="at least one"):
        combine([], target)
    with pytest.raises(AdapterFileError, match="no adapter file"):
        combine([(tmp_path / "nobody.safetensors", 1.0)], target)
    assert not target.exists()


def test_a_file_whose_factors_do_not_fit_each_other_is_refused(written, tmp_path):
    import safetensors.torch

    from tests.test_adapter_file import rewritten

    one = written("one", 2, 1)
    name = sorted(safetensors.torch.load_file(one))[0]

    for change in (lambda t, m: t.pop(name), lambda t, m: t.update({name: torch.zeros(5, 7)})):
        with pytest.raises(AdapterFileError, match="do not fit its rank 2"):
            combine([(rewritten(one, tmp_path, change), 1.0)], tmp_path / "both.safetensors")
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        nan = rewritten(one, tmp_path, lambda t, m: t[name].fill_(float("nan")))
        combine([(nan, 1.0)], tmp_path / "both.safetensors")


def test_the_combined_adapter_goes_on_as_any_other(written, tmp_path, tiny_unet, tiny_clip):
    one, two = written("one", 2, 1), written("two", 1, 2)
    combine([(one, 0.7), (two, 1.0)], tmp_path / "both.safetensors")
    pipe = pipeline(tiny_unet(), tiny_clip())
    load_adapter(pipe, tmp_path / "both.safetensors", "both")
    assert len(factors(pipe.unet, "both")) == 16
    save_adapter(pipe, tmp_path / "again.safetensors", "both", "somebody/base")
    assert read_adapter(tmp_path / "again.safetensors").config["unet"]["r"] == 3
