"""No bytes make a parser fail otherwise than by its one error, nor take much memory."""

from __future__ import annotations

import contextlib
import tracemalloc

import pytest
from foreign_bytes import TARGETS, request_of_another_curve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockrepl import limits

MEMORY_BYTES_MAX = 3 * limits.FRAME_PAYLOAD_BYTES_MAX  # beside the input: a frame's content, joined
EXAMPLES = {"spool-state": 30, "spool-files": 40, "ring": 40, "message-stream": 40}
INTERESTING = (
    b"\0",
    b"\xff",
    b"\xff" * 4,
    b"\0" * 8,
    b"\xff" * 8,
    b"\x7f",
    b"\x80",
    b'"',
    b"9" * 25,
)


@st.composite
def mutations(draw: st.DrawFn, samples: tuple[bytes, ...]) -> bytes:
    """Noise, or a sample with some pieces replaced, cut out, or put in."""
    if not samples or draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=400))
    data = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, min(len(data), 600) - 1)) | st.integers(0, len(data)))
        piece = draw(st.sampled_from(INTERESTING) | st.binary(max_size=8))
        after = at + draw(st.just(len(piece)) | st.integers(0, 40))
        data = data[:at] + piece + data[after:]
    return data[: draw(st.just(len(data)) | st.integers(0, len(data)))]


@pytest.mark.parametrize("name", TARGETS)
def test_the_samples_are_taken(name: str) -> None:
    for sample in TARGETS[name].samples:
        TARGETS[name].parse(sample)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_taken_or_refused_by_the_one_error(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES.get(name, 100),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(target.samples))
    def parse(data: bytes) -> None:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        with contextlib.suppress(*target.errors):
            target.parse(data)
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < MEMORY_BYTES_MAX + 4 * len(data)

    tracemalloc.start()
    try:
        parse()
    finally:
        tracemalloc.stop()


def sample_with(sample: bytes, old: bytes, new: bytes) -> bytes:
    assert sample.count(old) == 1
    return sample.replace(old, new)


FINDS = {
    "certificate-request": request_of_another_curve(),
    "client-hello": sample_with(
        TARGETS["client-hello"].samples[0], b"receiver", b"r\xe7ceiver"[:8]
    ),
}


@pytest.mark.parametrize("name", FINDS)
def test_what_the_fuzzer_has_found_stays_found(name: str) -> None:
    # Guards UnsupportedAlgorithm in certificates._UNSOUND, and _ignore in handshake.py.
    target = TARGETS[name]
    with contextlib.suppress(*target.errors):
        target.parse(FINDS[name])
