/*
 * Groups of processes, each with one open file description for all of its members, lock one file
 * while a timer interrupts them all the time. In a round every member asks for the lock and may
 * give up when it is interrupted. Who has got it must be alone with its group until the first
 * member unlocks for all; where none has got it nobody unlocks, and others must not be kept out.
 *
 *     storm FILE GROUPS MEMBERS ROUNDS MICROSECONDS FLAGS SHARED
 *
 * FLAGS are those of sigaction(2). In every SHARED-th round, if that is not 0, a group asks for a
 * shared lock. Prints how many locks were had and how many calls were interrupted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

enum { GROUPS_MAX = 16, TRIES = 3 };

struct board {
    pthread_barrier_t barrier[GROUPS_MAX];
    _Atomic int had[GROUPS_MAX];    /* members of the group that have the lock in this round */
    _Atomic int inside[GROUPS_MAX]; /* 1: shared, 2: exclusive; of the whole group */
    _Atomic long locks, interruptions, rounds;
};

static struct board *board;
static int groups, members, rounds, microseconds, flags, shared_round;

static void fail(const char *what, int group, int round) {
    fprintf(stderr, "group %d, round %d: %s (errno %d)\n", group, round, what, errno);
    kill(0, SIGKILL);
}

static void on_signal(int which) {
    (void)which;
}

static void check_alone(int group, int exclusive, int round) {
    for (int other = 0; other < groups; other++) {
        int there = other == group ? 0 : atomic_load(&board->inside[other]);

        if (there == 2 || (there == 1 && exclusive))
            fail("another group is inside", group, round);
    }
}

static int ask(int file, int operation, int tries, int group, int round) {
    while (flock(file, operation) < 0) {
        if (errno != EINTR)
            fail("flock", group, round);
        atomic_fetch_add(&board->interruptions, 1);
        if (--tries == 0)
            return 0;
    }
    return 1;
}

static void play(int file, int group, int member, int round) {
    int exclusive = !shared_round || (round + group) % shared_round;

    if (ask(file, exclusive ? LOCK_EX : LOCK_SH, TRIES, group, round)) {
        atomic_fetch_add(&board->locks, 1);
        atomic_fetch_add(&board->had[group], 1);
        atomic_store(&board->inside[group], exclusive ? 2 : 1);
        check_alone(group, exclusive, round);
        sched_yield();
        check_alone(group, exclusive, round);
    }
    pthread_barrier_wait(&board->barrier[group]);
    if (member == 0) {
        if (atomic_exchange(&board->had[group], 0)) {
            check_alone(group, exclusive, round);
            atomic_store(&board->inside[group], 0);
            ask(file, LOCK_UN, -1, group, round);
        }
        atomic_fetch_add(&board->rounds, 1);
    }
    pthread_barrier_wait(&board->barrier[group]);
}

static void be_member(int file, int group, int member) {
    struct itimerval timer = {.it_interval.tv_usec = microseconds,
                              .it_value.tv_usec = microseconds};

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setitimer(ITIMER_REAL, &timer, NULL);
    for (int round = 0; round < rounds; round++)
        play(file, group, member, round);
    exit(0);
}

int main(int argc, char **argv) {
    struct sigaction action = {.sa_handler = on_signal};
    pthread_barrierattr_t across;

    if (argc != 8)
        return 2;
    groups = atoi(argv[2]);
    members = atoi(argv[3]);
    rounds = atoi(argv[4]);
    microseconds = atoi(argv[5]);
    flags = atoi(argv[6]);
    shared_round = atoi(argv[7]);
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_barrierattr_init(&across);
    pthread_barrierattr_setpshared(&across, PTHREAD_PROCESS_SHARED);
    setpgid(0, 0);
    action.sa_flags = flags;
    sigaction(SIGALRM, &action, NULL);
    for (int group = 0; group < groups; group++) {
        int file = open(argv[1], O_RDWR | O_CREAT, 0666);

        pthread_barrier_init(&board->barrier[group], &across, (unsigned)members);
        for (int member = 0; member < members; member++) {
            if (fork() == 0)
                be_member(file, group, member);
        }
        close(file);
    }
    for (int status; wait(&status) > 0;) {
        if (status)
            return 1;
    }
    printf("locks %ld interruptions %ld rounds %ld\n", board->locks, board->interruptions,
           board->rounds);
    return 0;
}
