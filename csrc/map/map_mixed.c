/* SPDX-License-Identifier: MIT */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "map/map_internal.h"
#include "core/run.h"

#define LARGEST_SECTOR 4096u

static bool bit_of(const vx_bitmap *bitmap, uint64_t at)
{
    uint32_t byte = atomic_load_explicit(&bitmap->bits[at / 8], memory_order_acquire);
    return byte >> (at % 8) & 1u;
}

/* The end of the run of bits equal to `value` from sector `at` on; at most `end`. A single read
 * decides each bit, because another thread may set it at any time. */
static uint64_t run_of_bits(const vx_bitmap *bitmap, uint64_t at, uint64_t end, bool value)
{
    uint8_t whole = value ? 0xff : 0;
    while (at < end) {
        if (at % 8 == 0 && end - at >= 8 &&
            atomic_load_explicit(&bitmap->bits[at / 8], memory_order_acquire) == whole)
            at += 8;
        else if (bit_of(bitmap, at) == value)
            at++;
        else
            break;
    }
    return at;
}

uint64_t vx_mixed_run(const vx_map *map, uint64_t page, uint64_t within, uint64_t stop,
                      bool *stored)
{
    const vx_bitmap *bitmap = map->bitmaps[page];
    uint64_t sector = within >> map->sector_shift;
    uint64_t last = ((stop - 1) >> map->sector_shift) + 1;
    *stored = bit_of(bitmap, sector);
    /* The first bit is not read again: a second read could differ and give an empty run. */
    uint64_t end = run_of_bits(bitmap, sector + 1, last, *stored) << map->sector_shift;
    return end < stop ? end : stop;
}

static bool bitmaps_reserved_locked(vx_map *map)
{
    if (map->bitmaps != NULL)
        return true;
    void *memory = mmap(NULL, map->table.pages * sizeof *map->bitmaps, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    map->bitmaps = memory == MAP_FAILED ? NULL : memory;
    return map->bitmaps != NULL;
}

static vx_bitmap *new_bitmap_locked(vx_map *map, uint64_t page)
{
    uint64_t sectors = vx_page_size(map) >> map->sector_shift;
    if (!bitmaps_reserved_locked(map))
        return NULL;
    vx_bitmap *bitmap = calloc(1, sizeof *bitmap + (sectors + 7) / 8);
    if (bitmap == NULL)
        return NULL;
    bitmap->page = page;
    bitmap->sectors = sectors;
    bitmap->next = map->bitmap_list;
    map->bitmap_list = bitmap;
    map->bitmaps[page] = bitmap;
    return bitmap;
}

int vx_map_set_bitmap(vx_device *device, uint64_t page, const uint8_t *bits, uint64_t length)
{
    vx_map *map = (vx_map *)device;
    int code = VX_OK;
    if (map->sector_shift == 0 || page >= map->table.pages ||
        length < vx_page_size(map) >> map->sector_shift >> 3)
        return VX_E_INVALID;
    pthread_mutex_lock(&map->lock);
    /* An existing bitmap is newer than the one in the file. */
    if (map->bitmaps == NULL || map->bitmaps[page] == NULL) {
        vx_bitmap *bitmap = new_bitmap_locked(map, page);
        if (bitmap == NULL)
            code = VX_E_NOMEM;
        else
            for (uint64_t i = 0; i < (bitmap->sectors + 7) / 8; i++) {
                atomic_init(&bitmap->bits[i], bits[i]);
                bitmap->set += (uint64_t)__builtin_popcount(bits[i]);
            }
    }
    pthread_mutex_unlock(&map->lock);
    return code;
}

uint64_t vx_map_mix_locked(vx_map *map, uint64_t page, uint64_t fresh)
{
    vx_bitmap *bitmap = map->bitmaps == NULL ? NULL : map->bitmaps[page];
    if (bitmap == NULL)
        bitmap = new_bitmap_locked(map, page);
    else
        for (uint64_t i = 0; i < (bitmap->sectors + 7) / 8; i++)
            atomic_store(&bitmap->bits[i], 0);
    if (bitmap == NULL)
        return 0;
    bitmap->set = 0;
    vx_map_mark_dirty_locked(map, bitmap);
    return vx_entry(VX_MIXED, vx_entry_lower(fresh), vx_entry_offset(fresh), map->mixed_tag);
}

void vx_map_mark_dirty_locked(vx_map *map, vx_bitmap *bitmap)
{
    if (bitmap->dirty)
        return;
    bitmap->dirty = true;
    bitmap->next_dirty = map->dirty_bitmaps;
    map->dirty_bitmaps = bitmap;
    map->dirty_bitmap_count++;
}

/* Marks sectors as stored on this device, after their data are written. All steps are under one
 * lock, so that a flush by a thread that has seen a bit finds the generation raised and the bitmap
 * listed for the commit. */
static void own_sectors(vx_map *map, vx_bitmap *bitmap, uint64_t entry, uint64_t first,
                        uint64_t last)
{
    pthread_mutex_lock(&map->lock);
    atomic_fetch_add(&map->dirty_generation, 1);
    for (uint64_t i = first; i < last;) {
        uint64_t byte = i / 8, end = (byte + 1) * 8 < last ? (byte + 1) * 8 : last;
        uint8_t mask = (uint8_t)((0xffu << (i % 8)) & (0xffu >> ((8 - end % 8) % 8)));
        uint8_t before = atomic_fetch_or(&bitmap->bits[byte], mask);
        bitmap->set += (uint64_t)__builtin_popcount(mask & (uint8_t)~before);
        i = end;
    }
    vx_map_mark_dirty_locked(map, bitmap);
    if (bitmap->set == bitmap->sectors && vx_map_entry(map, bitmap->page) == entry &&
        vx_published_reserve(&map->published, 1))
        vx_map_publish_locked(map, bitmap->page,
                              vx_entry(VX_DATA, vx_entry_lower(entry), vx_entry_offset(entry),
                                       map->full_tag));
    pthread_mutex_unlock(&map->lock);
}

/* Changes part of a sector that is still the parent's: reads it, changes it and writes all of
 * it. */
static int change_edge(vx_map *map, vx_request *request, uint64_t page, uint64_t entry,
                       uint64_t from, uint64_t length, uint32_t flags)
{
    uint8_t sector[LARGEST_SECTOR];
    uint64_t size = (uint64_t)1 << map->sector_shift, start = from & ~(size - 1);
    uint64_t base = page << map->page_shift, end = vx_device_size(vx_map_lower_device(map, map->parent));
    uint64_t present = base + start >= end ? 0 : end - (base + start) < size ? end - base - start
                                                                              : size;
    uint32_t nowait = flags & VX_NOWAIT;
    memset(sector + present, 0, size - present);
    if (present > 0) {
        int answer = vx_map_lower(map, request, VX_READ, nowait, map->parent, base + start, present,
                                  sector);
        if (answer != VX_DONE || request->result != 0)
            return answer;
    }
    if (request->operation == VX_WRITE)
        memcpy(sector + (from - start), request->buffer + (base + from - request->offset), length);
    else
        memset(sector + (from - start), 0, length);
    return vx_map_lower(map, request, VX_WRITE, flags & ~(uint32_t)(VX_NO_HOLE | VX_FAST),
                        vx_entry_lower(entry), vx_entry_offset(entry) + start, size, sector);
}

static int change_sectors(vx_map *map, vx_request *request, uint64_t page, uint64_t entry,
                          uint64_t from, uint64_t stop, uint32_t flags)
{
    const vx_bitmap *bitmap = map->bitmaps[page];
    uint64_t base = page << map->page_shift, mask = ((uint64_t)1 << map->sector_shift) - 1;
    bool tail = (stop & mask) != 0 && !bit_of(bitmap, stop >> map->sector_shift);
    uint64_t whole = tail ? stop & ~mask : stop;
    int answer = VX_DONE;
    if ((from & mask) != 0 && !bit_of(bitmap, from >> map->sector_shift)) {
        uint64_t next = (from | mask) + 1, end = next < stop ? next : stop;
        answer = change_edge(map, request, page, entry, from, end - from, flags);
        from = end;
    }
    if (answer == VX_DONE && request->result == 0 && from < whole) {
        answer = vx_map_lower(map, request, request->operation, flags, vx_entry_lower(entry),
                              vx_entry_offset(entry) + from, whole - from,
                              request->operation == VX_WRITE
                                  ? request->buffer + (base + from - request->offset)
                                  : NULL);
        from = whole;
    }
    if (answer == VX_DONE && request->result == 0 && from < stop)
        answer = change_edge(map, request, page, entry, from, stop - from, flags);
    return answer;
}

int vx_map_change_mixed(vx_map *map, vx_request *request, uint64_t page, uint64_t entry,
                        uint64_t at, uint64_t length, uint32_t flags)
{
    vx_bitmap *bitmap = map->bitmaps[page];
    uint64_t from = at - (page << map->page_shift), stop = from + length;
    uint64_t first = from >> map->sector_shift, last = ((stop - 1) >> map->sector_shift) + 1;
    if (run_of_bits(bitmap, first, last, true) == last)
        return vx_map_lower(map, request, request->operation, flags, vx_entry_lower(entry),
                            vx_entry_offset(entry) + from, length,
                            request->operation == VX_WRITE
                                ? request->buffer + (at - request->offset)
                                : NULL);
    /* Only one thread at a time fills sectors of a page. Otherwise two changes to one sector could
     * overwrite each other with data read from the parent. A change that finds all its bits set
     * needs no lock. */
    pthread_mutex_t *lock = &map->mixed_locks[page % VX_MIXED_LOCKS];
    bool locked = !vx_mutated(map, VX_NO_MIXED_LOCK);
    if (!locked) {
        /* only in tests */
    } else if (flags & VX_NOWAIT) {
        if (pthread_mutex_trylock(lock) != 0)
            return VX_AGAIN;
    } else {
        pthread_mutex_lock(lock);
    }
    if (vx_mutated(map, VX_BITS_FIRST))
        own_sectors(map, bitmap, entry, first, last);
    int answer = change_sectors(map, request, page, entry, from, stop, flags);
    if (answer == VX_DONE && request->result == 0)
        own_sectors(map, bitmap, entry, first, last);
    if (locked)
        pthread_mutex_unlock(lock);
    return answer;
}

/* ---- for the commit ---- */

bool vx_map_take_bitmaps_locked(vx_map *map, vx_taken_bitmaps *taken)
{
    uint64_t bytes = map->sector_shift == 0 ? 0 : vx_page_size(map) >> map->sector_shift >> 3;
    *taken = (vx_taken_bitmaps){.bytes = bytes == 0 ? 1 : bytes};
    if (map->dirty_bitmap_count == 0)
        return true;
    taken->bitmaps = malloc(map->dirty_bitmap_count * sizeof(vx_bitmap *));
    taken->pages = malloc(map->dirty_bitmap_count * sizeof(uint64_t));
    taken->bits = malloc(map->dirty_bitmap_count * taken->bytes);
    if (taken->bitmaps == NULL || taken->pages == NULL || taken->bits == NULL) {
        vx_map_free_bitmaps(taken);
        return false;
    }
    for (vx_bitmap *bitmap = map->dirty_bitmaps; bitmap != NULL; bitmap = bitmap->next_dirty) {
        bitmap->dirty = false;
        taken->bitmaps[taken->count] = bitmap;
        taken->pages[taken->count++] = bitmap->page;
    }
    map->dirty_bitmaps = NULL;
    map->dirty_bitmap_count = 0;
    return true;
}

void vx_map_copy_bitmaps(vx_taken_bitmaps *taken)
{
    for (uint64_t i = 0; i < taken->count; i++)
        for (uint64_t b = 0; b < taken->bytes; b++)
            taken->bits[i * taken->bytes + b] = atomic_load(&taken->bitmaps[i]->bits[b]);
}

void vx_map_return_bitmaps_locked(vx_map *map, const vx_taken_bitmaps *taken)
{
    for (uint64_t i = 0; i < taken->count; i++)
        vx_map_mark_dirty_locked(map, taken->bitmaps[i]);
}

void vx_map_free_bitmaps(vx_taken_bitmaps *taken)
{
    free(taken->bitmaps);
    free(taken->pages);
    free(taken->bits);
    *taken = (vx_taken_bitmaps){0};
}
