"""A hub on the loopback address: as much of the Hugging Face hub's protocol as a folder takes, there and back."""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Hub:
    """Model repositories by id: which are private, and the files of each."""

    token: str  # whose bearer may write, and read what is private
    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    pause: float = 0.0  # seconds before every piece of 100,000 bytes, as of a slow line


@contextmanager
def running(token: str) -> Iterator[Hub]:
    """A hub that listens for as long as the block lasts."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_HandlerOfHub", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Leave the terminal alone."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._known():
            self._tell({"error": "Who are you?"}, 401)
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            repo = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            self.hub.files.setdefault(repo, {})
            self.hub.private[repo] = bool(told.get("private") or told.get("visibility") == "private")
            self._tell({"url": f"{self.hub.address}/{repo}"})
        elif self.path == "/api/validate-yaml":
            self._tell({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = [one["path"] for one in json.loads(body)["files"]]
            self._tell({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        else:
            self._commit([json.loads(line)["value"] for line in body.splitlines()])

    def do_GET(self) -> None:
        files, private = self.hub.files.get(self._repo()), self.hub.private.get(self._repo())
        if files is None or (private and not self._known()):
            self._tell({"error": "Repository not found"}, 404)  # as of a private one, which is not betrayed
        elif "/resolve/" in self.path:
            content = files[self.path.partition("/resolve/")[2].partition("/")[2]]
            self._send(content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": self._commit_id()})
        elif "/tree/" in self.path:
            self._tell([{"type": "file", "path": p, "size": len(c), "oid": _digest(c)} for p, c in files.items()])
        else:
            found = [{"rfilename": path} for path in files]
            self._tell({"id": self._repo(), "sha": self._commit_id(), "private": private, "siblings": found})

    do_HEAD = do_GET

    def _commit(self, operations: list[dict]) -> None:
        written = {one["path"]: base64.b64decode(one["content"]) for one in operations if "content" in one}
        self.hub.files[self._repo()] |= written
        commit = self._commit_id()
        self._tell({"commitUrl": f"{self.hub.address}/{self._repo()}/commit/{commit}", "commitOid": commit})

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self) -> str:
        return "/".join(self.path.removeprefix("/api/models").split("/")[1:3])

    def _commit_id(self) -> str:
        return _digest(repr(sorted(self.hub.files[self._repo()].items())).encode())

    def _tell(self, what: object, status: int = 200) -> None:
        self._send(json.dumps(what).encode(), {"Content-Type": "application/json"}, status)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(content), 100_000):
                time.sleep(self.hub.pause)
                self.wfile.write(content[start : start + 100_000])


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
