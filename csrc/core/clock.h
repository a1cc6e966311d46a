/* SPDX-License-Identifier: MIT
 *
 * A clock and its timers. A real clock is CLOCK_MONOTONIC and runs its timers on its own thread. A
 * virtual clock advances only through vx_clock_advance and vx_clock_skip, so a simulation of hours
 * takes seconds and is reproducible.
 *
 * A timer runs once, no earlier than its time and with no lock held. It must not block, because it
 * would delay the other timers. Timers with equal times run in the order in which they were set. A
 * timer's memory belongs to its owner, who may reuse it or set the timer again as soon as `run` has
 * been entered. All times are in nanoseconds.
 */
#ifndef VX_CLOCK_H
#define VX_CLOCK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct vx_clock vx_clock;
typedef struct vx_timer vx_timer;

struct vx_timer {
    void (*run)(vx_timer *timer);
    uint64_t when_ns;
    uint64_t sequence;
    size_t position; /* in the heap, counted from 1; 0: not set */
};

vx_clock *vx_clock_create(bool virtual_time); /* NULL: no memory */
/* Runs all set timers at once, in order, and stops the clock. No timer can be set afterwards. */
void vx_clock_stop(vx_clock *clock);
void vx_clock_destroy(vx_clock *clock); /* after vx_clock_stop */
uint64_t vx_clock_now(vx_clock *clock);
bool vx_clock_is_virtual(const vx_clock *clock);
/* Sets a timer, or moves one that is set. False: no memory, no thread, or the clock was stopped;
 * the timer is not set. */
bool vx_clock_set(vx_clock *clock, vx_timer *timer, uint64_t when_ns);
/* False: the timer was not set; it may be running. */
bool vx_clock_cancel(vx_clock *clock, vx_timer *timer);
/* Virtual clocks: runs the timers due up to `until_ns` on this thread, each at its own time. */
void vx_clock_advance(vx_clock *clock, uint64_t until_ns);
/* Virtual clocks: moves the time to `until_ns` and runs nothing, as if the process had stalled. */
void vx_clock_skip(vx_clock *clock, uint64_t until_ns);
/* Virtual clocks: the time of the next timer; UINT64_MAX: none is set. */
uint64_t vx_clock_next(vx_clock *clock);
uint64_t vx_now_ns(void); /* CLOCK_MONOTONIC */

#endif
