/* SPDX-License-Identifier: MIT
 *
 * Epochs: which accesses may still use an old page table entry.
 *
 * An access enters a slot, loads the entry, does its I/O and leaves. vx_epoch_quiesce returns when
 * every access that was inside at the time of the call has left. It does not wait for accesses that
 * enter later.
 *
 * Invariant: a store to the table that comes before the quiesce is seen by every access that the
 * quiesce does not wait for. The slot's store and the table's load, like the table's store and the
 * slot's load, are sequentially consistent, so at least one side sees the other.
 *
 * An epoch is never held across a fault, a socket or a lock that a quiescing thread may hold.
 */
#ifndef VX_EPOCH_H
#define VX_EPOCH_H

#include <stdatomic.h>
#include <stdint.h>

#define VX_EPOCH_SLOTS 128u

typedef struct vx_epochs {
    _Alignas(64) _Atomic uint64_t now; /* starts at 1 */
    struct {
        _Alignas(64) _Atomic uint64_t entered; /* 0: free */
    } slots[VX_EPOCH_SLOTS];
} vx_epochs;

void vx_epoch_initialise(vx_epochs *epochs);
/* Returns the slot to pass to vx_epoch_leave. Waits only when all slots are taken. */
uint32_t vx_epoch_enter(vx_epochs *epochs, uint32_t hint);
void vx_epoch_leave(vx_epochs *epochs, uint32_t slot);
void vx_epoch_quiesce(vx_epochs *epochs);

#endif
