/* What is kept between reads: values by 64-bit keys, bounded in bytes, least recently used out
 * first. May be used by several threads, none of which needs the interpreter.
 *
 * A value that was got or put is held by its user until it is let go, so one that is thrown out
 * meanwhile stays whole; it is freed by whoever lets go of it last.
 */
#ifndef BLOCKREPL_KEPT_H
#define BLOCKREPL_KEPT_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

struct kept_value {
    uint64_t key;
    size_t bytes;              /* of data */
    struct kept_value *chain;  /* the next of the same bucket */
    struct kept_value *older, *newer;
    uint32_t holders;          /* the collection itself is one */
    _Alignas(16) uint8_t data[];
};

struct kept {
    pthread_mutex_t lock;
    struct kept_value **buckets;
    size_t bucket_mask;
    size_t count;
    size_t bytes, bytes_max;
    struct kept_value *oldest, *newest;
};

int kept_init(struct kept *kept, size_t bytes_max); /* 0, or ENOMEM */
void kept_free(struct kept *kept);                  /* nobody may hold a value */

/* The value of a key, held; NULL when there is none. */
struct kept_value *kept_get(struct kept *kept, uint64_t key);
/* A value for kept_put, not yet seen by others; NULL when there is no memory. */
struct kept_value *kept_new(uint64_t key, size_t bytes);
/* Keep it, in place of what has its key. It stays held. */
void kept_put(struct kept *kept, struct kept_value *value);
/* One more holder of a held value. */
void kept_hold(struct kept *kept, struct kept_value *value);
void kept_let_go(struct kept *kept, struct kept_value *value);

#endif
