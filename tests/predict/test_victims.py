"""Victims: what comes first, and that nobody starves while requests keep arriving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.predict.victims import PATIENCE, Candidate, order, victim

CANDIDATES = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 3), st.booleans()), min_size=1, max_size=12
).map(
    lambda rows: [
        Candidate(f"{number}", number, cost, preemptions, prefilling)
        for number, (cost, preemptions, prefilling) in enumerate(rows)
    ]
)


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_the_one_given(candidates, random) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert order(shuffled) == order(candidates)
    assert sorted(order(candidates)) == sorted(candidates)


@given(CANDIDATES)
def test_who_is_the_victim(candidates) -> None:
    """Against the rules one by one."""
    found = victim(candidates)
    if len(candidates) == 1:
        assert found is None
        return
    assert found is not None
    oldest = min(candidates, key=lambda each: each.arrival)
    assert found is not oldest
    rivals = [each for each in candidates if each is not oldest]
    free = [each for each in rivals if each.preemptions < PATIENCE]
    if free:
        assert found.prefilling == any(each.prefilling for each in free)
        free = [each for each in free if each.prefilling == found.prefilling]
        least = min(each.cost for each in free)
        assert found.arrival == max(each.arrival for each in free if each.cost == least)
        assert found.cost == least
    else:
        assert found.arrival == max(each.arrival for each in rivals)


def test_nobody_runs_nobody_is_preempted() -> None:
    assert order([]) == []
    assert victim([]) is None


#: Tokens of memory, tokens that a request computes in a step, and the longest answer.
MEMORY, CHUNK, LONGEST = 60, 8, 29
#: While so many wait, nobody new arrives: they would only wait behind those.
MOST_WAITING = 12


@dataclass
class Request:
    """Of the load below."""

    arrival: int
    prompt: int
    answer: int
    generated: int = 0
    computed: int = 0
    preemptions: int = 0
    ended: int | None = None

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated


def serve(
    sizes: list[tuple[int, int]],
    steps: int,
    choose: Callable[[list[Candidate]], Candidate | None] = victim,
) -> list[Request]:
    """Requests that never stop arriving, in a memory of ``MEMORY`` tokens.

    The first that waits starts if all its tokens fit. In a step a request computes up to ``CHUNK``
    of its tokens, and gets another one once all are computed. While they do not fit, one is
    preempted: it waits in front of all others, as in vLLM, and has to compute everything again.

    Args:
        sizes: (prompt, answer) of one request after the other, again and again.
        steps: How long.
        choose: The victim of some candidates.
    """
    made: list[Request] = []
    waiting: list[Request] = []
    running: list[Request] = []
    for step in range(steps):
        if len(waiting) < MOST_WAITING:
            made.append(Request(step, *sizes[len(made) % len(sizes)]))
            waiting.append(made[-1])
        while waiting and sum(r.tokens for r in running) + waiting[0].tokens < MEMORY:
            running.append(waiting.pop(0))

        def grows(each: Request) -> bool:
            return each.computed + CHUNK >= each.tokens

        while sum(each.tokens + grows(each) for each in running) > MEMORY:
            chosen = choose(
                [
                    Candidate(f"{r.arrival}", r.arrival, r.computed, r.preemptions, not grows(r))
                    for r in running
                ]
            )
            assert chosen is not None, "one request always fits"
            out = next(each for each in running if f"{each.arrival}" == chosen.name)
            running.remove(out)
            out.preemptions += 1
            out.computed = 0
            waiting.insert(0, out)
        for each in running:
            more = grows(each)
            each.computed = min(each.computed + CHUNK, each.tokens)
            each.generated += more
            if each.generated == each.answer:
                each.ended = step
        running = [each for each in running if each.ended is None]
    return made


def late(made: list[Request], steps: int) -> Request | None:
    """The first request that ends later than if all before it ran one after the other.

    Each of them takes as many steps as computing everything twice and its answer.
    """
    alone = 2 * -(-MEMORY // CHUNK)
    bound = 0
    for request in made:
        bound = max(bound, request.arrival) + alone + request.answer
        if bound >= steps:
            return None
        if request.ended is None or request.ended > bound:
            return request
    return None


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, LONGEST)), min_size=1, max_size=8)
STEPS = 400


@given(SIZES)
@settings(max_examples=100, deadline=None)
def test_nobody_starves(sizes) -> None:
    assert late(serve(sizes, STEPS), STEPS) is None


def cheapest_alone(running: list[Candidate]) -> Candidate:
    """The rule without protection."""
    return min(running, key=lambda each: (each.cost, -each.arrival))


def test_control_without_protection_younger_ones_overtake() -> None:
    """The same load and the same bound: it breaks without the protection and holds with it."""
    sizes = [(2, 26), (14, 27), (4, 24), (6, 26), (19, 27), (30, 9)]
    overtaken = late(serve(sizes, STEPS, cheapest_alone), STEPS)
    assert overtaken is not None
    assert overtaken.arrival == 0
    assert overtaken.preemptions >= PATIENCE
    assert late(serve(sizes, STEPS), STEPS) is None


@given(SIZES, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_more_patience_still_ends(sizes, patience) -> None:
    """The proof needs the oldest alone; patience only bounds what the others lose."""
    made = serve(sizes, STEPS, lambda running: victim(running, patience))
    assert late(made, STEPS) is None
