"""How a guest reaches a disk's server: QEMU options, libvirt XML, NBD URI.

The reconnect delay makes a restart of the server a pause for the guest: QEMU holds its requests
back for so long before it fails them. libvirt knows it as ``<reconnect delay=...>``.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

RECONNECT_SECONDS = 3600
OPEN_SECONDS = 60  # the guest may be started before its disk's server


def uri(socket: Path) -> str:
    return f"nbd+unix:///?socket={quote(str(socket))}"


def qemu(name: str, socket: Path) -> str:
    """Options for qemu-system-*, on one line, safe in a shell without quotes."""
    node = f"blockrepl-{name}"[:31].replace(".", "-")  # QEMU's limit for node names
    path = str(socket).replace(",", ",,")
    return (
        f"-blockdev driver=nbd,node-name={node},server.type=unix,server.path={path},"
        f"reconnect-delay={RECONNECT_SECONDS},open-timeout={OPEN_SECONDS},discard=unmap,"
        f"detect-zeroes=unmap -device virtio-blk-pci,drive={node}"
    )


def libvirt(name: str, socket: Path) -> str:
    """A libvirt <disk> element, for the domain's <devices>."""
    return f"""<disk type='network' device='disk'>
  <driver name='qemu' type='raw' discard='unmap' detect_zeroes='unmap'/>
  <source protocol='nbd' name=''>
    <host transport='unix' socket={quoteattr(str(socket))}/>
    <reconnect delay='{RECONNECT_SECONDS}'/>
  </source>
  <target dev='vda' bus='virtio'/>
  <serial>{name[:20]}</serial>
</disk>"""
