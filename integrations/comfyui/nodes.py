"""The nodes: each a few lines over `comcat_diffusion.comfy`, in ComfyUI's older form and, below, its current one.

ComfyUI takes the older mappings where it finds both, so every version that people run shows the same five nodes.
"""

from pathlib import Path

import folder_paths

from comcat_diffusion.comfy.load import encode, keep_background, load, regions, save_lora

_CATEGORY = "COMCAT"
_FOLDER = "comcat"  # ComfyUI/models/comcat; adapters among the LoRAs are offered too


def _register() -> None:
    folder = str(Path(folder_paths.models_dir) / _FOLDER)
    folder_paths.add_model_folder_path(_FOLDER, folder)
    for path in folder_paths.get_folder_paths("loras"):
        folder_paths.add_model_folder_path(_FOLDER, path)
    paths, _ = folder_paths.folder_names_and_paths[_FOLDER]
    folder_paths.folder_names_and_paths[_FOLDER] = (paths, {".safetensors"})


_register()


def _files() -> list[str]:
    return folder_paths.get_filename_list(_FOLDER)


def _path(name: str) -> str:
    return folder_paths.get_full_path_or_raise(_FOLDER, name)


class LoadAdapter:
    """Load COMCAT adapter"""

    DESCRIPTION = "Puts an adapter on a model and its CLIP. A wrong base is refused; several of these chain."
    CATEGORY, FUNCTION, RETURN_TYPES = _CATEGORY, "run", ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "trigger")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        any_weights = {"default": False, "tooltip": "Also on a fine-tune of the base that it was trained on."}
        needed = {"model": ("MODEL",), "clip": ("CLIP",), "adapter": (_files(),), "strength": ("FLOAT", strength)}
        return {"required": needed, "optional": {"any_weights": ("BOOLEAN", any_weights)}}

    def run(self, model: object, clip: object, adapter: str, strength: float, any_weights: bool = False) -> tuple:
        """The node's work."""
        model, clip, header = load(model, clip, _path(adapter), strength, any_weights)
        return model, clip, header.notes.phrase


class TextEncode:
    """COMCAT text encode"""

    DESCRIPTION = "A prompt for adapters that wait for a word; BREAK parts it into chunks that are encoded alone."
    CATEGORY, FUNCTION, RETURN_TYPES = _CATEGORY, "run", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"clip": ("CLIP",), "text": ("STRING", {"multiline": True, "dynamicPrompts": True})}}

    def run(self, clip: object, text: str) -> tuple:
        """The node's work."""
        return (encode(clip, text),)


class Regions:
    """COMCAT regions"""

    DESCRIPTION = "Lets adapters, by their files' names without the ending, act where their masks are white only."
    CATEGORY, FUNCTION, RETURN_TYPES = _CATEGORY, "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        one, two = ("STRING", {"default": ""}), ("MASK",)
        needed = {"model": ("MODEL",), "first": one, "first_mask": two}
        return {"required": needed, "optional": {"second": one, "second_mask": two, "third": one, "third_mask": two}}

    def run(self, model: object, first: str, first_mask: object, **others: object) -> tuple:
        """The node's work."""
        masks = [(first, first_mask)]
        for name in ("second", "third"):
            if others.get(name) and others.get(f"{name}_mask") is not None:
                masks.append((others[name], others[f"{name}_mask"]))
        return (regions(model, [(name.strip(), mask.reshape(-1, *mask.shape[-2:])[0]) for name, mask in masks]),)


class KeepBackground:
    """COMCAT keep background"""

    DESCRIPTION = (
        "Lets adapters act only where the model looks at their subject's words: all around it is the base's own "
        "picture. Put it after the adapters; it draws twice, first the base alone, in twice the time."
    )
    CATEGORY, FUNCTION, RETURN_TYPES = _CATEGORY, "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "keep": ("BOOLEAN", {"default": True})}}

    def run(self, model: object, keep: bool) -> tuple:
        """The node's work."""
        return (keep_background(model, keep),)


class SaveLora:
    """COMCAT save as LoRA"""

    DESCRIPTION = "Writes an adapter that acts everywhere as a LoRA that every program reads, beside the LoRAs."
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = _CATEGORY, "run", ("STRING",), True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        name = {"default": "my-lora", "tooltip": "Name of the file, without .safetensors."}
        return {"required": {"model": ("MODEL",), "adapter": (_files(),), "name": ("STRING", name)}}

    def run(self, model: object, adapter: str, name: str) -> dict:
        """The node's work."""
        if not name.strip() or Path(name).name != name.strip():
            raise ValueError(f"'{name}' is no name of a file: write one without folders.")
        target = Path(folder_paths.get_folder_paths("loras")[0]) / f"{name.strip()}.safetensors"
        if target.exists():
            raise ValueError(f"{target.name} is among the LoRAs already: choose another name.")
        target.parent.mkdir(parents=True, exist_ok=True)
        files = [str(path) for path in save_lora(model, _path(adapter), target)]
        return {"ui": {"text": files}, "result": (files[0],)}


_NODES = {"ComcatLoadAdapter": LoadAdapter, "ComcatTextEncode": TextEncode, "ComcatRegions": Regions}
_NODES |= {"ComcatKeepBackground": KeepBackground, "ComcatSaveLora": SaveLora}
NODE_CLASS_MAPPINGS = _NODES
NODE_DISPLAY_NAME_MAPPINGS = {name: node.__doc__ for name, node in _NODES.items()}


# The current form: a schema made of the older one's, so that the two cannot differ


async def comfy_entrypoint() -> object:
    """ComfyUI's entry for nodes in its current form."""
    from comfy_api.latest import ComfyExtension

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list:
            return [_current(name, node) for name, node in _NODES.items()]

    return Extension()


def _current(node_id: str, node: type) -> type:
    """A node in ComfyUI's current form."""
    from comfy_api.latest import io

    kinds = {"MODEL": io.Model, "CLIP": io.Clip, "CONDITIONING": io.Conditioning, "STRING": io.String, "MASK": io.Mask}
    kinds |= {"FLOAT": io.Float, "BOOLEAN": io.Boolean}

    def inputs() -> list:
        found = []
        for need, fields in node.INPUT_TYPES().items():
            for name, (kind, *more) in fields.items():
                settings = {"optional": need == "optional", **_renamed(more[0] if more else {})}
                made = io.Combo.Input(name, options=kind, **settings) if isinstance(kind, list) else None
                found.append(made or kinds[kind].Input(name, **settings))
        return found

    class Current(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                display_name=node.__doc__,
                category=_CATEGORY,
                description=node.DESCRIPTION,
                inputs=inputs(),
                outputs=[kinds[kind].Output() for kind in node.RETURN_TYPES],
                is_output_node=getattr(node, "OUTPUT_NODE", False),
            )

        @classmethod
        def execute(cls, **given: object) -> io.NodeOutput:
            made = node().run(**given)
            return io.NodeOutput(*made["result"], ui=made["ui"]) if isinstance(made, dict) else io.NodeOutput(*made)

    Current.__name__ = node_id
    return Current


def _renamed(settings: dict) -> dict:
    """The older form's settings under the names of the current one."""
    names = {"dynamicPrompts": "dynamic_prompts"}
    return {names.get(name, name): value for name, value in settings.items()}
