/* SPDX-License-Identifier: MIT
 *
 * Threads for what may block, also from a time on.
 *
 * Jobs run in the order they were pushed, on at most `threads` threads: one from the start, further
 * ones when needed.
 * A job pushed with a time (CLOCK_MONOTONIC, nanoseconds) runs no earlier than that. The memory of a
 * job belongs to its owner and may be reused as soon as `run` was entered.
 *
 * `bytes` counts payload that connections borrow: vx_pool_charge refuses past the limit, so a server
 * does not grow. What a throttle holds up may have half of it, so that there is always room for who is
 * not limited. Who cannot go on without more says so with vx_pool_note_shortage; who borrows and does
 * not move asks vx_pool_shortage_since whether somebody waits for it.
 */
#ifndef VX_POOL_H
#define VX_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "core/clock.h"

typedef struct vx_pool vx_pool;
typedef struct vx_job vx_job;

struct vx_job {
    void (*run)(vx_job *job);
    vx_job *next;
    vx_timer timer; /* of a timed job */
    vx_pool *pool;
};

vx_pool *vx_pool_create(uint32_t threads, uint64_t byte_limit); /* NULL: no memory or thread */
/* Runs what is queued (timed jobs at once), stops the threads and frees the pool. */
void vx_pool_destroy(vx_pool *pool);
void vx_pool_push(vx_pool *pool, vx_job *job);
void vx_pool_push_at(vx_pool *pool, vx_job *job, uint64_t when_ns);
/* A job that waits for its time, or is about to run, or runs: now, if it waits. */
void vx_pool_hasten(vx_pool *pool, vx_job *job);
bool vx_pool_charge(vx_pool *pool, uint64_t bytes, bool held_up);
void vx_pool_discharge(vx_pool *pool, uint64_t bytes);
uint64_t vx_pool_charged(vx_pool *pool);
/* Somebody waits for bytes at `now_ns` (CLOCK_MONOTONIC); it says so again at least each second. */
void vx_pool_note_shortage(vx_pool *pool, uint64_t now_ns);
/* Since when somebody has been waiting without a break; 0: nobody. */
uint64_t vx_pool_shortage_since(vx_pool *pool, uint64_t now_ns);
vx_clock *vx_pool_clock(vx_pool *pool); /* real; lives as long as the pool */

#endif
