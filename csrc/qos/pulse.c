/* SPDX-License-Identifier: MIT
 *
 * Buckets of limits save by the clock, which goes on while the process is suspended. As long as a
 * limit may save for longer than LATE, a timer beats, or whoever comes before it when it is due. Where
 * that is more than LATE after, the process stood still: before anybody looks at a bucket again, what
 * was saved meanwhile goes, and what waits comes later by as much.
 */
#include <stdlib.h>

#include "qos/throttle_internal.h"

#define INTERVAL (LATE / 4)

struct pulse {
    pthread_mutex_t lock; /* taken before the lock of the domain */
    vx_qos *qos;          /* NULL: it has ended */
    uint32_t references;  /* of the domain, and of each run of the timer that is to come */
    bool is_set;
    uint64_t due; /* ticks */
    vx_timer timer;
};

static void stood_still(vx_limits *limits, unsigned b, uint64_t since, uint64_t now)
{
    vx_bucket_stood_still(&limits->buckets[b], now - since, now);
    for (flow *f = limits->qos->flows; f != NULL; f = f->next)
        if (f->due_set == limits && f->due_bucket == b && f->due > since)
            throttle_retime(f, f->due + (now - since));
}

/* Whether there is anything to look after. */
static bool look(const pulse *p, uint64_t now)
{
    bool late = p->is_set && now > p->due + LATE, saves = false;
    for (vx_limits *limits = p->qos->limits; limits != NULL; limits = limits->next)
        for (unsigned b = 0; b < BUCKETS; b++)
            if (throttle_saves(&limits->buckets[b])) {
                saves = true;
                if (late)
                    stood_still(limits, b, p->due, now);
            }
    return saves;
}

/* Under its lock. */
static void beat(pulse *p)
{
    vx_qos *qos = p->qos;
    pthread_mutex_lock(&qos->lock);
    uint64_t now = vx_ticks(vx_clock_now(qos->clock));
    bool saves = look(p, now);
    p->due = now + INTERVAL;
    p->references -= vx_clock_cancel(qos->clock, &p->timer);
    p->is_set = saves && vx_clock_set(qos->clock, &p->timer, vx_ns_of_ticks(p->due));
    p->references += p->is_set;
    atomic_store(&qos->beat_due, p->is_set ? p->due : UINT64_MAX);
    pthread_mutex_unlock(&qos->lock);
}

void throttle_pulse_beat(pulse *p)
{
    pthread_mutex_lock(&p->lock);
    if (p->is_set)
        beat(p);
    pthread_mutex_unlock(&p->lock);
}

/* Unlocks it, with a reference fewer. */
static void let_go(pulse *p)
{
    bool last = --p->references == 0;
    pthread_mutex_unlock(&p->lock);
    if (last) {
        pthread_mutex_destroy(&p->lock);
        free(p);
    }
}

static void on_time(vx_timer *timer)
{
    pulse *p = (pulse *)((char *)timer - offsetof(pulse, timer));
    pthread_mutex_lock(&p->lock);
    if (p->qos != NULL)
        beat(p);
    let_go(p);
}

pulse *throttle_pulse_create(vx_qos *qos)
{
    pulse *p = calloc(1, sizeof *p);
    if (p == NULL)
        return NULL;
    pthread_mutex_init(&p->lock, NULL);
    p->qos = qos;
    p->references = 1;
    p->timer.run = on_time;
    atomic_init(&qos->beat_due, UINT64_MAX);
    return p;
}

void throttle_pulse_begin(pulse *p)
{
    pthread_mutex_lock(&p->lock);
    if (!p->is_set)
        beat(p);
    pthread_mutex_unlock(&p->lock);
}

void throttle_pulse_end(pulse *p)
{
    pthread_mutex_lock(&p->lock);
    p->qos = NULL;
    let_go(p);
}
