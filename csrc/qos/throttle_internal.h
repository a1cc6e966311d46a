/* SPDX-License-Identifier: MIT
 *
 * What the files of the throttle share: limits.c has limits and their changes, throttle.c the flows
 * that pay them and wait, stall.c detects that the process was stalled. The functions want the lock of
 * the domain, where nothing else is said.
 */
#ifndef VX_THROTTLE_INTERNAL_H
#define VX_THROTTLE_INTERNAL_H

#include <pthread.h>

#include "qos/bucket.h"
#include "qos/throttle.h"

#define BUCKETS (2u * VX_LIMIT_KINDS) /* for each kind its rate, and the rate of spending credit */
#define SETS 2u

/* A timer that fires late is made up for up to this. A longer delay is a stall of the process: in that
 * time nothing may pass and no credit is saved. */
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
    flow *flows;       /* under lock: those with a request that waits */
    stall_detector *stalls;      /* detects stalls of the process while a limit saves credit */
    _Atomic uint64_t check_due; /* ticks: whoever comes later checks for a stall first; changed under lock */
};

struct vx_limits {
    vx_qos *qos;
    vx_limits *next;
    uint64_t unit;
    uint32_t waiting; /* flows with a request that waits; under the lock */
    _Atomic uint32_t active[2]; /* of reads and of writes: which buckets limit */
    vx_bucket buckets[BUCKETS];
    uint64_t saves_since[BUCKETS]; /* ticks, under the lock: an earlier stall was missed */
};

/* Of a request in a throttle. */
typedef struct VX_FRAME_TYPE throttle_frame {
    uint64_t arrived_ns; /* when it was parked */
    bool admitted;       /* it was let pass, also across a restart */
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
    uint64_t paid_bytes;    /* of the head: so much of it is paid for, or being paid */
    uint64_t piece;         /* bytes: the last part of that */
    uint32_t unpaid[SETS];  /* buckets that the piece has not paid yet */
    uint32_t paid[SETS];    /* those that it has */
    uint64_t due;           /* ticks: when the bucket that was paid last lets it pass */
    vx_limits *due_set;     /* that bucket */
    unsigned due_bucket;
    uint64_t waiting_units;
    vx_timer timer; /* set, or running, as long as something waits */
    flow *next, **link;
};

/* Arms the timer that releases the head request, or charges its next bucket, at `due` (ticks). While the
 * throttle drains it fires at once. */
static inline void throttle_retime(flow *f, uint64_t due)
{
    f->due = atomic_load(&f->draining) == HOLD ? due : 0;
    vx_clock_set(f->qos->clock, &f->timer, vx_ns_of_ticks(f->due));
}

/* stall.c. Whether a stall would fill it with credit: it saves for longer than LATE. */
static inline bool throttle_saves(const vx_bucket *bucket)
{
    return atomic_load(&bucket->rate) != 0 && atomic_load(&bucket->tolerance) > LATE;
}
stall_detector *throttle_stall_detector_create(vx_qos *qos); /* NULL: no memory */
/* Without the lock: checks regularly from now on, as long as a limit saves credit. */
void throttle_stall_detector_begin(stall_detector *p);
void throttle_stall_detector_check(stall_detector *p);
/* Before a limit is read: takes away the credit of a stall before `now`. */
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
