/* The ring: shared memory between capture (inside the NBD server) and the agent.
 *
 * One file in /dev/shm per disk; formats/ring.py holds the same tables for Python, and a test
 * holds the two together. Parts, in this order, each page-aligned:
 *
 *   header      4096 bytes, struct ring_header
 *   in flight   RING_INFLIGHT_SLOTS * 32 bytes: ranges being written at this moment. They are the
 *               range lock, and after a killed server they say which regions may differ.
 *   stale       one byte per region: 1 = its content must be sent again (nothing in the ring
 *               covers what changed there)
 *   syncing     one byte per region: 1 = the agent has sent its content, not yet acknowledged
 *   slots       slot_count * 32 bytes: the records, oldest at tail, newest at head - 1
 *   payload     payload_bytes bytes: the data of the write records, in order, wrapping
 *
 * The writer is one process at a time (it holds a lock on the image and on this file), the reader is the agent.
 * `head` is stored last (release), so a killed writer leaves no half record. The reader stores
 * `tail` once the agent needs records no more (they are durable at the receiver, or in the spool):
 * their room may be used again. It stores `durable` once the receiver has them for good: only then
 * may their regions cool. So tail >= durable while a spool holds the difference. The payload in use
 * follows from the slots: there is no second pair of counters to fall out of step.
 *
 * A flush of the image is seen in `flushing` from before it begins until after a failure of it is
 * in flush_failed. For the kernel tells of an error once to each open file, and to one that is
 * opened later not at all: a server that is killed inside a flush may take the error with it. Who
 * finds its ring (the next server, or the agent) counts it in flush_unknown, then makes the slots
 * even. The agent holds the image open for long, and asks again (storage/flush_watch.py): it stores
 * in flush_known how many it has an answer for. Nothing cools, and no ring is given back, while the
 * two differ.
 */
#ifndef BLOCKREPL_RING_H
#define BLOCKREPL_RING_H

#include <stdint.h>

#define RING_MAGIC "BRRING01"
#define RING_VERSION 2
#define RING_HEADER_BYTES 4096
#define RING_INFLIGHT_SLOTS 128
#define RING_FLUSH_SLOTS 160 /* more than a server has threads, which nbdkit has per client */
#define RING_PAGE 4096

enum record_kind { RECORD_WRITE = 0, RECORD_ZERO = 1, RECORD_TRIM = 2, RECORD_FLUSH = 3 };
#define RECORD_FUA 0x80

struct ring_header {
    char magic[8];            /*   0 */
    uint32_t version;         /*   8 */
    uint32_t complete;        /*  12: 1 once the file is fully set up */
    uint64_t ring_id;         /*  16: random, never 0, below 2^63 */
    uint8_t disk_id[16];      /*  24 */
    uint64_t size_bytes;      /*  40: of the disk */
    uint64_t region_bytes;    /*  48 */
    uint64_t region_count;    /*  56 */
    uint64_t slot_count;      /*  64 */
    uint64_t payload_bytes;   /*  72 */
    int64_t clock_offset;     /*  80: stamp = CLOCK_MONOTONIC + this, ns */
    uint8_t pad0[40];
    /* written by capture */
    uint64_t head;            /* 128: sequence of the next record */
    uint64_t busy;            /* 136: odd from just before a stamp is taken until it is published */
    uint64_t last_stamp;      /* 144 */
    uint64_t gap_from;        /* 152: first stamp that was not kept; 0 = no gap to report. Cleared
                                      by the agent (compare and swap) once it is reported durably */
    uint64_t dropped;         /* 160: records not kept since the ring was made */
    uint64_t written_bytes;   /* 168 */
    uint64_t hot_regions;     /* 176 */
    uint64_t writer_pid;      /* 184 */
    uint64_t flushed;         /* 192: all records before this sequence are in the local disk */
    uint64_t flush_failed;    /* 200: 1 once the local disk has failed to flush: what is on it is not
                                      known, and nothing cools as long as this ring is there */
    uint64_t flush_unknown;   /* 208: servers that were killed inside a flush */
    uint8_t pad1[40];
    /* written by the agent */
    uint64_t tail;            /* 256: records before this may be overwritten */
    uint64_t durable;         /* 264: records before this are durable at the receiver, or their
                                      regions are stale */
    uint64_t next_number;     /* 272: the group's frames before this are durable at the receiver,
                                      for an agent that was killed; 0: not known */
    uint64_t flush_known;     /* 280: of flush_unknown, those whose flush took no error with it */
    uint8_t pad2[224];
    /* written by capture */
    uint64_t flushing[RING_FLUSH_SLOTS]; /* 512: generations, odd while a flush is under way */
    uint8_t pad3[RING_HEADER_BYTES - 512 - 8 * RING_FLUSH_SLOTS];
};

struct ring_inflight {
    uint64_t start;           /*  0 */
    uint64_t end;             /*  8 */
    uint64_t generation;      /* 16: odd while in use */
    uint64_t pad;
};

struct ring_slot {
    uint64_t stamp;           /*  0: ns UTC */
    uint64_t offset;          /*  8 */
    uint64_t position;        /* 16: payload bytes appended before this record, ever */
    uint32_t length;          /* 24 */
    uint8_t kind;             /* 28: record_kind | RECORD_FUA */
    uint8_t pad[3];
};

_Static_assert(sizeof(struct ring_header) == RING_HEADER_BYTES, "ring header");
_Static_assert(sizeof(struct ring_inflight) == 32, "in-flight slot");
_Static_assert(sizeof(struct ring_slot) == 32, "record slot");

static inline uint64_t ring_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void ring_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline int ring_swap(uint64_t *p, uint64_t expected, uint64_t desired)
{
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}
static inline uint8_t ring_load_byte(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void ring_store_byte(uint8_t *p, uint8_t v)
{
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);
}

/* What was read before is not read after what follows. */
static inline void ring_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* `busy` goes odd, visibly to all, before the clock is read. Elsewhere than on x86, where the store
 * above is a full barrier, the clock may be read before an earlier store is seen. */
static inline void ring_begin_busy(uint64_t *busy)
{
    ring_store(busy, *busy + 1);
#if defined(__aarch64__)
    __asm__ __volatile__("dsb ish" ::: "memory"); /* a counter is no memory: dmb does not do */
#elif !defined(__x86_64__)
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

#endif
