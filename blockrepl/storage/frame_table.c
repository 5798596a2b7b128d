#define _GNU_SOURCE
#include "frame_table.h"
#include "digest.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* formats/frame.py and limits.py; a test holds them against these. */
#define HEADER_BYTES 144
#define RECORD_BYTES 21
#define ENTRY_BYTES 12
#define RAW_BIT UINT32_C(0x80000000)
#define FRAME_RECORDS_MAX 16384
#define FRAME_PAYLOAD_BYTES_MAX (8 << 20)
#define FRAME_BODY_BYTES_MAX (10 << 20)

#define FIRST_READ_BYTES 8192 /* header, columns and block table of a frame of 256 records */

int read_up_to(
    int descriptor, uint8_t *target, uint64_t length, uint64_t offset, int flags, uint64_t *done)
{
    *done = 0;
    while (*done < length) {
        struct iovec vector = {target + *done, length - *done};
        ssize_t count = preadv2(descriptor, &vector, 1, (off_t)(offset + *done), flags);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            return errno == EOPNOTSUPP ? EAGAIN : errno;
        }
        if (count == 0) /* some kernels say so of what is merely not in the page cache */
            return flags & RWF_NOWAIT ? EAGAIN : 0;
        *done += (uint64_t)count;
    }
    return 0;
}

int read_range(int descriptor, uint8_t *target, uint64_t length, uint64_t offset, int flags)
{
    uint64_t done;
    int failed = read_up_to(descriptor, target, length, offset, flags, &done);
    return failed || done == length ? failed : ENDS_TOO_SOON;
}

static uint32_t u32_at(const uint8_t *data)
{
    uint32_t value;
    memcpy(&value, data, sizeof value);
    return value;
}

static uint64_t u64_at(const uint8_t *data)
{
    uint64_t value;
    memcpy(&value, data, sizeof value);
    return value;
}

/* What is proven of a header. */
struct header {
    uint32_t records, blocks, body_bytes;
    uint64_t payload_bytes, digest;
};

static bool parse_header(const uint8_t *data, struct header *header)
{
    if (memcmp(data, "BRF1\1\0", 6) != 0 || data[6] < 1 || data[6] > 4)
        return false;
    if (digest64(data, HEADER_BYTES - 8) != u64_at(data + HEADER_BYTES - 8))
        return false;
    *header = (struct header){
        .records = u32_at(data + 68),
        .payload_bytes = u64_at(data + 112),
        .body_bytes = u32_at(data + 120),
        .blocks = u32_at(data + 124),
        .digest = u64_at(data + 128),
    };
    return header->records <= FRAME_RECORDS_MAX
        && header->payload_bytes <= FRAME_PAYLOAD_BYTES_MAX
        && header->body_bytes <= FRAME_BODY_BYTES_MAX
        && header->blocks == (header->payload_bytes + BLOCK_SIZE - 1) >> BLOCK_SHIFT;
}

/* A table of entries that have been proven and add up. */
static struct kept_value *make(
    const struct header *header, const uint8_t *entries, uint64_t blocks_offset, uint64_t key)
{
    uint32_t count = header->blocks;
    size_t bytes = sizeof(struct frame_table) + count * (8 + 4 + 2) + 4;
    struct kept_value *value = kept_new(key, bytes);
    if (value == NULL)
        return NULL;
    struct frame_table *table = table_of(value);
    table->blocks = count;
    table->payload_bytes = (uint32_t)header->payload_bytes;
    table->offset = blocks_offset;
    table->digests = (uint64_t *)(table + 1);
    table->starts = (uint32_t *)(table->digests + count);
    table->raw = (uint8_t *)(table->starts + count + 1);
    table->proven = table->raw + count;
    memcpy(table->digests, entries, 8 * (size_t)count);
    memset(table->proven, 0, count);
    table->starts[0] = 0;
    for (uint32_t block = 0; block < count; block++) {
        uint32_t stored = u32_at(entries + 8 * (size_t)count + 4 * (size_t)block);
        table->raw[block] = (stored & RAW_BIT) != 0;
        table->starts[block + 1] = table->starts[block] + (stored & ~RAW_BIT);
    }
    return value;
}

static uint64_t stored_bytes(const uint8_t *entries, uint32_t count)
{
    uint64_t sum = 0;
    for (uint32_t block = 0; block < count; block++)
        sum += u32_at(entries + 8 * (size_t)count + 4 * (size_t)block) & ~RAW_BIT;
    return sum;
}

int read_frame_table(
    const struct segment_file *file, uint32_t frame, uint64_t key, int flags,
    struct kept_value **value)
{
    uint8_t first[FIRST_READ_BYTES], *rest = NULL;
    struct header header;
    if (frame >= file->frame_count)
        return WRONG_TABLE;
    uint64_t offset = file->frames[frame];
    if (offset > file->end || file->end - offset < HEADER_BYTES)
        return WRONG_TABLE;
    uint64_t wanted = file->end - offset;
    if (wanted > sizeof first)
        wanted = sizeof first;
    int failed = read_range(file->descriptor, first, wanted, offset, flags);
    if (failed == ENDS_TOO_SOON) { /* perhaps only behind the table */
        wanted = HEADER_BYTES;
        failed = read_range(file->descriptor, first, wanted, offset, flags);
    }
    if (failed)
        return failed == ENDS_TOO_SOON ? WRONG_TABLE : failed;
    if (!parse_header(first, &header))
        return WRONG_TABLE;
    uint64_t columns_bytes = (uint64_t)header.records * RECORD_BYTES;
    uint64_t table_bytes = columns_bytes + (uint64_t)header.blocks * ENTRY_BYTES;
    if (header.body_bytes < table_bytes)
        return WRONG_TABLE;
    const uint8_t *body = first + HEADER_BYTES;
    if (HEADER_BYTES + table_bytes > wanted) {
        if ((rest = malloc(table_bytes)) == NULL)
            return ENOMEM;
        failed = read_range(file->descriptor, rest, table_bytes, offset + HEADER_BYTES, flags);
        body = rest;
    }
    if (!failed && digest64(body, table_bytes) != header.digest)
        failed = WRONG_TABLE;
    const uint8_t *entries = body + columns_bytes;
    if (!failed && stored_bytes(entries, header.blocks) != header.body_bytes - table_bytes)
        failed = WRONG_TABLE;
    if (!failed) {
        *value = make(&header, entries, offset + HEADER_BYTES + table_bytes, key);
        failed = *value == NULL ? ENOMEM : 0;
    }
    free(rest);
    return failed == ENDS_TOO_SOON ? WRONG_TABLE : failed;
}
