/*
 * Locks one byte as libmamba does: tries; if the byte is locked, waits for it in a thread, which
 * it cancels after some time; and unlocks by closing and removing the file.
 *
 *     lockfthread hold FILE MILLISECONDS     says what it does, and reads a line between
 *     lockfthread count FILE TURNS           adds as much to the number in FILE.number
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define POSITION 21
#define LONG 60000

static int file;

static int lock(int command) {
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = POSITION, .l_len = 1};
    return fcntl(file, command, &range);
}

static void *wait_for_it(void *result) {
    *(int *)result = lock(F_SETLKW);
    return NULL;
}

/* Whether the lock was had before the time was over. */
static int wait_in_thread(long milliseconds) {
    pthread_t thread;
    void *end;
    int result = -1;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += milliseconds % 1000 * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    if (pthread_create(&thread, NULL, wait_for_it, &result) != 0)
        return 0;
    if (pthread_timedjoin_np(thread, &end, &until) == 0)
        return result == 0;
    pthread_cancel(thread);
    pthread_join(thread, &end);
    return end != PTHREAD_CANCELED && result == 0;
}

static void acquire(const char *path, long milliseconds) {
    file = open(path, O_RDWR | O_CREAT, 0666);
    if (file == -1) {
        perror(path);
        exit(1);
    }
    if (lock(F_SETLK) == 0)
        return;
    if ((errno == EAGAIN || errno == EACCES) && wait_in_thread(milliseconds))
        return;
    fprintf(stderr, "Could not set lock (%s)\n", strerror(errno));
    exit(1);
}

static void say(const char *what) {
    puts(what);
    fflush(stdout);
    getchar();
}

static void hold(const char *path, long milliseconds) {
    acquire(path, milliseconds);
    say("locked");
    close(file);
    remove(path);
    say("unlocked");
}

/* Does not remove the file: who waits for it would lock another one than who comes later. */
static void count(const char *path, long turns) {
    char name[4096];
    snprintf(name, sizeof name, "%s.number", path);
    for (long i = 0; i < turns; i++) {
        acquire(path, LONG);
        long number = 0;
        FILE *numbers = fopen(name, "r+");
        if (!numbers || fscanf(numbers, "%ld", &number) != 1)
            exit(2);
        rewind(numbers);
        fprintf(numbers, "%ld\n", number + 1);
        fclose(numbers);
        close(file);
    }
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    (strcmp(argv[1], "hold") == 0 ? hold : count)(argv[2], atol(argv[3]));
    return 0;
}
