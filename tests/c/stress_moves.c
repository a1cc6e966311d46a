/* SPDX-License-Identifier: MIT
 *
 * Moves pages while they are written, between lower devices that join and leave, with watched entries
 * and tracked changes; nobody may lose a write, and every place is used by one page at a time.
 */
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "core/run.h"
#include "leaf/file.h"
#include "map/map.h"

#define PAGE_SHIFT 13u
#define PAGE (1u << PAGE_SHIFT)
#define PAGES 24u
#define PART (PAGE / 64u)
#define WRITERS 3u
#define LOWERS 4u

static vx_device *map, *lowers[LOWERS];
static _Atomic bool stop;
static _Atomic uint64_t moves, given_up, left, committed, counted;

ssize_t __real_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags);

/* Some writes take long to begin, so that copies overtake them. */
ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    static _Atomic uint32_t calls;
    if (pieces->iov_len <= PART && atomic_fetch_add(&calls, 1) % 16 == 0)
        usleep(300);
    return __real_pwritev2(fd, pieces, count, offset, flags);
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static int fault(uint64_t identity, vx_fault *fault)
{
    (void)identity;
    CHECK_EQ(fault->kind, VX_FAULT_COMMIT);
    atomic_fetch_add(&committed, fault->count);
    return VX_OK;
}

static const vx_upcalls upcalls = {.fault = fault};

static int transfer(vx_device *device, uint32_t operation, void *buffer, uint64_t length,
                    uint64_t offset)
{
    vx_failure failure;
    return vx_transfer(device, operation, 0, buffer, length, offset, &failure);
}

/* A file in memory, so that the sanitizer does not see the race of a copy with a write in it. */
static vx_device *new_lower(uint32_t index)
{
    int fd = memfd_create("lower", MFD_CLOEXEC);
    CHECK_GE(fd, 0);
    CHECK_EQ(ftruncate(fd, 2 * PAGES * PAGE), 0);
    return vx_file_create(fd, 2 * PAGES * PAGE, VX_FILE_MEMORY, 100 + index);
}

/* Owns every part p with p % WRITERS == its number, and knows what each holds. */
static void *write_and_read(void *argument)
{
    uint32_t me = (uint32_t)(uintptr_t)argument;
    uint64_t state = me + 77, expected[PAGES][64] = {{0}};
    for (uint64_t value = 1; !atomic_load(&stop); value++) {
        uint64_t chosen = next_random(&state);
        uint64_t page = chosen % PAGES, part = (chosen >> 16) % 21 * WRITERS + me;
        uint64_t offset = page * PAGE + part * PART, data[PART / 8];
        if (chosen >> 32 & 1) {
            for (uint32_t i = 0; i < PART / 8; i++)
                data[i] = value;
            CHECK_EQ(transfer(map, VX_WRITE, data, PART, offset), 0);
            expected[page][part] = value;
        } else {
            CHECK_EQ(transfer(map, VX_READ, data, PART, offset), 0);
            CHECK_EQ(data[0], expected[page][part]);
            CHECK_EQ(data[PART / 8 - 1], expected[page][part]);
        }
        if (chosen % 4 == 0)
            usleep(20);
    }
    return NULL;
}

static void copy(uint64_t from, uint64_t to, uint64_t parts)
{
    uint8_t data[PART];
    for (uint64_t i = 0; i < 64; i++)
        if (parts >> i & 1) {
            CHECK_EQ(transfer(lowers[vx_entry_lower(from)], VX_READ, data, PART,
                              vx_entry_offset(from) + i * PART), 0);
            CHECK_EQ(transfer(lowers[vx_entry_lower(to)], VX_WRITE, data, PART,
                              vx_entry_offset(to) + i * PART), 0);
        }
}

static bool replace(uint64_t page, uint64_t expected, uint64_t entry, bool publish)
{
    uint8_t mismatched;
    CHECK_GE(vx_map_replace(map, 1, &page, &expected, &entry, publish, &mismatched), 0);
    return !mismatched;
}

/* Each page has two places on each lower device, and moves to the other half of another device. */
static bool move(uint64_t page, uint32_t to_lower, bool tracks)
{
    uint64_t entry;
    vx_map_read_entries(map, page, 1, &entry);
    uint64_t half = vx_entry_offset(entry) >= PAGES * PAGE ? 0 : PAGES * PAGE;
    uint64_t to = vx_entry(VX_DATA, to_lower, half + page * PAGE, 0), parts = UINT64_MAX;
    if (tracks) {
        vx_map_track(map, page);
        for (uint32_t round = 0; round < 4 && parts != 0; round++) {
            copy(entry, to, parts);
            parts = vx_map_take_changes(map);
        }
    }
    bool moved = replace(page, entry, entry | VX_ENTRY_WATCHED, false);
    if (tracks) {
        parts |= vx_map_take_changes(map);
        vx_map_track(map, UINT64_MAX);
    }
    CHECK(moved); /* nobody else replaces entries */
    copy(entry, to, parts);
    moved = replace(page, entry | VX_ENTRY_WATCHED, to, true);
    if (!moved)
        atomic_fetch_add(&given_up, 1);
    else { /* nobody uses the old place any more */
        uint8_t garbage[PAGE];
        memset(garbage, 0xdd, sizeof garbage);
        CHECK_EQ(transfer(lowers[vx_entry_lower(entry)], VX_WRITE, garbage, PAGE,
                          vx_entry_offset(entry)), 0);
        atomic_fetch_add(&moves, 1);
    }
    return moved;
}

/* Moves everything from the device of `index` to another one, and takes it out. */
static void take_out(uint32_t index, uint64_t *state)
{
    for (uint64_t page = 0; page < PAGES && !atomic_load(&stop); page++) {
        uint64_t entry;
        vx_map_read_entries(map, page, 1, &entry);
        uint32_t other = (index + 1 + (uint32_t)(next_random(state) % (LOWERS - 1))) % LOWERS;
        while (other == index || lowers[other] == NULL)
            other = (other + 1) % LOWERS;
        if (vx_entry_lower(entry) != index)
            continue;
        CHECK_EQ(vx_map_clear_lower(map, index), VX_E_INVALID); /* an entry names it */
        while (!move(page, other, next_random(state) & 1) && !atomic_load(&stop))
            ;
    }
    if (atomic_load(&stop))
        return;
    CHECK_EQ(vx_map_clear_lower(map, index), 0);
    CHECK_EQ(vx_map_clear_lower(map, index), VX_E_INVALID);
    CHECK_EQ(atomic_load(&lowers[index]->references), 1);
    vx_device_release(lowers[index]);
    lowers[index] = NULL;
    atomic_fetch_add(&left, 1);
}

int main(int argc, char **argv)
{
    int seconds = argc > 1 ? atoi(argv[1]) : 4;
    pthread_t threads[WRITERS];
    uint64_t state = 4711;
    vx_pool *pool = vx_pool_create(2, 1 << 20, 1);
    map = vx_map_create(PAGES * PAGE, PAGES * PAGE, PAGE_SHIFT, LOWERS, 0, pool, 1, &upcalls);
    for (uint32_t i = 0; i < 2; i++) {
        lowers[i] = new_lower(i);
        CHECK_EQ(vx_map_set_lower(map, i, lowers[i]), 0);
    }
    for (uint64_t page = 0; page < PAGES; page++) {
        uint64_t entry = vx_entry(VX_DATA, page & 1, page * PAGE, 0);
        uint64_t missing = vx_entry(VX_DATA, 3, page * PAGE, 0);
        CHECK_EQ(vx_map_install(map, page, 1, &missing), VX_E_INVALID);
        CHECK_EQ(vx_map_install(map, page, 1, &entry), 0);
    }
    for (uintptr_t i = 0; i < WRITERS; i++)
        pthread_create(&threads[i], NULL, write_and_read, (void *)i);
    uint64_t end = vx_now_ns() + (uint64_t)seconds * 1000000000;
    for (uint32_t round = 0; vx_now_ns() < end; round++) {
        uint32_t index = (uint32_t)(next_random(&state) % LOWERS);
        uint32_t present = 0;
        for (uint32_t i = 0; i < LOWERS; i++)
            present += lowers[i] != NULL;
        CHECK_EQ(vx_map_count_accesses(map, round % 3 != 0), 0);
        if (lowers[index] == NULL) {
            lowers[index] = new_lower(index);
            CHECK_EQ(vx_map_set_lower(map, index, lowers[index]), 0);
            CHECK_EQ(vx_map_set_lower(map, index, lowers[index]), VX_E_INVALID);
        } else if (present > 2) {
            take_out(index, &state);
        }
        vx_accesses taken[PAGES];
        vx_map_take_accesses(map, 0, PAGES, taken);
        for (uint32_t i = 0; i < PAGES; i++)
            atomic_fetch_add(&counted, taken[i].random_reads + taken[i].random_writes);
    }
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQ(vx_map_close(map), 0);
    printf("moves %llu given up %llu left %llu counted %llu\n", (unsigned long long)moves,
           (unsigned long long)given_up, (unsigned long long)left, (unsigned long long)counted);
    CHECK_GT(moves, 0);
    CHECK_GT(given_up, 0);
    CHECK_GT(left, 0);
    CHECK_GT(counted, 0);
    CHECK_GE(committed, moves);
    vx_device_release(map);
    for (uint32_t i = 0; i < LOWERS; i++)
        vx_device_release(lowers[i]);
    vx_pool_destroy(pool);
    return 0;
}
