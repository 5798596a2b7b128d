#define _GNU_SOURCE
#include "gather.h"
#include "digest.h"

#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* Read for nothing rather than in two calls. */
#define BRIDGE_BYTES (16 << 10)

/* One thing that is to be read, of all the wants that it is for. */
struct item {
    uint32_t file;
    uint32_t count;   /* of wants, in the order of `sorted` from `first` on; not in steps 1 and 5 */
    size_t first;
    uint64_t offset;  /* in the file */
    uint64_t length;
    uint64_t into;    /* steps 1 and 5 only */
};

struct work {
    struct blocks *blocks;
    const struct segment_file *files;
    const struct want *wants;
    size_t count;
    uint8_t *target;
    bool may_wait;
    struct gather_failure *failure;
    struct kept_value **tables; /* per want, held */
    bool *done;                 /* per want */
    size_t *sorted;             /* wants */
    struct item *items;
    size_t item_count;
    uint8_t *scratch;
};

typedef int do_item(struct work *work, const struct item *item, int flags);

static int by_place(const void *left, const void *right)
{
    const struct item *a = left, *b = right;
    if (a->file != b->file)
        return a->file < b->file ? -1 : 1;
    return a->offset < b->offset ? -1 : a->offset > b->offset;
}

static int compare_wants(const void *left, const void *right, void *context)
{
    const struct want *wants = context;
    const struct want *a = &wants[*(const size_t *)left], *b = &wants[*(const size_t *)right];
    if (a->file != b->file)
        return a->file < b->file ? -1 : 1;
    if (a->frame != b->frame)
        return a->frame < b->frame ? -1 : 1;
    if (a->block != b->block)
        return a->block < b->block ? -1 : 1;
    return a->into < b->into ? -1 : a->into > b->into;
}

static uint64_t table_key(const struct work *work, const struct want *want)
{
    return (uint64_t)work->files[want->file].place << 32 | want->frame;
}

/* Frames of a segment take 17 bits, blocks of a frame 8. */
static uint64_t block_key(const struct work *work, const struct want *want)
{
    return (uint64_t)work->files[want->file].place << 25 | (uint64_t)want->frame << 8 | want->block;
}

static int failed_at(struct work *work, const struct item *item, const struct want *want, int why)
{
    *work->failure = (struct gather_failure){.file = item->file, .offset = item->offset};
    if (want != NULL) {
        work->failure->frame = want->frame;
        work->failure->block = want->block;
    }
    return why;
}

/* Do all items: first those that need no device, then the others, all of which it knows of. */
static int do_all(struct work *work, do_item *one)
{
    size_t late = 0;
    for (size_t index = 0; index < work->item_count; index++) {
        int failed = one(work, &work->items[index], RWF_NOWAIT);
        if (failed && (failed != EAGAIN || !work->may_wait))
            return failed;
        if (failed)
            work->items[late++] = work->items[index];
    }
    if (late > 1) {
        qsort(work->items, late, sizeof *work->items, by_place);
        for (size_t index = 0; index < late; index++) {
            const struct item *item = &work->items[index];
            posix_fadvise(
                work->files[item->file].descriptor, (off_t)item->offset, (off_t)item->length,
                POSIX_FADV_WILLNEED);
        }
    }
    for (size_t index = 0; index < late; index++) {
        int failed = one(work, &work->items[index], 0);
        if (failed)
            return failed;
    }
    return 0;
}

/* Items of the sorted wants [0, count): one for each run of them that is the same in all that
 * matters. */
static void make_items(struct work *work, size_t count, bool by_block)
{
    work->item_count = 0;
    for (size_t index = 0; index < count; index++) {
        const struct want *want = &work->wants[work->sorted[index]];
        if (work->item_count > 0) {
            struct item *last = &work->items[work->item_count - 1];
            const struct want *before = &work->wants[work->sorted[last->first]];
            if (before->file == want->file && before->frame == want->frame
                && (!by_block || before->block == want->block)) {
                last->count++;
                continue;
            }
        }
        work->items[work->item_count++] =
            (struct item){.file = want->file, .count = 1, .first = index};
    }
}

/* Step 1 */

static int do_image(struct work *work, const struct item *item, int flags)
{
    uint64_t done;
    uint8_t *target = work->target + item->into;
    int failed = read_up_to(
        work->files[item->file].descriptor, target, item->length, item->offset, flags, &done);
    if (failed)
        return failed_at(work, item, NULL, failed);
    memset(target + done, 0, item->length - done);
    return 0;
}

/* The item that a read goes on with, `gap_bytes_max` further on at most; NULL for a new one. */
static struct item *continued(
    struct work *work, uint32_t file, uint64_t offset, uint64_t into, uint64_t gap_bytes_max)
{
    if (work->item_count == 0)
        return NULL;
    struct item *last = &work->items[work->item_count - 1];
    uint64_t gap = into - (last->into + last->length);
    bool goes_on = last->file == file && gap <= gap_bytes_max
        && offset == last->offset + last->length + gap;
    return goes_on ? last : NULL;
}

static void add_read(
    struct work *work, const struct want *want, uint64_t offset, uint64_t gap_bytes_max)
{
    struct item *last = continued(work, want->file, offset, want->into, gap_bytes_max);
    if (last != NULL)
        last->length = want->into + want->length - last->into;
    else
        work->items[work->item_count++] = (struct item){
            .file = want->file, .offset = offset, .length = want->length, .into = want->into};
}

static int read_images(struct work *work, uint64_t bridge_bytes)
{
    work->item_count = 0;
    for (size_t index = 0; index < work->count; index++) {
        const struct want *want = &work->wants[index];
        if (work->files[want->file].is_image)
            add_read(work, want, want->offset, bridge_bytes);
    }
    return do_all(work, do_image);
}

/* Step 2 */

static void fill_zeros(struct work *work, uint64_t length)
{
    uint64_t filled = 0;
    for (size_t index = 0; index < work->count; index++) {
        const struct want *want = &work->wants[index];
        memset(work->target + filled, 0, want->into - filled);
        filled = want->into + want->length;
    }
    memset(work->target + filled, 0, length - filled);
}

/* Step 3 */

static int do_table(struct work *work, const struct item *item, int flags)
{
    const struct want *want = &work->wants[work->sorted[item->first]];
    struct kept_value *value;
    int failed = read_frame_table(
        &work->files[item->file], want->frame, table_key(work, want), flags, &value);
    if (failed)
        return failed_at(work, item, want, failed);
    kept_put(&work->blocks->tables, value);
    for (size_t index = 0; index < item->count; index++) {
        if (index > 0)
            kept_hold(&work->blocks->tables, value);
        work->tables[work->sorted[item->first + index]] = value;
    }
    return 0;
}

static int find_tables(struct work *work)
{
    size_t lacking = 0;
    for (size_t index = 0; index < work->count; index++) {
        const struct want *want = &work->wants[index];
        if (work->files[want->file].is_image)
            continue;
        work->tables[index] = kept_get(&work->blocks->tables, table_key(work, want));
        if (work->tables[index] == NULL)
            work->sorted[lacking++] = index;
    }
    if (lacking > 1)
        qsort_r(work->sorted, lacking, sizeof *work->sorted, compare_wants, (void *)work->wants);
    make_items(work, lacking, false);
    for (size_t index = 0; index < work->item_count; index++) {
        struct item *item = &work->items[index];
        const struct segment_file *file = &work->files[item->file];
        uint32_t frame = work->wants[work->sorted[item->first]].frame;
        item->offset = frame < file->frame_count ? file->frames[frame] : 0;
        item->length = 8192;
    }
    return do_all(work, do_table);
}

/* Step 4 */

static void copy(struct work *work, const struct item *item, const uint8_t *payload)
{
    for (size_t index = 0; index < item->count; index++) {
        const struct want *want = &work->wants[work->sorted[item->first + index]];
        memcpy(work->target + want->into, payload + want->offset, want->length);
    }
}

static int do_block(struct work *work, const struct item *item, int flags)
{
    const struct want *want = &work->wants[work->sorted[item->first]];
    struct frame_table *table = table_of(work->tables[work->sorted[item->first]]);
    uint32_t block = want->block, payload_bytes = block_payload_bytes(table, block);
    if (item->length > BLOCK_SIZE || (table->raw[block] && item->length != payload_bytes))
        return failed_at(work, item, want, WRONG_SIZE);
    bool is_whole = table->raw[block] && item->count == 1 && want->length == payload_bytes;
    uint8_t *stored = is_whole ? work->target + want->into : work->scratch;
    int failed = read_range(
        work->files[item->file].descriptor, stored, item->length, item->offset, flags);
    if (failed)
        return failed_at(work, item, want, failed);
    if (digest64(stored, item->length) != table->digests[block])
        return failed_at(work, item, want, WRONG_DIGEST);
    if (table->raw[block]) {
        __atomic_store_n(&table->proven[block], 1, __ATOMIC_RELAXED);
        if (!is_whole)
            copy(work, item, stored);
        return 0;
    }
    struct kept_value *value = kept_new(block_key(work, want), payload_bytes);
    if (value == NULL)
        return failed_at(work, item, want, ENOMEM);
    int size = LZ4_decompress_safe(
        (const char *)stored, (char *)value->data, (int)item->length, (int)payload_bytes);
    if (size < 0 || (uint32_t)size != payload_bytes) {
        free(value);
        return failed_at(work, item, want, WRONG_SIZE);
    }
    copy(work, item, value->data);
    kept_put(&work->blocks->payloads, value);
    kept_let_go(&work->blocks->payloads, value);
    return 0;
}

static int prove_blocks(struct work *work, size_t proofs_max)
{
    size_t lacking = 0;
    for (size_t index = 0; index < work->count; index++) {
        const struct want *want = &work->wants[index];
        if (work->files[want->file].is_image)
            continue;
        const struct frame_table *table = table_of(work->tables[index]);
        if (want->block >= table->blocks
            || want->offset + want->length > block_payload_bytes(table, want->block)) {
            struct item item = {.file = want->file, .offset = table->offset};
            return failed_at(work, &item, want, LEADS_OUT);
        }
        if (__atomic_load_n(&table->proven[want->block], __ATOMIC_RELAXED))
            continue;
        work->done[index] = true;
        if (!table->raw[want->block]) {
            struct kept_value *value = kept_get(&work->blocks->payloads, block_key(work, want));
            if (value != NULL) {
                memcpy(work->target + want->into, value->data + want->offset, want->length);
                kept_let_go(&work->blocks->payloads, value);
                continue;
            }
        }
        work->sorted[lacking++] = index;
    }
    if (lacking > 1)
        qsort_r(work->sorted, lacking, sizeof *work->sorted, compare_wants, (void *)work->wants);
    make_items(work, lacking, true);
    if (!work->may_wait && work->item_count > proofs_max)
        return EAGAIN;
    for (size_t index = 0; index < work->item_count; index++) {
        struct item *item = &work->items[index];
        size_t first = work->sorted[item->first];
        const struct frame_table *table = table_of(work->tables[first]);
        uint32_t block = work->wants[first].block;
        item->offset = table->offset + table->starts[block];
        item->length = table->starts[block + 1] - table->starts[block];
    }
    return do_all(work, do_block);
}

/* Step 5 */

static int do_read(struct work *work, const struct item *item, int flags)
{
    int failed = read_range(
        work->files[item->file].descriptor, work->target + item->into, item->length, item->offset,
        flags);
    return failed ? failed_at(work, item, NULL, failed) : 0;
}

static int read_rest(struct work *work)
{
    work->item_count = 0;
    for (size_t index = 0; index < work->count; index++) {
        const struct want *want = &work->wants[index];
        if (work->done[index] || work->files[want->file].is_image)
            continue;
        const struct frame_table *table = table_of(work->tables[index]);
        add_read(work, want, table->offset + table->starts[want->block] + want->offset, 0);
    }
    return do_all(work, do_read);
}

int gather_read(
    struct blocks *blocks, const struct segment_file *files, const struct want *wants, size_t count,
    uint8_t *target, uint64_t length, bool may_wait, size_t proofs_max,
    struct gather_failure *failure)
{
    struct work work = {
        .blocks = blocks,
        .files = files,
        .wants = wants,
        .count = count,
        .target = target,
        .may_wait = may_wait,
        .failure = failure,
    };
    *failure = (struct gather_failure){0};
    if (count == 0) {
        memset(target, 0, length);
        return 0;
    }
    size_t each = sizeof *work.tables + sizeof *work.items + sizeof *work.sorted + sizeof *work.done;
    uint8_t *memory = calloc(count, each);
    work.scratch = malloc(BLOCK_SIZE);
    int failed = ENOMEM;
    if (memory != NULL && work.scratch != NULL) {
        work.tables = (struct kept_value **)memory;
        work.items = (struct item *)(work.tables + count);
        work.sorted = (size_t *)(work.items + count);
        work.done = (bool *)(work.sorted + count);
        failed = read_images(&work, BRIDGE_BYTES);
        if (failed && failed != EAGAIN) /* perhaps only what lies between cannot be read */
            failed = read_images(&work, 0);
        if (!failed) {
            fill_zeros(&work, length);
            failed = find_tables(&work);
        }
        if (!failed)
            failed = prove_blocks(&work, proofs_max);
        if (!failed)
            failed = read_rest(&work);
        for (size_t index = 0; index < count; index++)
            if (work.tables[index] != NULL)
                kept_let_go(&blocks->tables, work.tables[index]);
    }
    free(work.scratch);
    free(memory);
    return failed;
}
