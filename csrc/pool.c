/* SPDX-License-Identifier: MIT */
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

struct vx_pool {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* a job is ready, or the pool stops */
    pthread_cond_t clock; /* the earliest timed job changed, or the pool stops */
    vx_job *head, *tail;
    uint32_t queued, idle, running, limit; /* idle: threads that wait, or were just signalled */
    pthread_t *threads;
    bool stopping;       /* timed jobs run at once */
    bool workers_ending; /* after the clock has handed over the last of them */

    vx_job **heap; /* timed jobs, earliest first; equal times in the order pushed */
    size_t heap_count, heap_capacity;
    uint64_t sequence;
    pthread_t clock_thread;
    bool clock_running;

    _Atomic uint64_t bytes;
    uint64_t byte_limit;
};

uint64_t vx_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Signals are for the threads of the language above, which knows what to do about them. */
static void block_signals(void)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
}

static void *worker(void *argument)
{
    vx_pool *pool = argument;
    block_signals();
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->head == NULL && !pool->workers_ending) {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
        vx_job *job = pool->head;
        if (job == NULL)
            break;
        pool->head = job->next;
        if (pool->head == NULL)
            pool->tail = NULL;
        pool->queued--;
        pthread_mutex_unlock(&pool->lock);
        job->run(job);
        pthread_mutex_lock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

vx_pool *vx_pool_create(uint32_t threads, uint64_t byte_limit)
{
    vx_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    pool->limit = threads == 0 ? 1 : threads;
    pool->threads = calloc(pool->limit, sizeof *pool->threads);
    if (pool->threads == NULL) {
        free(pool);
        return NULL;
    }
    pool->byte_limit = byte_limit;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&pool->clock, &attributes);
    pthread_condattr_destroy(&attributes);
    /* One thread from the start: then a push always finds somebody, whatever it holds. */
    if (pthread_create(&pool->threads[0], NULL, worker, pool) != 0) {
        free(pool->threads);
        free(pool);
        return NULL;
    }
    pool->running = 1;
    return pool;
}

static void enqueue_locked(vx_pool *pool, vx_job *job)
{
    job->next = NULL;
    if (pool->tail != NULL)
        pool->tail->next = job;
    else
        pool->head = job;
    pool->tail = job;
    pool->queued++;
    if (pool->queued > pool->idle && pool->running < pool->limit && !pool->workers_ending &&
        pthread_create(&pool->threads[pool->running], NULL, worker, pool) == 0)
        pool->running++;
    pthread_cond_signal(&pool->work);
}

void vx_pool_push(vx_pool *pool, vx_job *job)
{
    pthread_mutex_lock(&pool->lock);
    enqueue_locked(pool, job);
    pthread_mutex_unlock(&pool->lock);
}

static bool earlier(const vx_job *a, const vx_job *b)
{
    return a->when_ns != b->when_ns ? a->when_ns < b->when_ns : a->sequence < b->sequence;
}

static void heap_up(vx_pool *pool, size_t at)
{
    while (at > 0 && earlier(pool->heap[at], pool->heap[(at - 1) / 2])) {
        vx_job *swap = pool->heap[at];
        pool->heap[at] = pool->heap[(at - 1) / 2];
        pool->heap[(at - 1) / 2] = swap;
        at = (at - 1) / 2;
    }
}

static vx_job *heap_pop(vx_pool *pool)
{
    vx_job *top = pool->heap[0];
    pool->heap[0] = pool->heap[--pool->heap_count];
    for (size_t at = 0;;) {
        size_t least = at, left = 2 * at + 1, right = left + 1;
        if (left < pool->heap_count && earlier(pool->heap[left], pool->heap[least]))
            least = left;
        if (right < pool->heap_count && earlier(pool->heap[right], pool->heap[least]))
            least = right;
        if (least == at)
            return top;
        vx_job *swap = pool->heap[at];
        pool->heap[at] = pool->heap[least];
        pool->heap[least] = swap;
        at = least;
    }
}

static void *clock_worker(void *argument)
{
    vx_pool *pool = argument;
    block_signals();
    pthread_mutex_lock(&pool->lock);
    while (!pool->stopping || pool->heap_count > 0) {
        if (pool->heap_count == 0) {
            pthread_cond_wait(&pool->clock, &pool->lock);
            continue;
        }
        uint64_t when = pool->heap[0]->when_ns;
        if (pool->stopping || when <= vx_now_ns()) {
            enqueue_locked(pool, heap_pop(pool));
            continue;
        }
        struct timespec until = {.tv_sec = (time_t)(when / 1000000000u),
                                 .tv_nsec = (long)(when % 1000000000u)};
        pthread_cond_timedwait(&pool->clock, &pool->lock, &until);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static bool heap_reserve(vx_pool *pool)
{
    if (pool->heap_count < pool->heap_capacity)
        return true;
    size_t capacity = pool->heap_capacity == 0 ? 64 : 2 * pool->heap_capacity;
    vx_job **heap = realloc(pool->heap, capacity * sizeof *heap);
    if (heap == NULL)
        return false;
    pool->heap = heap;
    pool->heap_capacity = capacity;
    return true;
}

void vx_pool_push_at(vx_pool *pool, vx_job *job, uint64_t when_ns)
{
    pthread_mutex_lock(&pool->lock);
    if (!pool->clock_running && !pool->stopping)
        pool->clock_running =
            pthread_create(&pool->clock_thread, NULL, clock_worker, pool) == 0;
    if (pool->stopping || !pool->clock_running || !heap_reserve(pool)) {
        pthread_mutex_unlock(&pool->lock);
        vx_pool_push(pool, job); /* early rather than never */
        return;
    }
    job->when_ns = when_ns;
    job->sequence = pool->sequence++;
    pool->heap[pool->heap_count++] = job;
    heap_up(pool, pool->heap_count - 1);
    pthread_cond_signal(&pool->clock);
    pthread_mutex_unlock(&pool->lock);
}

void vx_pool_destroy(vx_pool *pool)
{
    if (pool == NULL)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->clock);
    pthread_mutex_unlock(&pool->lock);
    if (pool->clock_running)
        pthread_join(pool->clock_thread, NULL);
    pthread_mutex_lock(&pool->lock);
    pool->workers_ending = true;
    pthread_cond_broadcast(&pool->work);
    uint32_t running = pool->running;
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < running; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->clock);
    free(pool->threads);
    free(pool->heap);
    free(pool);
}

bool vx_pool_charge(vx_pool *pool, uint64_t bytes)
{
    uint64_t before = atomic_fetch_add(&pool->bytes, bytes);
    if (before == 0 || before + bytes <= pool->byte_limit)
        return true; /* one request always fits, or nothing would ever move */
    atomic_fetch_sub(&pool->bytes, bytes);
    return false;
}

void vx_pool_discharge(vx_pool *pool, uint64_t bytes)
{
    atomic_fetch_sub(&pool->bytes, bytes);
}

uint64_t vx_pool_charged(vx_pool *pool)
{
    return atomic_load(&pool->bytes);
}
