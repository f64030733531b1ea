"""The chat page as the server sends it: its bytes, and the headers that keep it harmless.

For the server's route of `/`. Apart because the Content-Security-Policy is a property of the page:
it allows its one script and its one style, by their hashes, and no others.
What a model writes can then run nothing, load nothing and send nothing, whatever the page does
with it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Page:
    """What a request of the page is answered with."""

    html: bytes
    headers: Mapping[str, str]


@cache
def page() -> Page:
    """The page, read once.

    Raises:
        ValueError: index.html has not exactly one script and one style: no policy fits it.
    """
    # Read as text, so that a checkout with other line ends gives the bytes that the browser hashes.
    here = resources.files(__name__)
    html = here.joinpath("index.html").read_text(encoding="utf-8")
    markdown = here.joinpath("markdown.js").read_text(encoding="utf-8")
    html = html.replace("//= markdown.js", markdown)
    policy = (
        "default-src 'none'",
        f"script-src {_hash_of('script', html)}",
        f"style-src {_hash_of('style', html)}",
        "connect-src 'self'",
        "img-src data:",  # the icon in the tab
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Text cannot become markup or script even by mistake: innerHTML and its like throw.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        # A page that stays after the server was upgraded would talk to another server.
        "Cache-Control": "no-cache",
    }
    return Page(html.encode(), headers)


def _hash_of(tag: str, html: str) -> str:
    """The source expression that allows the only such element of the page."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    if len(found) != 1:
        raise ValueError(
            f"server/page/index.html has {len(found)} elements <{tag}>; wanted 1, without "
            "attributes; reinstall bitnet-rs, or put what is needed into the one"
        )
    digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
    return f"'sha256-{digest}'"
