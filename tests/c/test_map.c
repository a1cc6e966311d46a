/* SPDX-License-Identifier: MIT
 *
 * Faults, grants and commit generations of a map, one at a time on one thread.
 */
#include <string.h>

#include "check.h"
#include "sim/injector.h"
#include "map/map.h"
#include "leaf/memory.h"
#include "core/run.h"

#define PAGE 4096u
#define PAGES 8u

static vx_device *map, *leaf;
static int grant_result, commit_result, load_result;
static uint32_t calls[5];
static uint64_t next_place, committed_entries;
static bool lazy; /* the handler returns VX_OK and does nothing */

static int handler(uint64_t identity, vx_fault *fault)
{
    uint64_t hole = vx_entry(VX_HOLE, 0, 0, 0);
    CHECK_EQ(identity, 7);
    calls[fault->kind]++;
    if (lazy)
        return VX_OK;
    switch (fault->kind) {
    case VX_FAULT_LOAD:
        for (uint64_t i = 0; load_result == 0 && i < fault->count; i++)
            vx_map_install(map, fault->first + i, 1, &hole);
        return load_result;
    case VX_FAULT_GRANT:
        if (grant_result == 0) {
            vx_map_grant(map, 0, 1, &next_place, 6, VX_GRANT_FRESH);
            next_place += PAGE;
        }
        return grant_result;
    case VX_FAULT_GATE:
        vx_map_gate(map, true);
        return VX_OK;
    case VX_FAULT_COMMIT:
        if (commit_result == 0)
            committed_entries += fault->count;
        return commit_result;
    default:
        return VX_OK;
    }
}

static const vx_upcalls upcalls = {.fault = handler};

static void set_up(uint32_t flags)
{
    memset(calls, 0, sizeof calls);
    grant_result = commit_result = load_result = 0;
    next_place = committed_entries = 0;
    lazy = false;
    leaf = vx_memory_create(PAGES * PAGE, PAGES * PAGE, 1);
    map = vx_map_create(PAGES * PAGE - 512, 1 << 20, 12, 1, flags, NULL, 7, &upcalls);
    CHECK(map != NULL);
    CHECK_EQ(vx_map_set_lower(map, 0, leaf), 0);
}

static void tear_down(void)
{
    vx_device_release(map);
    vx_device_release(leaf);
}

static int transfer(uint32_t operation, uint32_t flags, void *buffer, uint64_t length,
                    uint64_t offset)
{
    vx_failure failure;
    return vx_transfer(map, operation, flags, buffer, length, offset, &failure);
}

static void ranges(void)
{
    uint8_t byte[2] = {0};
    uint64_t size = PAGES * PAGE - 512;
    set_up(0);
    CHECK_EQ(transfer(VX_READ, 0, byte, 1, size - 1), 0);
    CHECK_EQ(transfer(VX_READ, 0, byte, 0, size), 0);
    CHECK_EQ(transfer(VX_READ, 0, byte, 1, size), VX_E_RANGE);
    CHECK_EQ(transfer(VX_READ, 0, byte, 2, UINT64_MAX), VX_E_RANGE);
    CHECK_EQ(transfer(VX_WRITE, 0, byte, UINT64_MAX, 1), VX_E_RANGE);
    CHECK_EQ(calls[VX_FAULT_GRANT], 0);
    tear_down();
}

static void allocates_once_a_page_and_commits_once(void)
{
    uint8_t data[3 * PAGE], back[3 * PAGE];
    vx_map_statistics statistics;
    set_up(VX_MAP_GATED);
    memset(data, 0x5a, sizeof data);
    CHECK_EQ(transfer(VX_WRITE, 0, data, sizeof data, 512), 0);
    CHECK_EQ(calls[VX_FAULT_GATE], 1);
    CHECK_EQ(calls[VX_FAULT_GRANT], 4);
    CHECK_EQ(transfer(VX_WRITE, 0, data, sizeof data, 512), 0);
    CHECK_EQ(calls[VX_FAULT_GRANT], 4);
    CHECK_EQ(transfer(VX_READ, 0, back, sizeof back, 512), 0);
    CHECK_EQ(memcmp(data, back, sizeof data), 0);
    CHECK_EQ(transfer(VX_READ, 0, back, 512, 0), 0);
    CHECK_EQ(back[0], 0);
    CHECK_EQ(back[511], 0);
    CHECK_EQ(transfer(VX_FLUSH, 0, NULL, 0, 0), 0);
    CHECK_EQ(calls[VX_FAULT_COMMIT], 1);
    CHECK_EQ(committed_entries, 4);
    CHECK_EQ(transfer(VX_FLUSH, 0, NULL, 0, 0), 0);
    CHECK_EQ(calls[VX_FAULT_COMMIT], 1); /* nothing is dirty: only the leaf is flushed */
    CHECK_EQ(vx_memory_barriers(leaf), 2);
    CHECK_EQ(transfer(VX_WRITE, VX_FUA, data, 512, 0), 0);
    CHECK_EQ(calls[VX_FAULT_COMMIT], 1); /* an overwrite needs no commit */
    CHECK_EQ(transfer(VX_WRITE, VX_FUA, data, 512, 5 * PAGE), 0);
    CHECK_EQ(calls[VX_FAULT_COMMIT], 2);
    vx_map_statistics_of(map, &statistics);
    CHECK_EQ(statistics.dirty_generation, statistics.committed_generation);
    tear_down();
}

static void no_space_is_no_poison(void)
{
    uint8_t data[512] = {1};
    set_up(0);
    grant_result = VX_E_NOSPACE;
    CHECK_EQ(transfer(VX_WRITE, 0, data, 512, 0), VX_E_NOSPACE);
    grant_result = 0;
    CHECK_EQ(transfer(VX_WRITE, 0, data, 512, 0), 0);
    commit_result = VX_E_NOSPACE;
    CHECK_EQ(transfer(VX_FLUSH, 0, NULL, 0, 0), VX_E_NOSPACE);
    commit_result = 0;
    CHECK_EQ(transfer(VX_FLUSH, 0, NULL, 0, 0), 0);
    CHECK_EQ(committed_entries, 1); /* the failed commit kept its entry for the next one */
    tear_down();
}

static void failed_commit_poisons(void)
{
    uint8_t data[512] = {1};
    set_up(0);
    CHECK_EQ(transfer(VX_WRITE, 0, data, 512, 0), 0);
    commit_result = VX_E_IO;
    CHECK_EQ(transfer(VX_FLUSH, 0, NULL, 0, 0), VX_E_IO);
    commit_result = 0;
    CHECK_EQ(transfer(VX_FLUSH, 0, NULL, 0, 0), VX_E_POISONED);
    CHECK_EQ(transfer(VX_READ, 0, data, 512, 0), VX_E_POISONED);
    tear_down();
}

static void handler_without_progress_fails(void)
{
    uint8_t data[512];
    set_up(0);
    lazy = true;
    CHECK_EQ(transfer(VX_READ, 0, data, 512, 0), VX_E_NO_PROGRESS);
    CHECK_EQ(calls[VX_FAULT_LOAD], 2);
    tear_down();
}

static void raising_handler_poisons(void)
{
    uint8_t data[512];
    set_up(0);
    load_result = VX_E_UPCALL;
    CHECK_EQ(transfer(VX_READ, 0, data, 512, 0), VX_E_UPCALL);
    CHECK_EQ(calls[VX_FAULT_LOAD], 1);
    CHECK_EQ(transfer(VX_READ, 0, data, 512, 0), VX_E_POISONED);
    tear_down();
}

static void dropped_chunks_ask_again(void)
{
    uint8_t data[512] = {1};
    set_up(0);
    CHECK_EQ(transfer(VX_READ, 0, data, 512, 0), 0);
    CHECK_EQ(calls[VX_FAULT_LOAD], 1);
    CHECK_EQ(vx_map_drop(map, 0, 1), 1);
    CHECK_EQ(transfer(VX_READ, 0, data, 512, 0), 0);
    CHECK_EQ(calls[VX_FAULT_LOAD], 2);
    CHECK_EQ(transfer(VX_WRITE, 0, data, 512, 0), 0);
    CHECK_EQ(vx_map_drop(map, 0, 1), 0); /* a dirty chunk stays */
    CHECK_EQ(transfer(VX_FLUSH, 0, NULL, 0, 0), 0);
    CHECK_EQ(vx_map_drop(map, 0, 1), 1);
    tear_down();
}

static void mixed_pages_choose_by_bit(void)
{
    uint8_t back[PAGE], bits[1] = {0xA5};
    vx_device *parent = vx_memory_create(PAGE - 512, PAGE, 2), *child;
    leaf = vx_memory_create(PAGE, PAGE, 1);
    memset(vx_memory_bytes(leaf), 'c', PAGE);
    memset(vx_memory_bytes(parent), 'p', PAGE - 512);
    child = vx_map_create(PAGE, PAGE, 12, 2, VX_MAP_READ_ONLY, NULL, 7, &upcalls);
    map = child;
    CHECK_EQ(vx_map_set_lower(child, 0, leaf), 0);
    CHECK_EQ(vx_map_set_lower(child, 1, parent), 0);
    CHECK_EQ(vx_map_set_parent(child, 1, 9, 7, 6), 0);
    CHECK_EQ(vx_map_set_bitmap(child, 0, bits, 1), 0);
    uint64_t entry = vx_entry(VX_MIXED, 0, 0, 7);
    CHECK_EQ(vx_map_install(child, 0, 1, &entry), 0);
    CHECK_EQ(transfer(VX_READ, 0, back, PAGE, 0), 0);
    for (uint32_t sector = 0; sector < 8; sector++)
        CHECK_EQ(back[sector * 512 + 7], (bits[0] >> sector & 1 ? 'c' : 'p'));
    bits[0] = 0; /* the map has its own copy */
    CHECK_EQ(transfer(VX_READ, 0, back, 1, 0), 0);
    CHECK_EQ(back[0], 'c');
    tear_down();
    vx_device_release(parent);
}

int main(void)
{
    RUN(ranges);
    RUN(allocates_once_a_page_and_commits_once);
    RUN(no_space_is_no_poison);
    RUN(failed_commit_poisons);
    RUN(handler_without_progress_fails);
    RUN(raising_handler_poisons);
    RUN(dropped_chunks_ask_again);
    RUN(mixed_pages_choose_by_bit);
    return CHECK_REPORT();
}
