"""A tuner in a process of its own, made to be killed."""

from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from tilewise.db.session import Database
from tilewise.domain.job import Budget
from tilewise.domain.problem import Dtype, Problem
from tilewise.tuner.crew import Crew
from tilewise.tuner.tune import tune

from .fakes import CPU, FAST_LIMITS, set_up

PROBLEM = Problem(batch=1, heads=16, q_len=200, head_dim=16, dtype=Dtype.FP32, causal=True, window=(16, 0))
BUDGET = Budget(name="test", trials=70, seconds=300, patience=1000, finalists=1, rounds=15)


def tune_and_tell(url: str, told: "Connection[Any, Any]") -> None:
    """Tune PROBLEM, and tell how many trials are kept after each."""
    # workers come from the server of who forked this process, so that none has to start, and import torch, anew
    holders: tuple[Any, ...] = (forkserver, forkserver._forkserver)
    for holder in holders:
        holder.ensure_running = lambda: None
    with (
        Database.open(url, upgrade=True) as database,
        Crew(CPU, compilers=1, limits=FAST_LIMITS, setup=set_up) as crew,
    ):
        tune(
            PROBLEM,
            device=CPU,
            database=database,
            budget=BUDGET,
            backends=("cpu_tiled", "plain"),
            crew=crew,
            report=lambda progress: told.send((progress.phase, progress.trials)),
        )
