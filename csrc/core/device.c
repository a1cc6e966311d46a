/* SPDX-License-Identifier: MIT */
#include "core/device.h"

#include <string.h>

void vx_device_initialise(vx_device *device, const vx_operations *operations, uint64_t identity,
                          const vx_upcalls *upcalls, uint64_t size)
{
    device->operations = operations;
    device->upcalls = upcalls;
    device->identity = identity;
    atomic_init(&device->size, size);
    atomic_init(&device->state, 0);
    atomic_init(&device->references, 1);
    atomic_init(&device->progress, 0);
    atomic_init(&device->read_only, false);
    device->sized_by = NULL;
}

vx_device *vx_device_reference(vx_device *device)
{
    atomic_fetch_add(&device->references, 1);
    return device;
}

void vx_device_release(vx_device *device)
{
    if (device != NULL && atomic_fetch_sub(&device->references, 1) == 1)
        device->operations->destroy(device);
}

uint64_t vx_device_identity(const vx_device *device)
{
    return device->identity;
}

uint64_t vx_device_size(vx_device *device)
{
    while (device->sized_by != NULL)
        device = device->sized_by;
    return atomic_load(&device->size);
}

int vx_device_resize(vx_device *device, uint64_t size)
{
    int state = atomic_load(&device->state);
    if (state != 0)
        return state;
    if (device->operations->resize == NULL)
        return VX_E_UNSUPPORTED;
    if (size > INT64_MAX)
        return VX_E_RANGE;
    return device->operations->resize(device, size);
}

int vx_device_state(vx_device *device)
{
    return atomic_load(&device->state);
}

void vx_device_set_state(vx_device *device, int state)
{
    int32_t none = 0;
    if (state == VX_E_FORKED)
        atomic_store(&device->state, state);
    else
        atomic_compare_exchange_strong(&device->state, &none, state);
}

void vx_device_freeze(vx_device *device)
{
    atomic_store(&device->read_only, true);
}

bool vx_can_fua(const vx_device *device)
{
    while (device->operations->forwards && device->sized_by != NULL)
        device = device->sized_by;
    return device->operations->can_fua;
}

bool vx_is_inside(vx_device *device, vx_request *request)
{
    uint64_t size = vx_device_size(device);
    if (request->offset <= size && request->length <= size - request->offset)
        return true;
    vx_fail(device, request, VX_E_RANGE, 0, request->offset);
    return false;
}

int vx_submit(vx_device *device, vx_request *request)
{
    int state = atomic_load_explicit(&device->state, memory_order_acquire);
    if (__builtin_expect(state != 0, 0))
        return vx_fail(device, request, state, 0, request->offset);
    if (!device->operations->forwards && !vx_is_inside(device, request))
        return VX_DONE;
    if (request->operation != VX_FLUSH) {
        if (device->read_only && request->operation >= VX_WRITE &&
            request->operation <= VX_TRIM)
            return vx_fail(device, request, VX_E_READONLY, 0, request->offset);
        if (request->length == 0 && request->operation != VX_EXTENTS)
            return vx_succeed(request);
    }
    return device->operations->submit(device, request);
}

void vx_request_child(vx_request *child, const vx_request *parent, uint32_t operation,
                      uint64_t offset, uint64_t length, uint8_t *buffer)
{
    child->operation = operation;
    child->flags = parent->flags;
    child->offset = offset;
    child->length = length;
    child->buffer = buffer;
    child->result = 0;
    child->epoch_slot = parent->epoch_slot;
    child->done = 0;
    child->not_before_ns = 0;
    child->starts_ns = parent->starts_ns;
    child->virtual_time = parent->virtual_time;
    atomic_init(&child->waits_for, 0);
    child->queued_ns = 0;
    child->initiator = parent->initiator;
    memset(child->frames, 0, sizeof child->frames);
    child->extents = NULL;
    child->extent_capacity = 0;
    child->extent_count = 0;
    child->depth = parent->depth;
    child->memo = parent->memo;
    child->complete = NULL;
    child->context = NULL;
    child->next = NULL;
}

void vx_request_again(vx_request *request, uint64_t done)
{
    request->flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    request->done = done;
    request->extent_count = 0;
    request->not_before_ns = 0;
}

void vx_request_adopt(vx_request *parent, const vx_request *child)
{
    parent->result = child->result;
    if (child->result != 0)
        parent->failure = child->failure;
    if (child->not_before_ns > parent->not_before_ns)
        parent->not_before_ns = child->not_before_ns;
    parent->virtual_time |= child->virtual_time;
}

void vx_request_follow(vx_request *request)
{
    if (request->not_before_ns > request->starts_ns)
        request->starts_ns = request->not_before_ns;
}

int vx_fail(vx_device *device, vx_request *request, int code, int os_error, uint64_t offset)
{
    request->result = code;
    request->failure = (vx_failure){.code = code,
                                    .os_error = os_error,
                                    .operation = request->operation,
                                    .device = device->identity,
                                    .offset = offset};
    return VX_DONE;
}

int vx_succeed(vx_request *request)
{
    request->result = VX_OK;
    return VX_DONE;
}
