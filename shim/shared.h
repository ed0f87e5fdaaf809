/* Which hosts a lock is for. */
#ifndef FLOCKSHIM_SHARED_H
#define FLOCKSHIM_SHARED_H

#include "config.h"

/* Whether the file system is known to be of this host alone: the kernel locks there. */
int is_of_one_host(int descriptor);
/* Whether a lock is to be one between all hosts that have mounted the file system. */
int is_for_all_hosts(const struct config *config, int descriptor);

#endif
