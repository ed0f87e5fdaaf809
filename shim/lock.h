/* The two steps of every lock call, for programs (flock.c) and for flockshim's own Python side. */
#ifndef FLOCKSHIM_LOCK_H
#define FLOCKSHIM_LOCK_H

#include "client.h"
#include "config.h"

/* The errno that stands in for the kernel's answer (--simulate, --force), or 0: ask the kernel. */
int lock_without_kernel(const struct config *config, int descriptor,
                        const struct client_request *request);

/* What the kernel says to flock(2), or what stands in for it (--simulate, --force): 0 or -errno. */
int lock_by_kernel(const struct config *config, int descriptor, int operation);

/* What the mode makes of a call that the kernel has refused with kernel_error, one that
 * config_triggers: 0 or -errno. Where the protection cannot be given that is -kernel_error, and
 * wait->refusal says why. */
int lock_by_mode(const struct config *config, struct client_wait *wait, int descriptor,
                 const struct client_request *request, int kernel_error);

/* The same for flock(2). */
int flock_by_mode(const struct config *config, struct client_wait *wait, int descriptor,
                  int operation, int kernel_error);

#endif
