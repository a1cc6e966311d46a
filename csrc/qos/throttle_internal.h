/* SPDX-License-Identifier: MIT
 *
 * Shared by the files of the throttle: limits.c has the limits and their changes, throttle.c the
 * flows that pay and wait, stall.c detects that the process was stalled. Call the functions with
 * the lock of the domain held, unless their comment says otherwise.
 */
#ifndef VX_THROTTLE_INTERNAL_H
#define VX_THROTTLE_INTERNAL_H

#include <pthread.h>

#include "qos/bucket.h"
#include "qos/throttle.h"

#define BUCKETS (2u * VX_LIMIT_KINDS) /* for each kind its rate, and the rate of spending credit */
#define SETS 2u

/* Up to this delay, a late timer does not reduce the rate. A longer delay is a stall of the
 * process: its time lets nothing pass and saves no credit. */
#define LATE ((uint64_t)100000000u * VX_TICKS_PER_NS)

typedef struct flow flow;
typedef struct stall_detector stall_detector;

enum draining { HOLD = 0, PASS = 1, DROP = 2 };

struct vx_qos {
    pthread_mutex_t lock;
    vx_clock *clock;
    vx_pool *pool;
    uint64_t largest_on_clock; /* bytes */
    vx_limits *limits; /* all of them */
    flow *flows;       /* under the lock: flows with a waiting request */
    stall_detector *stalls;      /* detects stalls of the process while a limit saves credit */
    _Atomic uint64_t check_due; /* ticks: later users check for a stall first; changed under lock */
};

struct vx_limits {
    vx_qos *qos;
    vx_limits *next;
    uint64_t unit;
    uint32_t waiting; /* flows with a waiting request; under the lock */
    _Atomic uint32_t active[2]; /* masks of the buckets that limit reads, and other operations */
    vx_bucket buckets[BUCKETS];
    uint64_t saves_since[BUCKETS]; /* ticks, under the lock: stalls since then are detected */
};

/* The frame of a request in a throttle. */
typedef struct VX_FRAME_TYPE throttle_frame {
    uint64_t arrived_ns; /* when it was parked */
    bool admitted;       /* it may pass, even if it is submitted again */
} throttle_frame;
VX_DEFINE_FRAME(throttle_frame_of, throttle_frame, VX_LAYER_THROTTLE)

struct flow {
    vx_device device;
    vx_device *lower;
    vx_qos *qos;
    _Atomic(vx_limits *) sets[SETS];
    _Atomic uint32_t waiting; /* requests; changed under the lock */
    _Atomic int draining;        /* enum draining */

    /* under the lock of the domain */
    vx_request *head, *tail;
    uint64_t paid_bytes;    /* bytes of the head that are paid for, including the current piece */
    uint64_t piece;         /* bytes of the current piece */
    uint32_t unpaid[SETS];  /* mask of the buckets that the piece has not paid yet */
    uint32_t paid[SETS];    /* mask of the buckets that it has paid */
    uint64_t due;           /* ticks: when the last paid bucket lets the piece pass */
    vx_limits *due_set;     /* the set of the last paid bucket */
    unsigned due_bucket;    /* its index there */
    uint64_t waiting_units;
    vx_timer timer; /* set or running while a request waits */
    flow *next, **link;
};

/* Sets the timer that releases the head request, or charges its next bucket, at `due` (ticks).
 * While the throttle drains, the timer fires at once. */
static inline void throttle_retime(flow *f, uint64_t due)
{
    f->due = atomic_load(&f->draining) == HOLD ? due : 0;
    vx_clock_set(f->qos->clock, &f->timer, vx_ns_of_ticks(f->due));
}

/* Whether the bucket can save credit for longer than LATE, so that a stall would add credit. */
static inline bool throttle_saves(const vx_bucket *bucket)
{
    return atomic_load(&bucket->rate) != 0 && atomic_load(&bucket->tolerance) > LATE;
}
/* stall.c; call these functions without the domain's lock. */
stall_detector *throttle_stall_detector_create(vx_qos *qos); /* NULL: no memory */
/* Starts regular checks, which last as long as a limit saves credit. */
void throttle_stall_detector_begin(stall_detector *p);
void throttle_stall_detector_check(stall_detector *p);
/* Before a limit is read, without the lock: takes away the credit of a stall before `now`. */
static inline void throttle_notice(vx_qos *qos, uint64_t now)
{
    if (now > atomic_load_explicit(&qos->check_due, memory_order_relaxed))
        throttle_stall_detector_check(qos->stalls);
}
/* Locks the domain and returns the time in ticks. Every stall before that time has been detected. Use
 * no other time until the domain is unlocked: a stall may come between two reads of the clock. */
static inline uint64_t throttle_lock(vx_qos *qos)
{
    for (;;) {
        pthread_mutex_lock(&qos->lock);
        uint64_t now = vx_ticks(vx_clock_now(qos->clock));
        if (now <= atomic_load_explicit(&qos->check_due, memory_order_relaxed))
            return now;
        pthread_mutex_unlock(&qos->lock);
        throttle_stall_detector_check(qos->stalls);
    }
}
void throttle_stall_detector_end(stall_detector *p); /* the clock may be gone */

#endif
