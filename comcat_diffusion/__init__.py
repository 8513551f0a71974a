"""Personalize Stable Diffusion with COMCAT adapters, and compress attention-based vision models."""
