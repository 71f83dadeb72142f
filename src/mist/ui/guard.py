"""Who may ask: only those who have the token, and change anything only with it in a header too.

Around the whole application, before any route. The token is the first part of every path, so that relative links keep
it; the header can't be sent by another site's page. It never tells why it refuses.
"""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Mist-Token"

_SHUT = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
#: for the page itself: what ships beside it, and nothing inline
PAGE_POLICY = f"{_SHUT}; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'"
#: for reports, which carry their style and script and fetch nothing
REPORT_POLICY = f"{_SHUT}; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
#: where a response says nothing else
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": PAGE_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """ASGI middleware: 403 without the token; with it, the application mounted below it."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the life span, and no web sockets
            await self.app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = {name.lower() for name, _ in message["headers"]}
                more = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *(each for each in more if each[0] not in told)]
            await send(message)

        if self._may(scope):
            await self.app({**scope, "root_path": f"/{self.token}"}, receive, sealed)
        else:
            refusal = PlainTextResponse("Open the address that `mist ui` printed.\n", status_code=403)
            await refusal(scope, receive, sealed)

    def _may(self, scope: Scope) -> bool:
        given = [scope["path"].lstrip("/").partition("/")[0]]
        if scope["method"] not in ("GET", "HEAD"):
            given.append(Headers(scope=scope).get(HEADER, ""))
        return all(secrets.compare_digest(each.encode(), self.token.encode()) for each in given)
