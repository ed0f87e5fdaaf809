/* seccomp_unotify(2), which came with Linux 5.0: newer than the headers that we build on. */
#ifndef FLOCKSHIM_NOTIFY_H
#define FLOCKSHIM_NOTIFY_H

#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#ifndef SECCOMP_SET_MODE_FILTER
#define SECCOMP_SET_MODE_FILTER 1
#endif
#ifndef SYS_seccomp
#ifdef __x86_64__
#define SYS_seccomp 317
#else
#define SYS_seccomp 277
#endif
#endif
#define FILTER_SPEC_ALLOW (1u << 2) /* Linux 4.17 */
#define NOTIFY_NEW_LISTENER (1u << 3)
#define NOTIFY_RETURN 0x7fc00000u

#define NOTIFY_CONTINUE 1u /* Linux 5.5 */

struct notification {
    uint64_t id;
    uint32_t tid; /* in our pid namespace; 0 where it is not to be seen there */
    uint32_t flags;
    struct seccomp_data call;
};

struct notification_reply {
    uint64_t id;
    int64_t value;
    int32_t error; /* -errno, or 0 */
    uint32_t flags;
};

/* A later kernel may write longer ones. */
union notification_buffer {
    struct notification notification;
    char room[512];
};

#define NOTIFY_RECEIVE _IOWR('!', 0, struct notification)
#define NOTIFY_REPLY _IOWR('!', 1, struct notification_reply)
/* The number that it had at first; later kernels know this one too. */
#define NOTIFY_IS_VALID _IOR('!', 2, uint64_t)
#define NOTIFY_SET_FLAGS _IOW('!', 4, uint64_t)
#define NOTIFY_SYNC_WAKE_UP 1u /* Linux 6.6 */

/* No operation of flock(2): a launcher asks so whether its COMMAND's calls reach a supervisor, and
 * is answered with the supervisor's mark instead of with EBADF. */
#define PING_DESCRIPTOR 0x7fffffff
#define PING_OPERATION 0x464c4b53
/* What a filter answers that answers by itself; no other call of ours ends so. */
#define PING_ERROR_OF_SUCCESS EDOTDOT
#define PING_ERROR_OF_FAILURE ESRMNT

#endif
