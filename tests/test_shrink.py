"""A finished adapter under a byte budget: what is kept is the best of its bytes, and what is written loads as it is."""

import json
from itertools import product

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.adapters.packing import pack, ranks_of, read_rows, row_bytes, unpack, written_rows
from comcat_diffusion.adapters.shrink import LOST, _allocated, _Direction, _directions, _Layer, least_bytes, shrink
from comcat_diffusion.adapters.terms import read_contents
from tests.slow import slow
from tests.test_adapter_file import edit, pipeline, rewritten

_WORDS = 16  # bytes by which a header may differ between files of as many directions
CLEAR = 0.01  # an effect on the output this large cannot be rounding


@pytest.fixture(scope="module", params=[slow(False, id="free"), pytest.param(True, id="foldable")])
def file(request, tiny_unet, tiny_clip, randomize, tmp_path_factory):
    """A random adapter of U-Net and text encoder whose heads differ in strength; tests read it alone."""
    tmp_path = tmp_path_factory.mktemp("whole")
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


@pytest.fixture(scope="module")
def packed(file):
    """The same in 8,000 bytes."""
    small = file.with_name("small.safetensors")
    shrink(file, small, 8_000)
    return small


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
    for budget in (60_000, 9_000, 7_000, 5_500, 4_500):
        made = shrink(file, tmp_path / "small.safetensors", budget)
        size = (tmp_path / "small.safetensors").stat().st_size
        assert size == made.bytes <= budget
        kept.append(made.energy_kept)
        errors.append(((output_of(tmp_path / "small.safetensors") - whole).norm() / effect).item())
    assert kept == sorted(kept, reverse=True) and 0.999999 < kept[0] < 1 and kept[-1] < 0.95
    assert errors[0] < 2e-3  # rounding to float16
    assert errors[0] < errors[1] < errors[3] < errors[4] < 1.1


def test_the_budget_is_used(file, tmp_path):
    made = shrink(file, tmp_path / "small.safetensors", 7_000)
    assert 0.99 * 7_000 < made.bytes <= 7_000 and made.energy_kept < 1


@pytest.mark.slow
def test_four_attempts_use_the_budget(tiny_unet, randomize, tmp_path, monkeypatch):
    """A tied adapter has few directions of long rows: many budgets make one file, and some of them one too large."""
    monkeypatch.setattr("comcat_diffusion.adapters.shrink._ATTEMPTS", 4)
    pipe = pipeline(tiny_unet())
    pipe.unet.add_adapter(ComcatConfig(r=8, foldable=True, tied=True, target_modules=["attn2"]), "dog")
    randomize(pipe.unet, "dog", 1)
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "somebody/base", Notes("sks", "a photo of sks dog", "dog"))
    contents = read_contents(tmp_path / "dog.safetensors")
    directions = _directions([_Layer.of(term) for term in contents.terms])
    (step,) = {direction.bytes(4) - direction.bytes(3) for direction in directions}
    for budget in range(least_bytes(contents) + step, 3 * least_bytes(contents) // 2, 7):
        room = budget - shrink(tmp_path / "dog.safetensors", tmp_path / "small.safetensors", budget).bytes
        assert 0 <= room < step + _WORDS, budget


def test_without_pressure_the_products_are_the_same(file, output_of, tmp_path):
    made = shrink(file, tmp_path / "same.safetensors", 1 << 20)
    assert made.energy_kept == pytest.approx(1, abs=1e-6)
    assert_close(output_of(tmp_path / "same.safetensors"), output_of(file), rtol=0, atol=CLEAR / 5)
    assert (output_of(file) - output_of()).abs().max() > CLEAR
    for before, after in zip(
        read_contents(file).terms, read_contents(tmp_path / "same.safetensors").terms, strict=True
    ):
        for (left, right), (left_after, right_after) in zip(before.products(), after.products(), strict=True):
            assert (left_after @ right_after - left @ right).norm() < 1e-3 * (left @ right).norm()


def test_no_other_choice_of_bits_keeps_much_more():
    """Against all choices, of directions of two heads whose rows have different lengths."""
    directions = [_Direction(share, (40, 60)) for share in (0.6, 0.05)]
    directions += [_Direction(share, (40, 200)) for share in (0.3, 0.2)]
    costs = [{bits: direction.bytes(bits) for bits in LOST} for direction in directions]
    for budget in (60, 100, 160, 250, 400, 1000):
        chosen = _allocated(directions, budget)

        def energy(bits):
            return sum(d.share * (1 - LOST[count]) for d, count in zip(directions, bits, strict=True))

        def size(bits):
            return sum(cost[count] for cost, count in zip(costs, bits, strict=True))

        best = max(energy(bits) for bits in product(LOST, repeat=4) if size(bits) <= budget)
        assert size(chosen) <= budget and energy(chosen) > 0.93 * best
    assert chosen == [8, 8, 8, 8]


@pytest.mark.slow
def test_what_a_rounded_direction_loses_is_as_the_table_says():
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, 2000, 320, generator=generator)
    for bits, told in list(LOST.items())[1:]:
        rounded = []
        for rows in sides:
            stream, scales = written_rows(rows, [bits] * 2000)
            rounded.append(read_rows(stream, 320, torch.full((2000,), bits)) * scales.unsqueeze(1))
        inner = [(rows * coarse).sum(1) for rows, coarse in zip(sides, rounded, strict=True)]
        squares = [rows.square().sum(1) for rows in (*sides, *rounded)]
        lost = squares[0] * squares[1] - 2 * inner[0] * inner[1] + squares[2] * squares[3]
        assert (lost / (squares[0] * squares[1])).mean().item() == pytest.approx(told, rel=0.1)


def test_heads_and_whole_attentions_may_fall_to_rank_0(file, tmp_path):
    made = shrink(file, tmp_path / "small.safetensors", least_bytes(read_contents(file)) + 500)
    header = read_adapter(tmp_path / "small.safetensors")
    assert header.head_ranks == made.head_ranks and header.format_version == 2
    ranks = [tuple(map(tuple, products)) for part in made.head_ranks.values() for products in part.values()]
    assert any(0 in own and max(own) > 0 for products in ranks for own in products)
    assert any(qk != vo for qk, vo in ranks)
    assert len(ranks) < len(read_contents(file).terms)
    assert header.notes.trigger == "sks" and header.base_model == "somebody/base"
    bits = safetensors.torch.load_file(tmp_path / "small.safetensors")["row_bits"]
    assert len(bits) == 2 * sum(rank for products in ranks for own in products for rank in own)
    assert bits.min() >= 2 and bits.max() <= 8


def test_what_cutting_and_rounding_lose_is_told(file, tmp_path):
    """The share of the energy of the difference between the products of both files, formed head by head."""
    for budget in (1 << 20, 8_000, 3_400):
        made, shares = shrink(file, tmp_path / "small.safetensors", budget), []
        after = {term.key: term.products() for term in read_contents(tmp_path / "small.safetensors").terms}
        for term in read_contents(file).terms:
            for number, (left, right) in enumerate(term.products()):
                now = after[term.key][number] if term.key in after else (0 * left, 0 * right)
                whole = left @ right
                shares.append(1 - ((whole - now[0] @ now[1]).square().sum() / whole.square().sum()).item())
        assert made.energy_kept == pytest.approx(sum(shares) / len(shares), abs=1e-9)


def test_numbers_are_rounded_where_float16_is_too_large(file, tmp_path):
    whole = shrink(file, tmp_path / "whole.safetensors", 1 << 20)
    for budget, rounded in ((whole.bytes, False), (whole.bytes - 1, True)):
        shrink(file, tmp_path / "small.safetensors", budget)
        types = {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / "small.safetensors").values()}
        assert types == ({torch.uint8, torch.float32} if rounded else {torch.float16})


def test_a_shrunk_file_shrinks_and_combines_again(file, output_of, tmp_path):
    from comcat_diffusion.adapters.combine import combine

    first = shrink(file, tmp_path / "first.safetensors", 6_000)
    second = shrink(tmp_path / "first.safetensors", tmp_path / "second.safetensors", 6_000)
    assert second.bytes <= 6_000 and 0 < 1 - second.energy_kept < 1 - first.energy_kept
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
    bits = {"unet": {name: [[[16] * rank for rank in ranks] for ranks in own] for name in ranks["unet"]}}
    assert ranks_of(bits) == ranks
    packed, lengths = pack(dense, bits)
    assert {name: tuple(rows.shape) for name, rows in packed.items()} == {
        "unet.4": (14, 4),
        "unet.5": (3, 5),
        "unet.6": (8, 6),
        "unet.7": (3, 7),
    }
    assert lengths == {"unet": [[4, 6, 5, 4], [4, 6, 7, 4]]}  # k_down, out_up, q_down, v_down
    assert_close(unpack(packed, ranks, lengths, ()), {name: tensor.half() for name, tensor in dense.items()})
    errors = []
    for mixed in ([[[2, 8], [], [5]], [[], [7, 4, 3], [6]]], [[[3, 3], [], [3]], [[], [3, 3, 3], [3]]]):
        packed, lengths = pack(dense, {"unet": {"a.attn2": mixed, "b.attn2": mixed}})
        rows = [(length, count) for own in lengths["unet"] for length, product in zip(own, (0, 1, 0, 1), strict=True)
                for head in mixed[product] for count in head]  # fmt: skip
        assert packed["row_bits"].tolist() == [count for _, count in rows]
        assert sum(tensor.nbytes for tensor in packed.values()) == sum(row_bytes(*row) for row in rows)
        coarse = unpack(packed, ranks, lengths, ())
        assert {name: tensor.shape for name, tensor in coarse.items()} == {n: t.shape for n, t in dense.items()}
        errors.append((coarse["unet.b.attn2.q_down"] - dense["unet.b.attn2.q_down"]).norm(dim=1).tolist())
        for name, tensor in coarse.items():
            assert 0 < (tensor - dense[name]).norm() < dense[name].norm() / 2
    assert errors[0][0] > errors[1][0] and 10 * errors[0][1] < errors[1][1]  # 2 and 3 bits; 8 and 3


def first_rank(change):
    def changed(header):
        products = next(iter(header["head_ranks"]["unet"].values()))
        products[0][0] = change(products[0][0])

    return lambda tensors, metadata: edit(metadata, changed)


def first_lengths(change):
    """Change the lengths of the first attention's rows."""
    return lambda tensors, metadata: edit(metadata, lambda header: change(header["row_lengths"]["unet"][0]))


@pytest.mark.parametrize(
    "message, change",
    [
        ("does not have the [0-9]+ rows of |of no head", first_rank(lambda rank: rank + 1)),
        ("of a rank that nothing has|does not have the", first_rank(lambda rank: 10**12)),
        ("does not make sense", lambda tensors, metadata: edit(metadata, lambda h: h["row_lengths"]["unet"].pop())),
        ("is damaged or was edited|lacks", first_lengths(lambda lengths: lengths.__setitem__(0, 1))),
        ("does not make sense", first_lengths(lambda lengths: lengths.__setitem__(0, "8"))),
        ("does not make sense", first_lengths(lambda lengths: lengths.append(8))),
        ("does not make sense", first_rank(lambda rank: -1)),
        ("does not make sense", first_rank(lambda rank: "2")),
        ("does not make sense", lambda tensors, metadata: edit(metadata, lambda h: h.update(format_version=1))),
        ("does not make sense", lambda tensors, metadata: edit(metadata, lambda h: h.update(head_ranks=[1]))),
        ("no head that the header", lambda tensors, metadata: edit(metadata, lambda h: h["head_ranks"].pop("unet"))),
        ("holds no rows", lambda tensors, metadata: tensors.update(stray=torch.zeros(()))),
        ("of no head", lambda tensors, metadata: tensors.update(stray=torch.zeros(2))),
        ("lacks", lambda tensors, metadata: tensors.pop("unet.rows")),
        ("lacks", lambda tensors, metadata: tensors.pop("row_scales")),
        ("does not have the", lambda tensors, metadata: tensors["row_bits"].fill_(1)),
        ("does not have the", lambda tensors, metadata: tensors["row_bits"].fill_(9)),
        ("does not have the", lambda tensors, metadata: tensors.update({"unet.rows": tensors["unet.rows"][:-1]})),
    ],
)
def test_a_packed_file_that_lies_is_refused(packed, tiny_unet, tiny_clip, tmp_path, message, change):
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(pipeline(tiny_unet(), tiny_clip()), rewritten(packed, tmp_path, change))


def test_the_header_tells_the_ranks_in_plain_json(file, tmp_path):
    shrink(file, tmp_path / "small.safetensors", 30_000)
    with safetensors.safe_open(tmp_path / "small.safetensors", framework="numpy") as opened:
        written = json.loads(opened.metadata()["comcat"])
    told, config = written["head_ranks"]["unet"], read_adapter(tmp_path / "small.safetensors").config["unet"]
    assert "target_modules" not in written["config"]["unet"] and config["target_modules"] == sorted(told)
    assert all(len(products) == 2 and all(len(ranks) == 2 for ranks in products) for products in told.values())


@pytest.mark.slow
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
    files = [tmp_path / f"{share}.safetensors" for share in (25, 12, 8)]
    for file in files:
        shrink(adapter, file, adapter.stat().st_size * int(file.stem) // 100)
    pipe = bases.load_base("embedded")
    same, *changes = change(pipe, adapter, [adapter, *files], ["a photo of sks dog"])
    assert same < 1e-6 and 0.001 < changes[0] < changes[1] < changes[2] < 1.2 and not hasattr(pipe.unet, "peft_config")
    budget = ["--max_bytes", str(files[1].stat().st_size)]
    command = ["shrink", "--adapter", str(adapter), "--output", str(small), *budget]
    assert main(command) == 0 and "differs by" not in capsys.readouterr().out
    assert main([*command, "--pretrained_model_name_or_path", "embedded", "--overwrite"]) == 0
    assert f"differs by {changes[1]:.2%} of the adapter's effect" in capsys.readouterr().out
