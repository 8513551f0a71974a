"""Our way into PEFT's image-generation benchmark: its steps, walked on a tiny random base of the same classes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from peft import PeftConfig, get_peft_model
from PIL import ImageChops
from safetensors.torch import load_file

from benchmarks.peft_image_gen.run import OWN, listening, main
from comcat_diffusion.adapters.model import adapted_layers
from tests import tiny_families

PROMPTS = ["sks cat on a chair", "a photo of sks cat", "a photo of cat", ""]
LAYERS = {"max_sequence_length": 48, "text_encoder_out_layers": [1, 2, 3]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_families.klein(tmp_path_factory.mktemp("klein"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied-rank4", "cores-rank4"])
def test_its_steps_teach_and_do_not_drift(base, name, tmp_path):
    """Prompts are encoded ahead, the encoder goes, and pictures are drawn from stored states, in a PeftModel."""

    def get_pipeline() -> Flux2KleinPipeline:
        pipe = Flux2KleinPipeline.from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.enable_gradient_checkpointing()
        pipe.text_encoder.requires_grad_(False)
        torch.manual_seed(0)
        pipe.transformer = get_peft_model(pipe.transformer, PeftConfig.from_pretrained(OWN / name))
        pipe.transformer.train()
        return pipe

    pipe = listening(get_pipeline)()
    with torch.no_grad():
        known = {prompt: pipe.encode_prompt(prompt=prompt, **LAYERS)[0] for prompt in PROMPTS}
    words = pipe._prepare_text_ids(known[""])
    pipe.text_encoder = None
    noise = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 4, 4, generator=noise)
    rate = 0.1 if name == "tied-rank4" else 1.0  # few steps
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(12):
        states = torch.cat([known[PROMPTS[0]], known[PROMPTS[1]]]).index_select(0, torch.tensor([1, 0]))
        places = pipe._prepare_latent_ids(latents.expand(2, -1, -1, -1))
        sigma, drawn = torch.tensor([0.3, 0.6]), torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(2))
        noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * drawn
        predicted = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy), timestep=sigma, guidance=None, encoder_hidden_states=states,
            txt_ids=words.expand(2, -1, -1), img_ids=places, return_dict=False,
        )[0]  # fmt: skip
        loss = (pipe._unpack_latents_with_ids(predicted, places) - (drawn - latents)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.99
    pipe.transformer.eval()

    @torch.inference_mode()
    def picture(prompt):
        return pipe(
            prompt_embeds=known[prompt], negative_prompt_embeds=known[""].expand(1, -1, -1), num_inference_steps=2,
            guidance_scale=3.5, height=32, width=32, generator=torch.Generator().manual_seed(3),
        ).images[0]  # fmt: skip

    with pipe.transformer.disable_adapter():
        bare = {prompt: picture(prompt) for prompt in PROMPTS[1:3]}
    moved = {prompt: ImageChops.difference(picture(prompt), bare[prompt]).getbbox() for prompt in bare}
    assert moved["a photo of cat"] is None and moved["a photo of sks cat"] is not None
    pipe.transformer.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    blocks, inner = len(adapted_layers(pipe.transformer)), 16
    heads, numbers = 2, 2 * 4 * (inner + blocks * inner)
    numbers = numbers if name == "tied-rank4" else 2 * blocks * heads * 4 * 4
    assert sum(tensor.numel() for tensor in saved.values()) == numbers


@pytest.mark.parametrize("name", [path.name for path in sorted(OWN.iterdir())])
def test_an_experiment_goes_to_the_benchmarks_own_run(name, tmp_path, monkeypatch):
    """In its folder, by a path of its form, with a pipeline that listens."""
    told = tmp_path / "told.json"
    (tmp_path / "utils.py").write_text("def get_pipeline():\n    return None\n")
    (tmp_path / "run.py").write_text(
        "import json, sys\nfrom pathlib import Path\nfrom utils import get_pipeline\nfrom peft import PeftConfig\n"
        "config = PeftConfig.from_pretrained(sys.argv[-1])\n"
        f"Path({str(told)!r}).write_text(json.dumps([sys.argv[1:], get_pipeline.__wrapped__.__name__, config.r]))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    main(str(tmp_path), name, ["-v"])
    sys.modules.pop("utils")
    path = f"experiments/comcat/flux2-klein-{name}"
    assert json.loads(told.read_text()) == [["-v", path], "get_pipeline", int(name.rpartition("rank")[2])]
    assert "optimizer_kwargs" in json.loads((tmp_path / path / "training_params.json").read_text())


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no run.py"):
        main(str(tmp_path), "tied-rank1", [])
    Path(tmp_path / "run.py").write_text("")
    with pytest.raises(ValueError, match="no experiment 'nope', but cores-rank4, tied-rank1, tied-rank4"):
        main(str(tmp_path), "nope", [])
