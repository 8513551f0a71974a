"""Who asks: nobody from elsewhere unless they may, and everybody by a cookie, so that a job has an owner.

What changes something is done only for the page itself: a request that another site's page made a browser send (its
`Origin` is another, or its `Host` is a name that somebody else gave to this machine) is refused.
"""

import base64
import hashlib
import hmac
import re
import secrets
from http.cookies import SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comcat_diffusion.ui import sentences, texts
from comcat_diffusion.ui.config import UiConfig

COOKIE, KEY = "studio", "studio_key"
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")
_HERE = ("localhost", "127.0.0.1", "::1")
# Nothing is loaded but from here, whatever stands in a name, a caption or a file of somebody else.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


def owner_of(secret: str) -> str:
    """How files name the holder of a cookie: what is read from them gives nobody the cookie."""
    return hashlib.sha256(secret.encode()).hexdigest()[:16]


class Visitors:
    """Lets an application answer those who may ask, and says in `scope["owner"]` who it is."""

    def __init__(self, app: ASGIApp, config: UiConfig) -> None:
        self.app, self.config = app, config
        framed_by = config.framed_by or "'none'"
        policy = POLICY.replace("frame-ancestors 'none'", f"frame-ancestors {framed_by}")
        self.headers = (*_HEADERS, (b"content-security-policy", policy.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        cookies = {name: morsel.value for name, morsel in _cookies(headers.get("cookie", "")).items()}
        refusal = self._refusal(scope, headers, cookies)
        if refusal is not None:
            return await refusal(scope, receive, send)
        secret, new = cookies.get(COOKIE, ""), []
        if not _SECRET.fullmatch(secret):
            secret = secrets.token_urlsafe(32)
            new.append(_set_cookie(COOKIE, secret, bool(self.config.framed_by)))
        scope["owner"] = owner_of(secret)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers, *new]
            await send(message)

        return await self.app(scope, receive, told)

    def _refusal(self, scope: Scope, headers: dict[str, str], cookies: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        if self.config.is_local and _name(host) not in (*_HERE, self.config.host):
            return _said(headers, 403, "This page is served to its own machine alone.")
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and (origin is None or urlsplit(origin).netloc != host):
            return _said(headers, 403, "This was not asked by the page itself.")
        if self.config.auth and _is(_basic(headers.get("authorization", "")), self.config.auth):
            return None
        if self.config.token:
            if _is(cookies.get(KEY, ""), _key(self.config.token)):
                return None
            if _is(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0], self.config.token):
                answer = RedirectResponse(scope["path"], 303)  # so that the word does not stay in the address
                answer.headers["set-cookie"] = _set_cookie(KEY, _key(self.config.token))[1].decode()
                return answer
        if self.config.auth:
            return PlainTextResponse("Name and password, please.", 401, {"WWW-Authenticate": 'Basic realm="studio"'})
        if self.config.token:
            return _said(headers, 403, "Open the address that comcat ui printed, with ?token= and its word.")
        return None


def _said(headers: dict[str, str], status: int, message: str) -> Response:
    """A sentence: as text to somebody who opens the page, as JSON to what asks in its name."""
    language = texts.asked_language(headers.get("accept-language", ""))
    message = sentences.said(message, language)
    if "text/html" in headers.get("accept", ""):
        return PlainTextResponse(message, status)
    return JSONResponse({"message": message}, status)


def _is(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(), known.encode())


def _key(token: str) -> str:
    return hashlib.sha256(f"studio {token}".encode()).hexdigest()


def _cookies(header: str) -> SimpleCookie:
    try:
        return SimpleCookie(header)
    except Exception:  # http.cookies.CookieError of what is none
        return SimpleCookie()


def _set_cookie(name: str, value: str, framed: bool = False) -> tuple[bytes, bytes]:
    """In a frame of another site, browsers keep only cookies that ask to be that site's alone."""
    where = "SameSite=None; Secure; Partitioned" if framed else "SameSite=Lax"
    return (b"set-cookie", f"{name}={value}; Path=/; HttpOnly; {where}; Max-Age=31536000".encode())


def _basic(header: str) -> str:
    kind, _, value = header.partition(" ")
    try:
        return base64.b64decode(value, validate=True).decode() if kind.lower() == "basic" else ""
    except ValueError:
        return ""


def _name(host: str) -> str:
    """A Host header's name without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
