"""The compiled parts. Everything else about the package is in pyproject.toml.

The capture core is loaded by the Python that nbdkit embeds (the system's) as well as by the
environment the package is installed in, so both must have the same minor version: `blockrepl
doctor` checks it by loading the core in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

HERE = Path(__file__).parent
HEADERS = sorted(str(path.relative_to(HERE)) for path in HERE.glob("blockrepl/*/*.h"))
FLAGS = ["-O2", "-Wall", "-pthread"]


def extension(name: str, *sources: str, libraries: Sequence[str] = ()) -> Extension:
    return Extension(
        name,
        sources=list(sources),
        include_dirs=["blockrepl/capture", "blockrepl/formats", "blockrepl/storage"],
        depends=HEADERS,
        libraries=list(libraries),
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
    )


EXTENSIONS = [
    extension(
        "blockrepl.capture._core",
        "blockrepl/capture/_core.pyx",
        "blockrepl/capture/device.c",
        "blockrepl/capture/hot_map.c",
    ),
    extension(
        "blockrepl.storage._gather",
        "blockrepl/storage/_gather.pyx",
        "blockrepl/storage/gather.c",
        "blockrepl/storage/frame_table.c",
        "blockrepl/storage/kept.c",
        libraries=["lz4", "xxhash"],
    ),
    extension("blockrepl.storage._ring", "blockrepl/storage/_ring.pyx"),
    extension(
        "blockrepl.formats._blocks",
        "blockrepl/formats/_blocks.pyx",
        libraries=["lz4", "xxhash"],
    ),
    extension("blockrepl.formats._pack", "blockrepl/formats/_pack.pyx"),
    extension("blockrepl.model._sweep", "blockrepl/model/_sweep.pyx"),
]

setup(ext_modules=cythonize(EXTENSIONS, build_dir="build/cython", language_level=3))
