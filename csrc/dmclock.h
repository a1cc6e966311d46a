/* SPDX-License-Identifier: MIT
 *
 * Whose turn it is, by mClock (Gulati, Merchant, Varman: "mClock: Handling Throughput Variability for
 * Hypervisor IO Scheduling", OSDI 2010): the arithmetic alone, without queues, clocks and locks.
 *
 * A client has a reservation and a limit, in units a second, and a weight. Where the sum of what all
 * want is more than there is, each gets max(reservation, its share by weight), never above its limit.
 *
 *   first    who is behind its reservation: the tag `reserved_at`, which each such service moves by
 *            units / reservation, has passed; the earliest one goes. But after nine such services in a row one goes by weight, if somebody may
 *   else     by weight: who has had least of cost / weight (start-time fair queueing), and whose tag
 *            `limited_at` has passed. The reservation's tag stays where it is then, or what the weight
 *            gives would be taken from what is reserved
 *
 * Every service counts for the share, so a client that lives on its reservation gets nothing more by
 * weight. A client that was idle begins at the share of the others, and may make up for
 * VX_DMCLOCK_IDLE_LAG_NS of its reservation. One that others kept waiting may make up for
 * VX_DMCLOCK_LAG_NS of reservation and limit. Times are ticks (bucket.h), one client has one request at the head.
 */
#ifndef VX_DMCLOCK_H
#define VX_DMCLOCK_H

#include <stdbool.h>
#include <stdint.h>

#define VX_DMCLOCK_IDLE_LAG_NS 100000000u
#define VX_DMCLOCK_LAG_NS 1000000000u
#define VX_DMCLOCK_RESERVED_IN_A_ROW 9u
#define VX_LARGEST_WEIGHT 10000u

typedef struct vx_dmclock_client {
    uint64_t reservation, limit; /* units a second; 0: none */
    uint64_t weight;             /* 1 to VX_LARGEST_WEIGHT */
    uint64_t reserved_at, limited_at; /* ticks */
    uint64_t share;                   /* cost / weight, scaled; wraps */
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
/* Who is next; NULL: nobody before *when (UINT64_MAX: nobody waits). */
vx_dmclock_client *vx_dmclock_choose(const vx_dmclock *all, uint64_t now, bool *reserved,
                                     uint64_t *when);
/* It is served: `units` for reservation and limit, `cost` (of any kind, below 2^36) for its share. */
void vx_dmclock_serve(vx_dmclock *all, vx_dmclock_client *client, bool reserved, uint64_t units,
                      uint64_t cost, uint64_t now);

#endif
