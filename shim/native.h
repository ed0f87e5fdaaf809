/* What the keeper cannot do in Python, for the extension flockshim._native. Ordinary libc code. */
#ifndef FLOCKSHIM_NATIVE_H
#define FLOCKSHIM_NATIVE_H

#include <stdint.h>

#include "protocol.h"

/* One packet as it came: see requests.c. */
struct native_packet {
    int connection;
    int pid;
    int descriptor; /* the description that came along, or -1 */
    int size; /* 0 at the end of the connection, -errno on failure: -EAGAIN where none is there yet
               */
    struct protocol_request request;
};

void native_accept(int listener, struct native_packet *packet);
void native_receive(int connection, struct native_packet *packet);
int native_answer(int connection, int kind, int error, const char *text);

/* Whether two descriptors of this process are one open file description: 1, 0, or -errno. See
 * descriptions.c. */
int native_same_description(int one, int other);
/* <0, 0 or >0: an order over descriptions that never changes, kcmp(2); *error is set where it is
 * forbidden. */
int native_compare(int one, int other, int *error);
/* Whether descriptor `number` of process `pid` is the description `kept`. */
int native_is_open_at(int kept, int pid, int number);

struct native_place {
    int pid;
    int number; /* -1: mapped, in flight, or in a process that may not be looked into */
};

/* Looks for the description `kept` (of the file device:inode) in all other processes. 1 and *place,
 * or 0. */
int native_find_open(int kept, uint64_t device, uint64_t inode, int known_pid,
                     struct native_place *place);

/* clone(2) with CLONE_FILES: a second process on the same descriptor table. Returns as fork(2)
 * does, or -errno. */
int native_clone_sharing_descriptors(void);
int native_die_with_parent(int signal);
int native_pidfd_open(int pid);
int native_inotify_init(void);
int native_inotify_add_watch(int inotify, const char *path, uint32_t mask);
int native_inotify_rm_watch(int inotify, int watch);

#endif
