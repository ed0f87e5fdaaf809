/* The shim's side of the conversation with the keeper. */
#ifndef FLOCKSHIM_CLIENT_H
#define FLOCKSHIM_CLIENT_H

#include "config.h"

/* Does what flock(2) would have done, by the keeper. Returns 0 or -errno; where the protection
 * cannot be given, reports why and returns -kernel_error, the errno with which the kernel refused.
 */
int client_flock(const struct config *config, int descriptor, int operation, int kernel_error);

#endif
