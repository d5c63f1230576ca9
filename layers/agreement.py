"""What the ranks of a process group must agree on, as plain bytes: nothing is pickled."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


def group_of(group: Group) -> dist.ProcessGroup | None:
    """Return the group that agrees: `group`, else all ranks where torch.distributed runs; None for a single process."""
    if group is not None:
        return group
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def from_first(
    group: dist.ProcessGroup, make: Callable[[], bytes], errors: tuple[type[Exception], ...]
) -> tuple[bytes, str | None]:
    """Return on every rank what `make` returned on the first one of `group`, where alone it is called.

    Where it raised one of `errors`, the bytes are empty and its message comes with them, on every rank.
    """
    data, error = b"", None
    if dist.get_rank(group) == 0:
        try:
            data = make()
        except errors as raised:
            error = str(raised)
    content = data if error is None else error.encode()
    where = _device(group)
    head = torch.tensor([len(content), error is not None], dtype=torch.int64, device=where)
    first = dist.get_global_rank(group, 0)
    dist.broadcast(head, first, group=group)
    size, failed = head.tolist()
    if dist.get_rank(group) == 0:
        body = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(where) if content else _empty(0, where)
    else:
        body = _empty(size, where)
    if size:
        dist.broadcast(body, first, group=group)
    sent = bytes(body.cpu().numpy()) if dist.get_rank(group) else content
    return (b"", sent.decode()) if failed else (sent, None)


def any_rank(group: dist.ProcessGroup, flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on any rank of `group`; all ranks give equally many."""
    if not flags:
        return []
    found = torch.tensor([int(flag) for flag in flags], dtype=torch.int32, device=_device(group))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in found.tolist()]


def _empty(size: int, where: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=where)


def _device(group: dist.ProcessGroup) -> torch.device:
    """Return where tensors must lie for `group` to send them."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
