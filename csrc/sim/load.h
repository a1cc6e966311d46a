/* SPDX-License-Identifier: MIT
 *
 * A client that asks of a device what is wanted, for experiments and benchmarks: so many requests
 * under way, each answered one followed by the next. With a virtual clock all of it happens on the
 * thread that advances the clock, in an order that depends on the seed alone; the device below must
 * take time then, or it would not end.
 */
#ifndef VX_LOAD_H
#define VX_LOAD_H

#include "core/clock.h"
#include "core/device.h"
#include "core/meter.h"
#include "core/pool.h"

typedef struct vx_load vx_load;

typedef struct vx_load_terms {
    uint64_t first, span;   /* bytes: where it works */
    uint64_t length;        /* bytes of a request, up to 32 MiB and `span` */
    uint64_t least;         /* requests have length, length / 2 .. down to this, equally often; 0: length */
    uint64_t pause_ns;      /* between an answer and what follows it */
    uint32_t depth;         /* requests under way, 1 to 1024; of 256 MiB in all */
    uint32_t write_percent; /* of the requests */
    bool flushes;           /* each write is followed by a flush, and that by the next request */
    bool in_a_row;          /* one behind the other, else at random multiples of `length` */
    uint64_t seed;
} vx_load_terms;

typedef struct vx_load_facts {
    uint64_t answered, failed; /* requests so far */
    uint64_t under_way;
} vx_load_facts;

/* Keeps a reference to the device; meter (or NULL), clock and pool must outlive it. NULL: no memory, or
 * terms that cannot be. */
vx_load *vx_load_create(vx_device *device, vx_clock *clock, vx_pool *pool, vx_meter *meter,
                        const vx_load_terms *terms);
void vx_load_start(vx_load *load);
/* No further requests; with a real clock it waits until none is under way. */
void vx_load_stop(vx_load *load);
void vx_load_read(vx_load *load, vx_load_facts *facts);
/* No further requests; its memory is freed when the last one is answered. The meter may go at once. */
void vx_load_destroy(vx_load *load);

#endif
