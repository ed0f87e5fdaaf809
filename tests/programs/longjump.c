/*
 * Gives up a waiting flock(2) by the old idiom for a time limit: siglongjmp(3) out of the handler.
 * Prints its pid, a line after the jump, and one for every line of its input with the errno of a
 * new try.
 *
 *     longjump FILE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/file.h>
#include <unistd.h>

static sigjmp_buf before;

static void on_alarm(int which) {
    siglongjmp(before, which);
}

int main(int argc, char **argv) {
    if (argc != 2)
        return 2;
    int file = open(argv[1], O_RDWR);
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGALRM, on_alarm);
    printf("%d\n", (int)getpid());
    if (sigsetjmp(before, 1) == 0)
        flock(file, LOCK_EX);
    else
        puts("jumped");
    while (getchar() != EOF)
        printf("%d\n", flock(file, LOCK_EX | LOCK_NB) < 0 ? errno : 0);
    return 0;
}
