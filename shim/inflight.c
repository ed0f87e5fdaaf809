/* A description that was sent over a socket and not yet received, unix(7), is in no process's
 * table. Where the kernel lets us (pidfd_getfd(2), Linux 5.6, and ptrace access) we peek at the
 * first message, which shows duplicates of what it carries; where it doesn't, and for messages
 * behind the first, any description under way is taken for the one that we look for: a lock may
 * last longer, never less. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"
#include "processes.h"

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#define MOST_PER_MESSAGE 253 /* SCM_MAX_FD */

/* A keeper's clients have open what they send to it, and it has itself what it sends to its lease
 * worker: nothing hangs on what waits there. */
static int is_keepers(pid_t pid) {
    struct mapped_text arguments;
    char name[64];
    int is_keepers;

    snprintf(name, sizeof name, "/proc/%d/cmdline", pid);
    if (!mapped_text_read(&arguments, name))
        return 0;
    is_keepers = mapped_text_mentions(&arguments, "/flockshim/keeper.py", "") ||
                 mapped_text_mentions(&arguments, "/flockshim/lease_worker.py", "");
    mapped_text_free(&arguments);
    return is_keepers;
}

/* How many descriptions the first message carries, or -errno; *found where ours is among them. */
static int peek(int socket, int kept, int *found) {
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(MOST_PER_MESSAGE * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
    } control;
    char byte;
    struct iovec part = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    int count = 0;

    if (recvmsg(socket, &message, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC) < 0)
        return -errno;
    for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
        int descriptors[MOST_PER_MESSAGE];
        int number = (int)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));

        if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
            continue;
        memcpy(descriptors, CMSG_DATA(head), (size_t)number * sizeof(int));
        for (int i = 0; i < number; i++) {
            *found |= native_same_description(descriptors[i], kept) == 1;
            close(descriptors[i]);
        }
        count += number;
    }
    return count;
}

/* How many were under way must be known before: a socket that is in use gets others meanwhile,
 * which were open in a table when the search began. */
static int carries(int socket, int kept, long under_way) {
    int found = 0;
    int count = peek(socket, kept, &found);

    if (count == -EAGAIN)
        return 0;
    if (count < 0)
        return 1;
    return found || count < under_way;
}

long socket_under_way(pid_t pid, int number) {
    char name[64];

    snprintf(name, sizeof name, "/proc/%d/fdinfo/%d", pid, number);
    return file_field(name, "scm_fds:", 10);
}

int socket_may_carry(pid_t pid, int number, int kept) {
    long under_way = socket_under_way(pid, number);
    int process = native_pidfd_open(pid);
    int socket = process < 0 ? process : (int)syscall(SYS_pidfd_getfd, process, number, 0);
    int gone = socket < 0 && (socket == -ESRCH || errno == ESRCH || errno == EBADF);
    int result = socket < 0 ? !gone : carries(socket, kept, under_way);

    if (socket >= 0)
        close(socket);
    if (process >= 0)
        close(process);
    return result && !is_keepers(pid);
}
