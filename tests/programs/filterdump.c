/*
 * Prints the seccomp filters of shim/filter.c, which it is linked with, instead of installing them:
 *
 *     filterdump report
 *     filterdump answer ERRNO
 *
 * one instruction a line: code, the two jumps, value.
 */
#include <linux/filter.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#include "native.h"

long syscall(long number, ...) {
    const struct sock_fprog *program;
    va_list arguments;

    va_start(arguments, number);
    va_arg(arguments, int);
    va_arg(arguments, unsigned);
    program = va_arg(arguments, const struct sock_fprog *);
    va_end(arguments);
    if (number != SYS_seccomp)
        abort();
    for (unsigned short i = 0; i < program->len; i++)
        printf("%u %u %u %u\n", program->filter[i].code, program->filter[i].jt,
               program->filter[i].jf, program->filter[i].k);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "report") == 0)
        return native_report_lock_calls();
    if (argc == 3 && strcmp(argv[1], "answer") == 0)
        return native_answer_lock_calls(atoi(argv[2]));
    return 125;
}
