/* What the shim and the keeper say to each other: one packet each way on a SOCK_SEQPACKET
 * connection, and a second packet from the shim where a wait is given up. The first three members
 * never change. */
#ifndef FLOCKSHIM_PROTOCOL_H
#define FLOCKSHIM_PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

#define PROTOCOL_MAGIC 0x4b434c46u
#define PROTOCOL_VERSION 4
#define PROTOCOL_TEXT 400
#define FLAG_TELL 1u
#define FLAG_CLUSTER 2u
#define FLAG_ONLY_WARN 4u
#define FLAG_REDIRECTED 16u /* another keeper has sent the program here */
#define FLAG_STAY 8u        /* of a knock: tell also when that lock may be gone */

enum protocol_kind {
    KIND_LOCK = 1, /* with the descriptor attached */
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
    KIND_KNOCK = 11,  /* from another keeper: does a lock of yours forbid this record lock?
                         Then KIND_FOUND, else KIND_ANSWER */
    KIND_FOUND = 12,  /* the answer to LOCK_TEST, or to a knock: this lock does */
};

/* A lock's owner: an open file description, flock(2); a process or an open file description, with a
 * range of the file, fcntl(2). */
enum protocol_family { FAMILY_FLOCK, FAMILY_PROCESS, FAMILY_DESCRIPTION };

/* Besides those of flock(2): as F_GETLK. */
#define LOCK_TEST 32

#define RECORD_END INT64_MAX

/* A lock that stands in the way of a record lock; packed, since it follows a head of 12 bytes. */
struct protocol_record {
    int32_t exclusive;
    int64_t first, last;
    int32_t pid; /* -1 for one of an open file description, as of F_GETLK */
    char holder[PROTOCOL_TEXT];
} __attribute__((packed, aligned(4)));

struct protocol_request {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    int32_t operation; /* as of flock(2), for record locks too */
    int32_t
        descriptor; /* its number in the program: where the keeper looks first whether it is open */
    uint64_t device;
    uint64_t inode;
    uint32_t flags;
    int32_t timeout; /* milliseconds; negative: for ever */
    int32_t pid;     /* the program, where its supervisor asks; else 0: who asks is the program */
    int32_t family;
    int64_t first, last; /* bytes, both inclusive; the last one is RECORD_END for all that follow */
};

struct protocol_answer {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    int32_t error;
    union {
        char text[PROTOCOL_TEXT];
        struct protocol_record found; /* of KIND_FOUND */
    };
};

_Static_assert(offsetof(struct protocol_answer, text) == 12, "older versions must understand it");

#define PROTOCOL_REQUEST_HEAD 8
#define PROTOCOL_ANSWER_HEAD 12

#endif
