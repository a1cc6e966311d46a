/* SPDX-License-Identifier: MIT
 *
 * What the files of the throttle share: limits.c has limits and their changes, throttle.c the flows
 * that pay them and wait, pulse.c notices that the process stood still. The functions want the lock of
 * the domain, where nothing else is said.
 */
#ifndef VX_THROTTLE_INTERNAL_H
#define VX_THROTTLE_INTERNAL_H

#include <pthread.h>

#include "qos/bucket.h"
#include "qos/throttle.h"

#define BUCKETS (2u * VX_LIMIT_KINDS) /* for each kind its rate, and the rate of spending credit */
#define SETS 2u

/* Waking late is made up for up to this; beyond, the process stood still, and time that it was not
 * there for lets nothing pass and saves nothing. */
#define LATE ((uint64_t)100000000u * VX_TICKS_PER_NS)

typedef struct flow flow;
typedef struct pulse pulse;

enum hurry { HOLD = 0, PASS = 1, DROP = 2 };

struct vx_qos {
    pthread_mutex_t lock;
    vx_clock *clock;
    vx_pool *pool;
    uint64_t largest_on_clock; /* bytes */
    vx_limits *limits; /* all of them */
    flow *flows;       /* under lock: those with a request that waits */
    pulse *pulse;      /* notices that the process stood still, where a limit saves */
    _Atomic uint64_t beat_due; /* ticks: who comes later beats first, see pulse.c; changed under lock */
};

struct vx_limits {
    vx_qos *qos;
    vx_limits *next;
    uint64_t unit;
    uint32_t waiting; /* flows with a request that waits; under the lock */
    _Atomic uint32_t active[2]; /* of reads and of writes: which buckets limit */
    vx_bucket buckets[BUCKETS];
    uint64_t saves_since[BUCKETS]; /* ticks, under the lock: an earlier standstill the pulse missed */
};

struct flow {
    vx_device device;
    vx_device *lower;
    vx_qos *qos;
    _Atomic(vx_limits *) sets[SETS];
    _Atomic uint32_t waiting; /* requests; changed under the lock */
    _Atomic int hurry;        /* enum hurry */

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

/* What the head has paid for passes, or pays more, at `due`, ticks; at once where nothing is held up. */
static inline void throttle_retime(flow *f, uint64_t due)
{
    f->due = atomic_load(&f->hurry) == HOLD ? due : 0;
    vx_clock_set(f->qos->clock, &f->timer, vx_ns_of_ticks(f->due));
}

/* pulse.c. Saves more than being late is made up for, so that a standstill would fill it. */
static inline bool throttle_saves(const vx_bucket *bucket)
{
    return atomic_load(&bucket->rate) != 0 && atomic_load(&bucket->tolerance) > LATE;
}
pulse *throttle_pulse_create(vx_qos *qos); /* NULL: no memory */
/* Without the lock: beats from now on where a limit saves. */
void throttle_pulse_begin(pulse *p);
void throttle_pulse_beat(pulse *p);
/* Before a limit is looked at: takes away what a standstill before `now` saved. */
static inline void throttle_notice(vx_qos *qos, uint64_t now)
{
    if (now > atomic_load_explicit(&qos->beat_due, memory_order_relaxed))
        throttle_pulse_beat(qos->pulse);
}
/* Locks the domain. The time, ticks, before which no standstill is unnoticed; no other may be used
 * until it is unlocked, because there may be one between two looks at the clock. */
static inline uint64_t throttle_lock(vx_qos *qos)
{
    for (;;) {
        pthread_mutex_lock(&qos->lock);
        uint64_t now = vx_ticks(vx_clock_now(qos->clock));
        if (now <= atomic_load_explicit(&qos->beat_due, memory_order_relaxed))
            return now;
        pthread_mutex_unlock(&qos->lock);
        throttle_pulse_beat(qos->pulse);
    }
}
void throttle_pulse_end(pulse *p); /* the clock may be gone */

#endif
