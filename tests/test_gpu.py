"""What only a GPU can show: kernels of its own, its precisions, its memory. Skipped where there is none."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from comcat_diffusion import bases, load_adapter
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.training import customize as story
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from tests.adapter_cases import Case
from tests.test_training import Listener

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPT = "a photo of a big sks teddy on the left, red background"


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """No TF32: what is compared with a CPU has float32's precision."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_gpu(case: Case, model: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    inputs = {n: t.to("cuda", dtype if t.is_floating_point() else t.dtype) for n, t in case.tiny.inputs().items()}
    return model.to("cuda", dtype)(**inputs)[0]


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, None), (torch.float16, None)], ids=str
)
def test_a_gpu_computes_what_a_cpu_computes(case, dtype, atol, merged):
    model = case.adapted("a", dtype=torch.float32)
    wanted = case.run(model)
    if merged:
        model.base_model.merge_adapter(["a"])
    found = on_gpu(case, model, dtype).float().cpu()
    # in a half precision: not much further away than the base itself is
    base = case.base(torch.float32)
    own = (on_gpu(case, case.tiny(torch.float32), dtype).float().cpu() - base).abs().max().item()
    assert_close(found, wanted, atol=atol or 6 * own + 1e-3, rtol=0)


def test_gradients_of_a_gpu_are_those_of_a_cpu(case):
    def gradients(device: str) -> dict[str, torch.Tensor]:
        model = case.adapted("a", dtype=torch.float32).train()
        output = on_gpu(case, model, torch.float32) if device == "cuda" else case.run(model)
        output.square().mean().backward()
        return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}

    here, there = gradients("cpu"), gradients("cuda")
    assert here.keys() == there.keys() and here
    for name, gradient in here.items():
        assert_close(there[name], gradient, atol=1e-4 * gradient.abs().max().item() + 1e-7, rtol=1e-3)


def config(folder, **more) -> TrainConfig:
    return TrainConfig(**{"output_dir": str(folder), "max_train_steps": 60, "skip_final_inference": True} | more)


def losses(listener: Listener) -> list[float]:
    return [step.loss for step in listener.steps]


@pytest.mark.parametrize(
    "more",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "compile": True},
        {"mixed_precision": "fp16", "kind": "free", "train_text_encoder": True},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_run_learns_in_every_precision(tmp_path, more):
    listener = Listener()
    outcome = customize(config(tmp_path, **more), listener)
    found = losses(listener)
    assert all(math.isfinite(loss) for loss in found)
    assert np.mean(found[-20:]) < 0.85 * np.mean(found[:20])
    pipe = bases.load_base(bases.EMBEDDED).to("cuda")
    load_adapter(pipe, outcome.adapter)


def test_two_runs_take_the_same_course(tmp_path):
    """Same noise, same order: only the rounding differs."""
    first, second = Listener(), Listener()
    customize(config(tmp_path / "a"), first)
    customize(config(tmp_path / "b"), second)
    assert_close(torch.tensor(losses(first)), torch.tensor(losses(second)), rtol=1e-2, atol=1e-3)


def test_nothing_but_the_vae_is_on_the_gpu_while_pictures_are_encoded(tmp_path, monkeypatch):
    there, encoded = [], story.encode_all

    def watched(config, pipe, *more):
        there.append(
            {name: module.device.type for name, module in pipe.components.items() if hasattr(module, "device")}
        )
        return encoded(config, pipe, *more)

    monkeypatch.setattr(story, "encode_all", watched)
    customize(config(tmp_path, max_train_steps=2))
    assert there == [{"vae": "cuda", "text_encoder": "cpu", "unet": "cpu"}]


@pytest.mark.parametrize("kind", ["tied", "foldable", "free"])
def test_pictures_are_the_same_again_and_in_any_batch(tmp_path, kind):
    adapter = str(customize(config(tmp_path / "run", kind=kind)).adapter)

    def drawn(folder: str, **more) -> np.ndarray:
        settings = {"adapter": [adapter], "prompt": [PROMPT], "num_images": 3, "num_inference_steps": 5}
        settings["precision"] = "fp32"
        made = generate(GenerateConfig(**settings | {"output_dir": str(tmp_path / folder)} | more))
        return np.stack([np.asarray(Image.open(path)).astype(int) for path in made.files])

    first = drawn("first")
    assert (drawn("again") == first).all()
    assert np.abs(drawn("one", batch_size=1) - first).max() <= 3
    assert np.abs(drawn("cpu", device="cpu") - first).max() <= 8
    assert first.std() > 10


def test_an_update_replayed_as_one_graph_is_the_update(tmp_path, monkeypatch):
    """What the recipe's stages do on a GPU from their fourth step on, against launching every kernel."""
    from recipe import fit
    from tests.test_recipe import learn

    graph = learn(tmp_path / "graph.pt")
    monkeypatch.setattr(fit, "EAGER_STEPS", 100)
    assert_close(graph.weight, learn(tmp_path / "eager.pt").weight, rtol=1e-5, atol=1e-6)
