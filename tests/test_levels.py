"""Which merged runs there should be: every segment once, few runs, whatever is missing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl.model import levels
from blockrepl.model.levels import FANOUT, LEVELS, Range, plan


def settle(sealed: list[int], end: int, present: set[Range]) -> tuple[set[Range], int]:
    """Do all merges there are to do; the runs that stay, and how many merges it took."""
    done = 0
    while merges := plan(sealed, end, present).merges:
        merge = merges[0]
        for first, last in merge.inputs:
            assert first == last or (first, last) in present
        covered = [n for n in sealed if merge.result[0] <= n <= merge.result[1]]
        of_inputs = [n for first, last in merge.inputs for n in sealed if first <= n <= last]
        # Guards _Planner.visit: a merge of less than its name says would hide records.
        assert of_inputs == covered
        assert 2 <= len(merge.inputs) <= FANOUT
        assert merge.result not in present
        present.add(merge.result)
        done += 1
        assert done < 10_000
    present &= plan(sealed, end, present).keep
    return present, done


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 700),
    st.sets(st.integers(1, 700), max_size=60),
    st.integers(0, 30),
    st.data(),
)
def test_each_segment_is_covered_once_by_few_runs(
    count: int, vanished: set[int], unsealed: int, data: st.DataObject
) -> None:
    sealed = [n for n in range(1, count + 1) if n not in vanished]
    end = max(1, count + 1 - unsealed)
    sealed = [n for n in sealed if n < end]
    present, _ = settle(sealed, end, set())
    alone = [n for n in sealed if not any(first <= n <= last for first, last in present)]
    covered = [n for first, last in present for n in sealed if first <= n <= last]
    assert sorted(covered + alone) == sealed
    assert len(present) + len(alone) <= (FANOUT - 1) * (LEVELS + 1) + 1

    # What is lost or half done is made again, and no more than that.
    kept = (
        set(data.draw(st.lists(st.sampled_from(sorted(present)), unique=True)))
        if present
        else set()
    )
    again, _ = settle(sealed, end, set(kept))
    assert again == present


def test_each_record_is_rewritten_once_per_level() -> None:
    present: set[Range] = set()
    written = 0
    for count in range(1, 513):
        sealed = list(range(1, count + 1))
        before = set(present)
        while merges := plan(sealed, count + 1, present).merges:
            present.add(merges[0].result)
            written += merges[0].result[1] - merges[0].result[0] + 1
        present &= plan(sealed, count + 1, present).keep
        assert len(present) <= (FANOUT - 1) * LEVELS
        assert present == settle(sealed, count + 1, before)[0]
    assert present == {(1, 512)}
    assert written == 3 * 512
    assert levels.FANOUT**3 == 512
