"""The routes of all pages."""

from . import compare, compare_sides, demand, devices, jobs, overview, problems, sign_in, snapshots, tokens

ROUTERS = tuple(
    module.router
    for module in (
        overview, problems, compare, compare_sides, jobs, devices, snapshots, demand, tokens, sign_in,
    )
)  # fmt: skip
