"""What a worker may take: seconds by phase, silence, memory."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long each phase of a task may last and how much memory a process may hold, before it is killed.

    - start: seconds until a new process answers; it imports torch, on a machine that may be busy.
    - prepare: seconds for the tensors and their float64 results, and for torch's own choice, which the rest is measured
      by.
    - load: seconds for importing what a backend needs.
    - compile: seconds for compiling one candidate ahead.
    - check, measure: seconds for checking a candidate and for timing it. Where right candidates take long, the limit is
      ten times the longest; a backend that compiles when it is first called gets its `compile_seconds` on top.
    - silence: seconds without a heartbeat: a process that is stopped, or stuck where Python cannot run.
    - memory_gib, compile_memory_gib: GiB, resident in the process that measures, of data in one that compiles.
    """

    start: float = 300.0
    prepare: float = 900.0
    load: float = 120.0
    compile: float = 120.0
    check: float = 20.0
    measure: float = 20.0
    silence: float = 90.0
    memory_gib: float = 64.0
    compile_memory_gib: float = 8.0
