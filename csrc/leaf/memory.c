/* SPDX-License-Identifier: MIT */
#include "leaf/memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct memory_device {
    vx_device device;
    uint8_t *bytes;
    uint64_t capacity;
    _Atomic uint64_t barriers;
} memory_device;

static int memory_submit(vx_device *device, vx_request *request)
{
    memory_device *memory = (memory_device *)device;
    uint8_t *at = memory->bytes + request->offset;
    switch (request->operation) {
    case VX_READ:
        memcpy(request->buffer, at, request->length);
        break;
    case VX_WRITE:
        memcpy(at, request->buffer, request->length);
        break;
    case VX_ZERO:
    case VX_TRIM:
        memset(at, 0, request->length);
        break;
    case VX_FLUSH:
        atomic_fetch_add(&memory->barriers, 1);
        break;
    case VX_EXTENTS:
        request->extent_count = 0;
        if (request->length > 0 && request->extent_capacity > 0) {
            request->extents[0] = (vx_extent){request->offset, request->length, VX_EXTENT_DATA,
                                              request->depth};
            request->extent_count = 1;
        }
        break;
    default:
        return vx_fail(device, request, VX_E_INVALID, 0, request->offset);
    }
    return vx_succeed(request);
}

static int memory_resize(vx_device *device, uint64_t size)
{
    memory_device *memory = (memory_device *)device;
    if (size > memory->capacity)
        return VX_E_NOSPACE;
    uint64_t old = atomic_load(&device->size);
    if (size < old)
        memset(memory->bytes + size, 0, old - size);
    atomic_store(&device->size, size);
    return VX_OK;
}

static void memory_destroy(vx_device *device)
{
    memory_device *memory = (memory_device *)device;
    munmap(memory->bytes, memory->capacity);
    free(memory);
}

static const vx_operations memory_operations = {.kind = "memory",
                                                .can_fua = true,
                                                .submit = memory_submit,
                                                .resize = memory_resize,
                                                .destroy = memory_destroy};

vx_device *vx_memory_create(uint64_t size, uint64_t capacity, uint64_t identity)
{
    memory_device *memory = calloc(1, sizeof *memory);
    if (memory == NULL)
        return NULL;
    memory->capacity = capacity < 4096 ? 4096 : capacity;
    if (size > memory->capacity) {
        free(memory);
        return NULL;
    }
    memory->bytes = mmap(NULL, memory->capacity, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory->bytes == MAP_FAILED) {
        free(memory);
        return NULL;
    }
    vx_device_initialise(&memory->device, &memory_operations, identity, NULL, size);
    return &memory->device;
}

uint8_t *vx_memory_bytes(vx_device *device)
{
    return ((memory_device *)device)->bytes;
}

uint64_t vx_memory_barriers(vx_device *device)
{
    return atomic_load(&((memory_device *)device)->barriers);
}
