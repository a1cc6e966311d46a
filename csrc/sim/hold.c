/* SPDX-License-Identifier: MIT */
#include "sim/hold.h"

#include <pthread.h>
#include <stdlib.h>

#include "core/run.h"

typedef struct hold_device {
    vx_device device;
    vx_device *lower;
    vx_pool *pool;
    pthread_mutex_t lock;
    vx_hold_settings settings;
    uint64_t matched; /* requests that fail_mask chose so far */
} hold_device;

typedef struct parked {
    vx_job job;
    hold_device *hold;
    vx_request *request;
} parked;

static int pass_on(hold_device *hold, vx_request *request, uint64_t delay_ns,
                   int (*submit)(vx_device *, vx_request *))
{
    vx_request child;
    vx_request_child(&child, request, request->operation, request->offset, request->length,
                     request->buffer);
    child.extents = request->extents;
    child.extent_capacity = request->extent_capacity;
    int answer = submit(hold->lower, &child);
    if (answer == VX_FAULTED)
        request->fault = child.fault;
    if (answer != VX_DONE)
        return answer;
    vx_request_adopt(request, &child);
    request->extent_count = child.extent_count;
    if (delay_ns != 0 && vx_now_ns() + delay_ns > request->not_before_ns)
        request->not_before_ns = vx_now_ns() + delay_ns;
    return VX_DONE;
}

static int run_to_end(vx_device *lower, vx_request *request)
{
    vx_wait(lower, request);
    return VX_DONE;
}

static void resume(vx_job *job)
{
    parked *waiting = (parked *)job;
    vx_request *request = waiting->request;
    request->memo = NULL; /* it belonged to the thread that parked the request */
    pass_on(waiting->hold, request, 0, run_to_end);
    free(waiting);
    request->complete(request);
}

static int hold_submit(vx_device *device, vx_request *request)
{
    hold_device *hold = (hold_device *)device;
    uint32_t bit = 1u << request->operation;
    pthread_mutex_lock(&hold->lock);
    vx_hold_settings now = hold->settings;
    bool again = (request->flags & VX_NOWAIT) &&
                 ((now.again_mask | now.park_mask | now.fail_mask) & bit);
    bool fail = !again && (now.fail_mask & bit) && hold->matched++ >= now.fail_after;
    pthread_mutex_unlock(&hold->lock);
    if (again)
        return VX_AGAIN;
    if (fail) {
        if (request->operation == VX_FLUSH)
            vx_device_set_state(device, VX_E_POISONED);
        return vx_fail(device, request, now.fail_code, 0, request->offset);
    }
    if (!(now.park_mask & bit))
        return pass_on(hold, request, now.delay_mask & bit ? now.delay_ns : 0, vx_call);
    parked *waiting = malloc(sizeof *waiting);
    if (waiting == NULL)
        return vx_fail(device, request, VX_E_NOMEM, 0, request->offset);
    *waiting = (parked){.job = {.run = resume}, .hold = hold, .request = request};
    vx_pool_push_at(hold->pool, &waiting->job, vx_now_ns() + now.park_ns);
    return VX_PARKED;
}

static int hold_resize(vx_device *device, uint64_t size)
{
    int code = vx_device_resize(((hold_device *)device)->lower, size);
    if (code == VX_OK)
        atomic_store(&device->size, size);
    return code;
}

static void hold_destroy(vx_device *device)
{
    hold_device *hold = (hold_device *)device;
    vx_device_release(hold->lower);
    pthread_mutex_destroy(&hold->lock);
    free(hold);
}

static const vx_operations hold_operations = {
    .kind = "hold", .submit = hold_submit, .resize = hold_resize, .destroy = hold_destroy};

vx_device *vx_hold_create(vx_device *lower, vx_pool *pool, uint64_t identity)
{
    hold_device *hold = calloc(1, sizeof *hold);
    if (hold == NULL)
        return NULL;
    vx_device_initialise(&hold->device, &hold_operations, identity, NULL, vx_device_size(lower));
    hold->device.read_only = lower->read_only;
    hold->lower = vx_device_reference(lower);
    hold->pool = pool;
    pthread_mutex_init(&hold->lock, NULL);
    return &hold->device;
}

void vx_hold_set(vx_device *device, const vx_hold_settings *settings)
{
    hold_device *hold = (hold_device *)device;
    pthread_mutex_lock(&hold->lock);
    hold->settings = *settings;
    hold->matched = 0;
    pthread_mutex_unlock(&hold->lock);
}
