"""The page in the browser: what `comcat train` and `comcat generate` do, behind forms made from their settings."""
