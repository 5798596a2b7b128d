"""Where the package's own files are, from a checkout as from a wheel.

==================  =============================  ==========================
what                checkout (editable install)    wheel
==================  =============================  ==========================
nbdkit's scripts    plugins/<name>.py              blockrepl/plugins/<name>.py
import root         the checkout                   site-packages
==================  =============================  ==========================

nbdkit runs the script in the Python it embeds, which knows nothing of this environment: whoever
starts nbdkit puts ``import_root()`` in its PYTHONPATH.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import blockrepl
from blockrepl.errors import StateError


def import_root() -> Path:
    """The directory that holds the ``blockrepl`` package."""
    return Path(blockrepl.__path__[0]).resolve().parent


def plugin_script(name: str) -> Path:
    """The nbdkit Python script ``name`` (without ``.py``). StateError where it is not installed."""
    spec = find_spec("blockrepl.plugins")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        script = Path(directory).resolve() / f"{name}.py"
        if script.is_file():
            return script
    raise StateError(
        f"nbdkit's script {name}.py is not installed (package blockrepl.plugins)",
        hint="install blockrepl again: pip install --force-reinstall blockrepl, or make setup",
    )
