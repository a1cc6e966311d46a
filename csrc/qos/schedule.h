/* SPDX-License-Identifier: MIT
 *
 * Shares one device among several disks. A scheduler has `depth` slots: no more requests than that are
 * below it at a time. dmclock (dmclock.h) chooses which request gets the next slot. The others wait here,
 * where their order can still be chosen, and not in a queue below, where it cannot.
 *
 *   share      a client of the scheduler: a disk, a group of disks, or work in the background
 *   cost       for reservation and limit normalised units, as everywhere; for the share by weight
 *              those too, or the time that a model says the device is taken
 *   pieces     reads and writes go 256 KiB at a time, zeros and trims 32 MiB, so that nobody waits for
 *              a large request of others. After the pieces of a write with FUA comes a flush
 *   free       FLUSH and EXTENTS pass at once
 *
 * A schedule device parks what it is given, if it may; NOWAIT alone is answered AGAIN. What a lower
 * device delays (not_before_ns) holds its place until then, and completes then; what it parks, because
 * its disk is paused or commits, holds none. What a client that is gone has waiting here fails
 * (`drop`). With a virtual clock all of it happens on the thread that advances the clock.
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
    uint64_t contended_ns;    /* some request waited because every slot was taken */
    uint64_t contended_units; /* served in that time */
    uint64_t waiting;         /* requests */
    uint64_t below;           /* pieces */
} vx_scheduler_facts;

typedef struct vx_share_facts {
    uint64_t requests, units; /* served so far */
    uint64_t reserved_units;  /* of those, by reservation */
    uint64_t waiting, waiting_units;
    uint64_t waited_ns; /* by all requests so far */
    uint64_t below;     /* pieces */
    uint64_t late_ns;   /* by which the deadline of its reservation is missed */
} vx_share_facts;

/* `unit`: bytes; `depth`: 1 to VX_DEEPEST; `model`: for costs, or NULL. NULL: no memory. */
vx_scheduler *vx_scheduler_create(vx_clock *clock, vx_pool *pool, uint32_t unit, uint32_t depth,
                                  vx_model *model);
/* No more is let through, beside `depth`, than the model takes so long for in the worst case, but for a
 * single piece; UINT64_MAX: no bound. From now on. */
void vx_scheduler_set_most_below(vx_scheduler *scheduler, uint64_t ns);
/* Cancels all waits for slots, now and later, and waits until every slot in use has ended. Call it before
 * the clock and the pool end. */
void vx_scheduler_stop(vx_scheduler *scheduler);
/* When no device of it is used any more. What it stands on lives until its last device is gone. */
void vx_scheduler_release(vx_scheduler *scheduler);
void vx_scheduler_read(vx_scheduler *scheduler, vx_scheduler_facts *facts);

/* Lives as long as the scheduler. */
vx_share *vx_share_create(vx_scheduler *scheduler);
/* Units a second, 0 for none; weight 1 to VX_LARGEST_WEIGHT. */
void vx_share_set(vx_share *share, uint64_t reservation, uint64_t limit, uint64_t weight);
void vx_share_read(vx_share *share, vx_share_facts *facts);

/* Keeps a reference to `lower` and to the scheduler. NULL: no memory. */
vx_device *vx_schedule_create(vx_device *lower, vx_share *share, uint64_t identity);
/* Requests of it that wait for a slot. */
uint64_t vx_schedule_waiting(vx_device *device);
/* Requests from now on wait in another share of the same scheduler. */
void vx_schedule_set_share(vx_device *device, vx_share *share);

/* Takes a slot for work that does its own I/O, `bytes` of one piece; give it back with vx_slot_end. It
 * blocks, so never call it where requests are run or while holding what others need to go on. NULL: the
 * scheduler has stopped. */
vx_slot *vx_share_take_slot(vx_share *share, uint64_t bytes);
void vx_slot_end(vx_slot *slot);

#endif
