/* A frame's block table, as reads keep it: where each block is stored, its digest, whether it was
 * proven. The format is that of formats/frame.py, which also has the words for what is wrong: here
 * a table that is not true in every respect is only refused.
 */
#ifndef BLOCKREPL_FRAME_TABLE_H
#define BLOCKREPL_FRAME_TABLE_H

#include "kept.h"

#include <stdbool.h>
#include <stdint.h>

#define BLOCK_SHIFT 16
#define BLOCK_SIZE (1 << BLOCK_SHIFT) /* limits.BLOCK_BYTES */

/* What may be wrong, beside an errno. */
#define ENDS_TOO_SOON (-1)
#define WRONG_DIGEST (-2)
#define WRONG_SIZE (-3)
#define LEADS_OUT (-4)
#define WRONG_TABLE (-5)

struct frame_table {
    uint32_t blocks;
    uint32_t payload_bytes;
    uint64_t offset;   /* of block 0 in the file */
    uint64_t *digests; /* blocks */
    uint32_t *starts;  /* blocks + 1, from offset on */
    uint8_t *raw;      /* blocks */
    uint8_t *proven;   /* blocks; written by any thread, from 0 to 1 only */
};

struct segment_file {
    int descriptor;
    uint32_t place;         /* as in index entries; of no meaning for an image */
    bool is_image;
    const uint64_t *frames; /* the offset of each frame, by ordinal */
    size_t frame_count;
    uint64_t end;           /* of the frames */
};

/* Up to `length` bytes, fewer only at the end of the file: *done. With RWF_NOWAIT: EAGAIN where it
 * would take a device's time, or the system cannot tell.
 */
int read_up_to(
    int descriptor, uint8_t *target, uint64_t length, uint64_t offset, int flags, uint64_t *done);
/* All of them, or ENDS_TOO_SOON. */
int read_range(int descriptor, uint8_t *target, uint64_t length, uint64_t offset, int flags);

/* Read and prove a frame's table; *value is new and holds a struct frame_table. */
int read_frame_table(
    const struct segment_file *file, uint32_t frame, uint64_t key, int flags,
    struct kept_value **value);

static inline struct frame_table *table_of(struct kept_value *value)
{
    return (struct frame_table *)value->data;
}

static inline uint32_t block_payload_bytes(const struct frame_table *table, uint32_t block)
{
    uint32_t left = table->payload_bytes - (block << BLOCK_SHIFT);
    return left < BLOCK_SIZE ? left : BLOCK_SIZE;
}

#endif
