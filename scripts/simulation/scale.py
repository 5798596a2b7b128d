"""The product's bounds and pauses, made small: a history of seconds meets all of them.

Relations between them stay as they are (a window holds a largest frame, a silent peer pings thrice
before it is dropped). A bound is replaced wherever a module has taken it in. Values that a seed
draws (plan.py) replace these.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

import blockrepl
from blockrepl import limits
from blockrepl.channel import framing
from blockrepl.session import receiver as receiver_machine
from blockrepl.storage import digests
from blockrepl.units import KIB

REGION_BYTES = 16 * KIB
BLOCK_BYTES = 4 * KIB
DATA_REGIONS_MAX = 2

BOUNDS: dict[str, object] = {
    "REGION_BYTES": REGION_BYTES,
    "COMPARE_BLOCK_BYTES": BLOCK_BYTES,
    "COMPARE_BYTES_MAX": 4 * REGION_BYTES,
    "FRAME_PAYLOAD_BYTES_TARGET": 16 * KIB,
    "WATERMARK_SECONDS": 0.15,
    "IDLE_SECONDS": 1.5,
    "MESSAGE_SECONDS": 1.5,
    "SEGMENT_FRAMES_MAX": 65536,
    "WINDOW_FRAMES": 256,
    "SPOOL_FILE_BYTES": 64 * KIB,
    # Of one module each.
    "storage.pieces.DATA_REGIONS_MAX": DATA_REGIONS_MAX,
    "storage.pieces.DATA_BYTES_MAX": DATA_REGIONS_MAX * REGION_BYTES,
    "services.disk_sync.DATA_REGIONS_MAX": DATA_REGIONS_MAX,
    "services.disk_sync.COMPARE_REGIONS_MAX": 4,
    "services.disk_sync.BLOCKS_PER_REGION": REGION_BYTES // BLOCK_BYTES,
    "model.unreadable.REST_SECONDS": 0.3,
    "services.outbox.MEMORY_FRAMES": 256,
    "services.outbox.MEMORY_BYTES": 1024 * KIB,
    "services.outbox.PRESSURE_SECONDS": 0.02,
    "services.outbox.FULL_SECONDS": 0.1,
    "services.outbox.SYNC_SECONDS": 0.2,
    "model.backoff.FIRST_SECONDS": 0.02,
    "model.backoff.LAST_SECONDS": 0.2,
    "services.agent.FENCED_SECONDS": 0.5,
    "services.agent.CONFIGURATION_SECONDS": 0.3,
    "services.agent_session.CONFIGURATION_SECONDS": 0.1,
    "services.agent_session.RETRY_SECONDS": 0.3,
    "services.agent_session.ANSWER_SECONDS": 1.5,
    "services.group_replication.RETIRE_SECONDS": 0.3,
    "services.group_replication.NOTE_SECONDS": 0.25,
    "services.group_replication.RETRY_SECONDS": 0.3,
    "services.group_replication.LOOK_SECONDS": 0.1,
    "services.group_pump.POLL_SECONDS": 0.01,
    "services.group_pump.IDLE_POLL_SECONDS": 0.04,
    "services.group_pump.SPOOL_POLL_SECONDS": 0.04,
    "services.receiver_sessions.GOODBYE_SECONDS": 0.2,
    "storage.digests._ZEROS": bytes(BLOCK_BYTES),
}


def _modules() -> Iterator[tuple[str, object]]:
    for found in pkgutil.walk_packages(blockrepl.__path__, "blockrepl."):
        if found.name.split(".")[1] in {"limits", "formats", "model", "session", "storage"} or (
            found.name.startswith(("blockrepl.services.", "blockrepl.channel."))
        ):
            yield found.name.removeprefix("blockrepl."), importlib.import_module(found.name)


_MODULES = dict(_modules())


def replacements(drawn: Mapping[str, object]) -> Iterator[tuple[object, str, object]]:
    """Place, name and value of all that is scaled. ``drawn``: names as in BOUNDS."""
    values = {**BOUNDS, **drawn}
    for path, value in values.items():
        place, _, name = path.rpartition(".")
        for module in [_MODULES[place]] if place else _MODULES.values():
            if place or name in vars(module):
                yield module, name, value
    digest = digests._digest(bytes(BLOCK_BYTES))
    yield digests, "ZERO_DIGEST", digest
    # Defaults that functions took in when they were made.
    idle = {
        "idle_seconds": values["IDLE_SECONDS"],
        "message_seconds": values["MESSAGE_SECONDS"],
    }
    yield framing.MessageStream.__init__, "__kwdefaults__", idle
    window = {"window_frames": values["WINDOW_FRAMES"], "window_bytes": limits.WINDOW_BYTES}
    yield receiver_machine.ReceiverSession.__init__, "__kwdefaults__", window


assert limits.FRAME_PAYLOAD_BYTES_MAX > 4 * REGION_BYTES
