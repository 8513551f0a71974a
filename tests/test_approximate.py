"""The closest foldable adapter: exact where there is one, the best of its kind elsewhere, honest about the rest."""

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, load_adapter, read_adapter, save_adapter
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.model import adapted_layers, factors
from comcat_diffusion.export.approximate import approximate
from comcat_diffusion.export.lora import export_adapter

PROMPTS = ["a photo of sks teddy", "a red ball"]


def free_file(path, randomize, inside: bool, std: float = 0.15):
    """A random free adapter of the embedded base; one that is `inside` the span of the base's heads could be folded."""
    pipe = bases.load_base("embedded")
    pipe.unet.add_adapter(ComcatConfig(r=2, alpha=3.0), "dog")
    randomize(pipe.unet, "dog", 1, std=std)
    if inside:
        generator = torch.Generator().manual_seed(2)
        for name, layer in adapted_layers(pipe.unet).items():
            _set_inside(layer, pipe.unet.get_submodule(name), generator)
    save_adapter(pipe, path, "dog", "embedded", Notes("sks", "a photo of sks teddy", "teddy"))
    return path


def _set_inside(layer: ComcatLayer, attention, generator) -> None:
    heads, width = layer.heads, layer.width
    core = 0.3 * torch.randn(heads, 2, width, generator=generator)  # H, R, D
    q = attention.to_q.weight.data.unflatten(0, (heads, width))  # H, D, C
    out = attention.to_out[0].weight.data.unflatten(1, (heads, width))  # C, H, D
    layer.comcat_q_down["dog"].weight.data = torch.einsum("hrd,hdc->hrc", core, q).flatten(0, 1)
    layer.comcat_out_up["dog"].weight.data = torch.einsum("hrd,chd->chr", core, out).flatten(1)


@torch.no_grad()
def predicted(pipe):
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    context = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(4))
    return pipe.unet(noise, 500, context)[0]


@pytest.mark.slow
def test_an_adapter_that_could_be_folded_is_found_exactly_and_exports(randomize, tmp_path):
    file = free_file(tmp_path / "free.safetensors", randomize, inside=True)
    pipe = bases.load_base("embedded")
    before = predicted(pipe)
    made = approximate(pipe, file, tmp_path / "closest.safetensors", PROMPTS)
    assert made.error < 1e-4 and torch.equal(predicted(pipe), before)
    assert read_adapter(tmp_path / "closest.safetensors").notes.trigger == "sks"
    export_adapter(tmp_path / "closest.safetensors", tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    live = bases.load_base("embedded")
    load_adapter(live, file)
    # the fit is exact on what the base sees while it draws, and this noise is not quite that
    assert_close(predicted(pipe), predicted(live), rtol=0, atol=1e-3)
    assert (predicted(live) - before).abs().max() > 0.05


@pytest.mark.slow
def test_an_adapter_outside_is_refused_with_its_error_or_forced(randomize, tmp_path):
    file = free_file(tmp_path / "free.safetensors", randomize, inside=False)
    pipe = bases.load_base("embedded")
    before = predicted(pipe)
    with pytest.raises(ValueError, match=r"differs from .* by [0-9]+% of its effect, more than the 10% allowed"):
        approximate(pipe, file, tmp_path / "closest.safetensors", PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["free.safetensors"]
    made = approximate(pipe, file, tmp_path / "closest.safetensors", PROMPTS, largest_error=2.0)
    assert 0.1 < made.error < 1.5 and torch.equal(predicted(pipe), before)


@pytest.mark.slow
def test_the_fit_is_the_least_squares_one(randomize, tmp_path):
    """No other G of a head comes closer to Ao_h: the residual is orthogonal to the rows of Wo_h."""
    file = free_file(tmp_path / "free.safetensors", randomize, inside=False)
    pipe = bases.load_base("embedded")
    approximate(pipe, file, tmp_path / "closest.safetensors", PROMPTS, largest_error=2.0)
    load_adapter(pipe, file, "free")
    load_adapter(pipe, tmp_path / "closest.safetensors", "closest")
    free, closest = factors(pipe.unet, "free"), factors(pipe.unet, "closest")
    for name, layer in adapted_layers(pipe.unet).items():
        out = pipe.unet.get_submodule(name).to_out[0].weight.double().unflatten(1, (layer.heads, -1))  # C, H, D
        back = free[f"{name}.out_up"].double().unflatten(1, (layer.heads, -1))  # C, H, R
        mix = closest[f"{name}.out_core"].double().unflatten(0, (layer.heads, -1))  # H, R, D
        residual = torch.einsum("hrd,chd->chr", mix, out) - back
        assert torch.einsum("chd,chr->hdr", out, residual).abs().max() < 1e-5
        assert residual.norm() > 0.1 * back.norm()


def test_what_is_not_to_be_approximated_is_refused(randomize, tmp_path):
    target, pipe = tmp_path / "closest.safetensors", bases.load_base("embedded")
    pipe.unet.add_adapter(ComcatConfig(r=1, foldable=True), "dog")
    save_adapter(pipe, tmp_path / "foldable.safetensors", "dog", "embedded")
    with pytest.raises(AdapterFileError, match="foldable already"):
        approximate(pipe, tmp_path / "foldable.safetensors", target, PROMPTS)
    file = free_file(tmp_path / "free.safetensors", randomize, inside=False)
    with pytest.raises(ValueError, match="carries adapters already"):
        approximate(pipe, file, target, PROMPTS)
    text = bases.load_base("embedded")
    for part in (text.unet, text.text_encoder):
        part.add_adapter(ComcatConfig(r=1), "dog")
    save_adapter(text, tmp_path / "text.safetensors", "dog", "embedded")
    with pytest.raises(AdapterFileError, match="also adapts text_encoder"):
        approximate(bases.load_base("embedded"), tmp_path / "text.safetensors", target, PROMPTS)
    nothing = bases.load_base("embedded")
    nothing.unet.add_adapter(ComcatConfig(r=1), "dog")
    save_adapter(nothing, tmp_path / "nothing.safetensors", "dog", "embedded")
    with pytest.raises(AdapterFileError, match="adds nothing"):
        approximate(bases.load_base("embedded"), tmp_path / "nothing.safetensors", target, PROMPTS)
    assert not target.exists()
