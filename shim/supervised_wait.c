/* Supervised calls that the kernel refuses: the shim's own client asks the keeper, as it would in
 * the program. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/file.h>
#include <unistd.h>

#include "lock.h"
#include "native.h"
#include "report.h"
#include "supervise.h"

/* The calls that are with the keeper. */
static struct {
    pthread_mutex_t mutex;
    pthread_cond_t left;
    struct lock_call *first;
} waiting = {.mutex = PTHREAD_MUTEX_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

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

/* A thread makes one call at a time, so an older one of it is gone. */
static struct lock_call *find_gone(const struct lock_call *call) {
    struct lock_call *other = waiting.first;

    while (other && other->tid != call->tid &&
           !(is_same_file(&other->status, &call->status) && call_is_gone(other)))
        other = other->next;
    return other;
}

/* A call that is made again after a signal, by the kernel (SA_RESTART) or by the program, keeps its
 * place among those who wait. A program that is interrupted all the time would else never be
 * served.
 */
static int is_made_again(const struct lock_call *other, const struct lock_call *call) {
    return other->tid == call->tid && !other->leaving && other->operation == call->operation &&
           !(call->operation & (LOCK_NB | LOCK_UN)) &&
           native_same_description(other->target.descriptor, call->target.descriptor) == 1;
}

/* Whether this thread shall ask the keeper for the call. Before, others that are gone have been
 * withdrawn there. */
static int begin(struct lock_call *call) {
    const uint64_t event = 1;
    struct lock_call *other;
    int begins = 1;

    pthread_mutex_lock(&waiting.mutex);
    while (begins && (other = find_gone(call)) != NULL) {
        if (is_made_again(other, call)) {
            other->id = call->id;
            begins = 0;
        } else if (write(other->wake, &event, sizeof event) > 0) {
            pthread_cond_wait(&waiting.left, &waiting.mutex);
            begins = !call_is_gone(call);
        }
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

static int deliver(void *lock_call) {
    struct lock_call *call = lock_call;
    int result;

    pthread_mutex_lock(&waiting.mutex);
    call->leaving = 1;
    pthread_mutex_unlock(&waiting.mutex);
    close(call->target.descriptor);
    result = call_reply(call, 0);
    call->delivered = 1;
    return result;
}

static int ask_keeper(const struct lock_call *call, struct client_wait *wait, int may_wait,
                      int kernel_error) {
    const struct config *config = supervisor.config;
    int operation = call->operation | (may_wait ? 0 : LOCK_NB);
    int result = lock_by_mode(config, wait, call->target.descriptor, operation, kernel_error);

    if (wait->timed_out) {
        report_timeout(config, call->target.descriptor, wait->refusal);
    } else if (*wait->refusal) {
        report(config, call->target.descriptor, wait->refusal);
    } else if (result == -EWOULDBLOCK && !(call->operation & LOCK_NB)) {
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
    int may_wait = have_another_listen() && call->wake >= 0;
    int result;

    if (!begin(call)) {
        close(call->target.descriptor);
        return;
    }
    result = ask_keeper(call, &wait, may_wait, kernel_error);
    leave(call);
    if (!call->delivered) {
        close(call->target.descriptor);
        call_reply(call, result);
    }
}
