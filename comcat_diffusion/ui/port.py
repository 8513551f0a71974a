"""Whether the page can be served where it is asked for. Nothing here waits for gradio."""

import errno
import os
import socket

from comcat_diffusion.ui.config import UiConfig

_LARGEST = 65535


def refuse_taken(config: UiConfig) -> None:
    """Raise OSError, in one sentence, unless this host and port can be listened at."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            if os.name == "posix":  # a page that has just ended does not count; elsewhere this would share the port
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except socket.gaierror as error:
        raise OSError(f"--host {config.host} is no address ({error.strerror}).") from error
    except OSError as error:
        raise OSError(error.errno, _reason(config, error)) from error


def address_of(config: UiConfig) -> str:
    """What to write into a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def _reason(config: UiConfig, error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {config.host} is no address of this machine."
    if error.errno == errno.EADDRINUSE:
        other = config.port + 1 if config.port < _LARGEST else config.port - 1
        return f"Port {config.port} is taken: name another one, for instance --port {other}."
    return f"Port {config.port} cannot be had ({error.strerror}): name another one with --port."
