"""A finished adapter under a byte budget: what is kept is the best of its bytes, and what is written loads as it is."""

import json

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.adapters.packing import pack, row_bytes, unpack
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.terms import read_contents
from tests.test_adapter_file import edit, pipeline, rewritten

CLEAR = 0.01  # an effect on the output this large cannot be rounding


@pytest.fixture(params=[False, True], ids=["free", "foldable"])
def file(request, tiny_unet, tiny_clip, randomize, tmp_path):
    """A random adapter of U-Net and text encoder whose heads differ in strength."""
    pipe = pipeline(tiny_unet(), tiny_clip())
    attentions = ["attn1", "attn2"]
    pipe.unet.add_adapter(ComcatConfig(r=4, alpha=2.0, foldable=request.param, target_modules=attentions), "dog")
    pipe.text_encoder.add_adapter(ComcatConfig(r=1, foldable=request.param), "dog")
    randomize(pipe.unet, "dog", 1)
    randomize(pipe.text_encoder, "dog", 2, std=0.2)
    for index, (name, factor) in enumerate(factors(pipe.unet, "dog").items()):
        if not name.endswith("out_up"):
            factor.data *= torch.linspace(1.0, 0.1 + 0.05 * (index % 7), len(factor)).unsqueeze(1)
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "somebody/base", Notes("sks", "a photo of sks dog", "dog"))
    return tmp_path / "dog.safetensors"


@pytest.fixture
def output_of(tiny_unet, tiny_clip):
    """What a float64 base gives with an adapter file, or without."""

    def run(path=None):
        pipe = pipeline(tiny_unet(torch.float64), tiny_clip(torch.float64))
        if path is not None:
            load_adapter(pipe, path)
        with torch.no_grad():
            return torch.cat([tiny_unet.run(pipe.unet).flatten(), tiny_clip.run(pipe.text_encoder).flatten()])

    return run


def test_the_file_keeps_to_its_budget_and_loses_more_the_smaller_it_is(file, output_of, tmp_path):
    whole, base = output_of(file), output_of()
    effect = (whole - base).norm()
    kept, errors = [], []
    for budget in (60_000, 12_000, 9_000, 7_000, 5_000):
        made = shrink(file, tmp_path / "small.safetensors", budget, torch.float16)
        size = (tmp_path / "small.safetensors").stat().st_size
        assert size == made.bytes <= budget
        kept.append(made.energy_kept)
        errors.append(((output_of(tmp_path / "small.safetensors") - whole).norm() / effect).item())
    assert kept == sorted(kept, reverse=True) and 0.999999 < kept[0] < 1 and kept[-1] < 0.9
    assert errors[0] < 2e-3  # rounding to float16
    assert errors[0] < errors[2] < errors[4] < 1.1


def test_the_budget_is_used(file, tmp_path):
    made = shrink(file, tmp_path / "small.safetensors", 9_000, torch.float16)
    assert 0.97 * 9_000 < made.bytes <= 9_000 and made.energy_kept < 1


def test_without_pressure_the_products_are_the_same(file, output_of, tmp_path):
    made = shrink(file, tmp_path / "same.safetensors", 1 << 20, torch.float32)
    assert made.energy_kept == pytest.approx(1, abs=1e-12)
    assert_close(output_of(tmp_path / "same.safetensors"), output_of(file), rtol=0, atol=2e-5)
    assert (output_of(file) - output_of()).abs().max() > CLEAR
    for before, after in zip(
        read_contents(file).terms, read_contents(tmp_path / "same.safetensors").terms, strict=True
    ):
        for (left, right), (left_after, right_after) in zip(before.products(), after.products(), strict=True):
            assert_close(left_after @ right_after, left @ right, rtol=0, atol=1e-5)


def test_what_is_kept_is_the_best_per_byte(file, tmp_path):
    """A direction that was kept has more energy per byte than any dropped one that would fit in its place."""
    made = shrink(file, tmp_path / "small.safetensors", 9_000, torch.float16)
    kept, dropped = [], []
    for term in read_contents(file).terms:
        ranks = made.head_ranks.get(term.part, {}).get(term.attention, [[0] * term.heads] * 2)
        width = 8 if term.part == "text_encoder" or "mid_block" not in term.attention else 16
        for (left, right), own, counts in zip(term.products(), ranks, (1 / width, 1), strict=True):
            cost = left.shape[1] + right.shape[2]
            for product, rank in zip(left @ right, own, strict=True):
                density = (counts * torch.linalg.svdvals(product)[: term.rank].square() / cost).tolist()
                kept += [(value, cost) for value in density[:rank]]
                dropped += [(value, cost) for value in density[rank:]]
    cheapest = min(cost for _, cost in dropped)
    assert len(kept) > 30 and len(dropped) > 30
    assert max(value for value, cost in dropped if cost == cheapest) < min(value for value, _ in kept) * (1 + 1e-6)


def test_heads_and_whole_attentions_may_fall_to_rank_0(file, tmp_path):
    made = shrink(file, tmp_path / "small.safetensors", 3_600, torch.float16)
    header = read_adapter(tmp_path / "small.safetensors")
    assert header.head_ranks == made.head_ranks and header.format_version == 2
    ranks = [tuple(map(tuple, products)) for part in made.head_ranks.values() for products in part.values()]
    assert any(0 in own and max(own) > 0 for products in ranks for own in products)
    assert any(qk != vo for qk, vo in ranks)
    assert len(ranks) < len(read_contents(file).terms)
    assert header.notes.trigger == "sks" and header.base_model == "somebody/base"
    rows = {name: len(tensor) for name, tensor in safetensors.torch.load_file(tmp_path / "small.safetensors").items()}
    for part, attentions in made.head_ranks.items():  # a row on each side of a direction
        there = sum(count for name, count in rows.items() if name.startswith(f"{part}."))
        assert there == 2 * sum(rank for products in attentions.values() for own in products for rank in own)


STORED = {torch.float16: torch.float16, 8: torch.uint8, 6: torch.uint8, 5: torch.uint8, 4: torch.uint8}


def stored(path):
    """The precision of a file's factors."""
    bits = read_adapter(path).bits
    (dtype,) = {t.dtype for name, t in safetensors.torch.load_file(path).items() if name != "row_scales"}
    assert dtype == STORED[bits or dtype]
    return bits or dtype


def test_whole_numbers_hold_more_of_it_in_the_same_bytes(file, output_of, tmp_path):
    whole, effect = output_of(file), (output_of(file) - output_of()).norm()
    kept, errors = [], []
    for precision in STORED:
        made = shrink(file, tmp_path / "small.safetensors", 7_000, precision)
        assert (tmp_path / "small.safetensors").stat().st_size == made.bytes <= 7_000
        assert stored(tmp_path / "small.safetensors") == precision
        kept.append(made.energy_kept)
        shrink(file, tmp_path / "all.safetensors", 1 << 20, precision)
        errors.append(((output_of(tmp_path / "all.safetensors") - whole).norm() / effect).item())
    assert kept[0] < min(kept[1:])
    assert errors[0] < 2e-3 and 1e-4 < errors[1] < 0.05  # 11 and 8 bits
    for finer, coarser, steps in zip(errors[1:], errors[2:], (127 / 31, 31 / 15, 15 / 7), strict=False):
        assert coarser / finer == pytest.approx(steps, rel=0.5)
    assert errors[-1] < 0.3


def test_what_rounding_loses_is_told(file, tmp_path):
    """The energy of the difference between the products of both files, formed head by head."""
    made, before = shrink(file, tmp_path / "small.safetensors", 1 << 20, 4), read_contents(file).terms
    lost = whole = 0.0
    for old, new in zip(before, read_contents(tmp_path / "small.safetensors").terms, strict=True):
        for (left, right), (now, then), counts in zip(old.products(), new.products(), (1 / old.width, 1), strict=True):
            lost += counts * (left @ right - now @ then).square().sum()
            whole += counts * (left @ right).square().sum()
    assert 0.001 < lost / whole < 0.1 and made.energy_kept == pytest.approx(1 - float(lost / whole), abs=1e-9)


def test_the_precision_is_the_finest_in_which_all_ranks_fit(file, tmp_path):
    sizes = [shrink(file, tmp_path / "whole.safetensors", 1 << 20, precision).bytes for precision in STORED]
    assert sizes == sorted(sizes, reverse=True)
    for size, precision, next_one in zip(sizes, STORED, [*list(STORED)[1:], 4], strict=True):
        for budget, expected in ((size, precision), (size - 1, next_one)):
            assert shrink(file, tmp_path / "small.safetensors", budget).bytes <= budget
            assert stored(tmp_path / "small.safetensors") == expected


def test_a_shrunk_file_shrinks_and_combines_again(file, output_of, tmp_path):
    from comcat_diffusion.adapters.combine import combine

    first = shrink(file, tmp_path / "first.safetensors", 12_000, torch.float32)
    second = shrink(tmp_path / "first.safetensors", tmp_path / "second.safetensors", 12_000, torch.float32)
    assert second.head_ranks == first.head_ranks
    combine([(tmp_path / "first.safetensors", 1.0)], tmp_path / "dense.safetensors")
    assert read_adapter(tmp_path / "dense.safetensors").format_version == 1
    shrunk = output_of(tmp_path / "first.safetensors")
    assert_close(output_of(tmp_path / "dense.safetensors"), shrunk, rtol=0, atol=1e-5)
    assert (shrunk - output_of()).abs().max() > CLEAR


def test_a_budget_below_the_least_is_refused_and_names_it(file, tmp_path):
    target = tmp_path / "small.safetensors"
    with pytest.raises(ValueError, match="100 bytes are too few: the least.* is [0-9,]+ bytes") as caught:
        shrink(file, target, 100)
    assert not target.exists()
    least = int(str(caught.value).rpartition(" is ")[2].split()[0].replace(",", ""))
    assert shrink(file, target, least).bytes <= least
    with pytest.raises(ValueError, match="too few"):
        shrink(file, target, least - 1)


def test_an_adapter_that_does_nothing_is_refused(tiny_unet, tmp_path):
    pipe = pipeline(tiny_unet())
    pipe.unet.add_adapter(ComcatConfig(), "dog")
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog")
    with pytest.raises(ValueError, match="adds nothing"):
        shrink(tmp_path / "dog.safetensors", tmp_path / "small.safetensors", 10_000)


def test_packing_and_unpacking_undo_each_other():
    generator = torch.Generator().manual_seed(0)
    own = [[2, 0, 1], [0, 3, 1]]
    ranks = {"unet": {"b.attn2": own, "a.attn2": own}}
    shapes = {"k_down": (9, 4), "v_down": (9, 4), "out_up": (6, 9)}  # three heads of rank 3
    shapes = {f"unet.{a}.attn2.{name}": shape for a in "ab" for name, shape in shapes.items()}
    shapes |= {"unet.a.attn2.q_down": (9, 5), "unet.b.attn2.q_down": (9, 7)}
    dense = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in dense.items():
        rows = tensor.T if name.endswith("out_up") else tensor
        for head, rank in enumerate(own[name.endswith(("v_down", "out_up"))]):
            rows[3 * head + rank : 3 * head + 3] = 0
    packed, lengths = pack(dense, ranks, torch.float32)
    assert {name: tuple(rows.shape) for name, rows in packed.items()} == {
        "unet.4": (14, 4),
        "unet.5": (3, 5),
        "unet.6": (8, 6),
        "unet.7": (3, 7),
    }
    assert lengths == {"unet": [[4, 6, 5, 4], [4, 6, 7, 4]]}  # k_down, out_up, q_down, v_down
    assert_close(unpack(packed, ranks, lengths, 0, ()), dense, rtol=0, atol=0)
    for bits in (8, 6, 5, 4, 2):
        (packed, lengths), rows = pack(dense, ranks, bits), {4: 14, 5: 3, 6: 8, 7: 3}
        size = sum(count * row_bytes(length, bits) for length, count in rows.items())
        assert sum(tensor.nbytes for tensor in packed.values()) == size
        for name, coarse in unpack(packed, ranks, lengths, bits, ()).items():
            assert coarse.shape == dense[name].shape
            assert 0 < (coarse - dense[name]).norm() < dense[name].norm() / (2 ** (bits - 1) - 1)


def first_rank(change):
    def changed(header):
        products = next(iter(header["head_ranks"]["unet"].values()))
        products[0][0] = change(products[0][0])

    return lambda tensors, metadata: edit(metadata, changed)


@pytest.mark.parametrize(
    "message, change",
    [
        ("does not have the [0-9]+ rows of |of no head", first_rank(lambda rank: rank + 1)),
        ("of a rank that nothing has|does not have the", first_rank(lambda rank: 10**12)),
        ("does not make sense", lambda tensors, metadata: edit(metadata, lambda h: h["row_lengths"]["unet"].pop())),
        ("lacks", lambda tensors, metadata: edit(metadata, lambda h: h["row_lengths"]["unet"][0].__setitem__(0, 1))),
        ("does not make sense", first_rank(lambda rank: -1)),
        ("does not make sense", first_rank(lambda rank: "2")),
        ("does not make sense", lambda tensors, metadata: edit(metadata, lambda h: h.update(format_version=1))),
        ("does not make sense", lambda tensors, metadata: edit(metadata, lambda h: h.update(head_ranks=[1]))),
        ("no head that the header", lambda tensors, metadata: edit(metadata, lambda h: h["head_ranks"].pop("unet"))),
        ("holds no rows", lambda tensors, metadata: tensors.update(stray=torch.zeros(2))),
        ("lacks", lambda tensors, metadata: tensors.pop(sorted(tensors)[0])),
    ],
)
def test_a_packed_file_that_lies_is_refused(file, tiny_unet, tiny_clip, tmp_path, message, change):
    shrink(file, tmp_path / "small.safetensors", 30_000)
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(pipeline(tiny_unet(), tiny_clip()), rewritten(tmp_path / "small.safetensors", tmp_path, change))


def test_the_header_tells_the_ranks_in_plain_json(file, tmp_path):
    shrink(file, tmp_path / "small.safetensors", 30_000)
    with safetensors.safe_open(tmp_path / "small.safetensors", framework="numpy") as opened:
        written = json.loads(opened.metadata()["comcat"])
    told, config = written["head_ranks"]["unet"], read_adapter(tmp_path / "small.safetensors").config["unet"]
    assert "target_modules" not in written["config"]["unet"] and config["target_modules"] == sorted(told)
    assert all(len(products) == 2 and all(len(ranks) == 2 for ranks in products) for products in told.values())


def test_the_change_of_the_output_is_measured_where_a_base_is_given(randomize, tmp_path, capsys):
    from comcat_diffusion import bases
    from comcat_diffusion.adapters.effect import change
    from comcat_diffusion.cli import main

    pipe, adapter, small = bases.load_base("embedded"), tmp_path / "dog.safetensors", tmp_path / "small.safetensors"
    pipe.unet.add_adapter(ComcatConfig(r=2), "dog")
    randomize(pipe.unet, "dog", 1, std=0.1)
    save_adapter(pipe, adapter, "dog", "embedded", Notes("sks", "a photo of sks dog", "dog"))
    with pytest.raises(ValueError, match="carries adapters already"):
        change(pipe, adapter, [adapter], ["a dog"])
    files = [tmp_path / f"{share}.safetensors" for share in (60, 20, 15)]
    for file in files:
        shrink(adapter, file, adapter.stat().st_size * int(file.stem) // 100, 8)
    pipe = bases.load_base("embedded")
    same, *changes = change(pipe, adapter, [adapter, *files], ["a photo of sks dog"])
    assert same < 1e-6 and 0.001 < changes[0] < changes[1] < changes[2] < 1.2 and not hasattr(pipe.unet, "peft_config")
    budget = ["--max_bytes", str(files[1].stat().st_size), "--save_precision", "int8"]
    command = ["shrink", "--adapter", str(adapter), "--output", str(small), *budget]
    assert main(command) == 0 and "differs by" not in capsys.readouterr().out
    assert main([*command, "--pretrained_model_name_or_path", "embedded"]) == 0
    assert f"differs by {changes[1]:.2%} of the adapter's effect" in capsys.readouterr().out
