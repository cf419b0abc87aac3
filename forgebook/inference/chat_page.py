"""The page of `serve --ui`: one HTML file that asks this endpoint and nothing else.

The page itself needs no key, as it holds nothing secret; its requests do. Its content security policy lets it run the
one script and the one style sheet that it contains, connect to this server, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

__all__ = ["read_page", "respond"]

PAGE = Path(__file__).with_name("chat_page.html")


@cache
def read_page() -> tuple[str, str]:
    """Read the page; return it and its content security policy."""
    html = PAGE.read_text(encoding="utf-8")
    allowed = {}
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        allowed[tag] = f"{tag}-src 'sha256-{digest}'"
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return html, f"default-src 'none'; {allowed['script']}; {allowed['style']}; {rest}"


async def respond(request: Request) -> Response:
    """Answer GET / with the page."""
    html, policy = read_page()
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
    }
    return HTMLResponse(html, headers=headers)
