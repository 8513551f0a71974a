"""Compressed models leave PyTorch: torch.export and ONNX give what the model gives, at any batch size."""

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion.compression import Settings, compress, load_compressed, save_compressed
from comcat_diffusion.compression.planning import count
from tests.compression_models import batches, built, out, pictures

INPUTS = ("sample", "timestep", "encoder_hidden_states")  # of a U-Net


@pytest.fixture(params=["vit", "deit"])
def loaded(request, tmp_path):
    """A model as `load_compressed` gives it, without 40 % of its parameters."""
    dense = built(request.param, num_hidden_layers=1).float()
    save_compressed(*compress(dense, 0.4, batches(dtype=torch.float32)), tmp_path / "low")
    low, _ = load_compressed(tmp_path / "low")
    assert (out(low, pictures(dtype=torch.float32)) - out(dense, pictures(dtype=torch.float32))).abs().max() > 1e-2
    return low


@pytest.mark.slow
def test_a_loaded_classifier_exports_at_any_batch_size(loaded):
    example = pictures(2, dtype=torch.float32)
    program = torch.export.export(loaded, (example,), dynamic_shapes={"pixel_values": {0: torch.export.Dim.DYNAMIC}})
    for size in (1, 5):
        inputs = pictures(size, dtype=torch.float32)
        assert_close(out(program.module(), inputs), out(loaded, inputs), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_loaded_classifier_becomes_an_onnx_file_for_any_batch_size(loaded, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")  # PyTorch's exporter is written in it
    file = tmp_path / "model.onnx"
    shapes = {"pixel_values": {0: "batch"}}
    example = (pictures(2, dtype=torch.float32),)
    torch.onnx.export(loaded, example, file, dynamo=True, dynamic_shapes=shapes, verbose=False)

    weights = sum(torch.Size(tensor.dims).numel() for tensor in onnx.load(file).graph.initializer)
    assert 0.9 * count(loaded) < weights < 1.1 * count(loaded)  # factors were not multiplied into dense matrices

    session = runtime.InferenceSession(file)
    for size in (1, 5):
        inputs = pictures(size, dtype=torch.float32)
        logits, *_ = session.run(None, {"pixel_values": inputs.numpy()})
        assert_close(torch.from_numpy(logits), out(loaded, inputs), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_compressed_unet_exports(tiny_unet):
    low, _ = compress(tiny_unet(), 0.4, settings=Settings(counted="parts"))
    # diffusers' upsampling takes another path from 64 pictures on, so the batch has a bound.
    batch = {0: torch.export.Dim("batch", max=63)}
    inputs = tiny_unet.inputs()
    example = tuple(inputs[name] if name == "timestep" else inputs[name].float() for name in INPUTS)
    program = torch.export.export(low, example, dynamic_shapes=dict.fromkeys(INPUTS, batch))
    one = tuple(tensor[:1] for tensor in example)
    for call in (example, one):
        assert_close(program.module()(*call).sample, low(*call).sample, rtol=0, atol=1e-6)
    assert (low(*example).sample - tiny_unet().forward(*example).sample).abs().max() > 1e-4
