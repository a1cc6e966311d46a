/* SPDX-License-Identifier: MIT
 *
 * A load generator for experiments and benchmarks. It keeps a number of requests in flight; each
 * answer is followed by the next request. With a virtual clock everything runs on the thread that
 * advances the clock, in an order that depends on the seed alone. Then the device must delay its
 * answers, or sending would never end.
 */
#ifndef VX_LOAD_H
#define VX_LOAD_H

#include "core/clock.h"
#include "core/device.h"
#include "core/meter.h"
#include "core/pool.h"

typedef struct vx_load vx_load;

typedef struct vx_load_terms {
    uint64_t first, span;   /* bytes: start and size of the range that requests address */
    uint64_t length;        /* bytes of a request, up to 32 MiB and `span` */
    uint64_t least;         /* lengths halve from length to this, equally often; 0: only length */
    uint64_t pause_ns;      /* between an answer and the next request */
    uint32_t depth;         /* requests in flight, 1 to 1024; at most 256 MiB in all */
    uint32_t write_percent; /* of the requests */
    bool flushes;           /* a flush follows each write, before the next request */
    bool in_a_row;          /* sequential; otherwise at random multiples of the request's length */
    uint64_t seed;
} vx_load_terms;

typedef struct vx_load_facts {
    uint64_t answered, failed; /* requests so far */
    uint64_t under_way;
} vx_load_facts;

/* Keeps a reference to the device. The meter (may be NULL), clock and pool must outlive the load.
 * NULL: no memory, or terms out of range. */
vx_load *vx_load_create(vx_device *device, vx_clock *clock, vx_pool *pool, vx_meter *meter,
                        const vx_load_terms *terms);
void vx_load_start(vx_load *load);
/* Stops sending requests. With a real clock it waits until none is in flight. */
void vx_load_stop(vx_load *load);
void vx_load_read(vx_load *load, vx_load_facts *facts);
/* Stops sending requests; the memory is freed when the last one is answered. The meter may be
 * destroyed at once. */
void vx_load_destroy(vx_load *load);

#endif
