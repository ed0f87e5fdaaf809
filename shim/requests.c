/* The keeper's side of the conversation, one call a packet. */
#include <errno.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "native.h"

static void take_descriptor(struct msghdr *message, struct native_packet *packet) {
    for (struct cmsghdr *head = CMSG_FIRSTHDR(message); head; head = CMSG_NXTHDR(message, head)) {
        if (head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
            memcpy(&packet->descriptor, CMSG_DATA(head), sizeof(int));
    }
}

static int status_of(const struct native_packet *packet, ssize_t got) {
    if (got < 0)
        return errno == EAGAIN ? STATUS_NOTHING : STATUS_ENDED;
    if (got < PROTOCOL_REQUEST_HEAD || packet->request.magic != PROTOCOL_MAGIC)
        return STATUS_ENDED;
    if (packet->request.version != PROTOCOL_VERSION)
        return STATUS_VERSION;
    if (got != sizeof packet->request)
        return STATUS_ENDED;
    if (packet->request.kind == KIND_CANCEL)
        return STATUS_CANCEL;
    if (packet->request.kind == KIND_TAKEN)
        return STATUS_TAKEN;
    if (packet->request.kind == KIND_KNOCK)
        return STATUS_KNOCK;
    if (packet->descriptor < 0)
        return STATUS_FULL;
    return packet->request.kind == KIND_LIST ? STATUS_LIST : STATUS_LOCK;
}

void native_receive(int connection, struct native_packet *packet) {
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {.iov_base = &packet->request, .iov_len = sizeof packet->request};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = CMSG_LEN(sizeof(int))};
    ssize_t got;

    packet->connection = connection;
    packet->descriptor = -1;
    do
        got = recvmsg(connection, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got > 0)
        take_descriptor(&message, packet);
    packet->status = status_of(packet, got);
    if (packet->descriptor >= 0 &&
        (packet->status == STATUS_CANCEL || packet->status == STATUS_TAKEN)) {
        close(packet->descriptor);
        packet->descriptor = -1;
    }
}

/* Sets connection to -errno where there is none; a stranger's is closed: SO_PEERCRED, unix(7). */
void native_accept(int listener, struct native_packet *packet) {
    struct ucred peer;
    socklen_t size = sizeof peer;
    int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    packet->connection = connection < 0 ? -errno : connection;
    if (connection < 0)
        return;
    if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 ||
        peer.uid != geteuid()) {
        close(connection);
        packet->connection = -EPERM;
        return;
    }
    native_receive(connection, packet);
    packet->pid = peer.pid;
}

static struct protocol_answer answer_of(int kind, int error) {
    return (struct protocol_answer){.magic = PROTOCOL_MAGIC,
                                    .version = PROTOCOL_VERSION,
                                    .kind = (uint16_t)kind,
                                    .error = error};
}

/* Sends what stands before `place` in the answer, and the text there. */
static void send_answer(int connection, struct protocol_answer *answer, char *place,
                        const char *text) {
    size_t length = strlen(text);

    if (length >= PROTOCOL_TEXT)
        length = PROTOCOL_TEXT - 1;
    memcpy(place, text, length);
    send(connection, answer, (size_t)(place - (char *)answer) + length,
         MSG_NOSIGNAL | MSG_DONTWAIT);
}

void native_send(int connection, int kind, int error, const char *text) {
    struct protocol_answer answer = answer_of(kind, error);

    send_answer(connection, &answer, answer.text, text);
}

void native_send_found(int connection, int exclusive, int pid, int64_t first, int64_t last,
                       const char *holder) {
    struct protocol_answer answer = answer_of(KIND_FOUND, 0);

    answer.found.exclusive = exclusive;
    answer.found.first = first;
    answer.found.last = last;
    answer.found.pid = pid;
    send_answer(connection, &answer, answer.found.holder, holder);
}

void native_answer(int connection, int kind, int error, const char *text) {
    native_send(connection, kind, error, text);
    close(connection);
}

void native_stop_receiving(int connection) {
    shutdown(connection, SHUT_RD);
}

int native_try_lock(int descriptor, int exclusive) {
    struct stat status;

    if (flock(descriptor, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) < 0)
        return errno == EWOULDBLOCK ? 0 : -errno;
    return fstat(descriptor, &status) == 0 && status.st_nlink ? 1 : -ENOENT;
}
