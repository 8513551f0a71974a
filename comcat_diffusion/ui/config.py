"""The settings of the page."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from comcat_diffusion.config import Group, option, require

_ADDRESS = re.compile(r"https://[A-Za-z0-9.-]+(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class UiConfig(Group):
    """The page"""

    output_dir: str = option("studio", "Folder for images, runs, adapters and pictures.")
    host: str = option("127.0.0.1", "Address to listen at. Default: this machine alone; 0.0.0.0 lets others in.")
    port: int = option(7860, "Port to listen at.")
    open_browser: bool = option(False, "Open the page in a browser.")
    auth: str | None = option(None, "NAME:PASSWORD that whoever comes has to give.")
    token: str | None = option(None, "A word that the page's address has to hold, as in http://...?token=WORD.")
    draw_only: bool = option(
        False, "Offer drawing with the adapters in --output_dir alone, to everybody: no training, no files brought."
    )
    framed_by: str | None = option(
        None, "An https address whose pages may show this one in a frame, with --draw_only. Default: none may."
    )
    allow_paths: list[str] = option(
        [], "Folders of this machine whose bases, adapters and pictures the page may name. Default: --output_dir alone."
    )

    def check(self) -> None:
        """The port is one, and who may come is said where others can."""
        require(0 < self.port < 65536, f"--port must be 1 to 65535, not {self.port}.")
        name, colon, password = (self.auth or "a:b").partition(":")
        require(bool(name and colon and password), "--auth must be NAME:PASSWORD, with a colon between the two.")
        word = self.token if self.token is not None else "word"
        require(bool(word) and word.isascii() and word.isalnum(), "--token must be letters and digits, at least one.")
        require(
            self.is_local or self.draw_only or bool(self.auth or self.token),
            f"--host {self.host} lets everybody who reaches this machine train, draw, use its memory and its disk, and "
            f"see what is in {self.output_dir}: say who may come by --auth NAME:PASSWORD or --token WORD.",
        )
        if self.framed_by is not None:
            told = f"--framed_by must be an address such as https://example.org, not {self.framed_by}."
            require(bool(_ADDRESS.fullmatch(self.framed_by)), told)
            told = "--framed_by goes with --draw_only: in a frame, clicks can be of another page's making."
            require(self.draw_only, told)
        for path in self.allow_paths:
            require(Path(path).expanduser().exists(), f"--allow_paths: there is no {path}.")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
