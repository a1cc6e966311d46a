/* SPDX-License-Identifier: MIT */
#include "core/clock.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

struct vx_clock {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* the earliest timer changed, or the clock stops */
    vx_timer **heap;        /* earliest first */
    size_t count, capacity;
    uint64_t sequence;
    uint64_t virtual_ns;
    bool is_virtual, running, stopping;
    pthread_t thread;
};

uint64_t vx_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool earlier(const vx_timer *a, const vx_timer *b)
{
    return a->when_ns != b->when_ns ? a->when_ns < b->when_ns : a->sequence < b->sequence;
}

static void place(vx_clock *clock, size_t at, vx_timer *timer)
{
    clock->heap[at] = timer;
    timer->position = at + 1;
}

static void sift_up(vx_clock *clock, size_t at)
{
    vx_timer *timer = clock->heap[at];
    for (; at > 0 && earlier(timer, clock->heap[(at - 1) / 2]); at = (at - 1) / 2)
        place(clock, at, clock->heap[(at - 1) / 2]);
    place(clock, at, timer);
}

static void sift_down(vx_clock *clock, size_t at)
{
    vx_timer *timer = clock->heap[at];
    for (;;) {
        size_t child = 2 * at + 1;
        if (child + 1 < clock->count && earlier(clock->heap[child + 1], clock->heap[child]))
            child++;
        if (child >= clock->count || !earlier(clock->heap[child], timer))
            break;
        place(clock, at, clock->heap[child]);
        at = child;
    }
    place(clock, at, timer);
}

static void take_out(vx_clock *clock, vx_timer *timer)
{
    size_t at = timer->position - 1;
    vx_timer *last = clock->heap[--clock->count];
    timer->position = 0;
    if (last == timer)
        return;
    place(clock, at, last);
    sift_up(clock, at);
    sift_down(clock, last->position - 1);
}

static void run_timers(vx_clock *clock)
{
    pthread_mutex_lock(&clock->lock);
    while (!clock->stopping || clock->count > 0) {
        if (clock->count == 0) {
            pthread_cond_wait(&clock->changed, &clock->lock);
            continue;
        }
        vx_timer *timer = clock->heap[0];
        uint64_t when = timer->when_ns;
        if (clock->stopping || when <= vx_now_ns()) {
            take_out(clock, timer);
            pthread_mutex_unlock(&clock->lock);
            timer->run(timer);
            pthread_mutex_lock(&clock->lock);
            continue;
        }
        struct timespec until = {.tv_sec = (time_t)(when / 1000000000u),
                                 .tv_nsec = (long)(when % 1000000000u)};
        pthread_cond_timedwait(&clock->changed, &clock->lock, &until);
    }
    pthread_mutex_unlock(&clock->lock);
}

static void *clock_thread(void *argument)
{
    sigset_t all; /* Python's threads handle signals */
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul);
    run_timers(argument);
    return NULL;
}

vx_clock *vx_clock_create(bool virtual_time)
{
    vx_clock *clock = calloc(1, sizeof *clock);
    if (clock == NULL)
        return NULL;
    clock->is_virtual = virtual_time;
    pthread_mutex_init(&clock->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&clock->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    return clock;
}

void vx_clock_stop(vx_clock *clock)
{
    pthread_mutex_lock(&clock->lock);
    clock->stopping = true;
    bool running = clock->running;
    pthread_cond_broadcast(&clock->changed);
    pthread_mutex_unlock(&clock->lock);
    if (running)
        pthread_join(clock->thread, NULL);
    else
        run_timers(clock);
    pthread_mutex_lock(&clock->lock);
    clock->running = false;
    pthread_mutex_unlock(&clock->lock);
}

void vx_clock_destroy(vx_clock *clock)
{
    pthread_mutex_destroy(&clock->lock);
    pthread_cond_destroy(&clock->changed);
    free(clock->heap);
    free(clock);
}

uint64_t vx_clock_now(vx_clock *clock)
{
    if (!clock->is_virtual)
        return vx_now_ns();
    pthread_mutex_lock(&clock->lock);
    uint64_t now = clock->virtual_ns;
    pthread_mutex_unlock(&clock->lock);
    return now;
}

bool vx_clock_is_virtual(const vx_clock *clock)
{
    return clock->is_virtual;
}

static bool ready(vx_clock *clock)
{
    if (clock->stopping)
        return false;
    if (!clock->is_virtual && !clock->running)
        clock->running = pthread_create(&clock->thread, NULL, clock_thread, clock) == 0;
    if (clock->count == clock->capacity) {
        size_t capacity = clock->capacity == 0 ? 64 : 2 * clock->capacity;
        vx_timer **heap = realloc(clock->heap, capacity * sizeof *heap);
        if (heap == NULL)
            return false;
        clock->heap = heap;
        clock->capacity = capacity;
    }
    return clock->is_virtual || clock->running;
}

bool vx_clock_set(vx_clock *clock, vx_timer *timer, uint64_t when_ns)
{
    pthread_mutex_lock(&clock->lock);
    bool can = timer->position != 0 || ready(clock);
    if (can) {
        timer->when_ns = when_ns;
        timer->sequence = clock->sequence++;
        if (timer->position == 0)
            place(clock, clock->count++, timer);
        sift_up(clock, timer->position - 1);
        sift_down(clock, timer->position - 1);
        if (timer->position == 1)
            pthread_cond_signal(&clock->changed);
    }
    pthread_mutex_unlock(&clock->lock);
    return can;
}

bool vx_clock_cancel(vx_clock *clock, vx_timer *timer)
{
    pthread_mutex_lock(&clock->lock);
    bool was_set = timer->position != 0;
    if (was_set)
        take_out(clock, timer);
    pthread_mutex_unlock(&clock->lock);
    return was_set;
}

void vx_clock_advance(vx_clock *clock, uint64_t until_ns)
{
    pthread_mutex_lock(&clock->lock);
    while (clock->count > 0 && clock->heap[0]->when_ns <= until_ns) {
        vx_timer *timer = clock->heap[0];
        if (timer->when_ns > clock->virtual_ns)
            clock->virtual_ns = timer->when_ns;
        take_out(clock, timer);
        pthread_mutex_unlock(&clock->lock);
        timer->run(timer);
        pthread_mutex_lock(&clock->lock);
    }
    if (until_ns > clock->virtual_ns)
        clock->virtual_ns = until_ns;
    pthread_mutex_unlock(&clock->lock);
}

void vx_clock_skip(vx_clock *clock, uint64_t until_ns)
{
    pthread_mutex_lock(&clock->lock);
    if (until_ns > clock->virtual_ns)
        clock->virtual_ns = until_ns;
    pthread_mutex_unlock(&clock->lock);
}

uint64_t vx_clock_next(vx_clock *clock)
{
    pthread_mutex_lock(&clock->lock);
    uint64_t when = clock->count > 0 ? clock->heap[0]->when_ns : UINT64_MAX;
    pthread_mutex_unlock(&clock->lock);
    return when;
}
