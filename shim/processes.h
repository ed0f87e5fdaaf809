/* Walks over /proc: processes, threads with a descriptor table of their own, and descriptors. */
#ifndef FLOCKSHIM_PROCESSES_H
#define FLOCKSHIM_PROCESSES_H

#include <stddef.h>
#include <sys/types.h>

struct search;

/* Both return nonzero when found; directory is an open /proc/PID/fd. */
typedef int (*process_test)(struct search *search, pid_t pid);
typedef int (*descriptor_test)(struct search *search, pid_t pid, int directory, int number);

/* Nonzero as soon as test is so of a process (or thread) that does not share our descriptor table;
 * -errno (other than -1) where we have not the means to look. */
int processes_find(process_test test, struct search *search);

/* The first descriptor of pid of which test is true, -1 where there is none, or as above. */
int descriptors_find(pid_t pid, descriptor_test test, struct search *search);

/* Whether pid is alive and nothing of it may be looked at. */
int process_is_hidden(pid_t pid);

/* The number, to this base, behind field at the beginning of a line; or -1. */
long file_field(const char *file, const char *field, int base);

/* /proc/PID/maps, whole. */
struct mapped_text {
    char *text;
    size_t size;
};

int mapped_text_read(struct mapped_text *maps, const char *file);
void mapped_text_free(struct mapped_text *maps);
/* Whether part stands in it, or path (if not empty) at the end of a line. */
int mapped_text_mentions(const struct mapped_text *maps, const char *part, const char *path);

#endif
