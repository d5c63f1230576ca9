"""Tiled attention on the CPU: tiles outside the causal or sliding window are never computed.

The algorithm is FlashAttention's forward (Dao et al. 2022, algorithm 1) with one difference: where a tile of queries
reaches no more than block_k keys, its softmax needs no running maximum, and is computed at once.
"""

from collections.abc import Mapping

import torch

from tilewise.domain.config import Config, Value
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Problem
from tilewise.domain.space import Constraint, Parameter, SearchSpace

from ..backend import Backend, unsupported_feature, unsupported_varlen
from ..call import Call, allowed
from ..packed import sequences

KERNEL = "cpu_tiled"
_TILES = (16, 32, 64, 128, 256, 512, 1024, 2048)
_MAX_TILE_BYTES = 64 << 20


class TiledCpu(Backend):
    """Blocks of queries against the keys they reach, several heads at a time, accumulated in float32."""

    name = KERNEL
    gives_lse = True

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CPU:
            return "needs a CPU"
        return unsupported_feature(problem, "mask", "alibi", "softcap", "dropout") or unsupported_varlen(problem)

    def spaces(self, problem: Problem, device: Device) -> Mapping[str, SearchSpace]:  # noqa: ARG002
        return {"forward": _space(problem)}

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if config is None:
            config = _space(call.problem).default
        if call.cu_seqlens is None:
            return _attend(call, config)
        total, heads = call.query.shape[:2]
        out = call.query.new_zeros(total, heads, call.value.shape[-1])
        lse = call.query.new_full((heads, total), -torch.inf, dtype=torch.float32)
        for one in sequences(call):
            part, part_lse = _attend(one.call, config)
            out[one.rows], lse[:, one.rows] = part[0], part_lse[0]
        return out, lse


def _choices(length: int, least: int) -> tuple[int, ...]:
    """Return the tile sizes from `least` up to the first that holds `length`."""
    sizes = [size for size in _TILES if size >= least]
    return tuple(size for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] < length)


def _space(problem: Problem) -> SearchSpace:
    group = problem.heads // problem.kv_heads
    block_q = _choices(problem.q_len, 16)
    block_k = _choices(problem.kv_len, 64)
    heads = (*(n for n in (1, 2, 4, 8, 16, 32, 64) if n < problem.kv_heads), problem.kv_heads)

    def fits(values: Mapping[str, Value]) -> bool:
        rows = int(values["heads_per_chunk"]) * group * int(values["block_q"])
        return rows * int(values["block_k"]) * 4 <= _MAX_TILE_BYTES

    return SearchSpace(
        kernel=KERNEL,
        parameters=(
            Parameter("block_q", block_q),
            Parameter("block_k", block_k),
            Parameter("heads_per_chunk", heads),
        ),
        constraints=(Constraint("a tile of scores would exceed 64 MiB", fits),),
        default=Config.of(
            KERNEL, block_q=min(block_q[-1], 64), block_k=min(block_k[-1], 256), heads_per_chunk=min(heads[-1], 2)
        ),
    )


def _attend(call: Call, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_len, heads, _ = call.query.shape
    out = call.query.new_empty(batch, q_len, heads, call.value.shape[-1])
    lse = call.query.new_empty(batch, heads, q_len, dtype=torch.float32)
    group = heads // call.key.shape[2]
    chunk = config["heads_per_chunk"]
    for entry in range(batch):
        for first in range(0, call.key.shape[2], chunk):
            kv = slice(first, first + chunk)
            q = slice(first * group, (first + chunk) * group)
            _attend_heads(
                call,
                call.query[entry, :, q],
                call.key[entry, :, kv],
                call.value[entry, :, kv],
                out[entry, :, q],
                lse[entry, q],
                config["block_q"],
                config["block_k"],
            )
    return out, lse


def _attend_heads(
    call: Call,
    query: torch.Tensor,  # (Q, chunk * group, D)
    key: torch.Tensor,  # (K, chunk, D)
    value: torch.Tensor,  # (K, chunk, Dv)
    out: torch.Tensor,  # (Q, chunk * group, Dv), written
    lse: torch.Tensor,  # (chunk * group, Q), written
    block_q: int,
    block_k: int,
) -> None:
    q_len, kv_len, chunk = query.shape[0], key.shape[0], key.shape[1]
    group = query.shape[1] // chunk
    left, right = call.window
    offset = kv_len - q_len
    keys = key.permute(1, 2, 0).float()  # (chunk, D, K)
    values = value.transpose(0, 1).float()  # (chunk, K, Dv)
    for row in range(0, q_len, block_q):
        rows = min(block_q, q_len - row)
        start = 0 if left == -1 else max(0, row + offset - left)
        stop = kv_len if right == -1 else min(kv_len, row + rows + offset + right)
        q_tile = query[row : row + rows].float().mul(call.scale)  # a copy when scaled: the input stays
        q_tile = q_tile.unflatten(1, (chunk, group)).permute(1, 2, 0, 3).reshape(chunk, group * rows, -1)
        tile = _Tile(q_tile, group, rows, row + offset, call.window)
        acc, total, peak = tile.attend(keys, values, start, max(start, stop), block_k)
        tile_out = (acc / total.clamp_min(torch.finfo(torch.float32).tiny)).unflatten(1, (group, rows))
        out[row : row + rows] = tile_out.permute(2, 0, 1, 3).flatten(1, 2)
        lse[:, row : row + rows] = (peak + total.log()).view(chunk * group, rows)


class _Tile:
    """One block of queries of several heads; rows of one key head's group lie beneath each other."""

    def __init__(self, query: torch.Tensor, group: int, rows: int, diagonal: int, window: tuple[int, int]) -> None:
        self.query = query  # (chunk, group * rows, D), scaled
        self.group, self.rows = group, rows
        self.diagonal = diagonal  # the key on the diagonal of the first row
        self.window = window

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, start: int, stop: int, block_k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the weighted values, the sum of weights and the maximum of scores over keys start..stop."""
        chunk, height, _ = self.query.shape
        total = self.query.new_zeros(chunk, height, 1)
        peak = torch.full_like(total, -torch.inf)
        acc: torch.Tensor | None = None
        for first in range(start, stop, block_k):
            last = min(first + block_k, stop)
            scores = self._scores(keys, first, last)
            new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
            # a row that has seen no key yet has the peak -inf: subtract 0 there, so that exp gives 0 and not NaN
            shift = new_peak.masked_fill(new_peak == -torch.inf, 0)
            weights = scores.sub_(shift).exp_()
            if acc is None:
                total, acc = weights.sum(-1, keepdim=True), weights @ values[:, first:last]
            else:
                decay = (peak - shift).exp_()
                total = total.mul_(decay).add_(weights.sum(-1, keepdim=True))
                acc = torch.baddbmm(acc.mul_(decay), weights, values[:, first:last])
            peak = new_peak
        if acc is None:
            acc = self.query.new_zeros(chunk, height, values.shape[-1])
        return acc, total, peak

    def _scores(self, keys: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return scores (chunk, group * rows, last - first); only a tile on the window's border is masked."""
        scores = self.query @ keys[:, :, first:last]
        left, right = self.window
        inside_right = right == -1 or last - 1 <= self.diagonal + right
        inside_left = left == -1 or first >= self.diagonal + self.rows - 1 - left
        if inside_right and inside_left:
            return scores
        reach = allowed(torch.arange(self.rows), torch.arange(first, last), self.diagonal, self.window)
        assert reach is not None
        masked = scores.view(scores.shape[0], self.group, self.rows, -1)
        masked.masked_fill_(~reach, -torch.inf)
        return scores
