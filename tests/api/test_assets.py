"""Files of the dashboard: under the hash of their content, and kept for ever."""

import gzip
import subprocess
import sys

import pytest
from fastapi.testclient import TestClient

from tilewise.api.assets import PLOTLY, asset_url, assets, guarded_styles


@pytest.mark.parametrize("name", ["style.css", "main.js", PLOTLY])
def test_a_file_is_kept_and_comes_compressed(client: TestClient, name: str) -> None:
    reply = client.get(asset_url(name))
    assert reply.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.content == assets()[name].path.read_bytes()
    plain = client.get(asset_url(name), headers={"Accept-Encoding": "identity"})
    assert plain.content == reply.content
    assert client.get(asset_url(name), headers={"If-None-Match": reply.headers["etag"]}).status_code == 304


def test_a_page_of_before_an_upgrade_gets_what_is_there_now_and_does_not_keep_it(client: TestClient) -> None:
    reply = client.get("/static/0123456789abcdef/style.css")
    assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-cache")


@pytest.mark.parametrize("path", ["/static/x/nothing.css", "/static/x/..%2Fassets.py", "/static/x/../assets.py"])
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_modules_find_one_another_under_one_hash() -> None:
    assert len({asset.digest for name, asset in assets().items() if name != PLOTLY}) == 1
    for name, asset in assets().items():
        if name.endswith(".js") and name != PLOTLY:
            text = asset.content.decode()
            imported = [line.split('"')[1] for line in text.splitlines() if line.startswith("import ")]
            assert all(each.removeprefix("./") in assets() for each in imported), name


def test_the_bundle_is_found_without_importing_its_package() -> None:
    code = "import sys; from tilewise.api.assets import assets; assets(); print('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert gzip.decompress(assets()[PLOTLY].gzipped) == assets()[PLOTLY].content


def test_the_style_that_the_policy_would_refuse_is_known() -> None:
    """Otherwise every page with a chart says in its console that a style was refused."""
    assert len(guarded_styles()) == 1
    assert f'getElementById("{guarded_styles()[0]}")' in assets()[PLOTLY].content.decode()
