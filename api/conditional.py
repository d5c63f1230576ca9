"""ETag and If-None-Match (RFC 9110, 13.1.2)."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TAG = re.compile(r'(?:W/)?"([^"]*)"')

not_modified: dict[int | str, dict[str, Any]] = {304: {"description": "What the asker has is still right."}}


def tag_of(content: bytes | str) -> str:
    """Return the ETag of a body, or of the id that changes with it; weak, for the body goes out plain and gzipped."""
    return f'W/"{content if isinstance(content, str) else hashlib.sha256(content).hexdigest()}"'


def conditional(
    body: bytes,
    if_none_match: str | None,
    *,
    tag: str,
    media_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return `body` with its ETag `tag`, or 304 without it when the asker has it already."""
    own = {"ETag": tag, "Cache-Control": "no-cache", **(headers or {})}
    known = _TAG.findall(if_none_match or "")
    if if_none_match is not None and (if_none_match.strip() == "*" or set(_TAG.findall(tag)) & set(known)):
        own.pop("Content-Encoding", None)
        return Response(status_code=304, headers=own)
    return Response(body, headers=own, media_type=media_type)
