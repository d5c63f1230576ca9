"""What all attention layers share: their options, their forward, and what they check before anything is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tilewise.domain.config import Candidate
from tilewise.domain.errors import InputError
from tilewise.kernels.run import autocasts

from .attention import attention
from .checks import check_dense, check_flags, is_one_of
from .kv_cache import KeyValueCache
from .masks import layer_mask, merged, with_zero_key
from .norms import RMSNorm
from .options import backend_of, check_epsilon, check_options, check_sizes
from .positions import Placed, Places, Span, as_tensor, positions_of
from .rope_scaling import Scaling, scaling_of

PositionIds = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Result = torch.Tensor | tuple[torch.Tensor | KeyValueCache, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """One forward: the rows (batch, seq, width) that queries, keys and values are made of, and how they attend."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    of_query: Places
    of_key: Places  # of the new keys
    mask: torch.Tensor | None
    past: KeyValueCache | None
    use_cache: bool
    return_lse: bool

    @property
    def past_length(self) -> int:
        return 0 if self.past is None else self.past.length

    @property
    def kv_len(self) -> int:
        return self.past_length + self.key.shape[1]


@dataclass(frozen=True, slots=True)
class Attended:
    """The result (batch, q_len, heads, dim), its LSE (batch, heads, q_len) where it was asked for, and the cache."""

    out: torch.Tensor
    lse: torch.Tensor | None
    cache: KeyValueCache | None


class FastAttention(nn.Module):
    """The options and the forward of every attention layer; a subclass says how queries, keys and values are made.

    - embed_dim: width of input and output. num_heads: heads of head_dim each (embed_dim / num_heads by default).
    - dropout: share of the weights that are dropped in training mode, the others being scaled.
    - bias: whether the projections have one.
    - kernel_type: "auto" (what was measured to be fastest, torch's own choice where nothing was), "flash", "triton",
      "sdpa" (torch's own choice), "pytorch" (matmul, softmax, matmul), or a Candidate, a backend with its configs.
      strict: raise where that kernel cannot run, instead of one warning and torch's own choice.
    - causal: each position sees itself and what came before. sliding_window: it sees that many positions at most,
      itself included (to each side where not causal).
    - position_method: "none", "rope", "alibi", or a module that places queries and keys (layers.positions.Custom).
    - max_seq_len: positions up to it are looked up in a table, others computed; dynamic scaling and YaRN without
      original_max_position_embeddings take it as the length of training.
    - rope_base, rope_scaling: of "rope"; the scaling as in a Hugging Face configuration, {"rope_type": "llama3", ...},
      with rope_type linear, dynamic, yarn or llama3 (layers.rope_scaling).
    - qk_norm: RMSNorm over the head_dim of queries and keys, before their positions. qk_norm_eps: its epsilon.
    - add_zero_attn: one more key and value of zeros, which every query sees wherever it stands.
    - batch_first: whether inputs and results are (batch, seq, width) or (seq, batch, width).

    Raises InputError for sizes and options that do not fit together.
    """

    o_proj: nn.Linear  # to be made by a subclass
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        kernel_type: str | Candidate = "auto",
        causal: bool = False,
        position_method: str | nn.Module = "none",
        max_seq_len: int = 2048,
        rope_base: float = 10000.0,
        rope_scaling: Scaling | Mapping[str, Any] | None = None,
        sliding_window: int | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        add_zero_attn: bool = False,
        batch_first: bool = True,
        strict: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim=embed_dim, num_heads=num_heads, head_dim=head_dim, max_seq_len=max_seq_len)
        check_options(kernel_type, dropout, sliding_window)
        check_flags(
            bias=bias, causal=causal, qk_norm=qk_norm, add_zero_attn=add_zero_attn, batch_first=batch_first,
            strict=strict,
        )  # fmt: skip
        check_epsilon("qk_norm_eps", qk_norm_eps)
        if head_dim is None and embed_dim % num_heads:
            raise InputError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.dropout, self.causal, self.kernel_type, self.strict = float(dropout), causal, kernel_type, strict
        self.add_zero_attn, self.batch_first = add_zero_attn, batch_first
        self.window = None
        if sliding_window is not None:
            self.window = (sliding_window - 1, 0 if causal else sliding_window - 1)
        self.rope_scaling = scaling_of(rope_scaling)
        self.position_method = position_method
        self.positions = positions_of(
            position_method,
            heads=num_heads,
            dim=self.head_dim,
            base=rope_base,
            max_seq_len=max_seq_len,
            scaling=self.rope_scaling,
        )
        self.q_norm = RMSNorm(self.head_dim, qk_norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, qk_norm_eps, device=device, dtype=dtype) if qk_norm else None
        self._linear = {"bias": bias, "device": device, "dtype": dtype}

    def _projection(self, width: int, into: int) -> nn.Linear:
        """Return a projection of this layer's bias, device and dtype."""
        return nn.Linear(width, into, **self._linear)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return float(self.head_dim**-0.5) * self._score_factor()  # not kept: dynamo takes a module's floats as variable

    def _score_factor(self) -> float:
        return 1.0

    def reset_parameters(self) -> None:
        """Draw the weights of the projections from Xavier's uniform distribution; biases are 0."""
        for name, layer in self.named_children():
            if name.endswith("_proj") and isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        position_ids: PositionIds | None = None,
        past_key_value: KeyValueCache | None = None,
        use_cache: bool = False,
        return_lse: bool = False,
    ) -> Result:
        """Return (batch, q_len, embed_dim): self-attention of one tensor, cross-attention of two or three.

        - query (batch, q_len, embed_dim), key (batch, kv_len, kdim), value (batch, kv_len, vdim); without `value` key
          is both. With batch_first=False (seq, batch, width), also in the result.
        - attn_mask: bool (True = attend; torch.nn.MultiheadAttention means the opposite) or additive floating point:
          (q_len, kv_len), (batch, kv_len), (batch, q_len, kv_len) or (batch, heads, q_len, kv_len), or 1 for all but
          the last. The keys of the cache count in kv_len and stand first.
        - position_ids: integers (q_len,) or (batch, q_len) of the queries, and of the keys in self-attention; a pair
          of them for queries and keys. By default keys count from 0, those of the cache included, and the last query
          stands where the last key does. ALiBi, causal and sliding_window always count so.
        - past_key_value: what an earlier call returned; its keys stand before those of this call.
        - use_cache: return the cache of all keys so far. return_lse: return the LSE, (batch, heads, q_len) float32,
          natural log, without a gradient.

        With return_lse and use_cache the result is (result, LSE, cache), without what was not asked for. Queries with
        nothing to attend give the bias of o_proj.

        Raises InputError, naming shapes, for what does not fit the layer or each other; with strict=True whatever
        `tilewise.attention` raises.
        """
        asked = self._asked(query, key, value, attn_mask, position_ids, past_key_value, use_cache, return_lse)
        found = self._attend(asked)
        out = self.o_proj(found.out.flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        more = tuple(each for each in (found.lse, found.cache) if each is not None)
        return (out, *more) if more else out

    def _attend(self, asked: Asked) -> Attended:
        """Return what queries see of the keys; a subclass with another way to make them replaces this."""
        query, key, value = self._project(asked)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.positions.late:
            places = as_tensor(asked.of_key, key.device).expand(key.shape[:2])
            (key, value, places), cache = self._cached(asked, key, value, places)
            of_key = asked.of_key if asked.past is None else places
            placed = self.positions.place(query, key, asked.of_query, of_key)
        else:
            placed = self.positions.place(query, key, asked.of_query, asked.of_key)
            (key, value), cache = self._cached(asked, placed.key, value)
            placed = replace(placed, key=key, slopes=self.positions.slopes(query.device))
        out, lse = self.core(placed, value, asked.mask, return_lse=asked.return_lse)
        return Attended(out, lse, cache)

    def _cached(self, asked: Asked, *new: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], KeyValueCache | None]:
        """Return the tensors of all tokens, cached and new, and the cache of them where one is wanted."""
        if asked.past is None:
            return new, KeyValueCache(new) if asked.use_cache else None
        cache = asked.past.append(*new)
        return cache.tensors, cache if asked.use_cache else None

    def core(
        self,
        placed: Placed,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        return_lse: bool = False,
        everywhere: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return attention alone, without projections: (batch, q_len, heads, v_head_dim), and the LSE if asked for.

        `mask` has four dimensions, as of `masks.layer_mask`; `everywhere`: it says all, and causal and window nothing.
        """
        query, key, slopes = placed.query, placed.key, placed.slopes
        q_len = query.shape[1]
        mask, causal, window = merged(mask, placed.bias), self.causal, self.window
        if everywhere:
            causal, window = False, None
        if q_len == 1 and window is None:  # one query sees all keys, causal or not, and is looked up without
            causal = False
        if self.add_zero_attn:
            window = window or (-1, 0 if causal else -1)
            key, value, mask, window = with_zero_key(key, value, mask, q_len, window, slopes)
            causal, slopes = False, None
        found = attention(
            query,
            key,
            value,
            causal=causal,
            window=window,
            mask=mask,
            alibi_slopes=slopes,
            dropout=self.dropout if self.training else 0.0,
            scale=self.scale,
            return_lse=return_lse,
            backend=backend_of(self.kernel_type),
            strict=self.strict,
        )
        return (found, None) if isinstance(found, torch.Tensor) else found

    def _project(self, asked: Asked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries (batch, q_len, heads, head_dim), keys and values (batch, new, kv_heads, head_dim)."""
        raise NotImplementedError

    # what is checked

    def _widths(self) -> tuple[int, int, int]:
        """Return the widths of query, key and value."""
        return self.embed_dim, self.embed_dim, self.embed_dim

    def _asked(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        mask: torch.Tensor | None,
        position_ids: PositionIds | None,
        past: KeyValueCache | None,
        use_cache: bool,
        return_lse: bool,
    ) -> Asked:
        alone = (key is None or key is query) and (value is None or value is query)
        if key is None:
            if value is not None:
                raise InputError(f"expected a key with the value {tuple(value.shape)}; give (query, key, value)")
            key = query
        value = key if value is None else value
        given = (query, key, value)
        for name, tensor, width in zip(("query", "key", "value"), given, self._widths(), strict=True):
            self._check_source(name, tensor, width)
        if not self.batch_first:
            query, key, value = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
            key = query if alone else key
            value = key if given[2] is given[1] else value
        if key.shape[:2] != value.shape[:2] or query.shape[0] != key.shape[0]:
            raise InputError(
                "expected query, key and value of one batch, key and value of one length, got "
                f"{', '.join(str(tuple(tensor.shape)) for tensor in given)}"
            )
        if past is not None and not isinstance(past, KeyValueCache):
            raise InputError(f"past_key_value: expected a KeyValueCache, got {type(past).__name__}")
        if past is not None and past.batch != query.shape[0]:
            raise InputError(f"past_key_value: expected a batch of {query.shape[0]} like query, got {past.batch}")
        first = 0 if past is None else past.length
        kv_len = first + key.shape[1]
        if mask is not None:
            sizes = {"batch": query.shape[0], "heads": self.num_heads, "q_len": query.shape[1], "kv_len": kv_len}
            mask = layer_mask(mask, **sizes)
            if mask.device != query.device:
                raise InputError(
                    f"attn_mask: expected it on {query.device} like query, got {tuple(mask.shape)} on {mask.device}"
                )
        of_query: Places = Span(kv_len - query.shape[1], query.shape[1])
        of_key: Places = Span(first, key.shape[1])
        if position_ids is not None:
            of_query, of_key = self._places(position_ids, query, key, of_key, alone)
        return Asked(query, key, value, of_query, of_key, mask, past, use_cache, return_lse)

    def _places(
        self, given: PositionIds, query: torch.Tensor, key: torch.Tensor, of_key: Places, alone: bool
    ) -> tuple[Places, Places]:
        if self.positions.slopes(query.device) is not None:
            raise InputError("position_ids: ALiBi counts places in the sequence; leave them out, or use 'rope'")
        if isinstance(given, tuple) and len(given) != 2:
            raise InputError(f"position_ids: expected those of queries, or a pair with those of keys, got {len(given)}")
        of_query, key_ids = given if isinstance(given, tuple) else (given, given if alone else None)
        found: list[Places] = [_ids(of_query, query)]
        found.append(of_key if key_ids is None else _ids(key_ids, key))
        return found[0], found[1]

    def _check_source(self, name: str, tensor: torch.Tensor, width: int) -> None:
        check_dense(name, tensor)
        if tensor.dim() != 3 or tensor.shape[-1] != width:
            order = "(batch, seq, " if self.batch_first else "(seq, batch, "
            raise InputError(f"expected {name} {order}{width}), got {tuple(tensor.shape)}")
        projection = self.o_proj
        if type(projection) is not nn.Linear:  # an adapter or a quantised layer says by itself what it takes
            return
        weight, kind = projection.weight, tensor.device.type
        if tensor.device != weight.device or (tensor.dtype != weight.dtype and not autocasts(kind)):
            raise InputError(
                f"expected {name} {weight.dtype} on {weight.device} like the layer's weights, got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )

    def extra_repr(self) -> str:
        method = self.position_method if isinstance(self.position_method, str) else "module"
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}", f"num_kv_heads={self.num_kv_heads}"]
        parts += [f"head_dim={self.head_dim}", f"kernel_type={str(self.kernel_type)!r}", f"causal={self.causal}"]
        return ", ".join([*parts, f"position_method={method!r}", f"window={self.window}", f"dropout={self.dropout}"])


def _ids(given: object, rows: torch.Tensor) -> torch.Tensor:
    """Return position ids (1 or batch, seq). Raises InputError for others than integers of that shape."""
    batch, length = rows.shape[:2]
    shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
    rowwise = isinstance(given, torch.Tensor) and given.dim() == 2 and is_one_of(given.shape[0], 1, batch)
    if not isinstance(given, torch.Tensor) or not (given.dim() == 1 or rowwise) or given.shape[-1] != length:
        raise InputError(f"position_ids: expected integers ({length},) or ({batch}, {length}), got {shape}")
    if given.dtype not in (torch.int64, torch.int32) or given.device != rows.device:
        raise InputError(
            f"position_ids: expected int64 or int32 on {rows.device} like query, got {given.dtype} {shape} on "
            f"{given.device}"
        )
    return given if given.dim() == 2 else given[None]
