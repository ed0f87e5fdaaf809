/* The shim's side of the conversation with the keeper. */
#ifndef FLOCKSHIM_CLIENT_H
#define FLOCKSHIM_CLIENT_H

#include "config.h"
#include "protocol.h"

/* What a program asks for. */
struct client_request {
    enum protocol_family family;
    int operation; /* of flock(2); LOCK_TEST with a mode, or with LOCK_UN for one's own locks */
    int64_t first, last; /* of a record lock: see protocol.h */
};

/* How a blocking call waits, and what became of it. */
struct client_wait {
    int timeout; /* milliseconds; negative: for ever */
    int poll; /* whether poll(2) may be used, which SA_RESTART does not restart: not in programs */
    /* Of a call that is a cancellation point, else NULL: recv(2) as one. */
    long (*receive)(int socket, void *buffer, unsigned long size);
    int cancel; /* a descriptor that is readable when the wait shall end as by a signal; or -1 */
    int pid;    /* for which program a supervisor asks; 0: for this one */
    int number; /* of the descriptor in that program */
    int (*gone)(void *call); /* of a supervisor, else NULL: whether the program's call has ended */
    int (*deliver)(void *call); /* tells the program that it has the lock: 0, or it has gone. Closes
                                   the descriptor */
    void *call;
    int is_found;                 /* out: of LOCK_TEST, whether a lock is in the way */
    struct protocol_record found; /* out: that lock */
    int timed_out;                /* out: the timeout is over; the refusal is who holds the lock */
    char refusal[PROTOCOL_TEXT];  /* out: why the protection cannot be given, or empty */
};

/* Does what flock(2) or fcntl(2) would have done, by the keeper. Returns 0 or -errno, which means
 * nothing where wait->refusal is set. */
int client_lock(const struct config *config, struct client_wait *wait, int descriptor,
                const struct client_request *request);

#endif
