"""Whether the ranks of a job agree: started by torchrun on one machine, with NCCL where each rank has a GPU, else gloo.

    torchrun --nproc-per-node 2 -m tilewise.bench.ranks --output FILE

Each rank has answers of its own. All must run those of the first; what fails on one must fail on all, and none may wait
for another for ever. Each line of the report is something that was tried, with its seconds on the slowest rank. Where a
rank saw something else than it should have, it says so and every rank ends with status 1.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import tilewise
from tilewise.client.client import Client
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Plan
from tilewise.domain.errors import AgreementError, DeviceError, SnapshotError
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.kernels import device as devices
from tilewise.kernels.backends import BACKENDS
from tilewise.layers.agreement import any_rank, from_first

PROBLEM = Problem(dtype=Dtype.FP32, batch=1, heads=2, q_len=64, head_dim=16, causal=True)
OTHER = replace(PROBLEM, batch=3)
PLAIN, SDPA = Candidate("plain"), Candidate("sdpa")
# A rank that waits for longer is taken to wait for ever.
TIMEOUT = timedelta(seconds=60)


@dataclass
class Trials:
    """What was tried on this rank, with its seconds, and what was not as it should be."""

    seconds: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def expect(self, name: str, found: object, expected: object) -> None:
        if found != expected:
            self.wrong.append(f"{name}: expected {expected!r}, got {found!r}")


def raised(work: Callable[[], object]) -> str:
    """Return the name of the error that `work` raises; empty for none."""
    try:
        work()
    except Exception as error:
        return type(error).__name__
    return ""


def known(problem: Problem, candidate: Candidate) -> Answer:
    device = devices.describe(devices.select())
    software = devices.software(device.kind)
    return Answer(
        problem=problem, device_key=device.key, plan=Plan(candidate), match=Match.EXACT, software=software
    )  # fmt: skip


def broken(*_: object) -> None:
    raise RuntimeError("no such instruction here")


def try_all(folder: Path) -> Trials:
    """Do on this rank what every rank does, some of it with faults on one."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    trials, source = Trials(), folder / f"source{rank}.json"
    first, second = Snapshot.of([known(PROBLEM, PLAIN)]), Snapshot.of([known(PROBLEM, PLAIN), known(OTHER, SDPA)])
    source.write_bytes(b"damaged" if rank == 1 else (Snapshot(()) if rank else first).dumps())
    tilewise.configure(source=str(source))

    with trials.trying("ready"):
        trials.expect("ready", tilewise.ready().snapshot_id, first.id)
    trials.expect("the answer", tilewise.answer(PROBLEM).plan.forward, PLAIN)
    if rank == 0:
        source.write_bytes(second.dumps())
    with trials.trying("refresh"):
        trials.expect("refresh", tilewise.refresh().snapshot_id, second.id)

    with trials.trying("a plan that fails on one rank"):
        fault = mock.patch.object(BACKENDS["plain"], "forward", broken if rank == last else BACKENDS["plain"].forward)
        with fault:
            (warmed,) = tilewise.warmup([PROBLEM])
    reason = "no such instruction here" if rank == last else "it failed on another rank"
    trials.expect("warmup", (warmed.candidate, warmed.demoted), (SDPA, reason))

    with trials.trying("other problems on one rank"):
        found = raised(lambda: tilewise.warmup([PROBLEM, OTHER] if rank == last else [PROBLEM]))
    trials.expect("other problems", found, AgreementError.__name__)

    with trials.trying("a device that one rank lacks"):
        found = raised(lambda: tilewise.ready(device="cuda:99" if rank == last else "auto"))
    trials.expect("a missing device", found, (DeviceError if rank == last else AgreementError).__name__)

    with trials.trying("an error of ours on the first rank"), mock.patch.object(Client, "refresh", broken):
        found = raised(tilewise.refresh)
    trials.expect("an error of ours", found, "AgreementError" if rank else "RuntimeError")

    tilewise.configure(source=str(source), snapshot="a" * 64)
    with trials.trying("a pinned snapshot that is not there"):
        trials.expect("a missing pin", raised(tilewise.ready), SnapshotError.__name__)

    tilewise.configure(source=str(source))
    with trials.trying("ready again"):
        trials.expect("ready again", tilewise.ready().snapshot_id, second.id)
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="for the report of the first rank")
    given = parser.parse_args()
    backend = "nccl" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    assert dist.group.WORLD is not None, "it was made just now"
    with tempfile.TemporaryDirectory() as own:
        os.environ["TILEWISE_HOME"] = own
        folder = Path(from_first(dist.group.WORLD, own.encode, OSError).decode())
        trials = try_all(folder)
        for line in trials.wrong:
            print(f"rank {dist.get_rank()}: {line}", file=sys.stderr, flush=True)
        seconds = torch.tensor(list(trials.seconds.values()), device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        (failed,) = any_rank(dist.group.WORLD, [bool(trials.wrong)])
        if dist.get_rank() == 0:
            report = {
                "command": f"torchrun --nproc-per-node {size} -m tilewise.bench.ranks",
                "backend": backend,
                "ranks": size,
                "right": not failed,
                "slowest_s": dict(zip(trials.seconds, seconds.tolist(), strict=True)),
            }
            text = json.dumps(report, indent=1)
            print(text, flush=True)
            if given.output is not None:
                given.output.write_text(text + "\n")
        # who leaves early takes the folder, and gloo's connections, away from those that still need them
        if store.add("done", 1) == size:
            store.set("all done", "")
        store.wait(["all done"])
    dist.destroy_process_group()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
