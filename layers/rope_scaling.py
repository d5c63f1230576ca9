"""How rotary frequencies are changed for contexts longer than a model was trained on.

The names and the formulas are those of Hugging Face's `rope_scaling`, so that a model's configuration can be handed on
as it is: linear (kaiokendev 2023), dynamic (NTK-aware, by the length at hand), YaRN (Peng et al. 2023,
arXiv:2309.00071, sections 3.2 and 3.4) and that of Llama 3.1 (Meta 2024).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.domain.errors import InputError


def plain_frequencies(dim: int, base: float | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Return base ** (-2 i / dim) for i in range(dim / 2), float64 (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return 1.0 / base**exponents


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """No scaling at all. `factor` is how many times longer the context gets."""

    rope_type: ClassVar[str] = "default"
    by_length: ClassVar[bool] = False  # whether frequencies depend on the longest position at hand
    factor: float = 1.0

    def frequencies(self, dim: int, base: float, max_seq_len: int, length: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the angle per position of each of dim / 2 pairs, float64, on the device of `length`.

        `length`, a number in a tensor, is the longest position at hand plus one.
        """
        return plain_frequencies(dim, base, length.device)

    @property
    def attention_factor_(self) -> float:
        """What cosine and sine are multiplied with."""
        return 1.0

    @property
    def score_factor(self) -> float:
        """What the scale of the scores is multiplied with in DeepSeek's latent attention."""
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Scaling):
    """Positions divided by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def frequencies(self, dim: int, base: float, max_seq_len: int, length: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return plain_frequencies(dim, base, length.device) / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic(Scaling):
    """A base that grows with the length once that exceeds `original_max_position_embeddings` (max_seq_len if None)."""

    rope_type: ClassVar[str] = "dynamic"
    by_length: ClassVar[bool] = True
    factor: float
    original_max_position_embeddings: int | None = None

    def frequencies(self, dim: int, base: float, max_seq_len: int, length: torch.Tensor) -> torch.Tensor:
        trained = self.original_max_position_embeddings or max_seq_len
        longest = length.double().clamp_min(trained)
        grown = base * (self.factor * longest / trained - (self.factor - 1)) ** (dim / (dim - 2))
        return plain_frequencies(dim, grown, length.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn(Scaling):
    """Slow pairs interpolated, fast ones kept, with a ramp between, and a temperature of the scores.

    - beta_fast, beta_slow: rotations over the trained length at which the ramp begins and ends.
    - attention_factor: of cosine and sine; by default from `factor`, or from mscale and mscale_all_dim where both are
      given. DeepSeek's latent attention multiplies the scores by a factor of mscale_all_dim besides.
    - truncate: whether the ramp's ends are whole pairs.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, dim: int, base: float, max_seq_len: int, length: torch.Tensor) -> torch.Tensor:
        trained = self.original_max_position_embeddings or max_seq_len
        kept = plain_frequencies(dim, base, length.device)
        low, high = self._pair(self.beta_fast, dim, base, trained), self._pair(self.beta_slow, dim, base, trained)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        places = torch.arange(dim // 2, dtype=torch.float64, device=length.device)
        interpolated = ((places - low) / width).clamp(0, 1)
        return kept / self.factor * interpolated + kept * (1 - interpolated)

    @staticmethod
    def _pair(rotations: float, dim: int, base: float, trained: int) -> float:
        """Return the pair, not a whole number, that turns `rotations` times over the trained length."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    @property
    def attention_factor_(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _temperature(self.factor, self.mscale) / _temperature(self.factor, self.mscale_all_dim)
        return _temperature(self.factor, 1.0)

    @property
    def score_factor(self) -> float:
        return _temperature(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def _temperature(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3(Scaling):
    """Long wavelengths divided by `factor`, short ones kept, a ramp between."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, dim: int, base: float, max_seq_len: int, length: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        kept = plain_frequencies(dim, base, length.device)
        turns = self.original_max_position_embeddings * kept / (2 * math.pi)  # over the trained length
        smooth = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - smooth) * kept / self.factor + smooth * kept


KINDS: dict[str, type[Scaling]] = {kind.rope_type: kind for kind in (Scaling, Linear, Dynamic, Yarn, Llama3)}


def scaling_of(given: Scaling | Mapping[str, Any] | None) -> Scaling:
    """Return the scaling of a model's configuration, {"rope_type": "llama3", "factor": 8.0, ...}.

    `type` may stand for `rope_type`, as in older configurations, and rope_theta, which is the layer's rope_base, is not
    looked at. Raises InputError for an unknown kind, for a field that the kind has not or lacks, and for values out of
    range.
    """
    if given is None:
        return Scaling()
    if isinstance(given, Scaling):
        return _checked(given)
    if not isinstance(given, Mapping):
        raise InputError(f'rope_scaling: expected None or {{"rope_type": ..., "factor": ...}}, got {given!r}')
    fields = {name: value for name, value in given.items() if name not in ("rope_type", "type", "rope_theta")}
    name = given.get("rope_type", given.get("type"))
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"rope_scaling: expected a rope_type of {', '.join(KINDS)}, got {name!r}")
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    unknown, missing = set(fields) - set(known), {name for name, needed in known.items() if needed} - set(fields)
    if unknown or missing:
        raise InputError(
            f"rope_scaling: {name} has the fields {', '.join(known)}, needs {', '.join(sorted(missing)) or 'no more'}, "
            f"and does not take {', '.join(sorted(map(str, unknown))) or 'any other'}"
        )
    return _checked(kind(**fields))


def _checked(scaling: Scaling) -> Scaling:
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if value is None or field.name == "truncate":
            continue
        least = 1 if field.name in ("factor", "original_max_position_embeddings") else 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise InputError(f"rope_scaling: {field.name}: expected a number of at least {least}, got {value!r}")
    if isinstance(scaling, Yarn) and not 0 < scaling.beta_slow <= scaling.beta_fast:
        raise InputError(
            "rope_scaling: expected beta_slow above 0 and not above beta_fast, got "
            f"{scaling.beta_slow} and {scaling.beta_fast}"
        )
    if isinstance(scaling, Llama3) and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise InputError(
            "rope_scaling: expected low_freq_factor below high_freq_factor, got "
            f"{scaling.low_freq_factor} and {scaling.high_freq_factor}"
        )
    return scaling
