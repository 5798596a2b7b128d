"""Views and forks over NBD: real nbdkit, foreign clients, signals, deaths and limits."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from journal_model import GROUP, Journal, small_segments
from oracle.nbd_client import FUA, Client
from serving import tool, wait_for
from test_export import command
from test_forks import assert_gives_way, at, fail, pinned, sources, succeed
from test_view import SIZES, find, flip, segments_of

from blockrepl.errors import StorageError
from blockrepl.limits import FORK_BLOCK_BYTES
from blockrepl.units import KIB
from blockrepl.views.nbd import ErrorLines, nbdkit


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    made.run(60)
    yield made
    made.close()


class Serving:
    """A `serve` that is ready."""

    def __init__(self, journal: Journal, socket: Path | None, *options: str) -> None:
        given = () if socket is None else ("--socket", socket)
        self.process = subprocess.Popen(
            command(journal, "serve", GROUP, *given, "--json", *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.answer: dict[str, Any] = json.loads(line)
        self.socket = socket or Path(self.answer["socket"])

    def client(self, disk: str) -> Client:
        return Client(self.socket, export=disk)

    def server(self) -> int:
        """nbdkit's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        [child] = children.split()
        return int(child)

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """What it said on stderr."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=30)[1]
        assert self.process.returncode == 0, said
        assert not self.socket.exists()
        return said


@contextmanager
def serving(journal: Journal, socket: Path | None, *options: str) -> Iterator[Serving]:
    made = Serving(journal, socket, *options)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.end()


def is_gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def read_all(client: Client) -> bytes:
    return b"".join(
        client.read(offset, min(64 * KIB, client.size_bytes - offset))
        for offset in range(0, client.size_bytes, 64 * KIB)
    )


def test_a_point_is_served_read_only_one_export_per_disk(journal: Journal, tmp_path: Path) -> None:
    stamp, option = at(journal, 30)
    socket = tmp_path / "s.sock"
    with serving(journal, socket, option) as served:
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert (served.answer["at_ns"], served.answer["writable"]) == (stamp, False)
        assert pinned(journal) == [(stamp, f"serve {socket}")]
        wanted = journal.model.at(stamp)
        for disk in served.answer["disks"]:
            out = tmp_path / f"{disk['name']}.out"
            tool("nbdcopy", disk["uri"], out)
            assert out.read_bytes() == wanted[disk["name"]]
            assert "read-only=on" in disk["qemu"]
        listed = json.loads(tool("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={socket}"))
        assert [export["export-name"] for export in listed["exports"]] == ["data", "root"]
        with served.client("root") as client, pytest.raises(OSError, match=r"."):
            client.write(0, b"x")
        with pytest.raises(ConnectionError):
            served.client("nope")
        assert "is there already" in fail(journal, "serve", GROUP, option, "--socket", socket)
        assert served.end(signal.SIGINT) == ""
    assert pinned(journal) == []
    assert [path.name for path in tmp_path.glob(".nbd*")] == []


def test_a_served_fork_is_written_to_and_thrown_away(journal: Journal, tmp_path: Path) -> None:
    before = sources(journal)
    stamp, option = at(journal, 40)
    chance = random.Random(5)
    with serving(journal, tmp_path / "s", option, "--writable") as served:
        assert_gives_way(served.server())
        wanted = journal.model.at(stamp)
        with served.client("root") as root, served.client("data") as data:
            for _ in range(60):
                client, name = chance.choice([(root, "root"), (data, "data")])
                offset = chance.randrange(SIZES[name] - 9000)
                length = chance.randrange(1, 9000)
                content = chance.randbytes(length)
                match chance.randrange(5):
                    case 0:
                        content = bytes(length)
                        client.zero(offset, length)
                    case 1:
                        content = bytes(length)
                        client.trim(offset, length, flags=FUA)
                    case 2:
                        client.write(offset, content, flags=FUA)
                    case _:
                        client.write(offset, content)
                wanted[name][offset : offset + length] = content
            root.flush()
            with pytest.raises(OSError, match=r"."):
                root.write(SIZES["root"] - 1, b"xx")
            with served.client("root") as second:  # another connection sees the same
                assert read_all(second) == wanted["root"]
            assert read_all(data) == wanted["data"]
        assert served.end() == ""
    assert sources(journal) == before
    assert list((journal.directory / "forks").iterdir()) == []


def test_a_named_fork_survives_its_server_s_and_its_parent_s_death(
    journal: Journal, tmp_path: Path
) -> None:
    """Guards, in plugins/view.py, the flush of FUA writes (`_force`), and the end of the pipe and
    the flush then (`_end`), with a client that stays.
    """
    stamp, option = at(journal, 20)
    wanted = journal.model.at(stamp)["root"]
    for turn, victim in enumerate(("server", "parent", "nobody")):
        served = Serving(journal, tmp_path / "s", option, "--fork=kept")
        client = served.client("root")
        assert read_all(client) == wanted
        data = bytes([turn + 65]) * 5000
        client.write(turn * 3000, data, flags=0 if victim == "nobody" else FUA)
        wanted[turn * 3000 : turn * 3000 + 5000] = data
        if victim == "nobody":
            assert served.end() == ""
            client.vanish()
            continue
        server = served.server()
        os.kill(server if victim == "server" else served.process.pid, signal.SIGKILL)
        wait_for(partial(is_gone, server), "nbdkit's end")
        client.vanish()
        said = served.process.communicate(timeout=30)[1]
        if victim == "server":
            assert served.process.returncode == 1
            assert said.splitlines()[-1].startswith("error: nbdkit has ended with status -9")
    with serving(journal, tmp_path / "s", "--fork=kept") as served:
        assert "in use by process" in fail(journal, "fork", "remove", GROUP, "kept")
        with served.client("root") as client:
            assert read_all(client) == wanted
    succeed(journal, "fork", "remove", GROUP, "kept")


def test_a_disk_that_cannot_be_flushed_at_the_end_is_told_of_and_the_others_are_flushed(
    journal: Journal, tmp_path: Path
) -> None:
    """Guards `WritableView.flush_all`, and that the end's status becomes the command's."""
    succeed(journal, "fork", "create", GROUP, "kept", "--at=latest")
    first, second = json.loads((journal.directory / "forks/kept/fork.json").read_text())["disks"]
    served = Serving(journal, tmp_path / "s", "--fork=kept")
    with served.client(first["name"]) as client:
        for block in range(3):
            client.write(block * 2 * FORK_BLOCK_BYTES, b"before", flags=FUA)
    clients = [served.client(disk["name"]) for disk in (first, second)]
    for client in clients:
        client.write(0, b"at the end")
    clients[0].write(7 * FORK_BLOCK_BYTES, b"one change of the map more")
    map_bytes = (journal.directory / f"forks/kept/{first['name']}.map").stat().st_size
    resource.prlimit(served.server(), resource.RLIMIT_FSIZE, (map_bytes, map_bytes))
    served.process.terminate()
    told = served.process.communicate(timeout=30)[1]
    for client in clients:
        client.vanish()
    assert served.process.returncode == 1, told
    assert f"cannot make durable the fork's {first['name']}.img" in told
    assert told.splitlines()[-1].startswith("error: nbdkit has ended with status 1")
    with (
        serving(journal, tmp_path / "s", "--fork=kept") as again,
        again.client(second["name"]) as client,
    ):
        assert client.read(0, 10) == b"at the end"


def test_what_killed_servers_left_is_removed_by_the_next(journal: Journal) -> None:
    """Guards `_sweep`, and that it leaves alone what is served."""
    run = journal.home / "run"
    with serving(journal, None, "--at=latest") as alive:
        in_use = set(run.iterdir())
        killed = Serving(journal, None, "--at=latest")
        server = killed.server()
        killed.process.kill()
        killed.process.communicate()
        wait_for(partial(is_gone, server), "nbdkit's end")
        assert len(set(run.iterdir()) - in_use) == 2
        with serving(journal, None, "--at=latest"):
            assert not killed.socket.exists()
            assert in_use < set(run.iterdir())
        assert set(run.iterdir()) == in_use
        with alive.client("root") as client:
            assert client.read(0, 1)
    assert not list(run.iterdir())


def test_a_guest_over_the_limit_gets_no_space_and_is_told_of_once(
    journal: Journal, tmp_path: Path
) -> None:
    with serving(journal, tmp_path / "s", "--at=latest", "--writable", "--size-limit=8K") as served:
        with served.client("root") as client:
            client.write(0, b"a" * 8 * KIB)
            for _ in range(3):
                with pytest.raises(OSError, match="No space left"):
                    client.write(16 * KIB, b"a")
            client.write(50, b"b" * 100)
            assert client.read(0, 200) == b"a" * 50 + b"b" * 100 + b"a" * 50
        assert served.end().count("limit of 8192 bytes") == 1


def test_damage_is_the_reader_s_error_and_names_the_segment(
    journal: Journal, tmp_path: Path
) -> None:
    bad = journal.write("root", 4096, journal.random.randbytes(8192))
    path = segments_of(journal)[-1]
    flip(path, find(path, bad.data[:4096]) + 9)
    with serving(journal, tmp_path / "s", "--at=latest", "--writable") as served:
        with served.client("root") as client:
            for _ in range(2):
                with pytest.raises(OSError, match="Input/output"):
                    client.read(4096, 4096)
            with pytest.raises(OSError, match="Input/output"):
                client.write(5000, b"half a block")  # the rest of it cannot be read
            client.write(4096, b"c" * 8192)
            assert client.read(4096, 8192) == b"c" * 8192
        said = served.end()
    assert said.count("is damaged at offset") == 1
    assert path.name in said


def test_a_server_is_ready_when_the_plugin_has_opened_the_view(tmp_path: Path) -> None:
    """Guards `_greets`: nbdkit listens before."""
    arguments = [f"replica={tmp_path}", "at_ns=1"]
    with (
        ErrorLines() as errors,
        pytest.raises(StorageError, match="no catalog"),
        nbdkit(arguments, tmp_path / "socket", errors),
    ):
        pytest.fail("ready with a replica that is not there")


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        ([GROUP], 2, "--at POINT"),
        ([GROUP, "--at=-1000d"], 1, "before the floor"),
        (["nope", "--at=latest"], 1, "no replica of a group nope"),
        ([GROUP, "--at=latest", "--socket=missing/s"], 1, "mkdir"),
        ([GROUP, "--at=latest", "--socket=file"], 1, "is there already"),
        ([GROUP, "--at=latest", f"--socket={'x' * 120}"], 1, "too long"),
        ([GROUP, "--fork=nope"], 1, "no fork 'nope'"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    journal: Journal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert told in fail(journal, "serve", *arguments, status=status)
    assert not list(tmp_path.glob(".nbd*"))
    assert pinned(journal) == []
