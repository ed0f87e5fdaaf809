#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#include "client.h"
#include "protocol.h"
#include "rendezvous.h"
#include "report.h"
#include "start.h"
#include "syscalls.h"
#include "text.h"

/* How often a call may lose its keeper (killed, or leaving just then) before the user is told. */
#define MAX_LOST 20
#define MAX_STARTS 5
#define SPIN_NANOSECONDS 50000

enum outcome { ANSWERED, LOST, NO_KEEPER, REDIRECTED, REFUSED };

struct call {
    const struct config *config;
    struct rendezvous rendezvous;
    struct protocol_request request;
    int blocking;
    long socket;
    ino_t socket_inode;
    struct protocol_answer answer;
    const char *refusal;
    int waited;      /* and the user was told */
    int interrupted; /* by a signal, and then the keeper was lost */
};

static enum outcome refuse(struct call *call, const char *why) {
    call->refusal = why;
    return REFUSED;
}

/* Another thread may close every descriptor while this one waits, and open its own. */
static int is_our_socket(const struct call *call) {
    struct stat status;

    return sys2(SYS_fstat, call->socket, &status) == 0 && status.st_ino == call->socket_inode &&
           S_ISSOCK(status.st_mode);
}

static void close_socket(const struct call *call) {
    if (is_our_socket(call))
        sys1(SYS_close, call->socket);
}

static enum outcome open_socket(struct call *call) {
    struct stat status;

    call->socket = sys3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (call->socket == -EMFILE || call->socket == -ENFILE)
        return refuse(call,
                      "no descriptor is left for asking the keeper; raise the limit (ulimit -n)");
    if (call->socket < 0)
        return refuse(call, "no socket can be made for asking the keeper");
    sys2(SYS_fstat, call->socket, &status);
    call->socket_inode = status.st_ino;
    return ANSWERED;
}

/* A socket of somebody else's in the directory's place would hand out locks as it likes: unix(7),
 * SO_PEERCRED. */
static enum outcome connect_keeper(struct call *call) {
    struct ucred peer;
    int size = sizeof peer;
    long result;

    do
        result = sys3(SYS_connect, call->socket, &call->rendezvous.address,
                      sizeof call->rendezvous.address);
    while (result == -EINTR);
    if (result < 0)
        return NO_KEEPER;
    if (sys5(SYS_getsockopt, call->socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 ||
        peer.uid != sys0(SYS_geteuid))
        return refuse(call, "the keeper's socket belongs to another user; set FLOCKSHIM_DIR");
    return ANSWERED;
}

static long send_request(struct call *call, int with_descriptor) {
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.head = {.cmsg_len = CMSG_LEN(sizeof(int)),
                          .cmsg_level = SOL_SOCKET,
                          .cmsg_type = SCM_RIGHTS}};
    struct iovec part = {.iov_base = &call->request, .iov_len = sizeof call->request};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    long result;

    if (with_descriptor) {
        *(int *)CMSG_DATA(&control.head) = call->request.descriptor;
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
    }
    do
        result = sys3(SYS_sendmsg, call->socket, &message, MSG_NOSIGNAL);
    while (result == -EINTR);
    return result;
}

static long send_word(struct call *call, enum protocol_kind kind) {
    long result;

    if (!is_our_socket(call))
        return -EBADF;
    call->request.kind = (uint16_t)kind;
    result = send_request(call, 0);
    call->request.kind = KIND_LOCK;
    return result;
}

/* A descriptor that was closed while its lock call waited may be another file by now. If granted
 * all the same, the lock has ended with the description, as it would have in the kernel. */
static int is_same_file(const struct call *call) {
    struct stat status;

    return sys2(SYS_fstat, call->request.descriptor, &status) == 0 &&
           status.st_dev == call->request.device && status.st_ino == call->request.inode;
}

/* The next keeper knows whether the last one had granted the lock just before a signal came. */
static enum outcome lose(struct call *call, int cancelled) {
    if (cancelled) {
        call->request.operation |= LOCK_NB;
        call->blocking = 0;
        call->interrupted = 1;
    }
    return LOST;
}

static long receive(struct call *call, int flags) {
    return sys6(SYS_recvfrom, call->socket, SYS_ARG(&call->answer), sizeof call->answer - 1, flags,
                0, 0);
}

static int64_t now_in_nanoseconds(void) {
    struct timespec now = {0};

    sys2(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* An answer mostly comes within some ten microseconds: less than a processor may need to fall
 * asleep and be woken (a third of a whole lock and unlock as measured). Yielding lets the keeper
 * run where there is but one processor. */
static long receive_soon(struct call *call) {
    int64_t end = now_in_nanoseconds() + SPIN_NANOSECONDS;
    long got;

    do {
        got = receive(call, MSG_DONTWAIT);
        if (got != -EAGAIN)
            return got;
        sys0(SYS_sched_yield);
    } while (now_in_nanoseconds() < end);
    return got;
}

/* recvfrom(2) on a socket is interrupted and restarted by signals exactly as flock(2) is. After an
 * interruption the keeper has the last word, since it may have granted the lock just before. */
static enum outcome receive_answer(struct call *call) {
    int cancelled = 0, reset = 0;

    for (;;) {
        long got = receive_soon(call);

        if (got == -EAGAIN)
            got = receive(call, 0);
        if (got == -EINTR) {
            if (call->blocking && !cancelled) {
                send_word(call, KIND_CANCEL);
                cancelled = 1;
            }
            continue;
        }
        /* A keeper that closes before it has read our second packet resets the connection, and the
         * kernel tells that before it hands out the answer: unix(7). */
        if (got == -ECONNRESET && !reset) {
            reset = 1;
            continue;
        }
        if (got < PROTOCOL_ANSWER_HEAD || call->answer.magic != PROTOCOL_MAGIC) {
            return lose(call, cancelled);
        }
        ((char *)&call->answer)[got] = 0;
        if (call->answer.kind == KIND_WAITING) {
            report_waiting(call->config, call->request.descriptor, call->answer.text);
            call->waited = 1;
            continue;
        }
        /* The lock is ours only if the keeper learns that we are still here: a call that was left
         * by longjmp(3) or exec, or is stopped, must not be served. */
        if (call->answer.kind == KIND_GRANT && send_word(call, KIND_TAKEN) < 0)
            return is_same_file(call) ? lose(call, cancelled) : ANSWERED;
        if (call->answer.kind == KIND_REFUSAL)
            return refuse(call, call->answer.text);
        return call->answer.kind == KIND_REDIRECT ? REDIRECTED : ANSWERED;
    }
}

static enum outcome ask(struct call *call) {
    enum outcome outcome = open_socket(call);

    if (outcome != ANSWERED)
        return outcome;
    outcome = connect_keeper(call);
    if (outcome == ANSWERED) {
        long sent = send_request(call, 1);

        if (sent == -ETOOMANYREFS)
            outcome =
                refuse(call, "too many descriptors are on their way; raise the limit (ulimit -n)");
        else
            outcome = sent < 0 ? LOST : receive_answer(call);
    }
    close_socket(call);
    return outcome;
}

/* Nobody listens: our own keeper must be started, unless there is nothing to unlock. */
static enum outcome find_keeper(struct call *call, int redirected) {
    const char *failure;

    if (redirected) {
        rendezvous_find(call->config, &call->rendezvous);
        return LOST;
    }
    if (call->request.operation == LOCK_UN)
        return ANSWERED;
    failure = start_keeper(call->config, &call->rendezvous);
    return failure ? refuse(call, failure) : NO_KEEPER;
}

static enum outcome ask_until_answered(struct call *call) {
    int starts = 0, redirected = 0;

    for (int lost = 0; lost < MAX_LOST && starts <= MAX_STARTS;) {
        enum outcome outcome = ask(call);

        if (outcome == NO_KEEPER) {
            outcome = find_keeper(call, redirected);
            redirected = 0;
        } else if (outcome == REDIRECTED) {
            redirected = rendezvous_set_key(&call->rendezvous, call->answer.text) == 0;
        }
        if (outcome == ANSWERED || outcome == REFUSED)
            return outcome;
        starts += outcome == NO_KEEPER;
        lost += outcome != NO_KEEPER;
        if (!is_same_file(call)) {
            call->answer.error = EBADF;
            return ANSWERED;
        }
    }
    return refuse(call,
                  "the keeper does not stay alive; see keeper.log in the rendezvous directory");
}

int client_flock(const struct config *config, int descriptor, int operation, int kernel_error) {
    struct call call = {.config = config, .blocking = !(operation & LOCK_NB)};
    struct stat status;
    int result = (int)sys2(SYS_fstat, descriptor, &status);

    if (operation & LOCK_UN) {
        operation = LOCK_UN;
        call.blocking = 0;
    }
    if (result < 0)
        return result;
    call.request = (struct protocol_request){.magic = PROTOCOL_MAGIC,
                                             .version = PROTOCOL_VERSION,
                                             .kind = KIND_LOCK,
                                             .operation = operation,
                                             .descriptor = descriptor,
                                             .device = status.st_dev,
                                             .inode = status.st_ino,
                                             .flags = config->verbose ? FLAG_VERBOSE : 0};
    if (config->bad) {
        char what[128];
        struct text text = text_over(what, sizeof what);

        text_add(&text, config->bad);
        text_add(&text, " cannot be understood; see flockshim --help");
        report(config, descriptor, what);
        return -kernel_error;
    }
    if (rendezvous_find(config, &call.rendezvous) < 0) {
        report(config, descriptor,
               "the name of the rendezvous directory is too long; set FLOCKSHIM_DIR");
        return -kernel_error;
    }
    if (ask_until_answered(&call) == REFUSED && !call.interrupted) {
        report(config, descriptor, call.refusal);
        return -kernel_error;
    }
    if (call.interrupted && (call.refusal || call.answer.error == EWOULDBLOCK))
        return -EINTR;
    if (call.waited && !call.answer.error)
        report_waited(config, descriptor);
    return -call.answer.error;
}
