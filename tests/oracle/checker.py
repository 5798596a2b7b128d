"""Is a view a state that the observer of all requests allows? Knows nothing of the product.

There must be one instant t(r) in [issued, ended] for each acknowledged request r such that a view
at T shows, in every sector, the request with the greatest t up to T. What is checked for it:

===============  ==============================================================================
rule             a view at T is refused when
===============  ==============================================================================
origin           a sector holds what no request put there
future           it shows a request that was issued at T or later
lost or stale    a sector shows r, although another request that covers it is in the view and was
                 issued after r's end. In the view is what was acknowledged up to T, what this view
                 shows in any sector (a request is whole or absent), and what an earlier one showed
order            requests in flight together have no common order: in all views together, "x is in
                 the view and w is shown where both wrote" (so t(x) < t(w)) leads in a circle, or
                 forces some t beyond its interval
===============  ==============================================================================

A sector of zeros may be due to any zero or trim, or to none; it is refused only when none fits.
Requests without acknowledgement are never required, and may be shown in part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from oracle.history import ZERO, History, View
from oracle.stamps import DAMAGED, ZEROS, Ids

NEVER = np.iinfo(np.int64).max
ALWAYS = -1  # before every instant
Edges = dict[int, set[int]]


def check(history: History, views: Sequence[View]) -> list[str]:
    """All violations found, in words; empty when every view is legal."""
    ordered = sorted(views, key=lambda view: view.at_ns)
    problems: list[str] = []
    shown_in = [_shown(history, view, problems) for view in ordered]
    included = _included_from(history, ordered, shown_in)
    _check_newest(history, ordered, shown_in, included, problems)
    _check_order(history, ordered, shown_in, included, problems)
    return problems


def _shown(history: History, view: View, problems: list[str]) -> Ids:
    """Per sector the index of the request it shows, ZEROS, or DAMAGED where that is nonsense."""
    place = np.arange(len(view.sectors))
    stamped = view.sectors >= 0
    index = history.find(view.sectors)
    known = stamped & (index >= 0)
    covered = known & (history.first[index] <= place) & (place < history.after[index])
    covered &= history.kind[index] != ZERO
    wrong = ~covered & (view.sectors != ZEROS)
    _tell(problems, view, wrong, lambda at: f"origin: no request put there {view.sectors[at]}")
    early = covered & (history.issued[index] >= view.at_ns)
    _tell(problems, view, early, lambda at: f"future: shows {history.describe(int(index[at]))}")
    return np.where(covered, index, np.where(wrong, DAMAGED, ZEROS))


def _included_from(history: History, views: Sequence[View], shown_in: Sequence[Ids]) -> Ids:
    """From which instant on every view must hold a request; NEVER without acknowledgement."""
    included: Ids = history.ended.copy()
    for view, shown in zip(views, shown_in, strict=True):
        seen = np.unique(shown[shown >= 0])
        included[seen] = np.minimum(included[seen], view.at_ns)
    included[~history.acknowledged] = NEVER
    return included


def _check_newest(
    history: History,
    views: Sequence[View],
    shown_in: Sequence[Ids],
    included: Ids,
    problems: list[str],
) -> None:
    """No sector may show what ended before the issue of another that is in the view."""
    newest = np.full(history.sectors, ALWAYS, np.int64)  # latest issue in the view, per sector
    zeroed = np.full(history.sectors, ALWAYS, np.int64)  # latest end of a zero that may be in it
    by_included = np.argsort(included, kind="stable")
    zeros = np.flatnonzero(history.kind == ZERO)
    next_included = next_zero = 0
    for view, shown in zip(views, shown_in, strict=True):
        while next_included < len(history) and included[by_included[next_included]] <= view.at_ns:
            request = by_included[next_included]
            part = newest[history.first[request] : history.after[request]]
            np.maximum(part, history.issued[request], out=part)
            next_included += 1
        while next_zero < len(zeros) and history.issued[zeros[next_zero]] < view.at_ns:
            request = zeros[next_zero]
            part = zeroed[history.first[request] : history.after[request]]
            np.maximum(part, history.ended[request], out=part)
            next_zero += 1
        ended = np.where(shown >= 0, history.ended[np.maximum(shown, 0)], zeroed)
        stale = (shown != DAMAGED) & (newest > ended)
        _tell(problems, view, stale, partial(_stale, history, shown, newest))


def _stale(history: History, shown: Ids, newest: Ids, at: int) -> str:
    what = history.describe(int(shown[at])) if shown[at] >= 0 else "zeros"
    over = int(np.searchsorted(history.issued, newest[at]))
    return f"lost or stale: shows {what}, not {history.describe(over)}"


def _check_order(
    history: History,
    views: Sequence[View],
    shown_in: Sequence[Ids],
    included: Ids,
    problems: list[str],
) -> None:
    partners: dict[int, list[int]] = defaultdict(list)
    for a, b in concurrent_pairs(history):
        partners[a].append(b)
        partners[b].append(a)
    later: Edges = defaultdict(set)  # x -> those that came after it
    for view, shown in zip(views, shown_in, strict=True):
        for winner in np.unique(shown[shown >= 0]):
            for other in partners[winner]:
                if included[other] > view.at_ns:
                    continue
                first = max(history.first[winner], history.first[other])
                after = min(history.after[winner], history.after[other])
                if (shown[first:after] == winner).any():
                    later[other].add(int(winner))
    _check_intervals(history, later, included, problems)


def concurrent_pairs(history: History) -> Iterator[tuple[int, int]]:
    """Acknowledged requests that were in flight together and share a sector."""
    flying: list[int] = []
    for index in np.flatnonzero(history.acknowledged).tolist():
        issued, first, after = history.issued[index], history.first[index], history.after[index]
        flying = [other for other in flying if history.ended[other] >= issued]
        for other in flying:
            if history.first[other] < after and first < history.after[other]:
                yield other, index
        flying.append(index)


def _check_intervals(history: History, later: Edges, included: Ids, problems: list[str]) -> None:
    """Push each request's earliest instant along the edges, in topological order."""
    waits: dict[int, int] = defaultdict(int)
    for winners in later.values():
        for winner in winners:
            waits[winner] += 1
    nodes = later.keys() | waits.keys()
    earliest = {node: int(history.issued[node]) for node in nodes}
    ready = [node for node in nodes if not waits[node]]
    done = 0
    while ready:
        node = ready.pop()
        done += 1
        for winner in later.get(node, ()):
            earliest[winner] = max(earliest[winner], earliest[node])
            if earliest[winner] > included[winner]:
                names = history.describe(node), history.describe(winner)
                problems.append(f"order: {names[0]} cannot have come before {names[1]}")
            waits[winner] -= 1
            if not waits[winner]:
                ready.append(winner)
    if done < len(nodes):
        circle = [history.describe(node) for node in nodes if waits[node]]
        problems.append(f"order: these lead in a circle: {', '.join(sorted(circle)[:8])}")


def _tell(
    problems: list[str], view: View, wrong: npt.NDArray[np.bool_], what: Callable[[int], str]
) -> None:
    places = np.flatnonzero(wrong)
    if len(places):
        where = f"sector {places[0]} and {len(places) - 1} more"
        problems.append(f"view {view.name or view.at_ns}: {where}: {what(int(places[0]))}")
