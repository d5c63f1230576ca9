"""Call: one attention problem together with its tensors, as every backend receives it."""

from dataclasses import dataclass, replace

import torch

from tilewise.domain.errors import InputError
from tilewise.domain.problem import MAX_DECODE_Q_LEN, Dtype, Problem

TORCH_DTYPES = {Dtype.FP16: torch.float16, Dtype.BF16: torch.bfloat16, Dtype.FP32: torch.float32}
DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOATING = (*DTYPES, torch.float64)  # of biases and slopes


@dataclass(slots=True, eq=False)
class Call:
    """Tensors and scalars of one call, already checked against each other. Nobody changes a call, they `replace` it; it
    is not frozen because a frozen one takes the host a microsecond more to make, at every call.

    - query (B, Q, H, D), key (B, K, Hkv, D), value (B, K, Hkv, Dv): any strides. With cu_seqlens, B sequences packed
      one behind the other: (total_q, H, D), (total_kv, Hkv, D), (total_kv, Hkv, Dv).
    - scale: factor on query @ key.T before everything else.
    - mask: bool (True = attend) or additive, broadcastable to (B, H, Q, K); None without one.
    - alibi_slopes: float32, (H,) or (B, H); adds -slope * |i + K - Q - j|.
    - softcap: scores become softcap * tanh(scores / softcap) where it is above 0.
    - dropout: share of the weights that are set to 0, the others being scaled by 1 / (1 - dropout); seed says which.

    Decoding (q_len up to 16) may have two more, int32 on the device of the tensors:

    - kv_lengths: (B,), the keys of each row of the batch: its first kv_lengths[b], from whose end its diagonal counts;
      None where every row has problem.kv_len. What lies behind is never read.
    - block_table: (B, max_pages), the pages of each row in order; key and value are then (pages, page_size, Hkv, D).
      Entries of which no key is attended may hold anything.

    A packed problem has

    - cu_seqlens: (cu_q, cu_kv), int32 (B + 1,) on the device of the tensors: sequence b has the queries
      cu_q[b]..cu_q[b + 1] and the keys cu_kv[b]..cu_kv[b + 1], perhaps none, and a diagonal of its own, which ends at
      its last query and key. The longest are at most problem.q_len and problem.kv_len. There is no mask; the result is
      (total_q, H, Dv), the LSE (H, total_q).
    """

    problem: Problem
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    mask: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    softcap: float = 0.0
    dropout: float = 0.0
    seed: int = 0
    kv_lengths: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def mask_is_bool(self) -> bool:
        return self.mask is not None and self.mask.dtype is torch.bool

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) reach of a query around its diagonal key, -1 for unbounded, causality included."""
        return self.problem.window or (-1, 0 if self.problem.causal else -1)

    def with_tensors(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> "Call":
        return replace(self, query=query, key=key, value=value)


def check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, paged: bool = False, packed: bool = False
) -> None:
    """Raise InputError unless BSHD query, key and value fit together and have a dtype that kernels take.

    - paged: key and value are (pages, page_size, heads, head_dim), and their first size is not the query's.
    - packed: all are (total, heads, head_dim), the total of query is not that of key, and each may be 0.
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    names = ("total", "heads", "head_dim") if packed else ("batch", "seq", "heads", "head_dim")
    if not query.dim() == key.dim() == value.dim() == len(names):
        raise InputError(f"expected {len(names)} dimensions ({', '.join(names)}), got {shapes}")
    if query.dtype not in DTYPES:
        raise InputError(
            f"expected float16, bfloat16 or float32, got {query.dtype} ({shapes}); "
            "for other dtypes use tilewise.kernels.reference.attention"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"expected one dtype, got query {query.dtype}, key {key.dtype}, value {value.dtype} ({shapes})"
        )
    if not query.device == key.device == value.device:
        raise InputError(
            f"expected one device, got query {query.device}, key {key.device}, value {value.device} ({shapes})"
        )
    if not packed and (key.shape[0] != value.shape[0] or (not paged and query.shape[0] != key.shape[0])):
        raise InputError(f"expected one {'number of pages' if paged else 'batch size'}, got {shapes}")
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise InputError(f"expected key and value of the same length and heads, got {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise InputError(f"expected query and key of the same head_dim, got {shapes}")
    if any(0 in tensor.shape[1 if packed else 0 :] for tensor in (query, key, value)):
        raise InputError(f"expected no empty dimension, got {shapes}")
    if query.shape[-2] % key.shape[-2]:
        raise InputError(
            f"query heads must be a multiple of key heads, got {query.shape[-2]} and {key.shape[-2]} ({shapes})"
        )


def check_cache(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    """Raise InputError unless the tensors of a decoding call fit together; their values are not looked at.

    query (B, Q, H, D) with Q up to 16; caches (B, K, Hkv, D or Dv), or (pages, page_size, Hkv, D or Dv) with a
    block_table (B, max_pages); kv_lengths (B,).
    """
    check_tensors(query, key_cache, value_cache, paged=block_table is not None)
    batch = query.shape[0]
    if query.shape[1] > MAX_DECODE_Q_LEN:
        raise InputError(
            f"decoding takes at most {MAX_DECODE_Q_LEN} queries a row, got query {tuple(query.shape)}; "
            "use tilewise.attention"
        )
    if kv_lengths is not None and tuple(kv_lengths.shape) != (batch,):
        raise InputError(f"lengths: expected shape (batch,) = ({batch},), got {tuple(kv_lengths.shape)}")
    if block_table is not None and (
        block_table.dim() != 2 or block_table.shape[0] != batch or block_table.shape[1] == 0
    ):
        raise InputError(
            f"block_table: expected shape (batch, max_pages) = ({batch}, 1 or more), got {tuple(block_table.shape)}"
        )
    for name, tensor in (("lengths", kv_lengths), ("block_table", block_table)):
        if tensor is not None and (tensor.dtype is not torch.int32 or tensor.device != query.device):
            raise InputError(
                f"{name}: expected int32 on {query.device} like query, got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )


def check_cache_values(call: Call) -> None:
    """Raise InputError for a length that the cache cannot hold, or a page in reach that does not exist.

    Copies lengths and table to the host: on a GPU this waits for the device.
    """
    kv_len = call.problem.kv_len
    lengths = torch.full((call.query.shape[0],), kv_len) if call.kv_lengths is None else call.kv_lengths.cpu()
    if not bool(((lengths >= 0) & (lengths <= kv_len)).all()):
        raise InputError(
            f"lengths: expected 0 to {kv_len}, what the cache holds, got {int(lengths.min())} to {int(lengths.max())}"
        )
    if call.block_table is None:
        return
    table, (pages, page_size) = call.block_table.cpu(), call.key.shape[:2]
    first_key = torch.arange(table.shape[1])[None, :] * page_size
    reached = first_key < lengths[:, None]
    if call.window[0] != -1:
        reached &= first_key + page_size > lengths[:, None] - call.query.shape[1] - call.window[0]
    wrong = reached & ((table < 0) | (table >= pages))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(
            f"block_table: expected pages 0 to {pages - 1} for the keys in reach, got {int(table[row, column])} at "
            f"({row}, {column})"
        )


def check_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise InputError unless `mask` is bool or floating and broadcasts to (B, H, Q, K)."""
    full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    shape = tuple(mask.shape)
    if mask.dtype is not torch.bool and mask.dtype not in FLOATING:
        raise InputError(f"mask: expected bool (True = attend) or additive floating point, got {mask.dtype} {shape}")
    if mask.device != query.device:
        raise InputError(f"mask: expected it on {query.device} like query, got {shape} on {mask.device}")
    fits = mask.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise InputError(
            f"mask: expected a shape that broadcasts to (batch, heads, q_len, kv_len) = {full}, got {shape}"
        )


def mask_pattern(mask: torch.Tensor | None) -> str:
    """Return the Problem.mask of a mask tensor: its kind and the dimensions along which it broadcasts."""
    if mask is None:
        return "none"
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    dims = "".join(name for name, size in zip(("b1", "h1", "q1", "k1"), shape, strict=True) if size == 1)
    kind = "bool" if mask.dtype is torch.bool else "bias"
    return f"{kind}.{dims}" if dims else kind


def allowed(
    q_rows: torch.Tensor, kv_columns: torch.Tensor, offset: int, window: tuple[int, int]
) -> torch.Tensor | None:
    """Return which (row, column) pairs the window leaves, bool (rows, columns); None where it leaves all.

    `offset` is kv_len - q_len: the diagonal is bottom-right aligned.
    """
    left, right = window
    if left == -1 and right == -1:
        return None
    distance = kv_columns[None, :] - (q_rows[:, None] + offset)
    if left == -1:
        return distance <= right
    if right == -1:
        return distance >= -left
    return (distance >= -left) & (distance <= right)
