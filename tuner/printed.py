"""Keeps what is worth keeping of what a worker says: compilers print megabytes where they fail."""

import re

MESSAGE_LIMIT = 2000  # characters of a trial's message
TAIL_BYTES = 1000
_LINE_BYTES = 300
_TELLING = re.compile(rb"error: |Assertion |LLVM ERROR|bad_alloc|terminate called")


class Printed:
    """The end of a stream, and the first line in it that tells of an error."""

    def __init__(self) -> None:
        self.bytes = 0
        self._tail = self._told = self._open = b""

    def feed(self, chunk: bytes) -> None:
        self.bytes += len(chunk)
        self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        if self._told:
            return
        text = self._open + chunk
        found = _TELLING.search(text)
        if found is not None:
            first = max(text.rfind(b"\n", 0, found.start()) + 1, found.start() - _LINE_BYTES // 2)
            self._told = text[first : first + _LINE_BYTES].partition(b"\n")[0].strip()
        self._open = text.rpartition(b"\n")[2][-_LINE_BYTES:]  # a line may go on in the next chunk

    def __str__(self) -> str:
        """Return the telling line, unless the tail holds it, and the tail; empty where nothing was printed."""
        tail = self._tail.decode(errors="replace").strip()
        if self.bytes > TAIL_BYTES:
            tail = f"... {self.bytes - TAIL_BYTES} bytes left out ...\n{tail}"
        told = self._told.decode(errors="replace")
        return tail if not told or told in tail else f"{told}\n{tail}"


def shortened(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return `text`, where it is too long its beginning and its end, in about `limit` characters."""
    text = text.strip()
    if len(text) <= limit:
        return text
    half = limit // 2 - 25
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
