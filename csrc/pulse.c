/* SPDX-License-Identifier: MIT
 *
 * Buckets of limits save by the clock, which goes on while the process is suspended. As long as a
 * limit may save for longer than LATE, a timer beats; where it is late, what was saved meanwhile goes.
 */
#include <stdlib.h>

#include "throttle_internal.h"

struct pulse {
    pthread_mutex_t lock; /* taken before the lock of the domain */
    vx_qos *qos;          /* NULL: it has ended, and the timer frees this */
    bool is_set;
    uint64_t due; /* ticks */
    vx_timer timer;
};

static void stood_still(vx_limits *limits, unsigned b, uint64_t lost, uint64_t now)
{
    vx_bucket_stood_still(&limits->buckets[b], limits->seen[b], lost, now);
    for (flow *f = limits->qos->flows; f != NULL; f = f->next)
        if (f->due_set == limits && f->due_bucket == b && f->due > now)
            throttle_retime(f, f->due + lost);
}

/* Whether there is anything to look after. */
static bool look(pulse *p, uint64_t now)
{
    uint64_t lost = p->is_set && now > p->due + LATE ? now - p->due : 0;
    bool saves = false;
    for (vx_limits *limits = p->qos->limits; limits != NULL; limits = limits->next)
        for (unsigned b = 0; b < BUCKETS; b++) {
            if (!throttle_saves(&limits->buckets[b]))
                continue;
            saves = true;
            if (lost != 0)
                stood_still(limits, b, lost, now);
            limits->seen[b] = atomic_load(&limits->buckets[b].paid);
        }
    return saves;
}

static void beat(pulse *p)
{
    pthread_mutex_lock(&p->qos->lock);
    uint64_t now = vx_ticks(vx_clock_now(p->qos->clock));
    bool saves = look(p, now);
    p->due = now + LATE;
    p->is_set = saves && vx_clock_set(p->qos->clock, &p->timer, vx_ns_of_ticks(p->due));
    pthread_mutex_unlock(&p->qos->lock);
}

static void destroy(pulse *p)
{
    pthread_mutex_destroy(&p->lock);
    free(p);
}

static void on_time(vx_timer *timer)
{
    pulse *p = (pulse *)((char *)timer - offsetof(pulse, timer));
    pthread_mutex_lock(&p->lock);
    bool ended = p->qos == NULL;
    if (!ended)
        beat(p);
    pthread_mutex_unlock(&p->lock);
    if (ended)
        destroy(p);
}

pulse *throttle_pulse_create(vx_qos *qos)
{
    pulse *p = calloc(1, sizeof *p);
    if (p == NULL)
        return NULL;
    pthread_mutex_init(&p->lock, NULL);
    p->qos = qos;
    p->timer.run = on_time;
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
    bool is_set = p->is_set;
    pthread_mutex_unlock(&p->lock);
    if (!is_set)
        destroy(p);
}
