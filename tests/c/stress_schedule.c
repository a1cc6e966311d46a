/* SPDX-License-Identifier: MIT */
/* Runs clients, changes of shares and background work at the same time, in real time. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "front/service.h"
#include "sim/delay.h"
#include "sim/load.h"
#include "leaf/memory.h"
#include "qos/schedule.h"
#include "map/switch.h"
#include "qos/throttle.h"

#define DISKS 4u
#define MIB ((uint64_t)1 << 20)

static vx_pool *pool;
static vx_scheduler *scheduler;
static vx_share *shares[DISKS + 1];
static vx_device *tops[DISKS], *paused;
static _Atomic bool stopping;

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static void *change(void *unused)
{
    uint32_t state = 1;
    vx_share_facts facts;
    vx_scheduler_facts all;
    const vx_initiator idle = {0};
    (void)unused;
    while (!atomic_load(&stopping)) {
        unsigned which = next_random(&state) % DISKS;
        uint64_t limit = next_random(&state) % 3 ? 0 : 1 + next_random(&state) % 5000;
        vx_share_set(shares[which], next_random(&state) % 2000, limit, 1 + next_random(&state) % 100);
        vx_schedule_set_share(tops[which], shares[next_random(&state) % DISKS]);
        if (next_random(&state) % 20 == 0) {
            vx_switch_pause(paused);
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
            vx_switch_resume(paused);
        }
        tops[which]->operations->drop(tops[which], &idle); /* of a client without requests */
        vx_share_read(shares[which], &facts);
        vx_scheduler_read(scheduler, &all);
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    return NULL;
}

static void *work(void *unused)
{
    (void)unused;
    while (!atomic_load(&stopping))
        vx_slot_end(vx_share_take_slot(shares[DISKS], 1 << 16));
    return NULL;
}

int main(int count, char **arguments)
{
    int seconds = count > 1 ? atoi(arguments[1]) : 2;
    pool = vx_pool_create(3, 64 * MIB, 1);
    vx_clock *clock = vx_pool_clock(pool);
    vx_model *model = vx_model_create(VX_MODEL_NVME, DISKS * MIB, true);
    vx_qos *qos = vx_qos_create(clock, pool);
    vx_limits *limits = vx_limits_create(qos, 8192);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 20000, .burst = 10}};
    vx_limits_set(limits, wanted, true);
    scheduler = vx_scheduler_create(clock, pool, 8192, 6, model);
    for (unsigned i = 0; i <= DISKS; i++)
        shares[i] = vx_share_create(scheduler);
    vx_share_set(shares[DISKS], 50, 500, 1);
    for (int round = 0; round < seconds * 2; round++) {
        vx_load *loads[DISKS];
        vx_meter *meters[DISKS];
        pthread_t threads[2];
        atomic_store(&stopping, false);
        for (unsigned i = 0; i < DISKS; i++) {
            vx_device *memory = vx_memory_create(MIB, MIB, i);
            vx_device *slow = i % 2 ? vx_delay_create(memory, model, clock, i * MIB, i)
                                    : vx_device_reference(memory);
            if (i == 2) {
                paused = vx_switch_create(slow, pool, 77);
                vx_device_release(slow);
                slow = vx_device_reference(paused);
            }
            tops[i] = vx_schedule_create(slow, shares[i], i);
            vx_device *flow = vx_throttle_create(tops[i], qos, limits, i);
            meters[i] = vx_meter_create(8192);
            vx_meter_switch(meters[i], true);
            vx_load_terms terms = {.span = MIB, .length = i == 0 ? MIB / 2 : 4096u << i, .depth = 8,
                                   .write_percent = 0, .seed = i + (unsigned)round};
            loads[i] = vx_load_create(flow, clock, pool, meters[i], &terms);
            vx_device_release(flow);
            vx_device_release(slow);
            vx_device_release(memory);
        }
        pthread_create(&threads[0], NULL, change, NULL);
        pthread_create(&threads[1], NULL, work, NULL);
        for (unsigned i = 0; i < DISKS; i++)
            vx_load_start(loads[i]);
        nanosleep(&(struct timespec){.tv_nsec = 400000000}, NULL);
        atomic_store(&stopping, true);
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        for (unsigned i = 0; i < DISKS; i++)
            vx_share_set(shares[i], 0, 0, 1); /* no request waits for a limit at the end */
        vx_load_facts facts;
        for (unsigned i = 0; i < DISKS; i++) {
            vx_load_stop(loads[i]);
            vx_load_read(loads[i], &facts);
            CHECK_GT(facts.answered, 0);
            CHECK_EQ(facts.failed, 0);
            CHECK_EQ(facts.under_way, 0);
            vx_load_destroy(loads[i]);
            vx_device_release(tops[i]);
        }
        vx_device_release(paused);
        for (unsigned i = 0; i < DISKS; i++)
            vx_meter_destroy(meters[i]);
    }
    vx_scheduler_facts found;
    vx_scheduler_read(scheduler, &found);
    CHECK_EQ(found.waiting, 0);
    CHECK_EQ(found.below, 0);
    vx_scheduler_stop(scheduler);
    CHECK(vx_share_take_slot(shares[DISKS], 1) == NULL);
    vx_scheduler_release(scheduler);
    vx_pool_destroy(pool);
    vx_qos_destroy(qos);
    vx_model_destroy(model);
    return 0;
}
