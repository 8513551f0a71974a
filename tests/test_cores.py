"""Cores: what a file holds, how small it is, the same directions from every copy of a base, and what is refused.

That they do what the slow formula says, with all else that an adapter must, is in the batteries.
"""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, load_adapter, save_adapter
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.cores import QUANTIZED, Ends, basis_of
from comcat_diffusion.adapters.header import AdapterFileError, read_adapter
from comcat_diffusion.adapters.model import adapted_layers, factors
from comcat_diffusion.adapters.placing import add_adapter
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.store import expected_shapes
from comcat_diffusion.cli import main
from comcat_diffusion.commands import _told
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.training.config import TrainConfig
from tests import tiny_bases
from tests.copies import Copies
from tests.reference import directions, rows_of_head
from tests.slow import slow
from tests.test_adapter_file import edit, rewritten

CORES = {"foldable": True, "cores": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A tiny Stable Diffusion 1.x."""
    return str(tiny_bases.sd1(tmp_path_factory.mktemp("base")))


@pytest.fixture
def saved(base, tmp_path):
    """A pipeline with cores of rank 2, and their file."""
    pipe = bases.load_base(base)
    add_adapter(pipe.unet, ComcatConfig(r=2, alpha=3.0, **CORES), "dog")
    with torch.no_grad():
        for number, factor in enumerate(factors(pipe.unet, "dog").values()):
            factor.normal_(std=3.0, generator=torch.Generator().manual_seed(number))
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", base)
    return pipe, tmp_path / "dog.safetensors"


def test_on_kleins_real_sizes_they_take_38_kilobytes():
    """25 blocks, keys and values, 24 heads, 4 x 4 numbers of two bytes; 8 kB in its five blocks of two streams."""
    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=7680, guidance_embeds=False,
        )  # fmt: skip
    for targets, count in ((["attn"], 25 * 2 * 24 * 16), (None, 5 * 2 * 24 * 16)):
        shapes = expected_shapes(model, ComcatConfig(r=4, target_modules=targets, **CORES))
        assert sum(high * wide for high, wide in shapes.values()) == count and len(shapes) == 2
    assert 2 * 25 * 2 * 24 * 16 == 38_400


def test_a_file_holds_the_cores_alone_and_loads_to_the_very_numbers(saved, base):
    pipe, file = saved
    tensors = load_file(file)
    heads = sum(layer.heads for layer in adapted_layers(pipe.unet).values())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"unet.cores.{mix}": (2 * heads, 2) for mix in ("k_mix", "v_mix")
    }
    assert _told(read_adapter(file), "unet").startswith("cores, rank 2")
    fresh = bases.load_base(base)
    load_adapter(fresh, file, "dog")
    for name, factor in factors(fresh.unet, "dog").items():
        assert torch.equal(factor, factors(pipe.unet, "dog")[name])
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 7, fresh.unet.config.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(*(one.unet(sample, 5, states).sample for one in (pipe, fresh)))


def test_directions_are_those_of_the_slow_formula():
    weight = torch.randn(24, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rank in (1, 3, 8):
        for head, basis in enumerate(basis_of(weight, 3, rank)):
            assert_close(basis, directions(rows_of_head(weight, head, 3), rank), rtol=0, atol=1e-9)
            assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_base_has_the_same_directions_in_either_precision():
    weight = torch.randn(24, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(basis_of(weight, 3, 2), basis_of(weight.bfloat16(), 3, 2))


def test_every_machine_finds_the_same_directions():
    """Whatever the order in which it sums, and whichever signs and order its singular vectors have."""
    weight = 0.02 * torch.randn(256, 3072, generator=torch.Generator().manual_seed(1))  # heads of klein's
    order = torch.randperm(3072, generator=torch.Generator().manual_seed(2))
    made = basis_of(weight, 2, 4)
    assert_close(made, basis_of(weight[:, order], 2, 4), rtol=0, atol=1e-11)
    rows = weight.bfloat16().double().unflatten(0, (2, -1))
    left = torch.linalg.svd(rows, full_matrices=False)[0][..., :4]  # by another way
    for signs in ([1, 1, 1, 1], [-1, 1, -1, -1]):
        for turned in (left, left.flip(-1)):
            own = turned * torch.tensor(signs, dtype=torch.float64)
            places, waves = torch.arange(128, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
            u, _, vh = torch.linalg.svd(own.mT @ torch.cos(torch.pi * (places[:, None] + 0.5) * waves / 128))
            assert_close(made, own @ u @ vh, rtol=0, atol=1e-9)


@torch.no_grad()
def test_loading_looks_for_no_directions_and_the_first_use_does(saved, base, monkeypatch):
    pipe, file = saved
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 7, pipe.unet.config.cross_attention_dim)
    fresh, found, own = bases.load_base(base), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: found.append(1) or own(matrix))
    load_adapter(fresh, file, "dog")
    assert not found
    assert torch.equal(fresh.unet(sample, 5, states).sample, pipe.unet(sample, 5, states).sample)
    count = len(found)
    assert count >= 2 * len(adapted_layers(fresh.unet))  # the other model's, which was saved only, among them
    fresh.unet(sample, 5, states)
    assert len(found) == count


@functools.cache
def askew(width: int, channels: int, number: int = 8000, rank: int = 2) -> torch.Tensor:
    """Heads (D, C) one below the other, of a number of them those that turn round when half precision rounds first.

    Their directions are those nearest to the first set of fixed vectors.
    """
    some = 0.1 * torch.randn(number * width, channels, generator=torch.Generator().manual_seed(1))
    turned = basis_of(some, number, rank) - basis_of(some.half(), number, rank)
    return some.unflatten(0, (number, -1))[turned.flatten(1).norm(dim=1) > 1.9].flatten(0, 1)


@pytest.mark.parametrize(("width", "channels", "number"), [(4, 24, 8000), slow(40, 320, 2000)])
def test_heads_that_stand_askew_go_by_other_vectors_and_stay(width, channels, number):
    weight = askew(width, channels, number)
    heads = len(weight) // width
    ends = Ends(weight, heads, 2)
    assert heads > 1 and len(ends.sets) == heads and "0" not in ends.sets
    for dtype, within in ((torch.float16, 0.3), (torch.bfloat16, 1e-2)):  # twice rounded, and once, as they are
        rounded = Ends(weight.to(dtype), heads, 2, ends.sets)
        assert (rounded.basis.float() - ends.basis).flatten(1).norm(dim=1).max() < within
    for head, number in enumerate(map(int, ends.sets)):
        slow = directions(rows_of_head(weight, head, heads), 2, number)
        assert_close(basis_of(weight, heads, 2, ends.sets)[head], slow, rtol=0, atol=1e-9)


def test_heads_that_do_not_stay_as_they_were():
    """Few go by others than the first set, which all went by before there were more."""
    weight = torch.randn(200 * 16, 64, generator=torch.Generator().manual_seed(1))
    ends = Ends(weight, 200, 2)
    assert 0 < sum(number != "0" for number in ends.sets) < 30
    kept = [head for head, number in enumerate(ends.sets) if number == "0"]
    assert torch.equal(ends.basis[kept], Ends(weight, 200, 2, "0" * 200).basis[kept])


@pytest.fixture(scope="module")
def askew_base(base):
    """`askew_base(rounded)`: a pipeline with heads of that kind, and whether half precision has rounded its weights."""
    rows, copies = {width: askew(width, 24) for width in (4, 8)}, Copies(bases.load_base(base))

    def build(rounded: bool = False):
        pipe = copies()
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                width = len(module.to_k.weight) // module.heads
                for number, projection in enumerate((module.to_k, module.to_v)):
                    projection.weight.data[:width] = rows[width][number * width :][:width]
        if rounded:
            for parameter in pipe.unet.parameters():
                parameter.data = parameter.data.half().float()
        return pipe

    return build


def without_sets(tensors, metadata):
    """A file as it was written before there were sets."""
    edit(metadata, lambda header: header["config"]["unet"].pop("core_sets", None))


@pytest.mark.slow
@torch.no_grad()
def test_a_file_says_what_its_directions_go_by_so_that_a_rounded_base_draws_the_same(base, askew_base, tmp_path):
    pipe, rounded = askew_base(), askew_base(rounded=True)
    sample, states = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((1, 4, 8, 8), (1, 7, 24)))
    bare, effects = [one.unet(sample, 5, states).sample for one in (pipe, rounded)], {}
    for name, asked in (("new", None), ("old", {})):  # None: chosen
        made = askew_base()
        add_adapter(made.unet, ComcatConfig(r=2, core_sets=asked, **CORES), name)
        for number, factor in enumerate(factors(made.unet, name).values()):
            factor.normal_(std=3.0, generator=torch.Generator().manual_seed(number))
        save_adapter(made, tmp_path / f"{name}.safetensors", name, base)
        told = read_adapter(tmp_path / f"{name}.safetensors").config["unet"].get("core_sets", {})
        layers = adapted_layers(made.unet)
        assert (set(told) == set(layers)) == (name == "new") and (not told) == (name == "old")
        for attention, digits in told.items():
            assert digits == layers[attention].sets[name]
            assert digits[0] != "0" and digits[layers[attention].heads] != "0"
        load_adapter(rounded, tmp_path / f"{name}.safetensors", name)
        effect, there = (one.unet(sample, 5, states).sample - b for one, b in zip((made, rounded), bare, strict=True))
        effects[name] = ((effect - there).norm() / effect.norm()).item()
        rounded.unet.delete_adapters(name)
    assert effects["new"] < 0.02 and effects["old"] > 0.1


@torch.no_grad()
def test_a_file_of_before_goes_by_the_first_set_wherever_it_is_read(base, askew_base, tmp_path):
    """Here, beside a new adapter of the same rank, and as what PEFT has written."""
    pipe = askew_base()
    add_adapter(pipe.unet, ComcatConfig(r=2, **CORES), "new")
    save_adapter(pipe, tmp_path / "new.safetensors", "new", base)
    load_adapter(pipe, rewritten(tmp_path / "new.safetensors", tmp_path, without_sets), "old")
    save_adapter(pipe, tmp_path / "again.safetensors", "old", base)
    assert "core_sets" not in read_adapter(tmp_path / "again.safetensors").config["unet"]
    before = ComcatConfig(r=2, inference_mode=True, **CORES)  # as adapter_config.json has them
    add_adapter(pipe.unet, before, "peft")
    for layer in adapted_layers(pipe.unet).values():
        first = basis_of(layer.owner.to_k.weight, layer.heads, 2)
        for name in ("old", "peft"):
            assert_close(layer._ends_of(name)[0].basis, first.float(), rtol=0, atol=0)
        assert not torch.equal(layer._ends_of("new")[0].basis, first.float())
        assert layer._ends_of("old")[0] is layer._ends_of("peft")[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        slow(lambda sets: sets.update(nowhere="0011"), "says of nowhere what directions go by which no heads have"),
        slow(lambda sets: sets.update({min(sets): "01"}), "what directions go by which no heads have"),
        (lambda sets: sets.update({min(sets): "0a01"}), "core_sets must be digits"),
        slow(lambda sets: sets.update({min(sets): 12}), "does not make sense"),
    ],
)
def test_sets_that_no_heads_go_by_are_refused(base, askew_base, tmp_path, change, told):
    pipe = askew_base()
    add_adapter(pipe.unet, ComcatConfig(r=2, **CORES), "dog")
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", base)
    file = rewritten(
        tmp_path / "dog.safetensors",
        tmp_path,
        lambda _, metadata: edit(metadata, lambda header: change(header["config"]["unet"]["core_sets"])),
    )
    fresh = askew_base()
    with pytest.raises(AdapterFileError, match=told):
        load_adapter(fresh, file, "dog")
    assert not adapted_layers(fresh.unet)


@torch.no_grad()
def test_another_base_gets_its_own_sets_by_the_same_configuration(askew_base, base):
    config = ComcatConfig(r=2, **CORES)
    found = []
    for pipe in (askew_base(), bases.load_base(base)):
        add_adapter(pipe.unet, config, "dog")
        found.append(pipe.unet.peft_config["dog"].core_sets)
    assert config.core_sets is None and found[0] != found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
@torch.no_grad()
def test_they_are_found_after_a_change_of_precision_but_of_no_other_weights(saved, base, dtype):
    pipe, file = saved
    fresh = bases.load_base(base)
    load_adapter(fresh, file, "dog")
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 7, pipe.unet.config.cross_attention_dim)
    weights = [module.to_k.weight for module in adapted_attentions(fresh.unet)]
    for weight in weights:  # as a fused LoRA leaves them
        weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std()
    with pytest.raises(ValueError, match="The base's weights are others than when this adapter of cores was loaded"):
        fresh.unet(sample, 5, states)
    for weight, module in zip(weights, adapted_attentions(pipe.unet), strict=True):
        weight.data = module.to_k.weight.data.clone()
    half = fresh.unet.to(dtype)(sample.to(dtype), 5, states.to(dtype)).sample
    assert half.isfinite().all()
    for layer, other in zip(*(adapted_layers(one.unet).values() for one in (fresh, pipe)), strict=True):
        for mine, its in zip(layer._ends_of("dog"), other._ends_of("dog"), strict=True):
            ours, theirs = mine.basis.float(), its.basis.float()
            assert_close(ours @ ours.mT, theirs @ theirs.mT, rtol=0.05, atol=0.05)
            if dtype == torch.bfloat16:  # half precision rounds twice, see the module
                assert_close(ours, theirs, rtol=0.05, atol=0.05)


def adapted_attentions(unet) -> list:
    return [layer.owner for layer in adapted_layers(unet).values()]


def test_what_was_drawn_first_can_be_trained_on(saved, base):
    """Directions that were found while torch kept no gradients can be part of a step that does."""
    _, file = saved
    fresh = bases.load_base(base)
    load_adapter(fresh, file, "dog")
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 7, fresh.unet.config.cross_attention_dim)
    with torch.inference_mode():
        fresh.unet(sample, 5, states)
    own = factors(fresh.unet, "dog")
    for factor in own.values():
        factor.requires_grad_(True)
    fresh.unet.train()(sample, 5, states).sample.square().mean().backward()
    assert all(factor.grad.abs().max() > 0 for factor in own.values())


def test_equal_singular_values_do_not_turn_directions():
    """Of a head whose two leading ones are equal every basis of the same plane is right; one is taken."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (8, 20))
    values = torch.tensor([3.0, 3.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.01], dtype=torch.float64)
    found = []
    for seed in range(2):  # other noise of the size of rounding, by which singular vectors turn as they like
        noise = 1e-9 * torch.randn(8, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(basis_of(left @ torch.diag(values) @ right[:8] + noise, 1, 2)[0])
    assert_close(found[0], found[1], rtol=0, atol=2e-2)  # weights are rounded to bfloat16, by 2^-9
    assert_close(found[0] @ found[0].T, left[:, :2] @ left[:, :2].T, rtol=0, atol=2e-2)


@torch.no_grad()
def test_they_move_and_are_copied_with_their_model(saved):
    pipe, _ = saved
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 7, pipe.unet.config.cross_attention_dim)
    before = pipe.unet(sample, 5, states).sample
    other = copy.deepcopy(pipe.unet)
    assert all(not layer.ends._found for layer in adapted_layers(other).values())
    assert torch.equal(other(sample, 5, states).sample, before)
    half = other.to(torch.bfloat16)(sample.bfloat16(), 5, states.bfloat16()).sample
    assert_close(half.float(), before, rtol=0.1, atol=0.1)


def test_what_they_are_not_for_is_refused_in_a_sentence(saved, base, tmp_path, capsys):
    pipe, file = saved
    output = tmp_path / "other.safetensors"
    for refused in (lambda: shrink(file, output, 1000), lambda: combine([(file, 1.0), (file, 1.0)], output)):
        with pytest.raises(AdapterFileError, match="holds cores, which mean nothing without their base's weights"):
            refused()
    with pytest.raises(AdapterFileError, match="is cores: name its base"):
        export_adapter(file, output)
    shell = copy.deepcopy(pipe.unet).to("meta")
    with pytest.raises(AdapterFileError, match="holds cores of a unet: name its base, whose weights"):
        export_adapter(file, output, models={"unet": shell})
    assert main(["shrink", "--adapter", str(file), "--output", str(output), "--max_bytes", "1000"]) == 2
    assert "as small as they get" in capsys.readouterr().err and not output.exists()
    add_adapter(pipe.unet, ComcatConfig(r=2, **CORES), "cat")
    with pytest.raises(ValueError, match="'dog' is of cores, which have no weighted sum"):
        from comcat_diffusion.adapters.weighted import weighted_sum

        weighted_sum(pipe.unet, [("dog", 1.0), ("cat", 1.0)], "cat", None)
    with pytest.raises(ValueError, match="Cores of rank 900 do not fit into heads of width"):
        add_adapter(pipe.unet, ComcatConfig(r=900, **CORES), "big")
    with pytest.raises(ValueError, match="foldable and not tied, of one rank"):
        ComcatConfig(r=2, tied=True, **CORES)
    with pytest.raises(ValueError, match="--max_bytes is for other kinds: cores"):
        TrainConfig(kind="cores", max_bytes=1000)
    with pytest.raises(ValueError, match="are quantized"):
        basis_of(torch.ones(8, 8, dtype=torch.uint8), 2, 1)
    assert "choose another kind" in QUANTIZED


def test_of_another_base_a_file_is_refused(saved, tmp_path):
    _, file = saved
    other = bases.load_base(str(tiny_bases.sd2(tmp_path / "other")))
    with pytest.raises(AdapterFileError, match="does not fit"):
        load_adapter(other, file, "dog")
    header = read_adapter(file)
    assert replace(header, tokens=[]).config["unet"]["cores"] is True


class _Late(Ends):
    """Ends of which another thread finds all just before this one looks whether that is to be done."""

    entered = False

    @property
    def _base(self) -> tuple | None:
        if not self.entered:
            self.entered = True
            _ = self.weight
        return self.left

    @_base.setter
    def _base(self, left: tuple | None) -> None:
        self.left = left


def test_what_another_thread_has_found_meanwhile_is_taken():
    weight = torch.randn(4, 6)
    assert torch.equal(_Late(weight, 2, 1).weight, Ends(weight, 2, 1).weight)
