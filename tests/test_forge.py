"""The panel for Forge, without it: what it does with what goes wrong, and with the PEFT that Forge pins."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from comcat_diffusion.comfy import forge

SCRIPT = Path(__file__).parents[1] / "integrations" / "forge" / "scripts" / "comcat.py"
OLDER = """
import sys

import diffusers
import peft
import peft.utils

sys.modules["peft.utils.hotswap"] = None
del peft.utils.register_peft_method, peft.utils.other.get_pattern_key
del peft.config.PeftConfigMixin.__post_init__

from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.comfy import forge

assert ComcatConfig(r=2).alpha == 2.0
"""


@pytest.fixture
def panel(monkeypatch, tmp_path):
    """The script as Forge loads it; its models are in `tmp_path`."""
    modules = types.ModuleType("modules")
    modules.paths = types.SimpleNamespace(models_path=str(tmp_path))
    modules.scripts = types.SimpleNamespace(Script=object, AlwaysVisible=object())
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    spec = importlib.util.spec_from_file_location("comcat_panel", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found.Comcat()


class Unet:
    """Forge's patcher, as far as `refuse` and the script see it."""

    def __init__(self, options):
        self.model_options = options

    def clone(self):
        """One more."""
        return Unet(dict(self.model_options))


@pytest.mark.parametrize("error", [ValueError("a wrong base"), AttributeError("nobody thought of this")])
def test_whatever_goes_wrong_stops_the_picture(panel, monkeypatch, error):
    def load(*arguments):
        raise error

    monkeypatch.setattr(forge, "load", load), monkeypatch.setattr(forge, "listen", lambda model: None)
    unet = Unet({})
    drawing = types.SimpleNamespace(extra_generation_params={}, sd_model=types.SimpleNamespace())
    drawing.sd_model.forge_objects = types.SimpleNamespace(unet=unet)
    panel.process_before_every_sampling(drawing, ["dog.safetensors"], 1.0)
    made = drawing.sd_model.forge_objects.unet
    assert not unet.model_options and drawing.extra_generation_params == {"COMCAT": "dog.safetensors:1.0"}
    with pytest.raises(type(error), match=str(error)):
        made.model_options["conditioning_modifiers"][0]()
    panel.process_before_every_sampling(drawing, [], 1.0)
    assert drawing.sd_model.forge_objects.unet is made


@pytest.mark.slow
def test_it_runs_beside_an_older_peft_which_forge_puts_back_at_every_start():
    ran = subprocess.run([sys.executable, "-c", OLDER], capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-2000:]
