/* The hot map: which regions of the disk may differ from the replica.
 *
 * A region is made hot, durably, before it is written to (`hot_map_heat`: one atomic load where it
 * is hot already). It goes cold when all of this is true at one moment:
 *
 *   1. its last record is durable at the receiver
 *   2. a local flush has ended that began after that record was appended
 *   3. it is neither stale nor being synced
 *   4. no write is in flight on it (looked at under the range lock: a write takes its range before
 *      it looks whether its region is hot)
 *   5. it has not been written for COOL_SECONDS, so that a busy region does not pay an fdatasync
 *      over and over; or more than `regions_max` are hot, and it is among the oldest of those that
 *      1 and 3 allow to go
 *
 * A thread of its own looks once a second (`hot_map_step`). Where only 2 is missing, as with a guest
 * that never flushes, it flushes the image itself: for the bound at most once in FLUSH_SECONDS, for
 * what is merely idle once in IDLE_FLUSH_SECONDS, since a guest that comes back to a cold disk pays
 * for each region again. The guest never waits for the thread, and that never waits for anybody:
 * while the receiver is away nothing is durable there, and the map grows beyond its bound, to all
 * that is written.
 *
 * What the bound costs: random writes over more than it holds find cold regions, and each pays an
 * fdatasync of the map. What it buys: after a power cut no more than that is compared.
 *
 * After a failed flush nothing cools any more, not by a later flush nor by another server, as long
 * as the ring is there: what is on the disk is not known, for the kernel tells of an error once, and
 * shows what it could not write until the machine is restarted. Nor does anything cool while it is
 * not known whether a flush has failed, whose server was killed meanwhile (ring.h).
 */
#ifndef BLOCKREPL_HOT_MAP_H
#define BLOCKREPL_HOT_MAP_H

#include "ring.h"

#include <pthread.h>
#include <stdint.h>

#define COOL_SECONDS 10
#define FLUSH_SECONDS 5
#define IDLE_FLUSH_SECONDS 300
#define AGE_BUCKETS 4096 /* the oldest are told from the others to this fraction of their ages */

struct hot_map {
    int map_fd, flush_fd;
    uint64_t region_bytes, region_count, regions_max;
    struct ring_header *ring;
    const struct ring_inflight *inflight;
    const uint8_t *stale, *syncing;
    pthread_mutex_t *range_lock;
    const int *ranges_used;
    pthread_mutex_t lock;
    uint8_t *hot;          /* a byte per region: 1 = hot and durably so */
    uint8_t *bits;         /* the file's bits, as last written */
    uint64_t *last_record; /* per hot region: sequence after its last record */
    uint64_t flushed;      /* one more than the records that a local flush followed; 0: no flush */
    uint64_t heads[COOL_SECONDS]; /* of the ring, one a step: what was appended since is not idle */
    uint64_t steps, flushed_step;
    uint64_t *ages; /* AGE_BUCKETS */
    pthread_t thread;
    pthread_mutex_t state_lock;
    pthread_cond_t stop_changed;
    int is_open, is_running, is_stopping;
};

/* All functions that return an int return 0 or a negative errno. The caller has filled in the
 * fields from map_fd to ranges_used, but for flush_fd. */
int hot_map_open(struct hot_map *map, int image_fd);
int hot_map_load(struct hot_map *map); /* the file, once the ring is recovered */
void hot_map_close(struct hot_map *map);
int hot_map_start(struct hot_map *map); /* the thread */

/* The regions of [start, end) are hot, durably. */
int hot_map_heat(struct hot_map *map, uint64_t start, uint64_t end);

/* Under the append lock: the records before `sequence` include the last of [start, end). */
static inline void hot_map_touch(struct hot_map *map, uint64_t start, uint64_t end,
                                 uint64_t sequence)
{
    for (uint64_t r = start / map->region_bytes; r <= (end - 1) / map->region_bytes; r++)
        __atomic_store_n(&map->last_record[r], sequence, __ATOMIC_RELAXED);
}

/* A flush of the image begins: its slot. */
int hot_map_flush_begins(struct hot_map *map);

/* It has ended, `rc`; all records before `head` had been appended when it began. */
void hot_map_flush_ended(struct hot_map *map, int slot, uint64_t head, int rc);

/* Cool what may go cold; once a second. */
void hot_map_step(struct hot_map *map);

#endif
