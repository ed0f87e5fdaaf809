/* Takes and gives back the flock(2) of a file. For each line with a number on standard input: that
 * many times, and the nanoseconds that it took on standard output. usage: pairs unlock|close FILE
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

static long long nanoseconds(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int open_file(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    if (file < 0) {
        perror(path);
        exit(1);
    }
    return file;
}

static void lock(int file, int operation) {
    if (flock(file, operation) < 0) {
        perror("flock");
        exit(1);
    }
}

/* The lock is given back by closing: what `with open(...)` in Python or a C++ destructor does. */
static void open_lock_close(const char *path) {
    int file = open_file(path);

    lock(file, LOCK_EX);
    close(file);
}

static void lock_unlock(int file) {
    lock(file, LOCK_EX);
    lock(file, LOCK_UN);
}

int main(int count, char **words) {
    int closing = count == 3 && strcmp(words[1], "close") == 0;
    int file = count == 3 && !closing ? open_file(words[2]) : -1;
    long pairs;

    if (count != 3) {
        fprintf(stderr, "usage: pairs unlock|close FILE\n");
        return 2;
    }
    while (scanf("%ld", &pairs) == 1) {
        long long start = nanoseconds();

        for (long i = 0; i < pairs; i++) {
            if (closing)
                open_lock_close(words[2]);
            else
                lock_unlock(file);
        }
        printf("%lld\n", nanoseconds() - start);
        fflush(stdout);
    }
    return 0;
}
