/* SPDX-License-Identifier: MIT
 *
 * Chooses the client that is served next, by mClock (Gulati, Merchant, Varman: "mClock: Handling
 * Throughput Variability for Hypervisor IO Scheduling", OSDI 2010). This is the arithmetic alone,
 * without queues, clocks and locks.
 *
 * A client has a reservation and a limit, in units a second, and a weight. When total demand
 * exceeds the device's capacity, each client gets max(reservation, its share by weight), at most
 * its limit.
 *
 *   first    clients whose reservation is due: their tag `reserved_at` has passed. Of these, the
 *            client with the earliest deadline is served. The deadline is the tag plus units /
 *            reservation of the request at its head (earliest deadline first among the eligible).
 *   else     by weight: the client with the least cost / weight so far is served (start-time fair
 *            queueing), among those whose tag `limited_at` has passed.
 *
 * Every service counts towards both the reservation and the share. A service by weight moves the
 * reservation's tag to at most one request ahead of now, so service by weight does not use up the
 * reservation. A client whose reservation exceeds its share by weight gets nothing more by weight.
 *
 * Overload. When a deadline is missed by VX_DMCLOCK_OVERLOAD_NS, the reservations exceed the
 * device's capacity. Then one service in ten goes by weight, so that no client starves. A set of
 * reservations that passed admission against a known capacity (vhdx/qos/admission.py) leaves a
 * tenth of the device unreserved and does not reach this state.
 *
 * Idle clients. `active` means that a client has requests that are not yet answered. A client that
 * was idle resumes at the share of the others. Idle time earns nothing: the reservation's tag
 * advances by the idle time, up to now. A client that others kept waiting may catch up on at most
 * VX_DMCLOCK_LAG_NS beyond its deadline. Times are ticks (bucket.h). A client has one request at
 * its head.
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
    uint64_t reserved_at, limited_at; /* ticks: tags of reservation and limit */
    uint64_t share;                   /* sum of cost / weight, scaled; wraps */
    uint64_t units;                   /* of the request at its head; 0 counts as one */
    uint64_t rested_at;               /* ticks: when it became idle; valid if it is not active */
    bool active;
    struct vx_dmclock_client *next, **link; /* in the list of waiting clients */
} vx_dmclock_client;

typedef struct vx_dmclock {
    vx_dmclock_client *waiting;
    uint64_t share; /* a new or idle client starts here: the least share of the waiting clients */
    uint32_t in_a_row; /* consecutive services by reservation */
} vx_dmclock;

/* Changes a client's figures at any time. Units that it owes stay owed. A changed reservation
 * resets its share by weight. */
void vx_dmclock_set(const vx_dmclock *all, vx_dmclock_client *client, uint64_t reservation,
                    uint64_t limit, uint64_t weight, uint64_t now);
/* Adds a client that now has a waiting request and had none before. */
void vx_dmclock_begin(vx_dmclock *all, vx_dmclock_client *client, uint64_t now);
/* Removes a client that has no waiting request left. */
void vx_dmclock_end(vx_dmclock_client *client);
/* The time by which an active client has missed its reservation's deadline; ticks. */
uint64_t vx_dmclock_late(const vx_dmclock_client *client, uint64_t now);
/* The client to serve next. NULL: none can be served before *when (UINT64_MAX: no client waits). */
vx_dmclock_client *vx_dmclock_choose(const vx_dmclock *all, uint64_t now, bool *reserved,
                                     uint64_t *when);
/* Charges a service to `client`: `units` to its reservation and limit, `cost` (in any measure,
 * below 2^36) to its share. */
void vx_dmclock_serve(vx_dmclock *all, vx_dmclock_client *client, bool reserved, uint64_t units,
                      uint64_t cost, uint64_t now);

#endif
