/* SPDX-License-Identifier: MIT
 *
 * Fans of threads that share a pool with few threads: every child is run once, to its end, before the
 * run returns, and what a helper does afterwards touches nothing that is gone.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "core/fan.h"
#include "leaf/memory.h"
#include "sim/injector.h"

#define THREADS 4u
#define WIDTH 6u
#define PIECE 512u

static vx_pool *pool, *timers;
static _Atomic uint64_t rounds;
static _Atomic bool stop;

static void *work(void *argument)
{
    uint8_t kind = (uint8_t)(uintptr_t)argument;
    vx_device *memory = vx_memory_create(WIDTH * PIECE, WIDTH * PIECE, kind);
    vx_device *parking = vx_injector_create(memory, timers, kind);
    vx_injector_set(parking, &(vx_injector_settings){.park_mask = 1u << VX_WRITE, .park_ns = 1000});
    for (uint32_t round = 0; !atomic_load(&stop); round++) {
        uint32_t width = 1 + round % WIDTH;
        uint8_t data[WIDTH][PIECE]; /* of this thread: children must end before it is used again */
        vx_request parent;
        memset(&parent, 0, sizeof parent);
        vx_fan *fan = vx_fan_begin(width);
        vx_request *children[WIDTH];
        for (uint32_t i = 0; i < width; i++) {
            memset(data[i], (int)(round + i), PIECE);
            children[i] = vx_fan_add(fan, &parent, round % 4 == 0 ? parking : memory, VX_WRITE,
                                     i * PIECE, PIECE, data[i]);
            children[i]->result = 1;
        }
        vx_fan_run(fan, pool, round % 5);
        for (uint32_t i = 0; i < width; i++) {
            CHECK_EQ(children[i]->result, 0);
            CHECK_EQ(memcmp(vx_memory_bytes(memory) + i * PIECE, data[i], PIECE), 0);
        }
        memset(data, 0xee, sizeof data);
        vx_fan_end(fan);
        atomic_fetch_add(&rounds, 1);
    }
    vx_device_release(parking);
    vx_device_release(memory);
    return NULL;
}

int main(int argc, char **argv)
{
    int seconds = argc > 1 ? atoi(argv[1]) : 4;
    pthread_t threads[THREADS];
    pool = vx_pool_create(2, 1 << 20, 2);
    timers = vx_pool_create(2, 1 << 20, 1);
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < seconds; i++) {
        uint64_t before = atomic_load(&rounds);
        for (int tenth = 0; tenth < 100 && (tenth < 10 || atomic_load(&rounds) == before); tenth++)
            usleep(100000);
        CHECK_GT(atomic_load(&rounds), before); /* else a fan waits for a thread */
    }
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    vx_pool_destroy(pool);
    vx_pool_destroy(timers);
    printf("%llu rounds\n", (unsigned long long)rounds);
    return 0;
}
