/* SPDX-License-Identifier: MIT
 *
 * Time, and what is to happen at a time. A real clock is CLOCK_MONOTONIC with a thread of its own; a
 * virtual one advances only when it is told to, so that hours pass in seconds and always alike.
 *
 * A timer runs once, no earlier than its time, with no lock held, and must not block: the others wait
 * for it. Timers of one time run in the order in which they were set. Its memory belongs to its owner
 * and may be reused, or set again, as soon as `run` was entered. All times are nanoseconds.
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
    size_t position; /* in the heap, from 1 on; 0: not set */
};

vx_clock *vx_clock_create(bool virtual_time); /* NULL: no memory */
/* Runs what is set, at once and in order, and stops. Timers that are set later run at once. */
void vx_clock_stop(vx_clock *clock);
void vx_clock_destroy(vx_clock *clock); /* after vx_clock_stop */
uint64_t vx_clock_now(vx_clock *clock);
bool vx_clock_is_virtual(const vx_clock *clock);
/* Sets a timer, or moves one that is set. False: no memory or thread; it is not set. */
bool vx_clock_set(vx_clock *clock, vx_timer *timer, uint64_t when_ns);
/* False: it was not set, and may be running. */
bool vx_clock_cancel(vx_clock *clock, vx_timer *timer);
/* Virtual clocks: runs what is due up to `until_ns` on this thread, each at its own time. */
void vx_clock_advance(vx_clock *clock, uint64_t until_ns);
/* Virtual clocks: time passes up to `until_ns` and nothing runs, as if the process were stalled. */
void vx_clock_skip(vx_clock *clock, uint64_t until_ns);
/* Virtual clocks: when the next timer is due; UINT64_MAX: none is set. */
uint64_t vx_clock_next(vx_clock *clock);
uint64_t vx_now_ns(void); /* CLOCK_MONOTONIC */

#endif
