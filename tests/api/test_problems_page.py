"""The page of tuned problems: its rows, its view in the URL, its exports, and the words and figures in it."""

import csv
import dataclasses
import io
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer, measurement

import tilewise.api.app
from tilewise.api import describe
from tilewise.api.assets import asset_url
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain.answer import Answer, Finalist
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.problem import Pass, Problem

from . import html
from .html import Page

OTHER = Problem(batch=2, heads=8, q_len=4096, head_dim=128)
DEFAULT = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=64, block_k=64, heads_per_chunk=1))
STATIC = Path(tilewise.api.app.__file__).with_name("static")


def put(database: Database, *answers: Answer) -> None:
    with database.write() as session:
        for one in answers:
            assert AnswerRepository(session).replace(one, expected_version=0, reason="test")


def get(client: TestClient, **query: str | int) -> Page:
    return html.get(client, "/problems", query)


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
    assert f"/problems/{DEVICE}/{PROBLEM.key}" in page.links
    for words in (
        "Causal multi-head, window 256, fp16 inference",
        "batch 1, 8 heads, 2,048 tokens, head_dim 64",
        DEVICE,
        "cpu_tiled",
        "block_k=128 block_q=128 heads_per_chunk=4",
        "10.0",
        "9.80 to 10.3",
        "3.00\N{MULTIPLICATION SIGN}",
        "1 failed",
    ):
        assert words in page.text
    assert f" {PROBLEM.forward_flops / 10e-3 / 1e12:.3g} " in page.text
    assert [cell["data-label"] for cell in page.all("td")][-1] == "Age"


def test_the_table_can_be_read_by_a_screen_reader(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer())
    page = get(client)
    assert len(page.all("caption")) == 1
    assert [cell["scope"] for cell in page.all("th")] == ["col"] * 10 + ["row"]
    assert [cell["aria-sort"] for cell in page.all("th") if "aria-sort" in cell] == ["descending"]
    assert len(page.all("input")) + len(page.all("select")) == len(page.all("label"))


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
    shown = describe.sizes(problem)
    assert (describe.title(problem), shown.replace("\N{NO-BREAK SPACE}", " ")) == (title, sizes)
    assert shown.count(" ") == sizes.count(", "), "it is broken after commas only"


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
    varlen = dataclasses.replace(PROBLEM, varlen=True)
    put(sqlite, answer(PROBLEM), answer(varlen))
    assert describe.tflops(PROBLEM, 2e9, 1.0) == 2
    assert describe.tflops(varlen, 2e9, 1.0) is None
    assert get(client).text.count(f" {PROBLEM.forward_flops / 10e-3 / 1e12:.3g} ") == 1


def test_training_shows_no_tflops_and_both_candidates(client: TestClient, sqlite: Database) -> None:
    training = dataclasses.replace(PROBLEM, pass_=Pass.TRAINING)
    both = Candidate.of("triton", dkdv=Config.of("k", block=64), dq=Config.of("k", block=32))
    put(sqlite, dataclasses.replace(answer(training), plan=Plan(TILED, both), runner_up=SDPA))
    page = get(client)
    assert "forward cpu_tiled" in page.text
    assert "backward triton dkdv: block=64 dq: block=32" in page.text
    assert f" {PROBLEM.forward_flops / 10e-3 / 1e12:.3g} " not in page.text


def test_an_answer_of_older_software_is_stale_and_says_since_when(client: TestClient, sqlite: Database) -> None:
    old = answer(OTHER, software=dataclasses.replace(SOFTWARE, torch="2.12.0"))
    assert old.evidence is not None
    old = dataclasses.replace(
        old, evidence=dataclasses.replace(old.evidence, measured=datetime(2026, 1, 1, tzinfo=UTC))
    )
    put(sqlite, answer(), old)
    page = get(client)
    assert [tag["title"] for tag in page.all("span") if tag.get("class") == "tag doubt"] == ["torch 2.12.0 -> 2.13.0"]
    assert order(get(client, match="stale")) == [OTHER.batch]
    assert order(get(client, match="exact")) == [PROBLEM.batch]


def test_what_the_search_won_over_the_default_config(client: TestClient, sqlite: Database) -> None:
    evidence = answer().evidence
    assert evidence is not None
    default = Finalist(candidate=DEFAULT, measurement=measurement(25, 25 / 30), default=True)
    tuned = dataclasses.replace(
        answer(), evidence=dataclasses.replace(evidence, finalists=(*evidence.finalists, default))
    )
    put(sqlite, tuned, answer(OTHER))
    assert tuned.default_speedup == pytest.approx(2.5)
    assert answer().default_speedup is None
    page = get(client, sort="-default")
    assert order(page) == [PROBLEM.batch, OTHER.batch]  # what has none comes last
    assert "2.50\N{MULTIPLICATION SIGN}" in page.text


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"mask": "window"}, [1]),
        ({"mask": "full"}, [2]),
        ({"mask": "causal"}, [1]),
        ({"mask": "bool"}, []),
        ({"head_dim": "128"}, [2]),
        ({"pass": "inference", "dtype": "fp16"}, [2, 1]),
        ({"backend": "sdpa"}, []),
        ({"device": "h200"}, []),
        ({"q": "d128", "dtype": "fp16"}, [2]),
        # what makes no sense is left out
        ({"mask": "odd"}, [2, 1]),
        ({"head_dim": "wide"}, [2, 1]),
        ({"match": "perfect"}, [2, 1]),
    ],
)
def test_filters_narrow_the_list(
    client: TestClient, sqlite: Database, query: dict[str, str | int], found: list[int]
) -> None:
    put(sqlite, answer(), answer(OTHER))
    page = get(client, sort="-problem", **query)
    assert order(page) == found
    if not found:
        assert "Nothing found" in page.text
        assert "/problems?sort=-problem" in page.links  # without the one filter


def test_filters_stay_when_the_order_changes_and_are_shown(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer(), answer(OTHER))
    page = get(client, mask="window", q="fp16")
    assert "/problems?q=fp16&mask=window&sort=expected" in page.links
    assert [option["value"] for option in page.all("option") if "selected" in option] == ["window"]
    assert "/problems.csv?q=fp16&mask=window" in page.links


def test_the_export_has_every_row_of_the_list_and_numbers(client: TestClient, sqlite: Database) -> None:
    put(sqlite, *batches(230))
    reply = client.get("/problems.csv", params={"sort": "-expected", "q": "fp16", "page": "3"})
    assert reply.headers["content-type"] == "text/csv; charset=utf-8"
    assert "tilewise-problems.csv" in reply.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(reply.text)))
    assert [float(row["expected_ms"]) for row in rows] == [float(n) for n in range(230, 0, -1)]
    assert rows[0]["problem"] == dataclasses.replace(PROBLEM, batch=230).key
    listed = client.get("/problems.json", params={"sort": "-expected", "q": "fp16"}).json()
    assert [row["problem"] for row in listed] == [row["problem"] for row in rows]
    assert listed[0]["speedup_over_torch"] == pytest.approx(30 / 230)
    assert (listed[0]["match"], listed[0]["speedup_over_default"]) == ("exact", None)


def test_an_export_of_nothing_is_still_a_file(client: TestClient) -> None:
    assert client.get("/problems.json").json() == []
    assert client.get("/problems.csv").text.count("\n") == 1


def test_a_spreadsheet_takes_no_cell_for_a_formula(client: TestClient, sqlite: Database) -> None:
    put(sqlite, dataclasses.replace(answer(), plan=Plan(Candidate("=cmd|' /C calc'!A0"))))
    (row,) = csv.DictReader(io.StringIO(client.get("/problems.csv").text))
    assert row["forward"] == "'=cmd|' /C calc'!A0"


def test_a_page_behind_the_end_leads_to_the_last_one(client: TestClient, sqlite: Database) -> None:
    put(sqlite, *batches(51))
    reply = client.get("/problems?q=fp16&page=7", follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (302, "/problems?q=fp16&page=2")


def test_news_come_as_a_mark_that_changes(client: TestClient, sqlite: Database) -> None:
    put(sqlite, answer())
    (notice,) = [tag for tag in get(client).all("div") if tag.get("class") == "news"]
    assert "hidden" in notice
    assert client.get(str(notice["data-url"])).json() == {"mark": notice["data-mark"]}
    put(sqlite, answer(OTHER))
    assert client.get(str(notice["data-url"])).json() != {"mark": notice["data-mark"]}
