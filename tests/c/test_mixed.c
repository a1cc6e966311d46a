/* SPDX-License-Identifier: MIT
 *
 * Looks for runs of stored sectors while another thread marks each page's first sector as stored. A
 * run must end with the first sector before it is marked, and with the page once it is marked.
 */
#include <pthread.h>
#include <sched.h>

#include "check.h"
#include "map/map_internal.h"
#include "leaf/memory.h"

#define PAGE_SHIFT 12u
#define SECTOR 512u
#define PAGE (1u << PAGE_SHIFT)
#define PAGES 65536u

static vx_map *map;
static _Atomic uint64_t looking; /* the reader's page + 1 */

static void *own_first_sectors(void *argument)
{
    (void)argument;
    for (uint64_t page = 0; page < PAGES; page++) {
        while (atomic_load(&looking) <= page)
            sched_yield();
        for (volatile uint64_t delay = page % 64; delay > 0; delay--)
            ;
        atomic_fetch_or(&map->bitmaps[page]->bits[0], 1);
    }
    return NULL;
}

static void a_run_is_decided_once(void)
{
    uint64_t size = (uint64_t)PAGES * PAGE, flips = 0;
    vx_pool *pool = vx_pool_create(1, 1 << 20, 1);
    vx_device *device = vx_map_create(size, size, PAGE_SHIFT, 2, 0, pool, 4, NULL);
    vx_device *parent = vx_memory_create(size, size, 1);
    CHECK(device != NULL);
    CHECK(parent != NULL);
    CHECK_EQ(vx_map_set_lower(device, 1, parent), 0);
    CHECK_EQ(vx_map_set_parent(device, 1, 9, 7, 6), 0);
    map = (vx_map *)device;
    for (uint64_t page = 0; page < PAGES; page++)
        CHECK_EQ(vx_map_set_bitmap(device, page, &(uint8_t){0xfe}, 1), 0);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, own_first_sectors, NULL), 0);
    for (uint64_t page = 0; page < PAGES; page++) {
        bool stored = false;
        atomic_store(&looking, page + 1);
        for (uint64_t looks = 0; !stored; looks++) {
            uint64_t within = looks % SECTOR; /* also starts inside a sector */
            uint64_t end = vx_mixed_run(map, page, within, PAGE, &stored);
            CHECK_EQ(end, (stored ? PAGE : SECTOR));
            flips += stored && looks > 0;
        }
    }
    pthread_join(thread, NULL);
    CHECK_GT(flips, 0);
    CHECK_EQ(vx_map_close(device), 0);
    vx_device_release(device);
    vx_device_release(parent);
    vx_pool_destroy(pool);
}

int main(void)
{
    RUN(a_run_is_decided_once);
    return CHECK_REPORT();
}
