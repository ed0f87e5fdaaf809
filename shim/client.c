#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#include "channel.h"
#include "client.h"
#include "protocol.h"
#include "rendezvous.h"
#include "report.h"
#include "shared.h"
#include "start.h"
#include "syscalls.h"
#include "text.h"

/* How often a call may lose its keeper (killed, or leaving just then) before the user is told. */
#define MAX_LOST 20
#define MAX_STARTS 5
#define STOPPED_MILLISECONDS 6000 /* more than the keeper needs to decide about LOCK_NB */
#define GONE_MILLISECONDS 100     /* how late a supervised call's end by a signal may be noticed */
#define SPIN_NANOSECONDS 50000
#define NANOSECONDS_IN_A_SECOND INT64_C(1000000000)
#define NANOSECONDS_IN_A_MILLISECOND 1000000

enum outcome { ANSWERED, LOST, NO_KEEPER, REDIRECTED, REFUSED };

struct call {
    const struct config *config;
    struct client_wait *wait;
    int descriptor;
    struct rendezvous rendezvous;
    struct protocol_request request;
    int blocking;
    struct channel channel;
    struct protocol_answer answer;
    const char *refusal;
    int64_t begin;   /* monotonic, nanoseconds */
    int told;        /* the user, of our waiting */
    int interrupted; /* by a signal, and then the keeper was lost */
};

static enum outcome refuse(struct call *call, const char *why) {
    call->refusal = why;
    return REFUSED;
}

static enum outcome connect_keeper(struct call *call) {
    long result = channel_connect(&call->channel, &call->rendezvous.address);

    if (result == -EPERM)
        return refuse(call, "the keeper's socket belongs to another user; set FLOCKSHIM_DIR");
    return result < 0 ? NO_KEEPER : ANSWERED;
}

static long send_word(const struct call *call, enum protocol_kind kind) {
    struct protocol_request word = call->request;

    if (!channel_is_intact(&call->channel))
        return -EBADF;
    word.kind = (uint16_t)kind;
    return channel_send(&call->channel, &word, -1);
}

/* A descriptor that was closed while its lock call waited may be another file by now. If granted
 * all the same, the lock has ended with the description, as it would have in the kernel. */
static int is_same_file(const struct call *call) {
    struct stat status;

    return sys2(SYS_fstat, call->descriptor, &status) == 0 &&
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

static int64_t now_in_nanoseconds(void) {
    struct timespec now = {0};

    sys2(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * NANOSECONDS_IN_A_SECOND + now.tv_nsec;
}

/* Of the timeout, in milliseconds: a keeper may have been lost meanwhile. */
static int32_t time_left(const struct call *call) {
    int64_t passed;

    if (call->wait->timeout < 0)
        return -1;
    passed = (now_in_nanoseconds() - call->begin) / NANOSECONDS_IN_A_MILLISECOND;
    return passed < call->wait->timeout ? (int32_t)(call->wait->timeout - passed) : 0;
}

static long receive(struct call *call, int flags) {
    return channel_receive(&call->channel, &call->answer, flags);
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

/* Whether nobody is there any more to be answered. */
static int is_gone(const struct call *call) {
    return call->wait->gone && call->wait->gone(call->wait->call);
}

/* How long our own callers wait for a keeper that may be stopped, in milliseconds: it should have
 * told them before that their timeout is over, or that somebody else holds the lock. */
static int32_t patience(const struct call *call) {
    /* A supervisor waits as its program would. */
    if (call->wait->gone || (call->blocking && call->wait->timeout < 0))
        return INT32_MAX;
    return STOPPED_MILLISECONDS + (call->blocking ? time_left(call) : 0);
}

static long poll_for_answer(struct call *call, int32_t milliseconds) {
    struct pollfd events[] = {{.fd = (int)call->channel.socket, .events = POLLIN},
                              {.fd = call->wait->cancel, .events = POLLIN}};
    struct timespec limit = {.tv_sec = milliseconds / 1000,
                             .tv_nsec = milliseconds % 1000 * NANOSECONDS_IN_A_MILLISECOND};
    long result = sys5(SYS_ppoll, events, call->blocking ? 2 : 1, &limit, NULL, 0);

    if (result <= 0)
        return result < 0 ? result : -ETIME;
    return events[0].revents ? receive(call, MSG_DONTWAIT) : -EINTR;
}

static long wait_for_answer(struct call *call) {
    long got;

    if (!call->blocking || !call->wait->receive)
        return receive(call, 0);
    got = call->wait->receive((int)call->channel.socket, &call->answer, sizeof call->answer - 1);
    if (got >= 0)
        ((char *)&call->answer)[got] = 0;
    return got;
}

static long receive_with_patience(struct call *call) {
    int looks = call->blocking && call->wait->gone;
    int32_t left;
    long result;

    if (!call->wait->poll)
        return wait_for_answer(call);
    left = patience(call);
    do {
        int32_t slice = looks && left > GONE_MILLISECONDS ? GONE_MILLISECONDS : left;

        result = poll_for_answer(call, slice);
        if (result == -ETIME && looks && is_gone(call))
            return -EINTR;
        if (left != INT32_MAX)
            left -= slice;
    } while (result == -ETIME && left > 0);
    return result;
}

static void tell_waited(const struct call *call) {
    if (call->told)
        report_waited(call->config, call->descriptor,
                      (now_in_nanoseconds() - call->begin) / NANOSECONDS_IN_A_SECOND);
}

/* Whether the supervised program has heard that it has the lock. The keeper keeps it for that
 * program until we say so or not: should we be killed in between, the program may have heard. */
static int is_delivered(struct call *call) {
    tell_waited(call);
    call->told = 0;
    return call->wait->deliver(call->wait->call) == 0;
}

/* As in fcntl_setlk in the kernel's fs/locks.c: another thread has closed the descriptor, and so
 * ended the lock. The keeper finds that out, too. */
static int is_had_in_vain(const struct call *call) {
    const struct protocol_answer *answer = &call->answer;

    return call->request.family == FAMILY_PROCESS &&
           !(call->request.operation & (LOCK_UN | LOCK_TEST)) &&
           (answer->kind == KIND_GRANT || (answer->kind == KIND_ANSWER && !answer->error)) &&
           !is_same_file(call);
}

/* recvfrom(2) on a socket is interrupted and restarted by signals exactly as flock(2) is. After an
 * interruption the keeper has the last word, since it may have granted the lock just before. */
static enum outcome receive_answer(struct call *call) {
    int cancelled = 0, reset = 0;

    for (;;) {
        long got = receive_soon(call);

        if (got == -EAGAIN)
            got = cancelled ? receive(call, 0) : receive_with_patience(call);
        if (got == -EINTR) {
            /* The same call may have been made again meanwhile. */
            if (call->wait->gone && !is_gone(call))
                continue;
            if (call->blocking && !cancelled) {
                send_word(call, KIND_CANCEL);
                cancelled = 1;
            }
            continue;
        }
        if (got == -ETIME)
            return refuse(call, "the keeper does not answer; is it stopped? See flockshim --locks");
        /* A keeper that closes before it has read our second packet resets the connection, and the
         * kernel tells that before it hands out the answer: unix(7). */
        if (got == -ECONNRESET && !reset) {
            reset = 1;
            continue;
        }
        if (got < PROTOCOL_ANSWER_HEAD || call->answer.magic != PROTOCOL_MAGIC)
            return lose(call, cancelled);
        if (call->answer.kind == KIND_WAITING) {
            report_waiting(call->config, call->descriptor, call->answer.text);
            call->told = 1;
            call->request.flags &= ~FLAG_TELL;
            continue;
        }
        if (call->answer.kind == KIND_GRANT && call->wait->deliver) {
            if (!cancelled && is_delivered(call)) {
                send_word(call, KIND_TAKEN);
                return ANSWERED;
            }
            /* Whoever comes after us must not find our request. */
            if (!cancelled)
                send_word(call, KIND_CANCEL);
            cancelled = 1;
            continue;
        }
        if (is_had_in_vain(call)) {
            call->answer.error = EBADF;
            return ANSWERED;
        }
        /* The lock is ours only if the keeper learns that we are still here: a call that was left
         * by longjmp(3) or exec, or is stopped, must not be served. */
        if (call->answer.kind == KIND_GRANT && send_word(call, KIND_TAKEN) < 0)
            return is_same_file(call) ? lose(call, cancelled) : ANSWERED;
        call->wait->timed_out = call->answer.kind == KIND_TIMEOUT;
        call->wait->is_found = call->answer.kind == KIND_FOUND;
        if (call->wait->is_found)
            call->wait->found = call->answer.found;
        if (call->answer.kind == KIND_REFUSAL || call->answer.kind == KIND_TIMEOUT)
            return refuse(call, call->answer.text);
        return call->answer.kind == KIND_REDIRECT ? REDIRECTED : ANSWERED;
    }
}

static enum outcome ask(struct call *call) {
    enum outcome outcome;
    const char *failure = channel_open(&call->channel);

    if (failure)
        return refuse(call, failure);
    outcome = connect_keeper(call);
    if (outcome == ANSWERED) {
        long sent;

        call->request.timeout = time_left(call);
        sent = channel_send(&call->channel, &call->request, call->descriptor);
        if (sent == -ETOOMANYREFS)
            outcome =
                refuse(call, "too many descriptors are on their way; raise the limit (ulimit -n)");
        else
            outcome = sent < 0 ? LOST : receive_answer(call);
    }
    channel_close(&call->channel);
    return outcome;
}

/* Who unlocks what nobody has locked, or asks about it, needs no keeper; but other hosts do not
 * need ours to lock. */
static int is_in_vain_without_keeper(const struct call *call) {
    int operation = call->request.operation;

    return operation == LOCK_UN || (operation & LOCK_TEST && !(call->request.flags & FLAG_CLUSTER));
}

/* Nobody listens: our own keeper must be started, unless there is nothing to unlock. A process that
 * was moved to another control group may have its lock from another keeper, to which ours will send
 * it. */
static enum outcome find_keeper(struct call *call, int redirected) {
    const char *failure;

    if (redirected) {
        call->request.flags &= ~FLAG_REDIRECTED;
        rendezvous_find(call->config, &call->rendezvous);
        return LOST;
    }
    if (is_in_vain_without_keeper(call) && !rendezvous_has_proxy(&call->rendezvous, &call->request))
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
            call->request.flags |= FLAG_REDIRECTED;
        }
        if (outcome == ANSWERED || outcome == REFUSED)
            return outcome;
        starts += outcome == NO_KEEPER;
        lost += outcome != NO_KEEPER;
        if (!is_same_file(call)) {
            call->answer.error = EBADF;
            return ANSWERED;
        }
        if (is_gone(call)) {
            call->interrupted = 1;
            return REFUSED;
        }
    }
    return refuse(call,
                  "the keeper does not stay alive; see keeper.log in the rendezvous directory");
}

/* An ioctl that only terminals know: isatty(3). */
static int is_terminal(int descriptor) {
    char settings[256];

    return sys3(SYS_ioctl, descriptor, TCGETS, settings) == 0;
}

static int shall_tell(const struct call *call) {
    return call->blocking && !call->config->quiet && (call->config->verbose || is_terminal(2));
}

static uint32_t flags_of(const struct call *call) {
    int cluster = is_for_all_hosts(call->config, call->descriptor);

    return (shall_tell(call) ? FLAG_TELL : 0) | (cluster ? FLAG_CLUSTER : 0) |
           (call->config->only_warn ? FLAG_ONLY_WARN : 0);
}

static enum outcome prepare(struct call *call, const struct stat *status,
                            const struct client_request *request) {
    int operation = request->operation & LOCK_TEST ? request->operation
                    : request->operation & LOCK_UN ? LOCK_UN
                                                   : request->operation;

    call->blocking = !(operation & (LOCK_NB | LOCK_UN | LOCK_TEST));
    if (call->blocking)
        call->begin = now_in_nanoseconds();
    call->request = (struct protocol_request){.magic = PROTOCOL_MAGIC,
                                              .version = PROTOCOL_VERSION,
                                              .kind = KIND_LOCK,
                                              .operation = operation,
                                              .family = request->family,
                                              .first = request->first,
                                              .last = request->last,
                                              .descriptor = call->wait->pid ? call->wait->number
                                                                            : call->descriptor,
                                              .pid = call->wait->pid,
                                              .device = status->st_dev,
                                              .inode = status->st_ino,
                                              .flags = flags_of(call)};
    if (call->config->bad) {
        struct text text = text_over(call->answer.text, sizeof call->answer.text);

        text_add(&text, call->config->bad);
        text_add(&text, " cannot be understood; see flockshim --help");
        return refuse(call, call->answer.text);
    }
    if (rendezvous_find(call->config, &call->rendezvous) < 0)
        return refuse(call, "the name of the rendezvous directory is too long; set FLOCKSHIM_DIR");
    return ANSWERED;
}

static void note_refusal(struct call *call) {
    struct text text = text_over(call->wait->refusal, sizeof call->wait->refusal);

    text_add(&text, call->refusal);
}

int client_lock(const struct config *config, struct client_wait *wait, int descriptor,
                const struct client_request *request) {
    struct call call = {.config = config, .wait = wait, .descriptor = descriptor};
    struct stat status;
    int result = (int)sys2(SYS_fstat, descriptor, &status);
    enum outcome outcome;

    if (result < 0)
        return result;
    outcome = prepare(&call, &status, request);
    if (outcome == ANSWERED)
        outcome = ask_until_answered(&call);
    if (call.interrupted && (outcome == REFUSED || call.answer.error == EWOULDBLOCK))
        return -EINTR;
    if (outcome == REFUSED)
        note_refusal(&call);
    else if (!call.answer.error)
        tell_waited(&call);
    return -call.answer.error;
}
