/* SPDX-License-Identifier: MIT */
#include "array/layout_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/clock.h"

vx_part vx_layout_part(const vx_layout *layout, uint64_t at, uint64_t end)
{
    uint32_t columns = layout->terms.columns;
    uint64_t row = at / layout->row_bytes, in_row = at - row * layout->row_bytes;
    uint64_t mask = layout->terms.interleave - 1, rest = end - at;
    if (columns == 1) {
        uint64_t room = layout->terms.slab - in_row;
        return (vx_part){row, 0, in_row, rest < room ? rest : room, at};
    }
    uint64_t unit = in_row >> layout->interleave_shift, stripe = unit / columns;
    uint64_t room = layout->terms.interleave - (in_row & mask);
    return (vx_part){.row = row,
                     .column = (uint32_t)(unit - stripe * columns),
                     .within = (stripe << layout->interleave_shift) + (in_row & mask),
                     .length = rest < room ? rest : room,
                     .at = at};
}

vx_span vx_layout_span(const vx_layout *layout, const vx_part *part)
{
    uint64_t base = (part->row * layout->terms.columns + part->column)
                    << (layout->slab_shift - VX_LOCK_SHIFT);
    uint64_t first = part->within >> VX_LOCK_SHIFT;
    uint64_t last = (part->within + part->length - 1) >> VX_LOCK_SHIFT;
    return (vx_span){base + first, last - first + 1};
}

vx_device *vx_layout_leaf(vx_layout *layout, uint64_t entry, bool stale_too)
{
    enum vx_kind kind = vx_entry_kind(entry);
    if (kind != VX_DATA && !(stale_too && kind == VX_STALE))
        return NULL;
    return atomic_load(&vx_disk_of(layout, entry)->device);
}

int vx_layout_fail_member(vx_layout *layout, vx_request *request, uint64_t row, uint32_t disk,
                          const vx_device *leaf, const vx_request *child)
{
    atomic_fetch_add_explicit(&layout->disks[disk].failures, 1, memory_order_relaxed);
    request->fault = (vx_fault){.device = &layout->device,
                                .kind = VX_FAULT_MEMBER,
                                .operation = child->operation,
                                .first = row,
                                .disk = disk,
                                .leaf = leaf->identity,
                                .code = child->result,
                                .os_error = child->failure.os_error};
    return VX_FAULTED;
}

uint64_t vx_disk_begin(vx_layout_disk *disk, bool changes)
{
    _Atomic uint64_t *counter = changes ? &disk->changes : &disk->reads;
    atomic_fetch_add_explicit(&disk->under_way, 1, memory_order_relaxed);
    return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed) % 16 == 0 ? vx_now_ns() : 0;
}

static void raise_to(_Atomic uint64_t *highest, uint64_t value)
{
    uint64_t found = atomic_load_explicit(highest, memory_order_relaxed);
    while (found < value && !atomic_compare_exchange_weak(highest, &found, value))
        ;
}

void vx_disk_end(vx_layout_disk *disk, const vx_request *child, uint64_t began)
{
    atomic_fetch_sub_explicit(&disk->under_way, 1, memory_order_relaxed);
    if (child->not_before_ns != 0)
        raise_to(&disk->busy_until_ns, child->not_before_ns);
    if (began == 0)
        return;
    uint64_t now = vx_now_ns();
    uint64_t end = child->not_before_ns > now && !child->virtual_time ? child->not_before_ns : now;
    raise_to(&disk->slowest_ns, end - began);
}

static int layout_submit(vx_device *device, vx_request *request)
{
    vx_layout *layout = (vx_layout *)device;
    switch (request->operation) {
    case VX_READ:
        return vx_layout_read(layout, request);
    case VX_WRITE:
    case VX_ZERO:
    case VX_TRIM:
        return vx_layout_change(layout, request);
    case VX_FLUSH:
        return vx_layout_flush(layout, request);
    case VX_EXTENTS:
        return vx_layout_extents(layout, request);
    default:
        return vx_fail(device, request, VX_E_INVALID, 0, request->offset);
    }
}

static int layout_resize(vx_device *device, uint64_t size)
{
    vx_layout *layout = (vx_layout *)device;
    if (size > layout->terms.largest_size)
        return VX_E_RANGE;
    if (size < vx_device_size(device)) /* what is cut off would show again */
        return VX_E_UNSUPPORTED;
    atomic_store(&device->size, size);
    return VX_OK;
}

static void layout_destroy(vx_device *device)
{
    vx_layout *layout = (vx_layout *)device;
    for (uint32_t i = 0; i < VX_LAYOUT_DISKS; i++)
        vx_device_release(atomic_load(&layout->disks[i].device));
    vx_table_release(&layout->table);
    if (layout->marks != NULL)
        munmap((void *)layout->marks, layout->rows);
    vx_ranges_destroy(layout->ranges);
    pthread_mutex_destroy(&layout->lock);
    free(layout);
}

static const vx_operations layout_operations = {.kind = "layout",
                                                .can_fua = true,
                                                .submit = layout_submit,
                                                .resize = layout_resize,
                                                .destroy = layout_destroy};

static bool is_power(uint64_t value, uint32_t least, uint32_t most)
{
    return value >= (uint64_t)1 << least && value <= (uint64_t)1 << most &&
           (value & (value - 1)) == 0;
}

static bool are_valid(const vx_layout_terms *terms)
{
    return terms->columns >= 1 && terms->columns <= VX_LAYOUT_COLUMNS && terms->copies >= 1 &&
           terms->copies <= VX_LAYOUT_COPIES && is_power(terms->slab, VX_LOCK_SHIFT, 40) &&
           is_power(terms->interleave, 12, 40) && terms->interleave <= terms->slab &&
           terms->size <= terms->largest_size && terms->largest_size <= (uint64_t)1 << 56;
}

static bool reserve(vx_layout *layout)
{
    layout->rows = layout->terms.largest_size / layout->row_bytes + 1;
    void *marks = mmap(NULL, layout->rows, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    layout->marks = marks == MAP_FAILED ? NULL : marks;
    layout->ranges = vx_ranges_create();
    return layout->marks != NULL && layout->ranges != NULL &&
           vx_table_reserve(&layout->table, layout->rows * layout->members);
}

vx_device *vx_layout_create(const vx_layout_terms *terms, vx_pool *pool, uint64_t identity,
                            const vx_upcalls *upcalls)
{
    vx_layout *layout = are_valid(terms)
                            ? aligned_alloc(64, (sizeof *layout + 63) / 64 * 64)
                            : NULL;
    if (layout == NULL)
        return NULL;
    memset(layout, 0, sizeof *layout);
    vx_device_initialise(&layout->device, &layout_operations, identity, upcalls, terms->size);
    vx_epoch_initialise(&layout->epochs);
    vx_epoch_initialise(&layout->flush_epochs);
    pthread_mutex_init(&layout->lock, NULL);
    layout->terms = *terms;
    layout->pool = pool;
    layout->slots = terms->copies + 1;
    layout->members = terms->columns * layout->slots;
    atomic_init(&layout->locks, terms->copies > 1);
    layout->slab_shift = (uint32_t)__builtin_ctzll(terms->slab);
    layout->interleave_shift = (uint32_t)__builtin_ctzll(terms->interleave);
    layout->row_bytes = terms->slab * terms->columns;
    if (!reserve(layout)) {
        layout_destroy(&layout->device);
        return NULL;
    }
    return &layout->device;
}

int vx_layout_set_disk(vx_device *device, uint32_t disk, vx_device *leaf)
{
    vx_layout *layout = (vx_layout *)device;
    if (disk >= VX_LAYOUT_DISKS)
        return VX_E_INVALID;
    vx_layout_disk *slot = &layout->disks[disk];
    pthread_mutex_lock(&layout->lock);
    bool is_free = atomic_load(&slot->device) == NULL;
    if (is_free) {
        atomic_store(&slot->suspect, false);
        atomic_store(&slot->busy_until_ns, 0);
        atomic_store(&slot->device, vx_device_reference(leaf));
        if (disk >= atomic_load(&layout->disk_limit))
            atomic_store(&layout->disk_limit, disk + 1);
    }
    pthread_mutex_unlock(&layout->lock);
    return is_free ? VX_OK : VX_E_INVALID;
}

int vx_layout_clear_disk(vx_device *device, uint32_t disk)
{
    vx_layout *layout = (vx_layout *)device;
    if (disk >= VX_LAYOUT_DISKS)
        return VX_E_INVALID;
    if (vx_device_state(device) == VX_E_FORKED)
        return VX_E_FORKED; /* its epochs belong to threads of the parent process */
    vx_device *left = atomic_exchange(&layout->disks[disk].device, NULL);
    vx_epoch_quiesce(&layout->epochs);
    vx_epoch_quiesce(&layout->flush_epochs);
    atomic_fetch_add(&device->progress, 1);
    vx_device_release(left);
    return left == NULL ? VX_E_INVALID : VX_OK;
}

int64_t vx_layout_replace(vx_device *device, uint64_t count, const uint64_t *rows,
                          const uint32_t *members, const uint64_t *expected,
                          const uint64_t *entries, uint8_t *mismatched)
{
    vx_layout *layout = (vx_layout *)device;
    int64_t mismatches = 0;
    if (vx_device_state(device) == VX_E_FORKED)
        return VX_E_FORKED;
    for (uint64_t i = 0; i < count; i++)
        if (rows[i] >= layout->rows || members[i] >= layout->members ||
            vx_entry_lower(entries[i]) >= VX_LAYOUT_DISKS)
            return VX_E_RANGE;
    pthread_mutex_lock(&layout->lock);
    for (uint64_t i = 0; i < count; i++) {
        _Atomic uint64_t *entry = &layout->table.entries[rows[i] * layout->members + members[i]];
        mismatched[i] = atomic_load(entry) != expected[i];
        mismatches += mismatched[i];
        if (!mismatched[i])
            atomic_store(entry, entries[i]);
    }
    pthread_mutex_unlock(&layout->lock);
    atomic_fetch_add(&device->progress, 1);
    vx_epoch_quiesce(&layout->epochs);
    return mismatches;
}

void vx_layout_read_entries(vx_device *device, uint64_t first_row, uint64_t count,
                            uint64_t *entries)
{
    vx_layout *layout = (vx_layout *)device;
    for (uint64_t i = 0; i < count * layout->members; i++) {
        uint64_t row = first_row + i / layout->members;
        bool is_inside = row >= first_row && row < layout->rows;
        entries[i] = is_inside ? vx_layout_entry(layout, row, (uint32_t)(i % layout->members)) : 0;
    }
}

void vx_layout_set_moving(vx_device *device, bool moving)
{
    vx_layout *layout = (vx_layout *)device;
    atomic_store(&layout->locks, moving || layout->terms.copies > 1);
}

static bool has_rows(const vx_layout *layout, uint64_t first, uint64_t count)
{
    return first <= layout->rows && count <= layout->rows - first;
}

int vx_layout_mark(vx_device *device, uint64_t first_row, uint64_t count, bool marked)
{
    vx_layout *layout = (vx_layout *)device;
    if (vx_device_state(device) == VX_E_FORKED)
        return VX_E_FORKED;
    if (!has_rows(layout, first_row, count))
        return VX_E_RANGE;
    for (uint64_t row = first_row; row - first_row < count; row++) {
        if (marked)
            atomic_fetch_or(&layout->marks[row], VX_MARKED);
        else
            atomic_fetch_and(&layout->marks[row], (uint8_t)~VX_MARKED);
    }
    atomic_fetch_add(&device->progress, 1);
    if (!marked)
        vx_epoch_quiesce(&layout->epochs); /* changes that found it marked */
    return VX_OK;
}

int vx_layout_take_changed(vx_device *device, uint64_t first_row, uint64_t count, uint8_t *changed)
{
    vx_layout *layout = (vx_layout *)device;
    if (!has_rows(layout, first_row, count))
        return VX_E_RANGE;
    for (uint64_t i = 0; i < count; i++)
        changed[i] = (atomic_fetch_and(&layout->marks[first_row + i], (uint8_t)~VX_CHANGED) &
                      VX_CHANGED) != 0;
    return VX_OK;
}

void vx_layout_facts(vx_device *device, uint32_t disk, vx_disk_facts *facts)
{
    vx_layout *layout = (vx_layout *)device;
    vx_layout_disk *slot = &layout->disks[disk % VX_LAYOUT_DISKS];
    *facts = (vx_disk_facts){.reads = atomic_load(&slot->reads),
                             .changes = atomic_load(&slot->changes),
                             .failures = atomic_load(&slot->failures),
                             .under_way = atomic_load(&slot->under_way),
                             .slowest_ns = atomic_load(&slot->slowest_ns)};
}

void vx_layout_forget_slowest(vx_device *device, uint32_t disk)
{
    vx_layout *layout = (vx_layout *)device;
    atomic_store(&layout->disks[disk % VX_LAYOUT_DISKS].slowest_ns, 0);
}

void vx_layout_close(vx_device *device)
{
    vx_layout *layout = (vx_layout *)device;
    if (vx_device_state(device) == VX_E_FORKED)
        return;
    vx_device_set_state(device, VX_E_CLOSED);
    atomic_store(&layout->closed, true);
    vx_epoch_quiesce(&layout->epochs);
    vx_epoch_quiesce(&layout->flush_epochs);
}
