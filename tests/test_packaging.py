"""The package as users get it: a wheel in a plain venv does what the checkout does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from blockrepl.paths import import_root, plugin_script

CHECKOUT = Path(__file__).parents[1]
UNITS = CHECKOUT / "scripts" / "systemd"
CORES = (
    "blockrepl/capture/_core",
    "blockrepl/formats/_pack",
    "blockrepl/model/_sweep",
    "blockrepl/storage/_gather",
    "blockrepl/storage/_ring",
)
pytestmark = pytest.mark.timeout(400)  # all cores are compiled, beside other tests
PLUGINS = sorted(path.name for path in (CHECKOUT / "plugins").glob("*.py"))


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a source distribution, so that both are complete."""
    base = tmp_path_factory.mktemp("build")
    source = base / "source"
    # What git tracks or would track: build leftovers in the checkout must not help.
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=CHECKOUT
    )
    for name in filter(None, listed.split("\0")):
        if (CHECKOUT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", base / "dist", cwd=source)
    (built,) = (base / "dist").glob("blockrepl-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the wheel; what blockrepl depends on is borrowed from this environment."""
    venv = tmp_path_factory.mktemp("venv")
    run("/usr/bin/python3", "-m", "venv", "--without-pip", venv, cwd=venv)
    site = venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # A path line adds a directory but does not run that directory's own .pth files, so the
    # editable install of the checkout stays out of sight.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(
        *(sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install"),
        *("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", wheel),
        cwd=venv,
    )
    return venv


@pytest.mark.slow
def test_the_wheel_holds_the_cores_the_plugins_and_the_types_but_no_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for core in CORES:
        assert any(name.startswith(core + ".") and name.endswith(".so") for name in names), core
    assert {f"blockrepl/plugins/{name}" for name in PLUGINS} <= set(names)
    assert "blockrepl/py.typed" in names
    modules = {str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("blockrepl/**/*.py*")}
    wanted = {name for name in modules if name.endswith((".py", ".pyi"))}
    assert wanted <= set(names)
    assert not [name for name in names if name.endswith((".pyx", ".c", ".h", ".pyc"))]
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_a_wheel_in_a_venv_runs_and_finds_its_plugins(environment: Path, tmp_path: Path) -> None:
    version = run(environment / "bin" / "blockrepl", "--version", cwd=tmp_path)
    assert version == "blockrepl 0.1.0\n"
    program = (
        "from blockrepl.paths import import_root, plugin_script; print(import_root());"
        "print(plugin_script('capture'))"
    )
    printed = run(environment / "bin" / "python", "-c", program, cwd=tmp_path)
    root, script = (Path(line) for line in printed.splitlines())
    assert root.is_relative_to(environment)
    assert script == root / "blockrepl" / "plugins" / "capture.py"


@pytest.mark.slow
def test_the_core_of_a_wheel_loads_inside_nbdkit(environment: Path, tmp_path: Path) -> None:
    report = run(environment / "bin" / "blockrepl", "doctor", "--role", "source", cwd=tmp_path)
    assert "source: ready" in report


def test_the_checkout_finds_its_own_plugins() -> None:
    assert import_root() == CHECKOUT
    assert plugin_script("capture") == CHECKOUT / "plugins" / "capture.py"


def test_every_package_directory_is_in_the_wheels_list() -> None:
    listed = re.findall(r'^    "(blockrepl[a-z.]*)",$', project_file(), re.MULTILINE)
    found = {
        str(path.parent.relative_to(CHECKOUT)).replace("/", ".")
        for path in CHECKOUT.glob("blockrepl/**/__init__.py")
    }
    assert found | {"blockrepl.plugins"} <= set(listed)


def project_file() -> str:
    return (CHECKOUT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "unit", ["blockrepl-receiver.service", "blockrepl-agent.service", "blockrepl-disk@.service"]
)
def test_systemd_accepts_the_units(unit: str, tmp_path: Path) -> None:
    text = (UNITS / unit).read_text()
    assert "\nExecStart=blockrepl " in text
    executable = Path(sys.executable).with_name("blockrepl")
    instance = tmp_path / unit.replace("@.", "@web.")
    instance.write_text(text.replace("ExecStart=blockrepl ", f"ExecStart={executable} "))
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this machine")
    done = subprocess.run(
        [analyze, "verify", "--man=no", instance], capture_output=True, text=True, check=False
    )
    # Unknown settings are warnings with status 0; of other units on the machine we do not care.
    complaints = [line for line in done.stderr.splitlines() if "blockrepl" in line]
    assert (done.returncode, complaints) == (0, [])
