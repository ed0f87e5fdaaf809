/* A command of lockdriver.c, and its arguments. */
#ifndef LOCKDRIVER_H
#define LOCKDRIVER_H

#include <limits.h>
#include <stdlib.h>

enum {
    ERRNO_BEFORE = 1234,
    CONTROL_MIN = 100, /* out of the way of the descriptors that a test counts on */
    ARGS_MAX = 10,
    PACKET_MAX = 8192,
    MAP_SIZE = 4096,
    RESULT_MAX = 128,
};

#define ANSWERED LONG_MIN

struct request {
    int control;
    int passed; /* the descriptor that came with the command, or -1 */
    const char *token;
    const char *name;
    const char *arg[ARGS_MAX];
    char result[RESULT_MAX]; /* a further word of the answer */
};

static inline long number(const struct request *rq, int index) {
    return rq->arg[index] ? strtol(rq->arg[index], NULL, 0) : 0;
}

/* The same of a number that may not fit into a long. */
static inline long long wide(const struct request *rq, int index) {
    return rq->arg[index] ? strtoll(rq->arg[index], NULL, 0) : 0;
}

#endif
