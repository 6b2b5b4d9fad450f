"""What protects the server and its page: limits of a request, the names it may use, headers of every response."""

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import json
import re
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse

from config import UserError

MAX_BODY = 2**16  # bytes
BODY_SECONDS = 10  # to send them in


def security_headers(page: str) -> list[tuple[bytes, bytes]]:
    """Headers of every response: the page may run its own script and style, and nothing from elsewhere."""
    def hashed(tag: str) -> str:
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode()}'"

    policy = (f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
              "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return [(b"content-security-policy", policy.encode()), (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"), (b"cross-origin-resource-policy", b"same-origin"),
            (b"cache-control", b"no-store")]


class Guard:
    """Refuses requests that name another host, as those of a foreign page whose name was rebound to this address do,
    and adds the security headers to every response."""

    def __init__(self, app: Any, host: str, port: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.app, self.host, self.port, self.headers = app, host, port, headers

    def knows(self, named: str) -> bool:
        name, _, port = named.rpartition(":") if re.search(r":\d+$", named) else (named, ":", "80")
        name = name.strip("[]").lower()
        if self.host in ("0.0.0.0", "::"):  # any address of this machine: an address cannot be rebound, a name can
            with contextlib.suppress(ValueError):
                return bool(ipaddress.ip_address(name)) and port == str(self.port)
        return name in ("127.0.0.1", "localhost", "::1", self.host.lower()) and port == str(self.port)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        named = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] == "http" and not self.knows(named):
            return await refuse(421, "this server has another name: use the address that it printed")(
                scope, receive, send_with_headers)
        await self.app(scope, receive, send_with_headers)


def refuse(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


async def read_json(request: Request) -> dict[str, Any]:
    """The body of a request. Raises HTTPException."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected the content type application/json")  # no form of a foreign page can send it

    async def read() -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"the request has more than {MAX_BODY:,} bytes")
        return body

    try:
        values = json.loads(await asyncio.wait_for(read(), BODY_SECONDS))
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the request took more than {BODY_SECONDS} seconds to arrive") from None
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON in UTF-8") from None
    if not isinstance(values, dict):
        raise UserError("expected a JSON object, such as {\"prompt\": \"One day\"}")
    return {name: value for name, value in values.items() if value is not None}
