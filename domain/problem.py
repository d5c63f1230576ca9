"""Problem: exactly what an attention call computes, as a value with a readable key."""

import enum
import re
from dataclasses import dataclass, replace
from typing import Self

from .errors import ProblemError

BUCKET_VERSION = 1
MAX_DECODE_Q_LEN = 16
MAX_WINDOW = (1 << 30) - 1  # kernels add lengths to it in 32 bits


class Pass(enum.StrEnum):
    """Whether only the forward runs, or forward and backward."""

    INFERENCE = "inference"
    TRAINING = "training"


class Dtype(enum.StrEnum):
    """Element type of query, key, value and result."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"


class Precision(enum.StrEnum):
    """How float32 products are computed: IEEE single precision, or TF32 tensor cores."""

    IEEE = "ieee"
    TF32 = "tf32"


class Layout(enum.StrEnum):
    """Order of the dimensions of query, key and value: batch, sequence, heads, head_dim."""

    BSHD = "bshd"
    BHSD = "bhsd"


_SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim")
_MASK = re.compile(r"(none|(bool|bias)(\.(?=.)(b1)?(h1)?(q1)?(k1)?)?)")
MAX_KEY_LENGTH = 300
_KEY = re.compile(
    r"(?P<pass_>inference|training)\.(?P<dtype>fp16|bf16|fp32)"
    r"\.b(?P<batch>\d+)\.h(?P<heads>\d+)\.kv(?P<kv_heads>\d+)\.q(?P<q_len>\d+)\.k(?P<kv_len>\d+)\.d(?P<head_dim>\d+)"
    r"(\.dv(?P<v_head_dim>\d+))?(?P<causal>\.causal)?(\.window(?P<left>\d+|inf)(-(?P<right>\d+|inf))?)?"
    r"(\.(?P<mask>(bool|bias)(\.(?=[bhqk]1)(b1)?(h1)?(q1)?(k1)?)?))?(?P<bias_grad>\.biasgrad)?(?P<alibi>\.alibi)?"
    r"(?P<dropout>\.dropout)?(?P<softcap>\.softcap)?(\.(?P<precision>tf32))?(?P<varlen>\.varlen)?"
    r"(\.page(?P<page_size>\d+))?(\.(?P<layout>bhsd))?(?P<deterministic>\.deterministic)?",
    re.ASCII,
)
_GRAMMAR = (
    "PASS.DTYPE.bB.hH.kvG.qQ.kK.dD[.dvD][.causal][.windowL[-R]][.bool|.bias[.b1h1q1k1]][.biasgrad][.alibi]"
    "[.dropout][.softcap][.tf32][.varlen][.pageN][.bhsd][.deterministic], for example "
    "inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One attention problem.

    Sizes are counts of elements. The mask bits:

    - causal: query i attends key j when j <= i + kv_len - q_len (bottom-right aligned).
    - window: (left, right) counted from the same diagonal, -1 for unbounded. A window with right 0 is causal, and a
      causal window has right 0: both spellings give the same Problem.
    - mask: `none`, `bool` or `bias`, the latter two with the dimensions along which it broadcasts: `bias.b1h1` is an
      additive mask of shape (1, 1, Q, K). Dimensions of size 1 are always among them.
    - varlen: `q_len` and `kv_len` are the longest lengths. With up to 16 queries it is decoding with a number of keys
      per row of the batch; above, `batch` sequences lie packed one behind the other (see `packed`).
    - page_size: tokens in one page of a paged key/value cache, 0 for a contiguous one.

    Raises ProblemError for a combination that cannot exist.
    """

    pass_: Pass = Pass.INFERENCE
    dtype: Dtype = Dtype.FP16
    batch: int
    heads: int
    kv_heads: int = 0
    q_len: int
    kv_len: int = 0
    head_dim: int
    v_head_dim: int = 0
    causal: bool = False
    window: tuple[int, int] | None = None
    mask: str = "none"
    bias_grad: bool = False
    alibi: bool = False
    dropout: bool = False
    softcap: bool = False
    precision: Precision = Precision.IEEE
    varlen: bool = False
    page_size: int = 0
    layout: Layout = Layout.BSHD
    deterministic: bool = False

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "pass_", Pass(self.pass_))
        set_(self, "dtype", Dtype(self.dtype))
        set_(self, "precision", Precision(self.precision))
        set_(self, "layout", Layout(self.layout))
        set_(self, "kv_heads", self.kv_heads or self.heads)
        set_(self, "kv_len", self.kv_len or self.q_len)
        set_(self, "v_head_dim", self.v_head_dim or self.head_dim)
        self._check()
        self._canonicalise_window()
        self._canonicalise_mask()

    def _check(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ProblemError(f"{name}: expected a whole number of at least 1, got {size!r}")
        if self.heads % self.kv_heads:
            raise ProblemError(
                f"heads must be a multiple of kv_heads, got heads={self.heads} and kv_heads={self.kv_heads}; "
                "use a kv_heads that divides heads (kv_heads = heads is plain multi-head attention)"
            )
        if self.window is not None and (
            len(self.window) != 2 or not all(type(side) is int and -1 <= side <= MAX_WINDOW for side in self.window)
        ):
            raise ProblemError(
                f"window: expected (left, right), each -1 (unbounded) or from 0 to {MAX_WINDOW}, got {self.window!r}"
            )
        if not _MASK.fullmatch(self.mask):
            raise ProblemError(f"mask: expected none, bool or bias, with .b1h1q1k1 as it broadcasts, got {self.mask!r}")
        if self.bias_grad and not (self.mask.startswith("bias") and self.pass_ is Pass.TRAINING):
            raise ProblemError("bias_grad needs mask='bias...' and pass_='training': there is nothing to differentiate")
        if self.precision is Precision.TF32 and self.dtype is not Dtype.FP32:
            raise ProblemError(f"precision 'tf32' belongs to dtype fp32, got {self.dtype}; leave it out")
        if self.page_size < 0:
            raise ProblemError(f"page_size: expected 0 (contiguous) or a number of tokens, got {self.page_size}")

    def _canonicalise_window(self) -> None:
        left, right = self.window or (-1, -1)
        causal = self.causal or right == 0
        if causal:
            right = 0
        window = None if left == -1 and (causal or right == -1) else (left, right)
        object.__setattr__(self, "causal", causal)
        object.__setattr__(self, "window", window)

    def _canonicalise_mask(self) -> None:
        """A mask broadcasts along every dimension of size 1, whether or not its pattern says so."""
        if self.mask == "none":
            return
        kind, _, given = self.mask.partition(".")
        sizes = {"b1": self.batch, "h1": self.heads, "q1": self.q_len, "k1": self.kv_len}
        dims = "".join(dim for dim, size in sizes.items() if dim in given or size == 1)
        object.__setattr__(self, "mask", f"{kind}.{dims}" if dims else kind)

    @property
    def key(self) -> str:
        """The canonical, readable, URL-safe name; `Problem.parse` is its inverse."""
        parts = [
            str(self.pass_),
            str(self.dtype),
            f"b{self.batch}",
            f"h{self.heads}",
            f"kv{self.kv_heads}",
            f"q{self.q_len}",
            f"k{self.kv_len}",
            f"d{self.head_dim}",
        ]
        if self.v_head_dim != self.head_dim:
            parts.append(f"dv{self.v_head_dim}")
        if self.causal:
            parts.append("causal")
        if self.window is not None:
            left, right = ("inf" if side == -1 else str(side) for side in self.window)
            parts.append(f"window{left}" if self.causal else f"window{left}-{right}")
        if self.mask != "none":
            parts.append(self.mask)
        parts += [name for name, on in (("biasgrad", self.bias_grad), ("alibi", self.alibi)) if on]
        parts += [name for name in ("dropout", "softcap") if getattr(self, name)]
        if self.precision is not Precision.IEEE:
            parts.append(str(self.precision))
        if self.varlen:
            parts.append("varlen")
        if self.page_size:
            parts.append(f"page{self.page_size}")
        if self.layout is not Layout.BSHD:
            parts.append(str(self.layout))
        if self.deterministic:
            parts.append("deterministic")
        return ".".join(parts)

    @classmethod
    def parse(cls, key: str) -> Self:
        """Return the Problem whose `key` this is. Raises ProblemError for anything else."""
        found = _KEY.fullmatch(key) if len(key) <= MAX_KEY_LENGTH else None
        if found is None:
            raise ProblemError(f"not a problem key: {key[:MAX_KEY_LENGTH]!r}; expected {_GRAMMAR}")
        part = found.groupdict()
        window = None
        if part["left"]:
            right = "0" if part["causal"] else part["right"] or "inf"
            window = (_side(part["left"]), _side(right))
        problem = cls(
            pass_=Pass(part["pass_"]),
            dtype=Dtype(part["dtype"]),
            window=window,
            mask=part["mask"] or "none",
            precision=Precision(part["precision"] or "ieee"),
            layout=Layout(part["layout"] or "bshd"),
            page_size=int(part["page_size"] or 0),
            batch=int(part["batch"]),
            heads=int(part["heads"]),
            kv_heads=int(part["kv_heads"]),
            q_len=int(part["q_len"]),
            kv_len=int(part["kv_len"]),
            head_dim=int(part["head_dim"]),
            v_head_dim=int(part["v_head_dim"] or 0),
            causal=part["causal"] is not None,
            bias_grad=part["bias_grad"] is not None,
            alibi=part["alibi"] is not None,
            dropout=part["dropout"] is not None,
            softcap=part["softcap"] is not None,
            varlen=part["varlen"] is not None,
            deterministic=part["deterministic"] is not None,
        )
        if problem.key != key:
            raise ProblemError(f"not the canonical key of a problem: {key!r}; write {problem.key!r}")
        return problem

    def bucket(self) -> Self:
        """Return the problem that run-time lookup uses for this one (rule BUCKET_VERSION).

        Lengths above 16 are rounded up to the next of 4, 5, 6, 7 times a power of two (at most 25% more), the same
        rule for q_len and kv_len, so equal lengths stay equal. Decoding (q_len up to 16) rounds kv_len and batch up
        to a power of two, at least 128 keys, so that a growing cache does not make a new problem every step.
        """
        if self.q_len <= MAX_DECODE_Q_LEN < self.kv_len:
            return replace(self, batch=_power_of_two(self.batch), kv_len=max(128, _power_of_two(self.kv_len)))
        batch = _power_of_two(self.batch) if self.varlen else self.batch
        return replace(self, batch=batch, q_len=_quarter_octave(self.q_len), kv_len=_quarter_octave(self.kv_len))

    @property
    def packed(self) -> bool:
        """Whether the tensors are sequences of different lengths, packed one behind the other.

        A packed call of at most 16 queries is written as one of 17: that is an upper bound too, and not decoding.
        """
        return self.varlen and self.q_len > MAX_DECODE_Q_LEN

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the two matrix products, counting only the pairs that may attend.

        Of varlen what it would be if every length were the longest.
        """
        return 2 * self.batch * self.heads * self.attended_pairs * (self.head_dim + self.v_head_dim)

    @property
    def attended_pairs(self) -> int:
        """Number of (query, key) pairs of one head that causality and the window leave."""
        left, right = self.window or (-1, 0 if self.causal else -1)
        offset = self.kv_len - self.q_len
        # keys up to the right edge, less those before the left edge
        total = self.q_len * self.kv_len if right == -1 else _clipped_sum(self.q_len, offset + right + 1, self.kv_len)
        return total if left == -1 else total - _clipped_sum(self.q_len, offset - left, self.kv_len)

    def to_json(self) -> str:
        return self.key

    @classmethod
    def from_json(cls, data: object) -> Self:
        return cls.parse(str(data))


def _side(text: str) -> int:
    return -1 if text == "inf" else int(text)


def _clipped_sum(count: int, first: int, most: int) -> int:
    """Return the sum of min(max(first + i, 0), most) for i in range(count)."""
    start = min(count, max(0, -first))  # terms before are 0
    stop = min(count, max(start, most - first))  # terms from here on are `most`
    inside = stop - start
    return inside * (first + start) + inside * (inside - 1) // 2 + (count - stop) * most


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _quarter_octave(size: int) -> int:
    if size <= MAX_DECODE_Q_LEN:
        return size
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step
