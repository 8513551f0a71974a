"""Which versions wrote a file."""

from importlib.metadata import version

from comcat_diffusion import __version__


def versions_with(*libraries: str) -> dict[str, str]:
    """Ours, also where the package runs from a clone that was never installed, and those of other libraries."""
    return {"comcat-diffusion": __version__} | {name: version(name) for name in libraries}
