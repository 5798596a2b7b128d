"""The peers: what a user of today would run instead.

=====================  ===========================================================================
nbdkit file            nbdkit with its C file plugin: the least an NBD server can cost
qemu-nbd               QEMU's own server for a raw file, write-back cache as is its default
QSD mirror             the qemu-storage-daemon exporting an image over NBD, a mirror job
                       (background, the full pass finished) sending every change over TLS with
                       mutual certificates to a qemu-nbd on loopback: QEMU's nearest to replication
QSD FUSE               the qemu-storage-daemon's FUSE export of a raw file
=====================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.processes import MeasurementError, Scratch, free_port, wait_until
from scripts.benchmark.qmp import Monitor

MIRROR_SECONDS = 180.0  # for the first full pass, and for the leftovers after a round
MIRROR_JOB = "mirror"


def socket_uri(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"


@contextmanager
def nbdkit_file(scratch: Scratch, image: Path) -> Iterator[str]:
    """Serve ``image`` with nbdkit's file plugin; yields the NBD URI."""
    path = scratch.directory / "nbdkit.sock"
    command: list[str | Path] = ["nbdkit", "-f", "-U", path, "file", image]
    with scratch.running("nbdkit", command, path) as service:
        service.wait_ready(path.is_socket)
        yield socket_uri(path)


@contextmanager
def qemu_nbd(scratch: Scratch, image: Path, *, read_only: bool = False) -> Iterator[str]:
    """Serve ``image`` with qemu-nbd; yields the NBD URI."""
    path = scratch.directory / "qemu-nbd.sock"
    command: list[str | Path] = ["qemu-nbd", "-f", "raw", "-t", "-e", "4", "-k", path, image]
    if read_only:
        command.append("--read-only")
    with scratch.running("qemu-nbd", command, path) as service:
        service.wait_ready(path.is_socket)
        yield socket_uri(path)


def make_certificates(scratch: Scratch) -> Path:
    """A CA, a server's and a client's certificate, named as QEMU's tls-creds-x509 wants them."""
    place = scratch.directory / "tls"
    place.mkdir(exist_ok=True)
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def make(name: str, subject: str, *extensions: str) -> None:
        signer: list[str] = []
        if name != "ca":
            signer = ["-CA", f"{place}/ca-cert.pem", "-CAkey", f"{place}/ca-key.pem"]
        added = [word for extension in extensions for word in ("-addext", extension)]
        files = ["-keyout", f"{place}/{name}-key.pem", "-out", f"{place}/{name}-cert.pem"]
        words = ["openssl", "req", "-x509", "-days", "2", "-subj", subject]
        scratch.run([*words, *new_key, *signer, *added, *files])

    make("ca", "/CN=bench", "keyUsage=critical,keyCertSign,cRLSign")
    leaf = ("basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature")
    make(
        "server", "/CN=server", *leaf, "extendedKeyUsage=serverAuth", "subjectAltName=IP:127.0.0.1"
    )
    make("client", "/CN=client", *leaf, "extendedKeyUsage=clientAuth")
    return place


@dataclass(frozen=True)
class Mirror:
    """A running mirror: where the guest writes, and the job's monitor."""

    uri: str
    monitor: Monitor

    def behind_bytes(self) -> int:
        """Bytes the remote side does not have yet."""
        for job in self.monitor.execute("query-block-jobs"):
            if job["device"] == MIRROR_JOB:
                if job.get("error"):
                    raise MeasurementError(f"the mirror job failed: {job['error']}")
                return int(job["len"]) - int(job["offset"])
        raise MeasurementError("the mirror job ended")

    def ready(self) -> bool:
        jobs = self.monitor.execute("query-block-jobs")
        return any(job["device"] == MIRROR_JOB and job["ready"] for job in jobs)

    def settle(self) -> None:
        """Wait until the remote side has everything."""
        wait_until(lambda: self.behind_bytes() == 0, "the mirror caught up", MIRROR_SECONDS)


@contextmanager
def qsd_mirror(scratch: Scratch, image: Path, remote_image: Path) -> Iterator[Mirror]:
    """Serve ``image`` and mirror it over TLS; yields when the first full pass is done."""
    place = make_certificates(scratch)
    port = free_port()
    credentials = f"tls-creds-x509,id=tls,dir={place},verify-peer=on"
    control = scratch.directory / "qsd.qmp"
    path = scratch.directory / "qsd.sock"
    remote_command = [
        *["qemu-nbd", "-f", "raw", "-t", "-x", "target", "-b", "127.0.0.1", "-p", str(port)],
        *["--object", f"{credentials},endpoint=server", "--tls-creds", "tls", str(remote_image)],
    ]
    source_command = [
        "qemu-storage-daemon",
        *["--object", f"{credentials},endpoint=client"],
        *["--chardev", f"socket,id=control,path={control},server=on,wait=off"],
        *["--monitor", "chardev=control"],
        *["--blockdev", f"file,node-name=file,filename={image}"],
        *["--blockdev", "raw,node-name=disk,file=file"],
        *["--nbd-server", f"addr.type=unix,addr.path={path}"],
        *["--export", "nbd,id=export,node-name=disk,name=disk,writable=on"],
    ]
    with (
        scratch.running("mirror-target", remote_command) as remote,
        scratch.running("mirror-source", source_command, control, path) as source,
    ):
        remote.wait_ready(lambda: _listens(port))
        source.wait_ready(lambda: control.is_socket() and path.is_socket())
        with Monitor(control) as monitor:
            _start_mirror(monitor, port)
            mirror = Mirror(socket_uri(path, "disk"), monitor)
            wait_until(mirror.ready, "the mirror's first pass", MIRROR_SECONDS)
            yield mirror


def _start_mirror(monitor: Monitor, port: int) -> None:
    target = {
        "driver": "nbd",
        "node-name": "target",
        "server": {"type": "inet", "host": "127.0.0.1", "port": str(port)},
        "export": "target",
        "tls-creds": "tls",
    }
    job = {
        "job-id": MIRROR_JOB,
        "device": "disk",
        "target": "target",
        "sync": "full",
        "copy-mode": "background",
    }
    monitor.execute("blockdev-add", **target)
    monitor.execute("blockdev-mirror", **job)


def _listens(port: int) -> bool:
    """Whether the port is in the LISTEN state (asked of the kernel: a probe would be a client)."""
    wanted = f":{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(wanted) and row[3] == "0A" for row in rows)


@contextmanager
def qsd_fuse(scratch: Scratch, image: Path) -> Iterator[Path]:
    """Export ``image`` over FUSE; yields the file to read."""
    point = scratch.directory / "qsd-fuse.img"
    point.touch()
    command = [
        "qemu-storage-daemon",
        *["--blockdev", f"file,node-name=file,filename={image},read-only=on"],
        *["--blockdev", "raw,node-name=disk,file=file,read-only=on"],
        *["--export", f"fuse,id=export,node-name=disk,mountpoint={point},writable=off"],
    ]
    with scratch.running("qsd-fuse", command) as service:
        service.wait_ready(lambda: point.stat().st_size == image.stat().st_size)
        yield point
