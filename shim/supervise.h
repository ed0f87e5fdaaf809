/* A lock call of a supervised program, from its report to its answer. */
#ifndef FLOCKSHIM_SUPERVISE_H
#define FLOCKSHIM_SUPERVISE_H

#include <fcntl.h>
#include <sys/stat.h>

#include "client.h"
#include "config.h"
#include "notify.h"
#include "target.h"

struct supervisor {
    const struct config *config;
    int listener;
    int mark;
    int idle;   /* threads that wait for a notification */
    int busy;   /* those that have one, and do not wait for the keeper */
    int blamed; /* the user was told that a program cannot be looked into */
};

extern struct supervisor supervisor;

/* Where a program has its struct flock. */
struct record_place {
    uint64_t address;
    enum record_layout { LAYOUT_64, LAYOUT_PACKED, LAYOUT_32 } layout;
    int command;
    struct flock lock; /* what stood there */
};

struct lock_call {
    uint64_t id; /* of the notification; may become that of the same call made again */
    pid_t tid;
    struct target target;
    struct stat status; /* of the file */
    struct client_request request;
    struct record_place place; /* of a record lock */
    int may_wait;              /* or no thread is left for others */
    int wake;                  /* an eventfd(2) of this thread */
    int dismissed;             /* the program makes another call */
    int leaving; /* the program has been told, or is gone: nobody can take the call up again */
    int delivered;
    struct lock_call *next;
};

/* Whether the program's call has ended, by a signal or with the program. */
int call_is_gone(const struct lock_call *call);
/* 0, or -ENOENT where it is gone. */
int call_reply(const struct lock_call *call, int result);
/* The kernel makes the call, as if there were no supervisor. */
void call_leave_to_kernel(const struct lock_call *call);

/* To be called by a thread before it does what may take long; calls that are over at once pile up
 * in the kernel only, which forgets those that have ended. Whether there is another thread. */
int have_another_listen(void);
/* A thread waits for the keeper. */
void begin_to_wait(void);
void end_to_wait(void);

int is_same_file(const struct stat *one, const struct stat *other);

/* Whether the kernel is known to lock files like this one, so that its calls can be left to it. */
int kernel_locks(const struct stat *status);
/* Answers the call where the kernel can, and closes the descriptor: 0. Else the errno that means
 * that the kernel cannot lock. */
int ask_kernel(struct lock_call *call);
/* The same for a record lock; the call itself is never made here, where the owner would be ours. */
int ask_kernel_about_records(struct lock_call *call);
/* For a thread that ends: it keeps a file of proc(5) open. */
void forget_information(void);

/* Whether that is a call of fcntl(2), which only a filter lets come here that has looked at its
 * command. */
int is_record_call(const struct seccomp_data *data);
/* What the program asks for: 0, or else the kernel shall say why it cannot. */
int read_record_call(struct lock_call *call, const struct seccomp_data *data);
/* Tells the program of a lock in the way: 0 or -errno. */
int write_record_answer(const struct lock_call *call, const struct client_wait *wait);

void supervised_wait_init(void);
/* Whether the keeper has been asked for this call already, before a signal, and is still. Then it
 * will be answered with that. */
int is_taken_up_again(const struct lock_call *call);
/* Answers a call that the kernel refuses with an errno; closes the descriptor. */
void emulate_call(struct lock_call *call, int kernel_error);
#endif
