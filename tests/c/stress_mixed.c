/* SPDX-License-Identifier: MIT
 *
 * Runs writers of pieces smaller than a sector, flushes and a trimmer on a map whose pages are at
 * first the parent's. A read must return the written data, the parent's data, or zeros after a
 * trim. A commit must refer only to sectors that are durable. With a mutation (build with
 * -DVX_MUTATE) it must fail with exit status 1.
 * Usage: stress_mixed SECONDS [MUTATION]
 */
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "map/map_internal.h"
#include "leaf/memory.h"
#include "core/run.h"

#define PAGE_SHIFT 12u
#define PAGE (1u << PAGE_SHIFT)
#define SECTOR 512u
#define PIECE 64u
#define PAGES 16384u
#define WINDOW 8u      /* pages that are written at a time; the window moves */
#define RECENT 1024u   /* the latest places granted, which include those of the window's pages */
#define WRITERS 4u
#define SIZE ((uint64_t)PAGES * PAGE)
#define SLOTS (2u * PAGES + 64u)
#define SPACE ((uint64_t)SLOTS * PAGE)
#define UNWRITTEN 0xEEu

static vx_device *map, *leaf, *parent;
static _Atomic bool stop;
static _Atomic uint64_t base, granted, barriers, bits_seen, trims;
static uint8_t *durable; /* the leaf as the last barrier found it */
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local uint64_t seed = 88172645463325252u;

static uint64_t random_number(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static uint8_t of_parent(uint64_t at)
{
    return (uint8_t)(at % 97 + 1); /* below 0x80; writers write values from 0x80 on */
}

/* A leaf that yields at random. Its barrier saves the data written before the barrier began. */
typedef struct jitter {
    vx_device device;
    vx_device *lower;
} jitter;

static void dither(void)
{
    if (random_number() % 4 == 0)
        sched_yield();
}

static int jitter_submit(vx_device *device, vx_request *request)
{
    dither();
    if (request->operation == VX_FLUSH) {
        uint64_t used = atomic_load(&granted), from = used > RECENT ? used - RECENT : 0;
        pthread_mutex_lock(&owner);
#ifndef __SANITIZE_THREAD__ /* like on a disk, this copy races with writes */
        memcpy(durable + from * PAGE, vx_memory_bytes(leaf) + from * PAGE, (used - from) * PAGE);
#else
        memset(durable + from * PAGE, 0, (used - from) * PAGE);
#endif
        atomic_fetch_add(&barriers, 1);
        pthread_mutex_unlock(&owner);
        dither();
        return vx_succeed(request);
    }
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

static void check_durable_bits(const vx_fault *fault)
{
    for (uint64_t i = 0; i < fault->bitmap_count; i++) {
        uint64_t page = fault->bitmap_pages[i], entry;
        vx_map_read_entries(map, page, 1, &entry);
        if (vx_entry_kind(entry) != VX_MIXED && vx_entry_kind(entry) != VX_DATA)
            continue;
        for (uint32_t s = 0; s < PAGE / SECTOR && vx_entry_kind(entry) == VX_MIXED; s++) {
            if (!(fault->bitmap_bits[i * fault->bitmap_bytes + s / 8] >> s % 8 & 1))
                continue;
            atomic_fetch_add(&bits_seen, 1);
            for (uint32_t b = 0; b < SECTOR; b++)
                CHECK_NE(durable[vx_entry_offset(entry) + s * SECTOR + b], UNWRITTEN);
        }
    }
}

static int fault_handler(uint64_t identity, vx_fault *fault)
{
    (void)identity;
    if (fault->kind == VX_FAULT_LOAD) {
        for (uint64_t i = 0; i < fault->count; i++) {
            uint64_t page = fault->first + i, entry = vx_entry(VX_SHARED, 1, page * PAGE, 0);
            CHECK_EQ(vx_map_install(map, page, 1, &entry), 0);
        }
    } else if (fault->kind == VX_FAULT_GRANT) {
        uint64_t offset = atomic_fetch_add(&granted, 1) * PAGE;
        if (offset >= SPACE)
            return VX_E_NOSPACE;
        CHECK_EQ(vx_map_grant(map, 0, 1, &offset, 6, VX_GRANT_STALE), 0);
    } else if (fault->kind == VX_FAULT_COMMIT) {
        check_durable_bits(fault);
    }
    return VX_OK;
}

static const vx_upcalls upcalls = {.fault = fault_handler};

static int transfer(uint32_t operation, uint8_t *buffer, uint64_t length, uint64_t offset)
{
    vx_failure failure;
    return vx_transfer(map, operation, 0, buffer, length, offset, &failure);
}

/* Owns the pieces p with p % WRITERS == its number. It expects the parent's bytes, zeros (after a
 * trim, and then never the parent's again), or the value that it wrote. */
static void *writer(void *argument)
{
    uint32_t me = (uint32_t)(uintptr_t)argument;
    static uint8_t expected[WRITERS][SIZE / PIECE]; /* 0: the parent's; 1: zero */
    uint8_t buffer[PIECE];
    seed ^= (me + 1) * 0x9E3779B97F4A7C15u;
    while (!atomic_load(&stop)) {
        uint64_t piece = random_number() % (WINDOW * PAGE / PIECE / WRITERS) * WRITERS + me +
                         atomic_load(&base) * (PAGE / PIECE);
        uint64_t offset = piece * PIECE;
        if (random_number() % 2) {
            uint8_t value = (uint8_t)(0x80u | (random_number() & 0x3f));
            memset(buffer, value, PIECE);
            if (transfer(VX_WRITE, buffer, PIECE, offset) == VX_E_NOSPACE)
                break;
            expected[me][piece] = value;
            if (random_number() % 16 == 0)
                CHECK_EQ(transfer(VX_FLUSH, NULL, 0, 0), 0);
        } else {
            CHECK_EQ(transfer(VX_READ, buffer, PIECE, offset), 0);
            for (uint32_t i = 0; i < PIECE; i++) {
                uint8_t was = expected[me][piece];
                uint8_t wanted = was == 0 ? of_parent(offset + i) : was == 1 ? 0 : was;
                CHECK(buffer[i] == wanted || buffer[i] == 0);
                CHECK(buffer[i] == buffer[0] || was == 0);
            }
            if (buffer[0] == 0)
                expected[me][piece] = 1;
        }
    }
    return NULL;
}

static void *trimmer(void *argument)
{
    (void)argument;
    while (!atomic_load(&stop) && atomic_load(&base) + WINDOW < PAGES) {
        uint64_t page = atomic_load(&base) + random_number() % WINDOW, entry;
        uint64_t hole = vx_entry(VX_HOLE, 0, 0, 3);
        uint8_t mismatched;
        vx_map_read_entries(map, page, 1, &entry);
        if (vx_entry_kind(entry) == VX_MIXED) {
            CHECK_GE(vx_map_replace(map, 1, &page, &entry, &hole, true, &mismatched), 0);
            atomic_fetch_add(&trims, !mismatched);
        }
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
        atomic_fetch_add(&base, random_number() % 2);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 1;
    pthread_t threads[WRITERS + 1];
    leaf = vx_memory_create(SPACE, SPACE, 1);
    parent = vx_memory_create(SIZE, SIZE, 2);
    durable = malloc(SPACE);
    jitter *between = calloc(1, sizeof *between);
    CHECK(leaf != NULL);
    CHECK(parent != NULL);
    CHECK(durable != NULL);
    CHECK(between != NULL);
    memset(durable, UNWRITTEN, SPACE);
    memset(vx_memory_bytes(leaf), UNWRITTEN, SPACE);
    for (uint64_t i = 0; i < SIZE; i++)
        vx_memory_bytes(parent)[i] = of_parent(i);
    vx_device_initialise(&between->device, &jitter_operations, 3, NULL, SPACE);
    between->lower = vx_device_reference(leaf);
    vx_pool *pool = vx_pool_create(2, 1 << 20, 1);
    map = vx_map_create(SIZE, SIZE, PAGE_SHIFT, 2, 0, pool, 4, &upcalls);
    CHECK(map != NULL);
    CHECK_EQ(vx_map_set_lower(map, 0, &between->device), 0);
    CHECK_EQ(vx_map_set_lower(map, 1, parent), 0);
    CHECK_EQ(vx_map_set_parent(map, 1, 9, 7, 6), 0);
#ifdef VX_MUTATE
    ((vx_map *)map)->mutate = argc > 2 ? (uint32_t)atoi(argv[2]) : 0;
#endif
    for (uintptr_t i = 0; i < WRITERS; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, writer, (void *)i), 0);
    CHECK_EQ(pthread_create(&threads[WRITERS], NULL, trimmer, NULL), 0);
    nanosleep(&(struct timespec){.tv_sec = (time_t)seconds,
                                 .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)},
              NULL);
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < WRITERS + 1; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQ(vx_map_close(map), 0);
    printf("barriers %llu bits %llu trims %llu places %llu\n", (unsigned long long)barriers,
           (unsigned long long)bits_seen, (unsigned long long)trims, (unsigned long long)granted);
    CHECK_GT(barriers, 0);
    CHECK_GT(bits_seen, 0);
    CHECK_GT(trims, 0);
    vx_device_release(map);
    vx_device_release(&between->device);
    vx_device_release(leaf);
    vx_device_release(parent);
    vx_pool_destroy(pool);
    free(durable);
    return 0;
}
