#include "kept.h"

#include <errno.h>
#include <stdlib.h>

#define BUCKETS_FIRST 256

static size_t bucket_of(const struct kept *kept, uint64_t key)
{
    return (size_t)((key * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & kept->bucket_mask;
}

static size_t cost(const struct kept_value *value)
{
    return sizeof *value + value->bytes;
}

int kept_init(struct kept *kept, size_t bytes_max)
{
    *kept = (struct kept){.bucket_mask = BUCKETS_FIRST - 1, .bytes_max = bytes_max};
    kept->buckets = calloc(BUCKETS_FIRST, sizeof *kept->buckets);
    if (kept->buckets == NULL)
        return ENOMEM;
    pthread_mutex_init(&kept->lock, NULL);
    return 0;
}

void kept_free(struct kept *kept)
{
    if (kept->buckets == NULL)
        return;
    while (kept->oldest != NULL) {
        struct kept_value *value = kept->oldest;
        kept->oldest = value->newer;
        free(value);
    }
    free(kept->buckets);
    pthread_mutex_destroy(&kept->lock);
    kept->buckets = NULL;
}

static void unlink_age(struct kept *kept, struct kept_value *value)
{
    *(value->older != NULL ? &value->older->newer : &kept->oldest) = value->newer;
    *(value->newer != NULL ? &value->newer->older : &kept->newest) = value->older;
}

static void link_newest(struct kept *kept, struct kept_value *value)
{
    value->older = kept->newest;
    value->newer = NULL;
    *(kept->newest != NULL ? &kept->newest->newer : &kept->oldest) = value;
    kept->newest = value;
}

static struct kept_value **place_of(struct kept *kept, uint64_t key)
{
    struct kept_value **place = &kept->buckets[bucket_of(kept, key)];
    while (*place != NULL && (*place)->key != key)
        place = &(*place)->chain;
    return place;
}

static void release(struct kept_value *value)
{
    if (--value->holders == 0)
        free(value);
}

static void throw_out(struct kept *kept, struct kept_value **place)
{
    struct kept_value *value = *place;
    *place = value->chain;
    unlink_age(kept, value);
    kept->count--;
    kept->bytes -= cost(value);
    release(value);
}

static void grow(struct kept *kept)
{
    size_t count = 2 * (kept->bucket_mask + 1);
    struct kept_value **buckets = calloc(count, sizeof *buckets);
    if (buckets == NULL)
        return; /* longer chains, that is all */
    free(kept->buckets);
    kept->buckets = buckets;
    kept->bucket_mask = count - 1;
    for (struct kept_value *value = kept->oldest; value != NULL; value = value->newer) {
        struct kept_value **bucket = &buckets[bucket_of(kept, value->key)];
        value->chain = *bucket;
        *bucket = value;
    }
}

struct kept_value *kept_get(struct kept *kept, uint64_t key)
{
    pthread_mutex_lock(&kept->lock);
    struct kept_value *value = *place_of(kept, key);
    if (value != NULL) {
        value->holders++;
        if (value != kept->newest) {
            unlink_age(kept, value);
            link_newest(kept, value);
        }
    }
    pthread_mutex_unlock(&kept->lock);
    return value;
}

struct kept_value *kept_new(uint64_t key, size_t bytes)
{
    struct kept_value *value = malloc(sizeof *value + bytes);
    if (value != NULL)
        *value = (struct kept_value){.key = key, .bytes = bytes, .holders = 1};
    return value;
}

void kept_put(struct kept *kept, struct kept_value *value)
{
    pthread_mutex_lock(&kept->lock);
    struct kept_value **place = place_of(kept, value->key);
    if (*place != NULL)
        throw_out(kept, place);
    if (kept->count > kept->bucket_mask)
        grow(kept);
    place = &kept->buckets[bucket_of(kept, value->key)];
    value->chain = *place;
    *place = value;
    value->holders++;
    link_newest(kept, value);
    kept->count++;
    kept->bytes += cost(value);
    while (kept->bytes > kept->bytes_max && kept->oldest != NULL)
        throw_out(kept, place_of(kept, kept->oldest->key));
    pthread_mutex_unlock(&kept->lock);
}

void kept_hold(struct kept *kept, struct kept_value *value)
{
    pthread_mutex_lock(&kept->lock);
    value->holders++;
    pthread_mutex_unlock(&kept->lock);
}

void kept_let_go(struct kept *kept, struct kept_value *value)
{
    pthread_mutex_lock(&kept->lock);
    release(value);
    pthread_mutex_unlock(&kept->lock);
}
