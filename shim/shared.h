/* Whether a lock is to be one between all hosts that have mounted the file system. */
#ifndef FLOCKSHIM_SHARED_H
#define FLOCKSHIM_SHARED_H

#include "config.h"

int is_for_all_hosts(const struct config *config, int descriptor);

#endif
