"""blockrepl doctor: what is missing is named with the command that brings it, for each role."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockrepl.services.requirements import (
    ROLES,
    check_core_in_nbdkit,
    check_fuse_device,
    check_home,
    check_program,
    check_shared_memory,
    examine,
    install_command,
)

BLOCKREPL = Path(sys.executable).with_name("blockrepl")


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BLOCKREPL, "doctor", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_this_machine_has_all_that_the_tests_need(tmp_path: Path) -> None:
    report = examine(tmp_path)
    assert report.ready == dict.fromkeys(ROLES, True), [r for r in report.requirements if not r.met]
    assert report.install == ""
    assert all(need.fix == "" for need in report.requirements)


def test_an_empty_path_lacks_nbdkit_and_names_its_packages(tmp_path: Path) -> None:
    done = doctor("--role", "source", "--json", PATH=str(tmp_path))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ready"] == {"source": False}
    assert (
        "apt-get install --no-install-recommends nbdkit nbdkit-plugin-python" in report["install"]
    )
    missing = {need["name"] for need in report["requirements"] if not need["met"]}
    assert missing == {"nbdkit", "nbdkit's Python plugin", "capture core in nbdkit"}


def test_without_a_role_it_reports_and_does_not_fail(tmp_path: Path) -> None:
    done = doctor(PATH=str(tmp_path))
    assert done.returncode == 0
    assert "MISSING" in done.stdout
    assert "source: NOT ready" in done.stdout
    assert "install what is missing: apt-get install" in done.stdout
    assert done.stderr == ""


def test_a_role_that_lacks_nothing_succeeds() -> None:
    done = doctor("--role", "receiver")
    assert (done.returncode, done.stderr) == (0, "")
    assert "receiver: ready" in done.stdout
    assert "nbdkit" not in done.stdout


def test_a_core_that_nbdkit_cannot_load_is_found_by_loading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_core_in_nbdkit().met
    broken = tmp_path / "blockrepl" / "capture"
    broken.mkdir(parents=True)
    (broken / "_core.py").write_text("raise ImportError('undefined symbol: PyUnicode_New')")
    wrapper = tmp_path / "nbdkit"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec /usr/bin/nbdkit "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = check_core_in_nbdkit()
    assert not finding.met
    assert "undefined symbol: PyUnicode_New" in finding.detail
    assert "/usr/bin/python3 -m venv" in finding.fix


def test_a_program_that_does_not_run_is_not_taken_for_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "qemu-img"
    program.write_text(
        "#!/bin/sh\necho libaio.so.1: cannot open shared object file >&2\nexit 127\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = check_program("qemu-img", ["--version"])
    assert not finding.met
    assert "libaio.so.1" in finding.detail


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_shared_memory_without_room_for_a_ring_is_refused(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", tmp_path], check=True)
    try:
        finding = check_shared_memory(str(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert not finding.met
    assert f"remount,size=1G {tmp_path}" in finding.fix


def test_a_home_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not check_home(tmp_path / "file" / "home").met
    assert check_home(tmp_path / "not" / "yet" / "there").met


def test_a_machine_without_fuse_is_told_to_load_it(tmp_path: Path) -> None:
    finding = check_fuse_device(str(tmp_path / "fuse"))
    assert not finding.met
    assert "modprobe fuse" in finding.fix


def test_the_install_command_names_each_package_once() -> None:
    assert install_command(["a", "b", "a"]) == "apt-get install --no-install-recommends a b"
    assert install_command([]) == ""


def test_setup_installs_every_package_that_doctor_asks_for(tmp_path: Path) -> None:
    setup = (Path(__file__).parents[1] / "scripts" / "setup.sh").read_text()
    listed = setup[setup.index("PACKAGES=(") : setup.index("\n)\n")].split()
    wanted = {need.package for need in examine(tmp_path).requirements if need.package}
    assert wanted <= set(listed)
