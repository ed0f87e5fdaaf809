/* Supervised calls that the kernel refuses: the shim's own client asks the keeper, as it would in
 * the program. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "lock.h"
#include "native.h"
#include "report.h"
#include "supervise.h"

/* How long a lock that was granted is kept for a program that was interrupted just then. */
#define RESTART_NANOSECONDS 20000000

/* The calls that are with the keeper. */
static struct {
    pthread_mutex_t mutex;
    pthread_cond_t left; /* or has been taken up again, or dismissed */
    struct lock_call *first;
} waiting = {.mutex = PTHREAD_MUTEX_INITIALIZER};

void supervised_wait_init(void) {
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&waiting.left, &attributes);
    pthread_condattr_destroy(&attributes);
}

static void forget_wakings(const struct lock_call *call) {
    uint64_t events;

    while (read(call->wake, &events, sizeof events) > 0)
        ;
}

static void enter(struct lock_call *call) {
    forget_wakings(call);
    call->next = waiting.first;
    waiting.first = call;
}

static void leave(const struct lock_call *call) {
    struct lock_call **place = &waiting.first;

    pthread_mutex_lock(&waiting.mutex);
    while (*place != call)
        place = &(*place)->next;
    *place = call->next;
    pthread_cond_broadcast(&waiting.left);
    pthread_mutex_unlock(&waiting.mutex);
}

/* Whether both are of one owner, as far as can be told: our duplicate may be closed. */
static int may_share(const struct lock_call *other, const struct lock_call *call) {
    if (!is_same_file(&other->status, &call->status) ||
        other->request.family != call->request.family)
        return 0;
    if (call->request.family == FAMILY_PROCESS)
        return other->target.pid == call->target.pid;
    return other->delivered ||
           native_same_description(other->target.descriptor, call->target.descriptor) != 0;
}

/* A thread makes one call at a time, so an older one of it is gone. Those of others matter where
 * they would change what this call gets: the lock of the same description. */
static struct lock_call *find_gone(const struct lock_call *call) {
    struct lock_call *other = waiting.first;

    while (other && other->tid != call->tid && !(may_share(other, call) && call_is_gone(other)))
        other = other->next;
    return other;
}

/* A call that is made again after a signal, by the kernel (SA_RESTART) or by the program, keeps its
 * place among those who wait. A program that is interrupted all the time would else never be
 * served.
 */
static int is_made_again(const struct lock_call *other, const struct lock_call *call) {
    const struct client_request *one = &other->request, *again = &call->request;

    return other->tid == call->tid && !other->leaving && one->family == again->family &&
           one->operation == again->operation && one->first == again->first &&
           one->last == again->last && !(again->operation & (LOCK_NB | LOCK_UN | LOCK_TEST)) &&
           native_same_description(other->target.descriptor, call->target.descriptor) == 1;
}

static void dismiss(struct lock_call *call) {
    const uint64_t event = 1;

    call->dismissed = 1;
    pthread_cond_broadcast(&waiting.left);
    if (write(call->wake, &event, sizeof event) < 0) {
        /* It looks by itself after a while. */
    }
}

int is_taken_up_again(const struct lock_call *call) {
    struct lock_call *other;

    pthread_mutex_lock(&waiting.mutex);
    for (other = waiting.first; other; other = other->next) {
        /* This thread may be slow, and another have come for a later notification. */
        if (is_made_again(other, call) && !call_is_gone(call)) {
            other->id = call->id;
            pthread_cond_broadcast(&waiting.left);
            break;
        }
    }
    pthread_mutex_unlock(&waiting.mutex);
    return other != NULL;
}

/* Whether this thread shall ask the keeper for the call. Before, others that are gone have been
 * withdrawn there. A call that is gone itself must not: its program may have gone on, and have made
 * another. */
static int begin(struct lock_call *call) {
    struct lock_call *other;
    int begins;

    pthread_mutex_lock(&waiting.mutex);
    /* Those who wait here are gone too if they are of the same thread. */
    pthread_cond_broadcast(&waiting.left);
    begins = !call_is_gone(call);
    while (begins && (other = find_gone(call)) != NULL) {
        /* Each dismissal wakes all who wait here. */
        if (!other->dismissed)
            dismiss(other);
        pthread_cond_wait(&waiting.left, &waiting.mutex);
        begins = !call_is_gone(call);
    }
    if (begins)
        enter(call);
    pthread_mutex_unlock(&waiting.mutex);
    return begins;
}

static int is_gone(void *lock_call) {
    struct lock_call *call = lock_call;

    pthread_mutex_lock(&waiting.mutex);
    forget_wakings(call);
    if (!call->leaving)
        call->leaving = call_is_gone(call);
    pthread_mutex_unlock(&waiting.mutex);
    return call->leaving;
}

static struct timespec soon(void) {
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    time.tv_nsec += RESTART_NANOSECONDS;
    if (time.tv_nsec >= 1000000000) {
        time.tv_nsec -= 1000000000;
        time.tv_sec++;
    }
    return time;
}

/* A program that is interrupted again and again is hardly ever found inside its call: it will be in
 * a moment, if it makes the call again. With the mutex held. */
static void await_program(const struct lock_call *call) {
    const struct timespec end = soon();

    while (call_is_gone(call) && !call->dismissed) {
        if (pthread_cond_timedwait(&waiting.left, &waiting.mutex, &end) != 0)
            return;
    }
}

/* Our duplicate is closed before, so that nobody finds the description open after the program has
 * closed it. */
static int deliver(void *lock_call) {
    struct lock_call *call = lock_call;
    int result;

    pthread_mutex_lock(&waiting.mutex);
    await_program(call);
    call->leaving = 1;
    call->delivered = 1;
    close(call->target.descriptor);
    result = call_reply(call, 0);
    pthread_mutex_unlock(&waiting.mutex);
    return result;
}

static int ask_keeper(const struct lock_call *call, struct client_wait *wait, int may_wait,
                      int kernel_error) {
    const struct config *config = supervisor.config;
    struct client_request request = call->request;
    int result;

    if (!may_wait)
        request.operation |= LOCK_NB;
    result = lock_by_mode(config, wait, call->target.descriptor, &request, kernel_error);

    if (wait->timed_out) {
        report_timeout(config, call->target.descriptor, wait->refusal);
    } else if (*wait->refusal) {
        report(config, call->target.descriptor, wait->refusal);
    } else if (result == -EWOULDBLOCK && !(call->request.operation & LOCK_NB)) {
        report(config, call->target.descriptor,
               "nothing is left to wait with; raise the limits (ulimit -u, ulimit -n)");
        return -kernel_error;
    }
    return result;
}

void emulate_call(struct lock_call *call, int kernel_error) {
    struct client_wait wait = {.timeout = supervisor.config->timeout,
                               .poll = 1,
                               .cancel = call->wake,
                               .pid = call->target.pid,
                               .number = call->target.number,
                               .gone = is_gone,
                               .deliver = deliver,
                               .call = call};
    int may_wait, result;

    begin_to_wait();
    may_wait = have_another_listen();
    if (!begin(call)) {
        close(call->target.descriptor);
        end_to_wait();
        return;
    }
    result = ask_keeper(call, &wait, may_wait, kernel_error);
    if (result == 0 && call->request.operation & LOCK_TEST && !call_is_gone(call))
        result = write_record_answer(call, &wait);
    leave(call);
    if (!call->delivered) {
        close(call->target.descriptor);
        call_reply(call, result);
    }
    end_to_wait();
}
