/* SPDX-License-Identifier: MIT
 *
 * Timing models of a hard disk and of solid-state disks, in integers, with the same results on
 * every machine. A model tells when an operation that arrives now is done, and keeps that in its
 * state. It moves no data and never waits. Times are nanoseconds of the caller's clock.
 *
 * Hard disk (7200 rpm; after Ruemmler & Wilkes, "An introduction to disk drive modeling", 1994)
 *
 *   seek       for a fraction x of the full stroke: 0.8 + 13.3 sqrt(x) ms up to a third, then 8.5 +
 *              14.25 (x - 1/3) ms. Track to track 0.8, mean 8.4, full stroke 18 ms
 *   rotation   8.333 ms a revolution
 *   transfer   16 zones, from 200 MB/s in the outermost to 100 MB/s in the innermost
 *   in a row   a request that begins where the last one ended costs its transfer only
 *   queue      requests are served in order of arrival. A drive that knows n others would reorder
 *              them, so seek and rotation are divided by 1 + log2(1 + n) / 5: by two with 31 others
 *   cache      a write is done after 0.1 ms while 64 MiB of cache have room. Cached writes go to
 *              the medium in order of address, in a quarter of the time, while no other request is
 *              served. A flush waits for them
 *
 * Solid-state disk (figures of NVMe in brackets): 8 channels [16] with pages of 16 KiB, and a bus
 * of 500 MB/s [3 GB/s]. Reading a page takes its channel for 80 us. A write is done after 25 us
 * while 64 MiB of buffer have room; programming a page takes a channel for 400 us. Above 70 % full,
 * garbage collection programs up to four pages for each page written. ZERO and TRIM free whole MiB
 * and take 50 us. A flush waits for the buffer.
 */
#ifndef VX_MODEL_H
#define VX_MODEL_H

#include <stdbool.h>
#include <stdint.h>

typedef struct vx_model vx_model;

enum vx_model_kind { VX_MODEL_HDD = 0, VX_MODEL_SSD = 1, VX_MODEL_NVME = 2 };

/* `capacity`: bytes, at least a MiB; larger offsets wrap. NULL: no memory, a smaller capacity, or
 * an unknown kind. */
vx_model *vx_model_create(uint32_t kind, uint64_t capacity, bool write_cache);
void vx_model_destroy(vx_model *model);
/* Returns when an operation (enum vx_operation) that arrives at `now` is done. Thread-safe. */
uint64_t vx_model_serve(vx_model *model, uint32_t operation, uint64_t offset, uint64_t length,
                        uint64_t now);
/* An estimate of how long a request keeps the device busy with `others` in flight, for a scheduler
 * to charge. Changes no state. */
uint64_t vx_model_cost(const vx_model *model, uint32_t operation, uint64_t length, bool in_a_row,
                       uint32_t others);
/* The longest time for which a request of up to `length` bytes delays later requests, with `others`
 * in flight. On a hard disk: the longest seek, a whole revolution, and the innermost zone. On other
 * disks: the most pages of a read that fall on one channel, or a write with the garbage collection
 * of a full device. A request takes at most the sum of these times over itself and all requests in
 * flight at its arrival; so does a flush. This bound holds only without a write cache. */
uint64_t vx_model_worst(const vx_model *model, uint32_t operation, uint64_t length, uint32_t others);

#endif
