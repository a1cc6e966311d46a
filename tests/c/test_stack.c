/* SPDX-License-Identifier: MIT
 *
 * Maps over maps and several leaves: what is parked, shared, failed and delayed on the way down.
 */
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "core/fan.h"
#include "core/ranges.h"
#include "core/run.h"
#include "leaf/callback.h"
#include "leaf/file.h"
#include "leaf/memory.h"
#include "map/map.h"
#include "qos/schedule.h"
#include "sim/delay.h"
#include "sim/injector.h"

#define PAGE 4096u
#define PAGES 64u
#define UPPER 1u
#define LOWER 2u

static vx_device *upper, *lower;
static _Atomic int lower_code; /* of the lower map's commits */
static _Atomic uint64_t commit_ns, next_place[3];
static _Atomic uint32_t commits[3];
static _Atomic uint64_t committed_at; /* vx_fault.time of the last commit of the upper map */

/* Both maps store page after page on their lower device 0; commits take commit_ns. */
static int handler(uint64_t identity, vx_fault *fault)
{
    vx_device *map = identity == UPPER ? upper : lower;
    uint64_t hole = vx_entry(VX_HOLE, 0, 0, 0), place;
    switch (fault->kind) {
    case VX_FAULT_LOAD:
        for (uint64_t i = 0; i < fault->count; i++)
            vx_map_install(map, fault->first + i, 1, &hole);
        return VX_OK;
    case VX_FAULT_GRANT:
        place = atomic_fetch_add(&next_place[identity], PAGE);
        return vx_map_grant(map, 0, 1, &place, 6, VX_GRANT_FRESH);
    case VX_FAULT_COMMIT: {
        struct timespec pause = {.tv_nsec = (long)commit_ns};
        atomic_fetch_add(&commits[identity], 1);
        if (identity == UPPER)
            atomic_store(&committed_at, fault->time.ns);
        if (commit_ns != 0)
            nanosleep(&pause, NULL);
        return identity == LOWER ? lower_code : VX_OK;
    }
    default:
        return VX_OK;
    }
}

static const vx_upcalls upcalls = {.fault = handler};

static vx_device *map_over(vx_device *below, uint32_t identity, vx_pool *pool)
{
    vx_device *map = vx_map_create(PAGES * PAGE, PAGES * PAGE, 12, 1, 0, pool, identity, &upcalls);
    CHECK(map != NULL);
    CHECK_EQ(vx_map_set_lower(map, 0, below), 0);
    return map;
}

static void reset(void)
{
    lower_code = VX_OK;
    commit_ns = committed_at = 0;
    memset((void *)next_place, 0, sizeof next_place);
    memset((void *)commits, 0, sizeof commits);
}

static int transfer(vx_device *device, uint32_t operation, uint32_t flags, uint64_t length,
                    uint64_t offset)
{
    static uint8_t data[PAGE];
    vx_failure failure;
    return vx_transfer(device, operation, flags, data, length, offset, &failure);
}

/* F1: a request on a caller's stack is not parked by a device below. */
static void nothing_on_a_stack_is_parked(void)
{
    reset();
    vx_pool *pool = vx_pool_create(2, 1 << 20, 1);
    vx_clock *clock = vx_clock_create(false);
    vx_device *leaf = vx_memory_create(PAGES * PAGE, PAGES * PAGE, 9);
    vx_scheduler *scheduler = vx_scheduler_create(clock, pool, 8192, 1, NULL);
    vx_share *share = vx_share_create(scheduler);
    vx_device *slow = vx_schedule_create(leaf, share, 8);
    upper = map_over(slow, UPPER, NULL);
    CHECK_EQ(transfer(upper, VX_WRITE, 0, PAGE, 0), 0);
    static uint8_t buffer[PAGE];
    for (uint32_t i = 0; i < 100; i++) {
        vx_request request;
        memset(&request, 0, sizeof request);
        request.operation = i % 2 ? VX_READ : VX_WRITE;
        request.flags = VX_NOWAIT | VX_MAY_PARK;
        request.buffer = buffer;
        request.length = sizeof buffer;
        CHECK_NE(vx_submit(upper, &request), VX_PARKED);
    }
    vx_device_release(upper);
    vx_device_release(slow);
    vx_scheduler_stop(scheduler);
    vx_scheduler_release(scheduler);
    vx_device_release(leaf);
    vx_clock_stop(clock);
    vx_clock_destroy(clock);
    vx_pool_destroy(pool);
}

typedef struct flusher {
    pthread_t thread;
    vx_device *device;
    uint64_t offset;
    uint32_t flushes;
    int code;
} flusher;

static void *write_and_flush(void *argument)
{
    flusher *self = argument;
    for (uint32_t i = 0; i < self->flushes && self->code == 0; i++) {
        self->code = transfer(self->device, VX_WRITE, 0, 512, self->offset);
        if (self->code == 0)
            self->code = transfer(self->device, VX_FLUSH, 0, 0, 0);
    }
    return NULL;
}

static void run_flushers(flusher *all, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        pthread_create(&all[i].thread, NULL, write_and_flush, &all[i]);
    for (uint32_t i = 0; i < count; i++) {
        pthread_join(all[i].thread, NULL);
        CHECK_EQ(all[i].code, 0);
    }
}

/* F2: many maps flush through one; each level has its pool. */
static void stacked_rounds_do_not_stand_still(void)
{
    enum { MAPS = 6, THREADS = 12 };
    static vx_device *maps[MAPS];
    reset();
    vx_pool *below = vx_pool_create(2, 1 << 20, 1), *above = vx_pool_create(2, 1 << 20, 2);
    vx_device *leaf = vx_memory_create(PAGES * PAGE, PAGES * PAGE, 9);
    lower = map_over(leaf, LOWER, below);
    flusher all[THREADS];
    for (uint32_t i = 0; i < MAPS; i++)
        maps[i] = map_over(lower, UPPER, above);
    uint64_t data = vx_entry(VX_DATA, 0, 0, 0);
    for (uint32_t i = 0; i < MAPS; i++)
        for (uint64_t page = 0; page < PAGES; page++)
            CHECK_EQ(vx_map_install(maps[i], page, 1, &data), 0);
    for (uint32_t i = 0; i < THREADS; i++)
        all[i] = (flusher){.device = maps[i % MAPS], .offset = i * 512, .flushes = 300};
    commit_ns = 1000;
    run_flushers(all, THREADS);
    for (uint32_t i = 0; i < MAPS; i++)
        vx_device_release(maps[i]);
    vx_device_release(lower);
    vx_device_release(leaf);
    vx_pool_destroy(above);
    vx_pool_destroy(below);
}

/* F3: a lower device without space fails the flush; it poisons nothing, and the next flush succeeds. */
static void a_lower_device_without_space_poisons_nothing(void)
{
    reset();
    vx_device *leaf = vx_memory_create(PAGES * PAGE, PAGES * PAGE, 9);
    lower = map_over(leaf, LOWER, NULL);
    upper = map_over(lower, UPPER, NULL);
    CHECK_EQ(transfer(upper, VX_WRITE, 0, PAGE, 0), 0);
    lower_code = VX_E_NOSPACE;
    CHECK_EQ(transfer(upper, VX_FLUSH, 0, 0, 0), VX_E_NOSPACE);
    CHECK_EQ(vx_device_state(upper), 0);
    CHECK_EQ(vx_device_state(lower), 0);
    CHECK_EQ(commits[UPPER], 0);
    lower_code = VX_OK;
    CHECK_EQ(transfer(upper, VX_FLUSH, 0, 0, 0), 0);
    CHECK_EQ(commits[UPPER], 1);
    lower_code = VX_E_IO; /* any other failure does */
    CHECK_EQ(transfer(upper, VX_WRITE, 0, PAGE, PAGE), 0);
    CHECK_EQ(transfer(upper, VX_FLUSH, 0, 0, 0), VX_E_IO);
    CHECK_EQ(vx_device_state(upper), VX_E_POISONED);
    vx_device_release(upper);
    vx_device_release(lower);
    vx_device_release(leaf);
}

static void *write_with_fua(void *argument)
{
    *(int *)argument = transfer(upper, VX_WRITE, VX_FUA, 512, 0);
    return NULL;
}

/* F4: a write with FUA waits for the lower map's commit outside of the upper map's epochs. */
static void a_write_with_fua_holds_no_epoch_while_the_lower_map_commits(void)
{
    pthread_t thread;
    int code;
    reset();
    vx_device *leaf = vx_memory_create(PAGES * PAGE, PAGES * PAGE, 9);
    lower = map_over(leaf, LOWER, NULL);
    upper = map_over(lower, UPPER, NULL);
    uint64_t entry = vx_entry(VX_DATA, 0, 0, 0);
    CHECK_EQ(vx_map_install(upper, 0, 1, &entry), 0);
    commit_ns = 500000000;
    pthread_create(&thread, NULL, write_with_fua, &code);
    while (commits[LOWER] == 0)
        usleep(1000);
    uint64_t began = vx_now_ns();
    vx_map_quiesce(upper);
    CHECK_LT(vx_now_ns() - began, 200000000);
    pthread_join(thread, NULL);
    CHECK_EQ(code, 0);
    CHECK_EQ(commits[LOWER], 1);
    vx_device_release(upper);
    vx_device_release(lower);
    vx_device_release(leaf);
}

/* F5: flushes of a file that was not changed cost nothing; those that wait share a barrier. */
static void a_clean_file_makes_no_barrier(void)
{
    char name[] = "/tmp/vhdx-test-XXXXXX";
    int fd = mkstemp(name);
    CHECK_GE(fd, 0);
    unlink(name);
    CHECK_EQ(ftruncate(fd, 1 << 20), 0);
    vx_device *file = vx_file_create(fd, 1 << 20, VX_FILE_SPARSE, 9);
    CHECK_EQ(transfer(file, VX_FLUSH, 0, 0, 0), 0); /* what it held before is made durable, too */
    CHECK_EQ(vx_file_barriers(file), 1);
    CHECK_EQ(transfer(file, VX_FLUSH, 0, 0, 0), 0);
    CHECK_EQ(vx_file_barriers(file), 1);
    uint64_t expected = 1;
    uint32_t changes[] = {VX_WRITE, VX_ZERO, VX_TRIM};
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(transfer(file, changes[i], 0, PAGE, 0), 0);
        CHECK_EQ(transfer(file, VX_READ, 0, PAGE, 0), 0);
        CHECK_EQ(transfer(file, VX_FLUSH, 0, 0, 0), 0);
        CHECK_EQ(transfer(file, VX_FLUSH, 0, 0, 0), 0);
        CHECK_EQ(vx_file_barriers(file), ++expected);
    }
    CHECK_EQ(vx_device_resize(file, 2 << 20), 0);
    CHECK_EQ(transfer(file, VX_FLUSH, 0, 0, 0), 0);
    CHECK_EQ(vx_file_barriers(file), ++expected);
    CHECK_EQ(transfer(file, VX_WRITE, VX_FUA, 512, 0), 0); /* a barrier of its own, for nobody else */
    CHECK_EQ(vx_file_barriers(file), ++expected);
    CHECK_EQ(transfer(file, VX_WRITE, 0, 512, 512), 0);
    CHECK_EQ(transfer(file, VX_WRITE, VX_FUA, 512, 0), 0);
    CHECK_EQ(transfer(file, VX_FLUSH, 0, 0, 0), 0);
    CHECK_EQ(vx_file_barriers(file), expected + 2);
    flusher all[8];
    for (uint32_t i = 0; i < 8; i++)
        all[i] = (flusher){.device = file, .offset = i * 512, .flushes = 200};
    uint64_t before = vx_file_barriers(file);
    run_flushers(all, 8);
    CHECK_LE(vx_file_barriers(file) - before, 1600);
    vx_device_release(file);
}

/* F6: what a flush takes below a map is handed up and begins what follows; nobody sleeps. */
static void time_is_handed_up(void)
{
    reset();
    vx_clock *clock = vx_clock_create(true);
    vx_model *model = vx_model_create(VX_MODEL_HDD, 1 << 30, true);
    vx_device *leaf = vx_memory_create(PAGES * PAGE, PAGES * PAGE, 9);
    vx_device *disk = vx_delay_create(leaf, model, clock, 0, 8);
    uint64_t hour = 3600000000000u;
    vx_clock_advance(clock, 10 * hour + 2 * vx_now_ns()); /* a sleep until then would never end */
    upper = map_over(disk, UPPER, NULL);
    uint64_t now = vx_clock_now(clock);
    static uint8_t data[PAGE];
    vx_failure failure;
    vx_time time = {now, true};
    CHECK_EQ(vx_transfer_at(upper, VX_WRITE, 0, data, PAGE, 0, &time, &failure), 0);
    uint64_t written = time.ns;
    CHECK_GT(written, now);
    CHECK_EQ(vx_transfer_at(upper, VX_FLUSH, 0, NULL, 0, 0, &time, &failure), 0);
    CHECK_GT(committed_at, written); /* the commit began when the data were durable */
    CHECK_GE(time.ns, committed_at);
    CHECK(time.is_virtual);
    vx_time later = {time.ns + hour, true};
    CHECK_EQ(vx_transfer_at(upper, VX_READ, 0, data, 512, 0, &later, &failure), 0);
    CHECK_GT(later.ns, time.ns + hour);
    CHECK_EQ(transfer(upper, VX_FLUSH, 0, 0, 0), 0); /* no sleep until a virtual time */
    vx_device_release(upper);
    vx_device_release(disk);
    vx_device_release(leaf);
    vx_model_destroy(model);
    vx_clock_stop(clock);
    vx_clock_destroy(clock);
}

/* ORDER reaches a single lower device, and never one of several. */
static _Atomic uint32_t flags_seen, flushes_seen;

static int see(uint64_t identity, vx_request *request)
{
    CHECK_EQ(identity, 5);
    if (request->operation == VX_FLUSH) {
        flags_seen = request->flags;
        flushes_seen++;
    }
    return VX_OK;
}

static void order_is_passed_to_a_single_device(void)
{
    static const vx_upcalls seeing = {.perform = see};
    reset();
    vx_device *leaf = vx_callback_create(PAGES * PAGE, false, 5, &seeing);
    vx_device *other = vx_memory_create(PAGES * PAGE, PAGES * PAGE, 9);
    uint64_t entry = vx_entry(VX_DATA, 0, 0, 0);
    for (uint32_t lowers = 1; lowers <= 2; lowers++) {
        upper = vx_map_create(PAGES * PAGE, PAGES * PAGE, 12, 2, VX_MAP_COMMITS_BELOW, NULL, UPPER,
                              &upcalls);
        CHECK_EQ(vx_map_set_lower(upper, 0, leaf), 0);
        if (lowers == 2)
            CHECK_EQ(vx_map_set_lower(upper, 1, other), 0);
        CHECK_EQ(vx_map_install(upper, 0, 1, &entry), 0);
        CHECK_EQ(transfer(upper, VX_FLUSH, 0, 0, 0), 0);
        CHECK_EQ(flags_seen & VX_ORDER, 0);
        CHECK_EQ(transfer(upper, VX_FLUSH, VX_ORDER, 0, 0), 0);
        CHECK_EQ(flags_seen & VX_ORDER, lowers == 1 ? VX_ORDER : 0);
        CHECK_EQ(transfer(upper, VX_WRITE, 0, 512, PAGE), 0);
        CHECK_EQ(transfer(upper, VX_FLUSH, 0, 0, 0), 0); /* a commit follows, with its own barrier */
        CHECK_EQ(flags_seen & VX_ORDER, lowers == 1 ? VX_ORDER : 0);
        vx_device_release(upper);
    }
    CHECK_EQ(flushes_seen, 6);
    vx_device_release(leaf);
    vx_device_release(other);
}

/* A fan ends although no thread of its pool is free, and says the first failure and the last delay. */
static void block(vx_job *job)
{
    (void)job;
    usleep(300000);
}

static void a_fan_needs_no_free_thread(void)
{
    vx_pool *pool = vx_pool_create(1, 1 << 20, 1);
    vx_job busy = {.run = block};
    vx_device *leaves[4];
    vx_request parent;
    memset(&parent, 0, sizeof parent);
    parent.operation = VX_WRITE;
    vx_pool_push(pool, &busy);
    vx_fan *fan = vx_fan_begin(4);
    static uint8_t data[512] = {7};
    for (uint32_t i = 0; i < 4; i++) {
        vx_device *memory = vx_memory_create(PAGE, PAGE, i);
        leaves[i] = vx_injector_create(memory, pool, 10 + i);
        vx_device_release(memory);
        CHECK(vx_fan_add(fan, &parent, leaves[i], VX_WRITE, 0, sizeof data, data) != NULL);
    }
    CHECK(vx_fan_add(fan, &parent, leaves[0], VX_WRITE, 0, 512, data) == NULL);
    vx_injector_set(leaves[1], &(vx_injector_settings){.fail_mask = 2, .fail_code = VX_E_NOSPACE});
    vx_injector_set(leaves[2], &(vx_injector_settings){.fail_mask = 2, .fail_code = VX_E_IO});
    vx_injector_set(leaves[3], &(vx_injector_settings){.delay_mask = 2, .delay_ns = 1000000000});
    uint64_t began = vx_now_ns();
    vx_fan_run(fan, pool, 3);
    CHECK_LT(vx_now_ns() - began, 200000000);
    vx_fan_adopt(fan, &parent);
    CHECK_EQ(parent.result, VX_E_NOSPACE);
    CHECK_EQ(parent.failure.device, 11);
    CHECK_GE(parent.not_before_ns, began + 1000000000);
    CHECK(!vx_fan_lacks_only_space(fan));
    vx_fan_end(fan);
    vx_pool_destroy(pool); /* the helpers run now, and find nothing */
    for (uint32_t i = 0; i < 4; i++)
        vx_device_release(leaves[i]);
}

static void ranges_exclude_writers(void)
{
    vx_ranges *ranges = vx_ranges_create();
    CHECK(vx_ranges_enter(ranges, &(vx_span){5, 3}, 1, false, false));
    CHECK(vx_ranges_enter(ranges, &(vx_span){6, 1}, 1, false, true));
    CHECK(!vx_ranges_enter(ranges, &(vx_span){7, 1}, 1, true, true));
    CHECK(!vx_ranges_is_busy(ranges, 7));
    vx_ranges_leave(ranges, &(vx_span){6, 1}, 1, false);
    vx_ranges_leave(ranges, &(vx_span){5, 3}, 1, false);
    CHECK(vx_ranges_enter(ranges, &(vx_span){7, 1}, 1, true, true));
    CHECK(vx_ranges_is_busy(ranges, 7));
    CHECK(!vx_ranges_enter(ranges, &(vx_span){0, 1 << 20}, 1, false, true)); /* all buckets */
    CHECK(!vx_ranges_enter(ranges, &(vx_span){7, 1}, 1, false, true));
    vx_ranges_leave(ranges, &(vx_span){7, 1}, 1, true);
    CHECK(vx_ranges_enter(ranges, &(vx_span){0, UINT64_MAX}, 1, true, true));
    CHECK(!vx_ranges_enter(ranges, &(vx_span){12345, 1}, 1, false, true));
    vx_ranges_leave(ranges, &(vx_span){0, UINT64_MAX}, 1, true);
    CHECK(vx_ranges_enter(ranges, &(vx_span){12345, 1}, 1, true, true));
    vx_ranges_leave(ranges, &(vx_span){12345, 1}, 1, true);
    vx_ranges_destroy(ranges);
}

int main(void)
{
    RUN(nothing_on_a_stack_is_parked);
    RUN(stacked_rounds_do_not_stand_still);
    RUN(a_lower_device_without_space_poisons_nothing);
    RUN(a_write_with_fua_holds_no_epoch_while_the_lower_map_commits);
    RUN(a_clean_file_makes_no_barrier);
    RUN(time_is_handed_up);
    RUN(order_is_passed_to_a_single_device);
    RUN(a_fan_needs_no_free_thread);
    RUN(ranges_exclude_writers);
    return CHECK_REPORT();
}
