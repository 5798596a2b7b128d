/* The captured device.
 *
 * A write goes through these steps, and their order is what keeps the replica true:
 *
 *   1. take the range (overlapping writes one after the other; the range is visible in the ring,
 *      so a killed server leaves word of what was in flight)
 *   2. make its regions hot, durably, if they are cold (hot_map.h)
 *   3. write to the local disk; with FUA, fdatasync
 *   4. append the record: copy the payload, take the stamp, publish
 *   5. release the range; the return is the guest's acknowledgement
 *
 * When 3 fails nothing is appended (no ghost writes), but the range may have been written in part:
 * its regions are marked stale, and so they are when the ring is full in 4. A stale mark and the
 * start of the gap are published inside the same busy section as the stamp would have been, so
 * that the agent never passes a watermark over a record that is missing.
 */
#define _GNU_SOURCE
#include "device.h"
#include "hot_map.h"
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define ZERO_CHUNK (1u << 20)
#define RECORD_BYTES_MAX (4u << 20) /* limits.REQUEST_BYTES_MAX */
#define EXTENT_LOOKS 4              /* at a range that is trimmed and written meanwhile */

struct device {
    int image_fd;
    int is_block;
    uint64_t size, region_bytes, region_count;
    struct ring_header *ring;
    size_t ring_bytes;
    struct ring_inflight *inflight;
    uint8_t *stale;
    struct ring_slot *slots;
    uint8_t *payload;
    uint64_t payload_head;
    pthread_mutex_t range_lock;
    pthread_cond_t range_freed;
    int ranges_used; /* slots at and beyond this index are free */
    pthread_mutex_t append_lock;
    struct hot_map map;
    uint8_t *zeros;
};

static uint64_t monotonic(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static size_t page_up(size_t n) { return (n + RING_PAGE - 1) / RING_PAGE * RING_PAGE; }

static int transfer(int fd, void *data, size_t length, uint64_t offset, int writing)
{
    uint8_t *p = data;
    while (length) {
        ssize_t n = writing ? pwrite(fd, p, length, (off_t)offset)
                            : pread(fd, p, length, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0) {
            if (writing)
                return -EIO;
            memset(p, 0, length); /* past the end of a file shorter than the disk */
            return 0;
        }
        p += n;
        length -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

static int sync_image(struct device *d, uint64_t head)
{
    int slot = hot_map_flush_begins(&d->map);
    int rc = fdatasync(d->image_fd) < 0 ? -errno : 0;
    hot_map_flush_ended(&d->map, slot, head, rc);
    return rc;
}

/* --- ranges ------------------------------------------------------------------------------- */

static int take_range(struct device *d, uint64_t start, uint64_t end)
{
    pthread_mutex_lock(&d->range_lock);
    for (;;) {
        int available = -1, blocked = 0;
        for (int i = 0; i < d->ranges_used; i++) {
            struct ring_inflight *r = &d->inflight[i];
            if (!(r->generation & 1)) {
                if (available < 0)
                    available = i;
            } else if (r->start < end && start < r->end) {
                blocked = 1;
                break;
            }
        }
        if (available < 0 && d->ranges_used < RING_INFLIGHT_SLOTS)
            available = d->ranges_used;
        if (!blocked && available >= 0) {
            struct ring_inflight *r = &d->inflight[available];
            r->start = start;
            r->end = end;
            ring_store(&r->generation, r->generation + 1);
            if (available >= d->ranges_used)
                d->ranges_used = available + 1;
            pthread_mutex_unlock(&d->range_lock);
            return available;
        }
        pthread_cond_wait(&d->range_freed, &d->range_lock);
    }
}

static void release_range(struct device *d, int index)
{
    pthread_mutex_lock(&d->range_lock);
    ring_store(&d->inflight[index].generation, d->inflight[index].generation + 1);
    while (d->ranges_used && !(d->inflight[d->ranges_used - 1].generation & 1))
        d->ranges_used--;
    pthread_cond_broadcast(&d->range_freed);
    pthread_mutex_unlock(&d->range_lock);
}

/* --- the ring ----------------------------------------------------------------------------- */

static uint64_t next_stamp(struct device *d)
{
    uint64_t now = monotonic() + (uint64_t)d->ring->clock_offset;
    return now > d->ring->last_stamp ? now : d->ring->last_stamp + 1;
}

/* Under append_lock: give up the record for this range; its regions must be sent again. */
static void mark_gap(struct device *d, uint64_t start, uint64_t end)
{
    struct ring_header *ring = d->ring;
    ring_begin_busy(&ring->busy);
    ring->last_stamp = next_stamp(d);
    for (uint64_t r = start / d->region_bytes; r <= (end - 1) / d->region_bytes; r++)
        ring_store_byte(&d->stale[r], 1);
    /* the agent may send the region's content before it is on the local disk: it cools only after
     * a flush that began after this write, as if the record had been kept */
    hot_map_touch(&d->map, start, end, ring->head + 1);
    ring->dropped++;
    if (!ring_load(&ring->gap_from))
        ring_swap(&ring->gap_from, 0, ring->last_stamp);
    ring_store(&ring->busy, ring->busy + 1);
}

static void append(struct device *d, int kind, uint64_t offset, uint32_t length, const void *data)
{
    struct ring_header *ring = d->ring;
    uint64_t head, tail, used, need = (kind & ~RECORD_FUA) == RECORD_WRITE ? length : 0;
    pthread_mutex_lock(&d->append_lock);
    head = ring->head;
    tail = ring_load(&ring->tail);
    used = tail == head ? 0 : d->payload_head - d->slots[tail % ring->slot_count].position;
    if (head - tail >= ring->slot_count || used + need > ring->payload_bytes) {
        if (length) /* a flush that is not kept takes nothing from the content */
            mark_gap(d, offset, offset + length);
        pthread_mutex_unlock(&d->append_lock);
        return;
    }
    if (need) {
        uint64_t at = d->payload_head % ring->payload_bytes;
        uint64_t part = ring->payload_bytes - at < need ? ring->payload_bytes - at : need;
        memcpy(d->payload + at, data, part);
        memcpy(d->payload, (const uint8_t *)data + part, need - part);
    }
    ring_begin_busy(&ring->busy);
    struct ring_slot *slot = &d->slots[head % ring->slot_count];
    slot->stamp = next_stamp(d);
    slot->offset = offset;
    slot->position = d->payload_head;
    slot->length = length;
    slot->kind = (uint8_t)kind;
    ring->last_stamp = slot->stamp;
    d->payload_head += need;
    ring->written_bytes += need;
    if (length)
        hot_map_touch(&d->map, offset, offset + length, head + 1);
    ring_store(&ring->head, head + 1);
    ring_store(&ring->busy, ring->busy + 1);
    pthread_mutex_unlock(&d->append_lock);
}

/* A frame holds a record of RECORD_BYTES_MAX; a larger write becomes several, as a power cut could
 * have split it. */
static void append_parts(struct device *d, int kind, uint64_t offset, uint32_t length,
                         const void *data)
{
    while (data && length > RECORD_BYTES_MAX) {
        append(d, kind, offset, RECORD_BYTES_MAX, data);
        data = (const uint8_t *)data + RECORD_BYTES_MAX;
        offset += RECORD_BYTES_MAX;
        length -= RECORD_BYTES_MAX;
    }
    append(d, kind, offset, length, data);
}

/* After a local failure: nothing is appended, but the range may differ now. */
static void give_up(struct device *d, uint64_t offset, uint32_t length)
{
    pthread_mutex_lock(&d->append_lock);
    mark_gap(d, offset, offset + length);
    pthread_mutex_unlock(&d->append_lock);
}

/* --- the local disk ------------------------------------------------------------------------ */

static int write_zeros(struct device *d, uint64_t offset, uint32_t length)
{
    while (length) {
        uint32_t part = length < ZERO_CHUNK ? length : ZERO_CHUNK;
        int rc = transfer(d->image_fd, d->zeros, part, offset, 1);
        if (rc)
            return rc;
        offset += part;
        length -= part;
    }
    return 0;
}

static int allocate(struct device *d, int mode, uint64_t offset, uint32_t length)
{
    int rc;
    do
        rc = fallocate(d->image_fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    while (rc < 0 && errno == EINTR);
    if (rc == 0)
        return 0;
    /* a block device answers EINVAL to what is not aligned to its sectors */
    return errno == EOPNOTSUPP || errno == ENODEV || errno == EINVAL || errno == ENOSYS ? -EOPNOTSUPP
                                                                                         : -errno;
}

static int local_zero(struct device *d, uint64_t offset, uint32_t length, int punch, int fast)
{
    int rc = -EOPNOTSUPP;
    if (punch)
        rc = allocate(d, FALLOC_FL_PUNCH_HOLE, offset, length);
    if (rc == -EOPNOTSUPP)
        rc = allocate(d, FALLOC_FL_ZERO_RANGE, offset, length);
    if (rc == -EOPNOTSUPP && !punch && !fast)
        rc = allocate(d, FALLOC_FL_PUNCH_HOLE, offset, length);
    if (rc == -EOPNOTSUPP && !fast)
        rc = write_zeros(d, offset, length);
    return rc;
}

/* --- the guest's requests ------------------------------------------------------------------ */

int device_read(struct device *d, void *data, uint32_t length, uint64_t offset)
{
    return transfer(d->image_fd, data, length, offset, 0);
}

/* `data` NULL: make the range zeros. A refused fast zero has changed nothing, and leaves nothing
 * behind; with any other failure, whatever its error, the range may be there in part. */
static int change(struct device *d, int kind, const void *data, uint32_t length, uint64_t offset,
                  int punch, int fast, int fua)
{
    int rc, range, is_refusal;
    uint64_t head;
    if (length == 0)
        return 0;
    if (offset > d->size || length > d->size - offset)
        return -ENOSPC;
    range = take_range(d, offset, offset + length);
    rc = hot_map_heat(&d->map, offset, offset + length);
    if (rc == 0) {
        head = ring_load(&d->ring->head);
        rc = data ? transfer(d->image_fd, (void *)data, length, offset, 1)
                  : local_zero(d, offset, length, punch, fast);
        is_refusal = fast && rc == -EOPNOTSUPP;
        if (rc == 0 && fua)
            rc = sync_image(d, head);
        if (rc == 0)
            append_parts(d, kind | (fua ? RECORD_FUA : 0), offset, length, data);
        else if (!is_refusal)
            give_up(d, offset, length);
    }
    release_range(d, range);
    return rc;
}

int device_write(struct device *d, const void *data, uint32_t length, uint64_t offset, int fua)
{
    return change(d, RECORD_WRITE, data, length, offset, 0, 0, fua);
}

int device_zero(struct device *d, uint32_t length, uint64_t offset, int may_trim, int fast, int fua)
{
    return change(d, RECORD_ZERO, NULL, length, offset, may_trim, fast, fua);
}

int device_trim(struct device *d, uint32_t length, uint64_t offset, int fua)
{
    return change(d, RECORD_TRIM, NULL, length, offset, 1, 0, fua);
}

int device_flush(struct device *d)
{
    int rc = sync_image(d, ring_load(&d->ring->head));
    if (rc == 0)
        append(d, RECORD_FLUSH, 0, 0, NULL);
    return rc;
}

int device_extent(struct device *d, uint64_t offset, uint64_t length, uint64_t *extent_length,
                  int *hole)
{
    off_t data, end;
    *hole = 0;
    *extent_length = length;
    if (d->is_block)
        return 0;
    for (int look = 0; look < EXTENT_LOOKS; look++) {
        data = lseek(d->image_fd, (off_t)offset, SEEK_DATA);
        if (data < 0) {
            if (errno != ENXIO)
                return errno == EINVAL ? 0 : -errno;
            *hole = 1;
            return 0;
        }
        if ((uint64_t)data > offset) {
            *hole = 1;
            end = data;
        } else {
            end = lseek(d->image_fd, (off_t)offset, SEEK_HOLE);
            if (end < 0)
                return -errno;
        }
        if ((uint64_t)end > offset) {
            if ((uint64_t)end - offset < length)
                *extent_length = (uint64_t)end - offset;
            return 0;
        }
        /* a trim has come between the two: an extent of no length is an error to the guest */
    }
    return 0; /* data, which may be holes */
}

/* --- opening ------------------------------------------------------------------------------- */

static int map_ring(struct device *d, int ring_fd)
{
    struct stat st;
    struct ring_header *ring;
    uint64_t region_part, inflight_part = RING_INFLIGHT_SLOTS * sizeof(struct ring_inflight);
    if (fstat(ring_fd, &st) < 0)
        return -errno;
    if (st.st_size < RING_HEADER_BYTES)
        return -EINVAL;
    /* populated: the first touch of a fresh page costs up to 30 us in a virtual machine */
    ring = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_fd,
                0);
    if (ring == MAP_FAILED)
        return -errno;
    d->ring = ring;
    d->ring_bytes = (size_t)st.st_size;
    region_part = page_up(ring->region_count);
    if (memcmp(ring->magic, RING_MAGIC, 8) || ring->version != RING_VERSION || !ring->complete ||
        ring->size_bytes != d->size || ring->region_bytes != d->region_bytes ||
        ring->region_count != d->region_count || !ring->slot_count || !ring->payload_bytes ||
        d->ring_bytes < RING_HEADER_BYTES + inflight_part + 2 * region_part +
                            page_up(ring->slot_count * sizeof(struct ring_slot)) +
                            ring->payload_bytes)
        return -EINVAL;
    d->inflight = (struct ring_inflight *)((uint8_t *)ring + RING_HEADER_BYTES);
    d->stale = (uint8_t *)d->inflight + inflight_part;
    d->map.syncing = d->stale + region_part;
    d->slots = (struct ring_slot *)(d->stale + 2 * region_part);
    d->payload = (uint8_t *)d->slots + page_up(ring->slot_count * sizeof(struct ring_slot));
    return 0;
}

/* Counted first: a slot that is even says that its flush has ended. */
static void recover_flushes(struct ring_header *ring)
{
    int i = 0;
    while (i < RING_FLUSH_SLOTS && !(ring->flushing[i] & 1))
        i++;
    if (i == RING_FLUSH_SLOTS)
        return;
    ring_store(&ring->flush_unknown, ring->flush_unknown + 1);
    for (; i < RING_FLUSH_SLOTS; i++)
        ring_store(&ring->flushing[i], ring->flushing[i] + (ring->flushing[i] & 1));
}

/* What a killed server left: ranges in flight become stale, the payload's end follows the slots. */
static void recover_ring(struct device *d)
{
    struct ring_header *ring = d->ring;
    recover_flushes(ring);
    if (ring->busy & 1)
        ring_store(&ring->busy, ring->busy + 1);
    for (int i = 0; i < RING_INFLIGHT_SLOTS; i++) {
        struct ring_inflight *r = &d->inflight[i];
        if (r->generation & 1) {
            if (r->start < r->end && r->end <= d->size)
                mark_gap(d, r->start, r->end);
            ring_store(&r->generation, r->generation + 1);
        }
    }
    if (ring->head) {
        struct ring_slot *last = &d->slots[(ring->head - 1) % ring->slot_count];
        d->payload_head = last->position + ((last->kind & ~RECORD_FUA) == RECORD_WRITE ? last->length : 0);
    }
    ring->writer_pid = (uint64_t)getpid();
}

static int open_map(struct device *d, int map_fd, uint64_t regions_max)
{
    d->map.map_fd = map_fd;
    d->map.region_bytes = d->region_bytes;
    d->map.region_count = d->region_count;
    d->map.regions_max = regions_max;
    d->map.ring = d->ring;
    d->map.inflight = d->inflight;
    d->map.stale = d->stale;
    d->map.range_lock = &d->range_lock;
    d->map.ranges_used = &d->ranges_used;
    return hot_map_open(&d->map, d->image_fd);
}

int device_open(struct device **out, int image_fd, int map_fd, int ring_fd, uint64_t size_bytes,
                uint64_t region_bytes, uint64_t hot_regions_max)
{
    struct stat st;
    int rc;
    struct device *d = calloc(1, sizeof *d);
    if (!d)
        return -ENOMEM;
    d->image_fd = image_fd;
    d->size = size_bytes;
    d->region_bytes = region_bytes;
    d->region_count = (size_bytes + region_bytes - 1) / region_bytes;
    pthread_mutex_init(&d->range_lock, NULL);
    pthread_cond_init(&d->range_freed, NULL);
    pthread_mutex_init(&d->append_lock, NULL);
    d->zeros = calloc(ZERO_CHUNK, 1);
    if (!d->zeros)
        rc = -ENOMEM;
    else if (fstat(image_fd, &st) < 0)
        rc = -errno;
    else {
        d->is_block = S_ISBLK(st.st_mode);
        rc = map_ring(d, ring_fd);
    }
    if (rc == 0)
        rc = open_map(d, map_fd, hot_regions_max);
    if (rc == 0) {
        recover_ring(d);
        rc = hot_map_load(&d->map);
    }
    if (rc) {
        device_close(d);
        return rc;
    }
    *out = d;
    return 0;
}

int device_start(struct device *d) { return hot_map_start(&d->map); }

void device_close(struct device *d)
{
    if (!d)
        return;
    hot_map_close(&d->map);
    if (d->ring)
        munmap(d->ring, d->ring_bytes);
    pthread_mutex_destroy(&d->range_lock);
    pthread_cond_destroy(&d->range_freed);
    pthread_mutex_destroy(&d->append_lock);
    free(d->zeros);
    free(d);
}
