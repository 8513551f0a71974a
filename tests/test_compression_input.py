"""What compression is given and cannot use is refused in one sentence with the way out; the model stays as it was."""

import pytest
import torch
from torch import nn
from transformers import Data2VecVisionConfig, Data2VecVisionModel

from comcat_diffusion.compression import SearchSettings, Settings, compress, search_ranks
from tests.compression_models import batches, built, out, pictures


@pytest.mark.parametrize("reduction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_reduction_must_be_a_fraction(reduction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        compress(built("vit"), reduction)


@pytest.mark.parametrize(
    "settings", [Settings(), Settings(parts=("attention",)), Settings(counted="parts", multiple=8)]
)
def test_a_reduction_that_cannot_be_reached_names_the_limit_and_the_limit_can_be(settings):
    model = built("vit")
    with pytest.raises(ValueError, match="cannot be reached") as refusal:
        compress(model, 0.99, settings=settings)
    limit = float(str(refusal.value).split("ask for at most ")[1].split(",")[0])
    assert 0.1 < limit < 0.99
    compress(model, limit, settings=settings)
    with pytest.raises(ValueError, match="cannot be reached"):
        compress(model, limit + 2e-4, settings=settings)


def test_either_a_reduction_or_a_plan():
    model = built("vit")
    plan = compress(model, 0.3)[1]
    for arguments in ({}, {"reduction": 0.3, "plan": plan}):
        with pytest.raises(ValueError, match="either a reduction or a plan"):
            compress(model, **arguments)


def test_a_model_with_nothing_to_compress():
    with pytest.raises(ValueError, match="nothing to compress in this Conv2d"):
        compress(nn.Conv2d(3, 4, 1), 0.3)
    with pytest.raises(ValueError, match="nothing to compress in this Sequential: it has no attention"):
        compress(nn.Sequential(nn.Linear(3, 4)), 0.3, settings=Settings(parts=("attention",)))


def test_a_compressed_model_is_not_compressed_again():
    low, _ = compress(built("vit"), 0.3)
    for refused in (lambda: compress(low, 0.3), lambda: search_ranks(low, batches(), 0.3)):
        with pytest.raises(ValueError, match="compressed already"):
            refused()


@pytest.mark.parametrize(
    "other", [{"kind": "deit"}, {"num_hidden_layers": 3}, {"hidden_size": 48}, {"kind": "vit-nobias"}]
)
def test_a_plan_for_another_model(other):
    plan = compress(built("vit"), 0.3)[1]
    with pytest.raises(ValueError, match="another layout"):
        compress(built(**other), plan=plan)


def test_a_plan_fits_another_model_of_its_layout():
    plan = compress(built("vit"), 0.3)[1]
    low, again = compress(built("vit", seed=5), plan=plan)
    assert again is plan and sum(p.numel() for p in low.parameters()) == plan.parameters_after


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_name_their_layer(value):
    model = built("vit")
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight[0, 0] = value
    for refused in (lambda: compress(model, 0.3), lambda: search_ranks(model, batches(), 0.3)):
        with pytest.raises(ValueError, match=r"vit\.layers\.1\.mlp\.fc2\.weight"):
            refused()


@pytest.mark.parametrize(
    "wrong, told",
    [
        ([], "no batches"),
        ([pictures()[0]], "no pictures"),
        ([(pictures() * 255).to(torch.uint8)], "uint8.*image processor"),
        ([{"labels": torch.ones(3)}], "'pixel_values'"),
        (["dog.png"], "Batch 1 is a str"),
        ([{"pixel_values": "dog.png"}], "no pictures but 'dog.png'"),
        ([pictures(), pictures() * torch.nan], "batch 2 holds NaN"),
    ],
)
def test_calibration_pictures_that_are_none(wrong, told):
    model = built("vit")
    before = out(model, pictures())
    with pytest.raises(ValueError, match=told):
        compress(model, 0.3, wrong)
    assert torch.equal(out(model, pictures()), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_calibration_never_calls_is_named():
    model = built("vit")
    model.vit.layers[0].spare = nn.Linear(24, 24).double()
    with pytest.raises(ValueError, match="spare.*saw nothing"):
        compress(model, 0.3, batches())


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_outside_the_classifier(label):
    wrong = batches(labels=True)
    wrong[1]["labels"][3] = label
    with pytest.raises(ValueError, match=f"label {label} is outside of the classifier.* 0 to 4"):
        search_ranks(built("vit"), wrong, 0.3, search=SearchSettings(steps=4))


def test_an_attention_that_is_another_function_is_refused():
    model = built("vit")
    host = type(model.vit.layers[0].attention)

    class Doubled(host):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            mixed, weights = super().forward(hidden_states, attention_mask, **kwargs)
            return 2 * mixed, weights

    Doubled.__module__ = host.__module__
    for layer in model.vit.layers:
        layer.attention.__class__ = Doubled
    with pytest.raises(ValueError, match="computes something else than attention"):
        compress(model, 0.3)

    class Rotary(host):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)

    for layer in model.vit.layers:
        layer.attention.__class__ = Rotary
    _, plan = compress(model, 0.3, settings=Settings(parts=("attention", "mlp")))
    assert "position_embeddings" in plan.skipped["vit.layers.0.attention"]
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.attention.*position_embeddings"):
        compress(model, 0.3, settings=Settings(parts=("attention",)))


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"method": "guess"}, "energy, search, uniform, matrix"),
        ({"counted": "all"}, "model, parts"),
        ({"multiple": 0}, "from 1 up"),
        ({"parts": ("head",)}, "attention, mlp, classifier"),
        ({"parts": ()}, "attention, mlp, classifier"),
    ],
)
def test_settings_that_make_no_sense(wrong, told):
    with pytest.raises(ValueError, match=told):
        Settings(**wrong)


def test_a_search_is_pointed_to_search_ranks():
    with pytest.raises(ValueError, match="search_ranks"):
        compress(built("vit"), 0.3, settings=Settings(method="search"))


def test_blocks_that_hand_on_more_than_one_tensor_are_refused_with_what_to_do():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Data2VecVisionModel(Data2VecVisionConfig(image_size=8, patch_size=4, **sizes)).eval()
    with pytest.raises(ValueError, match="Data2VecVisionModel do not hand on one tensor.* choose the method energy"):
        compress(model, 0.1, batches(1, dtype=torch.float32))
