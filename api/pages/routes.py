"""The routes of all pages."""

from . import (
    compare,
    compare_sides,
    demand,
    devices,
    jobs,
    overview,
    problem,
    problems,
    sign_in,
    snapshots,
    tokens,
    trial,
)

ROUTERS = tuple(
    module.router
    for module in (
        overview, problems, problem, trial, compare, compare_sides, jobs, devices, snapshots, demand, tokens, sign_in,
    )
)  # fmt: skip
