/* SPDX-License-Identifier: MIT
 *
 * Upcalls of one thread, carried out by another.
 *
 * The language above runs its signal handlers on its main thread, between any two of its instructions.
 * An exception that one raises in the middle of an upcall would leave the work of that upcall half
 * done. So upcalls of the main thread (the owner) are handed to a thread that runs vx_delegate_serve,
 * and the owner waits in C, where no handler runs. All other threads call for themselves.
 *
 * The serving thread may itself call into C and be called back; it is not the owner, so those upcalls
 * are its own. The owner hands over one upcall at a time, because it waits for it.
 */
#ifndef VX_DELEGATE_H
#define VX_DELEGATE_H

#include "core/device.h"

typedef struct vx_delegate vx_delegate;

/* `owner`: its pthread_t. NULL: no memory. There is one a process, and it is never freed: any thread may
 * look at it at any time. */
vx_delegate *vx_delegate_create(uint64_t owner);
/* Carries out what is handed over, until vx_delegate_end. */
void vx_delegate_serve(vx_delegate *delegate);
/* From now on the owner calls for itself; vx_delegate_serve returns. Not while an upcall is handed over. */
void vx_delegate_end(vx_delegate *delegate);

/* These make an upcall: on the delegate when the owner calls, else on the calling thread. */
int vx_upcall_fault(const vx_device *device, vx_fault *fault);
int vx_upcall_perform(const vx_device *device, vx_request *request);
int vx_upcall_resize(const vx_device *device, uint64_t size);

#endif
