"""The body of a server's answer, read whole or not at all: a server may send without end, or a bomb of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2


class BodyTooLarge(Exception):
    """The server sends more than any answer to such a request holds."""


async def read_body(response: httpx2.Response, most_bytes: int) -> httpx2.Response:
    """The response with its body in memory, unpacked; what stands after ``most_bytes`` is never fetched.

    Args:
        response: of a request that was sent with ``stream=True``; it is closed in any case.
        most_bytes: of the body as it is after any compression.

    Raises: BodyTooLarge; httpx2.RequestError as reading does.
    """
    import httpx2

    parts: list[bytes] = []
    size = 0
    try:
        async for part in response.aiter_bytes():
            size += len(part)
            if size > most_bytes:
                raise BodyTooLarge(f"its body is longer than {most_bytes / 2**20:g} MiB")
            parts.append(part)
    finally:
        await response.aclose()
    unpacked = [
        (name, value)
        for name, value in response.headers.multi_items()
        if name not in ("content-encoding", "content-length", "transfer-encoding")
    ]
    return httpx2.Response(
        response.status_code,
        headers=unpacked,
        content=b"".join(parts),
        request=response.request,
    )
