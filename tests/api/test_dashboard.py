"""The page of tuned problems, and the words and figures in it."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, SDPA, TILED, answer

import tilewise.api.app
from tilewise.api import describe
from tilewise.api.assets import asset_url
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.problem import Pass, Problem

STATIC = Path(tilewise.api.app.__file__).with_name("static")


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def put(database: Database, *answers: Answer) -> None:
    with database.write() as session:
        for one in answers:
            assert AnswerRepository(session).replace(one, expected_version=0, reason="test")


def get(client: TestClient, **query: str | int) -> Page:
    reply = client.get("/problems", params=query)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    return Page(reply.text)


def order(page: Page) -> list[int]:
    return [int(found) for found in re.findall(r"batch (\d+),", page.text)]


def batches(count: int) -> list[Answer]:
    return [
        dataclasses.replace(answer(dataclasses.replace(PROBLEM, batch=n)), expected_ms=float(n))
        for n in range(1, count + 1)
    ]


def test_an_empty_database_says_what_to_run(client: TestClient) -> None:
    page = get(client)
    assert "Nothing has been tuned yet" in page.text
    assert "tilewise tune --model deepseek_v3" in page.text
    assert page.all("table") == []


def test_a_row_says_what_won_and_by_how_much(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer())
    page = get(client)
    assert [time["datetime"] for time in page.all("time")] == ["2026-11-22T12:00:00+00:00"]
    for words in (
        "Causal multi-head, window 256, fp16 inference",
        "batch 1, 8 heads, 2,048 tokens, head_dim 64",
        PROBLEM.key,
        DEVICE,
        "cpu_tiled",
        "block_k=128 block_q=128 heads_per_chunk=4",
        "10.0",
        "9.80 to 10.3",
        "30.0",
        "3.00\N{MULTIPLICATION SIGN}",
        "1 failed",
    ):
        assert words in page.text
    assert f" {PROBLEM.forward_flops / 10e-3 / 1e12:.3g} " in page.text
    assert [cell["data-label"] for cell in page.all("td")][-1] == "Measured"


def test_the_table_can_be_read_by_a_screen_reader(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer())
    page = get(client)
    assert len(page.all("caption")) == 1
    assert [cell["scope"] for cell in page.all("th")] == ["col"] * 9 + ["row"]
    assert [cell["aria-sort"] for cell in page.all("th") if "aria-sort" in cell] == ["descending"]
    assert len(page.all("input")) == len(page.all("label")) == 1


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer())
    reply = client.get("/problems")
    page = Page(reply.text)
    assert [script["src"] for script in page.all("script")] == [asset_url("main.js")]
    assert page.all("style") == []
    for _, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        for name in ("href", "src", "action"):
            assert (attributes.get(name) or "/").startswith(("/", "?", "#"))
            assert not (attributes.get(name) or "").startswith("//")
    for file in STATIC.iterdir():
        assert "://" not in file.read_text().replace("http://www.w3.org/2000/svg", "")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in (asset_url("style.css"), asset_url("plotly.min.js"), "/healthz", "/v1/nothing"):
        headers = client.get(path).headers
        assert (headers["x-content-type-options"], headers["content-security-policy"]) == ("nosniff", policy)


def test_what_others_wrote_is_escaped(client: TestClient, sqlite: Database) -> None:
    evil = Candidate.of("<script>alert(1)</script>", forward=Config.of("k", name='"><img src=x>'))
    put(sqlite, dataclasses.replace(answer(), plan=Plan(evil)))
    page = get(client, q='<script>"')
    assert page.all("script")[1:] == page.all("img")[1:] == []
    page = get(client)
    assert "<script>alert(1)</script>" in page.text
    assert page.all("script")[1:] == page.all("img")[1:] == []


@pytest.mark.parametrize(
    ("sort", "expected"),
    [("expected", [1, 2, 3]), ("-expected", [3, 2, 1]), ("-speedup", [1, 2, 3]), ("-tflops", [1, 2, 3])],
)
def test_the_order_is_in_the_url(client: TestClient, sqlite: Database, sort: str, expected: list[int]) -> None:
    put(sqlite, *batches(3))
    page = get(client, sort=sort)
    direction = "descending" if sort.startswith("-") else "ascending"
    assert [cell["aria-sort"] for cell in page.all("th") if "aria-sort" in cell] == [direction]
    if sort != "-tflops":  # the same at every batch, but for rounding
        assert order(page) == expected


def test_a_click_on_the_sorted_heading_turns_the_order(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer())
    links = [link["href"] for link in get(client, sort="expected", q="fp16").all("a")]
    assert "/problems?q=fp16&sort=-expected" in links
    assert "/problems?q=fp16&sort=-speedup" in links


def test_pages_keep_search_and_order(client: TestClient, sqlite: Database) -> None:
    put(sqlite, *batches(51))
    first = get(client, q="fp16", sort="expected")
    assert order(first) == list(range(1, 51))
    assert "1 to 50 of 51" in first.text
    following = [link["href"] for link in first.all("a") if link.get("rel") == "next"]
    assert following == ["/problems?q=fp16&sort=expected&page=2"]
    second = Page(client.get(str(following[0])).text)
    assert order(second) == [51]
    assert [link["href"] for link in second.all("a") if link.get("rel") == "prev"] == ["/problems?q=fp16&sort=expected"]


def test_a_search_without_result_says_so(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer())
    page = get(client, q="bf16")
    assert "Nothing found" in page.text
    assert [field["value"] for field in page.all("input")] == ["bf16"]


@pytest.mark.parametrize(
    "query", [{"page": "0"}, {"page": "-1"}, {"page": "99"}, {"page": "9" * 99}, {"page": "x"}, {"sort": "; DROP"}]
)
def test_a_query_that_makes_no_sense_shows_the_list(
    client: TestClient, sqlite: Database, query: dict[str, str | int]
) -> None:
    put(sqlite, answer())
    assert order(get(client, **query)) == [1]


@pytest.mark.parametrize(
    ("problem", "title", "sizes"),
    [
        (
            Problem(pass_=Pass.TRAINING, batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128),
            "Grouped-query, fp16 training",
            "batch 1, 64/8 heads, 4,096 tokens, head_dim 128",
        ),
        (
            Problem(batch=32, heads=32, kv_heads=1, q_len=1, kv_len=8192, head_dim=128, alibi=True, page_size=16),
            "Multi-query, ALiBi, pages of 16, fp16 inference",
            "batch 32, 32/1 heads, 1 on 8,192 tokens, head_dim 128",
        ),
        (
            Problem(batch=1, heads=128, q_len=2048, head_dim=192, v_head_dim=128, causal=True),
            "Causal latent (MLA), fp16 inference",
            "batch 1, 128 heads, 2,048 tokens, head_dim 192/128",
        ),
        (
            Problem(batch=1, heads=8, q_len=64, head_dim=64, window=(-1, 3), mask="bias.b1h1", dropout=True),
            "Multi-head, window all back, 3 ahead, additive bias (b1h1), dropout, fp16 inference",
            "batch 1, 8 heads, 64 tokens, head_dim 64",
        ),
    ],
)
def test_problems_in_words(problem: Problem, title: str, sizes: str) -> None:
    assert (describe.title(problem), describe.sizes(problem)) == (title, sizes)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, describe.NOTHING),
        (float("inf"), describe.NOTHING),
        (0.0, "0"),
        (0.012345, "0.0123"),
        (0.9999, "1.00"),
        (9.996, "10.0"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
    ],
)
def test_figures_have_three_digits(value: float | None, shown: str) -> None:
    assert describe.figure(value) == shown


def test_lengths_that_vary_show_no_tflops(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer(PROBLEM))
    assert f" {describe.NOTHING} " not in get(client).text
    put(sqlite, answer(dataclasses.replace(PROBLEM, varlen=True)))
    assert f" {describe.NOTHING} " in get(client).text


def test_training_shows_no_tflops_and_both_candidates(client: TestClient, sqlite: Database) -> None:
    training = dataclasses.replace(PROBLEM, pass_=Pass.TRAINING)
    both = Candidate.of("triton", dkdv=Config.of("k", block=64), dq=Config.of("k", block=32))
    put(sqlite, dataclasses.replace(answer(training), plan=Plan(TILED, both), runner_up=SDPA))
    page = get(client)
    assert "forward cpu_tiled" in page.text
    assert "backward triton dkdv: block=64 dq: block=32" in page.text
    assert f" {describe.NOTHING} " in page.text
