"""How a guest reaches a disk's server: QEMU options, libvirt XML, NBD URI.

The reconnect delay makes a restart of the server a pause for the guest: QEMU holds its requests
back for so long before it fails them. libvirt knows it as ``<reconnect delay=...>``; its versions
up to 9.0, as in Debian 12, pass the element over (and `virsh define --validate` refuses it).
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

RECONNECT_SECONDS = 3600
OPEN_SECONDS = 60  # the guest may be started before its disk's server
_NODE_NAME_CHARACTERS_MAX = 31  # QEMU's limit
_SERIAL_CHARACTERS_MAX = 20  # virtio-blk's limit


def uri(socket: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={quote(str(socket))}"


def qemu_view(name: str, socket: Path, *, read_only: bool) -> str:
    """Options for a disk of a served view: the export of its name. There is no reconnecting."""
    node = _shortened(f"view-{name}", _NODE_NAME_CHARACTERS_MAX)
    path = str(socket).replace(",", ",,")
    blockdev = f"driver=nbd,node-name={node},server.type=unix,server.path={path},export={name}," + (
        "read-only=on" if read_only else "discard=unmap,detect-zeroes=unmap"
    )
    return f"-blockdev {shlex.quote(blockdev)} -device virtio-blk-pci,drive={node}"


def qemu(name: str, socket: Path) -> str:
    """Options for qemu-system-*, on one line, quoted for a shell where the path needs it."""
    node = _shortened(f"blockrepl-{name}", _NODE_NAME_CHARACTERS_MAX)
    path = str(socket).replace(",", ",,")
    blockdev = (
        f"driver=nbd,node-name={node},server.type=unix,server.path={path},"
        f"reconnect-delay={RECONNECT_SECONDS},open-timeout={OPEN_SECONDS},discard=unmap,"
        "detect-zeroes=unmap"
    )
    return f"-blockdev {shlex.quote(blockdev)} -device virtio-blk-pci,drive={node}"


def _shortened(name: str, characters_max: int) -> str:
    """The name, or where it is too long its beginning and a digest: names stay different."""
    if len(name) <= characters_max:
        return name
    return f"{name[: characters_max - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def libvirt(name: str, socket: Path) -> str:
    """A libvirt <disk> element, for the domain's <devices>."""
    return f"""<disk type='network' device='disk'>
  <driver name='qemu' type='raw' discard='unmap' detect_zeroes='unmap'/>
  <source protocol='nbd' name=''>
    <host transport='unix' socket={quoteattr(str(socket))}/>
    <reconnect delay='{RECONNECT_SECONDS}'/>
  </source>
  <target dev='vda' bus='virtio'/>
  <serial>{_shortened(name, _SERIAL_CHARACTERS_MAX)}</serial>
</disk>"""
