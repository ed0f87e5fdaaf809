/*
 * Lets a signal and the grant of a lock cross, ROUNDS times: one thread waits for the lock, a
 * second one gives it back, a third one interrupts the first, all let go at the same moment. After
 * EINTR the lock must not be held, after success it must. Prints how often which came.
 *
 *     crossing FILE ROUNDS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <unistd.h>

static int holder_fd, waiter_fd, probe_fd;
static pthread_t waiter;
static pthread_barrier_t start, end;
static int rounds;

static void require(int condition, const char *what, int round) {
    if (condition)
        return;
    fprintf(stderr, "round %d: %s (errno %d)\n", round, what, errno);
    exit(1);
}

static void on_signal(int which) {
    (void)which;
}

/* Moves the release and the signal past each other in steps from round to round. */
static void dawdle(int turns) {
    for (volatile int i = 0; i < turns; i++)
        continue;
}

static void *release(void *unused) {
    for (int i = 0; i < rounds; i++) {
        pthread_barrier_wait(&start);
        dawdle(i * 37 % 20000);
        require(flock(holder_fd, LOCK_UN) == 0, "release", i);
        pthread_barrier_wait(&end);
    }
    return unused;
}

static void *interrupt(void *unused) {
    for (int i = 0; i < rounds; i++) {
        pthread_barrier_wait(&start);
        dawdle(i * 53 % 20000);
        pthread_kill(waiter, SIGUSR1);
        pthread_barrier_wait(&end);
    }
    return unused;
}

static int is_held(void) {
    if (flock(probe_fd, LOCK_EX | LOCK_NB) < 0)
        return 1;
    flock(probe_fd, LOCK_UN);
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    int *descriptors[] = {&holder_fd, &waiter_fd, &probe_fd};
    for (int i = 0; i < 3; i++)
        *descriptors[i] = open(argv[1], O_RDWR | O_CREAT, 0666);
    rounds = atoi(argv[2]);
    waiter = pthread_self();
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    pthread_barrier_init(&start, NULL, 3);
    pthread_barrier_init(&end, NULL, 3);
    pthread_t releaser, interrupter;
    pthread_create(&releaser, NULL, release, NULL);
    pthread_create(&interrupter, NULL, interrupt, NULL);
    int granted = 0, interrupted = 0;
    for (int i = 0; i < rounds; i++) {
        require(flock(holder_fd, LOCK_EX) == 0, "hold", i);
        pthread_barrier_wait(&start);
        int result = flock(waiter_fd, LOCK_EX), err = errno;
        pthread_barrier_wait(&end);
        if (result == 0) {
            require(is_held(), "granted and not held", i);
            require(flock(waiter_fd, LOCK_UN) == 0, "give back", i);
            granted++;
        } else {
            errno = err;
            require(err == EINTR, "neither granted nor interrupted", i);
            require(!is_held(), "interrupted and held", i);
            interrupted++;
        }
    }
    pthread_join(releaser, NULL);
    pthread_join(interrupter, NULL);
    printf("granted %d interrupted %d\n", granted, interrupted);
    return 0;
}
