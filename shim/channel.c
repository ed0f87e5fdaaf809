#include <errno.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "channel.h"
#include "syscalls.h"

const char *channel_open(struct channel *channel) {
    struct stat status;

    channel->socket = sys3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (channel->socket == -EMFILE || channel->socket == -ENFILE)
        return "no descriptor is left for asking the keeper; raise the limit (ulimit -n)";
    if (channel->socket < 0)
        return "no socket can be made for asking the keeper";
    sys2(SYS_fstat, channel->socket, &status);
    channel->inode = status.st_ino;
    return NULL;
}

int channel_is_intact(const struct channel *channel) {
    struct stat status;

    return sys2(SYS_fstat, channel->socket, &status) == 0 && status.st_ino == channel->inode &&
           S_ISSOCK(status.st_mode);
}

void channel_close(const struct channel *channel) {
    if (channel_is_intact(channel))
        sys1(SYS_close, channel->socket);
}

/* A socket of somebody else's in the directory's place would hand out locks as it likes: unix(7),
 * SO_PEERCRED. */
long channel_connect(const struct channel *channel, const struct sockaddr_un *address) {
    struct ucred peer;
    int size = sizeof peer;
    long result;

    do
        result = sys3(SYS_connect, channel->socket, address, sizeof *address);
    while (result == -EINTR);
    if (result < 0)
        return result == -EPERM ? -EACCES : result;
    if (sys5(SYS_getsockopt, channel->socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 ||
        peer.uid != sys0(SYS_geteuid))
        return -EPERM;
    return 0;
}

long channel_send(const struct channel *channel, const struct protocol_request *request,
                  int descriptor) {
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.head = {.cmsg_len = CMSG_LEN(sizeof(int)),
                          .cmsg_level = SOL_SOCKET,
                          .cmsg_type = SCM_RIGHTS}};
    struct protocol_request body = *request;
    struct iovec part = {.iov_base = &body, .iov_len = sizeof body};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    long result;

    if (descriptor >= 0) {
        *(int *)CMSG_DATA(&control.head) = descriptor;
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
    }
    do
        result = sys3(SYS_sendmsg, channel->socket, &message, MSG_NOSIGNAL);
    while (result == -EINTR);
    return result;
}

long channel_receive(const struct channel *channel, struct protocol_answer *answer, int flags) {
    long got =
        sys6(SYS_recvfrom, channel->socket, SYS_ARG(answer), sizeof *answer - 1, flags, 0, 0);

    if (got >= 0)
        ((char *)answer)[got] = 0;
    return got;
}
