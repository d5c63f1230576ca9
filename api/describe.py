"""Answers in words and figures for the dashboard."""

import math
from dataclasses import dataclass
from datetime import datetime

from tilewise.db.answer_lists import WON, ListedAnswer
from tilewise.domain.config import Candidate, Plan
from tilewise.domain.problem import Pass, Precision, Problem

NOTHING = "\N{EN DASH}"
FULL_BAR = 4.0  # a speed-up that fills its bar
# Those that style.css has a colour for.
BACKENDS = (
    "triton", "triton_decode", "cpu_tiled", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math", "plain",
    "flex", "flex_cpu", "flash", "flash_cute",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One candidate of a plan: what it is for (empty if for everything), its backend, its configs in one line each."""

    role: str
    backend: str
    configs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table of answers, every figure ready to be shown.

    `worth` and `tuned` are the speed-ups over torch's own choice and over the default config; `won` says whether the
    first is more than nothing, `bar` is its length in percent. `outdated` says why the answer is stale, if it is.
    """

    title: str
    sizes: str
    device_key: str
    link: str
    parts: tuple[Part, ...]
    expected: str
    interval: str
    tflops: str
    worth: str
    won: bool
    bar: int
    tuned: str
    outdated: tuple[str, ...]
    trials: str
    failed: int
    noise: str
    measured: datetime


def row(listed: ListedAnswer) -> Row:
    """Return what a table shows of an answer."""
    answer, evidence = listed.answer, listed.answer.evidence
    speedup = answer.speedup
    return Row(
        title=title(answer.problem),
        sizes=sizes(answer.problem),
        device_key=answer.device_key,
        link=link(answer.device_key, answer.problem),
        parts=parts(answer.plan),
        expected=figure(answer.expected_ms),
        interval="" if answer.interval is None else " to ".join(figure(side) for side in answer.interval),
        tflops=figure(tflops(answer.problem, listed.forward_flops, answer.expected_ms)),
        worth=factor(speedup),
        won=speedup is not None and speedup >= WON,
        bar=0 if speedup is None else round(100 * min(max(speedup, 0) / FULL_BAR, 1)),
        tuned=factor(answer.default_speedup),
        outdated=listed.outdated,
        trials=f"{evidence.trials:,}" if evidence else NOTHING,
        failed=evidence.failed if evidence else 0,
        noise=percent(evidence.noise) if evidence else "",
        measured=evidence.measured if evidence else listed.updated,
    )


def link(device_key: str, problem: Problem) -> str:
    """Return the address of a problem's page; both keys are made of characters that need no quoting."""
    return f"/problems/{device_key}/{problem.key}"


def title(problem: Problem) -> str:
    """Return what kind of attention it is: `Causal GQA, window 256, fp16 inference`."""
    if problem.kv_heads == problem.heads:
        kind = "multi-head" if problem.head_dim == problem.v_head_dim else "latent (MLA)"
    else:
        kind = "multi-query" if problem.kv_heads == 1 else "grouped-query"
    words = [f"causal {kind}" if problem.causal else kind]
    if problem.window is not None:
        left, right = ("all" if side == -1 else f"{side:,}" for side in problem.window)
        words.append(f"window {left}" if problem.causal else f"window {left} back, {right} ahead")
    if problem.mask != "none":
        kind, _, broadcast = problem.mask.partition(".")
        words.append(("additive bias" if kind == "bias" else "bool mask") + (f" ({broadcast})" if broadcast else ""))
    words += [name for name in ("dropout", "softcap", "varlen", "deterministic") if getattr(problem, name)]
    words += [name for name, on in (("bias gradient", problem.bias_grad), ("ALiBi", problem.alibi)) if on]
    if problem.page_size:
        words.append(f"pages of {problem.page_size:,}")
    dtype = "tf32" if problem.precision is Precision.TF32 else problem.dtype
    text = ", ".join([*words, f"{dtype} {problem.pass_}"])
    return text[0].upper() + text[1:]


def sizes(problem: Problem) -> str:
    """Return the sizes in words, to be broken after commas only: `batch 1, 64/8 heads, 4,096 tokens, head_dim 128`."""
    heads = f"{problem.heads:,}" if problem.heads == problem.kv_heads else f"{problem.heads:,}/{problem.kv_heads:,}"
    tokens = f"{problem.q_len:,} tokens"
    if problem.q_len != problem.kv_len:
        tokens = f"{problem.q_len:,} on {problem.kv_len:,} tokens"
    dim = str(problem.head_dim)
    if problem.head_dim != problem.v_head_dim:
        dim = f"{problem.head_dim}/{problem.v_head_dim}"
    parts = f"batch {problem.batch:,}", f"{heads} heads", tokens, f"head_dim {dim}"
    return ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def figure(value: float | None) -> str:
    """Return `value` with three significant digits and no exponent; a dash for None."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 9.996 has its digits as 10.0 has
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Return a time with its unit: `0.418 ms`; a dash for None."""
    shown = figure(value)
    return shown if shown == NOTHING else f"{shown} ms"


def factor(value: float | None) -> str:
    """Return how many times faster: `3.00x`; a dash for None."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def percent(share: float) -> str:
    """Return a share with two significant digits: `0.35%`."""
    return f"{100 * share:.2g}%"


def backend_class(backend: str) -> str:
    """Return the name of a backend's colour, as a CSS class and, behind `--`, as a variable of style.css."""
    return f"backend-{backend.replace('_', '-')}" if backend in BACKENDS else "backend-other"


def tflops(problem: Problem, forward_flops: float, expected_ms: float | None) -> float | None:
    """Return 10^12 operations a second of a forward pass, None where they cannot be told."""
    # What a training step counts is a convention; only the forward's operations are beyond dispute. Those of varlen
    # depend on lengths that a problem does not have.
    if problem.pass_ is not Pass.INFERENCE or problem.varlen or not expected_ms:
        return None
    return forward_flops / expected_ms / 1e9


def parts(plan: Plan) -> tuple[Part, ...]:
    """Return the candidates of a plan, each with what it is for."""
    if plan.backward is None:
        return (_part("", plan.forward),)
    return _part("forward", plan.forward), _part("backward", plan.backward)


def _part(role: str, candidate: Candidate) -> Part:
    several = len(candidate.configs) > 1
    configs = tuple(f"{name}: {config}" if several else str(config) for name, config in candidate.configs)
    return Part(role=role, backend=candidate.backend, configs=configs)
