"""`make test-forge FORGE=folder`: Forge's own U-Net, patcher, tokenizer and sampling function, with adapters on them.

One step of Forge's sampling, classifier-free guidance included, is compared with diffusers and `load_adapter` on the
same random base. Forge's page is not started. It takes its Python from FORGE_PYTHON, or this one.
"""

import sys
import tempfile
import types
from pathlib import Path

import torch

from comcat_diffusion import load_adapter, remember_prompts
from comcat_diffusion.adapters.header import AdapterFileError
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.comfy import forge
from comcat_diffusion.comfy.load import keep_background
from tests.comfyui_bases import one, original_names
from tests.comfyui_check import CLOSE, adapters, expect

SIGMA_AT, GUIDANCE, SIDE = 500, 2.0, 12
PROMPT, NEGATIVE = "a photo of (sks dog:1.2), ohwx cat", "blurry"


class Engine:
    """What a script sees of Forge's model, over Forge's own tokenizer; text states are diffusers'."""

    def __init__(self, pipe: object, unet: object, text: object) -> None:
        self.pipe, self.text_processing_engine = pipe, text
        self.forge_objects = types.SimpleNamespace(unet=unet)

    def get_learned_conditioning(self, prompts: list[str]) -> torch.Tensor:
        """(B, M, E)."""
        made = []
        for prompt in prompts:
            chunks, _ = self.text_processing_engine.tokenize_line(prompt)
            made.append(torch.cat([self.pipe.text_encoder(torch.tensor([chunk.tokens]))[0] for chunk in chunks], dim=1))
        return torch.cat(made)


def backend(folder: Path, pipe: object) -> tuple:
    """Forge's U-Net in its patcher, its text engine without a text encoder, and its sampling function."""
    sys.argv = ["forge", "--always-cpu", "--all-in-fp32"]  # which Forge reads when it is imported
    sys.path[:0] = [str(folder), str(folder / "packages_3rdparty")]
    shared = types.ModuleType("modules.shared")  # of its page, which is not started
    shared.opts = types.SimpleNamespace(comma_padding_backtrack=20)
    sys.modules |= {"modules": types.ModuleType("modules"), "modules.shared": shared}
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.patcher.unet import UnetPatcher
    from backend.sampling import sampling_function
    from backend.text_processing.classic_engine import ClassicTextProcessingEngine
    from backend.text_processing.textual_inversion import EmbeddingDatabase

    unet = IntegratedUNet2DConditionModel(
        in_channels=4, model_channels=320, out_channels=4, num_res_blocks=[1, 1], channel_mult=(1, 2), num_heads=8,
        use_spatial_transformer=True, transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1, context_dim=768, use_linear_in_transformer=False,
    ).eval()  # fmt: skip
    unet.load_state_dict(original_names(pipe.unet))
    cpu = torch.device("cpu")
    unet.storage_dtype = unet.computation_dtype = torch.float32
    unet.load_device = unet.offload_device = unet.initial_device = cpu
    patcher = UnetPatcher.from_model(unet, pipe.scheduler, config=None)
    text = object.__new__(ClassicTextProcessingEngine)
    text.tokenizer, text.chunk_length = pipe.tokenizer, 75
    text.id_start, text.id_end = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id
    text.comma_token = pipe.tokenizer.get_vocab()[",</w>"]
    text.embeddings, text.emphasis = EmbeddingDatabase(pipe.tokenizer, 768), types.SimpleNamespace(name="Original")
    return patcher, text, sampling_function


def denoised(
    sampling: object,
    unet: object,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    x: torch.Tensor,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """One step of Forge's."""
    sampling.sampling_prepare(unet, x)
    sigma = unet.model.predictor.sigmas[SIGMA_AT].view(1)
    asked = types.SimpleNamespace(x=x, sigma=sigma, text_cond=cond, text_uncond=uncond, image_cond=None)
    wrapped = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet))
    wrapped.inner_model = wrapped  # as deep as this version looks
    sampler = types.SimpleNamespace(inner_model=wrapped, p=types.SimpleNamespace(seeds=[0]))
    made = sampling.sampling_function(sampler, asked, guidance, [[(0, 1.0)]])
    return made[0] if isinstance(made, tuple) else made  # newer versions also give both predictions


def main(folder: Path) -> None:
    """Each kind, several at once, and what is refused."""
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        pipe = one(folder / "backend/huggingface/runwayml/stable-diffusion-v1-5/tokenizer")
        files = adapters(pipe, Path(place) / "adapters")
        unet, text, sampling = backend(folder, pipe)
        engine = Engine(pipe, unet, text)
        memory = forge.listen(engine)
        expect("asked again, it is the same memory", forge.listen(engine) is memory, True)
        cond, uncond = engine.get_learned_conditioning([PROMPT]), engine.get_learned_conditioning([NEGATIVE])
        x = 5 * torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        sigma = float(unet.model.predictor.sigmas[SIGMA_AT])

        def by_diffusers() -> torch.Tensor:
            remember_prompts(pipe, torch.cat([cond, uncond]), [PROMPT.replace("(", "").replace(":1.2)", ""), NEGATIVE])
            both = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
            own, other = pipe.unet(both, SIGMA_AT, torch.cat([cond, uncond]))[0].chunk(2)
            return x - sigma * (other + GUIDANCE * (own - other))

        base = by_diffusers()
        for names in ((), ("tied",), ("free",), ("cores",), ("convolved",), ("tied", "free"), ("tied", "convolved")):
            made = unet
            for name in names:
                load_adapter(pipe, files[name], name)
                made, _ = forge.load(made, memory, files[name])
            if names:
                pipe.unet.set_adapters(list(names), [1.0] * len(names))
            found, expected = denoised(sampling, made, cond, uncond, x), by_diffusers()
            off, effect = float((found - expected).abs().max()), float((expected - base).abs().max())
            print(f"{' and '.join(names) or 'the base alone'}: off by {off:.1e}, without the adapter {effect:.1e}")
            if off > CLOSE * float(expected.abs().max()) or (names and effect < 20 * off):
                raise SystemExit("Forge predicts something else.")
            unload_adapters(pipe)
        made, _ = forge.load(unet, memory, files["tied"])
        without = engine.get_learned_conditioning(["a ball"])
        same = torch.equal(denoised(sampling, made, without, uncond, x), denoised(sampling, unet, without, uncond, x))
        expect("a prompt without the trigger is drawn as the base draws it", same, True)
        bare = [denoised(sampling, one, cond, uncond, x, guidance=1.0) for one in (unet, made)]
        expect("without guidance, where Forge asks for no other prompt, it acts too", torch.equal(*bare), False)
        long = engine.get_learned_conditioning(["a " * 80 + "sks dog"])
        expect("a long prompt is two chunks", denoised(sampling, made, long, uncond, x).isfinite().all().item(), True)
        kept, _ = forge.load(unet, memory, files["tied"])
        for told, act in (
            ("has no place to ask for that", lambda: keep_background(kept)),
            ("does not know the prompt", lambda: denoised(sampling, made, cond + 1, uncond, x)),
            ("use ComfyUI's nodes", lambda: forge.load(unet, memory, files["everywhere"])),
            ("wrong base", lambda: denoised(sampling, forge.refuse(unet, ValueError("wrong base")), cond, uncond, x)),
        ):
            try:
                act()
            except (ValueError, AdapterFileError) as error:
                expect(told, told in str(error), True)
            else:
                raise SystemExit(f"Nothing was said: {told}")
    print("Forge predicts what diffusers predicts.")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
