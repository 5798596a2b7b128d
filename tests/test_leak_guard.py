"""The guard in conftest.py: who leaves something behind fails, the next does not."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

pytest_plugins = ["pytester"]

LEAKS = {
    "process": """
        import subprocess
        subprocess.Popen(["sh", "-c", "sleep 60 & exit"], start_new_session=True).wait()
    """,
    "shm": """
        from pathlib import Path
        Path("/dev/shm/blockrepl-{unique}").write_bytes(b"x")
    """,
    "mount": """
        import subprocess
        subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    """,
}


def outcomes(pytester: pytest.Pytester, body: str) -> pytest.RunResult:
    guard = Path(__file__).with_name("conftest.py").read_text()
    assert "\nGRACE_SECONDS = 10.0" in guard
    pytester.makeconftest(guard.replace("\nGRACE_SECONDS = 10.0", "\nGRACE_SECONDS = 0.5"))
    pytester.makepyfile(
        f"def test_that_leaks(tmp_path):\n    if True:{body}\n\ndef test_after_it():\n    pass\n"
    )
    return pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")


@pytest.mark.parametrize("kind", LEAKS)
def test_what_a_test_leaves_behind_fails_it_and_is_removed(
    kind: str, pytester: pytest.Pytester
) -> None:
    unique = uuid4().hex
    result = outcomes(pytester, LEAKS[kind].replace("{unique}", unique))
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["left behind:", f"*{kind} *"])
    assert not Path(f"/dev/shm/blockrepl-{unique}").exists()


def test_a_clean_test_passes(pytester: pytest.Pytester) -> None:
    outcomes(pytester, "\n        pass\n").assert_outcomes(passed=2)
