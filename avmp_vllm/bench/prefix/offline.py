"""What a cache that knows the future could hit: a schedule that is possible, and a bound.

To hit ``d`` tokens a request needs the state behind them and their pages. Both can only have been
made when an earlier request passed that place, and must have stayed since. So a hit costs bytes for
a known time, whatever else is done::

    pages of each stretch of the prompt    since a request last passed the stretch
    the state at the stretch's end         since then, too

A stretch is what was last passed by the same request; later stretches were passed longer ago. A
stretch's pages are paid for by the request that passes it next and by no other, so nothing is
counted twice. Within a stretch a deeper hit is always the better bargain: one *option* a stretch.

The bound is a Lagrangian one: with a price for a byte at each moment, the memory is worth its
price, and each request takes its best option at these prices, or none. Whatever the prices are, no
schedule spares more tokens; they are improved by subgradient steps. At the best prices it equals
the relaxation as a linear program, in which a part of a state spares a part of the tokens.

The schedule takes options by what they spare for each priced byte, if the bytes are free all the
time that the option needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avmp_vllm.bench.prefix.cache import Sizes
from avmp_vllm.bench.prefix.trace import PAGE, Request

#: Subgradient steps of the bound.
STEPS = 400


@dataclass(frozen=True)
class Options:
    """Every way in which a request can hit something.

    Arrays have an entry for each option; a request's options follow one another, the shallowest
    first.

    Attributes:
        request: Which request it is.
        since: Which request passed the stretch last.
        pages: Pages of the stretch.
        tokens: Tokens that it spares: to the stretch's end.
        requests: How many requests there are.
    """

    request: np.ndarray
    since: np.ndarray
    pages: np.ndarray
    tokens: np.ndarray
    requests: int

    def first(self) -> np.ndarray:
        """Whether an option is its request's first."""
        found = np.ones(len(self.request), bool)
        found[1:] = self.request[1:] != self.request[:-1]
        return found


def options_of(requests: Sequence[Request]) -> Options:
    """The options of a trace."""
    count = max((run.key + run.pages for r in requests for run in r.runs), default=0)
    passed = np.full(count, -1, np.int64)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for number, row in enumerate(requests):
        keys = np.asarray(row.keys, np.int64)
        last = passed[keys[: row.reusable]]
        # Times do not grow along a prompt; what was never passed comes last.
        known = int(np.count_nonzero(last >= 0))
        if known:
            ends = np.append(np.flatnonzero(np.diff(last[:known])), known - 1) + 1
            rows.append(
                (
                    np.full(len(ends), number),
                    last[ends - 1],
                    np.diff(ends, prepend=0),
                    ends * PAGE,
                )
            )
        passed[keys] = number
    if not rows:
        none = np.zeros(0, np.int64)
        return Options(none, none, none, none, len(requests))
    request, since, pages, tokens = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Options(request, since, pages, tokens, len(requests))


def _prices(options: Options, sizes: Sizes, price: np.ndarray) -> np.ndarray:
    """What each option costs at given prices of a byte in each gap between requests."""
    total = np.concatenate(([0.0], np.cumsum(price)))
    span = total[options.request] - total[options.since]
    pages = np.cumsum(options.pages * sizes.page * span)
    # Pages of a request's shallower stretches count, those of other requests do not.
    first = options.first()
    before = np.maximum.accumulate(np.where(first, pages - options.pages * sizes.page * span, 0.0))
    cost: np.ndarray = pages - before + sizes.state * span
    return cost


def _best(options: Options, gain: np.ndarray) -> np.ndarray:
    """Each request's option of greatest positive gain, as indices."""
    starts = np.flatnonzero(options.first())
    if not len(starts):
        return starts
    most = np.maximum.reduceat(gain, starts)
    lengths = np.diff(np.append(starts, len(gain)))
    hits = np.flatnonzero((gain == np.repeat(most, lengths)) & (gain > 0))
    # Of equal ones the shallowest.
    _, unique = np.unique(options.request[hits], return_index=True)
    return hits[unique]


def _usage(options: Options, sizes: Sizes, chosen: np.ndarray) -> np.ndarray:
    """Bytes in use in each gap, if the chosen options are taken."""
    change = np.zeros(options.requests + 1)
    np.add.at(change, options.since[chosen], sizes.state)
    np.add.at(change, options.request[chosen], -sizes.state)
    # An option needs its request's stretches up to its own.
    starts = np.flatnonzero(options.first())
    begin = starts[np.searchsorted(starts, chosen, side="right") - 1]
    lengths = chosen - begin + 1
    ends = np.cumsum(lengths)
    stretches = np.arange(int(ends[-1]) if len(ends) else 0)
    stretches += np.repeat(chosen + 1 - ends, lengths)
    weights = options.pages[stretches] * float(sizes.page)
    np.add.at(change, options.since[stretches], weights)
    np.add.at(change, options.request[stretches], -weights)
    return np.cumsum(change)[:-1]


def bound(
    options: Options, sizes: Sizes, memory: int, steps: int = STEPS
) -> tuple[float, np.ndarray]:
    """Tokens that no cache can spare more than, and the prices that show it."""
    gaps = options.requests
    most = options.tokens[np.append(options.first()[1:], True)].sum() if len(options.tokens) else 0
    best, best_price = float(most), np.zeros(gaps)
    if not most:
        return best, best_price
    ones = _prices(options, sizes, np.ones(gaps))
    low, high = 0.0, float((options.tokens / ones).max())
    # First one price for all gaps.
    for _ in range(40):
        level = (low + high) / 2
        chosen = _best(options, options.tokens - level * ones)
        if ones[chosen].sum() > memory * gaps:
            low = level
        else:
            high = level
    price = np.full(gaps, high)
    # Where memory is short at times only, the one price is nothing: step by what options are worth.
    scale = max(high, float(np.quantile(options.tokens / ones, 0.05)))
    smooth = np.zeros(gaps)
    for step in range(steps):
        gain = options.tokens - _prices(options, sizes, price)
        chosen = _best(options, gain)
        value = gain[chosen].sum() + memory * price.sum()
        if value < best:
            best, best_price = float(value), price
        excess = (_usage(options, sizes, chosen) - memory) / memory
        smooth = 0.7 * smooth + 0.3 * excess
        price = np.maximum(price + scale * 0.5 / (1 + step / 20) * smooth, 0.0)
    return best, best_price


def schedule(options: Options, sizes: Sizes, memory: int, price: np.ndarray) -> float:
    """Tokens that a possible schedule spares.

    First each request's best option at the prices, then whatever else fits in the place of less.
    """
    if not len(options.tokens):
        return 0.0
    cost = _prices(options, sizes, price + price.mean() * 0.05 + 1e-18)
    order = np.argsort(-options.tokens / cost, kind="stable")
    best = np.zeros(len(order), bool)
    best[_best(options, options.tokens - _prices(options, sizes, price))] = True
    starts = np.flatnonzero(options.first())
    begin = starts[np.searchsorted(starts, np.arange(len(order)), side="right") - 1]
    used = np.zeros(options.requests)
    taken = np.full(options.requests, -1)

    def put(option: int, sign: int) -> None:
        since, request = options.since[option], options.request[option]
        used[since:request] += sign * sizes.state
        for stretch in range(begin[option], option + 1):
            used[options.since[stretch] : request] += sign * options.pages[stretch] * sizes.page

    for option in (*order[best[order]], *order[~best[order]]):
        request = options.request[option]
        now = taken[request]
        if now >= 0 and options.tokens[now] >= options.tokens[option]:
            continue
        if now >= 0:
            put(now, -1)
        put(option, 1)
        if used[options.since[option] : request].max() <= memory:
            taken[request] = option
        else:
            put(option, -1)
            if now >= 0:
                put(now, 1)
    return float(options.tokens[taken[taken >= 0]].sum())
