"""Tiny real models, built once per session and handed out as fresh copies. No test touches the network.

Letters: B batch, N tokens, M context tokens, H heads, D head width, R rank, C channels.
"""

import copy
import gc
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

from comcat_diffusion.adapters.model import factors
from comcat_diffusion.training import class_pictures, preview
from tests.adapter_cases import CASES, FEW, OFTEN, TARGETS, Case
from tests.copies import Copies
from tests.slow import mostly

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Weights that a test draws without a seed are the same in every order, worker and run."""
    torch.manual_seed(0)
    random.seed(0)


def pytest_collection_finish() -> None:
    """Let no later collection walk what importing left: a run frees memory twice, at 0.25 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def sketches() -> Iterator[None]:
    """What trainings in this process draw takes 4 steps instead of 25: seconds each, and longer than most trainings."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preview, "STEPS", 4)
        patched.setattr(class_pictures, "STEPS", 4)
        yield


@dataclass(frozen=True)
class Tiny:
    """A tiny model: calling it gives a fresh copy, `run` gives the output on inputs that are always the same."""

    name: str
    original: nn.Module
    inputs: Callable[[], dict[str, torch.Tensor]]
    copies: dict[torch.dtype, Copies] = field(default_factory=dict)
    bases: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def __call__(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        if dtype not in self.copies:
            self.copies[dtype] = Copies(copy.deepcopy(self.original).to(dtype))
        return self.copies[dtype]()

    def run(self, model: nn.Module, **more) -> torch.Tensor:
        made = model(**{name: _as(given, model.dtype) for name, given in self.inputs().items()}, **more)[0]
        return torch.stack(made) if isinstance(made, list) else made

    def base(self, dtype: torch.dtype) -> torch.Tensor:
        """The output of the model as it was built, computed once."""
        if dtype not in self.bases:
            self.bases[dtype] = self.run(self(dtype))
        return self.bases[dtype].clone()


def _as(given: torch.Tensor | list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(given, list):
        return [_as(one, dtype) for one in given]
    return given.to(dtype) if isinstance(given, torch.Tensor) and given.is_floating_point() else given


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model of random weights whose biases are not zero, without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build_tiny_unet() -> nn.Module:
    """Two blocks and a middle, 8x8 latents, four self- and four cross-attentions, context width 24."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,  # diffusers' name for the number of heads: widths 8 and 16
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.fixture(scope="session")
def tiny_unet() -> Tiny:
    """See `build_tiny_unet`."""

    def inputs() -> dict[str, torch.Tensor]:
        noise, context = _noise(2, 4, 8, 8, seed=1), _noise(2, 7, 24, seed=2)  # B C 8 8, B M C
        return {"sample": noise, "timestep": torch.tensor([10, 500]), "encoder_hidden_states": context}

    return Tiny("tiny_unet", _built(build_tiny_unet, seed=0), inputs)


@pytest.fixture(scope="session")
def tiny_clip() -> Tiny:
    """Two layers of width 32, four heads of 8, a causal mask."""

    def build() -> nn.Module:
        config = CLIPTextConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            initializer_factor=3.0,
            bos_token_id=97,
            eos_token_id=98,
        )
        return CLIPTextModel(config)

    def inputs() -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(18).view(2, 9) * 5 % 99}  # B N

    return Tiny("tiny_clip", _built(build, seed=1), inputs)


@pytest.fixture(scope="session")
def tiny_vit() -> Tiny:
    """Two layers of width 24, three heads of 8, pictures of 8x8 in patches of 4."""

    def build() -> nn.Module:
        config = ViTConfig(
            hidden_size=24,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=8,
            patch_size=4,
            initializer_range=0.2,
        )
        return ViTModel(config, add_pooling_layer=False)

    return Tiny("tiny_vit", _built(build, seed=2), lambda: {"pixel_values": _noise(2, 3, 8, 8, seed=3)})


@pytest.fixture(scope="session")
def tiny_sd3() -> Tiny:
    """Stable Diffusion 3.5's transformer: three joint blocks with norms, see tests/tiny_families.py."""
    from tests.tiny_families import WIDTH, sd3_transformer

    def inputs() -> dict[str, torch.Tensor]:
        noise, context = _noise(2, 4, 8, 8, seed=1), _noise(2, 7, 2 * WIDTH, seed=2)  # B C 8 8, B M E
        pooled = _noise(2, 2 * WIDTH, seed=3)
        times = torch.tensor([10.0, 500.0], dtype=torch.float64)
        return {
            "hidden_states": noise, "encoder_hidden_states": context, "pooled_projections": pooled, "timestep": times,
        }  # fmt: skip

    return Tiny("tiny_sd3", _built(sd3_transformer, seed=4), inputs)


def _flux_inputs(width: int, axes: int) -> dict[str, torch.Tensor]:
    """Two pictures of 3x4 tokens, which are 2x2 latents of four channels, and seven words."""
    places = torch.tensor([[0, row, column, 0] for row in range(3) for column in range(4)])
    words = torch.tensor([[0, 0, 0, number] for number in range(7)])
    return {
        "hidden_states": _noise(2, 12, 16, seed=1), "encoder_hidden_states": _noise(2, 7, width, seed=2),
        "img_ids": places[:, :axes], "txt_ids": words[:, :axes],
        "timestep": torch.tensor([0.01, 0.5], dtype=torch.float64),
    }  # fmt: skip


@pytest.fixture(scope="session")
def tiny_klein() -> Tiny:
    """FLUX.2's transformer: two joint blocks with norms and rotations, and one of one stream."""
    from tests.tiny_families import WIDTH, klein_transformer

    return Tiny("tiny_klein", _built(klein_transformer, seed=5), lambda: _flux_inputs(3 * WIDTH, axes=4))


@pytest.fixture(scope="session")
def tiny_flux1() -> Tiny:
    """FLUX.1's transformer: the same with biases."""
    from tests.tiny_families import WIDTH, flux1_transformer

    def inputs() -> dict[str, torch.Tensor]:
        told = {"pooled_projections": _noise(2, WIDTH, seed=3), "guidance": torch.tensor([3.5], dtype=torch.float64)}
        return _flux_inputs(WIDTH, axes=3) | told

    return Tiny("tiny_flux1", _built(flux1_transformer, seed=6), inputs)


@pytest.fixture(scope="session")
def tiny_z_image() -> Tiny:
    """Z-Image's transformer: two blocks of one stream, over two pictures of 3x4 tokens and texts of seven and five."""
    from tests.tiny_families import WIDTH, z_image_transformer

    def inputs() -> dict[str, object]:
        films, texts = _noise(2, 4, 1, 6, 8, seed=1).unbind(), _noise(2, 7, WIDTH, seed=2)
        times = torch.tensor([0.01, 0.5], dtype=torch.float64)
        return {"x": list(films), "t": times, "cap_feats": [texts[0], texts[1, :5]]}

    return Tiny("tiny_z_image", _built(z_image_transformer, seed=7), inputs)


@pytest.fixture(scope="session")
def tiny_qwen_image() -> Tiny:
    """Qwen-Image's transformer: two joint blocks, over pictures of 3x4 tokens and texts of seven and five."""
    from tests.tiny_families import WIDTH, qwen_image_transformer

    def inputs() -> dict[str, object]:
        return {
            "hidden_states": _noise(2, 12, 16, seed=1), "encoder_hidden_states": _noise(2, 7, WIDTH, seed=2),
            "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [5]]), "img_shapes": [[(1, 3, 4)]] * 2,
            "timestep": torch.tensor([0.01, 0.5], dtype=torch.float64),
        }  # fmt: skip

    return Tiny("tiny_qwen_image", _built(qwen_image_transformer, seed=8), inputs)


@pytest.fixture(scope="session")
def tiny_vae() -> Tiny:
    """An autoencoder with one attention on a 4-d input, with a residual, a group norm and biases."""

    def build() -> nn.Module:
        return AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4, sample_size=8)

    return Tiny("tiny_vae", _built(build, seed=3), lambda: {"sample": _noise(2, 3, 8, 8, seed=4)})


@pytest.fixture(scope="session")
def randomize() -> Callable:
    """`randomize(model, name, seed)` fills an adapter's factors with noise, so that it does something."""

    def fill(model: nn.Module, adapter_name: str, seed: int = 0, std: float = 0.4) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        found = factors(model, adapter_name)
        assert found, f"no adapter named {adapter_name}"
        with torch.no_grad():
            for parameter in found.values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std * noise)
        return model

    return fill


@pytest.fixture(params=mostly(CASES, *OFTEN))
def case(request: pytest.FixtureRequest, randomize: Callable) -> Case:
    """One kind of adapter on one family of attentions, see tests/adapter_cases.py."""
    return _case(request, randomize)


@pytest.fixture(params=mostly(CASES, *FEW))
def any_case(request: pytest.FixtureRequest, randomize: Callable) -> Case:
    """The same, for what has little to do with kinds."""
    return _case(request, randomize)


def _case(request: pytest.FixtureRequest, randomize: Callable) -> Case:
    kind, target = request.param.split("-", 1)
    model, name = TARGETS[target]
    return Case(request.getfixturevalue(model), name, kind, randomize)
