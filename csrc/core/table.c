/* SPDX-License-Identifier: MIT */
#include "core/table.h"

#include <stddef.h>
#include <sys/mman.h>

static void *reserve(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    /* A huge page would make one touched entry cost 2 MiB. */
    (void)madvise(memory, bytes, MADV_NOHUGEPAGE);
    return memory;
}

bool vx_table_reserve(vx_table *table, uint64_t pages)
{
    uint64_t chunks = (pages + VX_CHUNK_PAGES - 1) / VX_CHUNK_PAGES;
    if (chunks == 0)
        chunks = 1;
    table->pages = chunks * VX_CHUNK_PAGES;
    table->entry_bytes = table->pages * sizeof(uint64_t);
    table->dirty_bytes = chunks * sizeof(uint32_t);
    table->entries = reserve(table->entry_bytes);
    table->dirty = reserve(table->dirty_bytes);
    if (table->entries != NULL && table->dirty != NULL)
        return true;
    vx_table_release(table);
    return false;
}

void vx_table_release(vx_table *table)
{
    if (table->entries != NULL)
        munmap((void *)table->entries, table->entry_bytes);
    if (table->dirty != NULL)
        munmap((void *)table->dirty, table->dirty_bytes);
    table->entries = NULL;
    table->dirty = NULL;
}

void vx_table_drop_chunk(vx_table *table, uint64_t chunk)
{
    (void)madvise((void *)(table->entries + chunk * VX_CHUNK_PAGES),
                  VX_CHUNK_PAGES * sizeof(uint64_t), MADV_DONTNEED);
}
