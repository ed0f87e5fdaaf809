/*
 * Calls lockf(3) as it is told. Reads lines "FUNCTION OPERATION POSITION LENGTH", FUNCTION being
 * lockf or lockf64 (which lockf is in a program built with _FILE_OFFSET_BITS=64), and answers each
 * with the value and the errno.
 *
 *     lockf FILE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ERRNO_BEFORE 1234

static int number_of(const char *operation) {
    static const struct {
        const char *name;
        int number;
    } known[] = {
        {"F_LOCK", F_LOCK}, {"F_TLOCK", F_TLOCK}, {"F_TEST", F_TEST}, {"F_ULOCK", F_ULOCK}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(operation, known[i].name) == 0)
            return known[i].number;
    return -1;
}

int main(int argc, char **argv) {
    char line[128], function[16], operation[16];
    long position, length;
    int file = open(argv[argc - 1], O_RDWR | O_CREAT, 0666);
    if (file == -1) {
        perror(argv[argc - 1]);
        return 1;
    }
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "%15s %15s %ld %ld", function, operation, &position, &length) != 4 ||
            lseek(file, position, SEEK_SET) != position)
            return 2;
        errno = ERRNO_BEFORE;
        int value = strcmp(function, "lockf64") == 0 ? lockf64(file, number_of(operation), length)
                                                     : lockf(file, number_of(operation), length);
        printf("%d %d\n", value, errno);
        fflush(stdout);
    }
    return 0;
}
