"""ETag and If-None-Match (RFC 9110, 13.1.2)."""

import hashlib
import re
from typing import Any

from starlette.responses import Response

_TAG = re.compile(r'(?:W/)?"([^"]*)"')

not_modified: dict[int | str, dict[str, Any]] = {304: {"description": "What the asker has is still right."}}


def conditional(
    body: bytes, if_none_match: str | None, *, tag: str | None = None, media_type: str = "application/json"
) -> Response:
    """Return `body` with its ETag, or 304 without it when the asker has it already.

    `tag` must change with the body; the body's SHA-256 where it is not given. The ETag is weak, because the same body
    goes out plain and gzipped.
    """
    tag = tag or hashlib.sha256(body).hexdigest()
    headers = {"ETag": f'W/"{tag}"', "Cache-Control": "no-cache"}
    if if_none_match is not None and (if_none_match.strip() == "*" or tag in _TAG.findall(if_none_match)):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)
