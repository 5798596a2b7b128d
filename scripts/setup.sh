#!/bin/bash
# Bring what is missing: Debian packages (needs root, and only when one is missing) and .venv.
# A second run compares names and digests only.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(
    # the source and the receiver
    nbdkit nbdkit-plugin-python qemu-utils openssl
    # views
    fuse3
    # building the compiled core and pyfuse3
    gcc libc6-dev libfuse3-dev liblz4-dev libxxhash-dev make pkg-config python3-dev python3-venv
    # tests, demo and bench: foreign tools to check against, and guests
    libnbd-bin qemu-system-x86 fio git sqlite3 busybox-static
    e2fsprogs xfsprogs btrfs-progs cpio kmod zstd gnutls-bin tcpdump
)

# The Python that nbdkit embeds is the system's; another one (pyenv, conda) would build a core that
# nbdkit cannot load.
SYSTEM_PYTHON=/usr/bin/python3
STAMP=.venv/.blockrepl-stamp

missing_packages() {
    local package state
    for package in "${PACKAGES[@]}"; do
        state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || printf '%s\n' "$package"
    done
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "setup: installing ${missing[*]}"
    if [ "$(id -u)" -ne 0 ]; then
        echo "error: Debian packages are missing and this is not root." >&2
        echo "run: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install --yes --no-install-recommends "${missing[@]}"
}

# What the installed package was built from.
digest() {
    {
        "$SYSTEM_PYTHON" --version
        pwd
        sha256sum pyproject.toml setup.py
        find blockrepl -name '*.pyx' -o -name '*.pxd' -o -name '*.[ch]' |
            LC_ALL=C sort | xargs -r sha256sum
    } | sha256sum
}

install_package() {
    local wanted
    wanted=$(digest)
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && .venv/bin/blockrepl --version >/dev/null 2>&1; then
        return 0
    fi
    echo "setup: building blockrepl in .venv"
    # Made by another Python or at another place (a moved checkout): its scripts would not run.
    if ! grep -qs "$PWD/.venv" .venv/bin/activate || ! grep -qs '^home = /usr/bin$' .venv/pyvenv.cfg; then
        "$SYSTEM_PYTHON" -m venv --clear .venv
    fi
    # The build's own requirements come first: without isolation a rebuild fetches nothing.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        'setuptools>=77' 'Cython>=3.1,<4' 'wheel>=0.43,<1'
    PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --no-build-isolation --editable '.[dev]'
    printf '%s\n' "$wanted" >"$STAMP"
}

install_packages
exec 9<pyproject.toml
flock 9 # two runs at once would build into the same tree
install_package
