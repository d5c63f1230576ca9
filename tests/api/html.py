"""Reading pages in tests."""

from collections.abc import Mapping
from html.parser import HTMLParser

from fastapi.testclient import TestClient

_INSIDE_WORDS = ("wbr", "b", "strong", "a", "q")
BROWSER = {"Accept": "text/html,application/xhtml+xml"}


class Page(HTMLParser):
    """The parts of a page that the tests look at: its tags with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INSIDE_WORDS:
            self.text += " "
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def links(self) -> list[str]:
        return [link["href"] or "" for link in self.all("a")]


def get(client: TestClient, path: str, query: Mapping[str, str | int] | None = None, *, status: int = 200) -> Page:
    """Return a page as a browser asks for it."""
    reply = client.get(path, params=query or {}, headers=BROWSER)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "text/html; charset=utf-8")
    return Page(reply.text)
