"""The routes of all pages."""

from . import demand, devices, jobs, overview, problems, sign_in, snapshots, tokens

ROUTERS = tuple(module.router for module in (overview, problems, jobs, devices, snapshots, demand, tokens, sign_in))
