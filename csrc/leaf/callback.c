/* SPDX-License-Identifier: MIT */
#include "leaf/callback.h"
#include "core/delegate.h"

#include <stdlib.h>

static int callback_submit(vx_device *device, vx_request *request)
{
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    int code = vx_upcall_perform(device, request);
    if (code == VX_E_UPCALL || (code != VX_OK && request->operation == VX_FLUSH))
        vx_device_set_state(device, VX_E_POISONED);
    return code == VX_OK ? vx_succeed(request)
                         : vx_fail(device, request, code, 0, request->offset);
}

static int callback_resize(vx_device *device, uint64_t size)
{
    int code = vx_upcall_resize(device, size);
    if (code == VX_OK)
        atomic_store(&device->size, size);
    return code;
}

static void callback_destroy(vx_device *device)
{
    free(device);
}

static const vx_operations callback_operations = {.kind = "callback",
                                                  .submit = callback_submit,
                                                  .resize = callback_resize,
                                                  .destroy = callback_destroy};

vx_device *vx_callback_create(uint64_t size, bool read_only, uint64_t identity,
                              const vx_upcalls *upcalls)
{
    vx_device *device = calloc(1, sizeof *device);
    if (device == NULL)
        return NULL;
    vx_device_initialise(device, &callback_operations, identity, upcalls, size);
    device->read_only = read_only;
    return device;
}
