"""What PEFT documents of its methods, for each kind of adapter on each family of attentions.

The battery of what our own adapters promise is test_adapter_battery.py; here are PEFT's other words: which modules a
configuration chooses, what is asked of layers and models, saving and loading in all its ways, sums and swaps.
"""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.testing import assert_close

from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.model import adapted_layers, factors
from tests.adapter_cases import CLEAR, RANK, Case, distance
from tests.slow import slow

SAME = {"rtol": 0.0, "atol": 1e-10}

QUERIES = {"attn1": "to_q", "attn2": "to_q", "self_attn": "q_proj", "attention": "q_proj"}


@pytest.fixture
def case(any_case) -> Case:
    return any_case


@pytest.fixture
def one(tiny_unet, randomize) -> Case:
    """One case, where all are alike."""
    return Case(tiny_unet, "attn2", "free", randomize)


def attentions(model: nn.Module) -> list[str]:
    return [name.removeprefix("base_model.model.") for name in adapted_layers(model)]


# Which modules


def test_exclude_modules_leaves_attentions_out(case):
    everything = attentions(case.adapted("dog"))
    left_out = everything[-1]
    assert len(everything) > 1
    model = case.adapted("dog", exclude_modules=[left_out])
    assert attentions(model) == everything[:-1]
    assert attentions(case.adapted("dog", exclude_modules=rf"{left_out.rpartition('.')[0]}.*")) == everything[:-1]
    assert distance(case.run(model), case.run(case.adapted("dog"))) > CLEAR


def test_layers_are_counted_as_loras_are(case):
    query, pattern = QUERIES[case.target], "attentions" if case.target.startswith("attn") else "layers"
    for index in (0, [0], [0, 1]):
        choice = {"layers_to_transform": index, "layers_pattern": pattern}
        lora = LoraConfig(target_modules=[f"{case.target}.{query}"], **choice)
        loras = get_peft_model(case.tiny(), lora).base_model.targeted_module_names
        assert attentions(case.adapted("dog", **choice)) == [name.removesuffix(f".{query}") for name in loras]
        assert (len(loras) == len(attentions(case.adapted("dog")))) == (index == [0, 1])


def test_all_linear_is_answered_by_a_sentence(case):
    for word in ("all-linear", "ALL-Linear"):
        with pytest.raises(ValueError, match="COMCAT adapts whole attentions: leave target_modules out"):
            case.config(target_modules=word)


def test_targets_that_match_nothing_are_refused_as_peft_does(case):
    model = case.tiny()
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(model, case.config(target_modules=["nowhere"]))
    assert not adapted_layers(model) and not hasattr(model, "peft_config")


# What is asked of layers and models


def test_a_layer_says_what_it_reads_and_gives(case):
    for name, layer in adapted_layers(case.adapted("dog")).items():
        q, _, _, out = layer.style.projections(layer.owner)
        assert (layer.in_features, layer.out_features) == (q.in_features, out.out_features), name
        layer.merge()
        assert (layer.in_features, layer.out_features) == (q.in_features, out.out_features)


def test_the_status_of_layers_and_model(case):
    model = case.adapted("dog", "cat")
    model.set_adapter("cat")
    layers = model.get_layer_status()
    assert [status.name for status in layers] == [f"model.{name}.comcat" for name in attentions(model)]
    for status in layers:
        assert (status.module_type, status.enabled, status.merged_adapters) == ("ComcatLayer", True, [])
        assert status.active_adapters == ["cat"] and status.available_adapters == ["cat", "dog"]
        assert status.requires_grad == {"dog": False, "cat": True} and status.devices == {
            "dog": ["cpu"],
            "cat": ["cpu"],
        }
    model.merge_adapter()
    whole = model.get_model_status()
    assert (whole.adapter_model_type, whole.peft_types) == ("ComcatModel", {"dog": "COMCAT", "cat": "COMCAT"})
    assert (whole.num_adapter_layers, whole.enabled) == (len(layers), True)
    assert whole.active_adapters == whole.merged_adapters == ["cat"] and whole.available_adapters == ["cat", "dog"]
    unique = {id(factor): factor.numel() for factor in factors(model, "cat").values()}
    assert whole.trainable_params == sum(unique.values())


def test_gradients_follow_what_is_set(case):
    model = case.adapted("dog", "cat")

    def trained() -> set[str]:
        return {n for n in ("dog", "cat") if all(f.requires_grad for f in factors(model, n).values())}

    model.set_adapter("dog")
    assert trained() == {"dog"}
    model.set_requires_grad("cat")
    assert trained() == {"dog", "cat"}
    model.set_requires_grad(["dog", "cat"], requires_grad=False)
    assert trained() == set()
    model.set_adapter("cat", inference_mode=True)
    assert trained() == set() and model.active_adapters == ["cat"]


@torch.no_grad()
def test_an_irregular_state_comes_back_after_a_context(case):
    model = case.adapted("dog")
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        assert torch.equal(case.run(model), case.base())
    assert torch.equal(case.run(model), case.base())
    model.base_model.enable_adapter_layers()
    assert distance(case.run(model), case.base()) > CLEAR


# Merging


@torch.no_grad()
def test_a_second_merge_warns_as_loras_do_and_changes_nothing(case):
    model = case.adapted("dog", "cat")
    model.merge_adapter(["dog"])
    with pytest.warns(UserWarning, match="were merged dog. You are now additionally merging cat"):
        model.merge_adapter(["cat"])
    merged = case.run(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(case.run(model), merged)


@torch.no_grad()
def test_a_refused_merge_and_unload_takes_nothing_apart(case):
    model = case.adapted("dog", "cat")
    *_, last = factors(model, "cat").values()
    last.fill_(float("nan"))
    model.set_adapter("dog")
    model.merge_adapter()
    before, keys = case.run(model), list(model.state_dict())
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.merge_and_unload(adapter_names=["cat"], safe_merge=True)
    assert list(model.state_dict()) == keys and model.base_model.model is not None
    assert all(layer.merged_adapters == ["dog"] for layer in adapted_layers(model).values())
    assert torch.equal(case.run(model), before)


def test_a_merged_adapter_is_not_deleted(case):
    model = case.adapted("dog", "cat")
    model.merge_adapter(["dog"])
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['dog'\] while they are merged"):
        model.delete_adapter("dog")
    model.delete_adapter("cat")
    assert factors(model, "dog") and not factors(model, "cat")


@torch.no_grad()
def test_loras_in_the_same_model_unload_with_it(case):
    model = case.adapted("dog")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[QUERIES[case.target]]), model.base_model.model, "style")
    model.base_model.set_adapter(["dog"])
    back = model.unload()
    assert [name for name, _ in back.named_modules()] == [name for name, _ in case.tiny().named_modules()]
    assert torch.equal(case.run(back), case.base())


# Names, and deleting


@torch.no_grad()
@pytest.mark.parametrize("name", ["q", "cat", "comcat", "attn2", "0", "with space", "größe"])
def test_an_adapters_name_makes_no_difference(one, name, tmp_path):
    named, plain = one.adapted(name, dtype=torch.float32), one.adapted("dog", dtype=torch.float32)
    assert torch.equal(one.run(named), one.run(plain))
    named.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(one.tiny(), tmp_path / name, adapter_name="kitten").eval()
    assert torch.equal(one.run(loaded), one.run(plain))


@pytest.mark.parametrize("name", ["dog.v1", "", "keys", "train"])
def test_a_name_that_pytorch_does_not_take_is_refused_and_leaves_nothing(one, name):
    fresh = one.tiny()
    message = "'dog.v1' for instance 'dog_v1'" if "." in name else "choose another name"
    with pytest.raises(ValueError, match=message):
        get_peft_model(fresh, one.config(), adapter_name=name)
    assert not adapted_layers(fresh) and not hasattr(fresh, "peft_config")
    model = one.adapted("cat")
    output = one.run(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter(name, one.config())
    assert list(model.peft_config) == ["cat"] and torch.equal(one.run(model), output)
    model.add_adapter("dog", one.config())


def test_deleting_what_is_not_there_is_an_error(case):
    with pytest.raises(ValueError, match="kitten does not exist"):
        case.adapted("dog").delete_adapter("kitten")


@torch.no_grad()
def test_deleting_an_inactive_adapter_changes_nothing(case):
    model = case.adapted("dog", "cat")
    model.set_adapter("dog")
    output = case.run(model)
    model.delete_adapter("cat")
    assert torch.equal(case.run(model), output) and model.active_adapters == ["dog"]
    assert list(model.peft_config) == ["dog"] and not [k for k in model.state_dict() if ".cat." in k]
    assert all(layer._all_available_adapter_names() == ["dog"] for layer in adapted_layers(model).values())


# Saving and loading


@torch.no_grad()
@pytest.mark.parametrize(
    ("low", "trainable"),
    [
        pytest.param(False, False, id="plain-frozen"),
        pytest.param(True, True, id="low_cpu_mem_usage-trainable"),
        slow(False, True, id="plain-trainable"),
        slow(True, False, id="low_cpu_mem_usage-frozen"),
    ],
)
def test_what_is_loaded_is_what_was_saved(case, tmp_path, low, trainable):
    source = case.adapted("dog", "cat", dtype=torch.float32)
    both = case.run(source)
    source.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        case.tiny(), tmp_path / "dog", adapter_name="hund", low_cpu_mem_usage=low, is_trainable=trainable
    )
    result = loaded.load_adapter(tmp_path / "cat", "katze", low_cpu_mem_usage=low, is_trainable=trainable)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if ".katze." in key]
    assert all(factor.requires_grad == trainable for factor in factors(loaded, "hund").values())
    assert {factor.device.type for factor in factors(loaded, "katze").values()} == {"cpu"}
    loaded.base_model.set_adapter(["hund", "katze"])
    assert torch.equal(case.run(loaded.eval()), both)
    assert distance(both, case.base(torch.float32)) > CLEAR


@torch.no_grad()
def test_only_the_adapters_that_are_asked_for_are_saved(case, tmp_path):
    model = case.adapted("dog", "cat")
    model.save_pretrained(tmp_path, selected_adapters=["cat"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cat"]


@torch.no_grad()
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_factors_are_raised_to_float32_unless_told(case, base):
    def dtypes(**options) -> set[torch.dtype]:
        model = get_peft_model(case.tiny(base), case.config(), adapter_name="dog", **options)
        return {factor.dtype for factor in factors(model, "dog").values()}

    assert dtypes() == {torch.float32}
    assert dtypes(autocast_adapter_dtype=False) == {base}


# Sums and swaps


@torch.no_grad()
def test_the_weighted_sum_of_adapters_is_one_more(case):
    if case.kind == "cores":
        pytest.skip("refused, see tests/test_cores.py")
    model = case.adapted("dog", "cat")
    for layer in adapted_layers(model).values():
        layer.set_scale("dog", 0.7)
        layer.set_scale("cat", -0.3)
    both = case.run(model)
    for layer in adapted_layers(model).values():
        layer.set_scale("cat", 1.0)
    model.add_weighted_adapter(["dog", "cat"], [1.0, -0.3], "sum", combination_type="cat")
    model.add_weighted_adapter(["dog", "cat"], [1.0, -0.3], "cut", combination_type="svd", svd_rank=2 * RANK)
    model.add_weighted_adapter(["dog", "cat"], [1.0, -0.3], "rough")
    assert model.active_adapters == ["dog", "cat"]  # as PEFT: it does not act yet
    ranks = [model.peft_config[name].r for name in ("sum", "cut", "rough")]
    assert ranks == [2 * RANK, 2 * RANK, RANK]
    outputs = []
    for name in ("sum", "cut", "rough"):
        model.set_adapter(name, inference_mode=True)
        outputs.append(case.run(model))
        assert not any(factor.requires_grad for factor in factors(model, name).values())
    assert_close(outputs[0], both, **SAME)
    assert_close(outputs[1], both, **SAME)
    assert distance(outputs[2], both) > 1e-4 and distance(both, case.base()) > CLEAR
    model.add_weighted_adapter(["dog", "dog"], [1.5, -1.5], "nothing", combination_type="cat")
    model.set_adapter("nothing")
    assert_close(case.run(model), case.base(), **SAME)


@torch.no_grad()
def test_adapters_on_different_attentions_add_up(case):
    if case.kind == "cores":
        pytest.skip("refused, see tests/test_cores.py")
    model = case.adapted("dog")
    first, *_ = attentions(model)
    model.add_adapter("cat", case.config(r=2, alpha=1.0, target_modules=[first]))
    case.randomize(model, "cat", 5)
    model.base_model.set_adapter(["dog", "cat"])
    both = case.run(model)
    model.add_weighted_adapter(["cat", "dog"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert_close(case.run(model), both, **SAME)
    model.set_adapter("dog")
    assert distance(case.run(model), both) > CLEAR


@pytest.mark.parametrize(
    "adapters, options, message",
    [
        (["dog", "odd"], {}, "of different kinds and cannot be one adapter"),
        (["dog", "shy"], {}, "of different triggers and cannot be one adapter"),
        (["dog", "whole"], {}, "'whole' trains whole modules"),
        (["dog", "kitten"], {}, "no COMCAT adapter 'kitten' to add; loaded: dog, odd, shy, whole"),
        (["dog"], {"weights": [float("nan")]}, "must be a finite number"),
        (["dog"], {"weights": [1.0, 2.0]}, "give each adapter one"),
        ([], {}, "at least one adapter"),
        (["dog"], {"combination_type": "ties"}, "one of cat, svd, not 'ties'"),
        (["dog"], {"svd_rank": 0}, "svd_rank must be a whole number"),
        (["dog"], {"adapter_name": "odd"}, "exists already"),
        (["dog"], {"adapter_name": "a.b"}, "cannot have a dot"),
    ],
)
def test_what_has_no_sum_in_one_adapter_is_refused(one, adapters, options, message):
    model = one.adapted("dog")
    model.add_adapter("odd", one.config(foldable=True))
    model.add_adapter("shy", one.config(trigger=["sks"]))
    model.add_adapter("whole", one.config(modules_to_save=[one.whole]))
    asked = {"weights": [1.0] * len(adapters), "adapter_name": "sum"} | options
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, **asked)
    assert list(model.peft_config) == ["dog", "odd", "shy", "whole"] and not factors(model, "sum")


@torch.no_grad()
def test_an_adapter_is_swapped_for_another_in_place(case, tmp_path):
    for seed, name in enumerate(("dog", "cat")):
        source = case.adapted(name, dtype=torch.float32)
        case.randomize(source, name, seed=seed + 5).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(case.tiny(), tmp_path / "dog", adapter_name="default").eval()
    places, before = {id(factor) for factor in factors(model, "default").values()}, case.run(model)
    hotswap_adapter(model, tmp_path / "cat", adapter_name="default", torch_device="cpu")
    assert torch.equal(case.run(model), case.run(source)) and distance(before, case.run(source)) > CLEAR
    assert {id(factor) for factor in factors(model, "default").values()} == places  # compiled code stays valid


@pytest.mark.parametrize("change", [{"r": 2}, {"alpha": 1.0}, {"trigger": ["sks"]}], ids=["rank", "alpha", "trigger"])
def test_a_swap_that_weights_alone_do_not_make_is_refused(one, tmp_path, change):
    one.adapted("cat", **change).save_pretrained(tmp_path)
    model = one.adapted("dog")
    before = {name: factor.clone() for name, factor in factors(model, "dog").items()}
    with pytest.raises(ValueError, match=f"incompatible: for {next(iter(change))}"):
        hotswap_adapter(model, tmp_path / "cat", adapter_name="dog", torch_device="cpu")
    assert all(torch.equal(before[name], factor) for name, factor in factors(model, "dog").items())


def test_a_swap_of_ranks_by_module_is_refused(one, tmp_path):
    patterns = {"rank_pattern": {attentions(one.adapted("dog"))[0]: 2}}
    one.adapted("cat", **patterns).save_pretrained(tmp_path)
    model = one.adapted("dog", **patterns)
    before = {name: factor.clone() for name, factor in factors(model, "dog").items()}
    with pytest.raises(ValueError, match="ranks or alphas differ by module cannot be hot-swapped"):
        hotswap_adapter(model, tmp_path / "cat", adapter_name="dog", torch_device="cpu")
    assert all(torch.equal(before[name], factor) for name, factor in factors(model, "dog").items())


def test_no_warning_is_left_over(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = case.adapted("dog")
        model.merge_adapter()
        model.unmerge_adapter()
        model.unload()


def test_modules_to_save_are_names():
    assert ComcatConfig(modules_to_save=("b", "a")).modules_to_save == ["b", "a"]
    assert ComcatConfig(modules_to_save={"b", "a"}).modules_to_save == ["a", "b"]
    with pytest.raises(ValueError, match="must be a list of names of modules, not 'conv_out'"):
        ComcatConfig(modules_to_save="conv_out")
