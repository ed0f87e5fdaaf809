/* What is said once in a run of flockshim, whichever of its processes comes first. */
#ifndef FLOCKSHIM_TOLD_H
#define FLOCKSHIM_TOLD_H

#include "config.h"

#define TOLD_MAX_RUN 32

/* Whether nobody has said it yet in this run; from now on somebody has. False, too, where that
 * cannot be noted: rather nothing than the same line a thousand times. */
int told_first(const struct config *config, const char *run);

#endif
