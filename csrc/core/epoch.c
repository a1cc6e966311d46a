/* SPDX-License-Identifier: MIT */
#include "core/epoch.h"

#include <sched.h>
#include <time.h>

void vx_epoch_initialise(vx_epochs *epochs)
{
    atomic_init(&epochs->now, 1);
    for (uint32_t i = 0; i < VX_EPOCH_SLOTS; i++)
        atomic_init(&epochs->slots[i].entered, 0);
}

uint32_t vx_epoch_enter(vx_epochs *epochs, uint32_t hint)
{
    for (uint32_t tries = 0;; tries++) {
        uint32_t slot = (hint + tries) % VX_EPOCH_SLOTS;
        uint64_t none = 0;
        if (atomic_load_explicit(&epochs->slots[slot].entered, memory_order_relaxed) == 0 &&
            atomic_compare_exchange_strong(&epochs->slots[slot].entered, &none,
                                           atomic_load(&epochs->now)))
            return slot;
        if (tries % VX_EPOCH_SLOTS == VX_EPOCH_SLOTS - 1)
            sched_yield();
    }
}

void vx_epoch_leave(vx_epochs *epochs, uint32_t slot)
{
    atomic_store_explicit(&epochs->slots[slot].entered, 0, memory_order_release);
}

void vx_epoch_quiesce(vx_epochs *epochs)
{
    uint64_t next = atomic_fetch_add(&epochs->now, 1) + 1;
    for (uint32_t i = 0; i < VX_EPOCH_SLOTS; i++) {
        for (uint32_t spins = 0;; spins++) {
            uint64_t entered = atomic_load(&epochs->slots[i].entered);
            if (entered == 0 || entered >= next)
                break;
            if (spins < 100) {
                sched_yield();
            } else {
                struct timespec pause = {.tv_nsec = 50000};
                nanosleep(&pause, NULL);
            }
        }
    }
}
