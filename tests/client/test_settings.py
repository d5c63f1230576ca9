"""Settings and paths: arguments over variables over defaults, and no secret shown."""

from pathlib import Path

import pytest

from tilewise.client import paths
from tilewise.client.settings import Settings
from tilewise.client.sources import DatabaseSource, HttpSource, SnapshotFile, open_source
from tilewise.domain.errors import SettingsError


def test_nothing_set_is_the_embedded_snapshot() -> None:
    assert Settings.from_environment() == Settings()


def test_arguments_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SOURCE", "http://one"), ("SNAPSHOT", "a" * 64), ("TOKEN", "secret"), ("TIMEOUT", "0.5")):
        monkeypatch.setenv(f"TILEWISE_{name}", value)
    assert Settings.from_environment() == Settings(source="http://one", snapshot="a" * 64, token="secret", timeout=0.5)
    mixed = Settings.from_environment(source="http://two", timeout=3)
    assert (mixed.source, mixed.token, mixed.timeout) == ("http://two", "secret", 3)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_cannot_be_waited_for_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWISE_TIMEOUT", text)
    with pytest.raises(SettingsError, match=f"TILEWISE_TIMEOUT: expected seconds above 0, got '{text}'"):
        Settings.from_environment()


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "snö", ""])
def test_a_token_that_no_header_takes_is_refused_unseen(token: str) -> None:
    with pytest.raises(SettingsError, match="token") as caught:
        Settings(token=token)
    assert not token or token not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    settings = Settings(source="postgresql://me:hidden@db/tiles?password=hidden", token="hidden")
    assert "hidden" not in repr(settings)
    assert "hidden" not in f"{settings} {settings!s} {open_source(settings.source or '').name}"
    assert "hidden" not in repr(vars(open_source("http://here", token="x")).get("name"))


def test_a_snapshot_is_an_id_or_a_path() -> None:
    assert Settings(snapshot="A" * 64).pinned_id == "a" * 64
    assert Settings(snapshot="A" * 64).pinned_path is None
    assert Settings(snapshot="answers.json").pinned_path == "answers.json"
    assert Settings(snapshot="answers.json").pinned_id is None


@pytest.mark.parametrize(
    ("text", "kind", "local"),
    [
        ("http://tiles:8000", HttpSource, False),
        ("https://tiles/base/", HttpSource, False),
        ("sqlite:////data/tilewise.db", DatabaseSource, True),
        ("postgresql://me@db/tiles", DatabaseSource, False),
        ("postgresql+psycopg://me@db/tiles", DatabaseSource, False),
        ("some/answers.snapshot.json", SnapshotFile, True),
    ],
)
def test_the_form_of_a_source_chooses_its_kind(text: str, kind: type, local: bool) -> None:
    source = open_source(text)
    assert (type(source), source.local) == (kind, local)


@pytest.mark.parametrize(
    "text",
    ["ftp://x", "http://", "http://a b", "http://x:port", "https://me:hidden@x", "http://x/?a=hidden", "http://[x"],
)
def test_a_source_of_an_unknown_form_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="source: ") as caught:
        open_source(text)
    assert "hidden" not in str(caught.value)


def test_the_data_folder_moves_with_tilewise_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.default_database_file() == home / "tilewise.db"
    assert paths.default_database_url() == f"sqlite:///{home}/tilewise.db"
    assert paths.embedded_snapshot_path() == home / "tilewise.snapshot.json"
    monkeypatch.delenv("TILEWISE_HOME")
    assert paths.data_dir().name == "tilewise"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:////elsewhere/team.db", "/elsewhere/team.snapshot.json"),
        ("sqlite:///team.db?timeout=3", "team.snapshot.json"),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("postgresql://db/tiles", None),
    ],
)
def test_the_embedded_snapshot_lies_beside_its_database(
    url: str, expected: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEWISE_DB", url)
    assert paths.embedded_snapshot_path() == (Path(expected) if expected else home / "tilewise.snapshot.json")
    assert paths.default_database_url() == url
