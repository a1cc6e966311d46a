/* SPDX-License-Identifier: MIT
 *
 * Runs movers, writers, faults, flushes and a close on one map over memory, and checks contents all
 * the time. With a mutation (build with -DVX_MUTATE) it must fail with exit status 1.
 * Usage: stress_map SECONDS [MUTATION]
 */
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "map/map_internal.h"
#include "leaf/memory.h"
#include "core/run.h"

#define PAGE_SHIFT 13u
#define PAGE (1u << PAGE_SHIFT)
#define SECTOR 512u
#define SECTORS (PAGE / SECTOR)
#define PAGES 48u
#define WRITERS 4u
#define SLOTS 4096u

static vx_device *map, *leaf;
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static uint64_t free_slots[SLOTS];
static uint64_t free_count;
static uint64_t durable[PAGES];     /* entries that the last commit made durable */
static _Atomic bool stop;
static _Atomic uint64_t moves, copies;

/* ---- a leaf that yields at random before and after each request ---- */

typedef struct jitter {
    vx_device device;
    vx_device *lower;
} jitter;

static _Thread_local uint64_t seed = 88172645463325252u;

static uint64_t random_number(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void dither(void)
{
    uint64_t r = random_number() % 16;
    if (r < 4)
        sched_yield();
    else if (r == 4)
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
}

static int jitter_submit(vx_device *device, vx_request *request)
{
    dither();
    int answer = vx_submit(((jitter *)device)->lower, request);
    dither();
    return answer;
}

static void jitter_destroy(vx_device *device)
{
    vx_device_release(((jitter *)device)->lower);
    free(device);
}

static const vx_operations jitter_operations = {
    .kind = "jitter", .submit = jitter_submit, .destroy = jitter_destroy};

/* ---- the owner of the map, which is Python in production ---- */

static int answer_grant(void)
{
    uint64_t offsets[8], n = 0;
    pthread_mutex_lock(&owner);
    while (n < 8 && free_count > 0)
        offsets[n++] = free_slots[--free_count];
    pthread_mutex_unlock(&owner);
    if (n == 0)
        return VX_E_NOSPACE;
    /* Granted space may hold old data. About half of it is zeroed here; the map zeroes the rest. */
    for (uint64_t i = 0; i < n; i++) {
        bool stale = random_number() & 1;
        memset(vx_memory_bytes(leaf) + offsets[i], stale ? 0xEE : 0, PAGE);
        if (vx_map_grant(map, 0, 1, &offsets[i], 0, stale ? VX_GRANT_STALE : VX_GRANT_FRESH) != 0)
            return VX_E_NOMEM;
    }
    return VX_OK;
}

static int answer_commit(const vx_fault *fault)
{
    dither();
    pthread_mutex_lock(&owner);
    for (uint64_t i = 0; i < fault->count; i++)
        durable[fault->pages[i]] = fault->entries[i];
    pthread_mutex_unlock(&owner);
    return VX_OK;
}

static int fault_handler(uint64_t identity, vx_fault *fault)
{
    uint64_t hole = vx_entry(VX_HOLE, 0, 0, 0);
    (void)identity;
    switch (fault->kind) {
    case VX_FAULT_LOAD:
        for (uint64_t i = 0; i < fault->count; i++)
            CHECK_EQ(vx_map_install(map, fault->first + i, 1, &hole), 0);
        return VX_OK;
    case VX_FAULT_GRANT:
        return answer_grant();
    case VX_FAULT_COMMIT:
        return answer_commit(fault);
    default:
        return VX_E_UNSUPPORTED;
    }
}

static const vx_upcalls upcalls = {.fault = fault_handler};

static int transfer(uint32_t operation, uint8_t *buffer, uint64_t length, uint64_t offset)
{
    vx_failure failure;
    return vx_transfer(map, operation, 0, buffer, length, offset, &failure);
}

/* ---- threads ---- */

static void check_durable(uint64_t page)
{
    pthread_mutex_lock(&owner);
    enum vx_kind kind = vx_entry_kind(durable[page]);
    pthread_mutex_unlock(&owner);
    CHECK(kind == VX_DATA || kind == VX_SHARED);
}

/* Owns every sector s with s % WRITERS == its number, and knows the contents of each. */
static void *writer(void *argument)
{
    uint32_t me = (uint32_t)(uintptr_t)argument;
    uint64_t expected[PAGES][SECTORS] = {{0}};
    uint64_t buffer[SECTOR / 8], count = 0;
    seed ^= (me + 1) * 0x9E3779B97F4A7C15u;
    while (!atomic_load(&stop)) {
        uint64_t page = random_number() % PAGES;
        uint64_t sector = random_number() % (SECTORS / WRITERS) * WRITERS + me;
        uint64_t offset = page * PAGE + sector * SECTOR;
        uint64_t choice = random_number() % 8;
        if (choice < 4) {
            uint64_t value = ++count << 8 | me;
            for (uint32_t i = 0; i < SECTOR / 8; i++)
                buffer[i] = value;
            int code = transfer(VX_WRITE, (uint8_t *)buffer, SECTOR, offset);
            if (code == VX_E_CLOSED)
                break;
            CHECK_EQ(code, 0);
            expected[page][sector] = value;
            if (choice == 0) {
                code = transfer(VX_FLUSH, NULL, 0, 0);
                if (code == VX_E_CLOSED)
                    break;
                CHECK_EQ(code, 0);
                check_durable(page);
            }
        } else {
            int code = transfer(VX_READ, (uint8_t *)buffer, SECTOR, offset);
            if (code == VX_E_CLOSED)
                break;
            CHECK_EQ(code, 0);
            for (uint32_t i = 0; i < SECTOR / 8; i++)
                CHECK_EQ(buffer[i], expected[page][sector]);
        }
    }
    return NULL;
}

static void release_slot(uint64_t offset)
{
    pthread_mutex_lock(&owner);
    free_slots[free_count++] = offset;
    pthread_mutex_unlock(&owner);
}

/* Moves pages: marks a page shared, quiesces, copies it, publishes the copy, quiesces, and reuses
 * the old space. */
static void *mover(void *argument)
{
    seed ^= (uintptr_t)argument * 0xD1B54A32D192ED03u + 5;
    while (!atomic_load(&stop)) {
        uint64_t page = random_number() % PAGES, entry, to;
        uint8_t mismatched;
        vx_map_read_entries(map, page, 1, &entry);
        if (vx_entry_kind(entry) != VX_DATA)
            continue;
        pthread_mutex_lock(&owner);
        to = free_count > 16 ? free_slots[--free_count] : UINT64_MAX;
        pthread_mutex_unlock(&owner);
        if (to == UINT64_MAX)
            continue;
        uint64_t from = vx_entry_offset(entry);
        uint64_t shared = vx_entry(VX_SHARED, 0, from, 0), moved = vx_entry(VX_DATA, 0, to, 0);
        int64_t code = vx_map_replace(map, 1, &page, &entry, &shared, true, &mismatched);
        if (code == VX_E_CLOSED)
            break;
        CHECK_GE(code, 0);
        if (mismatched) {
            release_slot(to);
            continue;
        }
        if (random_number() % 4 == 0) {
            /* Leave the page shared, so that the next writer must copy it. Wait for that. */
            uint64_t now = shared;
            while (now == shared && !atomic_load(&stop)) {
                dither();
                vx_map_read_entries(map, page, 1, &now);
            }
            if (now == shared)
                break;
            atomic_fetch_add(&copies, 1);
            vx_map_quiesce(map);
            memset(vx_memory_bytes(leaf) + from, 0xDD, PAGE);
            release_slot(from);
            release_slot(to);
            continue;
        }
        memcpy(vx_memory_bytes(leaf) + to, vx_memory_bytes(leaf) + from, PAGE);
        dither();
        code = vx_map_replace(map, 1, &page, &shared, &moved, true, &mismatched);
        if (code == VX_E_CLOSED)
            break;
        CHECK_GE(code, 0);
        if (mismatched) { /* a writer has copied the page: quiesce before `from` is reused */
            vx_map_quiesce(map);
            release_slot(to);
        }
        memset(vx_memory_bytes(leaf) + from, 0xCC, PAGE);
        release_slot(from);
        atomic_fetch_add(&moves, 1);
    }
    return NULL;
}

static void *loader(void *argument)
{
    (void)argument;
    while (!atomic_load(&stop)) {
        vx_extent extents[PAGES];
        vx_failure failure;
        int64_t n = vx_list_extents(map, 0, PAGES * PAGE, extents, PAGES, &failure);
        CHECK(n == VX_E_CLOSED || n > 0);
        dither();
    }
    return NULL;
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 1;
    pthread_t threads[WRITERS + 3];
    leaf = vx_memory_create(SLOTS * (uint64_t)PAGE, SLOTS * (uint64_t)PAGE, 1);
    jitter *between = calloc(1, sizeof *between);
    CHECK(leaf != NULL);
    CHECK(between != NULL);
    vx_device_initialise(&between->device, &jitter_operations, 2, NULL, SLOTS * (uint64_t)PAGE);
    between->lower = vx_device_reference(leaf);
    vx_pool *pool = vx_pool_create(4, 1 << 20, 1);
    map = vx_map_create(PAGES * PAGE, PAGES * PAGE, PAGE_SHIFT, 1, 0, pool, 3, &upcalls);
    CHECK(map != NULL);
    CHECK_EQ(vx_map_set_lower(map, 0, &between->device), 0);
    for (uint64_t i = 0; i < SLOTS; i++)
        free_slots[free_count++] = i * PAGE;
#ifdef VX_MUTATE
    ((vx_map *)map)->mutate = argc > 2 ? (uint32_t)atoi(argv[2]) : 0;
#endif
    for (uintptr_t i = 0; i < WRITERS; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, writer, (void *)i), 0);
    CHECK_EQ(pthread_create(&threads[WRITERS], NULL, mover, (void *)1), 0);
    CHECK_EQ(pthread_create(&threads[WRITERS + 1], NULL, mover, (void *)2), 0);
    CHECK_EQ(pthread_create(&threads[WRITERS + 2], NULL, loader, NULL), 0);
    nanosleep(&(struct timespec){.tv_sec = (time_t)seconds,
                                 .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)},
              NULL);
    vx_map_close(map); /* under load */
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < WRITERS + 3; i++)
        pthread_join(threads[i], NULL);
    vx_map_statistics statistics;
    vx_map_statistics_of(map, &statistics);
    printf("moves %llu copies %llu commits %llu faults %llu\n", (unsigned long long)moves,
           (unsigned long long)copies, (unsigned long long)statistics.commits,
           (unsigned long long)statistics.faults);
    CHECK_GT(moves, 0);
    CHECK_GT(copies, 0);
    CHECK_GT(statistics.commits, 0);
    vx_device_release(map);
    vx_device_release(&between->device);
    vx_device_release(leaf);
    vx_pool_destroy(pool);
    return 0;
}
