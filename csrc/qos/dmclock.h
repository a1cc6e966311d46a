/* SPDX-License-Identifier: MIT
 *
 * Which client is served next, by mClock (Gulati, Merchant, Varman: "mClock: Handling Throughput Variability for
 * Hypervisor IO Scheduling", OSDI 2010): the arithmetic alone, without queues, clocks and locks.
 *
 * A client has a reservation and a limit, in units a second, and a weight. Where the sum of what all
 * want is more than there is, each gets max(reservation, its share by weight), never above its limit.
 *
 *   first    whose reservation is due, that is, whose tag `reserved_at` has passed. Of those, the client
 *            with the earliest deadline goes. The deadline is the tag plus units / reservation of the
 *            request at its head (earliest deadline first among the eligible).
 *   else     by weight: the client that has had least of cost / weight goes (start-time fair queueing),
 *            if its tag `limited_at` has passed.
 *
 * Every service counts for both. A service by weight moves the reservation's tag to one request ahead of
 * now at most, so what the weight gives is not taken from what is reserved. A client that lives on its
 * reservation gets nothing more by weight.
 *
 * Overload. Where a deadline was missed by VX_DMCLOCK_OVERLOAD_NS, more is reserved than there is. Then
 * one service in ten goes by weight, so that nobody starves. A set of reservations that was admitted
 * (vhdx/qos/admission.py) leaves a tenth of the device by itself and never comes to that.
 *
 * Idle clients. `active` says that a client has something under way. A client that was idle begins at the
 * share of the others. It earned nothing meanwhile: its tag moves on by as long as it was idle. A client
 * that others kept waiting may make up for VX_DMCLOCK_LAG_NS beyond its deadline. Times are ticks
 * (bucket.h); a client has one request at its head.
 */
#ifndef VX_DMCLOCK_H
#define VX_DMCLOCK_H

#include <stdbool.h>
#include <stdint.h>

#define VX_DMCLOCK_OVERLOAD_NS 500000000u
#define VX_DMCLOCK_LAG_NS 1000000000u
#define VX_DMCLOCK_RESERVED_IN_A_ROW 9u
#define VX_LARGEST_WEIGHT 10000u

typedef struct vx_dmclock_client {
    uint64_t reservation, limit; /* units a second; 0: none */
    uint64_t weight;             /* 1 to VX_LARGEST_WEIGHT */
    uint64_t reserved_at, limited_at; /* ticks */
    uint64_t share;                   /* cost / weight, scaled; wraps */
    uint64_t units;                   /* of what is at its head; 0 counts as one */
    uint64_t rested_at;               /* ticks: since when it is idle, if it is not active */
    bool active;
    struct vx_dmclock_client *next, **link; /* of those that wait */
} vx_dmclock_client;

typedef struct vx_dmclock {
    vx_dmclock_client *waiting;
    uint64_t share; /* where a client begins: the least of those that want something */
    uint32_t in_a_row; /* services by reservation */
} vx_dmclock;

/* Other figures, live: what is owed stays, in units. With another reservation it begins anew by weight. */
void vx_dmclock_set(const vx_dmclock *all, vx_dmclock_client *client, uint64_t reservation,
                    uint64_t limit, uint64_t weight, uint64_t now);
/* It has a request, after it had none. */
void vx_dmclock_begin(vx_dmclock *all, vx_dmclock_client *client, uint64_t now);
/* It has none any more. */
void vx_dmclock_end(vx_dmclock_client *client);
/* By how much the deadline of what it wants, or has under way, is missed; ticks. */
uint64_t vx_dmclock_late(const vx_dmclock_client *client, uint64_t now);
/* Who is next; NULL: nobody before *when (UINT64_MAX: nobody waits). */
vx_dmclock_client *vx_dmclock_choose(const vx_dmclock *all, uint64_t now, bool *reserved,
                                     uint64_t *when);
/* It is served: `units` for reservation and limit, `cost` (of any kind, below 2^36) for its share. */
void vx_dmclock_serve(vx_dmclock *all, vx_dmclock_client *client, bool reserved, uint64_t units,
                      uint64_t cost, uint64_t now);

#endif
