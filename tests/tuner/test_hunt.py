"""Several spaces searched side by side."""

from collections import Counter

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Problem
from tilewise.domain.space import Parameter, SearchSpace
from tilewise.domain.trial import Measurement, Outcome, Stage, Trial
from tilewise.tuner.hunt import Hunt, Role
from tilewise.tuner.neighbours import Near

BLOCKS = tuple(range(1, 41))


def space(kernel: str) -> SearchSpace:
    return SearchSpace(kernel, (Parameter("block", BLOCKS),), Config.of(kernel, block=1))


def tried(candidate: Candidate, ratio: float | None, seconds: float) -> Trial:
    measured = None if ratio is None else Measurement(median_ms=1, p20_ms=1, p80_ms=1, samples=9, ratio=ratio)
    outcome = Outcome.FAILED if ratio is None else Outcome.OK
    return Trial(candidate=candidate, stage=Stage.BOTH, outcome=outcome, measurement=measured, seconds=seconds)


def searched(ratios: dict[Role, float | None], seconds: dict[Role, float], trials: int) -> Counter[Role]:
    """Search as many trials; every config of a space has the same ratio and takes the same time."""
    hunt = Hunt({key: space(key[2]) for key in ratios}, seed=0)
    counts: Counter[Role] = Counter()
    for _ in range(trials):
        candidate = hunt.ask(Candidate, lambda _: True)
        assert candidate is not None
        ((role, config),) = candidate.configs
        key = candidate.backend, role, config.kernel
        counts[key] += 1
        hunt.tell(tried(candidate, ratios[key], seconds[key]))
    return counts


def test_what_takes_long_is_tried_less_often() -> None:
    quick, slow = ("a", "forward", "quick"), ("b", "forward", "slow")
    counts = searched({quick: 1.0, slow: 1.0}, {quick: 1.0, slow: 4.0}, 30)
    assert counts[quick] == 4 * counts[slow]


def test_what_lies_behind_is_tried_less_often() -> None:
    good, bad, never = ("a", "forward", "good"), ("a", "forward", "bad"), ("c", "forward", "never")
    counts = searched({good: 1.0, bad: 2.0, never: None}, {good: 1.0, bad: 1.0, never: 1.0}, 40)
    assert counts[good] > 8 * counts[bad] > 0
    assert counts[never] > 0


def test_a_backend_that_is_not_wanted_waits() -> None:
    hunt = Hunt({("a", "forward", "x"): space("x"), ("b", "forward", "y"): space("y")}, seed=0)
    assert {hunt.ask(Candidate, "b".__eq__).backend for _ in range(5)} == {"b"}  # type: ignore[union-attr]
    assert hunt.ask(Candidate, lambda _: False) is None


def test_a_backend_whose_default_does_not_run_is_not_searched() -> None:
    hunt = Hunt({("a", "forward", "x"): space("x"), ("b", "forward", "y"): space("y")}, seed=0)
    for name, kernel, block in (("a", "x", 1), ("b", "y", 7)):  # the default of one, but any config of the other
        candidate = Candidate.of(name, forward=Config.of(kernel, block=block))
        hunt.tell(Trial(candidate=candidate, stage=Stage.BOTH, outcome=Outcome.UNSUPPORTED, message="no import"))
    assert {hunt.ask(Candidate, lambda _: True).backend for _ in range(5)} == {"b"}  # type: ignore[union-attr]


def test_a_config_of_one_role_comes_with_the_best_of_the_others() -> None:
    hunt = Hunt({("a", "dq", "q"): space("q")}, seed=0)
    best = Candidate.of("a", forward=Config.of("f", block=7), dq=Config.of("q", block=1))
    candidate = hunt.ask(lambda _: best, lambda _: True)
    assert candidate is not None
    assert candidate.config("forward") == Config.of("f", block=7)
    assert candidate.config("dq") in [*space("q")]


def test_what_was_tried_elsewhere_is_not_tried_again() -> None:
    hunt = Hunt({("a", "forward", "x"): space("x")}, seed=0)
    for block in BLOCKS[:-1]:
        hunt.tell(tried(Candidate.of("a", forward=Config.of("x", block=block)), 1.0, 1.0))
    last = hunt.ask(Candidate, lambda _: True)
    assert last == Candidate.of("a", forward=Config.of("x", block=BLOCKS[-1]))
    assert hunt.ask(Candidate, lambda _: True) is None


def test_known_configs_come_first_where_no_near_problem_teaches() -> None:
    known = [Config.of("x", block=block) for block in (9, 30)]
    hunt = Hunt({("a", "forward", "x"): space("x")}, seed=0, known=lambda _: known)
    asked = [hunt.ask(Candidate, lambda _: True) for _ in known]
    assert asked == [Candidate.of("a", forward=config) for config in known]

    trial = tried(Candidate.of("a", forward=Config.of("x", block=17)), 1.0, 1.0)
    near = Near(Problem(batch=1, heads=2, q_len=64, head_dim=16), 1.0, (trial,))
    hunt = Hunt({("a", "forward", "x"): space("x")}, seed=0, near=[near], known=lambda _: known)
    assert hunt.ask(Candidate, lambda _: True) == trial.candidate


def test_what_is_on_its_way_is_not_asked_for_but_learned_from() -> None:
    hunt = Hunt({("a", "forward", "x"): space("x")}, seed=0)
    default = Candidate.of("a", forward=Config.of("x", block=1))
    hunt.expect(default)
    asked = {hunt.ask(Candidate, lambda _: True) for _ in BLOCKS[1:]}
    assert asked == {Candidate.of("a", forward=Config.of("x", block=block)) for block in BLOCKS[1:]}
    hunt.tell(tried(default, 1.0, 1.0))
    assert hunt.ask(Candidate, lambda _: True) is None


def test_what_is_on_its_way_counts_with_its_time() -> None:
    slow, quick = ("a", "forward", "x"), ("b", "forward", "y")
    hunt = Hunt({slow: space("x"), quick: space("y")}, seed=0)
    defaults = [Candidate.of(key[0], forward=Config.of(key[2], block=1)) for key in (slow, quick)]
    for default, seconds in zip(defaults, (15.0, 1.0), strict=True):
        hunt.expect(default)
        hunt.tell(tried(default, 1.0, seconds))
    counts: Counter[str] = Counter()
    for _ in range(20):
        candidate = hunt.ask(Candidate, lambda _: True)
        assert candidate is not None
        counts[candidate.backend] += 1
        hunt.tell(tried(candidate, 1.0, 1.0))
    assert counts == {"b": 17, "a": 3}
