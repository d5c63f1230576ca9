"""Where in its sequence a row stands, and what that does to queries, keys and scores.

A layer's `position_method` is "none", "rope", "alibi" or a module of the caller's own.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from tilewise.domain.errors import InputError

from .rope_scaling import Scaling
from .rotation import turned

METHODS = ("none", "rope", "alibi")


class Span(NamedTuple):
    """`length` neighbouring positions from `first` on, the same in every row of a batch."""

    first: int
    length: int


Places = Span | torch.Tensor  # or integers (1 or batch, seq)


def as_tensor(places: Places, device: torch.device) -> torch.Tensor:
    """Return positions int64 (1 or batch, seq)."""
    if isinstance(places, torch.Tensor):
        return places.long()
    return torch.arange(places.first, places.first + places.length, device=device)[None]


@dataclass(frozen=True, slots=True)
class Placed:
    """Queries and keys with their positions in them, and what their scores get: a bias, or ALiBi's slopes."""

    query: torch.Tensor
    key: torch.Tensor
    bias: torch.Tensor | None = None
    slopes: torch.Tensor | None = None


class Positions:
    """No positions.

    late: a key can only be placed when all that it is attended with are there, so caches hold it as it was before.
    on_keys: whether keys are changed at all.
    """

    late = False
    on_keys = False

    def place(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        of_query: Places,  # noqa: ARG002
        of_key: Places,  # noqa: ARG002
        *,
        in_place: bool = False,  # noqa: ARG002
    ) -> Placed:
        """Return queries (batch, q_len, heads, dim) and keys (batch, kv_len, kv_heads, dim) in their places.

        in_place: `query` may be overwritten, which is done where no gradient is recorded.
        """
        return Placed(query, key)

    def slopes(self, device: torch.device) -> torch.Tensor | None:  # noqa: ARG002
        """Return ALiBi's slopes (heads,), float32."""
        return None


class Alibi(Positions):
    """A bias of -slope * distance, which the kernels add themselves (Press et al. 2022, arXiv:2108.12409)."""

    def __init__(self, heads: int) -> None:
        self._heads = heads

    def slopes(self, device: torch.device) -> torch.Tensor | None:
        if torch.compiler.is_compiling():
            return torch.tensor(alibi_slopes(self._heads), device=device)
        return _kept_slopes(self._heads, device)


def alibi_slopes(heads: int) -> list[float]:
    """Return a slope per head: 2 ** (-8 i / heads) for a power of two, else interleaved with those of the next one.

    Press et al. 2022, section 3; for other numbers of heads as their published code does.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]


@functools.lru_cache(maxsize=64)
def _kept_slopes(heads: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(alibi_slopes(heads), device=device)


class Custom(Positions):
    """A module of the caller's own, called as module(query, key, query_positions, key_positions).

    query is (batch, q_len, heads, dim), key (batch, kv_len, kv_heads, dim) with all keys of the cache, positions are
    int64 (1 or batch, length). It returns (query, key) or (query, key, bias), the bias broadcasting to
    (batch, heads, q_len, kv_len).
    """

    late = True
    on_keys = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def place(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        of_query: Places,
        of_key: Places,
        *,
        in_place: bool = False,  # noqa: ARG002
    ) -> Placed:
        device = query.device
        found = self._module(query, key, as_tensor(of_query, device), as_tensor(of_key, device))
        if not (isinstance(found, tuple) and len(found) in (2, 3) and isinstance(found[0], torch.Tensor)):
            raise InputError(
                f"position_method: expected {type(self._module).__name__} to return (query, key) or (query, key, "
                f"bias), got {type(found).__name__}"
            )
        if (found[0].shape, found[1].shape) != (query.shape, key.shape):
            raise InputError(
                f"position_method: expected {type(self._module).__name__} to keep the shapes {tuple(query.shape)} and "
                f"{tuple(key.shape)}, got {tuple(found[0].shape)} and {tuple(found[1].shape)}"
            )
        return Placed(found[0], found[1], *found[2:])


@dataclass(frozen=True, slots=True)
class Rope(Positions):
    """Pairs of a head's elements turned by an angle that grows with the position (Su et al. 2021, arXiv:2104.09864).

    - dim: elements that are turned, an even number; of wider heads the last ones. Pair i is (i, i + dim / 2), as in
      Llama's weights of Hugging Face; with `interleaved` it is (2 i, 2 i + 1), as in DeepSeek's, and the result has the
      halves one behind the other.
    - max_seq_len: positions of the kept table; those beyond it are computed anew at each call.

    Angles are float64 and their cosines float32, whatever dtype the layer has; there are no buffers that .half() casts.
    """

    dim: int
    base: float
    max_seq_len: int
    scaling: Scaling
    interleaved: bool = False

    @property
    def late(self) -> bool:  # type: ignore[override]
        return self.scaling.by_length

    @property
    def on_keys(self) -> bool:  # type: ignore[override]
        return True

    def place(
        self, query: torch.Tensor, key: torch.Tensor, of_query: Places, of_key: Places, *, in_place: bool = False
    ) -> Placed:
        length = None
        if self.scaling.by_length:
            length = _length(query.device, of_query, of_key)
        placed = turned(query, *self.table(of_query, query.device, length), pairs=self.interleaved, in_place=in_place)
        return Placed(placed, turned(key, *self.table(of_key, key.device, length), pairs=self.interleaved))

    def table(
        self, places: Places, device: torch.device, length: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, float32 (1 or batch, seq, dim / 2), of what stands at `places`."""
        if not (isinstance(places, torch.Tensor) or length is not None or torch.compiler.is_compiling()):
            stop = places.first + places.length
            if places.first >= 0 and stop <= self.max_seq_len:
                cos, sin = _kept_table(self, device)
                return cos[:, places.first : stop], sin[:, places.first : stop]
        return self._compute(as_tensor(places, device), length)

    def _compute(self, places: torch.Tensor, length: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if length is None:
            length = places.new_tensor(self.max_seq_len)
        frequencies = self.scaling.frequencies(self.dim, self.base, self.max_seq_len, length)
        angles = places[..., None].double() * frequencies
        factor = self.scaling.attention_factor_
        return (angles.cos() * factor).float(), (angles.sin() * factor).float()


@functools.lru_cache(maxsize=16)
def _kept_table(rope: Rope, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the table of all positions below max_seq_len, one for all layers of a model."""
    with torch.inference_mode(mode=False), torch.no_grad():
        return rope._compute(torch.arange(rope.max_seq_len, device=device)[None], None)


def _length(device: torch.device, *places: Places) -> torch.Tensor:
    """Return the longest position plus one; nothing waits for the device."""
    ends = [
        each.max() + 1 if isinstance(each, torch.Tensor) else torch.tensor(each.first + each.length, device=device)
        for each in places
    ]
    return torch.stack(ends).max()


def positions_of(
    method: str | nn.Module, *, heads: int, dim: int, base: float, max_seq_len: int, scaling: Scaling
) -> Positions:
    """Return what a layer's position_method stands for. Raises InputError for one that is unknown or cannot be."""
    check_scaled(method, scaling)
    if isinstance(method, nn.Module):
        return Custom(method)
    if method == "none":
        return Positions()
    if method == "alibi":
        return Alibi(heads)
    if method == "rope":
        return rope_of(dim, base=base, max_seq_len=max_seq_len, scaling=scaling)
    raise InputError(f"position_method: expected one of {', '.join(METHODS)} or an nn.Module, got {method!r}")


def check_scaled(method: str | nn.Module, scaling: Scaling) -> None:
    """Raise InputError for a scaling that nothing would be scaled by."""
    if method != "rope" and scaling.rope_type != Scaling.rope_type:
        name = method if isinstance(method, str) else type(method).__name__
        raise InputError(
            f"rope_scaling: {scaling.rope_type} belongs to position_method 'rope', got {name!r}; leave one of them out"
        )


def rope_of(dim: int, *, base: float, max_seq_len: int, scaling: Scaling, interleaved: bool = False) -> Rope:
    """Return rotary positions. Raises InputError for an odd `dim`, or a base that is not above 1."""
    if dim % 2 or (scaling.by_length and dim < 4):
        raise InputError(f"position_method 'rope' needs an even head_dim (4 or more where it is dynamic), got {dim}")
    if isinstance(base, bool) or not isinstance(base, int | float) or not 1 < base < float("inf"):
        raise InputError(f"rope_base: expected a number above 1, got {base!r}")
    return Rope(dim, float(base), max_seq_len, scaling, interleaved)
