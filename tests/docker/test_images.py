"""The images, without a Docker engine: every step of each Dockerfile is run as a script in a root of its own, packages
come from what is installed here, and the service is started with the image's own command.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


def instructions(name: str) -> list[tuple[str, str]]:
    """Read a Dockerfile: names and arguments, continued lines as one."""
    lines = re.sub(r"\\\n", " ", (DOCKER / name).read_text()).splitlines()
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line and not line.startswith("#")
    ]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels made of the packages that are installed here: what a registry would give, without one."""
    folder = tmp_path_factory.mktemp("wheels")
    waiting, done = ["setuptools", *_needs("tilewise", {"server"})], set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        _wheel(metadata.distribution(name), folder)
        waiting += _needs(name, set())
    assert "torch" not in done
    return folder


def _needs(name: str, extras: set[str]) -> list[str]:
    from packaging.requirements import Requirement

    texts = metadata.requires(name) or []
    if name == "tilewise":
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        texts = [
            *project["dependencies"],
            *(one for extra in extras for one in project["optional-dependencies"][extra]),
        ]
    found = []
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement.name.lower().replace("_", "-"))
            for extra in requirement.extras:
                found += [
                    each.name
                    for each in map(Requirement, metadata.requires(requirement.name) or [])
                    if each.marker is not None and each.marker.evaluate({"extra": extra})
                ]
    return found


def _wheel(package: metadata.Distribution, folder: Path) -> None:
    tags = [line[5:] for line in (package.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: ")]
    # a wheel of several tags writes each of their three parts once: py2.py3-none-any
    python, abi, platforms = (".".join(dict.fromkeys(tag.split("-")[part] for tag in tags)) for part in range(3))
    stem = f"{package.metadata['Name'].replace('-', '_')}-{package.version}"
    with zipfile.ZipFile(folder / f"{stem}-{python}-{abi}-{platforms}.whl", "w") as archive:
        for file in package.files or []:
            place = Path(str(file.locate()))
            if not str(file).startswith("..") and "__pycache__" not in str(file) and place.is_file():
                archive.write(place, str(file))


@dataclass
class Image:
    """A root in which a Dockerfile's steps are run: `path` is where an absolute path of the image lies."""

    root: Path
    environment: dict[str, str]
    workdir: str = "/"
    user: str = "root"
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def path(self, text: str) -> Path:
        return self.root / text.lstrip("/")

    def placed(self, text: str) -> str:
        """Return `text` with the folders that the images make put below the root."""
        return re.sub(r"/(?=(opt|build)\b)", f"{self.root}/", text)

    def build(self, name: str) -> None:
        for instruction, given in instructions(name):
            getattr(self, f"_{instruction.lower()}")(given)

    def _from(self, given: str) -> None:
        assert re.fullmatch(r"[a-z/]+:[\w.-]+( AS build)?", given), "a base image has a tag"

    def _workdir(self, given: str) -> None:
        self.workdir = given
        self.path(given).mkdir(parents=True, exist_ok=True)

    def _copy(self, given: str) -> None:
        source, target = given.split()[-2:]
        if given.startswith("--from=build"):
            assert source == target, "both stages lie in one root here"
            assert self.path(source).is_dir()
            return
        assert (source, target) == (".", ".")
        files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(files, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
        left_out = tuple(line for line in (ROOT / ".dockerignore").read_text().split() if "*" not in line)
        for file in filter(None, map(os.fsdecode, names)):
            if not file.startswith(tuple(f"{line}/" for line in left_out)) and (ROOT / file).exists():
                place = self.path(self.workdir) / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, place, follow_symlinks=False)

    def _run(self, given: str) -> None:
        done = subprocess.run(
            ["bash", "-euc", self.placed(given)],
            cwd=self.path(self.workdir),
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{given}\n{done.stdout}\n{done.stderr}"

    def _env(self, given: str) -> None:
        for pair in shlex.split(given):
            name, value = pair.split("=", 1)
            self.environment[name] = self.placed(value).replace("$PATH", self.environment["PATH"])

    def _user(self, given: str) -> None:
        self.user = given

    def _expose(self, given: str) -> None:
        assert given == "8000"

    def _healthcheck(self, given: str) -> None:
        self.health = json.loads(given[given.index("CMD ") + 4 :])

    def _cmd(self, given: str) -> None:
        self.command = json.loads(given)


@pytest.fixture
def image(tmp_path: Path, wheels: Path) -> Image:
    """An empty root whose Python is a fresh environment, and a pip that finds the wheels and no network."""
    base = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", str(base)], check=True)
    environment = {
        "PATH": f"{base / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "HOME": str(tmp_path),
    }
    return Image(tmp_path / "root", environment)


@pytest.fixture
def running(image: Image, postgres_url: str, tmp_path: Path) -> Iterator[str]:
    """The service of its image on PostgreSQL, after the step that migrates; the URL comes from a file."""
    image.build("service.Dockerfile")
    secret = tmp_path / "db_url"
    secret.write_text(postgres_url + "\n")
    image.environment["TILEWISE_DB_FILE"] = str(secret)
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    subprocess.run(compose["migrate"]["command"], env=image.environment, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [port if word == "8000" else "127.0.0.1" if word == "0.0.0.0" else word for word in image.command]
    image.health = [word.replace(":8000/", f":{port}/") for word in image.health]
    process = subprocess.Popen(
        command, env=image.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.communicate(timeout=20)


def test_the_service_image_serves_without_torch(image: Image, running: str) -> None:
    assert image.user.split(":")[0].isdecimal()
    assert int(image.user.split(":")[0]) > 0
    healthy = [subprocess.run(image.health, env=image.environment).returncode for _ in range(2)]
    assert healthy == [0, 0]
    assert httpx.get(f"{running}/v1/devices").status_code == 401
    create = ["tilewise", "tokens", "create", "me", "--scope", "admin"]
    token = subprocess.run(create, env=image.environment, capture_output=True, text=True, check=True).stdout.strip()
    headers = {"Authorization": f"Bearer {token}"}
    end = time.monotonic() + 10  # the service follows the database
    while (reply := httpx.get(f"{running}/v1/devices", headers=headers)).status_code == 401:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert reply.json() == {"items": [], "next": None}
    python = [str(image.path("/opt/tilewise/bin/python")), "-c"]
    for module, found in (("torch", 1), ("triton", 1), ("tilewise.api.server", 0), ("psycopg", 0)):
        done = subprocess.run([*python, f"import {module}"], env=image.environment, stderr=subprocess.DEVNULL)
        assert done.returncode == found, module
    # nothing below the root is left for who runs it to write, but what a volume or tmpfs gives
    assert not any(image.path("/opt/tilewise").rglob("*.db"))


def test_the_worker_image_has_a_worker(image: Image, tmp_path: Path) -> None:
    # the base image has torch: here, what this environment has
    library = next((tmp_path / "base" / "lib").glob("python3*/site-packages"))
    (library / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    image.build("worker.Dockerfile")
    assert int(image.user.split(":")[0]) > 0
    image.environment |= {"TILEWISE_DB": f"sqlite:///{tmp_path / 'tilewise.db'}", "HOME": str(tmp_path)}
    assert image.command == ["tilewise", "worker"]
    done = subprocess.run([*image.command, "--help"], env=image.environment, capture_output=True, text=True, check=True)
    assert "Claim queued jobs" in done.stdout
    assert subprocess.run(image.health, env=image.environment, capture_output=True).returncode == 1
    subprocess.run(["tilewise", "db", "upgrade"], env=image.environment, check=True, capture_output=True)
    assert subprocess.run(image.health, env=image.environment, capture_output=True).returncode == 0
    drained = subprocess.run([*image.command, "--device", "cpu", "--drain"], env=image.environment, capture_output=True)
    assert drained.returncode == 0, drained.stderr


def test_the_compose_file_keeps_secrets_in_files_and_the_order() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"database", "migrate", "service", "worker"}
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())
    for name, service in services.items():
        assert "privileged" not in service
        assert set(service.get("secrets", ())) <= set(compose["secrets"])
        values = [str(value) for value in service["environment"].values()]
        assert not any("://" in value for value in values), f"{name} has a URL in its environment"
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert service["environment"] == {"TILEWISE_DB_FILE": "/run/secrets/db_url"}
    assert services["migrate"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert services["migrate"]["restart"] == "no"
    for name in ("service", "worker"):
        assert services[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert services["service"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "healthcheck" in services["database"]
