/* SPDX-License-Identifier: MIT
 *
 * Limits the requests that pass to a lower device: normalised units a second and bytes a second,
 * for reads, writes and both.
 *
 * A throttle is one flow: the requests of one initiator to one disk. Up to two sets of limits
 * apply: those of its disk, and those of a group of disks. A request within the limits is admitted
 * without a lock. If nothing is limited, the clock is not read either. Any other request is parked
 * and passes at its exact time. Each time is computed from the one before, so a timer that fires up
 * to 100 ms late does not reduce the rate. A longer delay is a stall, which is not made up for.
 * Nothing sleeps and nothing polls.
 *
 *   units     max(1, ceil(length / unit)) for reads and writes. ZERO and TRIM carry no payload:
 *             they count one unit for each MiB begun and no bytes. FLUSH and EXTENTS are free
 *   order     requests of a flow pass in the order of arrival
 *   pieces    a waiting request pays for one piece at a time, and passes when all of it is paid
 *             for. Each waiting flow has one piece in the queue of a shared limit. Pieces are small
 *             there: one unit, or what passes in 50 us. So the flows alternate and share by units,
 *             however large their requests are. Elsewhere a piece is what passes in 100 ms, at most
 *             256 KiB (32 MiB for ZERO and TRIM)
 *   stages    a piece pays one limit at a time. The limit that lets it pass last comes first; the
 *             next one follows when the piece is due. So a flow that waits for its own limit takes
 *             nothing from a limit that it shares
 *   drain     when a server ends, all requests pass at once, unpaid. The waiting requests of a
 *             client that is gone fail instead: they were never acknowledged, and they are not
 *             charged
 *
 * Credit is what an idle flow may save beyond its burst, and later spend at up to `credit_rate`.
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

/* A domain: the lock and the clock of flows and limits that affect each other. */
typedef struct vx_qos vx_qos;
typedef struct vx_limits vx_limits;

/* `pool` runs delayed requests that may block; `clock` may be the pool's, or a virtual one. */
vx_qos *vx_qos_create(vx_clock *clock, vx_pool *pool);
void vx_qos_destroy(vx_qos *qos); /* after the last throttle; also frees the limits */

/* `unit`: bytes of a normalised unit. The limits live as long as `qos`. NULL: no memory. */
vx_limits *vx_limits_create(vx_qos *qos, uint32_t unit);
/* Sets the limits of all kinds at any time and retimes waiting requests. With `fresh`, new limits
 * start with all that they may save, otherwise with nothing. */
void vx_limits_set(vx_limits *limits, const vx_limit *wanted, bool fresh);
/* The units or bytes that each kind could admit now; negative: owed. */
void vx_limits_levels(vx_limits *limits, int64_t *levels);

/* Keeps a reference to `lower`. `own` always applies, a group while it is set. NULL: no memory. */
vx_device *vx_throttle_create(vx_device *lower, vx_qos *qos, vx_limits *own, uint64_t identity);
/* NULL: no group. Waiting requests pay the new group and no longer the old one. */
void vx_throttle_set_group(vx_device *device, vx_limits *group);
/* The requests that wait now, and the units that they count. */
void vx_throttle_waiting(vx_device *device, uint64_t *requests, uint64_t *units);

#endif
