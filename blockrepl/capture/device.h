/* The captured device: a local disk whose accepted writes become records in the ring. */
#ifndef BLOCKREPL_DEVICE_H
#define BLOCKREPL_DEVICE_H

#include <stddef.h>
#include <stdint.h>

struct device;

/* All functions return 0 or a negative errno. */
int device_open(struct device **out, int image_fd, int map_fd, int ring_fd, uint64_t size_bytes,
                uint64_t region_bytes, uint64_t hot_regions_max);
int device_start(struct device *device); /* the thread that cools the hot map */
void device_close(struct device *device);
int device_read(struct device *device, void *data, uint32_t length, uint64_t offset);
int device_write(struct device *device, const void *data, uint32_t length, uint64_t offset,
                 int fua);
int device_zero(struct device *device, uint32_t length, uint64_t offset, int may_trim, int fast,
                int fua);
int device_trim(struct device *device, uint32_t length, uint64_t offset, int fua);
int device_flush(struct device *device);

/* One extent at offset: its length (at most `length`) and whether it is a hole. */
int device_extent(struct device *device, uint64_t offset, uint64_t length, uint64_t *extent_length,
                  int *hole);

#endif
