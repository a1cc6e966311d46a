/* SPDX-License-Identifier: MIT
 *
 * Shares one device among several disks. A scheduler has `depth` slots: at most that many pieces of
 * requests are below it at a time. dmclock (dmclock.h) chooses the request that gets the next slot.
 * The other requests wait here, where their order can still change, and not in a lower queue, where
 * it cannot.
 *
 *   share      a client of the scheduler: a disk, a group of disks, or background work
 *   cost       reservations and limits count normalised units. The share by weight counts units
 *              too, or the time for which a model says the device is busy
 *   pieces     reads and writes are cut into pieces of 256 KiB, zeros and trims into 32 MiB, so
 *              that no request waits for the whole of a large one. If a write with FUA is cut, a
 *              flush follows its last piece
 *   free       FLUSH and EXTENTS take no slot and pass at once
 *
 * A schedule device parks a request if it may; with NOWAIT alone it answers AGAIN. A piece that a
 * lower device delays (not_before_ns) keeps its slot until that time, and completes then. A piece
 * that a lower device parks, because its disk is paused or commits, frees its slot. When a client
 * is gone, its requests that wait here fail (`drop`). With a virtual clock everything runs on the
 * thread that advances the clock.
 */
#ifndef VX_SCHEDULE_H
#define VX_SCHEDULE_H

#include "core/clock.h"
#include "core/device.h"
#include "sim/model.h"
#include "core/pool.h"

#define VX_DEEPEST 256u

typedef struct vx_scheduler vx_scheduler;
typedef struct vx_share vx_share;
typedef struct vx_slot vx_slot;

typedef struct vx_scheduler_facts {
    uint64_t contended_ns;    /* time in which a request waited and every slot was taken */
    uint64_t contended_units; /* normalised, of the pieces that freed a slot in that time */
    uint64_t waiting;         /* requests */
    uint64_t below;           /* pieces in slots */
} vx_scheduler_facts;

typedef struct vx_share_facts {
    uint64_t requests, units; /* served so far */
    uint64_t reserved_units;  /* of those, by reservation */
    uint64_t waiting, waiting_units;
    uint64_t waited_ns; /* by all requests so far */
    uint64_t below;     /* pieces */
    uint64_t late_ns;   /* time by which the deadline of its reservation is missed */
} vx_share_facts;

/* `unit`: bytes; `depth`: 1 to VX_DEEPEST; `model`: for costs, or NULL. NULL: no memory. */
vx_scheduler *vx_scheduler_create(vx_clock *clock, vx_pool *pool, uint32_t unit, uint32_t depth,
                                  vx_model *model);
/* Bounds the pieces below, in addition to `depth`: by the model they take at most `ns` together in
 * the worst case. A single piece always passes. UINT64_MAX: no bound. Applies to pieces that start
 * later. */
void vx_scheduler_set_most_below(vx_scheduler *scheduler, uint64_t ns);
/* Cancels all waits for slots, now and later, and waits until every slot in use has ended. Call it before
 * the clock and the pool end. */
void vx_scheduler_stop(vx_scheduler *scheduler);
/* Call it when no device of the scheduler is in use any more. The clock, the pool and the model
 * must live until its last device is gone. */
void vx_scheduler_release(vx_scheduler *scheduler);
void vx_scheduler_read(vx_scheduler *scheduler, vx_scheduler_facts *facts);

/* The share lives as long as the scheduler. NULL: no memory. */
vx_share *vx_share_create(vx_scheduler *scheduler);
/* Units a second, 0 for none; weight 1 to VX_LARGEST_WEIGHT. */
void vx_share_set(vx_share *share, uint64_t reservation, uint64_t limit, uint64_t weight);
void vx_share_read(vx_share *share, vx_share_facts *facts);

/* Keeps a reference to `lower` and to the scheduler. NULL: no memory. */
vx_device *vx_schedule_create(vx_device *lower, vx_share *share, uint64_t identity);
/* The number of its requests that wait for a slot. */
uint64_t vx_schedule_waiting(vx_device *device);
/* Later requests wait in `share`, which belongs to the same scheduler. */
void vx_schedule_set_share(vx_device *device, vx_share *share);

/* Takes a slot for work that does its own I/O of `bytes`, at most one piece. Give the slot back
 * with vx_slot_end. The call blocks: never make it on a thread that runs requests, or while holding
 * a resource that other requests need. NULL: the scheduler has stopped. */
vx_slot *vx_share_take_slot(vx_share *share, uint64_t bytes);
void vx_slot_end(vx_slot *slot);

#endif
