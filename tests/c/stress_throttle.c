/* SPDX-License-Identifier: MIT */
/* Threads read and write through three flows while limits change: all pass, none too early. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "leaf/memory.h"
#include "core/run.h"
#include "qos/throttle.h"

#define FLOWS 3u
#define THREADS 6u
#define RATE 20000u

static vx_device *flows[FLOWS];
static vx_limits *own, *group;
static _Atomic bool stopping;
static _Atomic uint64_t units;

static void *writer(void *argument)
{
    unsigned me = (unsigned)(uintptr_t)argument;
    uint8_t data[16384];
    vx_failure failure;
    memset(data, (int)me, sizeof data);
    while (!atomic_load(&stopping)) {
        uint64_t length = me % 2 ? 4096 : 16384;
        CHECK_EQ(vx_transfer(flows[me % FLOWS], me % 3 ? VX_WRITE : VX_READ, 0, data, length,
                 me * 16384, &failure), 0);
        atomic_fetch_add(&units, (length + 8191) / 8192);
    }
    return NULL;
}

static void *changer(void *argument)
{
    (void)argument;
    for (unsigned i = 0; !atomic_load(&stopping); i++) {
        vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = RATE / 2 + i % 7 * 1000, .burst = i % 5 == 0 ? RATE : i % 5}};
        int64_t levels[VX_LIMIT_KINDS];
        uint64_t waiting, cost;
        vx_limits_set(own, wanted, false);
        vx_throttle_set_group(flows[i % FLOWS], i % 2 ? group : NULL);
        vx_limits_levels(own, levels);
        vx_throttle_waiting(flows[i % FLOWS], &waiting, &cost);
        nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 3;
    vx_pool *pool = vx_pool_create(4, 1 << 24, 1);
    vx_qos *qos = vx_qos_create(vx_pool_clock(pool), pool);
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    own = vx_limits_create(qos, 8192);
    group = vx_limits_create(qos, 8192);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = RATE}};
    vx_limits_set(own, wanted, true);
    vx_limits_set(group, wanted, true);
    for (unsigned i = 0; i < FLOWS; i++)
        flows[i] = vx_throttle_create(lower, qos, own, i);
    pthread_t threads[THREADS + 1];
    uint64_t began = vx_now_ns();
    for (unsigned i = 0; i < THREADS; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, writer, (void *)(uintptr_t)i), 0);
    CHECK_EQ(pthread_create(&threads[THREADS], NULL, changer, NULL), 0);
    nanosleep(&(struct timespec){.tv_sec = (time_t)seconds}, NULL);
    atomic_store(&stopping, true);
    for (unsigned i = 0; i <= THREADS; i++)
        pthread_join(threads[i], NULL);
    double took = (double)(vx_now_ns() - began) / 1e9;
    CHECK_LE((double)atomic_load(&units), took * RATE + 200);
    CHECK_GT(atomic_load(&units), 10);
    for (unsigned i = 0; i < FLOWS; i++) {
        uint64_t waiting, cost;
        vx_throttle_waiting(flows[i], &waiting, &cost);
        CHECK_EQ(waiting, 0);
        CHECK_EQ(cost, 0);
        vx_device_release(flows[i]);
    }
    vx_device_release(lower);
    vx_pool_destroy(pool);
    vx_qos_destroy(qos);
    return 0;
}
