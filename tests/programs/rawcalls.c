/*
 * Makes system calls by their numbers, with no C library between, and prints what each returned:
 *
 *     rawcalls WORD…
 *
 * where a word is
 *     /PATH                       opens that file (made if missing); its number is the lowest free
 *     native:NUMBER:ONE:TWO       a call as this program's architecture makes it
 *     i386:NUMBER:ONE:TWO         one of the 32-bit programs of an x86_64
 *     -                           waits for a line
 *     sleep                       waits for ever
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static long native(long number, long one, long two) {
#if defined(__x86_64__)
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(one), "S"(two), "d"(0)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long call __asm__("x8") = number;
    register long first __asm__("x0") = one;
    register long second __asm__("x1") = two;
    register long third __asm__("x2") = 0;

    __asm__ volatile("svc 0" : "+r"(first) : "r"(call), "r"(second), "r"(third) : "memory");
    return first;
#endif
}

static int i386(int number, int one, int two) {
#if defined(__x86_64__)
    int result;

    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(one), "c"(two), "d"(0)
                     : "r8", "r9", "r10", "r11", "memory");
    return result;
#else
    (void)number, (void)one, (void)two;
    abort();
#endif
}

static void call(const char *word) {
    char way[8];
    long number, one, two;

    if (sscanf(word, "%7[^:]:%li:%li:%li", way, &number, &one, &two) != 4) {
        fprintf(stderr, "rawcalls: cannot read %s\n", word);
        exit(125);
    }
    if (strcmp(way, "i386") == 0)
        printf("%d\n", i386((int)number, (int)one, (int)two));
    else
        printf("%ld\n", native(number, one, two));
    fflush(stdout);
}

int main(int argc, char **argv) {
    char line[80];

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "sleep") == 0) {
            for (;;)
                pause();
        } else if (strcmp(argv[i], "-") == 0) {
            if (!fgets(line, sizeof line, stdin))
                return 1;
        } else if (*argv[i] == '/') {
            if (open(argv[i], O_RDWR | O_CREAT, 0666) < 0) {
                perror(argv[i]);
                return 125;
            }
        } else {
            call(argv[i]);
        }
    }
    return 7;
}
