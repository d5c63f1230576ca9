"""What the ranks of a process group must agree on, as plain bytes: nothing is pickled.

Every function is collective, and ends alike everywhere: where one rank fails, all raise, so that none waits for one
that has left. Any backend will do; with one that moves only what lies on GPUs (NCCL), each rank must have set its
device, as for every other collective.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from tilewise.domain.errors import AgreementError

Group = dist.ProcessGroup | None
T = TypeVar("T")


def group_of(group: Group) -> dist.ProcessGroup | None:
    """Return the group that agrees: `group`, else all ranks where torch.distributed runs; None for a single process."""
    if group is not None:
        return group
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def together(group: dist.ProcessGroup, work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank. Where it raises on any, that one raises its error and the others
    AgreementError."""
    found, failed = None, None
    try:
        found = work()
    except Exception as error:
        failed = error
    elsewhere = any_rank(group, [failed is not None])[0]
    if failed is not None:
        raise failed
    if elsewhere:
        raise AgreementError("another rank of the process group failed, and says why; nothing was changed on this one")
    return found  # type: ignore[return-value]


def from_first(group: dist.ProcessGroup, make: Callable[[], bytes], error: type[Exception]) -> bytes:
    """Return on every rank what `make` returned on the first one of `group`, where alone it is called.

    Where it raises, the first rank raises that and the others `error` with its message where it is of that kind, else
    AgreementError.
    """
    content, raised, leads = b"", None, dist.get_rank(group) == 0
    if leads:
        try:
            content = make()
        except Exception as found:
            raised, content = found, str(found).encode("utf-8", "replace")
    where, first = _device(group), dist.get_global_rank(group, 0)
    outcome = 0 if raised is None else 1 if isinstance(raised, error) else 2
    head = torch.tensor([len(content), outcome], dtype=torch.int64, device=where)
    dist.broadcast(head, first, group=group)
    size, outcome = head.tolist()
    body = torch.empty(size, dtype=torch.uint8, device=where)
    if leads and size:
        body.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    if size:
        dist.broadcast(body, first, group=group)
    if raised is not None:
        raise raised
    sent = bytes(body.cpu().numpy())
    if outcome == 1:
        raise error(sent.decode())
    if outcome == 2:
        raise AgreementError(f"the first rank of the process group failed: {sent.decode()}")
    return sent


def any_rank(group: dist.ProcessGroup, flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on any rank of `group`; all ranks give equally many."""
    if not flags:
        return []
    found = torch.tensor([int(flag) for flag in flags], dtype=torch.int32, device=_device(group))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in found.tolist()]


def same_everywhere(group: dist.ProcessGroup, content: bytes) -> bool:
    """Return whether all ranks of `group` gave the same bytes."""
    number = int.from_bytes(hashlib.sha256(content).digest()[:7])
    found = torch.tensor([number, -number], dtype=torch.int64, device=_device(group))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    most, least = found.tolist()
    return bool(most == -least)


def _device(group: dist.ProcessGroup) -> torch.device:
    """Return where tensors must lie for `group` to send them: on the CPU where any of its backends takes them there."""
    if "cuda" not in (config := dist.get_backend_config(group)) or "cpu" in config:
        return torch.device("cpu")
    bound: torch.device | None = getattr(group, "bound_device_id", None)
    return bound or torch.device("cuda", torch.cuda.current_device())
