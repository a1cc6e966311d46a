/* SPDX-License-Identifier: MIT
 *
 * Counters of one flow: requests, normalised units, bytes, latency with its distribution, and time
 * in the queues of throttles and schedulers. One thread (a connection's) writes a meter; any thread
 * may read it. Each number is exact, but the numbers are not read at one instant. A meter that is
 * off counts nothing.
 *
 * Each octave of latencies has four bins, so a quantile above 4 us is at most a quarter too high.
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
    /* [0]: reads; [1]: changes */
    _Atomic uint64_t requests[2], units[2], bytes[2], latency_ns[2], queued_ns[2];
    _Atomic uint64_t offered[2]; /* units of all requests that arrived */
    _Atomic uint64_t bins[VX_METER_BINS];
} vx_meter;

/* The counts of a meter at one reading. */
typedef struct vx_meter_facts {
    uint64_t requests[2], units[2], bytes[2], latency_ns[2], queued_ns[2], offered[2];
    uint64_t bins[VX_METER_BINS];
} vx_meter_facts;

vx_meter *vx_meter_create(uint32_t unit); /* NULL: no memory */
void vx_meter_destroy(vx_meter *meter);
void vx_meter_switch(vx_meter *meter, bool on);
void vx_meter_read(vx_meter *meter, vx_meter_facts *facts);
/* The lower bound of a bin, nanoseconds. */
uint64_t vx_meter_bin_start(uint32_t bin);

static inline bool vx_meter_is_on(const vx_meter *meter)
{
    return meter != NULL && atomic_load_explicit(&meter->on, memory_order_relaxed);
}

/* vx_meter_offer: a request has arrived. vx_meter_note: it was answered after `latency_ns`, of
 * which it spent `queued_ns` in queues. FLUSH and EXTENTS are not counted. */
void vx_meter_offer(vx_meter *meter, uint32_t operation, uint64_t length);
void vx_meter_note(vx_meter *meter, uint32_t operation, uint64_t length, uint64_t latency_ns,
                   uint64_t queued_ns);

#endif
