"""The recipe of the embedded base: a small Stable Diffusion trained from scratch on scenes drawn here."""
