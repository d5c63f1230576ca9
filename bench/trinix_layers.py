"""trinix's own layers beside ours: the wheel's folder, or the wheel itself, is named on the command line.

Nothing here is needed otherwise, and the wheel is no dependency. The names of its weights are ours.
"""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewise.domain.errors import SettingsError, UnsupportedError
from tilewise.kernels.call import TORCH_DTYPES

from .page_specs import CLASSES, Spec

TRINIX = {"trinix_pytorch": "pytorch", "trinix_triton": "triton"}


class Trinix:
    """The layers of an unpacked wheel. Raises SettingsError where `folder` holds none."""

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise SettingsError(f"--trinix {folder}: expected a folder with trinix/ in it, or its wheel")
        sys.path.insert(0, str(folder.resolve()))
        try:
            with warnings.catch_warnings(action="ignore"):  # it warns of what is not installed
                self._module = importlib.import_module("trinix.layers.attention")
        except ImportError as error:
            raise SettingsError(f"--trinix {folder}: trinix cannot be imported from it ({error})") from error
        finally:
            sys.path.remove(str(folder.resolve()))

    def layer(self, spec: Spec, ours: nn.Module, column: str) -> nn.Module:
        """Return its layer of `spec` with the weights of `ours`. Raises UnsupportedError for one that it has not."""
        name = CLASSES.get(spec.layer)
        if name is None:
            raise UnsupportedError("trinix has no such layer")
        sizes = (spec.hidden, spec.heads, *([spec.kv_heads] if spec.layer == "gqa" else []))
        options: dict[str, Any] = {"bias": False, "causal": spec.causal, "kernel_type": TRINIX[column]}
        if spec.layer == "latent":
            options["latent_dim"] = ours.get_submodule("kv_down_proj").out_features
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            theirs: nn.Module = getattr(self._module, name)(*sizes, **options)
        # the very tensors of ours: nothing is held twice
        theirs.load_state_dict(dict(ours.named_parameters()), assign=True)
        return _Alone(theirs.to(TORCH_DTYPES[spec.dtype]))


class _Alone(nn.Module):
    """Its result alone: some of its layers give an empty cache with it. What it falls back to is an error here."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*falling back to PyTorch")
            found = self.layer(x)
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return out
