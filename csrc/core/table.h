/* SPDX-License-Identifier: MIT
 *
 * A page table: 8 bytes per page, read atomically. The map has one, and a layout (array/layout.h) has one
 * of its rows. Address space for the largest size is reserved
 * at once, so that growing never moves the table. Untouched memory is zero, which means ASK. Chunks
 * whose entries Python can supply again may therefore be dropped.
 *
 *   bits  0-38  offset on the lower device, in units of 512 bytes (256 TiB)
 *   bits 39-50  lower device (4096)
 *   bits 51-53  kind
 *   bit  54     watched: somebody copies the page. The first change of it clears the bit, so that a
 *               replace that expects it fails. Reads ignore it
 *   bits 55-63  tag: the owner's state of the page. C stores it and reads only VX_TAG_ZERO (a
 *               hole that is reported as zeros rather than as unallocated)
 */
#ifndef VX_TABLE_H
#define VX_TABLE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define VX_CHUNK_PAGES 512u /* entries in 4096 bytes of table: the unit of dropping */
#define VX_TAG_ZERO 256u
#define VX_ENTRY_LOWER_SHIFT 39u
#define VX_ENTRY_KIND_SHIFT 51u
#define VX_ENTRY_TAG_SHIFT 55u

enum vx_kind {
    VX_ASK = 0,    /* unknown: fault */
    VX_HOLE = 1,   /* nothing stored: reads zeros */
    VX_DATA = 2,   /* the page is at the offset on the lower device */
    VX_SHARED = 3, /* reads as DATA; a write first needs space of its own */
    VX_MIXED = 4,  /* a sector bitmap chooses between the offset and the parent */
    VX_STALE = 5,  /* layouts: takes every change, is never read */
    VX_AWAY = 6    /* layouts: neither, because its disk is away */
};

#define VX_ENTRY_WATCHED ((uint64_t)8 << VX_ENTRY_KIND_SHIFT)

static inline uint64_t vx_entry(enum vx_kind kind, uint32_t lower, uint64_t offset, uint32_t tag)
{
    return (offset >> 9) | (uint64_t)lower << VX_ENTRY_LOWER_SHIFT |
           (uint64_t)kind << VX_ENTRY_KIND_SHIFT | (uint64_t)tag << VX_ENTRY_TAG_SHIFT;
}

static inline enum vx_kind vx_entry_kind(uint64_t entry)
{
    return (enum vx_kind)(entry >> VX_ENTRY_KIND_SHIFT & 7u);
}

/* Whether the page is stored at the entry's offset on the entry's lower device. */
static inline bool vx_entry_is_placed(uint64_t entry)
{
    enum vx_kind kind = vx_entry_kind(entry);
    return kind == VX_DATA || kind == VX_SHARED || kind == VX_MIXED;
}

static inline uint32_t vx_entry_lower(uint64_t entry)
{
    return (uint32_t)(entry >> VX_ENTRY_LOWER_SHIFT & 0xfffu);
}

static inline uint64_t vx_entry_offset(uint64_t entry)
{
    return (entry & 0x7fffffffffu) << 9;
}

static inline uint32_t vx_entry_tag(uint64_t entry)
{
    return (uint32_t)(entry >> VX_ENTRY_TAG_SHIFT);
}

typedef struct vx_table {
    _Atomic uint64_t *entries;
    _Atomic uint32_t *dirty; /* per chunk: pages published and not yet committed */
    uint64_t pages;          /* reserved */
    uint64_t entry_bytes, dirty_bytes;
} vx_table;

bool vx_table_reserve(vx_table *table, uint64_t pages); /* false: no address space */
void vx_table_release(vx_table *table);
/* Resets the entries of the chunk to ASK. The caller holds the lock under which entries are
 * published. */
void vx_table_drop_chunk(vx_table *table, uint64_t chunk);

#endif
