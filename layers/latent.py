"""Latent attention: keys and values are made of one short vector per token, which is all that is cached."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import nn

from tilewise.domain.errors import InputError

from .base import Asked, Attended, FastAttention
from .checks import check_flags
from .masks import spelled_out
from .norms import RMSNorm
from .options import Options, check_epsilon, check_sizes
from .positions import Placed, Places, Positions, as_tensor, check_scaled, rope_of
from .rope_scaling import scaling_of
from .rotation import gives_fresh, joined


@dataclass(frozen=True, slots=True)
class _Dims:
    """Elements of a latent, and of a head: without and with rotary position, and of its value."""

    rank: int
    nope: int
    rope: int
    value: int


class FastMultiHeadLatentAttention(FastAttention):
    """Multi-head latent attention, in one of two forms.

    The simple one: latent_dim (embed_dim / 8 by default, at least 16) of both the queries' and the keys' latents, heads
    of head_dim, position_method as everywhere, applied to the heads. Parameters: q_down_proj, q_up_proj, kv_down_proj,
    k_up_proj, v_up_proj, o_proj.

    DeepSeek's (DeepSeek-V2, arXiv:2405.04434, section 2.1; V3 has the sizes below), where kv_rank is given:

    - kv_rank (512) and q_rank (1536; None projects queries directly, by q_proj): sizes of the latents, which are
      normalised: q_latent_norm, kv_latent_norm, with norm_eps.
    - nope_head_dim (128), rope_head_dim (64), v_head_dim (128): a head's query and key have a part without position
      and one that is rotated, which all heads share in the key; kv_down_proj makes it beside the latent.
    - position_method: "rope" by default, or "none". rope_interleave: pairs are neighbours, as in DeepSeek's weights.
    - YaRN with mscale_all_dim changes the scale of the scores too, as DeepSeek's code does.
    - bias: of the projections down and of o_proj; those up have none.

    absorb: whether k_up_proj and v_up_proj are applied to queries and results instead of all cached tokens (section
    2.1.2), which then attend the latents like one shared head. None: where that takes fewer operations, which is in
    decoding; True: wherever it gives the same; False: never. It does not where position_method or qk_norm changes the
    heads of keys, and the simple form's biases allow it only without gradients, mask, LSE and add_zero_attn.

    The cache holds latents (batch, length, rank + rope_head_dim). `value` must be `key`: both come of one latent.
    Everything else is as of FastAttention. Raises InputError for sizes and options that do not fit together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        latent_dim: int | None = None,
        q_rank: int | None = None,
        kv_rank: int | None = None,
        nope_head_dim: int = 128,
        rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope_interleave: bool = True,
        norm_eps: float = 1e-6,
        absorb: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_sizes(
            latent_dim=latent_dim, q_rank=q_rank, kv_rank=kv_rank, nope_head_dim=nope_head_dim,
            rope_head_dim=rope_head_dim, v_head_dim=v_head_dim,
        )  # fmt: skip
        check_flags(rope_interleave=rope_interleave)
        if absorb is not None:
            check_flags(absorb=absorb)
        check_epsilon("norm_eps", norm_eps)
        self.decoupled = kv_rank is not None
        if self.decoupled:
            _check_decoupled(latent_dim, options)
            options["head_dim"] = nope_head_dim + rope_head_dim
        elif q_rank is not None:
            raise InputError(f"q_rank {q_rank} belongs to kv_rank; give both, or latent_dim for the simple form")
        method = options.pop("position_method", "rope" if self.decoupled else "none")
        whole: Options = {**options, "position_method": method}
        if self.decoupled:  # only a part of its heads is placed, below
            whole |= {"position_method": "none", "rope_scaling": None}
        super().__init__(embed_dim, num_heads, **whole)
        self.absorb = absorb
        if kv_rank is not None:
            self.dims = _Dims(kv_rank, nope_head_dim, rope_head_dim, v_head_dim)
            self.position_method, self.rope_scaling = method, scaling_of(options.get("rope_scaling"))
            self.positions = self._decoupled_positions(rope_interleave, options)
        else:
            rank = latent_dim or max(16, embed_dim // 8)
            self.dims, q_rank = _Dims(rank, self.head_dim, 0, self.head_dim), rank
        self._make_projections(q_rank, norm_eps)
        self.reset_parameters()

    def _score_factor(self) -> float:
        return self.rope_scaling.score_factor if self.decoupled else 1.0

    def _decoupled_positions(self, interleaved: bool, options: Options) -> Positions:
        if self.position_method not in ("rope", "none"):
            raise InputError(
                f"position_method: expected 'rope' or 'none' with kv_rank, got {self.position_method!r}; the simple "
                "form (latent_dim) takes others"
            )
        check_scaled(self.position_method, self.rope_scaling)
        if self.position_method == "none":
            return Positions()
        return rope_of(
            self.dims.rope,
            base=options.get("rope_base", 10000.0),
            max_seq_len=options.get("max_seq_len", 2048),
            scaling=self.rope_scaling,
            interleaved=interleaved,
        )

    def _make_projections(self, q_rank: int | None, norm_eps: float) -> None:
        dims, heads = self.dims, self.num_heads
        into = {**self._linear, "bias": self._linear["bias"] and not self.decoupled}
        placed = {name: self._linear[name] for name in ("device", "dtype")}
        self.q_latent_norm = self.kv_latent_norm = None
        if q_rank is None:
            self.q_proj = nn.Linear(self.embed_dim, heads * (dims.nope + dims.rope), **into)  # type: ignore[arg-type]
        else:
            self.q_down_proj = self._projection(self.embed_dim, q_rank)
            self.q_up_proj = nn.Linear(q_rank, heads * (dims.nope + dims.rope), **into)  # type: ignore[arg-type]
        if self.decoupled:
            self.kv_latent_norm = RMSNorm(dims.rank, norm_eps, **placed)  # type: ignore[arg-type]
            if q_rank is not None:
                self.q_latent_norm = RMSNorm(q_rank, norm_eps, **placed)  # type: ignore[arg-type]
        self.q_rank = q_rank
        self.kv_down_proj = self._projection(self.embed_dim, dims.rank + dims.rope)
        self.k_up_proj = nn.Linear(dims.rank, heads * dims.nope, **into)  # type: ignore[arg-type]
        self.v_up_proj = nn.Linear(dims.rank, heads * dims.value, **into)  # type: ignore[arg-type]
        self.o_proj = self._projection(heads * dims.value, self.embed_dim)

    def _attend(self, asked: Asked) -> Attended:
        if asked.value is not asked.key:
            raise InputError(
                f"latent attention makes keys and values of one latent, got a value {tuple(asked.value.shape)} besides "
                "the key; give (query, key), or another layer"
            )
        fresh = self.decoupled and gives_fresh(self.q_proj if self.q_rank is None else self.q_up_proj)
        query, latents = self._queries(asked.query), self._latents(asked.key)
        places: Places = asked.of_key
        if self.decoupled and not self.positions.late:
            query, latents = self._rotated(query, latents, asked.of_query, places, fresh)
        if self._keys_placed_late:
            rows = as_tensor(places, latents.device).expand(latents.shape[:2])
            (latents, rows), cache = self._cached(asked, latents, rows)
            places = places if asked.past is None else rows
        else:
            (latents,), cache = self._cached(asked, latents)
        if self.decoupled and self.positions.late:
            query, latents = self._rotated(query, latents, asked.of_query, places, fresh)
        if self._absorbs(asked):
            out, lse = self._absorbed(query, latents, asked)
        else:
            out, lse = self._expanded(query, latents, asked, places)
        return Attended(out, lse, cache)

    @property
    def _keys_placed_late(self) -> bool:
        return self.positions.late or (self.positions.on_keys and not self.decoupled)

    def _queries(self, rows: torch.Tensor) -> torch.Tensor:
        """Return queries (batch, q_len, heads, nope + rope)."""
        if self.q_rank is None:
            made = self.q_proj(rows)
        else:
            latent = self.q_down_proj(rows)
            made = self.q_up_proj(latent if self.q_latent_norm is None else self.q_latent_norm(latent))
        heads: torch.Tensor = made.unflatten(-1, (self.num_heads, self.dims.nope + self.dims.rope))
        return heads

    def _latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Return latents, normalised, and the shared part of the keys behind them (batch, new, rank + rope)."""
        made: torch.Tensor = self.kv_down_proj(rows)
        if self.kv_latent_norm is None:
            return made
        latent, shared = made.split((self.dims.rank, self.dims.rope), -1)
        return torch.cat((self.kv_latent_norm(latent), shared), -1)

    def _rotated(
        self, query: torch.Tensor, latents: torch.Tensor, of_query: Places, of_key: Places, fresh: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries, overwritten where they are `fresh`, and latents with their rotary parts in their places."""
        placed = self.positions.place(query, latents[:, :, None], of_query, of_key, in_place=fresh)
        return placed.query, placed.key[:, :, 0]

    def _expanded(
        self, query: torch.Tensor, latents: torch.Tensor, asked: Asked, places: Places
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dims, heads = self.dims, self.num_heads
        latent = latents[..., : dims.rank]
        key = self.k_up_proj(latent).unflatten(-1, (heads, dims.nope))
        value = self.v_up_proj(latent).unflatten(-1, (heads, dims.value))
        if self.decoupled:
            placed = Placed(query, joined(key, latents[..., dims.rank :]))
        else:
            if self.q_norm is not None and self.k_norm is not None:
                query, key = self.q_norm(query), self.k_norm(key)
            placed = self.positions.place(query, key, asked.of_query, places)
            slopes = self.positions.slopes(query.device)
            placed = placed if slopes is None else Placed(placed.query, placed.key, slopes=slopes)
        return self.core(placed, value, asked.mask, return_lse=asked.return_lse)

    # the projections up, absorbed into queries and results

    def _absorbs(self, asked: Asked) -> bool:
        ups = (self.k_up_proj, self.v_up_proj)
        unchanged = self.decoupled or (self.q_norm is None and not self.positions.on_keys)
        if self.absorb is False or not unchanged or any(type(up) is not nn.Linear for up in ups):
            return False
        q_len, kv_len = asked.query.shape[1], asked.kv_len
        if ups[0].bias is not None:
            # the key's bias moves all scores of a row alike, and the value's comes back whole only from a row that
            # attends something
            odd = asked.mask is not None or asked.return_lse or self.add_zero_attn or q_len > kv_len
            if odd or torch.is_grad_enabled():
                return False
        return self.absorb is True or (q_len < kv_len and self._cheaper(q_len, kv_len))

    def _cheaper(self, q_len: int, kv_len: int) -> bool:
        """Whether absorbing takes fewer operations than projecting all cached latents up; per head and batch entry."""
        dims = self.dims
        up = dims.rank * (dims.nope + dims.value)
        return q_len * up + q_len * kv_len * (2 * dims.rank + dims.rope) < kv_len * up + q_len * kv_len * (
            dims.nope + dims.rope + dims.value
        )

    def _absorbed(
        self, query: torch.Tensor, latents: torch.Tensor, asked: Asked
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend the latents themselves, as the one key and value that all heads share.

        The heads of a query become queries of one head: kernels for shared keys end far below a latent's width, and
        what is left would repeat the latents for every head.
        """
        dims, heads, q_len = self.dims, self.num_heads, query.shape[1]
        up_key = self.k_up_proj.weight.unflatten(0, (heads, dims.nope))
        up_value = self.v_up_proj.weight.unflatten(0, (heads, dims.value))
        plain, rope = query.split((dims.nope, dims.rope), -1)
        inside = torch.cat((torch.einsum("bqhd,hdr->bqhr", plain, up_key), rope), -1)
        shared = latents[:, :, None]
        placed = Placed(inside.flatten(1, 2).unsqueeze(2), shared)
        mask = self._mask_of_heads(asked, latents.device)
        found, lse = self.core(
            placed, shared[..., : dims.rank], mask, return_lse=asked.return_lse, everywhere=True
        )  # (batch, q_len * heads, 1, rank)
        out = torch.einsum("bqhr,hvr->bqhv", found.view(-1, q_len, heads, dims.rank), up_value)
        bias = self.v_up_proj.bias
        out = out if bias is None else out + bias.unflatten(0, (heads, dims.value))
        return out, None if lse is None else lse.view(-1, q_len, heads).transpose(1, 2)

    def _mask_of_heads(self, asked: Asked, device: torch.device) -> torch.Tensor | None:
        """Return who attends whom (batch or 1, 1, q_len * heads, kv_len), a row for every head of a query."""
        q_len, kv_len = asked.query.shape[1], asked.kv_len
        window = self.window or (-1, 0 if self.causal and q_len > 1 else -1)
        mask = spelled_out(asked.mask, q_len, kv_len, window, self.positions.slopes(device), device)
        if mask is None:
            return None
        return mask.expand(-1, self.num_heads, q_len, kv_len).transpose(1, 2).flatten(1, 2).unsqueeze(1)

    def extra_repr(self) -> str:
        dims = self.dims
        parts = f"rank={dims.rank}, q_rank={self.q_rank}, nope={dims.nope}, rope={dims.rope}, value={dims.value}"
        return f"{super().extra_repr()}, {parts}"


def _check_decoupled(latent_dim: int | None, options: Options) -> None:
    if latent_dim is not None:
        raise InputError(f"latent_dim {latent_dim} belongs to the simple form; with kv_rank leave it out")
    for name in ("head_dim", "qk_norm"):
        if options.get(name):
            raise InputError(
                f"{name}: expected none with kv_rank, got {options[name]!r}; heads are nope_head_dim + rope_head_dim "
                "wide, and latents are normalised"
            )
