"""The settings of the page."""

from dataclasses import dataclass

from comcat_diffusion.config import Group, option, require


@dataclass(frozen=True, kw_only=True)
class UiConfig(Group):
    """The page"""

    output_dir: str = option("studio", "Folder for adapters and pictures, each run in one of its own.")
    host: str = option("127.0.0.1", "Address to listen at. Default: this machine alone; 0.0.0.0 lets others in.")
    port: int = option(7860, "Port to listen at.")
    open_browser: bool = option(False, "Open the page in a browser.")

    def check(self) -> None:
        """The port is one."""
        require(0 < self.port < 65536, f"--port must be 1 to 65535, not {self.port}.")
