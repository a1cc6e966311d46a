/* SPDX-License-Identifier: MIT
 *
 * A pool of threads for work that may block. A job may have a start time.
 *
 * Levels. Devices are stacked, and a job of an upper device may wait for a job of a lower one. If both
 * were of one pool, all of its threads could wait for a job that finds no thread. So every pool has a
 * level, the higher the nearer to the client, and a job waits only for jobs of pools of lower levels.
 * Builds without NDEBUG check this and abort.
 *
 * Jobs start in the order in which they were pushed, on at most `threads` threads. One thread
 * exists from the start; the pool creates more when needed. A job pushed with a time
 * (CLOCK_MONOTONIC, nanoseconds) starts no earlier than that. A job's memory belongs to its owner,
 * who may reuse it as soon as `run` has been entered.
 *
 * The pool also counts the payload bytes that connections borrow. vx_pool_charge refuses charges
 * past the limit, so the memory of a server is bounded. A charge is always granted when nothing
 * else is charged. A throttled connection (`held_up`) may borrow only up to half of the limit, so
 * that others find room. A connection that cannot continue without more memory calls
 * vx_pool_note_shortage. A connection that borrows and makes no progress calls
 * vx_pool_shortage_since to learn whether another one waits for memory.
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

/* level: 1 to 255. NULL: no memory or thread. */
vx_pool *vx_pool_create(uint32_t threads, uint64_t byte_limit, uint32_t level);
uint8_t vx_pool_level(const vx_pool *pool);
/* Checks that this thread may wait for a job of `level`; 0: unknown. Does nothing with NDEBUG. */
void vx_pool_check_wait(uint8_t level);
/* Runs the queued jobs (timed jobs at once), stops the threads and frees the pool. */
void vx_pool_destroy(vx_pool *pool);
void vx_pool_push(vx_pool *pool, vx_job *job);
/* Pushes the job only if a thread is free for it, or can be created. */
bool vx_pool_push_if_free(vx_pool *pool, vx_job *job);
void vx_pool_push_at(vx_pool *pool, vx_job *job, uint64_t when_ns);
/* Runs a timed job now if it still waits for its time. Has no effect on a job that has started. */
void vx_pool_hasten(vx_pool *pool, vx_job *job);
bool vx_pool_charge(vx_pool *pool, uint64_t bytes, bool held_up);
void vx_pool_discharge(vx_pool *pool, uint64_t bytes);
uint64_t vx_pool_charged(vx_pool *pool);
/* Notes that the caller waits for bytes at `now_ns` (CLOCK_MONOTONIC). A caller that goes on
 * waiting calls this at least once a second. */
void vx_pool_note_shortage(vx_pool *pool, uint64_t now_ns);
/* Since when callers have been waiting without a break; 0: none waits. */
uint64_t vx_pool_shortage_since(vx_pool *pool, uint64_t now_ns);
vx_clock *vx_pool_clock(vx_pool *pool); /* real; lives as long as the pool */

#endif
