/* SPDX-License-Identifier: MIT
 *
 * What a flow did: requests, normalised units, bytes, latency with its distribution, time in the
 * queue of a throttle. Written by one thread (a connection's), read by any: each number is exact,
 * their relation is not. Nothing is counted, and no clock is read, while it is off.
 *
 * Latencies fall into bins of a quarter of an octave: a quantile is right to a fifth.
 */
#ifndef VX_METER_H
#define VX_METER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/device.h"

#define VX_METER_BINS 128u

typedef struct vx_meter {
    _Atomic bool on;
    uint32_t unit; /* bytes of a normalised unit */
    /* of reads, of all that changes */
    _Atomic uint64_t requests[2], units[2], bytes[2], latency_ns[2], queued_ns[2];
    _Atomic uint64_t offered[2]; /* units of what has arrived, answered or not */
    _Atomic uint64_t bins[VX_METER_BINS];
} vx_meter;

/* What a meter has counted. */
typedef struct vx_meter_facts {
    uint64_t requests[2], units[2], bytes[2], latency_ns[2], queued_ns[2], offered[2];
    uint64_t bins[VX_METER_BINS];
} vx_meter_facts;

vx_meter *vx_meter_create(uint32_t unit); /* NULL: no memory */
void vx_meter_destroy(vx_meter *meter);
void vx_meter_switch(vx_meter *meter, bool on);
void vx_meter_read(vx_meter *meter, vx_meter_facts *facts);
/* The least latency of a bin, nanoseconds. */
uint64_t vx_meter_bin_start(uint32_t bin);

static inline bool vx_meter_is_on(const vx_meter *meter)
{
    return meter != NULL && atomic_load_explicit(&meter->on, memory_order_relaxed);
}

/* A request has come, or was answered after so many ns, `queued_ns` of them in a throttle. Flushes
 * and extents are not counted. */
void vx_meter_offer(vx_meter *meter, uint32_t operation, uint64_t length);
void vx_meter_note(vx_meter *meter, uint32_t operation, uint64_t length, uint64_t latency_ns,
                   uint64_t queued_ns);

#endif
