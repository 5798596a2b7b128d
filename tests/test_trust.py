"""Invitations are used once, revocations hold at once, groups stay with their owners."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockrepl.errors import StateError, StorageError, TrustError
from blockrepl.storage.trust import FILE_NAME, Source, TrustStore
from blockrepl.units import NANOSECONDS_PER_SECOND

NOW = 1_800_000_000 * NANOSECONDS_PER_SECOND


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE_NAME


@pytest.fixture
def store(path: Path) -> Iterator[TrustStore]:
    store = TrustStore(path)
    yield store
    store.close()


def add(store: TrustStore, name: str, *, groups: tuple[str, ...] = (), number: str = "") -> Source:
    secret = store.create_invite(60, groups, NOW)
    label = name + number
    return store.redeem(secret, NOW, name=name, source_id=f"id-{label}", serial=f"serial-{label}")


def refusal(store: TrustStore, secret: str, now: int, name: str = "web2") -> str:
    with pytest.raises(TrustError) as caught:
        store.redeem(secret, now, name=name, source_id="id-x", serial="serial-x")
    assert caught.value.hint
    return caught.value.code


def test_an_invitation_lets_one_source_in(store: TrustStore) -> None:
    secret = store.create_invite(60, [], NOW)
    source = store.redeem(secret, NOW, name="web1", source_id="id-1", serial="abc")
    assert source == Source("id-1", "web1", "abc", NOW, None, ())
    assert store.list_sources() == [source]
    assert not store.is_revoked("abc")
    assert refusal(store, secret, NOW) == "used"
    assert store.list_sources() == [source]


def test_an_expired_invitation_is_refused(store: TrustStore) -> None:
    secret = store.create_invite(1.5, [], NOW)
    assert refusal(store, secret, NOW + 1_500_000_000) == "expired"
    assert store.list_sources() == []
    store.redeem(secret, NOW + 1_499_999_999, name="web1", source_id="id-1", serial="abc")


@pytest.mark.parametrize("secret", ["", "x", "\ud800", "A" * 43])
def test_a_forged_invitation_is_refused(store: TrustStore, secret: str) -> None:
    store.create_invite(60, [], NOW)
    assert refusal(store, secret, NOW) == "unknown"


def test_a_taken_name_does_not_use_the_invitation_up(store: TrustStore) -> None:
    add(store, "web1")
    secret = store.create_invite(60, [], NOW)
    assert refusal(store, secret, NOW, "web1") == "name-taken"
    store.redeem(secret, NOW, name="web2", source_id="id-2", serial="s2")


def test_concurrent_redeemers_get_in_once(store: TrustStore, path: Path) -> None:
    for number in range(5):
        secret = store.create_invite(60, [], NOW)
        start = threading.Barrier(4)
        outcomes: list[str] = []

        def redeem(
            me: int,
            secret: str = secret,
            start: threading.Barrier = start,
            outcomes: list[str] = outcomes,
            number: int = number,
        ) -> None:
            label = f"{number}-{me}"
            own = TrustStore(path) if me % 2 else store
            start.wait()
            try:
                own.redeem(secret, NOW, name=label, source_id=f"i{label}", serial=f"s{label}")
                outcomes.append("in")
            except TrustError as error:
                outcomes.append(error.code)
            if me % 2:
                own.close()

        threads = [threading.Thread(target=redeem, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["in", "used", "used", "used"]
    assert len(store.list_sources()) == 5


def test_two_processes_open_a_new_store_at_once(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from blockrepl.storage.trust import TrustStore\n"
        "TrustStore(Path(sys.argv[1])).close()"
    )
    command = [sys.executable, "-c", code, str(path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert path.stat().st_mode & 0o777 == 0o600


def test_revocation_is_durable_and_seen_by_other_processes(store: TrustStore, path: Path) -> None:
    source = add(store, "web1")
    version = store.data_version()
    assert store.data_version() == version
    other = TrustStore(path)
    revoked = other.revoke("web1", NOW + 1)
    other.close()
    assert revoked.revoked_ns == NOW + 1
    assert store.data_version() > version
    assert store.is_revoked(source.serial)
    with pytest.raises(TrustError, match="no source named"):
        store.revoke("web1", NOW)


def test_every_change_moves_the_version(store: TrustStore) -> None:
    versions = [store.data_version()]
    add(store, "web1")
    versions.append(store.data_version())
    store.claim_group("id-web1", "shop")
    versions.append(store.data_version())
    store.revoke("web1", NOW)
    versions.append(store.data_version())
    assert sorted(set(versions)) == versions


def test_a_certificate_that_is_not_listed_is_not_trusted(store: TrustStore) -> None:
    assert store.is_revoked("abc")


def test_the_first_source_owns_a_group(store: TrustStore) -> None:
    add(store, "web1")
    add(store, "web2")
    store.claim_group("id-web1", "shop")
    store.claim_group("id-web1", "shop")
    with pytest.raises(TrustError, match="another source") as caught:
        store.claim_group("id-web2", "shop")
    assert caught.value.code == "not-owner"
    assert "--group shop" in caught.value.hint
    store.claim_group("id-web2", "mail")
    assert [source.groups for source in store.list_sources()] == [("shop",), ("mail",)]


def test_an_invitation_may_name_a_group_that_has_an_owner(store: TrustStore) -> None:
    add(store, "web1")
    store.claim_group("id-web1", "shop")
    add(store, "web2", groups=("shop", "shop", "mail"))
    store.claim_group("id-web2", "shop")
    assert [source.groups for source in store.list_sources()] == [("shop",), ("shop",)]


def test_a_revoked_source_keeps_its_groups_from_others(store: TrustStore) -> None:
    add(store, "web1")
    store.claim_group("id-web1", "shop")
    store.revoke("web1", NOW)
    with pytest.raises(TrustError) as caught:
        store.claim_group("id-web1", "shop")
    assert caught.value.code == "revoked"
    add(store, "web1", number="-again")
    with pytest.raises(TrustError) as caught:
        store.claim_group("id-web1-again", "shop")
    assert caught.value.code == "not-owner"
    assert store.is_revoked("serial-web1")
    assert not store.is_revoked("serial-web1-again")


def test_secrets_are_not_stored(store: TrustStore, path: Path) -> None:
    secret = store.create_invite(60, ["shop"], NOW)
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_everything_survives_a_restart(path: Path) -> None:
    store = TrustStore(path)
    secret = store.create_invite(60, [], NOW)
    add(store, "web1")
    before = store.list_sources()
    store.close()
    again = TrustStore(path)
    assert again.list_sources() == before
    again.redeem(secret, NOW, name="web2", source_id="id-2", serial="s2")
    again.close()


def test_a_damaged_or_foreign_file_is_said_so(path: Path) -> None:
    path.write_bytes(b"this is no database, and long enough to be looked at" * 100)
    with pytest.raises(StorageError):
        TrustStore(path)
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(StateError, match="version 9"):
        TrustStore(path)


def test_numbers_of_agent_processes_only_grow_and_one_that_is_behind_is_refused(
    store: TrustStore, path: Path
) -> None:
    # Guards the comparison in TrustStore.admit.
    web, mail = add(store, "web"), add(store, "mail")
    assert [store.admit(web.id, 0) for _ in range(3)] == [1, 2, 3]
    assert store.admit(mail.id, 0) == 1
    assert store.admit(web.id, 3) == 3
    for behind in (1, 2):
        with pytest.raises(TrustError) as caught:
            store.admit(web.id, behind)
        assert caught.value.code == "fenced"
        assert caught.value.hint
    assert store.admit(web.id, 2, may_return=True) == 2
    assert store.admit(web.id, 3) == 3  # is still the newest
    assert store.admit(web.id, 9) == 9  # as after the store came back from a backup
    again = TrustStore(path)
    assert again.admit(web.id, 0) == 10
    again.close()


def test_a_store_of_the_first_version_is_taken_over(path: Path) -> None:
    with TrustStore(path)._change() as connection:
        connection.execute("DROP TABLE instances")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    store = TrustStore(path)
    assert store.admit(add(store, "web").id, 0) == 1
    store.close()
