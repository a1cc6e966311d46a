/* SPDX-License-Identifier: MIT
 *
 * Upcalls of the main thread, made by another thread.
 *
 * Python runs signal handlers on its main thread, between any two bytecode instructions. A handler
 * that raises an exception in the middle of an upcall would leave the work of that upcall half
 * done. Therefore the main thread (the owner) hands its upcalls to a thread that runs
 * vx_delegate_serve. The owner waits in C, where no handler runs. All other threads make their
 * upcalls themselves.
 *
 * The serving thread may call into C and cause further upcalls. It is not the owner, so it makes
 * those upcalls itself. The owner waits for each upcall, so it hands over one upcall at a time.
 */
#ifndef VX_DELEGATE_H
#define VX_DELEGATE_H

#include "core/device.h"

typedef struct vx_delegate vx_delegate;

/* `owner`: the owner's pthread_t. NULL: no memory. A process creates one delegate and never frees
 * it, because any thread may read it at any time. */
vx_delegate *vx_delegate_create(uint64_t owner);
/* Makes the upcalls that are handed over, until vx_delegate_end. */
void vx_delegate_serve(vx_delegate *delegate);
/* From now on the owner makes its upcalls itself, and vx_delegate_serve returns. Must not be called
 * while an upcall is handed over. */
void vx_delegate_end(vx_delegate *delegate);

/* Each makes an upcall: on the serving thread if the owner calls, else on the calling thread. */
int vx_upcall_fault(const vx_device *device, vx_fault *fault);
int vx_upcall_perform(const vx_device *device, vx_request *request);
int vx_upcall_resize(const vx_device *device, uint64_t size);

#endif
