"""Adapters inside ComfyUI: what its nodes do, on any objects with the names that ComfyUI gives its own.

Nothing of ComfyUI is imported here, and no weight of its models is copied or changed: attentions get another forward by
the object patches of a `ModelPatcher`, which ComfyUI sets and takes back itself. The nodes are in integrations/comfyui.
"""
