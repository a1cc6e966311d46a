/* SPDX-License-Identifier: MIT
 *
 * Disks that share a device take turns at it. A scheduler lets no more than `depth` requests through
 * at a time, and dmclock (dmclock.h) chooses whose; the others wait here, where their order can still
 * be chosen, and not in a queue below, where it cannot.
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
#define VX_SHARE_FACTS 8u
#define VX_SCHEDULER_FACTS 4u

typedef struct vx_scheduler vx_scheduler;
typedef struct vx_share vx_share;
typedef struct vx_turn vx_turn;

/* `unit`: bytes; `depth`: 1 to VX_DEEPEST; `model`: for costs, or NULL. NULL: no memory. */
vx_scheduler *vx_scheduler_create(vx_clock *clock, vx_pool *pool, uint32_t unit, uint32_t depth,
                                  vx_model *model);
/* No more is let through, beside `depth`, than the model takes so long for in the worst case, but for a
 * single piece; UINT64_MAX: no bound. From now on. */
void vx_scheduler_set_most_below(vx_scheduler *scheduler, uint64_t ns);
/* Nobody waits for a turn any more, now or later, and those that are out have ended: it waits for them.
 * Before the clock and the pool end. */
void vx_scheduler_stop(vx_scheduler *scheduler);
/* When no device of it is used any more. What it stands on lives until its last device is gone. */
void vx_scheduler_release(vx_scheduler *scheduler);
/* Nanoseconds in which somebody waited because every place was taken, pieces served in them; requests
 * that wait, and are below. */
void vx_scheduler_read(vx_scheduler *scheduler, uint64_t *facts);

/* Lives as long as the scheduler. */
vx_share *vx_share_create(vx_scheduler *scheduler);
/* Units a second, 0 for none; weight 1 to VX_LARGEST_WEIGHT. */
void vx_share_set(vx_share *share, uint64_t reservation, uint64_t limit, uint64_t weight);
/* Requests and units served so far, units of those by reservation; requests and units that wait; ns
 * that requests have waited, in all; requests below; ns by which its reservation's deadline is missed. */
void vx_share_read(vx_share *share, uint64_t *facts);

/* Keeps a reference to `lower` and to the scheduler. NULL: no memory. */
vx_device *vx_schedule_create(vx_device *lower, vx_share *share, uint64_t identity);
/* Requests of it that wait for a turn. */
uint64_t vx_schedule_waiting(vx_device *device);
/* Requests from now on wait in another share of the same scheduler. */
void vx_schedule_set_share(vx_device *device, vx_share *share);

/* Work that does its own I/O waits here for its turn, and says when it is done with it. A piece at a
 * time; blocks, so never where requests are run, and never with what others need to go on. NULL: the
 * scheduler has stopped. */
vx_turn *vx_share_take_turn(vx_share *share, uint64_t bytes);
void vx_turn_end(vx_turn *turn);

#endif
