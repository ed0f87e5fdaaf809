/* The one line on stderr that says why a lock could not be given. */
#ifndef FLOCKSHIM_REPORT_H
#define FLOCKSHIM_REPORT_H

#include "config.h"

/* "flockshim: cannot lock PATH: WHAT", nothing where the user asked for quiet. */
void report(const struct config *config, int descriptor, const char *what);

/* The path that descriptor was opened by, as the kernel knows it now; empty where it cannot be
 * told. */
void path_of_descriptor(int descriptor, char *path, unsigned long size);

#endif
