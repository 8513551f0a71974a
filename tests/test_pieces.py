"""Several packed adapters in one file: about the bytes of all of them, and what each does from its own word on."""

import functools
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.store import read_tensors
from comcat_diffusion.adapters.terms import read_contents
from comcat_diffusion.export.card import Shared, card
from comcat_diffusion.export.lora import export_adapter
from tests.slow import mostly
from tests.test_adapter_file import edit, pipeline, rewritten

GOLDEN = Path(__file__).parent / "golden" / "adapter-v3.safetensors"
KINDS = {"free": {}, "foldable": {"foldable": True}, "tied": {"foldable": True, "tied": True}}


@pytest.fixture(scope="module", params=mostly(KINDS, "free", "tied"))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def written(tiny_unet, randomize, tmp_path_factory, kind):
    """`written(word, rank, bytes, target)`: a random adapter that waits for a word (of none: everywhere), shrunk.

    Its first heads are the strong ones, so that ranks differ. Tests read the files alone.
    """

    @functools.cache
    def build(word, rank, max_bytes=None, target=None):
        pipe = pipeline(tiny_unet())
        options = KINDS[kind] | ({"target_modules": [target]} if target else {})
        config = ComcatConfig(r=rank, alpha=1.5 * rank, trigger=[word] if word else None, **options)
        pipe.unet.add_adapter(config, "dog")
        randomize(pipe.unet, "dog", rank)
        for index, (name, factor) in enumerate(factors(pipe.unet, "dog").items()):
            if not name.endswith("out_up"):
                factor.data *= torch.linspace(1.0, 0.1 + 0.05 * (index % 7), len(factor)).unsqueeze(1)
        file = tmp_path_factory.mktemp("piece") / f"{word}{rank}.safetensors"
        save_adapter(pipe, file, "dog", "somebody/base", Notes(word, f"a photo of {word} dog", "dog"))
        if max_bytes:
            shrink(file, file.with_suffix(".small"), max_bytes)
        return file.with_suffix(".small") if max_bytes else file

    return build


def dense(file):
    return read_tensors(file, read_adapter(file))


def test_one_file_takes_the_bytes_of_both(written, tmp_path, kind):
    files, both = [written("sks", 6, 6_000), written("ohwx", 8, 6_500)], tmp_path / "both.safetensors"
    made = combine([(files[0], 0.5), (files[1], 1.0)], both)
    apart = sum(file.stat().st_size for file in files)
    assert both.stat().st_size < apart + 600 and made.header.format_version == 3
    header = read_adapter(both)
    assert [piece.head_ranks for piece in header.pieces] == [read_adapter(file).head_ranks for file in files]
    (config,) = header.config.values()
    assert [words for words, _ in config["trigger_ranks"]] == [["sks"], ["ohwx"]] and made.rank == config["r"]
    whole = sum(tensor.nbytes for tensor in dense(both).values())
    assert whole > 2 * both.stat().st_size or kind == "tied"  # whose heads share their rows anyway


def products(file):
    return {term.key: term.products() for term in read_contents(file).terms}


def test_it_holds_the_sum_of_all_to_the_last_bits(written, tmp_path):
    """Products of every attention and head in float64: of whole numbers of few bits, none is rounded again."""
    files = [(written("sks", 6, 6_000), -0.3), (written("ohwx", 8, 6_500), 1.0), (written("zwx", 2), 1.7)]
    combine(files[:2], tmp_path / "two.safetensors")
    combine([(tmp_path / "two.safetensors", 2.0), (files[2][0], 3.4)], tmp_path / "all.safetensors")
    expected = {}
    for file, weight in files:
        for key, pair in products(file).items():
            for number, (left, right) in enumerate(pair):
                expected[key, number] = expected.get((key, number), 0) + 2 * weight * left @ right
    found = {(key, n): left @ right for key, two in products(tmp_path / "all.safetensors").items()
             for n, (left, right) in enumerate(two)}  # fmt: skip
    assert found.keys() == expected.keys()
    for name, product in found.items():
        assert_close(product, expected[name], rtol=0, atol=1e-3)  # the dense one is rounded to half precision
        assert product.abs().max() > 0.01
    shares = next(iter(read_adapter(tmp_path / "all.safetensors").config.values()))["trigger_ranks"]
    assert [words for words, _ in shares] == [["sks"], ["ohwx"], ["zwx"]]
    stored = safetensors.torch.load_file(tmp_path / "all.safetensors")
    for number, (file, _) in enumerate(files[:2]):
        for name, tensor in safetensors.torch.load_file(file).items():
            assert torch.equal(stored[f"{number}.{name}"], tensor)


@pytest.mark.parametrize("kind", mostly(["free", "foldable"], "foldable"), indirect=True)
def test_attentions_that_only_one_of_them_has_are_in_it(written, tmp_path):
    """Shrinking leaves weak attentions out, and adapters may be of others to begin with."""
    for most in (6_000, None):
        files = [written(word, 6, most, kind) for word, kind in (("sks", "attn2"), ("ohwx", "attn1"))]
        combine([(files[0], 1.0), (files[1], 1.0)], tmp_path / "both.safetensors")
        own = [{term.key for term in read_contents(file).terms} for file in files]
        assert own[0] and own[1] and not own[0] & own[1]
        found = products(tmp_path / "both.safetensors")
        assert found.keys() == own[0] | own[1]
        for file in files:
            for key, pair in products(file).items():
                for one, other in zip(pair, found[key], strict=True):
                    assert_close(other[0] @ other[1], one[0] @ one[1], rtol=0, atol=2e-3)


def test_it_is_loaded_kept_shrunk_and_exported_as_others_are(written, tiny_unet, tmp_path, kind):
    """Of one word, or of none: then the ranks are of no more than one, and may be cut together."""
    files, both = [written("", 6, 6_000), written("", 8, 6_500)], tmp_path / "both.safetensors"
    combine([(file, 1.0) for file in files], both)
    pipe = pipeline(tiny_unet())
    load_adapter(pipe, both, "both")
    save_adapter(pipe, tmp_path / "again.safetensors", "both", "somebody/base")
    assert read_adapter(tmp_path / "again.safetensors").format_version == 1
    for name, tensor in dense(tmp_path / "again.safetensors").items():
        assert_close(tensor, dense(both)[name].float(), rtol=0, atol=0)
    made = shrink(both, tmp_path / "small.safetensors", 7_000)
    assert made.bytes <= 7_000 and made.header.format_version == 2 and not made.header.pieces
    told = card(read_adapter(both), Shared("me/dog", "both.safetensors", 1))
    assert f"{kind}, rank {read_adapter(both).config['unet']['r']} at most" in told
    if kind == "foldable":
        (lora,) = export_adapter(both, tmp_path / "lora.safetensors").files
        assert lora.stat().st_size > 1000


def test_dense_files_alone_stay_dense_and_a_single_packed_one_becomes_so(written, tmp_path):
    for files in ([written("sks", 2), written("ohwx", 3)], [written("sks", 6, 6_000)]):
        combine([(file, 1.0) for file in files], tmp_path / "both.safetensors")
        assert read_adapter(tmp_path / "both.safetensors").format_version == 1


def of_piece(change):
    return lambda _, metadata: edit(metadata, lambda header: change(header["pieces"][1]))


@pytest.mark.parametrize("kind", ["foldable"], indirect=True)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_piece(lambda piece: piece.pop("alpha")), "header that does not make sense"),
        (of_piece(lambda piece: piece.update(alpha={})), "alpha of a piece is not one number for each"),
        (of_piece(lambda piece: piece.update(alpha={"unet": "1"})), "alpha of a piece is not one number for each"),
        (of_piece(lambda piece: piece.update(alpha={"unet": float("nan")})), "alpha of a piece is not one number"),
        (of_piece(lambda piece: piece["row_lengths"]["unet"].pop()), "row_lengths of unet are not 4 whole numbers"),
        (of_piece(lambda piece: piece["head_ranks"].update(vae={})), "alpha of a piece is not one number for each"),
        (lambda _, m: edit(m, lambda h: h["config"]["unet"].update(r=3)), "ranks of the pieces of unet are not those"),
        (lambda _, m: edit(m, lambda h: h.pop("pieces")), "pieces belong to files of version 3"),
        (lambda _, m: edit(m, lambda h: h.update(format_version=2)), "does not make sense"),
        (lambda _, m: edit(m, lambda h: h.update(pieces=[])), "pieces belong to files of version 3"),
        (lambda t, _: t.pop("1.row_bits"), "lacks '1.row_bits'|does not have|lacks 'unet"),
        (lambda t, _: t.update({"2.unet.rows": t.pop("1.unet.rows")}), "is of no piece that the header speaks of"),
        (lambda t, _: t.update({"unet.rows": t.pop("1.unet.rows")}), "is of no piece that the header speaks of"),
        (lambda t, _: t.update({"1.unet.rows": t["1.unet.rows"][:-9]}), "does not have the [0-9]+ rows"),
    ],
)
def test_pieces_that_make_no_sense_are_refused(written, tiny_unet, tmp_path, change, told):
    files, both = [written("sks", 6, 6_000), written("ohwx", 8, 6_500)], tmp_path / "both.safetensors"
    combine([(file, 1.0) for file in files], both)
    pipe = pipeline(tiny_unet())
    with pytest.raises(AdapterFileError, match=told):
        load_adapter(pipe, rewritten(both, tmp_path, change))
    assert not factors(pipe.unet, "default")


@pytest.mark.parametrize("kind", ["foldable"], indirect=True)
def test_heads_that_differ_between_pieces_are_refused(written, tmp_path):
    files, both = [written("sks", 6, 6_000), written("ohwx", 8, 6_500)], tmp_path / "both.safetensors"
    combine([(file, 1.0) for file in files], both)

    def one_head_less(_, metadata):
        def change(header):
            for products in header["pieces"][1]["head_ranks"]["unet"].values():
                for heads in products:
                    heads.append(0)

        edit(metadata, change)

    with pytest.raises(AdapterFileError, match="have other heads or widths for"):
        dense(rewritten(both, tmp_path, one_head_less))


def test_the_golden_file_of_format_version_3_opens_for_ever():
    """Of one piece in half precision and one in whole numbers; written once by `python -m tests.golden.write`."""
    header, tensors = read_adapter(GOLDEN), dense(GOLDEN)
    assert header.format_version == 3 and len(header.pieces) == 2 and header.notes.trigger == "sks"
    told = json.loads(GOLDEN.with_suffix(".json").read_text())
    assert told["config"] == header.config["unet"]
    sums = {name: [list(tensor.shape), float(tensor.double().abs().sum())] for name, tensor in tensors.items()}
    assert sums.keys() == told["sums"].keys()
    for name, (shape, total) in sums.items():
        assert [shape, total] == [told["sums"][name][0], pytest.approx(told["sums"][name][1], rel=1e-9)]
