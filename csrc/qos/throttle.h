/* SPDX-License-Identifier: MIT
 *
 * Limits on what passes to a lower device: requests a second in normalised units, bytes a second, of
 * reads, writes and both.
 *
 * A throttle is one flow: what one initiator does to one disk. It is limited by up to two sets of
 * limits: its disk's, and that of a group of disks. What may pass is admitted without a lock, and
 * without a look at the clock where nothing is limited. What may not is parked, and passes at its
 * exact time: each time is computed from the one before, so that waking late, by up to 100 ms, costs
 * nothing of the rate; a longer delay is a stall, which is not made up for. Nothing sleeps
 * and nothing polls.
 *
 *   units     max(1, ceil(length / unit)) for reads and writes; ZERO and TRIM, which carry no payload,
 *             one for each MiB begun and no bytes; FLUSH and EXTENTS pass freely
 *   order     requests of a flow pass in the order in which they came
 *   pieces    what waits pays for a part at a time, and passes when all of it is paid for. Of several
 *             flows each that waits has one part in the queue of a shared limit, and parts are small
 *             there, a unit or what passes in 50 us: so they alternate, and share by units, however
 *             large their requests are. Elsewhere a part is what passes in 100 ms, at most 256 KiB
 *             (of ZERO and TRIM 32 MiB)
 *   stages    a piece pays one limit at a time, the one that would let it pass last first, and the
 *             next one when its time has come: so a flow that waits for a limit of its own takes
 *             nothing out of one that it shares
 *   drain     a server that ends lets everything pass at once, unpaid. What a client that is gone
 *             has left waiting fails instead: nobody was told that it was done, and nobody is to pay
 *
 * A credit is what an idle flow may save beyond its burst, and then spend at up to `credit_rate`.
 */
#ifndef VX_THROTTLE_H
#define VX_THROTTLE_H

#include "core/clock.h"
#include "core/device.h"
#include "core/pool.h"

enum vx_limit_kind {
    VX_LIMIT_UNITS = 0,
    VX_LIMIT_UNITS_READ = 1,
    VX_LIMIT_UNITS_WRITTEN = 2,
    VX_LIMIT_BYTES = 3,
    VX_LIMIT_BYTES_READ = 4,
    VX_LIMIT_BYTES_WRITTEN = 5,
    VX_LIMIT_KINDS = 6
};

typedef struct vx_limit {
    uint64_t rate;        /* units or bytes a second; 0: none */
    uint64_t burst;       /* units or bytes that may pass at once */
    uint64_t credit;      /* units or bytes saved while idle, beyond the burst */
    uint64_t credit_rate; /* a second, while credit is spent; 0: no bound */
} vx_limit;

/* The lock of the flows and limits that meet each other, and their time. */
typedef struct vx_qos vx_qos;
typedef struct vx_limits vx_limits;

/* `pool` runs what passes late and may block; `clock` may be the pool's, or a virtual one. */
vx_qos *vx_qos_create(vx_clock *clock, vx_pool *pool);
void vx_qos_destroy(vx_qos *qos); /* after every throttle; frees the limits, too */

/* `unit`: bytes of a normalised unit. Lives as long as `qos`. */
vx_limits *vx_limits_create(vx_qos *qos, uint32_t unit);
/* Limits of all kinds, live; what waits is timed anew. `fresh`: new limits begin with all that they
 * may save, otherwise with nothing. */
void vx_limits_set(vx_limits *limits, const vx_limit *wanted, bool fresh);
/* Units or bytes that each kind could admit now; negative: owed. */
void vx_limits_levels(vx_limits *limits, int64_t *levels);

/* Keeps a reference to `lower`; `own` counts always, a group as long as it is set. */
vx_device *vx_throttle_create(vx_device *lower, vx_qos *qos, vx_limits *own, uint64_t identity);
/* NULL: none. What waits pays the new group, and the old one no more. */
void vx_throttle_set_group(vx_device *device, vx_limits *group);
/* Requests that wait now, and the units that they will cost. */
void vx_throttle_waiting(vx_device *device, uint64_t *requests, uint64_t *units);

#endif
