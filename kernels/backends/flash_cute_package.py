"""The package flash-attn-4: whether it is here, what it takes, where it keeps what it compiles, and its one import.

Importing it takes seconds, so what it takes is read from its source, and nothing else here imports it.

It keeps compiled kernels on disk only where FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED is 1 while it is imported. Where the
user has not set that, it is 1 for the length of the import, and the folder is FLASH_ATTENTION_CUTE_DSL_CACHE_DIR, else
`cache_folder`: the package's own is below /tmp, where it does not outlive the machine's next start, and where another
user may have made it first.
"""

import ast
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewise.domain.collecting import uncollected
from tilewise.domain.device import Device
from tilewise.domain.errors import DeviceError

NEEDED = {"cutlass": "nvidia-cutlass-dsl", "quack": "quack-kernels", "tvm_ffi": "apache-tvm-ffi", "einops": "einops"}
ENABLED, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
_SHARED = {
    "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right",
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
}  # fmt: skip
_TAKEN = {
    "_flash_attn_fwd": _SHARED
    | {"tile_mn", "mma_pv_is_rs", "intra_wg_overlap", "pack_gqa", "num_splits", "return_lse"},
    "_flash_attn_bwd": _SHARED | {"deterministic"},
}


@dataclass(frozen=True, slots=True)
class Internals:
    """The package's forward and backward below its public function."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def absent() -> str | None:
    """Return why flash_attn.cute cannot be imported, or None; nothing is imported to find out."""
    if _spec() is None:
        return "flash_attn.cute is not installed: pip install 'tilewise[flash]' (CUDA 13: 'flash-attn-4[cu13]')"
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"flash_attn.cute is installed without {', '.join(missing)}: pip install 'tilewise[flash]'"
    return None


def version() -> str | None:
    """Return the installed version of flash-attn-4, None without one."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def interface() -> Any:
    """Import the package, with its cache on disk, and return its interface. Raises ImportError."""
    with uncollected(), _cache_on_disk():
        return importlib.import_module("flash_attn.cute.interface")


@functools.cache
def internals() -> Internals | None:
    """Return the internal functions, or None where this version's take other parameters or nothing can be imported."""
    if not tunable():
        return None
    try:
        found = interface()
    except ImportError:
        return None
    return Internals(found._flash_attn_fwd, found._flash_attn_bwd)


@functools.cache
def tunable() -> bool:
    """Whether this version's internal functions take the parameters that are tuned, as its source says."""
    try:
        body = ast.parse(_source("interface.py")).body
    except SyntaxError:  # of a newer Python
        return False
    found = {node.name: node.args for node in body if isinstance(node, ast.FunctionDef)}
    return all(
        name in found and taken <= {each.arg for each in (*found[name].args, *found[name].kwonlyargs)}
        for name, taken in _TAKEN.items()
    )


# what it compiled


def cache_folder() -> Path:
    """Return where compiled kernels lie unless the user says: below TILEWISE_HOME, else in the user's cache folder."""
    home = os.environ.get("TILEWISE_HOME")
    if home:
        return Path(home).expanduser() / "cache" / "flash-attn-4"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewise" / "flash-attn-4"


def keeps_compiled() -> bool:
    """Whether what one process compiles is found by another: the version can, and the user has not switched it off."""
    able = tunable() and ENABLED in _source("cache_utils.py") and "is_fake_mode" in _source("interface.py")
    if not able or ENABLED in os.environ:
        return able and os.environ[ENABLED] == "1"
    return bool(_our_settings())


def target(device: Device) -> None:
    """Have the package compile for `device` in this process, which needs no GPU for it and touches none from now on.

    The variables are the package's own for this (its `_get_device_arch` and `get_num_sms_for_selection`, and the DSL's
    `detect_gpu_arch`); what they say is what it finds out by itself where the device is. torch makes a context even for
    tensors without data, on any GPU that it sees, so it is to see none. Raises DeviceError where it has one already.
    """
    if torch.cuda.is_initialized():
        raise DeviceError("flash-attn-4 compiles ahead only in a process that uses no GPU; start one for it")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    suffix = "a" if device.capability >= 90 else ""
    os.environ.setdefault("FLASH_ATTENTION_ARCH", f"sm_{device.capability}")
    os.environ.setdefault("CUTE_DSL_ARCH", f"sm_{device.capability}{suffix}")
    os.environ.setdefault("FLASH_ATTENTION_NUM_SMS", str(device.units))


@contextlib.contextmanager
def _cache_on_disk() -> Iterator[None]:
    """Within, the variables are set that the package reads when it is imported, unless the user has set them."""
    ours = {} if ENABLED in os.environ else _our_settings()
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _our_settings() -> dict[str, str]:
    """Return the variables that switch the cache on; none where its folder cannot be made or written."""
    if FOLDER in os.environ:
        return {ENABLED: "1"}
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home
        return {}
    return {ENABLED: "1", FOLDER: str(folder)} if os.access(folder, os.W_OK) else {}


# its source


def _spec() -> importlib.machinery.ModuleSpec | None:
    parent = importlib.util.find_spec("flash_attn")
    places = list(parent.submodule_search_locations or ()) if parent else []
    return importlib.machinery.PathFinder.find_spec("flash_attn.cute", places) if places else None


@functools.cache
def _source(name: str) -> str:
    """Return the text of one of its files, empty where there is none."""
    spec = _spec()
    for place in (spec.submodule_search_locations or ()) if spec else ():
        with contextlib.suppress(OSError):
            return Path(place, name).read_text()
    return ""
