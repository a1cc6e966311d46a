/* SPDX-License-Identifier: MIT
 *
 * How long a disk would take: models of a hard disk and of solid-state disks, in integers, the same
 * on every machine. A model is asked when what arrives now is done, and remembers it; it moves no
 * data and never waits. Times are nanoseconds of whatever clock the caller has.
 *
 * Hard disk (7200 rpm; after Ruemmler & Wilkes, "An introduction to disk drive modeling", 1994)
 *
 *   seek       0.8 + 13.3 sqrt(x) ms over a share x of the stroke up to a third, then
 *              8.5 + 14.25 (x - 1/3): track to track 0.8, mean 8.4, whole stroke 18 ms
 *   rotation   8.333 ms; a place of a track passes below the head once in each
 *   transfer   16 zones, 200 MB/s in the outermost to 100 MB/s in the innermost
 *   in a row   what begins where the last one ended costs its transfer only
 *   queue      requests are taken as they come, but a drive that knows of n others reorders: seek and
 *              rotation are divided by 1 + log2(1 + n) / 5, so by two with 31 others
 *   cache      writes are done after 0.1 ms, until 64 MiB of them wait; they are written in order of
 *              place, in a quarter of the time, while nothing else is asked. A flush waits for them
 *
 * Solid-state disk: 8 channels of pages of 16 KiB (NVMe 16), a read of a page takes its channel for
 * 80 us; a bus of 500 MB/s (3 GB/s). A write is done after 25 us, as long as 64 MiB of buffer take it;
 * the channels program a page in 400 us. Above 70 % full, garbage collection makes of each page up to
 * four. ZERO and TRIM empty whole MiB, and take 50 us. A flush waits for the buffer.
 */
#ifndef VX_MODEL_H
#define VX_MODEL_H

#include <stdbool.h>
#include <stdint.h>

typedef struct vx_model vx_model;

enum vx_model_kind { VX_MODEL_HDD = 0, VX_MODEL_SSD = 1, VX_MODEL_NVME = 2 };

/* `capacity`: bytes, at least a MiB; places beyond wrap. NULL: no memory, or no such kind. */
vx_model *vx_model_create(uint32_t kind, uint64_t capacity, bool write_cache);
void vx_model_destroy(vx_model *model);
/* When an operation (enum vx_operation) that arrives at `now` is done. Any thread. */
uint64_t vx_model_serve(vx_model *model, uint32_t operation, uint64_t offset, uint64_t length,
                        uint64_t now);
/* About how long the device is taken by a request with `others` under way; what a scheduler charges.
 * Nothing is remembered. */
uint64_t vx_model_cost(const vx_model *model, uint32_t operation, uint64_t length, bool in_a_row,
                       uint32_t others);
/* The longest for which a request of up to `length` bytes holds up those that come after it, while `others`
 * are under way. A hard disk: the longest seek, a whole revolution, and the innermost zone. Others: all
 * pages on one channel, and the garbage collection of a full device. A request is done no later than all
 * that were under way when it came, and it itself, have held the device up; so is a flush. This holds
 * without a write cache only. */
uint64_t vx_model_worst(const vx_model *model, uint32_t operation, uint64_t length, uint32_t others);

#endif
