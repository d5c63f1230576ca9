"""The order of imports in docs/architecture.md, walked with ast: an import against it fails here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# folder -> (folders of ours it may import, third-party packages it may import)
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "domain": (set(), set()),
    "kernels": ({"domain"}, {"torch", "triton", "pynvml"}),
    "client": ({"domain"}, {"httpx", "platformdirs", "cryptography"}),
    "layers": ({"domain", "kernels", "client"}, {"torch", "triton"}),
    "db": ({"domain"}, {"sqlalchemy", "alembic", "cryptography"}),
    "tuner": ({"domain", "kernels", "db"}, {"torch", "optuna", "numpy"}),
    "api": (
        {"domain", "db"},
        {"fastapi", "starlette", "pydantic", "jinja2", "markupsafe", "uvicorn", "prometheus_client"},
    ),
    "bench": (
        {"domain", "kernels", "layers", "tuner", "client", "db", "api"},
        {"torch", "matplotlib", "httpx", "sqlalchemy", "fastapi", "numpy", "scipy"},
    ),
    "cli": (
        {"domain", "kernels", "client", "layers", "db", "tuner", "api", "bench"},
        {"typer", "click", "rich", "torch", "uvicorn", "platformdirs", "httpx"},
    ),
}
# The one exception: a client may read a database directly, and imports it only then.
EXCEPTIONS = {"client/sources/database.py": {"db"}}
# Packages that only one file may import.
ONLY_IN = {"optuna": "tuner/search.py", "ray": "tuner/fleet.py", "scipy": "bench/near_fit.py"}
STANDARD = set(__import__("sys").stdlib_module_names)


def files() -> Iterator[Path]:
    for folder in ALLOWED:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


@pytest.mark.parametrize("path", list(files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_order(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    folder = name.partition("/")[0]
    ours, others = ALLOWED[folder]
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "tilewise":
            target = rest.partition(".")[0]
            if not target:  # the package itself holds only the version and lazy names
                continue
            assert target != folder, f"{name} imports its own folder absolutely: use a relative import of {module}"
            assert target in ours | EXCEPTIONS.get(name, set()), f"{name} must not import {module}"
        elif top not in STANDARD:
            assert top in others, f"{name} must not import {module}; allowed: {sorted(others)}"
            assert ONLY_IN.get(top, name) == name, f"only {ONLY_IN[top]} may import {top}"


def test_every_folder_is_linked() -> None:
    for folder in ALLOWED:
        link = ROOT / "src" / "tilewise" / folder
        assert link.is_symlink(), f"{link} is not a link"
        assert link.resolve() == ROOT / folder
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder} must have no __init__.py of its own"
