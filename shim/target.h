/* The supervised program whose lock call is to be answered, and the descriptor that it named. */
#ifndef FLOCKSHIM_TARGET_H
#define FLOCKSHIM_TARGET_H

#include <sys/types.h>

struct target {
    pid_t pid;      /* the process */
    int number;     /* of the descriptor, there */
    int descriptor; /* our duplicate of it, so the same open file description; or -errno */
};

/* Thread `tid` has named its descriptor `number`. What comes of it is worth something only while
 * the thread's notification is valid, since its number may be another's by then. */
void target_open(struct target *target, pid_t tid, int number);

/* For a thread that ends: it keeps a handle of its last target. */
void target_forget(void);

#endif
