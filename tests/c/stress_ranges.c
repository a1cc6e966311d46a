/* SPDX-License-Identifier: MIT
 *
 * Locks of ranges: threads change and read pieces that others change, and nobody sees half a change.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "check.h"
#include "core/clock.h"
#include "core/ranges.h"

#define PIECES 3000u
#define THREADS 6u

static vx_ranges *ranges;
/* Two copies of each piece that are equal whenever nobody changes them. */
static uint32_t first_copy[PIECES], second_copy[PIECES];
static _Atomic uint64_t rounds, refused;
static _Atomic bool stop;

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void *work(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument * 7919 + 1;
    while (!atomic_load(&stop)) {
        uint64_t chosen = next_random(&state);
        uint64_t count = 1 + (chosen >> 40) % (chosen % 50 == 0 ? 1500 : 4);
        uint64_t first = (chosen >> 8) % (chosen % 3 == 0 ? 8 : PIECES - count);
        bool alone = chosen & 1, nowait = (chosen & 6) == 6;
        vx_span spans[2] = {{first, count}, {PIECES - 1 - first % 64, 1}};
        uint32_t number = 1 + (chosen >> 32 & 1);
        if (!vx_ranges_enter(ranges, spans, number, alone, nowait)) {
            CHECK(nowait);
            atomic_fetch_add(&refused, 1);
            continue;
        }
        for (uint64_t i = first; i < first + count; i++) {
            CHECK_EQ(first_copy[i], second_copy[i]);
            if (alone) {
                CHECK(vx_ranges_is_busy(ranges, i));
                first_copy[i]++;
                if (chosen % 64 == 0)
                    usleep(1);
                second_copy[i]++;
            }
        }
        if (number == 2 && alone && (spans[1].first < first || spans[1].first >= first + count)) {
            CHECK_EQ(first_copy[spans[1].first], second_copy[spans[1].first]);
            first_copy[spans[1].first]++;
            second_copy[spans[1].first]++;
        }
        vx_ranges_leave(ranges, spans, number, alone);
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    int seconds = argc > 1 ? atoi(argv[1]) : 4;
    pthread_t threads[THREADS];
    ranges = vx_ranges_create();
    CHECK(ranges != NULL);
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < seconds; i++) {
        uint64_t before = atomic_load(&rounds);
        for (int tenth = 0; tenth < 100 && (tenth < 10 || atomic_load(&rounds) == before); tenth++)
            usleep(100000);
        CHECK_GT(atomic_load(&rounds), before); /* else they wait for each other */
    }
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK_GT(refused, 0);
    vx_span all = {0, UINT64_MAX};
    CHECK(vx_ranges_enter(ranges, &all, 1, true, true)); /* nothing is held any more */
    vx_ranges_leave(ranges, &all, 1, true);
    vx_ranges_destroy(ranges);
    printf("%llu rounds, %llu refused\n", (unsigned long long)rounds, (unsigned long long)refused);
    return 0;
}
