/* What the keeper cannot do in Python, for the extension flockshim._native. Ordinary libc code. */
#ifndef FLOCKSHIM_NATIVE_H
#define FLOCKSHIM_NATIVE_H

#include <stdint.h>
#include <sys/types.h>

#include "config.h"
#include "lock.h"
#include "notify.h"
#include "protocol.h"
#include "rendezvous.h"
#include "shared.h"

enum native_status {
    STATUS_LOCK,    /* a request, with its description */
    STATUS_LIST,    /* a descriptor to which the list of all locks shall be written */
    STATUS_KNOCK,   /* another keeper asks about a record lock */
    STATUS_CANCEL,  /* a waiting call was interrupted */
    STATUS_TAKEN,   /* a grant has reached its program */
    STATUS_NOTHING, /* no packet yet */
    STATUS_ENDED,   /* the connection has ended, or what came was no request of ours */
    STATUS_VERSION, /* a shim of another version */
    STATUS_FULL,    /* the description could not be taken: no descriptor left */
};

/* One packet as it came: see requests.c. */
struct native_packet {
    int connection;
    int pid;
    int descriptor; /* the description that came along, or -1 */
    int status;
    struct protocol_request request;
};

void native_accept(int listener, struct native_packet *packet);
void native_receive(int connection, struct native_packet *packet);
/* Sends a packet to a program. */
void native_send(int connection, int kind, int error, const char *text);
/* Tells that a lock is in the way: exclusive or not, of which process, and its range. */
void native_send_found(int connection, int exclusive, int pid, int64_t first, int64_t last,
                       const char *holder);
/* From now on nothing comes by this connection but what has come already. */
void native_stop_receiving(int connection);
/* Sends the answer and closes the connection. */
void native_answer(int connection, int kind, int error, const char *text);

/* Has the keeper that listens there write its list to `descriptor`, a file. 0, or -errno: -ETIME
 * where it does not answer, -EPROTO where it is of another version. */
int native_ask_for_list(const char *socket_path, int descriptor, int milliseconds);

/* flock(2) without waiting: 1 if it was had, 0 if not, -ENOENT if it was had on an unlinked file.
 */
int native_try_lock(int descriptor, int exclusive);

/* A record lock by this open file description, without waiting, on a proxy: as above. */
int native_lock_record(int descriptor, int operation, int64_t first, int64_t last);

struct native_range {
    int64_t first, last;
    int exclusive;
};

/* Whether a lock of others forbids one of this range: 1, and the range is that lock's; 0; or
 * -errno. */
int native_test_record(int descriptor, int operation, struct native_range *range);

/* Whether two descriptors of this process are one description: 1, 0, or -errno. See descriptions.c.
 */
int native_same_description(int one, int other);
/* <0, 0 or >0: an order over descriptions that never changes, kcmp(2); *error where it is
 * forbidden. */
int native_compare(int one, int other, int *error);
/* Whether descriptor `number` of process `pid` is the description `kept`. */
int native_is_open_at(int kept, int pid, int number);
/* Whether it surely is not any more, in any thread's table. */
int native_was_closed_at(int kept, int pid, int number);
/* Whether the description `kept` is open in process `pid`. */
int native_is_open_in(int kept, int pid);
/* close(2), for descriptors in the hot path. */
void native_close(int descriptor);

/* A description of which it is asked whether a process has it open. */
struct native_suspect {
    int kept; /* the keeper's duplicate */
    uint64_t device, inode;
    int known_pid; /* where it was last seen */
    int pid;       /* in: 0; out: where it was found, or 0 */
    int number;    /* -1: mapped, in flight, or in a process that may not be looked into */
    char mapping[64];
    char path[4096];
};

/* Looks for all suspects in all other processes: search.c. How many were not found, or -errno where
 * that cannot be told: all of them must then be taken for open. */
int native_find_open(struct native_suspect *suspects, int count);

/* How many descriptions are on their way to the socket that is descriptor `number` of `pid`, and
 * whether `kept` may be one of them: inflight.c. */
long socket_under_way(pid_t pid, int number);
int socket_may_carry(pid_t pid, int number, int kept);

/* Our pid, by the system call: before glibc 2.25 getpid(3) remembers that of who called clone(2).
 */
int native_self(void);

/* clone(2) with CLONE_FILES: a second process on this descriptor table. As fork(2), or -errno. */
int native_clone_sharing_descriptors(void);
int native_die_with_parent(int signal);
int native_pidfd_open(int pid);
/* A duplicate of descriptor `number` of another process: pidfd_getfd(2). */
int native_pidfd_getfd(int pid, int number);
/* Descendants whose parent ends become our children: prctl(2), PR_SET_CHILD_SUBREAPER. */
int native_become_subreaper(void);
int native_inotify_init(void);
int native_inotify_add_watch(int inotify, const char *path, uint32_t mask);
int native_inotify_rm_watch(int inotify, int watch);

/* What the kernel says to a lock call, for --check: 0 or -errno. A record lock is of the whole
 * file, its type F_RDLCK, F_WRLCK or F_UNLCK. */
/* Filters of this process and of all that it starts, for good; or -errno. The first has its lock
 * calls reported to the descriptor that is returned; the second answers them itself, with an errno
 * or 0. See filter.c. */
int native_report_lock_calls(void);
int native_answer_lock_calls(int error);
/* The mark of the supervisor that our own lock calls reach, or -errno. */
int native_ping_supervisor(void);
/* Threads answer what is reported, from now on: 0, or -errno. The settings must stay. */
int native_supervise(const struct config *config, int listener, int mark);
int native_raw_flock(int descriptor, int operation);
int native_raw_record_lock(int descriptor, int type, int of_description, int wait);

#endif
