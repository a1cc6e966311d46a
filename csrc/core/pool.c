/* SPDX-License-Identifier: MIT */
#include "core/pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define SHORTAGE_GAP_NS ((uint64_t)1000000000)

struct vx_pool {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* a job is ready, or the pool stops */
    vx_job *head, *tail;
    uint32_t queued, idle, running, limit; /* idle: threads that wait, or were just signalled */
    pthread_t *threads;
    bool workers_ending; /* after the clock has handed over the last timed job */
    vx_clock *clock;
    uint8_t level;

    _Atomic uint64_t bytes;
    uint64_t byte_limit;
    _Atomic uint64_t short_since, short_last; /* of the last shortage; 0: none yet */
};

#ifndef NDEBUG
static _Thread_local uint8_t level_of_thread; /* of the pool whose worker this is; 0: of none */

static void set_level(uint8_t level)
{
    level_of_thread = level;
}

void vx_pool_check_wait(uint8_t level)
{
    if (level == 0 || level_of_thread == 0 || level < level_of_thread)
        return;
    fprintf(stderr, "a job of level %u waits for one of level %u\n", level_of_thread, level);
    abort();
}
#else
static void set_level(uint8_t level)
{
    (void)level;
}

void vx_pool_check_wait(uint8_t level)
{
    (void)level;
}
#endif

/* Python's threads handle signals. */
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
    set_level(pool->level);
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

static void free_pool(vx_pool *pool)
{
    if (pool->clock != NULL)
        vx_clock_destroy(pool->clock);
    free(pool->threads);
    free(pool);
}

uint8_t vx_pool_level(const vx_pool *pool)
{
    return pool->level;
}

vx_pool *vx_pool_create(uint32_t threads, uint64_t byte_limit, uint32_t level)
{
    if (level == 0 || level > UINT8_MAX)
        return NULL;
    vx_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    pool->limit = threads == 0 ? 1 : threads;
    pool->threads = calloc(pool->limit, sizeof *pool->threads);
    pool->clock = vx_clock_create(false);
    if (pool->threads == NULL || pool->clock == NULL) {
        free_pool(pool);
        return NULL;
    }
    pool->byte_limit = byte_limit;
    pool->level = (uint8_t)level;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    /* Start one thread now, so that every push finds a worker. */
    if (pthread_create(&pool->threads[0], NULL, worker, pool) != 0) {
        free_pool(pool);
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

bool vx_pool_push_if_free(vx_pool *pool, vx_job *job)
{
    pthread_mutex_lock(&pool->lock);
    bool is_free = pool->queued < pool->idle || pool->running < pool->limit;
    if (is_free)
        enqueue_locked(pool, job);
    pthread_mutex_unlock(&pool->lock);
    return is_free;
}

static void push_timed(vx_timer *timer)
{
    vx_job *job = (vx_job *)((char *)timer - offsetof(vx_job, timer));
    vx_pool_push(job->pool, job);
}

void vx_pool_push_at(vx_pool *pool, vx_job *job, uint64_t when_ns)
{
    job->timer = (vx_timer){.run = push_timed};
    job->pool = pool;
    if (!vx_clock_set(pool->clock, &job->timer, when_ns))
        vx_pool_push(pool, job); /* early rather than never */
}

void vx_pool_hasten(vx_pool *pool, vx_job *job)
{
    if (vx_clock_cancel(pool->clock, &job->timer))
        vx_pool_push(pool, job);
}

vx_clock *vx_pool_clock(vx_pool *pool)
{
    return pool->clock;
}

void vx_pool_destroy(vx_pool *pool)
{
    if (pool == NULL)
        return;
    vx_clock_stop(pool->clock); /* hands all timed jobs to the workers */
    pthread_mutex_lock(&pool->lock);
    pool->workers_ending = true;
    pthread_cond_broadcast(&pool->work);
    uint32_t running = pool->running;
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < running; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->work);
    free_pool(pool);
}

bool vx_pool_charge(vx_pool *pool, uint64_t bytes, bool held_up)
{
    uint64_t before = atomic_fetch_add(&pool->bytes, bytes);
    uint64_t limit = held_up ? pool->byte_limit / 2 : pool->byte_limit;
    if (before == 0 || before + bytes <= limit)
        return true; /* one charge always fits, or no request could proceed */
    atomic_fetch_sub(&pool->bytes, bytes);
    return false;
}

void vx_pool_discharge(vx_pool *pool, uint64_t bytes)
{
    atomic_fetch_sub(&pool->bytes, bytes);
}

void vx_pool_note_shortage(vx_pool *pool, uint64_t now_ns)
{
    if (vx_pool_shortage_since(pool, now_ns) == 0)
        atomic_store(&pool->short_since, now_ns);
    atomic_store(&pool->short_last, now_ns);
}

uint64_t vx_pool_shortage_since(vx_pool *pool, uint64_t now_ns)
{
    uint64_t last = atomic_load(&pool->short_last);
    bool lasts = last != 0 && (last >= now_ns || now_ns - last < SHORTAGE_GAP_NS);
    return lasts ? atomic_load(&pool->short_since) : 0;
}

uint64_t vx_pool_charged(vx_pool *pool)
{
    return atomic_load(&pool->bytes);
}
