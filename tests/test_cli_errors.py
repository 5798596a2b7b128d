"""Every failure of a command is one line that says what, why and what to do, and a status."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from rich.text import Text

from blockrepl.cli import failure, output
from blockrepl.cli.main import COMMANDS, cli, run
from blockrepl.errors import PeerError, PointError, StateError, StorageError, UsageError
from blockrepl.storage.home import Home
from blockrepl.units import format_bytes

BLOCKREPL = Path(sys.executable).with_name("blockrepl")

Capture = pytest.CaptureFixture[str]
Verb = Callable[[Callable[[], None]], list[str]]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Verb:
    """Adds a command ``verb [--json]`` that calls a function; returns its command line."""

    def add(action: Callable[[], None]) -> list[str]:
        @click.command(name="verb")
        @output.json_option
        def command(json_mode: bool) -> None:
            action()

        module = types.ModuleType("blockrepl.cli.verb_of_test")
        module.verb = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "verb", ("verb_of_test", "A verb of the test."))
        return ["--home", str(tmp_path / "home"), "verb"]

    return add


def raiser(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_an_expected_failure_is_one_line_with_its_hint(verb: Verb, capsys: Capture) -> None:
    error = StateError("a disk named web exists already", hint="choose another name")
    assert run(verb(raiser(error))) == 1
    out, err = capsys.readouterr()
    assert err == "error: a disk named web exists already. choose another name\n"
    assert out == ""


def test_with_json_the_failure_is_one_object_on_stdout_too(verb: Verb, capsys: Capture) -> None:
    error = StateError("no home at /x", hint="run receiver init", code="no-home")
    assert run([*verb(raiser(error)), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "error": "no home at /x",
        "code": "no-home",
        "hint": "run receiver init",
    }
    assert err == "error: no home at /x. run receiver init\n"


def test_a_refused_point_names_the_nearest_ones(verb: Verb, capsys: Capture) -> None:
    error = PointError("in a gap", nearest_before_ns=5, nearest_after_ns=None)
    assert run([*verb(raiser(error)), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "error": "in a gap",
        "code": "point",
        "hint": "",
        "nearest_before_ns": 5,
        "nearest_after_ns": None,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option"],
        ["no-such-verb"],
        ["completion"],
        ["completion", "ksh"],
        ["completion", "bash", "extra"],
        ["doctor", "--role", "astronaut"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], capsys: Capture) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "--help" in err


def test_a_usage_error_of_ours_is_status_2_too(verb: Verb, capsys: Capture) -> None:
    assert run(verb(raiser(UsageError("'A B' is no group's name")))) == 2
    assert capsys.readouterr().err == "error: 'A B' is no group's name\n"


@pytest.mark.parametrize("name", ["a\x01b", "../status", "a?b", "a#b", "a/b", "UPPER", ""])
@pytest.mark.parametrize(
    ("verb", "what"),
    [
        (("retention", "show"), "group"),
        (("retention", "plan"), "group"),
        (("retention", "plan", "--max-size=1G"), "group"),
        (("retention", "set", "--max-size=1G"), "group"),
        (("retention", "run"), "group"),
        (("checkpoint", "list"), "group"),
        (("verify",), "group"),
        (("disk", "resync"), "disk"),
    ],
)
def test_a_name_that_cannot_be_reaches_no_service(
    verb: tuple[str, ...], what: str, name: str, capsys: Capture, tmp_path: Path
) -> None:
    # Guards check_name before each name goes into a path of the control API.
    home = Home.create(tmp_path / "home").path
    assert run(["--home", str(home), *verb, name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert f"is no {what}'s name" in err


def test_wrong_usage_with_json_is_an_object_too(capsys: Capture) -> None:
    assert run(["doctor", "--json", "--role", "astronaut"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == "usage"


def test_a_json_flag_after_two_dashes_is_an_argument(capsys: Capture) -> None:
    assert run(["completion", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device (ENOSPC). free some room"),
        (errno.EACCES, "Permission denied (EACCES). run the command as"),
        (errno.ENOENT, "No such file or directory (ENOENT). check the path"),
        (errno.EADDRINUSE, "Address already in use (EADDRINUSE). choose another address"),
    ],
)
def test_a_failed_system_call_names_the_file_and_the_reason(
    number: int, words: str, verb: Verb, capsys: Capture
) -> None:
    error = OSError(number, os.strerror(number), "/images/web.img")
    assert run(verb(raiser(error))) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: /images/web.img: {words}")
    assert err.count("\n") == 1


def test_a_defect_is_one_line_and_its_traceback_is_in_the_log(
    verb: Verb, capsys: Capture, tmp_path: Path
) -> None:
    assert run(verb(raiser(ZeroDivisionError("division\nby zero")))) == 1
    err = capsys.readouterr().err
    log = tmp_path / "home" / "log" / "errors.log"
    assert err.startswith("error: internal: ZeroDivisionError: division by zero. ")
    assert err.count("\n") == 1
    assert str(log) in err
    assert "Traceback" in log.read_text()


def test_a_defect_shows_its_traceback_when_asked(
    verb: Verb, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLOCKREPL_DEBUG", "1")
    assert run(verb(raiser(ZeroDivisionError()))) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_defect_is_told_though_no_log_can_be_written(
    verb: Verb, capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    arguments = verb(raiser(ZeroDivisionError()))
    assert run(["--home", str(tmp_path / "file" / "home"), *arguments[2:]]) == 1
    err = capsys.readouterr().err
    assert "BLOCKREPL_DEBUG=1" in err
    assert err.count("\n") == 1


def test_an_interrupt_is_quiet(verb: Verb, capsys: Capture) -> None:
    assert run(verb(raiser(KeyboardInterrupt()))) == 130
    out, err = capsys.readouterr()
    assert (out.strip(), err.strip()) == ("", "")


def test_of_a_group_of_errors_the_worst_is_told(capsys: Capture, tmp_path: Path) -> None:
    expected = PeerError("the receiver sent garbage")
    nested = BaseExceptionGroup("x", [ExceptionGroup("y", [expected, StorageError("z")])])
    assert failure.report(nested, home=tmp_path, json_mode=False) == 1
    assert capsys.readouterr().err == "error: the receiver sent garbage\n"
    interrupted = BaseExceptionGroup("x", [expected, KeyboardInterrupt()])
    assert failure.report(interrupted, home=tmp_path, json_mode=False) == 130
    defect = BaseExceptionGroup("x", [expected, KeyboardInterrupt(), KeyError("k")])
    assert failure.report(defect, home=tmp_path, json_mode=False) == 1
    assert "internal: KeyError" in capsys.readouterr().err


def test_bytes_of_a_peer_cannot_drive_the_terminal(verb: Verb, capsys: Capture) -> None:
    assert run(verb(raiser(PeerError("bad name \x1b[2J\r\nfake: ok \x07")))) == 1
    assert capsys.readouterr().err == "error: bad name \ufffd[2J fake: ok \ufffd\n"


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [BLOCKREPL, "completion", "fish"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: No space left on device (ENOSPC)")
    assert done.stderr.count(b"\n") == 1


def test_a_reader_that_went_away_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = subprocess.run(
            [BLOCKREPL, "doctor", "--role", "receiver", "--json"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_leads_nowhere(closed: str) -> None:
    # Guards _open_closed_streams in cli/main.py: "internal: AttributeError", and the next file that
    # was opened was the stream.
    command = ["sh", "-c", f'"$0" completion fish {closed}', str(BLOCKREPL)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert bool(done.stdout) == (">&- " not in f"{closed} ".replace("2>&-", ""))


def test_no_command_shows_the_help_and_is_wrong_usage(capsys: Capture) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_help_names_what_a_receiver_can_do(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    [line] = [one for one in capsys.readouterr().out.splitlines() if "receiver  " in one]
    assert line.endswith("init, run, invite, seed, sources, revoke, check.")


def test_help_imports_no_verb() -> None:
    program = (
        "import sys; from blockrepl.cli.main import run; run(['--help']); "
        "print([m for m in ('trio', 'numpy', 'rich', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == b"[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_has_help_with_an_example(name: str, capsys: Capture) -> None:
    context = click.Context(cli, obj=output.Invocation())
    command = cli.get_command(context, name)
    assert command is not None
    subcommands = list(command.commands) if isinstance(command, click.Group) else []
    for path in [[name, sub] for sub in subcommands] or [[name]]:
        assert run([*path, "--help"]) == 0
        assert f"blockrepl {path[0]}" in capsys.readouterr().out.partition("Example")[2], path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str, capsys: Capture) -> None:
    assert run(["completion", shell]) == 0
    assert "_BLOCKREPL_COMPLETE" in capsys.readouterr().out


def test_the_shell_completes_verbs() -> None:
    done = subprocess.run(
        [BLOCKREPL],
        env={
            **os.environ,
            "_BLOCKREPL_COMPLETE": "bash_complete",
            "COMP_WORDS": "blockrepl do",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        check=False,
    )
    assert done.stdout == b"plain,doctor\n"


def test_the_home_is_the_option_then_the_environment_then_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    def home(*options: str) -> str:
        assert run([*options, "doctor", "--role", "receiver", "--json"]) == 0
        detail: str = json.loads(capsys.readouterr().out)["requirements"][0]["detail"]
        return detail.partition(":")[0]

    monkeypatch.setenv("BLOCKREPL_HOME", str(tmp_path / "environment"))
    assert home("--home", str(tmp_path / "option")) == str(tmp_path / "option")
    assert home() == str(tmp_path / "environment")
    monkeypatch.delenv("BLOCKREPL_HOME")
    assert home() == str(output.default_home())


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (3 << 40, "3 TiB")],
)
def test_bytes_are_told_in_binary_units(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.9999, "1 s"),
        (1.254, "1.25 s"),
        (59.96, "1 m"),
        (200, "3 m 20 s"),
        (7500, "2 h 5 m"),
        (694800, "8 d 1 h"),
        (-5, "-5 s"),
    ],
)
def test_durations_are_told_to_two_units(seconds: float, text: str) -> None:
    assert output.human_seconds(seconds) == text


def test_progress_without_a_terminal_is_a_line_a_tenth(capsys: Capture) -> None:
    with output.progress("export", 1 << 20) as advance:
        for done_bytes in range(0, (1 << 20) + 1, 4096):
            advance(done_bytes)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "export: 100% (1 MiB of 1 MiB)"


def test_a_line_into_a_pipe_is_a_line_however_long(capsys: Capture) -> None:
    # Guards PIPE_COLUMNS: `grep` for a gap met half of it.
    words = " ".join(["word"] * 200)
    output.emit(words, False, Text)
    output.emit([("web", words)], False, lambda rows: output.table(("name", "problem"), rows))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == words
    assert [line for line in told[1:] if words in line] == [told[-1]]
    assert len(told) == 4
    assert output.picture_columns() == output.PICTURE_COLUMNS


def test_a_table_takes_foreign_text_as_it_is(capsys: Capture) -> None:
    output.emit([("[red]x", "1")], False, lambda rows: output.table(("name", "n"), rows, right="n"))
    assert "[red]x" in capsys.readouterr().out
