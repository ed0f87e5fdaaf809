/* Walks over /proc: processes, and threads with a descriptor table of their own; files in their
 * directories. */
#ifndef FLOCKSHIM_PROCESSES_H
#define FLOCKSHIM_PROCESSES_H

#include <sys/types.h>

typedef int (*process_test)(void *argument, pid_t pid);
struct search;
typedef int (*descriptor_test)(const struct search *search, pid_t pid, int number);

/* 1 as soon as test is true of a process (or thread) that does not share our descriptor table. */
int processes_find(process_test test, void *argument);
/* The first descriptor of pid of which test is true, or -1. */
int descriptors_find(pid_t pid, descriptor_test test, const struct search *search);
int descriptors_readable(pid_t pid);

/* The number behind field at the beginning of a line, or 0. */
long file_field(const char *file, const char *field);
/* Whether a line of file contains part, or ends in path (if not empty). */
int file_has_line_with(const char *file, const char *part, const char *path);

#endif
