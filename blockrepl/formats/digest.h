/* XXH3 of 64 bits, by the widest instructions that this machine has. */
#ifndef BLOCKREPL_DIGEST_H
#define BLOCKREPL_DIGEST_H

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <xxh_x86dispatch.h>
#else
#define XXH_INLINE_ALL
#include <xxhash.h>
#endif

static inline uint64_t digest64(const void *data, size_t length) { return XXH3_64bits(data, length); }

#endif
