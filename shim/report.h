/* What the user is told on stderr: why a lock could not be given, and who is waited for. */
#ifndef FLOCKSHIM_REPORT_H
#define FLOCKSHIM_REPORT_H

#include "config.h"

/* "flockshim: cannot lock PATH: WHAT", nothing where the user asked for quiet. */
void report(const struct config *config, int descriptor, const char *what);

/* The same of a wait that has lasted for too long. */
void report_timeout(const struct config *config, int descriptor, const char *holder);

/* A blocking call that has to wait, and its end where that took a second or more. */
void report_waiting(const struct config *config, int descriptor, const char *holder);
void report_waited(const struct config *config, int descriptor, long seconds);

/* Whether a line would be read, as far as can be told, and writing it would not block: somebody who
 * waits for our program may be the only one who makes room. */
int report_would_be_seen(const struct config *config);

/* "flockshim: PROGRAM WHY and not covered: …" */
void report_not_covered(const struct config *config, const char *program, const char *why);

/* The path that descriptor was opened by, as the kernel knows it now; empty where it cannot be
 * told. */
void path_of_descriptor(int descriptor, char *path, unsigned long size);

#endif
