/* Takes and gives back the lock of a file's first byte, fcntl(2), or asks who has it. For each line
 * with a number on standard input: that many times, and the nanoseconds that it took on standard
 * output. usage: records process|more|description|ask FILE
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { WANTED, ANOTHER };

static long long nanoseconds(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void call(int file, int command, short type, off_t byte) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};

    if (fcntl(file, command, &lock) < 0) {
        perror("fcntl");
        exit(1);
    }
}

int main(int count, char **words) {
    const char *kind = count == 3 ? words[1] : "";
    int command = strcmp(kind, "ask") == 0           ? F_GETLK
                  : strcmp(kind, "description") == 0 ? F_OFD_SETLK
                                                     : F_SETLK;
    int file = count == 3 ? open(words[2], O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    long times;

    if (file < 0) {
        fprintf(stderr, "usage: records process|more|description|ask FILE\n");
        return 2;
    }
    /* What a database does inside a transaction: the process has locks of the file anyway. */
    if (strcmp(kind, "more") == 0)
        call(file, command, F_WRLCK, ANOTHER);
    while (scanf("%ld", &times) == 1) {
        long long start = nanoseconds();

        for (long i = 0; i < times; i++) {
            call(file, command, F_WRLCK, WANTED);
            if (command != F_GETLK)
                call(file, command, F_UNLCK, WANTED);
        }
        printf("%lld\n", nanoseconds() - start);
        fflush(stdout);
    }
    return 0;
}
