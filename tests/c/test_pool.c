/* SPDX-License-Identifier: MIT */
#include <pthread.h>
#include <time.h>

#include "check.h"
#include "sim/injector.h"
#include "leaf/memory.h"
#include "core/pool.h"
#include "core/run.h"

#define JOBS 200

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int order[JOBS], count;
static uint64_t early;

typedef struct numbered {
    vx_job job;
    int number;
    uint64_t when;
} numbered;

static void note(vx_job *job)
{
    numbered *mine = (numbered *)job;
    pthread_mutex_lock(&lock);
    if (vx_now_ns() < mine->when)
        early++;
    order[count++] = mine->number;
    pthread_mutex_unlock(&lock);
}

static void timed_jobs_run_in_time_and_order(void)
{
    static numbered jobs[JOBS];
    vx_pool *pool = vx_pool_create(1, 1000, 1);
    uint64_t now = vx_now_ns();
    for (int i = 0; i < JOBS; i++) {
        int number = i * 77 % JOBS;
        jobs[i] = (numbered){.job.run = note, .number = number,
                             .when = now + 20000000u + (uint64_t)number * 100000u};
        vx_pool_push_at(pool, &jobs[i].job, jobs[i].when);
    }
    for (int waited = 0; waited < 10000; waited++) {
        pthread_mutex_lock(&lock);
        int done = count;
        pthread_mutex_unlock(&lock);
        if (done == JOBS)
            break;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    CHECK_EQ(count, JOBS);
    CHECK_EQ(early, 0);
    for (int i = 0; i < JOBS; i++)
        CHECK_EQ(order[i], i);
    vx_pool_destroy(pool);
}

static void destroy_runs_what_waits(void)
{
    numbered job = {.job.run = note, .number = 5};
    vx_pool *pool = vx_pool_create(2, 1000, 1);
    count = 0;
    vx_pool_push_at(pool, &job.job, vx_now_ns() + 3600000000000u);
    vx_pool_destroy(pool);
    CHECK_EQ(count, 1);
    CHECK_EQ(order[0], 5);
}

static void charges_are_bounded(void)
{
    vx_pool *pool = vx_pool_create(1, 1000, 1);
    CHECK(vx_pool_charge(pool, 5000, false)); /* an empty pool accepts any charge */
    CHECK(!vx_pool_charge(pool, 1, false));
    vx_pool_discharge(pool, 5000);
    CHECK(vx_pool_charge(pool, 600, false));
    CHECK(vx_pool_charge(pool, 400, false));
    CHECK(!vx_pool_charge(pool, 1, false));
    CHECK_EQ(vx_pool_charged(pool), 1000);
    vx_pool_destroy(pool);
}

static void parked_and_delayed_requests_complete(void)
{
    uint8_t byte = 9, back = 0;
    vx_failure failure;
    vx_pool *pool = vx_pool_create(2, 1000, 1);
    vx_device *memory = vx_memory_create(4096, 4096, 1), *hold = vx_injector_create(memory, pool, 2);
    vx_injector_settings settings = {.park_mask = 1u << VX_WRITE, .park_ns = 3000000,
                                 .delay_mask = 1u << VX_READ, .delay_ns = 3000000};
    vx_injector_set(hold, &settings);
    uint64_t began = vx_now_ns();
    CHECK_EQ(vx_transfer(hold, VX_WRITE, 0, &byte, 1, 17, &failure), 0);
    CHECK_GE(vx_now_ns() - began, 3000000);
    began = vx_now_ns();
    CHECK_EQ(vx_transfer(hold, VX_READ, 0, &back, 1, 17, &failure), 0);
    CHECK_EQ(back, 9);
    CHECK_GE(vx_now_ns() - began, 3000000);
    settings = (vx_injector_settings){.fail_mask = 1u << VX_FLUSH, .fail_after = 1,
                                  .fail_code = VX_E_IO};
    vx_injector_set(hold, &settings);
    CHECK_EQ(vx_transfer(hold, VX_FLUSH, 0, NULL, 0, 0, &failure), 0);
    CHECK_EQ(vx_transfer(hold, VX_FLUSH, 0, NULL, 0, 0, &failure), VX_E_IO);
    CHECK_EQ(failure.code, VX_E_IO);
    CHECK_EQ(failure.device, 2);
    CHECK_EQ(vx_transfer(hold, VX_READ, 0, &back, 1, 0, &failure), VX_E_POISONED);
    vx_device_release(hold);
    vx_device_release(memory);
    vx_pool_destroy(pool);
}

int main(void)
{
    RUN(timed_jobs_run_in_time_and_order);
    RUN(destroy_runs_what_waits);
    RUN(charges_are_bounded);
    RUN(parked_and_delayed_requests_complete);
    return CHECK_REPORT();
}
