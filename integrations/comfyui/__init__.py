"""COMCAT adapters in ComfyUI: the nodes. What they do is in the package, `comcat_diffusion.comfy`."""

try:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, comfy_entrypoint
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "comcat_diffusion":
        raise
    raise ImportError(
        "The COMCAT nodes need the package comcat-diffusion in ComfyUI's own Python: pip install comcat-diffusion."
    ) from error

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "comfy_entrypoint"]
