"""The paper authors' `comcat_weight.pt`: the same function as theirs, and no file with anything else in it."""

import io
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import load_adapter
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.layer import factor_shapes
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.export.authors import FACTORS, authors_order, import_authors_file
from tests.reference import FreeFactors, attention
from tests.test_adapter_file import pipeline

CLEAR = 0.01  # an effect on the output this large cannot be rounding
ORDER = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
]


@pytest.fixture
def theirs(tiny_unet, tmp_path):
    """A list as their training leaves it, Parameters in the order of their walk, and its file."""
    generator, unet, parameters = torch.Generator().manual_seed(0), tiny_unet(), []
    for name in ORDER:
        shapes = factor_shapes(unet.get_submodule(name), 2, foldable=False)
        for factor in ("q_down", "k_down", "v_down", "out_up"):
            parameters.append(nn.Parameter(0.4 * torch.randn(*reversed(shapes[factor]), generator=generator)))
    torch.save(parameters, tmp_path / "comcat_weight.pt")
    return parameters, tmp_path / "comcat_weight.pt"


def test_the_order_is_that_of_their_walk(tiny_unet):
    assert authors_order(tiny_unet()) == ORDER


def test_the_order_covers_stable_diffusion_1_as_the_paper_counts_it():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    order = authors_order(unet)
    blocks = list(dict.fromkeys(name.partition(".attentions")[0] for name in order))
    assert len(order) == 32
    assert blocks == [*(f"down_blocks.{i}" for i in range(3)), *(f"up_blocks.{i}" for i in (1, 2, 3)), "mid_block"]
    shapes = [shape for name in order for shape in factor_shapes(unet.get_submodule(name), 2, False).values()]
    assert sum(into * outof for into, outof in shapes) == 1_591_296  # the paper's 6 MB in float32


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_what_is_imported_does_what_theirs_did(tiny_unet, theirs, tmp_path, strength):
    """Their formula, head by head in float64: both factors of a product times a, so the term times a^2."""
    parameters, path = theirs
    pipe = pipeline(tiny_unet())
    base = tiny_unet.run(pipe.unet)
    header = import_authors_file(pipe, path, tmp_path / "dog.safetensors", strength, "somebody/base", Notes("sks"))
    assert (header.base_model, header.notes.trigger, header.config["unet"]["r"]) == ("somebody/base", "sks", 2)
    assert header.config["unet"]["alpha"] == pytest.approx(2 * strength**2)
    load_adapter(pipe, tmp_path / "dog.safetensors", "dog")
    assert (tiny_unet.run(pipe.unet) - base).abs().max() > CLEAR

    pipe.unet.double()
    generator = torch.Generator().manual_seed(1)
    for index in (0, 3, 7):
        module = pipe.unet.get_submodule(ORDER[index])
        x = torch.randn(2, 5, module.to_q.in_features, generator=generator, dtype=torch.float64)
        c = torch.randn(2, 7, module.to_k.in_features, generator=generator, dtype=torch.float64)
        c = c if module.is_cross_attention else x
        projections = (module.to_q, module.to_k, module.to_v, module.to_out[0])
        term = FreeFactors(strength**2, *(p.detach().double() for p in parameters[4 * index : 4 * index + 4]))
        expected = attention(x, c, projections, module.heads, (term,))
        assert_close(module(x, c), expected, rtol=0, atol=1e-12)
        assert (expected - attention(x, c, projections, module.heads)).abs().max() > CLEAR


def test_the_tensors_are_taken_over_as_they_are(tiny_unet, theirs, tmp_path):
    pipe = pipeline(tiny_unet())
    import_authors_file(pipe, theirs[1], tmp_path / "dog.safetensors")
    load_adapter(pipe, tmp_path / "dog.safetensors", "dog")
    found = factors(pipe.unet, "dog")
    assert len(found) == 4 * len(ORDER)
    for index, parameter in enumerate(theirs[0]):
        assert torch.equal(found[f"{ORDER[index // 4]}.{FACTORS[index % 4]}"], parameter)


class Hostile:
    """What a pickle can do: call a function when it is opened."""

    def __reduce__(self):
        return print, ("code ran",)


def saved(content, old=False):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def swapped(index, change):
    return lambda tensors: saved([*tensors[:index], change(tensors[index]), *tensors[index + 1 :]])


WRONG = {
    "code": ("could run code", lambda tensors: saved([*tensors, Hostile()])),
    "code, old format": ("could run code", lambda tensors: saved([*tensors, Hostile()], old=True)),
    "bare pickle": ("could run code|no PyTorch file", lambda tensors: pickle.dumps(Hostile())),
    "noise": ("no PyTorch file", lambda tensors: b"nothing of the kind"),
    "empty": ("no PyTorch file", lambda tensors: b""),
    "cut": ("no PyTorch file", lambda tensors: saved(tensors)[:-2000]),
    "a table": ("not the list of tensors", lambda tensors: saved({"a": tensors[0]})),
    "a number": ("not the list of tensors", lambda tensors: saved([*tensors[:-1], 3.0])),
    "a vector": ("tensor 5 that is no matrix", swapped(5, lambda t: t[0])),
    "whole numbers": ("tensor 5 that is no matrix", swapped(5, lambda t: t.long())),
    "sparse": ("tensor 5 that is no matrix", swapped(5, lambda t: t.detach().to_sparse())),
    "not finite": ("NaN or infinity in tensor 5", swapped(5, lambda t: t * float("nan"))),
    "too few": ("31 tensors, but the 8 attentions of this base need 32", lambda tensors: saved(tensors[:-1])),
    "too many": ("33 tensors", lambda tensors: saved([*tensors, tensors[0]])),
    "nothing": ("0 tensors", lambda tensors: saved([])),
    "rows": ("factors of 3 rows, which 2 heads cannot share", swapped(1, lambda t: t[:3])),
    "no rows": ("factors of 0 rows", swapped(1, lambda t: t[:0])),
    "another shape": ("tensor 6 is .*v_down of .*attn2 is", swapped(6, lambda t: t[:, :-1])),
    "another rank": (r"tensor 4 is .*at rank 2", swapped(4, lambda t: t[:2])),
}


@pytest.mark.parametrize("kind", WRONG)
def test_anything_else_is_refused_in_one_sentence(tiny_unet, theirs, tmp_path, capsys, kind):
    message, content = WRONG[kind]
    path, target = tmp_path / "wrong.pt", tmp_path / "dog.safetensors"
    path.write_bytes(content(theirs[0]))
    with pytest.raises(AdapterFileError, match=message) as caught:
        import_authors_file(pipeline(tiny_unet()), path, target)
    assert "\n" not in str(caught.value) and "code ran" not in capsys.readouterr().out and not target.exists()


def test_a_missing_file_a_wrong_base_and_a_wrong_strength_are_refused(tiny_unet, tiny_clip, theirs, tmp_path):
    target = tmp_path / "dog.safetensors"
    with pytest.raises(AdapterFileError, match="no file"):
        import_authors_file(pipeline(tiny_unet()), tmp_path / "nobody.pt", target)
    with pytest.raises(AdapterFileError, match="name the Stable Diffusion 1.x base"):
        import_authors_file(tiny_clip(), theirs[1], target)
    with pytest.raises(ValueError, match="finite"):
        import_authors_file(pipeline(tiny_unet()), theirs[1], target, strength=float("inf"))
    assert not target.exists()
