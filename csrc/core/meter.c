/* SPDX-License-Identifier: MIT */
#include "core/meter.h"

#include <stdlib.h>

#include "core/units.h"

#define SUB_BINS 4u

vx_meter *vx_meter_create(uint32_t unit)
{
    vx_meter *meter = calloc(1, sizeof *meter);
    if (meter != NULL)
        meter->unit = unit;
    return meter;
}

void vx_meter_destroy(vx_meter *meter)
{
    free(meter);
}

void vx_meter_switch(vx_meter *meter, bool on)
{
    atomic_store(&meter->on, on);
}

/* In units of 1024 ns, each value from 0 to 3 has its own bin; each octave above has four bins. */
static uint32_t bin_of(uint64_t ns)
{
    uint64_t value = ns >> 10;
    if (value < SUB_BINS)
        return (uint32_t)value;
    uint32_t octave = 63u - (uint32_t)__builtin_clzll(value);
    uint32_t bin = (octave - 1) * SUB_BINS + (uint32_t)((value >> (octave - 2)) & (SUB_BINS - 1));
    return bin < VX_METER_BINS ? bin : VX_METER_BINS - 1;
}

uint64_t vx_meter_bin_start(uint32_t bin)
{
    if (bin < SUB_BINS)
        return (uint64_t)bin << 10;
    uint32_t octave = bin / SUB_BINS + 1;
    return ((uint64_t)(SUB_BINS + bin % SUB_BINS) << (octave - 2)) << 10;
}

static void add(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by,
                          memory_order_relaxed);
}

static bool is_counted(uint32_t operation)
{
    return operation <= VX_TRIM;
}

void vx_meter_offer(vx_meter *meter, uint32_t operation, uint64_t length)
{
    if (is_counted(operation))
        add(&meter->offered[operation != VX_READ], vx_units_of(operation, length, meter->unit));
}

void vx_meter_note(vx_meter *meter, uint32_t operation, uint64_t length, uint64_t latency_ns,
                   uint64_t queued_ns)
{
    if (!is_counted(operation))
        return;
    unsigned way = operation != VX_READ;
    add(&meter->requests[way], 1);
    add(&meter->units[way], vx_units_of(operation, length, meter->unit));
    add(&meter->bytes[way], operation <= VX_WRITE ? length : 0);
    add(&meter->latency_ns[way], latency_ns);
    add(&meter->queued_ns[way], queued_ns);
    add(&meter->bins[bin_of(latency_ns)], 1);
}

static uint64_t value(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

void vx_meter_read(vx_meter *meter, vx_meter_facts *facts)
{
    for (unsigned way = 0; way < 2; way++) {
        facts->requests[way] = value(&meter->requests[way]);
        facts->units[way] = value(&meter->units[way]);
        facts->bytes[way] = value(&meter->bytes[way]);
        facts->latency_ns[way] = value(&meter->latency_ns[way]);
        facts->queued_ns[way] = value(&meter->queued_ns[way]);
        facts->offered[way] = value(&meter->offered[way]);
    }
    for (unsigned i = 0; i < VX_METER_BINS; i++)
        facts->bins[i] = value(&meter->bins[i]);
}
