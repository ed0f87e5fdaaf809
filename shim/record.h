/* Record locks as a program asks for them, fcntl(2), and as a keeper understands them. */
#ifndef FLOCKSHIM_RECORD_H
#define FLOCKSHIM_RECORD_H

#include <fcntl.h>

#include "client.h"

/* Older than the headers that we build on may be: Linux 3.15. */
#ifndef F_OFD_GETLK
#define F_OFD_GETLK 36
#define F_OFD_SETLK 37
#define F_OFD_SETLKW 38
#endif

int record_is_command(int command);

/* What the command asks for on this descriptor: 0, or -errno where the kernel would refuse it
 * whatever the file system is. */
int record_request(int descriptor, int command, const struct flock *lock,
                   struct client_request *request);

/* What F_GETLK makes of the lock that was asked about, unless a lock in its way was found. */
void record_answer(const struct client_wait *wait, struct flock *lock);

#endif
