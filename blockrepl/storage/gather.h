/* Filling a buffer from the many places that its bytes are at, without the interpreter.
 *
 * A *want* is a part of the buffer and where it lies: in a base image, or in a block of a frame's
 * payload; they ascend in the buffer. The steps, each for all wants before the next:
 *
 *   1. images, straight into the buffer, across what little lies between: the other steps put
 *      there what belongs there
 *   2. zeros: what nothing is wanted of
 *   3. tables: of the frames that are not known yet (frame_table.h)
 *   4. blocks: one that is compressed is got from those that are kept; one that was never proven is
 *      read whole, checked, decompressed and kept; one that is raw and proven is only noted, for
 *   5. reads: of raw, proven blocks, straight into the buffer. Those that go on where the last one
 *      ends, in file and buffer, are one.
 *
 * Each step first does what the page cache can do at once. Then the device is told of all that it
 * cannot, so that it gets them all at a time, and they are read in the order in which they lie.
 */
#ifndef BLOCKREPL_GATHER_H
#define BLOCKREPL_GATHER_H

#include "frame_table.h"

struct want {
    uint32_t file;    /* index */
    uint32_t frame;   /* ordinal; of no meaning for an image, as block */
    uint32_t block;
    uint64_t offset;  /* in the block's payload, or in the image */
    uint64_t into;
    uint64_t length;
};

/* What is kept between reads, of all who share it. */
struct blocks {
    struct kept tables;   /* by place and frame */
    struct kept payloads; /* of compressed blocks, by place, frame and block */
};

struct gather_failure {
    uint32_t file, frame, block;
    uint64_t offset; /* in the file */
};

/* 0, an errno or what is wrong, which `failure` names the place of. Fills `length` bytes of the
 * target; beyond an image's end they are zeros.
 *
 * Without may_wait: EAGAIN where it would take a device's time, or the proof of more than
 * proofs_max blocks.
 */
int gather_read(
    struct blocks *blocks, const struct segment_file *files, const struct want *wants, size_t count,
    uint8_t *target, uint64_t length, bool may_wait, size_t proofs_max,
    struct gather_failure *failure);

#endif
