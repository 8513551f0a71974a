"""COMCAT adapters in Forge: an extension's script over `comcat_diffusion.comfy.forge`.

Forge logs what a script raises and draws on. So what is wrong is raised again where it samples, and no picture is drawn
as if nothing were.
"""

from pathlib import Path

import gradio as gr
from modules import paths, scripts

from comcat_diffusion.comfy import forge

FOLDER = Path(paths.models_path) / "COMCAT"


def _files() -> list[str]:
    return sorted(path.name for path in FOLDER.glob("*.safetensors"))


class Comcat(scripts.Script):
    """Adapters of models/COMCAT on the model that draws."""

    def title(self) -> str:
        """What the panel is called."""
        return "COMCAT adapters"

    def show(self, is_img2img: bool) -> object:
        """In every tab."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list:
        """Files and one strength."""
        with gr.Accordion(self.title(), open=False):
            files = gr.Dropdown(_files(), multiselect=True, label="Adapters (models/COMCAT)")
            strength = gr.Slider(0.0, 2.0, 1.0, step=0.05, label="Strength")
        return [files, strength]

    def process(self, p: object, files: list[str], strength: float, *others: object) -> None:
        """Before prompts are encoded: remember what they say. What was encoded before is encoded again."""
        if files and not hasattr(p.sd_model, "comcat_memory"):
            forge.listen(p.sd_model)
            p.clear_prompt_cache()

    def process_before_every_sampling(
        self, p: object, files: list[str], strength: float, *others: object, **more: object
    ) -> None:
        """Put the adapters on the model of this sampling; Forge takes the next one's afresh."""
        unet = p.sd_model.forge_objects.unet
        try:
            for name in files or ():
                unet, _ = forge.load(unet, forge.listen(p.sd_model), FOLDER / name, strength)
        except Exception as error:  # whatever it is: no picture without what was asked for
            unet = forge.refuse(unet, error)
        p.sd_model.forge_objects.unet = unet
        if files:
            p.extra_generation_params["COMCAT"] = ", ".join(f"{name}:{strength}" for name in files)
