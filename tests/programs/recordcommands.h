/* The commands of lockdriver.c for record locks, and for what else fcntl(2) does. */
#ifndef RECORDCOMMANDS_H
#define RECORDCOMMANDS_H

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "lockdriver.h"
#include "recordcalls.h"

/* HOW COMMAND FD TYPE WHENCE START LEN PID; answers with the last five as they are afterwards. */
static long do_record(struct request *rq) {
    struct flock lock = {.l_type = (short)number(rq, 3),
                         .l_whence = (short)number(rq, 4),
                         .l_start = wide(rq, 5),
                         .l_len = wide(rq, 6),
                         .l_pid = (pid_t)number(rq, 7)};
    long value = record_call(rq->arg[0], (int)number(rq, 2), (int)number(rq, 1), &lock);
    snprintf(rq->result, sizeof rq->result, "%d,%d,%lld,%lld,%d", lock.l_type, lock.l_whence,
             (long long)lock.l_start, (long long)lock.l_len, lock.l_pid);
    return value;
}

static long do_lockf(struct request *rq) {
    return lockf((int)number(rq, 0), (int)number(rq, 1), wide(rq, 2));
}

static long fcntl_by(const char *how, int fd, int command, void *argument) {
#ifdef __GLIBC__
    if (strcmp(how, "fcntl64") == 0)
        return fcntl64(fd, command, argument);
#endif
    if (strcmp(how, "fcntl") != 0)
        _exit(94);
    return fcntl(fd, command, argument);
}

static long do_fcntl(struct request *rq) {
    return fcntl_by(rq->arg[0], (int)number(rq, 1), (int)number(rq, 2), (void *)number(rq, 3));
}

/* The argument points to the bytes that are given in hexadecimal. */
static long do_fcntlbytes(struct request *rq) {
    unsigned char bytes[RESULT_MAX / 2] = {0};
    size_t count = 0;
    for (const char *hex = rq->arg[3]; count < sizeof bytes - 1 && hex[0] && hex[1]; hex += 2) {
        char pair[] = {hex[0], hex[1], '\0'};
        bytes[count++] = (unsigned char)strtol(pair, NULL, 16);
    }
    long value = fcntl_by(rq->arg[0], (int)number(rq, 1), (int)number(rq, 2), bytes);
    for (size_t i = 0; i < count; i++)
        snprintf(rq->result + 2 * i, 3, "%02x", bytes[i]);
    return value;
}

#endif
