/* The rules are in hot_map.h. Locks, where two are held: `lock`, then the range lock. */
#define _GNU_SOURCE
#include "hot_map.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAP_HEADER_BYTES 4096 /* formats/hot_map.py */
#define STEP_SECONDS 1
#define CHUNK_REGIONS 32768u /* a page of the file; cooled under one hold of the lock */

/* --- the file ------------------------------------------------------------------------------ */

static int write_bits(struct hot_map *m, uint64_t first, uint64_t last)
{
    uint64_t at = first / 8, end = last / 8 + 1;
    while (at < end) {
        ssize_t n = pwrite(m->map_fd, m->bits + at, end - at, (off_t)(MAP_HEADER_BYTES + at));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        at += (uint64_t)n;
    }
    return 0;
}

/* Everything that is hot may have been written just before this process came. */
int hot_map_load(struct hot_map *m)
{
    uint64_t at = 0, bytes = (m->region_count + 7) / 8, head = ring_load(&m->ring->head);
    uint64_t first = 0, last = bytes;
    int rc;
    while (at < bytes) {
        ssize_t n = pread(m->map_fd, m->bits + at, bytes - at, (off_t)(MAP_HEADER_BYTES + at));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        at += (uint64_t)n;
    }
    /* A killed server may have set bits that it did not come to sync, or failed to: those look
       clean, and a sync alone would leave them where they are. */
    while (first < last && !m->bits[first])
        first++;
    while (last > first && !m->bits[last - 1])
        last--;
    if (first < last && (rc = write_bits(m, first * 8, last * 8 - 1)))
        return rc;
    if (fdatasync(m->map_fd) < 0)
        return -errno;
    m->ring->hot_regions = 0;
    for (uint64_t r = 0; r < m->region_count; r++)
        if ((m->bits[r / 8] >> (r % 8)) & 1) {
            m->hot[r] = 1;
            m->last_record[r] = head;
            m->ring->hot_regions++;
        }
    return 0;
}

/* --- heating ------------------------------------------------------------------------------- */

int hot_map_heat(struct hot_map *m, uint64_t start, uint64_t end)
{
    uint64_t first = start / m->region_bytes, last = (end - 1) / m->region_bytes, cold = first;
    int rc;
    while (cold <= last && __atomic_load_n(&m->hot[cold], __ATOMIC_ACQUIRE))
        cold++;
    if (cold > last)
        return 0;
    pthread_mutex_lock(&m->lock);
    for (uint64_t r = cold; r <= last; r++)
        m->bits[r / 8] |= (uint8_t)(1u << (r % 8));
    rc = write_bits(m, cold, last);
    if (rc == 0 && fdatasync(m->map_fd) < 0)
        rc = -errno;
    if (rc == 0)
        for (uint64_t r = cold; r <= last; r++)
            if (!m->hot[r]) {
                __atomic_store_n(&m->hot[r], 1, __ATOMIC_RELEASE);
                m->ring->hot_regions++;
            }
    pthread_mutex_unlock(&m->lock);
    return rc;
}

/* --- flushes ------------------------------------------------------------------------------- */

int hot_map_flush_begins(struct hot_map *m)
{
    for (int i = 0;; i = (i + 1) % RING_FLUSH_SLOTS) { /* there are more than threads: one is free */
        uint64_t *slot = &m->ring->flushing[i], generation = ring_load(slot);
        if (!(generation & 1) && ring_swap(slot, generation, generation + 1))
            return i;
    }
}

void hot_map_flush_ended(struct hot_map *m, int slot, uint64_t head, int rc)
{
    if (rc)
        ring_store(&m->ring->flush_failed, 1);
    else {
        pthread_mutex_lock(&m->state_lock);
        if (m->flushed < head + 1) {
            ring_store(&m->ring->flushed, head);
            ring_store(&m->flushed, head + 1);
        }
        pthread_mutex_unlock(&m->state_lock);
    }
    ring_store(&m->ring->flushing[slot], m->ring->flushing[slot] + 1); /* it has told all there is */
}

/* Whether what a flush says can be relied on. */
static int is_trusted(const struct hot_map *m)
{
    return !ring_load(&m->ring->flush_failed) &&
           ring_load(&m->ring->flush_unknown) == ring_load(&m->ring->flush_known);
}

/* Our own descriptor: an error that this reports is reported to the guest's next flush as well.
 * What is dirty is on its way before the file system's own part of the flush begins, since that
 * part is what a guest's write may have to wait for. */
static void flush_image(struct hot_map *m)
{
    uint64_t head = ring_load(&m->ring->head);
    int slot = hot_map_flush_begins(m);
    int rc = sync_file_range(m->flush_fd, 0, 0,
                             SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                                 SYNC_FILE_RANGE_WAIT_AFTER);
    if (rc < 0 && (errno == ESPIPE || errno == EINVAL || errno == ENOSYS))
        rc = 0; /* not for this kind of file */
    if (fdatasync(m->flush_fd) < 0)
        rc = -1;
    hot_map_flush_ended(m, slot, head, rc);
    m->flushed_step = m->steps;
}

/* --- cooling ------------------------------------------------------------------------------- */

/* Ages are sequences: of regions whose last record is before `limit`. */
struct selection {
    uint64_t durable;          /* limit for all */
    uint64_t idle;             /* these go */
    uint64_t oldest, at_most;  /* so do these, for the bound: before `oldest` all of them, and */
    uint64_t share;            /* from there to `at_most` this many */
};

static uint64_t next_hot(const struct hot_map *m, uint64_t r)
{
    while (r < m->region_count) {
        if (r % 8 == 0 && !__atomic_load_n((const uint64_t *)(const void *)(m->hot + r),
                                           __ATOMIC_RELAXED))
            r += 8;
        else if (__atomic_load_n(&m->hot[r], __ATOMIC_RELAXED))
            return r;
        else
            r++;
    }
    return m->region_count;
}

static uint64_t age(const struct hot_map *m, uint64_t region)
{
    return __atomic_load_n(&m->last_record[region], __ATOMIC_RELAXED);
}

/* Neither stale nor syncing, at one and the same moment, though the agent moves the region from one
 * to the other between our looks: into syncing (seen second), or back to stale (seen third). */
static int is_synced(const struct hot_map *m, uint64_t region)
{
    return !ring_load_byte(&m->stale[region]) && !ring_load_byte(&m->syncing[region]) &&
           !ring_load_byte(&m->stale[region]);
}

static int may_cool(const struct hot_map *m, uint64_t region, const struct selection *s)
{
    return age(m, region) < s->durable && is_synced(m, region);
}

static int in_flight(const struct hot_map *m, uint64_t region)
{
    uint64_t start = region * m->region_bytes, end = start + m->region_bytes;
    for (int i = 0; i < *m->ranges_used; i++)
        if ((m->inflight[i].generation & 1) && m->inflight[i].start < end &&
            start < m->inflight[i].end)
            return 1;
    return 0;
}

/* The oldest of those that may go, as many as there are above the bound. */
static void select_oldest(struct hot_map *m, struct selection *s)
{
    uint64_t hot = ring_load(&m->ring->hot_regions), surplus, low = UINT64_MAX, step, seen = 0, b;
    if (hot <= m->regions_max)
        return;
    surplus = hot - m->regions_max;
    for (uint64_t r = next_hot(m, 0); r < m->region_count; r = next_hot(m, r + 1))
        if (age(m, r) < low && may_cool(m, r, s))
            low = age(m, r);
    if (low >= s->durable)
        return;
    step = (s->durable - low + AGE_BUCKETS - 1) / AGE_BUCKETS;
    memset(m->ages, 0, AGE_BUCKETS * sizeof *m->ages);
    for (uint64_t r = next_hot(m, 0); r < m->region_count; r = next_hot(m, r + 1)) {
        uint64_t last = age(m, r);
        if (last >= low && last < s->durable && is_synced(m, r))
            m->ages[(last - low) / step]++;
    }
    for (b = 0; b < AGE_BUCKETS && seen + m->ages[b] < surplus; b++)
        seen += m->ages[b];
    s->oldest = low + b * step;
    s->at_most = s->oldest + step;
    s->share = surplus - seen;
}

static int is_selected(const struct hot_map *m, uint64_t region, const struct selection *s)
{
    uint64_t last = age(m, region);
    return may_cool(m, region, s) &&
           (last < s->idle || last < s->oldest || (last < s->at_most && s->share));
}

static int wants_flush(const struct hot_map *m, const struct selection *s)
{
    uint64_t since = m->steps - m->flushed_step;
    if (since < FLUSH_SECONDS || (!s->at_most && since < IDLE_FLUSH_SECONDS))
        return 0;
    for (uint64_t r = next_hot(m, 0); r < m->region_count; r = next_hot(m, r + 1))
        if (age(m, r) >= m->flushed && is_selected(m, r, s))
            return 1;
    return 0;
}

/* Whether the region is cold now; under the lock. */
static int cool(struct hot_map *m, uint64_t region, uint64_t flushed, struct selection *s)
{
    int is_cold = 0;
    pthread_mutex_lock(m->range_lock);
    if (!in_flight(m, region) && age(m, region) < flushed && is_selected(m, region, s)) {
        uint64_t last = age(m, region);
        if (last >= s->idle && last >= s->oldest)
            s->share--;
        __atomic_store_n(&m->hot[region], 0, __ATOMIC_RELEASE);
        is_cold = 1;
    }
    pthread_mutex_unlock(m->range_lock);
    return is_cold;
}

static void cool_chunk(struct hot_map *m, uint64_t first, uint64_t after, uint64_t flushed,
                       struct selection *s)
{
    uint64_t low = UINT64_MAX, high = 0;
    pthread_mutex_lock(&m->lock);
    for (uint64_t r = next_hot(m, first); r < after; r = next_hot(m, r + 1)) {
        if (!is_selected(m, r, s) || !cool(m, r, flushed, s))
            continue;
        m->bits[r / 8] &= (uint8_t)~(1u << (r % 8));
        m->ring->hot_regions--;
        low = r < low ? r : low;
        high = r;
    }
    if (low != UINT64_MAX)
        (void)write_bits(m, low, high); /* a bit that stays set costs a resync, never truth */
    pthread_mutex_unlock(&m->lock);
}

void hot_map_step(struct hot_map *m)
{
    struct selection s = {.durable = ring_load(&m->ring->durable) + 1};
    uint64_t *head = &m->heads[m->steps % COOL_SECONDS], flushed;
    if (m->steps++ >= COOL_SECONDS)
        s.idle = *head + 1;
    *head = ring_load(&m->ring->head);
    if (!ring_load(&m->ring->hot_regions))
        return;
    select_oldest(m, &s);
    if (m->flush_fd >= 0 && is_trusted(m) && wants_flush(m, &s))
        flush_image(m);
    flushed = ring_load(&m->flushed);
    if (!is_trusted(m)) /* after `flushed`: one that failed does not count */
        return;
    for (uint64_t r = next_hot(m, 0); r < m->region_count; r = next_hot(m, r)) {
        uint64_t after = (r / CHUNK_REGIONS + 1) * CHUNK_REGIONS;
        cool_chunk(m, r, after < m->region_count ? after : m->region_count, flushed, &s);
        r = after;
    }
}

/* --- the thread ---------------------------------------------------------------------------- */

static void *run(void *argument)
{
    struct hot_map *m = argument;
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    pthread_mutex_lock(&m->state_lock);
    for (;;) {
        next.tv_sec += STEP_SECONDS;
        while (!m->is_stopping &&
               pthread_cond_timedwait(&m->stop_changed, &m->state_lock, &next) != ETIMEDOUT)
            ;
        if (m->is_stopping)
            break;
        pthread_mutex_unlock(&m->state_lock);
        hot_map_step(m);
        clock_gettime(CLOCK_MONOTONIC, &next); /* a step that was late makes the next no sooner */
        pthread_mutex_lock(&m->state_lock);
    }
    pthread_mutex_unlock(&m->state_lock);
    return NULL;
}

int hot_map_start(struct hot_map *m)
{
    sigset_t all, before;
    int rc;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are nbdkit's */
    rc = pthread_create(&m->thread, NULL, run, m);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    m->is_running = rc == 0;
    return -rc;
}

int hot_map_open(struct hot_map *m, int image_fd)
{
    char path[64];
    pthread_condattr_t monotonic;
    pthread_mutex_init(&m->lock, NULL);
    pthread_mutex_init(&m->state_lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&m->stop_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    /* a step that cannot flush waits for the guest to do it */
    snprintf(path, sizeof path, "/proc/self/fd/%d", image_fd);
    m->flush_fd = open(path, O_RDONLY | O_CLOEXEC);
    m->hot = calloc((m->region_count + 7) / 8, 8);
    m->bits = calloc((m->region_count + 7) / 8, 1);
    m->last_record = calloc(m->region_count, sizeof *m->last_record);
    m->ages = calloc(AGE_BUCKETS, sizeof *m->ages);
    m->is_open = 1;
    return m->hot && m->bits && m->last_record && m->ages ? 0 : -ENOMEM;
}

void hot_map_close(struct hot_map *m)
{
    if (!m->is_open)
        return;
    if (m->is_running) {
        pthread_mutex_lock(&m->state_lock);
        m->is_stopping = 1;
        pthread_cond_signal(&m->stop_changed);
        pthread_mutex_unlock(&m->state_lock);
        pthread_join(m->thread, NULL);
    }
    if (m->flush_fd >= 0)
        close(m->flush_fd);
    pthread_mutex_destroy(&m->lock);
    pthread_mutex_destroy(&m->state_lock);
    pthread_cond_destroy(&m->stop_changed);
    free(m->hot);
    free(m->bits);
    free(m->last_record);
    free(m->ages);
}
