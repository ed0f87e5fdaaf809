/* What the shim and the keeper say to each other: one packet each way on a SOCK_SEQPACKET
 * connection, and a second packet from the shim where a wait is given up. The first three members
 * never change. */
#ifndef FLOCKSHIM_PROTOCOL_H
#define FLOCKSHIM_PROTOCOL_H

#include <stdint.h>

#define PROTOCOL_MAGIC 0x4b434c46u
#define PROTOCOL_VERSION 3
#define PROTOCOL_TEXT 400
#define FLAG_TELL 1u
#define FLAG_CLUSTER 2u
#define FLAG_ONLY_WARN 4u

enum protocol_kind {
    KIND_LOCK = 1, /* with the descriptor attached; operation as in flock(2) */
    KIND_CANCEL =
        2, /* the waiting call was interrupted: answer EINTR, or 0 if it was granted just now */
    KIND_ANSWER = 3,   /* error is 0 or the errno for the program */
    KIND_REFUSAL = 4,  /* the protection cannot be given; text says why */
    KIND_REDIRECT = 5, /* another keeper has this description; text is its key */
    KIND_WAITING = 6,  /* not yet; text is who holds the lock. Only where FLAG_TELL asks for it */
    KIND_GRANT = 7, /* granted after a wait, or to a supervised program, if that is still there: it
                       answers KIND_TAKEN; a supervisor else KIND_CANCEL */
    KIND_TAKEN = 8,
    KIND_TIMEOUT = 9, /* a refusal: the timeout is over; text is who holds the lock */
    KIND_LIST = 10,   /* write who holds and who waits, as JSON, to the descriptor attached */
};

struct protocol_request {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    int32_t operation;
    int32_t
        descriptor; /* its number in the program: where the keeper looks first whether it is open */
    uint64_t device;
    uint64_t inode;
    uint32_t flags;
    int32_t timeout; /* milliseconds; negative: for ever */
    int32_t pid;     /* the program, where its supervisor asks; else 0: who asks is the program */
    int32_t unused;
};

struct protocol_answer {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    int32_t error;
    char text[PROTOCOL_TEXT];
};

#define PROTOCOL_REQUEST_HEAD 8
#define PROTOCOL_ANSWER_HEAD 12

#endif
