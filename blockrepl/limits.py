"""Every bound of the product, with unit and reason. Relations between them hold at import."""

from __future__ import annotations

from blockrepl.units import GIB, KIB, MIB

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"  # every name; safe as a part of a path

SECTOR_BYTES = 512  # a disk's size is a multiple of it
REGION_BYTES = 1 * MIB  # grain of the hot map and of resync
HOT_REGIONS_MAX = 16384  # per disk: 16 GiB to compare after a power cut, half a minute of reading
DISK_BYTES_MAX = 64 * 1024 * 1024 * MIB  # 64 TiB: its region maps in shared memory take 128 MiB
DISK_GROWTHS_MAX = 1000  # of one disk: every look at a point goes through them

RING_BYTES_DEFAULT = 64 * MIB
RING_BYTES_MIN = 16 * MIB  # must hold the largest request beside others
RING_BYTES_MAX = 16 * 1024 * MIB
REQUEST_BYTES_MAX = 4 * MIB  # largest NBD write we advertise

BLOCK_BYTES = 64 * KIB  # payload compressed as one unit: the cost of a random 4 KiB read
FRAME_PAYLOAD_BYTES_MAX = 8 * MIB  # a frame holds at least one largest request
FRAME_PAYLOAD_BYTES_TARGET = 2 * MIB  # amortises a frame: 1 MiB takes a fifth more of a core
FRAME_RECORDS_MAX = 16384  # columns of a frame stay under 400 KiB
FRAME_BODY_BYTES_MAX = 10 * MIB  # payload, columns and block table together
MARK_BYTES_MAX = 64 * KIB

MESSAGE_BYTES_MAX = 11 * MIB  # one frame and its envelope
CONTROL_MESSAGE_BYTES_MAX = 1 * MIB  # JSON messages
DISKS_PER_SOURCE_MAX = 1024
GROUPS_PER_SOURCE_MAX = 256  # each has files and a task at the receiver, for ever
GROUPS_PER_SESSION_MAX = 512  # names asked for, also those that were refused

COMPARE_BLOCK_BYTES = 64 * KIB  # digested as one: the least that a difference costs to send
COMPARE_BYTES_MAX = 16 * MIB  # of a disk in one comparison: its digests take 4 KiB
COMPARISONS_MAX = 4  # at work in the receiver per session; more wait for their turn
COMPARISONS_WAITING_MAX = 256  # those included: then the session's reader waits
REQUESTS_MAX = 16  # being answered per session: then its reader waits

WINDOW_FRAMES = 256  # frames sent and not yet acknowledged, per group
WINDOW_BYTES = 32 * MIB
BANDWIDTH_BYTES_MIN = 16 * KIB  # per second, of a limit: a frame in 10 minutes at the most

RECEIVER_PORT = 7420  # where a receiver listens unless told otherwise

HANDSHAKE_SECONDS = 10.0  # TLS and hello; a silent peer is dropped after it
MESSAGE_PIECE_BYTES = 2 * MIB  # a usual frame; a larger message is as many pieces as it takes
MESSAGE_SECONDS = 60.0  # from the first byte of a piece to its last: 35 KB/s
IDLE_SECONDS = 30.0  # no byte at all from a peer that should say something every third of it
SESSION_BYTES_MAX = 256 * GIB  # AES-GCM wants a new key before 2^24.5 full records (390 GB)
CLOCK_AHEAD_SECONDS = 60.0  # stamps so far ahead of the receiver's clock are told
SESSIONS_MAX = 256  # connections past their handshake
RECEIVE_BYTES_MAX = 96 * MIB  # frames of all sessions that wait for a commit
HANDSHAKES_MAX = 64  # connections not yet past it
CLIENT_HELLO_BYTES_MAX = 16 * KIB  # first flight of a client; real ones stay under 2 KiB
HANDSHAKE_BYTES_MAX = 64 * KIB  # all that either side sends before the channel is up
CLOSE_SECONDS = 2.0  # to hand a close_notify to a peer that may not be reading
ENROLMENT_MESSAGE_BYTES_MAX = 64 * KIB  # a certificate, a request or a refusal, as JSON
TOKEN_CHARACTERS_MAX = 4096  # an invitation token; real ones stay under 400

SPOOL_BYTES_DEFAULT = 10 * GIB  # an outage of 10 minutes at 17 MB/s
SPOOL_FREE_SHARE = 0.2  # of the free space, where that is less than the default
SPOOL_RESERVE_BYTES_DEFAULT = 1 * GIB  # left free for everybody else on the spool's file system
SPOOL_FILE_BYTES = 64 * MIB  # given back one at a time

FORK_BLOCK_BYTES = 4 * KIB  # copied as one when a part of it is written: what guests write in
FORK_ROOM_STEP_BYTES = 16 * MIB  # taken between two looks at the file system's free room
FORK_RESERVE_BYTES = 1 * GIB  # forks leave so much free: the journal comes first
FORK_RESERVE_SHARE = 0.05  # of the file system, where that is less
FORK_SWEEP_SECONDS = 60.0  # between two looks for forks that have expired
FORKS_MAX = 1000  # of a group

READ_CACHE_BYTES_DEFAULT = 176 * MIB  # a view's process stays under 300 MB
READ_CACHE_BYTES_MIN = 8 * MIB  # one resolved range, and a block of each of a megabyte's records

WATERMARK_SECONDS = 1.0  # an idle group's watermark moves at least this often
COMMIT_SECONDS = 0.003  # frames that arrive within it share one fdatasync

SEGMENT_BYTES_TARGET = 256 * MIB  # sealed beyond it
SEGMENT_FRAMES_MAX = 16384  # a view that is opened scans the open segment's: 15 us each
SEGMENT_RECORDS_TARGET = 1_000_000  # sealed beyond it: sorting them takes about 150 MB

assert FRAME_PAYLOAD_BYTES_MAX >= REQUEST_BYTES_MAX
assert FRAME_BODY_BYTES_MAX >= FRAME_PAYLOAD_BYTES_MAX + FRAME_RECORDS_MAX * 24
assert MESSAGE_BYTES_MAX > FRAME_BODY_BYTES_MAX
assert RING_BYTES_MIN >= 2 * REQUEST_BYTES_MAX
assert WINDOW_BYTES >= FRAME_BODY_BYTES_MAX
assert FRAME_PAYLOAD_BYTES_MAX % BLOCK_BYTES == 0
assert REGION_BYTES % COMPARE_BLOCK_BYTES == 0
assert GROUPS_PER_SESSION_MAX >= GROUPS_PER_SOURCE_MAX
assert COMPARE_BYTES_MAX % REGION_BYTES == 0
