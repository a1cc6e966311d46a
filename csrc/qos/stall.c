/* SPDX-License-Identifier: MIT
 *
 * Detects that the process was stalled (suspended, or not scheduled). Buckets save credit by the
 * clock, which continues during a stall. While a limit can save credit for longer than LATE, a
 * timer checks every LATE / 4. If a check runs more than LATE after it was due, the process was
 * stalled. Then the credit of that time is taken away, and waiting requests are released later by
 * as much. A thread that needs a bucket while a check is overdue runs the check first, so no credit
 * from a stall is spent.
 */
#include <stdlib.h>

#include "qos/throttle_internal.h"

#define INTERVAL (LATE / 4)

struct stall_detector {
    pthread_mutex_t lock; /* taken before the lock of the domain */
    vx_qos *qos;          /* NULL: the domain has ended */
    uint32_t references;  /* one of the domain, one for each pending run of the timer */
    bool is_set;
    uint64_t due; /* ticks */
    vx_timer timer;
};

static void skip_stall(vx_limits *limits, unsigned b, uint64_t since, uint64_t now)
{
    vx_bucket_skip_stall(&limits->buckets[b], now - since, now);
    for (flow *f = limits->qos->flows; f != NULL; f = f->next)
        if (f->due_set == limits && f->due_bucket == b && f->due > since)
            throttle_retime(f, f->due + (now - since));
}

/* Takes away the credit saved during a stall; returns whether any limit saves credit. */
static bool check_limits(const stall_detector *p, uint64_t now)
{
    bool late = p->is_set && now > p->due + LATE, saves = false;
    for (vx_limits *limits = p->qos->limits; limits != NULL; limits = limits->next)
        for (unsigned b = 0; b < BUCKETS; b++)
            if (throttle_saves(&limits->buckets[b])) {
                saves = true;
                if (late)
                    skip_stall(limits, b, p->due, now);
            }
    return saves;
}

/* Checks for a stall and sets the timer for the next check. Under the detector's lock. */
static void check(stall_detector *p)
{
    vx_qos *qos = p->qos;
    pthread_mutex_lock(&qos->lock);
    uint64_t now = vx_ticks(vx_clock_now(qos->clock));
    bool saves = check_limits(p, now);
    p->due = now + INTERVAL;
    p->references -= vx_clock_cancel(qos->clock, &p->timer);
    p->is_set = saves && vx_clock_set(qos->clock, &p->timer, vx_ns_of_ticks(p->due));
    p->references += p->is_set;
    atomic_store(&qos->check_due, p->is_set ? p->due : UINT64_MAX);
    pthread_mutex_unlock(&qos->lock);
}

void throttle_stall_detector_check(stall_detector *p)
{
    pthread_mutex_lock(&p->lock);
    if (p->is_set)
        check(p);
    pthread_mutex_unlock(&p->lock);
}

/* Releases a reference and unlocks the detector; the last reference frees it. */
static void let_go(stall_detector *p)
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
    stall_detector *p = (stall_detector *)((char *)timer - offsetof(stall_detector, timer));
    pthread_mutex_lock(&p->lock);
    if (p->qos != NULL)
        check(p);
    let_go(p);
}

stall_detector *throttle_stall_detector_create(vx_qos *qos)
{
    stall_detector *p = calloc(1, sizeof *p);
    if (p == NULL)
        return NULL;
    pthread_mutex_init(&p->lock, NULL);
    p->qos = qos;
    p->references = 1;
    p->timer.run = on_time;
    atomic_init(&qos->check_due, UINT64_MAX);
    return p;
}

void throttle_stall_detector_begin(stall_detector *p)
{
    pthread_mutex_lock(&p->lock);
    if (!p->is_set)
        check(p);
    pthread_mutex_unlock(&p->lock);
}

void throttle_stall_detector_end(stall_detector *p)
{
    pthread_mutex_lock(&p->lock);
    p->qos = NULL;
    let_go(p);
}
